"""`dd.distil`: a run from Python, which the commands know."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import results_of
from torch import nn
from torch.utils.data import TensorDataset

import bilevel
import dd
import gin
from dd import config, evaluate
from dd.api.bindings import dataset_bindings, keep, part_bindings
from dd.data import ImageDataset, arrays
from dd.distillation.events import Event, Finished, Ready, Stepped
from dd.runtime.files import read_sealed

TINY = {"Distiller.inner_steps": 6, "RandomWindow.window": 3, "Evaluator.steps": [5]}
IMAGES, LABELS = torch.rand(60, 3, 8, 8), torch.arange(60) % 3
OWN = """
import gin
from torch import nn
@gin.configurable
class Flat(nn.Sequential):
    def __init__(self, num_classes, channels, image_size, hidden=4):
        size = channels * image_size**2
        super().__init__(nn.Flatten(), nn.Linear(size, hidden), nn.Linear(hidden, num_classes))
"""


class Linear(nn.Sequential):
    """A network that nobody registered."""

    def __init__(self, num_classes: int, channels: int, image_size: int, scale: float = 1) -> None:
        super().__init__(nn.Flatten(), nn.Linear(channels * image_size**2, num_classes))


def test_a_run_made_in_python_is_judged_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_flat.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    gin.clear_config()  # what another test left open to nothing new
    import own_flat  # type: ignore[import-not-found]

    seen: list[Event] = []

    def distil(**changes: Any) -> dd.DistilledSet:
        chosen = {"network": functools.partial(own_flat.Flat, hidden=5), "run_dir": "run"}
        return dd.distil((IMAGES, LABELS), settings=TINY, **{**chosen, **changes})

    found = distil(outer_steps=3, callbacks=[seen.append, lambda event: event.step == 2])
    assert [type(event) for event in seen[:3]] == [Ready, Stepped, Ready]
    assert found.provenance["outer_step"] == 2
    assert found.recipe["network"]["arguments"]["hidden"] == 5
    assert str(tmp_path) not in found.recipe["config"]
    assert results_of(tmp_path / "run")["status"] == "interrupted"

    found = distil(outer_steps=3, callbacks=[seen.append])
    assert isinstance(seen[-1], Finished)
    assert found.provenance["outer_step"] == 3
    assert results_of(tmp_path / "run")["status"] == "complete"
    assert evaluate.main(["run", "--only=distilled", "--import=own_flat"]) == 0
    architectures = ["--architectures=Flat", "--import=own_flat"]
    own = [*architectures, "--gin_param=arrays.path = 'run/dataset.npz'", "--only=distilled"]
    assert evaluate.main(["run/distilled.safetensors", *own]) == 0
    with pytest.raises(ValueError, match="another configuration"):
        distil(outer_steps=3, images_per_class=2)
    with pytest.raises(ValueError, match="holds other data"):
        dd.distil((IMAGES + 1, LABELS), run_dir="run")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset": "digitz"}, "did you mean 'digits'"),
        ({"dataset": 3}, "dataset is a int; it must be a path"),
        ({"network": "ConvNett"}, "did you mean 'ConvNet'"),
        ({"network": lambda **sizes: None}, "network: it must be a class or a function"),
        ({"settings": {"ConvNet.widht": 3}}, "did you mean 'width'"),
        ({"settings": {"windw": 3}}, "nothing refers to windw"),
        ({"truncation": "Random"}, "did you mean"),
        ({"images_per_class": 0}, "images_per_class=0.*at least 1$"),
        ({"callbacks": [3]}, "callbacks=3"),
        (
            {"truncation": bilevel.truncation.StageAware(3, 1, bilevel.truncation.ByMetric())},
            "settings=.'StageAware.transition'",
        ),
    ],
)
def test_what_cannot_work_is_one_line_and_leaves_no_folder(
    changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        dd.distil(**{"dataset": "digits", **changes})
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_part_is_named_and_given_its_arguments() -> None:
    window = bilevel.truncation.RandomWindow(5)
    made = part_bindings("Distiller.truncation", window, evaluated=True)
    assert made == [
        "Distiller.truncation = @RandomWindow()",
        "RandomWindow.window = 5",
        "RandomWindow.refresh = 1",
    ]
    for _ in range(2):  # as when a cell of a notebook is run again
        again = type("Linear", (Linear,), {"__module__": __name__})
        made = part_bindings("Experiment.network", functools.partial(again, scale=2), False)
        assert made == ["Experiment.network = @Linear", "Linear.scale = 2"]
    with pytest.raises(ValueError, match="by their names"):
        part_bindings("Experiment.network", functools.partial(Linear, 3), False)


def test_what_has_no_path_is_kept_as_it_is(tmp_path: Path) -> None:
    rows = torch.arange(50, 60)
    given = ImageDataset(
        "mine", IMAGES, LABELS, IMAGES[:9], LABELS[:9], ("x", "y", "z"), validation_rows=rows
    )
    bindings, content = dataset_bindings(given, tmp_path, 8)
    keep(content, may_differ=False)
    found = arrays(tmp_path / "mine.npz", channels="first")
    assert bindings[-1] == "arrays.channels = 'first'"
    assert found.class_names == given.class_names
    for name in ("train_images", "train_labels", "test_images", "test_labels", "validation_rows"):
        assert torch.equal(getattr(found, name), getattr(given, name))

    keep(
        dataset_bindings(TensorDataset(IMAGES, LABELS), tmp_path / "torch", 8)[1], may_differ=False
    )
    content = np.load(tmp_path / "torch" / "dataset.npz")
    assert np.array_equal(content["images"], IMAGES.numpy())
    assert np.array_equal(content["labels"], LABELS.numpy())


def test_gin_is_left_open_for_what_is_registered_next(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ConvNett"):
        dd.distil("digits", network="ConvNett", run_dir=tmp_path / "run")
    gin.external_configurable(Linear, f"Linear{tmp_path.name}")
    assert config.load(["own_images"], ["Experiment.dataset = @digits()"]).dataset.name == "digits"


def test_a_configuration_has_what_was_asked_for(tmp_path: Path) -> None:
    def stop(event: Event) -> bool:
        return True

    chosen = {"Distiller.inner_steps": 8, "StageAware.window": 3, "StageAware.width_range": 1}
    found = dd.distil(
        "digits",
        truncation="StageAware",
        minutes=0.5,
        settings=chosen,
        run_dir=tmp_path / "run",
        callbacks=[stop],
    )
    assert found.provenance["outer_step"] == 0
    text = read_sealed(tmp_path / "run" / "config.gin")
    for line in ("Distiller.minutes = 0.5", "Distiller.truncation = @StageAware()"):
        assert line in text
