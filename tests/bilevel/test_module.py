"""Modules as inner models: fresh parameters by each layer's own initialisation."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded
from torch import nn
from torch.func import functional_call

import bilevel
from bilevel.random import DrawsFrom

seeds = st.integers(0, 2**31)


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


@given(seeds)
def test_the_same_generator_gives_the_same_bits_and_nothing_else_moves(seed):
    module = network()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    generator = seeded(seed)
    first = bilevel.fresh_parameters(module, generator)
    second = bilevel.fresh_parameters(module, generator)
    again = bilevel.fresh_parameters(module, seeded(seed))
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], second["0.weight"])
    assert not torch.equal(first["4.bias"], second["4.bias"])


def test_they_fit_the_module_and_carry_no_graph():
    module = network()
    params = bilevel.fresh_parameters(module, seeded(0))
    shapes = {name: value.shape for name, value in module.named_parameters()}
    assert {name: value.shape for name, value in params.items()} == shapes
    assert not any(value.requires_grad for value in params.values())
    assert functional_call(module, params, (torch.ones(5, 2, 4, 4),)).shape == (5, 3)


@settings(max_examples=10)
@given(seeds)
def test_the_distribution_is_the_modules_own(seed):
    """What construction under the same seed gives: layers are initialised in the same order."""
    seed_used = int(torch.randint(2**62, (), generator=seeded(seed)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_used)
        expected = dict(network().named_parameters())
    params = bilevel.fresh_parameters(network(), seeded(seed))
    assert all(torch.equal(params[name], expected[name]) for name in expected)


def test_what_the_module_holds_has_no_influence():
    module = network()
    expected = bilevel.fresh_parameters(module, seeded(0))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(float("nan"))
    params = bilevel.fresh_parameters(module, seeded(0))
    assert all(torch.equal(params[name], expected[name]) for name in expected)


def test_dtype_defaults_to_the_modules():
    params = bilevel.fresh_parameters(network().double(), seeded(0))
    assert {value.dtype for value in params.values()} == {torch.float64}
    asked = bilevel.fresh_parameters(network(), seeded(0), dtype=torch.float64, device="cpu")
    assert {value.dtype for value in asked.values()} == {torch.float64}


def test_tied_parameters_stay_tied():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    params = bilevel.fresh_parameters(module, seeded(0))
    assert params.keys() == {"0.weight", "0.bias", "1.bias"}
    x = torch.ones(1, 3)
    hidden = x @ params["0.weight"].T + params["0.bias"]
    expected = hidden @ params["0.weight"].T + params["1.bias"]
    torch.testing.assert_close(functional_call(module, params, (x,)), expected)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_a_layer_that_cannot_initialise_itself_is_named():
    nested, bare = nn.Sequential(nn.Linear(2, 2), nn.Sequential(Scale())), Scale()
    state = torch.get_rng_state()
    with pytest.raises(bilevel.ProblemError, match=r"layer '1\.0' \(Scale\).*reset_parameters"):
        bilevel.fresh_parameters(nested, seeded(0))
    with pytest.raises(bilevel.ProblemError, match=r"\(root\).*Scale.*lambda: Net"):
        bilevel.fresh_parameters(bare, seeded(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(bilevel.fresh_parameters(Scale, seeded(0))["scale"], torch.ones(3))


# What is frozen stays.


def test_frozen_parameters_are_left_out_and_stay_in_use():
    module = network()
    module[0].requires_grad_(False)
    module[4].bias.requires_grad_(False)
    before = copy.deepcopy(module.state_dict())
    params = bilevel.fresh_parameters(module, seeded(0))
    assert params.keys() == {"1.weight", "1.bias", "4.weight"}
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    x = torch.randn(5, 2, 4, 4, generator=seeded(1))
    norm = {"weight": params["1.weight"], "bias": params["1.bias"]}
    hidden = module[2:4](functional_call(module[1], norm, (module[0](x),)))
    expected = hidden @ params["4.weight"].T + module[4].bias
    torch.testing.assert_close(functional_call(module, params, (x,)), expected)


def test_a_frozen_part_may_hold_anything_and_need_not_know_how_to_draw_it():
    module = nn.Sequential(Scale(), nn.Linear(3, 2))
    nn.init.constant_(module[0].scale, 7.0)
    module[0].requires_grad_(False)
    assert bilevel.fresh_parameters(module, seeded(0)).keys() == {"1.weight", "1.bias"}
    assert torch.equal(module[0].scale, torch.full((3,), 7.0))


def test_a_layer_that_initialises_all_of_its_parts_does_not_touch_a_frozen_one():
    module = nn.Transformer(4, 2, 1, 1, 8, batch_first=True)
    nn.init.constant_(module.encoder.layers[0].linear1.weight, 7.0)
    module.encoder.requires_grad_(False)
    params = bilevel.fresh_parameters(module, seeded(0))
    assert not any(name.startswith("encoder") for name in params)
    assert bool((module.encoder.layers[0].linear1.weight == 7).all())


def test_a_run_trains_what_is_not_frozen():
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    module[0].requires_grad_(False)
    before = module[0].weight.clone()

    class Fit(bilevel.Problem):
        def init(self, outer, *, generator):
            return bilevel.fresh_parameters(module, generator)

        def inner_batch(self, outer, step, *, generator):
            return outer

        def inner_loss(self, params, batch):
            return (functional_call(module, params, (batch,)) ** 2).mean()

        def outer_loss(self, params, outer, batch):
            return (params["2.weight"] ** 2).sum()

    outer = torch.randn(4, 3, dtype=torch.float64, generator=seeded(0))
    result = bilevel.Hypergradient(Fit(), bilevel.optim.sgd(0.1), 3)(outer, None, seeded(0))
    assert result.params.keys() == {"2.weight", "2.bias"}
    assert result.stats.status == "ok"
    assert torch.equal(module[0].weight, before)


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)])
def test_nothing_to_train_is_an_error(module):
    for given_ in (module, lambda: module):
        with pytest.raises(bilevel.ProblemError, match="no parameter to train"):
            bilevel.fresh_parameters(given_, seeded(0))


# A module's own initialisation.


class Custom(nn.Module):
    """Every idiom of a custom initialisation, in a constructor."""

    def __init__(self, width=32):
        super().__init__()
        self.first, self.second, self.head = (
            nn.Linear(4, width),
            nn.Linear(width, width),
            nn.Linear(width, 1),
        )
        self.token = nn.Parameter(torch.randn(width))
        self.drawn = nn.Parameter(torch.normal(torch.zeros(3), torch.ones(3)))
        nn.init.orthogonal_(self.first.weight)
        self.second.weight.data.normal_(0.0, 0.02)
        nn.init.zeros_(self.head.weight)
        with torch.no_grad():
            self.second.bias.copy_(torch.rand(width) + torch.randint(3, (width,)))
            self.head.bias.bernoulli_(0.5)


@given(seeds)
@settings(max_examples=10)
def test_a_function_that_builds_a_module_gives_its_own_initialisation(seed):
    seed_used = int(torch.randint(2**62, (), generator=seeded(seed)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_used)
        expected = dict(Custom().named_parameters())
    state = torch.get_rng_state()
    for make in (Custom, lambda: Custom(32)):
        params = bilevel.fresh_parameters(make, seeded(seed))
        assert params.keys() == expected.keys()
        assert all(torch.equal(params[name], expected[name]) for name in expected)
        assert not any(value.requires_grad for value in params.values())
    assert torch.equal(state, torch.get_rng_state())


def test_what_a_function_freezes_is_left_out():
    def make():
        module = Custom()
        module.first.requires_grad_(False)
        return module

    params = bilevel.fresh_parameters(make, seeded(0))
    assert "first.weight" not in params
    assert bool((params["head.weight"] == 0).all())


def custom(change):
    def make():
        module = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 2))
        change(module)
        return module

    return make


def gelu_scale(module):
    module[0].weight.data.mul_(0.5)


def convolutions_of_resnet(module):
    nn.init.kaiming_normal_(module[0].weight, nonlinearity="relu")


def zero_head(module):
    nn.init.zeros_(module[2].weight)


def constant_bias(module):
    nn.init.constant_(module[2].bias, 0.1)


def small_norm(module):
    module[1].weight.data.fill_(0.1)


def truncated(module):
    nn.init.trunc_normal_(module[0].weight, std=0.02)


def orthogonal(module):
    nn.init.orthogonal_(module[0].weight)


def xavier(module):
    nn.init.xavier_uniform_(module[0].weight)


def shifted(module):
    module[0].bias.data.add_(0.3)


def replaced(module):
    module[2].weight = nn.Parameter(torch.eye(30)[:2])


def trained(module):
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(torch.ones(3, 40)).sum().backward()
    optimizer.step()


def sparse(module):
    nn.init.sparse_(module[0].weight, 0.5)


CHANGES = [
    gelu_scale, convolutions_of_resnet, zero_head, constant_bias, small_norm, truncated,
    orthogonal, xavier, shifted, replaced, trained, sparse,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_another_initialisation_is_refused_where_it_cannot_be_repeated(change):
    make = custom(change)
    with pytest.raises(
        bilevel.ProblemError, match=r"parameter '[012]\.(weight|bias)' is not.*lambda"
    ):
        bilevel.fresh_parameters(make(), seeded(0))
    with pytest.raises(bilevel.ProblemError, match="is not what its layer's"):
        bilevel.fresh_parameters(copy.deepcopy(make()), seeded(0))
    assert len(bilevel.fresh_parameters(make, seeded(0))) == 6


STOCK = {
    "mlp": lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)),
    "one": lambda: nn.Linear(1, 1),
    "convolutions": lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.PReLU()),
    "recurrent": lambda: nn.LSTM(3, 5, num_layers=2),
    "embedding": lambda: nn.Embedding(7, 3, padding_idx=0),
    "attention": lambda: nn.Transformer(4, 2, 2, 1, 8, batch_first=True),
    "bfloat16": lambda: nn.Linear(30, 20).to(torch.bfloat16),
    "wide": lambda: nn.Linear(400, 400),
}


@pytest.mark.parametrize("name", STOCK)
def test_stock_layers_are_never_refused(name):
    for seed in range(20):
        torch.manual_seed(seed)
        bilevel.fresh_parameters(STOCK[name](), seeded(seed))


def test_a_module_is_looked_at_again_after_it_has_changed():
    module = custom(lambda module: None)()
    bilevel.fresh_parameters(module, seeded(0))
    zero_head(module)
    with pytest.raises(bilevel.ProblemError, match=r"'2\.weight' is not"):
        bilevel.fresh_parameters(module, seeded(0))


@pytest.mark.parametrize("wrong", [lambda: 3, 3, "net", lambda: nn.LazyLinear(3)])
def test_what_is_no_module(wrong):
    with pytest.raises(bilevel.ProblemError, match="module"):
        bilevel.fresh_parameters(wrong, seeded(0))


def test_an_initialisation_by_numpy_is_its_own():
    def make():
        module = nn.Linear(3, 2)
        module.weight.data.copy_(torch.from_numpy(np.full((2, 3), 0.25)))
        return module

    assert bool((bilevel.fresh_parameters(make, seeded(0))["weight"] == 0.25).all())


# Threads.


@pytest.mark.parametrize("kind", ["module", "function"])
def test_threads_do_not_disturb_each_other_nor_the_global_generator(kind):
    given_ = network() if kind == "module" else Custom
    expected = [bilevel.fresh_parameters(given_, seeded(seed)) for seed in range(24)]
    stop = threading.Event()
    torch.manual_seed(0)
    alone = torch.rand(2000)
    torch.manual_seed(0)
    drawn = []

    def draw_globally():
        while len(drawn) < 2000:
            drawn.append(torch.rand(()))
        stop.set()

    def draw(seed):
        return bilevel.fresh_parameters(given_, seeded(seed))

    outsider = threading.Thread(target=draw_globally)
    outsider.start()
    with ThreadPoolExecutor(6) as pool:
        rounds = [list(pool.map(draw, range(24)))]
        while not stop.is_set():
            rounds.append(list(pool.map(draw, range(24))))
    outsider.join()
    for found in rounds:
        for one, other in zip(found, expected, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)
    assert torch.equal(torch.stack(drawn), alone)


DRAWS = {
    "randn": lambda: torch.randn(3),
    "rand": lambda: torch.rand(3),
    "randint": lambda: torch.randint(9, (3,)),
    "randint between": lambda: torch.randint(3, 9, (3,)),
    "randperm": lambda: torch.randperm(9),
    "randn_like": lambda: torch.randn_like(torch.zeros(3)),
    "rand_like": lambda: torch.rand_like(torch.zeros(3)),
    "randint_like": lambda: torch.randint_like(torch.zeros(3), 9),
    "normal": lambda: torch.normal(0.0, 1.0, (3,)),
    "bernoulli": lambda: torch.bernoulli(torch.full((9,), 0.5)),
    "multinomial": lambda: torch.multinomial(torch.ones(9), 4),
    "dropout": lambda: nn.functional.dropout(torch.ones(9)),
    "exponential_": lambda: torch.zeros(3).exponential_(),
    "random_": lambda: torch.zeros(3).random_(9),
    "gamma": lambda: torch.distributions.Gamma(2.0, 2.0).sample((3,)),
    "truncated": lambda: nn.init.trunc_normal_(torch.zeros(3)),
}


@pytest.mark.parametrize("name", DRAWS)
@given(seeds)
@settings(max_examples=3)
def test_draws_are_those_of_a_global_generator_with_that_seed(name, seed):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        expected = [DRAWS[name]() for _ in range(3)]
    state = torch.get_rng_state()
    with DrawsFrom(seed):
        found = [DRAWS[name]() for _ in range(3)]
    assert all(map(torch.equal, found, expected))
    assert torch.equal(state, torch.get_rng_state())


def test_a_generator_that_the_code_names_is_used():
    expected = torch.randn(3, generator=seeded(5)), torch.zeros(3).normal_(generator=seeded(5))
    with DrawsFrom(0):
        found = torch.randn(3, generator=seeded(5)), torch.zeros(3).normal_(generator=seeded(5))
    assert all(map(torch.equal, found, expected))
