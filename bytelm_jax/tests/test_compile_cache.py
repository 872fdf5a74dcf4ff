"""The folder of compiled programs: one for each kind of machine, small, private, and whole."""

import os
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from bytelm_jax.cli import compile_cache
from bytelm_jax.cli.main import _keeps_programs

X86 = """\
processor : 0
vendor_id : AuthenticAMD
cpu family : 25
model : 17
model name : AMD EPYC
stepping : 1
cpu MHz : 2445.4
flags : fpu avx2 avx512f
"""
ARM = "processor : 0\nFeatures : fp asimd sve\nCPU implementer : 0x41\nCPU part : 0xd0c\n"


def machine(folder: Path, cpuinfo: str, gpu: str = "") -> Path:
    """A folder in the place of /proc."""
    folder.mkdir()
    (folder / "cpuinfo").write_text(cpuinfo)
    if gpu:
        (folder / "driver/nvidia/gpus/0000:01").mkdir(parents=True)
        text = f"Model: \t {gpu}\nIRQ: 12\n"
        (folder / "driver/nvidia/gpus/0000:01/information").write_text(text)
    return folder


def test_unlike_machines_never_share_a_folder(tmp_path, monkeypatch):
    core = X86.replace("processor : 0", "processor : 1")
    kinds = {
        "as it is": (X86, ""),
        "without avx512": (X86.replace(" avx512f", ""), ""),
        "one more feature": (X86.replace("avx2", "avx2 avx512_fp16"), ""),
        "another model": (X86.replace("model : 17", "model : 1"), ""),
        "another stepping": (X86.replace("stepping : 1", "stepping : 2"), ""),
        "one core without avx512": (X86 + core.replace(" avx512f", ""), ""),
        "another architecture": (ARM, ""),
        "with a GPU": (X86, "NVIDIA H100"),
        "with another GPU": (X86, "NVIDIA H200"),
    }
    found = {}
    for number, (kind, (cpuinfo, gpu)) in enumerate(kinds.items()):
        found[kind] = compile_cache.describe_machine(machine(tmp_path / str(number), cpuinfo, gpu))
    first = found["as it is"]
    assert first is not None and len(set(found.values())) == len(kinds)

    same = X86.replace("fpu avx2 avx512f", "avx512f fpu avx2").replace("2445.4", "1500.0")
    same += same.replace("processor : 0", "processor : 1")  # cores are counted elsewhere
    assert compile_cache.describe_machine(machine(tmp_path / "same", same)) == first
    unknown = machine(tmp_path / "unknown", "processor : 0\n")
    assert compile_cache.describe_machine(unknown) is None
    assert compile_cache.describe_machine(tmp_path / "nowhere") is None

    proc = tmp_path / "0"
    monkeypatch.setattr(compile_cache, "_cores", lambda: 1000)
    assert compile_cache.describe_machine(proc) != first
    monkeypatch.undo()
    monkeypatch.setattr(compile_cache, "version", lambda _: "9.9")
    assert compile_cache.describe_machine(proc) != first


PROGRAM = """
import sys, warnings
warnings.simplefilter("error")
from pathlib import Path
from bytelm_jax.cli import compile_cache
folder = compile_cache.use(Path(sys.argv[1]))
import jax
from jax import monitoring
events = []
monitoring.register_event_listener(lambda name, **_: events.append(name))
jax.jit(lambda x: x * 2 + 1)(jax.numpy.arange(3.0)).block_until_ready()
print(folder, *(events.count(f"/jax/compilation_cache/cache_{x}") for x in ("hits", "misses")))
"""


def compiled(proc: Path, cache: Path, **variables: str) -> tuple[str, int, int]:
    """Folder, programs found and programs compiled of a process on that machine."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith("JAX_") or "PLATFORM" in k}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(proc)],
        env=keep | {"XDG_CACHE_HOME": str(cache)} | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not done.returncode and not done.stderr, done.stderr
    folder, hits, misses = done.stdout.split()
    return folder, int(hits), int(misses)


def test_programs_are_found_again_on_the_same_kind_of_machine_alone(tmp_path):
    one = machine(tmp_path / "one", X86)
    two = machine(tmp_path / "two", X86.replace(" avx512f", ""))
    folder, hits, misses = compiled(one, tmp_path)
    assert not hits and misses
    other, *found = compiled(two, tmp_path)
    assert other != folder and found == [0, misses]

    # What a process that was killed has left is dropped, and compiled again.
    entries = sorted(Path(folder).glob("*-cache"))
    entries[0].write_bytes(entries[0].read_bytes()[:-9])
    assert compiled(one, tmp_path) == (folder, misses - 1, 1)
    assert compiled(one, tmp_path) == (folder, misses, 0)
    off = compiled(one, tmp_path / "none", JAX_ENABLE_COMPILATION_CACHE="0")
    assert off == ("None", 0, 0) and not (tmp_path / "none").exists()


def test_a_folder_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    root = tmp_path / "bytelm/compiled"
    root.mkdir(parents=True)
    root.chmod(0o777)
    assert compiled(machine(tmp_path / "one", X86), tmp_path)[0] == "None"


def test_an_entry_without_its_end_is_seen():
    zstandard = pytest.importorskip("zstandard")
    for whole in (zlib.compress(bytes(999)), zstandard.compress(bytes(999))):
        assert compile_cache._is_whole(whole)
        assert not any(compile_cache._is_whole(whole[:size]) for size in range(len(whole)))


def test_what_was_not_used_for_longest_goes_first(tmp_path):
    for age, name in enumerate("dbca"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x-cache").write_bytes(bytes(10))
        os.utime(tmp_path / name / "x-cache", (1e9 - age, 1e9 - age))
    compile_cache.prune(tmp_path, 40)
    assert len([*tmp_path.glob("*/*")]) == 4
    compile_cache.prune(tmp_path, 25)
    assert {file.parent.name for file in tmp_path.glob("*/*")} == {"d", "b"}


def test_commands_that_need_their_own_compiler_keep_nothing():
    assert _keeps_programs("train", ["megabyte_tiny", "--steps", "3"])
    for wrong in ("--dry-run", "--distributed", "--coordinator=a:1", "--help"):
        assert not _keeps_programs("train", ["megabyte_tiny", wrong])
    assert not _keeps_programs("doctor", [])
