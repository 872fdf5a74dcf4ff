"""The commands on models and data, one function each; signatures and docstrings are their help.

Each command checks its options before it imports what it runs, so that help and mistakes need no
JAX.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bytelm import data as corpora
from bytelm import runs
from bytelm.arguments import UsageError
from bytelm.config import (
    Recipe,
    require,
    require_document_ends,
)
from bytelm.config.blt import PatchingContract

if TYPE_CHECKING:
    pass


def open_data(
    paths: tuple[Path, ...], text_field: str, raw: bool, cache_dir: str, *fields: str
) -> corpora.Corpus:
    """The corpus at `paths`; what looks wrong about it is said on standard error.

    Raises `ValueError` for sources with names, which are those of a training run.
    """
    for name, named in corpora.named_paths(tuple(map(str, paths)), "data").items():
        hint = f"only `bytelm train` and `doctor` know named data; give {named[0]} alone"
        require(not name, f"data={name}={named[0]}: {hint}")
    corpus = corpora.open_corpus(paths, text_field, raw, cache_dir, True, *fields)
    for note in corpus.notes:
        print(f"warning: data: {note}", file=sys.stderr, flush=True)
    return corpus


def with_resets(recipe: Recipe, reset_on: str) -> Recipe:
    """The recipe with the model resetting as asked for, or as it was trained."""
    if reset_on != "trained":
        recipe = replace(recipe, model=recipe.model.with_resets(reset_on))
    require_document_ends(recipe)
    return recipe


def calibrate_command(
    run: Path,
    /,
    data: tuple[Path, ...],
    bytes_per_patch: float = 4.5,
    check: tuple[Path, ...] = (),
    windows: int = 4096,
    text_field: str = "text",
    prompt_field: str = "",
    completion_field: str = "",
    chat_field: str = "",
    raw: bool = False,
    cache_dir: str = "",
) -> int:
    """Finds the entropy threshold for a wanted mean patch length and stores it in the run.

    RUN is an entropy model, from which `bytelm train blt_… --entropy-from RUN` takes model and
    threshold, or a Byte Latent Transformer, whose patches then change immediately.

    Example: bytelm calibrate runs/entropy_tiny --data README.md --bytes-per-patch 4.5

    Args:
        run: the run folder.
        data: files and folders of any form, cut into windows as in training.
        bytes_per_patch: the wanted mean.
        check: other data, whose mean patch length at that threshold is printed too.
        windows: how many windows to measure, evenly spaced; 0 is all.
        text_field: the field of records (JSON, Parquet, Arrow, tar) that holds the text.
        prompt_field: the field of records before COMPLETION_FIELD; both are cut into patches.
        completion_field: the field of records that comes after PROMPT_FIELD.
        chat_field: the field of records that holds messages, all of which are cut into patches.
        raw: take the bytes of files as they are, whatever their form.
        cache_dir: where compressed files and records are kept in prepared form.
    """
    _check_calibration(data, windows)

    from bytelm_jax.training import checkpoint as checkpoints
    from bytelm_jax.training import patch_calibration

    how = text_field, raw, cache_dir, prompt_field, completion_field, chat_field
    recipe, params, step = checkpoints.load_run(run)
    limit = windows or None
    calibrated, counts = patch_calibration.calibrate_and_count(
        recipe, params, _cut(recipe, data, *how), bytes_per_patch, limit
    )
    contract = calibrated.patching
    assert contract is not None
    lines = [_threshold_line(contract, step), *_room_lines(recipe, counts)]
    if check:
        seen = patch_calibration.measure_again(calibrated, params, _cut(recipe, check, *how), limit)
        lines += [f"{seen.mean_length:.3f} bytes per patch over {seen.sampled_bytes} of --check"]
    with runs.open_run(run) as lock:  # a trainer would find its config.json changed
        runs.require_lock(lock.take(lock.local), lock.name)
        lock.save_recipe(calibrated)
    print("\n".join(lines))
    known = recipe.model.has_patching_contract and recipe.patching
    if known and (wrong := patch_calibration.outside(known, contract)):
        print(f"bytelm calibrate: warning: {run}: {wrong}", file=sys.stderr)
    return 0


def _cut(recipe: Recipe, paths: tuple[Path, ...], *how: Any) -> corpora.Windows:
    corpus, length = open_data(paths, *how), recipe.data.sequence_length
    return corpora.Windows(corpus, recipe.model.vocab, length, recipe.data.append_eos)


def _check_calibration(data: tuple[Path, ...], windows: int) -> None:
    if not data or windows < 0:
        wrong = f"--windows={windows}: must be at least 0"
        raise UsageError(wrong if data else "--data: name at least one file or folder")


def _threshold_line(contract: PatchingContract, step: int) -> str:
    unit = "bits per patch" if contract.patcher == "histogram" else "nats"
    return (
        f"threshold {contract.threshold:.9g} {unit} (step {step}): {contract.mean_length:.3f} "
        f"bytes per patch over {contract.sampled_bytes} bytes of --data"
    )


def _room_lines(recipe: Recipe, counts: Any) -> list[str]:
    """What budget of patches the windows need, if there are enough of them to say."""
    from bytelm_jax.training import patch_calibration

    length = recipe.data.sequence_length
    if len(counts) * patch_calibration.OVERFLOW < 1:
        return []
    room = patch_calibration.room_for(counts)
    rate = max(room - 8, 1) * 1_000_000 // length / 1_000_000  # a budget rounds up and adds 8
    return [
        f"room for {room} patches is enough for {1 - patch_calibration.OVERFLOW:.1%} of windows of "
        f"{length} bytes, {counts.mean():.1f} on average: --model.patch-budget {rate:.6f}"
    ]


def prepare_command(
    paths: tuple[Path, ...],
    /,
    out: Path,
    text_field: str = "text",
    raw: bool = False,
    shard_bytes: int = 0,
    prompt_field: str = "",
    completion_field: str = "",
    chat_field: str = "",
) -> int:
    """Packs data of any form into one memory-mapped byte file with document bounds, or several.

    Example: bytelm prepare README.md bytelm_jax --out corpus.bytes

    Args:
        paths: files and folders; each plain file, and each record of another form, is a document.
        out: the file to write; with --shard-bytes, a new folder.
        text_field: the field of records (JSON, Parquet, Arrow, tar) that holds the text.
        raw: take the bytes of files as they are, whatever their form.
        shard_bytes: begin a new file of the folder --out after this many bytes; 0 writes one file.
        prompt_field: the field of records that is read and not counted, before COMPLETION_FIELD.
        completion_field: the field of records that is counted, after PROMPT_FIELD.
        chat_field: the field of records that holds messages; the assistant's are counted.
    """
    if not paths:
        raise UsageError("PATH: name at least one file or folder")
    prepared = corpora.prepare(
        paths, out, text_field, raw, shard_bytes, prompt_field, completion_field, chat_field
    )
    for note in prepared.notes:
        print(f"warning: {note}", file=sys.stderr, flush=True)
    print(f"wrote {out}: {prepared.documents} documents, {prepared.bytes} bytes")
    return 0


def parity_command(
    path: Path,
    /,
    dtype: Literal["float64", "float32"] = "float64",
    data: tuple[Path, ...] = (),
    rows: int = 2,
    length: int = 0,
    checkpoint: str = "latest",
    bytes: Literal["all", "real", "hostile"] = "all",
    json: bool = False,
    junit: Path = Path(),
    html: Path = Path(),
    text_field: str = "text",
    prompt_field: str = "",
    completion_field: str = "",
    chat_field: str = "",
    raw: bool = False,
    cache_dir: str = "",
) -> int:
    """Runs the JAX and torch twins in lock-step on the same bytes and reports where they differ.

    Prints one line per layer, then logits, loss, gradients and generation, and names the first
    tensor beyond its tolerance. Exit code 1 if there is one.

    Example: bytelm parity runs/megabyte_tiny

    Args:
        path: a run folder or an export.
        dtype: precision; float64 decides.
        data: real bytes to compare on; by default Python's standard library.
        rows: windows to compare on.
        length: bytes per window; 0 takes a little more than four patches, an odd number.
        checkpoint: of a run folder: latest, best or a step.
        bytes: real ones, hostile ones (zeros, one byte repeated, all values, random, truncated
            UTF-8, newlines only: a row each), or all of them.
        json: print JSON instead of lines.
        junit: also write this file of JUnit's XML, for CI systems.
        html: also write this page: the tree of layers with their errors, the first divergence.
        text_field: the field of records (JSON, Parquet, Arrow, tar) that holds the text.
        prompt_field: the field of records that is read and not counted, before COMPLETION_FIELD.
        completion_field: the field of records that is counted, after PROMPT_FIELD.
        chat_field: the field of records that holds messages; the assistant's are counted.
        raw: take the bytes of files as they are, whatever their form.
        cache_dir: where compressed files and records are kept in prepared form.
    """
    from bytelm_jax.parity import output
    from bytelm_jax.parity import report as parity

    output.check_files(junit=junit, html=html)
    corpus = open_data(data, text_field, raw, cache_dir, prompt_field, completion_field, chat_field)
    report = parity.compare(path, dtype, corpus, rows, length, checkpoint, bytes)
    output.write_files(report, junit, html)
    print(output.to_json(report) if json else report.text)
    return 0 if report.passed else 1
