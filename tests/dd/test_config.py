"""Configuration: gin files build experiments, and every mistake is one line that names it."""

from pathlib import Path

import numpy
import pytest
import torch

import bilevel
from dd import config
from dd.distillation.settings import Distiller
from dd.experiment import Experiment
from dd.objectives import RealImages

GIN = Path(__file__).parents[2] / "gin"
DIGITS = str(GIN / "digits.gin")
#: What makes any shipped configuration buildable here, without a download.
SMALL = ["Experiment.dataset = @digits()", "ConvNet.depth = 1", "ConvNet.width = 8"]

each_shipped_file = pytest.mark.parametrize(
    "path",
    # schedules.gin is for others to include.
    [path for path in sorted(GIN.rglob("*.gin")) if path.name != "schedules.gin"],
    ids=lambda path: str(path.relative_to(GIN)),
)


def error(*bindings: str, files: list[str] | None = None) -> str:
    """The message with which bindings are refused, which must be one short line."""
    with pytest.raises(config.ConfigError) as caught:
        config.load([DIGITS] if files is None else files, bindings)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return message


# What works.


@each_shipped_file
def test_shipped_files_build(path: Path) -> None:
    experiment = config.load([str(path)], SMALL)
    assert isinstance(experiment, Experiment)
    assert experiment.dataset.name == "digits"
    assert sum(parameter.numel() for parameter in experiment.network.parameters()) > 0


@pytest.mark.parametrize(
    "name",
    [
        "tiny_imagenet.gin",
        "tiny_imagenet_ipc1.gin",
        "tiny_imagenet_psp_cpu.gin",
        "imagenet.gin",
        "imagenet_ipc10.gin",
    ],
)
def test_shipped_files_with_patches_fit_images_of_64_by_64(name: str, tmp_path: Path) -> None:
    numpy.savez(
        tmp_path / "images.npz",
        images=numpy.zeros((20, 64, 64, 3), numpy.uint8),
        labels=numpy.arange(20) % 2,
    )
    arrays = ["Experiment.dataset = @arrays()", f"arrays.path = {str(tmp_path / 'images.npz')!r}"]
    experiment = config.load([str(GIN / name)], arrays)
    assert experiment.synthetic.patches_per_side == 4
    objective = experiment.distiller.objective
    assert isinstance(objective, RealImages)
    assert objective.alignment is not None
    # Those for whole data sets align a few classes at a time: all would not fit on a GPU.
    few = objective.alignment.classes_per_step
    assert few == (None if name == "tiny_imagenet_psp_cpu.gin" else 50)


@each_shipped_file
def test_shipped_files_make_synthetic_images_of_ten_classes(path: Path) -> None:
    """Also those for two hundred or a thousand: a user may list fewer."""
    synthetic = config.load([str(path)], SMALL).synthetic
    labels = torch.arange(10).repeat_interleave(max(synthetic.images_per_class, 8))
    images = torch.randn(len(labels), 3, 32, 32)
    generator = torch.Generator().manual_seed(0)
    batch = synthetic.batch(synthetic.create(images, labels, 10, generator), generator)
    assert batch[0].shape[1:] == (3, 32, 32)
    assert len(batch[0]) == len(batch[1]) <= len(labels)


@each_shipped_file
def test_shipped_files_set_nothing_without_effect(path: Path) -> None:
    config.load([str(path)], SMALL)
    # The dataset is another one here, so what a file says of its own has no effect.
    assert config.unused() == []


def test_what_a_default_is_like_can_be_set_without_naming_it(tmp_path: Path) -> None:
    named = ("Distiller.objective", "RealImages.precision", "Distiller.estimator")
    lines = Path(DIGITS).read_text().splitlines()
    path = tmp_path / "plain.gin"
    path.write_text("\n".join(line for line in lines if not line.startswith(named)))
    bindings = [
        "RealImages.real_batch = 77",
        "Precision.inner = 'float32'",
        "Adjoint.hvp = 'forward'",
    ]
    distiller = config.load([str(path)], bindings).distiller
    assert distiller.objective.real_batch == 77
    assert distiller.objective.precision.inner == "float32"
    assert distiller.estimator.hvp == "forward"
    assert config.warnings_of_unused() == []


@pytest.mark.parametrize("value", ["1e400", "[1e400]", "-1e400"])
@pytest.mark.parametrize("name", ["Distiller.objective", "RealImages.precision", "adam.eps"])
def test_what_gin_cannot_write_is_set_all_the_same(name: str, value: str) -> None:
    with pytest.raises((config.ConfigError, ValueError), match=name.rpartition(".")[2]):
        config.load([DIGITS], [f"{name} = {value}"])
    config.load([DIGITS], [f"Last.window = {value}"])
    assert config.unused() == ["Last.window"]


@each_shipped_file
def test_the_operative_configuration_reproduces_itself(path: Path, tmp_path: Path) -> None:
    config.load([str(path)], SMALL).prepare()
    text = config.text()
    (tmp_path / "config.gin").write_text(text)
    config.load([str(tmp_path / "config.gin")], []).prepare()
    assert config.text() == text


def test_the_operative_configuration_holds_defaults_and_long_values(tmp_path: Path) -> None:
    steps = list(range(1, 60))
    config.load([DIGITS], [f"Evaluator.steps = {steps}", "Experiment.seed = 7"]).prepare()
    (tmp_path / "config.gin").write_text(config.text())
    experiment = config.load([str(tmp_path / "config.gin")], [])
    assert experiment.evaluator.steps == steps
    assert experiment.seed == 7
    found = config.parameters((tmp_path / "config.gin").read_text())
    assert found["Experiment.seed"] == "7"
    assert found["Evaluator.steps"] == str(steps)
    assert found["SyntheticDataset.learn_labels"] == "False"
    assert found["Distiller.truncation"] == "@RandomWindow()"


def test_bindings_override_files_and_later_files_override_earlier_ones(tmp_path: Path) -> None:
    later = tmp_path / "later.gin"
    later.write_text("Experiment.seed = 1\nDistiller.outer_steps = 5\n")
    experiment = config.load([DIGITS, str(later)], ["Experiment.seed = 2"])
    assert experiment.distiller.outer_steps == 5
    assert experiment.seed == 2


def test_nothing_is_left_of_the_configuration_before() -> None:
    config.load([DIGITS], ["Experiment.seed = 3"])
    assert config.load([DIGITS], []).seed == 0


def test_names_that_gin_files_use_are_documented() -> None:
    undocumented = [
        name
        for name, target in config.CONFIGURABLES.items()
        if len((target.__doc__ or "").strip()) < 20
    ]
    assert undocumented == []


# Includes.


@pytest.fixture
def included(tmp_path: Path) -> Path:
    """A folder with `main.gin`, which includes `base.gin` beside it."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "base.gin").write_text(f"include '{DIGITS}'\nExperiment.seed = 11\n")
    (folder / "main.gin").write_text("include 'base.gin'\n")
    return folder


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_an_include_is_found_from_any_working_directory(
    included: Path,
    relative: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "mine/main.gin" if relative else str(included / "main.gin")
    assert config.load([name], []).seed == 11
    assert caplog.text == ""


def test_an_include_is_the_file_beside_not_one_in_the_working_directory(
    included: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base.gin").write_text(f"include '{DIGITS}'\nExperiment.seed = 99\n")
    monkeypatch.chdir(tmp_path)
    assert config.load([str(included / "main.gin")], []).seed == 11


def test_an_include_is_the_file_beside_not_one_beside_an_earlier_configuration(
    included: Path, tmp_path: Path
) -> None:
    config.load([str(included / "main.gin")], [])
    other = tmp_path / "other"
    other.mkdir()
    (other / "base.gin").write_text(f"include '{DIGITS}'\nExperiment.seed = 12\n")
    (other / "main.gin").write_text("include 'base.gin'\n")
    assert config.load([str(other / "main.gin")], []).seed == 12


def test_a_missing_include_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "main.gin"
    path.write_text("include 'nothere.gin'\n")
    assert "nothere.gin" in error(files=[str(path)])
    assert caplog.text == ""


# Recipes.


@pytest.mark.parametrize("name", ["digits", "digits.gin", "gin/digits", "gin/digits.gin"])
def test_a_recipe_is_found_by_its_name_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config.load([name], []).distiller.outer_steps == 320


def test_a_file_in_the_working_directory_comes_before_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.gin").write_text("include 'gin/digits.gin'\nExperiment.seed = 13\n")
    assert config.load(["digits"], []).seed == 13
    assert config.load(["gin/digits"], []).seed == 0


def test_a_misspelt_recipe_is_named_with_the_one_that_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "digit does not exist; did you mean 'digits.gin'?" in error(files=["digit"])
    assert f"recipes are in {config.RECIPES}" in error(files=["something else"])


# Mistakes.


def test_a_missing_file_is_named_with_the_one_that_is_meant() -> None:
    message = error(files=[str(GIN / "digit.gin")])
    assert "digit.gin does not exist; did you mean 'digits.gin'?" in message


def test_a_missing_file_like_no_other_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    for name in ("one.gin", "two.gin"):
        (tmp_path / name).write_text("")
    assert "zzzzzz does not exist; there are one.gin, two.gin" in error(
        files=[str(tmp_path / "zzzzzz")]
    )


def test_a_missing_file_in_a_missing_folder(tmp_path: Path) -> None:
    assert "x.gin does not exist" in error(files=[str(tmp_path / "no" / "x.gin")])


@pytest.mark.parametrize(
    ("binding", "wrong", "right"),
    [
        ("ConvNet.widht = 8", "widht", "width"),
        ("Distiller.inner_step = 8", "inner_step", "inner_steps"),
        ("standardize.chnk = 8", "chnk", "chunk"),
        ("RandomWindow.windows = 8", "windows", "window"),
        ("ConvNett.width = 8", "ConvNett", "ConvNet"),
        ("Experiment.network = @Convnet", "Convnet", "ConvNet"),
        ("Experiment.dataset = @digit()", "digit", "digits"),
        ("Distiller.optimizer = @Adam()", "Adam", "adam"),
    ],
)
def test_a_misspelt_name_is_corrected(binding: str, wrong: str, right: str) -> None:
    message = error(binding)
    assert repr(wrong) in message
    assert f"did you mean {right!r}" in message


@pytest.mark.parametrize(("old", "new"), config.MOVED.items())
def test_a_parameter_that_was_moved_says_where_to(old: str, new: str) -> None:
    message = error("RealImages.precision = @Precision()", f"{old} = None")
    assert message.startswith(f"{old} is now {new}")
    assert ("@RealImages()" in message) == new.startswith("RealImages")


def test_a_name_like_no_other_gets_the_list() -> None:
    message = error("Distiller.xyzzy = 1")
    assert "Distiller has no parameter 'xyzzy'" in message
    assert "outer_steps" in message


WRONG_VALUES = [
    "Experiment.seed = 1.5",
    "Experiment.seed = -1",
    "Experiment.seed = '0'",
    "Experiment.device = 'gpu'",
    "Experiment.device = 'meta'",
    "Experiment.validation_fraction = 'half'",
    "Experiment.validation_fraction = 0",
    "Experiment.validation_fraction = 1.5",
    "Experiment.images_on = 'disk'",
    "Experiment.dataset = 'digits'",
    "Experiment.network = 'ConvNet'",
    "Experiment.transform = None",
    "SyntheticDataset.images_per_class = 0",
    "SyntheticDataset.images_per_class = 1.0",
    "SyntheticDataset.start = 'nosie'",
    "SyntheticDataset.projection = ['start']",
    "SyntheticDataset.learn_labels = 'no'",
    "SyntheticDataset.batch_per_class = 2",
    "SyntheticDataset.patches_per_side = 0",
    "Distiller.outer_steps = 0",
    "Distiller.inner_steps = 2.5",
    "Distiller.minutes = '5'",
    "Distiller.minutes = 0",
    "Distiller.keep_every = 0",
    "RealImages.real_batch = True",
    "RealImages.real_micro_batch = 0",
    "Distiller.image_lr = '1e-3'",
    "Distiller.label_lr = -1",
    "Distiller.validate_every = -1",
    "Distiller.snapshot_minutes = 5",
    "Distiller.snapshot_minutes = ['five']",
    "RandomWindow.window = 0",
    "RandomWindow.window = '20'",
    "RandomWindow.refresh = 0",
    "MovingAverageClip.decay = 1.0",
    "MovingAverageClip.factor = 'two'",
    "RealImages.alignment = 1.0",
    "adam.lr = 'fast'",
    "adam.lr = -1",
    "adam.betas = 0.9",
    "adam.eps_root = None",
    "Evaluator.networks = 0",
    "Evaluator.steps = 5",
    "Evaluator.steps = [5, 'ten']",
    "Evaluator.lr = [1]",
    "ConvNet.depth = 0",
    "ConvNet.depth = '2'",
    "ConvNet.width = 2.5",
    "digits.test_fraction = 'half'",
    "digits.test_fraction = 2",
]


@pytest.mark.parametrize("binding", WRONG_VALUES)
def test_a_wrong_value_is_refused_with_the_name_of_its_parameter(binding: str) -> None:
    assert binding.split(" = ")[0].split(".")[1] in error(binding)


@pytest.mark.parametrize(
    "binding",
    [
        "Experiment.dataset = @digits",
        "Experiment.augmentation = @NoAugmentation",
        "Experiment.synthetic = @SyntheticDataset",
        "Experiment.distiller = @Distiller",
        "Experiment.evaluator = @Evaluator",
        "Distiller.truncation = @RandomWindow",
        "Distiller.optimizer = @adam",
        "Distiller.clip = @MovingAverageClip",
        "RealImages.alignment = @PrototypeAlignment",
        "Distiller.estimator = @Adjoint",
        "Evaluator.augmentation = @NoAugmentation",
    ],
)
def test_a_reference_without_its_parentheses_is_refused(binding: str) -> None:
    message = error(binding)
    assert binding.split(" = ")[0].split(".")[1] in message
    assert "()" in message


@pytest.mark.parametrize(
    ("binding", "name"),
    [
        ("Experiment.network = @ConvNet()", "ConvNet"),
        ("Experiment.transform = @standardize()", "standardize"),
        ("Experiment.dataset = @ConvNet", "dataset"),
        ("Experiment.evaluator = @SyntheticDataset()", "evaluator"),
        ("Distiller.truncation = @SyntheticDataset()", "truncation"),
        ("Distiller.optimizer = @RandomWindow()", "optimizer"),
        ("Distiller.estimator = @RandomWindow()", "estimator"),
        ("Experiment.seed = %undefined", "undefined"),
        ("Experiment.seed = %gin.REQUIRED", "Experiment.seed"),
        ("import nonexistent_module", "nonexistent_module"),
    ],
)
def test_a_wrong_reference_is_refused_by_name(binding: str, name: str) -> None:
    assert name in error(binding)


@pytest.mark.parametrize(
    ("binding", "name"),
    [
        ("PrototypeAlignment.weight = 0", "weight=0"),
        ("PrototypeAlignment.layer = 'feature'", "layer='feature'"),
        ("SyntheticDataset.patches_per_side = 4", "patches_per_side=4"),
        ("MovingAverageRowClip.cap = 0.5", "cap=0.5"),
    ],
)
def test_patches_that_cannot_work_are_refused_before_anything_is_done(
    binding: str, name: str
) -> None:
    parts = [
        "RealImages.alignment = @PrototypeAlignment()",
        "Distiller.clip = @MovingAverageRowClip()",
    ]
    config.load([DIGITS], parts)
    assert name in error(*parts, binding)


def test_low_rank_hessians_are_configured_by_name() -> None:
    experiment = config.load(
        [DIGITS],
        [
            "Distiller.estimator = @LowRank()",
            "LowRank.basis = @Krylov()",
            "Krylov.max_rank = 8",
            "LowRank.group_size = 2",
        ],
    )
    estimator = experiment.distiller.estimator
    assert isinstance(estimator, bilevel.estimators.LowRank)
    assert isinstance(estimator.basis, bilevel.basis.Krylov)
    assert (estimator.basis.max_rank, estimator.group_size) == (8, 2)


@pytest.mark.parametrize(
    ("name", "bindings", "expected"),
    [
        ("FirstOrder", [], {}),
        ("Penalty", ["penalty = 50.0", "steps = 30"], {"penalty": 50.0, "steps": 30}),
        ("ValueFunction", ["barrier = 2.0"], {"barrier": 2.0}),
        ("MoreauEnvelope", ["gamma = 5.0", "batches = 2"], {"gamma": 5.0, "batches": 2}),
    ],
)
def test_first_order_estimators_are_configured_by_name(
    name: str, bindings: list[str], expected: dict[str, float]
) -> None:
    settings = [f"{name}.{binding}" for binding in bindings]
    estimator = config.load(
        [DIGITS], [f"Distiller.estimator = @{name}()", *settings]
    ).distiller.estimator
    assert isinstance(estimator, getattr(bilevel.estimators, name))
    assert {key: getattr(estimator, key) for key in expected} == expected


def test_eigenvectors_are_not_kept_from_network_to_network() -> None:
    message = error(
        "Distiller.estimator = @LowRank()",
        "LowRank.basis = @Eigenvectors()",
        "Eigenvectors.refresh_every = 20",
    )
    assert "estimator=LowRank: it takes over its eigenvectors (refresh_every=20)" in message


@pytest.mark.parametrize(
    "estimator",
    [
        bilevel.estimators.Implicit(warm_start=True),
        bilevel.estimators.PersistentEvolutionStrategies(0.1, 10),
    ],
)
def test_estimators_that_go_on_from_the_step_before_are_refused(
    estimator: bilevel.estimators.Estimator,
) -> None:
    with pytest.raises(ValueError, match=f"estimator={type(estimator).__name__}: it takes over"):
        Distiller(10, 20, bilevel.truncation.Full(), bilevel.optim.sgd(0.1), estimator=estimator)


def test_a_window_longer_than_the_inner_run_is_refused_with_both_numbers() -> None:
    message = error("RandomWindow.window = 21", "Distiller.inner_steps = 20")
    assert "inner_steps=20" in message
    assert "21" in message


@pytest.mark.parametrize("binding", ["ConvNet.width 8", "ConvNet.width = ", "ConvNet.width = [1"])
def test_what_is_no_gin_is_refused(binding: str) -> None:
    assert error(binding)


@pytest.mark.parametrize(
    ("binding", "words"),
    [
        ("ConvNet.width = int('8')", "it is not computed"),
        ("ConvNet.width = f'8'", "it is not computed"),
        ("adam.lr = -inf", "it is not computed"),
        ("adam.lr = math.pi", "it is not computed"),
        ("Evaluator.steps = [10, ", "opened and not closed"),
        ("ConvNet.width = (8", "opened and not closed"),
        ("Distiller.optimizer = @adam.lr", "a reference is to what has it, as @adam is"),
        ("Experiment.network = @ConvNet.width", "a reference is to what has it, as @ConvNet is"),
    ],
)
def test_what_no_value_can_be_is_said(binding: str, words: str) -> None:
    assert words in error(binding)


def test_what_is_no_gin_in_a_file_is_refused_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.gin"
    path.write_text("Experiment.seed = 1\nConvNet.width 8\n")
    message = error(files=[str(path)])
    assert "broken.gin" in message
    assert "line 2" in message


def test_an_empty_configuration_says_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "empty.gin"
    path.write_text("")
    message = error(files=[str(path)])
    assert "Experiment" in message
    assert "dataset" in message


def test_a_dataset_that_is_not_there_says_where_it_was_looked_for(tmp_path: Path) -> None:
    message = error(
        "Experiment.dataset = @cifar10()",
        f"cifar10.root = '{tmp_path}'",
        "cifar10.download = False",
    )
    assert str(tmp_path) in message


# Parameters without effect.


def test_a_parameter_of_something_unused_is_found() -> None:
    config.load([DIGITS], ["DSA.strategy = 'flip'", "Last.window = 3", "adamw.lr = 1.0"])
    assert sorted(config.unused()) == ["DSA.strategy", "Last.window", "adamw.lr"]


def test_a_parameter_of_something_referred_to_is_not() -> None:
    config.load(
        [DIGITS], ["Evaluator.augmentation = @DSA()", "DSA.strategy = 'flip'", "adam.eps = 1e-7"]
    )
    assert config.unused() == []


def test_macros_and_scopes_have_an_effect() -> None:
    experiment = config.load(
        [DIGITS],
        [
            "SEED = 5",
            "Experiment.seed = %SEED",
            "Distiller.optimizer = @inner/adam()",
            "inner/adam.eps = 1e-7",
        ],
    )
    assert experiment.seed == 5
    assert config.unused() == []


def test_a_parameter_that_nothing_refers_to_is_warned_of(tmp_path: Path) -> None:
    """Of one's own file too, with its line; not of what it includes."""
    mine = tmp_path / "mine.gin"
    mine.write_text("\nLast.window = 3\n")
    config.load([DIGITS, str(mine)], [])
    assert config.warnings_of_unused() == [
        f"warning: Last.window ({mine}, line 2) is set, but nothing refers to Last, so it has no "
        "effect"
    ]
    config.load([str(mine), DIGITS], ["Distiller.truncation = @Last()"])
    assert not any("Last" in warning for warning in config.warnings_of_unused())
    mine.write_text(f"include '{DIGITS}'\nDistiller.truncation = @Full()\n")
    config.load([str(mine)], [])
    assert config.warnings_of_unused() == []
