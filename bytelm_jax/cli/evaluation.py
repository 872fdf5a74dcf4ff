"""`bytelm eval`: its signature and docstring are its help."""

import math
import sys
from collections.abc import Callable, Mapping
from json import dumps as dump_json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from bytelm import breakdown, harness, perturb
from bytelm import data as corpora
from bytelm.arguments import UsageError
from bytelm.config import Recipe, require
from bytelm.config.lfbyte import require_prediction
from bytelm.metrics import Evaluation
from bytelm_jax.cli.model import open_data, with_resets

if TYPE_CHECKING:
    from bytelm_jax.models import Params

_PERTURBED_LIMIT = 1 << 26


def eval_command(
    runs: tuple[Path, ...],
    /,
    data: tuple[Path, ...],
    checkpoint: str = "latest",
    batch_size: int = 16,
    dtype: Literal["float32", "bfloat16", "float64"] = "float32",
    json: bool = False,
    by: Literal["none", "source", "file", "document", "script", "position"] = "none",
    window: int = 0,
    stride: int = 0,
    robustness: bool = False,
    average: bool = True,
    reset_on: Literal["trained", "none", "newline", "document"] = "trained",
    text_field: str = "text",
    prompt_field: str = "",
    completion_field: str = "",
    chat_field: str = "",
    raw: bool = False,
    cache_dir: str = "",
) -> int:
    """Evaluates exact bits per byte: total nats and total bytes, every byte counted once.

    One model and one path give a sentence; several of either, and --by, a table with a row for each
    path and a column for each model. The data are one stream, whose windows may span files.

    Example: bytelm eval runs/megabyte_tiny --data README.md

    Args:
        runs: one run folder or several.
        data: files and folders of any form; their bytes are cut into windows.
        checkpoint: latest, best or a step.
        batch_size: windows per step, rounded up to a multiple of the number of devices.
        dtype: precision of the arithmetic.
        json: print JSON: one object, and for several models a list of them.
        by: the rows: source is a path as given, file each file in it, script that of the character
            by its Unicode name, position that in the window.
        window: bytes that the model sees at once; 0 takes the training length.
        stride: start windows this many bytes apart, so that each byte is counted where it has most
            before it; 0 is their length, and costs least.
        robustness: also evaluate the data with swapped case, letters swapped and dropped (5 %), and
            UTF-8 truncated (5 % of the characters beyond ASCII).
        average: of a run with train.average_decay, take the average of its weights.
        reset_on: where a new segment starts for the model; as in training, by default.
        text_field: the field of records (JSON, Parquet, Arrow, tar) that holds the text.
        prompt_field: the field of records that is read and not counted, before COMPLETION_FIELD.
        completion_field: the field of records that is counted, after PROMPT_FIELD.
        chat_field: the field of records that holds messages; the assistant's are counted.
        raw: take the bytes of files as they are, whatever their form.
        cache_dir: where compressed files and records are kept in prepared form.
    """
    if not data:
        raise UsageError("--data: name at least one file or folder")
    fields = prompt_field, completion_field, chat_field
    corpus = open_data(data, text_field, raw, cache_dir, *fields)
    kind = "source" if by == "none" and len(data) > 1 else by
    how = _How(checkpoint, batch_size, dtype, average, reset_on, window, stride, kind, robustness)
    _print(runs, _evaluate_runs(runs, corpus, how), by, json)
    return 0


def lm_eval_command(
    model: Path,
    /,
    checkpoint: str = "latest",
    window: int = 0,
    passed_on: tuple[str, ...] = (),
) -> int:
    """Scores a model by lm-evaluation-harness, with the harness's own options behind `--`.

    Log-likelihoods are in nats of bytes of UTF-8, and `max_gen_toks` counts bytes. Arithmetic is in
    the dtype of the parameters, on one device.

    Example: bytelm lm-eval runs/megabyte_tiny -- --tasks wikitext --limit 10

    Args:
        model: a run folder or an export.
        checkpoint: of a run folder: latest, best or a step.
        window: bytes that the model sees at once; 0 takes the training length, and if an export
            does not say it, 512 bytes, or the longest input if that is less.
        passed_on: the options of the harness, as `lm_eval run --help` lists them.
    """
    harness.check_passed_on(passed_on)
    harness.require_harness()
    from bytelm_jax.tools.harness import harness_place
    from bytelm_jax.training.pretrained import from_pretrained

    opened = from_pretrained(model, checkpoint=checkpoint)
    window = harness.chosen_window(opened.config, window, opened.training_length)
    return harness.run_harness(harness_place(opened), window, model, checkpoint, passed_on)


class _How(NamedTuple):
    """The options that say how a model is evaluated."""

    checkpoint: str
    batch_size: int
    dtype: str
    average: bool
    reset_on: str
    window: int
    stride: int
    kind: str
    robustness: bool


class _Result(NamedTuple):
    """One model's figures: the whole, its groups by name, and the damaged data by kind."""

    record: dict[str, Any]
    groups: dict[str, Evaluation]
    damaged: dict[str, Evaluation]


def _perturbed(corpus: corpora.Corpus) -> dict[str, corpora.Corpus]:
    small = corpus.total_bytes <= _PERTURBED_LIMIT and not corpus.is_masked
    wrong = f"--robustness: takes at most {_PERTURBED_LIMIT} bytes, all of them counted"
    require(small, f"{wrong}; these are {corpus.total_bytes}")
    sizes = corpus.lengths.tolist()
    documents = [corpus.read(i, 0, size).tobytes() for i, size in enumerate(sizes)]
    return {
        kind: corpora.memory_corpus([d for d in perturb.perturb(documents, kind) if d])
        for kind in perturb.KINDS
    }


def _evaluate_runs(runs: tuple[Path, ...], corpus: corpora.Corpus, how: _How) -> list[_Result]:
    if not runs:
        raise UsageError("RUNS: name at least one run folder")
    if how.window < 0:
        raise UsageError(f"--window {how.window}: must be at least 1, or 0 for the training length")
    damaged = _perturbed(corpus) if how.robustness else {}
    return [_evaluate_run(run, corpus, damaged, how) for run in runs]


def _evaluate_run(
    run: Path, corpus: corpora.Corpus, damaged: Mapping[str, corpora.Corpus], how: _How
) -> _Result:
    from bytelm_jax.training import checkpoint as checkpoints

    recipe, params, step = checkpoints.load_run(run, how.checkpoint, how.average)
    recipe = with_resets(recipe, how.reset_on)
    require_prediction(recipe.model)
    length = how.window or recipe.data.sequence_length
    windows, end_id = corpora.scored_windows(recipe.model, corpus, length, how.stride)
    parts = breakdown.Breakdown(windows, how.kind) if how.kind != "none" else None
    result = _evaluate(recipe, params, windows, end_id, how, parts and parts.add)
    if not result.count:
        raise ValueError("data: nothing of it is counted; give data with completions")
    _require_finite(result.nats, how.dtype)
    record = _figures(result) | _check_patches(recipe, params, windows)
    others = {}
    for kind, changed in damaged.items():
        windows, end_id = corpora.scored_windows(recipe.model, changed, length, how.stride)
        others[kind] = _evaluate(recipe, params, windows, end_id, how, None)
        _require_finite(others[kind].nats, how.dtype)
    return _Result(
        record | {"step": step, "dtype": how.dtype}, parts.rows() if parts else {}, others
    )


def _evaluate(
    recipe: Recipe,
    params: Any,
    windows: corpora.Windows,
    end_id: int | None,
    how: _How,
    add: Callable[..., None] | None,
) -> Evaluation:
    """The code length of all windows, in that precision, over all devices.

    `add(number, nats, counted)`, if there is one, gets the nats of each id of each window.
    """
    import jax
    import jax.numpy as jnp

    from bytelm_jax.models import define_model
    from bytelm_jax.training import evaluate as evaluation
    from bytelm_jax.training import mesh as meshes

    mesh, dtype = meshes.make_mesh(), how.dtype
    rows = min(how.batch_size, max(len(windows), 16))  # a batch of pads alone is of no use
    rows = -(-rows // mesh.size) * mesh.size
    batches = corpora.evaluation_batches(windows, rows)
    bind, _ = define_model(recipe.model)
    with jax.enable_x64(dtype == "float64"):
        wide = {name: value.astype(_PARAMETERS[dtype]) for name, value in params.items()}
        wide = meshes.place(mesh, wide)
        pad_id = recipe.model.vocab.pad_id
        byte_nats = evaluation.make_byte_nats(bind, pad_id, mesh, jnp.dtype(dtype), end_id)
        total, count = [], 0
        seen = evaluation.evaluated_batches(byte_nats, wide, batches, mesh)
        for batch, (nats, counted) in enumerate(seen):
            if add is not None:
                first = batch * rows
                for number in range(first, min(first + rows, len(windows))):
                    add(number, nats[number - first], counted[number - first])
            total.append(float(nats.sum(dtype="float64")))  # float32 would round each row's sum
            count += int(counted.sum())
        return Evaluation(math.fsum(total), count)


_PARAMETERS = {"float32": "float32", "bfloat16": "float32", "float64": "float64"}
"""The dtype of the parameters under each dtype of the arithmetic."""


def _figures(result: Evaluation) -> dict[str, Any]:
    bits = result.bits_per_byte
    return {"nats": result.nats, "bytes": result.count, "bits_per_byte": bits}


def _require_finite(nats: float, dtype: str) -> None:
    if not math.isfinite(nats):
        raise ValueError(
            f"data: their loss is {nats} in {dtype}, no finite number of nats; choose "
            "--dtype float64 or another checkpoint"
        )


def _check_patches(recipe: Recipe, params: "Params", windows: corpora.Windows) -> dict[str, float]:
    """The mean patch length of a BLT on these data; warns if it differs from the run's."""
    if not recipe.model.has_patching_contract:
        return {}

    from bytelm_jax.training import patch_calibration

    measured = patch_calibration.measure(recipe.model, params, windows)
    wrong = patch_calibration.outside(recipe.patching, measured) if recipe.patching else None
    if wrong:
        print(f"bytelm eval: warning: data: {wrong}", file=sys.stderr, flush=True)
    return {"bytes_per_patch": measured.mean_length}


# ---- output ---------------------------------------------------------------------------------


def _print(runs: tuple[Path, ...], results: list[_Result], by: str, as_json: bool) -> None:
    models = list(map(str, runs))
    if as_json:
        objects = [_object(result, by) for result in results]
        named = [{"model": model} | each for model, each in zip(models, objects, strict=True)]
        print(dump_json(named if len(runs) > 1 else objects[0], allow_nan=False))
    elif len(runs) > 1 or results[0].groups or results[0].damaged:
        print("\n".join(_table(models, results)))
    else:
        _print_sentence(results[0].record)


def _object(result: _Result, by: str) -> dict[str, Any]:
    """One model's figures for programs."""

    def listed(key: str, groups: Mapping[str, Evaluation]) -> list[dict[str, Any]]:
        return [{key: name} | _figures(group) for name, group in groups.items()]

    record = dict(result.record)
    if by != "none":
        record |= {"by": by, "groups": listed(by, result.groups)}
    elif result.groups:
        record["files"] = listed("file", result.groups)
    if result.damaged:
        record["robustness"] = listed("damage", result.damaged)
    return record


def _print_sentence(record: Mapping[str, Any]) -> None:
    print(
        "{bits_per_byte:.6f} bits per byte: {nats:.6f} nats over {bytes} bytes "
        "(step {step}, {dtype})".format(**record)
    )


def _table(models: list[str], results: list[_Result]) -> list[str]:
    """Bits per byte: a row for each group, a column for each model."""
    names = list(dict.fromkeys(name for result in results for name in result.groups))
    rows = [(name, [result.groups.get(name) for result in results]) for name in names]
    totals = [Evaluation(r.record["nats"], r.record["bytes"]) for r in results]
    rows.append(("total", list(totals)))
    rows += [(kind, [result.damaged[kind] for result in results]) for kind in results[0].damaged]
    width = max(len("bits per byte"), *(len(name) for name, _ in rows))
    columns = [max(len(model), 10) for model in models]
    header = [f"{'bits per byte':{width}}", f"{'bytes':>12}"]
    header += [f"{model:>{size}}" for model, size in zip(models, columns, strict=True)]
    lines = ["  ".join(header)]
    for name, figures in rows:
        count = max(figure.count for figure in figures if figure)
        cells = [
            f"{figure.bits_per_byte if figure else math.nan:{size}.6f}"
            for figure, size in zip(figures, columns, strict=True)
        ]
        lines.append("  ".join([f"{name:{width}}", f"{count:12}", *cells]))
    return lines
