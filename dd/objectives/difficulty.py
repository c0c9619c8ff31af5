"""Real images in the order of their difficulty: which of them an outer step may draw."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from bilevel import ConfigurationError, Key, fresh_parameters
from bilevel.checks import check_choice, check_integer, check_number
from bilevel.distributed import broadcast_
from bilevel.truncation import Stage
from dd.augmentation import Augmentation
from dd.data.prepared import RealBatches
from dd.data.stored_images import Images
from dd.objectives.base import Task
from dd.objectives.expert_buffer import check_description
from dd.runtime.files import DamagedFileError, read_tensors, write_tensors
from dd.runtime.processes import progress_bar

#: From an outer step and its stage to the indices of the images it may draw.
Pool = Callable[[int, Stage | None], Tensor]
#: Images that are scored at a time.
CHUNK = 500
#: Where in a run's folder the difficulty of every training image is.
SCORES = "difficulty.safetensors"


@final
class DifficultyPacing:
    """Outer steps draw from a share of every class that grows from one end of its difficulty.

        share(step)  = start + (1 − start)·min(1, step/over_steps)
        share(stage) = start early, (start + 1)/2 in the middle, 1 late, without `over_steps`

    The difficulty of (x, y) is its EL2N score, E‖softmax(f_θ(x)) − onehot(y)‖₂, over networks
    that were trained for a few epochs on the training images. They are trained when the run starts;
    the scores are kept in its folder. What was measured on CIFAR-10: docs/distil.md.

    Args:
        over_steps: The outer step from which on all images are drawn from; default: the share
            follows the stages of the truncation schedule, which must have them (`StageAware`).
        order: "easy_first": the share has each class's lowest scores; "hard_first": its highest.
        start: The share at step 0, or in the early stage, in (0, 1].
        networks: Networks that the score is the mean of.
        epochs: For how long each is trained.
        batch_size: Images in a training step.
        lr: Adam's learning rate.

    Raises:
        ValueError: An argument outside its range.

    Source: the score is that of Paul et al., NeurIPS 2021 (arXiv 2107.07075), definition 2.
    """

    def __init__(
        self,
        over_steps: int | None = None,
        order: str = "easy_first",
        start: float = 0.3,
        networks: int = 3,
        epochs: int = 3,
        batch_size: int = 256,
        lr: float = 1e-3,
    ) -> None:
        self.over_steps = over_steps
        if over_steps is not None:
            check_integer("over_steps", over_steps)
        self.order = check_choice("order", order, ("easy_first", "hard_first"))
        self.start = check_number("start", start, above=0, maximum=1)
        self.networks = check_integer("networks", networks)
        self.epochs = check_integer("epochs", epochs)
        self.batch_size = check_integer("batch_size", batch_size)
        self.lr = check_number("lr", lr, above=0)

    @property
    def scoring(self) -> dict[str, float]:
        """What the scores depend on beside the images, the network and the seed."""
        return {
            "networks": self.networks,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
        }

    def share(self, step: int, stage: Stage | None) -> float:
        """The share of every class that outer step `step`, in this stage, draws from.

        Raises:
            ConfigurationError: Stages are to be followed, and there are none.
        """
        if self.over_steps is not None:
            part = min(1.0, step / self.over_steps)
        elif stage is not None:
            part = stage / Stage.LATE
        else:
            raise ConfigurationError(
                "over_steps=None: the share would follow the stages of the truncation schedule, "
                "which has none; give the outer step from which on all images are drawn from"
            )
        return self.start + (1 - self.start) * part

    def pool_for(self, task: Task, batch: int, stage: Stage | None) -> Pool:
        """From an outer step of a run and its stage to the indices of training images it draws.

        The scores are those in the run's folder, or are computed now and kept there.

        Args:
            task: What the run works on.
            batch: How many images an outer step draws.
            stage: Of the truncation schedule at the start, if it has stages.

        Raises:
            ConfigurationError: The share at the start is less than a batch, or should follow
                stages that there are not.
            DamagedFileError: The scores in the folder are damaged, or others.
        """
        self.share(0, stage)  # raises what cannot be at the start
        images, labels = task.data.train_images, task.data.train_labels
        smallest = int(self.start * len(labels))
        if smallest < batch:
            raise ConfigurationError(
                f"DifficultyPacing.start={self.start}: a share of {smallest} images is less "
                f"than a batch, real_batch={batch}"
            )
        # Where training is not repeatable, all processes, and a resumed run, still draw from the
        # same images: those of the first scores that process 0 computed.
        scored = {**task.description, "scoring": self.scoring}
        path = task.folder.find(SCORES)
        if path is not None:
            scores = read_scores(path, labels, scored)
        else:
            scores = self.scores(
                task.network, images, labels, task.augmentation, task.key.fold("difficulty")
            )
            broadcast_([scores])
            task.folder.write(SCORES, lambda path: write_tensors(path, {"scores": scores}, scored))
        return self.pool(scores, labels)

    def pool(self, scores: Tensor, labels: Tensor) -> Pool:
        """From an outer step and its stage to the indices it draws from, ascending.

        Args:
            scores: Difficulties, [N].
            labels: int64 [N].
        """
        positions = positions_within_class(
            scores if self.order == "easy_first" else -scores, labels
        )
        return lambda step, stage: (positions < self.share(step, stage)).nonzero().squeeze(1)

    def scores(
        self,
        network: nn.Module,
        images: Images,
        labels: Tensor,
        augmentation: Augmentation,
        key: Key,
    ) -> Tensor:
        """EL2N scores [N] of the training images, by networks trained on them."""
        total = torch.zeros(len(labels), device=labels.device)
        steps = self.epochs * max(1, len(labels) // self.batch_size)
        with progress_bar(
            total=self.networks * steps, desc="scoring real images", unit="step"
        ) as progress:
            for index in range(self.networks):
                member = key.fold("network", index)
                params = fresh_parameters(network, member.generator("init"), device=images.device)
                leaves = [value.requires_grad_() for value in params.values()]
                optimizer = torch.optim.Adam(leaves, lr=self.lr)
                batches = RealBatches(images, labels, self.batch_size, augmentation, member)
                for step in range(steps):
                    batch, targets = batches.at(step)
                    loss = F.cross_entropy(functional_call(network, params, (batch,)), targets)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    progress.update()
                total += error_norms(network, params, images, labels)
        return total / self.networks


def read_scores(path: Path, labels: Tensor, scored: Mapping[str, Any]) -> Tensor:
    """The scores [N] in a file, if they are of what is described.

    Args:
        path: Of the file.
        labels: Of the images, int64 [N].
        scored: What they must be scores of.

    Raises:
        DamagedFileError: They are not, or the file is damaged.
    """
    tensors, metadata = read_tensors(path)
    scores = tensors.get("scores", labels[:0]).to(labels.device)
    try:
        check_description(path, metadata, scored, "scores")
    except DamagedFileError as error:
        raise DamagedFileError(f"{path} does not fit, delete it: {error}") from error
    if scores.shape != labels.shape:
        raise DamagedFileError(f"{path} has {len(scores)} scores for {len(labels)} training images")
    return scores


@torch.no_grad()
def error_norms(
    network: nn.Module, params: dict[str, Tensor], images: Images, labels: Tensor
) -> Tensor:
    """‖softmax(f_θ(x)) − onehot(y)‖₂ of every image, [N]."""
    found = []
    for start in range(0, len(labels), CHUNK):
        part = slice(start, start + CHUNK)
        probabilities = functional_call(network, params, (images[part],)).softmax(dim=1)
        found.append((probabilities - F.one_hot(labels[part], probabilities.shape[1])).norm(dim=1))
    return torch.cat(found)


def positions_within_class(scores: Tensor, labels: Tensor) -> Tensor:
    """Each image's rank among those of its class, from the lowest score, over their number: [N]."""
    positions = torch.empty(len(scores), dtype=torch.float64, device=scores.device)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = members[scores[members].argsort(stable=True)]
        ranks = torch.arange(len(order), dtype=torch.float64, device=scores.device)
        positions[order] = ranks / len(order)
    return positions
