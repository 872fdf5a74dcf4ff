"""What a path holds and how to read it: exports of this library and weights of other projects."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bytelm.config import DONORS, ModelConfig, require
from bytelm.export import CONFIG_FILE, INDEX_FILE, LIBRARY, read_description, read_json
from bytelm_jax.interop.convert import Cast, Float32Cast, load_export
from bytelm_jax.interop.hf_blt import import_hf_blt, read_hf_blt_config
from bytelm_jax.interop.llama import is_donor
from bytelm_jax.interop.megabyte import FOREIGN_FILES, import_megabyte, read_megabyte_config
from bytelm_jax.models import Params


def import_any(
    path: str | Path, format: str = "auto", cast: Cast | None = None
) -> tuple[ModelConfig, Params]:
    """Configuration and parameters from an export of this library or from a known foreign format.

    `format` is "bytelm", "megabyte", "hf-blt" or "auto", which detects it: a file holds MEGABYTE
    weights; a folder's config.json says what it is, and if it does not, the folder is an export.
    Parameters are float32, whatever the file holds, unless `cast` is not `Float32Cast`. Raises
    `ValueError` as `cast`, `load_export`, `import_megabyte` and `import_hf_blt` do.
    """
    folder = Path(path)
    require(format != "auto" or not is_token_model(folder), f"{path}: {_TOKENS}")
    readers = {"bytelm": load_export, "megabyte": import_megabyte, "hf-blt": import_hf_blt}
    known = ", ".join(("auto", *readers))
    require(format in ("auto", *readers), f"format={format!r}: choose one of {known}")
    found = _recognise(folder) if format == "auto" else format
    with _naming_the_type(folder, found, format):
        return readers[found](path, cast=Float32Cast() if cast is None else cast)


def read_config(path: str | Path) -> ModelConfig:
    """The configuration that `import_any` finds; no weights are read, and JAX is not started."""
    require(not is_token_model(Path(path)), f"{path}: {_TOKENS}")
    match _recognise(Path(path)):
        case "megabyte":
            return read_megabyte_config(path)
        case "hf-blt":
            return read_hf_blt_config(path)
        case _:
            return read_description(path).config


_TOKENS = "holds a token model; make a byte model of it by `bytelm import --format llama`"


def is_token_model(path: Path) -> bool:
    """Whether a folder holds a model that `import_llama` reads."""
    return path.is_dir() and is_donor(_fields(path))


def is_foreign(path: Path) -> bool:
    """Whether a folder holds a model of transformers, and neither a BLT nor an export of ours."""
    fields = _fields(path)
    ours = fields.get("library") == LIBRARY or "bytelm" in fields  # written by transformers
    return "model_type" in fields and fields["model_type"] != "blt" and not ours


@contextmanager
def _naming_the_type(folder: Path, found: str, format: str) -> Iterator[None]:
    """Errors in what is taken for MEGABYTE, since nothing else is left, name its `model_type`."""
    try:
        yield
    except ValueError as error:
        if format != "auto" or found == "hf-blt" or not is_foreign(folder):
            raise
        kind, known = _fields(folder)["model_type"], ", ".join((*DONORS, "blt"))
        only = f"model_type={kind!r:.100}: only {known} can be imported"
        raise ValueError(f"{folder}: {only}; as a MEGABYTE: {error}") from None


def _recognise(path: Path) -> str:
    if not path.is_dir():
        return "megabyte"
    fields = _fields(path)
    if fields.get("model_type") == "blt":
        return "hf-blt"
    weights = any((path / name).is_file() for name in (*FOREIGN_FILES, INDEX_FILE))
    ours = fields.get("library") == LIBRARY or "bytelm" in fields  # written by transformers
    foreign = weights and bool(fields) and not ours
    return "megabyte" if foreign else "bytelm"  # `load_export` says what is wrong


def _fields(folder: Path) -> dict[str, Any]:
    try:
        fields = read_json(folder / CONFIG_FILE)
    except (OSError, ValueError, RecursionError, OverflowError):
        return {}
    return fields if isinstance(fields, dict) else {}


def stored_extra(path: str | Path) -> dict[str, Any]:
    """What an export records besides its configuration; empty for anything else."""
    fields = _fields(Path(path))
    described = fields.get("bytelm", fields)  # written by transformers
    extra = described.get("extra") if isinstance(described, dict) else None
    return extra if isinstance(extra, dict) else {}
