"""`bytelm compress` and `decompress`; signatures and docstrings are their help."""

from functools import partial
from pathlib import Path

from bytelm.compression import codec
from bytelm.compression.options import run_compress, run_decompress
from bytelm.config import ModelConfig


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

    Use `bytelm decompress` with the same model, the same versions and the same kind of processor or
    GPU, which the file names: the last bits of a probability depend on them. A file that the model
    would make longer is stored unchanged.

    Example: bytelm compress README.md --model runs/megabyte_tiny

    Args:
        file: the file to compress.
        model: a run folder or an export.
        out: the file to write; by default FILE.blm.
        checkpoint: of a run folder: latest, best or a step.
        window: bytes that the model sees at once; 0 takes the training length, and if an export
            does not say it, 512 bytes, or the longest input if that is less.
        streams: windows that are coded side by side; a GPU takes hundreds.
    """
    return run_compress(file, out, window, streams, partial(_open, model, checkpoint))


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

    def open_place(header: codec.Header) -> codec.Place:
        from bytelm_jax.kernels.reproducible import describe_machine

        codec.check_machine(header, describe_machine(), file)
        return _open(model, checkpoint)[2]

    return run_decompress(file, out, open_place)


def _open(path: Path, checkpoint: str) -> tuple[ModelConfig, int, codec.Place]:
    """As `run_compress` asks for it."""
    from bytelm_jax.inference.compression import compression_place
    from bytelm_jax.training.pretrained import from_pretrained

    model = from_pretrained(path, checkpoint=checkpoint)
    return model.config, model.training_length, compression_place(model)
