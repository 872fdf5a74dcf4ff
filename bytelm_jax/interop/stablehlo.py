"""A model as a StableHLO program that runs without this library and without flax.

exported = jax.export.deserialize(Path("model.stablehlo").read_bytes())
logits = exported.call(ids)
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from jax import export

from bytelm.config import ModelConfig, require
from bytelm.files import replace_file
from bytelm_jax.models import Params, define_model


def export_stablehlo(
    config: ModelConfig, params: Params, path: str | Path, length: int, batch: int | None = None
) -> None:
    """Writes the program `ids [B, T] int32 → logits [B, T, V] float32`, weights included.

    T is `length`; shorter texts are padded behind, which changes no logit before. B is any number,
    or `batch`. The program is for the platform that it is made on, and JAX promises to read it for
    six months. Raises `ValueError` for a length that the model does not read, for a model whose
    program depends on the number of rows unless `batch` is given, and without the package
    flatbuffers.
    """
    longest = config.longest_input
    fits = length >= 1 and (longest is None or length <= longest)
    require(fits, f"length={length}: must be from 1 to {longest or 'any number'}")
    require(batch is None or batch >= 1, f"batch={batch}: must be at least 1")
    program = _program(config, params, length, batch)
    try:
        content = program.serialize()
    except ImportError:
        raise ValueError(
            "flatbuffers: not installed; install the extra stablehlo: pip install "
            "'bytelm[stablehlo]'"
        ) from None
    replace_file(Path(path), bytes(content))


def _program(
    config: ModelConfig, params: Params, length: int, batch: int | None
) -> export.Exported:
    bind, _ = define_model(config)
    held = {name: jnp.asarray(value) for name, value in params.items()}  # the program's constants
    rows = export.symbolic_shape("B")[0] if batch is None else batch
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    try:
        return export.export(jax.jit(lambda ids: bind(held)(ids)))(ids)
    except (TypeError, jax.errors.InconclusiveDimensionOperation) as error:
        if batch is not None:
            raise
        raise ValueError(
            f"{config.architecture}: its program depends on the number of rows (of routed "
            "positions, for instance); name one with --batch"
        ) from error
