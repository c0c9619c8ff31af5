"""A distilled set on disk: images and labels with the transform that gives them meaning."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import Tensor

from dd.data import PixelTransform, transform_from_state
from dd.runtime.files import DamagedFileError, read_tensors, write_tensors

FORMAT = "dd-distilled-set-1"


@final
@dataclass(frozen=True)
class DistilledSet:
    """A synthetic training set, complete: whoever has the file can train on it and look at it.

    Attributes:
        images: float32 [N, C, H, W], as the network sees them, behind `transform`.
        labels: int64 [N], or float32 [N, K] for soft labels.
        transform: Fitted on real training images; apply it to any real image that is to be
            classified by a network trained on this set.
        class_names: K names.
        provenance: Plain facts: dataset, step, seed, versions.
        stored: What the images are decoded from, float32 tensors by name, where that is not the
            images themselves (`dd.synthetic`).
    """

    images: Tensor
    labels: Tensor
    transform: PixelTransform
    class_names: tuple[str, ...]
    provenance: dict[str, Any]
    stored: dict[str, Tensor] = field(default_factory=dict)

    @property
    def images_per_class(self) -> int:
        """How many images a network is trained on, for each class."""
        return len(self.images) // len(self.class_names)

    @property
    def stored_floats(self) -> int:
        """How many floats are stored: of images, or what they are decoded from, and soft labels."""
        images = list(self.stored.values()) or [self.images]
        labels = [self.labels] if self.labels.is_floating_point() else []
        return sum(tensor.numel() for tensor in images + labels)

    def pixels(self) -> Tensor:
        """The images as people see them: the transform undone, not clamped to [0, 1]."""
        return self.transform.inverse(self.images)

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        state = {f"transform.{name}": value for name, value in self.transform.state().items()}
        stored = {f"stored.{name}": value for name, value in self.stored.items()}
        write_tensors(
            path,
            {"images": self.images, "labels": self.labels, **state, **stored},
            {
                "format": FORMAT,
                "transform": self.transform.kind,
                "class_names": list(self.class_names),
                "provenance": self.provenance,
            },
        )

    @classmethod
    def load(cls, path: Path) -> "DistilledSet":
        """Read a file that `save` wrote, on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            DamagedFileError: It is damaged, or holds something else.
        """
        tensors, metadata = read_tensors(path)
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
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} is no complete distilled set: {error}") from error
        if images.dim() != 4 or len(labels) != len(images):
            raise DamagedFileError(
                f"{path} holds images of shape {tuple(images.shape)} with labels of shape "
                f"{tuple(labels.shape)}; they must be [N, C, H, W] and N labels"
            )
        return cls(images, labels, transform, class_names, provenance, stored)
