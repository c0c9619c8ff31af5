"""Configuration by gin: what can be configured, and errors that fit on one line."""

import importlib
import inspect
import re
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import bilevel
import gin
from dd import augmentation, data, networks, objectives, synthetic
from dd.distillation.settings import Distiller
from dd.evaluation import protocols
from dd.evaluation.evaluator import Evaluator
from dd.experiment import Experiment
from dd.gin_text import (
    COMMAND_LINE,
    MOVED,
    RECIPES,
    ConfigError,
    check_is_data,
    differences,
    find,
    nearest,
    parameters,
    parse_text,
    place_in,
    registered,
    registered_names,
    saved_text,
)
from dd.runtime.changes import WHEN_JUDGED
from dd.runtime.error_text import own_line
from dd.runtime.memory import ran_out
from dd.runtime.precision import Precision
from dd.written import (
    begin,
    check_all_is_known,
    check_macros_end,
    macros_set,
    place_of,
    read_binding,
    read_file,
    refer_to_defaults,
    unused,
    user_of,
    warnings_of_unused,
)

#: Every name a gin file can use, with what it stands for.
CONFIGURABLES: dict[str, Callable[..., Any]] = {
    "Experiment": Experiment,
    "Distiller": Distiller,
    "Precision": Precision,
    "Evaluator": Evaluator,
    "DCProtocol": protocols.DCProtocol,
    "Experts": objectives.Experts,
    "MatchExperts": objectives.MatchExperts,
    "MatchFeatures": objectives.MatchFeatures,
    "MeanFeatures": objectives.MeanFeatures,
    "CharacteristicFunctions": objectives.CharacteristicFunctions,
    "RealImages": objectives.RealImages,
    "DifficultyPacing": objectives.DifficultyPacing,
    "PrototypeAlignment": objectives.PrototypeAlignment,
    "SyntheticDataset": synthetic.SyntheticDataset,
    "Pixels": synthetic.Pixels,
    "Patches": synthetic.Patches,
    "MultiFormation": synthetic.MultiFormation,
    "Bases": synthetic.Bases,
    "cifar10": data.cifar10,
    "cifar100": data.cifar100,
    "digits": data.digits,
    "arrays": data.arrays,
    "image_folder": data.image_folder,
    "torchvision": data.torchvision,
    "hugging_face": data.hugging_face,
    "tiny_imagenet": data.tiny_imagenet,
    "imagenet": data.imagenet,
    "standardize": data.Standardize.fit,
    "zca_whitening": data.zca_whitening,
    "kip_whitening": data.kip_whitening,
    "NoAugmentation": augmentation.NoAugmentation,
    "FlipOrRotate": augmentation.FlipOrRotate,
    "DSA": augmentation.DSA,
    "ConvNet": networks.ConvNet,
    "ResNet18": networks.ResNet18,
    "VGG11": networks.VGG11,
    "AlexNet": networks.AlexNet,
    "ViT": networks.ViT,
    "Full": bilevel.truncation.Full,
    "Last": bilevel.truncation.Last,
    "LogUniform": bilevel.truncation.LogUniform,
    "MinimumDistance": bilevel.truncation.MinimumDistance,
    "Pessimistic": bilevel.truncation.Pessimistic,
    "RandomWindow": bilevel.truncation.RandomWindow,
    "StageAware": bilevel.truncation.StageAware,
    "ByMetric": bilevel.truncation.ByMetric,
    "ByFraction": bilevel.truncation.ByFraction,
    "Softmax": bilevel.truncation.Softmax,
    "EffectiveSteps": bilevel.truncation.EffectiveSteps,
    "WithinTrajectoryPolicy": bilevel.truncation.WithinTrajectoryPolicy,
    "Adjoint": bilevel.estimators.Adjoint,
    "Reverse": bilevel.estimators.Reverse,
    "FirstOrder": bilevel.estimators.FirstOrder,
    "LowRank": bilevel.estimators.LowRank,
    "Penalty": bilevel.estimators.Penalty,
    "ValueFunction": bilevel.estimators.ValueFunction,
    "MoreauEnvelope": bilevel.estimators.MoreauEnvelope,
    "Krylov": bilevel.basis.Krylov,
    "Eigenvectors": bilevel.basis.Eigenvectors,
    "MovingAverageClip": bilevel.clip.MovingAverageClip,
    "MovingAverageRowClip": bilevel.clip.MovingAverageRowClip,
    "sgd": bilevel.optim.sgd,
    "adam": bilevel.optim.adam,
    "adamw": bilevel.optim.adamw,
    "rmsprop": bilevel.optim.rmsprop,
    "adagrad": bilevel.optim.adagrad,
}

_EXPERIMENT = gin.external_configurable(Experiment, "Experiment")
for _name, _target in CONFIGURABLES.items():
    if _name != "Experiment":
        gin.external_configurable(_target, _name)


#: What a set is judged by: all its parameters may change when that is done again.
JUDGES = (Evaluator, protocols.Protocol, augmentation.Augmentation, nn.Module)
#: What every network is told of the images.
SIZES = {"num_classes", "channels", "image_size"}
__all__ = [
    "CONFIGURABLES",
    "RECIPES",
    "ConfigError",
    "differences",
    "parameters",
    "saved_text",
    "unused",
    "warnings_of_unused",
]


def network(name: str, experiment: Experiment) -> nn.Module:
    """A network by its class's name, as configured, for the images of an experiment.

    Raises:
        ConfigError: There is none of that name, or it cannot take these images.
    """
    if not _is_network(name):
        networks_there = [name for name in registered_names() if _is_network(name)]
        raise ConfigError(f"there is no architecture {name!r}{nearest(name, networks_there)}")
    try:
        return networks.network_for(gin.get_configurable(name), experiment.image_format)
    except (ValueError, TypeError) as error:
        raise ConfigError(one_line(error) + own_line(error)) from error


def _is_network(name: str) -> bool:
    """Whether a name is that of a network's class, or of a function that makes networks."""
    target = registered(name)
    if isinstance(target, type):
        return issubclass(target, nn.Module)
    return target is not None and inspect.signature(target).parameters.keys() >= SIZES


def load(
    files: Sequence[str],
    bindings: Sequence[str],
    *,
    modules: Sequence[str] = (),
    saved: str | None = None,
    name: str = "config.gin",
) -> Experiment:
    """Build the experiment that gin files and bindings describe.

    A file is looked for in the working directory, then among the recipes of `dd`: from any
    directory, "digits", "gin/digits" and "gin/digits.gin" are the same recipe.

    Args:
        files: Gin files of the user's. They may import modules, which runs them.
        bindings: Of single parameters, after the files.
        modules: Imported first: what they register can be named.
        saved: The configuration of a run, before the files. It is data: it runs nothing.
        name: What messages call it.

    Raises:
        ConfigError: A file is missing, a name is misspelt, or a value cannot work.
    """
    gin.clear_config()
    begin()
    try:
        for module in modules:
            importlib.import_module(module)
        if saved is not None:
            parse_text(check_is_data(saved, name, modules), name)
        for path in [find(each, Path()) for each in files]:
            read_file(path)
        for binding in bindings:
            read_binding(binding)
        check_macros_end()
        check_sizes_are_left()
        refer_to_defaults()
        gin.finalize()
        check_all_is_known()
        return _EXPERIMENT()
    except RecursionError as error:
        raise ConfigError("the configuration refers to itself, or is nested too deeply") from error
    except (
        ValueError,
        TypeError,
        SyntaxError,
        ImportError,
        tokenize.TokenError,
        OSError,
        bilevel.BilevelError,
    ) as error:
        raise ConfigError(one_line(error) + own_line(error)) from error
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise ConfigError(f"out of memory: this is too large: {one_line(error)}") from error


def check_sizes_are_left() -> None:
    """Refuse sizes of networks that the dataset says, which would have no effect."""
    for name in parameters(gin.config_str()):
        owner, _, parameter = name.rpartition("/")[2].rpartition(".")
        if parameter in SIZES and _is_network(owner):
            raise ConfigError(
                f"{name}{place_of(name)} is what the dataset has; leave it out, or change the data"
            )


def text() -> str:
    """The operative configuration: every parameter in use, defaults included."""
    return str(gin.operative_config_str())


def one_line(error: BaseException) -> str:
    """The gist of an error, with a suggestion for a misspelt name, and the place if it has one."""
    message = str(error).strip()
    gist, place = _gist(message) or type(error).__name__, place_in(message)
    gist = re.sub(r"(\d{40})\d+", r"\1…", gist)  # nobody reads a number of four hundred digits
    if place is None or place.file == COMMAND_LINE or f"{place.file}, line" in gist:
        return gist
    return f"{place}: {gist}"


def _gist(message: str) -> str:
    parameter = re.search(
        r"Configurable '([\w.]+)' doesn't have a parameter named '(\w+)'", message
    )
    if parameter:
        owner, name = parameter[1].split(".")[-1], parameter[2]
        moved = MOVED.get(f"{owner}.{name}")
        if moved is not None:
            return f"{owner}.{name} is now {moved}" + (
                " (with Distiller.objective = @RealImages())" if "RealImages" in moved else ""
            )
        known = inspect.signature(registered(parameter[1])).parameters.keys() - {"self", "cls"}
        return f"{owner} has no parameter {name!r}{nearest(name, sorted(known))}"
    selector = re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", message)
    if selector:
        name = selector[1].split(".")[0]
        if name in registered_names():
            return f"@{selector[1]} names a parameter; a reference is to what has it, as @{name} is"
        return f"there is nothing called {name!r} to configure{nearest(name, registered_names())}"
    if "malformed node or string" in message:
        return (
            "a value is a number, a text in quotes, True, False, None, a list, tuple or dict of "
            "such, @NAME or %MACRO; it is not computed"
        )
    if "EOF in multi-line" in message:
        return "a bracket or a text is opened and not closed"
    macro = re.search(r"No bindings specified for '([\w./]+)/gin\.macro'", message)
    if macro:
        others = macros_set()
        return f"%{macro[1]}{user_of(macro[1])} is not set" + (
            nearest(macro[1], others) if others else ""
        )
    missing = re.search(r"Required bindings for `(\w+)` not provided.*: (\[.*\])", message)
    if missing:
        return f"{missing[1]} needs values for {missing[2]}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    inside = re.search(r"^\s*In call to configurable '([\w.]+)'", message, re.MULTILINE)
    gist = lines[0] if lines else ""
    gist = re.sub(
        r"[\w.]+\(\) missing \d+ required .*arguments?: (.*)", r"it needs a value for \1", gist
    )
    if inside is None:
        return gist
    # Our messages begin with the parameter.
    named = re.match(r"(\w+)", gist)
    return f"{inside[1]}: {gist}" + (place_of(f"{inside[1]}.{named[1]}") if named else "")


def changeable(mark: str) -> Callable[[str], bool]:
    """Whether a parameter, by its name, carries a mark of `dd.runtime.changes`."""

    def is_marked(name: str) -> bool:
        owner, _, parameter = name.rpartition("/")[2].rpartition(".")
        target = registered(owner) if owner else None
        if target is None:
            return False
        if mark == WHEN_JUDGED and judges(owner):
            return True
        found = inspect.signature(target, eval_str=True).parameters.get(parameter)
        return found is not None and mark in getattr(found.annotation, "__metadata__", ())

    return is_marked


def judges(owner: str) -> bool:
    """Whether it is a network, of one's own too, or one of `JUDGES`."""
    target = registered(owner) if owner else None
    is_judge = isinstance(target, type) and issubclass(target, JUDGES)
    return is_judge or (target is not None and _is_network(owner))
