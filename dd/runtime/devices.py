"""Which device a process works on."""

import sys

import torch

from bilevel.checks import check_instance
from bilevel.distributed import world_size
from dd.runtime.processes import local_rank


def chosen_device(name: str) -> torch.device:
    """The device that a user calls `name`: "auto" is CUDA if there is one.

    Of several processes each has a GPU of its own.

    Raises:
        ValueError: There is no such device here, or several processes would share it.
    """
    check_instance("device", name, str, "'cpu'")
    if name == "auto":
        return _own_cuda_device() if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"device={name!r}: it must be 'auto', 'cpu' or 'cuda'") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r}: it must be 'auto', 'cpu' or 'cuda'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name!r}: no CUDA device is available here")
    if device.type == "cuda" and world_size() > 1:
        if device.index is not None:
            raise ValueError(
                f"device={name!r}: {world_size()} processes cannot share one GPU; with 'cuda' "
                "each has its own"
            )
        return _own_cuda_device()
    return device


def device_name(device: torch.device) -> str:
    """What the device is called in results: the GPU's model, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _own_cuda_device() -> torch.device:
    """This process's GPU: "cuda", or of several processes the one numbered as on its machine.

    Raises:
        ValueError: There are more processes than GPUs.
    """
    if world_size() == 1:
        return torch.device("cuda")
    number, devices = local_rank(), torch.cuda.device_count()
    if number >= devices:
        raise ValueError(
            f"process {number} of this machine has no GPU of its own, for there are {devices}: "
            f"start {devices} with --nproc_per_node, or set device='cpu'"
        )
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return device


def peak_memory(device: torch.device) -> int:
    """The most bytes of memory so far, of a GPU, or else of this process; 0 if nobody knows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # noqa: TID251  (where there is none, 0 is told)
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
