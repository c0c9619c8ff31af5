"""Every mistake that can be found is found early, and its message names the thing."""

import optree
import problems
import pytest
import torch
import torchopt
from problems import Fixed, randn, seeded
from torch import nn

import bilevel
from bilevel import ConfigurationError, NonFiniteError, ProblemError, UnusedOuterVariableError
from bilevel.estimators import Adjoint, Forward, Reverse

ESTIMATORS = [Reverse(), Adjoint(), Adjoint("forward"), Forward()]
every_estimator = pytest.mark.parametrize(
    "estimator", ESTIMATORS, ids=["reverse", "adjoint", "adjoint-forward", "forward"]
)
SGD = bilevel.optim.sgd(0.1)
CASE = problems.make("quadratic", 0)


def problem(base=problems.Quadratic, **methods):
    """The quadratic problem with some of its methods replaced."""
    original = CASE.problem
    made = type("Changed", (base,), methods)(original.A, original.B, original.start)
    return made


def run(problem, optimizer=SGD, outer=None, truncation=None, estimator=None, steps=4, **options):
    hypergradient = bilevel.Hypergradient(
        problem, optimizer, steps, truncation, estimator, **options
    )
    return hypergradient(CASE.outer if outer is None else outer, CASE.outer_batch, seeded(0))


# Construction.


@pytest.mark.parametrize("steps", [0, -1, True, 2.5, "3", None])
def test_bad_steps(steps):
    with pytest.raises(ConfigurationError, match=f"steps={steps!r}: .* at least 1"):
        bilevel.Hypergradient(CASE.problem, SGD, steps)


@pytest.mark.parametrize("every", [0, -1, True, 1.5])
def test_bad_keep_every(every):
    with pytest.raises(ConfigurationError, match=f"keep_every={every!r}: .* at least 1"):
        bilevel.Hypergradient(CASE.problem, SGD, 3, keep_every=every)


@pytest.mark.parametrize("make", [bilevel.truncation.Last, bilevel.truncation.RandomWindow])
def test_a_window_longer_than_the_run(make):
    bilevel.Hypergradient(CASE.problem, SGD, 5, make(5))
    with pytest.raises(ConfigurationError, match=r"steps=4: .* at least 5"):
        bilevel.Hypergradient(CASE.problem, SGD, 4, make(5))


WEIGHT = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.SGD([WEIGHT], lr=0.1),
        torch.optim.Adam([WEIGHT]),
        torchopt.Adam([WEIGHT], lr=0.1),
        torchopt.MetaSGD(nn.Linear(1, 1), lr=0.1),
        "adam",
        0.1,
        None,
    ],
    ids=lambda optimizer: type(optimizer).__name__,
)
def test_what_is_no_gradient_transformation(optimizer):
    with pytest.raises(ConfigurationError, match=f"a {type(optimizer).__name__}; it must be"):
        bilevel.Hypergradient(CASE.problem, optimizer, 3)


def test_swapped_or_missing_parts():
    with pytest.raises(ConfigurationError, match="problem is a dict, not a Problem: write"):
        bilevel.Hypergradient({}, SGD, 3)
    with pytest.raises(ConfigurationError, match="truncation is an Adjoint, not a Truncation"):
        bilevel.Hypergradient(CASE.problem, SGD, 3, Adjoint())
    with pytest.raises(ConfigurationError, match="estimator is a Full, not an Estimator"):
        bilevel.Hypergradient(CASE.problem, SGD, 3, None, bilevel.truncation.Full())
    with pytest.raises(ConfigurationError, match="hvp='sideways'"):
        Adjoint("sideways")
    inner = bilevel.InnerLoop(CASE.problem, SGD)
    with pytest.raises(ConfigurationError, match=r"unknown signals.*'temperature'.*gradient_norm"):
        bilevel.record(inner, CASE.outer, bilevel.Key(0), steps=1, signals=["temperature"])


# Modules.


@pytest.mark.parametrize(
    ("held", "where"),
    [
        (nn.BatchNorm1d(3), "network"),
        (nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3))), r"network\.1\.0"),
        ([nn.Linear(2, 3), nn.BatchNorm2d(3)], r"network\[1\]"),
        ({"deep": (nn.SyncBatchNorm(3),)}, r"network\['deep'\]\[0\]"),
        (nn.InstanceNorm1d(3, track_running_stats=True), "network"),
    ],
)
def test_running_statistics_are_refused(held, where):
    made = problem()
    made.network = held
    with pytest.raises(ProblemError, match=rf"Changed\.{where} \(\w+\) keeps running statistics"):
        bilevel.Hypergradient(made, SGD, 3)


@pytest.mark.parametrize(
    "layer",
    [nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.BatchNorm1d(3, track_running_stats=False)],
)
def test_normalisation_without_running_statistics_is_fine(layer):
    network = nn.Sequential(nn.Linear(2, 3), layer, nn.Linear(3, 3))
    outer = {"images": randn(4, 2, generator=seeded(0)), "labels": torch.full((4, 3), 1 / 3.0)}
    outer["labels"] = outer["labels"].double()
    batch = randn(5, 2, generator=seeded(1)), torch.tensor([0, 1, 2, 0, 1])
    hypergradient = bilevel.Hypergradient(problems.Distillation(network), SGD, 3)
    assert hypergradient(outer, batch).stats.status == "ok"


# The methods of the problem.


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"theta": [1.0, 2.0]}, "a float at 'theta/0'"),
        ({"theta": torch.arange(4)}, r"a torch.int64 tensor of shape \(4,\) at 'theta'"),
        ({"a": torch.ones(2), "b": torch.ones(2).double()}, r"float32.*float64.*one dtype"),
        ({}, "at least one parameter"),
    ],
)
def test_bad_parameters(start, message):
    with pytest.raises(ProblemError, match=message):
        run(problem(init=lambda self, outer, *, generator: start))


def test_parameters_that_change_their_structure():
    sizes = iter([4, 3])
    made = problem(
        init=lambda self, outer, *, generator: {"theta": torch.zeros(next(sizes)).double()},
        inner_loss=lambda self, params, batch: (params["theta"] ** 2).sum(),
    )
    inner = bilevel.InnerLoop(made, SGD)
    bilevel.record(inner, CASE.outer, bilevel.Key(0), steps=1)
    with pytest.raises(ProblemError, match="another structure"):
        bilevel.record(inner, CASE.outer, bilevel.Key(0), steps=1)


@pytest.mark.parametrize("method", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda theta: theta**2, r"float64 tensor of shape \(4,\)"),
        (lambda theta: theta.sum().reshape(1), r"float64 tensor of shape \(1,\)"),
        (lambda theta: theta.argmax(), "int64 tensor"),
        (lambda theta: 1.0, "a float"),
        (lambda theta: None, "a NoneType"),
    ],
)
@every_estimator
def test_a_loss_that_is_no_scalar(estimator, method, value, message):
    made = problem(**{method: lambda self, params, *_: value(params["theta"])})
    with pytest.raises(ProblemError, match=f"{method} returned .*{message}.* scalar tensor"):
        run(made, estimator=estimator)


def test_an_inner_loss_that_ignores_its_params():
    """The classic: calling the module itself, with the parameters it holds."""
    network = nn.Linear(2, 3)

    class Forgot(problems.Distillation):
        def inner_loss(self, params, batch):
            return (self.network(batch[0].float()) ** 2).sum()

    outer = {"images": torch.ones(4, 2).double(), "labels": torch.ones(4, 3).double()}
    hypergradient = bilevel.Hypergradient(Forgot(network), SGD, 3)
    with pytest.raises(ProblemError, match=r"inner_loss does not depend.*functional_call"):
        hypergradient(outer, None)


@every_estimator
@pytest.mark.parametrize("what", ["params", "batch"])
def test_an_inner_loss_that_writes_in_place(estimator, what):
    def inner_loss(self, params, batch):
        (params["theta"] if what == "params" else batch).mul_(0.5)
        return problems.Quadratic.inner_loss(self, params, batch)

    with pytest.raises(ProblemError, match="in place"):
        run(problem(inner_loss=inner_loss), estimator=estimator)


class Box:
    """No pytree: what it holds cannot be seen."""

    def __init__(self, drive):
        self.drive = drive


@every_estimator
@pytest.mark.parametrize("way", ["batch", "closure"])
def test_outer_variables_that_bypass_the_batch_are_refused_or_seen(estimator, way):
    """Never a hypergradient that is silently wrong."""
    seen = {}

    def inner_batch(self, outer, step, *, generator):
        seen["drive"] = self.B @ outer["phi"]
        return Box(seen["drive"]) if way == "batch" else None

    def inner_loss(self, params, batch):
        drive = batch.drive if way == "batch" else seen["drive"]
        return problems.Quadratic.inner_loss(self, params, drive)

    expected = run(CASE.problem).grads
    try:
        result = run(problem(inner_batch=inner_batch, inner_loss=inner_loss), estimator=estimator)
    except ProblemError:
        return
    assert problems.relative_error(result.grads, expected) < 1e-12


@every_estimator
def test_an_outer_loss_that_ignores_its_params(estimator):
    made = problem(outer_loss=lambda self, params, outer, batch: outer["phi"].sum())
    with pytest.raises(ProblemError, match="outer_loss does not depend on the params"):
        run(made, estimator=estimator)


# Outer variables.


@pytest.mark.parametrize(
    ("outer", "message"),
    [
        ({"phi": torch.arange(3)}, "outer variable 'phi' is a torch.int64 tensor"),
        ({"phi": 1.5}, "outer variable 'phi' is a float"),
        ({"phi": randn(3, generator=seeded(0)), "n": 3}, "outer variable 'n' is a int"),
        ({}, "no outer variables"),
    ],
)
@every_estimator
def test_outer_variables_that_are_no_floating_point_tensors(estimator, outer, message):
    made = problem(
        inner_batch=lambda self, outer, step, *, generator: torch.ones(4).double(),
        outer_loss=lambda self, params, outer, batch: params["theta"].sum(),
    )
    with pytest.raises(ProblemError, match=message):
        run(made, outer=outer, estimator=estimator)


@every_estimator
def test_an_outer_tensor_that_nothing_uses_is_named(estimator):
    outer = CASE.outer | {"forgotten": randn(2, generator=seeded(0))}
    for truncation in (None, Fixed(2, 4)):
        with pytest.raises(UnusedOuterVariableError, match=r"outer variables \['forgotten'\]"):
            run(CASE.problem, outer=outer, estimator=estimator, truncation=truncation)


@every_estimator
def test_a_variable_of_the_start_gets_zero_from_a_later_window_and_the_status_says_so(estimator):
    case = problems.make("learned_start", 0)
    hypergradient = bilevel.Hypergradient(case.problem, SGD, 4, Fixed(1, 4), estimator)
    result = hypergradient(case.outer, case.outer_batch)
    assert not any(leaf.any() for leaf in optree.tree_leaves(result.grads))
    assert "'scale', 'shift'" in result.stats.status
    assert "[1, 4)" in result.stats.status
    whole = bilevel.Hypergradient(case.problem, SGD, 4, Fixed(0, 4), estimator)
    assert whole(case.outer, case.outer_batch).stats.status == "ok"


@every_estimator
def test_a_variable_of_steps_outside_the_window_gets_zero(estimator):
    """Each step has its own variable, of which the window [1, 3) sees two."""
    made = problem(inner_batch=lambda self, outer, step, *, generator: outer["targets"][step])
    made.penalty = 0.0
    targets = list(randn(4, 4, generator=seeded(0)))
    made.outer_loss = lambda params, outer, batch: (params["theta"] ** 2).sum()
    result = run(made, outer={"targets": targets}, truncation=Fixed(1, 3), estimator=estimator)
    assert [bool(grad.any()) for grad in result.grads["targets"]] == [False, True, True, False]
    assert "'targets/0', 'targets/3'" in result.stats.status


class Resting(bilevel.Problem):
    """The inner gradient is zero all along, so a learned rate changes nothing."""

    def init(self, outer, *, generator):
        return torch.zeros(2, dtype=torch.float64)

    def inner_batch(self, outer, step, *, generator):
        return None

    def inner_loss(self, params, batch):
        return (params**2).sum()

    def outer_loss(self, params, outer, batch):
        return ((params - 1) ** 2).sum()

    def hyperparameters(self, outer, step):
        return {"lr": outer["lr"]}


@every_estimator
@pytest.mark.parametrize("start", [0, 1])
def test_a_used_variable_whose_derivative_is_zero_is_not_called_unused(estimator, start):
    outer = {"lr": torch.tensor(0.1, dtype=torch.float64)}
    result = run(Resting(), bilevel.optim.sgd, outer, Fixed(start, 3), estimator, steps=3)
    assert float(result.grads["lr"]) == 0


# `backward`.


def test_backward_needs_leaves_that_require_gradients():
    hypergradient = bilevel.Hypergradient(CASE.problem, SGD, 3)
    plain, leaf = CASE.outer["phi"], CASE.outer["phi"].clone().requires_grad_()
    for phi in (plain, leaf * 2):
        with pytest.raises(ProblemError, match=r"outer variable 'phi' .*requires_grad=True"):
            hypergradient.backward({"phi": phi}, CASE.outer_batch)
    with pytest.raises(ProblemError, match="outer variable 'phi'"):
        hypergradient.backward({"phi": 3.0}, CASE.outer_batch)
    assert leaf.grad is None


def test_nothing_is_added_to_grad_when_the_call_fails():
    leaf = CASE.outer["phi"].clone().requires_grad_()
    hypergradient = bilevel.Hypergradient(CASE.problem, bilevel.optim.sgd(1e200), 4)
    with pytest.raises(NonFiniteError):
        hypergradient.backward({"phi": leaf}, CASE.outer_batch)
    assert leaf.grad is None


# Hyperparameters.


def test_hyperparameters_need_a_function_that_makes_the_optimizer():
    case = problems.make("learned_rate", 0)
    with pytest.raises(ConfigurationError, match=r"hyperparameters \['lr'\].*a\s*function"):
        bilevel.Hypergradient(case.problem, SGD, 3)(case.outer, case.outer_batch)
    with pytest.raises(ConfigurationError, match=r"hyperparameters \['lr'\].*keyword"):
        bilevel.Hypergradient(case.problem, lambda rate: SGD, 3)(case.outer, case.outer_batch)
    with pytest.raises(ConfigurationError, match=r"function sgd.*call it"):
        run(CASE.problem, bilevel.optim.sgd)


def test_hyperparameters_are_tensors():
    made = problem(hyperparameters=lambda self, outer, step: {"lr": 0.1})
    with pytest.raises(ProblemError, match=r"hyperparameters\(\)\['lr'\] holds a float"):
        run(made, bilevel.optim.sgd)


# What is not finite.


@every_estimator
def test_a_diverging_inner_run_names_the_step(estimator):
    """θ_1 is of the order 1e200, so the loss at step 1 overflows."""
    with pytest.raises(NonFiniteError, match=r"inner loss became (inf|nan) at inner step 1 of 4"):
        run(CASE.problem, bilevel.optim.sgd(1e200), estimator=estimator)


@every_estimator
def test_a_nan_in_one_inner_batch_names_the_step(estimator):
    def inner_batch(self, outer, step, *, generator):
        return self.B @ outer["phi"] * (float("nan") if step == 2 else 1.0)

    with pytest.raises(NonFiniteError, match="inner loss became nan at inner step 2 of 4"):
        run(problem(inner_batch=inner_batch), estimator=estimator)


@every_estimator
def test_an_outer_loss_that_is_nan(estimator):
    def outer_loss(self, params, outer, batch):
        return params["theta"].sum() * float("nan")

    with pytest.raises(NonFiniteError, match=r"outer loss is nan at inner step 3.*outer_loss"):
        run(problem(outer_loss=outer_loss), truncation=Fixed(1, 3), estimator=estimator)


class AtRest(Resting):
    """The inner gradient is zero at the start, though it depends on the outer variable."""

    def inner_batch(self, outer, step, *, generator):
        return outer["target"]

    def inner_loss(self, params, batch):
        return ((params - batch) ** 2).sum()

    def hyperparameters(self, outer, step):
        return {}


@every_estimator
def test_a_hypergradient_that_is_not_finite(estimator):
    """Adam's root at a gradient of exactly zero: finite with eps_root only."""
    outer = {"target": torch.zeros(2, dtype=torch.float64)}
    adjoint = r".*backward over \[1, 3\), the cotangent is not finite from inner step 2 on"
    message = "hypergradient's norm is nan" + adjoint * isinstance(estimator, Adjoint)
    run(AtRest(), bilevel.optim.adam(0.1), outer, Fixed(1, 3), estimator)
    rootless = bilevel.optim.adam(0.1, eps_root=0.0)
    with pytest.raises(NonFiniteError, match=message + ".*eps_root"):
        run(AtRest(), rootless, outer, Fixed(1, 3), estimator, graph_budget=0)


def test_every_error_can_be_caught_as_one():
    for error in (ConfigurationError, ProblemError, UnusedOuterVariableError, NonFiniteError):
        assert issubclass(error, bilevel.BilevelError)
    assert issubclass(UnusedOuterVariableError, ProblemError)
