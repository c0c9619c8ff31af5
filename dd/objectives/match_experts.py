"""Trajectory matching: the objective of MTT and ATT."""

from collections import deque
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import bilevel
from bilevel.checks import check_instance, check_integer, check_number
from bilevel.truncation import Stage
from dd.augmentation import Augmentation
from dd.networks import named_parameters_of
from dd.objectives.base import Objective, Outer, PreparedObjective, Task
from dd.objectives.experts import Experts
from dd.runtime.changes import Resumable
from dd.synthetic.dataset import SyntheticDataset

#: Over how many of the latest outer steps, since the program started, the fraction of mismatches is
#: taken.
MISMATCH_STEPS = 100


@final
class MatchExperts(Objective):
    """End where an expert network went: MTT with the schedule `Full`, ATT with `MinimumDistance`.

    Images, labels and the inner learning rate are learned by SGD with momentum.

    Args:
        experts: Whose trajectories; trained by `python -m dd.experts`.
        max_start: A stretch starts at one of the first `max_start` snapshots.
        target_after: N_T, how many snapshots later it ends.
        rate: α₀, where the learned inner rate starts.
        rate_lr: Its outer learning rate.
        momentum: Of the outer SGD.
        mismatch: γ. With `MinimumDistance`, an outer step counts as one that a fixed length would
            have mismatched if distance(θ_{N_S}) > (1 + γ) · min_t distance(θ_t).

    Sources: Cazenavette et al., arXiv 2203.11932; Liu et al., arXiv 2407.14245.

    Raises:
        ValueError: An argument outside its range, or a stretch that ends after the last snapshot.
    """

    learns_rate = True

    def __init__(
        self,
        experts: Experts,
        max_start: int,
        target_after: int = 2,
        rate: float = 1e-2,
        rate_lr: Resumable[float] = 1e-5,
        momentum: float = 0.5,
        mismatch: float = 0.05,
    ) -> None:
        self._experts = check_instance("experts", experts, Experts, "@Experts() with ()")
        self.max_start = check_integer("max_start", max_start)
        self.target_after = check_integer("target_after", target_after)
        if max_start - 1 + target_after > experts.snapshots:
            raise bilevel.ConfigurationError(
                f"max_start={max_start}, target_after={target_after}: a stretch would end at "
                f"snapshot {max_start - 1 + target_after}, but there are {experts.snapshots}"
            )
        self.rate = check_number("rate", rate, above=0)
        self.rate_lr = check_number("rate_lr", rate_lr, above=0)
        self.momentum = check_number("momentum", momentum, above=0, below=1)
        self.mismatch = check_number("mismatch", mismatch, minimum=0)

    @property
    def experts(self) -> Experts:
        return self._experts

    def variables(self, device: torch.device) -> Outer:
        return {"rate": torch.zeros((), device=device, requires_grad=True)}

    def optimizer(self, outer: Outer, rates: Mapping[str, float]) -> torch.optim.Optimizer:
        rates = {**rates, "rate": self.rate_lr}
        return torch.optim.SGD(
            [{"params": [value], "lr": rates[name]} for name, value in outer.items()],
            momentum=self.momentum,
        )

    def prepare(self, task: Task, key: bilevel.Key, stage: Stage | None) -> PreparedObjective:
        return _EndWhereExpertsWent(self, task, key)

    def provenance(self, outer: Outer) -> dict[str, float]:
        return {"learning_rate": float(learned_rate(outer["rate"].detach(), self.rate))}


@final
class _EndWhereExpertsWent(PreparedObjective):
    def __init__(self, settings: MatchExperts, task: Task, key: bilevel.Key) -> None:
        self.settings = settings
        self.problem = TrajectoryMatching(
            task.network, task.synthetic, task.augmentation, settings.rate
        )
        self.buffer = settings.experts.open(task.description)
        self.key = key.fold("stretch")
        self.device = task.device
        self._mismatched: deque[bool] = deque(maxlen=MISMATCH_STEPS)

    def inputs(self, step: int, stage: Stage | None) -> tuple[Outer, None]:
        start, target = self.buffer.stretch(
            self.key.generator(step), self.settings.max_start, self.settings.target_after
        )
        stretch = {"start": start.to(self.device), "target": target.to(self.device)}
        return {name: value.requires_grad_() for name, value in stretch.items()}, None

    def report(self, result: bilevel.HypergradientResult) -> dict[str, float]:
        norms = {
            f"hypergradient/norm_of_{name}": float(torch.linalg.vector_norm(grad))
            for name, grad in result.grads.items()
            if name not in ("start", "target")
        }
        distances = [name for name in result.trace if name.endswith("_distance")]
        if not distances:
            return norms
        along = result.trace[distances[0]]
        excess = float(along[-1] / along[result.window.stop - 1]) - 1
        self._mismatched.append(not excess <= self.settings.mismatch)
        return {
            **norms,
            "matching/nearest_step": result.window.stop,
            "matching/excess_at_fixed_length": excess,
            "matching/fraction_mismatched": sum(self._mismatched) / len(self._mismatched),
        }


@final
class TrajectoryMatching(bilevel.Problem):
    """Train an expert's network on the synthetic set; judge it by where the expert went.

        θ_0 = start,   θ_{t+1} = θ_t − α ∇_θ ℓ(θ_t, (x, y)),
        ℓ(θ, (x, y)) = cross-entropy on augmented synthetic images x, labels y
        F(θ, φ)      = ‖θ − target‖² / ‖start − target‖²

    Outer variables are those of `SyntheticDataset`, and

    - `rate`, a scalar r with α = α₀ exp(r / α₀): α is positive whatever r is, and dα/dr = 1 at
      r = 0, so that an outer learning rate published for α keeps its meaning;
    - `start` and `target`, two points of an expert's trajectory, flat [p]. They are outer
      variables because they change from one outer step to the next and because F and the signals
      need them; nobody need learn them. Their derivatives cost next to nothing.

    Signals for `MinimumDistance` are `l1_distance` and `squared_l2_distance`, from an iterate to
    the target. Reports `rate` (α).

    Args:
        network: The module whose parameters are trained; only its structure is used.
        synthetic: How inner batches are drawn.
        augmentation: Applied to every inner batch.
        rate: α₀ > 0, where the learned rate starts.

    Source: Cazenavette et al., arXiv 2203.11932, equation 2; with `MinimumDistance`, Liu et al.,
    arXiv 2407.14245.
    """

    def __init__(
        self,
        network: nn.Module,
        synthetic: SyntheticDataset,
        augmentation: Augmentation,
        rate: float,
    ) -> None:
        self.network = network
        self.synthetic = synthetic
        self.augmentation = augmentation
        self.rate = rate
        self.names = [name for name, _ in network.named_parameters()]

    def init(self, outer: Any, *, generator: torch.Generator) -> dict[str, Tensor]:
        return named_parameters_of(self.network, outer["start"])

    def hyperparameters(self, outer: Any, step: int) -> dict[str, Tensor]:
        return {"lr": learned_rate(outer["rate"], self.rate)}

    def inner_batch(
        self, outer: Any, step: int, *, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        images, labels = self.synthetic.batch(outer, generator)
        return self.augmentation(images, generator), labels

    def inner_loss(self, params: Any, batch: Any) -> Tensor:
        images, labels = batch
        return F.cross_entropy(functional_call(self.network, params, (images,)), labels)

    def signals(self, params: Any, outer: Any) -> Mapping[str, Tensor]:
        difference = self._flat(params) - outer["target"]
        return {
            "l1_distance": difference.abs().sum(),
            "squared_l2_distance": difference @ difference,
        }

    def outer_loss(self, params: Any, outer: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        target = outer["target"]
        reached, begun = self._flat(params) - target, outer["start"] - target
        return reached @ reached / (begun @ begun), {"rate": self.hyperparameters(outer, 0)["lr"]}

    def _flat(self, params: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([params[name].flatten() for name in self.names])


def learned_rate(variable: Tensor, start: float) -> Tensor:
    """α = α₀ exp(r / α₀) from the outer variable r."""
    return start * (variable / start).exp()
