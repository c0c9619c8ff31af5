"""Steps and whole loops of them as compiled graphs."""

from bilevel.compiler.compiler import Compiler, constants_of
from bilevel.compiler.inductor import surroundings

__all__ = ["Compiler", "constants_of", "surroundings"]
