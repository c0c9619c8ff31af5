"""Distribution matching: the features of random networks, with no inner loop."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

import bilevel
from bilevel.checks import check_instance, check_integer, check_number
from bilevel.truncation import Stage
from dd.augmentation import Augmentation
from dd.networks import embedded
from dd.objectives.base import Objective, Outer, PreparedObjective, Task
from dd.objectives.discrepancy import Discrepancy, MeanFeatures
from dd.objectives.fresh_network import FreshNetwork
from dd.synthetic.dataset import SyntheticDataset


@final
class MatchFeatures(Objective):
    """Draw the features of each class to those of the real images, by SGD.

        F(φ) = Σ_c D({f_θ(A(x_{c,i}))}_i, {f_θ(A(s_{c,j}(φ)))}_j)

    D compares two sets of features, by their means or their characteristic functions. f_θ is what
    the last linear layer of a network is given, θ a fresh initialisation in every outer step, x
    real images, s synthetic ones, A an augmentation drawn anew for both. Nothing is trained: an
    outer step costs one pass of the real images and one of the synthetic ones, there and back. Set
    `Distiller.inner_steps = 1` and `Distiller.truncation = @Full()`, as the one inner step does
    nothing, and `Distiller.compile = False`: the augmentation is drawn within the loss.

    Labels are not learned.

    Args:
        real_per_class: N, real images of each class in an outer step; all, if there are fewer.
        classes_per_step: How many random classes an outer step matches, or all if there are fewer;
            default: all.
        momentum: SGD's, for the images.
        discrepancy: D; default: `MeanFeatures()`.

    Raises:
        ValueError: An argument outside its range; from `check`, if labels are to be learned.

    Source: Zhao and Bilen, arXiv 2110.04181 (DM), whose rate for images is 1, for images that have
    the norm of real ones: where they are projected to norm 1, a thousandth of it.
    """

    metrics = ("loss", "progress")

    def __init__(
        self,
        real_per_class: int = 256,
        classes_per_step: int | None = None,
        momentum: float = 0.5,
        discrepancy: Discrepancy | None = None,
    ) -> None:
        self.real_per_class = check_integer("real_per_class", real_per_class)
        self.classes_per_step = classes_per_step
        if classes_per_step is not None:
            check_integer("classes_per_step", classes_per_step)
        # Above 0, so that a checkpoint has the buffer.
        self.momentum = check_number("momentum", momentum, above=0, below=1)
        discrepancy = MeanFeatures() if discrepancy is None else discrepancy
        self.discrepancy = check_instance(
            "discrepancy", discrepancy, Discrepancy, "@MeanFeatures()"
        )

    def check(
        self, network: nn.Module, image_shape: tuple[int, ...], synthetic: SyntheticDataset
    ) -> None:
        if synthetic.learn_labels:
            raise bilevel.ConfigurationError(
                "learn_labels=True: MatchFeatures looks at no labels, so it must be False"
            )

    def real_images_at_once(self, num_classes: int) -> tuple[str, int, int]:
        classes = min(self.classes_per_step or num_classes, num_classes)
        return "MatchFeatures.real_per_class", self.real_per_class, classes * self.real_per_class

    def optimizer(self, outer: Outer, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            [{"params": [value], "lr": rates[name]} for name, value in outer.items()],
            momentum=self.momentum,
        )

    def prepare(self, task: Task, key: bilevel.Key, stage: Stage | None) -> PreparedObjective:
        return _ClassMeans(self, task, key)


@final
class _ClassMeans(PreparedObjective):
    def __init__(self, settings: MatchFeatures, task: Task, key: bilevel.Key) -> None:
        self.settings, self.data = settings, task.data
        self.problem = FeatureMatching(
            task.network, task.synthetic, task.augmentation, task.device, settings.discrepancy
        )
        self.key = key.fold("real")
        labels = task.data.train_labels.cpu()
        self.members = [(labels == c).nonzero().flatten() for c in range(task.data.num_classes)]

    def inputs(self, step: int, stage: Stage | None) -> tuple[Outer, Any]:
        generator = self.key.generator(step)
        classes = torch.randperm(len(self.members), generator=generator)
        classes = classes[: self.settings.classes_per_step].sort().values
        rows = []
        for label in classes.tolist():
            order = torch.randperm(len(self.members[label]), generator=generator)
            rows.append(self.members[label][order[: self.settings.real_per_class]])
        seed = torch.randint(2**62, (), generator=generator)
        device = self.data.train_labels.device
        chosen = torch.cat(rows).to(device)
        batch = self.data.train_images[chosen], self.data.train_labels[chosen]
        return {}, (*batch, classes.to(device), seed)

    def report(self, result: bilevel.HypergradientResult) -> dict[str, float]:
        return {}


@final
class FeatureMatching(FreshNetwork):
    """Nothing is trained; the synthetic images are judged by the features of a fresh network.

    The outer loss is that of `MatchFeatures`. Outer variables are those of `SyntheticDataset`; the
    outer batch is (real images, their classes, the classes that are matched, int64 [k], and the
    seed of the augmentation, int64 []).

    Args:
        network: The module whose features are matched; only its structure is used.
        synthetic: The form of the set.
        augmentation: Of real and synthetic images, by one generator for all.
        device: Where parameters live.
        discrepancy: How features are compared.
    """

    def __init__(
        self,
        network: nn.Module,
        synthetic: SyntheticDataset,
        augmentation: Augmentation,
        device: torch.device,
        discrepancy: Discrepancy,
    ) -> None:
        super().__init__(network, synthetic, augmentation, device)
        self.discrepancy = discrepancy

    def inner_batch(self, outer: Any, step: int, *, generator: torch.Generator) -> tuple[()]:
        return ()

    def inner_loss(self, params: Any, batch: Any) -> Tensor:
        return torch.stack([0 * value.sum() for value in params.values()]).sum()

    def outer_loss(self, params: Any, outer: Any, batch: Any) -> Tensor:
        real, real_labels, classes, seed = batch
        synthetic, labels = self.synthetic.of_classes(outer, classes)
        generator = torch.Generator().manual_seed(int(seed))
        augmented = self.augmentation(torch.cat([real, synthetic]), generator)
        with torch.no_grad():
            wanted = embedded(self.network, params, augmented[: len(real)])[0]
        found = embedded(self.network, params, augmented[len(real) :])[0]
        members, real_members = (
            (classes[:, None] == each).to(found.dtype) for each in (labels, real_labels)
        )
        return self.discrepancy(wanted, real_members, found, members, int(seed))
