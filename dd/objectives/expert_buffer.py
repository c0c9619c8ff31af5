"""Trajectories of expert networks on disk: one file for each expert, and an index."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dd.data import PixelTransform
from dd.runtime.files import DamagedFileError, open_tensors, read_json, write_json, write_tensors

FORMAT = "dd-experts-1"
INDEX = "index.json"
#: How far whitening fitted twice, on another machine, may come out differently.
TRANSFORM_TOLERANCE = 1e-3


def describe(
    network: nn.Module,
    transform: PixelTransform,
    dataset: str,
    image_shape: tuple[int, int, int],
    seed: int,
    validation_fraction: float,
) -> dict[str, Any]:
    """What experts must have in common with the distillation that matches them, JSON-able.

    The split of the training data is part of it: experts that saw the validation images would
    leak them into the distilled set.

    Args:
        network: What is trained.
        transform: Of the pixels, such as whitening; described by what it makes of one image.
        dataset: Its name.
        image_shape: (C, H, W).
        seed: Of the validation split.
        validation_fraction: Share of the training data held out.
    """
    probe = torch.rand((1, *image_shape), generator=torch.Generator().manual_seed(0))
    seen = transform(probe.to(transform.device)).flatten().cpu()
    return {
        "dataset": dataset,
        "seed": seed,
        "validation_fraction": validation_fraction,
        "network": " ".join(str(network).split()),
        "parameters": {name: list(value.shape) for name, value in network.named_parameters()},
        "transform": transform.kind,
        "transform_of_a_fixed_image": seen[:: max(1, len(seen) // 64)].tolist(),
    }


@final
class ExpertBuffer:
    """Reads expert trajectories, one snapshot at a time, from memory-mapped files.

    Every file is checked when the buffer is opened (complete, of this network, dataset, split and
    whitening), and its checksum when it is first read.

    Args:
        folder: Where `ExpertWriter` wrote.
        description: What the experts must be, as `describe` gives it.

    Raises:
        FileNotFoundError: There are no experts.
        DamagedFileError: A file is damaged, missing, or of other experts; it is named.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]) -> None:
        self.folder = folder
        index = _read_index(folder)
        check_description(folder / INDEX, index["description"], description)
        self.shards: list[dict[str, Any]] = index["shards"]
        if not self.shards:
            raise FileNotFoundError(f"{folder} holds no finished expert yet")
        self._files: dict[int, Any] = {}
        self._size = sum(torch.Size(shape).numel() for shape in description["parameters"].values())
        for shard in self.shards:
            check_shard(folder / shard["file"], description, (index["snapshots"] + 1, self._size))
        self.snapshots: int = index["snapshots"]

    def __len__(self) -> int:
        return len(self.shards)

    def snapshot(self, expert: int, index: int) -> Tensor:
        """The parameters of an expert after `index` stretches of training, float32 [p], on the CPU.

        Raises:
            DamagedFileError: The file's checksum is wrong.
        """
        if expert not in self._files:
            shard = self.shards[expert]
            path = self.folder / shard["file"]
            if checksum(path) != shard["sha256"]:
                raise DamagedFileError(f"{path} is damaged: its checksum is not that of the index")
            self._files[expert] = safe_open(str(path), framework="pt").__enter__()
        snapshot: Tensor = self._files[expert].get_slice("snapshots")[index]
        return snapshot.float()

    def stretch(
        self, generator: torch.Generator, max_start: int, target_after: int
    ) -> tuple[Tensor, Tensor]:
        """(start, target) of a random expert: snapshots s ~ U{0 … max_start − 1} and s + N_T.

        Args:
            generator: Source of randomness.
            max_start: How many snapshots a stretch may start from.
            target_after: N_T, how many snapshots later it ends.
        """
        device = generator.device
        expert = int(torch.randint(len(self), (), generator=generator, device=device))
        start = int(torch.randint(max_start, (), generator=generator, device=device))
        return self.snapshot(expert, start), self.snapshot(expert, start + target_after)


@final
class ExpertWriter:
    """Writes expert trajectories, each as soon as it is complete; goes on where it was stopped.

    Args:
        folder: Where to write; made if need be.
        description: What the experts are, as `describe` gives it.
        training: How they are trained, JSON-able.
        snapshots: How many snapshots follow the initialisation in a trajectory.

    Raises:
        DamagedFileError: The folder holds other experts, or a damaged file; it is named.
    """

    def __init__(
        self,
        folder: Path,
        description: Mapping[str, Any],
        training: Mapping[str, Any],
        snapshots: int,
    ) -> None:
        self.folder = folder
        self.description = dict(description)
        self.index: dict[str, Any] = {
            "format": FORMAT,
            "description": self.description,
            "training": dict(training),
            "snapshots": snapshots,
            "shards": [],
        }
        if (folder / INDEX).exists():
            found = _read_index(folder)
            check_description(folder / INDEX, found["description"], description)
            check_description(
                folder / INDEX,
                {**found["training"], "snapshots": found["snapshots"]},
                {**training, "snapshots": snapshots},
            )
            for shard in found["shards"]:
                path = folder / shard["file"]
                if not path.is_file() or checksum(path) != shard["sha256"]:
                    raise DamagedFileError(
                        f"{path} is damaged or missing: remove it and its entry in {INDEX}, or "
                        "choose another folder"
                    )
            self.index = found

    @property
    def done(self) -> set[int]:
        """The experts that are complete."""
        return {shard["expert"] for shard in self.index["shards"]}

    def write(self, expert: int, snapshots: Tensor, facts: Mapping[str, Any]) -> None:
        """Add a trajectory [snapshots + 1, p]; the index names it only once it is on disk."""
        name = f"expert_{expert:04d}.safetensors"
        write_tensors(
            self.folder / name,
            {"snapshots": snapshots},
            {"format": FORMAT, "expert": expert, "description": self.description},
        )
        entry = {"expert": expert, "file": name, "sha256": checksum(self.folder / name), **facts}
        self.index["shards"] = sorted(
            [*self.index["shards"], entry], key=lambda shard: shard["expert"]
        )
        write_json(self.folder / INDEX, self.index)


def check_shard(path: Path, description: Mapping[str, Any], shape: tuple[int, int]) -> None:
    """Raise `DamagedFileError` unless a file is complete, as described, and of this shape."""
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing, though {path.with_name(INDEX)} lists it")
    with open_tensors(path) as (file, metadata):
        if metadata.get("format") != FORMAT:
            raise DamagedFileError(f"{path} holds no expert's trajectory")
        check_description(path, metadata.get("description", {}), description)
        try:
            found = tuple(file.get_slice("snapshots").get_shape())
        except SafetensorError as error:
            raise DamagedFileError(f"{path} holds no snapshots: {error}") from error
    if found != shape:
        raise DamagedFileError(f"{path} holds snapshots of shape {found}; the index says {shape}")


def check_description(
    path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], what: str = "experts"
) -> None:
    """Raise `DamagedFileError` naming the first thing in which `what` is not what is wanted."""
    for name, value in wanted.items():
        have = found.get(name)
        if name == "transform_of_a_fixed_image":
            if not _close(have, value):
                raise DamagedFileError(
                    f"{path}: these {what} saw images behind another fitted "
                    f"{wanted['transform']} transform (another whitening, or fitted on other data)"
                )
        elif have != value:
            raise DamagedFileError(f"{path}: these {what} have {name} {have}; wanted is {value}")


def checksum(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no experts, for there is no {INDEX}: train them by python -m "
            "dd.experts with the same configuration"
        )
    index = read_json(path)
    if not isinstance(index, dict) or index.get("format") != FORMAT or not _is_index(index):
        raise DamagedFileError(f"{path} is no index of expert trajectories")
    for shard in index["shards"]:
        if shard["file"] in ("", "..") or Path(shard["file"]).name != shard["file"]:
            raise DamagedFileError(f"{path} names the file {shard['file']!r}, outside its folder")
    return index


def _is_index(index: Mapping[str, Any]) -> bool:
    kinds = {"description": dict, "training": dict, "snapshots": int, "shards": list}
    of_shard = {"expert": int, "file": str, "sha256": str}
    return all(isinstance(index.get(name), kind) for name, kind in kinds.items()) and all(
        isinstance(shard, dict)
        and all(isinstance(shard.get(name), kind) for name, kind in of_shard.items())
        for shard in index["shards"]
    )


def _close(found: Sequence[float] | None, wanted: Sequence[float]) -> bool:
    if not isinstance(found, list) or len(found) != len(wanted):
        return False
    have, want = torch.tensor(found), torch.tensor(list(wanted))
    return bool((have - want).norm() <= TRANSFORM_TOLERANCE * want.norm())
