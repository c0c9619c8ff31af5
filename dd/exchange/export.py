"""A distilled set written in another form, with a card that tells what it is."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilevel.checks import check_choice
from dd.distillation.gallery import png
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.names import RESULTS
from dd.exchange.formats import Arrays, DDRanking, Format, Safetensors, Tensors
from dd.exchange.picture_formats import Folder, HuggingFace
from dd.exchange.shipped import find_set
from dd.runtime.files import read_json, write_bytes, write_text
from dd.runtime.plain import plain

FORMATS: dict[str, Format] = {
    each.name: each
    for each in (Safetensors(), Tensors(), Arrays(), Folder(), HuggingFace(), DDRanking())
}
CARD, PREVIEW = "README.md", "preview.png"
#: By this a folder that an export made is known; only such a one is ever replaced.
_MARK = "<!-- written by dd-export -->"


def export_set(
    source: DistilledSet | str | Path,
    folder: str | Path,
    format: str = "safetensors",
    *,
    overwrite: bool = False,
) -> Path:
    """Write a distilled set into a folder of its own, with a README and a picture.

    Args:
        source: The set, its file, the folder of its run, or the name of one that comes with `dd`.
            A run's results are taken along.
        folder: Where; it must not exist, or be empty.
        format: "safetensors", "pt", "npz", "folder", "datasets" or "ddranking".
        overwrite: Replace what an earlier export left in `folder`.

    Returns:
        The folder.

    Raises:
        FileExistsError: There is something in the folder.
        FileNotFoundError, DamagedFileError: There is no such set, or it cannot be read.
        ValueError: There is no such format, or the set cannot be written in it.
    """
    check_choice("format", format, tuple(FORMATS))
    form, target = FORMATS[format], Path(folder)
    _check_free(target, overwrite)
    if isinstance(source, DistilledSet):
        distilled = source
    else:
        path = find_set(source)
        distilled = with_results(DistilledSet.load(path), path.with_name(RESULTS))
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(".unfinished", f".{target.name}.", target.absolute().parent))
    try:
        form.write(distilled, temporary)
        write_text(temporary / CARD, card(distilled, form, target.name))
        write_bytes(
            temporary / PREVIEW,
            png(distilled.pixels(), distilled.images_per_class, distilled.class_names),
        )
        temporary.chmod(0o755)
        if target.exists():
            _check_free(target, overwrite)
            shutil.rmtree(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return target


def with_results(distilled: DistilledSet, results: Path) -> DistilledSet:
    """The set with what was measured of it in its recipe, if that is known.

    Raises:
        DamagedFileError: The results cannot be read.
    """
    found: Mapping[str, Any] = read_json(results) if results.is_file() else {}
    accuracy = (found.get("accuracy") or {}).get("distilled")
    step = (found.get("distilled_set") or {}).get("outer_step")
    if accuracy is None or step != distilled.provenance.get("outer_step"):
        return distilled
    measured = {name: accuracy[name] for name in ("mean", "std", "networks", "steps")}
    measured |= {"network": found["network"], "protocol": found["protocol"]}
    recipe = {**distilled.recipe, "steps": accuracy["steps"], "measured": measured}
    return replace(distilled, recipe=recipe)


def card(distilled: DistilledSet, form: Format, name: str) -> str:
    """What the set is, how it was made, and how it is used, in Markdown."""
    known, recipe = distilled.provenance, distilled.recipe
    shape = " × ".join(map(str, distilled.images.shape[1:]))
    dataset = known.get("dataset", "a dataset that is not named")
    measured = recipe.get("measured")
    language = "python"
    parts = [
        f"{form.front_matter(distilled)}{_MARK}\n# {name}\n",
        f"{len(distilled.images)} images of {shape} that stand for the training set of "
        f"**{dataset}**: {len(distilled.class_names)} classes, {distilled.label_kind} labels, "
        "learned by `dd` (dataset distillation, package `bilevel-dd`).\n",
        f"![The images, each stretched to the full range]({PREVIEW})\n",
    ]
    if measured:
        parts.append(
            f"Networks trained on it reach **{100 * measured['mean']:.1f} ± "
            f"{100 * measured['std']:.1f} %** on the test set ({measured['networks']} × "
            f"{measured['network']}, protocol {measured['protocol']}, {measured['steps']} steps).\n"
        )
    parts += [
        f"## Use\n\n```{language}\n{form.use}\n```\n",
        f"What this form keeps: {form.keeps}\n",
        "## Real images\n\nImages are what a network sees, behind a transform. Pixels x in [0, 1] "
        f"are brought there, and back, by (`{distilled.transform.kind}`):\n\n"
        f"```{language}\n{distilled.transform.formula}\n\n"
        f"{distilled.transform.inverse_formula}\n```\n",
        "## Train\n\n" + _told(recipe),
        f"## Classes\n\n{', '.join(distilled.class_names)}\n",
        "## Where it is from\n\n"
        + "".join(f"- {key}: {value}\n" for key, value in known.items())
        + f"\nThe images are derived from {dataset}; its licence and terms hold for them.\n",
    ]
    return plain("\n".join(parts))


def _told(recipe: Mapping[str, Any]) -> str:
    """The recipe as a list, but for the configuration, which is long."""
    if not recipe:
        return "The set does not say how a network is to be trained on it.\n"
    told = {name: value for name, value in recipe.items() if name not in ("config", "measured")}
    network = told.get("network")
    if isinstance(network, dict):
        told["network"] = {name: value for name, value in network.items() if name != "layers"}
    return "".join(f"- {name}: {value}\n" for name, value in told.items())


def _check_free(target: Path, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    path = target / CARD
    made_here = path.is_file() and _MARK in path.read_text("utf-8", errors="replace")
    if not made_here:
        raise FileExistsError(f"{target} exists and is no export: choose another folder")
    if not overwrite:
        raise FileExistsError(f"{target} holds an export: choose another folder, or overwrite it")
