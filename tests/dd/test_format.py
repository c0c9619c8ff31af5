"""The format of a distilled set, read as somebody without `dd` reads it."""

import hashlib
import json
import re
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.datasets import CIFAR10

import dd
from dd.augmentation import DSA
from dd.data import (
    KIPWhitening,
    LowRankKIP,
    LowRankZCA,
    PixelTransform,
    Standardize,
    ZCAWhitening,
    digits,
)
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.evaluator import Evaluator
from dd.evaluation.protocols import DCProtocol
from dd.evaluation.recipe import arguments_of, portable, student_recipe
from dd.exchange.shipped import find_set
from dd.networks import ConvNet
from dd.runtime.files import read_tensors, write_tensors

ROOT = Path(__file__).parents[2]
TRANSFORMS: dict[str, Callable[[torch.Tensor], PixelTransform]] = {
    "standardize": Standardize.fit,
    "zca": ZCAWhitening.fit,
    "kip": KIPWhitening.fit,
    "zca_low_rank": lambda images: LowRankZCA.of(ZCAWhitening.fit(images), 5),
    "kip_low_rank": lambda images: LowRankKIP.of(KIPWhitening.fit(images), 5),
}


def a_set(transform: PixelTransform, images: torch.Tensor, soft: bool = False) -> DistilledSet:
    labels = torch.eye(len(images)) if soft else torch.arange(len(images))
    names = tuple(f"class {index}" for index in range(len(images)))
    return DistilledSet(transform(images), labels, transform, names, {"dataset": "noise"})


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_the_formulas_are_the_transform(kind: str, tmp_path: Path) -> None:
    transform = TRANSFORMS[kind](torch.rand(40, 3, 4, 4))
    a_set(transform, torch.rand(5, 3, 4, 4)).save(tmp_path / "set.safetensors")
    with safe_open(tmp_path / "set.safetensors", "pt") as file:
        formulas = json.loads(file.metadata()["dd"])["formulas"]
    tensors = load_file(tmp_path / "set.safetensors")
    state = {name.removeprefix("transform."): value for name, value in tensors.items()}
    pixels = torch.rand(6, 3, 4, 4)
    names: dict[str, Any] = {**state, "x": pixels}
    exec(formulas["transform"], names)
    assert torch.allclose(names["y"], transform(pixels), atol=1e-5)
    exec(formulas["inverse"], names)
    assert torch.allclose(names["x"], transform.inverse(transform(pixels)), atol=1e-4)


@pytest.mark.parametrize("soft", [False, True])
def test_a_file_explains_itself(soft: bool, tmp_path: Path) -> None:
    path = tmp_path / "set.safetensors"
    a_set(Standardize([0.5], [0.2]), torch.rand(3, 1, 4, 4), soft).save(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["dd"])
    page = (ROOT / "docs" / "format.md").read_text()
    assert all(f"| `{key}`" in page for key in metadata)
    assert metadata["labels"]["kind"] == ("soft" if soft else "hard")
    tensors = load_file(path)
    assert metadata["checksums"] == {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in tensors.items()
    }


def test_a_set_of_before_is_read(tmp_path: Path) -> None:
    old = Path(__file__).with_name("run_of_0.1") / "distilled.safetensors"
    assert dd.load(old).recipe == {}
    path = tmp_path / "set.safetensors"
    a_set(Standardize([0.5], [0.2]), torch.rand(3, 1, 4, 4)).save(path)
    tensors, metadata = read_tensors(path)
    first = ("format", "transform", "class_names", "provenance")
    write_tensors(path, tensors, {name: metadata[name] for name in first})
    assert dd.load(str(path)).provenance == {"dataset": "noise"}


def test_a_set_is_a_dataset() -> None:
    found = dd.load("digits-ipc1")
    image, label = found[3]
    assert image.shape == (1, 8, 8)
    assert int(label) == 3
    (batch,) = list(found.dataloader())
    assert batch[0].shape == found.images.shape == (len(found), 1, 8, 8)
    assert len(list(found.dataloader(4, shuffle=False))) == 3
    assert torch.allclose(found.transform(found.inverse(found.images)), found.images, atol=1e-5)


def test_a_recipe_has_the_learned_rate_and_the_schedule() -> None:
    evaluator = Evaluator(protocol=DCProtocol(epochs=10), batch_size=4, augmentation=DSA("flip"))
    config = "A.x = 1\nConvNet.width = 4\nscope/ConvNet.depth = \\\n    1\nDSA.strategy = 'flip'\n"
    network, images = ConvNet(3, 1, 8, 1, 4), torch.zeros(6, 1, 8, 8)
    recipe = student_recipe(network, evaluator, images, 3, 0.05, config)
    json.dumps(recipe)
    assert recipe["optimizer"]["name"] == "SGD"
    assert recipe["optimizer"]["lr"] == recipe["learned_rate"] == 0.05
    assert recipe["schedule"]["milestones"] == {"11": 1}
    assert recipe["steps"] == 20
    sizes = {"num_classes": 3, "channels": 1, "image_size": 8, "depth": 1, "width": 4}
    assert recipe["network"]["arguments"] == sizes
    assert recipe["augmentation"] == {"name": "DSA", "arguments": {"strategy": "flip"}}
    assert arguments_of("NoAugmentation", config) == {}


def test_no_path_travels() -> None:
    config = (
        "image_folder.image_size = 8\nimage_folder.root = '/home/me'\nExperiment.device = 'x'\n"
    )
    assert portable(config) == "image_folder.image_size = 8\n"


@pytest.mark.parametrize(("networks", "stds"), [(1, 4), pytest.param(5, 2, marks=pytest.mark.slow)])
def test_the_page_trains_as_well_without_dd_as_dd_does(
    networks: int, stds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "format.md").read_text()
    (program,) = re.findall(r"^```python\n(import json.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert "dd." not in program
    shutil.copy(find_set("digits-ipc1"), tmp_path / "distilled.safetensors")
    monkeypatch.chdir(tmp_path)
    real = digits()
    code, accuracies = compile(program, "docs/format.md", "exec"), []
    for seed in range(networks):
        torch.manual_seed(seed)
        names: dict[str, Any] = {"x": real.test_images}
        exec(code, names)
        right = names["logits"].argmax(dim=1) == real.test_labels
        accuracies.append(float(right.float().mean()))
    told = dd.sets()["digits-ipc1"]
    assert abs(statistics.fmean(accuracies) - told.accuracy) < stds * told.std


@pytest.mark.slow
@pytest.mark.parametrize("name", dd.sets())
def test_a_set_that_ships_trains_networks_to_what_is_told_of_it(name: str) -> None:
    """With CIFAR-10 in `data/`, or a link to it, some ten minutes of one core."""
    distilled, told = dd.load(name), dd.sets()[name]
    if name.startswith("digits"):
        images, labels = digits().test_images, digits().test_labels
    else:
        try:
            held = CIFAR10(ROOT / "data", train=False)
        except RuntimeError as error:
            pytest.skip(f"there is no data to judge {name}: {error}")
        images = torch.from_numpy(held.data).permute(0, 3, 1, 2) / 255
        labels = torch.tensor(held.targets)
    recipe, accuracies = distilled.recipe, []
    augmentation = getattr(dd.augmentation, recipe["augmentation"]["name"])()
    assert recipe["augmentation"]["arguments"] == {}
    assert len(distilled.images) <= recipe["batch_size"]  # Every step has the whole set.
    for seed in range(5):
        torch.manual_seed(seed)
        draw = torch.Generator().manual_seed(seed)
        network = ConvNet(**recipe["network"]["arguments"])
        optimizer = torch.optim.Adam(network.parameters(), lr=recipe["optimizer"]["lr"])
        for _ in range(recipe["steps"]):
            optimizer.zero_grad()
            images_now = augmentation(distilled.images, draw)
            F.cross_entropy(network(images_now), distilled.labels).backward()
            optimizer.step()
        with torch.no_grad():
            found = [network(distilled.transform(some)).argmax(dim=1) for some in images.split(500)]
        accuracies.append(float((torch.cat(found) == labels).float().mean()))
    assert abs(statistics.fmean(accuracies) - told.accuracy) < 2 * told.std
