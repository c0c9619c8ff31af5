"""Real images by difficulty: the score, the pool of every step, and the batches drawn from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from bilevel import Key
from bilevel.truncation import Stage
from dd.augmentation import NoAugmentation
from dd.data.prepared import RealBatches
from dd.data.stored_images import StoredImages
from dd.networks import ConvNet
from dd.objectives.difficulty import DifficultyPacing, error_norms, positions_within_class

sizes = st.integers(2, 40)
seeds = st.integers(0, 2**31)


def drawn(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator), torch.randint(3, (count,), generator=generator)


@given(count=sizes, seed=seeds)
def test_positions_are_ranks_within_a_class(count, seed):
    scores, labels = drawn(count, seed)
    positions = positions_within_class(scores, labels)
    for index in range(count):
        alike = labels == labels[index]
        easier = (scores[alike] < scores[index]).sum()
        assert float(positions[index]) == pytest.approx(int(easier) / int(alike.sum()))


@given(count=sizes, seed=seeds, start=st.floats(0.05, 1), order=st.sampled_from(["easy", "hard"]))
def test_a_pool_grows_from_one_end_of_every_class_to_all(count, seed, start, order):
    scores, labels = drawn(count, seed)
    pacing = DifficultyPacing(over_steps=10, order=f"{order}_first", start=start)
    pool = pacing.pool(scores, labels)
    before = set()
    for step in range(12):
        now = set(pool(step, None).tolist())
        assert before <= now
        for label in labels.unique():
            members = (labels == label).nonzero().squeeze(1).tolist()
            inside = [i for i in members if i in now]
            outside = [i for i in members if i not in now]
            wanted = len(members) * pacing.share(step, None)
            assert wanted - 1e-9 <= len(inside) <= wanted + 1  # share·n is rounded
            if inside and outside:
                values = scores if order == "easy" else -scores
                assert max(values[inside]) <= min(values[outside])
        before = now
    assert before == set(range(count))


def test_share():
    pacing = DifficultyPacing(over_steps=4, start=0.2)
    shares = [pacing.share(step, Stage.EARLY) for step in (0, 1, 4, 100)]
    assert shares == pytest.approx([0.2, 0.4, 1.0, 1.0])


def test_share_by_stage():
    pacing = DifficultyPacing(start=0.2)
    assert [pacing.share(7, stage) for stage in Stage] == pytest.approx([0.2, 0.6, 1.0])
    with pytest.raises(ValueError, match=r"over_steps=None: .* has none"):
        pacing.share(0, None)


@given(seed=seeds, step=st.integers(0, 20), on_host=st.booleans())
def test_batches_are_drawn_from_the_pool_without_repetition(seed, step, on_host):
    images = torch.arange(20.0)[:, None, None, None].repeat(1, 1, 4, 4)

    def batch_of(step):
        return RealBatches(
            StoredImages(images, on_host=on_host),
            torch.arange(20),
            4,
            NoAugmentation(),
            Key(seed),
            lambda step: torch.arange(step, 20) if step < 16 else torch.arange(20),
        ).at(step)

    found, labels = batch_of(step)
    assert torch.equal(found[:, 0, 0, 0].long(), labels)
    assert len(set(labels.tolist())) == 4
    assert step >= 16 or int(labels.min()) >= step
    assert torch.equal(batch_of(step)[1], labels)


def small_set(count=200):
    """Two classes, dark and bright, of which every tenth image bears the wrong label."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.randn(count, 1, 8, 8, generator=generator) + 3.0 * labels[:, None, None, None]
    images[:, :, :4] = 0
    wrong = torch.arange(count) % 10 == 0
    return images, torch.where(wrong, 1 - labels, labels), wrong


def test_wrongly_labelled_images_score_highest_and_the_score_is_reproducible():
    images, labels, wrong = small_set()
    pacing = DifficultyPacing(over_steps=1, networks=2, epochs=4, batch_size=50, lr=1e-2)
    network = ConvNet(2, channels=1, image_size=8, depth=1, width=4)
    first, again = (
        pacing.scores(network, StoredImages(images), labels, NoAugmentation(), Key(3))
        for _ in range(2)
    )
    assert torch.equal(first, again)
    assert first[wrong].min() > first[~wrong].median()
    assert first[wrong].mean() > 2 * first[~wrong].mean()


def test_the_score_is_the_norm_of_the_error():
    images, labels, _ = small_set(7)
    network = ConvNet(2, channels=1, image_size=8, depth=1, width=4)
    params = dict(network.named_parameters())
    error = F.softmax(network(images), dim=1) - torch.eye(2)[labels]
    expected = error.square().sum(dim=1).sqrt()
    torch.testing.assert_close(error_norms(network, params, images, labels), expected.detach())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"over_steps": 0}, "over_steps=0"),
        ({"over_steps": 5, "start": 1.5}, "start=1.5: it must be a finite number"),
        ({"over_steps": 5, "start": 0}, "start=0: it must be a finite number in"),
        ({"over_steps": 5, "order": "easy"}, "order='easy': it must be one of 'easy_first'"),
        ({"over_steps": 5, "networks": 0}, "networks=0"),
    ],
)
def test_what_cannot_be_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        DifficultyPacing(**arguments)
