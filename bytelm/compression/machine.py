"""What the last bits of floating-point results depend on beside the program."""

import os
import platform
from pathlib import Path

from bytelm.compression.container import short

_VECTORS = ("avx512", "avx", "amx", "fma", "f16c", "sse", "ssse", "sve", "asimd", "bf16", "i8mm")


def instruction_set() -> str:
    """The processor's architecture, model and widest vectors, with a digest of all kinds of them.

    Compilers and libraries of matrix products choose their code by these.
    """
    fields = _processor()
    flags = fields.get("flags", fields.get("Features", "")).split()
    vectors = sorted(flag for flag in flags if flag.startswith(_VECTORS))
    widest = next((x for x in ("avx512f", "avx2", "avx", "sve", "asimd") if x in vectors), "")
    model = "-".join(fields.get(name, "") for name in ("cpu family", "model"))
    name = " ".join([platform.machine(), model, widest or platform.processor()])
    return short(f"{name} {' '.join(vectors)}")


def _processor() -> dict[str, str]:
    """The fields of the first processor in Linux' list, empty on other systems."""
    file = Path("/proc/cpuinfo")
    first = file.read_text("utf-8", "replace").split("\n\n")[0] if file.exists() else ""
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def processors() -> int:
    """Processors that this process may use, by which libraries choose their number of threads."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
