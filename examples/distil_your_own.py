# %% [markdown]
"""Distil your own pictures: a folder in, a few learned images out, and a network trained on them.

Read it from top to bottom, or run it cell by cell in an editor that knows `# %%`, or as a notebook.
It needs a folder with one sub-folder of pictures for each class. Without one it makes a folder
first, of scikit-learn's digits as PNG files, so that it needs no download.
"""

# %% A folder of pictures: put yours in place of `None`.
import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dd
from dd.data import image_folder

parser = argparse.ArgumentParser(description="distil a folder of pictures")
parser.add_argument("--photos", type=Path, default=None, help="one folder of pictures for a class")
parser.add_argument("--image_size", type=int, default=8, help="32 suits photographs")
parser.add_argument("--outer_steps", type=int, default=200, help="more, for photographs")
parser.add_argument("--quick", action="store_true", help="fewer steps")
parser.add_argument("--out", type=Path, default=Path("examples/distil_your_own.png"))
options, _ = parser.parse_known_args()  # a notebook has arguments of its own

workplace = Path(tempfile.mkdtemp())
photos = options.photos
if photos is None:
    photos = workplace / "photos"
    digits = load_digits()
    for index, (picture, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        (photos / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 15.9).astype("uint8")).save(photos / str(label) / f"{index}.png")

# %% Distil. A bar shows how far it is; interrupting keeps what was learned by then.
losses: list[float] = []


def listen(event: object) -> None:
    """Callbacks are told every event of the loop; steps have a loss."""
    if hasattr(event, "result"):
        losses.append(float(event.result.loss))


distilled = dd.distil(
    photos,
    image_size=options.image_size,
    images_per_class=1,
    outer_steps=60 if options.quick else options.outer_steps,
    settings={"ConvNet.depth": 2, "Distiller.image_lr": 0.1},
    run_dir=workplace / "run",  # dd-evaluate judges what is here
    callbacks=[listen],
)

# %% Look at it, and take it elsewhere: arrays, with a picture and a README of what they are.
exported = dd.export_set(workplace / "run", workplace / "exported", "npz")
options.out.write_bytes((exported / "preview.png").read_bytes())
Image.open(options.out).convert("RGB")


# %% Train a network of your own on it: any network, any loop.
def train(images: Tensor, labels: Tensor, steps: int = 300) -> nn.Module:
    """A small network, trained from scratch on these few images."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(32, 32), nn.ReLU(), nn.AvgPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(len(distilled.class_names)))
    network(images)  # which makes the last layer
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network


def accuracy(network: nn.Module) -> float:
    """On test pictures, which distilling never saw, behind the transform of the set."""
    with torch.no_grad():
        guessed = network(distilled.transform(data.test_images)).argmax(dim=1)
    return float((guessed == data.test_labels).float().mean())


# %% Beside it, the same network on as many real pictures.
data = image_folder(photos, image_size=options.image_size)
classes = range(len(data.class_names))
first = torch.stack([(data.train_labels == label).nonzero()[0, 0] for label in classes])
real = distilled.transform(data.train_images[first])
rows = {
    f"{len(classes)} learned images": accuracy(train(distilled.images, distilled.labels)),
    f"{len(classes)} real images": accuracy(train(real, torch.tensor(classes))),
}

# %% What came of it.
print(f"{'training set':<20}  {'test accuracy':>14}  {'outer loss':>10}")
for name, value in rows.items():
    told = losses[-1] if "learned" in name else float("nan")
    print(f"{name:<20}  {value:>14.3f}  {told:>10.3f}")
