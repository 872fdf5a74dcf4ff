"""Models from run folders and exports, and to exports."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from bytelm.config import ModelConfig, PatchingContract, Recipe, require
from bytelm.export import model_extra, patching_of, training_length_of
from bytelm.leaves import is_norm
from bytelm.remote.copies import local_copy
from bytelm.runs import read_export
from bytelm_jax.interop import convert, formats
from bytelm_jax.models import Model, Params, define_model, split_model


def from_pretrained(
    path: str | Path, dtype: DTypeLike | None = None, checkpoint: str | int = "latest"
) -> Model:
    """The model of an export or of a run folder, whichever of the two packages wrote it.

    `path` may be an address (`gs://`, `s3://`, `hf://`).

    `dtype` is that of the parameters, by default the stored one; norms, which are computed in at
    least float32, stay at least float32. `checkpoint` chooses from a run folder: "latest", "best"
    (lowest validation loss) or a step. The arrays are on the default device. `model.patching` is
    the patching contract, if there is one, and `model.training_length` the bytes of the training
    windows, 0 if an export does not say. Raises `ValueError` if a file is missing or damaged, if
    config.json holds an unknown field or version, and if the tensors do not match the configuration
    or one holds NaN or infinity.
    """
    if dtype is not None:
        _check_dtype(dtype)
    with local_copy(path, checkpoint) as folder:
        return _from_folder(folder, dtype, checkpoint)


def _from_folder(folder: Path, dtype: DTypeLike | None, checkpoint: str | int) -> Model:
    model = read_export(folder, checkpoint, lambda export: _read_model(export, dtype))
    if model is not None:
        return model
    from bytelm_jax.training import checkpoint as checkpoints  # Orbax takes a second to import

    recipe, params, _ = checkpoints.load_run(folder, str(checkpoint))
    if dtype is not None:
        params = {name: v.astype(_dtype_of(name, dtype)) for name, v in params.items()}
    return model_of(recipe, params)


def _read_model(export: Path, dtype: DTypeLike | None) -> Model:
    def cast(name: str, array: np.ndarray) -> np.ndarray:
        return array if dtype is None else array.astype(_dtype_of(name, dtype))

    config, params = convert.load_export(export, cast)
    extra = formats.stored_extra(export)
    return _model(config, params, patching_of(extra), training_length_of(extra))


def model_of(recipe: Recipe, params: Params) -> Model:
    """The model of a run, with the run's patching contract and training length."""
    return _model(recipe.model, params, recipe.patching, recipe.data.sequence_length)


def _model(
    config: ModelConfig, params: Params, contract: PatchingContract | None, length: int
) -> Model:
    model: Model = define_model(config)[0](params)
    if contract is not None:
        model.patching = contract
    model.training_length = length
    return model


def save_pretrained(model: Model, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Writes `path`/model.safetensors and `path`/config.json; creates the folder if necessary.

    `bytelm_jax.from_pretrained` and `bytelm_torch.from_pretrained` read it. `model.patching` and
    `model.training_length` go into the file's `extra`; the argument `extra` takes precedence. A
    failure leaves a previous export unchanged. Raises `ValueError` if a parameter is not finite, if
    `path` is a file, and if it cannot be written.
    """
    _, params = split_model(model)
    known = model_extra(model.patching, model.training_length)
    convert.export_model(model.config, params, path, known | (extra or {}))


def _check_dtype(dtype: DTypeLike) -> None:
    wanted = jnp.dtype(dtype)
    known = jnp.issubdtype(wanted, jnp.floating)
    require(known, f"dtype={wanted}: choose float32, bfloat16, float16 or float64")
    held = jax.dtypes.canonicalize_dtype(wanted) == wanted
    require(held, f"dtype={wanted}: JAX's 64-bit mode is off; set JAX_ENABLE_X64=1")


def _dtype_of(name: str, dtype: DTypeLike) -> jnp.dtype:
    wide = jnp.promote_types(dtype, jnp.float32)
    return wide if is_norm(name) else jnp.dtype(dtype)
