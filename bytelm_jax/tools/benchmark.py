"""Speed of generation, beside a token model of as many parameters: `bytelm bench`."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from bytelm.generation.completion import Completion
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference.generate import complete

_GRAM = 16  # bytes of the pieces whose repetition is counted
_TOKENS = 32_000


class Shape(NamedTuple):
    """How much is written at once: texts, bytes of each prompt, bytes after it, timed calls."""

    batch: int
    context: int
    new_bytes: int
    repeats: int


def measure(
    model: Any,
    text: bytes,
    shape: Shape,
    sampler: SamplerConfig,
    seed: int,
    name: str,
    drafter: Any,
) -> dict[str, Any]:
    """One row: bytes a second, bytes and milliseconds a round, and how repetitive the text was.

    A round appends what was accepted of a draft and one more byte; without a draft, one byte, or
    for MEGABYTE a patch. The prefill counts as time.
    """
    prompts = pieces(text, shape.batch, shape.context)
    found: list[Completion] = []

    def call() -> None:
        found[:] = complete(
            model, prompts, shape.new_bytes, sampler, seed, False, speculate=drafter
        )

    seconds = _median(call, shape.repeats)
    written = sum(len(each.text) for each in found)
    rounds = max(each.rounds for each in found)
    return {
        "model": type(model).__name__,
        "draft": name,
        "batch": shape.batch,
        "context": shape.context,
        "new_bytes": shape.new_bytes,
        "bytes_per_second": round(written / seconds, 1),
        "bytes_per_round": round(written / sum(each.rounds for each in found), 3),
        "ms_per_round": round(1000 * seconds / rounds, 3),
        "accepted": round(
            sum(each.accepted for each in found) / max(1, sum(each.drafted for each in found)), 4
        ),
        "repeated": round(
            repeated_share([p + f.text for p, f in zip(prompts, found, strict=True)]), 3
        ),
        "temperature": sampler.temperature,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def measure_tokens(
    model: Any, text: bytes, shape: Shape, sampler: SamplerConfig, dtype: str
) -> dict[str, Any]:
    """The row of a Llama of as many parameters: transformers' generate, compiled, static cache.

    Its tokens are those of a byte-level BPE of 32,000 that is made from `text`; its weights are
    random, which changes no time, and bytes a token are those of `text` itself.
    """
    import torch
    import transformers
    from accelerate import PartialState

    size = sum(leaf.size for leaf in _leaves(model))
    device = PartialState().device
    llama: Any = transformers.LlamaForCausalLM(_llama_of(size))
    llama = llama.to(device, getattr(torch, dtype))
    per_token = bytes_per_token(text)
    count = max(1, round(shape.new_bytes / per_token))
    prompt = max(1, round(shape.context / per_token))
    ids = torch.randint(0, _TOKENS, (shape.batch, prompt), device=device)
    how: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count}
    how |= {"do_sample": sampler.temperature > 0, "cache_implementation": "static"}
    if sampler.temperature:
        how |= {"temperature": sampler.temperature, "top_k": 0}

    def call() -> None:
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            llama.generate(ids, attention_mask=mask, pad_token_id=0, **how).cpu()

    seconds = _median(call, shape.repeats)
    return {
        "model": "Llama",
        "draft": "none",
        "batch": shape.batch,
        "context": shape.context,
        "new_bytes": round(count * per_token),
        "bytes_per_second": round(shape.batch * count * per_token / seconds, 1),
        "bytes_per_round": round(per_token, 3),
        "ms_per_round": round(1000 * seconds / count, 3),
        "parameters": sum(each.numel() for each in llama.parameters()),
        "temperature": sampler.temperature,
        "device": jax.devices()[0].device_kind,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def pieces(text: bytes, count: int, size: int) -> list[bytes]:
    """`count` pieces of `size` bytes, evenly spread over the text."""
    starts = np.linspace(0, len(text) - size, count + 1).astype(int)[:count]
    return [text[start : start + size] for start in starts]


def repeated_share(texts: list[bytes]) -> float:
    """The share of 16-byte pieces that appeared before in their text."""
    seen = total = 0
    for text in texts:
        grams = [text[at : at + _GRAM] for at in range(len(text) - _GRAM + 1)]
        total += len(grams)
        seen += len(grams) - len(set(grams))
    return seen / max(1, total)


def bytes_per_token(text: bytes) -> float:
    """Mean bytes of a token, for a byte-level BPE of 32,000 made from the first 9/10 of `text`.

    They are counted in the rest.
    """
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    cut = len(text) * 9 // 10
    known, rest = (part.decode("utf-8", "replace") for part in (text[:cut], text[cut:]))
    trainer = trainers.BpeTrainer(
        vocab_size=_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(known.splitlines(keepends=True), trainer)
    return len(rest.encode()) / max(1, len(tokenizer.encode(rest).ids))


def _llama_of(parameters: int) -> Any:
    """The configuration of a Llama of about so many parameters, heads of 64 to 128."""
    from transformers import LlamaConfig

    best: tuple[float, Any] | None = None
    for layers in range(2, 49):
        for width in range(128, 4097, 128):
            hidden = 256 * round(width * 8 / 3 / 256)
            size = 2 * _TOKENS * width + layers * (4 * width**2 + 3 * width * hidden)
            # As deep as models of this size are: some 100 to 130 of width a layer.
            miss = abs(size / parameters - 1) + 0.001 * abs(width / layers - 100)
            if best is None or miss < best[0]:
                best = miss, (layers, width, hidden)
    assert best is not None
    layers, width, hidden = best[1]
    heads = width // (128 if width >= 2048 else 64)
    return LlamaConfig(
        vocab_size=_TOKENS,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=16384,
    )


def _leaves(model: Any) -> list[Any]:
    from bytelm_jax.inference.compiled import split_cached

    return split_cached(model)[1]


def _median(call: Callable[[], None], repeats: int) -> float:
    """Seconds of a call, the median of several after one that compiles."""
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
