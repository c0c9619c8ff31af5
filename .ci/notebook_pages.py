"""Makes a page, and a notebook to download, of every example that is written in cells (`# %%`).

A hook of MkDocs: nothing is run, and nothing is needed beside it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

EXAMPLES = Path(__file__).parents[1] / "examples"
_CELL = re.compile(r"^# %%(.*)$", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what the examples become to the files of the site."""
    from mkdocs.structure.files import File

    for path in sorted(EXAMPLES.glob("*.py")):
        cells = cells_of(path.read_text("utf-8"))
        if cells:
            page, book = as_page(path.stem, cells), json.dumps(as_notebook(cells), indent=1)
            files.append(File.generated(config, f"{path.stem}.md", content=page))
            files.append(File.generated(config, f"{path.stem}.ipynb", content=book))
    return files


def cells_of(script: str) -> list[tuple[str, str, str]]:
    """(kind, title, text) of the cells; none, if there are no marks. Kinds: "markdown", "code"."""
    _, *parts = _CELL.split(script)
    cells = []
    for title, body in zip(parts[::2], parts[1::2], strict=True):
        if title.strip() == "[markdown]":
            cells.append(("markdown", "", body.strip().strip('"').strip()))
        else:
            cells.append(("code", title.strip(), body.strip()))
    return cells


def as_page(name: str, cells: list[tuple[str, str, str]]) -> str:
    """Markdown: the first sentence is the heading, and the title of a cell one below it."""
    written = []
    for kind, title, text in cells:
        if kind == "code":
            written.append(f"## {title}\n\n```python\n{text}\n```")
        elif written:
            written.append(text)
        else:
            heading, _, rest = text.partition("\n")
            source = f"The file is `examples/{name}.py`; [as a notebook]({name}.ipynb)."
            written.append(f"# {heading.rstrip('.')}\n\n{rest.strip()}\n\n{source}")
    return "\n\n".join(written) + "\n"


def as_notebook(cells: list[tuple[str, str, str]]) -> dict[str, Any]:
    """The same as Jupyter reads it, nbformat 4.5, without outputs."""
    made: list[dict[str, Any]] = []
    for kind, title, text in cells:
        cell: dict[str, Any] = {"cell_type": kind, "metadata": {}, "id": f"cell-{len(made)}"}
        if kind == "code":
            cell |= {"execution_count": None, "outputs": []}
            text = f"# {title}\n{text}"
        made.append(cell | {"source": text.splitlines(keepends=True)})
    language = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": made, "metadata": language, "nbformat": 4, "nbformat_minor": 5}
