"""All of PyTorch inside: attention, networks that recur, Functions of one's own; or a sentence."""

import pytest
import torch
from paths import PATHS, Weighted, follow, reference, weights
from problems import DTYPE, randn, relative_error, seeded
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import bilevel
from bilevel.estimators import Adjoint, FiniteDifference, Forward, Implicit, LowRank, Reverse

every_path = pytest.mark.parametrize("path", PATHS)


class Sequences(bilevel.Problem):
    """Classify sequences with learned weights by a network of some kind."""

    def __init__(self, make):
        torch.manual_seed(0)
        self.network = make().double()
        self.start = {k: v.detach().clone() for k, v in self.network.named_parameters()}
        generator = seeded(1)
        self.inputs, self.labels = randn(6, 5, 4, generator=generator), torch.arange(6) % 3
        self.test, self.test_labels = randn(4, 5, 4, generator=generator), torch.arange(4) % 3

    def init(self, outer, *, generator):
        return self.start

    def inner_batch(self, outer, step, *, generator):
        return torch.sigmoid(outer["weights"])

    def scores(self, params, inputs):
        output = functional_call(self.network, params, (inputs,))
        output = output[0] if isinstance(output, tuple) else output
        return output.mean(1)[:, :3]

    def inner_loss(self, params, batch):
        losses = F.cross_entropy(self.scores(params, self.inputs), self.labels, reduction="none")
        return (batch * losses).mean()

    def outer_loss(self, params, outer, batch):
        return F.cross_entropy(self.scores(params, self.test), self.test_labels)


def six_weights():
    return {"weights": randn(6, generator=seeded(2))}


class Attention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class CausalTransformer(nn.Module):
    """Two layers of masked self-attention with learned positions, as language models have."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(5, 4))
        self.layers = nn.ModuleList(
            nn.ModuleDict({"qkv": nn.Linear(4, 12), "up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x = x + self.positions
        for layer in self.layers:
            query, key, value = (
                part.unflatten(2, (2, 2)).transpose(1, 2)
                for part in layer["qkv"](self.norm(x)).chunk(3, dim=2)
            )
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + mixed.transpose(1, 2).flatten(2)
            x = x + layer["down"](F.gelu(layer["up"](self.norm(x))))
        return x


class ViT(nn.Module):
    """A class token before the patches, and PyTorch's own encoder, as in training and in eval."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 4))
        self.embed = nn.Linear(4, 4)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)

    def forward(self, x):
        x = torch.cat([self.token.expand(len(x), 1, 4), self.embed(x)], dim=1)
        return self.encoder(x)[:, :1]


NETWORKS = {
    "attention": lambda: Attention(4, 2, batch_first=True),
    "causal transformer": CausalTransformer,
    "ViT": ViT,
    "ViT in eval mode": lambda: ViT().eval(),
    "GRU": lambda: nn.GRU(4, 3, batch_first=True),
    "LSTM": lambda: nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True),
}


@every_path
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds_are_exact(path, name):
    problem, outer = Sequences(NETWORKS[name]), six_weights()
    result = follow(path, problem, outer, (0, 3), steps=3)
    with sdpa_kernel(SDPBackend.MATH):
        loss, grads = reference(problem, outer, (0, 3))
    assert result.stats.status == "ok"
    assert relative_error(result.loss, loss) < 1e-10
    assert relative_error(result.grads, grads) < 1e-8


@pytest.mark.parametrize(
    "estimator", [Implicit(damping=1.0), LowRank(guard=None), FiniteDifference()]
)
def test_attention_in_the_other_estimators(estimator):
    problem = Sequences(NETWORKS["causal transformer"])
    hypergradient = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.1), 3, None, estimator)
    assert bool(torch.isfinite(hypergradient(six_weights()).grads["weights"]).all())


class Cube(torch.autograd.Function):
    """Twice differentiable, but not by torch.func."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class WrongCube(torch.autograd.Function):
    """The derivative is computed in advance, so its own derivative is lost."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(3 * x**2)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad


class Through(Weighted):
    """The model's output goes through some function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def predict(self, params, inputs):
        return self.function(inputs @ params["theta"] + 0.1 * params["bias"])


def by_torch_func(path):
    return path.startswith(("forward over", "Forward"))


@every_path
def test_a_function_of_ones_own_is_exact_or_told_what_it_lacks(path):
    problem, outer = Through(Cube.apply), weights()
    if by_torch_func(path):
        with pytest.raises(bilevel.ProblemError, match=r"setup_context.*Adjoint\(\)"):
            follow(path, problem, outer)
        return
    result = follow(path, problem, outer)
    assert result.stats.status == "ok"
    assert relative_error(result.grads, reference(problem, outer)[1]) < 1e-8


@pytest.mark.parametrize("path", [path for path in PATHS if not by_torch_func(path)])
def test_a_function_with_a_wrong_second_derivative_is_never_ok(path):
    result = follow(path, Through(WrongCube.apply), weights())
    assert "custom torch.autograd.Function (WrongCube)" in result.stats.status


class HeldBack(Weighted):
    """A stop-gradient, in two spellings."""

    def __init__(self, hold):
        super().__init__()
        self.hold = hold

    def predict(self, params, inputs):
        output = inputs @ params["theta"] + params["bias"]
        return torch.tanh(output - self.hold(output).mean())


@torch.no_grad()
def without_grad(x):
    return x * 1


@every_path
@pytest.mark.parametrize("hold", [torch.Tensor.detach, without_grad])
def test_what_is_held_back_is_held_back_in_every_mode(path, hold):
    problem, outer = HeldBack(hold), weights()
    if by_torch_func(path) and hold is without_grad:
        with pytest.raises(bilevel.ProblemError, match=r"held back by torch\.no_grad"):
            follow(path, problem, outer)
        return
    result = follow(path, problem, outer)
    assert result.stats.status == "ok"
    assert relative_error(result.grads, reference(problem, outer)[1]) < 1e-8


def test_what_is_held_back_in_the_batch_is_told_to_forward_mode_alone():
    class Normalised(Weighted):
        def inner_batch(self, outer, step, *, generator):
            inputs, targets, scale = super().inner_batch(outer, step, generator=generator)
            return inputs, targets, scale / without_grad(scale).sum()

    outer = weights()
    with pytest.raises(bilevel.ProblemError, match=r"held back by torch\.no_grad"):
        follow("Forward", Normalised(), outer)
    result = follow("forward over reverse", Normalised(), outer)
    assert relative_error(result.grads, reference(Normalised(), outer)[1]) < 1e-8


def checkpointed(x):
    return checkpoint(torch.tanh, x, use_reentrant=False)


def distances(x):
    return torch.cdist(x[:, None], x[:, None] + 1).mean(0)


def flash(x):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        x = x.float()[None, None, :, None].repeat(1, 1, 1, 8)
        return F.scaled_dot_product_attention(x, x, x)[0, 0, :, 0].double()


@pytest.mark.parametrize(
    ("function", "estimator", "words"),
    [
        (flash, Adjoint(), "_scaled_dot_product_flash_attention"),
        (flash, Reverse(), "_scaled_dot_product_flash_attention"),
        (flash, Forward(), "_scaled_dot_product_flash_attention"),
        (distances, Adjoint("forward"), "_cdist_forward"),
        (distances, Forward(), "_cdist_forward"),
        (checkpointed, Adjoint("forward"), r"torch\.utils\.checkpoint"),
        (Cube.apply, Forward(), "setup_context"),
    ],
)
def test_a_missing_derivative_is_named_with_a_way_out(function, estimator, words):
    hypergradient = bilevel.Hypergradient(
        Through(function), bilevel.optim.sgd(0.01), 2, None, estimator
    )
    with pytest.raises(bilevel.ProblemError, match=words) as caught:
        hypergradient(weights())
    assert "Adjoint()" in str(caught.value)


def test_checkpointing_is_exact_where_it_works():
    outer = weights()
    result = follow("recursion, nothing kept", Through(checkpointed), outer)
    assert relative_error(result.grads, reference(Through(torch.tanh), outer)[1]) < 1e-8
    assert result.grads["weights"].dtype == DTYPE
