"""Training expert networks on the real images, and keeping their trajectories."""

from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

import bilevel
from bilevel.checks import check_choice, check_instance, check_integer, check_number, check_path
from dd.augmentation import DSA, Augmentation
from dd.data.prepared import PreparedData, RealBatches
from dd.evaluation.accuracy import accuracy
from dd.networks import named_parameters_of
from dd.objectives.expert_buffer import ExpertBuffer, ExpertWriter
from dd.runtime.stopping import StopRequest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@final
class Experts:
    """Networks trained on the real training images by SGD, with snapshots along the way.

    Args:
        folder: Where their trajectories are kept.
        count: How many networks.
        snapshots: How many snapshots follow the initialisation.
        steps_between_snapshots: Training steps between two; default: one epoch.
        lr: SGD's learning rate.
        momentum: SGD's momentum.
        batch_size: Images in a training step.
        augmentation: Of the training images; default: all of DSA.
        storage: "float32"; or "bfloat16", half the size, whose effect the index states.

    Source: Cazenavette et al., arXiv 2203.11932; the defaults are those of Liu et al., arXiv
    2407.14245.

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        folder: str,
        count: int = 100,
        snapshots: int = 50,
        steps_between_snapshots: int | None = None,
        lr: float = 0.01,
        momentum: float = 0.0,
        batch_size: int = 512,
        augmentation: Augmentation | None = None,
        storage: str = "float32",
    ) -> None:
        self.folder = check_path("folder", folder)
        self.count = check_integer("count", count)
        self.snapshots = check_integer("snapshots", snapshots)
        self.steps_between_snapshots = steps_between_snapshots
        if steps_between_snapshots is not None:
            check_integer("steps_between_snapshots", steps_between_snapshots)
        self.lr = check_number("lr", lr, above=0)
        self.momentum = check_number("momentum", momentum, minimum=0)
        self.batch_size = check_integer("batch_size", batch_size)
        self.augmentation = DSA() if augmentation is None else augmentation
        check_instance("augmentation", self.augmentation, Augmentation, "@DSA() with ()")
        self.storage = check_choice("storage", storage, tuple(DTYPES))

    def open(self, description: dict[str, Any]) -> ExpertBuffer:
        """What has been trained, checked against what is wanted; errors as of `ExpertBuffer`."""
        return ExpertBuffer(self.folder, description)

    def train(
        self,
        data: PreparedData,
        network: nn.Module,
        key: bilevel.Key,
        description: dict[str, Any],
        stop: StopRequest,
    ) -> ExpertWriter:
        """Train the experts that are still missing, until done or asked to stop.

        An expert depends on the seed and its number alone, so it does not matter when it is
        trained; one that is stopped halfway is begun anew.

        Args:
            data: What they are trained on: its training part.
            network: What is trained; only its structure is used.
            key: The randomness.
            description: What the experts are, as `describe` gives it.
            stop: Looked at after every snapshot.

        Returns:
            What has been written.

        Raises:
            DamagedFileError: The folder holds other experts, or a damaged file; it is named.
        """
        writer = ExpertWriter(self.folder, description, self._training(), self.snapshots)
        total = self.count * self.snapshots
        done = len(writer.done & set(range(self.count))) * self.snapshots
        with tqdm(total=total, initial=done, desc="training experts", unit="snapshot") as bar:
            for expert in sorted(set(range(self.count)) - writer.done):
                snapshots = self._trajectory(data, network, key.fold("expert", expert), stop, bar)
                if stop.requested:
                    break
                stored = snapshots.to(DTYPES[self.storage])
                facts = self._facts(snapshots, stored.float(), network, data)
                writer.write(expert, stored, facts)
                bar.set_postfix_str(f"accuracy {100 * facts['validation_accuracy']:.1f} %")
        return writer

    def _training(self) -> dict[str, Any]:
        return {
            "optimizer": "sgd",
            "lr": self.lr,
            "momentum": self.momentum,
            "batch_size": self.batch_size,
            "steps_between_snapshots": self.steps_between_snapshots,
            "augmentation": repr(self.augmentation),
            "storage": self.storage,
        }

    def _trajectory(
        self,
        data: PreparedData,
        network: nn.Module,
        key: bilevel.Key,
        stop: StopRequest,
        bar: Any,
    ) -> Tensor:
        """Snapshots [snapshots + 1, p] on the CPU, or fewer if stopped."""
        device = data.train_images.device
        params = bilevel.fresh_parameters(network, key.generator("init"), device=device)
        leaves = [value.requires_grad_() for value in params.values()]
        optimizer = torch.optim.SGD(leaves, lr=self.lr, momentum=self.momentum)
        batches = RealBatches(
            data.train_images, data.train_labels, self.batch_size, self.augmentation, key
        )
        stretch = self.steps_between_snapshots or len(data.train_labels) // batches.size
        snapshots = [_flat(leaves)]
        for step in range(self.snapshots * stretch):
            images, labels = batches.at(step)
            loss = F.cross_entropy(functional_call(network, params, (images,)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (step + 1) % stretch == 0:
                snapshots.append(_flat(leaves))
                bar.update()
                if stop.requested:
                    break
        return torch.stack(snapshots)

    def _facts(
        self, snapshots: Tensor, stored: Tensor, network: nn.Module, data: PreparedData
    ) -> dict[str, float]:
        """How good the expert is, and what storing it in another precision did to it.

        `storage_error` is the rounding error of a snapshot relative to how far it is from the next
        one, √mean ‖θ_t − stored‖² / √mean ‖θ_{t+1} − θ_t‖².
        """
        moved = (snapshots[1:] - snapshots[:-1]).square().sum(dim=1).mean().sqrt()
        error = (snapshots - stored).square().sum(dim=1).mean().sqrt()

        def judged(params: Tensor) -> float:
            named = named_parameters_of(network, params.to(data.validation_images.device))
            return accuracy(network, named, data.validation_images, data.validation_labels)

        return {
            "validation_accuracy": judged(snapshots[-1]),
            "stored_validation_accuracy": judged(stored[-1]),
            "storage_error": float(error / moved),
        }


def _flat(leaves: list[Tensor]) -> Tensor:
    return torch.cat([leaf.detach().flatten() for leaf in leaves]).cpu()
