"""Dataset distillation: the commands `dd.train`, `dd.evaluate`, `dd.experts` and `dd.sweep`."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bilevel import __version__ as __version__
else:

    def __getattr__(name: str) -> str:
        """`__version__`, which is `bilevel`'s: PyTorch is imported only if it is asked for."""
        if name == "__version__":
            import bilevel

            return bilevel.__version__
        raise AttributeError(f"module 'dd' has no attribute {name!r}")
