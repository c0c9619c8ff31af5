"""Images decoded once: what is read back, and what happens to a cache that cannot be right."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dd.data.sources import decoded_images as decoded_images_module
from dd.data.sources.decoded_images import decoded_images
from dd.data.sources.image_files import decode_image

SIZE = 4


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(5):
        Image.new("RGB", (6, 5), (40 * index, 7, 0)).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read(root: Path, cache: Path) -> Tensor:
    paths = [str(path) for path in sorted(root.iterdir())]
    return decoded_images(paths, root, SIZE, "mine", cache)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of all that is really decoded."""
    paths: list[str] = []

    def spy(path: str, image_size: int) -> Tensor:
        paths.append(path)
        return decode_image(path, image_size)

    monkeypatch.setattr(decoded_images_module, "decode_image", spy)
    return paths


def files(folder: Path) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found.pop("lock", None)
    return found


def test_images_come_in_order_and_are_decoded_once(
    root: Path, cache: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    first, second = read(root, cache), read(root, cache)
    assert len(decoded) == 5
    assert first.dtype == torch.uint8
    assert torch.equal(
        first, torch.stack([decode_image(str(p), SIZE) for p in sorted(root.iterdir())])
    )
    assert torch.equal(first, second)
    assert set(files(cache)) == {"images.npy", "manifest.json"}
    assert caplog.text == ""


def test_more_files_than_are_decoded_at_a_time(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded_images_module, "_FILES_AT_A_TIME", 2)
    assert read(root, cache)[:, 0, 0, 0].tolist() == [0, 40, 80, 120, 160]


def test_a_dataset_may_move(root: Path, cache: Path, decoded: list[str]) -> None:
    before = read(root, cache)
    moved = root.rename(root.with_name("moved"))
    assert torch.equal(read(moved, cache), before)
    assert len(decoded) == 5


@pytest.mark.parametrize("change", ["another size", "another name", "one less", "one more"])
def test_other_files_are_another_cache(
    change: str, root: Path, cache: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = read(root, cache).clone()
    last = root / "4.png"
    if change == "another size":
        Image.effect_noise((6, 5), 60).save(last)
    elif change == "another name":
        last.rename(root / "5.png")
    elif change == "one less":
        last.unlink()
    else:
        shutil.copy(last, root / "5.png")
    after = read(root, cache)
    assert len(decoded) == 5 + len(after)
    assert torch.equal(after[:4], before[:4])
    assert (len(after), torch.equal(after, before)) == {
        "another size": (5, False),
        "another name": (5, True),
        "one less": (4, False),
        "one more": (6, False),
    }[change]
    assert caplog.text == ""


def test_another_image_size_is_another_cache(root: Path, cache: Path) -> None:
    paths = [str(path) for path in sorted(root.iterdir())]
    read(root, cache)
    assert decoded_images(paths, root, 3, "mine", cache).shape == (5, 3, 3, 3)
    assert read(root, cache).shape == (5, 3, SIZE, SIZE)


def truncate(array: Path, manifest: Path) -> None:
    array.write_bytes(array.read_bytes()[:-1])


def empty(array: Path, manifest: Path) -> None:
    array.write_bytes(b"")


def remove(array: Path, manifest: Path) -> None:
    array.unlink()


def pickle(array: Path, manifest: Path) -> None:
    size = array.stat().st_size
    np.save(array, np.array([None, "x"], dtype=object), allow_pickle=True)
    with array.open("ab") as file:
        file.write(bytes(size - array.stat().st_size))


def other_array(array: Path, manifest: Path) -> None:
    np.save(array, np.zeros((5, 3, SIZE, SIZE), dtype=np.int8))


def damage_manifest(array: Path, manifest: Path) -> None:
    manifest.write_text("{")


def other_manifest(array: Path, manifest: Path) -> None:
    manifest.write_text(manifest.read_text().replace('"files": "', '"files": "0'))


def manifest_without_a_size(array: Path, manifest: Path) -> None:
    found = json.loads(manifest.read_text())
    del found["bytes"]
    manifest.write_text(json.dumps(found))


def list_as_manifest(array: Path, manifest: Path) -> None:
    manifest.write_text("[]")


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty,
        remove,
        pickle,
        other_array,
        damage_manifest,
        other_manifest,
        list_as_manifest,
        manifest_without_a_size,
    ],
)
def test_a_damaged_cache_is_made_again_with_a_warning_of_one_line(
    damage: Callable[[Path, Path], None],
    root: Path,
    cache: Path,
    decoded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    before = read(root, cache).clone()
    good = files(cache)
    (array,) = cache.rglob("images.npy")
    damage(array, array.with_name("manifest.json"))
    assert torch.equal(read(root, cache), before)
    assert len(decoded) == 10
    (record,) = caplog.records
    assert "again" in record.getMessage()
    assert str(array.parent) in record.getMessage()
    assert len(record.getMessage().splitlines()) == 1
    assert files(cache) == good


def test_a_damaged_cache_needs_no_room_for_two(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read(root, cache).clone()
    (array,) = cache.rglob("images.npy")
    truncate(array, array.with_name("manifest.json"))
    room = before.numel() - 1  # bytes, beside what is there now

    def usage(folder: Path) -> SimpleNamespace:
        return SimpleNamespace(free=room if array.exists() else room + before.numel())

    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert torch.equal(read(root, cache), before)


def test_an_image_that_cannot_be_decoded_is_named_and_nothing_is_left(
    root: Path, cache: Path
) -> None:
    (root / "3.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot decode the image .*3\.png"):
        read(root, cache)
    assert files(cache) == {}


def test_an_interrupted_decoding_leaves_nothing(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: str, image_size: int) -> Tensor:
        if path.endswith("2.png"):
            raise KeyboardInterrupt
        return decode_image(path, image_size)

    with monkeypatch.context() as patch:
        patch.setattr(decoded_images_module, "decode_image", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(root, cache)
    assert files(cache) == {}
    assert len(read(root, cache)) == 5


def test_what_a_killed_process_left_is_overwritten(root: Path, cache: Path) -> None:
    read(root, cache)
    good = files(cache)
    (array,) = cache.rglob("images.npy")
    array.with_suffix(".partial").write_bytes(bytes(10**5))
    array.with_name("manifest.json").unlink()
    read(root, cache)
    assert files(cache) == good


def test_of_two_at_the_same_time_one_decodes_and_the_other_waits(
    root: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    decoded: list[str] = []

    def slow(path: str, image_size: int) -> Tensor:
        begun.set()
        assert go_on.wait(timeout=60)
        decoded.append(path)
        return decode_image(path, image_size)

    monkeypatch.setattr(decoded_images_module, "decode_image", slow)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(read, root, cache)
        assert begun.wait(timeout=60)
        second = threads.submit(read, root, cache)
        deadline = time.monotonic() + 60
        while "waiting for another process" not in caplog.text:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        go_on.set()
        assert torch.equal(first.result(timeout=60), second.result(timeout=60))
    assert len(decoded) == 5


def test_a_full_disk_is_noticed_before_anything_is_written(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=5 * 3 * SIZE * SIZE - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="cache_folder, or by the environment variable DD_CACHE"):
        read(root, cache)
    assert files(cache) == {}


def test_a_cache_that_cannot_be_written_is_an_error(root: Path, cache: Path) -> None:
    cache.write_text("mine")
    with pytest.raises(OSError, match=f"{cache}.*cache_folder"):
        read(root, cache)


def test_the_cache_can_be_read_by_others(root: Path, cache: Path) -> None:
    read(root, cache)
    for path in cache.rglob("*.*"):
        if path.is_file():
            assert os.stat(path).st_mode & 0o444 == 0o444
