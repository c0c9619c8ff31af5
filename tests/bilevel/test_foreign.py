"""Transformations from elsewhere: which ones agree with brute force, and which are refused."""

import optree
import problems
import pytest
import torch
import torchopt
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import ONE_OF_EACH
from problems import brute_force, relative_error, seeded
from torchopt import transform
from torchopt.base import GradientTransformation
from torchopt.schedule import exponential_decay, linear_schedule, polynomial_schedule

import bilevel
from bilevel import optim
from bilevel.optim.foreign import check_differentiable
from bilevel.optim.side_by_side import check_side_by_side

LIKE = {"scale": torch.zeros(3), "shift": [torch.zeros(2, 2), torch.zeros(())]}


def everywhere(params):
    return optree.tree_map(lambda leaf: True, params)


def descend(transformation):
    """A step of 0.1 along what it makes of the gradient."""
    return torchopt.chain(transformation, transform.scale(-0.1))


#: Every public transformation of TorchOpt 0.7.3 that an inner run can be differentiated through.
RIGHT = {
    "sgd": torchopt.sgd(0.1),
    "sgd, momentum": torchopt.sgd(0.1, momentum=0.9),
    "sgd, Nesterov": torchopt.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "sgd, schedule": torchopt.sgd(linear_schedule(0.1, 0.01, 5, 0)),
    "adam": torchopt.adam(0.1, eps_root=1e-8),
    "adamw": torchopt.adamw(0.1, eps_root=1e-8),
    "adamax": torchopt.adamax(0.1),
    "adadelta": torchopt.adadelta(0.1),
    "adagrad": torchopt.adagrad(0.1),
    "radam": torchopt.radam(0.1),
    "rmsprop": torchopt.rmsprop(0.1),
    "rmsprop, centred": torchopt.rmsprop(0.1, centered=True),
    "nan_to_num": descend(torchopt.nan_to_num(0.0)),
    "chain": torchopt.chain(transform.trace(0.5), transform.trace(0.3), transform.scale(-0.1)),
    "chain_flat": torchopt.combine.chain_flat(transform.trace.flat(0.5), transform.scale.flat(-1)),
    "trace": descend(transform.trace(0.5)),
    "scale": transform.scale(-0.1),
    "scale_by_schedule": descend(transform.scale_by_schedule(exponential_decay(0.1, 0.9, 0))),
    "polynomial_schedule": torchopt.sgd(polynomial_schedule(0.1, 0.01, 2.0, 5, 0)),
    "add_decayed_weights": descend(transform.add_decayed_weights(0.1)),
    "masked": descend(transform.masked(transform.scale(2.0), everywhere)),
    "scale_by_adam": descend(transform.scale_by_adam(eps_root=1e-8)),
    "scale_by_adamax": descend(transform.scale_by_adamax()),
    "scale_by_adadelta": descend(transform.scale_by_adadelta()),
    "scale_by_radam": descend(transform.scale_by_radam()),
    "scale_by_rss": descend(transform.scale_by_rss(0.1)),
    "scale_by_rms": descend(transform.scale_by_rms()),
    "scale_by_stddev": descend(transform.scale_by_stddev()),
}  # fmt: skip

#: Those that are refused, with what the message says.
WRONG = {
    "clip_grad_norm": (torchopt.clip.clip_grad_norm(1.0), "clip_grad_norm is not that"),
    "a high bound": (torchopt.clip.clip_grad_norm(1e4), "clip_grad_norm is not that"),
    "in a chain": (
        torchopt.chain(torchopt.sgd(0.1), torchopt.clip.clip_grad_norm(1.0)),
        "of torchopt.clip.clip_grad_norm is not that",
    ),
    "in a chain of ours": (
        optim.chain(torchopt.clip.clip_grad_norm(1.0), optim.sgd(0.1)),
        "of torchopt.clip.clip_grad_norm is not that",
    ),
    "in a group": (
        optim.groups({"*": torchopt.clip.clip_grad_norm(1.0)}),
        r"Groups of \(torchopt.clip.clip_grad_norm\) is not that",
    ),
    "accelerated adam": (
        torchopt.adam(0.1, eps_root=1e-3, use_accelerated_op=True),
        "accelerated_adam.* is not that",
    ),
    "register_hook": (torchopt.register_hook(torchopt.hook.zero_nan_hook), "register_hook cannot"),
    "dampening": (torchopt.sgd(0.1, momentum=0.9, dampening=0.5), "dampening=0"),
}


def own(update, init=lambda params: ()):
    return GradientTransformation(
        init, lambda updates, state, *, params=None, inplace=False: update(updates, state, params)
    )


def each(formula):
    """A rule of one's own without a state, leaf by leaf."""
    return own(lambda updates, state, params: (optree.tree_map(formula, updates, params), state))


def momentum_sign(updates, state, params):
    """Lion."""
    directions = optree.tree_map(lambda m, g: -0.1 * torch.sign(0.9 * m + 0.1 * g), state, updates)
    return directions, optree.tree_map(lambda m, g: 0.99 * m + 0.01 * g, state, updates)


def rprop(updates, state, params):
    """Step sizes that grow and shrink with the signs of successive gradients."""
    before, sizes = state
    sizes = optree.tree_map(
        lambda s, g, b: s * torch.where(g * b > 0, 1.2, torch.where(g * b < 0, 0.5, 1.0)),
        sizes, updates, before,
    )  # fmt: skip
    return optree.tree_map(lambda s, g: -s * g.sign(), sizes, updates), (updates, sizes)


def lars(g, p):
    return -0.1 * g * torch.linalg.vector_norm(p) / (torch.linalg.vector_norm(g) + 1e-9)


zeros = lambda params: optree.tree_map(torch.zeros_like, params)  # noqa: E731
ones = lambda params: optree.tree_map(torch.ones_like, params)  # noqa: E731

#: Kinks, jumps and dependence on the leaf, none of which is a fault.
HONEST = {
    "lion": own(momentum_sign, zeros),
    "rprop": own(rprop, lambda params: (zeros(params), ones(params))),
    "lars": each(lars),
    "clamp": each(lambda g, p: -0.1 * g.clamp(-1, 1)),
    "soft threshold": each(lambda g, p: -torch.nn.functional.softshrink(g, 0.5)),
    "sign": each(lambda g, p: -0.1 * g.sign()),
    "decay of matrices": each(lambda g, p: -0.1 * (g + p if p.dim() > 1 else g)),
    "top entries": each(lambda g, p: -0.1 * torch.where(g.abs() >= g.abs().max(), g, 0)),
    "clipped norm": each(lambda g, p: -g / torch.linalg.vector_norm(g).clamp_min(1.0)),
    "constant": each(lambda g, p: torch.ones_like(g)),
    "projection": each(lambda g, p: (p - 0.1 * g).clamp(-1, 1) - p),
    "rounded": each(lambda g, p: -0.1 * (g * 4).round() / 4),
}

#: Rules of one's own with a wrong derivative.
DETACHED = {
    "norm": each(lambda g, p: -g / torch.linalg.vector_norm(g.detach())),
    "float": each(lambda g, p: -g / float(g.detach().abs().max())),
    "gradient": each(lambda g, p: -0.1 * g.detach()),
    "parameters": each(lambda g, p: -0.1 * (g + 0.01 * p.detach())),
    "trust ratio": each(lambda g, p: -g * torch.linalg.vector_norm(p.detach())),
    "state": own(
        lambda u, s, p: (
            optree.tree_map(lambda g, m: -0.1 * (g + 0.9 * m), u, s),
            optree.tree_map(torch.detach, u),
        ),
        zeros,
    ),
    "beyond a bound": each(
        lambda g, p: -g * (100 / torch.linalg.vector_norm(g).detach()).clamp_max(1)
    ),
    "one leaf": own(
        lambda u, s, p: ({**u, "scale": u["scale"].detach()} if isinstance(u, dict) else u, s)
    ),
}


@pytest.mark.parametrize("name", RIGHT)
@given(st.integers(0, 2**31))
@settings(max_examples=3)
def test_torchopt_agrees_with_brute_force(name, seed):
    case = problems.make("learned_start", seed)
    check_differentiable(RIGHT[name], case.outer)
    window = bilevel.Window(0, 4)
    loss, grads = brute_force(case, RIGHT[name], bilevel.Key.draw(seeded(seed)), window)
    found = bilevel.Hypergradient(case.problem, RIGHT[name], 4)(
        case.outer, case.outer_batch, seeded(seed)
    )
    assert relative_error(found.loss, loss) < 1e-10
    assert relative_error(found.grads, grads) < 1e-8


@pytest.mark.parametrize("name", RIGHT)
def test_it_is_not_refused_on_a_tree(name):
    check_differentiable(RIGHT[name], LIKE)


@pytest.mark.parametrize("name", WRONG)
def test_it_is_refused_by_name(name):
    transformation, message = WRONG[name]
    with pytest.raises(bilevel.ConfigurationError, match=message):
        check_differentiable(transformation, LIKE)


def test_nothing_public_in_torchopt_is_left_out():
    public = {
        *torchopt.alias.__all__,
        *torchopt.transform.__all__,
        *torchopt.clip.__all__,
        *torchopt.combine.__all__,
        *torchopt.schedule.__all__,
        "register_hook",
    }
    tried = {name.split(",")[0] for name in [*RIGHT, *WRONG]}
    here = {"linear_schedule": "sgd", "exponential_decay": "scale_by_schedule"}
    here["scale_by_accelerated_adam"] = "accelerated adam"
    assert {here.get(name, name) for name in public} <= tried


@pytest.mark.parametrize("like", [LIKE, torch.zeros(50), torch.zeros(1), {"a": torch.zeros(20000)}])
@pytest.mark.parametrize("name", HONEST)
def test_kinks_and_jumps_are_no_fault(name, like):
    check_differentiable(HONEST[name], like)


@pytest.mark.parametrize("name", DETACHED)
def test_what_detaches_is_refused(name):
    with pytest.raises(bilevel.ConfigurationError, match="test_foreign"):
        check_differentiable(DETACHED[name], LIKE)
    if name != "one leaf":
        with pytest.raises(bilevel.ConfigurationError, match="is not that of what it computes"):
            check_differentiable(DETACHED[name], {"a": torch.zeros(2000, dtype=torch.float32)})


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_ours_pass(name):
    check_differentiable(ONE_OF_EACH[name], LIKE)


def test_what_is_not_pure_is_refused():
    calls = []

    def counting(updates, state, params):
        calls.append(1)
        return optree.tree_map(lambda g: g / len(calls), updates), state

    def drawing(updates, state, params):
        return optree.tree_map(lambda g: g + torch.randn(g.shape), updates), state

    def in_place(updates, state, params):
        return optree.tree_map(lambda g: g.mul_(0.1), updates), state

    def in_place_state(updates, state, params):
        return updates, optree.tree_map(lambda m, g: m.add_(g), state, updates)

    def other_structure(updates, state, params):
        return optree.tree_leaves(updates), state

    for update, message in (
        (counting, "another step when it is run again"),
        (drawing, "another step when it is run again"),
        (in_place, "writes in place"),
        (in_place_state, "writes in place"),
        (other_structure, "another structure|of the structure"),
    ):
        with pytest.raises(bilevel.ConfigurationError, match=message):
            check_differentiable(own(update, zeros), LIKE)


def test_hyperparameters_are_tried_as_well():
    learned = {
        "lr": torch.tensor(0.1, requires_grad=True),
        "decay": torch.tensor(0.01, requires_grad=True),
    }

    def good(lr, decay):
        return each(lambda g, p: -lr * (g + decay * p))

    def bad(lr, decay):
        rate = float(lr.detach())
        return each(lambda g, p: -rate * (g + decay * p))

    check_differentiable(good, LIKE, hyperparameters=learned)
    check_differentiable(optim.sgd, LIKE, hyperparameters={"lr": learned["lr"]})
    check_differentiable(torchopt.sgd, LIKE, hyperparameters={"lr": learned["lr"]})
    with pytest.raises(bilevel.ConfigurationError, match=r"hyperparameters \['decay', 'lr'\]"):
        check_differentiable(bad, LIKE, hyperparameters=learned)
    # A constant may be used as a number.
    constant = {"lr": torch.tensor(0.1), "decay": learned["decay"]}
    check_differentiable(bad, LIKE, hyperparameters=constant)


def test_the_check_draws_from_no_global_generator():
    before = torch.get_rng_state()
    check_differentiable(RIGHT["adam"], LIKE)
    assert torch.equal(before, torch.get_rng_state())


STACKED = {"scale": torch.zeros(3, 4), "shift": [torch.zeros(3, 2, 2), torch.zeros(3)]}
NORMS = {
    "ours": optim.chain(optim.clip_by_norm(10.0), optim.adam(0.1)),
    "torchopt": torchopt.clip.clip_grad_norm(1.0),
    "lars": each(lars),
    "by dimension": optim.groups({lambda name, leaf: leaf.dim() > 1: optim.adamw(0.1), "*": None}),
}


@pytest.mark.parametrize("name", NORMS)
def test_norms_over_replicas_and_choices_by_dimension_are_refused(name):
    with pytest.raises(bilevel.ConfigurationError, match="Replicas, which are stacked"):
        check_side_by_side(NORMS[name], STACKED)


@pytest.mark.parametrize(
    "name", [*RIGHT, *sorted(set(ONE_OF_EACH) - {"clip_by_norm", "chain", *RIGHT})]
)
def test_elementwise_rules_go_side_by_side(name):
    check_side_by_side(RIGHT.get(name, ONE_OF_EACH.get(name)), STACKED)


def test_rates_for_replicas():
    """One for all, of a leaf, and one for each replica."""
    for rates in (0.1, {"scale": torch.ones(4), "shift": 0.1}, torch.rand(3, 1, 1)):
        like = {"a": torch.zeros(3, 2, 2)} if isinstance(rates, torch.Tensor) else STACKED
        check_side_by_side(optim.sgd, like, hyperparameters={"lr": rates})


@pytest.mark.parametrize("estimator", [None, bilevel.estimators.EvolutionStrategies(0.1)])
def test_clipping_by_the_norm_in_replicas_is_refused_at_the_first_call(estimator):
    case = problems.make("learned_start", 0)
    problem = bilevel.Replicas(case.problem, 2)
    optimizer = optim.chain(optim.clip_by_norm(1.0), optim.sgd(0.1))
    with pytest.raises(bilevel.ConfigurationError, match="inner_replicas"):
        bilevel.Hypergradient(problem, optimizer, 3, None, estimator)(
            case.outer, case.outer_batch, seeded(0)
        )


@pytest.mark.parametrize("bound", [0.05, 1e4])
@pytest.mark.parametrize("make", [torchopt.chain, optim.chain])
def test_a_clip_of_torchopt_gets_its_derivative_back(make, bound):
    case = problems.make("data_cleaning", 0)
    clipped = make(torchopt.clip.clip_grad_norm(bound), optim.sgd(0.1))
    result = bilevel.Hypergradient(case.problem, clipped, 4)(
        case.outer, case.outer_batch, seeded(0)
    )

    def descend_clipped(grads, state, params):
        norm = torch.cat([leaf.ravel() for leaf in optree.tree_leaves(grads)]).norm()
        scale = (bound / (norm + 1e-6)).clamp(max=1.0)
        return optree.tree_map(lambda leaf: -0.1 * scale * leaf, grads), state

    key = bilevel.Key.draw(seeded(0))
    _, expected = brute_force(case, own(descend_clipped), key, bilevel.Window(0, 4))
    assert relative_error(result.grads, expected) < 1e-8


def test_a_clip_by_another_norm_is_refused():
    case = problems.make("ridge", 0)
    clipped = torchopt.chain(torchopt.clip.clip_grad_norm(1.0, norm_type=1), optim.sgd(0.1))
    with pytest.raises(bilevel.ConfigurationError, match="clip_grad_norm is not that"):
        bilevel.Hypergradient(case.problem, clipped, 4)(case.outer, case.outer_batch, seeded(0))
