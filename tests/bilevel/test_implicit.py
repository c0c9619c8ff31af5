"""Implicit estimators: exact at an inner optimum, honest away from it."""

import math
import warnings

import optree
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, Fixed, flat, randn, relative_error, seeded

import bilevel
from bilevel import ConfigurationError, ConvergenceWarning, ProblemError, SolverError
from bilevel.estimators import Adjoint, FixedPoint, Implicit
from bilevel.linear import (
    GMRES,
    ConjugateGradient,
    Dense,
    Neumann,
    NormalConjugateGradient,
    Nystrom,
    RandomizedEigendecomposition,
)

seeds = st.integers(0, 2**31)
TIGHT = {"max_iterations": 20_000, "tolerance": 1e-12}


def hessian_solvers(step_size, size=100):
    """Every solver of `Implicit`, exact up to rounding."""
    return [
        ConjugateGradient(**TIGHT),
        NormalConjugateGradient(**TIGHT),
        GMRES(**TIGHT),
        Neumann(step_size, **TIGHT),
        Dense(),
        Nystrom(size),
        RandomizedEigendecomposition(size),
    ]


FIXED_POINT_SOLVERS = [Neumann(1.0, **TIGHT), GMRES(**TIGHT), Dense()]


def every_implicit(step_size):
    return [
        *(Implicit(solver) for solver in hessian_solvers(step_size)),
        *(FixedPoint(solver) for solver in FIXED_POINT_SOLVERS),
    ]


def solve(case, optimizer, steps, estimator, truncation=None, seed=0, outer=None):
    hypergradient = bilevel.Hypergradient(case.problem, optimizer, steps, truncation, estimator)
    return hypergradient(case.outer if outer is None else outer, case.outer_batch, seeded(seed))


def solve_each(case, optimizer, steps, estimators, seed=0):
    """(estimator, its result) on one and the same run."""
    inner = bilevel.InnerLoop(case.problem, optimizer)
    key = bilevel.Key.draw(seeded(seed))
    trajectory = bilevel.record(inner, case.outer, key, steps=steps)
    for estimator in estimators:
        yield estimator, estimator(trajectory, case.outer_batch)


def rate_and_steps(hessian, digits):
    """(1/λ_max, steps of gradient descent that gain so many powers of e)."""
    smallest, largest = torch.linalg.eigvalsh(hessian)[[0, -1]].tolist()
    return 1 / largest, int(digits * largest / smallest) + 30


# Closed forms.


@pytest.mark.parametrize(("name", "closed_form"), problems.CLOSED_FORMS.items())
@settings(max_examples=4)
@given(size=st.integers(1, 4), momentum=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 1000))
def test_every_implicit_estimator_is_the_closed_form(name, closed_form, size, momentum, seed):
    case = problems.make(name, seed, size)
    expected, hessian = closed_form(case)
    rate, steps = rate_and_steps(hessian, 30)
    optimizer = bilevel.optim.sgd(rate, momentum)
    for estimator, result in solve_each(case, optimizer, steps, every_implicit(rate)):
        assert relative_error(result.grads, expected) < 1e-8, estimator.solver
        assert result.stats.status == "ok"
        assert result.stats.solver.status == "converged"
        assert result.stats.solver.residual < 1e-10
        assert abs(result.stats.outer_loss_gap) < 1e-8


class Scalar(bilevel.Problem):
    """ℓ = ½a(θ − φ)², F = ½θ²: with one parameter, dF/dφ = φ for every a."""

    def __init__(self, curvature, shape):
        self.curvature, self.shape = curvature, shape

    def init(self, outer, *, generator):
        return outer["phi"].detach().reshape(self.shape) - 1.0

    def inner_batch(self, outer, step, *, generator):
        return outer["phi"]

    def inner_loss(self, params, batch):
        return 0.5 * self.curvature * (params.sum() - batch) ** 2

    def outer_loss(self, params, outer, batch):
        return 0.5 * params.sum() ** 2


@pytest.mark.parametrize("shape", [(), (1,)])
@settings(max_examples=8)
@given(st.floats(1e-3, 1e3), st.floats(0.5, 5), st.booleans())
def test_a_single_parameter(shape, curvature, value, negative):
    """A peer's implicit gradient is zero here, and another's at a curvature of 1."""
    outer = {"phi": torch.tensor(-value if negative else value, dtype=DTYPE)}
    case = problems.Case(Scalar(curvature, shape), outer, None)
    optimizer = bilevel.optim.sgd(1 / curvature)
    for _, result in solve_each(case, optimizer, 2, every_implicit(1 / curvature)):
        assert relative_error(result.grads, outer) < 1e-10


@pytest.mark.parametrize("curvature", [1.0, 7.0])
def test_a_hessian_that_is_a_multiple_of_the_identity(curvature):
    case = problems.make("quadratic", 0)
    case.problem.A = curvature * torch.eye(4, dtype=DTYPE)
    expected, _ = problems.implicit_quadratic(case)
    for estimator in every_implicit(1 / curvature):
        result = solve(case, bilevel.optim.sgd(1 / curvature), 3, estimator)
        assert relative_error(result.grads, expected) < 1e-12


@settings(max_examples=5)
@given(st.integers(2, 5), st.floats(1, 3), seeds)
def test_an_indefinite_hessian(size, condition, seed):
    """At a saddle, where the run starts and so stays, dθ*/dφ is still −H⁻¹ ∂²ℓ/∂θ∂φ."""
    case = problems.make("quadratic", seed % 1000, size)
    values = 1 + (condition - 1) * torch.rand(size, dtype=DTYPE, generator=seeded(seed))
    values[0] *= -1
    basis = torch.linalg.qr(randn(size, size, generator=seeded(seed)))[0]
    case.problem.A = basis @ torch.diag(values) @ basis.T
    case.problem.start = torch.linalg.solve(case.problem.A, case.problem.B @ case.outer["phi"])
    expected, _ = problems.implicit_quadratic(case)
    for solver in [GMRES(), NormalConjugateGradient(), Dense()]:
        result = solve(case, bilevel.optim.sgd(0.1), 1, Implicit(solver))
        assert relative_error(result.grads, expected) < 1e-4
    with pytest.raises(SolverError, match="diverges"):
        solve(case, bilevel.optim.sgd(0.1), 1, Implicit(Neumann(0.1, 150)))


@settings(max_examples=10)
@given(st.floats(0.01, 10), seeds)
def test_damping_is_added_to_the_hessian(damping, seed):
    case = problems.make("quadratic", seed % 1000)
    A, B, phi = case.problem.A, case.problem.B, case.outer["phi"]
    theta = torch.linalg.solve(A, B @ phi)
    case.problem.start = theta
    damped = A + damping * torch.eye(4, dtype=DTYPE)
    x = torch.linalg.solve(damped, theta - case.outer_batch)
    expected = {"phi": B.T @ x + case.problem.penalty * phi}
    step_size = 1 / float(torch.linalg.eigvalsh(damped)[-1])
    estimators = [Implicit(solver, damping=damping) for solver in hessian_solvers(step_size)]
    for _, result in solve_each(case, bilevel.optim.sgd(1e-3), 1, estimators):
        assert relative_error(result.grads, expected) < 1e-8


@pytest.mark.parametrize("make", [Nystrom, RandomizedEigendecomposition])
def test_a_rank_that_is_too_low_is_in_the_status(make):
    case = problems.make("quadratic", 0)
    with pytest.warns(ConvergenceWarning, match=f"{make.__name__} did not reach"):
        result = solve(case, bilevel.optim.sgd(0.1), 3, Implicit(make(1), damping=0.1))
    assert f"{make.__name__} stopped at a relative residual" in result.stats.status
    assert result.stats.solver.status != "converged"


@settings(max_examples=5)
@given(seeds)
def test_an_outer_loss_that_is_flat_gives_its_direct_part_alone(seed):
    """The right-hand side is zero."""
    case = problems.make("quadratic", seed % 1000)
    case.problem.outer_loss = lambda params, outer, batch: (
        (params["theta"] ** 2).sum() * 0 + (outer["phi"] ** 3).sum()
    )
    for _, result in solve_each(case, bilevel.optim.sgd(0.01), 1, every_implicit(0.1)):
        assert relative_error(result.grads, {"phi": 3 * case.outer["phi"] ** 2}) < 1e-12
        assert result.stats.solver.iterations == 0


# Against the unrolled run.


@settings(max_examples=3)
@given(st.integers(2, 4), seeds)
def test_the_unrolled_gradient_tends_to_the_implicit_one_at_the_rate_of_the_inner_run(size, seed):
    """For gradient descent on a quadratic the distance shrinks by max |1 − αλ| a step.

    Both are evaluated: the unrolled gradient after T steps, and the implicit one at the optimum.
    """
    case = problems.make("quadratic", seed % 1000, size)
    # One slow direction, so that what is left after a while is a pure exponential.
    contraction = torch.linspace(0.8, 0.1, size, dtype=DTYPE)
    basis = torch.linalg.qr(randn(size, size, generator=seeded(seed)))[0]
    case.problem.A = basis @ torch.diag((1 - contraction) / 0.5) @ basis.T
    optimizer = bilevel.optim.sgd(0.5)
    limit = solve(case, optimizer, 200, Implicit(Dense())).grads["phi"]

    def distance(steps):
        return (solve(case, optimizer, steps, Adjoint()).grads["phi"] - limit).norm()

    slope = float((distance(75) / distance(50)).log()) / 25
    assert abs(slope - math.log(0.8)) < 2e-3


@pytest.mark.parametrize("momentum", [0.0, 0.6])
@settings(max_examples=2)
@given(seed=st.integers(0, 1000))
def test_they_agree_on_a_problem_that_is_not_quadratic(momentum, seed):
    """Weighted logistic regression on the whole set, run to the end."""
    case = problems.make("data_cleaning", seed)
    case.problem.size = 8
    problem_loss = type(case.problem).inner_loss
    case.problem.inner_loss = lambda params, batch: (
        problem_loss(case.problem, params, batch) + 0.3 * (params["weight"] ** 2).sum()
    )
    estimators = [
        Implicit(ConjugateGradient(**TIGHT)),
        Implicit(Dense(), batches=4),
        FixedPoint(Neumann(1.0, **TIGHT)),
        FixedPoint(GMRES(**TIGHT), batches=2),
    ]
    unrolled = None
    optimizer = bilevel.optim.sgd(0.5, momentum)
    for _, result in solve_each(case, optimizer, 150, [Adjoint(), *estimators]):
        unrolled = result.grads if unrolled is None else unrolled
        assert relative_error(result.grads, unrolled) < 1e-8
        assert result.stats.status == "ok"


class DecayingOptimizer(problems.Quadratic):
    """The penalty is in the optimizer: θ* = (A + wI)⁻¹Bφ, with w an outer variable as well."""

    def hyperparameters(self, outer, step):
        return {"weight_decay": outer["decay"]}


@settings(max_examples=6)
@given(st.floats(0.1, 2), st.sampled_from([0.0, 0.5]), seeds)
def test_a_fixed_point_knows_what_the_optimizer_adds(decay, momentum, seed):
    """And `Implicit`, which does not, says that its point is no optimum."""
    case = problems.make("quadratic", seed % 1000)
    A, B, phi = case.problem.A, case.problem.B, case.outer["phi"]
    problem = DecayingOptimizer(A, B, case.problem.start)
    outer = case.outer | {"decay": torch.tensor(decay, dtype=DTYPE)}
    case = problems.Case(problem, outer, case.outer_batch)
    penalised = A + decay * torch.eye(4, dtype=DTYPE)
    theta = torch.linalg.solve(penalised, B @ phi)
    x = torch.linalg.solve(penalised, theta - case.outer_batch)
    expected = {"phi": B.T @ x + problem.penalty * phi, "decay": -theta @ x}
    rate, steps = rate_and_steps(penalised, 30)

    def optimizer(weight_decay):
        return bilevel.optim.sgd(rate, momentum, weight_decay)

    estimators = [*map(FixedPoint, FIXED_POINT_SOLVERS), Implicit(Dense())]
    for estimator, result in solve_each(case, optimizer, steps, estimators):
        gap = abs(float(result.stats.outer_loss_gap))
        if isinstance(estimator, FixedPoint):
            for name in expected:
                assert relative_error(result.grads[name], expected[name]) < 1e-8
            assert (gap < 1e-8, result.stats.status) == (True, "ok")
        else:
            assert gap > 1e-4
            assert ("has not converged" in result.stats.status) == (gap > 0.1 * float(result.loss))


# What is not converged, is said.


@settings(max_examples=10)
@given(st.integers(1, 5), seeds)
def test_the_gap_is_what_the_outer_loss_would_still_change_by(steps, seed):
    """Exactly, for an outer loss that is linear in θ; and the status names a large one."""
    case = problems.make("quadratic", seed % 1000)
    case.problem.outer_loss = lambda params, outer, batch: (
        params["theta"] @ batch + 0 * outer["phi"].sum()
    )
    optimum = torch.linalg.solve(case.problem.A, case.problem.B @ case.outer["phi"])
    for estimator in [Implicit(Dense()), FixedPoint(Dense())]:
        result = solve(case, bilevel.optim.sgd(0.05, momentum=0.3), steps, estimator)
        gap = result.stats.outer_loss_gap
        assert relative_error(result.loss + gap, optimum @ case.outer_batch) < 1e-10
        large = abs(float(gap)) > 0.1 * abs(float(result.loss))
        assert ("has not converged" in result.stats.status) == large


def test_a_solver_that_stops_early_warns_and_says_so():
    case = problems.make("quadratic", 0)
    estimator = Implicit(ConjugateGradient(1))
    with pytest.warns(ConvergenceWarning, match="ConjugateGradient did not reach"):
        result = solve(case, bilevel.optim.sgd(0.1), 400, estimator)
    assert "ConjugateGradient stopped after 1 iterations" in result.stats.status
    assert result.stats.solver.status in result.stats.status
    assert result.stats.solver.iterations == 1
    assert 1e-5 < result.stats.solver.residual < 10


def test_a_learned_start_has_no_effect_on_an_optimum_and_the_status_says_so():
    case = problems.make("learned_start", 0)
    for estimator in [Implicit(Dense()), FixedPoint(Dense())]:
        result = solve(case, bilevel.optim.sgd(0.05), 5, estimator)
        assert not flat(result.grads).any()
        assert "'scale', 'shift'" in result.stats.status


def test_a_learned_rate_has_no_effect_on_an_optimum():
    problem = type(
        "Rated", (problems.Quadratic,), {"hyperparameters": lambda s, o, t: {"lr": o["lr"]}}
    )
    made = problems.make("quadratic", 0)
    problem = problem(made.problem.A, made.problem.B, made.problem.start)
    outer = made.outer | {"lr": torch.tensor(0.3, dtype=DTYPE)}
    case = problems.Case(problem, outer, made.outer_batch)
    expected, _ = problems.implicit_quadratic(made)
    for estimator in [Implicit(Dense()), FixedPoint(Dense())]:
        result = solve(case, bilevel.optim.sgd, 600, estimator)
        assert relative_error(result.grads["phi"], expected) < 1e-10
        assert abs(result.grads["lr"]) < 1e-12


def test_errors_of_a_run_are_named_as_by_the_other_estimators():
    case = problems.make("quadratic", 0)
    for estimator in [Implicit(), Implicit(Dense()), FixedPoint(GMRES()), FixedPoint(Dense())]:
        with pytest.raises(bilevel.NonFiniteError, match=r"inner loss became .* inner step 1 of 4"):
            solve(case, bilevel.optim.sgd(1e200), 4, estimator)
        forgotten = case.outer | {"forgotten": torch.ones(1, dtype=DTYPE)}
        with pytest.raises(bilevel.UnusedOuterVariableError, match="forgotten"):
            solve(case, bilevel.optim.sgd(0.3), 4, estimator, outer=forgotten)
        deaf = problems.make("quadratic", 0)
        deaf.problem.outer_loss = lambda params, outer, batch: outer["phi"].sum()
        with pytest.raises(ProblemError, match="outer_loss does not depend"):
            solve(deaf, bilevel.optim.sgd(0.3), 4, estimator)


def test_a_singular_hessian():
    case = problems.make("quadratic", 0)
    case.problem.A = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0], dtype=DTYPE))
    with pytest.raises(SolverError, match=r"Dense failed with damping=0.*raise damping"):
        solve(case, bilevel.optim.sgd(0.1), 3, Implicit(Dense()))
    with pytest.raises(SolverError, match="ConjugateGradient failed"):
        solve(case, bilevel.optim.sgd(0.1), 3, Implicit())
    for solver in [GMRES(), NormalConjugateGradient()]:
        with pytest.warns(ConvergenceWarning, match=f"{type(solver).__name__} did not reach"):
            solve(case, bilevel.optim.sgd(0.1), 3, Implicit(solver))
    assert solve(case, bilevel.optim.sgd(0.1), 3, Implicit(Dense(), damping=0.1)).stats.solver


# Which batch, which window.


class Driven(problems.Quadratic):
    """Every step has its own drive, and its own curvature."""

    def inner_batch(self, outer, step, *, generator):
        return (step + 1.0) ** 2 * self.B @ outer["phi"], step + 1.0

    def inner_loss(self, params, batch):
        drive, factor = batch
        theta = params["theta"]
        return 0.5 * factor * theta @ self.A @ theta - theta @ drive


@pytest.mark.parametrize("start", [0, 3])
@settings(max_examples=8)
@given(st.integers(1, 4), seeds)
def test_the_objective_is_the_mean_over_the_last_batches(start, batches, seed):
    made = problems.make("quadratic", seed % 1000).problem
    case = problems.make("quadratic", seed % 1000)
    case.problem = Driven(made.A, made.B, made.start)
    factors = torch.arange(4 - batches, 4, dtype=DTYPE) + 1
    optimizer = bilevel.optim.sgd(1e-3)
    result = solve(case, optimizer, 6, Implicit(Dense(), batches=batches), Fixed(start, 4))
    slope = result.params["theta"] - case.outer_batch
    x = torch.linalg.solve(factors.mean() * made.A, slope)
    expected = (factors**2).mean() * made.B.T @ x + made.penalty * case.outer["phi"]
    assert relative_error(result.grads, {"phi": expected}) < 1e-10
    result = solve(case, optimizer, 6, FixedPoint(Dense(), batches=batches), Fixed(start, 4))
    assert relative_error(result.grads, {"phi": expected}) < 1e-8


def test_more_batches_than_steps():
    case = problems.make("quadratic", 0)
    for estimator in [Implicit(batches=4), FixedPoint(batches=4)]:
        with pytest.raises(ConfigurationError, match=r"batches=4: there are only 3 inner steps"):
            solve(case, bilevel.optim.sgd(0.1), 5, estimator, Fixed(1, 3))


@settings(max_examples=8)
@given(st.integers(0, 5), seeds)
def test_where_the_window_starts_does_not_matter(start, seed):
    case = problems.make("data_cleaning", seed % 1000)
    optimizer = bilevel.optim.sgd(0.3)
    for estimator in [Implicit(Nystrom(3), damping=0.1), FixedPoint(Dense())]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            whole, part = (
                solve(case, optimizer, 6, estimator, Fixed(s, 6), seed) for s in (0, start)
            )
        assert torch.equal(flat(whole.grads), flat(part.grads))


# Many tasks, warm starts.


class ManyRidges(bilevel.Problem):
    """Ridge regressions side by side, under `vmap`; two leaves a task."""

    def __init__(self, inputs, targets):
        self.inputs, self.targets = inputs, targets

    def init(self, outer, *, generator):
        tasks, _, width = self.inputs.shape
        return {
            "slope": torch.zeros(tasks, width, dtype=DTYPE),
            "shift": torch.zeros(tasks).double(),
        }

    def inner_batch(self, outer, step, *, generator):
        return outer["log_penalty"].exp()

    def inner_loss(self, params, batch):
        def loss(params, inputs, targets):
            residual = inputs @ params["slope"] + params["shift"] - targets
            square = (params["slope"] ** 2).sum() + params["shift"] ** 2
            return 0.5 * (residual**2).mean() + 0.5 * batch * square

        return torch.func.vmap(loss)(params, self.inputs, self.targets).sum()

    def outer_loss(self, params, outer, batch):
        inputs, targets = batch
        output = torch.einsum("tnw,tw->tn", inputs, params["slope"]) + params["shift"][:, None]
        return 0.5 * ((output - targets) ** 2).mean(1).sum()


def many_ridges(tasks, seed):
    scale = 3.0 ** torch.arange(tasks, dtype=DTYPE)[:, None, None] / 3 ** (tasks - 1)
    inputs = scale * randn(tasks, 9, 3, generator=seeded(seed))
    problem = ManyRidges(inputs, randn(tasks, 9, generator=seeded(seed + 1)))
    batch = (
        randn(tasks, 5, 3, generator=seeded(seed + 2)),
        randn(tasks, 5, generator=seeded(seed + 3)),
    )
    return problems.Case(problem, {"log_penalty": torch.tensor(-1.0, dtype=DTYPE)}, batch)


def one_of(case, task):
    problem = ManyRidges(case.problem.inputs[task, None], case.problem.targets[task, None])
    return problems.Case(problem, case.outer, tuple(part[task, None] for part in case.outer_batch))


@settings(max_examples=2)
@given(st.integers(2, 3), seeds)
def test_many_tasks_in_one_solve(tasks, seed):
    case = many_ridges(tasks, seed)
    optimizer = bilevel.optim.sgd(0.3)
    alone = [
        solve(one_of(case, task), optimizer, 250, Implicit(ConjugateGradient(**TIGHT)))
        for task in range(tasks)
    ]
    expected = sum(result.grads["log_penalty"] for result in alone)
    estimators = [Implicit(solver, tasks=tasks) for solver in hessian_solvers(0.5)]
    for estimator, result in solve_each(case, optimizer, 250, estimators):
        assert relative_error(result.grads, [expected]) < 1e-7
        if isinstance(estimator.solver, ConjugateGradient):
            # Every task needs at most as many iterations as it has parameters.
            assert result.stats.solver.iterations <= 5
            assert result.stats.hessian_vector_products <= 6


def test_tasks_that_are_not_independent_do_not_pass_unseen():
    case = many_ridges(2, 0)
    loss = type(case.problem).inner_loss
    case.problem.inner_loss = lambda params, batch: (
        loss(case.problem, params, batch) + params["shift"].prod()
    )
    with pytest.warns(ConvergenceWarning):
        result = solve(case, bilevel.optim.sgd(0.1), 5, Implicit(Dense(), tasks=2))
    assert "relative residual" in result.stats.status


def test_parameters_without_the_dimension_of_the_tasks():
    with pytest.raises(ConfigurationError, match=r"tasks=3: .* shape \(2\b.*number of tasks"):
        solve(many_ridges(2, 0), bilevel.optim.sgd(0.1), 5, Implicit(tasks=3))


@pytest.mark.parametrize("tasks", [None, 2])
def test_a_warm_start_is_carried_on_and_saved(tasks):
    case, optimizer = many_ridges(2, 0), bilevel.optim.sgd(0.3)
    estimator = Implicit(warm_start=True, tasks=tasks)
    first = solve(case, optimizer, 120, estimator)
    assert first.stats.solver.iterations > 1
    again = solve(case, optimizer, 120, estimator)
    assert again.stats.solver.iterations == 0
    assert relative_error(again.grads, first.grads) < 1e-4

    resumed = Implicit(warm_start=True, tasks=tasks)
    assert resumed.state_dict() == {}
    resumed.load_state_dict(estimator.state_dict())
    assert solve(case, optimizer, 120, resumed).stats.solver.iterations == 0
    cold = solve(case, optimizer, 120, Implicit(tasks=tasks))
    assert cold.stats.solver.iterations == first.stats.solver.iterations

    with pytest.raises(ConfigurationError, match=r"warm_start=True: the previous solution has 8"):
        solve(many_ridges(3, 0), optimizer, 3, Implicit_with(estimator.state_dict()))


def Implicit_with(state):
    estimator = Implicit(warm_start=True)
    estimator.load_state_dict(state)
    return estimator


def test_states_of_others_are_refused():
    for state in ({"solution": torch.ones(3)}, {"step": 3}):
        with pytest.raises(ConfigurationError, match="cannot continue"):
            Implicit().load_state_dict(state)
        with pytest.raises(ConfigurationError, match="FixedPoint has no state"):
            FixedPoint().load_state_dict(state)
    with pytest.raises(ConfigurationError, match="cannot continue"):
        Implicit(warm_start=True).load_state_dict({"step": 3})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Implicit("cg"), "solver is a str, not a Solver"),
        (lambda: FixedPoint(3), "solver is an int, not a Solver"),
        (lambda: Implicit(damping=-1), "damping=-1: it must be a finite number of at least 0"),
        (lambda: Implicit(batches=0), "batches=0: it must be an integer of at least 1"),
        (lambda: FixedPoint(batches=True), "batches=True"),
        (lambda: Implicit(tasks=0), "tasks=0"),
        (lambda: Implicit(Dense(), warm_start=True), "warm_start=True: Dense does not iterate"),
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_a_fixed_point_needs_a_solver_for_matrices_that_are_not_symmetric():
    case = problems.make("quadratic", 0)
    with pytest.raises(ConfigurationError, match="ConjugateGradient needs a symmetric matrix"):
        solve(case, bilevel.optim.sgd(0.1), 3, FixedPoint(ConjugateGradient()))


@settings(max_examples=5)
@given(st.floats(-3, 3), seeds)
def test_linear_in_the_outer_loss(factor, seed):
    case = problems.make("data_cleaning", seed % 1000, 2)
    loss_and_metrics = type(case.problem).outer_loss

    def first(*args):
        return loss_and_metrics(*args)[0]

    def second(problem, params, outer, batch):
        return flat(params).sin().sum() + flat(outer).pow(2).sum()

    def gradient(loss, estimator):
        case.problem.outer_loss = lambda *args: loss(case.problem, *args)
        return flat(solve(case, bilevel.optim.sgd(0.1), 3, estimator, seed=seed).grads)

    for estimator in [Implicit(Dense()), FixedPoint(Dense())]:
        both = gradient(lambda *args: first(*args) + factor * second(*args), estimator)
        expected = gradient(first, estimator) + factor * gradient(second, estimator)
        assert relative_error(both, expected) < 1e-6


def test_outer_variables_are_left_alone():
    case = problems.make("data_cleaning", 0)
    outer = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), case.outer)
    for estimator in [Implicit(Dense()), FixedPoint(Dense())]:
        solve(case, bilevel.optim.sgd(0.1), 3, estimator, outer=outer)
        assert outer[0].grad is None
        assert torch.equal(outer[0], case.outer[0])
