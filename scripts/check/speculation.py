"""Speculation against plain generation, in both packages: the same bytes, the same distribution.

    python scripts/check/speculation.py --package jax --dtype float64
    python scripts/check/speculation.py --package torch --dtype float32 --models blt megabyte
    python scripts/check/speculation.py --package jax --dtype bfloat16 --models lfbyte
    python scripts/check/speculation.py --package jax --utf8 1000000

Tiny models with random weights, one JSON line each: every draft, greedy and sampled, with and
without stop texts and valid UTF-8, for prompts of every length from 0 to 4P in one ragged batch.
"equal" counts the texts that are those of plain cached generation, "uncached" those of full passes.
In bfloat16 programs of different shapes round differently: texts that part are counted, with the
largest gap between the logits, in float32, of the two bytes at which they part.

"chi2" is the least p-value, over the drafts, of the second byte after each of the two most frequent
first ones against the model's own probabilities. `--utf8 N` samples that many bytes under
`valid_utf8` and decodes them strictly. The status is 1 if a line fails. From a checkout:
PYTHONPATH=$PWD.
"""

import argparse
import itertools
import json
import sys
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
import torch
from scipy.stats import chisquare

from bytelm.config import ModelConfig
from bytelm.generation.draft_table import build_table
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference import generate as jax_generation
from bytelm_jax.models import define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.tests.test_extend import random_params
from bytelm_torch.inference import generate as torch_generation
from parity_tests.blocks import MODELS, TEXT

NEW = 12
GREEDY, SAMPLED = SamplerConfig(sampler="greedy"), SamplerConfig(temperature=0.9)
TABLE = build_table([TEXT * 20], slots=1 << 8)
LEAST_P = 0.01


def build(config: ModelConfig, package: str, dtype: str) -> tuple[Any, Any]:
    """A model of the package in that dtype, and a function from ids to its logits."""
    with jax.enable_x64(True):
        params = random_params(config)
        if package == "jax":
            model = define_model(config)[0]({k: v.astype(dtype) for k, v in params.items()})
            return model, lambda ids: np.asarray(model(ids), np.float64)
        twin = make_twin(config, params).to(getattr(torch, dtype))
        return twin, lambda ids: twin(torch.from_numpy(ids)).detach().double().numpy()


def check(name: str, package: str, dtype: str) -> dict[str, Any]:
    """One line about one model."""
    config, began = MODELS[name], time.perf_counter()
    generation = jax_generation if package == "jax" else torch_generation
    model, logits = build(config, package, dtype)
    drafts: dict[str, Any] = {"ngram": "ngram", "table": TABLE, "model": model}
    if hasattr(model, "draft"):
        drafts["self"] = "self"
    patch = max(model.round_length, getattr(config, "patch_size", 1))
    prompts = [TEXT[:length] for length in range(4 * min(patch, 4) + 1)]
    row: dict[str, Any] = {"model": name, "package": package, "dtype": dtype, "failed": []}
    equal = total = same = 0
    gaps: list[float] = []
    for sampler, utf8 in itertools.product((GREEDY, SAMPLED), (False, True)):
        options: dict[str, Any] = {"seed": 3, "stop_at_eos": False, "valid_utf8": utf8}
        plain = generation.generate(model, prompts, NEW, sampler, **options)
        full = generation.generate_uncached(model, prompts, NEW, sampler, **options)
        same += sum(a == b for a, b in zip(plain, full, strict=True))
        stops = [plain[0][3:5], plain[-1][7:8]]
        for draft, stop in itertools.product(drafts, ((), stops)):
            expected = generation.generate(model, prompts, NEW, sampler, stop=stop, **options)
            found = generation.generate(
                model, prompts, NEW, sampler, stop=stop, speculate=drafts[draft], **options
            )
            hits = [a == b for a, b in zip(expected, found, strict=True)]
            equal, total = equal + sum(hits), total + len(hits)
            if not all(hits):
                row["failed"].append(f"{draft}, {sampler.sampler}, utf8 {utf8}, stops {bool(stop)}")
                pairs = zip(prompts, expected, found, strict=True)
                gaps += [gap(config, logits, *each) for each in pairs if each[1] != each[2]]
    row |= {"equal": f"{equal} of {total}", "uncached": f"{same} of {4 * len(prompts)}"}
    if gaps:
        row["largest_gap"] = round(max(gaps), 5)
    if dtype != "bfloat16":
        row["chi2"] = round(
            min(chi2(config, generation, model, logits, d) for d in drafts.values()), 4
        )
        row["good"] = not row["failed"] and same == 4 * len(prompts)
        row["good"] = row["good"] and row["chi2"] > LEAST_P / (len(MODELS) * len(drafts))
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def gap(config: ModelConfig, logits: Any, prompt: bytes, first: bytes, second: bytes) -> float:
    """Between the logits of the two bytes at which texts part, after what they share."""
    at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    if at is None:  # a stop text was met in one of them alone, behind an earlier difference
        return 0.0
    ids = np.frombuffer(prompt + first[: at + 1], np.uint8).astype(np.int32)[None]
    row = logits(ids + config.vocab.offset)[0, -1]
    return abs(float(row[first[at] + config.vocab.offset] - row[second[at] + config.vocab.offset]))


def chi2(config: ModelConfig, generation: Any, model: Any, logits: Any, draft: Any) -> float:
    """The least p of the second byte after the most frequent first ones, for sampled rows."""
    sampler, worst = SamplerConfig(temperature=2.0), 1.0
    texts: list[bytes] = []
    for seed in range(8):
        options: dict[str, Any] = {"seed": seed, "stop_at_eos": False, "speculate": draft}
        texts += generation.generate(model, [TEXT[:9]] * 256, 2, sampler, **options)
    for byte, count in Counter(text[0] for text in texts).most_common(2):
        ids = np.frombuffer(TEXT[:9] + bytes([byte, 0]), np.uint8).astype(np.int32)[None]
        offset = config.vocab.offset
        row = logits(ids + offset)[0, -1, offset : offset + 256] / sampler.temperature
        shares = np.exp(row - row.max())
        shares /= shares.sum()
        seen = np.bincount([text[1] for text in texts if text[0] == byte], minlength=256)
        # Bins of at least 5 expected texts, as the test needs: unlikely bytes share one.
        order = np.argsort(shares)
        bins = np.minimum(np.cumsum(shares[order]) * count // 5, 255).astype(int)
        expected = np.bincount(bins, shares[order] * count)
        observed = np.bincount(bins, seen[order], len(expected))
        keep = expected >= 5
        expected = np.append(expected[keep], expected[~keep].sum())
        observed = np.append(observed[keep], observed[~keep].sum())
        if expected[-1] < 5:
            expected, observed = (np.append(x[:-2], x[-2:].sum()) for x in (expected, observed))
        if len(expected) > 1:
            worst = min(worst, float(chisquare(observed, expected).pvalue))
    return worst


def utf8(package: str, count: int) -> dict[str, Any]:
    """Bytes of an untrained model that decode strictly, in rows of 1,024."""
    generation = jax_generation if package == "jax" else torch_generation
    model, _ = build(MODELS["lfbyte"], package, "float32")
    written, began = 0, time.perf_counter()
    sampler = SamplerConfig(temperature=2.0)
    for seed in itertools.count():
        options: dict[str, Any] = {"seed": seed, "stop_at_eos": False, "valid_utf8": True}
        texts = generation.generate(model, [b""] * 256, 1024, sampler, **options)
        for text in texts:
            text.decode("utf-8")
            written += len(text)
        if written >= count:
            break
    seconds = round(time.perf_counter() - began, 1)
    return {"package": package, "utf8_bytes": written, "good": True, "seconds": seconds}


def main() -> None:
    """Prints one line a model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--package", choices=["jax", "torch"], default="jax")
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16"], default="float64")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--utf8", type=int, metavar="BYTES")
    options = parser.parse_args()
    if options.utf8:
        print(json.dumps(utf8(options.package, options.utf8)), flush=True)
        return
    failed = False
    with jax.enable_x64(options.dtype == "float64"):
        for name in options.models:
            row = check(name, options.package, options.dtype)
            failed |= not row.get("good", True)
            print(json.dumps(row), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
