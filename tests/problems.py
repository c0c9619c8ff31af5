"""The table of named problems that every estimator and optimizer is run over, in float64.

`brute_force` is the reference: autograd through an unroll written without any of the package's
inner loop or estimators, on the problem's own pytrees.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel

DTYPE = torch.float64


def randn(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=generator)


class Quadratic(bilevel.Problem):
    """ℓ = ½θᵀAθ − θᵀ(Bφ),  F = ½‖θ − c‖² + ½ρ‖φ‖². Under SGD everything has a closed form."""

    def __init__(self, A: Tensor, B: Tensor, start: Tensor, penalty: float = 0.1) -> None:
        self.A, self.B, self.start, self.penalty = A, B, start, penalty

    def init(self, outer, *, generator):
        return {"theta": self.start}

    def inner_batch(self, outer, step, *, generator):
        return self.B @ outer["phi"]

    def inner_loss(self, params, batch):
        theta = params["theta"]
        return 0.5 * theta @ self.A @ theta - theta @ batch

    def outer_loss(self, params, outer, batch):
        distance = ((params["theta"] - batch) ** 2).sum()
        return 0.5 * distance + 0.5 * self.penalty * (outer["phi"] ** 2).sum()


class Ridge(bilevel.Problem):
    """Linear regression whose penalty is the only outer variable."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def init(self, outer, *, generator):
        return torch.zeros(self.inputs.shape[1], dtype=DTYPE)

    def inner_batch(self, outer, step, *, generator):
        return outer["log_penalty"].exp()

    def inner_loss(self, params, batch):
        residual = self.inputs @ params - self.targets
        return 0.5 * (residual**2).mean() + 0.5 * batch * (params**2).sum()

    def outer_loss(self, params, outer, batch):
        inputs, targets = batch
        return 0.5 * ((inputs @ params - targets) ** 2).mean()


class DataCleaning(bilevel.Problem):
    """Logistic regression with one learned weight an example, on random mini-batches."""

    def __init__(self, inputs: Tensor, labels: Tensor, size: int) -> None:
        self.inputs, self.labels, self.size = inputs, labels, size

    def init(self, outer, *, generator):
        return {"weight": 0.1 * randn(self.inputs.shape[1], 3, generator=generator)}

    def inner_batch(self, outer, step, *, generator):
        chosen = torch.randperm(len(self.labels), generator=generator)[: self.size]
        return self.inputs[chosen], self.labels[chosen], torch.sigmoid(outer[0][chosen])

    def inner_loss(self, params, batch):
        inputs, labels, weights = batch
        losses = F.cross_entropy(inputs @ params["weight"], labels, reduction="none")
        return (weights * losses).mean() + 0.01 * (params["weight"] ** 2).sum()

    def outer_loss(self, params, outer, batch):
        inputs, labels = batch
        logits = inputs @ params["weight"]
        accuracy = (logits.argmax(1) == labels).to(DTYPE).mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}


class Distillation(bilevel.Problem):
    """A network trained on learned inputs with learned soft labels and noise augmentation."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network

    def init(self, outer, *, generator):
        return bilevel.fresh_parameters(self.network, generator, dtype=DTYPE)

    def inner_batch(self, outer, step, *, generator):
        noise = 0.1 * randn(*outer["images"].shape, generator=generator)
        return outer["images"] + noise, outer["labels"]

    def inner_loss(self, params, batch):
        images, labels = batch
        return F.cross_entropy(functional_call(self.network, params, (images,)), labels)

    def outer_loss(self, params, outer, batch):
        images, labels = batch
        return F.cross_entropy(functional_call(self.network, params, (images,)), labels)


class LearnedStart(bilevel.Problem):
    """MAML-like: the initial parameters are the outer variables."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def init(self, outer, *, generator):
        return {"scale": outer["scale"], "shift": outer["shift"] * 1.5}

    def inner_batch(self, outer, step, *, generator):
        return self.inputs, self.targets

    def inner_loss(self, params, batch):
        inputs, targets = batch
        return ((torch.tanh(inputs @ params["scale"]) + params["shift"] - targets) ** 2).mean()

    def outer_loss(self, params, outer, batch):
        return self.inner_loss(params, batch)


class LearnedRate(LearnedStart):
    """The learning rate is learned beside the start, through `hyperparameters`."""

    def hyperparameters(self, outer, step):
        return {"lr": outer["log_lr"].exp()}


@dataclass
class Case:
    problem: bilevel.Problem
    outer: Any
    outer_batch: Any

    @property
    def learns_rate(self) -> bool:
        return isinstance(self.problem, LearnedRate)

    def optimizer(self, make: Callable[..., Any], lr: float) -> Any:
        """A transformation, or the function that makes it where the problem learns the rate."""
        return make if self.learns_rate else make(lr=lr)


def quadratic(generator: torch.Generator, size: int = 4) -> Case:
    root = randn(size, size, generator=generator) / size**0.5
    A = root @ root.T + 0.3 * torch.eye(size, dtype=DTYPE)
    problem = Quadratic(A, randn(size, 3, generator=generator), randn(size, generator=generator))
    return Case(problem, {"phi": randn(3, generator=generator)}, randn(size, generator=generator))


def ridge(generator: torch.Generator, size: int = 4) -> Case:
    problem = Ridge(randn(9, size, generator=generator), randn(9, generator=generator))
    batch = randn(7, size, generator=generator), randn(7, generator=generator)
    return Case(problem, {"log_penalty": randn(generator=generator)}, batch)


def data_cleaning(generator: torch.Generator, size: int = 4) -> Case:
    def labels(count: int) -> Tensor:
        return torch.randint(3, (count,), generator=generator)

    problem = DataCleaning(randn(8, size, generator=generator), labels(8), size=5)
    batch = randn(6, size, generator=generator), labels(6)
    return Case(problem, (randn(8, generator=generator),), batch)


def _distillation(generator: torch.Generator, network: nn.Module, shape: tuple[int, ...]) -> Case:
    outer = {
        "images": randn(3, *shape, generator=generator),
        "labels": torch.softmax(randn(3, 3, generator=generator), dim=1),
    }
    batch = randn(5, *shape, generator=generator), torch.randint(3, (5,), generator=generator)
    return Case(Distillation(network), outer, batch)


def mlp_distillation(generator: torch.Generator, size: int = 4) -> Case:
    network = nn.Sequential(nn.Linear(size, 5), nn.GELU(), nn.Linear(5, 3))
    return _distillation(generator, network, (size,))


def convnet_distillation(generator: torch.Generator, size: int = 4) -> Case:
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.Softplus(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    return _distillation(generator, network, (2, 4, 4))


def learned_start(generator: torch.Generator, size: int = 4) -> Case:
    inputs, targets = randn(6, size, generator=generator), randn(6, generator=generator)
    outer = {"scale": randn(size, generator=generator), "shift": randn(1, generator=generator)}
    batch = randn(5, size, generator=generator), randn(5, generator=generator)
    return Case(LearnedStart(inputs, targets), outer, batch)


def learned_rate(generator: torch.Generator, size: int = 4) -> Case:
    case = learned_start(generator, size)
    log_lr = torch.tensor(0.05, dtype=DTYPE).log()
    return Case(
        LearnedRate(case.problem.inputs, case.problem.targets),
        {**case.outer, "log_lr": log_lr},
        case.outer_batch,
    )


def implicit_quadratic(case: Case) -> tuple[Tensor, Tensor]:
    """(dF/dφ at θ* = A⁻¹Bφ, the inner Hessian A)."""
    A, B, phi = case.problem.A, case.problem.B, case.outer["phi"]
    residual = torch.linalg.solve(A, B @ phi) - case.outer_batch
    return B.T @ torch.linalg.solve(A, residual) + case.problem.penalty * phi, A


def implicit_ridge(case: Case) -> tuple[Tensor, Tensor]:
    """(dF/d log λ at θ* = H⁻¹Xᵀy/n, H) with H = XᵀX/n + λI, so dθ*/d log λ = −λH⁻¹θ*."""
    X, y = case.problem.inputs, case.problem.targets
    inputs, targets = case.outer_batch
    penalty = case.outer["log_penalty"].exp()
    H = X.T @ X / len(y) + penalty * torch.eye(X.shape[1], dtype=X.dtype)
    theta = torch.linalg.solve(H, X.T @ y / len(y))
    slope = inputs.T @ (inputs @ theta - targets) / len(targets)
    return (-penalty * slope @ torch.linalg.solve(H, theta)).reshape(1), H


#: Problems whose inner optimum is known, with the hypergradient there and the inner Hessian.
CLOSED_FORMS = {"quadratic": implicit_quadratic, "ridge": implicit_ridge}

PROBLEMS: dict[str, Callable[..., Case]] = {
    "quadratic": quadratic,
    "ridge": ridge,
    "data_cleaning": data_cleaning,
    "mlp_distillation": mlp_distillation,
    "convnet_distillation": convnet_distillation,
    "learned_start": learned_start,
    "learned_rate": learned_rate,
}


def make(name: str, seed: int, size: int = 4) -> Case:
    return PROBLEMS[name](torch.Generator().manual_seed(seed), size)


def unroll(case: Case, optimizer: Any, outer: Any, key: bilevel.Key, start: int, stop: int):
    """(θ_stop as a pytree, Σ f_t) with a graph to `outer`, the iterate at `start` > 0 detached."""
    problem = case.problem
    params = problem.init(outer, generator=key.generator("init"))
    state, total = None, 0.0
    for step in range(stop):
        hyper = problem.hyperparameters(outer, step)
        transformation = optimizer(**hyper) if hyper else optimizer
        state = transformation.init(params) if state is None else state
        if step == start and start > 0:
            params, state = optree.tree_map(lambda x: x.detach(), (params, state))
        params = optree.tree_map(
            lambda p: p if p.requires_grad else p.detach().requires_grad_(), params
        )
        batch = problem.inner_batch(outer, step, generator=key.generator("inner_batch", step))
        leaves, spec = optree.tree_flatten(params)
        loss = problem.inner_loss(params, batch)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        updates, state = transformation.update(
            optree.tree_unflatten(spec, grads), state, params=params, inplace=False
        )
        params = optree.tree_map(lambda p, u: p + u, params, updates)
        along = problem.step_loss(params, outer, step, generator=key.generator("step_loss", step))
        total = total + along if along is not None and step >= start else total
    return params, total


def outer_value(case: Case, params: Any, outer: Any) -> Tensor:
    value = case.problem.outer_loss(params, outer, case.outer_batch)
    return 0.0 if value is None else value[0] if isinstance(value, tuple) else value


def brute_force(case: Case, optimizer: Any, key: bilevel.Key, window: bilevel.Window):
    """(F, dF/dφ) by autograd through the unroll."""
    outer = optree.tree_map(lambda x: x.detach().clone().requires_grad_(), case.outer)
    params, along = unroll(case, optimizer, outer, key, window.start, window.stop)
    loss = outer_value(case, params, outer) + along
    leaves, spec = optree.tree_flatten(outer)
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return loss.detach(), optree.tree_unflatten(spec, grads)


def flat(tree: Any) -> Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in optree.tree_leaves(tree)])


def relative_error(actual: Any, expected: Any) -> float:
    """‖actual − expected‖ / ‖expected‖ over whole pytrees."""
    actual, expected = flat(actual), flat(expected)
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-300))


class Fixed(bilevel.truncation.Truncation):
    """Always the same window [start, stop), whatever was recorded."""

    def __init__(self, start: int, stop: int) -> None:
        self.window = bilevel.Window(start, stop)

    @property
    def minimum_steps(self) -> int:
        return self.window.stop

    def plan(self, steps, generator):
        return bilevel.truncation.Plan(steps, self.window, self.window.start)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class OnceDifferentiable(torch.autograd.Function):
    """x ↦ x², whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad
