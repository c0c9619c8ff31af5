"""What a user's configuration says, and where; and what of it says nothing to anybody."""

import inspect
import re
from functools import partial
from pathlib import Path

import gin
from dd.gin_text import (
    COMMAND_LINE,
    ConfigError,
    Place,
    names_set,
    nearest,
    parameters,
    parse,
    parse_text,
    registered,
    registered_names,
)

#: Where parameters and macros are set.
_places: dict[str, Place] = {}
#: The files that the user named, not those they include, and the command line.
_by_user: set[str] = set()

#: What a parameter is by default. Each may be set like what is named.
DEFAULTS = {
    "RealImages.precision": "Precision",
    "Distiller.objective": "RealImages",
    "Distiller.estimator": "Adjoint",
}


def begin() -> None:
    """Forget the configuration before."""
    _places.clear()
    _by_user.clear()


def read_file(path: Path) -> None:
    """Have gin parse a file that the user named."""
    _by_user.add(str(path))
    _places.update(parse(path))


def read_binding(binding: str) -> None:
    """Have gin parse a binding of the command line.

    Raises:
        ConfigError: It binds nothing.
    """
    if re.match(r"\s*include\s+['\"]", binding):
        raise ConfigError(f"{COMMAND_LINE}={binding!r}: a file is given by --gin_file")
    _by_user.add(COMMAND_LINE)
    parse_text(binding, COMMAND_LINE)
    if not re.sub("#.*", "", binding).strip():
        raise ConfigError(
            f"{COMMAND_LINE}={binding!r} sets nothing; it is 'NAME.PARAMETER = VALUE'"
        )
    _places.update(names_set(binding, COMMAND_LINE))


def macros_set() -> list[str]:
    """The names of all macros."""
    return [name for name in _places if "." not in name]


def place_of(name: str) -> str:
    """Where a parameter is set, to be put behind its name; empty if that is not known."""
    return f" ({_places[name]})" if name in _places else ""


def _bindings() -> dict[str, str]:
    """What is set, as gin writes it; what it cannot write, such as an infinity, as nothing."""
    written = parameters(gin.config_str())
    parts = [known for known in written if "." in known]
    others = [
        name
        for name in _places
        if name not in written and not any(name.endswith(f".{known}") for known in parts)
    ]
    return {**dict.fromkeys(others, ""), **written}


def refer_to_defaults() -> None:
    """Let gin make the defaults of which something is set, which else would have no effect."""
    for parameter, owner in DEFAULTS.items():
        bindings = _bindings()
        is_set = any(name.startswith(f"{owner}.") for name in bindings)
        if is_set and parameter not in bindings:
            gin.parse_config(f"{parameter} = @{owner}()")


def _macros_used() -> dict[str, list[str]]:
    """The macros that the value of each parameter, and of each macro, refers to."""
    quoted = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""
    return {
        name: re.findall(r"%([\w./]+)", re.sub(quoted, "", value))
        for name, value in parameters(gin.config_str()).items()
    }


def user_of(macro: str) -> str:
    """ " in " a parameter that refers to a macro, and where that is set; empty if there is none."""
    for name, used in _macros_used().items():
        if macro in used:
            return f" in {name}{place_of(name)}"
    return ""


def check_macros_end() -> None:
    """Refuse macros that refer to themselves, in whatever many steps."""
    used = _macros_used()
    for name in macros_set():
        reached, waiting = set[str](), [name]
        while waiting:
            found = {each for each in used.get(waiting.pop(), ()) if each not in reached}
            reached |= found
            waiting += found
        if name in reached:
            through = " and ".join(sorted(reached))
            raise ConfigError(f"{_places[name]}: {name} refers to itself, through {through}")


def check_all_is_known() -> None:
    """Refuse macros and scopes of the user's to which nothing refers: they are misspelt."""
    bindings = _bindings()
    values = " ".join(bindings.values())
    macros = set(re.findall(r"%([\w./]+)", values))
    scopes = set(re.findall(r"@([\w./]+)/\w", values))
    for name, place in _places.items():
        if place.file not in _by_user:
            continue
        scope = name.rpartition("/")[0]
        if "." not in name and name not in macros:
            owner = next(filter(partial(_has, name), registered_names()), None)
            meant = f"; did you mean {owner}.{name}?" if owner else nearest(name, sorted(macros))
            raise ConfigError(f"{place}: nothing refers to {name}{meant}")
        if scope and "." in name and scope not in scopes:
            raise ConfigError(
                f"{place}: {name} is set, but nothing refers to the scope {scope!r}, as "
                f"@{name.rpartition('.')[0]} would"
            )


def _has(parameter: str, owner: str) -> bool:
    return parameter in inspect.signature(registered(owner)).parameters


def unused() -> list[str]:
    """Parameters that are set on something which nothing refers to, so they have no effect.

    Those of an included file are left out: they let one line switch back to what it describes.
    """
    bindings = _bindings()
    references = " ".join(bindings.values())
    return [
        name
        for name in bindings
        if name in _places
        and _places[name].file in _by_user
        and not name.startswith("Experiment.")
        and "." in name
        and not re.search(rf"@(\w+/)*{re.escape(name.rsplit('.', 1)[0])}\b", references)
    ]


def warnings_of_unused() -> list[str]:
    """A line on each parameter without effect: it may be misunderstood, or another one be why."""
    return [
        f"warning: {name}{place_of(name)} is set, but nothing refers to "
        f"{name.rpartition('/')[2].rpartition('.')[0]}, so it has no effect"
        for name in unused()
    ]
