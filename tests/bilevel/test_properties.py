"""What holds for every hypergradient: algebra, limits, determinism; and what a result means."""

from collections.abc import Mapping

import optree
import problems
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import Fixed, flat, randn, relative_error, seeded
from torch.func import functional_call
from torch.nn import functional as F

import bilevel
from bilevel.estimators import Adjoint, Forward, Reverse

ESTIMATORS = [Reverse(), Adjoint(), Adjoint("forward"), Forward()]
SGD = bilevel.optim.sgd(0.05, momentum=0.5)
small_problems = st.sampled_from(["quadratic", "ridge", "data_cleaning", "learned_start"])
seeds = st.integers(0, 2**31)


class Wrapped(bilevel.Problem):
    """A problem whose outer variables are a function of others, and with any outer loss."""

    def __init__(self, problem, variables=lambda outer: outer, outer_loss=None):
        self.problem, self.variables = problem, variables
        self.judge = outer_loss or problem.outer_loss

    def init(self, outer, *, generator):
        return self.problem.init(self.variables(outer), generator=generator)

    def inner_batch(self, outer, step, *, generator):
        return self.problem.inner_batch(self.variables(outer), step, generator=generator)

    def inner_loss(self, params, batch):
        return self.problem.inner_loss(params, batch)

    def outer_loss(self, params, outer, batch):
        return self.judge(params, self.variables(outer), batch)


def grads(problem, case, estimator, seed, outer=None, start=0, stop=4):
    """The hypergradient over [start, stop) of 5 steps, as one vector."""
    hypergradient = bilevel.Hypergradient(problem, SGD, 5, Fixed(start, stop), estimator)
    outer = case.outer if outer is None else outer
    return flat(hypergradient(outer, case.outer_batch, seeded(seed)).grads)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=8)
@given(small_problems, st.floats(-3, 3), st.integers(0, 3), seeds)
def test_it_is_linear_in_the_outer_loss(estimator, name, factor, start, seed):
    case = problems.make(name, seed % 1000)

    def first(params, outer, batch):
        return problems.outer_value(case, params, outer)

    def second(params, outer, batch):
        return flat(params).sin().sum() + flat(outer).pow(2).sum()

    def both(params, outer, batch):
        return first(params, outer, batch) + factor * second(params, outer, batch)

    one, two, sum_ = (
        grads(Wrapped(case.problem, outer_loss=loss), case, estimator, seed, start=start)
        for loss in (first, second, both)
    )
    assert relative_error(sum_, one + factor * two) < 1e-10


@pytest.mark.parametrize("estimator", ESTIMATORS)
@settings(max_examples=8)
@given(small_problems, st.integers(1, 4), st.integers(0, 3), seeds)
def test_chain_rule(estimator, name, size, start, seed):
    """With φ = Aψ, dF/dψ = Aᵀ dF/dφ."""
    case = problems.make(name, seed % 1000)
    leaves, spec = optree.tree_flatten(case.outer)
    A = randn(flat(case.outer).numel(), size, generator=seeded(seed))
    psi = randn(size, generator=seeded(seed + 1))

    def phi(psi):
        pieces = (A @ psi).split([leaf.numel() for leaf in leaves])
        shaped = [piece.reshape(leaf.shape) for piece, leaf in zip(pieces, leaves, strict=True)]
        return optree.tree_unflatten(spec, shaped)

    through = grads(Wrapped(case.problem, phi), case, estimator, seed, psi, start=start)
    direct = grads(case.problem, case, estimator, seed, phi(psi), start=start)
    assert relative_error(through, A.T @ direct) < 1e-9


class Noiseless(problems.Distillation):
    def inner_batch(self, outer, step, *, generator):
        return outer["images"], outer["labels"]


@given(st.permutations(range(3)), st.integers(0, 3), seeds)
def test_permuting_the_synthetic_examples_permutes_the_gradient(order, start, seed):
    case = problems.make("mlp_distillation", seed % 1000)
    permuted = optree.tree_map(lambda leaf: leaf[list(order)], case.outer)
    hypergradient = bilevel.Hypergradient(Noiseless(case.problem.network), SGD, 5, Fixed(start, 5))
    one = hypergradient(case.outer, case.outer_batch, seeded(seed)).grads
    other = hypergradient(permuted, case.outer_batch, seeded(seed)).grads
    for name in case.outer:
        assert relative_error(other[name], one[name][list(order)]) < 1e-10


@pytest.mark.parametrize(("name", "implicit"), problems.CLOSED_FORMS.items())
@settings(max_examples=5)
@given(seed=st.integers(0, 100))
def test_the_unrolled_gradient_tends_to_the_implicit_one(name, implicit, seed):
    case = problems.make(name, seed, size=3)
    expected, hessian = implicit(case)
    smallest, largest = torch.linalg.eigvalsh(hessian)[[0, -1]].tolist()
    steps = int(12 * largest / smallest) + 1  # contraction by (1 − smallest/largest) a step

    def error(steps):
        optimizer = bilevel.optim.sgd(1 / largest)
        result = bilevel.Hypergradient(case.problem, optimizer, steps)(case.outer, case.outer_batch)
        return float((flat(result.grads) - expected).norm())

    early, middle, late = error(1), error(steps), error(3 * steps)
    assert middle < 1e-2 * max(early, 1e-3)
    assert late < 1e-3 * middle + 1e-10


@given(st.sampled_from(list(problems.PROBLEMS)), seeds)
def test_same_seed_same_bits_and_the_global_generator_is_left_alone(name, seed):
    case = problems.make(name, seed % 1000)
    optimizer = case.optimizer(bilevel.optim.sgd, 0.05)
    hypergradient = bilevel.Hypergradient(case.problem, optimizer, 4, Fixed(1, 3))
    before = torch.get_rng_state()
    results = [hypergradient(case.outer, case.outer_batch, seeded(seed)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(flat(results[0].grads), flat(results[1].grads))


@given(seeds)
def test_different_draws_differ_and_the_default_generator_is_the_global_one(seed):
    case = problems.make("data_cleaning", 0)
    hypergradient = bilevel.Hypergradient(case.problem, SGD, 4)
    generator = seeded(seed)
    losses = [hypergradient(case.outer, case.outer_batch, generator).loss for _ in range(2)]
    assert losses[0] != losses[1]
    torch.manual_seed(seed)
    assert [hypergradient(case.outer, case.outer_batch).loss for _ in range(2)] == losses


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_backward_accumulates_as_autograd_does(estimator):
    case = problems.make("learned_start", 1)
    outer = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), case.outer)
    hypergradient = bilevel.Hypergradient(case.problem, SGD, 4, None, estimator)
    result = hypergradient.backward(outer, case.outer_batch, seeded(0))
    once = {name: leaf.grad.clone() for name, leaf in outer.items()}
    assert all(torch.equal(once[name], result.grads[name]) for name in outer)
    for leaf in outer.values():
        leaf.grad.mul_(3)
        assert not leaf.grad.requires_grad
    # What is in .grad belongs to the caller: writing to it leaves the result as it was.
    assert all(torch.equal(once[name], result.grads[name]) for name in outer)
    hypergradient.backward(outer, case.outer_batch, seeded(0))
    for name, leaf in outer.items():
        assert torch.equal(leaf.grad, 3 * once[name] + once[name])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_outer_tensors_are_not_touched(estimator):
    case = problems.make("learned_start", 1)
    outer = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), case.outer)
    bilevel.Hypergradient(case.problem, SGD, 4, None, estimator)(outer, case.outer_batch)
    for name, leaf in outer.items():
        assert torch.equal(leaf, case.outer[name])
        assert leaf.grad is None
        assert leaf.is_leaf


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_grad_mode_around_the_call_does_not_matter(estimator):
    case = problems.make("quadratic", 1)
    expected = grads(case.problem, case, estimator, 0)
    with torch.no_grad():
        assert torch.equal(grads(case.problem, case, estimator, 0), expected)


@given(st.integers(1, 6), st.data(), seeds)
def test_cotangents_are_the_derivatives_at_every_iterate(steps, data, seed):
    """Against autograd on an unroll written out here, from a constant θ_start and momentum."""
    start = data.draw(st.integers(0, steps - 1))
    case = problems.make("mlp_distillation", seed % 1000)
    problem, network = Noiseless(case.problem.network), case.problem.network
    result = bilevel.Hypergradient(problem, SGD, steps, Fixed(start, steps), graph_budget=0)(
        case.outer, case.outer_batch, seeded(seed)
    )
    key = bilevel.Key.draw(seeded(seed))
    params = problem.init(case.outer, generator=key.generator("init"))
    names = list(params)
    theta = {name: value.requires_grad_() for name, value in params.items()}
    velocity = dict.fromkeys(names, 0.0)
    iterates, losses = [theta], []
    for _ in range(steps):
        output = functional_call(network, theta, (case.outer["images"],))
        losses.append(F.cross_entropy(output, case.outer["labels"]))
        slopes = torch.autograd.grad(losses[-1], list(theta.values()), create_graph=True)
        velocity = {n: 0.5 * velocity[n] + g for n, g in zip(names, slopes, strict=True)}
        theta = {name: theta[name] - 0.05 * velocity[name] for name in names}
        iterates.append(theta)
    images, labels = case.outer_batch
    loss = F.cross_entropy(functional_call(network, theta, (images,)), labels)
    norms = [
        flat(torch.autograd.grad(loss, list(iterate.values()), retain_graph=True)).norm()
        for iterate in iterates[start:]
    ]
    assert relative_error(result.loss, loss.detach()) < 1e-12
    assert relative_error(result.params, optree.tree_map(torch.Tensor.detach, theta)) < 1e-12
    assert relative_error(result.trace["inner_loss"], torch.stack(losses).detach()) < 1e-12
    assert result.stats.cotangent_norms.shape == (result.window.width + 1,)
    assert relative_error(result.stats.cotangent_norms, torch.stack(norms)) < 1e-10


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_what_a_result_carries(estimator):
    case = problems.make("data_cleaning", 0)
    result = bilevel.Hypergradient(case.problem, SGD, 6, Fixed(2, 5), estimator)(
        case.outer, case.outer_batch
    )
    assert result.window == bilevel.Window(2, 5)
    assert isinstance(result.trace, Mapping)
    assert list(result.trace) == ["inner_loss"]
    assert result.trace.horizon == 6
    assert result.trace["inner_loss"].shape == (6,)
    assert result.params.keys() == {"weight"}
    assert result.params["weight"].shape == (4, 3)
    assert isinstance(result.grads, tuple)
    assert result.grads[0].shape == case.outer[0].shape
    assert result.stats.status == "ok"
    assert relative_error(result.stats.hypergradient_norm, flat(result.grads).norm()) < 1e-12
    columns = flat(case.outer).numel() if isinstance(estimator, Forward) else 1
    assert result.stats.hessian_vector_products == 3 * columns
    logits = case.outer_batch[0] @ result.params["weight"]
    accuracy = (logits.argmax(1) == case.outer_batch[1]).double().mean()
    assert float(result.metrics["accuracy"]) == float(accuracy)
    with pytest.raises(KeyError, match=r"gradient_norm.*inner_loss"):
        result.trace["gradient_norm"]
