"""Dataset distillation: `distil`, `load`, `sets`, `export_set`, and the commands, each a module."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bilevel import __version__ as __version__
    from dd.api.distil import distil as distil
    from dd.evaluation.distilled_set import DistilledSet as DistilledSet
    from dd.exchange.export import export_set as export_set
    from dd.exchange.shipped import load as load
    from dd.exchange.shipped import sets as sets
else:
    _HOME = {
        "__version__": "bilevel",
        "distil": "dd.api.distil",
        "DistilledSet": "dd.evaluation.distilled_set",
        "export_set": "dd.exchange.export",
        "load": "dd.exchange.shipped",
        "sets": "dd.exchange.shipped",
    }
    __all__ = ["DistilledSet", "distil", "export_set", "load", "sets"]

    def __getattr__(name: str) -> Any:
        """What is asked for; PyTorch is imported with it, not with `dd`."""
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        raise AttributeError(f"module 'dd' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted([*globals(), *_HOME])
