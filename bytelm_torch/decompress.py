"""Restores a file that `bytelm_torch.compress` wrote, bit for bit.

python -m bytelm_torch.decompress README.md.blm --model exports/megabyte_tiny --out README.copy
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bytelm.compression import codec
from bytelm.compression.options import run_decompress
from bytelm_torch.compress import Device, open_model, run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Bad input: 2 and one line on standard error."""
    return run_command(_decompress, "decompress", argv)


def _decompress(
    file: Path,
    /,
    model: Path,
    out: Path = Path(),
    checkpoint: str = "latest",
    device: Device = "cpu",
) -> int:
    """Restores a file that `python -m bytelm_torch.compress` wrote, bit for bit.

    Nothing is written for another model, at a machine that differs from the one where the file was
    made in what the file names, and for a damaged file.

    Example: python -m bytelm_torch.decompress README.md.blm --model exports/megabyte_tiny

    Args:
        file: the compressed file.
        model: the export or run folder that compressed it.
        out: the file to write; by default FILE without .blm, which must not exist yet.
        checkpoint: of a run folder: latest, best or a step.
        device: where the model runs: where it ran before.
    """

    def open_place(header: codec.Header) -> codec.Place:
        import torch

        from bytelm_torch.inference.compression import describe_machine

        threads = header.machine.get("threads", "")
        if threads.isdigit() and 1 <= int(threads) <= 1024:
            torch.set_num_threads(int(threads))  # the one thing that can be made equal here
        if device != "cuda" or torch.cuda.is_available():
            codec.check_machine(header, describe_machine(torch.device(device)), file)
        return open_model(model, checkpoint, device)[2]

    return run_decompress(file, out, open_place)


if __name__ == "__main__":
    sys.exit(main())
