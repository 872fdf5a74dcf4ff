"""`bytelm draft-table`; its signature and docstring are its help."""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from bytelm.arguments import UsageError
from bytelm.config import Recipe, require
from bytelm.storage.stores import is_remote, protocol_of, tidy

if TYPE_CHECKING:
    from bytelm.generation.draft_table import DraftTable

_JUDGED_BYTES = 1 << 20
"""Bytes of the validation data that a table is judged by."""


def draft_table_command(
    run: Path,
    /,
    data: tuple[Path, ...] = (),
    megabytes: float = 16.0,
    text_field: str = "text",
    prompt_field: str = "",
    completion_field: str = "",
    chat_field: str = "",
    raw: bool = False,
    cache_dir: str = "",
) -> int:
    """Makes a table of frequent n-grams for speculative decoding: RUN/draft_table.npz.

    It drafts 8 bytes after the last bytes of a text, in one look-up. By default it is made from the
    run's own training data, and judged by the data that the run holds out: the mean bytes a round
    are printed that it would give if the model wrote them.

    Example: bytelm draft-table runs/megabyte_tiny

    Args:
        run: the run folder, or with --data an export on this machine.
        data: files and folders of any form to make it from, instead of the run's training data.
        megabytes: the most text to read, in units of 1,048,576 bytes, evenly spread over the data;
            each takes 60 MB of memory.
        text_field: the field of records (JSON, Parquet, Arrow, tar) that holds the text.
        prompt_field: the field of records before COMPLETION_FIELD; both are read.
        completion_field: the field of records that comes after PROMPT_FIELD.
        chat_field: the field of records that holds messages, all of which are read.
        raw: take the bytes of files as they are, whatever their form.
        cache_dir: where compressed files and records are kept in prepared form.
    """
    most = _bytes_of(megabytes)
    how = text_field, raw, cache_dir, prompt_field, completion_field, chat_field
    if not data and how != ("text", False, "", "", "", ""):
        raise UsageError("--data: name the files that the other options are about")
    if is_remote(run) and protocol_of(tidy(run)) not in ("gs", "s3"):
        raise UsageError(f"{tidy(run)}: a table is written on disks, gs:// and s3://")

    from bytelm.generation.draft_table import TABLE_FILE, build_table, bytes_per_round

    chunks, held_out = _given(run, data, most, *how) if data else _own(run, most)
    table = build_table(chunks, most_bytes=most)
    name = f"{tidy(run) if is_remote(run) else run}/{TABLE_FILE}"
    lines = [f"wrote {name}: {int((table.keys > 0).sum()):,} contexts"]
    text = b"".join(held_out)[:_JUDGED_BYTES]
    if len(text) > 100:
        rate = bytes_per_round(table, text)
        lines += [f"{rate:.2f} bytes a round on {len(text):,} bytes that the run holds out"]
    _save(run, table)
    print("\n".join(lines))
    return 0


def _bytes_of(megabytes: float) -> int:
    if not 0 < megabytes <= 256:
        raise UsageError(f"--megabytes {megabytes}: must be above 0 and at most 256")
    return int(megabytes * 2**20)


def _save(run: Path, table: "DraftTable") -> None:
    """Writes the table into the folder of a run, here or at an address."""
    from bytelm.generation.draft_table import TABLE_FILE, save_table
    from bytelm.remote.folder import RemoteFolder

    if not is_remote(run):
        save_table(run / TABLE_FILE, table)
        return
    with TemporaryDirectory() as folder:
        file = Path(folder) / TABLE_FILE
        save_table(file, table)
        RemoteFolder(tidy(run)).write(TABLE_FILE, file.read_bytes())


def _given(
    run: Path, data: tuple[Path, ...], most: int, text_field: str, raw: bool, *rest: str
) -> tuple[Iterator[bytes], Iterator[bytes]]:
    """The text of files, and nothing that is held out."""
    from bytelm.export import holds_weights
    from bytelm.run_data import spread_text
    from bytelm.runs import is_run, saved_recipe
    from bytelm_jax.cli.model import open_data

    found = is_run(run) or holds_weights(run)
    if is_remote(run):
        found = saved_recipe(run) is not None
    require(found, f"{run}: no model there; give a run folder or an export")
    cache_dir, *fields = rest
    return spread_text(open_data(data, text_field, raw, cache_dir, *fields), most), iter(())


def _own(run: Path, most: int) -> tuple[Iterator[bytes], Iterator[bytes]]:
    """The text that a run trains on, and what it holds out."""
    from bytelm.export import holds_weights
    from bytelm.run_data import open_windows, spread_text, training_text
    from bytelm.runs import load_recipe

    hint = "is an export, which does not say what it was trained on; give files by --data"
    require(not holds_weights(run), f"{run}: {hint}")
    recipe = load_recipe(run)
    _require_files(recipe)
    found = open_windows(recipe)
    share = _JUDGED_BYTES // max(1, len(found.validation))
    held_out = (
        chunk
        for windows in found.validation.values()
        for chunk in spread_text(windows.corpus, share)
    )
    return training_text(found, most), held_out


def _require_files(recipe: Recipe) -> None:
    """Raises `ValueError` for a run that read its data from a pipe, which cannot be read again."""
    from bytelm.data import named_paths

    paths = [
        path for each in named_paths(recipe.data.paths, "data.paths").values() for path in each
    ]
    require("-" not in paths, "the run read standard input; give the same data by --data FILE")
