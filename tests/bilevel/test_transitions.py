"""Stage transitions: when a stage ends, that none comes back, and what is said about it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bilevel
from bilevel.truncation import ByFraction, ByMetric, Stage

metrics = st.lists(st.floats(0, 1), min_size=0, max_size=150)
references = st.sampled_from(["best", "previous"])


def observe(transition, values, name="held_out_accuracy"):
    """The stage after each value."""
    stages = []
    for value in values:
        transition.update({name: value, "loss": 1.0})
        stages.append(transition.stage)
    return stages


@st.composite
def by_metrics(draw):
    return ByMetric(
        gain=(draw(st.floats(0.001, 0.3)), draw(st.floats(0.001, 0.3))),
        patience=(draw(st.integers(1, 6)), draw(st.integers(1, 6))),
        block=draw(st.integers(1, 5)),
        reference=draw(references),
    )


@given(by_metrics(), metrics)
def test_stages_never_go_back_and_none_is_skipped(transition, values):
    stages = [Stage.EARLY, *observe(transition, values)]
    assert all(0 <= after - before <= 1 for before, after in itertools.pairwise(stages))


@given(references, st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.floats(0, 1))
def test_a_constant_metric_ends_each_stage_after_its_patience(
    reference, early, middle, block, value
):
    """One block is the reference, `patience` more are without gain; then the same again."""
    transition = ByMetric(patience=(early, middle), block=block, reference=reference)
    first = block * (1 + early)
    second = first + block * (1 + middle)
    stages = observe(transition, [value] * (second + 50))
    assert stages.index(Stage.MIDDLE) == first - 1
    assert stages.index(Stage.LATE) == second - 1


@given(st.integers(2, 8), st.integers(1, 4), st.booleans())
def test_a_slow_rise_keeps_a_stage_if_it_earns_the_gain_within_the_patience(
    patience, block, fast_enough
):
    """The metric needs `patience` blocks for one gain, or one block more than that."""
    gain = 0.01
    slope = 1.001 * gain / (patience if fast_enough else patience + 1)
    values = [slope * index for index in range(400) for _ in range(block)]
    stages = observe(ByMetric(gain=(gain, gain), patience=(patience, 1), block=block), values)
    assert (stages[-1] == Stage.EARLY) == fast_enough
    literal = ByMetric(gain=(gain, gain), patience=(patience, 1), block=block, reference="previous")
    assert observe(literal, values).index(Stage.MIDDLE) == block * (1 + patience) - 1


@given(st.integers(2, 6), st.integers(1, 40))
def test_a_gain_in_one_block_starts_the_patience_anew(patience, jump):
    values = [0.5] * (1 + jump) + [0.6] * 100
    stages = observe(ByMetric(gain=(0.05, 0.05), patience=(patience, 50), block=1), values)
    expected = patience if jump >= patience else jump + 1 + patience
    assert stages.index(Stage.MIDDLE) == expected


def test_a_block_is_judged_by_its_mean():
    noisy = [0.5 + 0.2 * (-1) ** index for index in range(2 * 4)]
    stages = observe(ByMetric(gain=(0.01, 0.01), patience=(3, 3), block=2), noisy)
    assert stages == [Stage.EARLY] * 7 + [Stage.MIDDLE]


@given(by_metrics(), metrics)
def test_a_metric_of_which_less_is_better_is_the_negative_of_one_of_which_more_is(rising, values):
    configuration = {k: v for k, v in vars(rising).items() if k not in ("metrics", "_state")}
    falling = ByMetric(**{**configuration, "better": "smaller"})
    stages = observe(falling, [-value for value in values])
    assert stages == observe(rising, values)
    assert falling.report().get("gain") == rising.report().get("gain")


def test_a_falling_loss_keeps_a_stage():
    values = [3 - 0.2 * index for index in range(12)]
    for name, options, goes_on in (
        ("loss", {}, True),
        ("error", {"better": "smaller"}, True),
        ("error", {}, False),
        ("loss", {"better": "larger"}, False),
    ):
        transition = ByMetric(name, patience=(3, 3), block=1, **options)
        for value in values:
            transition.update({name: value})
        assert (transition.stage == Stage.EARLY) == goes_on


def test_the_end_of_a_stage_is_reported_with_its_numbers():
    transition = ByMetric("accuracy", gain=(0.015, 0.01), patience=(2, 9), block=2)
    said = [transition.update({"accuracy": v}) for v in [0.25, 0.25, 0.26, 0.26, 0.254, 0.256]]
    assert said[:-1] == [None] * 5
    for part in ("early", "middle", "accuracy", "2 blocks of 2", "0.015", "0.2550", "+0.0050"):
        assert part in said[-1]
    assert transition.report()["stage"] == Stage.MIDDLE


def test_the_report_shows_the_gain_against_the_threshold():
    transition = ByMetric(gain=(0.02, 0.01), patience=(7, 9), block=1)
    assert "gain" not in transition.report()
    observe(transition, [0.25, 0.26])
    shown = transition.report()
    assert shown["metric"] == 0.26
    assert shown["gain"] == pytest.approx(0.01)
    assert (shown["gain_wanted"], shown["blocks_without_gain"], shown["patience"]) == (0.02, 1, 7)
    observe(transition, [0.29])
    assert transition.report()["gain"] == pytest.approx(0.04)
    assert transition.report()["blocks_without_gain"] == 0


@given(by_metrics(), metrics, metrics)
def test_the_state_of_by_metric_round_trips(transition, before, after):
    configuration = {k: v for k, v in vars(transition).items() if not k.startswith("_")}
    other = ByMetric(**{k: v for k, v in configuration.items() if k != "metrics"})
    observe(transition, before)
    other.load_state_dict(transition.state_dict())
    assert observe(other, after) == observe(transition, after)
    assert other.report() == transition.report()
    assert {k: v for k, v in vars(transition).items() if not k.startswith("_")} == configuration


fractions = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


@given(fractions, st.lists(st.floats(0, 1), min_size=1))
def test_by_fraction_follows_the_furthest_progress(bounds, progress):
    """Also where a run is made longer, so that less of it is done."""
    transition = ByFraction(*bounds)
    for index, value in enumerate(progress):
        before = transition.stage
        said = transition.update({"progress": value})
        furthest = max(progress[: index + 1])
        assert transition.stage == sum(furthest >= bound for bound in bounds)
        assert (said is not None) == (transition.stage != before)
    other = ByFraction(*bounds)
    other.load_state_dict(transition.state_dict())
    assert other.stage == transition.stage
    assert other.report() == {"stage": transition.stage}


def test_by_fraction_says_where_a_stage_began():
    transition = ByFraction()
    assert transition.update({"progress": 0.2}) is None
    said = transition.update({"progress": 0.35})
    assert "early" in said
    assert "middle" in said
    assert "35.0 %" in said


@pytest.mark.parametrize(
    ("transition", "name"),
    [(ByMetric(), "held_out_accuracy"), (ByMetric("recall"), "recall"), (ByFraction(), "progress")],
)
def test_a_metric_that_is_missing_or_no_number_is_named(transition, name):
    assert tuple(transition.metrics) == (name,)
    with pytest.raises(bilevel.ConfigurationError, match=rf"'{name}'.*\['loss'\]"):
        transition.update({"loss": 1.0})
    with pytest.raises(bilevel.ConfigurationError, match=rf"'{name}' is nan"):
        transition.update({name: float("nan")})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByMetric(gain=0.1), "gain=0.1.*pair"),
        (lambda: ByMetric(gain=(0.1, 0)), "gain=0.*above 0"),
        (lambda: ByMetric(patience=(3,)), r"patience=\(3,\).*pair"),
        (lambda: ByMetric(patience=(0.5, 3)), "patience=0.5.*integer"),
        (lambda: ByMetric(block=0), "block=0.*at least 1"),
        (lambda: ByMetric(reference="first"), "reference='first'.*'best', 'previous'"),
        (lambda: ByMetric(better="higher"), "better='higher'.*'larger', 'smaller'"),
        (lambda: ByFraction(0.5, 0.4), r"late=0.4.*\[0.5, 1\]"),
        (lambda: ByFraction(late=1.5), "late=1.5"),
        (lambda: ByFraction("a", "b"), "middle='a'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(bilevel.ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    "change",
    [{"stage": 3}, {"stage": None}, {"count": 10}, {"count": -1}, {"total": "x"}, {"new": 1}],
    ids=str,
)
def test_a_wrong_state_is_refused(change):
    transition = ByMetric(block=10)
    with pytest.raises(bilevel.ConfigurationError, match="cannot continue"):
        transition.load_state_dict({**transition.state_dict(), **change})
    with pytest.raises(bilevel.ConfigurationError, match="progress"):
        ByFraction().load_state_dict({**transition.state_dict(), **change})
