"""Compresses any file without loss, by arithmetic coding with a model's probabilities.

python -m bytelm_torch.compress README.md --model exports/megabyte_tiny
"""

import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from bytelm.arguments import parse_call
from bytelm.compression import codec
from bytelm.compression.options import run_compress
from bytelm.config import ModelConfig
from bytelm.files import error_line

__all__ = ["main"]

Device = Literal["cpu", "cuda"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Bad input: 2 and one line on standard error."""
    return run_command(_compress, "compress", argv)


def run_command(command: Callable[..., int], name: str, argv: Sequence[str] | None) -> int:
    """Parses and runs a command; errors that are the user's are one line and exit code 2."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        return parse_call(command, argv, f"python -m bytelm_torch.{name}")
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (ValueError, OSError) as error:
        print(f"{name}: {error_line(error)}", file=sys.stderr)
        return 2


def _compress(
    file: Path,
    /,
    model: Path,
    out: Path = Path(),
    checkpoint: str = "latest",
    window: int = 0,
    streams: int = 64,
    device: Device = "cpu",
) -> int:
    """Compresses any file without loss, by arithmetic coding with a model's probabilities.

    `python -m bytelm_torch.decompress` needs the same model, and the same kind of processor or GPU
    and versions, which the file names: the last bits of a probability depend on them. A file that
    the model would make longer is stored as it is.

    Example: python -m bytelm_torch.compress README.md --model exports/megabyte_tiny

    Args:
        file: the file to compress.
        model: an export, or a run folder of this package.
        out: the file to write; by default FILE.blm.
        checkpoint: of a run folder: latest, best or a step.
        window: bytes that the model sees at once; 0 takes the training length, and if the model
            does not say it, 512 bytes, or the longest input if that is less.
        streams: windows that are coded side by side; a GPU takes hundreds.
        device: where the model runs.
    """
    return run_compress(file, out, window, streams, partial(open_model, model, checkpoint, device))


def open_model(path: Path, checkpoint: str, device: Device) -> tuple[ModelConfig, int, codec.Place]:
    """As `run_compress` asks for it."""
    from bytelm_torch.inference.compression import compression_place
    from bytelm_torch.interop.export import from_pretrained

    model = from_pretrained(path, device=device, checkpoint=checkpoint)
    return model.config, model.training_length, compression_place(model)


if __name__ == "__main__":
    sys.exit(main())
