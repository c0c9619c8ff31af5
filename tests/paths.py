"""Every exact way from a problem to its hypergradient, and a small problem to send along them."""

import problems
import torch
from problems import DTYPE, Fixed, randn, seeded

import bilevel
from bilevel.estimators import Adjoint, Forward, Reverse


class Late(bilevel.truncation.Truncation):
    """The window [start, stop), which is not known before the run is over."""

    def __init__(self, start, stop):
        self.window = bilevel.Window(start, stop)

    @property
    def minimum_steps(self):
        return self.window.stop

    def plan(self, steps, generator):
        return bilevel.truncation.Plan(steps, None, self.window.start)

    def select(self, trace, generator):
        return self.window


#: By name, the settings of `Hypergradient` for a window [start, stop).
PATHS = {
    "recorded graph": lambda *window: {"truncation": Fixed(*window)},
    "recursion, inputs kept": lambda *window: {"truncation": Late(*window)},
    "recursion, nothing kept": lambda *window: {"truncation": Fixed(*window), "graph_budget": 0},
    "recursion, iterates recomputed": lambda *window: {
        "truncation": Fixed(*window),
        "graph_budget": 0,
        "keep_every": 3,
    },
    "forward over reverse": lambda *window: {
        "truncation": Fixed(*window),
        "estimator": Adjoint("forward"),
    },
    "forward over reverse, nothing kept": lambda *window: {
        "truncation": Fixed(*window),
        "estimator": Adjoint("forward"),
        "graph_budget": 0,
    },
    "Reverse, recorded again": lambda *window: {
        "truncation": Late(*window),
        "estimator": Reverse(),
    },
    "Reverse, nothing kept": lambda *window: {
        "truncation": Fixed(*window),
        "estimator": Reverse(),
        "graph_budget": 0,
    },
    "Forward": lambda *window: {"truncation": Fixed(*window), "estimator": Forward()},
}

#: Those that keep what every step took of φ, so that it need not be made again.
KEEPING = ("recorded graph", "recursion, inputs kept", "forward over reverse")

GENERATOR = seeded(7)
INPUTS, TARGETS = randn(20, 4, generator=GENERATOR), randn(20, generator=GENERATOR)
TEST_INPUTS, TEST_TARGETS = randn(8, 4, generator=GENERATOR), randn(8, generator=GENERATOR)


class Weighted(bilevel.Problem):
    """Regression on five of twenty examples a step, each with a learned weight.

    Tests override the parts: `setup` for what the problem holds, `rows` for the examples of a step,
    `predict` for the model.
    """

    def __init__(self):
        self.setup()

    def setup(self):
        pass

    def rows(self, step):
        return torch.arange(5 * step, 5 * step + 5) % 20

    def predict(self, params, inputs):
        return torch.tanh(inputs @ params["theta"] + params["bias"])

    def init(self, outer, *, generator):
        return {"theta": torch.full((4,), 0.1, dtype=DTYPE), "bias": torch.ones(1, dtype=DTYPE)}

    def inner_batch(self, outer, step, *, generator):
        rows = self.rows(step)
        return INPUTS[rows], TARGETS[rows], torch.sigmoid(outer["weights"][rows])

    def inner_loss(self, params, batch):
        inputs, targets, weights = batch
        return (weights * (self.predict(params, inputs) - targets) ** 2).mean()

    def outer_loss(self, params, outer, batch):
        return ((self.predict(params, TEST_INPUTS) - TEST_TARGETS) ** 2).mean()


def weights():
    """The outer variables of `Weighted`, as a user holds them."""
    return {"weights": randn(20, generator=seeded(8)).requires_grad_()}


def follow(path, problem, outer, window=(0, 5), optimizer=None, steps=5, seed=0, **options):
    """The result along a path."""
    optimizer = bilevel.optim.sgd(0.1, momentum=0.5) if optimizer is None else optimizer
    hypergradient = bilevel.Hypergradient(
        problem, optimizer, steps, **{**PATHS[path](*window), **options}
    )
    return hypergradient(outer, None, seeded(seed))


def reference(problem, outer, window=(0, 5), optimizer=None, seed=0):
    """(F, dF/dφ) by brute force."""
    optimizer = bilevel.optim.sgd(0.1, momentum=0.5) if optimizer is None else optimizer
    case = problems.Case(problem, outer, None)
    key = bilevel.Key.draw(seeded(seed))
    return problems.brute_force(case, optimizer, key, bilevel.Window(*window))
