"""What surely does not fit into the host's memory, so that nothing tries to allocate it."""

import os

from bytelm.config import Recipe, require

_FLOAT32 = 4


def host_memory() -> int:
    """Bytes of memory that the host has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def require_host_memory(recipe: Recipe) -> None:
    """Raises `ValueError` where a training step surely needs more memory than the host has.

    It needs at least parameters and gradients, and the logits of a micro-batch, in float32. Of a
    run that freezes parameters only these are known to be needed.
    """
    memory, run, length = host_memory(), recipe.train, recipe.data.sequence_length
    some = bool(run.freeze or run.lora_rank)
    copies, what = (1, "parameters") if some else (2, "parameters and gradients")
    weights = copies * _FLOAT32 * recipe.model.parameter_count()
    require(
        weights <= memory,
        f"model: {what} take {_gib(weights)} of the {_gib(memory)} of this "
        "machine; make it smaller",
    )
    row = _FLOAT32 * length * recipe.model.logit_width
    require(
        row <= memory,
        f"sequence_length={length}: the logits of one row take {_gib(row)} of the {_gib(memory)} "
        f"of this machine; at most {memory * length // row} fit",
    )
    rows = run.batch_size // run.accumulation_steps
    require(
        rows * row <= memory,
        f"batch_size={run.batch_size}: the logits of a step take {_gib(rows * row)} of the "
        f"{_gib(memory)} of this machine; at most {memory // row * run.accumulation_steps} rows "
        "fit; lower it or raise accumulation_steps",
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
