"""The wheel, installed on its own: commands and recipes work from any folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from PIL import Image

import bilevel
import dd

ROOT = Path(__file__).parents[1]
#: What the wheel is made of; not the caches beside it.
SOURCES = ("bilevel", "dd", "gin", "LICENSE", "README.md", "pyproject.toml")


def run(*words: str | Path, cwd: Path, **environment: str) -> str:
    """A command's standard output; one that fails shows what it said."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        words,
        cwd=cwd,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target, cwd=source)
    (made,) = target.glob("*.whl")
    return made


def test_the_wheel_holds_types_licence_and_every_recipe(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = {f"dd/recipes/{path.relative_to(ROOT / 'gin')}" for path in ROOT.glob("gin/**/*.gin")}
    assert recipes <= names
    assert {"bilevel/py.typed", "dd/py.typed", "dd/sets/index.json"} <= names
    sets = {f"dd/sets/{path.name}" for path in ROOT.glob("dd/sets/*.safetensors")}
    assert sets
    assert sets <= names
    assert f"bilevel_dd-{bilevel.__version__}.dist-info/licenses/LICENSE" in names


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands of an environment that the wheel is installed in."""
    place = tmp_path_factory.mktemp("place")
    venv.create(place)
    paths = sysconfig.get_paths("venv", {"base": str(place), "platbase": str(place)})
    # The dependencies are those of these tests. What a path file names is not searched for path
    # files, so a development install of this repository is not seen.
    installed = [path for path in sys.path if Path(path).name == "site-packages"]
    Path(paths["purelib"], "dependencies.pth").write_text("\n".join(installed))
    folder = Path(paths["scripts"])
    pip = [sys.executable, "-m", "pip", "--python", folder / "python"]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=place)
    return folder


def parameters(**values: object) -> list[str]:
    """Arguments that set parameters; in their names, `__` stands for a dot."""
    return [f"--gin_param={name.replace('__', '.')} = {text}" for name, text in values.items()]


def test_every_command_runs_a_recipe_by_its_name_in_an_empty_folder(
    commands: Path, tmp_path: Path
) -> None:
    tiny = parameters(
        Distiller__outer_steps=2,
        Distiller__inner_steps=4,
        window=2,
        width_range=1,
        Evaluator__networks=1,
        Evaluator__steps=[2],
        Evaluator__full_data_networks=0,
    )
    run(commands / "dd-train", "--gin_file=digits", "--run_dir=run", *tiny, cwd=tmp_path)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["outer_steps"] == 2
    assert results["accuracy"]["distilled"]["networks"] == 1

    shown = run(commands / "dd-evaluate", "run", "--only=distilled", cwd=tmp_path)
    assert "test accuracy on digits" in shown

    tiny = parameters(
        Experiment__dataset="@digits()",
        Experiment__transform="@standardize",
        ConvNet__depth=1,
        Experts__count=1,
        Experts__snapshots=6,
        Experts__steps_between_snapshots=1,
        Experts__folder="'experts'",
    )
    shown = run(commands / "dd-experts", "--gin_file=gin/cifar10_att_cpu.gin", *tiny, cwd=tmp_path)
    assert "1 experts" in shown
    assert {path.name for path in tmp_path.iterdir()} == {"run", "experts"}


def test_both_packages_have_one_version() -> None:
    assert dd.__version__ == bilevel.__version__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dd.nothing  # noqa: B018


#: What a newcomer types in Python: distil, then train a network of one's own on an export.
DISTIL = """
import dd
distilled = dd.distil("photos", image_size=16, outer_steps=2, run_dir="second")
print(distilled, dd.load("digits-ipc1"))
dd.export_set("second", "exported", "npz")
"""
TRAIN = """
import numpy, torch
from torch import nn
found = numpy.load("exported/distilled.npz")
images, labels = torch.tensor(found["images"]), torch.tensor(found["labels"])
network = nn.Sequential(nn.Flatten(), nn.Linear(images[0].numel(), 32), nn.ReLU(), nn.Linear(32, 2))
optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
for _ in range(100):
    optimizer.zero_grad()
    nn.functional.cross_entropy(network(images), labels).backward()
    optimizer.step()
print((network(images).argmax(dim=1) == labels).float().mean().item())
"""


@pytest.mark.slow
def test_a_newcomer_distils_a_folder_of_photos(commands: Path, tmp_path: Path) -> None:
    for index in range(60):
        name = ("cats", "dogs")[index % 2]
        (tmp_path / "photos" / name).mkdir(parents=True, exist_ok=True)
        color = (200, index, 0) if index % 2 else (0, index, 200)
        picture = Image.new("RGB", (40, 30), color)
        picture.save(tmp_path / "photos" / name / f"{index}.jpg")

    tiny = parameters(
        image_folder__root="'photos'",
        image_folder__image_size=16,
        Distiller__outer_steps=2,
        Evaluator__networks=1,
        Evaluator__steps=[2],
    )
    run(commands / "dd-train", "--gin_file=own_images", "--run_dir=first", *tiny, cwd=tmp_path)
    shown = run(commands / "python", "-c", DISTIL, cwd=tmp_path)
    assert "2 images of shape (3, 16, 16), 2 classes" in shown
    assert "10 images of shape (1, 8, 8)" in shown
    assert float(run(commands / "python", "-c", TRAIN, cwd=tmp_path)) == 1.0
    run(commands / "dd-export", "first", "--format=folder", "--out=pictures", cwd=tmp_path)
    assert len(list(tmp_path.glob("pictures/pictures/*/*.png"))) == 2

    judged = "--gin_param=Evaluator.steps = [2]", "--gin_param=Evaluator.networks = 1"
    shown = run(commands / "dd-evaluate", "second", "--only=distilled", *judged, cwd=tmp_path)
    assert "test accuracy on photos" in shown
    shown = run(commands / "dd-evaluate", "digits-ipc1", "--only=distilled", *judged, cwd=tmp_path)
    assert "test accuracy on digits" in shown
