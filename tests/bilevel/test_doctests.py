"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import bilevel

MODULES = ["bilevel", *(m.name for m in pkgutil.walk_packages(bilevel.__path__, "bilevel."))]


def examples(name):
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = {"bilevel": bilevel, "torch": torch}
    return [test for test in finder.find(module, name, globs=names) if test.examples]


@pytest.mark.parametrize("name", [name for name in MODULES if examples(name)])
def test_examples_of(name):
    for test in examples(name):
        output = []
        failed, _ = doctest.DocTestRunner().run(test, out=output.append)
        assert not failed, "".join(output)


@pytest.mark.parametrize(
    "name",
    ["hypergradient", "problem", "optim", "truncation", "estimators"],
)
def test_the_entry_points_have_examples(name):
    assert examples(f"bilevel.{name}")


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_first_program_of_a_page_runs(page):
    text = (Path(__file__).parents[2] / page).read_text()
    # What README.md has of dd comes after this.
    text = text.partition("## Distil a dataset")[0]
    source = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    names = {}
    exec(compile(source, page, "exec"), names)
    assert names["result"].stats.status == "ok"
    assert names["outer"]["log_penalty"].grad is not None
