"""Writes a model as a program that runs without this library.

python -m bytelm_torch.export exports/megabyte_tiny --format onnx --out model.onnx
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bytelm_torch.compress import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Bad input: 2 and one line on standard error."""
    return run_command(_export, "export", argv)


def _export(
    model: Path,
    /,
    out: Path,
    format: Literal["torch-export", "onnx"] = "torch-export",
    checkpoint: str = "latest",
    length: int = 0,
) -> int:
    """Writes a model as a program of ids int64 [B, T] that gives logits float32 [B, T, V].

    Both are dynamic; of MEGABYTE, T is a multiple of the patch. What torch can export for one
    length only is refused with its reason.

    Example: python -m bytelm_torch.export exports/megabyte_tiny --format onnx --out model.onnx

    Args:
        model: an export, or a run folder of this package.
        out: the file to write.
        format: torch-export, for `torch.export.load`, or onnx.
        checkpoint: of a run folder: latest, best or a step.
        length: bytes of a text with which the program is made; 0 takes the training length, and if
            the model does not say it, 512, or the longest input if that is less.
    """
    from bytelm.config import default_length
    from bytelm.files import require_file_to_write
    from bytelm_torch.interop.export import from_pretrained
    from bytelm_torch.interop.programs import export_onnx, save_program

    require_file_to_write(out, f"out={out}")
    made = from_pretrained(model, checkpoint=checkpoint)
    length = length or default_length(made.config, made.training_length)
    if format == "onnx":
        export_onnx(made, out, length)
    else:
        save_program(made, out, length)
    print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
