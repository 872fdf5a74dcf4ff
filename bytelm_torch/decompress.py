"""Restores a file that `bytelm_torch.compress` wrote, bit for bit.

python -m bytelm_torch.decompress README.md.blm --model exports/megabyte_tiny --out README.copy
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bytelm.compression import codec
from bytelm.compression.options import default_out
from bytelm_torch.compress import Device, run_command

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
    header = codec.inspect_file(file)
    out = default_out(file, out, is_compressed=True)
    codec.check_paths(file, out)
    place = codec.NO_MODEL
    if header.is_coded:
        place = _place(header, file, model, checkpoint, device)
    summary = codec.decompress_file(file, out, place)
    print(f"wrote {out}: {summary.line}")
    return 0


def _place(
    header: codec.Header, file: Path, model: Path, checkpoint: str, device: Device
) -> codec.Place:
    import torch

    from bytelm_torch.inference.compression import compression_place, describe_machine
    from bytelm_torch.interop.export import from_pretrained

    threads = header.machine.get("threads", "")
    if threads.isdigit() and 1 <= int(threads) <= 1024:
        torch.set_num_threads(int(threads))  # the one thing that can be made equal here
    if device != "cuda" or torch.cuda.is_available():
        codec.check_machine(header, describe_machine(torch.device(device)), file)
    return compression_place(from_pretrained(model, device=device, checkpoint=checkpoint))


if __name__ == "__main__":
    sys.exit(main())
