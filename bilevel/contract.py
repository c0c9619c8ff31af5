"""Checks that a problem and an optimizer keep their contract, run before they can mislead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bilevel.errors import ConfigurationError, ProblemError
from bilevel.random import Key
from bilevel.tree import is_differentiable, named_leaves, partition

if TYPE_CHECKING:
    from bilevel.inner import InnerLoop


def check_params(params: Any) -> None:
    """Raise `ProblemError` unless `params` are floating-point tensors, all of one dtype."""
    leaves = named_leaves(params)
    for name, leaf in leaves:
        if not is_differentiable(leaf):
            raise ProblemError(
                f"init returned {_kind(leaf)} at {name!r}; parameters must be floating-point "
                "tensors"
            )
    dtypes = {leaf.dtype for _, leaf in leaves}
    if len(dtypes) != 1:
        raise ProblemError(
            f"init returned parameters of dtypes {sorted(map(str, dtypes))}; there must be "
            "at least one parameter, and all of one dtype"
        )


def check_scalar(value: Any, name: str) -> Tensor:
    """`value`, or `ProblemError` unless it is a floating-point scalar tensor."""
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        raise ProblemError(
            f"{name} returned {_kind(value)}; it must be a floating-point scalar tensor"
        )
    return value


def check_inner_loss(inner: InnerLoop, outer: Any, key: Key, *, twice: bool = True) -> None:
    """Find an inner loss that would make every hypergradient silently wrong.

    It is evaluated once by plain autograd at θ_0, on a batch cut off the outer variables.

    Args:
        inner: The inner loop.
        outer: The outer variables as the user holds them, so that a closure over them is found.
        key: The randomness of the first run.
        twice: Whether it must be differentiable twice.

    Raises:
        ProblemError: It does not depend on its parameters, depends on outer variables other than
            through the batch, writes in place, draws from a global generator, or has an operation
            that can be differentiated only once.
    """
    given, rebuild_outer = partition(outer)
    leaves = [leaf.detach().clone().requires_grad_() for leaf in given]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        frozen = rebuild_outer([leaf.detach() for leaf in leaves])
        start = inner.start(frozen, key, inner.hyperparameters(frozen))
    params = start.params.detach().clone().requires_grad_()
    device_state = torch.cuda.get_rng_state(params.device) if params.is_cuda else None
    with torch.enable_grad():
        batch = inner.batch(rebuild_outer(leaves), 0, key)
        inputs, rebuild_batch = partition(batch, lambda leaf: isinstance(leaf, Tensor))
        inputs = [leaf.detach().clone() for leaf in inputs]
        try:
            loss = inner.loss(params, rebuild_batch(inputs))
        except RuntimeError as error:
            if "inplace" in str(error).replace("-", ""):
                raise ProblemError(f"inner_loss writes to its params in place: {error}") from error
            raise
        once = _differentiable_once(loss) if twice else ""
        suspects = [*leaves, *(leaf for leaf in given if leaf.requires_grad)]
        grads: tuple[Tensor | None, ...] = (None,)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, [params, *suspects], allow_unused=True)
    if not torch.equal(random_state, torch.get_rng_state()) or (
        device_state is not None
        and not torch.equal(device_state, torch.cuda.get_rng_state(params.device))
    ):
        raise ProblemError(
            "init, inner_batch or inner_loss draws from PyTorch's global generator, as dropout "
            "does, so a step that is run again would differ: draw from the generator that init and "
            "inner_batch are given, and put the module in eval mode"
        )
    if any(leaf._version for leaf in inputs):
        raise ProblemError("inner_loss writes to its batch in place; make a new tensor instead")
    if grads[0] is None:
        raise ProblemError(
            "inner_loss does not depend on the params it is given; call the model through "
            "torch.func.functional_call(module, params, inputs)"
        )
    if once:
        raise ProblemError(
            f"inner_loss uses {once}, whose backward is marked @once_differentiable: its second "
            "derivative would be taken as zero; bilevel.estimators.FiniteDifference needs none"
        )
    if any(grad is not None for grad in grads[1:]):
        raise ProblemError(
            "inner_loss depends on outer variables other than through tensors of its batch, where "
            "their derivative would be lost: return them from inner_batch in a pytree (dict, "
            f"list, tuple), which a {type(batch).__name__} may not be"
        )


def settle(transformation: Any, device: torch.device, *, check: bool) -> None:
    """Make a TorchOpt transformation a pure function of its state.

    TorchOpt 0.7.3's momentum keeps a first-call flag outside its state, which would change what
    a step gives when it is run again or when the transformation is made anew for every step. One
    discarded update spends it. Without dampening a zero buffer then gives the same first step.

    Args:
        transformation: Any transformation; only TorchOpt's are touched.
        device: Where its hyperparameters live.
        check: Also compare the first step with one that is run again.

    Raises:
        ConfigurationError: The flag changes the first step, as it does with dampening.
    """
    if not getattr(transformation.update, "__module__", "").startswith("torchopt"):
        return
    probe = torch.ones(1, device=device)
    state = transformation.init(probe)
    with torch.no_grad():
        first, *again = (
            transformation.update(probe.clone(), state, params=probe, inplace=False)[0]
            for _ in range(2 if check else 1)
        )
    if check and not torch.equal(first, again[0]):
        raise ConfigurationError(
            "this TorchOpt optimizer keeps a first-call flag outside its state that changes its "
            "first step (momentum with dampening does), so an inner run could not be repeated: "
            "use dampening=0"
        )


def _differentiable_once(value: Tensor) -> str:
    """The name of an `autograd.Function` in the graph of `value` that refuses a second derivative.

    PyTorch itself raises only where the incoming gradient requires one, not where saved tensors do.
    """
    nodes, seen = [value.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if getattr(getattr(function, "backward", None), "__code__", None) is _ONCE:
            return str(function.__name__)  # type: ignore[union-attr]
        nodes += [parent for parent, _ in node.next_functions]
    return ""


#: The code that `once_differentiable` puts around every backward it marks.
_ONCE = once_differentiable(lambda *args: None).__code__


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}"
