"""lm-evaluation-harness itself, on a tiny task of local files, against the models' own figures.

    python scripts/check/lm_eval.py [--python PATH] [--only NAME …] [--keep DIR]

Makes an environment with lm_eval, torch, transformers and what bytelm needs, unless PATH is the
interpreter of one; bytelm itself is not installed there. For each architecture it writes a run
folder, an export and a folder of `--format hf` with random weights, and scores them by
`bytelm lm-eval`, `python -m bytelm_torch.lm_eval` and, where bytelm cannot be imported,
`lm_eval --model hf`. Every log-likelihood is compared with one of a pass without padding (relative
1e-5), with contexts below, at and above the window, as are rolling log-likelihoods, bits per byte,
and greedy answers. One line a run; exit code 1 if any fails.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VERSION = "lm_eval==0.4.13"
WINDOW, NEW, BOUND = 32, 8, 1e-5
TEXT = "the café and naïve 日本語 characters 🙂 of everyone everywhere" * 4
SIZES = (1, 5, WINDOW - 5, WINDOW - 4, WINDOW - 3, 60)
"""Characters of the contexts; the answers have four bytes."""
TASKS = {
    "mine_pairs": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "mine_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    "mine_answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\u0001"], "max_gen_toks": NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def models() -> dict[str, Any]:
    """Every architecture, small; a window fits into each."""
    from bytelm import recipes
    from parity_tests.tiny_models import CONFIGS

    found = {name: config for name, config in CONFIGS.items() if config.causal}
    found["transformer"] = replace(recipes.get("transformer_tiny").model, global_layers=1)
    smaller = {"local_dim": 16, "global_dim": 32, "global_layers": 1, "decoder_layers": 1}
    smaller |= {f"{part}_hidden_dim": 16 for part in ("encoder", "decoder", "global")}
    found["bytropix"] = replace(recipes.get("bytropix_tiny").model, ngram_rows=101, **smaller)
    return found


def write_tasks(place: Path) -> list[dict[str, str]]:
    """The tasks' files; their documents."""
    plain = TEXT.replace(" ", "_")
    rows = [
        {"context": plain[:n], "answer": "abcd", "text": plain[: 2 * n + 1].replace("_", " ")}
        for n in SIZES
    ]
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name, task in TASKS.items():
        files = {"test": str(place / "data.jsonl")}
        whole = {"task": name, "dataset_path": "json", "test_split": "test", **task}
        whole["dataset_kwargs"] = {"data_files": files}
        (place / f"{name}.yaml").write_text(json.dumps(whole), "utf-8")  # JSON is YAML
    return rows


def write_model(name: str, config: Any, place: Path) -> Any:
    """A run, an export and a folder for transformers of random weights; the torch twin."""
    import bytelm_torch
    from bytelm.config import Recipe
    from bytelm.model_card import model_card
    from bytelm_jax.interop import convert, hf_folder
    from bytelm_jax.training import checkpoint
    from parity_tests.twins import random_params

    recipe, params = Recipe(name=name, model=config), random_params(config, "float32")
    checkpoint.create_run(place / "run", recipe, params)
    convert.export_model(config, params, place / "export")
    hf_folder.export_hf(config, params, place / "hf", partial(model_card, recipe, 0, "mit", []))
    return bytelm_torch.from_pretrained(place / "export")


def score(model: Any, ids: list[int], counted: int) -> tuple[float, bool]:
    """The last `counted` of `ids` in one pass: log-likelihood, and whether all are most likely."""
    import torch

    row = torch.tensor([ids])
    with torch.inference_mode():
        chances = model(row)[0].double().log_softmax(dim=-1)[-counted:]
    value = chances.gather(1, row[0, -counted:, None]).sum()
    return float(value), bool((chances.argmax(dim=-1) == row[0, -counted:]).all())


def expected(model: Any, rows: list[dict[str, str]], prefix: bool) -> dict[str, list[Any]]:
    """What each task's samples should hold; `prefix`: with BOS before a text, as `--model hf`."""
    import bytelm_torch
    from bytelm.harness import windows
    from bytelm.sampling import SamplerConfig

    vocab = model.config.vocab
    found: dict[str, list[Any]] = {name: [] for name in TASKS}
    greedy = SamplerConfig(temperature=0.0)
    for row in rows:
        ids = [byte + vocab.offset for byte in (row["context"] + row["answer"]).encode()]
        found["mine_pairs"].append(score(model, ids[-WINDOW:], 4))
        text = [byte + vocab.offset for byte in row["text"].encode()]
        text = [vocab.bos_id, *text] if prefix else text
        parts = [
            score(model, text[begin:end], end - first)[0]
            for begin, first, end in windows(len(text), int(prefix), WINDOW)
        ]
        found["mine_rolling"].append((math.fsum(parts), len(row["text"].encode())))
        # `--model hf` counts one id less, for that which `forward` appends.
        room = WINDOW - NEW - int(prefix)
        made = bytelm_torch.generate(model, [row["context"].encode()[-room:]], NEW, greedy)[0]
        found["mine_answers"].append(made.split(b"\x01")[0].decode("utf-8", "replace"))
    return found


def close(a: float, b: float) -> float:
    return abs(a - b) / abs(b)


def compare(out: Path, want: dict[str, list[Any]]) -> str:
    """One line on the largest difference; raises what is wrong."""
    worst = 0.0
    for name, answers in want.items():
        (file,) = out.rglob(f"samples_{name}_*.jsonl")
        samples = sorted(
            map(json.loads, file.read_text("utf-8").splitlines()), key=lambda s: s["doc_id"]
        )
        assert len(samples) == len(answers), f"{name}: {len(samples)} samples"
        for sample, answer in zip(samples, answers, strict=True):
            got = sample["resps"][0][0]
            if name == "mine_answers":
                assert got == answer, f"{name}: {got!r}, not {answer!r}"
                continue
            value, other = got if isinstance(got, list) else (got, None)
            worst = max(worst, close(float(value), answer[0]))
            assert worst <= BOUND, f"{name}, {sample['doc_id']}: {value}, not {answer[0]}"
            if name == "mine_pairs":
                assert str(other) == str(answer[1]), f"{name}: greedy {other}"
    (results,) = out.rglob("results_*.json")
    bits = json.loads(results.read_text("utf-8"))["results"]["mine_rolling"]["bits_per_byte,none"]
    sums = [math.fsum(each) for each in zip(*want["mine_rolling"], strict=True)]
    error = close(bits, -sums[0] / math.log(2) / sums[1])
    assert error <= BOUND, f"bits per byte: {bits}"
    return f"log-likelihoods within {worst:.1e}, {bits:.4f} bits per byte within {error:.1e}"


def environment(place: Path) -> Path:
    """The interpreter of a new environment; bytelm is not in it."""
    home = place / "harness"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "-q", home], check=True)
    python = home / "bin" / "python"
    links = os.environ.get("PIP_FIND_LINKS")
    install = [uv, "pip", "install", "-q", "--python", python]
    install += ["--find-links", links] if links else []
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    limits = ["-c", ROOT / "scripts/constraints.txt"]
    subprocess.run(
        [*install, *limits, VERSION, "torch", "transformers", "accelerate", *needs], check=True
    )
    return python


def commands(python: Path, place: Path) -> dict[str, list[str]]:
    """How each of the three is called, but for the harness's own options."""
    window = ["--window", str(WINDOW), "--"]
    hf = f"pretrained={place}/hf,trust_remote_code=True,dtype=float32,max_length={WINDOW - 1}"
    return {
        "jax": [f"{python}", "-m", "bytelm_jax", "lm-eval", f"{place}/run", *window],
        "torch": [f"{python}", "-m", "bytelm_torch.lm_eval", f"{place}/export", *window],
        "hf": [f"{python}", "-P", "-m", "lm_eval", "run", "--model", "hf", "--model_args", hf],
    }


def run(kind: str, command: list[str], tasks: Path, out: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"HF_HOME": f"{tasks}/home", "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    env |= {} if kind == "hf" else {"PYTHONPATH": str(ROOT)}
    options = ["--tasks", ",".join(TASKS), "--include_path", str(tasks), "--batch_size", "4"]
    options += ["--output_path", str(out), "--log_samples"]
    options += ["--device", "cpu"] if kind == "hf" else []
    done = subprocess.run(
        [*command, *options], env=env, cwd=tasks, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-1500:]}")


def check(name: str, python: Path, place: Path, tasks: Path, rows: list[dict[str, str]]) -> int:
    """A line for each way; how many fail."""
    place.mkdir()
    model, bad = write_model(name, models()[name], place), 0
    for kind, command in commands(python, place).items():
        out = place / f"out_{kind}"
        try:
            run(kind, command, tasks, out)
            line = f"good: {compare(out, expected(model, rows, kind == 'hf'))}"
        except Exception as error:
            bad += 1
            line = f"BAD: {type(error).__name__}: {error}"
        print(f"{name}, {kind}: {line}", flush=True)
    return bad


def main() -> int:
    parser = argparse.ArgumentParser(description="Scores tiny models by lm-evaluation-harness.")
    parser.add_argument("--python", type=Path, help="an interpreter with lm_eval, without bytelm")
    parser.add_argument("--only", nargs="*", default=[], help="names of models")
    parser.add_argument("--keep", type=Path, help="where to write everything, which then stays")
    asked = parser.parse_args()
    sys.path[:1] = [str(ROOT)]  # not this folder, whose lm_eval.py is no lm_eval
    with tempfile.TemporaryDirectory(prefix="bytelm-lm-eval-") as temporary:
        place = asked.keep or Path(temporary)
        tasks = place / "tasks"
        tasks.mkdir(parents=True)
        python = (asked.python or environment(place)).absolute()
        alone = [python, "-P", "-c", "import importlib.util as u; print(u.find_spec('bytelm'))"]
        plain = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        found = subprocess.check_output(alone, cwd="/", env=plain, text=True)
        assert found.strip() == "None", "bytelm is installed there"
        rows = write_tasks(tasks)
        names = asked.only or list(models())
        bad = sum(
            check(name, python, place.absolute() / name, tasks.absolute(), rows) for name in names
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
