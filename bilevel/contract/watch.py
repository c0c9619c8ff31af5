"""Where the graph of what a method returns ends: in its arguments, or somewhere else."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, final

import optree
from torch import Tensor

from bilevel.contract.graph import is_tracing, leaves_behind, leaves_of, nodes_of, nodes_so_far
from bilevel.contract.held import modules_held_by
from bilevel.contract.repeatable import is_same
from bilevel.errors import ProblemError
from bilevel.problem import Problem
from bilevel.tree import (
    is_dense,
    is_differentiable,
    is_variable,
    named_leaves,
    needs_gradient,
    partition,
    tensors_in,
)


@final
class Watch:
    """Calls methods of a problem and looks at where their results come from.

    Args:
        problem: The problem; parameters of modules that it holds are taken for constants.
        optimizer: The optimizer, of which the same holds.

    Attributes:
        remarks: Sentences for the status: modules whose parameters are held constant.
    """

    def __init__(self, problem: object, optimizer: object) -> None:
        self.remarks: list[str] = []
        self._problem, self._optimizer = problem, optimizer
        self._modules = dict(modules_held_by(problem))

    def begin(self, outer: Any) -> None:
        """A run begins; `outer` is φ as the user holds it."""
        given = [leaf for leaf in tensors_in(outer) if is_dense(leaf)]
        self._outer = {id(leaf) for leaf in (*given, *leaves_of(given))}
        self._addresses = {leaf.data_ptr() for leaf in given if leaf.numel()}
        #: The private leaves that methods were given.
        self._variables: set[int] = set()
        self._versions = self._versions_of_buffers()

    def __call__(
        self, method: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """`function(*args, **kwargs)`, the method of this name.

        Raises:
            ProblemError: What it returns depends on another tensor that requires a gradient than
                its arguments, and that is no parameter of a module which the problem holds; or the
                method changed a buffer, or one of its arguments.
        """
        if method == "outer_loss":
            self._check_outer_batch(args[-1])
        generator = kwargs.get("generator")
        state = None if generator is None else generator.get_state()
        given = partition(args, needs_gradient)[0]
        own = {id(leaf) for leaf in given if leaf.grad_fn is None}

        def strangers(returned: Any) -> list[Tensor]:
            found = leaves_of(_outputs(method, returned), beyond=given)
            return [leaf for leaf in found if id(leaf) not in own]

        def again() -> list[Tensor]:
            if generator is not None:
                generator.set_state(state)
            return strangers(function(*args, **kwargs))

        since = nodes_so_far()
        arguments = None
        if method != "inner_loss" and not is_tracing():
            arguments = _Arguments(method, args)
        returned = function(*args, **kwargs)
        if arguments is not None:
            arguments.check()
        self.judge(method, strangers(returned), again, args)
        if method != "inner_loss":
            self._check_kept(method, _outputs(method, returned), given, since)
        if method == "init":
            self._remark_shared(returned)
            self._versions = self._versions_of_buffers()
        else:
            self._check_buffers(method)
        return returned

    def judge(
        self,
        method: str,
        strangers: Sequence[Tensor],
        again: Callable[[], Sequence[Tensor]],
        args: Sequence[Any] = (),
    ) -> None:
        """Raise `ProblemError` unless a method may depend on leaves that it was not given.

        It may on parameters of modules, and on what it made itself: a leaf that is another one
        when the method is called again.

        Args:
            method: What errors call it.
            strangers: The leaves.
            again: Calls the method again and returns what it then depends on.
            args: What it was given.
        """
        recurring: set[int] | None = None
        for leaf in strangers:
            if not self._is_outer(leaf):
                module = self._module_of(leaf)
                if module:
                    self._remark(method, module)
                    continue
                if recurring is None:
                    recurring = {id(each) for each in again()}
                if id(leaf) not in recurring:
                    continue
            raise ProblemError(_went_round(method, leaf, args))

    def _check_kept(
        self, method: str, outputs: list[Tensor], given: list[Tensor], since: int
    ) -> None:
        """Raise `ProblemError` if a result depends on φ through nodes from before this call."""
        self._variables.update(id(leaf) for leaf in given if leaf.grad_fn is None)
        nodes = nodes_of(outputs, beyond=given)
        kept = leaves_behind(node for node in nodes if node._sequence_nr() < since)
        if any(id(leaf) in self._variables for leaf in kept):
            raise ProblemError(
                f"{method} depends on outer variables through something that another call, or "
                "another method, has computed from them and kept, so that its derivative would be "
                "lost: compute it anew from the `outer` that this call is given"
            )

    def _is_outer(self, leaf: Tensor) -> bool:
        """Whether a leaf is an outer variable of the user's, or what one was computed from."""
        return id(leaf) in self._outer or (leaf.numel() > 0 and leaf.data_ptr() in self._addresses)

    def _module_of(self, leaf: Tensor) -> str:
        """A name for the module that has this parameter, if the problem or optimizer holds one."""
        for owner, prefix in ((self._problem, type(self._problem).__name__), (self._optimizer, "")):
            for name, module in modules_held_by(owner):
                for path, parameter in module.named_parameters():
                    if parameter is leaf:
                        parts = (prefix, name, path.rpartition(".")[0])
                        return ".".join(part for part in parts if part) or "the optimizer"
        return ""

    def _remark(self, method: str, module: str) -> None:
        remark = (
            f"{method} depends on the parameters of {module}, which are held constant (said once; "
            "requires_grad_(False) says that they are meant to be)"
        )
        if remark not in self.remarks:
            self.remarks.append(remark)

    def _remark_shared(self, params: Any) -> None:
        """Say that one tensor under two names is two parameters: tied weights would be one."""
        names: dict[Any, str] = {}
        for name, leaf in named_leaves(params):
            if not (is_variable(leaf) and leaf.numel()):
                continue
            memory = leaf.data_ptr(), leaf.shape, leaf.stride()
            if memory in names:
                remark = (
                    f"init returned one tensor at {names[memory]!r} and {name!r}: they are two "
                    "parameters that begin alike; return tied weights once, or clone what is meant "
                    "to be two"
                )
                if remark not in self.remarks:
                    self.remarks.append(remark)
            names.setdefault(memory, name)

    def _check_outer_batch(self, batch: Any) -> None:
        if any(map(self._is_outer, leaves_of(partition(batch, needs_gradient)[0]))):
            raise ProblemError(
                "outer_batch holds an outer variable, or something computed from one, whose "
                "derivative would be lost: outer_loss has it in `outer`; or detach it"
            )

    def _check_buffers(self, method: str) -> None:
        """Raise `ProblemError` if a module's buffer is not what it was."""
        for name, (buffer, version) in self._versions_of_buffers().items():
            before = self._versions.get(name)
            if before is None or before[0] is not buffer or before[1] != version:
                raise ProblemError(
                    f"{method} changes the buffer {type(self._problem).__name__}.{name}, so a step "
                    "that is run again would differ: put the module in eval mode, or make the "
                    "buffer a part of the parameters that init returns"
                )

    def _versions_of_buffers(self) -> dict[str, tuple[Tensor, int]]:
        return {
            f"{name}.{path}": (buffer, buffer._version)
            for name, module in self._modules.items()
            for path, buffer in module.named_buffers()
        }


@final
class _Arguments:
    """What a method is given, as it is before the call.

    Args:
        method: Its name.
        args: Its arguments by position.
    """

    def __init__(self, method: str, args: tuple[Any, ...]) -> None:
        self._method, self._args = method, args
        self._names = list(inspect.signature(getattr(Problem, method)).parameters)[1:]
        self._leaves = [optree.tree_flatten(arg) for arg in args]
        # Of an outer batch, which may be large, what PyTorch itself notices must do.
        self._values = [
            [leaf.detach().clone() for leaf in leaves if is_differentiable(leaf)]
            if name != "batch"
            else None
            for name, (leaves, _) in zip(self._names, self._leaves, strict=False)
        ]
        self._versions = [list(map(_version, leaves)) for leaves, _ in self._leaves]

    def check(self) -> None:
        """Raise `ProblemError` if one is not what it was."""
        for index, (leaves, spec) in enumerate(self._leaves):
            name, values = self._names[index], self._values[index]
            now, spec_now = optree.tree_flatten(self._args[index])
            # Parameters come in a container of their own, of which anything may be made.
            is_other = spec_now != spec or any(map(operator.is_not, now, leaves))
            if is_other and name != "params":
                what = f"takes something out of its argument `{name}`, or puts something in"
                advice = "work on a copy of it"
            elif list(map(_version, leaves)) != self._versions[index] or (
                values is not None and not is_same(values, list(filter(is_differentiable, leaves)))
            ):
                what = f"writes to its argument `{name}` in place"
                advice = "make a new tensor instead"
            else:
                continue
            raise ProblemError(
                f"{self._method} {what}, which other methods and other steps are given as well: "
                f"{advice}"
            )


def _version(leaf: object) -> int | None:
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else None


def _outputs(method: str, returned: Any) -> list[Tensor]:
    """What is differentiated of a result: of a loss with metrics, the loss."""
    if method == "outer_loss" and isinstance(returned, tuple):
        returned = returned[0]
    return partition(returned, needs_gradient)[0]


def _went_round(method: str, leaf: Tensor, args: Sequence[Any]) -> str:
    what = f"a tensor of shape {tuple(leaf.shape)} that requires a gradient"
    if method == "the optimizer":
        return (
            f"the optimizer depends on {what}, so its derivative would be lost: return it from "
            "hyperparameters, and give Hypergradient the function that makes the optimizer from "
            "them; or detach it if it is a constant"
        )
    if method == "inner_loss":
        kind = type(args[1])
        opaque = (
            "" if kind in (dict, list, tuple, Tensor) else f", which a {kind.__name__} may not be"
        )
        return (
            "inner_loss depends on outer variables other than through tensors of its batch, where "
            f"their derivative would be lost: {what}. Return it from inner_batch in a pytree "
            f"(dict, list, tuple){opaque}; or detach it if it is a constant"
        )
    return (
        f"{method} depends on {what} and is not among its arguments, so its derivative would be "
        "lost: make it an outer variable and take it from the `outer` that this call is given, "
        "not from what another call has kept; detach it if it is a constant; or hold the module "
        "that it belongs to as an attribute of the problem"
    )
