"""What the README and the guides print works as it is typed, and leaves nothing out."""

import inspect
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dd import config, evaluate, experts, export, sweep, train
from dd.data import Standardize
from dd.evaluation.distilled_set import DistilledSet

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a page that are in a language, or in none."""
    return [body for name, body in FENCE.findall(page.read_text()) if name == language]


@pytest.fixture
def _digits_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a distilled set of digits where the pages say it is."""
    images = torch.rand(10, 1, 8, 8)
    transform = Standardize.fit(images)
    distilled = DistilledSet(
        transform(images), torch.arange(10), transform, tuple("0123456789"), {}
    )
    distilled.save(tmp_path / "runs" / "digits" / "distilled.safetensors")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_digits_run")
@pytest.mark.parametrize("page", ["README.md", "docs/distil.md"])
def test_a_distilled_set_is_read_as_the_pages_read_it(page: str) -> None:
    (program,) = [block for block in blocks(ROOT / page, "python") if 'dd.load("runs' in block]
    names: dict[str, object] = {}
    exec(compile(program, page, "exec"), names)
    distilled = names["distilled"]
    assert isinstance(distilled, DistilledSet)
    assert distilled.pixels().shape == (10, 1, 8, 8)


COMMAND = re.compile(r"\bdd[-.](train|evaluate|experts|export|sweep)\b")
COMMANDS = sorted(
    {
        line.split("#")[0].strip()
        for page in PAGES
        for block in blocks(page, "")
        for line in block.replace("\\\n", "").splitlines()
        if COMMAND.search(line)
    }
)


def options(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit):
        module.main(["--help"])
    return set(re.findall(r"--\w+", capsys.readouterr().out))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_command_has_options_and_recipes_that_exist(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = COMMAND.search(command)
    assert name is not None
    modules = {
        "train": train,
        "evaluate": evaluate,
        "experts": experts,
        "export": export,
        "sweep": sweep,
    }
    known = options(modules[name[1]], capsys)
    for word in shlex.split(command[name.end() :]):
        option, _, value = word.partition("=")
        assert option in known or not option.startswith("--")
        if option == "--gin_file":
            assert (config.RECIPES / f"{value}.gin").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_parameter_that_a_page_names_exists(page: Path) -> None:
    named = set(re.findall(r"(?<![\w.@/])(\w+)\.([a-z]\w*)(?![\w(.])", page.read_text()))
    parameters = {
        f"{owner}.{name}"
        for owner, name in named
        if owner in config.CONFIGURABLES and name != "gin"
    }
    known = {
        f"{owner}.{name}"
        for owner, target in config.CONFIGURABLES.items()
        for name in inspect.signature(target).parameters
    }
    assert parameters <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_refers_to_in_gins_way_exists(page: Path) -> None:
    named = set(re.findall(r"@(\w+)", page.read_text()))
    assert named <= set(config.CONFIGURABLES)


def test_every_recipe_is_described() -> None:
    page = (ROOT / "docs" / "gin.md").read_text()
    described = {"gin/" + name for name in re.findall(r"`(?:gin/)?([\w/*]+\.gin)`", page)}
    described |= {
        f"gin/{path.relative_to(ROOT / 'gin')}" for p in described for path in ROOT.glob(p)
    }
    recipes = {f"gin/{path.relative_to(ROOT / 'gin')}" for path in ROOT.glob("gin/**/*.gin")}
    assert recipes <= described


def test_what_a_gin_file_can_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "dd.md").read_text()
    listed = set(re.findall(r"^::: [\w.]+\.(\w+)$", page, re.MULTILINE)) | {"standardize"}
    ours = {
        name for name, target in config.CONFIGURABLES.items() if target.__module__.startswith("dd.")
    }
    assert ours <= listed
