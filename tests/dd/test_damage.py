"""Whatever file of a run, a buffer or a cache is damaged: it is named, and never used.

The files are those that are there after a run, so one that is new is tested by itself.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import arguments, contents

from dd import evaluate, experts, train
from dd.data.sources.decoded_images import decoded_images
from dd.runtime.files import read_tensors

CHANGES = {
    "Experiment__dataset": "@digits()",
    "Experiment__transform": "@zca_whitening",
    "Experts__count": 1,
    "Experts__snapshots": 2,
    "Experts__steps_between_snapshots": 1,
    "MatchExperts__max_start": 1,
    "MatchExperts__target_after": 1,
    "Distiller__average_decay": 0.5,
    "Distiller__validate_every": 2,
    "Distiller__inner_steps": 4,
    "MinimumDistance__minimum": 1,
    "Evaluator__networks": 1,
    "Evaluator__steps": [1],
    "Evaluator__validation_steps": 1,
    "Evaluator__full_data_networks": 0,
}
#: Nothing reads these back.
SHOWN_ONLY = {"distilled.png", "traceback.txt"}


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes, int], bytes | None]] = {
    "bit flipped": flipped,
    "truncated": lambda content, at: content[:at],
    "deleted": lambda content, at: None,
}


def words(folder: Path, outer_steps: int = 3) -> list[str]:
    changes = {**CHANGES, **places(folder), "Distiller__outer_steps": outer_steps}
    return arguments(folder / "run", file="cifar10_att_cpu.gin", **changes)


def places(folder: Path) -> dict[str, str]:
    return {
        "Experts__folder": str(folder / "experts"),
        "zca_whitening__cache_folder": str(folder / "cache"),
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, its experts and its cache."""
    folder = tmp_path_factory.mktemp("whole")
    of_experts = [word for word in words(folder) if not word.startswith("--run_dir")]
    assert experts.main(of_experts) == 0
    assert train.main(words(folder)) == 0
    assert evaluate.main([str(folder / "run")]) == 0
    return folder


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Iterator[Path]:
    """The same folder again, of the same name, since a configuration names it."""
    aside = Path(shutil.copytree(whole, tmp_path / "aside"))
    yield whole
    shutil.rmtree(whole)
    shutil.copytree(aside, whole)


def holdings(folder: Path) -> list[str]:
    return [
        name
        for name in sorted(contents(folder))
        if Path(name).name not in SHOWN_ONLY and "events" not in Path(name).parts
    ]


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("bit flipped", [0.5]),
        pytest.param("deleted", [0.0], marks=pytest.mark.slow),
        # Near the beginning, and the last byte.
        pytest.param("bit flipped", [0.02, 0.2, 0.8, 1.0], marks=pytest.mark.slow),
        pytest.param("truncated", [0.0, 0.02, 0.5, 1.0], marks=pytest.mark.slow),
    ],
)
def test_every_file_of_a_run_is_named_or_not_used(
    kind: str,
    shares: list[float],
    damaged: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Going on, judging or comparing names the file, or gives the bits that it gives without."""
    held = {name: (damaged / name).read_bytes() for name in holdings(damaged)}
    assert len(held) >= 8
    checkpoint = damaged / "run" / "checkpoint.safetensors"
    assert train.main(words(damaged, 4)) == 0
    # Copies, for what is read may be mapped, and below files are overwritten in place.
    expected = {name: value.clone() for name, value in read_tensors(checkpoint)[0].items()}
    silent = []
    for name, content in held.items():
        for share in shares:
            restore(damaged, held)
            bad = DAMAGES[kind](content, min(int(share * len(content)), len(content.rstrip()) - 1))
            path = damaged / name
            path.unlink() if bad is None else path.write_bytes(bad)
            caplog.clear()
            capsys.readouterr()
            assert use(damaged, name) in (0, 2), name
            read = capsys.readouterr()
            printed = read.out + read.err + caplog.text
            assert "Traceback" not in printed
            if path.name not in printed and not same(checkpoint, expected):
                silent.append((name, share))
    assert silent == []


def use(folder: Path, name: str) -> int:
    """The command that reads a file; its status."""
    run = str(folder / "run")
    if "snapshots" in name:
        return evaluate.main([run, f"--set={folder / name}", "--only=distilled"])
    if name.endswith("results.json"):
        return evaluate.main([run, f"--compare={run}"])
    return train.main(words(folder, 4))


def same(checkpoint: Path, expected: dict[str, torch.Tensor]) -> bool:
    found = read_tensors(checkpoint)[0]
    return all(torch.equal(found[name], value) for name, value in expected.items())


def restore(folder: Path, held: dict[str, bytes]) -> None:
    for name in holdings(folder):
        if name not in held:
            (folder / name).unlink()
    for name, content in held.items():
        (folder / name).write_bytes(content)


# Decoded images.


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_file_of_decoded_images_is_named_and_made_again(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for index, path in enumerate(paths):
        Image.new("RGB", (9, 9), (80 * index, 1, 2)).save(path)
    cache = tmp_path / "cache"
    expected = decoded_images(paths, tmp_path, 8, "tiny", cache).clone()
    for name, content in contents(cache).items():
        if not content:
            continue  # the lock
        for share in (0.02, 0.5, 1.0):
            bad = DAMAGES[kind](content, min(int(share * len(content)), len(content.rstrip()) - 1))
            (cache / name).unlink() if bad is None else (cache / name).write_bytes(bad)
            caplog.clear()
            assert bool((decoded_images(paths, tmp_path, 8, "tiny", cache) == expected).all())
            # Without its manifest there is nothing to be said.
            assert caplog.records or (kind == "deleted" and name.endswith("manifest.json"))
            assert (cache / name).read_bytes() == content
