"""Whatever a problem holds is found, and a change to any of it is noticed."""

import array
import collections
import contextvars
import enum
import functools
import os
import types
import weakref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from paths import Weighted, weights
from problems import relative_error, seeded
from torch import nn

import bilevel
from bilevel.compiler import Compiler
from bilevel.contract.held import Snapshot, modules_held_by, reachable

SETTINGS = types.ModuleType("settings")
FACTORS = {"loss": 1.0}


class Defaults:
    factor = 1.0


class Mode(enum.Enum):
    ONE = 1
    TWO = 2


class Slotted:
    __slots__ = ("factor",)

    def __init__(self):
        self.factor = 1.0


@dataclass
class Record:
    factor: float = 1.0


def helper(x, scale=(1.0,)):
    return scale[0] * x


class Factor(Weighted):
    """The inner loss times a factor that is held somewhere."""

    factors = (1.0,)

    def setup(self):
        self.held = self.make()

    @staticmethod
    def of_class():
        return 1.0

    @property
    def of_property(self):
        return 1.0

    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) * self.factor()


def problem(make=lambda: None, factor=lambda self: 1.0):
    kind = type("Problem", (Factor,), {"make": staticmethod(make), "factor": factor})
    return kind()


def replace(target, name, value):
    """A change that is undone when the test is over."""
    return lambda held, patch: patch.setattr(target, name, value)


def item(key, value):
    return lambda held, patch: held.__setitem__(key, value)


def attribute(name, value):
    return lambda held, patch: setattr(held, name, value)


def closure(value):
    return lambda: value


def noted(value):
    def function():
        pass

    function.factor = value
    return function


RECORD = Record()
CASES = {
    "attribute of a module": (
        None,
        lambda self: SETTINGS.factor,
        replace(SETTINGS, "factor", 2.0),
    ),
    "item of a global": (
        None,
        lambda self: FACTORS["loss"],
        lambda _, p: p.setitem(FACTORS, "loss", 2.0),
    ),
    "attribute of a class": (None, lambda self: Defaults.factor, replace(Defaults, "factor", 2.0)),
    "class attribute": (None, lambda self: self.factors[0], replace(Factor, "factors", (2.0,))),
    "static method": (
        None,
        lambda self: self.of_class(),
        replace(Factor, "of_class", staticmethod(lambda: 2.0)),
    ),
    "property": (
        None,
        lambda self: self.of_property,
        replace(Factor, "of_property", property(lambda self: 2.0)),
    ),
    "global function": (
        None,
        lambda self: helper(1.0),
        lambda _, patch: patch.setitem(globals(), "helper", lambda x: 2 * x),
    ),
    "defaults of a function": (
        None,
        lambda self: helper(1.0),
        lambda _, patch: patch.setattr(helper, "__defaults__", ((2.0,),)),
    ),
    "partial": (
        lambda: [functools.partial(helper, 1.0)],
        lambda self: self.held[0](),
        item(0, functools.partial(helper, 2.0)),
    ),
    "closure": (lambda: [closure(1.0)], lambda self: self.held[0](), item(0, closure(2.0))),
    "list in a list": (lambda: [[[1.0]]], lambda self: self.held[0][0][0], item(0, [[2.0]])),
    "deque": (lambda: collections.deque([1.0]), lambda self: self.held[0], item(0, 2.0)),
    "array": (lambda: np.ones(3), lambda self: float(self.held[0]), item(0, 2.0)),
    "set": (
        lambda: {1.0},
        lambda self: max(self.held),
        lambda held, patch: (held.clear(), held.add(2.0)),
    ),
    "slots": (Slotted, lambda self: self.held.factor, attribute("factor", 2.0)),
    "dataclass": (Record, lambda self: self.held.factor, attribute("factor", 2.0)),
    "namespace": (
        lambda: types.SimpleNamespace(factor=1.0),
        lambda self: self.held.factor,
        attribute("factor", 2.0),
    ),
    "enumeration": (
        lambda: [Mode.ONE],
        lambda self: float(self.held[0].value),
        item(0, Mode.TWO),
    ),
    "attribute of a network": (
        lambda: nn.LeakyReLU(1.0),
        lambda self: -self.held(torch.tensor(-1.0)),
        attribute("negative_slope", 2.0),
    ),
    "forward of a network": (
        lambda: nn.Identity(),
        lambda self: self.held(torch.tensor(1.0)),
        attribute("forward", lambda x: 2 * x),
    ),
    "attribute of a function": (
        lambda: [noted(1.0)],
        lambda self: self.held[0].factor,
        lambda held, patch: setattr(held[0], "factor", 2.0),
    ),
    "wrapped function": (
        lambda: [functools.wraps(closure(1.0))(lambda: None)],
        lambda self: self.held[0].__wrapped__(),
        lambda held, patch: setattr(held[0], "__wrapped__", closure(2.0)),
    ),
    "order of a dict": (
        lambda: {"one": 1.0, "two": 2.0},
        lambda self: next(iter(self.held.values())),
        lambda held, patch: held.setdefault("one", held.pop("one")),
    ),
    "array of numbers": (lambda: array.array("d", [1.0]), lambda self: self.held[0], item(0, 2.0)),
    "bytes": (lambda: bytearray(b"\1"), lambda self: self.held[0], item(0, 2)),
    "array of objects": (
        lambda: np.array([[1.0], None], dtype=object),
        lambda self: self.held[0][0],
        lambda held, patch: item(0, 2.0)(held[0], patch),
    ),
    "end of a long list": (
        lambda: [*range(2000), [1.0]],
        lambda self: self.held[-1][0],
        lambda held, patch: item(0, 2.0)(held[-1], patch),
    ),
    "weak reference": (
        lambda: weakref.ref(RECORD),
        lambda self: self.held().factor,
        lambda held, patch: patch.setattr(RECORD, "factor", 2.0),
    ),
    "global that was not there": (
        None,
        lambda self: late() if "late" in globals() else 1.0,  # noqa: F821
        lambda _, patch: patch.setitem(globals(), "late", closure(2.0)),
    ),
    "builtin": (
        None,
        lambda self: float(abs(-1)),
        lambda _, patch: patch.setitem(globals(), "abs", lambda x: 2),
    ),
    "parameter in place": (
        lambda: nn.Linear(1, 1, bias=False).requires_grad_(False),
        lambda self: 1 + self.held.weight.sum() ** 2,
        lambda held, patch: held.weight.fill_(2.0),
    ),
}

SETTINGS.factor = 1.0


@pytest.mark.parametrize("name", CASES)
def test_a_change_to_what_a_problem_holds_is_noticed(name, monkeypatch):
    make, factor, change = CASES[name]
    held = problem(make or (lambda: None), factor)
    hypergradient = bilevel.Hypergradient(held, bilevel.optim.sgd(0.1), 2)
    before = hypergradient(weights(), None, seeded(0)).grads
    snapshot = Snapshot(held, bilevel.optim.adam(0.1))
    hypergradient(weights(), None, seeded(0))
    assert snapshot.unchanged()
    change(held.held, monkeypatch)
    assert relative_error(hypergradient(weights(), None, seeded(0)).grads, before) > 1e-3
    assert not snapshot.unchanged()


@pytest.mark.parametrize("name", ["partial", "attribute of a module"])
def test_a_compiled_step_follows_what_the_problem_holds(name, monkeypatch):
    make, factor, change = CASES[name]
    held = problem(make or (lambda: None), factor)
    hypergradient = bilevel.Hypergradient(held, bilevel.optim.sgd(0.1), 2, compile=True)
    hypergradient.inner.compiler = Compiler(backend="eager")
    outer = weights()
    hypergradient(outer, None, seeded(0))
    change(held.held, monkeypatch)
    after = hypergradient(outer, None, seeded(0)).grads
    eager = bilevel.Hypergradient(held, bilevel.optim.sgd(0.1), 2)(outer, None, seeded(0)).grads
    assert relative_error(after, eager) < 1e-12


VARIABLE = contextvars.ContextVar("factor", default=1.0)

#: What nobody can find without running it: the factor, and a change.
UNREACHABLE = {
    "name that is put together": (
        lambda self: getattr(SETTINGS, "".join(["fac", "tor"])),
        replace(SETTINGS, "factor", 2.0),
    ),
    "environment": (
        lambda self: float(os.environ.get("FACTOR", "1")),
        lambda _, patch: patch.setenv("FACTOR", "2"),
    ),
    "context variable": (lambda self: VARIABLE.get(), lambda _, patch: VARIABLE.set(2.0)),
    "attribute that was not there": (
        lambda self: getattr(self, "later", 1.0),
        lambda held, patch: setattr(held, "later", 2.0),
    ),
    "NumPy's settings": (
        lambda self: 1.0 + (np.geterr()["over"] == "raise"),
        lambda _, patch: np.seterr(over="raise"),
    ),
    "default dtype": (
        lambda self: torch.tensor(1.0).element_size() / 4,
        lambda _, patch: torch.set_default_dtype(torch.float64),
    ),
}


@pytest.mark.parametrize("steps", [2, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", UNREACHABLE)
def test_a_compiled_step_follows_what_only_running_it_shows(name, steps, monkeypatch):
    factor, change = UNREACHABLE[name]
    held = problem(factor=factor)
    hypergradient = bilevel.Hypergradient(held, bilevel.optim.sgd(0.1), steps, compile=True)
    hypergradient.inner.compiler = Compiler(backend="eager")
    outer, settings = weights(), np.geterr()
    hypergradient(outer, None, seeded(0))
    before = hypergradient(outer, None, seeded(0)).grads
    seconds = hypergradient.inner.compiler.seconds
    hypergradient(outer, None, seeded(0))
    assert hypergradient.inner.compiler.seconds == seconds
    try:
        change(held, monkeypatch)
        after = hypergradient(outer, None, seeded(0)).grads
        plain = bilevel.Hypergradient(held, bilevel.optim.sgd(0.1), steps)
        eager = plain(outer, None, seeded(0)).grads
    finally:
        torch.set_default_dtype(torch.float32)
        np.seterr(**settings)
        VARIABLE.set(1.0)
    assert relative_error(after, eager) < 1e-12
    assert relative_error(after, before) > 1e-3


@pytest.mark.parametrize("autocast", [True, False])
def test_a_compiled_step_follows_autocast(autocast):
    held = problem()
    hypergradient = bilevel.Hypergradient(held, bilevel.optim.sgd(0.1), 2, compile=True)
    hypergradient.inner.compiler = Compiler(backend="eager")
    plain = bilevel.Hypergradient(held, bilevel.optim.sgd(0.1), 2)
    outer = weights()
    for enabled in (autocast, not autocast, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found = [each(outer, None, seeded(0)).grads for each in (hypergradient, plain)]
        assert relative_error(*found) < 1e-12


@pytest.mark.parametrize("where", ["object", "class"])
def test_a_method_that_is_replaced_is_noticed(where):
    held = problem()
    snapshot = Snapshot(held)
    assert snapshot.unchanged()
    owner = held if where == "object" else type(held)
    owner.predict = lambda *args: args[-1].sum(1)
    assert not snapshot.unchanged()


def test_what_methods_note_for_themselves_is_no_change():
    held = problem()
    snapshot = Snapshot(held)
    held.last_step = 3
    assert snapshot.unchanged()


def test_modules_are_found_wherever_they_are():
    def make():
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        return {
            "partial": functools.partial(network, 1),
            "closure": (lambda found: lambda x: found(x))(nn.Linear(3, 3)),
            "list": [(nn.Linear(4, 4),)],
            "bound": nn.Linear(5, 5).forward,
        }

    found = [type(module).__name__ for _, module in modules_held_by(problem(make))]
    assert sorted(found) == ["Linear"] * 3 + ["Sequential"]


def test_libraries_are_not_looked_into():
    class Using(Weighted):
        def predict(self, params, inputs):
            return nn.functional.tanh(inputs @ params["theta"]) + np.pi

    assert len(list(reachable(Using()))) < 100
