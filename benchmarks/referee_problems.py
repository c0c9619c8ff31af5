"""The problems of benchmark_bilevel, restated on data that come with scikit-learn."""

from abc import abstractmethod
from collections.abc import Callable
from typing import final

import torch
import torch.nn.functional as F
from inner_problem import InnerProblem, Params
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor


class RefereeProblem(InnerProblem):
    """A bilevel problem to be solved, not only differentiated.

    Attributes:
        outer_rate: The largest rate of the outer gradient descent that is tried.
        position: φ, as leaves that every method of one problem shares and the outer loop moves.
    """

    outer_rate: float

    def __init__(self, length: float = 1.0, *, fresh: bool = False) -> None:
        super().__init__(length, fresh=fresh)
        self.position = {name: x.clone().requires_grad_() for name, x in self.outer.items()}

    def leaves(self) -> Params:
        return self.position

    @abstractmethod
    def test_error(self, params: Params) -> float | None:
        """The part of test examples that are misclassified, where there are any."""


@final
class Quadratic(RefereeProblem):
    """ℓ = ½θᵀAθ − θᵀBφ of condition 10 in 100 dimensions, F = ½‖θ − c‖² + ½·0.1‖φ‖²."""

    full_steps, rate, momentum, outer_rate = 50, 1.0, 0.5, 0.03

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
    """A linear softmax on 1000 digits, each with a weight, a part p of which have a random label.

    Judged on 300 clean ones; 497 are the test.
    """

    full_steps, rate, momentum, outer_rate = 80, 0.3, 0.9, 10_000.0
    wrong: float

    def make(self, draw: torch.Generator) -> None:
        x, y = load_digits(return_X_y=True)
        inputs, answers = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
        order = torch.randperm(len(y), generator=draw).split([1000, 300, 497])
        self.x, self.held_out_x, self.test_x = (inputs[rows] for rows in order)
        self.y, self.held_out_y, self.test_y = (answers[rows] for rows in order)
        chosen = torch.rand(1000, generator=draw) < self.wrong
        self.y = torch.where(chosen, torch.randint(10, (1000,), generator=draw), self.y)
        self.start = {"w": torch.zeros(10, 64)}
        self.outer = {"scores": torch.zeros(1000)}

    def batch(self, outer: Params, step: int) -> Params:
        return {"weights": torch.sigmoid(outer["scores"])}

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        losses = F.cross_entropy(F.linear(self.x, params["w"]), self.y, reduction="none")
        return (batch["weights"] * losses).mean() + 0.005 * (params["w"] ** 2).sum()

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        return F.cross_entropy(F.linear(self.held_out_x, params["w"]), self.held_out_y)

    def test_error(self, params: Params) -> float:
        wrong = F.linear(self.test_x, params["w"]).argmax(1) != self.test_y
        return float(wrong.float().mean())


@final
class CleaningHalf(Cleaning):
    """p = 0.5."""

    wrong = 0.5


@final
class CleaningMost(Cleaning):
    """p = 0.7."""

    wrong = 0.7


@final
class CleaningNearlyAll(Cleaning):
    """p = 0.9."""

    wrong = 0.9


PROBLEMS: dict[str, Callable[[], RefereeProblem]] = {
    "quadratic": Quadratic,
    "logistic": Logistic,
    "cleaning-0.5": CleaningHalf,
    "cleaning-0.7": CleaningMost,
    "cleaning-0.9": CleaningNearlyAll,
}
