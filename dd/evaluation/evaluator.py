"""How good a training set is: fresh networks trained on it, judged on held-out images."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bilevel import ConfigurationError, Key, fresh_parameters
from bilevel.checks import check_instance, check_integer, check_number
from dd.augmentation import Augmentation, NoAugmentation
from dd.data.prepared import PreparedData
from dd.data.stored_images import Images
from dd.evaluation.accuracy import Accuracy, accuracy, confusion
from dd.evaluation.protocols import BPTTProtocol, Protocol
from dd.runtime.changes import Resumable
from dd.runtime.precision import full_float32
from dd.runtime.processes import collected, own_share, progress_bar
from dd.synthetic.dataset import random_subset

#: Where below a key the randomness of the networks of each training set is.
DISTILLED_KEY, RANDOM_REAL_KEY, FULL_DATA_KEY = "distilled", "random real", "full data"
TEACHER_KEY = "teacher"
#: By so many training steps it is judged how long many take.
STEPS_TIMED = 3
#: A function from the key of one network to the (images, labels) it is trained on.
TrainingSet = Callable[[Key], tuple[Images, Tensor]]


@final
class Evaluator:
    """Trains networks by a protocol, and judges them.

    Networks are trained from fresh initialisations on the whole small set (mini-batches beyond
    `batch_size`). Their accuracy on the *validation* part is measured after each number in
    `steps`; the number with the best mean is chosen, and only there is the test set used, once.
    (The papers choose on the test set itself.) Several processes share the networks out.

    Args:
        networks: How many networks each training set is given.
        steps: Numbers of training steps to choose from.
        lr: Adam's learning rate in the default protocol.
        batch_size: Images in a training step.
        full_data_networks: Networks trained on all training images; 0 leaves that out.
        full_data_steps: Numbers of training steps for these.
        validation_networks: Networks for each look during distillation.
        validation_steps: Training steps of these.
        augmentation: Of the training images; default: the protocol's.
        teacher_steps: Training steps of the network, trained on all training images, by whose
            features and predictions baselines are chosen and labelled.
        protocol: What optimizes the networks, and for how long; default: `bptt`, Adam at a constant
            rate with flip or rotate.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        networks: Resumable[int] = 8,
        steps: Resumable[Sequence[int]] = (300, 600, 1000, 3000),
        lr: float = 1e-3,
        batch_size: int = 256,
        full_data_networks: Resumable[int] = 2,
        full_data_steps: Resumable[Sequence[int]] = (5000, 10000),
        validation_networks: int = 2,
        validation_steps: int = 300,
        augmentation: Augmentation | None = None,
        protocol: Protocol | None = None,
        teacher_steps: Resumable[int] = 1000,
    ) -> None:
        self.networks = check_integer("networks", networks)
        self.steps = _checked_steps("steps", steps)
        self.batch_size = check_integer("batch_size", batch_size)
        self.full_data_networks = check_integer("full_data_networks", full_data_networks, 0)
        self.full_data_steps = _checked_steps("full_data_steps", full_data_steps)
        self.validation_networks = check_integer("validation_networks", validation_networks)
        self.validation_steps = check_integer("validation_steps", validation_steps)
        self.teacher_steps = check_integer("teacher_steps", teacher_steps)
        check_number("lr", lr, above=0)
        self.protocol = BPTTProtocol(lr) if protocol is None else protocol
        check_instance("protocol", self.protocol, Protocol, "@DCProtocol() with ()")
        self.augmentation = self.protocol.augmentation if augmentation is None else augmentation
        check_instance("augmentation", self.augmentation, Augmentation, "@FlipOrRotate() with ()")

    def without_augmentation(self) -> "Evaluator":
        """The same evaluator, but for its augmentation."""
        other = copy.copy(self)
        other.augmentation = NoAugmentation()
        return other

    def distilled(
        self,
        images: Tensor,
        labels: Tensor,
        network: nn.Module,
        data: PreparedData,
        key: Key,
        rate: float | None = None,
    ) -> Accuracy:
        """Test accuracy of networks trained on one given set, hard or soft labels.

        `rate` is the learning rate that was learned with the set, which `dc` trains at.
        """
        whole = images.detach(), labels.detach()
        steps = self.protocol.steps(self.steps, len(images), self.batch_size)
        keys = [key.fold(DISTILLED_KEY, index) for index in range(self.networks)]
        return self._measure("distilled", lambda _: whole, network, data, keys, steps, rate)

    def random_real(
        self, images_per_class: int, network: nn.Module, data: PreparedData, key: Key
    ) -> Accuracy:
        """Test accuracy with as many random real images, or all of a class that has fewer."""

        def draw(network_key: Key) -> tuple[Tensor, Tensor]:
            generator = network_key.generator("subset")
            chosen = random_subset(
                data.train_labels, images_per_class, data.num_classes, generator, or_all=True
            )
            return data.train_images[chosen], data.train_labels[chosen]

        counts = torch.bincount(data.train_labels, minlength=data.num_classes)
        size = int(counts.clamp(max=images_per_class).sum())
        return self.real(draw, size, network, data, key)

    def real(
        self,
        training_set: TrainingSet,
        size: int,
        network: nn.Module,
        data: PreparedData,
        key: Key,
    ) -> Accuracy:
        """Test accuracy on `size` real images, which each network chooses by its key."""
        steps = self.protocol.steps(self.steps, size, self.batch_size)
        keys = [key.fold(RANDOM_REAL_KEY, index) for index in range(self.networks)]
        return self._measure("random real", training_set, network, data, keys, steps)

    @full_float32()
    def teacher(self, network: nn.Module, data: PreparedData, key: Key) -> dict[str, Tensor]:
        """The parameters of a network after `teacher_steps` on all training images."""
        images, labels = data.train_images, data.train_labels
        with progress_bar(desc="training a teacher", total=self.teacher_steps, unit="step") as bar:
            trained = self._train(
                images,
                labels,
                network,
                key.fold(TEACHER_KEY),
                [self.teacher_steps],
                None,
                bar.update,
            )
        return trained[0]

    def full_data(self, network: nn.Module, data: PreparedData, key: Key) -> Accuracy | None:
        """Test accuracy with all training images; None if that was turned off."""
        if not self.full_data_networks:
            return None
        everything = data.train_images, data.train_labels
        keys = [key.fold(FULL_DATA_KEY, index) for index in range(self.full_data_networks)]
        steps = self.full_data_steps
        return self._measure("full data", lambda _: everything, network, data, keys, steps)

    @full_float32()
    def expected_seconds(
        self, images: Tensor, labels: Tensor, network: nn.Module, data: PreparedData, key: Key
    ) -> dict[str, float]:
        """About how long training takes on each of `TRAINING_SETS`, by a few steps of it.

        Args:
            images: The distilled set's, or others of its shape.
            labels: Of these.
            network: What is trained.
            data: The dataset.
            key: The randomness of the steps.
        """

        images, labels = images.detach(), labels.detach()
        small = self._seconds_of_step(images, labels, network, key) * self.networks
        small *= max(self.protocol.steps(self.steps, len(images), self.batch_size))
        found = {"distilled": small, "random_real": small}
        if self.full_data_networks:
            whole = self._seconds_of_step(data.train_images, data.train_labels, network, key)
            found["full_data"] = whole * self.full_data_networks * max(self.full_data_steps)
        return found

    @full_float32()
    def expected_validation_seconds(
        self, images: Tensor, labels: Tensor, network: nn.Module, data: PreparedData, key: Key
    ) -> float:
        """About how long `validation` takes in this process, by a few steps of it."""
        step = self._seconds_of_step(images.detach(), labels.detach(), network, key)
        return step * self.validation_steps * len(own_share(self.validation_networks))

    def _seconds_of_step(
        self, images: Images, labels: Tensor, network: nn.Module, key: Key
    ) -> float:
        self._train(images, labels, network, key, [1])
        began = time.perf_counter()
        trained = self._train(images, labels, network, key, [STEPS_TIMED])
        # Reading a number waits for the device.
        float(next(iter(trained[0].values())).sum())
        return (time.perf_counter() - began) / STEPS_TIMED

    @full_float32()
    def validation(
        self,
        images: Tensor,
        labels: Tensor,
        network: nn.Module,
        data: PreparedData,
        key: Key,
        rate: float | None = None,
    ) -> float:
        """Mean accuracy on the validation part after `validation_steps`; never the test set."""
        images, labels = images.detach(), labels.detach()
        accuracies = {}
        for index in own_share(self.validation_networks):
            trained = self._train(
                images, labels, network, key.fold("network", index), [self.validation_steps], rate
            )
            accuracies[index] = accuracy(
                network, trained[0], data.validation_images, data.validation_labels
            )
        values = collected(accuracies)
        return statistics.fmean(values)

    @full_float32()
    def _measure(
        self,
        label: str,
        training_set: TrainingSet,
        network: nn.Module,
        data: PreparedData,
        keys: Sequence[Key],
        steps: Sequence[int],
        rate: float | None = None,
    ) -> Accuracy:
        """Test accuracy of a network for each of `keys`; the bars are called `label`."""
        trained, validated, tested = {}, {}, {}
        share = list(own_share(len(keys)))
        total = len(share) * max(steps)
        with progress_bar(desc=f"training on {label}", total=total, unit="step") as bar:
            for index in share:
                images, labels = training_set(keys[index])
                stages = self._train(images, labels, network, keys[index], steps, rate, bar.update)
                trained[index] = stages
                validated[index] = torch.tensor(
                    [
                        accuracy(network, params, data.validation_images, data.validation_labels)
                        for params in stages
                    ]
                )
        chosen = int(sum(collected(validated), torch.zeros(len(steps))).argmax())
        for index, stages in progress_bar(
            iterable=trained.items(), desc=f"testing {label}", unit="network"
        ):
            params = stages[chosen]
            tested[index] = confusion(
                network, params, data.test_images, data.test_labels, data.num_classes
            )
        found = collected(tested)
        values = tuple(int(counts.diagonal().sum()) / int(counts.sum()) for counts in found)
        return Accuracy(values, steps[chosen], torch.stack(found).sum(dim=0))

    def _train(
        self,
        images: Images,
        labels: Tensor,
        network: nn.Module,
        key: Key,
        steps: Sequence[int],
        rate: float | None = None,
        on_step: Callable[[], object] = lambda: None,
    ) -> list[dict[str, Tensor]]:
        """The parameters after each number in `steps` of training on (images, labels)."""
        params = fresh_parameters(network, key.generator("init"), device=images.device)
        leaves = [value.requires_grad_() for value in params.values()]
        optimizer, schedule = self.protocol.optimizer(leaves, max(steps), rate)
        generator = key.generator("batches")
        stages = []
        for step in range(1, max(steps) + 1):
            chosen: Tensor | slice = slice(None)
            if len(images) > self.batch_size:
                chosen = torch.randint(
                    len(images), (self.batch_size,), generator=generator, device=generator.device
                )
            batch = self.augmentation(_rows(images, chosen), generator)
            targets = _rows(labels, chosen)
            loss = F.cross_entropy(functional_call(network, params, (batch,)), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            on_step()
            if step in steps:
                stages.append({k: value.detach().clone() for k, value in params.items()})
        return stages


def _checked_steps(name: str, steps: Sequence[int]) -> list[int]:
    """Numbers of steps, ascending, each once."""
    if not isinstance(steps, (list, tuple)) or not steps:
        raise ConfigurationError(f"{name}={steps!r}: it must be a list of numbers of steps")
    return sorted({check_integer(name, value) for value in steps})


def _rows(source: Images, chosen: Tensor | slice) -> Tensor:
    """`source[chosen]`, without waiting for the device of a tensor."""
    if isinstance(source, Tensor) and isinstance(chosen, Tensor):
        chosen = chosen.to(source.device, non_blocking=True)
    return source[chosen]
