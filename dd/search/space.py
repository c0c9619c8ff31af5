"""What a search varies: one line for each gin parameter."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, final

from bilevel import ConfigurationError
from dd.config import RECIPES

if TYPE_CHECKING:
    import optuna

#: The space files that come with `dd`.
SPACES = RECIPES / "sweeps"
#: What stands on the right of a line, as it is told in errors.
FORMS = "log(LOW, HIGH), uniform(LOW, HIGH), integer(LOW, HIGH) or choice(VALUE, …)"
_LINE = re.compile(r"\s*([\w./]+)\s*=\s*(\w+)\((.*)\)\s*", re.DOTALL)


@final
@dataclass(frozen=True)
class Parameter:
    """A gin parameter, or macro, and the values that it may take.

    Attributes:
        name: As gin has it, such as `Distiller.image_lr`.
        kind: "log", a number drawn on a logarithmic scale; "uniform", a number; "integer"; or
            "choice", one of several.
        values: The bounds, both included; or, of a choice, the values as gin reads them.
    """

    name: str
    kind: str
    values: tuple[float | str, ...]

    @property
    def example(self) -> str:
        """A gin binding with one of the values."""
        return f"{self.name} = {self.values[0]}"

    def binding(self, trial: "optuna.Trial") -> str:
        """The gin binding with the value that a trial is to have."""
        if self.kind == "choice":
            value: object = trial.suggest_categorical(self.name, self.values)
        elif self.kind == "integer":
            value = trial.suggest_int(self.name, *(int(bound) for bound in self.values))
        else:
            low, high = (float(bound) for bound in self.values)
            value = trial.suggest_float(self.name, low, high, log=self.kind == "log")
        return f"{self.name} = {value}"

    def __str__(self) -> str:
        return f"{self.name} = {self.kind}({', '.join(map(str, self.values))})"


def parameter(line: str) -> Parameter:
    """What a line such as `Distiller.image_lr = log(1e-4, 1e-2)` says.

    Raises:
        ConfigurationError: It is not one of the forms, or its bounds are in no order.
    """
    found = _LINE.fullmatch(line)
    if found is None:
        raise ConfigurationError(f"{line.strip()!r}: it must be NAME = {FORMS}")
    name, kind, inside = found.groups()
    parts = _split(inside)
    if kind == "choice" and all(parts):
        return Parameter(name, kind, tuple(parts))
    numbers = [_number(part) for part in parts]
    if kind not in ("log", "uniform", "integer") or len(numbers) != 2 or None in numbers:
        raise ConfigurationError(f"{line.strip()!r}: it must be NAME = {FORMS}")
    low, high = (number for number in numbers if number is not None)
    if not low < high or (kind == "log" and low <= 0):
        positive = ", and be positive" if kind == "log" else ""
        raise ConfigurationError(f"{line.strip()!r}: LOW must be below HIGH{positive}")
    if kind == "integer" and not (isinstance(low, int) and isinstance(high, int)):
        raise ConfigurationError(f"{line.strip()!r}: the bounds of an integer are integers")
    return Parameter(name, kind, (low, high))


def space(files: list[str], lines: list[str]) -> list[Parameter]:
    """The parameters of space files and of single lines, which replace those of the files.

    A space file has a line for each parameter; what follows # is a comment. Those that come with
    `dd`, in gin/sweeps, are found by their names.

    Raises:
        ConfigurationError: A line says nothing, or there is none.
        OSError: A file cannot be read.
    """
    of_files = [line for file in files for line in _found(file).read_text("utf-8").splitlines()]
    without_comments = [line.split("#")[0].strip() for line in of_files]
    found = [parameter(line) for line in [*filter(None, without_comments), *lines]]
    if not found:
        raise ConfigurationError(f"nothing is varied: give --vary 'NAME = {FORMS}', or --space")
    return list({each.name: each for each in found}.values())


def _found(name: str) -> Path:
    packaged = SPACES / f"{name}.space"
    return packaged if packaged.is_file() and not Path(name).exists() else Path(name)


def _split(inside: str) -> list[str]:
    """The parts between commas that are in no brackets and no quotes."""
    parts, depth, quote = [""], 0, ""
    for character in inside:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _number(text: str) -> int | float | None:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number else None
