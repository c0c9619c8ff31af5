"""One vocabulary of checking: what is a number, what is in range, and what the error says."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bilevel.checks import (
    check_callable,
    check_choice,
    check_flag,
    check_instance,
    check_integer,
    check_number,
    check_path,
)
from bilevel.errors import ConfigurationError

NO_NUMBERS = [True, np.True_, None, "3", 1j, [3], np.array([3])]


@pytest.mark.parametrize("kind", [int, np.int64, np.uint8])
def test_integers_of_every_kind(kind):
    found = check_integer("steps", kind(3))
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize("kind", [int, float, np.int32, np.float32, np.float64, Fraction])
def test_numbers_of_every_kind(kind):
    found = check_number("rate", kind(3))
    assert found == 3
    assert type(found) is float


@pytest.mark.parametrize("value", [*NO_NUMBERS, 3.0, np.float64(3), Fraction(3)], ids=repr)
def test_what_is_no_integer(value):
    with pytest.raises(ConfigurationError, match="it must be an integer of at least 1") as error:
        check_integer("steps", value)
    assert str(error.value).startswith(f"steps={value!r}: ")


@pytest.mark.parametrize(
    "value",
    [*NO_NUMBERS, float("inf"), float("nan"), np.float32("inf"), np.float64("nan"), -(10**400)],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_finite_number(value):
    with pytest.raises(ConfigurationError, match="it must be a finite number") as error:
        check_number("rate", value)
    assert str(error.value).startswith(f"rate={value!r}: ")


@given(st.integers(), st.integers(), st.none() | st.integers())
def test_integers_in_a_range(value, minimum, maximum):
    if minimum <= value and (maximum is None or value <= maximum):
        assert check_integer("n", value, minimum, maximum) == value
    else:
        allowed = f"of at least {minimum}" if maximum is None else f"in [{minimum}, {maximum}]"
        with pytest.raises(ConfigurationError) as error:
            check_integer("n", value, minimum, maximum)
        assert str(error.value) == f"n={value}: it must be an integer {allowed}"


@pytest.mark.parametrize(
    ("bounds", "inside", "outside", "allowed"),
    [
        ({"above": 0}, [1e-300, 1e300], [0, -1], "above 0"),
        ({"minimum": 0}, [0, 1e300], [-1e-300], "of at least 0"),
        ({"below": 1}, [-1e300, 0.99], [1, 2], "below 1"),
        ({"maximum": 1}, [-1e300, 1], [1.01], "of at most 1"),
        ({"above": 0, "below": 1}, [0.5], [0, 1], "in (0, 1)"),
        ({"above": 0, "maximum": 1}, [0.5, 1], [0, 1.5], "in (0, 1]"),
        ({"minimum": 0, "below": 1}, [0, 0.5], [-1, 1], "in [0, 1)"),
        ({"minimum": 0, "maximum": 1}, [0, 1], [-0.5, 1.5], "in [0, 1]"),
    ],
    ids=str,
)
def test_numbers_in_a_range(bounds, inside, outside, allowed):
    for value in inside:
        assert check_number("x", value, **bounds) == value
    for value in outside:
        with pytest.raises(ConfigurationError) as error:
            check_number("x", value, **bounds)
        assert str(error.value) == f"x={value}: it must be a finite number {allowed}"


def test_choices():
    assert check_choice("anchor", "end", ("start", "end")) == "end"
    assert type(check_choice("anchor", np.str_("end"), ("start", "end"))) is str
    assert check_choice("compile", False, (True, False, "auto")) is False
    assert check_choice("rank", np.int64(2), (1, 2)) == 2
    for value in ("middle", None, 1, ["end"], np.array(["start", "end"])):
        with pytest.raises(ConfigurationError, match="it must be one of 'start', 'end'"):
            check_choice("anchor", value, ("start", "end"))
    with pytest.raises(ConfigurationError, match="rank=True: it must be one of 1, 2"):
        check_choice("rank", True, (1, 2))
    with pytest.raises(ConfigurationError, match="compile=1: it must be one of True, False"):
        check_choice("compile", 1, (True, False))


def test_flags():
    assert check_flag("exact", True) is True
    assert check_flag("exact", False) is False
    for value in (0, 1, None, "yes", np.True_):
        with pytest.raises(ConfigurationError, match=r"exact=.*: it must be True or False"):
            check_flag("exact", value)


def test_instances():
    value = Fraction(3)
    assert check_instance("share", value, Fraction, "Fraction(3)") is value
    for value, found in ((3, "an int"), ("3", "a str"), (Fraction, "the class Fraction")):
        with pytest.raises(ConfigurationError) as error:
            check_instance("share", value, Fraction, "Fraction(3)")
        expected = f"share is {found}, not a Fraction: write for example Fraction(3)"
        assert str(error.value) == expected
    with pytest.raises(ConfigurationError, match="not an int"):
        check_instance("count", "3", int, "3")


def test_callables():
    assert check_callable("network", Fraction, "ConvNet") is Fraction
    with pytest.raises(ConfigurationError, match=r"network=3: it must be .*, for example ConvNet"):
        check_callable("network", 3, "ConvNet")


@pytest.mark.parametrize("value", ["", "a\0b", b"data", 5, None, ["data"]])
def test_what_can_be_no_path_is_refused(value):
    with pytest.raises(ConfigurationError, match=r"root=.*must be the path of a file or folder"):
        check_path("root", value)


def test_a_path_may_begin_at_home():
    assert check_path("root", "data/x") == check_path("root", Path("data/x")) == Path("data/x")
    assert check_path("root", "~/x") == Path.home() / "x"
