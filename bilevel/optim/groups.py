"""Parts of the parameters with an optimizer of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, final

import optree
from torch import Tensor
from torchopt.base import GradientTransformation

from bilevel.errors import ConfigurationError
from bilevel.optim.base import Rule, transformation_of
from bilevel.optim.composition import check_transformation, freeze
from bilevel.optim.hyperparameters import named

#: Which leaves a group has: by name, or a function of (name, leaf).
Pattern = str | Callable[[str, Tensor], bool]


def groups(parts: Mapping[Pattern, GradientTransformation | None]) -> GradientTransformation:
    """A transformation for each part of the parameters.

    The name of a leaf is its path, `layers/0/weight`, or what it is called in a flat dict such as
    that of `fresh_parameters`, `layers.0.weight`. A pattern is the name of a leaf; or its
    beginning, up to a slash or a dot, as in `"layers"`; or a glob, as in `"*bias"` or `"*"`, in
    which `*` stands for anything, slashes and dots too; or a function of (name, leaf), which may
    look at shapes but not at values. Each leaf belongs to the first pattern that it fits.

    A transformation sees the whole tree, with None in place of the leaves of the others. Norms are
    taken over its own leaves, and pytrees of hyperparameters are like the whole tree.

    Args:
        parts: Transformations by pattern, in the order in which patterns are tried. None, or
            `freeze()`, leaves its part as it is.

    Raises:
        ConfigurationError: A part is no transformation; when it sees the parameters, a leaf fits
            no pattern, or a pattern gets no leaf. The message names it.

    Example:
        >>> params = {"head": torch.ones(2), "trunk": {"weight": torch.ones(2, 2)}}
        >>> optimizer = bilevel.optim.groups({"head": bilevel.optim.sgd(0.1), "trunk": None})
        >>> updates, _ = optimizer.update(params, optimizer.init(params), params=params)
        >>> updates["head"], updates["trunk"]["weight"][0]
        (tensor([-0.1000, -0.1000]), tensor([0., 0.]))
    """
    if not isinstance(parts, Mapping) or not parts:
        raise ConfigurationError(
            f"groups({parts!r}): it must be a dict of transformations by pattern, such as "
            '{"head": bilevel.optim.sgd(0.1), "*": None}'
        )
    for pattern, part in parts.items():
        if not isinstance(pattern, str) and not callable(pattern):
            raise ConfigurationError(
                f"groups has the pattern {pattern!r}; it must be a string, or a function of the "
                "name and the leaf"
            )
        if part is not None:
            check_transformation(f"the part {_shown(pattern)} of groups", part)
    transformations = [freeze() if part is None else part for part in parts.values()]
    return transformation_of(Groups(tuple(parts), tuple(transformations)))


@final
@dataclass(frozen=True, eq=False)
class Groups(Rule):
    """The rule of `groups`. There is no vector form, since names and parts are of the tree."""

    patterns: tuple[Pattern, ...]
    transformations: tuple[Any, ...]

    def start(self, params: Any) -> Any:
        members = self._members(params)
        return tuple(
            each.init(_only(params, own))
            for each, own in zip(self.transformations, members, strict=True)
        )

    def step(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        members = self._members(grads)
        leaves, spec = optree.tree_flatten(grads)
        after = []
        for each, inner, own in zip(self.transformations, state, members, strict=True):
            updates, inner = each.update(
                _only(grads, own),
                inner,
                params=None if params is None else _only(params, own),
                inplace=False,
            )
            for index, update in zip(own, optree.tree_leaves(updates), strict=True):
                leaves[index] = update
            after.append(inner)
        return optree.tree_unflatten(spec, leaves), tuple(after)

    def on_vector(self, like: Any) -> None:
        return None

    def _members(self, params: Any) -> list[list[int]]:
        """The indices of the leaves of each part."""
        found: list[list[int]] = [[] for _ in self.patterns]
        leaves = named(params)
        for index, (name, leaf) in enumerate(leaves):
            fits = (i for i, pattern in enumerate(self.patterns) if _fits(pattern, name, leaf))
            chosen = next(fits, None)
            if chosen is None:
                raise ConfigurationError(
                    f"groups has no part for {name!r}: its patterns are "
                    f'{", ".join(map(_shown, self.patterns))}; add one, or "*" for all the rest'
                )
            found[chosen].append(index)
        for pattern, own in zip(self.patterns, found, strict=True):
            if not own:
                raise ConfigurationError(
                    f"groups has the pattern {_shown(pattern)}, which no leaf fits first: the "
                    f"parameters are {', '.join(repr(name) for name, _ in leaves[:20])}"
                )
        return found


def _only(tree: Any, members: list[int]) -> Any:
    """The tree with None in place of every leaf that is not among `members`."""
    leaves, spec = optree.tree_flatten(tree)
    kept = set(members)
    return optree.tree_unflatten(
        spec, [leaf if index in kept else None for index, leaf in enumerate(leaves)]
    )


def _fits(pattern: Pattern, name: str, leaf: Tensor) -> bool:
    if not isinstance(pattern, str):
        return bool(pattern(name, leaf))
    return (
        name == pattern
        or name.startswith((f"{pattern}/", f"{pattern}."))
        or (any(sign in pattern for sign in "*?[") and fnmatchcase(name, pattern))
    )


def _shown(pattern: Pattern) -> str:
    return repr(pattern) if isinstance(pattern, str) else getattr(pattern, "__name__", "(function)")
