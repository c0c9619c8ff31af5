"""Gin files and bindings as people have them: what they say, or one line that says where."""

from pathlib import Path

import pytest

from dd import config

INCLUDE = b"include 'digits.gin'\n"
SET = b"Distiller.inner_steps = 50\n"

#: All of them set 50 inner steps.
RIGHT: dict[str, bytes] = {
    "a byte order mark": b"\xef\xbb\xbf" + INCLUDE + SET,
    "the line ends of Windows": (INCLUDE + SET).replace(b"\n", b"\r\n"),
    "the line ends of old": (INCLUDE + SET).replace(b"\n", b"\r"),
    "no last line end": (INCLUDE + SET).strip(),
    "tabs": INCLUDE + SET.replace(b" ", b"\t"),
    "a comment behind an include": INCLUDE.strip() + b"  # the recipe\n" + SET,
    "a block": INCLUDE + b"Distiller:\n\tinner_steps = 50\n",
    "a macro of a macro": INCLUDE + b"a = %b\nb = 50\nDistiller.inner_steps = %a\n",
    "a macro in a scope": INCLUDE + b"s/a = 50\nDistiller.inner_steps = %s/a\n",
    "a percent sign in a text": INCLUDE + SET + b"arrays.path = '100%zz.npz'\n",
}


def written(content: bytes, folder: Path) -> str:
    (folder / "mine.gin").write_bytes(content)
    return str(folder / "mine.gin")


@pytest.mark.parametrize("name", RIGHT)
def test_what_can_be_read_is_read(name: str, tmp_path: Path) -> None:
    assert config.load([written(RIGHT[name], tmp_path)], []).distiller.inner_steps == 50


#: What is behind an include, and what is said of it.
WRONG: dict[str, tuple[bytes, str]] = {
    "sixteen bits a letter": ("a = 1\n".encode("utf-16"), r"mine\.gin is no UTF-8 text"),
    "a letter of Latin-1": (b"# caf\xe9\n", r"mine\.gin is no UTF-8 text"),
    "a macro of itself": (b"a = %a\n", "line 2: a refers to itself, through a$"),
    "macros of each other": (b"a = %b\nb = %a\n", "line 2: a refers to itself, through a and b$"),
    "in a circle of three": (b"a = %b\nb = [%c]\nc = {'x': %a}\n", "line 2: a refers to itself"),
    "no such macro": (b"Distiller.inner_steps = %z\n", r"%z in Distiller\.inner_steps \(.*line 2"),
    "an include of nothing": (b"include ''\n", "line 2: an include is written include 'FILE'"),
    "an include without quotes": (b"include digits.gin\n", "line 2: an include is written"),
    "an include in two parts": (b"include 'digits' '.gin'\n", "line 2: an include is written"),
    "a raw include": (b"include r'digits.gin'\n", "line 2: an include is written"),
    "a size of the data": (b"ConvNet.num_classes = 3\n", "line 2.* is what the dataset has"),
    "no owner": (b"inner_steps = 3\n", r"line 2: .*did you mean Distiller\.inner_steps\?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_meant_is_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    content, said = WRONG[name]
    with pytest.raises(config.ConfigError, match=said) as error:
        config.load([written(INCLUDE + content, tmp_path)], [])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("binding", [" ", "# nothing", "\t\n"])
def test_a_binding_that_sets_nothing_is_refused(binding: str) -> None:
    with pytest.raises(config.ConfigError, match=r"sets nothing; it is 'NAME.PARAMETER = VALUE'"):
        config.load(["digits"], [binding])


def test_a_binding_that_includes_a_file_is_refused() -> None:
    with pytest.raises(config.ConfigError, match="a file is given by --gin_file"):
        config.load(["digits"], ["include 'digits.gin'"])


@pytest.mark.parametrize("name", ["a" * 5000, "a\0b", "..", "/"])
def test_a_file_that_cannot_be_is_one_line(name: str) -> None:
    with pytest.raises(config.ConfigError, match=r"^[^\n]+ does not exist; [^\n]+$"):
        config.load([name], [])
