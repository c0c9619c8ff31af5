"""How a network is trained on a distilled set, in plain values: for those without this program."""

import ast
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dd.evaluation.evaluator import Evaluator

#: What the labels of a set mean, by their kind.
LABELS = {
    "hard": "int64 [N], the index of the class",
    "soft": "float32 [N, K], the weights y_k of the loss -sum_k y_k log softmax(z)_k of logits z, "
    "at least 0; they need not add up to 1",
}
#: Parameters that say where something is on one machine, or what it has.
_OF_A_MACHINE = re.compile(
    r"^\S*\.(?:root|path|folder|cache_folder|device|images_on) =[^\n]*(?:\n[ \t]+[^\n]*)*\n?",
    re.MULTILINE,
)


def student_recipe(
    network: nn.Module,
    evaluator: Evaluator,
    images: Tensor,
    num_classes: int,
    learned_rate: float | None,
    config: str,
) -> dict[str, Any]:
    """What `evaluator` does to train a network on a set, JSON-able.

    Args:
        network: What is trained.
        evaluator: How.
        images: The set's, [N, C, H, W].
        num_classes: K.
        learned_rate: The learning rate that was learned with the set, if there is one.
        config: The operative configuration, from which the arguments of the parts are taken; empty
            if there is none.
    """
    config = portable(config)
    count, channels, image_size, _ = images.shape
    made_for = {"num_classes": num_classes, "channels": channels, "image_size": image_size}
    tried = evaluator.protocol.steps(evaluator.steps, count, evaluator.batch_size)
    parameter = torch.zeros(1, requires_grad=True)
    optimizer, schedule = evaluator.protocol.optimizer([parameter], max(tried), learned_rate)
    # A function may have made it.
    maker = re.search(r"^Experiment\.network = @(?:\w+[/.])*(\w+)$", config, re.MULTILINE)
    name = type(network).__name__ if maker is None else maker[1]
    return {
        "network": {
            "name": name,
            "arguments": {**made_for, **arguments_of(name, config)},
            "parameters": sum(value.numel() for value in network.parameters()),
            "layers": str(network),
        },
        "initialisation": "PyTorch's defaults, anew for every network",
        "protocol": evaluator.protocol.name,
        "optimizer": {"name": type(optimizer).__name__, **_plain(optimizer.defaults)},
        "schedule": None
        if schedule is None
        else {"name": type(schedule).__name__, **_plain(schedule.state_dict())},
        "loss": "the mean over a batch of -sum_k y_k log softmax(z)_k",
        "steps": max(tried),
        "steps_tried": tried,
        "batch_size": evaluator.batch_size,
        "augmentation": {
            "name": type(evaluator.augmentation).__name__,
            "arguments": arguments_of(type(evaluator.augmentation).__name__, config),
        },
        "learned_rate": learned_rate,
        "config": config,
    }


def portable(config: str) -> str:
    """A configuration without what holds on one machine only: paths, and the device."""
    return _OF_A_MACHINE.sub("", config)


def arguments_of(part: str, config: str) -> dict[str, Any]:
    """The arguments of a part that a configuration lists; what is no plain value stays text."""
    lines = re.sub(r"\\?\n[ \t]+", " ", config)
    found = re.findall(rf"^(?:[\w/.]*[/.])?{part}\.(\w+) = *(.*)$", lines, re.MULTILINE)
    return {argument: _value(text) for argument, text in found}


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those entries that JSON can hold, and that say something."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = {str(key): each for key, each in value.items()}
        plain = isinstance(value, (bool, int, float, str, list, tuple, dict))
        if plain and not name.startswith("_"):
            found[name] = list(value) if isinstance(value, tuple) else value
    return found
