"""Lower precision is asked for, stays close, and leaves everything else float32."""

from types import SimpleNamespace

import pytest
import torch
from problems import seeded
from torch import Tensor
from torch.nn import functional as F

import bilevel
from dd.augmentation import NoAugmentation
from dd.distillation.settings import Distiller
from dd.evaluation.evaluator import Evaluator
from dd.networks import ConvNet
from dd.objectives.real_images import MetaLoss
from dd.runtime.precision import Precision, allow_tf32
from dd.synthetic.dataset import SyntheticDataset

CPU = torch.device("cpu")
CLASSES = 3


def hypergradient(precision: Precision | None) -> tuple[Tensor, bilevel.HypergradientResult]:
    synthetic = SyntheticDataset(images_per_class=2)
    images = torch.randn(30, 3, 8, 8, generator=seeded(0))
    labels = torch.arange(30) % CLASSES
    outer = synthetic.create(images, labels, CLASSES, seeded(1))
    problem = MetaLoss(
        ConvNet(CLASSES, image_size=8, depth=2, width=8),
        synthetic,
        NoAugmentation(),
        CPU,
        precision=precision,
    )
    made = bilevel.Hypergradient(problem, bilevel.optim.sgd(0.1), 5)
    result = made(outer, (images, labels), seeded(2))
    return result.grads["images"], result


@pytest.mark.parametrize("part", ["inner", "outer"])
def test_bfloat16_changes_the_arithmetic_and_not_the_direction(part: str) -> None:
    exact, _ = hypergradient(None)
    low, result = hypergradient(Precision(**{part: "bfloat16"}))
    assert low.dtype == result.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in result.params.values())
    error = float((low - exact).norm() / exact.norm())
    assert 1e-4 < error < 0.3
    assert F.cosine_similarity(low.flatten(), exact.flatten(), dim=0) > 0.95


@pytest.mark.parametrize(("capability", "same_as"), [("AVX512", "bfloat16"), ("AVX2", "float32")])
def test_auto_is_bfloat16_where_the_processor_multiplies_it(
    capability: str, same_as: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    asked = hypergradient(Precision("auto", "auto"))[0]
    assert torch.equal(asked, hypergradient(Precision(same_as, same_as))[0])


def test_bfloat16_that_is_only_imitated_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    Precision("auto", "auto").warn_if_imitated(CPU)
    with pytest.warns(UserWarning, match="imitates"):
        Precision(inner="bfloat16").warn_if_imitated(CPU)


def test_the_default_and_the_memory_format_change_nothing() -> None:
    exact, _ = hypergradient(None)
    torch.testing.assert_close(hypergradient(Precision())[0], exact, rtol=0, atol=0)
    torch.testing.assert_close(
        hypergradient(Precision(channels_last=True))[0], exact, rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize(
    ("argument", "value"),
    [("inner", "float64"), ("outer", 16), ("channels_last", 1)],
)
def test_a_value_that_cannot_work(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{argument}="):
        Precision(**{argument: value})  # type: ignore[arg-type]


def test_evaluation_is_in_full_float32_and_leaves_the_flags_as_they_were() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    seen = []

    class Network(torch.nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return super().forward(images.flatten(1))

    images, labels = torch.randn(6, 1, 1, 2, generator=seeded(0)), torch.arange(6) % 2
    data = SimpleNamespace(
        validation_images=images,
        validation_labels=labels,
        test_images=images,
        test_labels=labels,
        num_classes=2,
    )
    try:
        allow_tf32(True)
        evaluator = Evaluator(networks=1, steps=[1], validation_steps=1)
        network, key = Network(2, 2), bilevel.Key(0)
        evaluator.distilled(images, labels, network, data, key)  # type: ignore[arg-type]
        evaluator.validation(images, labels, network, data, key)  # type: ignore[arg-type]
        assert set(seen) == {"ieee"}
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def distiller(**changes: object) -> Distiller:
    settings: dict[str, object] = {
        "outer_steps": 1000,
        "inner_steps": 100,
        "truncation": bilevel.truncation.Last(5),
        "optimizer": bilevel.optim.sgd(0.1),
        **changes,
    }
    return Distiller(**settings)  # type: ignore[arg-type]


def test_auto_compiles_a_run_that_is_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dd.distillation.settings.shutil.which", lambda name: "/usr/bin/" + name)
    assert distiller().compiles
    assert not distiller(outer_steps=999).compiles
    assert distiller(outer_steps=500, inner_replicas=2).compiles
    assert not distiller(minutes=9).compiles
    assert distiller(minutes=10).compiles
    assert not distiller(compile=False).compiles
    assert distiller(outer_steps=1, compile=True).compiles


def test_auto_needs_something_to_compile_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dd.distillation.settings.shutil.which", lambda name: None)
    assert distiller().compiles == torch.cuda.is_available()


@pytest.mark.parametrize("name", ["compile", "tf32"])
def test_switches_take_no_other_value(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='yes'"):
        distiller(**{name: "yes"})
