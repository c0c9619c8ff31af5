"""Mistakes in parts of one's own: one line that says which part, what, and where in its file."""

from pathlib import Path

import pytest
from tiny_runs import arguments, one_error

from dd import train

MISTAKES = """
import gin, torch
from torch import nn
from dd.augmentation import Augmentation

class Linear(nn.Module):
    def __init__(self, num_classes, channels, image_size):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(channels * image_size**2, num_classes))
    def forward(self, images):
        return self.body(images)

@gin.configurable
def wrong_key(**sizes): return {}["layers"]
@gin.configurable
class WrongValue(Linear):
    def __init__(self, num_classes, channels, image_size): int("many")
@gin.configurable
class WrongType(Linear):
    def __init__(self, num_classes, channels, image_size): len(3)
@gin.configurable
class NotBegun(Linear):
    def __init__(self, num_classes, channels, image_size): self.body = nn.Flatten()
@gin.configurable
class WrongForward(Linear):
    def forward(self, images): return {}["logits"]
@gin.configurable
class Refuses(Linear):
    def forward(self, images): assert images.shape[1] == 77
@gin.configurable
class Pair(Linear):
    def forward(self, images): return self.body(images), images
@gin.configurable
class Twice(Linear):
    def forward(self, images): return torch.cat([self.body(images)] * 2, 1)
@gin.configurable
class Whole(Linear):
    def forward(self, images): return self.body(images).long()
@gin.configurable
class Complex(Linear):
    def forward(self, images): return self.body(images).to(torch.complex64)
@gin.configurable
class Detached(Linear):
    def forward(self, images): return self.body(images).detach()
@gin.configurable
class Frozen(Linear):
    def __init__(self, **sizes):
        super().__init__(**sizes)
        self.requires_grad_(False)
@gin.configurable
class Late(Linear):
    calls = 0
    def forward(self, images):
        Late.calls += 1
        if Late.calls > 1: raise RuntimeError("too late")
        return self.body(images)
@gin.configurable
class WrongAugmentation(Augmentation):
    def __call__(self, images, generator): raise KeyError("angle")
@gin.configurable
def no_transform(images): pass
@gin.configurable
def wrong_dataset(): raise ValueError("no photos today")
"""
#: What is set, the exit status, and what is said.
CASES: dict[str, tuple[str, int, str]] = {
    "wrong_key": ("network = @wrong_key", 2, "KeyError: 'layers' (in MODULE.py, line 14)"),
    "WrongValue": ("network = @WrongValue", 2, "'many' (in MODULE.py, line 17)"),
    "WrongType": ("network = @WrongType", 2, "no len() (in MODULE.py, line 20)"),
    "NotBegun": ("network = @NotBegun", 2, "before Module.__init__() call (in MODULE.py, line 23)"),
    "WrongForward": ("network = @WrongForward", 2, "take them: KeyError: 'logits' (in MODULE.py"),
    "Refuses": ("network = @Refuses", 2, "AssertionError (in MODULE.py, line 29)"),
    "Pair": ("network = @Pair", 2, "Pair for 10 classes and images of 1×8×8 gives tuple"),
    "Twice": ("network = @Twice", 2, "gives (2, 20) of two images"),
    "Whole": ("network = @Whole", 2, "gives torch.int64; logits are real numbers"),
    "Complex": ("network = @Complex", 2, "gives torch.complex64; logits are real numbers"),
    "Detached": ("network = @Detached", 2, "no parameter to be trained has a part in"),
    "Frozen": ("network = @Frozen", 2, "no parameter to be trained has a part in"),
    "Late": ("network = @Late", 1, "RuntimeError: too late (in MODULE.py, line 55)"),
    "augmentation": ("augmentation = @WrongAugmentation()", 1, "'angle' (in MODULE.py, line 59)"),
    "transform": ("transform = @no_transform", 2, "the transform is a NoneType"),
    "dataset": ("dataset = @wrong_dataset()", 2, "no photos today (in MODULE.py, line 63)"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_of_ones_own_is_one_line_that_says_where(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    binding, status, said = CASES[name]
    # gin has one registry, and a name can be registered in it once for each module.
    module = f"mistakes_{name.lower()}"
    (tmp_path / f"{module}.py").write_text(MISTAKES)
    monkeypatch.syspath_prepend(str(tmp_path))
    part = binding.replace("@", f"@{module}.")
    words = arguments(tmp_path / "run", f"Experiment.{part}", Evaluator__full_data_networks=0)
    unused = "ConvNet" if "network" in binding else "nothing"
    words = [f"--import={module}", *(word for word in words if unused not in word)]
    assert train.main(words) == status
    assert said.replace("MODULE", module) in one_error(capsys)
