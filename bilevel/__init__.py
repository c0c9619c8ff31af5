"""Nested optimisation on PyTorch: exact hypergradients through an inner training run."""

from bilevel import basis, clip, distributed, estimators, linear, optim, truncation
from bilevel.errors import (
    BilevelError,
    CompileWarning,
    ConfigurationError,
    ConvergenceWarning,
    NonFiniteError,
    ProblemError,
    ProcessError,
    SilentProcessError,
    SolverError,
    UnusedOuterVariableError,
)
from bilevel.gradcheck import gradcheck
from bilevel.gradient_check import Comparison, GradientCheck
from bilevel.hypergradient import Hypergradient
from bilevel.module import fresh_parameters, refuse_running_statistics
from bilevel.problem import Problem
from bilevel.random import Key
from bilevel.recording.inner import InnerLoop
from bilevel.recording.outer_gradient import MicroBatches
from bilevel.recording.record import record
from bilevel.recording.trajectory import Trace, Trajectory
from bilevel.recording.unrolled import GraphBudget
from bilevel.replicas import Replicas
from bilevel.result import HypergradientResult, LowRankStats, SolverStats, Stats
from bilevel.variables import Iterate
from bilevel.window import Window

#: Of both packages; `pyproject.toml` reads it here.
__version__ = "0.2.0"

__all__ = [
    "BilevelError",
    "Comparison",
    "CompileWarning",
    "ConfigurationError",
    "ConvergenceWarning",
    "GradientCheck",
    "GraphBudget",
    "Hypergradient",
    "HypergradientResult",
    "InnerLoop",
    "Iterate",
    "Key",
    "LowRankStats",
    "MicroBatches",
    "NonFiniteError",
    "Problem",
    "ProblemError",
    "ProcessError",
    "Replicas",
    "SilentProcessError",
    "SolverError",
    "SolverStats",
    "Stats",
    "Trace",
    "Trajectory",
    "UnusedOuterVariableError",
    "Window",
    "basis",
    "clip",
    "distributed",
    "estimators",
    "fresh_parameters",
    "gradcheck",
    "linear",
    "optim",
    "record",
    "refuse_running_statistics",
    "truncation",
]
