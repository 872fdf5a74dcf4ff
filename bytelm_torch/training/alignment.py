"""Teaching a byte encoder to make of each patch what a token model's embeddings say of its tokens.

Axes: B batch, T bytes, N patches, D global width, E rows of the embeddings. The mirror of
`bytelm_jax/training/alignment.py`.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bytelm.alignment import (
    Aligned,
    alignment_parts,
    check_stage,
    require_finite,
    step_line,
    validation_record,
)
from bytelm.config import Recipe, require
from bytelm.metrics import MetricsLog
from bytelm.progress import StopSignal
from bytelm.runs import (
    Outcome,
    RunLock,
    prepare_run_dir,
    require_ahead,
    require_lock,
    require_same_data,
    saved_steps,
)
from bytelm.schedules import learning_rate_schedule
from bytelm_torch.layers.segments import segment_sum
from bytelm_torch.models import build_model, parameter_paths
from bytelm_torch.optimizers.build import build_optimizer, global_norm, set_rate
from bytelm_torch.training import checkpoint, parallel
from bytelm_torch.training.average import Average


def alignment_loss(
    model: Any,
    ids: Int[Tensor, "B T"],
    token: Int[Tensor, "B T"],
    embeddings: Float[Tensor, "E D"],
    begin: int,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean squared error of patches, and the mean cosine between them and what they should be.

    A patch should be the mean of the embeddings of the tokens that end in it: row `token` − 1 for
    the token that ends at a byte, none for 0. Patches in which no token ends do not count. BOS is a
    patch of its own, for which row `begin` − 1 stands, if any. The error is relative to the mean
    square of the embeddings: 1 is what vectors of zeros have.
    """
    encoded = model.encode(ids)
    patches = model.widen(encoded.pooled)
    wide = torch.promote_types(patches.dtype, torch.float32)
    embeddings = embeddings.to(wide)
    # s is BOS and then the bytes.
    ends = torch.cat([torch.full_like(token[:, :1], begin), token[:, :-1]], dim=1)
    is_end = (ends > 0).to(wide)[:, :, None]
    rows = embeddings[(ends - 1).clamp(min=0)] * is_end
    both = segment_sum(
        torch.cat([rows, is_end], dim=-1), encoded.plan.patch_of, encoded.plan.budget
    )
    count = both[:, :, -1]
    target = both[:, :, :-1] / count.clamp(min=1)[:, :, None]
    weight = (count > 0).to(wide)
    total = weight.sum().clamp(min=1)
    patches = patches.to(wide)
    error = (patches - target).square().mean(dim=-1)
    size = (patches.square().sum(dim=-1) * target.square().sum(dim=-1)).sqrt()
    cosine = (patches * target).sum(dim=-1) / size.clamp(min=1e-30)
    power = embeddings.square().mean()
    return (weight * error).sum() / total / power, (weight * cosine).sum() / total


def align(
    recipe: Recipe, data: Aligned, run_dir: Path, weights: Callable[[], dict[str, Tensor]]
) -> Outcome:
    """Trains the byte encoder of `recipe` in `run_dir`, from its latest checkpoint if there is one.

    `weights` reads those of the run's beginning, a state dict. Writes what `train` does, and to
    `metrics.jsonl` `alignment_loss`, `alignment_cosine`, `seconds` since the first step of this
    process and, of windows that are held out, loss and cosine with `validation_`. Raises
    `ValueError` for data, settings or checkpoints that do not fit. SIGINT and SIGTERM end it with
    everything saved.
    """
    with StopSignal() as stop, RunLock(run_dir) as lock, parallel.join_group() as group:
        return Stage(recipe, data, group).run(run_dir, stop, lock, weights)


class Stage:
    """What the stage trains, on what, and how: `step` and `validate` are all of it."""

    def __init__(self, recipe: Recipe, data: Aligned, group: parallel.Group) -> None:
        require(group.size == 1, "align: runs in one process; start one")
        check_stage(recipe, data)
        parallel.check_batch(group, recipe.train)
        self.recipe, self.data = recipe, data
        self.length, self.device = recipe.data.sequence_length, group.device
        self.model = build_model(recipe.model).to(self.device).eval()  # without dropout
        parts = alignment_parts(parameter_paths(self.model).values())
        self.optimizer = build_optimizer(recipe.optimizer, self.model, recipe.train.seed, parts)
        self.embeddings = torch.from_numpy(data.embeddings).to(self.device)
        self.dtype = parallel.compute_dtype(recipe.train, self.device)

    def loss(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        """Loss and cosine of these windows."""
        rows = self.data.rows(windows, self.length, self.recipe.model.vocab.offset)
        ids, token = (torch.from_numpy(each).to(self.device) for each in rows)
        with parallel.autocast(self.device, self.dtype):
            return alignment_loss(self.model, ids, token, self.embeddings, self.data.begin)

    def validate(self) -> dict[str, float]:
        """Loss and cosine of windows that are held out, as a record of metrics."""
        batches = self.data.held_out(self.recipe.train.batch_size, self.length)
        with torch.no_grad():
            found = [self.loss(windows) for windows in batches]
        return validation_record([(float(loss), float(cosine)) for loss, cosine in found])

    def step(self, count: int, rate: float) -> dict[str, Tensor]:
        """The step after `count` steps; one that is not finite changes nothing.

        An optimizer with an agent has its own rule.
        """
        run, clip = self.recipe.train, self.recipe.optimizer.max_grad_norm
        windows = self.data.batch(count, run.batch_size, self.length, run.seed)
        self.optimizer.zero_grad()
        loss, cosine = self.loss(windows)
        loss.backward()
        loss, cosine = loss.detach(), cosine.detach()
        norm = global_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        set_rate(self.optimizer, rate)
        moved = {parallel.OBJECTIVE: loss, "loss": loss, "grad_norm": norm}
        parallel.move(self.optimizer, self.model, moved, clip, lambda: self._loss_now(windows))
        return {"alignment_loss": loss, "alignment_cosine": cosine, "grad_norm": norm}

    @torch.no_grad()
    def _loss_now(self, windows: list[int]) -> Tensor:
        return self.loss(windows)[0]

    def run(
        self,
        run_dir: Path,
        stop: StopSignal,
        lock: RunLock,
        weights: Callable[[], dict[str, Tensor]],
    ) -> Outcome:
        """See `align`."""
        run, average = self.recipe.train, Average(self.model, 0.0)
        start = (saved_steps(run_dir) or [0])[-1]
        if not start:
            self.model.load_state_dict(weights())  # damaged ones leave no folder behind
        prepare_run_dir(run_dir, self.recipe, branches=False)
        require_lock(lock.take(run_dir), str(run_dir))
        require_ahead(self.recipe, start, run_dir)
        if start:
            found = checkpoint.restore(run_dir, start, self.model, self.optimizer, average)
            require_same_data(found["data"], self.data.identity, run_dir)
        schedule = learning_rate_schedule(self.recipe.optimizer, run.steps)
        log, saved, step = MetricsLog(run_dir / "metrics.jsonl", start), start, start
        begun = time.monotonic()
        lock.save_recipe(self.recipe)
        how = "resuming" if start else "aligning"
        print(f"{how} {self.recipe.name} in {run_dir}, step {start}", flush=True)
        try:
            while step < run.steps and not stop:
                rate = schedule(step)
                report = self.step(step, rate)
                step += 1
                if step == start + 1:
                    begun = time.monotonic()
                last = step == run.steps
                if last or step % run.log_every == 0:
                    values = {name: float(value) for name, value in report.items()}
                    require_finite(step, values["alignment_loss"])
                    values |= {"learning_rate": rate, "seconds": time.monotonic() - begun}
                    log.write({"step": step, **values})
                    print(step_line(step, run.steps, values), flush=True)
                if last or (run.eval_every and step % run.eval_every == 0):
                    record = self.validate()
                    log.write({"step": step, **record})
                    loss = record["validation_alignment_loss"]
                    print(f"step {step}: validation {loss:.4f}", flush=True)
                if last or (run.checkpoint_every and step % run.checkpoint_every == 0):
                    self._save(run_dir, step, lock, average)
                    saved = step
            if step > saved:
                self._save(run_dir, step, lock, average)
        finally:
            log.close()
        return Outcome(step, bool(stop) and step < run.steps)

    def _save(self, run_dir: Path, step: int, lock: RunLock, average: Average) -> None:
        lock.check()
        state, identity = (self.model, self.optimizer, self.recipe), self.data.identity
        checkpoint.save(run_dir, step, *state, identity, None, average)
