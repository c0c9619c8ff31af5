"""A picture file gives the pixels that a viewer shows, or one line that says what is wrong."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from dd.data.pictures import decode_image, is_leftover, is_picture
from dd.data.sources.image_folder import image_folder

SIZE = 4


def upper_half(mode: str, bright: object, dark: object) -> Image.Image:
    """Bright above, dark below."""
    image = Image.new(mode, (SIZE, SIZE), dark)
    image.paste(bright, (0, 0, SIZE, SIZE // 2))
    return image


def turned(orientation: int) -> dict[str, object]:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return {"exif": exif}


def sixteen_bits(white: int) -> Image.Image:
    rows = np.repeat(np.array([white, white, 0, 0], np.uint16)[:, None], SIZE, axis=1)
    return Image.fromarray(rows)


def frames() -> dict[str, object]:
    return {"save_all": True, "append_images": [upper_half("L", 0, 255)]}


class Deep:
    """A picture with several channels of 16 bits, which Pillow cannot write."""

    def __init__(self, white: int, channels: int = 3) -> None:
        self.pixels = np.zeros((SIZE, SIZE, channels), ">u2")
        self.pixels[: SIZE // 2, :, :3] = white
        self.pixels[..., 3:] = 65535

    def save(self, path: Path) -> None:
        path.write_bytes(self._png() if path.suffix == ".png" else self._tiff(path.suffix))

    def _png(self) -> bytes:
        def chunk(kind: bytes, content: bytes) -> bytes:
            body = kind + content
            return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

        kind = {3: 2, 4: 6}[self.pixels.shape[2]]
        header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, kind, 0, 0, 0)
        rows = b"".join(b"\0" + row.tobytes() for row in self.pixels)
        parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    def _tiff(self, suffix: str) -> bytes:
        order = {".tif": ">", ".tiff": "<"}[suffix]
        content = self.pixels.astype(f"{order}u2").tobytes()
        behind = 8 + len(content) + 2 + 9 * 12 + 4
        entries = [(256, 4, 1, SIZE), (257, 4, 1, SIZE), (258, 3, 3, behind)]
        entries += [(259, 4, 1, 1), (262, 4, 1, 2), (273, 4, 1, 8), (277, 4, 1, 3)]
        entries += [(278, 4, 1, SIZE), (279, 4, 1, len(content))]
        table = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
        return b"".join(
            [
                {">": b"MM", "<": b"II"}[order],
                struct.pack(f"{order}HI", 42, 8 + len(content)),
                content,
                struct.pack(f"{order}H", len(entries)),
                table,
                struct.pack(f"{order}IHHH", 0, 16, 16, 16),
            ]
        )


RGB = upper_half("RGB", "white", "black")
LARGER = RGB.resize((16 * SIZE, 16 * SIZE), Image.Resampling.NEAREST)
CLEAR = upper_half("RGBA", (0, 0, 0, 0), (0, 0, 0, 255))
GREY = upper_half("L", 255, 0)

#: All of them are white above and black below.
SHOWN = {
    "png": ("a.png", RGB, {}),
    "upper case": ("a.PNG", RGB, {}),
    "bmp": ("a.bmp", RGB, {}),
    "gif": ("a.gif", RGB, {}),
    "webp": ("a.webp", RGB, {"lossless": True}),
    "tiff": ("a.tiff", RGB, {}),
    "ppm": ("a.ppm", RGB, {}),
    "jpeg 2000": ("a.jp2", RGB, {"irreversible": False}),
    "grey": ("a.png", GREY, {}),
    "one bit": ("a.png", RGB.convert("1"), {}),
    "palette": ("a.png", RGB.convert("P"), {}),
    "cmyk": ("a.tiff", RGB.convert("CMYK"), {}),
    "transparent above": ("a.png", CLEAR, {}),
    "transparent, grey": ("a.png", CLEAR.convert("LA"), {}),
    "a transparent colour": ("a.png", upper_half("L", 7, 0), {"transparency": 7}),
    "16 bits": ("a.png", sixteen_bits(65535), {}),
    "12 bits in 16": ("a.png", sixteen_bits(4095), {}),
    "16 bits, white is 0": (
        "a.tif",
        sixteen_bits(65535).transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        {"tiffinfo": {262: 0}},
    ),
    "colours of 16 bits": ("a.png", Deep(65535), {}),
    "colours of 12 bits in 16": ("a.png", Deep(4095), {}),
    "colours of 12 bits, opaque": ("a.png", Deep(4095, 4), {}),
    "colours of 12 bits, tiff": ("a.tiff", Deep(4095), {}),
    "colours of 12 bits, big-endian": ("a.tif", Deep(4095), {}),
    "several frames, gif": ("a.gif", GREY, frames()),
    "several frames, png": ("a.png", GREY, frames()),
    "several frames, tiff": ("a.tiff", GREY, frames()),
    "upside down": ("a.png", RGB.transpose(Image.Transpose.ROTATE_180), turned(3)),
    "mirrored": ("a.png", RGB.transpose(Image.Transpose.FLIP_LEFT_RIGHT), turned(2)),
    "flipped": ("a.png", RGB.transpose(Image.Transpose.FLIP_TOP_BOTTOM), turned(4)),
    "on its left side": ("a.png", RGB.transpose(Image.Transpose.ROTATE_90), turned(6)),
    "on its right side": ("a.png", RGB.transpose(Image.Transpose.ROTATE_270), turned(8)),
    "transposed": ("a.png", RGB.transpose(Image.Transpose.TRANSPOSE), turned(5)),
    "transversed": ("a.png", RGB.transpose(Image.Transpose.TRANSVERSE), turned(7)),
    "an orientation that is none": ("a.png", RGB, turned(42)),
}


@pytest.mark.parametrize("name", SHOWN)
def test_pixels_are_those_that_a_viewer_shows(name: str, tmp_path: Path) -> None:
    file, image, options = SHOWN[name]
    path = tmp_path / file
    image.save(path, **options)
    assert is_picture(file)
    expected = torch.tensor([255, 255, 0, 0], dtype=torch.uint8)[:, None].expand(SIZE, SIZE)
    for channels in (1, 3):
        assert torch.equal(
            decode_image(str(path), SIZE, channels), expected.expand(channels, -1, -1)
        )


@pytest.mark.parametrize(
    ("file", "image", "options"),
    [
        ("a.jpg", LARGER, {}),
        ("a.jfif", LARGER, {"format": "JPEG"}),
        ("a.mpo", LARGER, {}),
        ("a.jpg", LARGER, {"format": "MPO"}),
        ("a.jpg", LARGER.convert("CMYK"), {}),
        ("a.jpg", LARGER.transpose(Image.Transpose.ROTATE_90), turned(6)),
        ("a.webp", LARGER.transpose(Image.Transpose.ROTATE_90), {**turned(6), "lossless": True}),
        ("a.tiff", LARGER.transpose(Image.Transpose.ROTATE_90), turned(6)),
        ("a.tiff", LARGER.convert("LAB"), {}),
        ("a.ico", LARGER.convert("RGBA"), {}),
        ("a.jpg", LARGER, {"icc_profile": b"no profile"}),
    ],
)
def test_pixels_are_nearly_those_that_a_viewer_shows(
    file: str, image: Image.Image, options: dict[str, object], tmp_path: Path
) -> None:
    image.save(tmp_path / file, quality=95, **options)
    assert is_picture(file)
    shown = decode_image(str(tmp_path / file), SIZE).float()
    assert shown[:, 0].min() > 240
    assert shown[:, -1].max() < 15


def test_colours_keep_their_order_in_sixteen_bits(tmp_path: Path) -> None:
    deep = Deep(65535)
    deep.pixels[..., 1:] = (0x1234, 0xFF00)
    deep.save(tmp_path / "a.png")
    assert decode_image(str(tmp_path / "a.png"), SIZE)[:, 0, 0].tolist() == [255, 0x12, 0xFF]
    with pytest.raises(ValueError, match="go up to 65535, more than white = 4095"):
        decode_image(str(tmp_path / "a.png"), SIZE, white=4095)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def cut(path: Path) -> None:
    RGB.resize((64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:60])


def floats(path: Path) -> None:
    Image.fromarray(np.full((SIZE, SIZE), 0.5, np.float32)).save(path, format="tiff")


def strip(path: Path) -> None:
    Image.new("L", (30_000, 1)).save(path)


def circle(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(pipe, marks=pytest.mark.skipif(os.name == "nt", reason="no pipes")),
        cut,
        floats,
        strip,
        circle,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("no picture"),
        lambda path: path.write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
    ],
)
def test_what_is_no_picture_is_one_line_that_names_the_file(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(ValueError, match=r"^cannot decode the image .*a\.png: [^\n]+$"):
        decode_image(str(path), SIZE)


@pytest.mark.parametrize(
    "error",
    [AssertionError(), EOFError("end"), RuntimeError("codec"), zlib.error("-3"), RecursionError()],
)
def test_damage_is_one_line_however_pillow_says_it(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (SIZE, SIZE)).save(path)

    def load(self: Image.Image) -> None:
        raise error

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", load)
    with pytest.raises(ValueError, match=r"^cannot decode the image .*a\.png: [^\n]+$"):
        decode_image(str(path), SIZE)


def test_a_picture_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    RGB.resize((64, 64)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png: Image size \(4096 pixels\) exceeds limit"):
        decode_image(str(path), SIZE)


@pytest.mark.parametrize(
    "name",
    [
        *(".DS_Store", "._a.png", ".ipynb_checkpoints", "__MACOSX", "Thumbs.db", "desktop.ini"),
        *("__pycache__", "lost+found", "System Volume Information", "#recycle"),
    ],
)
def test_what_tools_leave_behind_is_no_data(name: str) -> None:
    assert is_leftover(name)
    assert not is_picture(name)


def test_what_is_not_decoded_is_no_picture() -> None:
    assert not any(map(is_picture, ["a.txt", "a.pdf", "a.mp4", "a", "a.heic", "a.svg"]))


def write_pictures(folder: Path, count: int) -> None:
    for index in range(count):
        path = folder / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        RGB.rotate(90 * index).save(path)


@pytest.mark.parametrize("validation", ["val", "Valid", "VALIDATION", None])
def test_splits_are_found_whatever_their_case(validation: str | None, tmp_path: Path) -> None:
    for split in ("Train", "TEST", validation):
        for name in ("cat", "dog"):
            if split is not None:
                write_pictures(tmp_path / split / name, 3)
    found = image_folder(tmp_path, SIZE)
    assert found.class_names == ("cat", "dog")
    assert len(found.test_labels) == 6
    assert len(found.train_labels) == (6 if validation is None else 12)
    rows = found.validation_rows
    assert (rows is None) == (validation is None)
    assert rows is None or rows.tolist() == list(range(6, 12))


def test_leftovers_are_neither_classes_nor_images_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat", "dog", ".ipynb_checkpoints", "__MACOSX"):
        write_pictures(tmp_path / name, 4)
    (tmp_path / "cat" / "._0.png").write_bytes(b"no picture")
    (tmp_path / "cat" / "notes.txt").write_text("seen in the garden")
    found = image_folder(tmp_path, SIZE, test_fraction=0.25)
    assert found.class_names == ("cat", "dog")
    assert len(found.train_labels) + len(found.test_labels) == 8
    assert "notes.txt" in caplog.text or ".txt" in caplog.text


def test_a_dark_picture_of_sixteen_bits_stays_dark_among_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, white in (("cat", 65535), ("dog", 3000)):
        (tmp_path / name).mkdir()
        for index in range(2):
            sixteen_bits(white).save(tmp_path / name / f"{index}.png")
    bright = image_folder(tmp_path, SIZE, test_fraction=0.5)
    assert [int(image.max()) for image in bright.train_images] == [255, 3000 // 256]
    assert "taken for white" not in caplog.text
    for path in (tmp_path / "cat").iterdir():
        sixteen_bits(4095).save(path)
    dark = image_folder(tmp_path, SIZE, test_fraction=0.5)
    assert [int(image.max()) for image in dark.train_images] == [255, 3000 // 16]
    assert "4 pictures with 16 bits a channel exceeds 4095, so 4095 is taken" in caplog.text
    told = image_folder(tmp_path, SIZE, test_fraction=0.5, white=65535)
    assert [int(image.max()) for image in told.train_images] == [4095 // 256, 3000 // 256]
    with pytest.raises(ValueError, match=r"go up to 4095, more than white = 1023"):
        image_folder(tmp_path, SIZE, test_fraction=0.5, white=1023)


@pytest.mark.parametrize("size", [(16, 8), (8, 16), (16, 16)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_is_padded_with_the_background(
    size: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", size, "black").save(path)
    padded = decode_image(str(path), 8, channels, fit="pad", background="#ffffff")
    expected = torch.full((channels, 8, 8), 255)
    width, height = (side * 8 // 16 for side in size)
    top, left = (8 - height) // 2, (8 - width) // 2
    expected[:, top : top + height, left : left + width] = 0
    assert torch.equal(padded, expected.byte())


def test_what_is_transparent_has_the_background(tmp_path: Path) -> None:
    CLEAR.save(tmp_path / "a.png")
    shown = decode_image(str(tmp_path / "a.png"), SIZE, background="red")
    assert shown[:, 0, 0].tolist() == [255, 0, 0]
    assert shown[:, -1, -1].tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "option", [{"fit": "stretch"}, {"background": "no colour"}, {"background": 3}, {"white": 256}]
)
def test_how_pictures_are_read_is_checked(option: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        image_folder(tmp_path, SIZE, **option)  # type: ignore[arg-type]
