"""Gin files as text: found, read with what they include, and judged before anything is run.

A gin file that a user names may import modules. The configuration of a run may come from somebody
else, so it is data: `check_is_data` refuses all that is not a value or the name of something known.
"""

import difflib
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import gin
from dd.runtime.files import DamagedFileError, read_sealed
from gin import config_parser

_PACKAGED = Path(__file__).parent / "recipes"
#: The recipes that come with `dd`, beside this file in a wheel; the repository has them in gin/.
RECIPES = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "gin"
#: What a binding on the command line is called where a file would be named.
COMMAND_LINE = "--gin_param"

#: What parameters of version 0.1 are called now.
MOVED = {
    **{
        f"Distiller.{name}": f"RealImages.{name}"
        for name in ("real_batch", "real_micro_batch", "held_out_batch", "alignment", "precision")
    },
    "Precision.tf32": "Distiller.tf32",
}


class ConfigError(Exception):
    """The configuration cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Place:
    """Where something is set: a line of a file, or the command line."""

    file: str
    line: int

    def __str__(self) -> str:
        return self.file if self.file == COMMAND_LINE else f"{self.file}, line {self.line}"


class _AsWritten(config_parser.ParserDelegate):
    """Reads references without looking anything up; tells `seen` their selectors."""

    def __init__(self, seen: Callable[[str], None]) -> None:
        self._seen = seen

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Any:
        self._seen(scoped_configurable_name.rsplit("/", 1)[-1])
        return f"@{scoped_configurable_name}"

    def macro(self, macro_name: str) -> Any:
        self._seen(f"%{macro_name}")
        return f"%{macro_name}"


def statements(text: str, seen: Callable[[str], None] = lambda _: None) -> Iterator[Any]:
    """What a text says, statement by statement, as `gin.config_parser` names them.

    Raises:
        SyntaxError, tokenize.TokenError, ValueError: It is no gin.
    """
    yield from config_parser.ConfigParser(text, _AsWritten(seen))


def names_set(text: str, file: str) -> dict[str, Place]:
    """The parameters and macros that a text sets, and where."""
    found: dict[str, Place] = {}
    try:
        for statement in statements(text):
            if isinstance(statement, config_parser.BindingStatement):
                scope = f"{statement.scope}/" if statement.scope else ""
                parameter = f".{statement.arg_name}" if statement.arg_name else ""
                name = f"{scope}{statement.selector}{parameter}"
                found[name] = Place(file, statement.location.line_num)
    except (SyntaxError, tokenize.TokenError, ValueError):
        pass  # said, with its place, when it is parsed
    return found


def find(name: str, folder: Path) -> Path:
    """The file of this name in a folder, or the recipe that is called so.

    Raises:
        ConfigError: There is neither.
    """
    recipe = PurePath(name)
    if recipe.parts[:1] == ("gin",):
        recipe = recipe.relative_to("gin")
    for path in (folder / name, RECIPES / recipe):
        for spelled in (path, Path(f"{path}.gin")):
            with suppress(OSError):  # such as a name that is too long
                if spelled.is_file():
                    return spelled
    beside = sorted(path.name for path in (folder / name).parent.glob("*.gin"))
    recipes = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.gin"))
    near = difflib.get_close_matches(recipe.name, [*beside, *recipes], n=1)
    if near:
        hint = f"did you mean {near[0]!r}?"
    elif beside:
        hint = f"there are {', '.join(beside)}"
    else:
        hint = f"recipes are in {RECIPES}"
    raise ConfigError(f"gin file {name} does not exist; {hint}")


def recipe_for_cpu(name: str) -> str | None:
    """The recipe that is made for a CPU and nearest to the recipe of this name, if there is one."""
    path = PurePath(name)
    parts = path.name.removesuffix(".gin").split("_")
    if parts[-1] == "cpu":
        return None
    kept = ["_".join(parts[:count]) for count in range(len(parts), 0, -1)]
    for stem in (f"{parts[0]}_{path.parent.name}", *kept):
        if (RECIPES / f"{stem}_cpu.gin").is_file():
            return f"{stem}_cpu"
    return None


def parse(path: Path, within: tuple[Path, ...] = ()) -> dict[str, Place]:
    """Parse a file; what it includes is looked for beside it, wherever one is, then in `dd`.

    Args:
        path: The file.
        within: The files that include it.

    Returns:
        Where each parameter and macro is set last.
    """
    begin = 0
    text = _read(path)
    lines = text.split("\n")
    within = (*within, path.resolve())
    places: dict[str, Place] = {}

    def flush(end: int) -> None:
        parse_text("\n" * begin + "\n".join(lines[begin:end]) + "\n", str(path))

    for number, line in enumerate(lines):
        include = re.fullmatch(r"\s*include\s+(['\"])([^'\"\\]+)\1\s*(#.*)?", line)
        if include is None and re.match(r"\s*include\b(?!\s*[=.:/])", line):
            raise ConfigError(f"{path}, line {number + 1}: an include is written include 'FILE'")
        if include:
            flush(number)
            begin = number + 1
            try:
                target = find(include[2], path.absolute().parent)
            except ConfigError as error:
                raise ConfigError(f"{path} includes {include[2]}: {error}") from error
            if target.resolve() in within:
                raise ConfigError(f"{path}, line {begin}: {target} is included within itself")
            places |= parse(target, within)
    flush(len(lines))
    return places | names_set(text, str(path))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def parse_text(text: str, name: str) -> None:
    """Have gin parse a text; its messages then name `name`."""
    source = io.StringIO(text)
    source.name = name
    gin.parse_config(source)


def check_is_data(text: str, name: str, modules: Iterable[str]) -> str:
    """A text from which only values, and names that are known, can come.

    Args:
        text: The configuration of a run.
        name: What it is called in messages.
        modules: What the user imported; an import of one of them is taken out.

    Raises:
        ConfigError: It would run code, or names what nobody registered.
    """
    allowed, lines, used, found = set(modules), text.split("\n"), list[str](), False
    try:
        for statement in statements(text, used.append):
            line = statement.location.line_num
            if isinstance(statement, config_parser.ImportStatement):
                if statement.module not in allowed:
                    raise ConfigError(
                        f"{name}, line {line}: a run's configuration imports nothing by itself; "
                        f"if you trust the module, give --import {statement.module}"
                    )
                lines[line - 1], found = "", True
            elif isinstance(statement, config_parser.IncludeStatement):
                raise ConfigError(f"{name}, line {line}: a run's configuration includes nothing")
            elif isinstance(statement, config_parser.BlockDeclaration) or statement.arg_name:
                used.append(statement.selector)
    except (SyntaxError, tokenize.TokenError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} is no configuration: {_first_line(error)}") from error
    for selector in used:
        target = registered(selector)
        is_macro = selector.startswith("%") and not selector.startswith("%gin.")
        if not is_macro and (target is None or target.__module__.split(".")[0] == "gin"):
            raise ConfigError(
                f"{name} refers to {selector!r}, which is nothing that a run may be made of; what "
                "modules of your own register is known after --import MODULE"
            )
    # What is taken out may begin a statement, so what is left is judged again.
    return check_is_data("\n".join(lines) + "\n", name, ()) if found else text


def registered(selector: str) -> Any:
    """The function or class that gin knows by a name; None if there is none."""
    try:
        return gin.config.ConfigurableReference(selector, False).configurable.wrapped
    except (ValueError, KeyError):
        return None


def registered_names() -> list[str]:
    """Every name that a configuration can use, those from modules of one's own among them.

    One that two modules have is none: it must be written with its module.
    """
    # gin lists what is registered nowhere else.
    known = [selector for selector, _ in gin.config._REGISTRY.items()]
    names = (name.rpartition(".")[2] for name in known if not name.startswith("gin."))
    return [name for name in names if registered(name) is not None]


def parameters(configuration: str) -> dict[str, str]:
    """The bindings in a configuration's text, by name."""
    joined = re.sub(r"\\?\n[ \t]+", " ", configuration).replace("=  ", "= ")
    pairs = [line.split(" = ", 1) for line in joined.splitlines() if " = " in line]
    return {name.strip(): value.strip() for name, value in pairs if not name.startswith("#")}


def differences(old: str, new: str, allowed: Callable[[str], bool]) -> list[str]:
    """What two operative configurations disagree in, beyond the parameters that are `allowed`."""
    first, second = parameters(old), parameters(new)

    def value(of: dict[str, str], name: str) -> str:
        # A run of before a parameter was there did what its default does now.
        return of[name] if name in of else _default(name)

    return [
        f"{name} was {first.get(name, 'unset')}, now {second.get(name, 'unset')}"
        for name in sorted(first.keys() | second.keys())
        if value(first, name) != value(second, name) and not allowed(name)
    ]


def _default(name: str) -> str:
    """What a parameter is by default, as gin writes it."""
    selector, _, parameter = name.rpartition("/")[2].rpartition(".")
    target = registered(selector)
    found = None if target is None else inspect.signature(target).parameters.get(parameter)
    return "None" if found is None or found.default is found.empty else repr(found.default)


def place_in(message: str) -> Place | None:
    """Where gin, or Python, says that an error is."""
    found = re.search(r'In (?:file "(.*?)",|bindings string) line (\d+)', message) or re.search(
        r"\((.+?\.gin), line (\d+)\)", message
    )
    return Place(found[1] or COMMAND_LINE, int(found[2])) if found else None


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about a name that is not among the known ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def saved_text(path: Path) -> str:
    """The configuration of a run.

    Raises:
        ConfigError: The run is of version 0.1.
        DamagedFileError: It is damaged.
        OSError: It cannot be read.
    """
    saved = read_sealed(path)
    if not parameters(saved):
        raise DamagedFileError(f"{path} is damaged: it holds no configuration")
    if not MOVED.keys().isdisjoint(parameters(saved)):
        raise ConfigError(
            f"{path.parent} holds a run of version 0.1, which cannot be resumed or judged again; "
            "its distilled set can be judged as that of another run, by --set"
        )
    return saved
