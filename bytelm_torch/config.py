"""The configurations of bytelm, word for word those of `bytelm_jax/config.py`.

Neither package imports the other, so the text stands twice; a test holds the two equal.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from .config_base import (
    LARGEST_FLOAT,
    ByteVocab,
    require,
    require_finite,
    require_fraction,
    require_positive,
)
from .config_blt import BLTConfig, EntropyConfig, PatchingContract
from .config_lfbyte import LFByteConfig
from .config_q_learning import QLearningConfig


@dataclass(frozen=True, kw_only=True)
class MegabyteConfig:
    """MEGABYTE (Yu et al. 2023, arXiv 2305.07185). The global width is patch_size * global_dim.

    `patch_size=1, local_layers=0` makes it a plain byte transformer, the yardstick of comparisons.
    `max_length` bounds the input of the `paper` variant; `in_action` has no learned positions and
    ignores it.

    `reset_on`: the text starts anew behind each newline, or behind each document. What lies between
    is a text of its own, with its own patches, the last one filled up with pads. In training these
    find room for `reset_room` times the patches of an undivided row: a reset that finds none left
    is not made, so that the rest of that row is one text. Evaluation and generation make them all.
    """

    architecture: ClassVar[str] = "megabyte"
    frozen_prefixes: ClassVar[tuple[str, ...]] = ()
    variant: Literal["paper", "in_action"] = "paper"
    vocab: ByteVocab = field(default_factory=ByteVocab)
    patch_size: int = 8
    global_dim: int = 128
    local_dim: int = 256
    max_length: int = 2048
    global_layers: int = 12
    global_heads: int = 16
    local_layers: int = 6
    local_heads: int = 4
    init_std: float = 0.02
    dropout: float = 0.0
    reset_on: Literal["none", "newline", "document"] = "none"
    reset_room: float = 1.5

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(self, "patch_size", "global_dim", "local_dim", "max_length")
        require_positive(self, "global_layers", "global_heads", "local_heads")
        require(self.local_layers >= 0, f"local_layers={self.local_layers}: must be at least 0")
        require_fraction(self, "dropout")
        require(self.init_std > 0, f"init_std={self.init_std}: must be above 0")
        for name, width in (("global_heads", self.global_width), ("local_heads", self.local_dim)):
            heads = getattr(self, name)
            require(heads <= width, f"{name}={heads}: must be at most the width {width}")
        require(
            self.variant != "paper" or self.max_length % self.patch_size == 0,
            f"max_length={self.max_length}: must be a multiple of patch_size={self.patch_size}",
        )
        require(self.reset_room >= 1, f"reset_room={self.reset_room}: must be at least 1")

    def patches(self, length: int) -> int:
        """Patches of `length` bytes of one text, at least 1."""
        return max(1, -(-length // self.patch_size))

    def reset_patches(self, length: int) -> int:
        """Patches that training has room for in a row of `length` bytes with resets."""
        return math.ceil(self.reset_room * self.patches(length))

    @property
    def global_width(self) -> int:
        """Width of the global transformer: one patch of concatenated byte embeddings."""
        return self.patch_size * self.global_dim

    def parameter_count(self) -> int:
        """Number of parameters, in closed form."""
        vocab, narrow, local = self.vocab.size, self.global_dim, self.local_dim
        count = self.global_layers * _block_parameters(self.global_width, self.global_heads)
        count += self.local_layers * _block_parameters(local, self.local_heads)
        count += vocab * narrow + (narrow * local + local) + (local * vocab + vocab)
        if self.variant == "paper":
            return count + self.max_length * narrow + vocab * local
        return count + narrow * local + local

    def flops_per_byte(self, length: int) -> float:
        """Forward floating-point operations a byte at `length` bytes; causal attention half.

        Of one text: the room that resets need is not counted.
        """
        patches = -(-length // self.patch_size)
        wide, heads = self.global_width, self.global_heads
        work = self.global_layers * _block_flops(wide, heads, patches) / self.patch_size
        work += self.local_layers * _block_flops(self.local_dim, self.local_heads, self.patch_size)
        work += 2 * self.local_dim * (self.global_dim + self.vocab.size)
        return work + (2 * self.global_dim * self.local_dim if self.variant == "in_action" else 0)


def _block_parameters(width: int, heads: int) -> int:
    """Parameters of one multi-query attention block and its feed-forward of four widths."""
    head = width // heads
    attention = 2 * width + width * heads * head + width * 2 * head + heads * head * width
    return attention + 2 * width + (width * 4 * width + 4 * width) + (4 * width * width + width)


def _block_flops(width: int, heads: int, keys: int) -> int:
    """Forward floating-point operations of that block for one position out of `keys`."""
    head = width // heads
    products = 2 * width * heads * head + width * 2 * head + 8 * width * width
    return 2 * products + 2 * heads * head * keys  # scores and values, each half of 2 * keys


ModelConfig = MegabyteConfig | EntropyConfig | BLTConfig | LFByteConfig
MODEL_CONFIGS: tuple[type[ModelConfig], ...] = (
    MegabyteConfig,
    EntropyConfig,
    BLTConfig,
    LFByteConfig,
)


def training_flops_per_byte(config: ModelConfig, length: int) -> float:
    """Operations a byte of a training step: the backward pass costs twice the forward one.

    A frozen entropy model runs forward alone.
    """
    frozen = config.frozen_flops_per_byte(length) if isinstance(config, BLTConfig) else 0.0
    return 3 * config.flops_per_byte(length) - 2 * frozen


_ONLY_FOR = {
    "beta1": ("adamw", "q_learning_adamw"),
    "beta2": ("adamw", "q_learning_adamw"),
    "epsilon": ("adamw", "q_learning_adamw"),
    "momentum": ("sgd", "q_learning_sgd"),
    "entropy_threshold": ("q_learning_sgd",),
    "noise_scale": ("q_learning_sgd",),
    "centralize": ("q_learning_sgd",),
    "controller": ("q_learning_sgd", "q_learning_adamw"),
}
"""Fields of `OptimizerConfig` that mean nothing to the optimizers not named here."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The optimizer: linear warm-up, then cosine decay to `learning_rate * final_fraction`.

    `q_learning_sgd` and `q_learning_adamw` put that rate, and `momentum` or `beta1`, under the
    agent of `controller`. A field of another optimizer than `name` must keep its default: `beta1`,
    `beta2`, `epsilon` belong to the two of AdamW, `momentum` to the two of SGD, and
    `entropy_threshold`, `noise_scale`, `centralize` to `q_learning_sgd`. `max_grad_norm=0` turns
    clipping off. Weight decay leaves norms and biases alone; `sgd` adds it to the gradient, for
    the others it is decoupled.
    """

    name: Literal["adamw", "sgd", "q_learning_sgd", "q_learning_adamw"] = "adamw"
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    final_fraction: float = 0.1
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    momentum: float = 0.9
    max_grad_norm: float = 1.0
    entropy_threshold: float = 0.0
    noise_scale: float = 0.0
    centralize: bool = True
    controller: QLearningConfig = field(default_factory=QLearningConfig)

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.learning_rate > 0, f"learning_rate={self.learning_rate}: must be above 0")
        require(self.warmup_steps >= 0, f"warmup_steps={self.warmup_steps}: must be at least 0")
        require(
            0 <= self.final_fraction <= 1,
            f"final_fraction={self.final_fraction}: must be between 0 and 1",
        )
        require_fraction(self, "beta1", "beta2", "momentum")
        numbers = "weight_decay", "epsilon", "max_grad_norm", "entropy_threshold", "noise_scale"
        for name in numbers:
            value = getattr(self, name)
            require(value >= 0, f"{name}={value}: must be at least 0")
        self._check_decay()
        self._check_that_every_field_counts()
        if self.name.startswith("q_learning"):
            name = "momentum" if self.name == "q_learning_sgd" else "beta1"
            value, low = getattr(self, name), self.controller.min_momentum
            require(
                low <= value <= self.controller.max_momentum,
                f"{name}={value}: must lie within the controller's min_momentum={low} and "
                f"max_momentum={self.controller.max_momentum}",
            )

    def _check_decay(self) -> None:
        """Past these bounds a weight that nothing else moves grows from step to step."""
        most = 2 * (1 + self.momentum) if self.name == "sgd" else 2.0
        rate, decay = self.learning_rate, self.weight_decay
        require(
            rate * decay <= most,
            f"weight_decay={decay}: times learning_rate={rate} it must be at most {most:g}, or "
            "weights grow without bound; lower one of them",
        )

    def _check_that_every_field_counts(self) -> None:
        for name, takers in _ONLY_FOR.items():
            given, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            changed = [(name, given, default)] if given != default else []
            if name == "controller":
                own = [
                    (f.name, getattr(given, f.name), f.default) for f in dataclasses.fields(given)
                ]
                changed = [(f"{name}.{key}", *pair) for key, *pair in own if pair[0] != pair[1]]
            for where, value, usual in changed:
                require(
                    self.name in takers,
                    f"{where}={value}: has no effect on {self.name}; leave it at {usual} or "
                    f"choose optimizer.name {' or '.join(takers)}",
                )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where bytes come from and how they become windows of `sequence_length` ids.

    `paths` empty means the source of the running interpreter's standard library. Documents are
    split into training and validation by a hash of `split_seed` and the document's index, so that
    about `validation_fraction` of them are held out; `append_eos` closes each document with the
    end-of-sequence id.

    `warmup_lengths`: the first steps train on pieces of that many ids, into which the windows of a
    batch are cut, `warmup_length_steps` steps on each length in turn; a step's bytes stay the same.
    """

    paths: tuple[str, ...] = ()
    sequence_length: int = 512
    validation_fraction: float = 0.02
    split_seed: int = 0
    shuffle_seed: int = 0
    append_eos: bool = True
    warmup_lengths: tuple[int, ...] = ()
    warmup_length_steps: int = 100

    def __post_init__(self) -> None:
        require_finite(self)
        require_positive(self, "sequence_length", "warmup_length_steps")
        require_fraction(self, "validation_fraction")
        for piece in self.warmup_lengths:
            require(
                piece >= 1 and self.sequence_length % piece == 0,
                f"warmup_lengths={self.warmup_lengths}: each must divide "
                f"sequence_length={self.sequence_length}",
            )

    def length_at(self, step: int) -> int:
        """Ids in each row that the step numbered `step`, from 0, trains on."""
        stage = step // self.warmup_length_steps
        return (*self.warmup_lengths, self.sequence_length)[min(stage, len(self.warmup_lengths))]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The run. `batch_size` is global and counts windows; 0 for `devices` means all there are.

    Each `fsdp` of the devices hold one copy of parameters and optimizer state together, cut in as
    many parts; 1 means a whole copy on every device.

    `compute_dtype="auto"` is bfloat16 on accelerators and float32 on a CPU; parameters stay
    float32. `eval_every=0` and `checkpoint_every=0` leave only the last step's.
    `eval_windows` bounds the validation windows of each evaluation during training.
    A step whose loss or gradient is no number is skipped; `max_bad_steps` of them in a row end the
    run. So does a process that shows no progress for `step_timeout` seconds (0: never).
    `track` names what gets the metrics besides `metrics.jsonl`.
    `entropy_from` names a calibrated run folder, from which BLT with patcher="entropy" takes its
    entropy model: sizes, weights, threshold and mean patch length.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulation_steps: int = 1
    seed: int = 0
    devices: int = 0
    fsdp: int = 1
    parallel: Literal["jit", "shard_map"] = "jit"
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    remat: bool = False
    log_every: int = 10
    eval_every: int = 250
    eval_windows: int = 64
    checkpoint_every: int = 250
    keep_last: int = 2
    keep_best: int = 1
    max_bad_steps: int = 20
    step_timeout: int = 1800
    entropy_from: str = ""
    track: tuple[Literal["tensorboard", "wandb"], ...] = ()

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch_size", "accumulation_steps", "log_every")
        require_positive(self, "keep_last", "eval_windows", "fsdp", "max_bad_steps")
        counts = ("devices", "eval_every", "checkpoint_every", "keep_best", "seed", "step_timeout")
        for name in counts:
            value = getattr(self, name)
            require(value >= 0, f"{name}={value}: must be at least 0")
        require(
            self.batch_size % self.accumulation_steps == 0,
            f"batch_size={self.batch_size}: must be a multiple of "
            f"accumulation_steps={self.accumulation_steps}",
        )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A named run: everything that `bytelm train NAME` needs.

    `patching`, which no recipe sets, is what `train` and `calibrate` found out about the patches.
    """

    name: str
    model: ModelConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    patching: PatchingContract | None = None


def require_document_ends(recipe: Recipe) -> None:
    """Raises `ValueError` where a model resets behind documents whose ends the data do not tell."""
    require(
        recipe.model.reset_on != "document" or recipe.data.append_eos,
        "model.reset_on=document: needs data.append_eos=True, for it is the end-of-sequence id "
        "behind each document that resets; or choose newline",
    )


def to_dict(config: Any) -> Any:
    """JSON-ready form of a config; a model config carries its `architecture`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        fields = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        tag = getattr(config, "architecture", None)
        return fields if tag is None else {"architecture": tag, **fields}
    if isinstance(config, (tuple, list)):
        return [to_dict(item) for item in config]
    return config


def from_dict(kind: Any, value: Any, where: str = "config") -> Any:
    """Builds `kind` from what `to_dict` gave. Unknown, missing or ill-typed fields raise."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(None) in arguments:
        return None if value is None else from_dict(arguments[0], value, where)
    if origin in (types.UnionType, typing.Union) or kind in MODEL_CONFIGS:
        return model_from_dict(value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_dict(kind, value, where)
    if origin is Literal:
        require(value in arguments, f"{where}={value!r}: choose one of {', '.join(arguments)}")
        return value
    if origin is tuple:
        require(isinstance(value, (list, tuple)), f"{where}={value!r}: must be a list")
        return tuple(from_dict(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        fits = abs(value) <= LARGEST_FLOAT
        require(fits, f"{where}: must be a finite number, at most {LARGEST_FLOAT:.7g}")
        return float(value)
    require(type(value) is kind, f"{where}={value!r}: must be of type {kind.__name__}")
    return value


def model_from_dict(value: Any, where: str = "model") -> Any:
    """The model config whose `architecture` the dictionary names."""
    require(isinstance(value, dict), f"{where}={value!r}: must be an object")
    fields = dict(value)
    tag = fields.pop("architecture", None)
    known = {kind.architecture: kind for kind in MODEL_CONFIGS}
    require(
        isinstance(tag, str) and tag in known,
        f"{where}.architecture={tag!r}: choose one of {', '.join(known)}",
    )
    return _dataclass_from_dict(known[tag], fields, where)


def _dataclass_from_dict(kind: Any, value: Any, where: str) -> Any:
    require(isinstance(value, dict), f"{where}={value!r}: must be an object")
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - names)
    require(
        not unknown, f"{where}.{unknown[0] if unknown else ''}: unknown field of {kind.__name__}"
    )
    values = {k: from_dict(hints[k], v, f"{where}.{k}") for k, v in value.items()}
    try:
        return kind(**values)
    except TypeError as error:  # a field without default is missing
        raise ValueError(f"{where}: {error}") from None
