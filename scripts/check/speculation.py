"""Speculation against plain generation, in both packages: the same bytes, the same distribution.

    python scripts/check/speculation.py --out speculation.jsonl
    python scripts/check/speculation.py --packages torch --dtypes float64 --models blt megabyte
    python scripts/check/speculation.py --summary --out speculation.jsonl
    python scripts/check/speculation.py --packages jax --utf8 1000000

Tiny models with random weights of every architecture, one JSON line for each with a package, dtype
and sampler: every draft, with and without stop texts and valid UTF-8, for prompts of every length
from 0 to 4P (P = 3 where there are no patches), a line's end in them, in one ragged batch. "equal"
counts the texts that are those of plain cached generation, "uncached" those of full passes. "chi2"
is the p-value of the second byte that is sampled under one of the drafts, against the model's own
probabilities.

In bfloat16 programs of different shapes round differently. There "equal" is counted only, "gap" is
the largest distance between two bytes at which texts part, in units of what bfloat16 itself moves
the logits (or the cumulated probabilities) at that place, and "neighbours" counts the texts that
one program writes again beside other prompts.

PyTorch is checked with both samplers in every dtype, JAX, which compiles each program, with sampled
bytes in float32 and greedy ones in float64 and bfloat16, unless `--samplers` says otherwise. With
`--out FILE` lines are appended to it, and what it holds already is skipped, so that a run goes on
where it ended. `--utf8 N` samples that many bytes under `valid_utf8` and decodes them strictly.
The status is 1 if a line fails. From a checkout: PYTHONPATH=$PWD.
"""

import argparse
import itertools
import json
import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__" and os.environ.get("JAX_PLATFORMS") == "cpu":
    # Most of the time goes into compiling. XLA's own passes are those of every run; LLVM's are not.
    cheap = (
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
        "--xla_cpu_parallel_codegen_split_count=1"
    )
    if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
        cheap += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{cheap} {os.environ.get('XLA_FLAGS', '')}"

import jax
import numpy as np
import torch
from scipy.stats import chisquare

from bytelm.generation.draft_table import build_table
from bytelm.sampling import SamplerConfig
from bytelm_jax.inference import generate as jax_generation
from bytelm_jax.inference.sampling import random_uniforms as jax_uniforms
from bytelm_jax.models import define_model
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.tests.test_extend import random_params
from bytelm_torch.inference import generate as torch_generation
from bytelm_torch.inference.sampling import random_uniforms as torch_uniforms
from parity_tests.blocks import MODELS, TEXT

NEW, SEED = 12, 3
SAMPLERS = {"greedy": SamplerConfig(sampler="greedy"), "sampled": SamplerConfig(temperature=0.9)}
TABLE = build_table([TEXT * 20], slots=1 << 8)
USUAL = {"float32": ["sampled"], "float64": ["greedy"], "bfloat16": ["greedy"]}
"""The samplers of JAX, which compiles each of them anew."""
KEY = ("package", "dtype", "model", "sampler")
LEAST_P = 0.01 / (2 * 2 * len(MODELS))
MOST_GAP = 4.0
"""Bytes that bfloat16 parts and that lie further apart than so many of its errors are no tie."""


class Case:
    """A model of one package, and what its texts are checked with."""

    def __init__(self, name: str, package: str, dtype: str, sampler: str) -> None:
        self.config, self.dtype = MODELS[name], dtype
        self.package, self.sampler = package, SAMPLERS[sampler]
        with jax.enable_x64(True):
            params = random_params(self.config)
            self.twin = make_twin(self.config, params).to(getattr(torch, dtype))
            if package == "jax":
                params = {k: v.astype(dtype) for k, v in params.items()}
                self.model: Any = define_model(self.config)[0](params)
            else:
                self.model = self.twin
            self.exact = self.twin
            if dtype == "bfloat16":
                self.exact = make_twin(self.config, random_params(self.config))
                self.exact.load_state_dict(self.twin.state_dict())  # the rounded weights
        self.generation: Any = jax_generation if package == "jax" else torch_generation
        self.drafts: dict[str, Any] = {"ngram": "ngram", "table": TABLE, "model": self.model}
        if hasattr(self.model, "draft"):
            self.drafts["self"] = "self"
        patch = max(self.model.round_length, getattr(self.config, "patch_size", 3))
        text = TEXT[TEXT.index(b"\n") - 5 :]  # where models that reset do so
        self.prompts = [text[:length] for length in range(4 * min(patch, 4) + 1)]

    def texts(self, prompts: list[bytes] | None = None, **options: Any) -> list[bytes]:
        """What is written after the prompts."""
        options = {"seed": SEED, "stop_at_eos": False} | options
        prompts = self.prompts if prompts is None else prompts
        return self.generation.generate(self.model, prompts, NEW, self.sampler, **options)

    def logits(self, text: bytes, model: Any) -> np.ndarray:
        """float64[256]: those of the byte after `text`, by one pass of a torch model."""
        ids = np.frombuffer(text + b"\0", np.uint8).astype(np.int64)[None]
        offset = self.config.vocab.offset
        with torch.no_grad():
            row = model(torch.from_numpy(ids + offset))[0, -1]
        return row.double().numpy()[offset : offset + 256]


def check(name: str, package: str, dtype: str, sampler: str) -> dict[str, Any]:
    """One line about one model."""
    began = time.perf_counter()
    case = Case(name, package, dtype, sampler)
    row: dict[str, Any] = dict(zip(KEY, (package, dtype, name, sampler), strict=True))
    row |= _in_bfloat16(case) if dtype == "bfloat16" else _exactly(case)
    if dtype != "bfloat16" and sampler == "sampled":
        drafts = list(case.drafts)
        row["chi2_of"] = drafts[list(MODELS).index(name) % len(drafts)]
        row["chi2"] = round(chi2(case, case.drafts[row["chi2_of"]]), 4)
        row["good"] = row["good"] and row["chi2"] > LEAST_P
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def _exactly(case: Case) -> dict[str, Any]:
    equal = total = same = 0
    failed: list[str] = []
    for valid_utf8 in (False, True):
        plain = case.texts(valid_utf8=valid_utf8)
        options: dict[str, Any] = {"seed": SEED, "stop_at_eos": False, "valid_utf8": valid_utf8}
        full = case.generation.generate_uncached(
            case.model, case.prompts, NEW, case.sampler, **options
        )
        same += sum(a == b for a, b in zip(plain, full, strict=True))
        for stop in ((), [plain[0][3:5], plain[-1][7:8]]):
            expected = case.texts(valid_utf8=valid_utf8, stop=stop) if stop else plain
            for draft, speculate in case.drafts.items():
                found = case.texts(valid_utf8=valid_utf8, stop=stop, speculate=speculate)
                hits = sum(a == b for a, b in zip(expected, found, strict=True))
                equal, total = equal + hits, total + len(found)
                if hits != len(found):
                    failed.append(f"{draft}, utf8 {valid_utf8}, stops {bool(stop)}")
    texts = 2 * len(case.prompts)
    good = equal == total and same == texts
    return {
        "equal": equal,
        "texts": total,
        "uncached": same,
        "uncached_texts": texts,
        "failed": failed,
        "good": good,
    }


def _in_bfloat16(case: Case) -> dict[str, Any]:
    plain = case.texts()
    # Every second prompt is another one: what stands beside them is to be written as before.
    others = [b"(" + p[1:] if i % 2 and p else p for i, p in enumerate(case.prompts)]
    equal = total = same = beside = 0
    gaps: list[float] = []
    for speculate in (None, *case.drafts.values()):
        found = plain if speculate is None else case.texts(speculate=speculate)
        again = case.texts(others, speculate=speculate)
        same += sum(a == b for a, b in zip(found[::2], again[::2], strict=True))
        beside += len(found[::2])
        if speculate is not None:
            equal += sum(a == b for a, b in zip(plain, found, strict=True))
            total += len(found)
            gaps += [
                gap(case, i, *pair)
                for i, pair in enumerate(zip(plain, found, strict=True))
                if pair[0] != pair[1]
            ]
    return {
        "equal": equal,
        "texts": total,
        "gap": round(max(gaps, default=0.0), 2),
        "neighbours": same,
        "neighbours_texts": beside,
        "good": same == beside and max(gaps, default=0.0) <= MOST_GAP,
    }


def gap(case: Case, row: int, first: bytes, second: bytes) -> float:
    """How far apart two bytes lie at which texts part, in units of bfloat16's own error there."""
    at = next(i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b)
    text, sampler = case.prompts[row] + first[:at], case.sampler
    both = case.logits(text, case.exact), case.logits(text, case.twin)
    if sampler.sampler == "greedy":
        return distance(*both, (first[at], second[at]))
    position, rows = len(text), len(case.prompts)
    numbers = (
        np.asarray(jax_uniforms("plain", SEED, rows, position + 1))
        if case.package == "jax"
        else torch_uniforms(SEED, rows, position + 1).numpy()
    )
    uniform = float(numbers[row, position])
    return distance(*both, (first[at], second[at]), sampler.temperature, uniform)


def distance(
    exact: np.ndarray,
    rounded: np.ndarray,
    pair: tuple[int, int],
    temperature: float = 0.0,
    uniform: float = 0.0,
) -> float:
    """How far from a tie two bytes are, in units of the largest error of the rounded logits [256].

    Greedy: the difference of their logits. Sampled: how much further the random number would have
    to lie for the byte that is further from it, in units of the cumulated probabilities' error.
    """
    if temperature == 0:
        apart = abs(exact[pair[0]] - exact[pair[1]])
    else:
        exact, rounded = (np.exp((x - x.max()) / temperature).cumsum() for x in (exact, rounded))
        exact, rounded = exact / exact[-1], rounded / rounded[-1]
        lower = np.append(0.0, exact)
        apart = max(max(lower[x] - uniform, uniform - exact[x], 0.0) for x in pair)
    return float(apart / max(np.abs(exact - rounded).max(), 1e-12))


def chi2(case: Case, speculate: Any) -> float:
    """The p-value of the second byte after a prompt, whatever the first one was."""
    sampler, prompt = SamplerConfig(temperature=2.0), case.prompts[-1]
    seen = np.zeros(256)
    options: dict[str, Any] = {"stop_at_eos": False, "speculate": speculate}
    for seed in range(24):
        texts = case.generation.generate(
            case.model, [prompt] * 32, 2, sampler, seed=seed, **options
        )
        seen += np.bincount([text[1] for text in texts], minlength=256)
    offset = case.config.vocab.offset
    after = np.array([[*prompt, byte, 0] for byte in range(256)]) + offset
    with torch.no_grad():
        logits = case.twin(torch.from_numpy(after))[:, len(prompt) :, offset : offset + 256]
    chances = (logits.double() / sampler.temperature).softmax(dim=-1).numpy()
    shares = chances[0, 0] @ chances[:, 1]
    # Bins of at least 5 expected texts, as the test needs: unlikely bytes share one.
    order = np.argsort(shares)
    bins = np.minimum(np.cumsum(shares[order]) * seen.sum() // 6, 255).astype(int)
    expected = np.bincount(bins, shares[order] * seen.sum())
    observed = np.bincount(bins, seen[order], len(expected))
    keep = expected >= 5
    expected = np.append(expected[keep], expected[~keep].sum())
    observed = np.append(observed[keep], observed[~keep].sum())
    if expected[-1] < 5:
        expected, observed = (np.append(x[:-2], x[-2:].sum()) for x in (expected, observed))
    return float(chisquare(observed, expected * (observed.sum() / expected.sum())).pvalue)


def utf8(package: str, count: int) -> dict[str, Any]:
    """Bytes of an untrained model that decode strictly, in rows of 1,024."""
    case = Case("lfbyte", package, "float32", "sampled")
    written, began = 0, time.perf_counter()
    sampler = SamplerConfig(temperature=2.0)
    for seed in itertools.count():
        options: dict[str, Any] = {"seed": seed, "stop_at_eos": False, "valid_utf8": True}
        texts = case.generation.generate(case.model, [b""] * 256, 1024, sampler, **options)
        for text in texts:
            text.decode("utf-8")
            written += len(text)
        if written >= count:
            break
    seconds = round(time.perf_counter() - began, 1)
    return {"package": package, "utf8_bytes": written, "good": True, "seconds": seconds}


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of a run's lines: one row a package, dtype and sampler."""
    head = ["package", "dtype", "sampler", "models", "texts", "equal", "uncached", "least p", "gap"]
    lines = [head, ["---"] * len(head)]
    kinds = list(dict.fromkeys((r["package"], r["dtype"], r["sampler"]) for r in rows))
    for kind in kinds:
        part = [r for r in rows if (r["package"], r["dtype"], r["sampler"]) == kind]
        total = {key: sum(r.get(key, 0) for r in part) for key in ("texts", "equal")}
        full = [sum(r.get(key, 0) for r in part) for key in ("uncached", "uncached_texts")]
        p, gaps = (
            [r["chi2"] for r in part if "chi2" in r],
            [r["gap"] for r in part if "gap" in r],
        )
        lines.append([
            *kind, str(len(part)), f"{total['texts']:,}", f"{total['equal']:,}",
            f"{full[0]:,} of {full[1]:,}" if full[1] else "–",
            str(min(p)) if p else "–", str(max(gaps)) if gaps else "–",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Prints one line a model, package, dtype and sampler."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packages", nargs="+", choices=["jax", "torch"], default=["torch", "jax"])
    known = ["float32", "float64", "bfloat16"]
    parser.add_argument("--dtypes", nargs="+", choices=known, default=known)
    parser.add_argument("--samplers", nargs="+", choices=list(SAMPLERS), help="default: see above")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--out", type=Path, metavar="FILE", help="append here, skip what it holds")
    parser.add_argument("--summary", action="store_true", help="print the table of --out alone")
    parser.add_argument("--utf8", type=int, metavar="BYTES")
    options = parser.parse_args()
    if options.utf8:
        for package in options.packages:
            print(json.dumps(utf8(package, options.utf8)), flush=True)
        return
    done: list[dict[str, Any]] = []
    if options.out and options.out.exists():
        done = [json.loads(line) for line in options.out.read_text("utf-8").splitlines()]
    if options.summary:
        print(summary(done))
        sys.exit(not all(row["good"] for row in done))
    torch.set_num_threads(1)
    held = {tuple(row[key] for key in KEY) for row in done}
    failed = False
    asked = itertools.product(options.packages, options.dtypes, SAMPLERS, options.models)
    for package, dtype, sampler, name in asked:
        usual = options.samplers or (USUAL[dtype] if package == "jax" else list(SAMPLERS))
        if sampler not in usual or (package, dtype, name, sampler) in held:
            continue
        with jax.enable_x64(dtype == "float64"):
            row = check(name, package, dtype, sampler)
        jax.clear_caches()
        failed |= not row["good"]
        print(json.dumps(row), flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as sink:
                sink.write(json.dumps(row) + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
