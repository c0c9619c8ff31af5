"""Where whatever gin can name stands in an experiment."""

import inspect
import shutil
import typing
from pathlib import Path

import numpy
import torchopt
from fake_data import write_image, write_tiny_imagenet
from tiny_runs import GIN
from torch import nn

import bilevel
from dd import augmentation, data, objectives, synthetic
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
    objectives.Discrepancy: [
        "Distiller.objective = @MatchFeatures()",
        "MatchFeatures.discrepancy = @{}()",
    ],
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
torchvision.name = 'CIFAR10'
torchvision.root = '{folder}'
torchvision.download = False
hugging_face.path = '{folder}/absent'
cifar100.root = '{folder}'
cifar10.download = False
cifar100.download = False
"""


def made_by(name: str) -> type:
    """The class of what a name stands for."""
    target = registered(name)
    if isinstance(target, type):
        return target
    made = inspect.signature(target, eval_str=True).return_annotation
    made = target.__self__ if made is typing.Self else made
    return made if isinstance(made, type) else typing.get_args(made)[0]


def in_its_place(name: str) -> list[str]:
    """The bindings that make what a name stands for a part of an experiment."""
    places = [lines for kind, lines in PLACES.items() if issubclass(made_by(name), kind)]
    assert places, f"say in PLACES where a {made_by(name)} stands in an experiment"
    return [line.format(name) for line in places[0]]


def everything(folder: Path, *lines: str) -> str:
    """A gin file with which everything can be built, and these lines."""
    needed = NEEDED.replace("{gin}", str(GIN)).replace("{folder}", str(folder))
    return "\n".join([needed, *lines, ""])


def write_data(folder: Path) -> None:
    """The data that `everything` names."""
    write_tiny_imagenet(folder / "tiny")
    for part in ("train", "val"):
        shutil.copytree(folder / "tiny" / "train", folder / "imagenet" / part)
    for label in (0, 1):
        for index in range(20):
            write_image(folder / "classes" / str(label) / f"{index}.png", 100 * label, (32, 32))
    images = numpy.random.default_rng(0).integers(0, 255, (40, 8, 8), numpy.uint8)
    numpy.savez(folder / "arrays.npz", images=images, labels=numpy.arange(40) % 2)
