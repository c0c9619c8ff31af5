"""What methods do to what they are given, and what they hide: named, wherever it could mislead."""

import numpy as np
import pytest
import torch
from paths import PATHS, Fixed, Weighted, follow, reference, weights
from problems import DTYPE, relative_error, seeded
from torchopt.base import GradientTransformation

import bilevel
from bilevel.compiler import Compiler
from bilevel.estimators import (
    Adjoint,
    EvolutionStrategies,
    FiniteDifference,
    Forward,
    Implicit,
    MoreauEnvelope,
    Penalty,
    PersistentEvolutionStrategies,
    ValueFunction,
)

every_path = pytest.mark.parametrize("path", PATHS)


def made(problem, optimizer=None, steps=5, **options):
    optimizer = bilevel.optim.sgd(0.1, momentum=0.5) if optimizer is None else optimizer
    return bilevel.Hypergradient(problem, optimizer, steps, **options)


def compiled(problem, steps=5, **options):
    """Traced, and run as it was traced: what inductor makes of it is tested elsewhere."""
    hypergradient = made(problem, steps=steps, compile=True, **options)
    hypergradient.inner.compiler = Compiler("eager")
    return hypergradient


# --- arguments -----------------------------------------------------------------------------------


def scale_data(outer):
    outer["weights"].data.mul_(1.01)


def scale_under_no_grad(outer):
    with torch.no_grad():
        outer["weights"].mul_(1.01)


def rebind(outer):
    outer["weights"] = outer["weights"] * 1.01


def put_in(outer):
    outer["more"] = 1.0


def through_numpy(outer):
    outer["weights"].detach().numpy()[0] += 1


class Touching(Weighted):
    """One method does something to the outer variables that it is given."""

    def __init__(self, method, touch):
        super().__init__()
        self.method, self.touch = method, touch

    def _touch(self, method, outer):
        if method == self.method:
            self.touch(outer)

    def init(self, outer, *, generator):
        self._touch("init", outer)
        return super().init(outer, generator=generator)

    def inner_batch(self, outer, step, *, generator):
        self._touch("inner_batch", outer)
        return super().inner_batch(outer, step, generator=generator)

    def hyperparameters(self, outer, step):
        self._touch("hyperparameters", outer)
        return {"lr": torch.tensor(0.1, dtype=DTYPE)}

    def step_loss(self, params, outer, step, *, generator):
        self._touch("step_loss", outer)
        return (params["theta"] ** 2).sum()

    def outer_loss(self, params, outer, batch):
        self._touch("outer_loss", outer)
        return super().outer_loss(params, outer, batch)


METHODS = ("init", "inner_batch", "hyperparameters", "step_loss", "outer_loss")


@pytest.mark.parametrize("touch", [scale_data, scale_under_no_grad, rebind, put_in, through_numpy])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["recorded graph", "recursion, nothing kept"])
def test_a_method_that_changes_the_outer_variables_is_named(path, method, touch):
    problem = Touching(method, touch)
    with pytest.raises(bilevel.ProblemError, match=f"{method} (writes to|takes something out of)"):
        follow(path, problem, weights(), optimizer=bilevel.optim.sgd)


def test_the_users_own_outer_variables_are_left_alone():
    outer = weights()
    before = outer["weights"].detach().clone()
    with pytest.raises(bilevel.ProblemError, match="writes to its argument `outer`"):
        follow("recorded graph", Touching("init", scale_data), outer, optimizer=bilevel.optim.sgd)
    assert torch.equal(outer["weights"], before)


class Judge(Weighted):
    def __init__(self, judge):
        super().__init__()
        self.judge = judge

    def outer_loss(self, params, outer, batch):
        return self.judge(super().outer_loss, params, outer, batch)


@pytest.mark.parametrize("compile", [False, True])
def test_an_outer_loss_that_writes_to_its_parameters_is_named(compile):
    def write(judge, params, outer, batch):
        params["theta"].data.mul_(2)
        return judge(params, outer, batch)

    hypergradient = compiled(Judge(write), 12) if compile else made(Judge(write))
    with pytest.raises(bilevel.ProblemError, match="outer_loss writes to its argument `params`"):
        hypergradient(weights())


@pytest.mark.parametrize("method", ["inner_batch", "outer_loss"])
def test_writing_in_place_where_autograd_forbids_it_is_named(method):
    def write(outer):
        outer["weights"].mul_(2)

    with pytest.raises(bilevel.ProblemError, match=f"{method} writes in place"):
        follow("recorded graph", Touching(method, write), weights(), optimizer=bilevel.optim.sgd)


@every_path
def test_parameters_come_in_a_container_of_their_own(path):
    def take(judge, params, outer, batch):
        return judge({"theta": params.pop("theta"), "bias": params.pop("bias")}, outer, batch)

    result = follow(path, Judge(take), weights())
    assert relative_error(result.grads, reference(Weighted(), weights())[1]) < 1e-8


class Twice(Weighted):
    """Two parameters that begin alike."""

    def __init__(self, second):
        super().__init__()
        self.second = second

    def init(self, outer, *, generator):
        one = torch.full((4,), 0.1, dtype=DTYPE)
        return {"theta": one, "other": self.second(one), "bias": torch.ones(1, dtype=DTYPE)}

    def predict(self, params, inputs):
        return super().predict(params, inputs) + inputs @ params["other"]


@every_path
def test_one_tensor_under_two_names_is_two_parameters_and_that_is_said(path):
    result = follow(path, Twice(lambda one: one), weights())
    expected = follow(path, Twice(torch.clone), weights())
    assert relative_error(result.grads, expected.grads) < 1e-12
    assert "one tensor at 'other' and 'theta'" in result.stats.status
    assert expected.stats.status == "ok"


# --- what is in derivatives alone -----------------------------------------------------------------


class Hidden(Weighted):
    """Calls change neither the loss nor its gradient, but what is differentiated once more."""

    def __init__(self, since=0):
        super().__init__()
        self.calls, self.since = 0, since

    def amount(self):
        self.calls += 1
        return 0.1 * max(0, self.calls - self.since)

    def inner_loss(self, params, batch):
        off = params["theta"] - params["theta"].detach()
        return super().inner_loss(params, batch) + self.amount() * self.hide(off, batch[2])


class HiddenCurvature(Hidden):
    def hide(self, off, weights):
        return (off**2).sum()


class HiddenMixed(Hidden):
    def hide(self, off, weights):
        return (off * (weights - weights.detach())[:4]).sum()


@every_path
@pytest.mark.parametrize("since", [0, 4, 9])
@pytest.mark.parametrize("problem", [HiddenCurvature, HiddenMixed])
def test_a_state_that_only_second_derivatives_show_is_named(path, problem, since):
    with pytest.raises(bilevel.ProblemError, match="another second derivative"):
        follow(path, problem(since), weights())


@pytest.mark.parametrize("problem", [HiddenCurvature, HiddenMixed])
def test_who_takes_no_second_derivative_is_not_misled_by_it(problem):
    result = made(problem(), estimator=FiniteDifference(1e-4))(weights(), None, seeded(0))
    expected = made(Weighted(), estimator=FiniteDifference(1e-4))(weights(), None, seeded(0))
    assert relative_error(result.grads, expected.grads) < 1e-8


class GradientPenalty(Weighted):
    """Differentiates by its parameters itself, at every step."""

    def inner_loss(self, params, batch):
        theta = params["theta"]
        theta = theta if theta.requires_grad else theta.detach().requires_grad_()
        loss = super().inner_loss({**params, "theta": theta}, batch)
        (slope,) = torch.autograd.grad(loss, theta, create_graph=True)
        return loss + 0.1 * (slope**2).sum()


@pytest.mark.parametrize("path", [path for path in PATHS if path.lower().startswith("re")])
def test_parameters_can_be_differentiated_by_at_every_step(path):
    result = follow(path, GradientPenalty(), weights())
    assert relative_error(result.grads, reference(GradientPenalty(), weights())[1]) < 1e-8


# --- an outer loss that is another one every time -------------------------------------------------


class Restless(Weighted):
    calls = 0

    def outer_loss(self, params, outer, batch):
        self.calls += 1
        return super().outer_loss(params, outer, batch) * (1 + self.calls)


@pytest.mark.parametrize(
    "estimator",
    [
        EvolutionStrategies(0.1, 2),
        PersistentEvolutionStrategies(0.1, 5, 2),
        ValueFunction(1.0),
        MoreauEnvelope(0.5),
        Penalty(1.0, steps=3),
    ],
)
def test_an_outer_loss_is_the_same_again_where_it_is_evaluated_again(estimator):
    with pytest.raises(bilevel.ProblemError, match="outer_loss is no pure function"):
        made(Restless(), estimator=estimator)(weights(), None, seeded(0))


@pytest.mark.parametrize("estimator", [Adjoint(), Forward(), Implicit()])
@pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")
def test_an_outer_loss_that_is_evaluated_once_is_a_sample(estimator):
    result = made(Restless(), estimator=estimator)(weights(), None, seeded(0))
    expected = made(Weighted(), estimator=estimator)(weights(), None, seeded(0))
    assert relative_error(result.grads, {"weights": 2 * expected.grads["weights"]}) < 1e-8


# --- what methods return, raise and use -----------------------------------------------------------


class Given(Weighted):
    """A batch with something beside the tensors."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def inner_batch(self, outer, step, *, generator):
        return *super().inner_batch(outer, step, generator=generator), self.make()

    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch[:3])


@every_path
@pytest.mark.parametrize("make", [torch.nn.Identity, torch.Generator, object])
def test_objects_that_cannot_be_compared_are_no_difference(path, make):
    result = follow(path, Given(make), weights())
    assert relative_error(result.grads, reference(Weighted(), weights())[1]) < 1e-8


def test_a_batch_made_under_inference_mode_is_named():
    def make():
        with torch.inference_mode():
            return torch.ones(2)

    with pytest.raises(bilevel.ProblemError, match=r"at '3' that was made under torch\.inference"):
        follow("recorded graph", Given(make), weights())


@pytest.mark.parametrize("method", ["inner_loss", "outer_loss"])
def test_a_sparse_loss_is_named(method):
    def sparse(self, *args):
        return getattr(Weighted, method)(self, *args).to_sparse()

    problem = type("Mine", (Weighted,), {method: sparse})()
    with pytest.raises(bilevel.ProblemError, match=rf"{method} returned .*layout torch\.sparse"):
        follow("recorded graph", problem, weights())


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(0.1).to_sparse(), "layout torch.sparse_coo"),
        (torch.tensor(0.1, device="meta"), "on the meta device"),
        (torch.tensor(float("nan")), "is not finite at step 0"),
        ({"theta": torch.tensor(float("inf")), "bias": torch.tensor(0.1)}, "is not finite"),
    ],
)
def test_hyperparameters_without_numbers_are_named(value, words):
    problem = type("Mine", (Weighted,), {"hyperparameters": lambda *args: {"lr": value}})()
    with pytest.raises(bilevel.ProblemError, match=words):
        made(problem, bilevel.optim.sgd)(weights())


@pytest.mark.parametrize("method", ["init", "inner_batch", "inner_loss", "outer_loss"])
@pytest.mark.parametrize("estimator", [Adjoint(), Forward(), EvolutionStrategies(0.1, 1)])
def test_an_iterator_at_its_end_is_named(method, estimator):
    problem = type("Mine", (Weighted,), {method: lambda *args, **kwargs: next(iter(()))})()
    with pytest.raises(bilevel.ProblemError, match=f"{method} raised StopIteration"):
        made(problem, estimator=estimator)(weights())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), KeyError("k")])
@pytest.mark.parametrize("method", ["init", "inner_batch", "inner_loss", "outer_loss"])
def test_what_a_method_raises_comes_out_as_it_is(method, error):
    def fail(*args, **kwargs):
        raise error

    with pytest.raises(type(error)) as caught:
        made(type("Mine", (Weighted,), {method: fail})())(weights())
    assert caught.value is error


@pytest.mark.parametrize("missing", ["init", "inner_loss"])
def test_from_functions_needs_a_start_and_a_loss(missing):
    functions = {"init": lambda outer: outer, "inner_loss": lambda params, batch: params.sum()}
    with pytest.raises(bilevel.ConfigurationError, match=f"{missing}=None: it must be a function"):
        bilevel.Problem.from_functions(
            **{**functions, missing: None}, outer_loss=lambda params, outer, batch: params.sum()
        )


# --- what a graph would get wrong -----------------------------------------------------------------


class ByNumPy(Weighted):
    def size(self, theta):
        return float(np.linalg.norm(theta.detach().numpy()))

    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) * (1 + self.size(params["theta"]))

    def outer_loss(self, params, outer, batch):
        return super().outer_loss(params, outer, batch) * (1 + self.size(params["theta"]))


class ByPython(ByNumPy):
    def size(self, theta):
        return sum(entry**2 for entry in theta.tolist()) ** 0.5


class ByForwardMode(ByNumPy):
    def size(self, theta):
        return torch.func.jvp(lambda x: x.sin().sum(), (theta,), (torch.ones_like(theta),))[1]


@pytest.mark.filterwarnings("ignore::bilevel.errors.CompileWarning")
@pytest.mark.parametrize("steps", [5, 12])
@pytest.mark.parametrize("problem", [ByNumPy, ByPython, ByForwardMode])
def test_values_that_a_graph_does_not_follow_are_not_frozen_in_it(problem, steps):
    found, expected = compiled(problem(), steps), made(problem(), steps=steps)
    for seed in range(3):
        outer = {"weights": torch.randn(20, dtype=DTYPE, generator=seeded(seed))}
        error = relative_error(found(outer).grads, expected(outer).grads)
        assert error < 1e-8


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch's, about what it leaves alone
def test_a_program_under_torch_compile_gives_the_same():
    hypergradient = made(Weighted(), truncation=Fixed(0, 5))

    def twice(outer):
        return 2 * hypergradient.loss(outer, None, seeded(0))

    outer, expected = weights(), weights()
    torch.compile(twice, backend="eager")(outer).backward()
    twice(expected).backward()
    assert torch.equal(outer["weights"].grad, expected["weights"].grad)


# --- compiled steps that are not alike ------------------------------------------------------------


def rule(init, update):
    def step(updates, state, *, params=None, inplace=True):
        return {name: -0.1 * g for name, g in updates.items()}, update(updates, state)

    return GradientTransformation(init, step)


FORMS = {
    "a buffer that begins as None": rule(lambda p: None, lambda u, s: u),
    "more with every step": rule(lambda p: (), lambda u, s: (*s, u)),
    "another shape": rule(lambda p: torch.ones(1), lambda u, s: torch.cat([s, s[:1]])),
    "another dtype": rule(
        lambda p: torch.ones(1), lambda u, s: s.double() if s.dtype is torch.float32 else s.float()
    ),
    "deeper": rule(lambda p: {}, lambda u, s: {"inside": s}),
}
#: Those that the real compiler gets to see.
COMPILED = ("more with every step", "another shape", "deeper")


@pytest.mark.filterwarnings("ignore::bilevel.errors.CompileWarning")
@pytest.mark.parametrize(
    "form",
    [pytest.param(form, marks=pytest.mark.slow if form in COMPILED else ()) for form in FORMS],
)
def test_a_state_that_changes_its_form_is_no_loop(form):
    found = compiled(Weighted(), 12, optimizer=FORMS[form])(weights(), None, seeded(0))
    expected = made(Weighted(), FORMS[form], 12)(weights(), None, seeded(0))
    assert relative_error(found.grads, expected.grads) < 1e-8
