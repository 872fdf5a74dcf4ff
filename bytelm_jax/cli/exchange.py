"""The commands that write and read weights as files: their docstrings are their help.

Each command checks its options before it imports what it runs, so that help and mistakes need no
JAX.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bytelm.arguments import UsageError
from bytelm.config import Recipe
from bytelm.export import imported_recipe, model_extra
from bytelm.files import require_file_to_write
from bytelm.remote.copies import local_copy
from bytelm.runs import find_export


def export_command(
    run: Path,
    /,
    out: Path,
    checkpoint: str = "latest",
    format: Literal["bytelm", "hf", "hf-blt", "stablehlo"] = "bytelm",
    average: bool = True,
    adapter: bool = False,
    max_shard_size: str = "",
    license: str = "",
    check: bool = False,
    push: str = "",
    public: bool = False,
    length: int | None = None,
    batch: int | None = None,
    vocab_size: int = -1,
    vocab_offset: int = -1,
    pad_id: int = -1,
    bos_id: int = -1,
    eos_id: int = -1,
) -> int:
    """Writes OUT/model.safetensors and OUT/config.json for `bytelm_torch.from_pretrained(OUT)`.

    With --format hf, writes a folder that transformers loads without bytelm: call
    AutoModelForCausalLM.from_pretrained(OUT, trust_remote_code=True). With --format hf-blt,
    writes one for transformers' BltForCausalLM.from_pretrained(OUT). With --format stablehlo,
    OUT is a file with a program for jax.export.deserialize. Adapters are merged into the weights,
    unless --adapter writes them alone, for peft's PeftModel.from_pretrained(MODEL, OUT), where
    MODEL comes from bytelm_torch.hf.from_native.

    Example: bytelm export runs/megabyte_tiny --out exports/megabyte_tiny

    Args:
        run: the run folder.
        out: the folder to write, with --format stablehlo the file.
        checkpoint: latest, best or a step.
        format: bytelm, hf (with the model's code), hf-blt (transformers' BLT), or stablehlo.
        average: of a run with train.average_decay, write the average of its weights.
        adapter: write the low-rank adapter alone, as peft does.
        max_shard_size: with --format hf or hf-blt, most bytes of a file of weights, as 5GB (50GB).
        license: with --format hf or hf-blt, the licence in the model card; by default unknown.
        check: with --format hf, compare what transformers loads with JAX, for the model card.
        push: with --format hf or hf-blt, USER/NAME on the Hugging Face Hub; OUT is uploaded there.
        public: with --push, make a repository that is new there public, in place of private.
        length: with --format stablehlo, ids of a row; by default the training length.
        batch: with --format stablehlo, the number of rows; by default any number.
        vocab_size: number of ids of the export; -1, here and below, keeps the model's value.
        vocab_offset: the id of byte 0; the model stays the same, its rows move with their ids.
        pad_id: the id of padding.
        bos_id: the id of the beginning of a sequence.
        eos_id: the id of the end of a sequence.
    """
    ids = {"size": vocab_size, "offset": vocab_offset}
    ids |= {"pad_id": pad_id, "bos_id": bos_id, "eos_id": eos_id}
    source = _Source(run, checkpoint, average, {k: v for k, v in ids.items() if v != -1})
    folder = _Folder(max_shard_size, license, check, push, public)
    _refuse(format, adapter, source.ids, folder, length=length, batch=batch)
    if format == "stablehlo":
        return _export_program(source, out, length, batch)
    return _export(source, out, format, adapter, folder)


class _Source(NamedTuple):
    """The weights that are exported, and the ids that they get."""

    run: Path
    checkpoint: str
    average: bool
    ids: dict[str, int]

    def load(self) -> tuple[Recipe, Any, int, dict[str, Any]]:
        """Recipe and parameters with these ids, the step, and what a file records."""
        from bytelm_jax.interop.vocab import remap_vocab
        from bytelm_jax.training import checkpoint as checkpoints

        recipe, params, step = checkpoints.load_run(self.run, self.checkpoint, self.average)
        vocab = replace(recipe.model.vocab, **self.ids)
        model, params = remap_vocab(recipe.model, params, vocab)
        extra: dict[str, Any] = {"recipe": recipe.name, "step": step}
        extra |= model_extra(recipe.patching, recipe.data.sequence_length)
        return replace(recipe, model=model), params, step, extra


class _Folder(NamedTuple):
    """The options of `export` that say what a folder for transformers holds and where it goes."""

    max_shard_size: str
    license: str
    check: bool
    push: str
    public: bool


def _export(source: _Source, out: Path, format: str, adapter: bool, folder: _Folder) -> int:
    if adapter:
        return _export_adapter(source.run, out, source.checkpoint, source.average)
    if format != "bytelm":
        return _export_folder(source, out, format == "hf", folder)
    from bytelm_jax.interop import convert

    recipe, params, step, extra = source.load()
    convert.export_model(recipe.model, params, out, extra)
    print(f"wrote {out}/model.safetensors and {out}/config.json (step {step})")
    return 0


def _refuse(
    format: str, adapter: bool, asked: dict[str, int], folder: _Folder, **sizes: int | None
) -> None:
    """Raises `UsageError` for options that have no effect beside the others."""
    for name, value in sizes.items():
        if value is not None and format != "stablehlo":
            raise UsageError(f"--{name}: needs --format stablehlo; leave it out or add that")
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: must be at least 1")
    for name, value in folder._asdict().items():
        known = ("hf",) if name == "check" else ("hf", "hf-blt")
        if value and format not in known:
            option, formats = f"--{name.replace('_', '-')}", " or ".join(known)
            raise UsageError(f"{option}: needs --format {formats}; leave it out or add that")
    if folder.public and not folder.push:
        raise UsageError("--public: says how --push makes a repository; leave it out or add that")
    if adapter and (asked or format != "bytelm"):
        what = "--adapter: an adapter has its model's ids and layout"
        raise UsageError(f"{what}; leave out --format and the options of the vocabulary")


def _export_folder(source: _Source, out: Path, own_code: bool, folder: _Folder) -> int:
    """For transformers: with the model's code (`own_code`), or in its own BLT layout."""
    from bytelm import hub
    from bytelm.model_card import check_licence, model_card
    from bytelm.shards import parse_size
    from bytelm_jax.interop import hf_blt, hf_folder
    from bytelm_jax.parity import standalone

    shard_bytes = parse_size(folder.max_shard_size or "50GB")
    check_licence(folder.license)
    (hf_folder if own_code else hf_blt).check_out(out)
    if folder.check:
        standalone.require_installed()
    if folder.push:
        hub.check_push(folder.push)
    recipe, params, step, extra = source.load()
    card = partial(model_card, recipe, step, folder.license or "unknown", _records(source.run))
    if own_code:
        compare = partial(standalone.check_folder, recipe.model, params) if folder.check else None
        files = hf_folder.export_hf(recipe.model, params, out, card, extra, shard_bytes, compare)
    else:
        text = card(own_code=False)
        files = hf_blt.export_hf_blt(recipe.model, params, out, text, shard_bytes)
    print(f"wrote {', '.join(files)} in {out} (step {step})")
    if folder.push:
        print(f"uploaded {out} to {hub.push_folder(out, folder.push, folder.public)}")
    return 0


def _export_program(source: _Source, out: Path, length: int | None, batch: int | None) -> int:
    require_file_to_write(out, f"--out {out}")
    from bytelm_jax.interop.stablehlo import export_stablehlo

    recipe, params, step, _ = source.load()
    length = length or recipe.data.sequence_length
    export_stablehlo(recipe.model, params, out, length, batch)
    print(f"wrote {out}, for rows of {length} ids (step {step})")
    return 0


def _records(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, if it has any: an imported one has none."""
    from bytelm.metrics import read_metrics
    from bytelm.remote.copies import NO_ARRAYS

    with local_copy(run, NO_ARRAYS) as folder:
        file = folder / "metrics.jsonl"
        return read_metrics(file) if file.is_file() else []


def _export_adapter(run: Path, out: Path, checkpoint: str, average: bool) -> int:
    from bytelm.lora import CONFIG_FILE, MODEL_FILE
    from bytelm_jax.interop import convert
    from bytelm_jax.models import adapters_of
    from bytelm_jax.training import checkpoint as checkpoints

    recipe, params, step = checkpoints.load_leaves(run, checkpoint, average)
    lora = adapters_of(recipe)
    if lora is None:
        raise ValueError(
            f"{run}: has no adapter; train one with --lora-rank, or leave out --adapter"
        )
    convert.export_adapter(params, lora, out)
    print(f"wrote {out}/{MODEL_FILE} and {out}/{CONFIG_FILE} (step {step})")
    return 0


def import_command(
    source: Path,
    /,
    out: Path,
    format: Literal["auto", "bytelm", "megabyte", "hf-blt", "llama"] = "auto",
    local: str = "",
    patcher: Literal["", "entropy", "histogram", "space", "word", "fixed", "byte"] = "",
    entropy_from: str = "",
    seed: int = 0,
) -> int:
    """Makes a run folder from an export or from weights of other projects.

    These can be a checkpoint of the PyTorch MEGABYTE code, a folder of BltForCausalLM of
    transformers, in one file or in shards, or a folder of a token model (Llama, Qwen2, Qwen3,
    OLMo 2, SmolLM), whose layers become the global transformer of a BLT that is otherwise new. The
    run's parameters are float32: float16 and bfloat16 fit exactly, float64 is rounded, and a line
    on stderr says by how much.

    Example: bytelm import exports/megabyte_tiny --out runs/imported

    Args:
        source: an export folder, a run folder of PyTorch, a folder of transformers, or a state
            dict in a .pt or .safetensors file.
        out: the run folder to make; it must not hold a run yet.
        format: what SOURCE is; auto detects it.
        local: of a token model: the recipe of BLT, by name or file, whose byte encoder, byte
            decoder and patches the byte model gets.
        patcher: of a token model: what ends a patch, if not what the recipe says.
        entropy_from: of a token model, for patches by entropy: a calibrated run of an entropy
            model.
        seed: of a token model: draws the parameters that are new.
    """
    from bytelm_jax.interop import convert, formats
    from bytelm_jax.training import checkpoint as checkpoints

    checkpoints.check_unused(out)
    cast = convert.Float32Cast()
    with local_copy(source) as folder:
        folder = find_export(folder)
        if folder is None:
            why = "is a run folder already; every command reads it, and --init-from starts from it"
            raise ValueError(f"{source}: {why}")
        detected = formats.is_token_model(folder) or (bool(local) and formats.is_foreign(folder))
        if format == "llama" or (format == "auto" and detected):
            recipe, params, note = _from_donor(folder, local, patcher, entropy_from, seed, cast)
        else:
            options = {"local": local, "patcher": patcher, "entropy_from": entropy_from}
            _refuse_local(options | {"seed": str(seed) if seed else ""})
            config, params = formats.import_any(folder, format, cast)
            recipe, note = imported_recipe(config, formats.stored_extra(folder)), ""
    config = recipe.model
    checkpoints.create_run(out, recipe, params)
    _note_rounding(cast)
    size = f"{config.parameter_count():,} parameters{note}"
    print(f"wrote run folder {out} ({config.architecture}, {size})")
    return 0


def _note_rounding(cast: Any) -> None:
    """Says on standard error by how much float64 was rounded, if it was."""
    if cast.rounded:
        print(
            f"bytelm import: float64 was rounded to float32, by a relative error of at most "
            f"{cast.rounding:.1e} (in {cast.rounded})",
            file=sys.stderr,
        )


def _refuse_local(options: dict[str, str]) -> None:
    """Raises `UsageError` for the first option that only a token model has a use for."""
    for name, value in options.items():
        if value:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option}: needs --format llama; leave it out or add that")


def _from_donor(
    folder: Path, local: str, patcher: str, entropy_from: str, seed: int, cast: Any
) -> tuple[Recipe, Any, str]:
    """Recipe and parameters of a byte model around a token model, and how many are its."""
    from bytelm.recipe_files import find_recipe
    from bytelm_jax.interop import llama
    from bytelm_jax.training import patch_calibration

    if not local:
        hint = "whose byte encoder and decoder the model gets, such as blt_132m"
        raise UsageError(f"--local: name a recipe of BLT, {hint}")
    recipe, donor = find_recipe(local), llama.read_donor(folder)
    if not recipe.model.takes_donor:
        raise ValueError(f"--local {local}: is {recipe.model.architecture}; name a recipe of blt")
    if patcher:
        model: Any = recipe.model
        recipe = replace(recipe, model=replace(model, patcher=patcher))
    train = replace(recipe.train, entropy_from=entropy_from)
    recipe = patch_calibration.adopt(replace(recipe, train=train), folder / "none")
    entropy_model = patch_calibration.load_entropy_model(recipe) if entropy_from else None
    local_model: Any = recipe.model
    config, params = llama.import_llama(
        folder, local_model, seed=seed, patcher=entropy_model, cast=cast
    )
    train = replace(recipe.train, entropy_from="")
    recipe = replace(recipe, name="imported", model=config, train=train)
    theirs = sum(value.size for name, value in params.items() if name.startswith(llama.STACK))
    return recipe, params, f", {theirs:,} of them from {donor.fields['model_type']}"
