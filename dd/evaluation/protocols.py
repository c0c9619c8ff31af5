"""How a network is trained in an evaluation: the field's protocols."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR

from bilevel.checks import check_integer, check_number
from dd.augmentation import DSA, Augmentation, FlipOrRotate


class Protocol(ABC):
    """What optimizes a network that is trained on a small set, and for how long.

    Attributes:
        name: What reports call it.
        augmentation: Of the training images, unless the `Evaluator` is given another.
    """

    name: str
    augmentation: Augmentation

    @abstractmethod
    def steps(self, wanted: Sequence[int], images: int, batch_size: int) -> list[int]:
        """The numbers of steps to choose from for a set of so many images.

        Args:
            wanted: What the `Evaluator` asks for.
            images: How many images there are.
            batch_size: How many of them a step has at most.
        """

    @abstractmethod
    def optimizer(
        self, params: list[Tensor], steps: int, rate: float | None
    ) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        """The optimizer, and a schedule that is stepped after it.

        Args:
            params: What is trained.
            steps: For how long.
            rate: The learning rate that was learned with the set, if there is one.
        """


@final
class BPTTProtocol(Protocol):
    """RaT-BPTT and AT-BPTT: Adam at a constant rate, the best of several numbers of steps.

    Args:
        lr: Adam's learning rate.

    Source: the released code of arXiv 2311.07025.
    """

    name = "bptt"

    def __init__(self, lr: float = 1e-3) -> None:
        self.lr = check_number("lr", lr, above=0)
        self.augmentation = FlipOrRotate()

    def steps(self, wanted: Sequence[int], images: int, batch_size: int) -> list[int]:
        return list(wanted)

    def optimizer(
        self, params: list[Tensor], steps: int, rate: float | None
    ) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        return torch.optim.Adam(params, lr=self.lr), None


@final
class DCProtocol(Protocol):
    """MTT, ATT and DSA: SGD for a number of epochs, its rate divided by ten at half of them.

    Args:
        epochs: Passes over the set.
        lr: SGD's rate for sets that were not learned together with one.
        momentum: SGD's momentum.
        weight_decay: SGD's L2 penalty.

    Source: the released code of arXiv 2006.05929 and arXiv 2203.11932.
    """

    name = "dc"

    def __init__(
        self,
        epochs: int = 1000,
        lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
    ) -> None:
        self.epochs = check_integer("epochs", epochs)
        self.lr = check_number("lr", lr, above=0)
        self.momentum = check_number("momentum", momentum, minimum=0)
        self.weight_decay = check_number("weight_decay", weight_decay, minimum=0)
        self.augmentation = DSA()

    def steps(self, wanted: Sequence[int], images: int, batch_size: int) -> list[int]:
        return [self.epochs * -(-images // batch_size)]

    def optimizer(
        self, params: list[Tensor], steps: int, rate: float | None
    ) -> tuple[torch.optim.Optimizer, LRScheduler | None]:
        optimizer = torch.optim.SGD(
            params,
            lr=self.lr if rate is None else rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
        )
        return optimizer, MultiStepLR(optimizer, [steps // 2 + 1], gamma=0.1)
