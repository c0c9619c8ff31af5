"""Several processes: what holds in one, and `two_processes.py` run in two."""

import os
import subprocess
import sys
from pathlib import Path

import problems
import pytest
import torch
from problems import flat, seeded

import bilevel
from bilevel.distributed import AveragedHypergradient, average, gather, rank, world_size

HERE = Path(__file__).parent


def test_two_processes():
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
            *("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", HERE / "two_processes.py"),
        ],
        cwd=HERE.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout


def test_one_process_is_as_if_there_were_no_groups():
    assert (rank(), world_size(), gather("me")) == (0, 1, ["me"])
    tensor = torch.ones(3)
    (averaged,) = average([tensor])
    assert torch.equal(averaged, tensor)

    case = problems.make("data_cleaning", 0)
    plain = bilevel.Hypergradient(case.problem, bilevel.optim.sgd(0.1), 4)
    expected = plain(case.outer, case.outer_batch, seeded(1))
    found = AveragedHypergradient(plain)(case.outer, case.outer_batch, seeded(1))
    assert torch.equal(flat(found.grads), flat(expected.grads))
    assert torch.equal(found.loss, expected.loss)


def test_backward_in_one_process_fills_grad():
    case = problems.make("ridge", 0)
    plain = bilevel.Hypergradient(case.problem, bilevel.optim.sgd(0.1), 4)
    outer = {name: value.requires_grad_() for name, value in case.outer.items()}
    result = AveragedHypergradient(plain).backward(outer, case.outer_batch)
    assert torch.equal(outer["log_penalty"].grad, result.grads["log_penalty"])


def test_what_is_no_hypergradient_is_refused():
    with pytest.raises(bilevel.ConfigurationError, match="hypergradient is a function"):
        AveragedHypergradient(test_two_processes)
