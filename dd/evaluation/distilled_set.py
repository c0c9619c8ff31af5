"""A distilled set on disk: images and labels, with all that gives them meaning (docs/format.md)."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, final

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dd.data import ImageDataset, PixelTransform, transform_from_state
from dd.evaluation.recipe import LABELS
from dd.runtime.files import DamagedFileError, read_tensors, write_tensors

#: A reader refuses any other.
FORMAT = "dd-distilled-set-1"
#: Rises with every addition that an older reader may pass over.
REVISION = 2
_SINCE_REVISION_2 = {"revision", "formulas", "labels", "recipe", "checksums"}


@final
@dataclass(frozen=True, eq=False)
class DistilledSet(Dataset[tuple[Tensor, Tensor]]):
    """A synthetic training set, complete: whoever has the file can train on it and look at it.

    As a `torch.utils.data.Dataset` it has pairs (image, label).

    Attributes:
        images: float32 [N, C, H, W], as the network sees them, behind `transform`.
        labels: int64 [N], or float32 [N, K] for soft labels: weights of the cross-entropy.
        transform: Fitted on real training images; apply it to any real image that is to be
            classified by a network trained on this set.
        class_names: K names.
        provenance: Plain facts: dataset, step, seed, versions.
        stored: What the images are decoded from, float32 tensors by name, where that is not the
            images themselves (`dd.synthetic`).
        recipe: How a network is to be trained on it, in plain values (docs/format.md); empty for
            sets of before version 0.3, and for those of others.
    """

    images: Tensor
    labels: Tensor
    transform: PixelTransform
    class_names: tuple[str, ...]
    provenance: dict[str, Any]
    stored: dict[str, Tensor] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]

    def __repr__(self) -> str:
        return (
            f"DistilledSet({len(self.images)} images of shape {tuple(self.images.shape[1:])}, "
            f"{len(self.class_names)} classes, {self.label_kind} labels, behind "
            f"{self.transform.kind!r})"
        )

    @property
    def images_per_class(self) -> int:
        """How many images a network is trained on, for each class."""
        return len(self.images) // len(self.class_names)

    @property
    def label_kind(self) -> str:
        """ "hard" or "soft"."""
        return "soft" if self.labels.is_floating_point() else "hard"

    @property
    def stored_floats(self) -> int:
        """How many floats are stored: of images, or what they are decoded from, and soft labels."""
        images = list(self.stored.values()) or [self.images]
        labels = [self.labels] if self.labels.is_floating_point() else []
        return sum(tensor.numel() for tensor in images + labels)

    def pixels(self) -> Tensor:
        """The images as people see them: the transform undone, not clamped to [0, 1]."""
        return self.inverse(self.images)

    def inverse(self, transformed: Tensor) -> Tensor:
        """Pixels of what a network sees, [N, C, H, W]; not clamped to [0, 1]."""
        return self.transform.inverse(transformed)

    def dataloader(
        self, batch_size: int | None = None, *, shuffle: bool = True
    ) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches (images, labels) of one pass over the set.

        Args:
            batch_size: Default: the recipe's, or the whole set where that is smaller.
            shuffle: In another order at every pass.
        """
        wanted = self.recipe.get("batch_size", len(self)) if batch_size is None else batch_size
        return DataLoader(self, batch_size=min(wanted, len(self)), shuffle=shuffle)

    def with_hard_labels(self) -> "DistilledSet":
        """The same with the most likely class of every image for its label."""
        if not self.labels.is_floating_point():
            return self
        return replace(self, labels=self.labels.argmax(dim=1))

    def check_classes(self, name: str, dataset: ImageDataset) -> None:
        """Raise `ValueError`, which calls it `name`, unless its classes are those of a dataset."""
        if self.class_names != dataset.class_names:
            raise ValueError(
                f"{name} has {len(self.class_names)} classes {list(self.class_names)[:3]} …; the "
                f"dataset {dataset.name} has others"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        state = {f"transform.{name}": value for name, value in self.transform.state().items()}
        stored = {f"stored.{name}": value for name, value in self.stored.items()}
        tensors = {"images": self.images, "labels": self.labels, **state, **stored}
        write_tensors(
            Path(path),
            tensors,
            {
                "format": FORMAT,
                "revision": REVISION,
                "transform": self.transform.kind,
                "formulas": {
                    "transform": self.transform.formula,
                    "inverse": self.transform.inverse_formula,
                },
                "labels": {"kind": self.label_kind, "convention": LABELS[self.label_kind]},
                "class_names": list(self.class_names),
                "recipe": self.recipe,
                "checksums": {name: _sha256(tensor) for name, tensor in tensors.items()},
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> "DistilledSet":
        """Read a file that `save` wrote, of this version or an earlier one, on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            DamagedFileError: It is damaged, or holds something else.
        """
        tensors, metadata = read_tensors(Path(path))
        if metadata.get("format") != FORMAT:
            raise DamagedFileError(
                f"{path} has format {metadata.get('format')!r}; a distilled set has {FORMAT!r}"
            )
        state, stored = (
            {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
            for prefix in ("transform.", "stored.")
        )
        try:
            images, labels = tensors["images"], tensors["labels"]
            transform = transform_from_state(metadata["transform"], state)
            class_names = tuple(metadata["class_names"])
            provenance = dict(metadata["provenance"])
            recipe = _recipe(metadata)
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} is no complete distilled set: {error}") from error
        if images.dim() != 4 or len(labels) != len(images):
            raise DamagedFileError(
                f"{path} holds images of shape {tuple(images.shape)} with labels of shape "
                f"{tuple(labels.shape)}; they must be [N, C, H, W] and N labels"
            )
        return cls(images, labels, transform, class_names, provenance, stored, recipe)


def _recipe(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe; empty in a file of the first revision, which has none of what came later."""
    if metadata.keys().isdisjoint(_SINCE_REVISION_2):
        return {}
    missing = sorted(_SINCE_REVISION_2 - metadata.keys())
    if missing:
        raise KeyError(missing[0])
    return dict(metadata["recipe"])


def _sha256(tensor: Tensor) -> str:
    """Of a tensor's values in little-endian byte order, as safetensors stores them."""
    values = tensor.detach().cpu().contiguous().numpy()
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()
