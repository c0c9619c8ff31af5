"""Whatever a parameter is set to, it is refused by its name, or it is what may be there.

The parameters are those that gin knows, so one that is new is tested by itself.
"""

import functools
import inspect
import types
import typing
from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
from gin_places import everything, in_its_place, made_by, write_data
from hypothesis import example, given
from hypothesis import strategies as st
from tiny_runs import bindings
from torch import nn
from torchvision import datasets

from dd import config, data
from dd.data.sources import digits
from dd.gin_text import registered

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

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        raise RuntimeError("Dataset not found or corrupted.")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A gin file with which everything can be built from small data."""
    folder = tmp_path_factory.mktemp("values")
    write_data(folder)
    (folder / "base.gin").write_text(everything(folder, *bindings()))
    with pytest.MonkeyPatch.context() as patch:
        module = inspect.getmodule(digits)
        patch.setattr(module, "load_digits", functools.cache(module.load_digits))
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(datasets, "CIFAR10", NoCIFAR)
        patch.setattr(datasets, "CIFAR100", NoCIFAR)
        yield folder / "base.gin"


def check(base: Path, name: str, value: str) -> None:
    """Build an experiment with this value, and prepare its data: in vain, or rightly so."""
    owner, _, parameter = name.partition(".")
    try:
        config.load([str(base)], [*in_its_place(owner), f"{name} = {value}"]).prepare()
    except (config.ConfigError, ValueError) as error:
        message = config.one_line(error)
        if is_of_missing_data(error):
            assert value[0] != "@", f"{name} = {value}"
            assert fits(eval(value), ANNOTATIONS[name]), f"{name} = {value}: {message}"
            return
        assert len(message.splitlines()) == 1, message
        assert len(message) < 1000, message
        # What is wrong with betas may be said of beta2.
        is_named = parameter.removesuffix("s") in message or (
            owner in message and value.strip("'") in message
        )
        # A reference may be named by what it refers to.
        is_named |= value[0] == "@" and value.strip("@()") in message
        is_named |= value == f"@{owner}()" and "refers to itself" in message
        assert is_named, f"{name} = {value}: {message}"
    else:
        assert value[0] == "@" or fits(eval(value), ANNOTATIONS[name]), f"{name} = {value}"


def is_of_missing_data(error: BaseException) -> bool:
    """Whether the parameters were found good, but there is nothing to be read."""
    return isinstance(error.__cause__, data.DatasetNotFoundError) or "pip install" in str(error)


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
