"""The tensors that a transform declares, and whether those of a saved file are like them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

#: Declares an int64 tensor of the three sizes of an image.
IMAGE_SHAPE = "(C, H, W)"


def check_state(kind: str, declared: Mapping[str, str], state: Mapping[str, Tensor]) -> None:
    """Check that `state` has exactly the tensors that are declared, as they are declared.

    Args:
        kind: The transform's kind, for error messages.
        declared: As in `PixelTransform.tensors`; what gives the sizes of an image comes first.
        state: The tensors to check.

    Raises:
        ValueError: Naming the first tensor that is missing, unknown or wrong.
    """
    for name in sorted(declared.keys() | state.keys()):
        if name not in state:
            raise ValueError(f"the state of a {kind!r} transform lacks the tensor {name!r}")
        if name not in declared:
            raise ValueError(
                f"the state of a {kind!r} transform has the unknown tensor {name!r}; "
                f"it consists of {', '.join(sorted(declared))}"
            )
    sizes = {"3": 3}
    for name, text in declared.items():
        is_shape = text == IMAGE_SHAPE
        dtype = torch.int64 if is_shape else torch.float32
        letters = ["3"] if is_shape else text.split()
        found = state[name].shape
        wanted = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
        fits = len(found) == len(letters) and all(
            sizes.setdefault(letter, size) == size
            for letter, size in zip(letters, found, strict=True)
        )
        if not fits or state[name].dtype != dtype:
            raise ValueError(
                f"the tensor {name!r} of a {kind!r} transform is {state[name].dtype} of shape "
                f"{tuple(found)}; it must be {dtype} of shape ({wanted})"
            )
        if is_shape:
            sizes |= zip("CHW", state[name].tolist(), strict=True)
        if sizes.keys() >= set("CHW"):
            sizes["d"] = math.prod(sizes[letter] for letter in "CHW")
