"""What a problem holds: everything that its methods can reach without being given it."""

from __future__ import annotations

import array
import functools
import sys
import types
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, final

import numpy as np
from torch import Tensor, nn

#: How to get at a part of something: (function of a container and a key, container, key).
Place = tuple[Callable[[Any, Any], Any], Any, Any]

#: From so many items on, a list of numbers or strings is compared as a whole.
LONG = 1000

_ABSENT = object()


@final
class Snapshot:
    """Everything reachable from some objects, as it was: has any of it been replaced or changed?

    Attributes, items of containers, closures, defaults and globals of functions, class attributes,
    and so on down: by identity, or by equality where that is cheap; tensors also by version, so
    that writing in place is noticed; numpy's arrays by a checksum. What libraries hold is left out.
    """

    def __init__(self, *roots: Any) -> None:
        self._places: list[tuple[Place, Any]] = []
        self._sizes: list[tuple[Any, int]] = []
        self._orders: list[tuple[dict[Any, Any], list[Any]]] = []
        self._versions: list[tuple[Tensor, int]] = []
        self._copies: list[tuple[Sequence[Any], list[Any]]] = []
        self._checksums: list[tuple[np.ndarray | array.array[Any] | bytearray, int]] = []
        for _, value, place in reachable(*roots):
            if place is not None:
                self._places.append((place, value))
            if isinstance(value, Tensor):
                self._versions.append((value, value._version))
            elif isinstance(value, np.ndarray | array.array | bytearray):
                self._checksums.append((value, _checksum(value)))
            elif _is_long(value):
                self._copies.append((value, list(value)))
            elif isinstance(value, dict):
                self._orders.append((value, list(value)))
            elif isinstance(value, list | set | deque):
                self._sizes.append((value, len(value)))

    def unchanged(self) -> bool:
        """Whether all of it is as it was."""
        for (get, container, key), value in self._places:
            try:
                now = get(container, key)
            except IndexError:
                return False
            if now is not value and not _is_same(now, value):
                return False
        return (
            all(tensor._version == version for tensor, version in self._versions)
            and all(len(value) == size for value, size in self._sizes)
            and all(_has_keys(value, keys) for value, keys in self._orders)
            and all(list(value) == copy for value, copy in self._copies)
            and all(_checksum(values) == checksum for values, checksum in self._checksums)
        )


def modules_held_by(owner: object) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the methods of `owner` can reach, outermost ones only, by readable names."""
    inside: set[int] = set()
    for name, value, _ in reachable(owner):
        if isinstance(value, nn.Module) and id(value) not in inside:
            inside.update(id(part) for part in value.modules())
            yield name, value


def reachable(*roots: Any) -> Iterator[tuple[str, Any, Place | None]]:
    """(a readable name, a thing, where it was found) for all that is reachable, each thing once.

    Numbers and strings come once for every place that they are found in. Classes, functions and
    modules of libraries are taken for what they are, not looked into.
    """
    is_library = _Libraries(roots)
    seen: set[int] = set()
    waiting: list[tuple[str, Any, Place | None]] = [("", root, None) for root in reversed(roots)]
    while waiting:
        name, value, place = waiting.pop()
        yield name, value, place
        if isinstance(value, str | bytes | int | float | complex | Tensor | type(None)):
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        parts = list(_parts(name, value, is_library))
        waiting += reversed(parts)


@final
class _Libraries:
    """Whether a class, a function or a module is of a library: of Python's, or an installed one.

    The packages that the objects come from which are looked at are none.
    """

    def __init__(self, objects: Sequence[object]) -> None:
        self._own = {_package(x) for x in objects} | {_package(type(x)) for x in objects}
        self._own.add("abc")  # where a Problem says it is from that was made by `type(…)`
        # This package keeps what it has looked at already, which changes nothing.
        self._known: dict[str, bool] = {__name__.split(".")[0]: True}

    def __call__(self, value: Any) -> bool:
        package = _package(value)
        if package not in self._known:
            file = str(getattr(sys.modules.get(package), "__file__", "") or "")
            self._known[package] = package not in self._own and (
                package in sys.stdlib_module_names or "site-packages" in file
            )
        return self._known[package]


def _package(value: Any) -> str:
    name = getattr(value, "__name__" if isinstance(value, types.ModuleType) else "__module__", "")
    return str(name).split(".")[0]


def _parts(
    name: str, value: Any, is_library: Callable[[Any], bool]
) -> Iterable[tuple[str, Any, Place]]:
    """What is directly inside something."""
    if isinstance(value, dict):
        return [
            (f"{name}[{key!r}]", part, (dict.get, value, key)) for key, part in list(value.items())
        ]
    if _is_long(value):
        return []
    if isinstance(value, list | tuple | deque):
        get = type(value).__getitem__
        return [(f"{name}[{i}]", part, (get, value, i)) for i, part in enumerate(value)]
    if isinstance(value, set | frozenset):
        return [(name, part, (_member, value, part)) for part in value]
    if isinstance(value, np.ndarray):
        items = value.ravel().tolist() if value.dtype == object else []
        return [(f"{name}[{i}]", item, (_item, value, i)) for i, item in enumerate(items)]
    if isinstance(value, weakref.ref):
        return [(name, value(), (_referred, value, None))]
    if isinstance(value, functools.partial):
        return [_attribute(name, value, key) for key in ("func", "args", "keywords")]
    if isinstance(value, types.MethodType):
        return [_attribute(name, value, key) for key in ("__self__", "__func__")]
    if isinstance(value, types.FunctionType):
        return [] if is_library(value) else _parts_of_function(name, value, is_library)
    if isinstance(value, type):
        return _parts_of_class(name, value, is_library)
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | types.CodeType):
        return []
    return _parts_of_object(name, value, is_library)


def _parts_of_function(
    name: str, function: Any, is_library: Callable[[Any], bool]
) -> Iterator[tuple[str, Any, Place]]:
    for key in ("__code__", "__defaults__", "__kwdefaults__", "__dict__"):
        yield _attribute(name, function, key)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=False)
    for variable, cell in cells:
        contents = _contents(cell, None)
        if contents is not _ABSENT:
            yield variable, contents, (_contents, cell, None)
    names = _names(function.__code__)
    for variable in sorted(names - function.__globals__.keys()):
        # It may later be defined, also in front of a builtin.
        yield variable, None, (dict.get, function.__globals__, variable)
    for variable in sorted(names & function.__globals__.keys()):
        found = function.__globals__[variable]
        yield variable, found, (dict.get, function.__globals__, variable)
        if isinstance(found, types.ModuleType) and not is_library(found):
            # Of a module, what the function may look up in it.
            for key in sorted(names & vars(found).keys()):
                yield f"{variable}.{key}", vars(found)[key], (_get, found, key)


def _parts_of_object(
    name: str, value: Any, is_library: Callable[[Any], bool]
) -> Iterator[tuple[str, Any, Place]]:
    prefix = f"{name}." if name else ""
    held = getattr(value, "__dict__", {})
    if isinstance(held, dict):
        for key, part in list(held.items()):
            if isinstance(value, nn.Module) and key in ("_parameters", "_buffers", "_modules"):
                for own, held_part in part.items():
                    yield prefix + own, held_part, (dict.get, part, own)
            else:
                yield prefix + key, part, (dict.get, held, key)
        if isinstance(value, nn.Module) and "forward" not in held:
            # Of a library's class, it may later be replaced on the object itself.
            yield f"{prefix}forward", None, (dict.get, held, "forward")
    for key in _names_of_class(type(value), is_library):
        kind = _resolved(type(value), key)
        if isinstance(kind, types.MemberDescriptorType):  # a slot
            part = getattr(value, key, _ABSENT)
            if part is not _ABSENT:
                yield prefix + key, part, (_get, value, key)
        elif isinstance(kind, functools.cached_property):
            yield prefix + key, kind.func, (_found_in_class, type(value), key)
        elif key not in held:
            # A method may later be replaced on the object itself, or lower down in its classes.
            yield prefix + key, _found(value, key), (_found, value, key)


def _parts_of_class(
    name: str, owner: type, is_library: Callable[[Any], bool]
) -> Iterator[tuple[str, Any, Place]]:
    for key in _names_of_class(owner, is_library):
        yield f"{name}.{key}", _unwrapped(_resolved(owner, key)), (_found_in_class, owner, key)


def _names_of_class(owner: type, is_library: Callable[[Any], bool]) -> list[str]:
    """What the classes of a user have, their own and that of their bases which are not ours."""
    users = [c for c in owner.__mro__ if not (is_library(c) or c.__module__ == "bilevel.problem")]
    names = dict.fromkeys(key for each in users for key in list(vars(each)))
    return [key for key in names if not key.startswith("__") or key == "__call__"]


def _resolved(owner: type, key: str) -> Any:
    """What an attribute of a class is, as it was written."""
    for each in owner.__mro__:  # A generator here takes most of the time of `unchanged`.
        if key in each.__dict__:
            return each.__dict__[key]
    return _ABSENT


def _unwrapped(part: Any) -> Any:
    """The function inside a method's wrapper."""
    if isinstance(part, types.FunctionType):
        return part
    if isinstance(part, staticmethod | classmethod):
        return part.__func__
    if isinstance(part, functools.cached_property):
        return part.func
    return part.fget if isinstance(part, property) else part


def _found_in_class(owner: type, key: str) -> Any:
    return _unwrapped(_resolved(owner, key))


def _found(value: Any, key: str) -> Any:
    own = getattr(value, "__dict__", {})
    return own[key] if key in own else _found_in_class(type(value), key)


def _is_long(value: Any) -> bool:
    """Whether it is a long list of numbers or strings, which has no parts to look into."""
    return (
        isinstance(value, list | tuple)
        and len(value) > LONG
        and all(isinstance(item, str | bytes | int | float) for item in value)
    )


def _attribute(name: str, value: Any, key: str) -> tuple[str, Any, Place]:
    return name, getattr(value, key), (_get, value, key)


def _get(value: Any, key: str) -> Any:
    return getattr(value, key, _ABSENT)


def _contents(cell: Any, _: None) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # It is still empty.
        return _ABSENT


def _item(values: np.ndarray, index: int) -> Any:
    return values.flat[index]


def _referred(reference: weakref.ref[Any], _: None) -> Any:
    return reference()


def _member(value: Any, part: Any) -> Any:
    return part if part in value else _ABSENT


def _names(code: types.CodeType) -> set[str]:
    """The names that a function, or one inside it, looks up outside itself."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _has_keys(value: dict[Any, Any], keys: list[Any]) -> bool:
    """Whether a dict has these keys, in this order."""
    return len(value) == len(keys) and all(
        now is before or _is_same(now, before)
        for now, before in zip(value.copy(), keys, strict=False)
    )


def _is_same(now: Any, before: Any) -> bool:
    return (
        isinstance(before, str | int | float | bool) and type(now) is type(before) and now == before
    )


def _checksum(values: np.ndarray | array.array[Any] | bytearray) -> int:
    if isinstance(values, np.ndarray):
        # Objects are looked into one by one.
        return 0 if values.dtype.hasobject else zlib.crc32(np.ascontiguousarray(values).tobytes())
    return zlib.crc32(values)
