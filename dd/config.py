"""Configuration by gin: what can be configured, and errors that fit on one line."""

import difflib
import inspect
import io
import re
import tokenize
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any

from torch import nn

import bilevel
import gin
from dd import augmentation, data, networks, objectives, synthetic
from dd.distillation.settings import Distiller
from dd.evaluation import protocols
from dd.evaluation.evaluator import Evaluator
from dd.experiment import Experiment
from dd.runtime.changes import WHEN_JUDGED
from dd.runtime.precision import Precision

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
    "LowRank": bilevel.estimators.LowRank,
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


#: What parameters of version 0.1 are called now.
MOVED = {
    **{
        f"Distiller.{name}": f"RealImages.{name}"
        for name in ("real_batch", "real_micro_batch", "held_out_batch", "alignment", "precision")
    },
    "Precision.tf32": "Distiller.tf32",
}

#: What a set is judged by: all its parameters may change when that is done again.
JUDGES = (Evaluator, protocols.Protocol, augmentation.Augmentation, nn.Module)

_PACKAGED = Path(__file__).parent / "recipes"
#: The recipes that come with `dd`, beside this file in a wheel; the repository has them in gin/.
RECIPES = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[1] / "gin"

#: Parameters that the named files and bindings set themselves, not those they include.
_set_by_user: set[str] = set()


def network(name: str, experiment: Experiment) -> nn.Module:
    """A network by its class's name, as configured, for the images of an experiment.

    Raises:
        ConfigError: There is none of that name, or it cannot take these images.
    """
    classes = {
        name: target
        for name, target in CONFIGURABLES.items()
        if isinstance(target, type) and issubclass(target, nn.Module)
    }
    if name not in classes:
        raise ConfigError(f"there is no architecture {name!r}{_nearest(name, list(classes))}")
    try:
        made: nn.Module = gin.get_configurable(name)(**experiment.image_format)
    except (ValueError, TypeError) as error:
        raise ConfigError(one_line(error)) from error
    return made


class ConfigError(Exception):
    """The configuration cannot be used; the message is one line for the user."""


def load(files: Sequence[str], bindings: Sequence[str]) -> Experiment:
    """Build the experiment that gin files and bindings describe.

    A file is looked for in the working directory, then among the recipes of `dd`: from any
    directory, "digits", "gin/digits" and "gin/digits.gin" are the same recipe.

    Raises:
        ConfigError: A file is missing, a name is misspelt, or a value cannot work.
    """
    gin.clear_config()
    _set_by_user.clear()
    paths = [_found(name, Path()) for name in files]
    try:
        for source in [*(path.read_text("utf-8") for path in paths), *bindings]:
            _set_by_user.update(re.findall(r"^\s*([\w./]+)\s*=", source, re.MULTILINE))
        for path in paths:
            _parse(path)
        gin.parse_config_files_and_bindings([], list(bindings))
        return _EXPERIMENT()
    except (
        ValueError,
        TypeError,
        SyntaxError,
        ImportError,
        tokenize.TokenError,
        OSError,
        bilevel.BilevelError,
    ) as error:
        raise ConfigError(one_line(error)) from error


def _found(name: str, folder: Path) -> Path:
    recipe = PurePath(name)
    if recipe.parts[:1] == ("gin",):
        recipe = recipe.relative_to("gin")
    for path in (folder / name, RECIPES / recipe):
        for spelled in (path, Path(f"{path}.gin")):
            if spelled.is_file():
                return spelled
    beside = sorted(path.name for path in (folder / name).parent.glob("*.gin"))
    recipes = sorted(path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*.gin"))
    near = difflib.get_close_matches(recipe.name, [*beside, *recipes], n=1)
    if near:
        hint = f"did you mean {near[0]!r}?"
    elif beside:
        hint = f"there are {', '.join(beside)}"
    else:
        hint = f"recipes are in {RECIPES}"
    raise ConfigError(f"gin file {name} does not exist; {hint}")


def _parse(path: Path) -> None:
    """Parse a file; what it includes is looked for beside it, wherever one is, then in `dd`."""
    begin = 0
    lines = path.read_text("utf-8").splitlines()

    def flush(end: int) -> None:
        text = io.StringIO("\n" * begin + "\n".join(lines[begin:end]) + "\n")
        text.name = str(path)  # for gin's messages
        gin.parse_config(text)

    for number, line in enumerate(lines):
        include = re.match(r"\s*include\s+(['\"])(.+?)\1", line)
        if include:
            flush(number)
            begin = number + 1
            try:
                target = _found(include[2], path.absolute().parent)
            except ConfigError as error:
                raise ConfigError(f"{path} includes {include[2]}: {error}") from error
            _parse(target)
    flush(len(lines))


def unused() -> list[str]:
    """Parameters that are set on something which nothing refers to, so they have no effect.

    Those of an included file are left out: they let one line switch back to what it describes.
    """
    bindings = parameters(gin.config_str())
    references = " ".join(bindings.values())
    return [
        name
        for name in bindings
        if name in _set_by_user
        and not name.startswith("Experiment.")
        and "." in name
        and not re.search(rf"@(\w+/)*{re.escape(name.rsplit('.', 1)[0])}\b", references)
    ]


def text() -> str:
    """The operative configuration: every parameter in use, defaults included."""
    return str(gin.operative_config_str())


def one_line(error: BaseException) -> str:
    """The gist of an error, with a suggestion for a misspelt name."""
    message = str(error).strip()
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
        known = [
            p
            for p in inspect.signature(CONFIGURABLES[owner]).parameters
            if p not in ("self", "cls")
        ]
        return f"{owner} has no parameter {name!r}{_nearest(name, known)}"
    selector = re.search(r"No configurable matching (?:reference )?'@?([\w./]+)", message)
    if selector:
        name = selector[1].split(".")[0]
        return f"there is nothing called {name!r} to configure{_nearest(name, list(CONFIGURABLES))}"
    missing = re.search(r"Required bindings for `(\w+)` not provided.*: (\[.*\])", message)
    if missing:
        return f"{missing[1]} needs values for {missing[2]}"
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    where = [line for line in lines if line.startswith("In call to configurable")]
    inside = re.search(r"In call to configurable '([\w.]+)'", where[0]) if where else None
    gist = lines[0] if lines else type(error).__name__
    argument = re.search(r"missing \d+ required .*arguments?: (.*)", gist)
    if argument:
        gist = f"it needs a value for {argument[1]}"
    return f"{inside[1]}: {gist}" if inside else gist


def saved_text(path: Path) -> str:
    """The configuration of a run.

    Raises:
        ConfigError: The run is of version 0.1.
        OSError: It cannot be read.
    """
    saved = path.read_text()
    if not MOVED.keys().isdisjoint(parameters(saved)):
        raise ConfigError(
            f"{path.parent} holds a run of version 0.1, which cannot be resumed or judged again; "
            "its distilled set can be judged as that of another run, by --set"
        )
    return saved


def changeable(mark: str) -> set[str]:
    """The parameters that carry a mark of `dd.runtime.changes`."""
    names = set()
    for name, target in CONFIGURABLES.items():
        judges = isinstance(target, type) and issubclass(target, JUDGES)
        for parameter in inspect.signature(target, eval_str=True).parameters.values():
            marks = getattr(parameter.annotation, "__metadata__", ())
            if mark in marks or (judges and mark == WHEN_JUDGED):
                names.add(f"{name}.{parameter.name}")
    return names


def differences(old: str, new: str, allowed: set[str]) -> list[str]:
    """What two operative configurations disagree in, beyond the parameters in `allowed`."""
    first, second = parameters(old), parameters(new)
    return [
        f"{name} was {first.get(name, 'unset')}, now {second.get(name, 'unset')}"
        for name in sorted(first.keys() | second.keys())
        # A run of before a parameter was there has what is None by default now.
        if first.get(name, "None") != second.get(name, "None") and name not in allowed
    ]


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def parameters(configuration: str) -> dict[str, str]:
    """The bindings in a configuration's text, by name."""
    joined = re.sub(r"\\?\n[ \t]+", " ", configuration).replace("=  ", "= ")
    pairs = [line.split(" = ", 1) for line in joined.splitlines() if " = " in line]
    return {name.strip(): value.strip() for name, value in pairs if not name.startswith("#")}
