"""What a trace would get wrong without a word, so that it is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode

#: What gives the values of a tensor to Python: they would be constants of the graph.
_READING = {
    getattr(Tensor, name)
    for name in ("numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "__reduce_ex__")
}


@final
class ValuesUnread(TorchFunctionMode):
    """Inside, nothing but a constant is read by NumPy or Python. (`item()` fails by itself.)"""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _READING and args:
            mode = get_proxy_mode()
            if mode is not None and args[0] in mode.tracer.tensor_tracker:
                raise NotImplementedError(
                    f"it reads the values of a tensor, by {func.__name__}(), as NumPy does"
                )
        return func(*args, **(kwargs or {}))


@contextmanager
def no_forward_mode_of_users() -> Iterator[None]:
    """Inside, forward derivatives are taken by this package alone.

    Tracing a derivative of somebody else's, as of `torch.func.jvp` in an inner loss, may end the
    process: PyTorch has no memory for zeros that stand for tangents.
    """
    from torch._functorch import eager_transforms
    from torch.autograd import forward_ad

    places: tuple[tuple[Any, str], ...] = (
        (eager_transforms, "_jvp_increment_nesting"),
        (forward_ad, "enter_dual_level"),
    )
    before = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), enter in zip(places, before, strict=True):
            setattr(owner, name, _guarded(enter))
        yield
    finally:
        for (owner, name), enter in zip(places, before, strict=True):
            setattr(owner, name, enter)


def _guarded(enter: Callable[..., Any]) -> Callable[..., Any]:
    """A function of PyTorch's that only this package may call."""

    def called(*args: Any, **kwargs: Any) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and _package(frame) in ("torch", "contextlib"):
            frame = frame.f_back
        if _package(frame) != __name__.split(".")[0]:
            raise NotImplementedError(
                "it takes a forward derivative, as torch.func.jvp, jacfwd and hessian do"
            )
        return enter(*args, **kwargs)

    return called


def _package(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".")[0]
