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

    Any of `paths` may be an address (`gs://`, `s3://`, `hf://`, `https://`), and "@FILE" stands for
    the paths in a file. Without any, the data are the source of the running interpreter's standard
    library. Files that cannot be mapped into memory, such as compressed ones, are read once into
    the folder `cache_dir`, and so are objects at addresses. Chats are written in the ChatML
    template.

    Each named source is split, shuffled and repeated by itself, and its loss is reported. Documents
    are split by a hash of `split_seed` and either their content, so that adding a document moves no
    other, or their rank among all, as in runs begun before there was a choice. With fewer than 50
    documents the last share of the bytes is held out.

    The order "grain" draws one window twice and leaves the last one out if there are 4^k + 1 of
    them, with k at least 8, and is "exact" otherwise. Each of `warmup_lengths` must divide
    the number `sequence_length`; the number of bytes per step stays the same.
    """

    paths: tuple[str, ...] = ()
    """Files, folders, globs or addresses; "-" is standard input, NAME=PATH names a source."""
    weights: tuple[str, ...] = ()
    """Share of the windows of each named source, as NAME=NUMBER; by default by bytes."""
    valid: tuple[str, ...] = ()
    """Paths to validate on, or NAME=PATH; nothing is then held out of `paths`."""
    text_field: str = "text"
    """Field of a record (JSON, Parquet, Arrow, tar) that holds the text of a document."""
    prompt_field: str = ""
    """Field of the text that is read but not counted, before that of `completion_field`."""
    completion_field: str = ""
    """Field of the text that is counted, after that of `prompt_field`."""
    chat_field: str = ""
    """Field of a list of messages with `role` and `content`; the assistant's are counted."""
    raw: bool = False
    """Whether the bytes of every file are taken as they are, whatever its format."""
    cache_dir: str = ""
    """Folder for decompressed and fetched files; by default ~/.cache/bytelm."""
    sequence_length: int = 512
    """Bytes per window."""
    validation_fraction: float = 0.02
    """Fraction of the documents that is held out."""
    split_seed: int = 0
    """Seed of the split into training and validation."""
    split_rule: Literal["content", "rank"] = "content"
    """Whether the split goes by the content of documents, or by rank as in older runs."""
    shuffle_seed: int = 0
    """Seed of the order of windows."""
    append_eos: bool = True
    """Whether each document ends with the end-of-sequence id."""
    order: Literal["exact", "grain"] = "exact"
    """Order of windows in an epoch: "exact" visits each once; older runs have "grain"."""
    warmup_lengths: tuple[int, ...] = ()
    """Bytes of the shorter pieces that the first steps train on, in this order."""
    warmup_length_steps: int = 100
    """Steps for each of `warmup_lengths`."""

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


def parse_steps(field_name: str, text: str) -> range:
    """The steps of FIRST:LAST, both included, counted from 1; none of an empty text.

    Raises `ValueError` for anything else, which names the field.
    """
    if not text:
        return range(0)
    first, _, last = text.partition(":")
    good = first.isdecimal() and last.isdecimal() and len(text) <= 40
    good = good and 1 <= int(first) <= int(last)
    require(good, f"{field_name}={text}: write FIRST:LAST, two steps from 1 on, as 10:15")
    return range(int(first), int(last) + 1)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run. `batch_size` counts windows over all devices and processes.

    Parameters stay float32 whatever `compute_dtype` is. A run that starts at `init_from` has the
    model of those weights, a new optimizer and step 0; in a branch everything but the model may
    change. An average a of the weights w follows a ← d a + (1 − d) w after each step. Frozen
    parameters have no gradient, no optimizer state and no update. Names are as in the PyTorch
    twin's state dict, or with the kind of leaf in JAX as their last part; if several patterns of
    the option `learning_rate_scale` match, the last one counts.
    """

    steps: int = 1000
    """Number of steps of the run."""
    batch_size: int = 32
    """Windows per step, over all devices."""
    accumulation_steps: int = 1
    """Micro-batches per step, whose gradients are added."""
    seed: int = 0
    """Seed of initial weights and dropout."""
    devices: int = 0
    """Number of devices; 0 means all there are."""
    fsdp: int = 1
    """Devices that share one copy of parameters and optimizer state."""
    tensor: int = 1
    """Devices that compute each layer together, for what one device cannot hold."""
    parallel: Literal["jit", "shard_map"] = "jit"
    """How the step is spread over devices; both forms compute the same."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of products; "auto" is bfloat16 on accelerators, float32 on a CPU."""
    remat: bool = False
    """Whether activations are recomputed in the backward pass, which saves memory."""
    log_every: int = 10
    """Steps between lines of progress."""
    eval_every: int = 250
    """Steps between evaluations; 0 evaluates only at the end."""
    eval_windows: int = 64
    """Largest number of validation windows in an evaluation."""
    patience: int = 0
    """Evaluations in a row without a lower score that end the run; 0: never."""
    checkpoint_every: int = 250
    """Steps between checkpoints; 0 saves only at the end."""
    keep_last: int = 2
    """Number of latest checkpoints to keep."""
    keep_best: int = 1
    """Number of best checkpoints to keep, by validation."""
    max_bad_steps: int = 20
    """Number of non-finite steps in a row that end the run; they are skipped."""
    step_timeout: int = 1800
    """Seconds without progress that end a process; 0: never."""
    entropy_from: str = ""
    """Calibrated run of the entropy model for patcher=entropy."""
    init_from: str = ""
    """Weights to start from: RUN, RUN@CHECKPOINT, an export, or what `import` reads."""
    init_optimizer: bool = False
    """Whether the run at `init_from` also provides the state of the optimizer."""
    branch_from: str = ""
    """RUN or RUN@STEP to continue from in a new folder."""
    average_decay: float = 0.0
    """Decay per step of an average of the weights, which is evaluated; 0: none."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that do not train."""
    learning_rate_scale: tuple[str, ...] = ()
    """Factors of the updates of matching parameters, as PATTERN=NUMBER."""
    lora_rank: int = 0
    """Rank of the adapters that are trained instead of the weights; 0: none."""
    lora_alpha: float = 16.0
    """Adapters are multiplied by this, divided by `lora_rank`."""
    lora_dropout: float = 0.0
    """Fraction of the adapters' inputs that training drops."""
    lora_targets: tuple[str, ...] = ()
    """Patterns of the linear layers that get adapters; by default attention."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Services that receive the metrics, besides metrics.jsonl."""
    profile_steps: str = ""
    """First and last step of a trace for xprof and TensorBoard, as 10:15; by default none."""

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
        traced = parse_steps("profile_steps", self.profile_steps)
        within = not traced or traced[-1] <= self.steps
        require(within, f"profile_steps={self.profile_steps}: the run ends at step {self.steps}")
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

    The fields `patching` and `origin` are empty in recipes. In a run, `patching` is what `train`
    and `calibrate` measured about the patches, and `origin` says which weights `train.init_from`
    named when the run began.
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


def default_length(model: ModelConfig, trained: int) -> int:
    """The training length, or if it is not known (0) that of a new recipe, as far as it fits."""
    length = trained or DataConfig().sequence_length
    return min(length, model.longest_input or length)


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
