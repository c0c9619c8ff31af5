"""The synthetic set: how it starts, what holds of it, and the batches drawn from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import seeded
from torch import Tensor

from bilevel import ConfigurationError
from dd.synthetic.dataset import SyntheticDataset, random_subset
from dd.synthetic.patches import split_patches

Outer = dict[str, Tensor]

SHAPE = (2, 3, 3)
seeds = st.integers(0, 2**31)


def real(num_classes: int = 4, per_class: int = 6) -> tuple[Tensor, Tensor]:
    """Shuffled images, each filled with its own index, and their labels."""
    count = num_classes * per_class
    labels = torch.arange(count)[torch.randperm(count, generator=seeded(5))] % num_classes
    images = torch.arange(1.0, count + 1)[:, None, None, None].expand(-1, *SHAPE).contiguous()
    return images, labels


def created(dataset: SyntheticDataset, num_classes: int = 4, seed: int = 0) -> Outer:
    return dataset.create(*real(num_classes), num_classes, seeded(seed))


def norms(images: Tensor) -> Tensor:
    return images.detach().flatten(1).norm(dim=1)


@st.composite
def batched(draw: st.DrawFn) -> tuple[SyntheticDataset, int]:
    """A dataset with any batch sizes that make sense, and its number of classes."""
    num_classes = draw(st.integers(1, 5))
    per_class = draw(st.integers(1, 4))
    return (
        SyntheticDataset(
            images_per_class=per_class,
            learn_labels=draw(st.booleans()),
            classes_per_step=draw(st.none() | st.integers(1, num_classes)),
            batch_per_class=draw(st.none() | st.integers(1, per_class)),
        ),
        num_classes,
    )


@given(
    num_classes=st.integers(1, 5),
    per_class=st.integers(1, 4),
    start=st.sampled_from(["noise", "real"]),
    projection=st.sampled_from(["none", "start", "every_step"]),
    learn_labels=st.booleans(),
    seed=seeds,
)
def test_outer_variables_are_leaves_of_the_promised_shapes(
    num_classes: int, per_class: int, start: str, projection: str, learn_labels: bool, seed: int
) -> None:
    dataset = SyntheticDataset(per_class, start, projection, learn_labels)
    outer = created(dataset, num_classes, seed)
    assert set(outer) == ({"images", "labels"} if learn_labels else {"images"})
    assert outer["images"].shape == (num_classes * per_class, *SHAPE)
    for value in outer.values():
        assert value.is_leaf
        assert value.requires_grad
        assert value.dtype == torch.float32
    if projection != "none":
        torch.testing.assert_close(norms(outer["images"]), torch.ones(num_classes * per_class))


def test_noise_is_standard_normal() -> None:
    images = SyntheticDataset(500).create(*real(), 4, seeded(0))["images"].detach()
    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_images_are_ordered_by_class() -> None:
    dataset = SyntheticDataset(images_per_class=3)
    assert dataset.classes(created(dataset, 2)).tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.labels(created(dataset, 2)).tolist() == [0, 0, 0, 1, 1, 1]


@given(per_class=st.integers(1, 6), seed=seeds)
def test_a_real_start_copies_distinct_images_of_each_class(per_class: int, seed: int) -> None:
    images, labels = real()
    kept = images.clone()
    outer = SyntheticDataset(per_class, start="real").create(images, labels, 4, seeded(seed))
    chosen = outer["images"].detach()[:, 0, 0, 0].long() - 1
    assert len(chosen.unique()) == 4 * per_class
    assert torch.equal(labels[chosen], torch.arange(4).repeat_interleave(per_class))
    with torch.no_grad():
        outer["images"].zero_()
    assert torch.equal(images, kept)


def test_projecting_a_real_start_leaves_the_real_images_alone() -> None:
    images, labels = real()
    kept = images.clone()
    SyntheticDataset(6, start="real", projection="start").create(images, labels, 4, seeded(0))
    assert torch.equal(images, kept)


def test_the_same_generator_gives_the_same_start() -> None:
    for start in ("noise", "real"):
        dataset = SyntheticDataset(2, start)
        first, again, other = (created(dataset, seed=seed)["images"] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_learned_labels_start_one_hot() -> None:
    dataset = SyntheticDataset(images_per_class=2, learn_labels=True)
    labels = dataset.labels(created(dataset, 3))
    assert torch.equal(labels, torch.eye(3).repeat_interleave(2, dim=0))


@pytest.mark.parametrize("projection", ["none", "start", "every_step"])
def test_only_projection_at_every_step_restores_unit_norms(projection: str) -> None:
    dataset = SyntheticDataset(2, projection=projection)
    outer = created(dataset)
    with torch.no_grad():
        outer["images"].mul_(3)
    moved = outer["images"].detach().clone()
    dataset.constrain_(outer)
    if projection == "every_step":
        torch.testing.assert_close(
            outer["images"].detach(), moved / norms(moved)[:, None, None, None]
        )
    else:
        assert torch.equal(outer["images"], moved)


def test_projection_of_a_black_image_is_finite() -> None:
    dataset = SyntheticDataset(projection="every_step")
    outer = {"images": torch.zeros(1, *SHAPE)}
    dataset.constrain_(outer)
    assert torch.equal(outer["images"], torch.zeros(1, *SHAPE))


@given(values=st.lists(st.floats(-3, 3, width=32), min_size=16, max_size=16))
def test_constraints_clamp_labels_and_do_not_normalise_them(values: list[float]) -> None:
    dataset = SyntheticDataset(learn_labels=True)
    outer = created(dataset)
    moved = torch.tensor(values).view(4, 4)
    with torch.no_grad():
        outer["labels"].copy_(moved)
    dataset.constrain_(outer)
    assert torch.equal(outer["labels"], moved.clamp(min=0))
    assert outer["labels"].requires_grad


@given(case=batched(), seed=seeds)
def test_a_batch_is_balanced_without_repeats_and_its_labels_match(
    case: tuple[SyntheticDataset, int], seed: int
) -> None:
    dataset, num_classes = case
    outer = created(dataset, num_classes)
    with torch.no_grad():  # each image is its own index
        outer["images"].copy_(torch.arange(len(outer["images"]))[:, None, None, None])
    images, labels = dataset.batch(outer, seeded(seed))
    index = images[:, 0, 0, 0].long()
    assert len(index.unique()) == len(index)
    assert torch.equal(labels, dataset.labels(outer)[index])
    counts = torch.bincount(index // dataset.images_per_class, minlength=num_classes)
    assert len(counts.nonzero()) == (dataset.classes_per_step or num_classes)
    per_class = dataset.batch_per_class or dataset.images_per_class
    assert set(counts[counts > 0].tolist()) == {per_class}


@given(case=batched(), seed=seeds)
def test_gradients_of_a_batch_reach_exactly_the_chosen_images(
    case: tuple[SyntheticDataset, int], seed: int
) -> None:
    dataset, num_classes = case
    outer = created(dataset, num_classes)
    images, labels = dataset.batch(outer, seeded(seed))
    weights = torch.rand(images.shape, generator=seeded(1)) + 1
    (images * weights).sum().backward(retain_graph=True)
    reached = outer["images"].grad.flatten(1).ne(0).any(dim=1)
    assert torch.equal(outer["images"].detach()[reached].sort(0)[0], images.detach().sort(0)[0])
    torch.testing.assert_close(outer["images"].grad.sum(), weights.sum())
    if dataset.learn_labels:
        labels.sum().backward()
        assert torch.equal(outer["labels"].grad.ne(0).any(dim=1), reached)


@given(case=batched(), seed=seeds)
def test_the_same_generator_gives_the_same_batch(
    case: tuple[SyntheticDataset, int], seed: int
) -> None:
    dataset, num_classes = case
    outer = created(dataset, num_classes)
    first, again = dataset.batch(outer, seeded(seed)), dataset.batch(outer, seeded(seed))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


def test_batches_differ_and_reach_every_image() -> None:
    dataset = SyntheticDataset(3, classes_per_step=2, batch_per_class=1)
    outer = created(dataset)
    generator = seeded(0)
    drawn = [tuple(dataset.batch(outer, generator)[0][:, 0, 0, 0].tolist()) for _ in range(100)]
    assert len(set(drawn)) > 10
    assert {value for batch in drawn for value in batch} == set(
        outer["images"][:, 0, 0, 0].tolist()
    )


@pytest.mark.parametrize("sizes", [(None, None), (4, None), (None, 3), (4, 3)])
def test_a_full_batch_is_the_set_itself(sizes: tuple[int | None, int | None]) -> None:
    dataset = SyntheticDataset(3, classes_per_step=sizes[0], batch_per_class=sizes[1])
    outer = created(dataset)
    images, labels = dataset.batch(outer, seeded(0))
    assert torch.equal(images, outer["images"])
    assert torch.equal(labels, dataset.classes(outer))


PATCHED_SHAPE = (2, 6, 6)


def whole_and_patched(
    n: int, seed: int, projection: str = "none", **sizes: int
) -> tuple[tuple[SyntheticDataset, Outer], tuple[SyntheticDataset, Outer]]:
    """The same three classes of four images, learned whole and in n×n patches."""
    made = []
    for patches_per_side in (1, n):
        dataset = SyntheticDataset(
            4, projection=projection, patches_per_side=patches_per_side, **sizes
        )
        images = torch.zeros(12, *PATCHED_SHAPE)
        made.append((dataset, dataset.create(images, torch.arange(12) % 3, 3, seeded(seed))))
    return made[0], made[1]


each_n = st.sampled_from([1, 2, 3, 6])


@given(n=each_n, seed=seeds, classes=st.integers(1, 3), per_class=st.integers(1, 4))
def test_patches_make_the_same_images_and_batches(
    n: int, seed: int, classes: int, per_class: int
) -> None:
    (whole, one), (patched, other) = whole_and_patched(
        n, seed, classes_per_step=classes, batch_per_class=per_class
    )
    assert other["images"].shape == (12 * n**2, 2, 6 // n, 6 // n)
    assert torch.equal(patched.images(other), one["images"])
    assert torch.equal(whole.images(one), one["images"])
    for dataset, outer in ((whole, one), (patched, other)):
        assert torch.equal(dataset.labels(outer), torch.arange(3).repeat_interleave(4))
    batches = [each.batch(outer, seeded(seed)) for each, outer in ((whole, one), (patched, other))]
    assert torch.equal(batches[0][0], batches[1][0])
    assert torch.equal(batches[0][1], batches[1][1])
    # What reaches the patches is what reaches the whole images, cut.
    for images, _ in batches:
        (images * torch.arange(float(images.numel())).view_as(images)).sum().backward()
    assert torch.equal(other["images"].grad, split_patches(one["images"].grad, n))


@given(n=each_n, seed=seeds)
def test_every_patch_is_projected_so_that_images_have_unit_norm(n: int, seed: int) -> None:
    _, (patched, outer) = whole_and_patched(n, seed, projection="every_step")
    for _ in range(2):
        images = outer["images"].detach()
        torch.testing.assert_close(norms(images), torch.full((12 * n**2,), 1 / n))
        torch.testing.assert_close(norms(patched.images(outer)), torch.ones(12))
        with torch.no_grad():
            outer["images"].mul_(torch.rand(12 * n**2, 1, 1, 1, generator=seeded(1)) + 0.5)
        patched.constrain_(outer)


def test_classes_are_those_the_images_were_made_for() -> None:
    dataset = SyntheticDataset(2, learn_labels=True, patches_per_side=3)
    outer = created(dataset)
    with torch.no_grad():
        outer["labels"].zero_()
    assert dataset.classes(outer).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_images_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"patches_per_side=2: images of 3×3"):
        created(SyntheticDataset(patches_per_side=2))


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    per_class=st.integers(1, 3),
    seed=seeds,
)
def test_a_random_subset_has_distinct_members_of_each_class(
    labels: list[int], per_class: int, seed: int
) -> None:
    targets = torch.tensor(labels)
    short = [label for label in range(4) if labels.count(label) < per_class]
    if short:
        message = (
            rf"images_per_class={per_class}: class {short[0]} has only {labels.count(short[0])}"
        )
        with pytest.raises(ConfigurationError, match=message):
            random_subset(targets, per_class, 4, seeded(seed))
        return
    chosen = random_subset(targets, per_class, 4, seeded(seed))
    assert len(chosen.unique()) == 4 * per_class
    assert torch.equal(targets[chosen], torch.arange(4).repeat_interleave(per_class))


def test_a_random_subset_is_random() -> None:
    labels = real()[1]
    drawn = {tuple(random_subset(labels, 1, 4, seeded(seed)).tolist()) for seed in range(50)}
    assert len(drawn) > 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_class": 0}, "images_per_class=0"),
        ({"images_per_class": 1.5}, "images_per_class=1.5"),
        ({"images_per_class": True}, "images_per_class=True"),
        ({"start": "zeros"}, "start='zeros'.*'noise', 'real'"),
        ({"projection": "always"}, "projection='always'.*'every_step'"),
        ({"classes_per_step": 0}, "classes_per_step=0"),
        ({"batch_per_class": "1"}, "batch_per_class='1'"),
        ({"batch_per_class": 2}, "batch_per_class=2.*images_per_class=1"),
        ({"learn_labels": "no"}, "learn_labels='no'"),
        ({"patches_per_side": 0}, "patches_per_side=0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticDataset(**arguments)  # type: ignore[arg-type]


def test_more_classes_a_step_than_there_are_mean_all_of_them() -> None:
    generator = torch.Generator().manual_seed(0)
    synthetic = SyntheticDataset(images_per_class=2, classes_per_step=5, batch_per_class=1)
    images, labels = synthetic.batch(created(synthetic), generator)
    assert sorted(labels.tolist()) == [0, 1, 2, 3]
    assert len(images) == 4
    every = SyntheticDataset(classes_per_step=5)
    outer = created(every)
    assert torch.equal(every.batch(outer, generator)[0], every.images(outer))
