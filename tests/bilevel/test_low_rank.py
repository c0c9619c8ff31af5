"""The low-rank recursion: exact where it says so, closer with more rank, and never silently off."""

import itertools

import problems
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import DTYPE, Fixed, flat, randn, relative_error, seeded

import bilevel
from bilevel import ConfigurationError, NonFiniteError
from bilevel.basis import Anchor, Eigenvectors, Krylov
from bilevel.compiler import Compiler
from bilevel.estimators import Adjoint, LowRank
from bilevel.linear import HessianOperator, Lanczos

seeds = st.integers(0, 2**31)
ANY = 10**6

OPTIMIZERS = {
    "sgd": lambda: bilevel.optim.sgd(0.05),
    "momentum": lambda: bilevel.optim.sgd(0.05, momentum=0.9),
    "adam": lambda: bilevel.optim.adam(0.05, betas=(0.9, 0.95), eps_root=1e-8),
    "adagrad": lambda: bilevel.optim.adagrad(0.05, eps_root=1e-8),
}
optimizers = st.sampled_from(sorted(OPTIMIZERS))
full_bases = st.sampled_from([lambda: Krylov(ANY, 0.0), lambda: Eigenvectors(ANY)])


class Bent(bilevel.Problem):
    """ℓ_t = Σ ½aᵢeᵢ² + ¼ quartic·eᵢ⁴ with e = θ − φ_t, one row of φ a step; F = ½‖θ − c‖²."""

    def __init__(self, curvatures, quartic):
        self.curvatures, self.quartic = curvatures, quartic

    def init(self, outer, *, generator):
        return 2 * randn(len(self.curvatures), generator=generator)

    def inner_batch(self, outer, step, *, generator):
        return outer[step % len(outer)]

    def inner_loss(self, params, batch):
        error = params - batch
        return (0.5 * self.curvatures * error**2 + 0.25 * self.quartic * error**4).sum()

    def outer_loss(self, params, outer, batch):
        return 0.5 * ((params - batch) ** 2).sum()


def bent(curvatures, quartic=0.0, rows=1, seed=0):
    curvatures = torch.as_tensor(curvatures, dtype=DTYPE)
    outer = randn(rows, len(curvatures), generator=seeded(seed))
    return problems.Case(
        Bent(curvatures, quartic), outer, randn(len(curvatures), generator=seeded(seed + 1))
    )


def solve(case, optimizer, window, estimator, seed=0, **options):
    hypergradient = bilevel.Hypergradient(
        case.problem, optimizer, window[1], Fixed(*window), estimator, **options
    )
    return hypergradient(case.outer, case.outer_batch, seeded(seed))


def reference(case, optimizer, window, seed=0):
    return problems.brute_force(
        case, optimizer, bilevel.Key.draw(seeded(seed)), bilevel.Window(*window)
    )[1]


def unguarded(basis, group_size=1):
    return LowRank(basis, group_size, guard=None)


@st.composite
def windows(draw):
    stop = draw(st.integers(1, 9))
    return draw(st.integers(0, stop - 1)), stop


# The Krylov space.


@settings(max_examples=40)
@given(st.integers(1, 30), st.integers(1, 40), st.floats(0, 12), st.booleans(), seeds)
def test_the_basis_is_orthonormal_and_the_matrix_its_projection(size, capacity, decay, sign, seed):
    """Also for spectra over twelve decades and of both signs, where the recurrence alone fails."""
    basis = torch.linalg.qr(randn(size, size, generator=seeded(seed)))[0]
    values = 10 ** -torch.linspace(0, decay, size, dtype=DTYPE)
    values[::2] *= -1 if sign else 1
    A = basis @ torch.diag(values) @ basis.T
    start = randn(size, generator=seeded(seed + 1))
    process = Lanczos(start, capacity)
    while process.next is not None:
        process.extend(A @ process.next)
    Q = process.basis
    rank = len(process.matrix)
    assert 1 <= rank <= min(size, capacity)
    torch.testing.assert_close(Q.T @ Q, torch.eye(rank, dtype=DTYPE), rtol=0, atol=1e-10)
    torch.testing.assert_close(process.matrix, Q.T @ A @ Q, rtol=0, atol=1e-10)
    torch.testing.assert_close(Q[:, 0], start / start.norm())


@given(st.integers(1, 4), st.integers(0, 8), st.sampled_from([1e-20, 1.0, 1e20]), seeds)
def test_it_ends_with_the_invariant_subspace_of_its_start(inside, outside, scale, seed):
    size = inside + outside
    basis = torch.linalg.qr(randn(size, size, generator=seeded(seed)))[0]
    A = scale * basis @ torch.diag(torch.linspace(1, 3, size, dtype=DTYPE)) @ basis.T
    process = Lanczos(basis[:, :inside].sum(1), capacity=20)
    while process.next is not None:
        process.extend(A @ process.next)
    assert len(process.matrix) == inside
    with pytest.raises(ValueError, match="no further direction"):
        process.extend(A[0])


def test_a_start_of_zero_and_one_that_is_not_finite():
    assert Lanczos(torch.zeros(3), 2).next is None
    with pytest.raises(NonFiniteError, match="start of the Krylov space"):
        Lanczos(torch.tensor([1.0, float("nan")]), 2)
    process = Lanczos(torch.ones(3), 2)
    with pytest.raises(NonFiniteError, match="a product with the matrix"):
        process.extend(torch.full((3,), float("inf")))


# Where the low-rank recursion is exact.


@settings(max_examples=50)
@given(optimizers, windows(), full_bases, st.integers(1, 12), seeds)
def test_full_rank_is_exact_for_a_constant_hessian(name, window, basis, group_size, seed):
    """Whatever the grouping: the mixed derivative of this problem is constant too."""
    case = problems.make("quadratic", seed % 1000)
    optimizer = OPTIMIZERS[name]()
    result = solve(case, optimizer, window, unguarded(basis(), group_size), seed)
    assert relative_error(result.grads, reference(case, optimizer, window, seed)) < 1e-8
    assert result.stats.status == "ok"
    assert not result.stats.low_rank.exact


@settings(max_examples=40)
@given(st.sampled_from(sorted(problems.PROBLEMS)), optimizers, st.integers(0, 5), full_bases, seeds)
def test_full_rank_is_exact_where_every_step_has_its_own_hessian(name, kind, start, basis, seed):
    """A window of one step: its middle is that step."""
    case = problems.make(name, seed % 1000)
    optimizer = bilevel.optim.sgd if case.learns_rate else OPTIMIZERS[kind]()
    window = (start, start + 1)
    result = solve(case, optimizer, window, unguarded(basis()), seed)
    assert relative_error(result.grads, reference(case, optimizer, window, seed)) < 1e-8


@given(st.integers(1, 7), st.sampled_from(["sgd", "momentum"]), seeds)
def test_a_krylov_space_as_long_as_the_window_is_exact_for_gradient_descent(steps, name, seed):
    """Far below the number of parameters."""
    case = bent(torch.linspace(0.1, 3, 40), seed=seed)
    optimizer = OPTIMIZERS[name]()
    basis = Krylov(steps + 1, 0.0)
    result = solve(case, optimizer, (0, steps), unguarded(basis), seed)
    assert relative_error(result.grads, reference(case, optimizer, (0, steps), seed)) < 1e-9
    assert result.stats.low_rank.rank == steps + 1


@pytest.mark.parametrize("name", ["sgd", "momentum"])
@pytest.mark.parametrize("basis", [Krylov, lambda rank, _: Eigenvectors(rank)])
def test_the_error_falls_with_the_rank_for_a_decaying_spectrum(basis, name):
    case = bent(2.0 ** -torch.arange(16) * 4, seed=3)
    optimizer, window = OPTIMIZERS[name](), (10, 30)
    exact = reference(case, optimizer, window)
    errors = [
        relative_error(solve(case, optimizer, window, unguarded(basis(rank, 0.0))).grads, exact)
        for rank in (1, 3, 6, 16)
    ]
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[0] > 0.5
    assert errors[2] < 0.02
    assert errors[3] < 1e-8


@settings(max_examples=10)
@given(st.sampled_from(["sgd", "momentum"]), seeds)
def test_a_decaying_spectrum_needs_few_directions(name, seed):
    case = bent(2.0 ** -torch.arange(16) * 4, seed=seed)
    optimizer, window = OPTIMIZERS[name](), (10, 30)
    exact = reference(case, optimizer, window, seed)
    few, more, all_of_them = (
        relative_error(
            solve(case, optimizer, window, unguarded(Krylov(rank, 0.0)), seed).grads, exact
        )
        for rank in (1, 6, 16)
    )
    assert more < few / 5
    assert all_of_them < 1e-7


@settings(max_examples=10)
@given(st.sampled_from(["sgd", "momentum"]), seeds)
def test_the_rank_is_as_large_as_the_tolerance_needs(name, seed):
    case = bent(2.0 ** -torch.arange(40), seed=seed)
    optimizer, window = OPTIMIZERS[name](), (15, 35)
    exact = reference(case, optimizer, window, seed)
    found = [
        solve(case, optimizer, window, unguarded(Krylov(40, tolerance)), seed)
        for tolerance in (1e-2, 1e-5)
    ]
    ranks = [result.stats.low_rank.rank for result in found]
    assert ranks[0] < ranks[1] < 40
    errors = [relative_error(result.grads, exact) for result in found]
    assert errors[0] < 0.1
    assert errors[1] < 1e-3


# What a group sees, and what everything costs.


@pytest.mark.parametrize(
    ("window", "size", "centres"), [((0, 6), 3, [1, 4]), ((2, 9), 4, [4, 7]), ((1, 4), 9, [2])]
)
def test_a_group_is_evaluated_at_its_middle_step(window, size, centres):
    """One row of the outer variable a step, so its gradient shows where it was asked for."""
    case = bent([1.0, 2.0], rows=9)
    result = solve(case, OPTIMIZERS["sgd"](), window, unguarded(Krylov(2, 0.0), size))
    assert flat(result.grads).view(9, 2).abs().sum(1).nonzero().flatten().tolist() == centres
    assert result.stats.hessian_vector_products == 2
    assert result.stats.low_rank.evaluations == 2 + len(centres)
    assert result.stats.cotangent_norms.shape == (window[1] - window[0] + 1,)


def test_the_published_form_costs_more_than_the_exact_recursion():
    case, optimizer, window = bent(torch.linspace(1, 2, 50)), OPTIMIZERS["sgd"](), (0, 20)
    published = solve(case, optimizer, window, LowRank(Eigenvectors(), 1, None)).stats.low_rank
    ours = solve(case, optimizer, window, LowRank(Krylov(4, 0.0), 4)).stats.low_rank
    assert published.evaluations == (32 + 4) * (2 + 2) + 20
    assert ours.evaluations == 4 + 5 + 2
    assert (published.rank, ours.rank) == (32, 4)


def test_nothing_is_mixed_where_no_batch_depends_on_the_outer_variables():
    case = problems.make("learned_start", 0)
    result = solve(case, OPTIMIZERS["adam"](), (0, 4), unguarded(Krylov(2, 0.0)))
    assert result.stats.low_rank.evaluations == 2


@pytest.mark.parametrize("options", [{"keep_every": 3}, {"keep_every": 4, "keep_on": "cpu"}])
def test_recomputed_iterates_make_no_difference(options):
    case, optimizer = problems.make("mlp_distillation", 0), OPTIMIZERS["adam"]()
    expected = solve(case, optimizer, (3, 13), unguarded(Krylov(), 3), keep_every=1)
    found = solve(case, optimizer, (3, 13), unguarded(Krylov(), 3), **options)
    assert relative_error(found.grads, expected.grads) < 1e-12


# Breakdown.


def at_end(case, optimizer, steps, offset):
    """The same case with ∂F/∂θ_stop = `offset`."""
    stop = solve(case, optimizer, (0, steps), Adjoint()).params
    return problems.Case(case.problem, case.outer, stop - offset)


@given(optimizers, full_bases, seeds)
def test_a_cotangent_of_zero_is_a_hypergradient_of_zero(name, basis, seed):
    optimizer = OPTIMIZERS[name]()
    case = at_end(bent([1.0, 2.0, 3.0], quartic=0.1), optimizer, 6, torch.zeros(3, dtype=DTYPE))
    result = solve(case, optimizer, (2, 6), LowRank(basis(), 2, guard=1e-9))
    assert not flat(result.grads).any()
    assert not result.stats.low_rank.exact
    assert "exactly zero" in result.stats.status


@given(st.sampled_from(["sgd", "momentum"]), st.integers(1, 3))
def test_a_cotangent_in_an_invariant_subspace_needs_no_more_than_that(name, inside):
    optimizer = OPTIMIZERS[name]()
    offset = (torch.arange(5) < inside).to(DTYPE)
    case = at_end(bent([1.0, 1.5, 2.0, 2.5, 3.0]), optimizer, 6, offset)
    result = solve(case, optimizer, (0, 6), unguarded(Krylov(5, 0.0)))
    assert result.stats.low_rank.rank == inside
    assert relative_error(result.grads, reference(case, optimizer, (0, 6))) < 1e-9


# The guard.


@pytest.mark.parametrize(
    "optimizer",
    [bilevel.optim.sgd(0.05), bilevel.optim.sgd(0.05, momentum=0.9), bilevel.optim.adam(0.4)],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.parametrize("basis", [Krylov, Eigenvectors])
def test_a_rapidly_changing_curvature_is_done_exactly_and_said(optimizer, basis):
    case, window = bent([0.1] * 4, quartic=1.0), (0, 20)
    found = solve(case, optimizer, window, LowRank(basis()))
    exact = solve(case, optimizer, window, Adjoint(), graph_budget=0)
    torch.testing.assert_close(found.grads, exact.grads, rtol=0, atol=0)
    torch.testing.assert_close(found.stats.cotangent_norms, exact.stats.cotangent_norms)
    assert "exact recursion: the Hessian changes by" in found.stats.status
    stats = found.stats.low_rank
    assert stats.exact
    assert stats.rank == 0
    assert stats.staleness > 0.6
    assert stats.evaluations == found.stats.hessian_vector_products == 20 + 3
    off = solve(case, optimizer, window, LowRank(basis(), guard=None))
    assert not off.stats.low_rank.exact
    assert relative_error(off.grads, exact.grads) > 0.05


@given(optimizers, windows(), seeds)
def test_a_constant_curvature_is_not_stale(name, window, seed):
    result = solve(problems.make("quadratic", seed % 1000), OPTIMIZERS[name](), window, LowRank())
    assert not result.stats.low_rank.exact
    assert result.stats.low_rank.staleness < 1e-10


def test_random_batches_are_a_reason_too():
    case = problems.make("data_cleaning", 0)
    result = solve(case, OPTIMIZERS["momentum"](), (2, 12), LowRank(guard=0.05))
    assert "exact recursion" in result.stats.status


def test_falling_back_again_compiles_nothing_anew():
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph

    case = problems.make("data_cleaning", 0)
    hypergradient = bilevel.Hypergradient(
        case.problem, OPTIMIZERS["momentum"](), 9, Fixed(2, 8), LowRank(guard=1e-9), compile=True
    )
    hypergradient.inner.compiler = Compiler(counting)
    after = []
    for seed in range(5):
        result = hypergradient(case.outer, case.outer_batch, seeded(seed))
        assert result.stats.low_rank.exact
        after.append(len(graphs))
    assert after == [after[0]] * 5
    assert after[0] >= 3  # the recorded step, the outer loss, the adjoint step


def test_a_run_that_diverges_is_reported_as_by_the_exact_recursion():
    case = bent([1.0], quartic=1.0)
    with pytest.raises(NonFiniteError, match="the inner loss became"):
        solve(case, bilevel.optim.sgd(100.0), (0, 9), LowRank())


# Eigenvectors that are kept.


def kept(every=3, change=1e9):
    return LowRank(Eigenvectors(4, refresh_every=every, refresh_change=change), guard=None)


def products(case, estimator, count, seed=0):
    results = [solve(case, OPTIMIZERS["sgd"](), (2, 6), estimator, seed) for _ in range(count)]
    return [result.stats.hessian_vector_products for result in results]


def test_kept_eigenvectors_are_made_anew_after_so_many_calls_or_such_a_change():
    case = bent([1.0, 2.0, 3.0, 4.0, 5.0], quartic=0.1)
    assert products(case, kept(), 5) == [21, 1, 1, 21, 1]  # one of each is Hu
    assert products(case, kept(every=1), 2) == [20, 20]
    changing = kept(every=100, change=0.01)
    assert [products(case, changing, 1, seed)[0] for seed in (0, 0, 1, 1)] == [21, 1, 21, 1]


@given(st.floats(-0.9, 3), seeds)
def test_kept_eigenvectors_go_with_the_hessian_though_the_gradient_is_the_same(change, seed):
    """One that is (1 + change)·H: kept where |change| is below refresh_change."""
    curvatures = torch.linspace(1, 8, 5, dtype=DTYPE)
    basis = Eigenvectors(5, refresh_every=100, refresh_change=0.2)
    assume(abs(abs(change) - 0.2) > 1e-6)
    vectors = [randn(5, generator=seeded(seed + index)) for index in range(2)]

    def anchor(scale):
        hessian = HessianOperator(lambda params: scale * curvatures * params, vectors[0])
        return Anchor(hessian, *vectors, torch.ones(5, dtype=DTYPE), 10, seeded(seed))

    basis.approximate(anchor(1.0))
    found = basis.approximate(anchor(1 + change)).values.sort().values
    scale = 1.0 if abs(change) < 0.2 else 1 + change
    torch.testing.assert_close(found, scale * curvatures, rtol=1e-9, atol=1e-12)


def test_kept_eigenvectors_are_saved_and_restored():
    case, optimizer = bent([1.0, 2.0, 3.0], quartic=0.1), OPTIMIZERS["sgd"]()
    first = kept()
    products(case, first, 2)
    second = kept()
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        expected, found = (solve(case, optimizer, (2, 6), each) for each in (first, second))
        torch.testing.assert_close(found.grads, expected.grads, rtol=0, atol=0)
        products_taken = (each.stats.hessian_vector_products for each in (expected, found))
        assert len(set(products_taken)) == 1
    assert LowRank().state_dict() == {}
    with pytest.raises(ConfigurationError, match="4 parameters"):
        products(bent([1.0] * 4), second, 1)


@pytest.mark.parametrize("basis", [Krylov(), Eigenvectors(), Eigenvectors(refresh_every=2)])
def test_a_foreign_state_is_refused(basis):
    with pytest.raises(ConfigurationError, match="solution"):
        LowRank(basis).load_state_dict({"solution": torch.zeros(3)})


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: LowRank("krylov"), "basis"),
        (lambda: LowRank(group_size=0), "group_size"),
        (lambda: LowRank(guard=0.0), "guard"),
        (lambda: Krylov(0), "max_rank"),
        (lambda: Krylov(tolerance=-1.0), "tolerance"),
        (lambda: Eigenvectors(0), "rank"),
        (lambda: Eigenvectors(power_iterations=-1), "power_iterations"),
        (lambda: Eigenvectors(refresh_every=0), "refresh_every"),
        (lambda: Eigenvectors(refresh_change=0), "refresh_change"),
        (lambda: Lanczos(torch.ones(2), 0), "capacity"),
    ],
)
def test_arguments_that_cannot_work_are_named(make, name):
    with pytest.raises(ConfigurationError, match=name):
        make()
