"""The synthetic set: its images and labels, and what is learned of them."""

from dd.synthetic.bases import Bases
from dd.synthetic.dataset import SyntheticDataset
from dd.synthetic.multi_formation import MultiFormation
from dd.synthetic.parameterisation import Parameterisation
from dd.synthetic.patches import Patches
from dd.synthetic.pixels import Pixels

__all__ = [
    "Bases",
    "MultiFormation",
    "Parameterisation",
    "Patches",
    "Pixels",
    "SyntheticDataset",
]
