"""What people have, through three doors: the pixels that it shows, or one line and status 2."""

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import arguments, bindings, one_error

from dd import config, evaluate, train
from dd.data import ImageDataset, to_unit_range

CLASSES = ("cat", "dog", "owl")
SIZE, COUNT = 8, 24
LABELS = np.arange(COUNT) % 3
#: White above, and below a grey that says which image it is.
PIXELS = np.full((COUNT, SIZE, SIZE, 3), 255, np.uint8)
PIXELS[:, SIZE // 2 :] = 8 * np.arange(COUNT)[:, None, None, None]
NAMES = np.array(CLASSES)[LABELS]
ALPHA = np.concatenate([PIXELS, np.full((COUNT, SIZE, SIZE, 1), 255, np.uint8)], axis=3)


def outcome(
    dataset: str, lines: list[str], said: str | None, tmp_path: Path, capsys: Any
) -> ImageDataset | None:
    """The dataset that a command builds; None if it says `said` in one line, with status 2."""
    lines = [f"Experiment.dataset = @{dataset}()", f"{dataset}.test_fraction = 0.25", *lines]
    if said is None:
        return config.load(["digits"], bindings(*lines)).dataset
    run = tmp_path / "run"
    assert train.main(arguments(run, *lines)) == 2
    assert said in one_error(capsys)
    assert not run.exists()
    return None


def check(data: ImageDataset | None) -> None:
    """All images are there, whatever their order, with the classes that they have."""
    if data is None:
        return
    images = to_unit_range(torch.cat([data.train_images, data.test_images]))
    labels = torch.cat([data.train_labels, data.test_labels])
    which = (images[:, :, -1, -1].mean(1) * 255 / 8).round().long()
    assert sorted(which.tolist()) == list(range(COUNT))
    assert torch.equal(labels, which % 3)
    expected = torch.from_numpy(PIXELS).movedim(3, 1)[which] / 255
    torch.testing.assert_close(images, expected[:, : images.shape[1]], rtol=0, atol=0.02)


# --- an .npz file ------------------------------------------------------------------------------

#: What differs from a plain file, options of `arrays`, and what is said if it is refused.
ARRAYS: dict[str, tuple[dict[str, Any], dict[str, Any], str | None]] = {
    "plain": ({}, {}, None),
    "channels first": ({"images": PIXELS.transpose(0, 3, 1, 2)}, {}, None),
    "grey": ({"images": PIXELS[..., 0]}, {}, None),
    "with opacity": ({"images": ALPHA}, {}, None),
    "halves": ({"images": (PIXELS / 255).astype(np.float16)}, {}, None),
    "floats to 255": ({"images": PIXELS.astype(float)}, {"white": 255}, None),
    "floats to 255, undeclared": ({"images": PIXELS.astype(float)}, {}, "arrays.white = 255"),
    "centred floats": ({"images": PIXELS / 127.5 - 1}, {}, "from -1.0 to 1.0; they must lie"),
    "sixteen bits": ({"images": PIXELS.astype(np.uint16) * 257}, {}, None),
    "signed bytes": ({"images": PIXELS.astype(np.int8)}, {}, "images has values from -128"),
    "one not a number": ({"images": np.where(PIXELS == 8, np.nan, PIXELS / 255)}, {}, "nan"),
    "complex": ({"images": PIXELS * 1j}, {}, "images has dtype complex128"),
    "five channels": ({"images": PIXELS[..., [0] * 5]}, {}, "neither has such a size"),
    "two channels": ({"images": PIXELS[..., :2]}, {}, "neither has such a size"),
    "flat": ({"images": PIXELS.reshape(COUNT, -1)}, {}, "images has shape (24, 192)"),
    "not square": ({"images": PIXELS[:, :, :6]}, {}, "images are 8×6; they must be square"),
    "too small for the network": ({"images": PIXELS[:, :1, :1, 0]}, {}, "with depth=1 it must be"),
    "no image": ({"images": PIXELS[:0], "labels": LABELS[:0]}, {}, "labels has dtype"),
    "labels as names": ({"labels": NAMES}, {}, None),
    "labels in a column": ({"labels": LABELS[:, None].astype(float)}, {}, None),
    "labels one-hot": ({"labels": np.eye(3)[LABELS]}, {}, None),
    "labels from one": ({"labels": LABELS + 1}, {}, "no image of 1 of the 4 classes (0)"),
    "labels below zero": ({"labels": LABELS - 1}, {}, "labels from -1 to 1"),
    "labels with halves": ({"labels": LABELS + 0.5}, {}, "no whole numbers"),
    "labels soft": ({"labels": np.full((COUNT, 3), 1 / 3)}, {}, "not a single 1 in every row"),
    "a label for each pixel": ({"labels": PIXELS[..., 0]}, {}, "labels has dtype uint8"),
    "a label too few": ({"labels": LABELS[1:]}, {}, "labels has shape (23,)"),
    "a class of one": ({"labels": np.where(np.arange(COUNT) == 2, 2, LABELS % 2)}, {}, "has one"),
    "objects": ({"images": np.array([None] * COUNT)}, {}, "object arrays and pickles"),
    "only others": ({"images": None, "labels": None, "a": LABELS}, {}, "it holds ['a']; it must"),
    "only a test set": (
        {"images": None, "labels": None, "test_images": PIXELS, "test_labels": LABELS},
        {},
        "'images' is missing",
    ),
    "in Fortran's order": ({"images": np.asfortranarray(PIXELS)}, {}, None),
    "big-endian": (
        {"images": PIXELS.astype(">u2") * 257, "labels": LABELS.astype(">i8")},
        {},
        None,
    ),
    "big-endian floats": ({"images": (PIXELS / 255).astype(">f4")}, {}, None),
    "long doubles": ({"images": (PIXELS / 255).astype(np.longdouble)}, {}, None),
    "dates": ({"labels": LABELS.astype("datetime64[D]")}, {}, "labels has dtype datetime64"),
    "labels as bytes": ({"labels": NAMES.astype("S")}, {}, None),
    "labels no text": ({"labels": np.array([b"\xff", b"a", b"b"])[LABELS]}, {}, "are not UTF-8"),
    "labels as halves": ({"labels": LABELS.astype(np.float16)}, {}, None),
    "labels not finite": ({"labels": np.where(LABELS, LABELS, np.inf)}, {}, "no whole numbers"),
    "labels not numbers": ({"labels": np.where(LABELS, LABELS, np.nan)}, {}, "no whole numbers"),
    "labels beyond all": ({"labels": np.where(LABELS, LABELS, 2**63)}, {}, "labels from"),
    "labels with ties": ({"labels": np.eye(3)[LABELS] + np.eye(3)[0]}, {}, "not a single 1"),
    "a class without images": ({"labels": np.eye(4)[LABELS]}, {}, "1 of the 4 classes (3)"),
    "structures": ({"images": np.zeros(COUNT, [("r", "u1")])}, {}, "images has dtype"),
    "pickled names": (
        {"class_names": np.array(CLASSES, dtype=object)},
        {},
        "object arrays and pickles",
    ),
    "names of Keras": (
        {"images": None, "labels": None, "x_train": PIXELS, "y_train": LABELS[:, None]},
        {},
        None,
    ),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, options, said = ARRAYS[name]
    content = {"images": PIXELS, "labels": LABELS, **changes}
    path = tmp_path / "mine.npz"
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    lines = [f"arrays.{key} = {value!r}" for key, value in {"path": str(path), **options}.items()]
    check(outcome("arrays", lines, said, tmp_path, capsys))


# --- a folder of images ------------------------------------------------------------------------


def tree(root: Path, suffix: str = "png", **options: Any) -> None:
    for index, (pixels, name) in enumerate(zip(PIXELS, NAMES, strict=True)):
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / name / f"{index}.{suffix}", **options)


def each(change: Callable[[Path, Image.Image], None]) -> Callable[[Path], None]:
    """Every picture written in another way."""

    def call(root: Path) -> None:
        for path in sorted(root.rglob("*.png")):
            with Image.open(path) as image:
                change(path, image.copy())

    return call


def turned(path: Path, image: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def see_through(path: Path, image: Image.Image) -> None:
    layer = np.array(image.convert("RGBA"))
    layer[: SIZE // 2] = (90, 0, 0, 0)
    Image.fromarray(layer).save(path)


def deep(path: Path, image: Image.Image) -> None:
    Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 16 + 15).save(path)


def wide(path: Path, image: Image.Image) -> None:
    canvas = Image.new("RGB", (3 * SIZE, SIZE), "red")
    canvas.paste(image, (SIZE, 0))
    canvas.save(path)


def first(root: Path) -> Path:
    return root / "cat" / "0.png"


def replaced(content: bytes) -> Callable[[Path], None]:
    return lambda root: [first(root).write_bytes(content), None][1]


def circle(root: Path) -> None:
    (root / "cat" / "more").symlink_to(root / "cat")


def pipe(root: Path) -> None:
    first(root).unlink()
    os.mkfifo(first(root))


def huge(root: Path) -> None:
    """A header of 40,000×40,000 pixels."""
    content = bytearray(first(root).read_bytes())
    content[16:24] = (40_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    first(root).write_bytes(content)


def under(root: Path) -> list[str]:
    names = sorted(path.name for path in root.iterdir())
    (root / "all").mkdir()
    return names


def litter(root: Path) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX", ".git"):
        shutil.copytree(root / "cat", root / name)
    for name in ("Thumbs.db", ".DS_Store", "._0.png", "desktop.ini", "readme.txt"):
        (root / "dog" / name).write_bytes(b"left behind")


def halves(*names: str) -> Callable[[Path], None]:
    def call(root: Path) -> None:
        for name in ("cat", "dog", "owl"):
            for index, path in enumerate(sorted((root / name).iterdir())):
                target = root / names[index % len(names)] / name / path.name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(path, target)
            (root / name).rmdir()

    return call


FOLDERS: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str | None]] = {
    "plain": (lambda root: None, {}, None),
    "turned": (each(turned), {}, None),
    "transparent": (each(see_through), {}, None),
    "twelve bits": (each(deep), {}, None),
    "panoramas": (each(wide), {}, None),
    "palettes": (each(lambda path, image: image.quantize().save(path)), {}, None),
    "other formats": (
        each(lambda path, image: [image.save(path.with_suffix(".gif")), path.unlink()][1]),
        {},
        None,
    ),
    "litter": (litter, {}, None),
    "splits in capitals": (halves("Train", "TEST"), {}, None),
    "splits with other names": (
        halves("trainset", "testset"),
        {},
        "call the folders of the splits",
    ),
    "a class called train": (
        lambda root: [(root / name).rename(root / to) for name, to in (("owl", "train"),)],
        {},
        None,
    ),
    "a folder too high": (
        lambda root: [shutil.move(root / name, root / "all" / name) for name in under(root)],
        {},
        "all holds no picture but the folders cat, dog, owl",
    ),
    "files of three-dimensional pictures": (
        each(
            lambda path, image: [image.save(path.with_suffix(".mpo"), quality=100), path.unlink()]
        ),
        {},
        None,
    ),
    "a validation split": (halves("train", "test", "Valid"), {}, None),
    "train alone": (halves("train"), {}, "for test/ beside train/; add it"),
    "a class only in train": (
        lambda root: [halves("train", "test")(root), shutil.rmtree(root / "test" / "cat")][1],
        {},
        "same classes; only one of them has 'cat'",
    ),
    "empty file": (replaced(b""), {}, "0.png"),
    "text": (replaced(b"no picture"), {}, "0.png"),
    "half a picture": (
        lambda root: first(root).write_bytes(first(root).read_bytes()[:45]),
        {},
        "0.png",
    ),
    "a circle of links": (circle, {}, "cat/more is a link that leads in a circle"),
    "a pipe": (pipe, {}, "0.png is no regular file"),
    "a link to nowhere": (
        lambda root: (root / "cat" / "a.png").symlink_to("gone"),
        {},
        "a.png is no regular file",
    ),
    "a huge picture": (huge, {}, "Image size (1600000000 pixels) exceeds limit"),
    "an empty class": (lambda root: (root / "ant").mkdir(), {}, "for the classes ant"),
    "no class": (lambda root: [shutil.rmtree(root / name) for name in CLASSES], {}, "class folder"),
    "a class of one": (
        lambda root: [path.unlink() for path in sorted((root / "owl").iterdir())[1:]],
        {},
        "every class needs two, and class owl has one",
    ),
    "no folder": (shutil.rmtree, {}, "looked in"),
    "no size": (lambda root: None, {"image_size": 0}, "image_size=0"),
    "a size that the network cannot take": (lambda root: None, {"image_size": 1}, "image_size=1"),
    "a way that there is not": (lambda root: None, {"fit": "squeeze"}, "fit='squeeze'"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, options, said = FOLDERS[name]
    root = tmp_path / "photos"
    tree(root)
    change(root)
    options = {"root": str(root), "image_size": SIZE, **options}
    lines = [f"image_folder.{key} = {value!r}" for key, value in options.items()]
    check(outcome("image_folder", lines, said, tmp_path, capsys))


# --- a set of others ---------------------------------------------------------------------------

IMAGES = torch.from_numpy(PIXELS[:3]).movedim(3, 1)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the plain tree, of which its configuration is all that is needed."""
    folder = tmp_path_factory.mktemp("sets")
    tree(folder / "photos")
    lines = [
        "Experiment.dataset = @image_folder()",
        f"image_folder.root = '{folder / 'photos'}'",
        f"image_folder.image_size = {SIZE}",
        "image_folder.test_fraction = 0.25",
        "Experiment.validation_fraction = 0.2",
    ]
    small = {"Distiller__outer_steps": 1, "Evaluator__networks": 1, "Evaluator__steps": [1]}
    words = arguments(folder / "run", *lines, Evaluator__full_data_networks=0, **small)
    assert train.main(words) == 0
    return folder / "run"


def npz(**content: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        np.savez(folder / "set.npz", **content)
        return folder / "set.npz"

    return write


def pt(held: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        torch.save(held, folder / "set.pt")
        return folder / "set.pt"

    return write


def pictures(*names: str, change: Callable[[Path], Any] = lambda root: None) -> Any:
    def write(folder: Path) -> Path:
        for index, name in enumerate(names):
            (folder / "set" / name).mkdir(parents=True)
            Image.fromarray(PIXELS[index]).save(folder / "set" / name / "0.png")
        change(folder / "set")
        return folder / "set"

    return write


def file(name: str, content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


SETS: dict[str, tuple[Callable[[Path], Path], str | None]] = {
    "tensors": (pt({"images": IMAGES, "labels": torch.arange(3)}), None),
    "channels last": (pt((IMAGES.movedim(1, 3) / 255, torch.arange(3.0))), None),
    "arrays": (npz(images=PIXELS[:3], labels=np.arange(3)), None),
    "arrays by name": (npz(images=PIXELS[:3], labels=np.array(CLASSES)), None),
    "arrays with soft labels": (npz(x_train=PIXELS[:3], y_train=np.eye(3) * 0.9 + 0.03), None),
    "pictures": (pictures(*CLASSES), None),
    "pictures and litter": (pictures(*CLASSES, change=litter), None),
    "not there": (lambda folder: folder / "set.pt", "there is no such file or folder"),
    "nothing": (file("set.pt", b""), "set.pt"),
    "text": (file("set.pt", b"images"), "set.pt"),
    "an archive of text": (file("set.npz", b"images"), "set.npz"),
    "no images": (pt((IMAGES[:0], torch.arange(0))), "set.pt has shape (0, 3, 8, 8)"),
    "of bytes as floats": (pt(IMAGES.float()), "floating point images must lie in [0, 1]"),
    "not a number": (pt(IMAGES / torch.zeros(())), "set.pt has values from"),
    "of another size": (pt(IMAGES[:, :, :4]), "images of shape (3, 3, 4, 8)"),
    "of another number": (pt(IMAGES[:2]), "2 images without labels"),
    "a strange label": (pt((IMAGES, torch.tensor([0, 1, 3]))), "labels outside 0 … 2"),
    "labels not a number": (pt((IMAGES, torch.full((3, 3), torch.nan))), "NaN or infinite"),
    "too few labels": (pt((IMAGES, torch.arange(2))), "labels of shape (2,)"),
    "a list": (pt([1, 2, 3]), "must hold a dict with tensors"),
    "a strange class": (pictures("cat", "dog", "eel"), "they must be the classes"),
    "a damaged picture": (
        pictures(*CLASSES, change=lambda root: first(root).write_bytes(b"")),
        "0.png",
    ),
    "arrays of a strange class": (
        npz(images=PIXELS[:3], labels=np.array(["cat", "dog", "eel"])),
        "there is no class 'eel'",
    ),
}


@pytest.mark.parametrize("name", SETS)
def test_a_set(
    name: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, said = SETS[name]
    path, found = write(tmp_path), tmp_path / "found.json"
    words = [str(run_dir), f"--set={path}", "--only=distilled", f"--json={found}"]
    if said is None:
        assert evaluate.main(words) == 0
        assert found.exists()
        return
    assert evaluate.main(words) == 2
    assert said in one_error(capsys)
    assert not found.exists()
