"""The commands that align a byte encoder with a token model: their docstrings are their help.

Each command checks its options before it imports what it runs, so that help and mistakes need no
JAX.
"""

from pathlib import Path

from bytelm import alignment
from bytelm.arguments import UsageError
from bytelm.data import open_corpus
from bytelm.runs import load_recipe


def align_data_command(
    donor: Path,
    /,
    data: tuple[str, ...] = (),
    out: Path = Path(),
    text_field: str = "text",
    raw: bool = False,
    cache_dir: str = "",
) -> int:
    """Cuts text into the tokens of a token model, for `bytelm align`.

    Writes one file with the text, the token that ends at each byte, and the embeddings of the
    tokens that occur; the token model and its tokenizer are not needed afterwards.

    Example: bytelm align-data llama/ --data books/ --out books.tokens

    Args:
        donor: the folder of the token model, as transformers saved it, with its tokenizer.json.
        data: files and folders of text; by default Python's standard library.
        out: the file to write.
        text_field: the field of records (JSON, Parquet, Arrow, tar) that holds the text.
        raw: take the bytes of files as they are, whatever their form.
        cache_dir: where what cannot be mapped is kept (default: the user's cache).
    """
    if out == Path():
        raise UsageError("--out: name the file to write")
    alignment.check_output(out, data)
    tokenizer, begin = alignment.open_tokenizer(donor)
    corpus = open_corpus(data, text_field, raw, cache_dir)
    from bytelm_jax.interop.llama import read_embeddings

    embeddings = read_embeddings(donor)
    sizes = (int(size) for size in corpus.lengths)
    documents = (corpus.read(i, 0, size).tobytes() for i, size in enumerate(sizes))
    made = alignment.prepare(documents, tokenizer, embeddings, begin, out)
    print("\n".join(made.lines(out)))
    return 0


def align_command(
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

    Trains the byte encoder of RUN, which `bytelm import --format llama` made, and nothing else.
    Resumes by itself when the run folder holds a checkpoint. `metrics.jsonl` has `alignment_loss`,
    the mean squared error relative to the mean square of the embeddings, and `alignment_cosine`.

    Example: bytelm align runs/imported --tokens books.tokens --run-dir runs/aligned --steps 500

    Args:
        run: the run folder that is begun from.
        tokens: a file of `bytelm align-data`.
        run_dir: the run folder to make or to continue.
        steps: number of steps; 0, here and below, is as in RUN.
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
    recipe, data = alignment.open_stage(run, tokens, run_dir, lambda: load_recipe(run), **changes)
    from bytelm_jax.training import checkpoint
    from bytelm_jax.training.alignment import align

    outcome = align(recipe, data, run_dir, lambda: checkpoint.load_run(run)[1])
    print(alignment.end_line(outcome, run_dir))
    return 0
