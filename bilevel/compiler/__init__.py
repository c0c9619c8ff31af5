"""Steps and whole loops of them as compiled graphs."""

from bilevel.compiler.compiler import Compiler, constants_of
from bilevel.compiler.inductor import surroundings
from bilevel.compiler.refusals import is_tracing
from bilevel.compiler.untraced import untraced

__all__ = ["Compiler", "constants_of", "is_tracing", "surroundings", "untraced"]
