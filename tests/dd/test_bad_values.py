"""Whatever a parameter is set to, it is refused by its name, or it is what may be there.

The parameters are those that gin knows, so one that is new is tested by itself.
"""

import functools
import inspect
import shutil
import types
import typing
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import numpy
import pytest
import torchopt
from fake_data import write_image, write_tiny_imagenet
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_runs import GIN, bindings
from torch import nn
from torchvision import datasets

import bilevel
from dd import augmentation, config, data, objectives, synthetic
from dd.data.sources import digits
from dd.distillation.settings import Distiller
from dd.evaluation.evaluator import Evaluator
from dd.evaluation.protocols import Protocol
from dd.experiment import Experiment
from dd.gin_text import registered
from dd.runtime.precision import Precision

STAGES = "Distiller.truncation = @StageAware()"
#: What makes something of a kind part of an experiment: the first that fits.
PLACES: dict[type, list[str]] = {
    Experiment: [],
    Distiller: [],
    Evaluator: [],
    synthetic.SyntheticDataset: [],
    Precision: ["RealImages.precision = @{}()"],
    Protocol: ["Evaluator.protocol = @{}()"],
    objectives.Experts: [
        "RealImages.alignment = @PrototypeAlignment()",
        "PrototypeAlignment.experts = @{}()",
    ],
    objectives.MatchExperts: [
        "Distiller.objective = @{}()",
        "Distiller.optimizer = @sgd",
        "Distiller.truncation = @MinimumDistance()",
    ],
    objectives.Objective: ["Distiller.objective = @{}()"],
    objectives.DifficultyPacing: ["RealImages.pacing = @{}()"],
    objectives.PrototypeAlignment: ["RealImages.alignment = @{}()"],
    synthetic.Parameterisation: ["SyntheticDataset.parameterisation = @{}()"],
    data.ImageDataset: ["Experiment.dataset = @{}()"],
    data.PixelTransform: ["Experiment.transform = @{}"],
    augmentation.Augmentation: ["Experiment.augmentation = @{}()"],
    nn.Module: ["Experiment.dataset = @image_folder()", "Experiment.network = @{}"],
    bilevel.truncation.Truncation: ["Distiller.truncation = @{}()"],
    bilevel.truncation.Transition: [STAGES, "StageAware.transition = @{}()"],
    bilevel.truncation.StepDistribution: [STAGES, "StageAware.distribution = @{}()"],
    bilevel.estimators.Estimator: ["Distiller.estimator = @{}()"],
    bilevel.basis.Basis: ["Distiller.estimator = @LowRank()", "LowRank.basis = @{}()"],
    bilevel.clip.Clip: ["Distiller.clip = @{}()"],
    torchopt.base.GradientTransformation: ["Distiller.optimizer = @{}()"],
}
#: What has no default, or one for real data; {} is the folder of `base`.
NEEDED = """
include '{gin}/digits.gin'
window = 3
width_range = 2
Experts.folder = '{folder}/experts'
Experts.snapshots = 5
Experts.steps_between_snapshots = 1
MatchExperts.experts = @Experts()
MatchExperts.max_start = 1
Patches.patches_per_side = 1
EffectiveSteps.fraction = 0.5
sgd.lr = 0.1
ByMetric.metric = 'loss'
RealImages.held_out_batch = 20
arrays.path = '{folder}/arrays.npz'
image_folder.root = '{folder}/classes'
image_folder.image_size = 32
imagenet.root = '{folder}/imagenet'
imagenet.image_size = 16
tiny_imagenet.root = '{folder}/tiny'
tiny_imagenet.image_size = 16
cifar10.root = '{folder}'
cifar100.root = '{folder}'
cifar10.download = False
cifar100.download = False
"""
#: As gin has them. What begins with @ refers to something.
VALUES = [
    *("None", "True", "False", "'text'", "''", r"'a\0b'", "b'x'", "1j"),
    *("[]", "()", "{}", "[1]", "(0.5, 'x')", "[None, None]", "{'a': 1}", "[1e400, 1e400]"),
    *("0", "-1", "1", "0.5", "-0.5", "1.5", "1e400", "-1e400", "1e300", "5e-324", "(-1, -1)"),
    *("2147483648", "9223372036854775808", "1000000000000", "1" + 30 * "0", "1" + 400 * "0"),
    *("@ConvNet", "@adam()", "@NoAugmentation()"),
]
drawn = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(inner, inner),
    max_leaves=3,
).map(lambda value: repr(value).replace("inf", "1e400"))


def made_by(name: str) -> type:
    """The class of what a name stands for."""
    target = registered(name)
    if isinstance(target, type):
        return target
    made = inspect.signature(target, eval_str=True).return_annotation
    return target.__self__ if made is typing.Self else made


def parameters_of(name: str) -> dict[str, Any]:
    """The parameters that a configuration may set, and their annotations."""
    found = inspect.signature(registered(name), eval_str=True).parameters.values()
    given = {nn.Module: {"num_classes", "channels", "image_size"}, data.PixelTransform: {"images"}}
    taken = {p for kind, names in given.items() if issubclass(made_by(name), kind) for p in names}
    return {each.name: each.annotation for each in found if each.name not in taken}


ANNOTATIONS = {
    f"{name}.{parameter}": annotation
    for name in config.CONFIGURABLES
    for parameter, annotation in parameters_of(name).items()
}


class NoCIFAR:
    """torchvision's, where there are no data and there is no network."""

    url = "the archive"

    def __init__(self, root: str, train: bool, download: bool) -> None:
        raise RuntimeError("Dataset not found or corrupted.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A gin file with which everything can be built from small data."""
    folder = tmp_path_factory.mktemp("values")
    write_tiny_imagenet(folder / "tiny")
    for part in ("train", "val"):
        shutil.copytree(folder / "tiny" / "train", folder / "imagenet" / part)
    for label in (0, 1):
        for index in range(20):
            write_image(folder / "classes" / str(label) / f"{index}.png", 100 * label, (32, 32))
    images = numpy.random.default_rng(0).integers(0, 255, (40, 8, 8), numpy.uint8)
    numpy.savez(folder / "arrays.npz", images=images, labels=numpy.arange(40) % 2)
    lines = [NEEDED.replace("{gin}", str(GIN)).replace("{folder}", str(folder)), *bindings()]
    (folder / "base.gin").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        module = inspect.getmodule(digits)
        patch.setattr(module, "load_digits", functools.cache(module.load_digits))
        patch.chdir(folder)
        patch.setattr(datasets, "CIFAR10", NoCIFAR)
        patch.setattr(datasets, "CIFAR100", NoCIFAR)
        yield folder / "base.gin"


def lines_for(name: str, value: str) -> list[str]:
    owner = name.partition(".")[0]
    places = [lines for kind, lines in PLACES.items() if issubclass(made_by(owner), kind)]
    assert places, f"say in PLACES where a {made_by(owner)} stands in an experiment"
    return [*(line.format(owner) for line in places[0]), f"{name} = {value}"]


def check(base: Path, name: str, value: str) -> None:
    """Build an experiment with this value, and prepare its data: in vain, or rightly so."""
    owner, _, parameter = name.partition(".")
    try:
        config.load([str(base)], lines_for(name, value)).prepare()
    except (config.ConfigError, ValueError) as error:
        message = config.one_line(error)
        assert len(message.splitlines()) == 1, message
        assert len(message) < 1000, message
        # What is wrong with betas may be said of beta2.
        is_named = parameter.removesuffix("s") in message or (
            owner in message and value.strip("'") in message
        )
        is_named |= value == f"@{owner}()" and "refers to itself" in message
        assert is_named, f"{name} = {value}: {message}"
    else:
        assert value[0] == "@" or fits(eval(value), ANNOTATIONS[name]), f"{name} = {value}"


def fits(value: Any, annotation: Any) -> bool:
    """Whether a value is of the type that an annotation says, finite, and no text where any is."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return fits(value, inside[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in inside)
    if origin is typing.Literal:
        return value in inside
    if origin in (tuple, Sequence):
        each = inside[0]
        return isinstance(value, (list, tuple)) and all(fits(item, each) for item in value)
    if annotation is typing.Any:
        return fits(value, float | Sequence[float] | dict)
    if annotation is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and isfinite(value)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**64
    return isinstance(value, types.NoneType if annotation is None else annotation)


def test_there_are_all_parameters() -> None:
    assert len(ANNOTATIONS) > 150
    assert {"Experiment.seed", "zca_whitening.epsilon", "ViT.heads", "adam.lr"} <= set(ANNOTATIONS)


@given(name=st.sampled_from(sorted(ANNOTATIONS)), value=drawn | st.sampled_from(VALUES))
@example("cifar10.root", "b'x'")
@example("cifar10.download", "'no'")
@example("arrays.path", r"'a\0b'")
@example("arrays.white", "1e300")
@example("digits.seed", "9223372036854775808")
@example("Experiment.seed", "1000000000000")
@example("adam.betas", "(0.5, 'x')")
@example("zca_whitening.chunk", "0.5")
@example("image_folder.image_size", "1000000000000")
@example("zca_whitening.cache_folder", "5")
@example("Experiment.device", "1" + 30 * "0")
@example("ResNet18.width", "1000000000000")
@example("VGG11.width", "1000000000000")
@example("ConvNet.depth", "1000000000000")
@example("ViT.depth", "1000000000000")
@example("SyntheticDataset.images_per_class", "1000000000000")
@example("Experiment.seed", "1" + 400 * "0")
def test_a_value_is_refused_by_name_or_is_allowed(base: Path, name: str, value: str) -> None:
    check(base, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ANNOTATIONS)
def test_all_values_are_refused_by_name_or_are_allowed(base: Path, name: str) -> None:
    for value in VALUES:
        check(base, name, value)
