"""BOAT's hypergradients of an `InnerProblem`.

It takes the same loss at every step, of a module's own parameters, and the gradient of all steps,
so problems with batches of their own, a learned start or rate, or a window are not offered.
"""

import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
from inner_problem import Call, InnerProblem, Params
from torch import Tensor
from turns import NotOffered


class Holder(torch.nn.Module):
    """Tensors as the parameters of a module, which share their memory."""

    def __init__(self, values: Params) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, torch.nn.Parameter(value.detach()))
        self.keys = list(values)

    def forward(self) -> Params:
        return {name: getattr(self, name) for name in self.keys}


def boat(problem: InnerProblem, **operations: Any) -> Call:
    """BOAT's `Problem`.

    Args:
        problem: With one batch for all steps.
        operations: Of its configuration: "gm_op" and "na_op", or "fo_op", with their settings.
    """
    if problem.fresh or problem.window < problem.steps or problem.optimizer != "sgd":
        raise NotOffered("one batch for all steps, all of them differentiated, by SGD")
    if problem.learned_rate(problem.outer, 0) is not None or "w0" in problem.outer:
        raise NotOffered("a learned start or rate")
    import boat_torch

    lower = Holder({name: value.clone() for name, value in problem.start.items()})
    upper = Holder(problem.leaves())
    # It looks the losses up by the name of a module.
    losses = types.ModuleType("inner_losses")
    losses.lower = lambda data, upper, lower, **_: problem.inner_loss(  # type: ignore[attr-defined]
        lower(), problem.batch(upper(), 0)
    )
    losses.upper = lambda data, upper, lower, **_: problem.outer_loss(lower(), upper())  # type: ignore[attr-defined]
    sys.modules["inner_losses"] = losses
    inner = torch.optim.SGD(lower.parameters(), lr=problem.rate, momentum=problem.momentum)
    settings = {
        "fo_op": None,
        "gm_op": None,
        "na_op": None,
        "lower_level_model": lower,
        "upper_level_model": upper,
        "lower_level_var": list(lower.parameters()),
        "upper_level_var": list(upper.parameters()),
        "lower_level_opt": inner,
        "upper_level_opt": torch.optim.SGD(upper.parameters(), lr=0.0),
        "lower_iters": problem.steps,
        "device": "cpu",
        "loss_log_path": str(Path(tempfile.gettempdir()) / "boat.json"),
        "accumulate_grad": False,
        "return_grad": True,
        "copy_last_param": False,
        "RGT": {"truncate_iter": 0},
        "GDA": {"alpha_init": 0.0, "alpha_decay": 0.9},
        "DI": {"lr": 0.1},
        "CG": {"k": 10, "tolerance": 1e-10, "gamma": 1.0},
        "FD": {"r": 0.01},
        "NS": {"k": 10},
        "fo_ol_batch_input": False,
    } | operations
    names = {"lower_level_loss": "lower", "upper_level_loss": "upper"}
    made = boat_torch.Problem(
        settings,
        {key: {"function": f"inner_losses.{name}", "params": {}} for key, name in names.items()},
    )
    made.build_ll_solver()
    made.build_ul_solver()
    made.save_losses = lambda *args, **kwargs: None
    count = 0

    def call() -> list[Tensor]:
        nonlocal count
        for value in upper.parameters():
            value.grad = None
        made._log_results.clear()  # It keeps every call's losses.
        made.run_iter({}, {}, count)
        count += 1
        return [value.grad for value in upper.parameters()]  # type: ignore[misc]

    return call


def unrolled_by_boat(problem: InnerProblem) -> Call:
    """Naive gradient descent with reverse automatic differentiation."""
    return boat(problem, gm_op=["NGD"], na_op=["RAD"])
