"""Run folders: `config.json`, and Orbax checkpoints of everything a run needs to continue.

A checkpoint holds the parameters, the optimizer state, the step (which is also the position in the
data), the recipe with its vocabulary, the identity of the data, and a fingerprint of every array:
an integer sum that is the same under any sharding, compared after every restore, because the array
files themselves carry no checksum. Arrays that hold NaN or infinity are neither saved nor restored.
"""

import contextlib
import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from bytelm.config import Recipe, TrainConfig, model_from_dict, require, to_dict
from bytelm.files import JSON_LIMIT, errors_about, one_line, require_plain_file
from bytelm.folders import new_folder
from bytelm.metrics import score
from bytelm.remote.copies import local_copy
from bytelm.remote.run import RemoteRun
from bytelm.runs import find_export, load_recipe, save_recipe, saved_steps
from bytelm.storage.stores import is_address, require_local
from bytelm.trainable import trainable
from bytelm_jax.layers.lora import merge
from bytelm_jax.models import Params, abstract_params, adapters_of
from bytelm_jax.optimizers.build import without
from bytelm_jax.training import processes
from bytelm_jax.training.fingerprints import (
    NonFiniteError,
    check_finite,
    examine,
    fingerprints,
)
from bytelm_jax.training.manager import Manager, silence_orbax, stored
from bytelm_jax.training.remote import checkpoint_folder, committing, raise_if_lost

_PLAIN, _MORE = 1, 2
"""The `version` of a checkpoint, and of one that holds adapters or an average of the weights."""

_MOST_TRIED = 64
"""Number of checkpoints that a run tries, newest first, to find an undamaged one."""

_FILE_BYTES = 2**24
"""Largest array file of an import: Orbax gathers one in memory, 2 GB by default, before writing."""


def _rank(metrics: dict[str, Any]) -> float:
    """`score` for Orbax, which cannot order the NaN that older runs stored."""
    value = score(metrics)
    return math.inf if value is None else value


def open_checkpoints(
    run_dir: Path, train: TrainConfig | None = None, remote: RemoteRun | None = None
) -> ocp.CheckpointManager:
    """The checkpoints of the run in `run_dir`, or of `remote`, whose scratch folder that is.

    `train` says how many to keep, None opens them read-only.

    Raises `ValueError` for what Orbax would wait for, or read without an end, when it opens them.
    """
    silence_orbax()
    directory = checkpoint_folder(run_dir, remote)
    for pattern in ("*/_CHECKPOINT_METADATA", "*/metrics/metrics"):
        for file in (run_dir / "checkpoints").glob(pattern):
            if file.exists():  # a running trainer removes old steps
                with errors_about(file, "remove it"):
                    _check_small(file)
    if train is None:
        # Each process reads for itself: none waits for another one that found the files damaged.
        process = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(
            primary_host=process,
            active_processes={process},
            barrier_sync_key_prefix=f"reader{process}",
        )
        options = ocp.CheckpointManagerOptions(
            read_only=True, create=False, multiprocessing_options=alone
        )
    else:
        best = BestN(
            get_metric_fn=_rank,
            reverse=True,
            n=train.keep_best,
            keep_checkpoints_without_metrics=False,
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_rank,
            best_mode="min",
            preservation_policy=AnyPreservationPolicy([LatestN(n=train.keep_last), best]),
            cleanup_tmp_directories=True,
            temporary_path_class=committing(remote),
        )
    return Manager(directory, options=options)


def save(
    manager: ocp.CheckpointManager,
    step: int,
    params: Params,
    opt_state: Any,
    recipe: Recipe,
    data: str,
    metrics: dict[str, float] | None,
    average: Params | None = None,
) -> None:
    """Starts an asynchronous save; the arrays may be donated as soon as it returns.

    `average` is that of the parameters that train, if the run keeps one. Without an `opt_state`
    only the parameters are saved, and they must not be donated. Raises
    `NonFiniteError`, before anything is written, for an array that is not finite.
    """
    arrays = _items(params, opt_state, average)
    if jax.default_backend() == "cpu" and opt_state is not None:
        # On a CPU the "host copy" is a view of the very buffers that the next step overwrites.
        arrays = jax.tree.map(jnp.copy, arrays)
    marks = examine(arrays)
    check_finite(arrays, marks)
    metadata = {
        **({"version": _MORE} if recipe.train.lora_rank or average is not None else {}),
        "step": step,
        "recipe": to_dict(recipe),
        "data": data,
        "metrics": metrics,
        "fingerprints": {name: fingerprints(each) for name, each in marks.items()},
    }
    kept: dict[str, Any]
    if opt_state is None:  # the same files, cut so that little waits in memory to be written
        kept = {"params": ocp.args.PyTreeSave(params, ocdbt_target_data_file_size=_FILE_BYTES)}
    else:
        kept = {name: ocp.args.StandardSave(stored(tree)) for name, tree in arrays.items()}
    items = ocp.args.Composite(metadata=ocp.args.JsonSave(metadata), **kept)
    with _writable(manager):
        ranked = None if score(metrics) is None else metrics
        manager.save(step, args=items, metrics=ranked, force=True)


def finish(manager: ocp.CheckpointManager) -> None:
    """Waits until every save is on disk; raises `ValueError` if one failed."""
    with _writable(manager):
        manager.wait_until_finished()


def _items(params: Any, opt_state: Any, average: Any) -> dict[str, Any]:
    """The trees of a checkpoint by their names in it; those that are None are left out."""
    trees = {"params": params, "optimizer": opt_state, "average": average}
    return {name: tree for name, tree in trees.items() if tree is not None}


class DamagedError(ValueError):
    """A checkpoint cannot be read back as it was written; the message names it."""


class Recovered(NamedTuple):
    """The state from which a run continues; what was not asked for is None."""

    step: int
    params: Any
    opt_state: Any
    average: Any
    metadata: dict[str, Any]


def restore(
    manager: ocp.CheckpointManager,
    step: int,
    params: Any | None,
    opt_state: Any | None = None,
    average: Any | None = None,
) -> Recovered:
    """Arrays shaped and sharded like the abstract ones, and the metadata; reads no others.

    Raises `DamagedError` if the checkpoint is damaged, holds other arrays or some that are not
    finite.
    """
    recovered = _read(manager, step, _items(params, opt_state, average))
    with _readable(manager, step):
        _check_arrays(recovered)
    return recovered


def recover(
    run_dir: Path,
    params: Any,
    opt_state: Any,
    remote: RemoteRun | None = None,
    average: Any | None = None,
) -> Recovered | None:
    """The newest undamaged checkpoint of a run, if any, placed on devices like the abstract arrays.

    Newer, damaged ones are moved to the folder `damaged`, with a line on standard error. Every
    process reads its own parts and all agree on the result. Raises `ValueError` if there are
    checkpoints but no undamaged one, and leaves them where they are.
    """
    bad: list[tuple[int, str]] = []
    recovered = None
    with contextlib.ExitStack() as stack:
        # The first process decides whether there are any: another one may look while the folder for
        # the next ones is being created.
        there = bool(remote.steps()) if remote else (run_dir / "checkpoints").is_dir()
        opened = open_checkpoints(run_dir, remote=remote) if there else None
        manager = stack.enter_context(opened) if opened else None
        steps = sorted(manager.all_steps(), reverse=True) if manager else []
        for step in processes.from_first(steps, _MOST_TRIED):
            problem = ""
            if remote:
                remote.fetch(step)
            try:
                wanted = _items(params, opt_state, average)
                recovered = _read(manager, step, wanted) if manager else None
            except DamagedError as error:
                problem = str(error)
            if processes.all_agree(recovered is not None) and recovered and manager:
                try:
                    with _readable(manager, step):
                        # A sum over all processes, so the same in each of them.
                        _check_arrays(recovered)
                    if remote:
                        remote.drop(step)
                    break
                except DamagedError as error:
                    problem = str(error)
            bad.append((step, problem or f"checkpoint {step}: another process cannot read it"))
            recovered = None
    if bad and recovered is None:
        raise ValueError(f"{bad[0][1]}; there is no undamaged one; train in another run_dir")
    for step, problem in bad:
        _set_aside(run_dir, step, problem, remote)
    if bad:
        processes.wait_for_all("damaged checkpoints are set aside")
    return recovered


def _set_aside(run_dir: Path, step: int, problem: str, remote: RemoteRun | None) -> None:
    """Moves a damaged checkpoint out of the way of the one that will be saved in its place."""
    if not processes.is_first():
        return
    target = remote.set_aside(step) if remote else _move_aside(run_dir, step)
    print(
        f"bytelm train: warning: {problem}; it is now {target}, and the run continues from the "
        "checkpoint before",
        file=sys.stderr,
        flush=True,
    )


def _move_aside(run_dir: Path, step: int) -> Path:
    folder = run_dir / "damaged"
    folder.mkdir(exist_ok=True)
    taken = sum(path.name.split(".")[0] == str(step) for path in folder.iterdir())
    target = folder / (f"{step}.{taken}" if taken else str(step))
    os.replace(run_dir / "checkpoints" / str(step), target)
    return target


def _read(manager: ocp.CheckpointManager, step: int, wanted: dict[str, Any]) -> Recovered:
    metadata = read_metadata(manager, step)
    if "optimizer" in wanted and "optimizer" not in metadata["fingerprints"]:
        raise ValueError(
            f"{manager.directory}: imported weights, which training cannot continue from; name "
            "another run_dir"
        )
    arguments: dict[str, Any] = {
        name: ocp.args.StandardRestore(stored(tree)) for name, tree in wanted.items()
    }
    with _readable(manager, step):
        restored = manager.restore(step, args=ocp.args.Composite(**arguments))
        found = {
            name: jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(restored[name]))
            for name, tree in wanted.items()
        }
        return Recovered(
            step, found.get("params"), found.get("optimizer"), found.get("average"), metadata
        )


def _check_arrays(recovered: Recovered) -> None:
    arrays = _items(recovered.params, recovered.opt_state, recovered.average)
    marks = examine(arrays)
    for name, each in marks.items():
        if fingerprints(each) != recovered.metadata["fingerprints"][name]:
            raise ValueError(f"the stored {name} differ from those that were saved")
    check_finite(arrays, marks)


def choose_step(manager: ocp.CheckpointManager, which: str) -> int:
    """The step that `which` names: "latest", "best" or the number of an existing step."""
    steps = sorted(manager.all_steps())
    if not steps:
        raise ValueError(f"{manager.directory}: no checkpoint there; train first")
    if which == "latest":
        return steps[-1]
    if which == "best":
        scores = {step: score(read_metadata(manager, step)["metrics"]) for step in steps}
        ranked = [(value, step) for step, value in scores.items() if value is not None]
        if not ranked:
            raise ValueError("checkpoint=best: no checkpoint was evaluated; choose latest")
        return min(ranked)[1]
    if which.isdigit() and int(which) in steps:
        return int(which)
    raise ValueError(f"checkpoint={which}: choose latest, best or one of {steps}")


def read_metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """The metadata of a checkpoint; raises `DamagedError` unless they are as `save` wrote them."""
    with _readable(manager, step):
        if not is_address(str(manager.directory)):
            _check_files(Path(manager.directory) / str(step))
        items = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        metadata = manager.restore(step, args=items)["metadata"]
        _check_metadata(metadata, step)
        return metadata


def _check_files(folder: Path) -> None:
    """Raises `OSError` or `ValueError` for what Orbax would wait for, or read without an end."""
    for file in folder.rglob("*"):
        if not file.is_dir():
            require_plain_file(file)
    for file in (folder / "metadata" / "metadata", folder / "params" / "_METADATA"):
        _check_small(file)


def _check_small(file: Path) -> None:
    """Raises `OSError` or `ValueError` unless `file` is plain and as small as JSON files are."""
    require_plain_file(file)
    size = file.stat().st_size
    require(size <= JSON_LIMIT, f"{file.name} has {size} bytes, {JSON_LIMIT} at most expected")


def _check_metadata(metadata: Any, step: int) -> None:
    kinds: dict[str, Any] = {"step": int, "recipe": dict, "data": str, "metrics": dict | None}
    kinds["fingerprints"] = dict
    require(isinstance(metadata, dict), "the metadata are no object")
    version = metadata.get("version", _PLAIN)
    require(version in (_PLAIN, _MORE), f"version={version!r}: update bytelm, which wrote it")
    for name, kind in kinds.items():
        require(isinstance(metadata.get(name), kind), f"metadata: {name} is missing or damaged")
    good = metadata["step"] == step and isinstance(metadata["recipe"].get("model"), dict)
    good &= all(isinstance(value, int | float) for value in (metadata["metrics"] or {}).values())
    good &= isinstance(metadata["fingerprints"].get("params"), list)
    require(good, "the metadata are damaged")


def load_run(
    run_dir: Path, which: str = "latest", averaged: bool = True
) -> tuple[Recipe, Params, int]:
    """Recipe, parameters (on the default device) and step of a checkpoint of a folder or address.

    Adapters are merged into the weights. Of a run that averages its weights the parameters are the
    average, unless not `averaged`. A checkpoint that a training run removes meanwhile is replaced
    by the next that `which` names.

    Raises `ValueError`, and `DamagedError` if the checkpoint is damaged.
    """
    recipe, params, step = load_leaves(run_dir, which, averaged)
    lora = adapters_of(recipe)
    return recipe, merge(params, lora) if lora else params, step


def load_leaves(
    run_dir: Path, which: str = "latest", averaged: bool = True
) -> tuple[Recipe, Params, int]:
    """As `load_run`, with the parameters of adapters beside the others, as they were trained."""
    with local_copy(run_dir, which) as copy:
        return _load_run(copy, which, averaged)


def _load_run(run_dir: Path, which: str, averaged: bool) -> tuple[Recipe, Params, int]:
    recipe = load_recipe(run_dir)
    if not (run_dir / "checkpoints").is_dir():
        raise ValueError(f"{run_dir}: no checkpoints there; train first")
    exported = find_export(run_dir, which)
    if exported is not None:
        hint = f"`bytelm import {exported} --out RUN` makes a run folder of its weights"
        raise ValueError(f"{run_dir}: PyTorch trained it; {hint}")
    while True:
        with open_checkpoints(run_dir) as manager:
            steps = sorted(manager.all_steps())
            try:
                step = choose_step(manager, which)
                return recipe, _load_params(manager, step, recipe, run_dir, averaged), step
            except DamagedError as error:
                now = saved_steps(run_dir)
                if now == steps:
                    raise DamagedError(f"{error}; choose another checkpoint") from error
                if which.isdecimal():
                    gone = f"checkpoint={which}: was removed while it was read"
                    raise ValueError(f"{gone}; choose latest, best or one of {now}") from None


def _load_params(
    manager: ocp.CheckpointManager, step: int, recipe: Recipe, run_dir: Path, averaged: bool
) -> Params:
    metadata = read_metadata(manager, step)
    described = metadata["recipe"]["model"]
    described = to_dict(model_from_dict(described))  # older files name some patchers otherwise
    if _uncalibrated(described) != _uncalibrated(to_dict(recipe.model)):
        raise ValueError(f"{run_dir}: config.json and checkpoint {step} describe different models")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)
        for name, leaf in abstract_params(recipe.model, adapters_of(recipe)).items()
    }
    average, kept = None, "average" in metadata["fingerprints"]
    require(kept or averaged, f"average: {run_dir} keeps none of its weights; leave it out")
    if averaged and kept:
        average = without(abstract, trainable(recipe, abstract).frozen)
    restored = restore(manager, step, abstract, average=average)
    return restored.params | (restored.average or {})


def _uncalibrated(model: dict[str, Any]) -> dict[str, Any]:
    """A model configuration without the fields that `calibrate` changes in `config.json`."""
    return {k: v for k, v in model.items() if k not in ("threshold", "bytes_per_patch")}


def check_unused(run_dir: Path) -> None:
    """Raises `ValueError` unless a new run folder can be created at `run_dir`, here."""
    require_local(run_dir, "out")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise ValueError(f"{run_dir}: exists and is not an empty folder; name another")


def create_run(run_dir: Path, recipe: Recipe, params: Params) -> None:
    """Creates a run folder that holds `params` as its step 0; it appears complete or not at all.

    Training cannot continue from it, since its data are unknown, so no optimizer state is stored.
    Raises `ValueError` if a parameter is not float32, the dtype in which all of them are restored,
    and if the folder cannot be written.
    """
    check_unused(run_dir)
    for name, value in params.items():
        require(value.dtype == jnp.float32, f"{name}: dtype {value.dtype}; a run holds float32")
    try:
        with new_folder(run_dir) as temporary:
            with open_checkpoints(temporary, recipe.train) as manager:
                save(manager, 0, params, None, recipe, "", None)
                finish(manager)
            save_recipe(temporary, recipe)
    except (UnwrittenError, OSError) as error:
        why = f"cannot be written ({_system_reason(error)}); choose another place or free space"
        raise ValueError(f"{run_dir}: {why}") from None


@contextlib.contextmanager
def _readable(manager: ocp.CheckpointManager, step: int) -> Iterator[None]:
    """Turns any error of reading a damaged checkpoint into one line."""
    try:
        yield
    except NonFiniteError as error:
        raise DamagedError(
            f"checkpoint {step} in {manager.directory}: {error}, so the run had diverged"
        ) from None
    except Exception as error:  # tensorstore, Orbax and JSON each raise their own types
        raise DamagedError(
            f"checkpoint {step} in {manager.directory}: damaged or not of this model "
            f"({_first_line(error)})"
        ) from error


class UnwrittenError(ValueError):
    """A checkpoint could not be saved."""


@contextlib.contextmanager
def _writable(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns any error of a failed save into one line."""
    try:
        yield
    except Exception as error:  # from tensorstore's and Orbax's threads, of many types
        raise_if_lost(error)
        raise UnwrittenError(
            f"{manager.directory}: a checkpoint could not be written ({_first_line(error)}); "
            "earlier ones are intact; free some space and run the same command again"
        ) from error


def _system_reason(error: BaseException) -> str:
    """What the operating system says, without the places that tensorstore names around it."""
    cause = error.__cause__ or error
    code = re.search(r"\[os_error_code='(\d+)'", str(cause))
    reason = os.strerror(int(code[1])) if code else getattr(cause, "strerror", None)
    return reason or _first_line(cause)


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return one_line(line.split(" See full TensorStore")[0], 200)
