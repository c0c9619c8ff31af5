"""JAX's side of `inner_loops.py`: the same problems in an environment without PyTorch.

    python inner_jax.py PROBLEM METHOD DATA GRADIENT turns|memory

DATA.npz is what `InnerProblem.tensors` holds, DATA.json its numbers; METHOD is "jax", one
jit-compiled scan differentiated by autodiff; "jax-remat", the same with every step recomputed
instead of stored; or, of an implicit problem, "jax" and "jaxopt".
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import peak_memory
from turns import serve

Tree = dict[str, Any]


class Data:
    """The tensors of a problem, dictionaries put together again."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as held:
            arrays = {name: held[name] for name in held.files}
        self.settings: Tree = json.loads(path.with_suffix(".json").read_text())
        groups: dict[str, Tree] = {}
        for name, value in arrays.items():
            group, _, key = name.partition(".")
            if key:
                groups.setdefault(group, {})[key] = jnp.asarray(value)
            else:
                setattr(self, name, jnp.asarray(value))
        self.outer, self.start = groups["outer"], groups.get("start")

    def of_step(self, step: Any, *values: Any) -> tuple[Any, ...]:
        """The rows of a step, or all where the steps share them."""
        if not hasattr(self, "rows"):
            return values
        return tuple(value[self.rows[step]] for value in values)


def cross_entropy(outputs: Any, labels: Any) -> Any:
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def two_layers(params: Tree, x: Any, activation: Callable[[Any], Any]) -> Any:
    return activation(x @ params["w1"].T + params["b1"]) @ params["w2"].T + params["b2"]


def linear(params: Tree, x: Any) -> Any:
    return x @ params["w"].T + params["b"]


def convolution(x: Any, weight: Any, bias: Any) -> Any:
    return jax.lax.conv_general_dilated(x, weight, (1, 1), "SAME") + bias[None, :, None, None]


def average_pool(x: Any) -> Any:
    count, channels, height, width = x.shape
    return x.reshape(count, channels, height // 2, 2, width // 2, 2).mean((3, 5))


def group_norm(x: Any, weight: Any, bias: Any) -> Any:
    mean = x.mean((2, 3), keepdims=True)
    variance = ((x - mean) ** 2).mean((2, 3), keepdims=True)
    normal = (x - mean) / jnp.sqrt(variance + 1e-5)
    return normal * weight[None, :, None, None] + bias[None, :, None, None]


def small_convolutions(params: Tree, x: Any) -> Any:
    for layer in "12":
        x = average_pool(jax.nn.relu(convolution(x, params["c" + layer], params["d" + layer])))
    return linear(params, x.reshape(len(x), -1))


def conv_net(params: Tree, x: Any) -> Any:
    for layer in "123":
        x = convolution(x, params["c" + layer], params["d" + layer])
        x = average_pool(jax.nn.relu(group_norm(x, params["g" + layer], params["h" + layer])))
    return linear(params, x.reshape(len(x), -1))


def sine_network(params: Tree, x: Any) -> Any:
    for layer in range(3):
        x = x @ params[f"w{layer}"] + params[f"b{layer}"]
        x = jax.nn.relu(x) if layer < 2 else x
    return x


def losses(problem: str, data: Data) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(ℓ(θ, φ, t), F(θ, φ))."""

    def weighted(network: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
        def inner(params: Tree, outer: Tree, step: Any) -> Any:
            weights, x, y = data.of_step(step, jax.nn.sigmoid(outer["scores"]), data.x, data.y)
            return (weights * cross_entropy(network(params, x), y)).mean()

        return inner, classified(network)

    def classified(network: Callable[..., Any]) -> Callable[..., Any]:
        return lambda params, outer: cross_entropy(
            network(params, data.held_out_x), data.held_out_y
        ).mean()

    if problem == "tiny":
        return weighted(lambda params, x: two_layers(params, x, jnp.tanh))
    if problem == "cleaning":
        return weighted(linear)
    if problem == "cleaning-mlp":
        return weighted(lambda params, x: two_layers(params, x, jax.nn.relu))
    if problem == "penalties":

        def penalised(params: Tree, outer: Tree, step: Any) -> Any:
            x, y = data.of_step(step, data.x, data.y)
            penalty = sum((jnp.exp(outer[name]) * params[name] ** 2).sum() for name in params)
            return cross_entropy(linear(params, x), y).mean() + 0.5 * penalty

        return penalised, classified(linear)
    if problem == "maml":
        network = jax.vmap(sine_network)

        def squares(params: Tree, outer: Tree, step: Any) -> Any:
            x, y = (data.x[step], data.y[step]) if data.settings["fresh"] else (data.x, data.y)
            return ((network(params, x) - y) ** 2).mean((1, 2)).sum()

        held_out = data.held_out_x, data.held_out_y
        return squares, lambda params, outer: (
            (network(params, held_out[0]) - held_out[1]) ** 2
        ).mean()
    if problem in ("rate", "schedule"):

        def of_digits(params: Tree, outer: Tree, step: Any) -> Any:
            x, y = data.of_step(step, data.x, data.y)
            return cross_entropy(small_convolutions(params, x), y).mean()

        return of_digits, classified(small_convolutions)

    def distilled(params: Tree, outer: Tree, step: Any) -> Any:
        x, y = data.of_step(step, outer["x"], data.y)
        return cross_entropy(conv_net(params, x), y).mean()

    return distilled, classified(conv_net)


def unrolled(
    inner: Callable[..., Any], outer_loss: Callable[..., Any], data: Data, remat: bool
) -> Callable[[Tree], Any]:
    """The gradient of F through one scan."""
    settings = data.settings
    first = settings["steps"] - settings["window"]

    def optimizer(rate: Any) -> Any:
        if settings["optimizer"] == "adam":
            return optax.adam(rate, eps_root=1e-12)
        return optax.sgd(rate, momentum=settings["momentum"] or None)

    def run(outer: Tree) -> Any:
        if data.start is None:
            tasks = len(data.held_out_x)
            params = {k: jnp.broadcast_to(v, (tasks, *v.shape)) for k, v in outer.items()}
        else:
            params = data.start

        def rate(step: Any) -> Any:
            if "log_rate" not in outer:
                return settings["rate"]
            return jnp.exp(outer["log_rate"][step] if settings["scheduled"] else outer["log_rate"])

        def advance(carry: Any, step: Any) -> Any:
            params, state = carry
            gradient = jax.grad(inner)(params, outer, step)
            updates, state = optimizer(rate(step)).update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer(rate(0)).init(params)
        if first:
            carry, _ = jax.lax.scan(advance, carry, jnp.arange(first))
            carry = jax.lax.stop_gradient(carry)
        recorded = jax.checkpoint(advance) if remat else advance
        carry, _ = jax.lax.scan(recorded, carry, jnp.arange(first, settings["steps"]))
        return outer_loss(carry[0], outer)

    return jax.jit(jax.grad(run))


def implicit(problem: str, iterations: int, data: Data, jaxopt: bool) -> Callable[[Tree], Any]:
    """The gradient at an inner optimum, with that many iterations of conjugate gradients."""
    inner, outer_loss = losses(problem, data)
    if jaxopt:
        from jaxopt import linear_solve
        from jaxopt.implicit_diff import custom_root

        def solve(matvec: Callable[..., Any], b: Any) -> Any:
            return linear_solve.solve_cg(matvec, b, maxiter=iterations, tol=0.0)

        @custom_root(jax.grad(inner), solve=solve)
        def optimum(start: Tree, outer: Tree, step: int) -> Any:
            return data.start

        return jax.jit(jax.grad(lambda outer: outer_loss(optimum(data.start, outer, 0), outer)))

    def run(outer: Tree) -> Any:
        _, product = jax.linearize(lambda p: jax.grad(inner)(p, outer, 0), data.start)
        slope = jax.grad(outer_loss)(data.start, outer)
        x, _ = jax.scipy.sparse.linalg.cg(product, slope, maxiter=iterations, tol=0.0)
        _, pull = jax.vjp(lambda o: jax.grad(inner)(data.start, o, 0), outer)
        return pull(jax.tree.map(jnp.negative, x))[0]

    return jax.jit(run)


def main() -> None:
    problem, method, path, gradient, memory = sys.argv[1:6]
    data = Data(Path(path))

    def make() -> Callable[[], Any]:
        if problem.startswith("implicit"):
            function = implicit("penalties", data.settings["iterations"], data, method == "jaxopt")
        else:
            function = unrolled(*losses(problem, data), data, method == "jax-remat")

        def call() -> list[Any]:
            found = jax.block_until_ready(function(data.outer))
            return [found[name] for name in data.outer]

        return call

    if memory == "memory":
        call = make()
        call()
        print(json.dumps({"MB": peak_memory(call)}))
        return
    serve(make, Path(gradient))


if __name__ == "__main__":
    main()
