"""A run, a set or a buffer of somebody else is data: it runs nothing and says nothing unseen."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import arguments, one_error

from dd import config, evaluate, train
from dd.evaluation.comparison import comparison_plot
from dd.objectives.expert_buffer import INDEX, ExpertBuffer
from dd.runtime.files import DamagedFileError, read_json, read_sealed, write_json, write_sealed
from dd.runtime.plain import plain

OWN_NETWORK = """
from pathlib import Path
import gin
from torch import nn
Path(__file__).with_name("ran").touch()
@gin.configurable
class OwnNet(nn.Sequential):
    def __init__(self, num_classes, channels, image_size, hidden=4):
        size = channels * image_size**2
        super().__init__(nn.Flatten(), nn.Linear(size, hidden), nn.Linear(hidden, num_classes))
"""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs") / "run"
    assert train.main(arguments(folder, Distiller__outer_steps=1)) == 0
    return folder


@pytest.fixture
def run(theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a module beside it that leaves a trace when it is imported."""
    (tmp_path / "own_net.py").write_text(OWN_NETWORK.replace("OwnNet", f"Own{tmp_path.name}"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(theirs, tmp_path / "run"))


HOSTILE = {
    "import": "import own_net",
    "import as": "import own_net as torch",
    "import from": "from own_net import Path",
    "import a submodule": "import os.path",
    "dynamic registration": "from __gin__ import dynamic_registration\nimport own_net",
    "include": "include 'other.gin'",
    "import in other words": "import \\\n  own_net",
    "import after a form feed": "\f import own_net",
    "singleton": "Experiment.seed = @x/gin.singleton()\nx/gin.singleton.constructor = @ConvNet",
    "macro by its name": "Experiment.seed = @x/gin.macro()\nx/gin.macro.value = 3",
    "a function that nobody registered": "Experiment.network = @os.system",
    "in a list": "Experiment.seed = [@builtins.eval(), 1]",
    "a block": "os.system:\n  command = 'touch ran'",
    "an expression": "Experiment.seed = __import__('own_net')",
    "an expression in a container": "Experiment.seed = {1: open('ran', 'w')}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_saved_configuration_runs_nothing(
    kind: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run.parent / "other.gin").write_text("import own_net\n")
    path = run / "config.gin"
    saved = read_sealed(path)
    for text in (f"{HOSTILE[kind]}\n{saved}", f"{saved}\n{HOSTILE[kind]}\n"):
        write_sealed(path, text)
        assert evaluate.main([str(run), "--only=distilled"]) == 2
        assert "config.gin" in one_error(capsys)
        assert not (run.parent / "ran").exists()


def test_a_module_of_the_users_own_is_imported_when_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "config.gin"
    write_sealed(path, "import own_net\n" + read_sealed(path))
    assert evaluate.main([str(run), "--only=distilled"]) == 2
    assert "give --import own_net" in one_error(capsys)
    name = f"Own{run.parent.name}"
    own = ["--import=own_net", f"--gin_param=Experiment.network = @{name}"]
    assert (
        evaluate.main([str(run), "--only=distilled", *own, f"--gin_param={name}.hidden = 5"]) == 0
    )
    assert (run.parent / "ran").exists()
    capsys.readouterr()
    assert evaluate.main([str(run), *own, f"--gin_param={name}.hiden = 5"]) == 2
    assert "did you mean 'hidden'?" in one_error(capsys)
    for flag in ("--architectures=", "--gin_param=Experiment.network = @"):
        assert evaluate.main([str(run), *own, f"{flag}{name}s"]) == 2
        assert f"did you mean {name!r}?" in one_error(capsys)


def test_escape_sequences_are_shown_not_obeyed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b]0;owned\x07\x9b2J\u202e"
    results = read_json(run / "results.json")
    results |= {"dataset": evil, "protocol": f"{evil}$x^$"}
    write_json(run / "results.json", results)
    assert evaluate.main(["run", "--compare=run"]) == 0
    path = run / "config.gin"
    write_sealed(path, read_sealed(path) + f"Experiment.seed = '{evil}'\n")
    assert evaluate.main([str(run)]) == 2
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(text)
    assert comparison_plot({evil: results})[:4] == b"\x89PNG"


@pytest.mark.parametrize("text", ["plain", "é – 日本\n\ttwo", "\x1b[31m", "a\rb", "\ud800"])
def test_what_can_be_shown_stays_as_it_is(text: str) -> None:
    shown = plain(text)
    assert (shown == text) == all(c.isprintable() or c in "\n\t" for c in text)
    shown.encode("utf-8")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_names_only_files_of_its_own_folder(name: str, tmp_path: Path) -> None:
    index: dict[str, Any] = {
        "format": "dd-experts-1",
        "description": {"parameters": {}},
        "training": {},
        "snapshots": 1,
        "shards": [{"expert": 0, "file": name, "sha256": ""}],
    }
    write_json(tmp_path / INDEX, index)
    with pytest.raises(DamagedFileError, match="outside its folder"):
        ExpertBuffer(tmp_path, {"parameters": {}})


def test_tensors_of_others_are_read_without_running_them(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Touch:
        def __reduce__(self) -> Any:
            return Path.touch, (Path("ran"),)

    torch.save({"images": Touch()}, run.parent / "theirs.pt")
    assert evaluate.main([str(run), f"--set={run.parent / 'theirs.pt'}"]) == 2
    assert "theirs.pt" in one_error(capsys)
    assert not (run.parent / "ran").exists()


# A gin file that the user names runs what it imports, but never without an end.


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("include 'main.gin'", "main.gin, line 2: "),
        ("include 'other.gin'", "included within itself"),
        ("Experiment.seed = %a\na = %b\nb = %a", "refers to itself"),
        ("SyntheticDataset.start = @SyntheticDataset()", "refers to itself"),
        ("Experiment.seed = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_a_configuration_that_refers_to_itself_is_refused(
    lines: str, said: str, tmp_path: Path
) -> None:
    (tmp_path / "main.gin").write_text(f"include 'digits.gin'\n{lines}\n")
    (tmp_path / "other.gin").write_text("include 'main.gin'\n")
    with pytest.raises(config.ConfigError, match=said):
        config.load([str(tmp_path / "main.gin")], [])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ConvNet.width = 0", r"width=0.*main.gin, line 2\)"),
        ("ConvNet.widht = 8", r"main.gin, line 2: ConvNet has no parameter 'widht'"),
        ("Experiment.network = @ConvNett", r"main.gin, line 2: .*'ConvNett'"),
        ("windw = 5", r"main.gin, line 2: nothing refers to windw; did you mean 'window'"),
        ("no/ConvNet.width = 8", r"main.gin, line 2: .*nothing refers to the scope 'no'"),
        ("ConvNet.width 8", "main.gin, line 2"),
        ("import nothing_of_that_name", "main.gin, line 2: .*nothing_of_that_name"),
        ("adam.lr = %rat", r"%rat in adam\.lr .* is not set"),
    ],
)
def test_a_message_names_the_file_and_the_line(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "main.gin").write_text(f"include 'digits.gin'\n{line}\n")
    with pytest.raises(config.ConfigError, match=said) as caught:
        config.load([str(tmp_path / "main.gin")], [])
    assert len(str(caught.value).splitlines()) == 1
