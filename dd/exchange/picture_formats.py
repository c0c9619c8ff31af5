"""The forms in which a distilled set is a folder of picture files."""

import json
from pathlib import Path
from typing import final

from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from dd.evaluation.distilled_set import DistilledSet
from dd.exchange.formats import Format
from dd.runtime.files import write_text

_ROUNDED = (
    "Nothing bit by bit: pictures hold pixels in [0, 1], rounded to 8 bits, while learned pixels "
    "may lie outside"
)


@final
class Folder(Format):
    """One folder of PNG files for each class."""

    name = "folder"
    keeps = f"{_ROUNDED}, and folders say one class for each picture, the likeliest."
    use = (
        "from torchvision.datasets import ImageFolder\n\n"
        'images = ImageFolder("pictures")  # or: dd-evaluate RUN_DIR --set=pictures'
    )

    def write(self, distilled: DistilledSet, folder: Path) -> None:
        for name in distilled.class_names:
            if name in ("", ".", "..") or set(name) & set('/\\\0<>:"|?*'):
                raise ValueError(
                    f"the class {name!r} cannot be the name of a folder: choose another format"
                )
        for index, (pixels, label) in enumerate(_pictures(distilled)):
            place = folder / "pictures" / distilled.class_names[label]
            place.mkdir(parents=True, exist_ok=True)
            to_pil_image(pixels).save(place / f"{index:05}.png")


@final
class HuggingFace(Format):
    """A folder that the package `datasets` loads, and its hub shows."""

    name = "datasets"
    keeps = (
        f"{_ROUNDED}. Soft labels are in the column `soft_label`; `distilled.safetensors` beside "
        "the pictures has everything, bit by bit."
    )
    use = (
        "from datasets import load_dataset\n\n"
        'images = load_dataset("imagefolder", data_dir=".", split="train")'
    )

    def write(self, distilled: DistilledSet, folder: Path) -> None:
        place = folder / "train"
        place.mkdir()
        lines = []
        for index, (pixels, label) in enumerate(_pictures(distilled)):
            file = f"{index:05}.png"
            to_pil_image(pixels).save(place / file)
            line = {"file_name": file, "label": label, "class_name": distilled.class_names[label]}
            if distilled.label_kind == "soft":
                line["soft_label"] = distilled.labels[index].tolist()
            lines.append(json.dumps(line, ensure_ascii=False))
        write_text(place / "metadata.jsonl", "\n".join(lines) + "\n")
        distilled.save(folder / "distilled.safetensors")

    def front_matter(self, distilled: DistilledSet) -> str:
        lines = ["task_categories: [image-classification]", "tags: [dataset-distillation]"]
        lines.append("configs: [{config_name: default, data_dir: .}]")
        return "\n".join(["---", *lines, "---", "", ""])


def _pictures(distilled: DistilledSet) -> list[tuple[Tensor, int]]:
    """Every image as uint8 [C, H, W], with its class."""
    pixels = distilled.pixels().cpu().clamp(0, 1).mul(255).round().byte()
    labels = distilled.labels.cpu()
    hard = labels.argmax(dim=1) if distilled.label_kind == "soft" else labels
    return list(zip(pixels, hard.tolist(), strict=True))
