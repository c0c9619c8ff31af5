"""Linear solvers: exact where they promise it, and never wrong without saying so."""

from functools import partial

import problems
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import DTYPE, randn, relative_error, seeded

from bilevel import ConfigurationError, ConvergenceWarning, SolverError
from bilevel.linear import (
    GMRES,
    ConjugateGradient,
    Dense,
    HessianOperator,
    LinearOperator,
    Neumann,
    NormalConjugateGradient,
    Nystrom,
    RandomizedEigendecomposition,
    randomized_eigendecomposition,
)

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 8)
scales = st.integers(-30, 30).map(lambda power: 10.0**power)


class Matrix(LinearOperator):
    """A given matrix, or a batch of them."""

    def __init__(self, matrix, symmetric=True):
        super().__init__(matrix[..., 0], symmetric=symmetric)
        self.matrix = matrix

    def product(self, vector):
        return (self.matrix @ vector[..., None])[..., 0]


def symmetric(eigenvalues, seed):
    basis = torch.linalg.qr(randn(*[len(eigenvalues)] * 2, generator=seeded(seed)))[0]
    return basis @ torch.diag(torch.as_tensor(eigenvalues, dtype=DTYPE)) @ basis.T


def spectrum(size, condition, seed):
    """Eigenvalues from 1 to `condition`, both there."""
    inside = torch.rand(size, dtype=DTYPE, generator=seeded(seed))
    inside[0], inside[-1] = 0, 1 if size > 1 else 0
    return condition**inside


def iterative(largest, smallest=0.0):
    """Every iterative solver, with far more iterations than the tests need."""
    return [
        ConjugateGradient(10_000, 1e-12),
        NormalConjugateGradient(10_000, 1e-12),
        Neumann(2 / (largest + smallest), 10_000, 1e-12),
        GMRES(200, 1e-12),
        GMRES(10_000, 1e-12, restart=5),
    ]


def direct(size):
    return [Dense(), Nystrom(size), RandomizedEigendecomposition(size)]


def measured(A, x, b):
    return float((b - A @ x).norm() / b.norm())


# Where the answer is known.


@settings(max_examples=40)
@given(sizes, st.floats(1, 50), scales, scales, st.sampled_from([0.0, 0.3]), seeds)
def test_every_solver_solves_a_positive_definite_system(size, condition, a, b, damping, seed):
    """Whatever the units of the matrix and of the right-hand side."""
    values = spectrum(size, condition, seed)
    A, rhs = a * symmetric(values, seed), b * randn(size, generator=seeded(seed + 1))
    damped = A + damping * a * torch.eye(size, dtype=DTYPE)
    expected = torch.linalg.solve(damped, rhs)
    for solver in [*iterative(a * (condition + damping), a * (1 + damping)), *direct(size)]:
        found = solver.solve(Matrix(A), rhs, damping=damping * a)
        assert relative_error(found.x, expected) < 1e-12 * condition * 2, solver
        assert (found.converged, found.status) == (True, "converged")
        assert float(found.residual) <= min(solver.tolerance, 1e-9)


@pytest.mark.parametrize("factor", [1e-20, 0.5, 1.0, 3.0, 1e20])
@given(sizes, seeds)
def test_a_multiple_of_the_identity_takes_one_iteration(factor, size, seed):
    """A peer's conjugate gradients return zeros here."""
    rhs = randn(size, generator=seeded(seed))
    A = Matrix(factor * torch.eye(size, dtype=DTYPE))
    for solver in [
        ConjugateGradient(),
        NormalConjugateGradient(),
        GMRES(),
        Neumann(1 / factor),
        *direct(size),
    ]:
        found = solver.solve(A, rhs)
        assert relative_error(found.x, rhs / factor) < 1e-14
        assert int(found.iterations) == (1 if solver.uses_start else 0)


@given(st.floats(0.1, 10), st.booleans(), st.floats(-5, 5))
def test_a_scalar_system(magnitude, negative, b):
    """A peer's implicit gradient is zero for a single parameter."""
    a = -magnitude if negative else magnitude
    rhs = torch.tensor([b], dtype=DTYPE)
    solvers = [ConjugateGradient(), NormalConjugateGradient(), GMRES(), *direct(1)]
    for solver in solvers:
        x = solver.solve(Matrix(torch.tensor([[a]], dtype=DTYPE)), rhs).x
        assert relative_error(x, rhs / a) < 1e-14


@given(sizes, seeds)
def test_a_zero_right_hand_side_gives_zero_at_once(size, seed):
    A = Matrix(symmetric(spectrum(size, 10.0, seed), seed))
    zero = torch.zeros(size, dtype=DTYPE)
    start = randn(size, generator=seeded(seed))
    for solver in [*iterative(11.0), *direct(size)]:
        for options in ({}, {"start": start}):
            found = solver.solve(A, zero, **options)
            assert torch.equal(found.x, zero)
            assert (float(found.residual), int(found.iterations), found.converged) == (0, 0, True)


@given(st.integers(2, 8), st.floats(1, 10), seeds)
def test_indefinite_matrices(size, condition, seed):
    """Solvers for them solve them; conjugate gradients do, or say that they did not."""
    values = spectrum(size, condition, seed)
    values[seed % size] *= -1
    A, rhs = symmetric(values, seed), randn(size, generator=seeded(seed + 1))
    expected = torch.linalg.solve(A, rhs)
    for solver in [NormalConjugateGradient(10_000, 1e-12), GMRES(100, 1e-12), Dense()]:
        found = solver.solve(Matrix(A), rhs)
        assert relative_error(found.x, expected) < 1e-10
        assert found.converged


@pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")
@given(st.integers(1, 8), st.integers(1, 12), st.floats(1, 1e10), seeds)
def test_no_solver_calls_a_wrong_answer_converged(size, iterations, condition, seed):
    """The residual that is reported is the one of the answer, whatever happened on the way."""
    values = spectrum(size, condition, seed) * torch.sign(randn(size, generator=seeded(seed)))
    A, rhs = symmetric(values, seed), randn(size, generator=seeded(seed + 1))
    for solver in [
        ConjugateGradient(iterations),
        NormalConjugateGradient(iterations),
        GMRES(iterations, restart=3),
        Neumann(1.9 / condition, iterations),
        Nystrom(iterations),
        RandomizedEigendecomposition(iterations),
        Dense(),
    ]:
        try:
            found = solver.solve(Matrix(A), rhs, damping=1e-3)
        except SolverError:
            continue
        x, damped = found.x, A + 1e-3 * torch.eye(size, dtype=DTYPE)
        residual = measured(damped, x, rhs)
        assert abs(float(found.residual) - residual) <= 1e-10 * condition * float(x.norm() + 1)
        assert found.converged == (float(found.residual) <= solver.tolerance)
        assert found.converged == (found.status == "converged")


@pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")
@given(st.integers(2, 7), st.integers(1, 3), seeds)
def test_a_singular_system_without_a_solution_gets_the_least_residual(size, null, seed):
    """And a solution of ordinary size, from at most one iteration for each distinct eigenvalue."""
    values = torch.tensor([2.0, 1.0, 3.0, -1.0, 2.0, 1.0, 3.0], dtype=DTYPE)[:size]
    values[-min(null, size - 1) :] = 0
    A, rhs = symmetric(values, seed), randn(size, generator=seeded(seed + 1))
    least = torch.linalg.pinv(A, hermitian=True) @ rhs
    for solver in [GMRES(40, 1e-10), NormalConjugateGradient(40, 1e-10)]:
        found = solver.solve(Matrix(A), rhs)
        assert abs(float(found.residual) - measured(A, least, rhs)) < 1e-8
        assert float(found.x.norm()) < 10 * float(rhs.norm())
        assert not found.converged
    assert int(GMRES(40, 1e-10).solve(Matrix(A), rhs).iterations) <= len(values.unique())


def test_negative_curvature_is_named():
    """The first direction of the one breaks down at once; the other is stopped early."""
    for values, iterations in (([1.0, -1.0], 100), ([1.0, -5.0, 3.0], 2)):
        A = Matrix(torch.diag(torch.tensor(values, dtype=DTYPE)))
        rhs = torch.ones(len(values), dtype=DTYPE)
        with pytest.warns(ConvergenceWarning, match="ConjugateGradient did not reach"):
            found = ConjugateGradient(iterations).solve(A, rhs)
        assert not found.converged
        assert "negative curvature" in found.status
        assert "GMRES" in found.status


@given(st.integers(2, 8), seeds)
def test_a_diverging_series_is_an_error(size, seed):
    A = Matrix(symmetric(spectrum(size, 10.0, seed), seed))
    rhs = A(torch.ones(size, dtype=DTYPE))
    with pytest.raises(SolverError, match=r"Neumann\(step_size=0.3\) diverges.*lower\s+step_size"):
        Neumann(0.3, 200).solve(A, rhs)


def test_a_series_that_grows_at_first_may_still_converge():
    """Powers of a matrix that is not normal: an early stop is no divergence, and is named."""
    A = Matrix(torch.tensor([[0.5, -9.0], [0.0, 0.5]], dtype=DTYPE), symmetric=False)
    rhs = torch.ones(2, dtype=DTYPE)
    with pytest.warns(ConvergenceWarning, match="Neumann did not reach"):
        early = Neumann(1.0, 2).solve(A, rhs)
    assert float(early.residual) > 1
    assert "may diverge" in early.status
    assert Neumann(1.0, 100).solve(A, rhs).converged


# How fast.


@pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")
@settings(max_examples=15)
@given(st.integers(2, 12), st.floats(2, 200), st.integers(1, 12), seeds)
def test_convergence_at_the_rate_of_theory(size, condition, iterations, seed):
    """Conjugate gradients and the Neumann series keep their bounds; GMRES is at least as good."""
    A = symmetric(spectrum(size, condition, seed), seed)
    rhs = randn(size, generator=seeded(seed + 1))
    exact = torch.linalg.solve(A, rhs)

    def energy(error):
        return float(error @ A @ error) ** 0.5

    found = ConjugateGradient(iterations, 1e-13).solve(Matrix(A), rhs)
    rate = (condition**0.5 - 1) / (condition**0.5 + 1)
    bound = 2 * rate ** int(found.iterations) * energy(exact)
    assert energy(found.x - exact) <= bound * (1 + 1e-8) + 1e-11
    minimal = GMRES(iterations, 1e-13).solve(Matrix(A), rhs)
    assert float(minimal.residual) <= float(found.residual) * (1 + 1e-8) + 1e-11

    step = 1 / condition
    series = Neumann(step, iterations, 1e-13).solve(Matrix(A), rhs)
    remaining = torch.eye(size, dtype=DTYPE) - step * A
    expected = torch.linalg.matrix_power(remaining, iterations) @ rhs
    assert relative_error(rhs - A @ series.x, expected) < 1e-9


@given(st.integers(2, 10), st.integers(1, 4), seeds)
def test_krylov_solvers_end_after_as_many_iterations_as_distinct_eigenvalues(size, distinct, seed):
    values = torch.tensor([1.0, 2.0, 5.0, 11.0])[torch.arange(size) % min(distinct, size)]
    A, rhs = Matrix(symmetric(values, seed)), randn(size, generator=seeded(seed + 1))
    for solver in [ConjugateGradient(100, 1e-10), GMRES(100, 1e-10)]:
        assert int(solver.solve(A, rhs).iterations) <= min(distinct, size)


def test_a_solver_that_stops_early_says_so_in_words():
    A = Matrix(symmetric(spectrum(20, 1e4, 0), 0))
    with pytest.warns(ConvergenceWarning, match=r"did not reach its tolerance of 1e-05"):
        found = ConjugateGradient(3).solve(A, randn(20, generator=seeded(1)))
    assert not found.converged
    assert "stopped after 3 iterations at a relative residual of" in found.status


# Matrices that are not symmetric.


@given(sizes, st.floats(0.1, 0.9), seeds)
def test_contractions(size, radius, seed):
    """I − Jᵀ for a contraction J that is not normal."""
    J = randn(size, size, generator=seeded(seed))
    J = radius * J / torch.linalg.matrix_norm(J, 2)
    A, rhs = torch.eye(size, dtype=DTYPE) - J.T, randn(size, generator=seeded(seed + 1))
    expected = torch.linalg.solve(A, rhs)
    for solver in [Neumann(1.0, 1000, 1e-12), GMRES(100, 1e-12), Dense()]:
        found = solver.solve(Matrix(A, symmetric=False), rhs)
        assert relative_error(found.x, expected) < 1e-10
        assert found.converged


@pytest.mark.parametrize(
    "solver",
    [ConjugateGradient(), NormalConjugateGradient(), Nystrom(2), RandomizedEigendecomposition(2)],
)
def test_solvers_for_symmetric_matrices_refuse_others(solver):
    A = Matrix(torch.eye(3, dtype=DTYPE), symmetric=False)
    with pytest.raises(ConfigurationError, match=f"{type(solver).__name__} needs a symmetric"):
        solver.solve(A, torch.ones(3, dtype=DTYPE))


# Low rank.


@given(st.integers(1, 10), st.integers(1, 4), st.integers(-6, 2), seeds)
def test_low_rank_solvers_are_exact_at_the_rank_of_the_matrix(size, rank, power, seed):
    """Even with a damping far below the eigenvalues, where the published form loses all digits."""
    factor = randn(size, rank, generator=seeded(seed))
    A, rhs, damping = factor @ factor.T, randn(size, generator=seeded(seed + 1)), 10.0**power
    core = torch.linalg.eigvalsh(A)[-min(rank, size) :]
    # A draw of columns that are nearly dependent says little about the matrix.
    chosen = torch.randperm(size, generator=seeded(0))[:rank]
    assume(float(torch.linalg.eigvalsh(A[chosen][:, chosen])[0]) > 1e-3 * float(core[-1]))
    expected = torch.linalg.solve(A + damping * torch.eye(size, dtype=DTYPE), rhs)
    for solver in [Nystrom(rank), RandomizedEigendecomposition(rank)]:
        x = solver.solve(Matrix(A), rhs, damping=damping, generator=seeded(0)).x
        assert relative_error(x, expected) < 1e-7


@pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")
@given(st.integers(3, 8), st.integers(1, 3), seeds)
def test_nystrom_is_the_published_formula(size, rank, seed):
    A = symmetric(spectrum(size, 20.0, seed), seed)
    rhs, damping = randn(size, generator=seeded(seed + 1)), 0.7
    chosen = torch.randperm(size, generator=seeded(seed))[:rank]
    columns, core = A[:, chosen], A[chosen][:, chosen]
    inner = torch.linalg.solve(core + columns.T @ columns / damping, columns.T @ rhs)
    expected = rhs / damping - columns @ inner / damping**2
    found = Nystrom(rank).solve(Matrix(A), rhs, damping=damping, generator=seeded(seed))
    assert relative_error(found.x, expected) < 1e-10


@pytest.mark.parametrize("make", [Nystrom, RandomizedEigendecomposition])
def test_a_rank_that_is_too_low_is_not_called_converged(make):
    A, rhs = Matrix(torch.eye(40, dtype=DTYPE)), torch.ones(40, dtype=DTYPE)
    with pytest.warns(ConvergenceWarning, match=rf"{make.__name__} did not reach.*0\.01"):
        found = make(2).solve(A, rhs, damping=1.5)
    assert not found.converged
    assert "at a relative residual of 0.6" in found.status
    assert make(2, tolerance=0.9).solve(A, rhs, damping=1.5).converged


@pytest.mark.parametrize("tolerance", [1, 1.0, 5.0])
def test_what_zero_would_satisfy_is_no_tolerance(tolerance):
    for make in (
        *(ConjugateGradient, NormalConjugateGradient, GMRES, Dense),
        *(partial(each, 2) for each in (Nystrom, RandomizedEigendecomposition, Neumann)),
    ):
        with pytest.raises(ConfigurationError, match=rf"tolerance={tolerance}: .* in \(0, 1\)"):
            make(tolerance=tolerance)


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 2), seeds)
def test_eigenpairs_of_a_matrix_of_low_rank(size, rank, power_iterations, seed):
    rank = min(rank, size)
    values = torch.zeros(size, dtype=DTYPE)
    values[:rank] = torch.tensor([3.0, -2.0, 1.0, 0.5], dtype=DTYPE)[:rank]
    A = symmetric(values, seed)
    found, vectors = randomized_eigendecomposition(
        Matrix(A),
        rank,
        oversampling=2,
        power_iterations=power_iterations,
        generator=seeded(seed),
    )
    assert relative_error(found, values[:rank]) < 1e-8
    assert relative_error(vectors * found @ vectors.T, A) < 1e-8
    assert relative_error(vectors.T @ vectors, torch.eye(rank, dtype=DTYPE)) < 1e-10


@pytest.mark.parametrize("solver", [Nystrom(2), RandomizedEigendecomposition(2)])
def test_low_rank_without_damping_is_refused(solver):
    A = Matrix(torch.eye(3, dtype=DTYPE))
    with pytest.raises(ConfigurationError, match=r"damping=0: .* of rank 2 .* 3"):
        solver.solve(A, torch.ones(3, dtype=DTYPE))


# Many systems at once.


@settings(max_examples=15)
@given(st.integers(1, 6), st.integers(1, 5), seeds)
def test_a_batch_is_solved_as_each_by_itself(size, count, seed):
    """Easy, hard, scaled and zero right-hand sides side by side, each with its own verdict."""
    conditions = 10.0 ** (torch.arange(count, dtype=DTYPE) / 2)
    matrices = torch.stack(
        [symmetric(spectrum(size, conditions[i], seed + i), seed + i) for i in range(count)]
    )
    rhs = randn(count, size, generator=seeded(seed)) * 10.0 ** torch.arange(count)[:, None]
    rhs[seed % count] = 0
    for solver in [
        ConjugateGradient(500, 1e-10),
        NormalConjugateGradient(30, 1e-8),
        GMRES(30, 1e-10, restart=4),
        Neumann(1 / float(conditions[-1]), 30, 1e-8),
        *direct(size),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)
            together = solver.solve(Matrix(matrices), rhs)
            alone = [solver.solve(Matrix(A), b) for A, b in zip(matrices, rhs, strict=True)]
        for row, one in enumerate(alone):
            assert (together.x[row] - one.x).norm() <= 1e-7 * one.x.norm()
            assert abs(int(together.iterations[row]) - int(one.iterations)) <= 1
        assert together.converged == all(one.converged for one in alone)


def test_a_converged_system_stays_as_it_is_while_others_go_on():
    """At a coarse tolerance, where going on would change it."""
    easy = 1000 * symmetric(torch.linspace(0.5, 1, 10), 0)
    hard = symmetric(spectrum(10, 1e3, 0), 0)
    rhs = randn(2, 10, generator=seeded(1))
    for solver in [
        ConjugateGradient(200, 1e-2),
        NormalConjugateGradient(5000, 1e-2),
        GMRES(200, 1e-2),
        Neumann(1e-3, 5000, 1e-2),
    ]:
        alone = solver.solve(Matrix(easy), rhs[0])
        found = solver.solve(Matrix(torch.stack([easy, hard])), rhs)
        assert int(found.iterations[0]) == int(alone.iterations) < int(found.iterations[1])
        assert float(alone.residual) > 1e-5
        assert relative_error(found.x[0], alone.x) < 1e-12


def test_many_tasks_under_vmap():
    """One batched solve with a vmapped Hessian equals the solves of every task."""
    inputs, theta = randn(5, 7, 3, generator=seeded(0)), randn(5, 3, generator=seeded(1))

    def loss(theta, inputs):
        return torch.nn.functional.softplus(inputs @ theta).mean() + 0.05 * (theta**2).sum()

    gradients = torch.func.vmap(torch.func.grad(loss))
    rhs = randn(5, 3, generator=seeded(2))
    operator = HessianOperator(lambda theta: gradients(theta, inputs), theta)
    assert relative_error(operator.gradient, gradients(theta, inputs)) < 1e-14
    for solver in [ConjugateGradient(20, 1e-10), GMRES(20, 1e-10), *direct(3)]:
        found = solver.solve(operator, rhs)
        for row in range(5):
            hessian = torch.func.jacrev(torch.func.grad(loss))(theta[row], inputs[row])
            assert relative_error(found.x[row], torch.linalg.solve(hessian, rhs[row])) < 1e-9


# The operator.


@given(seeds)
def test_hessian_products(seed):
    case = problems.make("learned_start", seed % 1000)
    inputs, targets = case.problem.inputs, case.problem.targets

    def loss(theta):
        return ((torch.tanh(inputs @ theta) - targets) ** 2).mean()

    theta = randn(4, generator=seeded(seed))
    hessian = torch.func.jacrev(torch.func.grad(loss))(theta)
    operator = HessianOperator(torch.func.grad(loss), theta)
    vector = randn(4, generator=seeded(seed + 1))
    assert relative_error(operator(vector), hessian @ vector) < 1e-12
    assert not operator(vector).requires_grad
    assert operator.products == 2
    assert relative_error(operator.columns(torch.tensor([2, 0])), hessian[:, [2, 0]]) < 1e-12
    assert operator.products == 4


def test_every_product_is_counted():
    A, rhs = symmetric(spectrum(6, 5.0, 0), 0), randn(6, generator=seeded(1))
    for solver in [*iterative(5.0, 1.0), *direct(6), RandomizedEigendecomposition(6, 2, 3)]:
        operator = Matrix(A)
        assert solver.solve(operator, rhs).products == operator.products
        assert operator.products >= 2


# Starts, and what is refused.


@given(sizes, seeds)
def test_a_good_start_needs_no_iteration_and_a_bad_one_does_no_harm(size, seed):
    A, rhs = symmetric(spectrum(size, 9.0, seed), seed), randn(size, generator=seeded(seed + 1))
    exact = torch.linalg.solve(A, rhs)
    for solver in iterative(9.0, 1.0):
        assert int(solver.solve(Matrix(A), rhs, start=exact).iterations) <= 1
        found = solver.solve(Matrix(A), rhs, start=100 * randn(size, generator=seeded(seed)))
        assert relative_error(found.x, exact) < 1e-9


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_is_named(bad):
    A, rhs = Matrix(torch.eye(2, dtype=DTYPE)), torch.tensor([1.0, bad], dtype=DTYPE)
    for solver in [*iterative(1.0), *direct(2)]:
        found = solver.solve(A, rhs)
        assert not torch.isfinite(found.x).any()
        assert not found.converged
        assert "not finite" in found.status


@pytest.mark.parametrize("entry", [0.0, float("nan"), float("inf")])
def test_a_matrix_that_cannot_be_inverted(entry):
    A = Matrix(torch.diag(torch.tensor([1.0, entry], dtype=DTYPE)))
    rhs = torch.ones(2, dtype=DTYPE)
    for solver in direct(2):
        with pytest.raises(SolverError, match=rf"{type(solver).__name__} failed .*raise damping"):
            solver.solve(A, rhs)


def test_shapes_that_do_not_fit():
    A = Matrix(torch.eye(3, dtype=DTYPE))
    with pytest.raises(ConfigurationError, match=r"rhs of shape \(2,\).*\(3,\)"):
        ConjugateGradient().solve(A, torch.ones(2, dtype=DTYPE))
    ones = torch.ones(3, dtype=DTYPE)
    with pytest.raises(ConfigurationError, match=r"start of shape \(2,\).*\(3,\)"):
        ConjugateGradient().solve(A, ones, start=ones[:2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConjugateGradient(0), "max_iterations=0: it must be an integer of at least 1"),
        (
            lambda: ConjugateGradient(tolerance=0),
            r"tolerance=0: it must be a finite number in \(0, 1\)",
        ),
        (lambda: NormalConjugateGradient(True), "max_iterations=True"),
        (lambda: GMRES(restart=0), "restart=0"),
        (lambda: Neumann(0.0), r"step_size=0.0: it must be a finite number above 0"),
        (lambda: Neumann("small"), "step_size='small'"),
        (lambda: Nystrom(0), "rank=0"),
        (lambda: RandomizedEigendecomposition(2, -1), "oversampling=-1: .* at least 0"),
        (lambda: RandomizedEigendecomposition(2, 1, 0.5), "power_iterations=0.5"),
        (lambda: Dense(float("nan")), "tolerance=nan"),
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()
