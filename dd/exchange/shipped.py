"""The sets that come with `dd`, and how a set is found by its name or path."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

if TYPE_CHECKING:
    from dd.evaluation.distilled_set import DistilledSet

#: Where they are, and what is known of them.
FOLDER = Path(__file__).parents[1] / "sets"
INDEX = "index.json"
#: The set in a run's folder.
_OF_A_RUN = "distilled.safetensors"


@final
@dataclass(frozen=True)
class ShippedSet:
    """What is known of a set that comes with `dd`.

    Attributes:
        name: By which `dd.load` and `dd-evaluate` know it.
        description: Of what, and how much.
        accuracy: On the test set, the mean over networks, a fraction.
        std: Over networks.
        networks: How many were trained.
        network: Which.
        protocol: How.
        steps: For how long.
        made_by: The command.
        data: Whose images it was distilled from, and under which licence.
    """

    name: str
    description: str
    accuracy: float
    std: float
    networks: int
    network: str
    protocol: str
    steps: int
    made_by: str
    data: str

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.description}; test accuracy {100 * self.accuracy:.1f} ± "
            f"{100 * self.std:.1f} % ({self.networks} × {self.network}, protocol {self.protocol}, "
            f"{self.steps} steps)"
        )


def sets() -> dict[str, ShippedSet]:
    """The sets that come with `dd`, by name."""
    return {name: ShippedSet(name, **known) for name, known in read_index().items()}


def read_index(folder: Path = FOLDER) -> Mapping[str, Mapping[str, Any]]:
    """What the index of a folder of sets says of each."""
    found: Mapping[str, Mapping[str, Any]] = json.loads((folder / INDEX).read_text("utf-8"))
    return found


def find_set(path_or_name: str | Path) -> Path:
    """The file of a set: that file itself, that of a run's folder, or one that comes with `dd`.

    Raises:
        FileNotFoundError: There is none of these.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    if (path / _OF_A_RUN).is_file():
        return path / _OF_A_RUN
    name = str(path_or_name)
    if name in read_index():
        return FOLDER / f"{name}.safetensors"
    if path.is_dir():
        raise FileNotFoundError(f"{path} holds no {_OF_A_RUN}")
    near = difflib.get_close_matches(name, read_index(), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"those are {', '.join(read_index())}"
    raise FileNotFoundError(
        f"{name} is no run directory, no file, and none of the sets that come with dd; {hint}"
    )


def load(path_or_name: str | Path) -> "DistilledSet":
    """A distilled set: of a file, of a run's folder, or one that comes with `dd`.

    Args:
        path_or_name: Such as "runs/digits", "mine.safetensors", or "digits-ipc1" (`dd.sets`).

    Raises:
        FileNotFoundError: There is no such set.
        DamagedFileError: The file is damaged, or holds something else.
    """
    from dd.evaluation.distilled_set import DistilledSet

    return DistilledSet.load(find_set(path_or_name))
