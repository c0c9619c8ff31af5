"""Parts that a module of one's own registers are used, named and judged as built-in ones are."""

from pathlib import Path

import pytest
from tiny_runs import arguments, one_error, results_of

import dd
import gin
from dd import evaluate, train
from dd.data import transform_from_state

OWN = """
import gin, torch
from torch import nn
from bilevel import truncation
from bilevel import Window
from bilevel.truncation import Plan
from dd.augmentation import Augmentation
from dd.data import ImageDataset, PixelTransform, digits

@gin.configurable
def own_network(num_classes, channels, image_size, hidden=4):
    size = channels * image_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.Linear(hidden, num_classes))

@gin.configurable
def own_dataset(count=600):
    whole = digits()
    train = whole.train_images[:count], whole.train_labels[:count]
    return ImageDataset("own", *train, whole.test_images, whole.test_labels, whole.class_names)

class Scale(PixelTransform):
    kind, elementwise = "own scale", True
    formula, inverse_formula = "y = x * factor", "x = y / factor"
    tensors = {"factor": ""}

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, images):
        return images * self.factor

    def inverse(self, transformed):
        return transformed / self.factor

@gin.configurable
def own_transform(images, factor=2.0):
    return Scale(torch.tensor(factor))

@gin.configurable
class OwnAugmentation(Augmentation):
    def __init__(self, shift=0.1):
        self.shift = shift

    def __call__(self, images, generator):
        return images + self.shift

@gin.configurable
class OwnSchedule(truncation.Truncation):
    minimum_steps = 2

    def __init__(self, width=2):
        self.width = width

    def plan(self, steps, generator):
        return Plan.of(Window(0, self.width))
"""


def test_a_run_of_ones_own_parts_is_made_and_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    gin.clear_config()  # so that the module can be imported whatever ran before
    own = ["--import=own_parts"]
    parts = [
        "Experiment.network = @own_network",
        "own_network.hidden = 6",
        "Experiment.dataset = @own_dataset()",
        "own_dataset.count = 500",
        "Experiment.transform = @own_transform",
        "Experiment.augmentation = @OwnAugmentation()",
        "Evaluator.augmentation = @OwnAugmentation()",
        "Distiller.truncation = @OwnSchedule()",
    ]
    assert train.main([*arguments("run", *parts, Distiller__outer_steps=1), *own]) == 0
    distilled = dd.load("run")
    assert distilled.recipe["network"]["name"] == "own_network"
    assert distilled.recipe["network"]["arguments"]["hidden"] == 6
    assert distilled.recipe["augmentation"]["arguments"] == {"shift": 0.1}
    assert distilled.transform.kind == "own scale"
    assert (
        transform_from_state("own scale", distilled.transform.state()).formula == "y = x * factor"
    )

    short = ["--only=distilled", *own, "--json=found.json"]
    judged = [*short, "--gin_param=own_network.hidden = 5", "--architectures=own_network"]
    for source in ("run", "run/distilled.safetensors"):
        assert evaluate.main([source, *judged]) == 0
    capsys.readouterr()
    for wrong, said in (
        ("--architectures=own_netwrok", "did you mean 'own_network'"),
        ("--gin_param=own_network.hiden = 5", "did you mean 'hidden'"),
        ("--gin_param=Distiller.truncation = @OwnSchedul()", "did you mean 'OwnSchedule'"),
        ("--gin_param=own_dataset.count = 400", "own_dataset.count was 500, now 400"),
    ):
        assert evaluate.main(["run", *own, wrong]) == 2
        assert said in one_error(capsys)
    assert results_of(tmp_path / "run")["dataset"] == "own"
    with pytest.raises(ValueError, match="of your own once it is imported"):
        transform_from_state("nothing", {})
