"""The real image that is nearest to each distilled one."""

import torch
from torch import Tensor

from dd.data.prepared import PreparedData
from dd.evaluation.distilled_set import DistilledSet

#: So many images of a class are looked at, evenly spaced, if there are more.
MOST_CANDIDATES = 1000


@torch.no_grad()
def nearest_real(distilled: DistilledSet, data: PreparedData) -> Tensor:
    """Of each image's class, the training image at the least distance ‖·‖₂ in pixels.

    Pixels are those of `DistilledSet.inverse`, of the real images too: what a transform forgets,
    such as the brightness of each image, makes no distance.

    Args:
        distilled: The set, ordered by class.
        data: What it was distilled from; images of the validation split are not looked at.

    Returns:
        float32 [N, C, H, W], pixels on the CPU, not clamped.
    """
    found = []
    for label, images in enumerate(distilled.pixels().split(distilled.images_per_class)):
        members = (data.train_labels == label).nonzero().flatten()
        rows = members[:: -(-len(members) // MOST_CANDIDATES)]
        real = distilled.inverse(data.train_images[rows])
        nearest = torch.cdist(images.flatten(1), real.flatten(1)).argmin(dim=1)
        found.append(real[nearest].cpu())
    return torch.cat(found)
