"""The forms in which a distilled set can be written."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np
import torch

from dd.evaluation.distilled_set import DistilledSet


class Format(ABC):
    """Writes a distilled set in one form.

    Attributes:
        name: By which the command knows it.
        keeps: What a reader gets back bit by bit, and what not.
        use: Python, or a command, that reads it.
    """

    name: ClassVar[str]
    keeps: ClassVar[str]
    use: ClassVar[str]

    @abstractmethod
    def write(self, distilled: DistilledSet, folder: Path) -> None:
        """Write the files into an empty folder.

        Raises:
            ValueError: The set cannot be written in this form.
        """

    def front_matter(self, distilled: DistilledSet) -> str:
        """What stands before the card of the set."""
        return ""


@final
class Safetensors(Format):
    """The format of `dd` itself (docs/format.md)."""

    name = "safetensors"
    keeps = "Everything, bit by bit."
    use = 'import dd\n\ndistilled = dd.load("distilled.safetensors")'

    def write(self, distilled: DistilledSet, folder: Path) -> None:
        distilled.save(folder / "distilled.safetensors")


@final
class Tensors(Format):
    """A dict of tensors and plain values, as `torch.save` writes them."""

    name = "pt"
    keeps = (
        "Images as the network sees them, pixels, labels, the transform's tensors and the recipe, "
        "bit by bit. Not kept: what coded images are decoded from, and checksums."
    )
    use = (
        "import torch\n\n"
        'found = torch.load("distilled.pt", weights_only=True)\n'
        'images, labels, recipe = found["images"], found["labels"], found["recipe"]'
    )

    def write(self, distilled: DistilledSet, folder: Path) -> None:
        torch.save(
            {
                "images": distilled.images.cpu().clone(),
                "labels": distilled.labels.cpu().clone(),
                "pixels": distilled.pixels().cpu(),
                "class_names": list(distilled.class_names),
                "transform": {n: v.cpu() for n, v in distilled.transform.state().items()},
                "formula": distilled.transform.formula,
                "inverse_formula": distilled.transform.inverse_formula,
                "recipe": distilled.recipe,
            },
            folder / "distilled.pt",
        )


@final
class Arrays(Format):
    """Plain NumPy arrays."""

    name = "npz"
    keeps = (
        "Images as the network sees them, pixels (float32, not clamped to [0, 1]), labels, class "
        "names and the transform's tensors, bit by bit. Not kept: the recipe, which is in this "
        "text, and what coded images are decoded from."
    )
    use = (
        "import numpy\n\n"
        'found = numpy.load("distilled.npz")\n'
        'images, labels, pixels = found["images"], found["labels"], found["pixels"]'
    )

    def write(self, distilled: DistilledSet, folder: Path) -> None:
        state = distilled.transform.state()
        arrays: dict[str, Any] = {
            "images": distilled.images.cpu().numpy(),
            "labels": distilled.labels.cpu().numpy(),
            "pixels": distilled.pixels().cpu().numpy(),
            "class_names": np.array(distilled.class_names),
            **{f"transform_{name}": value.cpu().numpy() for name, value in state.items()},
        }
        np.savez(folder / "distilled.npz", **arrays)


@final
class DDRanking(Format):
    """The tensors that the package `ddranking` is given."""

    name = "ddranking"
    keeps = (
        "Images as the network sees them, labels and the learned rate, bit by bit; "
        "`distilled.safetensors` beside them has everything. The package brings test images behind "
        "the transform by `custom_val_trans`; the random images of its baseline it draws from its "
        "own `dst_train`, which it normalises, so that has to be replaced for a fair comparison "
        "(as `benchmarks/dd_ranking.py` of this project does)."
    )
    use = (
        "import dd, torch\n"
        "from torchvision.transforms.functional import to_tensor\n\n"
        'transform = dd.load("distilled.safetensors").transform\n'
        "settings = dict(custom_val_trans=lambda picture: transform(to_tensor(picture)[None])[0])\n"
        "# for the evaluator of ddranking.metrics, of which compute_metrics is given\n"
        'inputs = dict(image_tensor=torch.load("images.pt"), hard_labels=torch.load("labels.pt"))\n'
        '# and syn_lr=torch.load("lr.pt"), if there is one'
    )

    def write(self, distilled: DistilledSet, folder: Path) -> None:
        torch.save(distilled.images.cpu().clone(), folder / "images.pt")
        torch.save(distilled.labels.cpu().clone(), folder / "labels.pt")
        distilled.save(folder / "distilled.safetensors")
        rate = distilled.provenance.get("learning_rate")
        if rate is not None:
            torch.save(torch.tensor(float(rate)), folder / "lr.pt")
