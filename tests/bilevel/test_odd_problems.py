"""What a problem is made of in odd ways: the exact hypergradient, or a sentence that names it."""

import functools
from collections import OrderedDict, deque
from typing import Any, NamedTuple

import optree
import pytest
import torch
from paths import PATHS, Fixed, Weighted, follow, reference, weights
from problems import DTYPE, relative_error, seeded
from torch import nn
from torchopt.base import GradientTransformation

import bilevel

every_path = pytest.mark.parametrize("path", PATHS)


def exact(path, problem, optimizer=None):
    """Along a path it is what brute force gives."""
    outer = weights()
    result = follow(path, problem, outer, optimizer=optimizer)
    loss, grads = reference(problem, outer, optimizer=optimizer)
    assert relative_error(result.loss, loss) < 1e-12
    assert relative_error(result.grads, grads) < 1e-8


# --- what a batch is made of --------------------------------------------------------------------


class Form(Weighted):
    """The weights of a batch in another form."""

    def __init__(self, make, read):
        super().__init__()
        self.make, self.read = make, read

    def inner_batch(self, outer, step, *, generator):
        inputs, targets, weights = super().inner_batch(outer, step, generator=generator)
        return inputs, targets, self.make(weights)

    def inner_loss(self, params, batch):
        inputs, targets, weights = batch
        return super().inner_loss(params, (inputs, targets, self.read(weights)))


class Pair(NamedTuple):
    one: Any
    other: Any


FORMS = {
    "complex": (lambda w: torch.complex(w, w), lambda w: w.real + w.imag),
    "spectrum": (torch.fft.fft, lambda w: torch.fft.ifft(w).real),
    "expanded": (lambda w: w.mean().expand(5), lambda w: w),
    "one by one": (lambda w: [*w], torch.stack),
    "named": (lambda w: Pair(None, {"w": (w,)}), lambda w: w.other["w"][0]),
    "twice": (lambda w: deque([w, w[:2]]), lambda w: w[0] * w[1].sum()),
    "ordered": (lambda w: OrderedDict(z=w, a=()), lambda w: w["z"]),
}


@every_path
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_any_form_is_exact(path, form):
    exact(path, Form(*FORMS[form]))


@every_path
def test_a_batch_of_less_precision_is_no_reason_to_refuse(path):
    result = follow(path, Form(torch.Tensor.float, torch.Tensor.double), weights())
    _, grads = reference(Form(lambda w: w, lambda w: w), weights())
    assert relative_error(result.grads, grads) < 1e-6


def nested(tensors):
    return torch.nested.as_nested_tensor(tensors, layout=torch.jagged)


@every_path
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda w: iter([w]), "list_iterator at '2', which can be read only once"),
        (lambda w: (x for x in [w]), "generator at '2', which can be read only once"),
        (lambda w: map(torch.sin, [w]), "map at '2', which can be read only once"),
        (torch.Tensor.to_sparse, r"layout torch\.sparse_coo at '2' that depends on outer"),
        (lambda w: nested([w]), r"a nested torch\.float64 tensor at '2' that depends on outer"),
    ],
)
def test_a_batch_that_cannot_be_read_again_or_differentiated_is_named(path, make, words):
    with pytest.raises(bilevel.ProblemError, match=words):
        follow(path, Form(make, lambda w: next(iter(w))), weights())


# --- what parameters and outer variables are made of --------------------------------------------


class Started(Weighted):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def init(self, outer, *, generator):
        return {"theta": self.make(), "bias": torch.ones(1, dtype=DTYPE)}


def made_under_inference_mode():
    with torch.inference_mode():
        return torch.full((4,), 0.1, dtype=DTYPE)


STARTS = {
    "expanded": lambda: torch.tensor(0.1, dtype=DTYPE).expand(4),
    "strided": lambda: torch.arange(8, dtype=DTYPE)[::2],
    "a parameter": lambda: nn.Parameter(torch.full((4,), 0.1, dtype=DTYPE), requires_grad=False),
}


@every_path
@pytest.mark.parametrize("start", STARTS)
def test_parameters_of_any_layout_are_exact(path, start):
    exact(path, Started(STARTS[start]))


@every_path
def test_parameters_made_under_inference_mode_are_taken(path):
    result = follow(path, Started(made_under_inference_mode), weights())
    assert relative_error(result.grads, reference(Weighted(), weights())[1]) < 1e-8


NO_VARIABLES = {
    "sparse": (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
    "of eight bits": (torch.ones(2).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "without numbers": (torch.ones(2, device="meta"), "on the meta device"),
    "nested": (nested([torch.ones(2)]), "a nested torch.float32 tensor"),
    "complex": (torch.ones(2, dtype=torch.complex64), "torch.complex64"),
    "a generator": (nn.Linear(2, 2).parameters(), "a generator"),
}


@pytest.mark.parametrize("name", NO_VARIABLES)
def test_what_cannot_be_optimised_is_named(name):
    value, words = NO_VARIABLES[name]
    with pytest.raises(bilevel.ProblemError, match=f"init returned .*{words}.*at 'theta'"):
        follow("recorded graph", Started(lambda: value), weights())
    with pytest.raises(bilevel.ProblemError, match=f"outer variable 'weights' is .*{words}"):
        follow("recorded graph", Weighted(), {"weights": value})


# --- what an optimizer keeps ---------------------------------------------------------------------


def own(update, init):
    def rule(updates, state, *, params=None, inplace=True):
        return update(updates, state)

    return GradientTransformation(init, rule)


def scaled(rate, updates):
    return optree.tree_map(lambda g: -rate * g, updates)


def gather(updates, state):
    """Momentum whose buffers are made by the first step."""
    state = updates if state is None else optree.tree_map(lambda m, g: m / 2 + g, state, updates)
    return scaled(0.1, state), state


def remember(updates, state):
    """Every gradient so far."""
    state = (*state, updates)
    return optree.tree_map(lambda *g: -0.1 * sum(g), *state), state


STATES = {
    "a count": own(lambda u, s: (scaled(0.2 / (1 + s), u), s + 1), lambda p: 0),
    "a rate": own(lambda u, s: (scaled(s[0], u), [0.7 * s[0]]), lambda p: [0.2]),
    "a word": own(lambda u, s: (scaled(0.01 if s == "cold" else 0.2, u), "warm"), lambda p: "cold"),
    "later a buffer": own(gather, lambda p: None),
    "more and more": own(remember, lambda p: ()),
}


@every_path
@pytest.mark.parametrize("state", STATES)
def test_a_state_that_begins_without_a_tensor_is_one_nevertheless(path, state):
    exact(path, Weighted(), STATES[state])


BROKEN = {
    "list": (lambda u, s: (list(u.values()), s), "returned updates of the structure"),
    "sum": (lambda u, s: (optree.tree_map(torch.sum, u), s), "returned updates of shapes"),
    "numbers": (lambda u, s: (optree.tree_map(lambda g: 0.1, u), s), "updates of shapes"),
    "one result": (lambda u, s: u, "cannot be run on the pytree that init returned"),
    "attribute": (lambda u, s: (u.theta, s), "cannot be run on the pytree that init returned"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_optimizer_that_does_not_fit_is_named(name):
    update, words = BROKEN[name]
    with pytest.raises(bilevel.ConfigurationError, match=words):
        follow("recorded graph", Weighted(), weights(), optimizer=own(update, lambda p: ()))


def test_hyperparameters_have_the_same_names_at_every_step():
    class Later(Weighted):
        def hyperparameters(self, outer, step):
            rate = {"lr": torch.tensor(0.1, dtype=DTYPE)}
            return rate if step < 2 else {**rate, "momentum": torch.tensor(0.5, dtype=DTYPE)}

    with pytest.raises(bilevel.ProblemError, match="the same names at every step"):
        follow("recorded graph", Later(), weights(), optimizer=bilevel.optim.sgd)


# --- what methods do late, and what they return --------------------------------------------------


class LateStepLoss(Weighted):
    calls = 0

    def step_loss(self, params, outer, step, *, generator):
        self.calls += step > 2
        return (1 + self.calls) * (params["theta"] ** 2).sum()


class LateHyperparameters(Weighted):
    calls = 0

    def hyperparameters(self, outer, step):
        self.calls += step > 2
        return {"lr": torch.tensor(0.1 * 0.9**self.calls, dtype=DTYPE)}


@every_path
@pytest.mark.parametrize("problem", [LateStepLoss, LateHyperparameters])
def test_what_changes_late_in_the_run_is_named(path, problem):
    optimizer = bilevel.optim.sgd if problem is LateHyperparameters else None
    with pytest.raises(bilevel.ProblemError, match="is no pure function"):
        follow(path, problem(), weights(), optimizer=optimizer)


class Reported(Weighted):
    def __init__(self, report):
        super().__init__()
        self.report = report

    def outer_loss(self, params, outer, batch):
        loss = super().outer_loss(params, outer, batch)
        return (loss, *self.report)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ((), r"the tuple \(a torch.float64 tensor"),
        (([1],), "a list"),
        ((None,), "a NoneType"),
        (({}, 1), "a int"),
        (({"name": "x"},), "the metric 'name' of outer_loss is a str"),
        (({"all": {"a": 1.0}},), "the metric 'all' of outer_loss is a dict"),
    ],
)
def test_metrics_are_a_dict_of_numbers(report, words):
    with pytest.raises(bilevel.ProblemError, match=words):
        follow("recorded graph", Reported(report), weights())


@pytest.mark.parametrize("method", [None, 3, "loss"])
def test_a_method_that_is_none_is_named(method):
    problem = type("Mine", (Weighted,), {"inner_loss": method})()
    with pytest.raises(bilevel.ProblemError, match=f"Mine.inner_loss is {method!r}"):
        bilevel.Hypergradient(problem, bilevel.optim.sgd(0.1), 3)


@pytest.mark.parametrize(
    "error", [RuntimeError("my jvp layer"), ValueError("x"), NotImplementedError("no jvp")]
)
def test_errors_of_the_users_own_are_left_as_they_are(error):
    def fail(*args):
        raise error

    problem = type("Mine", (Weighted,), {"inner_loss": fail})()
    with pytest.raises(type(error)) as caught:
        follow("recorded graph", problem, weights())
    assert caught.value is error


def test_what_a_method_keeps_from_forward_mode_is_named():
    class Observing(Weighted):
        highest = torch.zeros(1, dtype=DTYPE)

        def predict(self, params, inputs):
            output = super().predict(params, inputs)
            self.highest = torch.maximum(self.highest, output.detach().abs().max())
            return output / self.highest

    with pytest.raises(bilevel.ProblemError, match=r"keeps a tensor|is no pure function"):
        follow("Forward", Observing(), weights())


# --- settings and where a call is made ------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"keep_on": "gpu"}, "keep_on='gpu': it must be a device"),
        ({"keep_on": 1.5}, "keep_on=1.5: it must be a device"),
        ({"keep_on": "meta"}, "holds no numbers"),
        ({"compile": "inductor"}, "compile='inductor': it must be True or False"),
    ],
)
def test_settings_of_another_kind_are_named(setting, words):
    with pytest.raises(bilevel.ConfigurationError, match=words):
        bilevel.Hypergradient(Weighted(), bilevel.optim.sgd(0.1), 3, **setting)


@pytest.mark.parametrize("window", [(0.0, 3.0), (0, 2.5), ("0", 3), (None, 3)])
def test_a_window_has_integers(window):
    with pytest.raises(bilevel.ConfigurationError, match="both integers"):
        bilevel.Window(*window)


@pytest.mark.parametrize("generator", [3, "x", torch.Generator])
def test_a_generator_is_one_of_pytorch(generator):
    hypergradient = bilevel.Hypergradient(Weighted(), bilevel.optim.sgd(0.1), 3)
    with pytest.raises(bilevel.ConfigurationError, match=r"it must be a torch\.Generator"):
        hypergradient(weights(), None, generator)


@pytest.mark.parametrize("name", ["__call__", "loss", "backward"])
def test_inference_mode_is_refused(name):
    outer = weights()
    hypergradient = bilevel.Hypergradient(Weighted(), bilevel.optim.sgd(0.1), 3)
    with torch.inference_mode(), pytest.raises(bilevel.ProblemError, match=r"torch\.no_grad"):
        getattr(hypergradient, name)(outer)


def test_the_bridge_has_no_forward_derivative():
    hypergradient = bilevel.Hypergradient(
        Weighted(), bilevel.optim.sgd(0.1), 3, truncation=Fixed(0, 3)
    )
    loss = functools.partial(hypergradient.loss, outer_batch=None, generator=seeded(0))
    point = weights()["weights"].detach()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(point, point)
        with pytest.raises(bilevel.ProblemError, match="no forward derivative"):
            loss({"weights": dual})
