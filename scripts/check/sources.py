"""Twenty steps from weights of six sources: the same losses and parameters in JAX and in torch.

    python scripts/check/sources.py

The sources are a run folder of each package, an export, the folder that transformers saves of the
twin, a checkpoint of the PyTorch MEGABYTE code, and a folder of transformers' `BltForCausalLM`. The
torch trainer reads the last two, and the run folder of JAX, by way of `bytelm import` and `export`.
Prints a line each with the largest relative differences; ends with status 1 if one is larger than
the bounds of the tolerance table.
"""

import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import torch

import bytelm_torch
import bytelm_torch.hf
import bytelm_torch.train
from bytelm import tolerances
from bytelm.metrics import read_metrics
from bytelm_jax.cli import main as cli
from parity_tests.test_blt_transformers import reference
from parity_tests.test_import_megabyte import original

STEPS = 20
TINY = "--patch-size 4 --global-dim 16 --local-dim 16 --global-layers 1 --local-layers 1"
TINY += " --global-heads 2 --local-heads 2 --max-length 32"
OPTIONS = "--sequence-length 16 --batch-size 4 --devices 1 --compute-dtype float32 --log-every 1"
OPTIONS += " --eval-every 0 --checkpoint-every 0 --warmup-steps 2 --learning-rate 1e-3"


def quietly(command, *argv: str) -> None:
    """Runs a command of ours, which must succeed; its words are shown only if it does not."""
    with tempfile.TemporaryFile("w+") as said:
        with redirect_stdout(said), redirect_stderr(said):
            status = command(list(argv))
        if status:
            said.seek(0)
            sys.exit(f"{' '.join(argv)}: status {status}\n{said.read()}")


def make_sources(folder: Path, text: Path) -> dict[str, tuple[str, Path, Path]]:
    """Name → recipe, what JAX reads, and what torch reads."""
    made = {name: folder / name for name in ("jax", "torch", "export", "twin", "blt")}
    few = ["megabyte_tiny", *TINY.split(), *OPTIONS.split(), "--steps", "3", "--data", str(text)]
    quietly(cli.main, "train", *few, "--run-dir", str(made["jax"]))
    quietly(bytelm_torch.train.main, *few, "--run-dir", str(made["torch"]))
    quietly(cli.main, "export", str(made["jax"]), "--out", str(made["export"]))
    twin = bytelm_torch.hf.from_native(bytelm_torch.from_pretrained(made["torch"]))
    twin.save_pretrained(made["twin"])
    checkpoint = folder / "megabyte.pt"
    torch.save(original(dtype=torch.float32).state_dict(), checkpoint)
    reference("plain").float().save_pretrained(made["blt"])
    sources = {
        "run folder of JAX": ("megabyte_tiny", made["jax"], made["export"]),
        "run folder of torch": ("megabyte_tiny", made["torch"], made["torch"]),
        "export": ("megabyte_tiny", made["export"], made["export"]),
        "transformers' folder of the twin": ("megabyte_tiny", made["twin"], made["twin"]),
    }
    for name, recipe, source in (
        ("checkpoint of MEGABYTE", "megabyte_tiny", checkpoint),
        ("transformers' BLT folder", "blt_tiny", made["blt"]),
    ):
        run, out = folder / f"{source.stem} run", folder / f"{source.stem} export"
        quietly(cli.main, "import", str(source), "--out", str(run))
        quietly(cli.main, "export", str(run), "--out", str(out))
        sources[name] = (recipe, source, out)
    return sources


def compare(recipe: str, ours: Path, theirs: Path, text: Path, folder: Path) -> tuple[float, float]:
    """The largest relative differences of a loss and of a parameter's tensor."""
    options = [*OPTIONS.split(), "--steps", str(STEPS), "--data", str(text)]
    runs = folder / "jax", folder / "torch"
    for command, source, run in (
        (lambda argv: cli.main(["train", *argv]), ours, runs[0]),
        (bytelm_torch.train.main, theirs, runs[1]),
    ):
        quietly(command, recipe, "--init-from", str(source), *options, "--run-dir", str(run))
    quietly(cli.main, "export", str(runs[0]), "--out", str(folder / "out"))
    losses = [
        [r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r] for run in runs
    ]
    assert len(losses[0]) == len(losses[1]) == STEPS
    loss = max(abs(a - b) / b for a, b in zip(*losses, strict=True))
    states = [
        bytelm_torch.from_pretrained(place).state_dict() for place in (folder / "out", runs[1])
    ]
    errors = [
        float((states[0][name] - value).norm() / value.norm().clip(1e-30))
        for name, value in states[1].items()
    ]
    return loss, max(errors)


def main() -> int:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    bound, worst = tolerances.DEVICES_AFTER_5_STEPS, 0.0
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text"
        source = np.random.default_rng(0)
        words = [bytes(source.integers(97, 123, 5, np.uint8)) for _ in range(64)]
        text.write_bytes(b" ".join(words[i] for i in source.integers(0, 64, 4000)))
        for index, (name, parts) in enumerate(make_sources(Path(work), text).items()):
            place = Path(work) / f"compared {index}"
            loss, parameters = compare(*parts, text, place)
            print(
                f"{name}: {STEPS} steps, loss {loss:.1e}, parameters {parameters:.1e}", flush=True
            )
            worst = max(worst, loss, parameters)
    print(f"largest {worst:.1e}, bound {bound:.0e}")
    return int(worst > bound)


if __name__ == "__main__":
    sys.exit(main())
