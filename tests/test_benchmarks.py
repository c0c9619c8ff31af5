"""The benchmark scripts run, and what they write has the promised form."""

import importlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from fake_data import write_tiny_imagenet

from dd.data import Standardize, digits
from dd.evaluation.distilled_set import DistilledSet
from dd.evaluation.scores import label_robust_score

ROOT = Path(__file__).parent.parent


def benchmark(words, timeout=300):
    """Run a benchmark as a user does, to its end."""
    process = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert process.returncode == 0, process.stderr
    return process


@pytest.mark.slow
def test_hypergradient_benchmark_writes_a_sound_result(tmp_path):
    pytest.importorskip("higher", reason="a peer, installed with the extra `benchmark`")
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    out = tmp_path / "result.json"
    options = "--width 8 --images 10 --windows 3 2 --burn-in 3 --repeats 1 --threads 1"
    script = ROOT / "benchmarks" / "hypergradient.py"
    process = benchmark([sys.executable, str(script), *options.split(), "--json", str(out)])
    assert "memory/higher" in process.stdout

    result = json.loads(out.read_text())
    assert set(result) == {"command", "machine", "rows", "summary"}
    assert result["command"] == (f"python benchmarks/hypergradient.py {options} --json {out.name}")
    assert {"cpu", "cores", "torch", "threads", "date"} <= set(result["machine"])
    assert set(result["summary"]) == {
        "speedup_vs_higher",
        "memory_vs_higher",
        "growth_vs_higher",
    }
    assert all(isinstance(value, float) for value in result["summary"].values())

    rows = result["rows"]
    assert [(row["window"], row["method"]) for row in rows] == [
        (window, method)
        for window in (2, 3)
        for method in ("higher", "reverse", "adjoint", "compiled")
    ]
    for row in rows:
        assert row["seconds"] > 0
        assert row["MB"] > 0
        if row["method"] == "higher":
            assert row["time/higher"] == row["memory/higher"] == 1
        if row["window"] == 2:
            assert row["error"] < 1e-2
        else:
            assert row["error"] is None


@pytest.mark.slow
def test_estimators_benchmark_writes_a_sound_result(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    out, picture = tmp_path / "result.json", tmp_path / "plot.png"
    options = ["--problems", "ridge", "--repeats", "1", "--threads", "1"]
    benchmark(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "estimators.py")),
            *(*options, "--json", str(out), "--plot", str(picture)),
        ]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = json.loads(out.read_text())["rows"]
    cost = {(row["method"], row["setting"]): row for row in rows if row["table"] == "cost"}
    assert cost["Implicit, conjugate gradient", 80]["error"] < 1e-9
    assert cost["Implicit, dense", 0]["products"] == 101
    assert cost["Adjoint", 500]["error"] < cost["Adjoint", 20]["error"]
    assert cost["Evolution strategies", 4]["evaluations"] == 4000
    length = [row for row in rows if row["table"] == "length" and row["method"] == "Implicit"]
    assert [row["error"] for row in length] == sorted((r["error"] for r in length), reverse=True)
    memory = {row["method"]: row["MB"] for row in rows if row["table"] == "memory"}
    assert memory["Adjoint"] < memory["Reverse"]


@pytest.mark.slow
def test_data_benchmark_writes_a_sound_result(tmp_path):
    out = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "data.py"
    options = ["--fitted-on", "100", "--batch", "50", "--mapped", "2000", "--json", str(out)]
    benchmark([sys.executable, str(script), *options])
    rows = json.loads(out.read_text())["rows"]
    assert all(row["seconds"] > 0 for row in rows)
    seconds = {row["what"]: row["seconds"] for row in rows}
    # Not ratios to watch: only an order that no machine turns round.
    assert seconds["standardize"] < seconds["kip whitening"] < seconds["outer loss"]


@pytest.mark.slow
def test_low_rank_benchmark_writes_a_sound_result(tmp_path):
    out = tmp_path / "result.json"
    options = "--ipc 1 --seeds 1 --width 8 --real-images 32 --stops 8 20 --window 8"
    benchmark(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "low_rank.py")),
            *(*options.split(), "--json", str(out)),
        ]
    )
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * 2 * 5
    for row in rows:
        assert -1 <= row["least"] <= row["cosine"] <= 1 + 1e-6
        if row["method"] == "Adjoint" or row["exact"]:
            assert row["cosine"] == pytest.approx(1)
        if row["method"].startswith("Eigenvectors"):
            assert row["evaluations"] == (8 + 4) * 3 + 8


@pytest.mark.slow
def test_methods_benchmark_writes_a_sound_result_and_goes_on_where_it_was(tmp_path):
    out, picture = tmp_path / "result.json", tmp_path / "plot.png"
    words = [sys.executable, str(ROOT / "benchmarks" / "methods.py"), "--json", str(out)]
    costs = tmp_path / "costs.json"
    words += ["--plot", str(picture), "--costs", str(costs), "--cost-rounds", "1"]
    words += ["--steps", "4", "--parts", "0.5", "1"]
    words += ["--networks", "1", "--width", "4", "--real-batch", "20", "--paced-steps", "2"]
    words += ["--gin_param=Experiment.dataset = @digits()", "--gin_param=ConvNet.depth = 1"]
    methods = ["AT width", "AT-BPTT low rank", "AT easy first", "first 15"]
    for count, seeds in ((3, ["0"]), (4, ["0", "1"])):
        benchmark([*words, "--methods", *methods[:count], "--seeds", *seeds])
        rows = json.loads(out.read_text())["rows"]
        assert len(rows) == count * len(seeds)
        assert len({(row["method"], row["seed"]) for row in rows}) == len(rows)
    seconds = json.loads(costs.read_text())["summary"]
    for row in rows:
        expected = round(4 * seconds["RaT-BPTT"] / seconds[row["method"]])
        assert row["outer_steps"] == expected >= 1
        assert all(0 <= row["accuracy"][part] <= 1 for part in ("0.5", "1"))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_patches_benchmark_writes_a_sound_result(tmp_path):
    data, out = write_tiny_imagenet(tmp_path / "data", size=64), tmp_path / "result.json"
    options = ["--outer-steps", "1", "--seeds", "1", "--networks", "1", "--json", str(out)]
    benchmark(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "patches.py")),
            *("--data", str(data), "--real-batch", "8", *options),
        ]
    )
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 8
    assert all(0 <= row["accuracy"] <= 1 for row in rows)


@pytest.mark.slow
def test_gpu_report_in_small_on_a_cpu(tmp_path):
    report = tmp_path / "report.md"
    benchmark(
        [
            *(sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--quick"),
            *("--parts", "replicas", "methods", "--report", str(report)),
        ],
        timeout=400,
    )
    parts = json.loads(report.with_suffix(".json").read_text())["parts"]
    assert len(parts["A hypergradient by method"]) == 7
    assert all(float(row["spread"]) > 0 for row in parts["Inner replicas"])


@pytest.mark.slow
def test_inner_loops_benchmark_writes_sound_tables(tmp_path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from Linux's /proc")
    out, picture = tmp_path / "result.json", tmp_path / "plot.png"
    options = "--problems maml schedule --methods ours torchopt boat --rounds 1 --length 0.1"
    script = ROOT / "benchmarks" / "inner_loops.py"
    words = [*options.split(), "--json", str(out), "--plot", str(picture)]
    process = benchmark([sys.executable, str(script), *words], timeout=600)
    assert "| problem | batches | plain | ours | torchopt | boat |" in process.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")

    rows = json.loads(out.read_text())["rows"]
    assert [(row["batches"], row["problem"], row["method"]) for row in rows] == [
        (batches, problem, method)
        for batches in ("shared", "fresh")
        for problem in ("maml", "schedule")
        for method in ("plain", "ours", "torchopt", "boat")
    ]
    for row in rows:
        if row["method"] == "boat":  # It cannot say a learned start or schedule.
            assert row["time/plain"] is None
            assert row["remark"]
            continue
        assert row["error"] < 1e-5
        assert 0 < row["least"] <= row["time/plain"] <= row["most"]
        assert row["first s"] > 0
        assert row["MB"] is not None
        if row["method"] == "plain":
            assert row["time/plain"] == row["wall/plain"] == 1


@pytest.mark.slow
def test_the_referee_writes_sound_rows_of_each_method_and_start(tmp_path):
    out, picture = tmp_path / "result.json", tmp_path / "plot.png"
    methods = ["by hand", "Implicit, CG(20)", "AmIGO", "Penalty", "FirstOrder, Last(1)"]
    options = ["--problems", "quadratic", "--seconds", "1.5", "--starts", "2"]
    script = ROOT / "benchmarks" / "referee.py"
    words = [sys.executable, str(script), "--methods", *methods, *options, "--json", str(out)]
    printed = benchmark([*words, "--plot", str(picture)]).stdout
    assert "first in PyTorch" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    result = json.loads(out.read_text())
    assert result["summary"] == {"seconds a run": 1.5, "starts": 2}
    rows = {(row["method"], row["start"]): row for row in result["rows"]}
    assert list(rows) == [(method, start) for method in methods for start in (1, 2)]
    least = min(row["curve"][-1][2] for row in rows.values())
    for (method, _), row in rows.items():
        assert not row["remark"]
        seconds, evaluations, values = zip(*row["curve"], strict=True)
        assert list(seconds) == sorted(seconds)
        assert list(evaluations) == sorted(evaluations)
        # The four that converge to the hypergradient at the optimum get there, the other does not.
        there = values[-1] - least < 0.01 * (values[0] - least)
        assert there == (method != methods[-1])
    again = benchmark([*words, "--problems", "quadratic"]).stdout
    assert printed.split("\n", 1)[1] == again.split("\n", 1)[1]  # It has them all.


@pytest.fixture
def referee(monkeypatch):
    """The referee's modules by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return lambda name: importlib.import_module(f"referee_{name}")


def test_the_referee_says_what_is_left_out(referee, monkeypatch):
    methods = referee("methods")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    left_out = methods.left_out()
    assert left_out["boat, RAD"].startswith("left out: boat_torch and higher not installed")
    assert not any(method.ours for name, method in methods.METHODS.items() if name in left_out)


def test_the_referee_judges_a_network_where_its_run_ends(referee, monkeypatch, tmp_path):
    class Photographs:
        """As many as are taken, at random."""

        def __init__(self, root, train, download):
            draw = np.random.default_rng(0)
            self.data = draw.integers(0, 256, (3500, 32, 32, 3), dtype=np.uint8)
            self.targets = draw.integers(0, 10, 3500).tolist()

    monkeypatch.setattr(referee("problems"), "CIFAR10", Photographs)
    problem = referee("problems").problems(tmp_path)["cifar10-network"]()
    problem.begin(1)
    judge = referee("run").Judge(problem)
    judged = judge(problem.position)
    assert judged == judge.begin(1)

    problem.double()
    outer = {name: value.detach() for name, value in problem.position.items()}
    params = {name: value.clone().requires_grad_() for name, value in problem.start.items()}
    optimizer = torch.optim.SGD(params.values(), lr=problem.rate, momentum=problem.momentum)
    for _ in range(40):
        optimizer.zero_grad()
        problem.inner_loss(params, problem.batch(outer, 0)).backward()
        optimizer.step()
    assert judged == pytest.approx(float(problem.outer_loss(params, outer).detach()))
    assert judge.test_error == problem.test_error(params)


def test_the_referee_interpolates_between_the_steps_that_it_judged(referee):
    curve = [(0.0, 0, 3.0), (1.0, 10, 2.02), (2.0, 20, 2.0)]
    crossings = referee("report").crossings
    # From a gap of 1 to one of 0.02 in a second, on a line in the logarithm.
    expected = math.log(0.1) / math.log(0.02)
    assert crossings(curve, 2.0)[0.1] == pytest.approx(expected)
    assert crossings(curve, 2.0, of=1)[0.1] == pytest.approx(10 * expected)
    assert 1 < crossings(curve, 2.0)[0.002] < 2
    assert crossings(curve[:2], 2.0)[0.01] is None


def test_the_page_of_estimators_is_what_the_referee_measured(referee, tmp_path):
    page = tmp_path / "estimators.md"
    before = (ROOT / "docs" / "estimators.md").read_text()
    page.write_text(before)
    referee("report").write_docs(ROOT / "benchmarks" / "results" / "referee_cpu.json", page)
    assert page.read_text() == before


class LabelRobustScore:
    """What DD-Ranking 0.2.0 documents of its score: what it is given, and what it returns."""

    def __init__(self, **settings):
        self.settings = settings
        self.dst_train = self.test_loader_real = self.test_loader_syn = self.class_to_indices = None

    def compute_metrics(self, image_tensor, hard_labels, syn_lr):
        LabelRobustScore.seen = self, image_tensor, hard_labels, syn_lr
        names = ("hard_label_recovery", "improvement_over_random", "label_robust_score")
        return {f"{name}_{of}": torch.tensor(1.0) for name in names for of in ("mean", "std")}


@pytest.mark.parametrize("soft", [False, True])
def test_dd_ranking_is_given_all_images_behind_the_transform_of_the_set(
    soft, tmp_path, monkeypatch
):
    spec = importlib.util.spec_from_file_location(
        "dd_ranking", ROOT / "benchmarks" / "dd_ranking.py"
    )
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    cached = {}
    for name, parts in (
        ("ddranking", {}),
        (
            "ddranking.metrics",
            {"LabelRobustScoreHard": LabelRobustScore, "hard_label": ModuleType("hard_label")},
        ),
        ("ddranking.utils", {"REAL_DATA_ACC_CACHE": cached}),
    ):
        module = ModuleType(name)
        vars(module).update(parts)
        monkeypatch.setitem(sys.modules, name, module)

    data = digits()
    transform = Standardize.fit(data.train_images)
    labels = torch.eye(10) if soft else torch.arange(10)
    learned = {} if soft else {"learning_rate": 0.02}
    images = transform(torch.rand(10, 1, 8, 8))
    distilled = DistilledSet(images, labels, transform, data.class_names, learned)
    script.write_inputs(distilled, data, tmp_path, 50)
    settings = {"data": "data", "num_eval": 5, "num_epochs": 300, "real_accuracy": 0.8}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script.inside(tmp_path)

    evaluator, given, classes, rate = LabelRobustScore.seen
    assert torch.equal(given, images)
    assert classes.tolist() == list(range(10))
    assert rate is None if soft else float(rate) == pytest.approx(0.02)
    assert cached == {"CIFAR10-ConvNet-3": 80.0}
    assert evaluator.settings["ipc"] == 1
    assert not evaluator.settings["eval_full_data"]
    real = torch.stack([image for image, _ in evaluator.dst_train])
    assert torch.equal(real, transform(data.train_images))
    for wanted, rows in enumerate(evaluator.class_to_indices):
        assert {evaluator.dst_train[row][1] for row in rows} == {wanted}
    (batch,) = evaluator.test_loader_syn
    assert torch.equal(batch[0], transform(data.test_images[:50]))
    assert set(json.loads((tmp_path / "found.json").read_text()).values()) == {1.0}
    assert script.score(0.3, 0.1) == pytest.approx(label_robust_score(0.8, 0.5, 0.5, 0.4))
    assert math.isclose(script.score(-1, 1), 1)
