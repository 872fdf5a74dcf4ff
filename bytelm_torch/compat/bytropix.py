"""The names of bytropix over the Byte Latent Transformer: model, data, training, generation."""

import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from bytelm import sampling
from bytelm.config import BLTConfig, require
from bytelm.config.q_learning import QLearningConfig
from bytelm.data import Windows, open_corpus
from bytelm.metrics import bits_per_byte
from bytelm.tokenizer import ByteTokenizer
from bytelm_torch.inference.sampling import next_ids
from bytelm_torch.models.blt import BLT
from bytelm_torch.models.interface import inference
from bytelm_torch.optimizers import q_learning
from bytelm_torch.training import parallel

__all__ = [
    "EnhancedByteTransformer",
    "EnhancedSGD",
    "SamplerConfig",
    "generate_text",
    "prepare_dataloader",
    "train_model",
]

_VOCAB = BLTConfig().vocab


class EnhancedByteTransformer(BLT):
    """The recipe `bytropix` at these sizes: patches by the entropy of byte histograms, splines.

    `context_size` is how many bytes
    `generate_text` shows the model at once.
    """

    def __init__(
        self,
        hidden_size: int = 256,
        num_layers: int = 4,
        num_heads: int = 8,
        dropout_rate: float = 0.1,
        context_size: int = 8,
    ):
        require(context_size >= 2, f"context_size={context_size}: must be at least 2")
        self.context_size = context_size
        wide = 4 * hidden_size
        super().__init__(
            BLTConfig(
                patcher="histogram",
                threshold=11.0,
                bytes_per_patch=6.0,
                ngram_sizes=(3, 4, 5),
                ngram_rows=30_000,
                ngram_combine="mean",
                patch_queries=1,
                local_dim=hidden_size,
                encoder_heads=num_heads,
                encoder_hidden_dim=wide,
                decoder_layers=1,
                decoder_heads=num_heads,
                decoder_hidden_dim=wide,
                global_dim=hidden_size,
                global_layers=num_layers,
                global_heads=num_heads,
                global_hidden_dim=wide,
                feedforward="spline",
                entropy_attention=True,
                positions="sinusoidal",
                dropout=dropout_rate,
            )
        )


class EnhancedSGD(q_learning.EnhancedSGD):
    """This library's optimizer of that name, with the arguments of the original besides its own.

    `lr_scale_bounds` and `momentum_scale_bounds`, each (low, high) around 1, limit what the agent
    makes of `lr` and `momentum`: all its changes together, where the original limits each change by
    itself. Momentum stays at most `controller.max_momentum` even so, since a momentum of 1 never
    forgets. `smoothing_factor` is the weight of a new loss in the moving average that the agent
    watches. Left out, each is as `controller` has it.

    `step()` without a loss is SGD with momentum, centring, clipping, noise and decay, at the rate
    and the momentum that the agent chose last; the agent neither sees nor counts it.
    """

    loss_is_optional: ClassVar[bool] = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.005,
        max_grad_norm: float = 1.0,
        entropy_threshold: float = 0.0,
        noise_scale: float = 0.0,
        centralize: bool = True,
        controller: QLearningConfig | None = None,
        seed: int = 0,
        patch_size: int | None = None,
        smoothing_factor: float | None = None,
        lr_scale_bounds: Sequence[float] | None = None,
        momentum_scale_bounds: Sequence[float] | None = None,
    ):
        controller = QLearningConfig() if controller is None else controller
        if lr_scale_bounds is not None:
            low, high = _bounds("lr_scale_bounds", lr_scale_bounds)
            controller = replace(controller, min_scale=low, max_scale=high)
        if momentum_scale_bounds is not None:
            low, high = _bounds("momentum_scale_bounds", momentum_scale_bounds)
            high = min(momentum * high, controller.max_momentum)
            controller = replace(controller, min_momentum=momentum * low, max_momentum=high)
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay,
            max_grad_norm,
            entropy_threshold,
            noise_scale,
            centralize,
            controller,
            seed,
            patch_size,
            smoothing_factor,
        )


def _bounds(name: str, value: Sequence[float]) -> tuple[float, float]:
    good = len(value) == 2 and 0 < value[0] <= 1 <= value[1]
    require(good, f"{name}={value}: give (low, high), low above 0 and at most 1, high at least 1")
    return float(value[0]), float(value[1])


@dataclass(frozen=True)
class SamplerConfig:
    """Thresholds in bits: below `low` the likeliest byte, below `medium` one of ten, else any."""

    low_entropy_threshold: float = 0.3
    medium_entropy_threshold: float = 1.2
    high_entropy_threshold: float = 2.5


def prepare_dataloader(
    batch_size: int,
    context_size: int,
    num_workers: int = 0,
    distributed: bool = False,
    paths: Sequence[str | Path] | None = None,
) -> tuple[DataLoader, DistributedSampler]:
    """(loader of ids int32 [batch_size, context_size], its sampler).

    `paths` are files and folders; without them the folder `data` is read if there is one, else the
    source of Python's standard library. `num_workers` processes read, at most one a processor.
    `distributed` gives each process that torchrun started its
    own share of the windows.
    """
    if paths is None:
        paths = ["data"] if Path("data").is_dir() else []
    windows: Any = Windows(open_corpus(list(paths)), _VOCAB, context_size, append_eos=True)
    size = int(os.environ.get("WORLD_SIZE", 1)) if distributed else 1
    rank = int(os.environ.get("RANK", 0)) if distributed else 0
    sampler = DistributedSampler(windows, num_replicas=size, rank=rank)
    workers = min(num_workers, os.cpu_count() or 1)
    loader = DataLoader(windows, batch_size=batch_size, sampler=sampler, num_workers=workers)
    return loader, sampler


def train_model(
    model: EnhancedByteTransformer,
    dataloader: DataLoader,
    optimizer: q_learning.EnhancedSGD,
    epochs: int,
    learning_rate: float,
    device: str,
    config: SamplerConfig,
    distributed: bool = False,
) -> None:
    """Trains for `epochs` passes; prints loss and a sample, writes `checkpoint_epoch_N.pt` each.

    A checkpoint is a dictionary with `model_state_dict`, `optimizer_state_dict`, `epoch`, `loss`.
    `distributed` averages gradients over the processes that torchrun started.
    """
    if distributed and "WORLD_SIZE" not in os.environ:
        warnings.warn("distributed=True: torchrun started no group; one process", stacklevel=2)
    kind = "cuda" if device.startswith("cuda") else device
    with parallel.join_group(kind) as group:
        model.to(group.device)
        whole: nn.Module = parallel.RowLoss(model, _VOCAB.pad_id, remat=False)
        if group.size > 1:
            whole = DistributedDataParallel(whole)
        for settings in optimizer.param_groups:
            settings["lr"] = learning_rate
        for epoch in range(1, epochs + 1):
            if isinstance(dataloader.sampler, DistributedSampler):
                dataloader.sampler.set_epoch(epoch)
            model.train()
            loss = _train_epoch(whole, dataloader, optimizer, group)
            if group.rank == 0:
                _report(model, optimizer, epoch, loss, config, group.device)
            parallel.wait_for_all(group)


def _train_epoch(
    whole: nn.Module,
    dataloader: DataLoader,
    optimizer: q_learning.EnhancedSGD,
    group: parallel.Group,
) -> float:
    total, count = 0.0, 0
    for batch in dataloader:
        ids = batch.to(group.device)
        counted = parallel.all_sum(group, (ids != _VOCAB.pad_id).sum()).clamp(min=1)
        optimizer.zero_grad()
        nats, *_ = whole(ids)
        (nats / counted * group.size).backward()
        nats = parallel.all_sum(group, nats.detach())
        optimizer.step(loss=nats / counted)
        total, count = total + float(nats), count + int(counted)
    require(count > 0, "dataloader: holds no batch")
    return total / count


def _report(
    model: EnhancedByteTransformer,
    optimizer: q_learning.EnhancedSGD,
    epoch: int,
    loss: float,
    config: SamplerConfig,
    device: torch.device,
) -> None:
    state = {"epoch": epoch, "loss": loss, "model_state_dict": model.state_dict()}
    state["optimizer_state_dict"] = optimizer.state_dict()
    torch.save(state, f"checkpoint_epoch_{epoch}.pt")
    sample = generate_text(model, "The ", 32, config, str(device))
    print(f"epoch {epoch}: {bits_per_byte(loss, 1):.3f} bits per byte; {sample!r}")


def generate_text(
    model: EnhancedByteTransformer,
    seed_text: str,
    length: int,
    config: SamplerConfig,
    device: str,
    temperature: float = 1.0,
) -> str:
    """`seed_text` and `length` more bytes, drawn from torch's generator.

    Each byte is chosen by the entropy of its distribution, given the `context_size` − 1 before it.
    """
    sampler = sampling.SamplerConfig(
        sampler="entropy",
        temperature=temperature,
        entropy_low=config.low_entropy_threshold,
        entropy_medium=config.medium_entropy_threshold,
        entropy_high=config.high_entropy_threshold,
    )
    tokenizer, seen = ByteTokenizer(_VOCAB), model.context_size - 1
    ids = tokenizer.encode(seed_text).tolist()
    with inference(model.to(device)):
        for _ in range(length):
            window = torch.tensor([[*ids[-seen:], _VOCAB.offset]], device=device)
            logits = model(window)[:, -1]
            ids.append(int(next_ids(logits, _uniform(device), sampler, _VOCAB, False)))
    return tokenizer.decode(ids)


def _uniform(device: str) -> Tensor:
    return torch.rand(1).to(device)
