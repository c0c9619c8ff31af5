"""Every derivative flows through what the contract names, or the call ends in an error."""

import dataclasses
import functools
import types

import optree
import pytest
import torch
from paths import PATHS, TEST_INPUTS, TEST_TARGETS, Weighted, follow, reference, weights
from problems import DTYPE, randn, relative_error, seeded
from torch import nn
from torchopt.base import GradientTransformation

import bilevel

every_path = pytest.mark.parametrize("path", PATHS)
#: A recorded graph, the recursion with and without it, and forward mode.
some_paths = pytest.mark.parametrize(
    "path", ["recorded graph", "recursion, inputs kept", "recursion, nothing kept", "Forward"]
)

PENALTY = torch.tensor(0.3, dtype=DTYPE, requires_grad=True)
MODULE = types.ModuleType("settings")
MODULE.penalty = PENALTY


def penalised(params, penalty=PENALTY):
    return penalty * (params["theta"] ** 2).sum()


class WithPenalty(Weighted):
    """φ has a penalty, which is honestly used in the outer loss alone."""

    def outer_loss(self, params, outer, batch):
        return super().outer_loss(params, outer, batch) + 0.1 * outer["penalty"] ** 2


class InGlobal(WithPenalty):
    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) + PENALTY * (params["theta"] ** 2).sum()


class InModule(WithPenalty):
    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) + MODULE.penalty * (params["theta"] ** 2).sum()


class InDefault(WithPenalty):
    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) + penalised(params)


class InPartial(WithPenalty):
    def setup(self):
        self.extra = functools.partial(lambda penalty, x: penalty * (x**2).sum(), PENALTY.exp())

    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) + self.extra(params["theta"])


class InClass(WithPenalty):
    held = (PENALTY,)

    def outer_loss(self, params, outer, batch):
        return super().outer_loss(params, outer, batch) + type(self).held[0] ** 2


class InDict(WithPenalty):
    def setup(self):
        self.held = {"penalty": nn.Parameter(torch.tensor(0.3, dtype=DTYPE))}

    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) + penalised(params, self.held["penalty"])


class MadeBefore(WithPenalty):
    """In __init__, from the outer variable."""

    def setup(self):
        self.scale = PENALTY.sigmoid()

    def inner_batch(self, outer, step, *, generator):
        inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
        return inputs, targets, scale * self.scale


class InInit(WithPenalty):
    def init(self, outer, *, generator):
        start = super().init(outer, generator=generator)
        return optree.tree_map(lambda x: x + PENALTY, start)


class AtOneStep(WithPenalty):
    """At a step that is neither the first nor the last."""

    def inner_batch(self, outer, step, *, generator):
        return *super().inner_batch(outer, step, generator=generator), step

    def inner_loss(self, params, batch):
        loss = super().inner_loss(params, batch[:3])
        return loss + penalised(params) if batch[3] == 2 else loss


class InBatchAtOneStep(WithPenalty):
    def inner_batch(self, outer, step, *, generator):
        inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
        return inputs, targets, scale * PENALTY if step == 3 else scale


class InStepLossAtOneStep(WithPenalty):
    def step_loss(self, params, outer, step, *, generator):
        return penalised(params) if step == 3 else (params["theta"] ** 2).sum()


class InHyperparametersAtOneStep(WithPenalty):
    def hyperparameters(self, outer, step):
        return {"lr": 0.1 * (PENALTY if step == 3 else torch.ones((), dtype=DTYPE))}


@dataclasses.dataclass
class Batch:
    inputs: torch.Tensor
    targets: torch.Tensor
    scale: torch.Tensor


class NoPytree(WithPenalty):
    """At one step the batch is an object that autograd's leaves cannot be taken from."""

    def inner_batch(self, outer, step, *, generator):
        batch = super().inner_batch(outer, step, generator=generator)
        return Batch(*batch) if step == 2 else batch

    def inner_loss(self, params, batch):
        if isinstance(batch, Batch):
            batch = batch.inputs, batch.targets, batch.scale
        return super().inner_loss(params, batch)


class KeptFromInit(WithPenalty):
    def init(self, outer, *, generator):
        self.outer = outer
        return super().init(outer, generator=generator)

    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) + penalised(params, self.outer["penalty"])


class KeptFromBatch(WithPenalty):
    """A function of φ that one method computes and another uses."""

    def inner_batch(self, outer, step, *, generator):
        self.penalty = outer["penalty"].exp()
        return super().inner_batch(outer, step, generator=generator)

    def outer_loss(self, params, outer, batch):
        return super().outer_loss(params, outer, batch) + penalised(params, self.penalty)


class KeptFromTheFirstStep(WithPenalty):
    def setup(self):
        self.scale = None

    def inner_batch(self, outer, step, *, generator):
        if self.scale is None:
            self.scale = outer["penalty"].exp()
        inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
        return inputs, targets, scale * self.scale


ROUND = [
    InGlobal,
    InModule,
    InDefault,
    InPartial,
    InClass,
    InDict,
    MadeBefore,
    InInit,
    AtOneStep,
    InBatchAtOneStep,
    InStepLossAtOneStep,
    InHyperparametersAtOneStep,
    NoPytree,
    KeptFromInit,
    KeptFromBatch,
    KeptFromTheFirstStep,
]


@some_paths
@pytest.mark.parametrize("problem", ROUND)
def test_what_goes_round_the_contract_is_refused(path, problem):
    optimizer = bilevel.optim.sgd if problem is InHyperparametersAtOneStep else None
    outer = {**weights(), "penalty": PENALTY}
    with pytest.raises(bilevel.ProblemError, match="lost"):
        follow(path, problem(), outer, optimizer=optimizer)


@every_path
def test_a_parameter_of_a_module_that_is_an_outer_variable_is_no_constant(path):
    module = nn.Linear(4, 1).double()

    class Extractor(WithPenalty):
        def setup(self):
            self.module = module

        def inner_loss(self, params, batch):
            return super().inner_loss(params, batch) + self.module.weight.square().sum() * (
                params["bias"].sum()
            )

    names = {"penalty": PENALTY, **weights()}
    for learned in (module.weight, module.weight.detach()):
        outer = {**names, "penalty": learned}
        with pytest.raises(bilevel.ProblemError, match="lost"):
            follow(path, Extractor(), outer)
    status = follow(path, Extractor(), {**names}).stats.status
    assert "Extractor.module, which are held constant" in status
    module.requires_grad_(False)
    assert follow(path, Extractor(), {**names}).stats.status == "ok"


def test_the_start_of_a_run_that_was_kept_from_the_call_before_is_refused():
    class Starting(Weighted):
        start = None

        def init(self, outer, *, generator):
            if self.start is None:
                self.start = {
                    "theta": outer["weights"][:4] * 0.1,
                    "bias": torch.ones(1, dtype=DTYPE),
                }
            return self.start

    outer = weights()
    hypergradient = bilevel.Hypergradient(Starting(), bilevel.optim.sgd(0.1), 3)
    result = hypergradient(outer, None, seeded(0))
    expected = reference(Starting(), outer, (0, 3), bilevel.optim.sgd(0.1))
    assert relative_error(result.grads, expected[1]) < 1e-8
    with pytest.raises(bilevel.ProblemError, match="not from what another call has kept"):
        hypergradient(outer, None, seeded(0))


def test_an_outer_variable_in_the_outer_batch_is_refused():
    class Judged(Weighted):
        def outer_loss(self, params, outer, batch):
            return super().outer_loss(params, outer, batch) + batch["extra"].sum()

    outer, optimizer = weights(), bilevel.optim.sgd(0.1)
    for extra in (outer["weights"], outer["weights"].exp()):
        hypergradient = bilevel.Hypergradient(Judged(), optimizer, 2)
        with pytest.raises(bilevel.ProblemError, match="outer_batch holds an outer variable"):
            hypergradient(outer, {"extra": extra})
    hypergradient(outer, {"extra": torch.ones(2, requires_grad=True)})


def scaled(rate):
    """SGD written by a user, whose rate may be a tensor of anywhere."""

    def update(updates, state, *, params=None, inplace=True):
        return optree.tree_map(lambda g: -rate * g, updates), state

    return GradientTransformation(lambda params: (), update)


@dataclasses.dataclass
class Momentum:
    buffer: object


def momentum(kind):
    """Momentum whose state is of a kind."""

    def init(params):
        return kind(optree.tree_map(torch.zeros_like, params))

    def update(updates, state, *, params=None, inplace=True):
        before = state.buffer if isinstance(state, Momentum) else state[0]
        buffer = optree.tree_map(lambda m, g: 0.9 * m + g, before, updates)
        return optree.tree_map(lambda m: -0.1 * m, buffer), kind(buffer)

    return GradientTransformation(init, update)


@every_path
@pytest.mark.parametrize(
    "optimizer",
    [scaled(PENALTY), bilevel.optim.sgd(PENALTY), bilevel.optim.adam(0.1, weight_decay=PENALTY**2)],
)
def test_an_optimizer_that_knows_an_outer_variable_is_refused(path, optimizer):
    outer = {**weights(), "penalty": PENALTY}
    with pytest.raises(bilevel.ProblemError, match="the optimizer depends on a tensor"):
        follow(path, WithPenalty(), outer, optimizer=optimizer)


@every_path
def test_a_state_whose_tensors_cannot_be_seen_is_refused(path):
    outer = weights()
    with pytest.raises(bilevel.ProblemError, match="state holds tensors where they cannot be seen"):
        follow(path, Weighted(), outer, optimizer=momentum(Momentum))
    result = follow(path, Weighted(), outer, optimizer=momentum(lambda buffer: [buffer]))
    expected = reference(Weighted(), outer, optimizer=momentum(lambda buffer: [buffer]))
    assert relative_error(result.grads, expected[1]) < 1e-8


class LearnsRate(Weighted):
    def hyperparameters(self, outer, step):
        return {"rate": outer["rate"].exp()}


@pytest.mark.parametrize("make", [scaled, bilevel.optim.sgd])
def test_a_rate_that_is_made_a_number_is_refused(make):
    outer = {**weights(), "rate": torch.tensor(-2.0, dtype=DTYPE)}
    with pytest.raises(bilevel.ConfigurationError, match="by its hyperparameters"):
        follow(
            "recorded graph", LearnsRate(), outer, optimizer=lambda rate: make(float(rate.detach()))
        )
    result = follow("recorded graph", LearnsRate(), outer, optimizer=lambda rate: make(rate))
    expected = reference(LearnsRate(), outer, optimizer=lambda rate: make(rate))
    assert relative_error(result.grads, expected[1]) < 1e-8


class GradientPenalty(Weighted):
    """A loss that differentiates by a tensor of its own making."""

    def inner_loss(self, params, batch):
        points = torch.linspace(0, 1, 4, dtype=DTYPE).requires_grad_()
        values = torch.tanh(points * params["theta"]).sum()
        (slopes,) = torch.autograd.grad(values, points, create_graph=True)
        return super().inner_loss(params, batch) + slopes.square().sum()

    def outer_loss(self, params, outer, batch):
        inputs = TEST_INPUTS.clone().requires_grad_()
        outputs = self.predict(params, inputs)
        (slopes,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
        return ((outputs - TEST_TARGETS) ** 2).mean() + slopes.square().mean()


class Adversarial(Weighted):
    """A batch that is made with derivatives."""

    def inner_batch(self, outer, step, *, generator):
        inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
        moved = inputs.clone().requires_grad_()
        loss = (scale * (torch.tanh(moved.sum(1)) - targets) ** 2).sum()
        (slope,) = torch.autograd.grad(loss, moved, create_graph=True)
        return inputs + 0.1 * slope, targets, scale


@every_path
@pytest.mark.parametrize("problem", [GradientPenalty, Adversarial])
def test_methods_may_differentiate_themselves(path, problem):
    outer = weights()
    by_torch_func = path == "Forward" or (
        path.startswith("forward over") and problem is GradientPenalty
    )
    if by_torch_func:
        with pytest.raises(bilevel.ProblemError, match=r"torch\.func"):
            follow(path, problem(), outer)
        return
    result = follow(path, problem(), outer)
    assert result.stats.status == "ok"
    assert relative_error(result.grads, reference(problem(), outer)[1]) < 1e-8


def test_the_outer_tensors_of_the_user_may_be_shared_views_or_the_same():
    class Both(Weighted):
        def inner_batch(self, outer, step, *, generator):
            return super().inner_batch(
                {"weights": outer[0] + outer[1].repeat(2)}, step, generator=generator
            )

    tensor = randn(20, generator=seeded(3))
    for outer in ((tensor, tensor[:10]), (tensor, tensor[10:])):
        result = follow("recorded graph", Both(), outer)
        assert result.stats.status == "ok"
        assert relative_error(result.grads, reference(Both(), outer)[1]) < 1e-8
