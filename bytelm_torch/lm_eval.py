"""Scores a model by lm-evaluation-harness, with the harness's own options behind `--`.

python -m bytelm_torch.lm_eval exports/megabyte_tiny -- --tasks wikitext --limit 10
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from bytelm import harness
from bytelm_torch.compress import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Bad input: 2 and one line on standard error."""
    return run_command(_lm_eval, "lm_eval", argv)


def _lm_eval(
    model: Path,
    /,
    checkpoint: str = "latest",
    window: int = 0,
    device: Literal["cpu", "cuda"] = "cpu",
    passed_on: tuple[str, ...] = (),
) -> int:
    """Scores a model by lm-evaluation-harness, with the harness's own options behind `--`.

    Log-likelihoods are in nats of bytes of UTF-8, and `max_gen_toks` counts bytes.

    Example: python -m bytelm_torch.lm_eval exports/megabyte_tiny -- --tasks wikitext --limit 10

    Args:
        model: an export, or a run folder of this package.
        checkpoint: of a run folder: latest, best or a step.
        window: bytes that the model sees at once; 0 takes the training length, and if the model
            does not say it, 512 bytes, or the longest input if that is less.
        device: where the model runs.
        passed_on: the options of the harness, as `lm_eval run --help` lists them.
    """
    harness.check_passed_on(passed_on)
    harness.require_harness()
    from bytelm_torch.interop.export import from_pretrained
    from bytelm_torch.tools.harness import harness_place

    made = from_pretrained(model, device=device, checkpoint=checkpoint)
    window = harness.chosen_window(made.config, window, made.training_length)
    return harness.run_harness(harness_place(made), window, model, checkpoint, passed_on)


if __name__ == "__main__":
    sys.exit(main())
