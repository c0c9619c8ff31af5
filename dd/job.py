"""What a distillation is given to work on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

import bilevel
from dd.augmentation import Augmentation
from dd.data.prepared import PreparedData
from dd.evaluation import Evaluator
from dd.synthetic import SyntheticDataset


@final
@dataclass(frozen=True)
class Job:
    """What one distillation works on; everything but the outer loop's own settings."""

    data: PreparedData
    network: nn.Module
    augmentation: Augmentation
    synthetic: SyntheticDataset
    evaluator: Evaluator
    folder: Path
    key: bilevel.Key
    device: torch.device
    provenance: dict[str, Any]
    description: dict[str, Any]
