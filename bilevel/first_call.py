"""What is checked of a problem once, at the first hypergradient, before it can mislead.

`docs/contract.md` says what is checked at every call, and what cannot be checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, final

import optree
import torch
from torch import Tensor

from bilevel.errors import ProblemError
from bilevel.estimators.base import Estimator
from bilevel.graph import differentiable_once, leaves_of
from bilevel.held import modules_held_by
from bilevel.inner import InnerLoop, StepInputs
from bilevel.outer import OuterVariables
from bilevel.random import Key
from bilevel.result import HypergradientResult
from bilevel.trajectory import Iterate
from bilevel.tree import detach, needs_gradient, partition

#: Two results of the same computation may differ by so many rounding units, where sums are split
#: over threads or a device decides their order.
ROUNDING_UNITS = 64


@final
class FirstCall:
    """The checks of one first call.

    Args:
        inner: The inner loop.
        estimator: What it needs decides what is checked.

    Attributes:
        remarks: Sentences for the status: modules whose parameters are held constant.
    """

    def __init__(self, inner: InnerLoop, estimator: Estimator) -> None:
        self.remarks: list[str] = []
        self._inner, self._estimator = inner, estimator
        self._modules = dict(modules_held_by(inner.problem))
        self._buffers = {
            f"{name}.{path}": buffer
            for name, module in self._modules.items()
            for path, buffer in module.named_buffers()
        }
        self._versions = {name: buffer._version for name, buffer in self._buffers.items()}

    def examine(self, method: str, returned: Any, arguments: Any) -> None:
        """Look at what a method returned: does its graph end in its arguments?

        Raises:
            ProblemError: It ends in another tensor that requires a gradient, and that is no
                parameter of a module which the problem holds; or the method changed a buffer.
        """
        outputs = partition(returned, needs_gradient)[0]
        inputs = leaves_of(partition(arguments, needs_gradient)[0])
        known = {id(leaf) for leaf in inputs}
        held = {
            id(parameter): f"{name}.{path}"
            for name, module in self._modules.items()
            for path, parameter in module.named_parameters()
        }
        for leaf in leaves_of(outputs):
            if id(leaf) in known:
                continue
            if id(leaf) not in held:
                raise ProblemError(_went_round(method, leaf, arguments))
            module = held[id(leaf)].rsplit(".", 1)[0]
            remark = (
                f"{method} depends on the parameters of {type(self._inner.problem).__name__}."
                f"{module}, which are held constant (said once; requires_grad_(False) says that "
                "they are meant to be)"
            )
            if remark not in self.remarks:
                self.remarks.append(remark)
        self._check_buffers(method)

    def remarked(self, result: HypergradientResult) -> HypergradientResult:
        """The result with what was noticed in its status."""
        if not self.remarks:
            return result
        status = [] if result.stats.status == "ok" else [result.stats.status]
        stats = replace(result.stats, status="; ".join([*status, *self.remarks]))
        return replace(result, stats=stats)

    def step(
        self,
        variables: OuterVariables,
        key: Key,
        first: Iterate,
        iterate: Iterate,
        inputs: StepInputs,
        step: int,
    ) -> None:
        """Look at one inner step, before it is made: is it the same when it is run again?

        Args:
            variables: φ.
            key: The randomness of the run.
            first: (θ_0, s_0), on the graph of φ.
            iterate: (θ_t, s_t), without a graph.
            inputs: What the step takes of φ.
            step: t. What holds for all steps is looked at in the first.

        Raises:
            ProblemError: The inner loss does not depend on its parameters, writes in place, draws
                from a global generator, differs when it is evaluated again, ends in other tensors
                than its arguments, or has an operation that can be differentiated only once; or,
                where steps are run again for other φ, the initialisation or the batch differs when
                it is made again.
        """
        inner = self._inner
        is_tensor = partition(detach(inputs.batch), lambda leaf: isinstance(leaf, Tensor))
        tensors, rebuild = [leaf.clone() for leaf in is_tensor[0]], is_tensor[1]
        here = iterate.params.detach().clone().requires_grad_()
        with torch.enable_grad(), inner.examined(self.examine, "inner_loss"):
            if step:
                inner.loss(here, rebuild(tensors))
                return
            with _global_generator("inner_loss", here.device):
                try:
                    loss, again = (inner.loss(here, rebuild(tensors)) for _ in range(2))
                except RuntimeError as error:
                    if "inplace" in str(error).replace("-", ""):
                        raise ProblemError(
                            f"inner_loss writes to its params in place: {error}"
                        ) from error
                    raise
        if any(leaf._version for leaf in tensors):
            raise ProblemError("inner_loss writes to its batch in place; make a new tensor instead")
        if not _same(loss.detach(), again.detach()):
            raise ProblemError(
                "inner_loss is no pure function: from the same params and batch it gave "
                f"{float(loss)!r} and then {float(again)!r}. Look for a counter, a generator or "
                "a buffer that it changes (docs/contract.md)"
            )
        if not any(leaf is here for leaf in leaves_of([loss])):
            raise ProblemError(
                "inner_loss does not depend on the params it is given; call the model through "
                "torch.func.functional_call(module, params, inputs)"
            )
        once = differentiable_once(loss) if self._estimator.uses_second_derivatives else ""
        if once:
            raise ProblemError(
                f"inner_loss uses {once}, whose backward is marked @once_differentiable: its "
                "second derivative would be taken as zero; bilevel.estimators.FiniteDifference "
                "needs none"
            )
        if self._estimator.differentiates_optimizer:
            inner.check_optimizer(detach(inputs.hyperparameters))
        if self._estimator.runs_again:
            outer = detach(variables.tree)
            start = partial(inner.start, outer, key, detach(inputs.hyperparameters))
            _check_repeatable("init", first.params, lambda: start().params)
            _check_repeatable("inner_batch", inputs.batch, lambda: inner.inputs(outer, 0, key)[0])

    def _check_buffers(self, method: str) -> None:
        """Raise `ProblemError` if a module's buffer is not what it was."""
        now = {
            f"{name}.{path}": buffer
            for name, module in self._modules.items()
            for path, buffer in module.named_buffers()
        }
        for name, buffer in now.items():
            before = self._buffers.get(name)
            if before is not buffer or buffer._version != self._versions[name]:
                raise ProblemError(
                    f"{method} changes the buffer {type(self._inner.problem).__name__}.{name}, so "
                    "a step that is run again would differ: put the module in eval mode, or make "
                    "the buffer a part of the parameters that init returns"
                )


@torch.no_grad()
def _check_repeatable(method: str, made: Any, make: Callable[[], Any]) -> None:
    """Raise `ProblemError` unless a method makes the same again."""
    try:
        what = "" if _same(detach(made), make()) else "returned something else"
    except Exception as error:
        what = f"raised {type(error).__name__} ({error})"
    if what:
        raise ProblemError(
            f"{method}, called again with the same arguments, {what}. This estimator runs steps "
            "again for other outer variables: draw from the generator that the method is given, "
            "and choose examples by `step` (docs/contract.md)"
        )


def _went_round(method: str, leaf: Tensor, arguments: Any) -> str:
    what = f"a tensor of shape {tuple(leaf.shape)} that requires a gradient"
    if method == "inner_loss":
        batch = arguments[1]
        return (
            "inner_loss depends on outer variables other than through tensors of its batch, where "
            f"their derivative would be lost: {what}. Return it from inner_batch in a pytree "
            f"(dict, list, tuple), which a {type(batch).__name__} may not be; or detach it if it "
            "is a constant"
        )
    return (
        f"{method} depends on {what} and is not among its arguments, so its derivative would be "
        "lost: make it an outer variable and take it from `outer`; detach it if it is a constant; "
        "or hold the module that it belongs to as an attribute of the problem"
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two pytrees are equal up to rounding. What cannot be compared counts as equal."""
    leaves, spec = optree.tree_flatten(one)
    others, other_spec = optree.tree_flatten(other)
    return spec == other_spec and all(map(_same_leaf, leaves, others))


def _same_leaf(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point():
            return torch.equal(one, other)
        tolerance = ROUNDING_UNITS * torch.finfo(one.dtype).eps
        return torch.allclose(one, other, rtol=tolerance, atol=0.0, equal_nan=True)
    try:
        return bool((one == other).all()) if hasattr(one, "all") else bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return True


@contextmanager
def _global_generator(method: str, device: torch.device) -> Iterator[None]:
    """Raise `ProblemError` if PyTorch's global generator is drawn from inside."""

    def states() -> list[Tensor]:
        found = [torch.get_rng_state()]
        return [*found, torch.cuda.get_rng_state(device)] if device.type == "cuda" else found

    before = states()
    yield
    if not all(map(torch.equal, before, states())):
        raise ProblemError(
            f"{method} draws from PyTorch's global generator, as dropout does, so a step that is "
            "run again would differ: draw in inner_batch, from the generator that it is given, and "
            "put the module in eval mode"
        )


#: What PyTorch says of an operation that lacks the derivative that was asked for.
_MISSING = (
    r"derivative for '?(?:aten::)?(?P<name>\w+)",
    r"Trying to use forward AD with (?P<name>\S+) that does not support it",
    r"(?P<name>\w*(?:CuDNN|cudnn)\w*)[^.]*(?:double backward|second derivative)",
    r"[Dd]ouble backward[^.]* (?:not supported|not implemented)[^.]* for (?P<name>\w+)",
    r"Batching rule not implemented for (?:aten::)?(?P<name>\S+)",
)


@contextmanager
def missing_derivatives_named(estimator: object) -> Iterator[None]:
    """Turn PyTorch's errors about an operation into a `ProblemError` that says a way out."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, ProblemError):
            raise
        text = str(error)
        name = type(estimator).__name__
        if "modified by an inplace operation" in text:
            raise ProblemError(
                "a tensor that the derivative of a step needs was written to in place after the "
                f"step was made: a buffer, a counter, or a tensor of the problem ({_first(text)})"
            ) from error
        for pattern in _MISSING:
            found = re.search(pattern, text)
            if found:
                raise ProblemError(
                    f"the operation {found['name'].rstrip('.')} lacks a derivative that {name} "
                    f"needs ({_first(text)}). Write it in other operations, or choose an estimator "
                    "that needs less: FiniteDifference takes first derivatives of the inner loss "
                    "only, EvolutionStrategies none of the outer loss"
                ) from error
        raise


def _first(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else "no message"
