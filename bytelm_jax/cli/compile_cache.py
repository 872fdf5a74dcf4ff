"""Compiled programs that outlive a command: JAX's own cache, in a folder of this machine's kind.

JAX knows a program by its text, its options and the versions, but not by the processor for which it
was compiled: code for another one may end the process with an illegal instruction. So the folder
is named after everything that the machine is.

Nothing here imports JAX, which reads the variables below when it is imported.
"""

import contextlib
import hashlib
import os
import platform
import sys
import time
import warnings
import zlib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LIMIT = 2**30
"""Bytes that the programs of all machines together may take; looked at when a command starts."""

_VARIABLES = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
"""Every program is kept, however small: a command compiles dozens that take 50 ms each."""

_PROCESSOR = {
    "vendor_id", "cpu family", "model", "model name", "stepping", "flags", "Features", "isa",
    "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "CPU revision", "cpu",
}  # fmt: skip
"""Lines of /proc/cpuinfo that say what code a processor can run, and what code suits it."""

_FEATURES = {"flags", "Features", "isa"}

_COMPILERS = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin", "libtpu",
)  # fmt: skip

_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_CHECKED = "checked"


def use(proc: Path = Path("/proc")) -> Path | None:
    """Has JAX keep compiled programs in the user's cache folder, and returns the folder.

    None, and nothing is changed, where JAX is imported already, where the user has switched the
    cache off (`JAX_ENABLE_COMPILATION_CACHE=0`) or named a folder (`JAX_COMPILATION_CACHE_DIR`),
    where the processor's features are unknown, and where the folder cannot be written or is not the
    user's alone: what is read from it is run.
    """
    wanted = os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "1").lower()
    if wanted not in ("1", "true", "on", "yes", "y", "t") or "jax" in sys.modules:
        return None
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    described = describe_machine(proc)
    if described is None:
        return None
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        root = base / "bytelm" / "compiled"
        folder = root / f"{platform.machine()}-jaxlib-{_version('jaxlib')}-{digest}"
        _create(root, folder)
        prune(root)
        _drop_unfinished(folder)
    except (OSError, RuntimeError):  # the latter where the user has no home
        return None
    # Whatever cannot be read or written is compiled again, and nobody need know.
    for doing in ("reading", "writing"):
        warnings.filterwarnings("ignore", f"Error {doing} persistent compilation cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    return folder


def describe_machine(proc: Path = Path("/proc")) -> str | None:
    """Processor features, cores, accelerators and versions, a line each.

    None where the features of the processor are unknown.
    """
    try:
        text = (proc / "cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return None
    pairs = (line.partition(":") for line in text.splitlines())
    named = ((name.strip(), value.strip()) for name, _, value in pairs)
    seen = {(name, value) for name, value in named if name in _PROCESSOR}
    if not any(name in _FEATURES for name, _ in seen):
        return None
    # A processor whose cores differ has several lines of one name.
    lines = [f"{name}: {' '.join(sorted(value.split()))}" for name, value in sorted(seen)]
    lines += [platform.machine(), f"cores: {_cores()}"]  # XLA cuts loops into as many parts
    lines += sorted(_accelerators(proc))
    lines += [f"{name} {_version(name)}" for name in _COMPILERS]
    return "\n".join(lines)


def prune(root: Path, limit: int = LIMIT) -> None:
    """Removes the programs that were not used for longest until the rest fit into `limit` bytes."""
    files = []
    for file in root.rglob("*"):
        with contextlib.suppress(OSError):  # another command may have removed it
            if not file.is_dir():
                status = file.stat()
                files.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= limit:
            break
        with contextlib.suppress(OSError):
            file.unlink()
        total -= size


def _create(root: Path, folder: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    for each in (root, folder):
        each.mkdir(mode=0o700, exist_ok=True)
        status = each.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise PermissionError(f"{each}: others may write to it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder}: cannot be written")


def _drop_unfinished(folder: Path) -> None:
    """Removes what a command that was killed has left half-written, since JAX would keep it.

    Each file is looked at once, by the first command after the one that wrote it.
    """
    stamp, began = folder / _CHECKED, time.time()
    before = stamp.stat().st_mtime if stamp.exists() else 0.0
    for file in folder.glob("*-cache"):
        with contextlib.suppress(OSError):
            if file.stat().st_mtime >= before and not _is_whole(file.read_bytes()):
                file.unlink()
    stamp.touch()
    os.utime(stamp, (began, began))


def _is_whole(data: bytes) -> bool:
    """Whether a compressed entry, which JAX writes by zstandard if it is installed, has its end."""
    try:
        if data.startswith(_ZSTANDARD):
            import zstandard

            zstandard.ZstdDecompressor().decompress(data)
        else:
            zlib.decompress(data)
    except Exception:  # or the library is gone, and JAX cannot read the entry either
        return False
    return True


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _accelerators(proc: Path) -> set[str]:
    """Models of NVIDIA's GPUs and their driver, and the devices of TPUs, as the kernel shows them.

    JAX itself knows programs by the devices that they are for.
    """
    found = set()
    for file in [*proc.glob("driver/nvidia/gpus/*/information"), proc / "driver/nvidia/version"]:
        with contextlib.suppress(OSError):
            lines = file.read_text("utf-8", "replace").splitlines()
            found |= {line for line in lines if line.startswith(("Model", "NVRM"))}
    tpus = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    return found | ({f"{len(tpus)} devices"} if tpus else set())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
