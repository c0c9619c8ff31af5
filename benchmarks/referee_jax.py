"""JAX's side of `referee.py`: the same problems in an environment without PyTorch.

    python referee_jax.py FORM METHOD DATA FOLDER

DATA.npz is what `RefereeProblem.tensors` holds, DATA.json its numbers. METHOD is "jax", one
jit-compiled scan differentiated by autodiff, with optax's SGD; or "jaxopt", the same run behind
`custom_root` with 20 iterations of conjugate gradients. It answers every line {"rate": …,
"seconds": …} with one of JSON: φ_0 is read from FOLDER/start.npz, every φ written to
FOLDER/positions.npz.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inner_jax import Data, Tree, cross_entropy, unrolled  # first: it sets JAX's environment

# isort: split
import jax
import jax.numpy as jnp
import numpy as np
import optax

ITERATIONS = 20


def losses(form: str, data: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(ℓ(θ, φ, t), F(θ, φ))."""
    if form == "quadratic":

        def quadratic(params: Tree, outer: Tree, step: Any) -> Any:
            theta = params["theta"]
            return 0.5 * theta @ data.a @ theta - theta @ (data.b @ outer["phi"])

        def distance(params: Tree, outer: Tree) -> Any:
            far = ((params["theta"] - data.target) ** 2).sum()
            return 0.5 * far + 0.05 * (outer["phi"] ** 2).sum()

        return quadratic, distance
    if form == "logistic":

        def logistic(params: Tree, outer: Tree, step: Any) -> Any:
            fit = optax.sigmoid_binary_cross_entropy(data.x @ params["w"], data.y).mean()
            return fit + 0.5 * (jax.nn.sigmoid(outer["penalty"]) * params["w"] ** 2).sum()

        def held_out(params: Tree, outer: Tree) -> Any:
            scores = data.held_out_x @ params["w"]
            return optax.sigmoid_binary_cross_entropy(scores, data.held_out_y).mean()

        return logistic, held_out

    def outputs(params: Tree, x: Any) -> Any:
        first = x @ params["w"].T
        return jnp.tanh(first) @ params["v"].T if form == "network" else first

    def cleaning(params: Tree, outer: Tree, step: Any) -> Any:
        weights = jax.nn.sigmoid(outer["scores"])
        fit = (weights * cross_entropy(outputs(params, data.x), data.y)).mean()
        return fit + 0.005 * (params["w"] ** 2).sum()

    def clean(params: Tree, outer: Tree) -> Any:
        return cross_entropy(outputs(params, data.held_out_x), data.held_out_y).mean()

    return cleaning, clean


def implicit(
    inner: Callable[..., Any], outer_loss: Callable[..., Any], data: Data
) -> Callable[[Tree], Any]:
    """The gradient where the run ends, taken for an optimum."""
    from jaxopt import linear_solve
    from jaxopt.implicit_diff import custom_root

    settings = data.settings
    optimizer = optax.sgd(settings["rate"], momentum=settings["momentum"] or None)

    def solve(matvec: Callable[..., Any], b: Any) -> Any:
        return linear_solve.solve_cg(matvec, b, maxiter=ITERATIONS, tol=0.0)

    @custom_root(jax.grad(inner), solve=solve)
    def run(start: Any, outer: Tree, step: int) -> Any:
        def advance(carry: Any, step: Any) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(inner)(params, outer, step), state)
            return (optax.apply_updates(params, updates), state), None

        carry = data.start, optimizer.init(data.start)
        return jax.lax.scan(advance, carry, jnp.arange(settings["steps"]))[0][0]

    return jax.jit(jax.grad(lambda outer: outer_loss(run(None, outer, 0), outer)))


def main() -> None:
    form, method, path, folder = sys.argv[1:5]
    begin = time.process_time()
    answers, sys.stdout = sys.stdout, sys.stderr  # What a library prints is no answer.
    data = Data(Path(path))
    both = losses(form, data)
    implicitly = method == "jaxopt"
    gradient = implicit(*both, data) if implicitly else unrolled(*both, data, remat=False)

    @jax.jit
    def advance(outer: Tree, rate: Any) -> Tree:
        slope = gradient(outer)
        return {name: value - rate * slope[name] for name, value in outer.items()}

    def descend(rate: float, seconds: float) -> dict[str, Any]:
        with np.load(Path(folder) / "start.npz") as held:
            outer = {name: jnp.asarray(held[name]) for name in held.files}
        positions, times, start = [], [], time.process_time()
        while time.process_time() - start < seconds or not positions:
            outer = advance(outer, rate)
            positions.append({name: np.asarray(value) for name, value in outer.items()})
            times.append(time.process_time() - start)
        stacked = {name: np.stack([each[name] for each in positions]) for name in outer}
        np.savez(Path(folder) / "positions.npz", **stacked)
        return {"seconds": times}

    jax.block_until_ready(advance(data.outer, 0.0))
    print(json.dumps({"first": time.process_time() - begin}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(descend(**json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
