"""Keys: the same path gives the same bits, another path independent ones."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded

import bilevel

seeds = st.integers(-(2**70), 2**70)
parts = st.integers(0, 2**40) | st.text(max_size=4)
paths = st.lists(parts, min_size=1, max_size=4).map(tuple)


def bits(generator):
    return torch.randint(2**62, (4,), generator=generator)


@given(seeds, paths)
def test_the_same_path_gives_the_same_bits(seed, path):
    key, same = bilevel.Key(seed), bilevel.Key(seed)
    generator = key.generator(*path)
    expected = bits(generator)
    bits(key.generator("another", 1))
    assert torch.equal(bits(same.generator(*path)), expected)
    assert torch.equal(bits(key.generator(*path)), expected)
    assert not torch.equal(bits(generator), expected)  # a generator itself goes on
    assert key.fold(*path) == same.fold(*path)


@given(seeds, paths, paths)
def test_different_paths_give_different_bits(seed, one, other):
    key = bilevel.Key(seed)
    equal = torch.equal(bits(key.generator(*one)), bits(key.generator(*other)))
    assert equal == (one == other)


@given(seeds, seeds, paths)
def test_different_seeds_give_different_bits(one, other, path):
    equal = torch.equal(*(bits(bilevel.Key(seed).generator(*path)) for seed in (one, other)))
    assert equal == (one == other)


def test_a_path_is_more_than_its_characters():
    key = bilevel.Key(0)
    paths = [("a", 1), ("a1",), ("a", "1"), ("a", 1, ""), ("a, 1",), ("'a', 1",), (1, "a"), ("a",)]
    seeds = [key.fold(*path).seed for path in paths]
    assert len(set(seeds)) == len(paths)


def test_neighbouring_paths_are_uncorrelated():
    """Over 10,000 normal draws a correlation has standard deviation 0.01."""
    generators = [bilevel.Key(seed).generator("step", t) for seed in (0, 1) for t in range(5)]
    draws = torch.stack([torch.randn(10_000, generator=generator) for generator in generators])
    correlations = torch.corrcoef(draws) - torch.eye(10)
    assert float(correlations.abs().max()) < 0.05


@given(st.integers(0, 2**31))
def test_draw_takes_its_seed_from_the_generator(seed):
    generator = seeded(seed)
    first, second = bilevel.Key.draw(generator), bilevel.Key.draw(generator)
    assert first == bilevel.Key.draw(seeded(seed))
    assert first != second
    assert first.device == generator.device
    before = torch.get_rng_state()
    bilevel.Key.draw(generator)
    assert torch.equal(torch.get_rng_state(), before)


def test_draw_without_a_generator_uses_the_global_one():
    torch.manual_seed(3)
    first = bilevel.Key.draw()
    assert first != bilevel.Key.draw()
    torch.manual_seed(3)
    assert first == bilevel.Key.draw()
