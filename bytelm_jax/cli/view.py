"""The commands that show a model or a run to a person; one function each, as in `model.py`."""

import sys
from json import dumps as dump_json
from pathlib import Path
from typing import Literal

from bytelm.arguments import UsageError
from bytelm.storage.stores import is_remote, tidy
from bytelm_jax.cli.model import with_resets


def inspect_command(
    text: str,
    /,
    model: Path,
    max_bytes: int = 1024,
    table: bool = True,
    json: bool = False,
    checkpoint: str = "latest",
    reset_on: Literal["trained", "none", "newline", "document"] = "trained",
) -> int:
    """Shows patches, entropy and surprise (bits) of every byte; colours only on a terminal.

    The entropy is that of the model's own distribution of the next byte. The background shows the
    surprise: green for 0 bits, yellow for 4, red for 8 and more.

    Example: bytelm inspect "def main():" --model runs/megabyte_tiny

    Args:
        text: a text, or a file if there is one of that name.
        model: the run folder.
        max_bytes: the most bytes to show; a note says if some are left out.
        table: print the rows of numbers below the text.
        json: print one JSON object instead: bytes, surprise, entropy, starts.
        checkpoint: latest, best or a step.
        reset_on: where a new segment starts for the model; as in training, by default.
    """
    if max_bytes < 1:
        raise UsageError(f"--max-bytes {max_bytes}: must be at least 1")
    content, name, size = _text_or_file(text, max_bytes)
    if not content:
        raise ValueError(f"{name}: is empty; give at least one byte")

    from rich.console import Console

    from bytelm_jax.tools import inspection
    from bytelm_jax.training import checkpoint as checkpoints
    from bytelm_jax.training.pretrained import model_of

    recipe, params, _ = checkpoints.load_run(model, checkpoint)
    recipe = with_resets(recipe, reset_on)
    shown = content[: recipe.model.longest_input]
    inspected = inspection.inspect(model_of(recipe, params), shown)
    if len(shown) < size:
        why = "--max-bytes" if len(shown) == max_bytes else "the model's max_length"
        note = f"bytelm inspect: {name}: the first {len(shown):,} of {size:,} bytes ({why})"
        print(note, file=sys.stderr, flush=True)
    if json:
        print(dump_json(inspected.to_dict(), allow_nan=False))
        return 0
    console = Console(highlight=False, soft_wrap=True)
    console.print(inspected.describe(), markup=False)
    console.print(inspection.paint_text(inspected))
    if table:
        console.print(inspection.paint_table(inspected), end="")
    return 0


def _text_or_file(text: str, limit: int) -> tuple[bytes, str, int]:
    """The first `limit` bytes of a file or a text, a name for it, and its size in bytes."""
    try:
        is_file = Path(text).is_file()
    except (OSError, ValueError):  # too long for a file name, or contains a NUL
        is_file = False
    if is_file:
        with open(text, "rb") as file:
            return file.read(limit), text, Path(text).stat().st_size
    data = text.encode("utf-8", "surrogateescape")
    return data[:limit], "TEXT", len(data)


def plot_command(run: Path, /, out: Path | None = None) -> int:
    """Plots a run: OUT/plot.png, and OUT/plot.html with the picture inside.

    Loss, bits per byte, learning rate, momentum and gradient norms; if the run has them, also bits
    per byte of each source and validation set, actions and tables of the Q-learning agent, patch
    lengths, and the load of the experts. Of `bytelm align`, its loss and cosine.

    Example: bytelm plot runs/megabyte_tiny

    Args:
        run: the run folder.
        out: the folder to write to; by default the run folder, if it is one of this machine.
    """
    if out is None and is_remote(run):
        raise UsageError(f"--out: name a folder here; {tidy(run)} is an address")

    from bytelm_jax.tools.plot import write_plots

    png, page = write_plots(run, run if out is None else out)
    print(f"wrote {png} and {page}")
    return 0
