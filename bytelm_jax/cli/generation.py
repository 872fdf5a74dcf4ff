"""`bytelm generate` and `bytelm bench`; their signatures and docstrings are their help."""

import codecs
import itertools
import json as json_module
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bytelm.arguments import UsageError
from bytelm.config import Recipe, require
from bytelm.sampling import SamplerConfig
from bytelm.tokenizer import StreamingDecoder
from bytelm_jax.cli.model import with_resets

_MOST_SAMPLES = 4096

if TYPE_CHECKING:
    from bytelm.generation.completion import Completion


def generate_command(
    run: Path,
    /,
    prompt: str = "",
    prompt_file: str = "",
    max_new_bytes: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    sampler: Literal["greedy", "categorical", "entropy"] = "categorical",
    seed: int = 0,
    samples: int = 1,
    stop: tuple[str, ...] = (),
    valid_utf8: bool = False,
    speculate: str = "none",
    dtype: Literal["float32", "bfloat16"] = "float32",
    json: bool = False,
    checkpoint: str = "latest",
    reset_on: Literal["trained", "none", "newline", "document"] = "trained",
) -> int:
    """Streams text that continues the prompt; never splits a UTF-8 character.

    The output is UTF-8, whatever the locale. Bytes that are no character become U+FFFD.

    Example: bytelm generate runs/megabyte_tiny --prompt "def " --max-new-bytes 64

    Args:
        run: the run folder.
        prompt: what the text starts with; it is printed first.
        prompt_file: a file that holds it; - reads standard input.
        max_new_bytes: the most bytes to generate; the model may end earlier.
        temperature: divides the logits; 0 is greedy.
        top_k: keep only the k most likely bytes; 0 keeps all.
        top_p: keep the most likely bytes that together reach this probability.
        sampler: greedy, categorical, or by the entropy of each distribution.
        seed: seed of the random choices.
        samples: how many texts to write.
        stop: texts that end the output where they appear; they are not printed.
        valid_utf8: never write a byte that cannot become valid UTF-8.
        speculate: what drafts bytes, which change no text: ngram, table (`bytelm draft-table`),
            self (a BLT's local stacks) or the run folder of a smaller model.
        dtype: of the weights; bfloat16 is faster on a GPU or TPU, and rounds.
        json: print one object a sample: text, bytes, log-probabilities (nats), why it ended.
        checkpoint: latest, best or a step.
        reset_on: where a new segment starts for the model; as in training, by default.
    """
    config = SamplerConfig(sampler=sampler, temperature=temperature, top_k=top_k, top_p=top_p)
    start = _prompt(prompt, prompt_file, samples)
    from bytelm_jax.inference.generate import complete, stream

    recipe, model = load_model(run, checkpoint, reset_on, dtype)
    how: dict[str, Any] = {"valid_utf8": valid_utf8, "stop": tuple(map(_bytes_of, stop))}
    how["speculate"] = load_drafter(speculate, run, checkpoint, dtype)
    if samples == 1 and not json:
        pieces = stream(model, start, max_new_bytes, config, seed, **how)
        _write_text(pieces, recipe, start)
        return 0
    how["log_probs"] = json
    rows = complete(model, [start] * samples, max_new_bytes, config, seed, **how)
    return _write_samples(rows, start, recipe, json)


def _write_samples(found: "list[Completion]", start: bytes, recipe: Recipe, as_json: bool) -> int:
    for number, each in enumerate(found):
        if as_json:
            print(_as_json(each, start), flush=True)
            continue
        if number:
            _write(b"\n")
        _write(f"[{number + 1} of {len(found)}]\n".encode())
        _write_text([each.text], recipe, start)
    return 0


def bench_command(
    run: Path,
    /,
    text: Path,
    batches: tuple[int, ...] = (1,),
    contexts: tuple[int, ...] = (256,),
    new_bytes: int = 256,
    speculate: tuple[str, ...] = ("none", "ngram"),
    temperature: float = 1.0,
    seed: int = 0,
    repeats: int = 5,
    dtype: Literal["float32", "bfloat16"] = "float32",
    token_model: bool = False,
    json: bool = False,
    checkpoint: str = "latest",
) -> int:
    """Measures generation: bytes per second by batch, context and draft.

    The first call of each shape compiles and is not counted; a figure is the median of the others,
    prefill and copies included. Prompts are pieces of TEXT, evenly spread.

    Example: bytelm bench runs/megabyte_tiny --text README.md --batches 1 8

    Args:
        run: the run folder.
        text: a file that prompts are taken from; choose text that the model was not trained on.
        batches: how many texts are written at once.
        contexts: bytes of the prompts.
        new_bytes: bytes to write after each prompt.
        speculate: drafts to compare, as in `bytelm generate`.
        temperature: divides the logits; 0 is greedy.
        seed: seed of the random choices.
        repeats: calls of each shape that are timed.
        dtype: of the weights.
        token_model: also measure transformers' generate of a Llama of as many parameters.
        json: print one object a row.
        checkpoint: latest, best or a step.
    """
    for name, values in (("batches", batches), ("contexts", contexts), ("repeats", (repeats,))):
        if not values or min(values) < 1:
            raise UsageError(f"--{name} {' '.join(map(str, values))}: must be at least 1")
    if new_bytes < 1:
        raise UsageError(f"--new-bytes {new_bytes}: must be at least 1")
    config = SamplerConfig(temperature=temperature)
    source, most = text.read_bytes(), max(contexts)
    require(len(source) > most, f"{text}: {len(source)} bytes; give a text longer than {most}")

    from bytelm_jax.tools.benchmark import Shape, measure, measure_tokens

    _, model = load_model(run, checkpoint, "trained", dtype)
    drafters = {name: load_drafter(name, run, checkpoint, dtype) for name in speculate}
    _write_row(None, json)
    for batch in batches:
        for context in contexts:
            shape = Shape(batch, context, new_bytes, repeats)
            for name, drafter in drafters.items():
                _write_row(measure(model, source, shape, config, seed, name, drafter), json)
            if token_model:
                _write_row(measure_tokens(model, source, shape, config, dtype), json)
    return 0


_COLUMNS = {
    "model": "model", "draft": "draft", "batch": "batch", "context": "context",
    "bytes_per_second": "bytes/s", "bytes_per_round": "bytes/round",
    "ms_per_round": "ms/round", "repeated": "repeated",
}  # fmt: skip
"""The columns of the table, of all that a row holds."""


def _write_row(row: dict[str, Any] | None, as_json: bool) -> None:
    """One line of the table, its head for None; the numbers as JSON if asked for."""
    if as_json:
        if row is not None:
            print(json_module.dumps(row), flush=True)
        return
    cells = _COLUMNS.values() if row is None else (row.get(name, "") for name in _COLUMNS)
    print(" ".join(f"{cell!s:>11}" for cell in cells), flush=True)


def load_model(run: Path, checkpoint: str, reset_on: str, dtype: str) -> tuple[Recipe, Any]:
    """The recipe of a run and its model, with weights of that dtype."""
    import jax.numpy as jnp

    from bytelm_jax.models import cast_params, define_model
    from bytelm_jax.training import checkpoint as checkpoints

    recipe, params, _ = checkpoints.load_run(run, checkpoint)
    recipe = with_resets(recipe, reset_on)
    bind, _ = define_model(recipe.model)
    return recipe, bind(params if dtype == "float32" else cast_params(params, jnp.dtype(dtype)))


def load_drafter(speculate: str, run: Path, checkpoint: str, dtype: str) -> Any:
    """What `--speculate` names, for `speculate=` of `generate`: a word, a table or a model."""
    known = "none, ngram, table, self or the run folder of a smaller model"
    if not speculate:
        raise UsageError(f"--speculate: is empty; give {known}")
    if speculate in ("none", "ngram", "self"):
        return speculate
    if speculate == "table":
        from bytelm.generation.draft_table import TABLE_FILE, load_table
        from bytelm.remote.copies import local_copy

        with local_copy(run, checkpoint) as copy:
            file = copy / TABLE_FILE
            hint = f"make it by `bytelm draft-table {run}`"
            require(file.exists(), f"--speculate table: {run} has no {TABLE_FILE}; {hint}")
            return load_table(file)
    require(Path(speculate).exists(), f"--speculate {speculate}: no such folder; give {known}")
    try:
        return load_model(Path(speculate), "latest", "trained", dtype)[1]
    except ValueError as error:
        raise ValueError(f"--speculate {speculate}: gives no model ({error}); {known}") from None


def _prompt(prompt: str, prompt_file: str, samples: int) -> bytes:
    if not 1 <= samples <= _MOST_SAMPLES:
        raise UsageError(f"--samples {samples}: must be from 1 to {_MOST_SAMPLES}")
    if not prompt_file:
        return _bytes_of(prompt)
    if prompt:
        raise UsageError("--prompt and --prompt-file: give one of them")
    return _standard_input() if prompt_file == "-" else Path(prompt_file).read_bytes()


def _bytes_of(argument: str) -> bytes:
    return argument.encode("utf-8", "surrogateescape")


def _as_json(found: "Completion", prompt: bytes) -> str:
    """One line: `text` with U+FFFD for bytes that are no character, and all `bytes` in hex.

    A character that the prompt began belongs to the text.
    """
    assert found.log_probs is not None
    before = codecs.getincrementaldecoder("utf-8")("replace").decode(prompt)
    row = {
        "text": (prompt + found.text).decode("utf-8", "replace")[len(before) :],
        "bytes": found.text.hex(),
        "log_probs": [round(float(each), 6) for each in found.log_probs],
        "end": found.end,
        "rounds": found.rounds,
        "accepted": found.accepted,
    }
    return json_module.dumps(row, ensure_ascii=False)


def _write_text(pieces: Any, recipe: Recipe, before: bytes) -> None:
    """Writes bytes as text, each character once it is complete, and ends the line."""
    decoder, offset = StreamingDecoder(recipe.model.vocab), recipe.model.vocab.offset
    for piece in itertools.chain([before], pieces):
        _write(decoder.push([byte + offset for byte in piece]).encode("utf-8"))
    _write(decoder.finish().encode("utf-8") + b"\n")


def _standard_input() -> bytes:
    """All of standard input; where it is text alone, in UTF-8."""
    source = sys.stdin
    binary = getattr(source, "buffer", None)
    return source.read().encode("utf-8", "surrogateescape") if binary is None else binary.read()


def _write(text: bytes) -> None:
    """Writes UTF-8 to standard output at once; where that is text alone, what it can encode."""
    sink = sys.stdout
    sink.flush()
    binary = getattr(sink, "buffer", None)
    if binary is not None:
        binary.write(text)
        binary.flush()
        return
    encoding = sink.encoding or "utf-8"
    sink.write(text.decode("utf-8", "replace").encode(encoding, "replace").decode(encoding))
    sink.flush()
