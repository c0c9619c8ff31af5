"""What every benchmark needs: the machine it ran on, peak memory, a table, a result file."""

import ctypes
import gc
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

#: For processes whose memory is measured: glibc then maps every block of 64 KiB or more on its own
#: and gives it back when it is freed, so that the resident set follows the tensors alive instead
#: of what the allocator keeps for later, and is the same from run to run.
FAITHFUL_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def machine() -> dict[str, Any]:
    """What a reader needs to know of the machine, and the date."""
    import torch  # here, since processes of JAX use the rest of this file

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def command() -> str:
    """This process's command line, without the folders of this machine."""
    arguments = [Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:]]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def peak_memory(call: Callable[[], object]) -> float:
    """MB (10⁶ bytes) by which this process's resident set peaks, in `call`, above where it stood.

    The kernel's own high-water mark is set back before the call, so nothing is missed between
    samples and nothing from before counts. Linux only.

    Raises:
        OSError: There is no /proc/self/clear_refs.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory("VmRSS")
    call()
    return (_memory("VmHWM") - before) / 1e6


def table(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """`rows` as aligned text; `columns` maps a key to its format, such as `.2f`; None is a dash."""
    cells = [
        ["–" if row[key] is None else format(row[key], form) for key, form in columns.items()]
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in [list(columns), *cells]
    )


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """`rows` as a Markdown table."""
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([str(v) for v in row.values()] for row in rows),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_json(
    path: Path, rows: Sequence[dict[str, Any]], summary: dict[str, float | None]
) -> None:
    """The result with the command, machine and date that made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"command": command(), "machine": machine(), "rows": rows, "summary": summary}
    path.write_text(json.dumps(result, indent=2) + "\n")


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _memory(field: str) -> int:
    """A field of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")
