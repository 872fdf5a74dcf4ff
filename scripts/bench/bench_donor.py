"""How much faster a byte model learns that begins as a token model: from scratch against a donor.

    python scripts/bench/bench_donor.py --train english_train.txt --valid english_valid.txt \\
        --out donor-runs/

1. Makes a donor by `token_model.py`: `--donor-seconds` of training; its bytes, minutes, bits per
   byte.
2. Makes byte models around it (`bytelm import --format llama`).
3. Measures how many bytes a BLT from scratch reads in `--seconds`, and trains every arm on so many,
   over `--seeds`. Arms with alignment spend the first fifth of their bytes on it (`bytelm align`).
4. Trains the two best arms for `--seconds`.

All arms have one architecture, one optimizer and one held-out text; learning rates of the donor's
layers are scaled by `--donor-rate`. Seconds are without compilation, evaluation and saving, and
bytes without the donor's own.

Prints a JSON line as each part ends and keeps it in OUT/lines.jsonl: an arm's line has its curve,
[bytes, seconds, held-out bits per byte]. Parts whose line stands there are not run again. Ends with
the report of `donor_report.py`. `--tiny` has models of a few thousand parameters, to try the script
on a CPU.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from donor_report import SCRATCH, best_arms, print_report, read_lines
from token_model import beginnings, locked

from bytelm.files import replace_file

ARMS: dict[str, list[tuple[str, float]]] = {
    "from scratch": [("scratch", 1.0)],
    "donor": [("all", 1.0)],
    "donor, frozen": [("frozen", 1.0)],
    "donor, frozen then all": [("frozen", 0.5), ("all", 0.5)],
    "aligned": [("align", 0.2), ("all", 0.8)],
    "aligned, frozen": [("align", 0.2), ("frozen", 0.8)],
    "aligned, frozen then all": [("align", 0.2), ("frozen", 0.3), ("all", 0.5)],
}
"""Arm → its stages: what trains, and which share of the arm's bytes or seconds."""

LOCAL: dict[str, Any] = {
    "base": "blt_132m",
    "model": {"ngram_rows": 8000},
    "data": {"sequence_length": 1024},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 50},
    "train": {"batch_size": 32, "devices": 1},
}
TINY_LOCAL: dict[str, Any] = {
    "base": "blt_tiny",
    "model": {
        "patcher": "space", "ngram_rows": 53, "local_dim": 12, "encoder_heads": 2,
        "encoder_hidden_dim": 8, "decoder_layers": 1, "decoder_heads": 2, "decoder_hidden_dim": 8,
    },
    "data": {"sequence_length": 64},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 2},
    "train": {"batch_size": 4, "devices": 1},
}  # fmt: skip
_ALIGNED_BYTES = 3 * 10**7
"""Text, from the beginning of each file, for alignment."""
_POINTS, _HELD_OUT = 12, 256
"""Points of a stage's curve, and windows of held-out text behind each."""
_SETTINGS = ("train", "valid", "tokens", "donor_seconds", "seconds", "donor_rate", "tiny")
"""What all lines of a file have in common."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--donor-seconds", type=float, default=300.0)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--donor-rate", type=float, default=0.25)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    with locked(asked.out, waits=False):
        lines = Lines(asked.out / "lines.jsonl")
        settings = json.loads(
            json.dumps({name: getattr(asked, name) for name in _SETTINGS}, default=str)
        )
        lines.once("settings", lambda: {"settings": settings})
        if lines["settings"]["settings"] != settings:
            held = lines["settings"]["settings"]
            parser.error(f"{asked.out}: holds runs with {held}; name another folder")
        lines.once("donor", lambda: make_donor(asked))
        run_arms(asked, lines)
    print_report(lines)


def run_arms(asked: argparse.Namespace, lines: "Lines") -> None:
    """Every arm on equal bytes, and the two best for equal seconds."""
    arms = Arms(asked, lines)
    lines.once("pace", arms.pace)
    for seed in asked.seeds:
        for arm in asked.arms:
            lines.once(f"{arm}, seed {seed}", partial(arms.counted, arm, seed))
    for arm in best_arms(lines, asked.arms, asked.seeds)[:2]:
        for seed in asked.seeds:
            lines.once(f"{arm}, equal seconds, seed {seed}", partial(arms.timed, arm, seed))


class Lines(dict[str, dict[str, Any]]):
    """The parts that have ended, by name, as a file of JSON lines holds them."""

    def __init__(self, file: Path) -> None:
        super().__init__(read_lines(file) if file.exists() else {})
        self._file = file

    def once(self, part: str, run: Callable[[], dict[str, Any]]) -> None:
        """Runs a part unless it has ended before; prints and keeps its line.

        `wall` is how long it took with all that its seconds leave out.
        """
        if part in self:
            return
        begun = time.monotonic()
        record = {"part": part, **run()}
        self[part] = record | {"wall": round(time.monotonic() - begun, 1)}
        text = "".join(json.dumps(each) + "\n" for each in self.values())
        replace_file(self._file, text.encode())
        print(json.dumps(self[part]), flush=True)


def make_donor(asked: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own, since PyTorch keeps the GPU's memory that it took."""
    out = asked.out / "donor"
    command = [sys.executable, str(Path(__file__).with_name("token_model.py"))]
    command += ["--train", *map(str, asked.train), "--valid", str(asked.valid), "--out", str(out)]
    command += ["--tokens", str(asked.tokens), "--seconds", str(asked.donor_seconds)]
    subprocess.run([*command, "--tiny"] if asked.tiny else command, check=True)
    return json.loads((out / "measured.json").read_text())


# ---- the arms -------------------------------------------------------------------------------


class Stage(NamedTuple):
    """Part of an arm: what trains, from what, for how many steps or seconds."""

    kind: str
    seed: int
    start: Any
    steps: int
    seconds: float


class Arms:
    """Byte models around the donor, trained in stages."""

    def __init__(self, asked: argparse.Namespace, lines: Lines) -> None:
        import jax

        from bytelm.alignment import open_aligned
        from bytelm.recipe_files import find_recipe
        from bytelm_jax.cli import main as cli
        from bytelm_jax.training import checkpoint

        # A restart, and each stage of alignment, finds its programs there.
        cached = str((asked.out / "programs").absolute())
        jax.config.update("jax_compilation_cache_dir", cached)
        self.asked, self.out, self.lines = asked, asked.out, lines
        local = asked.out / "local.json"
        local.write_text(json.dumps(TINY_LOCAL if asked.tiny else LOCAL))
        tokens, donor = asked.out / "train.tokens", str(asked.out / "donor")
        if not tokens.exists():
            text = asked.out / "aligned.txt"
            text.write_bytes(beginnings(asked.train, _ALIGNED_BYTES))
            assert cli.main(["align-data", donor, "--data", str(text), "--out", str(tokens)]) == 0
        for left in self.out.glob(".imported-*"):  # by an import that was killed
            shutil.rmtree(left)
        for seed in asked.seeds:
            run = self.out / f"imported-{seed}"
            command = ["import", donor, "--local", str(local), "--seed", str(seed)]
            assert run.exists() or cli.main([*command, "--out", str(run)]) == 0
        self.tokens = open_aligned(tokens)
        self.imported = cache(lambda seed: checkpoint.load_run(self.out / f"imported-{seed}"))
        recipe, paths = find_recipe(str(local)), tuple(str(path) for path in asked.train)
        data = replace(recipe.data, paths=paths, valid=(str(asked.valid),))
        self.recipe = replace(recipe, model=self.imported(asked.seeds[0])[0].model, data=data)
        self._trainers: dict[str, Any] = {}
        self._alignments: dict[tuple[int, int], Any] = {}  # the last one
        lines.once("machine", self.machine)

    def machine(self) -> dict[str, Any]:
        from equal_time import machine

        model = self.recipe.model
        sizes = {"parameters": model.parameter_count(), "batch": self.recipe.train.batch_size}
        return machine() | sizes | {"length": self.recipe.data.sequence_length}

    def pace(self) -> dict[str, Any]:
        """How many steps a BLT from scratch takes in `--seconds`, from a part of them."""
        trainer = self._trainer(Stage("scratch", self.asked.seeds[0], None, 0, 0.0))
        run = trainer.begin(self.asked.seeds[0])
        run.advance(lambda used, count: 0.0, 1.0, sys.maxsize)  # pipelines fill, files are cached
        steps, used = run.count, run.used
        run.advance(lambda used, count: 0.0, 1.0 + self.asked.seconds / 4, sys.maxsize)
        steps, used = run.count - steps, run.used - used
        return {"steps": round(self.asked.seconds * steps / used), "steps_per_second": steps / used}

    def counted(self, arm: str, seed: int) -> dict[str, Any]:
        """An arm on as many bytes as a BLT from scratch reads in `--seconds`."""
        count = self.lines["pace"]["steps"]
        return self._run(arm, seed, lambda kind, share: (max(2, round(share * count)), 0.0))

    def timed(self, arm: str, seed: int) -> dict[str, Any]:
        """An arm for `--seconds`; alignment takes the steps that fit, by its speed in `counted`."""

        def amount(kind: str, share: float) -> tuple[int, float]:
            seconds = share * self.asked.seconds
            if kind != "align":
                return 0, seconds
            lines = [self.lines[f"{arm}, seed {each}"] for each in self.asked.seeds]
            measured = [stage for line in lines for stage in line["stages"] if stage[0] == kind]
            steps, used = totals(measured)
            return max(2, round(seconds * steps / used)), 0.0  # of one program, by all seeds' speed

        return self._run(arm, seed, amount)

    def _run(
        self, arm: str, seed: int, amount: Callable[[str, float], tuple[int, float]]
    ) -> dict[str, Any]:
        params: Any = None if arm == SCRATCH else self.imported(seed)[1]
        curve, stages = list[list[float]](), list[tuple[str, int, float]]()
        size = self.recipe.train.batch_size * self.recipe.data.sequence_length
        for kind, share in ARMS[arm]:
            stage = Stage(kind, seed, params, *amount(kind, share))
            steps, seconds = totals(stages)
            run = self._aligned if kind == "align" else self._trained
            params, count, used, points = run(stage)
            curve += [[(steps + c) * size, seconds + s, bits] for c, s, bits in points]
            stages.append((kind, count, used))
        steps, seconds = totals(stages)
        bits = curve[-1][2]
        return {"steps": steps, "seconds": seconds, "bits": bits, "stages": stages, "curve": curve}

    def _aligned(self, stage: Stage) -> Any:
        """Once for all arms with as many steps. The first one, which compiles, is not timed."""
        from bytelm.alignment import stage_recipe
        from bytelm.metrics import read_metrics
        from bytelm_jax.training import alignment, checkpoint

        known = (stage.seed, stage.steps)
        if known not in self._alignments:
            place = self.out / "aligning"
            shutil.rmtree(place, ignore_errors=True)
            recipe = stage_recipe(self.recipe, "", steps=stage.steps, seed=stage.seed + 1)
            run = replace(recipe.train, eval_every=0, checkpoint_every=0, log_every=stage.steps)
            start = partial(copied, stage.start)
            alignment.align(replace(recipe, train=run), self.tokens, place, start)
            records = read_metrics(place / "metrics.jsonl")
            used = next(r["seconds"] for r in records[::-1] if "seconds" in r)
            used *= stage.steps / (stage.steps - 1)
            self._alignments = {known: (checkpoint.load_run(place)[1], stage.steps, used, [])}
        return self._alignments[known]

    def _trained(self, stage: Stage) -> Any:
        trainer = self._trainer(stage)
        if stage.seconds:
            clock, endless = time.monotonic, sys.maxsize  # the text may be read several times
            done = trainer.train(stage.seed, stage.seconds, clock, _POINTS, most_steps=endless)
            size = self.recipe.train.batch_size * self.recipe.data.sequence_length
            points = [(read // size, used, bits) for used, read, bits, _ in done.curve]
            return done.params, done.steps, done.seconds, points
        return trainer.count(stage.seed, stage.steps)

    def _trainer(self, stage: Stage) -> Any:
        """One for each kind of stage, whose programs are compiled once."""
        if stage.kind not in self._trainers:
            scaled = (f"global_transformer.*={self.asked.donor_rate}",)
            changes: dict[str, Any] = {"learning_rate_scale": scaled}
            if stage.kind != "all":
                frozen = ("global_transformer.*",) if stage.kind == "frozen" else ()
                changes = {"freeze": frozen}
            train = replace(self.recipe.train, **changes)
            self._trainers[stage.kind] = trainer_class()(replace(self.recipe, train=train))
        self._trainers[stage.kind].given = stage.start
        return self._trainers[stage.kind]


def copied(params: Any) -> Any:
    """The parameters in memory of their own: steps take over the memory of their state."""
    import jax

    return {name: jax.numpy.array(value) for name, value in params.items()}


def totals(stages: list[tuple[str, int, float]]) -> tuple[int, float]:
    """Steps and seconds of stages together."""
    return sum(steps for _, steps, _ in stages), sum(used for _, _, used in stages)


def trainer_class() -> Any:
    """`equal_time.Trainer`, from given parameters, also by a number of steps."""
    import jax
    from equal_time import Trainer, _Run, rate_at

    from bytelm_jax.training import mesh as meshes
    from bytelm_jax.training.step import TrainState

    class FromWeights(Trainer):
        given: Any = None
        _first: Any = None

        def start(self, seed: int) -> Any:
            if self.given is None:
                return super().start(seed)
            if self._first is None:  # tracing it takes seconds, and every run begins with it
                self._first = jax.jit(self._optimizer.init)
            params = copied(self.given)
            state = TrainState(jax.numpy.zeros((), jax.numpy.int32), params, self._first(params))
            return meshes.place(self._mesh, state)

        def begin(self, seed: int) -> Any:
            """A run before its first step."""
            self.compile(seed)
            return _Run(self, seed, time.monotonic)

        def count(self, seed: int, steps: int) -> Any:
            """Trains so many steps; parameters, steps, seconds, [(steps, seconds, bits)]."""
            run, optimizer = self.begin(seed), self.recipe.optimizer

            def rate(used: float, count: int) -> float:
                del used
                falling = rate_at(count / steps, self._warmup, optimizer.final_fraction)
                return optimizer.learning_rate * falling

            points = list[tuple[int, float, float]]()
            for end in ends_of(steps):
                run.advance(rate, math.inf, end)
                points.append((run.count, run.used, self._point(run)[0]))
            return run.state.params, run.count, run.used, points

        def _point(self, run: Any) -> tuple[float, float]:
            run.losses.clear()
            first = next(iter(self.held_out.values()))
            return self._look(run.state.params, first, _HELD_OUT).bits_per_byte, math.nan

    return FromWeights


def ends_of(steps: int) -> Iterator[int]:
    """The steps after which a curve has a point: denser at the beginning, each once."""
    found = {max(2, round(steps * (i / _POINTS) ** 1.5)) for i in range(1, _POINTS + 1)}
    yield from sorted(end for end in found if end <= max(2, steps))


if __name__ == "__main__":
    main()
