"""What is kept between runs: fitted whitening, found again only for the same images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import platformdirs
import pytest
import torch
from problems import seeded
from torch import Tensor

from dd import config
from dd.data import KIPWhitening, PixelTransform, ZCAWhitening, kip_whitening, zca_whitening
from dd.runtime.cache import cache_folder, checksum

IMAGES = torch.randint(0, 256, (12, 1, 3, 3), dtype=torch.uint8, generator=seeded(0))
DIGITS = Path(__file__).parents[2] / "gin" / "digits.gin"

Whitening = tuple[Callable[..., PixelTransform], type[PixelTransform], str]
WHITENINGS: dict[str, Whitening] = {
    "zca": (zca_whitening, ZCAWhitening, "epsilon"),
    "kip": (kip_whitening, KIPWhitening, "regularization"),
}


@pytest.fixture(params=WHITENINGS.values(), ids=WHITENINGS)
def whitening(request: pytest.FixtureRequest) -> Whitening:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def fits(whitening: Whitening, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The images of every fit that is really made."""
    made: list[Tensor] = []
    fit = whitening[1].fit  # type: ignore[attr-defined]

    def spy(images: Tensor, **arguments: Any) -> PixelTransform:
        made.append(images)
        return fit(images, **arguments)  # type: ignore[no-any-return]

    monkeypatch.setattr(whitening[1], "fit", spy)
    return made


def assert_same(first: PixelTransform, second: PixelTransform) -> None:
    assert type(first) is type(second)
    for name, value in first.state().items():
        assert torch.equal(second.state()[name], value)
    assert torch.equal(first(IMAGES), second(IMAGES))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_second_fit_is_read_with_the_same_bits(
    whitening: Whitening, fits: list[Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit, kind, parameter = whitening
    first, second = (fit(IMAGES, **{parameter: 0.3}, cache_folder=tmp_path) for _ in range(2))
    assert len(fits) == 1
    assert_same(first, second)
    assert_same(first, kind.fit(IMAGES, **{parameter: 0.3}))  # type: ignore[attr-defined]
    assert len(files(tmp_path)) == 1
    assert caplog.text == ""


def test_other_images_or_parameters_are_fitted_anew(
    whitening: Whitening, fits: list[Tensor], tmp_path: Path
) -> None:
    fit, _, parameter = whitening
    changed = IMAGES.clone()
    changed[-1, -1, -1, -1] ^= 1
    variants = [IMAGES, changed, IMAGES.flip(0), IMAGES.view(12, 1, 1, 9), IMAGES / 255]
    for images in variants:
        fit(images, cache_folder=tmp_path)
    fit(IMAGES, **{parameter: 0.2}, cache_folder=tmp_path)
    assert len(fits) == len(variants) + 1
    fit(IMAGES, chunk=5, cache_folder=tmp_path)  # only memory and time depend on it
    assert len(fits) == len(variants) + 1


@pytest.mark.parametrize("damage", ["truncated", "empty", "a changed bit", "foreign"])
def test_a_damaged_file_is_replaced_with_a_warning_of_one_line(
    damage: str,
    whitening: Whitening,
    fits: list[Tensor],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fit = whitening[0]
    first = fit(IMAGES, cache_folder=tmp_path)
    (path,) = files(tmp_path)
    good = path.read_bytes()
    path.write_bytes(
        {
            "truncated": good[:-8],
            "empty": b"",
            "a changed bit": good[:-1] + bytes([good[-1] ^ 1]),
            "foreign": b"\x80\x04N.",
        }[damage]
    )
    assert_same(first, fit(IMAGES, cache_folder=tmp_path))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert str(path) in record.getMessage()
    assert len(record.getMessage().splitlines()) == 1
    assert_same(first, fit(IMAGES, cache_folder=tmp_path))
    assert len(caplog.records) == 1
    assert len(fits) == 2
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_costs_a_warning(
    whitening: Whitening, fits: list[Tensor], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("mine")
    for _ in range(2):
        whitening[0](IMAGES, cache_folder=tmp_path / "file")
    assert len(fits) == 2
    assert len(caplog.records) == 2
    assert str(tmp_path / "file") in caplog.records[0].getMessage()
    assert (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_fitted_is_not_kept(whitening: Whitening, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=whitening[2]):
        whitening[0](IMAGES, **{whitening[2]: -1.0}, cache_folder=tmp_path)
    assert files(tmp_path) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DD_CACHE", str(tmp_path / "by_variable"))
    assert cache_folder(tmp_path / "chosen") == tmp_path / "chosen"
    assert cache_folder() == tmp_path / "by_variable"
    monkeypatch.setenv("DD_CACHE", "~/by_variable")
    assert cache_folder() == Path.home() / "by_variable"
    monkeypatch.delenv("DD_CACHE")
    assert cache_folder() == platformdirs.user_cache_path("bilevel-dd")


def test_a_gin_parameter_moves_the_cache(tmp_path: Path) -> None:
    bindings = [
        "Experiment.transform = @kip_whitening",
        f"kip_whitening.cache_folder = '{tmp_path}'",
    ]
    config.load([str(DIGITS)], bindings).prepare()
    assert len(files(tmp_path)) == 1


def test_a_checksum_tells_shapes_dtypes_and_boundaries_apart() -> None:
    zeros = torch.zeros(4)
    variants: list[list[str | Tensor]] = [
        [zeros],
        [zeros.view(2, 2)],
        [zeros.to(torch.int32)],
        [zeros[:2], zeros[:2]],
        ["ab", "c"],
        ["a", "bc"],
        ["abc"],
    ]
    assert len({checksum(variant) for variant in variants}) == len(variants)
    assert checksum(["a", zeros]) == checksum(["a", zeros.clone()])
    assert checksum([torch.arange(4.0).view(2, 2).T]) == checksum(
        [torch.tensor([[0.0, 2], [1, 3]])]
    )
