"""The distilled images as one picture that people can read."""

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from dd.runtime.lettering import label

#: Up to so many classes, each has a column of its own; of more, all are shown, in bands.
MOST_COLUMNS = 20
#: Images of a class that are shown at most, and where there are many classes.
MOST_ROWS, MOST_ROWS_OF_MANY = 10, 3
#: The least side of an image in pixels, above which a name can be read, and up to how many classes.
LEAST_SIDE, LEAST_SIDE_OF_MANY, MOST_NAMED = 64, 32, 200
#: The share of a channel's pixels that may be too dark, and too bright, to be told apart.
OUTSIDE = 0.01
_BORDER = 2


def stretched(pixels: Tensor) -> Tensor:
    """Every channel of every image, centred and stretched, so that any recipe's can be seen.

        0.5 + (x − (low + high) / 2) / (high − low), clamped to [0, 1]

    Low and high are the values that 1 % of the channel's pixels lie below, and above.

    Args:
        pixels: [N, C, H, W].
    """
    ordered = pixels.flatten(2).sort(dim=2).values
    outside = round(OUTSIDE * (ordered.shape[2] - 1))
    low, high = ordered[..., outside, None, None], ordered[..., -1 - outside, None, None]
    middle = (low + high) / 2
    # Of an even grey there is only rounding, which is not to be seen.
    spread = (high - low).maximum(5e-5 * (1 + middle.abs()))
    return (0.5 + (pixels - middle) / spread).clamp(0, 1)


def beside(pixels: Tensor, real: Tensor | None) -> Tensor:
    """Every image and, to the right of it, a real one: [N, C, H, 2W + 1], or `pixels` without."""
    if real is None:
        return pixels
    gap = torch.ones_like(pixels[..., :1])
    return torch.cat([pixels, gap, real.to(pixels.device)], dim=-1)


def image_grid(pixels: Tensor, images_per_class: int, class_names: Sequence[str] = ()) -> Tensor:
    """Images of all classes as one picture, uint8 [3, H', W'].

    A column for each class, under its name; with one image per class, rows of five, ten or more.

    Args:
        pixels: [K·I, C, H, W] in [0, 1], ordered by class; of images side by side, W is larger.
        images_per_class: I.
        class_names: K names; none are written by default.
    """
    by_class = pixels.detach().cpu().unflatten(0, (-1, images_per_class))
    classes, many = len(by_class), len(by_class) > MOST_COLUMNS
    rows = min(images_per_class, MOST_ROWS_OF_MANY if many else MOST_ROWS)
    columns = min(classes, MOST_COLUMNS // max(1, pixels.shape[-1] // pixels.shape[-2]))
    if images_per_class == 1:
        columns = min(columns, 5 if classes <= 10 else 10 if classes <= 100 else MOST_COLUMNS)
    least = LEAST_SIDE if classes <= MOST_NAMED else LEAST_SIDE_OF_MANY
    factor = -(-least // pixels.shape[-2])
    height, width = (side * factor for side in pixels.shape[-2:])
    name_height = label("", width).height if class_names else 0
    # Between pairs there is more than within one.
    cell = width + (_BORDER if width == height else 4 * _BORDER)
    band = rows * (height + _BORDER) + name_height
    size = (columns * cell + _BORDER, -(-classes // columns) * band + _BORDER)
    canvas = Image.new("RGB", size, "white")
    for index, images in enumerate(by_class):
        left = index % columns * cell + _BORDER
        top = index // columns * band + _BORDER
        if class_names:
            canvas.paste(label(class_names[index], width), (left, top - _BORDER))
        for row, image in enumerate(images[:rows]):
            shown = to_pil_image(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(shown, (left, top + name_height + row * (height + _BORDER)))
    return pil_to_tensor(canvas)


def png(
    pixels: Tensor,
    images_per_class: int,
    class_names: Sequence[str] = (),
    real: Tensor | None = None,
) -> bytes:
    """The grid of stretched images as a PNG file, each beside its `real` one if there are any."""
    buffer = io.BytesIO()
    shown = beside(stretched(pixels), None if real is None else stretched(real))
    grid = image_grid(shown, images_per_class, class_names)
    to_pil_image(grid).save(buffer, "PNG")
    return buffer.getvalue()
