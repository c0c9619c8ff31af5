"""A step that is run again is the same step: exact where it can be, else an error that says why."""

import collections
import functools
import itertools
import random
import time

import numpy as np
import pytest
import torch
from paths import KEEPING, PATHS, Weighted, follow, reference, weights
from problems import DTYPE, relative_error, seeded
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import bilevel


class Streamed(Weighted):
    """The examples of a step are the next ones of a stream."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def rows(self, step):
        return torch.as_tensor(self.stream())


def shuffled():
    loader = DataLoader(
        TensorDataset(torch.arange(20)), batch_size=5, shuffle=True, generator=seeded(1)
    )
    iterator = itertools.chain.from_iterable(itertools.repeat(loader))
    return lambda: next(iterator)[0]


def drawn_by_numpy():
    rng = np.random.default_rng(0)
    return lambda: rng.choice(20, 5, replace=False)


def drawn_by_python():
    random.seed(0)
    return lambda: random.sample(range(20), 5)


def popped():
    rows = [list(range(i, i + 5)) for i in range(16)]
    return rows.pop


def rotated():
    queue = collections.deque(range(20))
    return lambda: (queue.rotate(3), list(queue)[:5])[1]


def drawn_from_a_generator_of_its_own():
    generator = seeded(2)
    return lambda: torch.randperm(20, generator=generator)[:5]


STREAMS = [
    shuffled,
    drawn_by_numpy,
    drawn_by_python,
    popped,
    rotated,
    drawn_from_a_generator_of_its_own,
]


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("path", PATHS)
def test_a_stream_of_batches_is_differentiated_as_it_ran_or_refused(path, stream):
    outer = weights()
    if path not in (*KEEPING, "Reverse, recorded again"):
        with pytest.raises(bilevel.ProblemError, match=r"run again|made again|called again"):
            follow(path, Streamed(stream()), outer)
        return
    result = follow(path, Streamed(stream()), outer)
    expected = reference(Streamed(stream()), outer)
    assert result.stats.status == "ok"
    assert relative_error(result.loss, expected[0]) < 1e-12
    assert relative_error(result.grads, expected[1]) < 1e-8


def test_a_stream_that_lasts_just_long_enough_is_enough():
    outer = weights()
    rows = [list(range(i, i + 5)) for i in range(5)]
    result = follow("recorded graph", Streamed(rows.copy().pop), outer)
    expected = reference(Streamed(rows.copy().pop), outer)
    assert relative_error(result.grads, expected[1]) < 1e-8
    with pytest.raises(bilevel.ProblemError, match="IndexError"):
        follow("recursion, nothing kept", Streamed(rows.copy().pop), outer)


class Counting(Weighted):
    def setup(self):
        self.calls = 0

    def inner_loss(self, params, batch):
        self.calls += 1
        return super().inner_loss(params, batch) * (1 + 0.1 * self.calls)


class Clock(Weighted):
    def inner_loss(self, params, batch):
        return super().inner_loss(params, batch) * (1 + time.perf_counter() % 1)


class Noisy(Weighted):
    """Seen in the gradient alone where θ is 0."""

    def setup(self):
        self.rng = np.random.default_rng(0)

    def init(self, outer, *, generator):
        return {"theta": torch.zeros(4, dtype=DTYPE), "bias": torch.ones(1, dtype=DTYPE)}

    def inner_loss(self, params, batch):
        noise = torch.from_numpy(self.rng.standard_normal(4))
        return super().inner_loss(params, batch) + noise @ params["theta"]


class Averaging(Weighted):
    """A running average in a plain tensor, which is no buffer of a module."""

    def setup(self):
        self.average = torch.zeros(1, dtype=DTYPE)

    def predict(self, params, inputs):
        output = inputs @ params["theta"] + params["bias"]
        self.average.mul_(0.9).add_(0.1 * output.detach().mean())
        return output - self.average


class CountingHyperparameters(Weighted):
    def setup(self):
        self.calls = 0

    def hyperparameters(self, outer, step):
        self.calls += 1
        return {"lr": torch.tensor(0.1 * 0.95**self.calls, dtype=DTYPE)}


class CountingStepLoss(Weighted):
    def setup(self):
        self.calls = 0

    def step_loss(self, params, outer, step, *, generator):
        self.calls += 1
        return self.calls * (params["theta"] ** 2).sum()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("problem", "method"),
    [
        (Counting, "inner_loss"),
        (Clock, "inner_loss"),
        (Noisy, "inner_loss"),
        (Averaging, "inner_loss"),
        (CountingHyperparameters, "hyperparameters"),
        (CountingStepLoss, "step_loss"),
    ],
)
def test_a_method_that_gives_something_else_again_is_named(path, problem, method):
    optimizer = bilevel.optim.sgd if method == "hyperparameters" else None
    with pytest.raises(bilevel.ProblemError, match=f"{method} is no pure function.*gradcheck"):
        follow(path, problem(), weights(), optimizer=optimizer)


class InBuffer(nn.Module):
    """Assigned, not written in place."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        output = self.linear(x)
        self.mean = 0.5 * self.mean + 0.5 * output.detach().mean(0)
        return output - self.mean


class Network(Weighted):
    def __init__(self, module, call=functional_call):
        torch.manual_seed(0)
        super().__init__()
        module = module().double()
        self.start = {name: x.detach().clone() for name, x in module.named_parameters()}
        self.model = functools.partial(call, module)

    def init(self, outer, *, generator):
        return self.start

    def predict(self, params, inputs):
        return self.model(params, (inputs,))[:, 0]


def spectral(normalize):
    return lambda: nn.Sequential(normalize(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 1))


@pytest.mark.parametrize(
    ("module", "buffer"),
    [
        (InBuffer, r"model\[0\]\.mean"),
        (spectral(nn.utils.spectral_norm), r"model\[0\]\.0\.weight_u"),
        (spectral(nn.utils.parametrizations.spectral_norm), r"model\[0\]\.0\.parametrizations"),
    ],
)
@pytest.mark.parametrize("path", ["recorded graph", "recursion, nothing kept", "Forward"])
def test_a_module_that_changes_a_buffer_is_named_wherever_it_is_held(path, module, buffer):
    with pytest.raises(bilevel.ProblemError, match=f"changes the buffer Network.{buffer}"):
        follow(path, Network(module), weights())


@pytest.mark.parametrize(
    "normalize", [nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm]
)
def test_a_module_that_only_could_change_is_right(normalize):
    problem = Network(lambda: spectral(normalize)().eval())
    for path in ("recorded graph", "recursion, nothing kept"):
        result = follow(path, problem, weights())
        assert relative_error(result.grads, reference(problem, weights())[1]) < 1e-8


class Reused(Weighted):
    """Batches share one array, which is filled anew for every step."""

    def setup(self):
        self.array = np.empty((5, 4))

    def inner_batch(self, outer, step, *, generator):
        inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
        self.array[:] = inputs.numpy()
        return torch.from_numpy(self.array), targets, scale


class ReusedInGraph(Weighted):
    """The array is not in the batch, but in what its derivative needs."""

    def setup(self):
        self.array = np.empty(5)

    def inner_batch(self, outer, step, *, generator):
        inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
        self.array[:] = np.cos(np.arange(5) * (step + 1))
        return inputs, targets, scale * torch.from_numpy(self.array)


class Scaled(Weighted):
    """What `ReusedInGraph` means."""

    def inner_batch(self, outer, step, *, generator):
        inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
        return inputs, targets, scale * torch.cos(torch.arange(5, dtype=DTYPE) * (step + 1))


@pytest.mark.parametrize(("problem", "meant"), [(Reused, Weighted), (ReusedInGraph, Scaled)])
@pytest.mark.parametrize("path", PATHS)
def test_memory_that_is_written_over_is_noticed_where_it_matters(path, problem, meant):
    outer = weights()
    if path.startswith(("recursion", "forward over")) and path not in KEEPING:
        result = follow(path, problem(), outer)
        assert relative_error(result.grads, reference(meant(), outer)[1]) < 1e-8
    else:
        with pytest.raises(bilevel.ProblemError, match=r"memory|written to after|made again|NumPy"):
            follow(path, problem(), outer)


class Writing(Weighted):
    def inner_loss(self, params, batch):
        self.write(params, batch)
        return super().inner_loss(params, batch)


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda params, batch: params["theta"].data.mul_(1.001), "its params"),
        (lambda params, batch: batch[0].data.mul_(1.001), "its batch"),
        (lambda params, batch: batch[0].numpy().__imul__(1.001), "its batch"),
    ],
)
def test_a_loss_that_writes_behind_autograds_back_is_refused(write, what):
    problem = Writing()
    problem.write = write
    with pytest.raises(bilevel.ProblemError, match=f"writes to {what}"):
        follow("recorded graph", problem, weights())


class Cached(Weighted):
    """What does not depend on φ may be kept."""

    @functools.cached_property
    def order(self):
        return torch.arange(20).flip(0)

    def rows(self, step):
        return self.order[(5 * step) % 20 :][:5]


@pytest.mark.parametrize("path", PATHS)
def test_a_cache_of_constants_is_no_state(path):
    outer = weights()
    result = follow(path, Cached(), outer)
    assert result.stats.status == "ok"
    assert relative_error(result.grads, reference(Cached(), outer)[1]) < 1e-8


def test_a_sparse_batch_and_one_of_all_kinds_of_leaves_are_compared():
    class Mixed(Weighted):
        def inner_batch(self, outer, step, *, generator):
            inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
            others = {"array": np.arange(3), "name": "x", "none": None, "index": slice(2)}
            return inputs.to_sparse(), targets, scale, others

        def inner_loss(self, params, batch):
            return super().inner_loss(params, (batch[0].to_dense(), *batch[1:3]))

    outer = weights()
    result = follow("Forward", Mixed(), outer)
    assert relative_error(result.grads, reference(Weighted(), outer)[1]) < 1e-8


def test_a_loss_that_takes_something_out_of_its_batch_is_refused():
    class Taking(Weighted):
        def inner_batch(self, outer, step, *, generator):
            batch = super().inner_batch(outer, step, generator=generator)
            return dict(zip(("inputs", "targets", "scale"), batch, strict=True))

        def inner_loss(self, params, batch):
            rest = self.take(batch)
            return super().inner_loss(params, (batch["inputs"], batch["targets"], rest))

    problem = Taking()
    problem.take = lambda batch: batch.pop("scale")
    with pytest.raises(bilevel.ProblemError, match="takes something out of its batch"):
        follow("recorded graph", problem, weights())
    problem.take = lambda batch: dict(batch).pop("scale")
    assert follow("recorded graph", problem, weights()).stats.status == "ok"
