"""An exported CIFAR-10 set scored by DD-Ranking 0.2.0, in an environment of its own.

    python benchmarks/dd_ranking.py runs/cpu/distilled.safetensors --data data --json results.json

The package needs NumPy 1 and this project NumPy 2, so the script makes an environment for it with
venv and pip (gigabytes, as it brings PyTorch along), and hands tensors over: the set in the form
`ddranking` of `dd-export`, and the real images behind the set's own transform. The package would
normalise the images of its random baseline by itself, and test networks of that baseline on images
of another kind; here all that it trains and tests on is behind one transform. Soft labels are
scored by their likeliest class.

Version 0.2.0 takes its score from percentages, so that it does not lie in [0, 1]; what is printed
beside it is the published formula of the same accuracies as fractions. Training on all images takes
hours on a CPU; --real-accuracy gives what was measured otherwise. Even then the defaults are for a
GPU, as every tenth epoch of every network is tested on all test images.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VERSION = "0.2.0"
#: What the package calls the dataset and the network.
DATASET, NETWORK = "CIFAR10", "ConvNet-3"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("set", help="a set's file, the folder of its run, or a name that dd knows")
    parser.add_argument("--data", default="data", help="the folder of cifar-10-batches-py/")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--environment", type=Path, default=Path("runs/dd_ranking_environment"))
    parser.add_argument("--evaluations", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--test-images", type=int, default=None, help="fewer, for a trial")
    parser.add_argument("--real-accuracy", type=float, default=None, help="a fraction")
    options = parser.parse_args()

    from common import table, write_json

    import dd
    from dd.data import cifar10

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {
            "data": str(Path(options.data).absolute()),
            "num_eval": options.evaluations,
            "num_epochs": options.epochs,
            "real_accuracy": options.real_accuracy,
        }
        write_inputs(dd.load(options.set), cifar10(options.data), folder, options.test_images)
        (folder / "settings.json").write_text(json.dumps(settings))
        python = environment(options.environment)
        subprocess.run([python, __file__, "--inside", str(folder)], check=True)
        found = json.loads((folder / "found.json").read_text())
    recovery, gain = (
        found[f"{of}_mean"] / 100 for of in ("hard_label_recovery", "improvement_over_random")
    )
    found["label_robust_score_of_fractions"] = score(recovery, gain)
    rows = [{"what": name, "value": value} for name, value in found.items()]
    print(table(rows, {"what": "", "value": ".3f"}))
    write_json(options.json, [found], {"label_robust": found["label_robust_score_of_fractions"]})


def score(recovery: float, gain: float, weight: float = 0.5) -> float:
    """(e^α − e^−1) / (e − e^−1) with α = w·gain − (1 − w)·recovery, both fractions."""
    alpha = weight * gain - (1 - weight) * recovery
    return (math.exp(alpha) - math.exp(-1)) / (math.e - math.exp(-1))


def environment(folder: Path) -> Path:
    """The Python of an environment that has the package; it is made if it is not there."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        wanted = f"ddranking=={VERSION}"
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", wanted], check=False)
        if done.returncode:
            python.unlink()  # so that the next call tries again
            sys.exit(f"error: pip cannot install {wanted} into {folder}")
    return python


def write_inputs(distilled: Any, dataset: Any, folder: Path, test_images: int | None) -> None:
    """The exported set, and the real images as its networks see them."""
    import torch

    import dd
    from dd.data import apply_in_chunks

    if dataset.class_names != distilled.class_names:
        sys.exit(f"error: the set's classes are {', '.join(distilled.class_names[:3])} …")
    dd.export_set(distilled, folder / "set", "ddranking")
    for part in ("train", "test"):
        images, labels = getattr(dataset, f"{part}_images"), getattr(dataset, f"{part}_labels")
        if part == "test":
            images, labels = images[:test_images], labels[:test_images]
        torch.save(apply_in_chunks(distilled.transform, images), folder / f"{part}_images.pt")
        torch.save(labels, folder / f"{part}_labels.pt")


def inside(folder: Path) -> None:
    """In the package's environment: score what `write_inputs` wrote, into `found.json`."""
    import torch
    from ddranking.metrics import LabelRobustScoreHard, hard_label
    from ddranking.utils import REAL_DATA_ACC_CACHE
    from torch.utils.data import DataLoader

    def read(name: str) -> Any:
        return torch.load(folder / f"{name}.pt", weights_only=True)

    settings = json.loads((folder / "settings.json").read_text())
    images, labels = read("set/images"), read("set/labels")
    if labels.is_floating_point():
        labels = labels.argmax(dim=1)
    rate = read("set/lr") if (folder / "set" / "lr.pt").exists() else None
    real_accuracy = settings["real_accuracy"]
    if real_accuracy is not None:
        REAL_DATA_ACC_CACHE[f"{DATASET}-{NETWORK}"] = 100 * real_accuracy
    evaluator = LabelRobustScoreHard(
        dataset=DATASET,
        real_data_path=settings["data"],
        ipc=len(images) // 10,
        model_name=NETWORK,
        data_aug_func=None,
        optimizer="sgd",
        lr_scheduler="cosine",
        num_eval=settings["num_eval"],
        num_epochs=settings["num_epochs"],
        num_workers=0,
        save_path=str(folder / "scores.csv"),
        device="cuda" if torch.cuda.is_available() else "cpu",
        random_data_format="tensor",
        random_data_path=str(folder / "random"),
        eval_full_data=real_accuracy is None,
    )
    # Version 0.2.0 counts every score twice, and then cannot write the columns of its table.
    hard_label.save_results = lambda *_: None
    # Random images are drawn from this dataset, as it is, and networks are tested on these.
    train = list(zip(read("train_images"), read("train_labels").tolist(), strict=True))
    test = list(zip(read("test_images"), read("test_labels").tolist(), strict=True))
    evaluator.dst_train = train
    evaluator.class_to_indices = [
        [row for row, (_, label) in enumerate(train) if label == wanted] for wanted in range(10)
    ]
    evaluator.test_loader_real = evaluator.test_loader_syn = DataLoader(test, batch_size=256)
    found = evaluator.compute_metrics(image_tensor=images, hard_labels=labels, syn_lr=rate)
    numbers = {name: float(value) for name, value in found.items()}
    (folder / "found.json").write_text(json.dumps(numbers))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]))
    else:
        main()
