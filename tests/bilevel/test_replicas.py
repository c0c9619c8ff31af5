"""Several inner runs give the mean of their hypergradients, one after the other or side by side."""

import time

import optree
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, brute_force, flat, relative_error, seeded

import bilevel
from bilevel.recording.record import record

WINDOW = problems.Fixed(0, 4)
names = st.sampled_from(["data_cleaning", "mlp_distillation", "learned_start"])
optimizers = st.sampled_from(
    [bilevel.optim.sgd(0.1, momentum=0.9), bilevel.optim.adam(0.05, eps_root=1e-6)]
)


class Member(bilevel.Problem):
    """One replica, drawing what `Replicas` lets it draw."""

    def __init__(self, problem, index):
        self.problem, self.index = problem, index

    def own(self, generator):
        return bilevel.Key.draw(generator).generator("replica", self.index)

    def init(self, outer, *, generator):
        return self.problem.init(outer, generator=self.own(generator))

    def inner_batch(self, outer, step, *, generator):
        return self.problem.inner_batch(outer, step, generator=self.own(generator))

    def inner_loss(self, params, batch):
        return self.problem.inner_loss(params, batch)

    def outer_loss(self, params, outer, batch):
        return self.problem.outer_loss(params, outer, batch)


def mean_of(trees):
    return optree.tree_map(lambda *leaves: torch.stack(leaves).mean(0), *trees)


@settings(max_examples=15)
@given(name=names, optimizer=optimizers, count=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_side_by_side_is_the_mean(name, optimizer, count, seed):
    case = problems.make(name, seed)
    replicated = bilevel.Replicas(case.problem, count)
    found = bilevel.Hypergradient(replicated, optimizer, 5, WINDOW)(
        case.outer, case.outer_batch, seeded(seed)
    )
    key = bilevel.Key.draw(seeded(seed))
    losses, grads = [], []
    for index in range(count):
        member = problems.Case(Member(case.problem, index), case.outer, case.outer_batch)
        loss, grad = brute_force(member, optimizer, key, WINDOW.window)
        losses.append(loss)
        grads.append(grad)
    assert relative_error(found.grads, mean_of(grads)) < 1e-8
    assert relative_error(found.loss, torch.stack(losses).mean()) < 1e-10


@settings(max_examples=15)
@given(name=names, optimizer=optimizers, count=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_one_after_the_other_is_the_mean(name, optimizer, count, seed):
    case = problems.make(name, seed)
    found = bilevel.Hypergradient(case.problem, optimizer, 5, WINDOW, inner_replicas=count)(
        case.outer, case.outer_batch, seeded(seed)
    )
    key = bilevel.Key.draw(seeded(seed))
    keys = [key, *(key.fold("replica", index) for index in range(1, count))]
    losses, grads = zip(
        *(brute_force(case, optimizer, each, WINDOW.window) for each in keys), strict=True
    )
    assert relative_error(found.grads, mean_of(grads)) < 1e-8
    assert relative_error(found.loss, torch.stack(losses).mean()) < 1e-10
    assert relative_error(found.stats.hypergradient_norm, flat(mean_of(grads)).norm()) < 1e-8
    assert found.stats.hessian_vector_products == 4 * count


class Early(problems.Fixed):
    """A window that ends before the run does, and is known only after it."""

    def plan(self, steps, generator):
        return bilevel.truncation.Plan(steps)

    def select(self, trace, generator):
        return self.window


def test_only_the_first_replica_runs_past_the_window():
    case = problems.make("mlp_distillation", 0)
    drawn = []
    draw = case.problem.inner_batch

    def inner_batch(outer, step, *, generator):
        drawn.append(step)
        return draw(outer, step, generator=generator)

    case.problem.inner_batch = inner_batch
    optimizer = bilevel.optim.sgd(0.1)
    made = bilevel.Hypergradient(case.problem, optimizer, 9, Early(1, 4), inner_replicas=3)
    made(case.outer, case.outer_batch, seeded(0))
    drawn.clear()
    found = made(case.outer, case.outer_batch, seeded(0))
    assert drawn.count(3) == 3  # once each, since their graphs are kept
    assert drawn.count(8) == 1
    key = bilevel.Key.draw(seeded(0))
    keys = [key, key.fold("replica", 1), key.fold("replica", 2)]
    grads = [brute_force(case, optimizer, each, bilevel.Window(1, 4))[1] for each in keys]
    assert relative_error(found.grads, mean_of(grads)) < 1e-8


def test_low_rank_numbers_are_those_of_all_runs():
    case = problems.make("mlp_distillation", 0)
    optimizer, krylov = bilevel.optim.sgd(0.1), bilevel.basis.Krylov(2, 0.0)

    def stats(guard, count):
        estimator = bilevel.estimators.LowRank(krylov, guard=guard)
        return bilevel.Hypergradient(
            case.problem, optimizer, 5, WINDOW, estimator, inner_replicas=count
        )(case.outer, case.outer_batch, seeded(0)).stats.low_rank

    one, three = stats(1e6, 1), stats(1e6, 3)
    assert (three.evaluations, three.exact) == (3 * one.evaluations, False)
    assert three.staleness > one.staleness
    # The first run is below the guard, another is not.
    mixed = stats((one.staleness + three.staleness) / 2, 3)
    assert mixed.exact
    assert not stats((one.staleness + three.staleness) / 2, 1).exact


def test_the_mean_varies_less():
    """Its variance over seeds is that of one run divided by the number of replicas."""
    case = problems.make("mlp_distillation", 0)

    def variance(count):
        made = bilevel.Hypergradient(
            case.problem, bilevel.optim.sgd(0.1), 4, WINDOW, inner_replicas=count
        )
        grads = [flat(made(case.outer, case.outer_batch, seeded(seed)).grads) for seed in range(60)]
        return float(torch.stack(grads).var(0).sum())

    assert 2.5 < variance(1) / variance(4) < 6.4


@pytest.mark.parametrize("count", [0, True, 1.5])
def test_a_count_that_cannot_work(count):
    case = problems.make("mlp_distillation", 0)
    with pytest.raises(bilevel.ConfigurationError, match="count="):
        bilevel.Replicas(case.problem, count)
    with pytest.raises(bilevel.ConfigurationError, match="inner_replicas="):
        bilevel.Hypergradient(case.problem, bilevel.optim.sgd(0.1), 4, inner_replicas=count)


class Reporting(bilevel.Problem):
    """A noisy start, and metrics of every kind."""

    def init(self, outer, *, generator):
        return torch.randn(3, generator=generator, dtype=DTYPE)

    def inner_batch(self, outer, step, *, generator):
        return outer

    def inner_loss(self, params, batch):
        return ((params - batch) ** 2).sum()

    def outer_loss(self, params, outer, batch):
        return (params**4).sum(), {
            "each": params**2,
            "count": (params > 0).sum(),
            "positive": params > 0,
            "number": 2.0,
        }


OUTER = torch.tensor([0.5, -1.0, 2.0], dtype=DTYPE)


def runs_of(count, estimator=None, steps=2, seed=0):
    """What each of `count` replicas gives by itself."""
    key = bilevel.Key.draw(seeded(seed))
    keys = [key, *(key.fold("replica", index) for index in range(1, count))]
    hypergradient = bilevel.Hypergradient(
        Reporting(), bilevel.optim.sgd(0.1), steps, None, estimator
    )
    return [
        hypergradient.estimator(record(hypergradient.inner, OUTER, key, steps=steps), None)
        for key in keys
    ]


@pytest.mark.parametrize("side_by_side", [False, True])
def test_metrics_of_every_kind_are_averaged_entry_by_entry(side_by_side):
    problem = bilevel.Replicas(Reporting(), 3) if side_by_side else Reporting()
    count = 1 if side_by_side else 3
    found = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.1), 2, inner_replicas=count)(
        OUTER, None, seeded(0)
    )
    if side_by_side:
        key = bilevel.Key.draw(seeded(0))
        loops = [
            bilevel.InnerLoop(Member(Reporting(), i), bilevel.optim.sgd(0.1)) for i in range(3)
        ]
        ends = [record(loop, OUTER, key, steps=2).iterate_at(2).params for loop in loops]
        runs = [Reporting().outer_loss(params, OUTER, None)[1] for params in ends]
    else:
        runs = [run.metrics for run in runs_of(3)]
    for name in ("each", "count", "positive", "number"):
        expected = torch.stack([torch.as_tensor(run[name]).double() for run in runs]).mean(0)
        assert found.metrics[name].shape == expected.shape
        torch.testing.assert_close(found.metrics[name].double(), expected, rtol=1e-6, atol=0)


class Uneven(Reporting):
    def outer_loss(self, params, outer, batch):
        return params.sum(), {"found": params[: 1 + int(abs(params[0]) * 1e6) % 2]}


def test_a_metric_of_changing_shape_is_named():
    made = bilevel.Hypergradient(Uneven(), bilevel.optim.sgd(0.1), 2, inner_replicas=8)
    with pytest.raises(bilevel.ProblemError, match=r"metric 'found' .* \[\(1,\), \(2,\)\]"):
        made(OUTER, None, seeded(0))


@pytest.mark.parametrize(
    "estimator",
    [None, *(bilevel.estimators.EvolutionStrategies(0.1, pairs) for pairs in (3, 1))],
    ids=["exact", "sampled", "one pair"],
)
def test_the_standard_error_is_from_the_spread_over_the_runs(estimator):
    made = bilevel.Hypergradient(
        Reporting(), bilevel.optim.sgd(0.1), 2, None, estimator, inner_replicas=5
    )
    found = made(OUTER, None, seeded(0))
    grads = torch.stack([flat(run.grads) for run in runs_of(5, estimator)])
    assert relative_error(found.grads, grads.mean(0)) < 1e-12
    expected = (grads.var(0) / 5).sum().sqrt()
    assert relative_error(found.stats.standard_error, expected) < 1e-12


def test_the_standard_error_is_that_of_the_mean():
    """Over seeds, the mean lies off its expectation by as much as it says."""
    made = bilevel.Hypergradient(Reporting(), bilevel.optim.sgd(0.1), 2, inner_replicas=16)
    results = [made(OUTER, None, seeded(seed)) for seed in range(40)]
    grads = torch.stack([flat(result.grads) for result in results])
    spread = grads.var(0).sum().sqrt()
    said = torch.stack([result.stats.standard_error for result in results]).square().mean().sqrt()
    assert 0.7 < float(spread / said) < 1.4


def test_one_run_says_nothing_of_the_spread():
    assert runs_of(1)[0].stats.standard_error is None


@pytest.mark.filterwarnings("ignore::bilevel.ConvergenceWarning")
def test_solver_numbers_are_the_worst_of_all_runs():
    estimator = bilevel.estimators.Implicit(bilevel.linear.ConjugateGradient(1), damping=0.1)
    problem = Reporting()
    problem.inner_loss = lambda params, batch: ((params - batch) ** 2 * scale + params**4).sum()
    scale = torch.tensor([1.0, 5.0, 20.0], dtype=DTYPE)
    made = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.01), 2, None, estimator)
    key = bilevel.Key.draw(seeded(0))
    alone = [
        estimator(record(made.inner, OUTER, each, steps=2), None).stats
        for each in (key, key.fold("replica", 1), key.fold("replica", 2))
    ]
    found = bilevel.Hypergradient(
        problem, bilevel.optim.sgd(0.01), 2, None, estimator, inner_replicas=3
    )(OUTER, None, seeded(0)).stats
    worst = max(alone, key=lambda stats: stats.solver.residual)
    assert found.solver == worst.solver
    assert all(f"{stats.solver.residual:.2g}" in found.status for stats in alone)
    gaps = torch.stack([stats.outer_loss_gap for stats in alone])
    assert relative_error(found.outer_loss_gap, gaps.mean()) < 1e-12


def test_a_remark_about_some_runs_says_about_how_many():
    class Sometimes(Reporting):
        def inner_batch(self, outer, step, *, generator):
            chosen = torch.rand((), generator=generator) < 0.5
            return outer * chosen

    made = bilevel.Hypergradient(Sometimes(), bilevel.optim.sgd(0.1), 1, inner_replicas=6)
    status = made(OUTER, None, seeded(0)).stats.status
    assert "exactly zero" in status
    assert " of 6 inner runs)" in status


@pytest.mark.parametrize("pairs", [1, 2])
def test_persistent_particles_go_on_by_one_segment_a_call(pairs):
    """Each replica as an estimator of its own would."""

    def make():
        return bilevel.estimators.PersistentEvolutionStrategies(0.1, run_length=5, pairs=pairs)

    together = bilevel.Hypergradient(
        Reporting(), bilevel.optim.sgd(0.1), 2, None, make(), inner_replicas=3
    )
    each = [make() for _ in range(3)]
    loop = bilevel.InnerLoop(Reporting(), bilevel.optim.sgd(0.1))
    windows = []
    for call in range(5):
        found = together(OUTER, None, seeded(call))
        windows.append((found.window.start, found.window.stop))
        key = bilevel.Key.draw(seeded(call))
        keys = [key, key.fold("replica", 1), key.fold("replica", 2)]
        grads = [
            estimator(record(loop, OUTER, own, steps=2), None).grads
            for estimator, own in zip(each, keys, strict=True)
        ]
        assert relative_error(found.grads, mean_of(grads)) < 1e-12
        if call == 1:  # resumed
            state = together.estimator.state_dict()
            together = bilevel.Hypergradient(
                Reporting(), bilevel.optim.sgd(0.1), 2, None, make(), inner_replicas=3
            )
            together.estimator.load_state_dict(state)
    assert windows == [(0, 2), (2, 4), (4, 5), (0, 2), (2, 4)]


@pytest.mark.parametrize("inner_replicas", [1, 3])
@pytest.mark.parametrize("known_before", [True, False])
def test_the_parts_of_a_call_take_no_longer_than_all_of_it(inner_replicas, known_before):
    by_stage = bilevel.truncation.StageAware(2, 1, bilevel.truncation.ByFraction())
    case = problems.data_cleaning(seeded(0))
    hypergradient = bilevel.Hypergradient(
        case.problem,
        bilevel.optim.sgd(0.1),
        8,
        truncation=WINDOW if known_before else by_stage,
        inner_replicas=inner_replicas,
    )
    began = time.perf_counter()
    seconds = hypergradient(case.outer, case.outer_batch, seeded(0)).stats.seconds
    passed = time.perf_counter() - began
    assert set(seconds) == {"rollout", "selection", "backward"}
    assert 0 < sum(seconds.values()) <= passed
