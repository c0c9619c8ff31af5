"""Distil from Python, without a gin file: `dd.distil`."""

import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import gin
from bilevel.checks import check_callable
from bilevel.truncation import Truncation
from dd import config
from dd.api.bindings import Data, dataset_bindings, keep, named, part_bindings
from dd.api.runs import is_resumed
from dd.distillation.events import Event
from dd.distillation.recorder import DISTILLED
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.names import RESULTS
from dd.exchange.export import with_results
from dd.experiment import CONFIG
from dd.gin_text import COMMAND_LINE
from dd.runtime.stopping import StopRequest, stop_on_signal
from dd.runtime.writer import only_writer

#: The recipe that suits any images.
RECIPE = "own_images"


def distil(
    dataset: Data,
    *,
    network: str | Callable[..., Any] = "ConvNet",
    truncation: str | Callable[..., Any] | Truncation | None = None,
    images_per_class: int = 1,
    minutes: float | None = None,
    outer_steps: int | None = None,
    image_size: int = 32,
    seed: int = 0,
    run_dir: str | Path | None = None,
    recipe: str | Path = RECIPE,
    settings: Mapping[str, Any] | None = None,
    callbacks: Iterable[Callable[[Event], object]] = (),
    evaluate: bool = False,
) -> DistilledSet:
    """Distil a dataset to a few images per class, in this process, with a bar that shows progress.

    It does what `dd-train` does, and leaves a folder that the commands know: `dd-evaluate` judges
    it, `dd-train` and this function go on with it. An interrupt, as by Ctrl-C or a notebook's
    stop button, ends it after the current step; what was learned by then is returned.

    Args:
        dataset: A folder with one sub-folder of pictures for each class; an `.npz` file; the name
            of a dataset that gin knows, such as "digits"; an `ImageDataset`; a pair (images,
            labels) of arrays, as `dd.data.arrays` describes them; or a `torch.utils.data.Dataset`
            of pairs (picture or tensor in [0, 1], class). What has no path is kept in the folder of
            the run.
        network: The name of a network, its class, or a `functools.partial` of it; called with
            `num_classes`, `channels` and `image_size`. One of your own need not be registered,
            but only one that a module registers with `@gin.configurable` can be judged by a
            command (`--import MODULE`).
        truncation: Which inner steps are differentiated: a name such as "StageAware", a class, a
            `functools.partial`, or an instance that shows its arguments as attributes. Default: the
            recipe's.
        images_per_class: Of the distilled set.
        minutes: Wall clock at most; default: the recipe's, or none if `outer_steps` is given.
        outer_steps: At most.
        image_size: Height and width to which pictures of a folder are scaled.
        seed: Of everything.
        run_dir: Where the run is kept; one that holds a checkpoint is resumed. Default: a new
            folder below `runs/`.
        recipe: A gin file, by its name, which has the values of everything else.
        settings: Other parameters by their names in gin files, such as
            `{"Distiller.inner_steps": 60}`; a text that begins with @ names a part.
        callbacks: Each is called with every event of the loop (`dd.distillation.events`); if one
            returns True, the run ends after that step.
        evaluate: Afterwards also train networks on the set, and compare (`results.json`).

    Returns:
        The set, as `distilled.safetensors` in the folder holds it.

    Raises:
        ValueError: An argument that cannot work; the message names it.
        FileNotFoundError: The dataset is not there.
        bilevel.BilevelError: The run failed, such as by hypergradients that are not finite.

    What this process had configured in gin is forgotten.
    """
    watchers = [check_callable("callbacks", each, "[print]") for each in callbacks]
    folder = Path(run_dir) if run_dir is not None else _new_folder(dataset)
    bindings, arrays = dataset_bindings(dataset, folder, image_size)
    bindings += [
        *part_bindings("Experiment.network", network, evaluated=False),
        f"SyntheticDataset.images_per_class = {images_per_class!r}",
        f"Experiment.seed = {seed!r}",
    ]
    if truncation is not None:
        bindings += part_bindings("Distiller.truncation", truncation, evaluated=True)
    if outer_steps is not None:
        bindings.append(f"Distiller.outer_steps = {outer_steps!r}")
    if minutes is not None or outer_steps is not None:
        bindings.append(f"Distiller.minutes = {minutes!r}")
    bindings += [f"{name} = {named(value)}" for name, value in (settings or {}).items()]
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with only_writer(folder):
            # What no run has begun with may be left from a call with other data that failed.
            keep(arrays, may_differ=not (folder / CONFIG).exists())
            _run(folder, str(recipe), bindings, watchers, evaluate)
    finally:
        gin.clear_config()  # which also lets modules register parts again
        if new and not (folder / CONFIG).exists():
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # what another run is in by now stays
                for path in new[1:]:
                    path.rmdir()
    return with_results(DistilledSet.load(folder / DISTILLED), folder / RESULTS)


def _run(
    folder: Path,
    recipe: str,
    bindings: Sequence[str],
    watchers: Sequence[Callable[[Event], object]],
    evaluate: bool,
) -> None:
    try:
        experiment = config.load([recipe], bindings)
        data = experiment.prepare()
        text = config.text()
        is_resumed(folder, text)
    except config.ConfigError as error:
        raise ValueError(str(error).removesuffix(f" ({COMMAND_LINE})")) from error

    # Signals can be handled in the main thread alone.
    in_main = threading.current_thread() is threading.main_thread()
    with stop_on_signal() if in_main else nullcontext(StopRequest()) as stop:

        def watch(event: Event) -> None:
            told = [each(event) is True for each in watchers]
            stop.by_caller |= any(told)

        experiment.train(data, folder, stop, text, evaluate=evaluate, watch=watch)


def _new_folder(dataset: object) -> Path:
    """A folder below `runs/` that is not there yet."""
    name = Path(dataset).stem if isinstance(dataset, (str, Path)) else "distilled"
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S-%f}"
