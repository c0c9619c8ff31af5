"""The inner loops that users of such libraries have, small enough for every library to be timed on.

Each is two functions and some data, in terms of no library. The JAX side of the comparison writes
the same functions again (`inner_jax.py`) on the same tensors (`InnerProblem.tensors`).
"""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import final

import torch
import torch.nn.functional as F
from inner_problem import InnerProblem, Params
from sklearn.datasets import load_digits
from torch import Tensor


@final
class TinyNetwork(InnerProblem):
    """Weights of 50 examples for a network of 16 hidden units."""

    full_steps, optimizer, rate = 100, "adam", 1e-2

    def make(self, draw: torch.Generator) -> None:
        self.x, self.y = torch.randn(50, 20, generator=draw), labels(50, 5, draw)
        self.held_out_x, self.held_out_y = (
            torch.randn(200, 20, generator=draw),
            labels(200, 5, draw),
        )
        self.start = {
            "w1": torch.randn(16, 20, generator=draw) / 20**0.5,
            "b1": torch.zeros(16),
            "w2": torch.randn(5, 16, generator=draw) / 4,
            "b2": torch.zeros(5),
        }
        self.outer = {"scores": torch.zeros(50)}
        self.draw_rows(50, draw)

    def batch(self, outer: Params, step: int) -> Params:
        weights = torch.sigmoid(outer["scores"])
        return {"weights": weights, **self.of_step(step, weights=weights, x=self.x, y=self.y)}

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        outputs = two_layers(params, batch.get("x", self.x), torch.tanh)
        return weighted_loss(outputs, batch.get("y", self.y), batch["weights"])

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        return F.cross_entropy(two_layers(params, self.held_out_x, torch.tanh), self.held_out_y)


@final
class Penalties(InnerProblem):
    """One log penalty for each weight of a logistic regression on 1200 digits."""

    full_steps, rate, momentum = 200, 0.5, 0.9

    def make(self, draw: torch.Generator) -> None:
        self.x, self.y, self.held_out_x, self.held_out_y = digits(1200)
        self.start = {"w": torch.zeros(10, 64), "b": torch.zeros(10)}
        self.outer = {
            name: torch.full_like(value, math.log(1e-3)) for name, value in self.start.items()
        }
        self.draw_rows(1200, draw)

    def batch(self, outer: Params, step: int) -> Params:
        penalties = {name: value.exp() for name, value in outer.items()}
        return {**penalties, **self.of_step(step, x=self.x, y=self.y)}

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        scores = F.linear(batch.get("x", self.x), params["w"], params["b"])
        penalty = sum((batch[name] * value**2).sum() for name, value in params.items())
        return F.cross_entropy(scores, batch.get("y", self.y)) + 0.5 * penalty

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        return F.cross_entropy(F.linear(self.held_out_x, params["w"], params["b"]), self.held_out_y)


class Cleaning(InnerProblem):
    """Weights of 1000 digits, half of them wrongly labelled."""

    full_steps = 100
    hidden: int | None

    def make(self, draw: torch.Generator) -> None:
        self.x, self.y, self.held_out_x, self.held_out_y = digits(1000)
        wrong = torch.rand(1000, generator=draw) < 0.5
        self.y[wrong] = labels(int(wrong.sum()), 10, draw)
        width = self.hidden
        if width is None:
            self.start = {"w": torch.zeros(10, 64), "b": torch.zeros(10)}
        else:
            self.start = {
                "w1": torch.randn(width, 64, generator=draw) / 8,
                "b1": torch.zeros(width),
                "w2": torch.randn(10, width, generator=draw) / width**0.5,
                "b2": torch.zeros(10),
            }
        self.outer = {"scores": torch.zeros(1000)}
        self.draw_rows(1000, draw)

    def network(self, params: Params, x: Tensor) -> Tensor:
        if self.hidden is None:
            return F.linear(x, params["w"], params["b"])
        return two_layers(params, x, torch.relu)

    def batch(self, outer: Params, step: int) -> Params:
        weights = torch.sigmoid(outer["scores"])
        return {"weights": weights, **self.of_step(step, weights=weights, x=self.x, y=self.y)}

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        outputs = self.network(params, batch.get("x", self.x))
        return weighted_loss(outputs, batch.get("y", self.y), batch["weights"])

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        return F.cross_entropy(self.network(params, self.held_out_x), self.held_out_y)


@final
class LinearCleaning(Cleaning):
    hidden, rate = None, 0.5


@final
class NetworkCleaning(Cleaning):
    hidden, rate = 128, 0.3


@final
class MAML(InnerProblem):
    """A learned start of a small network for 25 sine waves, 10 points each, side by side."""

    full_steps, rate, tasks, points = 5, 0.01, 25, 10

    def make(self, draw: torch.Generator) -> None:
        amplitude = torch.rand(self.tasks, 1, 1, generator=draw) * 4.9 + 0.1
        phase = torch.rand(self.tasks, 1, 1, generator=draw) * math.pi

        def points(*leading: int) -> tuple[Tensor, Tensor]:
            x = torch.rand(*leading, self.tasks, self.points, 1, generator=draw) * 10 - 5
            return x, amplitude * torch.sin(x + phase)

        self.x, self.y = points(self.steps) if self.fresh else points()
        self.held_out_x, self.held_out_y = points()
        sizes = [1, 40, 40, 1]
        self.outer = {}
        for layer, (before, after) in enumerate(itertools.pairwise(sizes)):
            self.outer[f"w{layer}"] = torch.randn(before, after, generator=draw) / before**0.5
            self.outer[f"b{layer}"] = torch.zeros(after)

    def init(self, outer: Params) -> Params:
        return {name: value.expand(self.tasks, *value.shape) for name, value in outer.items()}

    def network(self, params: Params, x: Tensor) -> Tensor:
        for layer in range(3):
            x = torch.baddbmm(params[f"b{layer}"].unsqueeze(1), x, params[f"w{layer}"])
            x = torch.relu(x) if layer < 2 else x
        return x

    def batch(self, outer: Params, step: int) -> Params:
        return {"x": self.x[step], "y": self.y[step]} if self.fresh else {}

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        error = self.network(params, batch.get("x", self.x)) - batch.get("y", self.y)
        return (error**2).mean((1, 2)).sum()

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        return ((self.network(params, self.held_out_x) - self.held_out_y) ** 2).mean()


class SmallConvolutions(InnerProblem):
    """Two convolutions of 16 channels on 64 digits."""

    full_steps = 60

    def make(self, draw: torch.Generator) -> None:
        self.x, self.y, *held_out = digits(64)
        self.held_out_x, self.held_out_y = (each[:200] for each in held_out)
        self.x, self.held_out_x = (each.view(-1, 1, 8, 8) for each in (self.x, self.held_out_x))
        self.start = {
            "c1": torch.randn(16, 1, 3, 3, generator=draw) / 3,
            "d1": torch.zeros(16),
            "c2": torch.randn(16, 16, 3, 3, generator=draw) / 12,
            "d2": torch.zeros(16),
            "w": torch.randn(10, 64, generator=draw) / 8,
            "b": torch.zeros(10),
        }
        self.outer = {"log_rate": self.log_rate()}
        self.draw_rows(64, draw)

    @abstractmethod
    def log_rate(self) -> Tensor:
        """The outer variable to begin with."""

    def network(self, params: Params, x: Tensor) -> Tensor:
        for layer in ("1", "2"):
            x = F.conv2d(x, params["c" + layer], params["d" + layer], padding=1)
            x = F.avg_pool2d(torch.relu(x), 2)
        return F.linear(x.flatten(1), params["w"], params["b"])

    def batch(self, outer: Params, step: int) -> Params:
        return self.of_step(step, x=self.x, y=self.y)

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        return F.cross_entropy(self.network(params, batch.get("x", self.x)), batch.get("y", self.y))

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        return F.cross_entropy(self.network(params, self.held_out_x), self.held_out_y)


@final
class LearnedRate(SmallConvolutions):
    """The learning rate of Adam."""

    optimizer = "adam"

    def log_rate(self) -> Tensor:
        return torch.tensor(math.log(3e-3))

    def learned_rate(self, outer: Params, step: int) -> Tensor:
        return outer["log_rate"].exp()


@final
class LearnedSchedule(SmallConvolutions):
    """A learning rate for each step of gradient descent."""

    scheduled = True

    def log_rate(self) -> Tensor:
        return torch.full((self.steps,), math.log(0.1))

    def learned_rate(self, outer: Params, step: int) -> Tensor:
        return outer["log_rate"][step].exp()


@final
class Distillation(InnerProblem):
    """Ten learned images for a ConvNet-3 of width 32, the last half of the steps differentiated."""

    full_steps, full_window, rate, width = 40, 20, 0.01, 32

    def make(self, draw: torch.Generator) -> None:
        self.y = torch.arange(10)
        self.held_out_x, self.held_out_y = (
            torch.randn(64, 3, 32, 32, generator=draw),
            labels(64, 10, draw),
        )
        self.start, channels = {}, 3
        for layer in "123":
            filters = torch.randn(self.width, channels, 3, 3, generator=draw)
            self.start["c" + layer] = filters / (9 * channels) ** 0.5
            self.start["d" + layer] = torch.zeros(self.width)
            self.start["g" + layer] = torch.ones(self.width)
            self.start["h" + layer] = torch.zeros(self.width)
            channels = self.width
        self.start["w"] = (
            torch.randn(10, 16 * self.width, generator=draw) / (16 * self.width) ** 0.5
        )
        self.start["b"] = torch.zeros(10)
        self.outer = {"x": torch.randn(10, 3, 32, 32, generator=draw)}
        self.draw_rows(10, draw)

    def network(self, params: Params, x: Tensor) -> Tensor:
        for layer in "123":
            x = F.conv2d(x, params["c" + layer], params["d" + layer], padding=1)
            x = F.group_norm(x, self.width, params["g" + layer], params["h" + layer])
            x = F.avg_pool2d(torch.relu(x), 2)
        return F.linear(x.flatten(1), params["w"], params["b"])

    def batch(self, outer: Params, step: int) -> Params:
        return {"x": outer["x"], **self.of_step(step, x=outer["x"], y=self.y)}

    def inner_loss(self, params: Params, batch: Params) -> Tensor:
        return F.cross_entropy(self.network(params, batch["x"]), batch.get("y", self.y))

    def outer_loss(self, params: Params, outer: Params) -> Tensor:
        return F.cross_entropy(self.network(params, self.held_out_x), self.held_out_y)


def digits(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`count` digits to train on and the others, in one fixed random order."""
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order[:count]], y[order[:count]], x[order[count:]], y[order[count:]]


def two_layers(params: Params, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    hidden = activation(F.linear(x, params["w1"], params["b1"]))
    return F.linear(hidden, params["w2"], params["b2"])


def weighted_loss(outputs: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    return (weights * F.cross_entropy(outputs, labels, reduction="none")).mean()


def labels(count: int, classes: int, draw: torch.Generator) -> Tensor:
    return torch.randint(0, classes, (count,), generator=draw)


#: By the name in the table.
PROBLEMS: dict[str, type[InnerProblem]] = {
    "tiny": TinyNetwork,
    "penalties": Penalties,
    "cleaning": LinearCleaning,
    "cleaning-mlp": NetworkCleaning,
    "maml": MAML,
    "rate": LearnedRate,
    "schedule": LearnedSchedule,
    "distillation": Distillation,
}
