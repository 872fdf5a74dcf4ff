"""`bytelm doctor`: will a run work here? Versions, devices, arithmetic, gradients, disk, data.

Every check gives one line. None of them changes anything except a folder that it removes again. If
there are several processes, all of them check, and gradients and checkpoints are checked across
them.
"""

import importlib.metadata
import os
import platform
import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from bytelm import data
from bytelm.config import DataConfig, MegabyteConfig, TrainConfig
from bytelm.files import replace_file
from bytelm.remote.folder import RemoteFolder
from bytelm.run_data import open_source
from bytelm.storage.lock import StoreLock
from bytelm.storage.stores import is_remote, tidy
from bytelm_jax.models import define_model
from bytelm_jax.tools.memory import device_limit
from bytelm_jax.training import mesh as meshes
from bytelm_jax.training import processes
from bytelm_jax.training import step as steps
from bytelm_jax.training.loss import cross_entropy
from bytelm_jax.training.remote import store_path

Form = Literal["jit", "shard_map"]
"""The two forms of the train step."""

FREE = 2**30
"""Free bytes that a folder for checkpoints should have at the very least."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")

_BANDS = {"float32": (0.0, 1e-5), "bfloat16": (2e-4, 5e-3)}
"""Relative errors that a product of matrices may have, lower and upper bound.

bfloat16 keeps 8 bits of each result, which costs about 2e-3; a much smaller error would mean that
the product is computed in another dtype.
"""

_GRADIENT_ERROR = 1e-4
"""Relative, in float32; a sum taken twice would be off by the number of devices."""

_TINY = MegabyteConfig(
    patch_size=1, global_dim=16, local_dim=16, max_length=8,
    global_layers=1, global_heads=2, local_layers=0, local_heads=1, init_std=0.2,
)  # fmt: skip


class Finding(NamedTuple):
    """One line of the report."""

    check: str
    ok: bool
    message: str


class SickError(Exception):
    """A failed check; the message says what is wrong and what to do."""


def examine(
    run_dir: Path, sizes: tuple[int, int, int], reading: DataConfig, limit: float
) -> Iterator[Finding]:
    """Runs all checks that come after joining the processes, in order.

    `sizes` are those that `meshes.make_mesh` takes: devices, fsdp and tensor.

    A check that takes longer than `limit` seconds ends the process: a collective in which other
    processes do not take part never returns.
    """
    yield _run("versions", check_versions, limit)
    yield _run("devices", check_devices, limit)
    try:
        mesh = meshes.make_mesh(*sizes)
    except ValueError as error:
        yield Finding("mesh", False, str(error))
        mesh = None
    if mesh is not None:
        yield _run("mesh", partial(check_mesh, mesh), limit)
    yield _run("precision", check_precision, limit)
    if mesh is not None:
        yield _run("gradients", partial(check_gradients, mesh), limit)
        yield _run("checkpoints", partial(check_checkpoints, run_dir, mesh), limit)
    if reading.paths or reading.valid:
        yield _run("data", partial(check_data, reading), limit)


def _run(name: str, check: Callable[[], str], limit: float) -> Finding:
    timer = threading.Timer(limit, _give_up, (name, limit))
    timer.daemon = True
    timer.start()
    try:
        return Finding(name, True, check())
    except SickError as error:
        return Finding(name, False, str(error))
    except Exception as error:  # whatever it is, the other checks should still run
        line = (str(error).strip().splitlines() or [""])[0]
        return Finding(name, False, f"{type(error).__name__}: {line}")
    finally:
        timer.cancel()


def _give_up(name: str, limit: float) -> None:
    print(
        f"FAIL {name}: no answer in {limit:g} s; look at the other processes, and at the network "
        "between them",
        flush=True,
    )
    os._exit(1)


def check_coordinator(host: str, port: int, is_coordinator: bool, patience: float = 60.0) -> str:
    """Whether the coordinator answers or, with `is_coordinator` (process 0), could listen.

    The other processes get `patience` seconds to come up. Uses nothing of JAX.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise SickError(f"{host}: no such host ({error.strerror}); check the name") from error
    if is_coordinator:
        family, kind, number, _, address = addresses[0]
        with socket.socket(family, kind, number) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                raise SickError(
                    f"{host}:{port}: cannot be listened on ({error.strerror}); process 0 has to "
                    "run on that host, and the port has to be free"
                ) from error
        return f"{host}:{port} is this host's, and free"
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return f"{host}:{port} answers"
        except OSError as error:
            if time.monotonic() >= deadline:
                raise SickError(
                    f"{host}:{port}: {error.strerror or error}; is process 0 running there, and is "
                    "the port open between the hosts?"
                ) from error
        time.sleep(1.0)


def check_versions() -> str:
    """The versions of Python and the relevant packages; none may be older than required."""
    installed = {name: importlib.metadata.version(name) for name in _PACKAGES}
    try:
        asked = importlib.metadata.requires("bytelm") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that was not installed
        asked = []
    for line in asked:
        needs = re.match(r"([\w-]+)>=([\d.]+)$", line)
        if needs and _number(importlib.metadata.version(needs[1])) < _number(needs[2]):
            have = importlib.metadata.version(needs[1])
            raise SickError(f"{needs[1]} {have}: pip install '{needs[0]}'")
    if _number(installed["jaxlib"]) > _number(installed["jax"]):
        raise SickError(
            f"jaxlib {installed['jaxlib']} is newer than jax {installed['jax']}: pip install "
            f"jaxlib=={installed['jax']}"
        )
    versions = [f"{name} {version}" for name, version in installed.items()]
    return ", ".join([f"Python {platform.python_version()}", *versions])


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def check_devices() -> str:
    """The devices of all processes, and the memory of this process's devices."""
    devices, local = jax.devices(), jax.local_devices()
    kinds = sorted({device.device_kind for device in devices})
    if len(kinds) > 1:
        raise SickError(
            f"{', '.join(kinds)}: different kinds of devices cannot be mixed; use one kind"
        )
    memory, share = device_limit(local[0]), "each"
    if memory is None:  # a CPU
        memory, share = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "of the host"
    return (
        f"{len(devices)} x {kinds[0]} in {jax.process_count()} processes, {len(local)} of them "
        f"here, {memory / 2**30:.1f} GiB {share}"
    )


def check_mesh(mesh: Mesh) -> str:
    """The shape of the mesh, and the rows of a batch that this process feeds."""
    part, parts = meshes.process_slice(mesh)
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    return f"{shape}; this process feeds part {part + 1} of {parts} of each batch"


def check_precision() -> str:
    """Compares a product of matrices on each device of this process with float64 on the host."""
    if jax.config.read("jax_enable_x64"):
        raise SickError("JAX_ENABLE_X64 is set, but training is not meant for it; unset it")
    source, worst = np.random.default_rng(0), dict.fromkeys(_BANDS, 0.0)
    left, right = (source.standard_normal((256, 256)) for _ in range(2))
    for device in jax.local_devices():
        for name, (least, most) in _BANDS.items():
            a, b = (jax.device_put(jnp.asarray(x, jnp.dtype(name)), device) for x in (left, right))
            got = np.asarray(_product(a, b)).astype(np.float64)
            exact = np.asarray(a).astype(np.float64) @ np.asarray(b).astype(np.float64)
            error = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
            worst[name] = max(worst[name], error)
            if not least <= error <= most:
                raise SickError(
                    f"{device}: a product in {name} is off by {error:.1e}, expected {least:.0e} "
                    f"to {most:.0e}; exclude this device"
                )
    return ", ".join(f"{name} off by {error:.1e}" for name, error in worst.items())


@jax.jit
def _product(a: Any, b: Any) -> Any:
    return jnp.matmul(a, b, precision="highest")


def check_gradients(mesh: Mesh) -> str:
    """Compares gradients over the mesh, by plain SGD, with those of one device.

    AdamW would hide gradients that are too large by the same factor everywhere. Checks the forms of
    the step that the mesh allows.
    """
    rows, pad_id = 2 * mesh.size, _TINY.vocab.pad_id
    ids = np.random.default_rng(0).integers(0, 256, (rows, _TINY.max_length), np.int32)
    bind, init = define_model(_TINY)

    def loss(params: Any) -> Any:
        nats, count = cross_entropy(bind(params)(jnp.asarray(ids)), jnp.asarray(ids), pad_id)
        return nats / count

    with jax.default_matmul_precision("highest"):
        before = jax.device_get(jax.jit(init, static_argnums=0)(0))
        exact = jax.device_get(jax.jit(jax.grad(loss))(before))
        errors = []
        for form in get_args(Form) if meshes.tensor_parts(mesh) == 1 else ("jit",):
            gradients = _gradients(mesh, form, bind, before, ids)
            error = _norm({name: gradients[name] - exact[name] for name in exact}) / _norm(exact)
            if not error <= _GRADIENT_ERROR:
                raise SickError(
                    f"{form} over {mesh.size} devices makes them "
                    f"{_norm(gradients) / _norm(exact):.3g} times as long as on one device, off "
                    f"by {error:.1e}: do not train on this mesh; try the other --parallel, "
                    "--fsdp 1, or fewer devices"
                )
            errors.append(f"{form} to {error:.1e}")
    return f"those of {mesh.size} devices are those of one: {', '.join(errors)}"


def _gradients(
    mesh: Mesh, form: Form, bind: Any, before: dict[str, np.ndarray], ids: np.ndarray
) -> dict[str, np.ndarray]:
    """How much a step of SGD at rate 1 reduces each parameter."""
    groups = mesh.shape[meshes.FSDP]
    run = TrainConfig(batch_size=len(ids), fsdp=groups, compute_dtype="float32", parallel=form)
    optimizer = optax.with_extra_args_support(optax.sgd(1.0))
    params = {name: jnp.asarray(value) for name, value in before.items()}
    state = steps.TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))
    step = steps.make_train_step(bind, optimizer, run, _TINY.vocab.pad_id, mesh)
    part, parts = meshes.process_slice(mesh)
    local_ids = ids[part * len(ids) // parts : (part + 1) * len(ids) // parts]
    state, _ = step(meshes.place(mesh, state), meshes.put_batch(mesh, local_ids))
    after = meshes.fetch(mesh, state.params)
    return {name: before[name] - after[name] for name in before}


def _norm(tree: dict[str, Any]) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.float64(leaf))) for leaf in tree.values())))


def check_checkpoints(run_dir: Path, mesh: Mesh) -> str:
    """Writes a file and a sharded array under `run_dir`, reads them back and removes them."""
    if is_remote(run_dir):
        return _check_store(tidy(run_dir), mesh)
    created = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    probe, problem = run_dir.absolute() / ".doctor", ""
    try:
        # No process may be left behind in a collective because another one failed.
        if processes.is_first():
            problem = _write(probe)
        if not processes.all_agree(not problem):
            raise SickError(problem or "process 0 cannot write there; see its line")
        problem = _read(probe)
        if not processes.all_agree(not problem):
            raise SickError(problem or "another process cannot read there; see its line")
        seconds = _through_orbax(probe / "arrays", mesh)
        free = shutil.disk_usage(run_dir).free
        if free < FREE:
            raise SickError(
                f"{run_dir}: only {free / 2**30:.2f} GiB free; free some space or "
                "name another folder"
            )
        return f"{run_dir} keeps what is written ({seconds:.1f} s), {free / 2**30:.0f} GiB free"
    finally:
        if processes.is_first():
            shutil.rmtree(probe, ignore_errors=True)
            for path in created:
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()


def _check_store(address: str, mesh: Mesh) -> str:
    """The same on an object store, and whether a lock would keep a second run out."""
    probe, start = f"{address}/doctor", time.perf_counter()
    folder, problem, seconds = RemoteFolder(probe), "", 0.0
    try:
        if processes.is_first():
            try:
                folder.remove_all(folder.names(""))
                StoreLock(address).check_store()
                folder.write("file", b"written")
                if folder.read("file") != b"written":
                    problem = f"{address}: returns different bytes than were written; name another"
            except ValueError as error:
                problem = str(error)
        if not processes.all_agree(not problem):
            raise SickError(problem or "process 0 cannot write there; see its line")
        seconds = time.perf_counter() - start
        if address.startswith("gs://"):  # others are written here first, and then uploaded
            seconds = _through_orbax(store_path(f"{probe}/arrays"), mesh)
        return f"{address} keeps what is written ({seconds:.1f} s), and one run at a time"
    finally:
        if processes.is_first():
            folder.remove_all(folder.names(""))


def _write(probe: Path) -> str:
    """Writes a file; returns the problem, if any."""
    try:
        shutil.rmtree(probe, ignore_errors=True)
        probe.mkdir(parents=True)
        replace_file(probe / "file", b"written")
    except OSError as error:
        where = error.filename or probe
        return f"{where}: {error.strerror}; name a folder that can be written with --run-dir"
    return ""


def _read(probe: Path) -> str:
    """Reads the file back; returns the problem, if any."""
    folder = probe.parent
    try:
        same = (probe / "file").read_text("utf-8") == "written"
    except FileNotFoundError:
        return f"{folder}: not the folder that process 0 sees; name one that all hosts share"
    except OSError as error:
        return f"{folder}: {error.strerror}; name another folder with --run-dir"
    return "" if same else f"{folder}: returns different bytes than were written; name another"


def _through_orbax(path: Any, mesh: Mesh) -> float:
    """Seconds for saving and restoring a sharded array; raises if it came back changed."""
    start = time.perf_counter()
    rows = meshes.put_batch(mesh, np.arange(64 * len(mesh.local_devices), dtype=np.float32))
    tree = {"rows": rows}
    template = {"rows": jax.ShapeDtypeStruct(rows.shape, rows.dtype, sharding=rows.sharding)}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(path, template)
    same = bool(jnp.array_equal(back["rows"], rows))
    if not processes.all_agree(same):
        raise SickError(f"{path.parent.parent}: arrays come back changed; name another folder")
    return time.perf_counter() - start


def check_data(reading: DataConfig) -> str:
    """Whether every source and validation set can be read."""
    parts = []
    for field, paths in (("data", reading.paths), ("valid", reading.valid)):
        for name, named in data.named_paths(paths, f"data.{field}").items():
            corpus = open_source(reading, name, named)
            size = f"{corpus.total_bytes:,} bytes in {corpus.documents:,} documents"
            size += f" ({corpus.counted_bytes:,} counted)" if corpus.is_masked else ""
            called = name if field == "data" else f"valid {name}".strip()
            parts += [f"{called}: {size}" if called else size, *corpus.notes]
    return "; ".join(parts)


def report(finding: Finding) -> None:
    """Prints one line: successes in the first process only, failures in each."""
    who = f" (process {jax.process_index()})" if _joined() and not finding.ok else ""
    if finding.ok and _joined() and not processes.is_first():
        return
    print(f"{'ok  ' if finding.ok else 'FAIL'} {finding.check}{who}: {finding.message}", flush=True)


def _joined() -> bool:
    """Whether this is one of several processes; asking does not start JAX's backends."""
    return jax.distributed.is_initialized()
