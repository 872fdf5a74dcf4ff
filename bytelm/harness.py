"""A model behind the interface of lm-evaluation-harness (`lm_eval`), which papers use.

The harness finds no models by itself: `run_harness` registers the model and then calls the
harness's own command line. Its requests are texts; here they are the bytes of their UTF-8, so that
the bytes by which the harness divides are those that were predicted. Axes: B rows, T bytes.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from bytelm.config import ModelConfig, default_length, require
from bytelm.config.lfbyte import require_prediction
from bytelm.sampling import SamplerConfig
from bytelm.tokenizer import ByteTokenizer

NAME = "bytelm"
"""What the harness is told that the model is called."""

_BATCH_SIZE, _LEAST = 16, 64  # rows of a batch by default; bytes: shorter ones share one program
_NEW_BYTES = 256  # as the harness has it where a task says nothing
_OURS = {"--model": "the model", "--model_args": "the model", "--device": "the device"}
_SHORT = {"-M": "--model", "-a": "--model_args"}
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Place(NamedTuple):
    """What a framework does for the harness."""

    config: ModelConfig
    score: Callable[[Int32[np.ndarray, "B T"]], tuple[np.ndarray, np.ndarray]]
    """Of each id its nats, float32 [B, T], and whether it is the most likely, bool [B, T]."""
    generate: Callable[[Sequence[bytes], int, SamplerConfig, int], list[bytes]]
    """`generate(prompts, max_new_bytes, sampler, seed)`: the new bytes of each prompt."""


class _Piece(NamedTuple):
    """A window of a request: ids from `first` on are counted."""

    request: int
    ids: Int32[np.ndarray, " T"]
    first: int


class ByteRequests:
    """Answers the requests of the harness; `run_harness` makes a class of the harness's own of it.

    Windows have `window` bytes. `batch_size` rows are computed at once.
    """

    cache_hook: Any

    def __init__(self, place: Place, window: int, batch_size: int = _BATCH_SIZE) -> None:
        super().__init__()
        self._place, self._window, self._batch_size = place, window, batch_size
        self._tokenizer = ByteTokenizer(place.config.vocab)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each continuation behind its context, and if it is greedy.

        A request's `args` are (context, continuation). White space that ends a context belongs to
        the continuation, as it does for every model of the harness. A context loses its beginning
        where both are longer than the window; a continuation longer than that is cut as in
        `loglikelihood_rolling`. Behind an empty context stands what the model expects of a text's
        first byte.
        """
        texts = []
        for request in requests:
            context, continuation = request.args
            kept = context.rstrip()
            start = len(self._tokenizer.encode(kept))
            texts.append((self._tokenizer.encode(context + continuation), start))
        found = self._log_likelihoods(texts)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood in nats of each text, every byte of which is predicted once.

        The harness's rule for texts that are longer than the window: each window after the first
        begins with one byte of context, and the last one is filled up with context.
        """
        found = self._log_likelihoods([(self._tokenizer.encode(r.args[0]), 0) for r in requests])
        for request, (answer, _) in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return [answer for answer, _ in found]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to the first of its stops, which is left out.

        A request's `args` are (context, settings): `until`, `max_gen_toks` (bytes here),
        `do_sample`, `temperature`, `top_k`, `top_p`, `seed`. A context loses its beginning where it
        and the new bytes do not fit into the window. Raises `ValueError` for another setting.
        """
        wanted = [(self._tokenizer.encode(r.args[0]), _settings(r.args[1])) for r in requests]
        for _, settings in wanted:
            fits = settings.most < self._window
            why = f"the window has {self._window} bytes and a context needs one of them"
            require(fits, f"max_gen_toks={settings.most}: {why}; give --gen_kwargs max_gen_toks=N")
        # Rows of one length replay nothing, and rows of one kind can be computed together.
        order = sorted(
            range(len(wanted)), key=lambda i: (wanted[i][1].shared, -len(wanted[i][0]), i)
        )
        answers = [""] * len(wanted)
        for rows in _batches(order, self._batch_size, lambda i: wanted[i][1].shared):
            settings = wanted[rows[0]][1]
            room = self._window - settings.most
            prompts = [self._tokenizer.to_bytes(wanted[i][0][-room:]) for i in rows]
            made = self._place.generate(prompts, settings.most, settings.sampler, settings.seed)
            for i, new in zip(rows, made, strict=True):
                answers[i] = _until(new, wanted[i][1].stops)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        """Raises `ValueError`: these models know no roles."""
        raise ValueError("--apply_chat_template: these models have no chat template; leave it out")

    def _log_likelihoods(self, texts: Sequence[tuple[np.ndarray, int]]) -> list[tuple[float, bool]]:
        """Of each (ids, start): the sum from `start` on, and whether all are the most likely."""
        pieces = [
            _Piece(number, ids[begin:end], first - begin)
            for number, (ids, start) in enumerate(texts)
            for begin, first, end in windows(len(ids), start, self._window)
        ]
        pieces.sort(key=lambda piece: -len(piece.ids))
        sums, greedy = [0.0] * len(texts), [True] * len(texts)
        for rows in _batches(pieces, self._batch_size, lambda piece: self._width(len(piece.ids))):
            nats, best = self._place.score(self._padded(rows))
            for row, piece in enumerate(rows):
                counted = slice(piece.first, len(piece.ids))
                sums[piece.request] -= float(nats[row, counted].sum(dtype=np.float64))
                greedy[piece.request] &= bool(best[row, counted].all())
        require(bool(np.isfinite(sums).all()), "the model's logits are not finite on these texts")
        return list(zip(sums, greedy, strict=True))

    def _width(self, length: int) -> int:
        """The columns of a batch whose longest row has `length` ids: few programs serve all."""
        return min(self._window, max(_LEAST, 1 << (length - 1).bit_length()))

    def _padded(self, rows: Sequence[_Piece]) -> Int32[np.ndarray, "B T"]:
        shape = self._batch_size, self._width(len(rows[0].ids))
        ids = np.full(shape, self._place.config.vocab.pad_id, np.int32)
        for row, piece in zip(ids, rows, strict=False):
            row[: len(piece.ids)] = piece.ids
        return ids


def windows(size: int, start: int, window: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first counted, end) of each window by which ids `start` … `size` are predicted once.

    What fits into one window has as much before it as fits, too. Of more, each window begins with
    one id of context, if there is any, and the last is filled up with context:

        list(windows(10, 0, 5)) == [(0, 0, 5), (4, 5, 9), (5, 9, 10)]
    """
    at = start
    while at < size:
        end = min(size, max(at - 1, 0) + window)
        yield max(0, end - window), at, end
        at = end


def _batches(items: Sequence[Any], size: int, kind: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Up to `size` neighbours of one kind at a time."""
    rows: list[Any] = []
    for item in items:
        if rows and (len(rows) == size or kind(rows[0]) != kind(item)):
            yield rows
            rows = []
        rows.append(item)
    if rows:
        yield rows


# ---- generation -----------------------------------------------------------------------------


class _Settings(NamedTuple):
    """How one context is continued."""

    most: int
    sampler: SamplerConfig
    seed: int
    stops: tuple[bytes, ...]

    @property
    def shared(self) -> tuple[Any, ...]:
        """What rows of one batch have in common."""
        chosen = self.sampler
        return self.most, chosen.temperature, chosen.top_k, chosen.top_p, self.seed


def _settings(given: dict[str, Any]) -> _Settings:
    """Of a request's settings, as the harness names them; greedy unless they ask for samples."""
    known = dict(given)
    until = known.pop("until", None) or []
    stops = [until] if isinstance(until, str) else until
    limits = [known.pop(name) for name in _LIMITS if name in known]
    temperature = float(known.pop("temperature", 0.0) or 0.0)
    samples = known.pop("do_sample", None)
    if samples is False:
        temperature = 0.0
    elif samples and temperature == 0.0:
        temperature = 1.0
    sampler = SamplerConfig(
        temperature=temperature,
        top_k=int(known.pop("top_k", 0) or 0),
        top_p=float(known.pop("top_p", 1.0) or 1.0),
    )
    most = int(next((limit for limit in limits if limit is not None), _NEW_BYTES))
    require(most >= 1, f"max_gen_toks={most}: must be at least 1")
    seed = int(known.pop("seed", 0))
    known = {name: value for name, value in known.items() if (name, value) != ("num_beams", 1)}
    for name, value in known.items():
        raise ValueError(f"gen_kwargs: {name}={value!r}: these models do not take it; leave it out")
    return _Settings(most, sampler, seed, tuple(stop.encode() for stop in stops if stop))


def _until(new: bytes, stops: Sequence[bytes]) -> str:
    found = [at for stop in stops if (at := new.find(stop)) >= 0]
    return new[: min(found, default=len(new))].decode("utf-8", "replace")


# ---- the command ----------------------------------------------------------------------------


def require_harness() -> None:
    """Raises `ValueError` where the harness is not installed."""
    found = find_spec("lm_eval") is not None
    require(found, "lm_eval: not installed; install the extra lm-eval: pip install bytelm[lm-eval]")


def check_passed_on(words: Sequence[str]) -> None:
    """Raises `ValueError` for options of the harness that this command gives, or that have no use.

    `words` is what the harness gets.
    """
    require(bool(words), "--: write the harness's options behind it, as in: -- --tasks wikitext")
    for word in words:
        name = _SHORT.get(word, word).partition("=")[0]
        what = _OURS.get(name)
        require(what is None, f"{name}: {what} is given before --; leave it out")


def chosen_window(config: ModelConfig, window: int, trained: int) -> int:
    """The bytes of a window: as asked, or for 0 those of the training, or of a new recipe.

    Raises `ValueError` for a model that cannot be scored and for a window that it cannot read.
    """
    require_prediction(config)
    require(config.causal, "causal=False: the harness needs a causal model")
    longest, found = config.longest_input, window or default_length(config, trained)
    require(found >= 2, f"--window {window}: must be at least 2, or 0")
    fits = longest is None or found <= longest
    require(fits, f"--window {window}: this model sees at most {longest} bytes")
    return found


def run_harness(
    place: Place, window: int, path: Path, checkpoint: str, words: Sequence[str]
) -> int:
    """Calls the harness's own command line with `words` for the model of `place`; its exit code."""
    require_harness()
    # By name, since type checkers look for what is written as an import and few have it.
    command, model, registry = map(
        import_module, ("lm_eval.__main__", "lm_eval.api.model", "lm_eval.api.registry")
    )
    registry.register_model(NAME)(_model_class(model.LM, place, window))
    about = f"pretrained={str(path)!r},checkpoint={checkpoint!r},window={window}"
    usual = ["--batch_size", str(_BATCH_SIZE)]
    before = sys.argv
    sys.argv = ["lm_eval", "run", "--model", NAME, "--model_args", about, *usual, *words]
    try:
        command.cli_evaluate()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv = before
    return 0


def _model_class(base: type[Any], place: Place, window: int) -> type[Any]:
    """A class of the harness's own, whose one model is that of `place`."""

    class Model(ByteRequests, base):
        @classmethod
        def create_from_arg_obj(cls, arg_dict: Any, additional_config: Any = None) -> Any:
            given = additional_config or {}
            size = str(given.get("batch_size") or _BATCH_SIZE)
            counts = size.isdecimal() and int(size) >= 1 and not given.get("max_batch_size")
            require(counts, f"--batch_size {size}: give a number of rows, without --max_batch_size")
            return cls(place, window, int(size))

    if inspect.isabstract(Model):
        raise TypeError(f"lm_eval asks for more methods: {sorted(Model.__abstractmethods__)}")
    return Model
