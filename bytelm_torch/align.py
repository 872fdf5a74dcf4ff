"""Teaches a byte encoder to make of words what a token model's embeddings say of them.

python -m bytelm_torch.align exports/imported --tokens books.tokens --run-dir runs/aligned
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from bytelm import alignment
from bytelm.config import Recipe
from bytelm.export import imported_recipe, read_description
from bytelm.runs import is_run, load_recipe
from bytelm_torch.compress import run_command

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code. Bad input: 2 and one line on standard error."""
    return run_command(_align, "align", argv)


def _align(
    run: Path,
    /,
    tokens: Path,
    run_dir: Path,
    steps: int = 0,
    batch_size: int = 0,
    sequence_length: int = 0,
    learning_rate: float = 0.0,
    warmup_steps: int = -1,
    seed: int = 0,
    log_every: int = 0,
    eval_every: int = 0,
    checkpoint_every: int = 0,
) -> int:
    """Teaches a byte encoder to make of words what a token model's embeddings say of them.

    Trains the byte encoder of RUN, a model that `bytelm import --format llama` made and `bytelm
    export` wrote, and nothing else, as `bytelm align` does. Resumes by itself when the run folder
    holds a checkpoint. `metrics.jsonl` has `alignment_loss`, the mean squared error relative to the
    mean square of the embeddings, and `alignment_cosine`.

    Example: python -m bytelm_torch.align exports/imported --tokens books.tokens --run-dir aligned

    Args:
        run: the export, or run folder of this package, that is begun from.
        tokens: a file of `bytelm align-data`.
        run_dir: the run folder to make or to continue.
        steps: number of steps; 0, here and below, is as in RUN. An export has no recipe, and its
            defaults are 1000 steps of 32 rows, a learning rate of 1e-3 and 100 steps of warm-up.
        batch_size: rows of a step.
        sequence_length: bytes of a row.
        learning_rate: the highest learning rate.
        warmup_steps: steps over which the learning rate rises; -1 is as in RUN.
        seed: decides the order of rows.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations of text that is held out.
        checkpoint_every: steps between checkpoints; by default at most a quarter of the steps.
    """
    changes = {"steps": steps, "batch_size": batch_size, "sequence_length": sequence_length}
    changes |= {"learning_rate": learning_rate, "warmup_steps": warmup_steps, "seed": seed}
    changes |= {"log_every": log_every, "eval_every": eval_every}
    changes |= {"checkpoint_every": checkpoint_every}
    recipe, data = alignment.open_stage(run, tokens, run_dir, lambda: _recipe_of(run), **changes)
    from bytelm_torch.interop.export import from_pretrained
    from bytelm_torch.training.alignment import align

    outcome = align(recipe, data, run_dir, lambda: from_pretrained(run).float().state_dict())
    print(alignment.end_line(outcome, run_dir))
    return 0


def _recipe_of(run: Path) -> Recipe:
    """The recipe of a run folder, or one with the model of an export."""
    if is_run(run):
        return load_recipe(run)
    described = read_description(run)
    return imported_recipe(described.config, described.extra)


if __name__ == "__main__":
    sys.exit(main())
