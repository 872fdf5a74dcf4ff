"""How much faster a byte model learns that begins as a token model: from scratch against a donor.

    python scripts/bench/bench_donor.py --train english_train.txt --valid english_valid.txt \\
        --out donor-runs/

1. Makes a donor: a BPE of `--tokens` tokens and a Llama of about 40 million parameters, trained by
   transformers for `--donor-seconds` on the text; its bytes, minutes and bits per byte.
2. Makes byte models around it (`bytelm import --format llama`) and, for the arms with alignment,
   aligns their byte encoders (`bytelm align`), a fifth of an arm's bytes, which count as its own.
3. Trains every arm on equal bytes, those that a BLT from scratch reads in `--seconds`, over
   `--seeds`; and the two best at equal seconds. All arms have one architecture, one optimizer and
   one held-out text; learning rates of the donor's layers are scaled by `--donor-rate`.

Prints a JSON line as each part ends and appends it to OUT/lines.jsonl: an arm's line has its curve,
[bytes, seconds, held-out bits per byte]. Parts whose line stands there are not run again. Ends with
a table. `--tiny` has models of a few thousand parameters, to try the script on a CPU.
"""

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parent), str(HERE.parents[2])]

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

DONOR: dict[str, Any] = {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8}
DONOR |= {"num_attention_heads": 10, "num_key_value_heads": 5}
LOCAL: dict[str, Any] = {
    "base": "blt_132m",
    "model": {"ngram_rows": 8000},
    "data": {"sequence_length": 1024},
    "optimizer": {"learning_rate": 1e-3, "warmup_steps": 50},
    "train": {"batch_size": 32, "devices": 1},
}
TINY_DONOR: dict[str, Any] = dict.fromkeys(DONOR, 2) | {"hidden_size": 16, "intermediate_size": 24}
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
_TOKEN_ROWS, _TOKEN_LENGTH = 64, 512
_TOKENIZER_BYTES, _ALIGNED_BYTES = 2 * 10**7, 3 * 10**7
"""Text, from the beginning of each file, for tokenizer and alignment: more teaches them no more."""
_POINTS, _HELD_OUT = 12, 256
"""Points of a curve, and windows of held-out text behind each."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train", type=Path, nargs="+", required=True, help="text to train on")
    parser.add_argument("--valid", type=Path, required=True, help="text to evaluate on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--donor-seconds", type=float, default=300.0)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--donor-rate", type=float, default=0.5)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only-donor", action="store_true", help="make the donor and end")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    lines = Lines(asked.out / "lines.jsonl")
    if asked.only_donor:  # in a process of its own: PyTorch keeps the memory that it took
        lines.once("donor", lambda: make_donor(asked))
        return
    if "donor" not in lines:
        again = [sys.executable, str(HERE), *sys.argv[1:], "--only-donor"]
        subprocess.run(again, check=True)
        lines = Lines(asked.out / "lines.jsonl")
    arms = Arms(asked, lines)
    first = f"from scratch, seed {asked.seeds[0]}"
    lines.once(first, lambda: arms.timed("from scratch", asked.seeds[0]))
    count = lines[first]["steps"]
    for seed in asked.seeds:
        for arm in asked.arms:
            run = lambda arm=arm, seed=seed: arms.counted(arm, seed, count)  # noqa: E731
            lines.once(f"{arm}, seed {seed}", run)
    best = sorted(asked.arms, key=lambda arm: statistics.mean(finals(lines, arm, asked.seeds)))[:2]
    for arm in best:
        for seed in asked.seeds:
            run = lambda arm=arm, seed=seed: arms.timed(arm, seed)  # noqa: E731
            lines.once(f"{arm}, equal seconds, seed {seed}", run)
    print_table(lines, asked.seeds, asked.arms, best)


class Lines(dict[str, dict[str, Any]]):
    """The parts that have ended, by name, as a file of JSON lines holds them."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        for line in file.read_text().splitlines() if file.exists() else []:
            record = json.loads(line)
            self[record["part"]] = record

    def once(self, part: str, run: Callable[[], dict[str, Any]]) -> None:
        """Runs a part unless it has ended before; prints and appends its line."""
        if part in self:
            return
        self[part] = {"part": part, **run()}
        line = json.dumps(self[part])
        with open(self._file, "a") as file:
            file.write(line + "\n")
        print(line, flush=True)


# ---- the donor ------------------------------------------------------------------------------


def make_donor(asked: argparse.Namespace) -> dict[str, Any]:
    """Trains tokenizer and token model, and saves them in OUT/donor."""
    import torch
    import transformers

    tokenizer = train_tokenizer(asked)
    text = b"\n".join(path.read_bytes() for path in asked.train)
    ids = torch.tensor(tokenized(tokenizer, text))
    begin = tokenizer.token_to_id("<s>")
    config = transformers.LlamaConfig(
        **(TINY_DONOR if asked.tiny else DONOR),
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=_TOKEN_LENGTH,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=begin,
        eos_token_id=begin,
    )
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(device)
    length, rows = (32, 4) if asked.tiny else (_TOKEN_LENGTH, _TOKEN_ROWS)
    step, seconds = train_tokens(model, ids, begin, (rows, length), asked.donor_seconds)
    held_out = asked.valid.read_bytes()[: 20_000 if asked.tiny else 2_000_000]
    bits = token_bits(model, tokenized(tokenizer, held_out), begin, length, len(held_out))
    folder = asked.out / "donor"
    shutil.rmtree(folder, ignore_errors=True)
    model.float().save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    per_token = len(text) / len(ids)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": step,
        "bytes": round(step * rows * (length - 1) * per_token),
        "bytes_per_token": per_token,
        "seconds": seconds,
        "bits": bits,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def train_tokenizer(asked: argparse.Namespace) -> Any:
    """A byte-level BPE, trained on `_TOKENIZER_BYTES` of the text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300 if asked.tiny else asked.tokens,
        special_tokens=["<s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = beginnings(asked.train, _TOKENIZER_BYTES).decode(errors="replace")
    tokenizer.train_from_iterator(text.splitlines(True), trainer)
    return tokenizer


def beginnings(paths: list[Path], size: int) -> bytes:
    """Whole lines of texts, about so many bytes in all, as many of each."""
    texts = []
    for path in paths:
        with path.open("rb") as file:
            text = file.read(size // len(paths))
            texts.append(text + file.readline())
    return b"\n".join(texts)


def tokenized(tokenizer: Any, text: bytes) -> list[int]:
    pieces = text.decode(errors="replace").splitlines(True)
    return [i for each in tokenizer.encode_batch_fast(pieces) for i in each.ids]


def train_tokens(
    model: Any, ids: Any, begin: int, shape: tuple[int, int], seconds: float
) -> tuple[int, float]:
    """Trains for so many seconds, the rate a cosine over them; steps and seconds."""
    import torch

    device, (rows, length) = model.device, shape
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    source, begun, step, used = torch.Generator().manual_seed(0), time.monotonic(), 0, 0.0
    while used < seconds:
        part = used / seconds
        rate = min(1.0, part / 0.02 + 0.01) * (0.05 + 0.475 * (1 + math.cos(math.pi * part)))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        starts = torch.randint(len(ids) - length, (rows,), generator=source)
        batch = torch.stack([ids[s : s + length - 1] for s in starts.tolist()])
        batch = torch.cat([torch.full((rows, 1), begin), batch], dim=1).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 10 == 0 or device.type == "cpu":
            loss.item()  # waits for the device
            used = time.monotonic() - begun
    return step, used


def token_bits(model: Any, ids: list[int], begin: int, length: int, size: int) -> float:
    """Bits per byte of a text of `size` bytes, in windows that each begin anew."""
    import torch

    nats, model = 0.0, model.eval()
    for start in range(0, len(ids), length - 1):
        row = torch.tensor([[begin, *ids[start : start + length - 1]]], device=model.device)
        with torch.no_grad():
            logits = model(row, use_cache=False).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum"))
    return nats / math.log(2) / size


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
        cache = str((asked.out / "programs").absolute())
        jax.config.update("jax_compilation_cache_dir", cache)
        self.asked, self.out = asked, asked.out
        local = asked.out / "local.json"
        local.write_text(json.dumps(TINY_LOCAL if asked.tiny else LOCAL))
        tokens, donor = asked.out / "train.tokens", str(asked.out / "donor")
        if not tokens.exists():
            text = asked.out / "aligned.txt"
            text.write_bytes(beginnings(asked.train, _ALIGNED_BYTES))
            assert cli.main(["align-data", donor, "--data", str(text), "--out", str(tokens)]) == 0
        for seed in asked.seeds:
            run = self.out / f"imported-{seed}"
            command = ["import", donor, "--local", str(local), "--seed", str(seed)]
            assert run.exists() or cli.main([*command, "--out", str(run)]) == 0
        self.tokens = open_aligned(tokens)
        imported = checkpoint.load_run(self.out / f"imported-{asked.seeds[0]}")[0]
        recipe = find_recipe(str(local))
        paths = tuple(str(path) for path in asked.train)
        data = replace(recipe.data, paths=paths, valid=(str(asked.valid),))
        self.recipe = replace(recipe, model=imported.model, data=data)
        self._trainers: dict[str, Any] = {}
        self._alignments: dict[tuple[int, int], Any] = {}  # the last one
        lines.once("machine", self.machine)

    def machine(self) -> dict[str, Any]:
        from equal_time import machine

        model = self.recipe.model
        sizes = {"parameters": model.parameter_count(), "batch": self.recipe.train.batch_size}
        return machine() | sizes | {"length": self.recipe.data.sequence_length}

    def counted(self, arm: str, seed: int, count: int) -> dict[str, Any]:
        """An arm on as many bytes as `count` steps read."""
        return self._run(arm, seed, lambda share: (round(share * count), 0.0))

    def timed(self, arm: str, seed: int) -> dict[str, Any]:
        """An arm for as many seconds as the command line says."""
        return self._run(arm, seed, lambda share: (0, share * self.asked.seconds))

    def _run(
        self, arm: str, seed: int, amount: Callable[[float], tuple[int, float]]
    ) -> dict[str, Any]:
        from bytelm_jax.training import checkpoint

        params: Any = None
        if arm != "from scratch":
            params = checkpoint.load_run(self.out / f"imported-{seed}")[1]
        curve: list[list[float]] = []
        steps, seconds = 0, 0.0
        for kind, share in ARMS[arm]:
            stage = Stage(kind, seed, params, *amount(share))
            run = self._aligned if kind == "align" else self._trained
            params, count, used, points = run(stage)
            size = self.recipe.train.batch_size * self.recipe.data.sequence_length
            curve += [[(steps + c) * size, seconds + s, bits] for c, s, bits in points]
            steps, seconds = steps + count, seconds + used
        return {"steps": steps, "seconds": seconds, "bits": curve[-1][2], "curve": curve}

    def _aligned(self, stage: Stage) -> Any:
        """Once for all arms with as many steps; by seconds, so many as a few steps before tell."""
        from bytelm.alignment import stage_recipe
        from bytelm.metrics import read_metrics
        from bytelm_jax.training import alignment, checkpoint

        place = self.out / "aligning"

        def align(steps: int) -> float:
            shutil.rmtree(place, ignore_errors=True)
            plan = {"steps": steps, "seed": stage.seed + 1, "eval_every": 0, "checkpoint_every": 0}
            recipe = stage_recipe(self.recipe, "", **plan, log_every=max(steps - 1, 1))
            run = replace(recipe.train, eval_every=0, checkpoint_every=0)
            recipe = replace(recipe, train=run)
            alignment.align(recipe, self.tokens, place, lambda: stage.start)
            records = read_metrics(place / "metrics.jsonl")
            return next(r["seconds"] for r in records[::-1] if "seconds" in r)

        steps = stage.steps
        if not steps:
            probe = 4 if self.asked.tiny else 50
            steps = max(2, round(stage.seconds / (align(probe) / probe)))
        known = (stage.seed, steps)
        if known not in self._alignments:
            used = align(steps)
            self._alignments = {known: (checkpoint.load_run(place)[1], steps, used, [])}
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


def trainer_class() -> Any:
    """`equal_time.Trainer`, from given parameters, also by a number of steps."""
    import jax
    from equal_time import Trainer, _Run, rate_at

    from bytelm_jax.training import mesh as meshes

    class FromWeights(Trainer):
        given: Any = None

        def start(self, seed: int) -> Any:
            state = super().start(seed)
            if self.given is None:
                return state
            copies = {name: jax.numpy.array(value) for name, value in self.given.items()}
            return state._replace(params=meshes.place(self._mesh, copies))

        def count(self, seed: int, steps: int) -> Any:
            """Trains so many steps; parameters, steps, seconds, [(steps, seconds, bits)]."""
            self.compile(seed)
            run, optimizer = _Run(self, seed, time.monotonic), self.recipe.optimizer
            rising = min(optimizer.warmup_steps / steps, 0.5)

            def rate(used: float, count: int) -> float:
                del used
                falling = rate_at(count / steps, rising, optimizer.final_fraction)
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


# ---- the table ------------------------------------------------------------------------------


def finals(lines: Lines, arm: str, seeds: list[int], how: str = "") -> list[float]:
    return [lines[f"{arm}{how}, seed {seed}"]["bits"] for seed in seeds]


def saved(curve: list[list[float]], bits: float) -> float | None:
    """Which share of its bytes an arm did not need to get to `bits`; None if it never did."""
    before: list[float] | None = None
    for point in curve:
        if point[2] <= bits:
            read = point[0]
            if before is not None and before[2] > point[2]:
                part = (before[2] - bits) / (before[2] - point[2])
                read = before[0] + part * (point[0] - before[0])
            return 1 - read / curve[-1][0]
        before = point
    return None


def print_table(lines: Lines, seeds: list[int], arms: list[str], best: list[str]) -> None:
    donor = lines["donor"]
    print(
        f"donor: {donor['parameters']:,} parameters, {donor['bytes']:,} bytes in "
        f"{donor['seconds'] / 60:.1f} minutes, {donor['bits']:.4f} bits per byte"
    )
    print("| arm | bits per byte, equal bytes | fewer bytes to what scratch ends at | seconds |")
    print("| --- | --- | --- | --- |")
    for arm in arms:
        bits = finals(lines, arm, seeds)
        shares = [
            saved(lines[f"{arm}, seed {s}"]["curve"], lines[f"from scratch, seed {s}"]["bits"])
            for s in seeds
        ]
        known = [share for share in shares if share is not None]
        fewer = f"{statistics.mean(known):.0%}" if len(known) == len(shares) else "not reached"
        seconds = statistics.mean(lines[f"{arm}, seed {seed}"]["seconds"] for seed in seeds)
        spread = f"{statistics.mean(bits):.4f} ({min(bits):.4f} to {max(bits):.4f})"
        print(f"| {arm} | {spread} | {fewer} | {seconds:.0f} |")
    for arm in best:
        bits = finals(lines, arm, seeds, ", equal seconds")
        spread = f"{statistics.mean(bits):.4f} ({min(bits):.4f} to {max(bits):.4f})"
        print(f"equal seconds, {arm}: {spread}")


if __name__ == "__main__":
    main()
