"""Several inner runs give the mean of their hypergradients, one after the other or side by side."""

import optree
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import brute_force, flat, relative_error, seeded

import bilevel

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
    assert drawn.count(3) == 6  # recorded and differentiated
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
