"""Evolution strategies: unbiased, by tests that a biased estimate fails; and their state."""

import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import DTYPE, Fixed, flat, relative_error, seeded

import bilevel
from bilevel import ConfigurationError
from bilevel.estimators import (
    Adjoint,
    EvolutionStrategies,
    Implicit,
    PersistentEvolutionStrategies,
)

seeds = st.integers(0, 2**31)
SGD = bilevel.optim.sgd(0.1, momentum=0.5)


def solve(case, steps, estimator, truncation=None, seed=0, optimizer=SGD):
    hypergradient = bilevel.Hypergradient(
        case.problem, case.optimizer(lambda lr: optimizer, 0.1), steps, truncation, estimator
    )
    return hypergradient(case.outer, case.outer_batch, seeded(seed))


def deviation(samples, expected):
    """The z-score of the worst coordinate; the mean of many samples is close to normal.

    With three coordinates, |z| > 4 has a probability of 2e-4 if `expected` is the mean.
    """
    samples = torch.stack(samples)
    error = samples.std(0) / len(samples) ** 0.5
    return float(((samples.mean(0) - expected) / error).abs().max())


def gentle(seed=0):
    """A quadratic whose hypergradient is not small against what is left out by truncation."""
    case = problems.make("quadratic", seed)
    case.outer_batch, case.problem.penalty = case.outer_batch + 10, 0.01
    return case


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (1, 3)])
def test_evolution_strategies_are_unbiased(start, stop):
    """F is quadratic in φ, so smoothing leaves its gradient as it is."""
    case = gentle()
    exact = solve(case, 3, Adjoint(), Fixed(start, stop)).grads["phi"]
    short = solve(case, 3, Adjoint(), Fixed(stop - 1, stop)).grads["phi"]
    result = [
        solve(case, 3, EvolutionStrategies(0.3, pairs=8), Fixed(start, stop), seed).grads["phi"]
        for seed in range(60)
    ]
    assert deviation(result, exact) < 4
    # The same test sees a bias: the gradient through the last step alone, or one of 3/2 the size.
    assert deviation(result, short) > 6
    assert deviation(result, exact * 1.5) > 6


@pytest.mark.slow
def test_persistent_evolution_strategies_are_unbiased_and_truncated_ones_are_not():
    """Segments of one step; the third call is the gradient through all three."""
    case = gentle()
    exact = solve(case, 3, Adjoint()).grads["phi"]
    truncated = solve(case, 3, Adjoint(), Fixed(2, 3)).grads["phi"]
    samples = []
    for seed in range(40):
        estimator = PersistentEvolutionStrategies(0.3, run_length=3, pairs=12)
        for _ in range(3):
            result = solve(case, 1, estimator, seed=seed)
        samples.append(result.grads["phi"])
    assert result.window == bilevel.Window(2, 3)
    assert deviation(samples, exact) < 4
    assert deviation(samples, truncated) > 6


def test_the_first_segment_is_a_whole_gradient():
    case = gentle()
    exact = solve(case, 2, Adjoint()).grads["phi"]
    samples = [
        solve(case, 2, PersistentEvolutionStrategies(0.3, 8, pairs=16), seed=seed).grads["phi"]
        for seed in range(30)
    ]
    assert deviation(samples, exact) < 4
    assert deviation(samples, 2 * exact) > 6


@settings(max_examples=2)
@given(st.floats(1e-3, 10), seeds)
def test_the_variance_is_what_theory_says(sigma, seed):
    """For F linear in φ a pair gives εεᵀg: mean g, and variance ‖g‖²(m + 1) over all m entries."""
    case = problems.make("quadratic", seed % 1000)
    case.problem.outer_loss = lambda params, outer, batch: params["theta"] @ batch
    exact = solve(case, 2, Adjoint()).grads["phi"]
    result = solve(case, 2, EvolutionStrategies(sigma, pairs=200), seed=seed)
    expected = float(exact.norm()) * (4 / 200) ** 0.5
    assert 0.6 * expected < float(result.stats.standard_error) < 1.6 * expected
    assert float((result.grads["phi"] - exact).norm()) < 4 * expected


def test_one_pair_has_no_standard_error():
    for estimator in [EvolutionStrategies(0.1), PersistentEvolutionStrategies(0.1, 4)]:
        result = solve(gentle(), 2, estimator)
        assert result.stats.standard_error is None
        assert flat(result.grads).any()


@given(st.sampled_from(["data_cleaning", "learned_start", "learned_rate"]), seeds)
@settings(max_examples=6)
def test_pytrees_random_batches_and_hyperparameters(name, seed):
    """Along the direction drawn, a pair is the central difference of the loss of a real run."""
    case = problems.make(name, seed % 1000)
    optimizer = case.optimizer(bilevel.optim.sgd, 0.05)
    hypergradient = bilevel.Hypergradient(
        case.problem, optimizer, 3, None, EvolutionStrategies(1e-4)
    )
    result = hypergradient(case.outer, case.outer_batch, seeded(seed))
    exact = bilevel.Hypergradient(case.problem, optimizer, 3)(
        case.outer, case.outer_batch, seeded(seed)
    )
    assert torch.equal(result.loss, exact.loss)
    assert relative_error(result.params, exact.params) == 0
    # The estimate is ε(εᵀg), so it lies along ε, its slope there is positive, and what it is
    # longer by than the slope is ‖ε‖², of which all but 1e-6 of the draws are within these bounds.
    found = flat(result.grads)
    slope = found @ flat(exact.grads) / found.norm()
    assert 0.01 < float(found.norm() / slope) < 50


class Accuracy(problems.DataCleaning):
    """An outer loss without a derivative."""

    def outer_loss(self, params, outer, batch):
        inputs, labels = batch
        return ((inputs @ params["weight"]).argmax(1) != labels).double().mean()


def test_an_outer_loss_without_a_derivative():
    made = problems.make("data_cleaning", 0)
    problem = Accuracy(made.problem.inputs, made.problem.labels, 8)
    case = problems.Case(problem, made.outer, made.outer_batch)
    result = solve(case, 5, EvolutionStrategies(3.0, pairs=20))
    assert flat(result.grads).any()
    with pytest.raises(bilevel.ProblemError):
        solve(case, 5, Adjoint())


def test_micro_batches():
    case = gentle()
    halves = bilevel.MicroBatches([case.outer_batch, case.outer_batch + 1], [0.3, 0.7])
    whole = problems.Case(case.problem, case.outer, halves)
    parts = [
        problems.Case(case.problem, case.outer, batch)
        for batch in (case.outer_batch, case.outer_batch + 1)
    ]
    for make in [
        lambda: EvolutionStrategies(0.1, 3),
        lambda: PersistentEvolutionStrategies(0.1, 4, 3),
    ]:
        together, first, second = (solve(each, 2, make()) for each in (whole, *parts))
        expected = 0.3 * first.grads["phi"] + 0.7 * second.grads["phi"]
        assert relative_error(together.grads["phi"], expected) < 1e-9
        assert relative_error(together.loss, 0.3 * first.loss + 0.7 * second.loss) < 1e-12


# The run that persists.


def test_the_run_goes_on_from_call_to_call_and_starts_anew():
    """Its unperturbed particle is the run that `Hypergradient` would record in one go."""
    case, estimator = problems.make("data_cleaning", 0), PersistentEvolutionStrategies(0.1, 5)
    whole = solve(case, 5, Adjoint(), seed=7)
    results = [solve(case, 2, estimator, seed=7 + call) for call in range(4)]
    windows = [(result.window.start, result.window.stop) for result in results]
    assert windows == [(0, 2), (2, 4), (4, 5), (0, 2)]
    assert torch.equal(results[2].trace["inner_loss"], whole.trace["inner_loss"])
    assert relative_error(results[2].params, whole.params) == 0
    assert torch.equal(results[2].loss, whole.loss)
    assert torch.equal(results[2].metrics["accuracy"], whole.metrics["accuracy"])
    assert results[3].trace.horizon == 2
    assert not torch.equal(results[3].trace["inner_loss"], whole.trace["inner_loss"][:2])


@pytest.mark.parametrize("optimizer", [SGD, bilevel.optim.adam(0.1)], ids=["momentum", "adam"])
def test_a_saved_run_goes_on_to_the_same_bits(optimizer):
    case = problems.make("data_cleaning", 0)
    estimator = PersistentEvolutionStrategies(0.1, 9, pairs=2)
    assert estimator.state_dict() == {}
    solve(case, 2, estimator, optimizer=optimizer)
    state = estimator.state_dict()
    assert all(isinstance(value, (int, str, torch.Tensor)) for value in state.values())
    kept = {name: state[name].clone() for name in state if isinstance(state[name], torch.Tensor)}
    resumed = PersistentEvolutionStrategies(0.1, 9, pairs=2)
    resumed.load_state_dict(state)
    for call in range(2):
        one, other = (
            solve(case, 3, each, seed=call, optimizer=optimizer) for each in (estimator, resumed)
        )
        assert torch.equal(flat(one.grads), flat(other.grads))
        assert torch.equal(one.loss, other.loss)
        assert one.window == other.window
    assert all(torch.equal(value, kept[name]) for name, value in state.items() if name in kept)


def test_states_that_do_not_fit():
    case, estimator = gentle(), PersistentEvolutionStrategies(0.1, 9, pairs=2)
    solve(case, 2, estimator)
    state = estimator.state_dict()
    with pytest.raises(ConfigurationError, match=r"without \['device', 'losses'"):
        PersistentEvolutionStrategies(0.1, 9).load_state_dict({"step": 3})
    fewer = PersistentEvolutionStrategies(0.1, 9, pairs=1)
    fewer.load_state_dict(state)
    with pytest.raises(ConfigurationError, match="pairs=1 need"):
        solve(case, 2, fewer)
    with pytest.raises(ConfigurationError, match="the run under way"):
        solve(problems.make("data_cleaning", 0), 2, estimator)
    with pytest.raises(ConfigurationError, match="EvolutionStrategies has no state"):
        EvolutionStrategies(0.1).load_state_dict(state)


def test_a_run_that_diverged_is_given_up():
    case, estimator = gentle(), PersistentEvolutionStrategies(0.1, 9)
    with pytest.raises(bilevel.NonFiniteError):
        solve(case, 2, estimator, optimizer=bilevel.optim.sgd(1e200))
    assert estimator.state_dict() == {}
    assert solve(case, 2, estimator).window == bilevel.Window(0, 2)


@settings(max_examples=5)
@given(seeds)
def test_same_seed_same_bits(seed):
    case = problems.make("data_cleaning", 0)
    for make in [lambda: EvolutionStrategies(0.1), lambda: PersistentEvolutionStrategies(0.1, 4)]:
        before = torch.get_rng_state()
        one, other = (solve(case, 2, make(), seed=seed) for _ in range(2))
        assert torch.equal(flat(one.grads), flat(other.grads))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvolutionStrategies(0.0), "sigma=0.0: it must be a finite number above 0"),
        (lambda: EvolutionStrategies(0.1, 0), "pairs=0: it must be an integer of at least 1"),
        (lambda: PersistentEvolutionStrategies("a", 3), "sigma='a'"),
        (lambda: PersistentEvolutionStrategies(0.1, 0), "run_length=0"),
        (lambda: PersistentEvolutionStrategies(0.1, 3, True), "pairs=True"),
    ],
)
def test_arguments_outside_their_range(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_the_implicit_gradient_is_what_a_long_run_gives_them():
    """All families on one problem: the gradient at the optimum, within four standard errors."""
    case = gentle()
    steps = 60
    limit = solve(case, steps, Implicit(), optimizer=bilevel.optim.sgd(0.4)).grads["phi"]
    result = solve(
        case, steps, EvolutionStrategies(0.3, pairs=15), optimizer=bilevel.optim.sgd(0.4)
    )
    error = (result.grads["phi"] - limit).norm()
    assert float(error) < 4 * float(result.stats.standard_error)
    assert limit.dtype == DTYPE
