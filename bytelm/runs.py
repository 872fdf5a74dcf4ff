"""Folders that hold a model: an export, or a run folder of either framework; and what a run reads.

An export is `config.json` and `model.safetensors`, or its shards. A run folder has
`checkpoints/STEP`, which are exports in PyTorch and Orbax checkpoints in JAX.
"""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from bytelm.config import DONORS, Recipe, TrainConfig, from_dict, parse_steps, require, to_dict
from bytelm.config.serialize import recipe_text
from bytelm.export import CONFIG_FILE, LIBRARY, holds_weights
from bytelm.files import errors_about, read_json, replace_file
from bytelm.metrics import METRIC, read_metrics, score
from bytelm.remote.copies import NO_ARRAYS, local_copy
from bytelm.remote.folder import RemoteFolder
from bytelm.remote.run import RemoteRun
from bytelm.storage.stores import is_remote, protocol_of, tidy

T = TypeVar("T")


def is_run(folder: Path) -> bool:
    """Whether `folder` is a run folder, of JAX or of PyTorch, and not an export."""
    return (folder / "checkpoints").is_dir() and not holds_weights(folder)


def saved_steps(run_dir: Path) -> list[int]:
    """The steps of which `run_dir` holds a checkpoint, in increasing order."""
    folder = run_dir / "checkpoints"
    names = [each.name for each in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def find_export(folder: Path, checkpoint: str | int = "latest") -> Path | None:
    """The export that `folder` is, or that it contains if PyTorch trained in it; otherwise None.

    None means a run folder of JAX. `checkpoint` is "latest", "best" (the lowest validation loss in
    `metrics.jsonl`) or a step. Raises `ValueError` for a checkpoint that does not exist, and if one
    is chosen in an export.
    """
    if not is_run(folder):
        known = checkpoint == "latest"
        require(known, f"checkpoint={checkpoint}: {folder} is not a run folder; leave it out")
        return folder
    steps = saved_steps(folder)
    require(bool(steps), f"{folder}/checkpoints: no checkpoint there; train first")
    places = {step: folder / "checkpoints" / str(step) for step in steps}
    if not any(holds_weights(place) for place in places.values()):
        return None
    if checkpoint == "latest":
        return places[steps[-1]]
    if checkpoint == "best":
        return places[_best(folder, steps)]
    wanted = int(checkpoint) if str(checkpoint).isdecimal() else None
    if wanted not in places:
        raise ValueError(f"checkpoint={checkpoint}: choose latest, best or one of {steps}")
    return places[wanted]


def read_export(folder: Path, checkpoint: str | int, read: Callable[[Path], T]) -> T | None:
    """What `read` makes of the export that `find_export` names; None for a run folder of JAX.

    A checkpoint that a training run removes meanwhile is replaced by the next that `checkpoint`
    names. Raises `ValueError` as `find_export` and `read` do, and for a step that was removed.
    """
    while True:
        steps = saved_steps(folder)
        try:
            export = find_export(folder, checkpoint)
            return None if export is None else read(export)
        except ValueError:
            now = saved_steps(folder)
            if now == steps:
                raise
            if str(checkpoint).isdecimal():
                gone = f"checkpoint={checkpoint}: was removed while it was read"
                raise ValueError(f"{gone}; choose latest, best or one of {now}") from None


def _best(run_dir: Path, steps: list[int]) -> int:
    file = run_dir / "metrics.jsonl"
    records = read_metrics(file) if file.is_file() else []
    scores = {record.get("step"): score(record) for record in records if METRIC in record}
    ranked = [(bits, step) for step in steps if (bits := scores.get(step)) is not None]
    require(bool(ranked), "checkpoint=best: no checkpoint was evaluated; choose latest")
    return min(ranked)[1]


# ---- config.json --------------------------------------------------------

_PLACES = ("paths", "valid", "cache_dir")
"""Fields of `DataConfig` that say where data are, not what they are."""

_FIXED = {"batch_size", "seed", "entropy_from", "init_from"}
_FIXED |= {"init_optimizer", "branch_from", "average_decay"}
_FIXED |= {"freeze", "learning_rate_scale"}
_FIXED |= {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
_MAY_CHANGE = {f.name for f in fields(TrainConfig)} - _FIXED
"""Fields of `TrainConfig` that a resumed run may change without changing what it trains on."""


class Outcome(NamedTuple):
    """How a run ended: at which step, and whether a signal stopped it before the last one."""

    step: int
    interrupted: bool


class DivergedError(RuntimeError):
    """Loss or weights are not finite; the message names the step and the last good checkpoint."""


def diverged(recipe: Recipe, step: int, why: str, saved: int) -> DivergedError:
    """The error of a run that ends at `step`, and whose last checkpoint is that of step `saved`."""
    kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint was saved"
    rate = recipe.optimizer.learning_rate
    return DivergedError(f"step {step}: {why}; {kept}; lower optimizer.learning_rate={rate}")


def never_finite(values: Mapping[str, float], times: int) -> str:
    """Why a run ends whose last `times` steps were skipped; `values` are those of the last one."""
    loss, norm = values["loss"], values["grad_norm"]
    return f"the loss is {loss} and the gradient norm {norm}, at {times} steps in a row"


def not_saved(skipped: int) -> str:
    """Why the end of a run is not saved, whose last `skipped` steps were skipped."""
    why = "the validation of its weights is not finite"
    if skipped:
        why = f"the last steps ({skipped}) were skipped because their loss or gradient norm is not "
        why += "finite"
    return f"{why}, so the end of the run is not saved"


def save_recipe(run_dir: Path, recipe: Recipe) -> None:
    """Writes `config.json` of a run folder, whole or not at all."""
    replace_file(run_dir / CONFIG_FILE, recipe_text(recipe))


def load_recipe(path: Path) -> Recipe:
    """The recipe in a JSON file or in the `config.json` of a run folder; raises `ValueError`."""
    if is_remote(path):
        with local_copy(path, NO_ARRAYS) as copy:
            return load_recipe(copy)
    file = path if path.is_file() or path.suffix == ".json" else path / CONFIG_FILE
    if file != path and not file.exists():
        hint = "give a folder that `train` or `import` made"
        raise ValueError(f"{path}: no config.json there; {hint}")
    with errors_about(file, "give a run folder or a JSON file with a recipe"):
        stored = read_recipe_json(file)
        refuse_export(stored, file)
        return from_dict(Recipe, stored)


def read_recipe_json(file: Path) -> Any:
    """What a JSON file with a recipe holds; raises `ValueError`."""
    try:
        return read_json(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        ours = file.name == CONFIG_FILE
        hint = "restore it from a backup" if ours else "give a run folder, or JSON with a recipe"
        raise ValueError(f"not JSON ({error}); {hint}") from None


def refuse_export(stored: Any, file: Path) -> None:
    """Raises `ValueError` for what `file` holds if it describes an export, or a foreign model."""
    if isinstance(stored, dict) and "name" not in stored:
        exported = stored.get("library") == LIBRARY or "bytelm" in stored
        hint = _import_hint(stored, file.parent, exported)
        require(not exported, f"belongs to an export, not to a run; {hint}")
        foreign = "model_type" in stored
        require(not foreign, f"belongs to a model of transformers, not to a run; {hint}")


def _import_hint(stored: dict[str, Any], folder: Path, exported: bool) -> str:
    """How the model in `folder` becomes one that commands read, if it can."""
    kind = stored.get("model_type")
    if not holds_weights(folder):
        return f"{folder} holds no weights: copy all of it again"
    if kind in DONORS:
        options = "--format llama --local RECIPE --out RUN"
        return f"`bytelm import {folder} {options}` makes a byte model of it"
    if not exported and kind != "blt":
        return f"model_type={kind!r:.100}: only {', '.join((*DONORS, 'blt'))} can be imported"
    return f"`bytelm import {folder} --out RUN` makes a run folder of it"


def saved_recipe(run_dir: Path) -> Recipe | None:
    """The recipe of the run that `run_dir`, here or at an address, holds; None if it holds none."""
    if is_remote(run_dir):
        begun = RemoteFolder(tidy(run_dir)).read(CONFIG_FILE) is not None
    else:
        begun = (run_dir / CONFIG_FILE).exists()
    return load_recipe(run_dir) if begun else None


def keep_rules(run_dir: Path, recipe: Recipe) -> Recipe:
    """`recipe` with the rules about data and patches of an older run that `run_dir` holds.

    A run begun before `data.order`, `data.split_rule` and `data.raw`, or the patcher `word` existed
    keeps its rules, whatever the recipe's are now.
    """
    saved = saved_recipe(run_dir)
    if saved is None:
        return recipe
    if saved.data.split_rule == "rank":
        raw = recipe.data.raw or saved.data.raw
        recipe = replace(recipe, data=replace(recipe.data, split_rule="rank", raw=raw))
    if saved.data.order != "grain":
        return recipe
    recipe = replace(recipe, data=replace(recipe.data, order="grain"))
    tree, older = to_dict(recipe), to_dict(saved.model).get("patcher") == "word"
    if older and tree["model"].get("patcher") == "space":
        tree["model"]["patcher"] = "word"
    return from_dict(Recipe, tree)


def prepare_run_dir(run_dir: Path, recipe: Recipe, branches: bool = True) -> None:
    """Creates the folder, or checks that it holds this recipe; raises `ValueError` otherwise.

    `branches` says whether the command can branch off a run, which the error then advises.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"run_dir={run_dir}: is a file; name a folder")
    if (saved := saved_recipe(run_dir)) is not None:
        check_same_run(saved, recipe, run_dir, branches)
    run_dir.mkdir(parents=True, exist_ok=True)


class RunLock:
    """A context manager that keeps a second run out of a folder until it ends.

    It is the operating system's lock (`flock`) on the folder itself, taken by the first process of
    a run: it leaves no file behind, and ends with the process, however that ends. File systems
    without such locks are used without, and so are all if not `locked`. Nothing locks a folder
    against being moved or changed, so `check` looks before a run saves anything.
    """

    def __init__(self, run_dir: Path | None = None, locked: bool = True) -> None:
        self.local = self._run_dir = run_dir or Path()
        self._locked = locked
        self._handle: int | None = None
        self._config: bytes | None = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None

    def take(self, run_dir: Path) -> bool:
        """False if another process holds the folder."""
        self._run_dir = run_dir
        self._handle = os.open(run_dir, os.O_RDONLY)
        if not self._locked:
            return True
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a network file system that cannot
            return True
        return True

    look = take

    @property
    def name(self) -> str:
        """What a person calls the folder."""
        return str(self.local)

    def steps(self) -> list[int]:
        """The steps of which the folder holds a checkpoint."""
        return saved_steps(self.local)

    def stop_if_lost(self) -> None:
        """Raises `ValueError` if the lock was lost, which one of the operating system cannot be."""

    def save_recipe(self, recipe: Recipe) -> None:
        """Writes `config.json` of the folder, which `check` compares from now on."""
        save_recipe(self._run_dir, recipe)
        self._config = (self._run_dir / CONFIG_FILE).read_bytes()

    def check(self) -> None:
        """Raises `ValueError` if the folder was moved or replaced, or its `config.json` changed.

        A `config.json` that was deleted is written again, with a line on standard error: without
        it no checkpoint could be opened, and nothing of anybody's is lost by writing it.
        """
        assert self._handle is not None
        try:
            same = os.path.samestat(os.stat(self._run_dir), os.fstat(self._handle))
        except OSError:
            same = False
        hint = "nothing more was saved; put it back and run the same command again"
        require(same, f"run_dir={self._run_dir}: was moved or replaced during the run; {hint}")
        file = self._run_dir / CONFIG_FILE
        if self._config is None:
            return
        if not os.path.lexists(file):
            replace_file(file, self._config)
            print(f"warning: {file}: was deleted; written again", file=sys.stderr, flush=True)
            return
        same = file.is_file() and file.stat().st_size == len(self._config)
        same = same and file.read_bytes() == self._config
        require(same, f"{file}: was changed during the run; {hint}")


def open_run(
    run_dir: Path,
    cache_dir: str = "",
    locked: bool = True,
    track: Sequence[str] = (),
    traced: str = "",
) -> RunLock | RemoteRun:
    """What holds a run folder, here or at an address, while a process trains in it.

    `cache_dir` is for what is written here of a run at an address. Raises `ValueError` for a store
    that holds no runs, and for trackers and traced steps, which write beside the run.
    """
    if not is_remote(run_dir):
        return RunLock(run_dir, locked)
    known = protocol_of(tidy(run_dir)) in ("gs", "s3")
    require(
        known, f"run_dir={tidy(run_dir)}: runs live on disks, gs:// and s3://; take one of them"
    )
    why = f"writes files beside the run, which {tidy(run_dir)} does not take; leave it out"
    require(not track, f"train.track={', '.join(track)}: {why}")
    require(not traced, f"train.profile_steps={traced}: {why}")
    return RemoteRun(run_dir, cache_dir, locked)


def traced_steps(run: TrainConfig, start: int, say: Callable[[str], None]) -> range:
    """The steps that `train.profile_steps` asks for and that come after step `start`.

    `say` takes a line about those that are left out.
    """
    asked = parse_steps("train.profile_steps", run.profile_steps)
    left = range(max(asked.start, start + 1), asked.stop)
    if len(left) < len(asked):
        what = f"only from step {left.start} on" if left else "nothing"
        say(f"train.profile_steps={run.profile_steps}: the run is at step {start}; traces {what}")
    return left


def start_notes(recipe: Recipe) -> list[str]:
    """What to say before a run begins.

    That is of a model that transformers knows but cannot express, and of adapters over weights that
    have learned nothing.
    """
    known, problem = recipe.model.transformers_type, recipe.model.transformers_problem
    run, notes = recipe.train, list[str]()
    if known is not None and problem is not None:
        export = f"`bytelm export --format hf-{known}`"
        notes.append(f"note: {export} cannot write this model ({problem})")
    if run.lora_rank and not (run.init_from or run.branch_from):
        notes.append("warning: adapters train over random weights; start from some by --init-from")
    return notes


def require_same_data(before: str, now: str, run_dir: str | Path) -> None:
    """Raises `ValueError` unless the data of a run are those that it was started on."""
    hint = "give the same files"
    require(before == now, f"data: not the bytes that {run_dir} was started on; {hint}")


def require_ahead(recipe: Recipe, start: int, run_dir: str | Path) -> None:
    """Raises `ValueError` if the run is past the last step that `recipe` asks for."""
    steps, hint = recipe.train.steps, "give more steps, or leave them out"
    require(start <= steps, f"train.steps={steps}: {run_dir} is at step {start} already; {hint}")


def require_lock(taken: bool, run_dir: str | Path) -> None:
    """Raises `ValueError` unless the lock of `run_dir` was `taken`."""
    hint = "wait for it, stop it, or choose another run_dir"
    require(taken, f"run_dir={run_dir}: another process is training there; {hint}")


def check_same_run(saved: Recipe, asked: Recipe, run_dir: Path, branches: bool = True) -> None:
    """Raises `ValueError` for the first field whose change would make this a different run.

    `branches` is that of `prepare_run_dir`.
    """
    pairs = [("model", saved.model, asked.model), ("optimizer", saved.optimizer, asked.optimizer)]
    pairs += [("data", saved.data, asked.data), ("train", saved.train, asked.train)]
    for part, old, new in pairs:
        before, after = to_dict(old), to_dict(new)
        for name in before:  # first the architecture, or the optimizer's name: others depend on it
            free = name in _PLACES or name == "decay_steps"
            free |= part == "train" and name in _MAY_CHANGE
            if before[name] != after[name] and not free:
                instead = "choose another run_dir"
                if not branches:
                    instead = "name another folder"
                elif name.startswith("lora_"):
                    instead = f"start from its weights: --init-from {run_dir} --run-dir NEW"
                elif part != "model":
                    instead = f"branch off: --branch-from {run_dir} --run-dir NEW"
                raise ValueError(
                    f"{part}.{name}={after[name]}: {run_dir} was started with {before[name]}; "
                    f"keep that value or {instead}"
                )


def what_a_run_is(recipe: Recipe) -> dict[str, Any]:
    """Every field of the recipe, as `section.field`, that processes of one run must have alike.

    Paths are not among them: what they hold is compared, not how it is called.
    """
    sections = {"model": recipe.model, "optimizer": recipe.optimizer}
    sections |= {"data": recipe.data, "train": recipe.train}
    return {
        f"{section}.{name}": value
        for section, config in sections.items()
        for name, value in to_dict(config).items()
        if name not in _PLACES
    }


def short_json(value: Any) -> str:
    """A value as text that is equal where the values are, and fits a line."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"sha256:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def require_same(everyone: Sequence[dict[str, str]]) -> None:
    """Raises `ValueError` for the first entry that a process does not have as process 0 has it."""
    for index, theirs in enumerate(everyone):
        for name in {**everyone[0], **theirs}:
            ours, other = (each.get(name, "nothing") for each in (everyone[0], theirs))
            says = f"{name}={other} in process {index}, {ours} in process 0: start all processes "
            says += "with one command, on the same data, from the same installation"
            require(ours == other, says)
