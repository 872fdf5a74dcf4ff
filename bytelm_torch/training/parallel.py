"""Processes: the group that `torchrun` started, and the train step over it.

Models and losses run in one process unchanged. Each process has one device, a copy of the
parameters and its share of every batch's rows; gradients and losses are sums over all processes, so
that their number changes nothing but rounding.
"""

import contextlib
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Int, Integer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bytelm.config import ModelConfig, TrainConfig, require
from bytelm.runs import require_same, short_json
from bytelm_torch.layers.ids import as_ids
from bytelm_torch.optimizers.build import clip_by_global_norm, global_norm, set_rate
from bytelm_torch.training.loss import counted_ids, cross_entropy, row_nats, source_sums


class Group(NamedTuple):
    """This process among `size` of them, and its device."""

    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def join_group(device: str = "auto", timeout: int = 0) -> Iterator[Group]:
    """The group of this process: as set by `torchrun`, otherwise one process alone.

    A process that waits for the others for more than `timeout` seconds ends (0: torch's default).

    `device="auto"` is the process's own GPU if there are any, otherwise the CPU. GPUs communicate
    over nccl, CPUs over gloo.
    """
    size, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK={local}: this machine has {torch.cuda.device_count()} GPUs; "
                "start at most that many processes on it"
            )
        torch.cuda.set_device(local)
        kind = f"cuda:{local}"
    local_device = torch.device(kind)
    if size == 1 or dist.is_initialized():
        known = dist.is_initialized()
        yield Group(
            dist.get_rank() if known else 0, dist.get_world_size() if known else 1, local_device
        )
        return
    limit = timedelta(seconds=timeout) if timeout else None
    dist.init_process_group("nccl" if local_device.type == "cuda" else "gloo", timeout=limit)
    try:
        yield Group(dist.get_rank(), size, local_device)
    finally:
        dist.destroy_process_group()


def check_batch(group: Group, train: TrainConfig) -> None:
    """Raises `ValueError` unless the batch divides evenly over processes and micro-batches."""
    if train.fsdp != 1:
        raise ValueError(
            f"fsdp={train.fsdp}: every process of this package holds a whole copy; set it to 1"
        )
    if train.tensor != 1:
        raise ValueError(
            f"tensor={train.tensor}: every process of this package computes whole layers; set it "
            "to 1"
        )
    if train.parallel != "jit":
        raise ValueError(
            f"parallel={train.parallel}: chooses how JAX divides a step, which this package does "
            "in one way; set it to jit"
        )
    if train.devices not in (0, group.size):
        raise ValueError(
            f"devices={train.devices}: this run has {group.size}, one a process; set "
            "it to 0, or start that many with torchrun"
        )
    parts = group.size * train.accumulation_steps
    if train.batch_size % parts:
        raise ValueError(
            f"batch_size={train.batch_size}: must be a multiple of {parts} ({group.size} processes "
            f"x {train.accumulation_steps} accumulation_steps); or start fewer processes"
        )


def compute_dtype(train: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype of products: what the config says, or what suits this device."""
    name = train.compute_dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


def autocast(device: torch.device, dtype: torch.dtype) -> Any:
    """Products in `dtype` if it is narrower than the parameters, which stay unchanged."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is torch.bfloat16)


def require_compilable(config: ModelConfig) -> None:
    """Raises `ValueError` for a model that `torch.compile` cannot hold in one graph."""
    problem = config.uncompilable
    require(problem is None, f"--compile: {problem}")


def all_sum(group: Group, values: Tensor) -> Tensor:
    """The sum of `values` over all processes."""
    if group.size > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def wait_for_all(group: Group) -> None:
    """Returns when every process has arrived here."""
    if group.size > 1:
        dist.barrier()


def as_first_says(group: Group, value: bool) -> bool:
    """The first process's `value`, in every process."""
    first = torch.tensor(float(value and group.rank == 0), device=group.device)
    return bool(all_sum(group, first))


def require_agreement(group: Group, found: dict[str, Any]) -> None:
    """Raises `ValueError`, in all processes alike, unless all of them found the same."""
    if group.size > 1:
        everyone: list[Any] = [None] * group.size
        dist.all_gather_object(everyone, {name: short_json(each) for name, each in found.items()})
        require_same(everyone)


Report = dict[str, Tensor]
"""The metrics of a step, by name."""

OBJECTIVE = "objective"
"""What is differentiated, the loss and a model's extra loss: part of no report outside of here."""


class RowLoss(nn.Module):
    """Sums of rows: nats, extra loss, metrics, nats by source; the module that DDP wraps."""

    def __init__(self, model: Any, pad_id: int, remat: bool, count: int = 0):
        """`count` is the number of sources."""
        super().__init__()
        self.model, self.pad_id, self.remat, self.count = model, pad_id, remat, count

    def forward(
        self,
        ids: Integer[Tensor, "B T"],
        sources: Int[Tensor, " B"] | None = None,
        counted: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:
        output = self.model.outputs(ids, self.remat)
        metrics = {k: v.sum() for k, v in output.metrics.items()}
        if sources is None:
            nats, _ = cross_entropy(output.logits, ids, self.pad_id, counted)
            return nats, output.extra_loss.sum(), metrics, None
        each = row_nats(output.logits, ids, self.pad_id, counted)
        by_source = source_sums(each.detach(), sources, self.count)
        return each.sum(), output.extra_loss.sum(), metrics, by_source


def make_train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    train: TrainConfig,
    pad_id: int,
    group: Group,
    names: tuple[str, ...] = (),
    compiled: bool = False,
) -> Callable[..., dict[str, Tensor]]:
    """`step(count, rows, learning_rate, max_grad_norm, stop) -> metrics`, after `count` steps.

    `rows` are this process's ids of the global batch, int[B, T]. Metrics: `loss` (nats, mean over
    all counted ids of the global batch), `grad_norm`, the model's metrics, averaged over rows, and
    `stop`, above 0 if any process asks for it. With `names` the step takes `sources`, int32 [B],
    indices of names, and there is a `loss/NAME` for each, NaN without rows. `counted`, bool [B, T],
    leaves ids out of the loss that the model nevertheless reads. Gradients of
    micro-batches are added before they are used. A step whose loss or gradient norm is not finite
    changes no parameter. `compiled` has `torch.compile` make one graph of model and loss, again for
    each length of rows. Dropout depends on seed, step and process alone, so a resumed run draws
    the same.
    """
    check_batch(group, train)
    dtype, parts = compute_dtype(train, group.device), train.accumulation_steps
    whole = _over_processes(group, RowLoss(model, pad_id, train.remat, len(names)), compiled)
    forward = partial(_forward, whole, group, dtype)

    def backward(batch: dict[str, Tensor], count: Tensor, rows: int, each: Tensor) -> Report:
        nats, objective, metrics, by_source = forward(batch, count, rows)
        # DDP averages the gradients of the processes, but they should be summed.
        (objective * group.size).backward()
        report = {"loss": nats / count, OBJECTIVE: objective}
        report |= {k: v / rows for k, v in metrics.items()}
        if by_source is not None:
            report |= {f"loss/{name}": x for name, x in zip(names, by_source / each, strict=True)}
        return {name: value.detach() for name, value in report.items()}

    def step(
        count: int, rows: np.ndarray, learning_rate: float, max_grad_norm: float, stop: bool,
        **rest: np.ndarray,
    ) -> Report:  # fmt: skip
        seed = _seed(train.seed, count, group.rank)
        torch.manual_seed(seed)
        batch = {name: torch.from_numpy(each).to(group.device) for name, each in rest.items()}
        batch["ids"] = as_ids(torch.from_numpy(rows)).to(group.device)
        total, each = _counts(group, batch, pad_id, len(names))
        optimizer.zero_grad()
        cut = [{name: value[i::parts] for name, value in batch.items()} for i in range(parts)]
        reports = []
        for ours in cut:
            quiet = isinstance(whole, DistributedDataParallel) and ours is not cut[-1]
            with whole.no_sync() if quiet else nullcontext():  # pyright: ignore
                reports.append(backward(ours, total, len(rows) * group.size, each))
        report = _add_up(group, reports, stop)
        report["grad_norm"] = global_norm(p.grad for p in model.parameters() if p.grad is not None)
        set_rate(optimizer, learning_rate)
        again = partial(forward, count=total, rows=len(rows) * group.size)
        move(optimizer, model, report, max_grad_norm, partial(_loss_now, group, seed, again, cut))
        return report

    return step


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _forward(
    whole: nn.Module, group: Group, dtype: torch.dtype,
    batch: dict[str, Tensor], count: Tensor, rows: int,
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor | None]:  # fmt: skip
    """Nats, what is differentiated, metrics, and nats by source of a micro-batch."""
    with autocast(group.device, dtype):
        nats, extra, metrics, by_source = whole(**batch)
    return nats, nats / count + extra / rows, metrics, by_source


def _loss_now(
    group: Group, seed: int, forward: Callable[..., Any], cut: list[dict[str, Tensor]]
) -> Tensor:
    """The loss of the same micro-batches, with the same dropout, at the parameters of now."""
    with torch.random.fork_rng([group.device] if group.device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.no_grad():
            return all_sum(group, torch.stack([forward(ours)[1] for ours in cut]).sum())


def _over_processes(group: Group, loss: RowLoss, compiled: bool) -> nn.Module:
    """The loss whose gradients are averaged over processes; its graph is one process's own."""
    if compiled:
        require_compilable(loss.model.config)
        loss.compile(fullgraph=True, dynamic=False)
    if group.size == 1:
        return loss
    devices = None if group.device.type == "cpu" else [group.device]
    return DistributedDataParallel(loss, device_ids=devices)


def _counts(
    group: Group, batch: dict[str, Tensor], pad_id: int, sources: int
) -> tuple[Tensor, Tensor]:
    """How many ids of the global batch are counted, at least 1, and how many of each source."""
    counted = counted_ids(batch["ids"], pad_id, batch.get("counted"))
    total = all_sum(group, counted.sum()).clamp(min=1)
    if not sources:
        return total, total
    return total, all_sum(group, source_sums(counted.sum(dim=1), batch["sources"], sources))


def _add_up(group: Group, reports: list[Report], stop: bool) -> Report:
    """The sums over micro-batches and processes, and how many processes ask to `stop`."""
    names = sorted(reports[0])
    wide = reports[0]["loss"].dtype
    local = [torch.stack([report[name].to(wide) for report in reports]).sum() for name in names]
    sums = all_sum(group, torch.stack([*local, local[0].new_tensor(float(stop))]))
    return dict(zip([*names, "stop"], sums, strict=True))


def move(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    report: dict[str, Tensor],
    max_grad_norm: float,
    loss_now: Callable[[], Tensor],
) -> None:
    """Moves the parameters by their gradients, which it clips, unless `report` is not finite.

    `report` has the `loss`, the `grad_norm` and, until this takes it out, `OBJECTIVE`. `loss_now`
    computes what is differentiated again, for an optimizer that looks at it after its step.
    """
    objective, loss, norm = report.pop(OBJECTIVE), report["loss"], report["grad_norm"]
    takes = inspect.signature(optimizer.step).parameters
    if "value_fn" in takes:  # an optimizer with an agent clips and skips by itself
        optimizer.step(loss=objective, value_fn=loss_now)  # pyright: ignore[reportCallIssue]
        return
    if not torch.isfinite(loss + norm):
        return
    clip_by_global_norm(model.parameters(), max_grad_norm, norm)
    optimizer.step()
