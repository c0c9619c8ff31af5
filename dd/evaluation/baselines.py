"""What a sceptic would train on instead: real images, chosen and labelled without distilling."""

from collections.abc import Callable, Iterator, Sequence
from typing import final

import torch
from torch import Tensor, nn

from bilevel import Key
from dd.data.prepared import PreparedData
from dd.evaluation.accuracy import Accuracy
from dd.evaluation.evaluator import Evaluator, TrainingSet
from dd.evaluation.names import LABELS_ALONE
from dd.networks import embedded
from dd.runtime.precision import full_float32
from dd.synthetic.dataset import random_subset

#: Images that are in memory with their features at a time.
CHUNK = 500


def herding(features: Tensor, count: int) -> Tensor:
    """The images whose running mean stays nearest to the mean of all, one by one.

        i_k = argmin_i ‖μ − (f_i + Σ_{j<k} f_{i_j}) / k‖   among those that are not chosen yet

    Args:
        features: [N, d].
        count: How many, at most N.

    Returns:
        int64 [count], in the order of their choice.

    Source: Welling, ICML 2009; as in Rebuffi et al., arXiv 1611.07725.
    """
    mean, total = features.mean(0), torch.zeros_like(features[0])
    chosen: list[int] = []
    for k in range(1, count + 1):
        distances = torch.linalg.vector_norm(mean - (features + total) / k, dim=1)
        distances[chosen] = torch.inf
        chosen.append(int(distances.argmin()))
        total = total + features[chosen[-1]]
    return torch.tensor(chosen)


def k_center(features: Tensor, count: int) -> Tensor:
    """The image nearest to the mean, then again and again the one farthest from all chosen.

    The largest distance of any image from its nearest chosen one is at most twice the least that
    as many can have.

    Args:
        features: [N, d].
        count: How many, at most N.

    Returns:
        int64 [count], in the order of their choice.

    Source: Gonzalez, 1985; as in Sener and Savarese, arXiv 1708.00489.
    """
    chosen = [int(torch.linalg.vector_norm(features - features.mean(0), dim=1).argmin())]
    nearest = torch.full_like(features[:, 0], torch.inf)
    for _ in range(count - 1):
        distances = torch.linalg.vector_norm(features - features[chosen[-1]], dim=1)
        nearest = torch.minimum(nearest, distances)
        nearest[chosen] = -1.0
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)


@final
class Teacher:
    """A network trained on all training images: its features choose, its predictions label.

    Args:
        network: The module.
        params: Of the trained network.
    """

    def __init__(self, network: nn.Module, params: dict[str, Tensor]) -> None:
        self._network, self._params = network, params

    @full_float32()
    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The features that its last linear layer is given, [N, d], and its predictions, [N, K]."""
        features, logits = embedded(self._network, self._params, images)
        return features, logits.softmax(dim=1)


@final
class Baselines:
    """Accuracies by the same protocol on as many real images of each class as a set has.

    A class that has fewer is taken whole.

    Each choice is judged with hard labels, and with soft ones: a teacher's predictions. The set
    itself is judged with hard labels beside its own; and if these are soft, so are random images
    with the set's labels, each with one of its class: the value of the labels alone.

    Args:
        images: The set's, [N, C, H, W], ordered by class.
        labels: Its labels: int64 [N], or soft, [N, K].
        data: The dataset, by the set's own transform.
        network: What is trained, the teacher too.
        evaluator: How.
        key: The randomness of all networks.
        rate: The learning rate that was learned with the set, if there is one.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        data: PreparedData,
        network: nn.Module,
        evaluator: Evaluator,
        key: Key,
        rate: float | None = None,
    ) -> None:
        self._images, self._labels, self._rate = images, labels, rate
        self._data, self._network, self._evaluator, self._key = data, network, evaluator, key
        self._per_class = len(images) // data.num_classes

    def measured(self, names: Sequence[str]) -> Iterator[tuple[str, str, Accuracy]]:
        """(what is trained on, "hard_labels" or "soft_labels", its test accuracy), one by one.

        Args:
            names: Of `BASELINES`.
        """
        counts = torch.bincount(self._data.train_labels, minlength=self._data.num_classes)
        self._size = int(counts.clamp(max=self._per_class).sum())
        soft = self._labels if self._labels.is_floating_point() else None
        hard = self._labels if soft is None else soft.argmax(dim=1)
        yield "distilled", "hard_labels", self._distilled(hard)
        if soft is not None:
            yield "distilled", "soft_labels", self._distilled(soft)
            if self._size == len(soft):  # else there is no image for each of its labels
                yield LABELS_ALONE, "soft_labels", self._random(lambda _: soft)
        params = self._evaluator.teacher(self._network, self._data, self._key)
        teacher = Teacher(self._network, params)
        for name in names:
            if name == "random":
                yield name, "hard_labels", self._random(lambda rows: self._data.train_labels[rows])
                yield (
                    name,
                    "soft_labels",
                    self._random(lambda rows: teacher(self._data.train_images[rows])[1]),
                )
                continue
            rows = self._chosen(name, teacher)
            images = self._data.train_images[rows]
            yield name, "hard_labels", self._same(images, self._data.train_labels[rows])
            yield name, "soft_labels", self._same(images, teacher(images)[1])

    def _distilled(self, labels: Tensor) -> Accuracy:
        return self._evaluator.distilled(
            self._images, labels, self._network, self._data, self._key, self._rate
        )

    def _random(self, labels: Callable[[Tensor], Tensor]) -> Accuracy:
        """On random images, every network its own, those of `Evaluator.random_real`."""

        def draw(key: Key) -> tuple[Tensor, Tensor]:
            rows = random_subset(
                self._data.train_labels,
                self._per_class,
                self._data.num_classes,
                key.generator("subset"),
                or_all=True,
            )
            return self._data.train_images[rows], labels(rows)

        return self._real(draw)

    def _same(self, images: Tensor, labels: Tensor) -> Accuracy:
        """On the same images for every network."""
        return self._real(lambda _: (images, labels))

    def _real(self, training_set: TrainingSet) -> Accuracy:
        wanted = training_set, self._size
        return self._evaluator.real(*wanted, self._network, self._data, self._key)

    def _chosen(self, name: str, teacher: Teacher) -> Tensor:
        chosen = []
        for label in range(self._data.num_classes):
            members = (self._data.train_labels == label).nonzero().flatten()
            count = min(self._per_class, len(members))
            parts = [teacher(self._data.train_images[part]) for part in members.split(CHUNK)]
            features, predictions = (torch.cat(each) for each in zip(*parts, strict=True))
            if name == "el2n":
                target = torch.zeros_like(predictions[0])
                target[label] = 1.0
                scores = torch.linalg.vector_norm(predictions - target, dim=1)
                rows = scores.argsort(stable=True)[:count]
            else:
                rows = {"herding": herding, "k_center": k_center}[name](features, count)
            chosen.append(members[rows.to(members.device)])
        return torch.cat(chosen)
