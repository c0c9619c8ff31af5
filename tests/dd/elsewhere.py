"""Everything runs where images are not on the CPU, and seldom waits for that device.

`test_pretend_device.py` runs this file in a process of its own.
"""

from collections import Counter
from pathlib import Path

import pytest
import torch
from gin_places import everything, in_its_place, made_by, write_data
from pretend_device import pretended
from tiny_runs import bindings
from torch import nn

import bilevel
from dd import augmentation, config, data, objectives, synthetic
from dd.distillation.loop import Distillation, begin, outer_step
from dd.experiment import Experiment
from dd.runtime.files import read_tensors
from dd.runtime.stopping import StopRequest

#: Of each kind, all that gin can name.
KINDS = (
    objectives.Objective,
    objectives.DifficultyPacing,
    objectives.PrototypeAlignment,
    synthetic.Parameterisation,
    data.PixelTransform,
    augmentation.Augmentation,
    nn.Module,
    bilevel.truncation.Truncation,
    bilevel.truncation.Transition,
    bilevel.truncation.StepDistribution,
    bilevel.estimators.Estimator,
    bilevel.basis.Basis,
    bilevel.clip.Clip,
    bilevel.optim.adam().__class__,
)
NAMES = [
    name
    for name in config.CONFIGURABLES
    # It looks at the distance to experts, so it comes with MatchExperts.
    if issubclass(made_by(name), KINDS) and name != "MinimumDistance"
]
#: For what one outer step tells: its loss, metrics, statuses and checks.
MOST_WAITS = 40
ALMOST = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretend")
    write_data(folder)
    (folder / "base.gin").write_text(everything(folder, *bindings(*SMALL)))
    return folder / "base.gin"


SMALL = [
    "Distiller.average_decay = 0.5",
    "Experts.count = 1",
    "Experts.batch_size = 32",
    "DifficultyPacing.networks = 1",
    "DifficultyPacing.epochs = 1",
    "DifficultyPacing.over_steps = 2",
    "Bases.number = 2",
    "ResNet18.width = 4",
    "VGG11.width = 4",
    "AlexNet.width = 4",
    "ViT.width = 8",
    "ViT.depth = 1",
]


def made_on(device: torch.device, base: Path, *lines: str) -> Experiment:
    """An experiment there, with its experts trained there."""
    made = config.load([str(base)], lines)
    made.device = device
    experts = made.distiller.objective.experts
    if experts is not None and not experts.folder.exists():
        prepared = made.prepare()
        key = made.key.fold("experts")
        described = made.describe(prepared)
        experts.train(prepared, made.network, key, described, StopRequest())
    return made


def steps(made: Experiment, count: int, counts: Counter[str] | None = None) -> Distillation:
    """Some outer steps; `counts` is then of the last one."""
    run = begin(made.distiller, made.task(made.prepare(), None))
    for _ in range(count):
        if counts is not None:
            counts.clear()
        outer_step(run)
    return run


def check_same(base: Path, *lines: str) -> Counter[str]:
    """Two steps elsewhere and on the CPU lead to the same set; how often the second waited."""
    expected = steps(made_on(torch.device("cpu"), base, *lines), 2).state.outer
    with pretended() as (device, counts):
        run = steps(made_on(device, base, *lines), 2, counts)
        waited = Counter(counts)
        for name, value in run.state.outer.items():
            assert value.device == device
            torch.testing.assert_close(value.detach().cpu(), expected[name].detach(), **ALMOST)
    return waited


@pytest.mark.parametrize("name", NAMES)
def test_everything_runs_where_it_is_put(name: str, base: Path) -> None:
    waited = check_same(base, *in_its_place(name))
    assert waited.total() <= MOST_WAITS, waited


@pytest.mark.parametrize(
    "lines",
    [
        ["Distiller.keep_on = 'cpu'", "Distiller.keep_every = 2"],
        ["Experiment.images_on = 'host'"],
        ["SyntheticDataset.learn_labels = True", "SyntheticDataset.classes_per_step = 3"],
        ["RealImages.precision = @Precision()", "Precision.channels_last = True"],
        ["Distiller.inner_replicas = 2"],
    ],
)
def test_settings_run_elsewhere(lines: list[str], base: Path) -> None:
    check_same(base, *lines)


@pytest.mark.parametrize("name", ["RandomWindow", "StageAware"])
def test_inner_steps_are_not_waited_for(name: str, base: Path) -> None:
    """Of CUDA: they are queued, however many there are, and looked at once, when all are done."""
    place = in_its_place(name)
    few, many = (check_same(base, *place, f"Distiller.inner_steps = {steps}") for steps in (6, 18))
    assert few == many


def test_a_run_is_kept_resumed_and_judged_elsewhere(base: Path, tmp_path: Path) -> None:
    found = {}
    for kind in ("cpu", "pretend"):
        folder = tmp_path / kind
        with pretended() as (elsewhere, _):
            device = elsewhere if kind == "pretend" else torch.device("cpu")
            for outer_steps in (2, 4):
                made = made_on(device, base, f"Distiller.outer_steps = {outer_steps}")
                report = made.train(made.prepare(), folder, StopRequest(), "")
                assert report.told_status == "complete"
        found[kind] = read_tensors(folder / "checkpoint.safetensors")[0]
    assert read_tensors(tmp_path / "pretend" / "checkpoint.safetensors")[1]["step"] == 4
    torch.testing.assert_close(found["pretend"], found["cpu"], **ALMOST)


def test_what_a_device_refuses_is_refused_here() -> None:
    with pretended() as (device, counts):
        there, here = torch.ones(3, device=device), torch.ones(3)
        with pytest.raises(RuntimeError, match="on pretend:0 and on cpu"):
            there + here
        with pytest.raises(RuntimeError, match="a generator of the host draws on pretend:0"):
            there.normal_(generator=torch.Generator())
        assert counts.total() == 0
        assert torch.equal((there + here.sum()).cpu(), torch.full((3,), 4.0))
        assert float(there[0]) == 1
        assert counts.total() == 2
