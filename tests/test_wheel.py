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
    assert {"bilevel/py.typed", "dd/py.typed"} <= names
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
