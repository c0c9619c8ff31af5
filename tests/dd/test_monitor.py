"""TensorBoard: what is written can be read back."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

import bilevel
from dd.distillation.monitor import Monitor


class Quadratic(bilevel.Problem):
    """ℓ = ½ Σ i·(θ_i − φ_i)² with i = 1 … p."""

    def init(self, outer: Tensor, *, generator: torch.Generator) -> Tensor:
        return torch.zeros_like(outer)

    def inner_batch(self, outer: Tensor, step: int, *, generator: torch.Generator) -> Tensor:
        return outer

    def inner_loss(self, params: Tensor, batch: Tensor) -> Tensor:
        curvatures = torch.arange(1, len(params) + 1, device=params.device)
        return 0.5 * (curvatures * (params - batch) ** 2).sum()

    def outer_loss(self, params: Tensor, outer: Tensor, batch: Tensor) -> Tensor:
        return ((params - 1) ** 2).sum()


def test_a_low_rank_hessian_shows_its_spectrum(tmp_path: Path) -> None:
    basis = bilevel.basis.Eigenvectors(6)
    hypergradient = bilevel.Hypergradient(
        Quadratic(), bilevel.optim.sgd(0.01), 8, estimator=bilevel.estimators.LowRank(basis)
    )
    monitor = Monitor(tmp_path)
    monitor.outer_step(3, hypergradient(torch.randn(6)), None, 0.1)
    monitor.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    names = {name for name in events.Tags()["scalars"] if name.startswith("low_rank/")}
    eigenvalues = [f"low_rank/eigenvalue_{index}" for index in range(4)]
    assert names == {
        *("low_rank/rank", "low_rank/evaluations", "low_rank/staleness", "low_rank/exact"),
        *eigenvalues,
    }
    found = [events.Scalars(name)[0].value for name in eigenvalues]
    assert found == pytest.approx([6, 5, 4, 3], rel=1e-3)
    assert events.Scalars("low_rank/rank")[0].value == 6
    assert events.Scalars("low_rank/rank")[0].step == 3


def test_what_is_resumed_in_the_same_second_is_read_after_what_was_before(tmp_path: Path) -> None:
    names = []
    for first_step in (0, 1):
        monitor = Monitor(tmp_path, first_step)
        monitor.config("")
        monitor.close()
        names.append({path.name for path in tmp_path.iterdir()})
    (later,) = names[1] - names[0]
    assert all(later.split(".")[3] > name.split(".")[3] for name in names[0])
