"""`bytelm compress` and `decompress`; signatures and docstrings are their help."""

from pathlib import Path
from typing import Any

from bytelm.compression import codec
from bytelm.compression.options import default_out, default_window


def compress_command(
    file: Path,
    /,
    model: Path,
    out: Path = Path(),
    checkpoint: str = "latest",
    window: int = 0,
    streams: int = 64,
) -> int:
    """Compresses any file without loss, by arithmetic coding with a model's probabilities.

    `bytelm decompress` needs the same model, and the same kind of processor or GPU and versions,
    which the file names: the last bits of a probability depend on them. A file that the model would
    make longer is stored as it is.

    Example: bytelm compress README.md --model runs/megabyte_tiny

    Args:
        file: the file to compress.
        model: a run folder or an export.
        out: the file to write; by default FILE.blm.
        checkpoint: of a run folder: latest, best or a step.
        window: bytes that the model sees at once; 0 takes the training length, and 512 bytes, or
            the longest input if that is less, for an export.
        streams: windows that are coded side by side; a GPU takes hundreds.
    """
    codec.check_request(streams, window)
    out = default_out(file, out)
    codec.check_paths(file, out)
    loaded, trained = _load(model, checkpoint)

    from bytelm_jax.inference.compression import compression_place

    window = window or default_window(loaded.config, trained)
    summary = codec.compress_file(file, out, compression_place(loaded), window, streams)
    print(f"wrote {out}: {summary.line}")
    return 0


def decompress_command(
    file: Path, /, model: Path, out: Path = Path(), checkpoint: str = "latest"
) -> int:
    """Restores a file that `bytelm compress` wrote, bit for bit.

    Nothing is written for another model, at a machine that differs from the one where the file was
    made in what the file names, and for a damaged file.

    Example: bytelm decompress README.md.blm --model runs/megabyte_tiny --out README.copy

    Args:
        file: the compressed file.
        model: the run folder or export that compressed it.
        out: the file to write; by default FILE without .blm, which must not exist yet.
        checkpoint: of a run folder: latest, best or a step.
    """
    header = codec.inspect_file(file)
    out = default_out(file, out, is_compressed=True)
    codec.check_paths(file, out)
    place = codec.NO_MODEL
    if header.is_coded:
        from bytelm_jax.kernels.reproducible import describe_machine

        codec.check_machine(header, describe_machine(), file)

        from bytelm_jax.inference.compression import compression_place

        place = compression_place(_load(model, checkpoint)[0])
    summary = codec.decompress_file(file, out, place)
    print(f"wrote {out}: {summary.line}")
    return 0


def _load(path: Path, checkpoint: str) -> tuple[Any, int]:
    """The model, and the bytes of its training windows, 0 if they are not known."""
    from bytelm.export import holds_weights
    from bytelm.remote.copies import local_copy
    from bytelm_jax.training.pretrained import from_pretrained, model_of

    with local_copy(path, checkpoint) as folder:
        if holds_weights(folder):
            return from_pretrained(folder, checkpoint=checkpoint), 0
        from bytelm_jax.training import checkpoint as checkpoints

        recipe, params, _ = checkpoints.load_run(folder, checkpoint)
        return model_of(recipe, params), recipe.data.sequence_length
