"""Steps and whole loops of them as compiled graphs."""

from bilevel.compiler.compiler import Compiler, constants_of
from bilevel.compiler.inductor import surroundings
from bilevel.compiler.loop import NotAlikeError
from bilevel.compiler.untraced import untraced

__all__ = ["Compiler", "NotAlikeError", "constants_of", "surroundings", "untraced"]
