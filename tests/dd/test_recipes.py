"""The recipes of CONTRIBUTING, each followed with a toy in a copy of both packages."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import TINY, arguments, results_of, shown_in

ROOT = Path(__file__).parents[2]

SCHEDULE = '''
from typing import final

import torch

from bilevel.truncation.base import Truncation
from bilevel.window import Plan
from bilevel.window import Window


@final
class Toy(Truncation):
    """The second step alone."""

    minimum_steps = 2

    def plan(self, steps: int, generator: torch.Generator) -> Plan:
        return Plan.of(Window(1, 2))
'''
DATASET = '''
import torch

from dd.data.image_dataset import ImageDataset


def toy(count: int = 60) -> ImageDataset:
    """Three classes: a bright row each.

    Args:
        count: Of training images, and of test images.
    """
    labels = torch.arange(count) % 3
    images = torch.zeros(count, 1, 8, 8)
    images[torch.arange(count), 0, labels] = 1.0
    return ImageDataset("toy", images, labels, images, labels, ("top", "second", "third"))
'''
OBJECTIVE = '''
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

import bilevel
from bilevel.truncation import Stage
from dd.objectives.base import Objective, Outer, PreparedObjective, Task


@final
class ToyObjective(Objective):
    """The loss on the first real images."""

    def optimizer(self, outer: Outer, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        return torch.optim.SGD([outer["images"]], lr=rates["images"])

    def prepare(self, task: Task, key: bilevel.Key, stage: Stage | None) -> PreparedObjective:
        return _Prepared(task)


@final
class _Prepared(PreparedObjective):
    def __init__(self, task: Task) -> None:
        self.problem = _Problem(task)
        self.batch = task.data.train_images[:10], task.data.train_labels[:10]

    def inputs(self, step: int, stage: Stage | None) -> tuple[Outer, Any]:
        return {}, self.batch

    def report(self, result: bilevel.HypergradientResult) -> dict[str, float]:
        return {"toy/seen": 10.0}


@final
class _Problem(bilevel.Problem):
    def __init__(self, task: Task) -> None:
        self.network, self.synthetic = task.network, task.synthetic

    def init(self, outer: Any, *, generator: torch.Generator) -> dict[str, Tensor]:
        return bilevel.fresh_parameters(self.network, generator)

    def inner_batch(self, outer: Any, step: int, *, generator: torch.Generator) -> Any:
        return self.synthetic.batch(outer, generator)

    def inner_loss(self, params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(functional_call(self.network, params, (batch[0],)), batch[1])

    def outer_loss(self, params: Any, outer: Any, batch: Any) -> Tensor:
        return self.inner_loss(params, batch)
'''
PROTOCOL = '''

@final
class ToyProtocol(Protocol):
    """SGD for seven steps."""

    name = "toy"
    augmentation: Augmentation = FlipOrRotate()

    def steps(self, wanted: Sequence[int], images: int, batch_size: int) -> list[int]:
        return [7]

    def optimizer(
        self, params: list[Tensor], steps: int, rate: float | None
    ) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        return torch.optim.SGD(params, lr=0.1), None
'''
CONFIG = "dd/config.py"
END_OF_NAMES = '    "adagrad": bilevel.optim.adagrad,\n'


def configurable(line: str) -> tuple[str, str]:
    """An edit of dd/config.py that adds a name for gin files."""
    return END_OF_NAMES, f"{END_OF_NAMES}    {line},\n"


#: By what CONTRIBUTING calls it: the files that are added to, or in which something is replaced.
RECIPES: dict[str, dict[str, str | tuple[str, str]]] = {
    "A truncation schedule": {
        "bilevel/truncation/toy.py": SCHEDULE,
        "bilevel/truncation/__init__.py": "from bilevel.truncation.toy import Toy\n",
        CONFIG: configurable('"Toy": bilevel.truncation.Toy'),
    },
    "A dataset": {
        "dd/data/sources/toy.py": DATASET,
        "dd/data/sources/__init__.py": (
            "__all__ = [\n",
            'from dd.data.sources.toy import toy\n\n__all__ = [\n    "toy",\n',
        ),
        CONFIG: configurable('"toy": data.toy'),
    },
    "An objective": {
        "dd/objectives/toy.py": OBJECTIVE,
        "dd/objectives/__init__.py": "from dd.objectives.toy import ToyObjective\n",
        CONFIG: configurable('"ToyObjective": objectives.ToyObjective'),
    },
    "An evaluation protocol": {
        "dd/evaluation/protocols.py": PROTOCOL,
        CONFIG: configurable('"ToyProtocol": protocols.ToyProtocol'),
    },
}


@pytest.mark.parametrize("name", RECIPES)
def test_contributing_names_the_files_and_they_are_three_at_most(name: str) -> None:
    (item,) = re.findall(
        rf"^- \*\*{name}\*\*(.*?)(?=^- |^$)",
        (ROOT / "CONTRIBUTING.md").read_text(),
        re.MULTILINE | re.DOTALL,
    )
    named = {path.replace("NAME", "toy") for path in re.findall(r"`([\w/]+\.py)`", item)}
    assert named == set(RECIPES[name])
    assert len(named) <= 3


def test_a_run_takes_a_toy_of_each(tmp_path: Path) -> None:
    for package in ("bilevel", "dd", "gin"):
        shutil.copytree(ROOT / package, tmp_path / package)
    for recipe in RECIPES.values():
        for name, change in recipe.items():
            path = tmp_path / name
            before = path.read_text() if path.exists() else ""
            if isinstance(change, str):
                path.write_text(before + change)
            else:
                assert before.count(change[0]) == 1
                path.write_text(before.replace(*change))
    toys = {
        "Experiment__dataset": "@toy()",
        "toy__count": 30,
        "Distiller__truncation": "@Toy()",
        "Distiller__objective": "@ToyObjective()",
        "Evaluator__protocol": "@ToyProtocol()",
        "Evaluator__full_data_networks": 0,
    }
    done = subprocess.run(
        [sys.executable, "-m", "dd.train", *arguments("run", **toys)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    results = results_of(tmp_path / "run")
    assert (results["dataset"], results["protocol"]) == ("toy", "toy")
    assert results["accuracy"]["distilled"]["steps"] == 7
    shown = shown_in(tmp_path / "run")
    steps = TINY["Distiller.outer_steps"]
    assert [event.value for event in shown.Scalars("window/start")] == [1] * steps
    assert [event.value for event in shown.Scalars("toy/seen")] == [10] * steps
