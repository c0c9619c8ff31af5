"""What a distillation takes of a device's memory, and what to lower where that is too much.

    outer loss     images at once × what the network keeps of one image
    inner step     3 × images of a step × the same: its double backward keeps what it is made of
    iterates       inner steps that are kept × (parameters and the optimizer's state)
    real images    all of them, as they are held

It is a model: what an allocator adds, and other programs take, is not in it.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch.func import functional_call

from bilevel.contract.graph import saved_storages
from bilevel.tree import tensors_in
from dd.distillation.settings import Distiller
from dd.objectives.base import Task
from dd.runtime.memory import total

#: Of the memory that is there; the rest is for what the model does not know.
SHARE = 0.8


@final
@dataclass(frozen=True)
class Part:
    """One large part of what an outer step takes.

    Attributes:
        what: A noun for it.
        option: The gin parameter that sets its size.
        value: Of that parameter; None if it is no number that can be lowered.
        bytes: What it takes with that value, proportional to it.
        instead: What to set where `value` is None.
    """

    what: str
    option: str
    value: int | None
    bytes: int
    instead: str = ""


def parts(settings: Distiller, task: Task) -> list[Part]:
    """The parts of an outer step, the largest first."""
    kept_of_an_image = _kept_of_an_image(task)
    classes = task.data.num_classes
    found = []
    at_once = settings.objective.real_images_at_once(classes)
    if at_once is not None:
        option, value, images = at_once
        found.append(Part("the outer loss", option, value, images * kept_of_an_image))
    synthetic = task.synthetic
    in_a_step = min(synthetic.classes_per_step or classes, classes)
    per_class = synthetic.batch_per_class or synthetic.images_per_class
    found.append(
        Part(
            "an inner step",
            "SyntheticDataset.classes_per_step",
            in_a_step,
            3 * in_a_step * per_class * kept_of_an_image,
        )
    )
    if settings.keep_on is None:
        params = dict(task.network.named_parameters())
        state = 4 * sum(value.numel() for value in params.values())
        if hasattr(settings.optimizer, "init"):
            state += sum(tensor.nbytes for tensor in tensors_in(settings.optimizer.init(params)))
        kept = -(-settings.inner_steps // (settings.keep_every or 1))
        found.append(
            Part(
                "the inner iterates",
                "Distiller.keep_on",
                None,
                kept * state if settings.keep_every else 0,
                f"'cpu', or Distiller.keep_every = {2 * (settings.keep_every or 1)}",
            )
        )
    if not getattr(task.data.train_images, "on_host", False):
        images = len(task.data.train_images)
        size = images * 4 * int(torch.Size(task.data.train_images.shape[1:]).numel())
        found.append(Part("the real images", "Experiment.images_on", None, size, "'host'"))
    return sorted(found, key=lambda part: -part.bytes)


def out_of_memory_advice(settings: Distiller, task: Task) -> str:
    """Which option to lower, and to what, where a run of this has not enough memory."""
    largest, *others = parts(settings, task)
    said = f"the largest part is {largest.what}, about {largest.bytes / 1e9:.2g} GB"
    if largest.value is None:
        return f"{said}: set {largest.option} = {largest.instead}"
    there = total(task.device)
    room = 0.5 * largest.bytes
    if there is not None:
        room = min(room, SHARE * there - sum(part.bytes for part in others))
    lower = max(1, int(largest.value * room / largest.bytes))
    if lower < largest.value:
        return (
            f"{said}: lower {largest.option} from {largest.value} to {lower}, which takes "
            f"{largest.bytes * lower / largest.value / 1e9:.2g} GB"
        )
    return f"{said}, and {largest.option} is as low as it can be: use a smaller network"


def _kept_of_an_image(task: Task) -> int:
    """Bytes that a backward pass keeps of one image, beyond the parameters; measured on the CPU."""
    params = {
        name: value.detach().cpu().requires_grad_()
        for name, value in task.network.named_parameters()
    }
    image = torch.zeros((1, *task.data.train_images.shape[1:]))
    logits = functional_call(task.network, params, (image,))
    own = {value.untyped_storage().data_ptr() for value in params.values()}
    return sum(size for at, size in saved_storages([logits]).items() if at not in own)
