"""Federated hypergradients: clients keep their digits, the server averages what they send.

Ten clients hold three kinds of digit each, and each numbers its own 0, 1, 2: no one model suits
all. Outer variables: a common initialisation and log learning rate from which five steps on a
client's own digits suffice. In each round every client rolls its own inner loop and sends its
hypergradient; the server steps along the mean. This mean is the hypergradient of the mean outer
loss, so nothing is lost by keeping the data apart.

Estimator: `Adjoint`: the initialisation is an outer variable, on which an inner optimum does not
depend, so `Implicit` has nothing to say; the runs are short. `FiniteDifference` needs no second
derivative on the clients, which may matter on small devices. Federated averaging sends as much and
differentiates nothing, but finds one model for all.
"""

import argparse
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import bilevel
from bilevel.estimators import Adjoint, Estimator, FiniteDifference

STEPS = 5
NETWORK = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3))
Outer = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


class Client(bilevel.Problem):
    """A few steps from the common initialisation on one client's training digits."""

    def __init__(self, training: Batch, test: Batch) -> None:
        self.training, self.test = training, test

    def init(self, outer: Outer, *, generator: torch.Generator) -> Outer:
        return {name: value for name, value in outer.items() if name != "log_rate"}

    def inner_batch(self, outer: Outer, step: int, *, generator: torch.Generator) -> Batch:
        drawn = torch.randint(len(self.training[1]), (16,), generator=generator)
        return self.training[0][drawn], self.training[1][drawn]

    def hyperparameters(self, outer: Outer, step: int) -> Outer:
        return {"lr": outer["log_rate"].exp()}

    def inner_loss(self, params: Outer, batch: Batch) -> Tensor:
        return cross_entropy(functional_call(NETWORK, params, (batch[0],)), batch[1])

    def outer_loss(self, params: Outer, outer: Outer, batch: Batch) -> Tensor:
        return self.inner_loss(params, batch)

    def accuracy(self, outer: Outer, steps: int, seed: int = 0) -> float:
        """On the client's test digits, after `steps` local steps."""
        params = self.adapt(outer, steps, seed) if steps else self.init(outer, generator=None)
        scores = functional_call(NETWORK, params, (self.test[0],))
        return float((scores.argmax(1) == self.test[1]).float().mean())

    def adapt(self, outer: Outer, steps: int, seed: int) -> Outer:
        """The parameters after `steps` local steps from the common initialisation."""
        inner = bilevel.InnerLoop(self, bilevel.optim.sgd)
        run = bilevel.record(inner, outer, bilevel.Key(seed), steps=steps)
        return inner.unravel(run.kept[steps].params)


def federated_averaging(clients: list[Client], outer: Outer, rounds: int) -> Outer:
    """McMahan et al., arXiv 1602.05629: the mean of the clients' parameters, round after round."""
    for number in range(rounds):
        found = [client.adapt(outer, STEPS, number) for client in clients]
        mean = {name: torch.stack([params[name] for params in found]).mean(0) for name in found[0]}
        outer = {**outer, **mean}
    return outer


def federated_hypergradients(
    clients: list[Client], outer: Outer, rounds: int, estimator: Estimator
) -> Outer:
    """An outer step along the mean of the clients' hypergradients in each round."""
    outer = {name: value.clone().requires_grad_() for name, value in outer.items()}
    server = torch.optim.Adam(outer.values(), lr=0.03)
    hypergradients = [
        bilevel.Hypergradient(client, bilevel.optim.sgd, STEPS, estimator=estimator)
        for client in clients
    ]
    for _ in range(rounds):
        server.zero_grad()
        for client, hypergradient in zip(clients, hypergradients, strict=True):
            hypergradient.backward(outer, client.training)  # adds to .grad
        for value in outer.values():
            value.grad /= len(clients)
        server.step()
    return {name: value.detach() for name, value in outer.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".png"))
    options = parser.parse_args()
    rounds = 15 if options.quick else 50

    torch.manual_seed(0)
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    images = images.float() / 16
    clients = []
    for _ in range(10):
        names = torch.full((10,), -1)  # what this client calls each kind of digit, if it has it
        names[torch.randperm(10)[:3]] = torch.arange(3)
        own = (names[labels] >= 0).nonzero()[:, 0]
        own = own[torch.randperm(len(own))].split([30, 100, len(own) - 130])
        clients.append(Client(*((images[part], names[labels[part]]) for part in own[:2])))
    start = bilevel.fresh_parameters(NETWORK, torch.Generator().manual_seed(0))
    start["log_rate"] = torch.tensor(-1.0)

    print(f"{'method':<34}{'CPU seconds':>13}{'common model':>14}{'personalised':>14}")
    axes = (figure := Figure(layout="constrained")).subplots()
    began = time.process_time()
    for name, method in (
        ("local steps alone", lambda: start),
        ("federated averaging", lambda: federated_averaging(clients, start, rounds)),
        (
            "hypergradients, Adjoint",
            lambda: federated_hypergradients(clients, start, rounds, Adjoint()),
        ),
        (
            "hypergradients, FiniteDifference",
            lambda: federated_hypergradients(clients, start, rounds, FiniteDifference()),
        ),
    ):
        torch.manual_seed(1)
        began = time.process_time()
        outer = method()
        seconds = time.process_time() - began
        scores = [
            sum(client.accuracy(outer, steps) for client in clients) / len(clients)
            for steps in range(2 * STEPS + 1)
        ]
        print(f"{name:<34}{seconds:>13.1f}{scores[0]:>14.3f}{scores[STEPS]:>14.3f}")
        axes.plot(scores, label=name)
    axes.set(xlabel="local steps", ylabel="mean accuracy on a client's own test digits")
    axes.legend()
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
