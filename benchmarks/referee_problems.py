"""The problems of benchmark_bilevel, restated on data that come with scikit-learn, and CIFAR-10."""

import functools
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Literal, final

import torch
import torch.nn.functional as F
from inner_problem import InnerProblem, Params
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor
from torchvision.datasets import CIFAR10

#: Before the names of θ_0 where it is among the outer variables.
START = "start "


class RefereeProblem(InnerProblem):
    """A bilevel problem to be solved, not only differentiated.

    Attributes:
        outer_rate: A rate of the outer gradient descent that suits the exact hypergradient.
        noise: Standard deviation of φ_0.
        form: Of its losses, by which JAX's side knows them.
        converges: Whether what counts is the inner optimum; otherwise it is the end of the run.
        patience: What the time of a run is multiplied by.
        position: φ, as leaves that every method of one problem shares and the outer loop moves.
    """

    outer_rate: float
    noise: float
    form: Literal["quadratic", "logistic", "cleaning", "network"]
    converges: bool = True
    patience: float = 1.0

    def __init__(self, length: float = 1.0, *, fresh: bool = False) -> None:
        super().__init__(length, fresh=fresh)
        self.position = {name: x.clone().requires_grad_() for name, x in self.outer.items()}

    def leaves(self) -> Params:
        return self.position

    def init(self, outer: Params) -> Params:
        given = {name: outer[START + name] for name in self.start if START + name in outer}
        return given or self.start

    def begin(self, seed: int) -> None:
        """Set φ to φ_0 of this seed."""
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, value in self.position.items():
                noise = torch.randn(value.shape, generator=draw)
                value.copy_(self.outer[name] + self.noise * noise)

    @abstractmethod
    def test_error(self, params: Params) -> float | None:
        """The part of test examples that are misclassified, where there are any."""


@final
class Quadratic(RefereeProblem):
    """ℓ = ½θᵀAθ − θᵀBφ of condition 10 in 100 dimensions, F = ½‖θ − c‖² + ½·0.1‖φ‖²."""

    full_steps, rate, momentum, outer_rate = 50, 1.0, 0.5, 0.03
    form, noise = "quadratic", 1.0

    def make(self, draw: torch.Generator) -> None:
        basis = torch.linalg.qr(torch.randn(100, 100, generator=draw))[0]
        self.a = basis @ torch.diag(torch.logspace(-1, 0, 100)) @ basis.T
        self.b = torch.randn(100, 20, generator=draw) / 10
        self.target = torch.randn(100, generator=draw)
        self.start = {"theta": torch.zeros(100)}
        self.outer = {"phi": torch.zeros(20)}

    def batch(self, outer: Params, step: int) -> Params:
        return {"drive": self.b @ outer["phi"]}

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        theta = params["theta"]
        return 0.5 * theta @ self.a @ theta - theta @ batch["drive"]

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        distance = ((params["theta"] - self.target) ** 2).sum()
        return 0.5 * distance + 0.05 * (outer["phi"] ** 2).sum()

    def test_error(self, params: Params) -> None:
        return None


@final
class Logistic(RefereeProblem):
    """Logistic regression on 569 tumours with a penalty for each of 30 features, in (0, 1)."""

    full_steps, rate, momentum, outer_rate = 60, 0.25, 0.7, 300.0
    form, noise = "logistic", 0.5

    def make(self, draw: torch.Generator) -> None:
        x, y = load_breast_cancer(return_X_y=True)
        inputs = torch.tensor(x, dtype=torch.float32)
        inputs = (inputs - inputs.mean(0)) / inputs.std(0)
        order = torch.randperm(len(y), generator=draw).split([240, 160, 169])
        answers = torch.tensor(y, dtype=torch.float32)
        self.x, self.held_out_x, self.test_x = (inputs[rows] for rows in order)
        self.y, self.held_out_y, self.test_y = (answers[rows] for rows in order)
        self.start = {"w": torch.zeros(30)}
        self.outer = {"penalty": torch.zeros(30)}

    def batch(self, outer: Params, step: int) -> Params:
        return {"penalty": torch.sigmoid(outer["penalty"])}

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        fit = F.binary_cross_entropy_with_logits(self.x @ params["w"], self.y)
        return fit + 0.5 * (batch["penalty"] * params["w"] ** 2).sum()

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        scores = self.held_out_x @ params["w"]
        return F.binary_cross_entropy_with_logits(scores, self.held_out_y)

    def test_error(self, params: Params) -> float:
        wrong = (self.test_x @ params["w"] > 0) != (self.test_y > 0)
        return float(wrong.float().mean())


class Cleaning(RefereeProblem):
    """A softmax on examples with a weight each, a part of which have a random label.

    Attributes:
        wrong: That part.
        hidden: Units of a hidden layer; None for a linear softmax.
    """

    form, noise, patience = "cleaning", 0.3, 1.5
    wrong: float
    hidden: int | None = None

    @abstractmethod
    def examples(self, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        """(inputs, labels) to train on, to judge by, and to test on."""

    def make(self, draw: torch.Generator) -> None:
        train, held_out, test = self.examples(draw)
        self.x, self.y = train
        self.held_out_x, self.held_out_y = held_out
        self.test_x, self.test_y = test
        chosen = torch.rand(len(self.y), generator=draw) < self.wrong
        self.y = torch.where(chosen, torch.randint(10, self.y.shape, generator=draw), self.y)
        width = self.x.shape[1]
        if self.hidden is None:
            self.start = {"w": torch.zeros(10, width)}
        else:
            self.start = {
                "w": torch.randn(self.hidden, width, generator=draw) / width**0.5,
                "v": torch.randn(10, self.hidden, generator=draw) / self.hidden**0.5,
            }
        self.outer = {"scores": torch.zeros(len(self.y))}

    def outputs(self, params: Params, inputs: Tensor) -> Tensor:
        """The classifier."""
        first = F.linear(inputs, params["w"])
        return first if self.hidden is None else F.linear(torch.tanh(first), params["v"])

    def batch(self, outer: Params, step: int) -> Params:
        return {"weights": torch.sigmoid(outer["scores"])}

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        losses = F.cross_entropy(self.outputs(params, self.x), self.y, reduction="none")
        return (batch["weights"] * losses).mean() + 0.005 * (params["w"] ** 2).sum()

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        return F.cross_entropy(self.outputs(params, self.held_out_x), self.held_out_y)

    def test_error(self, params: Params) -> float:
        wrong = self.outputs(params, self.test_x).argmax(1) != self.test_y
        return float(wrong.float().mean())


@final
class Digits(Cleaning):
    """1000 digits, judged by 300 clean ones; 497 are the test."""

    full_steps, rate, momentum, outer_rate = 80, 0.3, 0.9, 10_000.0

    def __init__(self, wrong: float) -> None:
        self.wrong = wrong
        super().__init__()

    def examples(self, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        x, y = load_digits(return_X_y=True)
        inputs, answers = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
        order = torch.randperm(len(y), generator=draw).split([1000, 300, 497])
        return [(inputs[rows], answers[rows]) for rows in order]


class Photographs(Cleaning):
    """CIFAR-10 in colour at 8×8 pixels, half of the labels to train on random."""

    wrong, patience = 0.5, 2.0
    counts: tuple[int, int, int]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        super().__init__()

    def examples(self, draw: torch.Generator) -> list[tuple[Tensor, Tensor]]:
        dataset = CIFAR10(str(self.folder), train=True, download=False)
        order = torch.randperm(len(dataset.data), generator=draw)[: sum(self.counts)]
        pixels = torch.from_numpy(dataset.data[order.numpy()]).permute(0, 3, 1, 2) / 255
        inputs = F.avg_pool2d(pixels, 4).flatten(1)
        # A quarter, so that the inner loss has a curvature of about 1.
        inputs = (inputs - inputs.mean(0)) / inputs.std(0) / 4
        answers = torch.tensor(dataset.targets)[order]
        return list(zip(inputs.split(self.counts), answers.split(self.counts), strict=True))


@final
class LinearPhotographs(Photographs):
    """2000 of them under a linear softmax, judged by 1000 clean ones; 2000 are the test."""

    full_steps, rate, momentum, outer_rate = 60, 1.0, 0.9, 20_000.0
    counts = (2000, 1000, 2000)


@final
class NetworkPhotographs(Photographs):
    """1000 of them, 40 steps of a network with 24 hidden units: what counts is where those end."""

    full_steps, rate, momentum, outer_rate = 40, 0.5, 0.9, 3_000.0
    form, converges, hidden = "network", False, 24
    counts = (1000, 500, 2000)


def problems(cifar10: Path | None) -> dict[str, Callable[[], RefereeProblem]]:
    """All problems by name; those on CIFAR-10 need its folder, that of `cifar-10-batches-py`."""
    found: dict[str, Callable[[], RefereeProblem]] = {
        "quadratic": Quadratic,
        "logistic": Logistic,
        **{f"cleaning-{wrong}": functools.partial(Digits, wrong) for wrong in (0.5, 0.7, 0.9)},
    }
    if cifar10 is not None:
        found["cifar10"] = functools.partial(LinearPhotographs, cifar10)
        found["cifar10-network"] = functools.partial(NetworkPhotographs, cifar10)
    return found
