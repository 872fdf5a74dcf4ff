"""The configuration of a run: data, training, and the recipe that holds all parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

from bytelm.config.base import (
    LARGEST_FLOAT,
    require,
    require_fraction,
    require_non_negative,
    require_numbers,
    require_positive,
)
from bytelm.config.blt import PatchingContract
from bytelm.config.models import ModelConfig
from bytelm.config.optimizer import AdamWConfig, OptimizerConfig

_MOST_LAYERS = 4096


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where bytes come from and how they become windows of `sequence_length` ids.

    `paths` are files, folders and globs, here or at addresses (`gs://`, `s3://`, `hf://`,
    `https://`), "-" for standard input, "@FILE" for the paths in a file; empty, the source of the
    running interpreter's standard library. Of records (JSON, Parquet, Arrow, tar) the field
    `text_field` is a document each; `raw` takes the bytes of every file as they are. What cannot
    be mapped into memory, as compressed files, is read once into `cache_dir` (default:
    $XDG_CACHE_HOME/bytelm or ~/.cache/bytelm), and so are objects at addresses.

    With `prompt_field` and `completion_field` a record's document is one after the other, and the
    prompt's bytes are read and not counted. With `chat_field` it is a list of messages with `role`
    and `content`, written in the ChatML template, of which the assistant's are counted.

    Entries NAME=PATH of `paths` name sources, whose losses are reported each by itself. Each is
    held out from, shuffled and repeated by itself, and has the share of the windows that `weights`,
    entries NAME=NUMBER for all of the names, give it; without them, its share of the bytes.
    `valid` are paths, or entries NAME=PATH of several sets, to validate on; with them nothing is
    held out of `paths`.

    Documents are split into training and validation by a hash of `split_seed` and, by `split_rule`,
    of their "content", so that adding a document moves no other, or of their "rank" among all, as
    in runs begun before there was a choice. About `validation_fraction` of them are held out; with
    fewer than 50 documents by content, that share of the bytes, the last ones. `append_eos` ends
    each document with the end-of-sequence id.

    `order` is the order of windows within an epoch. "exact" visits every window once. "grain", that
    of runs begun before there was a choice, draws one window twice and leaves the last one out if
    there are 4^k + 1 of them, k at least 8, and is the same otherwise.

    `warmup_lengths`: the first steps train on shorter pieces of these many ids, into which the
    windows of a batch are cut, `warmup_length_steps` steps per length in this order. The number of
    bytes per step stays the same.
    """

    paths: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    text_field: str = "text"
    prompt_field: str = ""
    completion_field: str = ""
    chat_field: str = ""
    raw: bool = False
    cache_dir: str = ""
    sequence_length: int = 512
    validation_fraction: float = 0.02
    split_seed: int = 0
    split_rule: Literal["content", "rank"] = "content"
    shuffle_seed: int = 0
    append_eos: bool = True
    order: Literal["exact", "grain"] = "exact"
    warmup_lengths: tuple[int, ...] = ()
    warmup_length_steps: int = 100

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(self, "sequence_length", "warmup_length_steps")
        require_fraction(self, "validation_fraction")
        require(
            all(self.paths),
            f"paths={self.paths}: an empty path names no file; leave it out",
        )
        require(all(self.valid), f"valid={self.valid}: an empty path names no file; leave it out")
        parse_weights(self.weights)
        require(self.text_field != "", "text_field: is empty; name the field of the text")
        for piece in self.warmup_lengths:
            require(
                piece >= 1 and self.sequence_length % piece == 0,
                f"warmup_lengths={self.warmup_lengths}: each must divide "
                f"sequence_length={self.sequence_length}",
            )

    def length_at(self, step: int) -> int:
        """Ids per row in the step with index `step`, counted from 0."""
        stage = step // self.warmup_length_steps
        return (*self.warmup_lengths, self.sequence_length)[min(stage, len(self.warmup_lengths))]


def parse_weights(weights: Sequence[str]) -> dict[str, float]:
    """The number of each name in entries NAME=NUMBER; raises `ValueError` for other entries."""
    return _parse_numbers("weights", weights, "NAME=NUMBER, as web=0.7", "leave its data out")


def parse_scales(scales: Sequence[str]) -> dict[str, float]:
    """The number of each pattern in entries PATTERN=NUMBER; `ValueError` for other entries."""
    form = "PATTERN=NUMBER, as to_logits.*=0.1"
    return _parse_numbers("learning_rate_scale", scales, form, "freeze those parameters")


def _parse_numbers(
    field_name: str, entries: Sequence[str], form: str, instead: str
) -> dict[str, float]:
    """Entries NAME=NUMBER as a dictionary; a message names `form` or what to do `instead`."""
    numbers: dict[str, float] = {}
    for entry in entries:
        where = f"{field_name}={entry}"
        name, equals, text = entry.partition("=")
        require(bool(name and equals), f"{where}: write {form}")
        require(name not in numbers, f"{where}: {name} is given twice; give it once")
        try:
            numbers[name] = float(text)
        except ValueError:
            example = form.rpartition("=")[2]
            require(False, f"{where}: {text!r} is no number; write one, as {name}={example}")
        fits = 0 < numbers[name] <= LARGEST_FLOAT
        require(fits, f"{where}: must be a finite number above 0; or {instead}")
    return numbers


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run. `batch_size` is global and counts windows; `devices=0` means all there are.

    Every group of `fsdp` devices shares one copy of parameters and optimizer state, cut into that
    many parts; 1 means a whole copy on every device. Every `tensor` of them compute one layer
    together, each a part of its heads and hidden features: for what one device cannot hold.

    `compute_dtype="auto"` is bfloat16 on accelerators and float32 on a CPU; parameters stay
    float32. `eval_every=0` and `checkpoint_every=0` evaluate and save at the last step only.
    `eval_windows` limits the validation windows of each evaluation during training, and `patience`
    of them in a row without a lower score end the run (0: never). A step with a
    non-finite loss or gradient is skipped; `max_bad_steps` of them in a row end the run. So does a
    process that makes no progress for `step_timeout` seconds (0: never). `track` names the services
    that receive the metrics, besides `metrics.jsonl`. `entropy_from` names a calibrated run folder,
    from which BLT with patcher="entropy" takes its entropy model: sizes, weights, threshold and
    mean patch length. `init_from` names weights from which a run starts, with a new optimizer: a
    run folder, PATH@CHECKPOINT for another checkpoint than its latest, an export, or what
    `bytelm import` reads. With `init_optimizer` the state of that run's optimizer comes along.
    `branch_from`, likewise RUN or RUN@CHECKPOINT, goes on from the step of a run in a new folder,
    where everything but the model may change. `average_decay` d keeps an average of the weights,
    a ← d a + (1 − d) w after each step, which evaluation and export use (0: none).

    `freeze` are patterns (`*`, `?`, `[…]`) of names of parameters that have no gradient, no
    optimizer state and no update. `learning_rate_scale`, entries PATTERN=NUMBER, multiply the
    updates of the parameters that match; where several do, the last counts. Names are as in the
    PyTorch twin's state dict, or with the kind of leaf in JAX as their last part.

    `lora_rank` above 0 trains low-rank adapters of that rank in place of the weights: those of the
    linear layers whose names match one of the patterns `lora_targets` (default: those of
    attention). They are multiplied by `lora_alpha` / `lora_rank`, and `lora_dropout` is the share
    of their inputs that a step leaves out.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulation_steps: int = 1
    seed: int = 0
    devices: int = 0
    fsdp: int = 1
    tensor: int = 1
    parallel: Literal["jit", "shard_map"] = "jit"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False
    log_every: int = 10
    eval_every: int = 250
    eval_windows: int = 64
    patience: int = 0
    checkpoint_every: int = 250
    keep_last: int = 2
    keep_best: int = 1
    max_bad_steps: int = 20
    step_timeout: int = 1800
    entropy_from: str = ""
    init_from: str = ""
    init_optimizer: bool = False
    branch_from: str = ""
    average_decay: float = 0.0
    freeze: tuple[str, ...] = ()
    learning_rate_scale: tuple[str, ...] = ()
    lora_rank: int = 0
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = ()
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(self, "steps", "batch_size", "accumulation_steps", "log_every")
        require_positive(self, "keep_last", "eval_windows", "fsdp", "tensor", "max_bad_steps")
        counts = (
            "devices",
            "eval_every",
            "checkpoint_every",
            "keep_best",
            "step_timeout",
            "patience",
        )
        require_non_negative(self, *counts)
        require(all(self.freeze), f"freeze={self.freeze}: an empty pattern matches nothing")
        parse_scales(self.learning_rate_scale)
        self._require_adapters()
        self._require_tensor()
        require_fraction(self, "average_decay")
        only = not (self.init_from and self.branch_from)
        require(only, "init_from, branch_from: both say what a run begins from; give one of them")
        needs = not self.init_optimizer or bool(self.init_from)
        require(needs, "init_optimizer=True: needs init_from, the run whose optimizer it is")
        require(
            self.batch_size % self.accumulation_steps == 0,
            f"batch_size={self.batch_size}: must be a multiple of "
            f"accumulation_steps={self.accumulation_steps}",
        )

    def _require_tensor(self) -> None:
        cut = f"tensor={self.tensor}"
        known = self.tensor == 1 or self.parallel == "jit"
        require(known, f"{cut}: parallel={self.parallel} cuts no layers; use parallel=jit")
        plain = self.tensor == 1 or not self.lora_rank
        require(plain, f"{cut}: lora_rank={self.lora_rank} adds adapters, which are not cut; use 1")

    def _require_adapters(self) -> None:
        require_non_negative(self, "lora_rank")
        require_fraction(self, "lora_dropout")
        require(self.lora_alpha > 0, f"lora_alpha={self.lora_alpha}: must be above 0")
        targets = self.lora_targets
        require(all(targets), f"lora_targets={targets}: an empty pattern matches nothing")
        if not self.lora_rank:
            for name in ("lora_alpha", "lora_dropout", "lora_targets"):
                value, default = getattr(self, name), getattr(TrainConfig, name)
                require(value == default, f"{name}={value}: needs lora_rank, the adapters' rank")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run: everything that `bytelm train NAME` needs.

    `patching`, which recipes leave empty, is what `train` and `calibrate` measured about the
    patches; `origin`, likewise, is which weights `train.init_from` named when the run began.
    Raises `ValueError` for a model of more than 4,096 layers of one kind.
    """

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig = field(default_factory=AdamWConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    patching: PatchingContract | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        _require_few_layers(self.model, "model")
        if self.train.tensor > 1:
            _require_cut(self.model, self.train.tensor)


def _require_cut(model: ModelConfig, tensor: int) -> None:
    sizes = model.tensor_sizes
    if sizes is None:
        require(False, f"train.tensor={tensor}: layers of {model.architecture} are not cut; use 1")
        return
    for name, size in sizes.items():
        require(size % tensor == 0, f"train.tensor={tensor}: must divide model.{name}={size}")


def _require_few_layers(config: Any, where: str) -> None:
    """Every layer is traced, so that a million of them would take hours before anything else."""
    for part in fields(config):
        value = getattr(config, part.name)
        if is_dataclass(value):
            _require_few_layers(value, f"{where}.{part.name}")
        elif part.name.endswith("layers"):
            few = value <= _MOST_LAYERS
            require(few, f"{where}.{part.name}={value}: must be at most {_MOST_LAYERS}")


def require_length(recipe: Recipe) -> None:
    """Raises `ValueError` if windows are longer than the model's longest input."""
    length, most = recipe.data.sequence_length, recipe.model.longest_input
    require(
        most is None or length <= most,
        f"sequence_length={length}: this model has max_length={most} positions; shorten it, or "
        'give a larger max_length or variant="in_action"',
    )


def require_document_ends(recipe: Recipe) -> None:
    """Raises `ValueError` if a model resets after documents but the data do not mark their ends."""
    require(
        recipe.model.reset_on != "document" or recipe.data.append_eos,
        "model.reset_on=document: needs data.append_eos=True, because the end-of-sequence id "
        "after each document is what resets; or choose newline",
    )
