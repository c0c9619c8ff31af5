"""What `bilevel` raises. Every message names the thing, its value and what is allowed."""

from collections.abc import Sequence


class BilevelError(Exception):
    """Base of every error raised on purpose by `bilevel`."""


class ConfigurationError(BilevelError, ValueError):
    """An argument has a value that can never work."""


class ProblemError(BilevelError, ValueError):
    """A method of a `Problem` returned something that breaks its contract."""


class UnusedOuterVariableError(ProblemError):
    """An outer variable on which neither the inner run nor the outer loss depends."""


class NonFiniteError(BilevelError, ArithmeticError):
    """A loss or a hypergradient became NaN or infinite; the message says where it began."""


class CompileWarning(UserWarning):
    """Something is run in eager mode although it was to be compiled; the message says why."""


class ProcessError(BilevelError, RuntimeError):
    """Another process of the group has failed, is gone, or does something else than this one."""


class SilentProcessError(ProcessError):
    """Another process of the group is stopped, hangs or is out of reach; `ranks` are such ones."""

    def __init__(self, message: str, ranks: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.ranks = tuple(ranks)


class SolverError(BilevelError, ArithmeticError):
    """A linear system without a usable solution: a singular matrix, or a diverging iteration."""


class ConvergenceWarning(UserWarning):
    """A linear solver stopped short of its tolerance, so the hypergradient is approximate.

    `warnings.filterwarnings("error", category=bilevel.ConvergenceWarning)` makes it an error.
    """
