"""Modules as inner models: fresh parameters by each layer's own initialisation."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import seeded
from torch import nn
from torch.func import functional_call

import bilevel

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
    with pytest.raises(bilevel.ProblemError, match=r"\(root\).*Scale"):
        bilevel.fresh_parameters(bare, seeded(0))
    assert torch.equal(torch.get_rng_state(), state)
