"""What every configuration is built from: field checks and the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

LARGEST_FLOAT = 3.4028234663852886e38
"""The largest number of float32, in which every model and optimizer computes."""

LARGEST_INTEGER = 2**31 - 1
"""The largest number of int32, in which every model and optimizer counts."""

LARGEST_SEED = 2**32 - 1
"""The largest seed: random keys hold 32 bits, and a larger seed would give a smaller one's run."""


_LONGEST = 900
"""Characters of a message."""


def require(condition: bool, message: str) -> None:
    """Raises `ValueError(message)` unless `condition` holds.

    A message that quotes a name or value from a file is cut to what people read.
    """
    if not condition:
        raise ValueError(message if len(message) <= _LONGEST else f"{message[: _LONGEST - 1]}…")


def require_number(name: str, value: Any) -> None:
    """Raises `ValueError` for a number that no array holds; other values pass.

    Those are floats that are not finite in float32, integers past int32, and seeds, which are the
    numbers whose names end with `seed`, outside 0 to 2**32 − 1.
    """
    if isinstance(value, float):
        finite = abs(value) <= LARGEST_FLOAT
        require(finite, f"{name}={value}: must be a finite value, at most {LARGEST_FLOAT:.7g}")
    elif name.endswith("seed") and isinstance(value, int):
        fits = 0 <= value <= LARGEST_SEED
        require(fits, f"{name}={value}: choose one from 0 to {LARGEST_SEED}")
    elif isinstance(value, int):
        require(value <= LARGEST_INTEGER, f"{name}={value}: must be at most {LARGEST_INTEGER}")
        least = -LARGEST_INTEGER
        require(value >= least, f"{name}={value}: must be at least {least}")


def _as_float(value: int) -> float:
    return float(value) if abs(value) <= LARGEST_FLOAT else math.inf


def require_amount(name: str, value: Any) -> None:
    """Raises `ValueError` for a number that no float32 holds or that is below 0.

    Other values pass: arrays and schedules, which are known later.
    """
    if isinstance(value, (int, float)):
        require_number(name, value if isinstance(value, float) else _as_float(value))
        require(value >= 0, f"{name}={value}: must be at least 0")


def require_numbers(config: Any, prefix: str = "") -> None:
    """Raises `ValueError` for the first field that `require_number` refuses, in lists as well.

    The message begins with `prefix`.
    """
    for field in fields(config):
        value = getattr(config, field.name)
        if "float" in str(field.type) and isinstance(value, int):
            value = _as_float(value)
        for item in value if isinstance(value, tuple) else (value,):
            require_number(prefix + field.name, item)


def require_positive(config: Any, *names: str) -> None:
    """Raises `ValueError` for the first of the named fields that is not at least 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{name}={value}: must be at least 1")


def require_non_negative(config: Any, *names: str) -> None:
    """Raises `ValueError` for the first of the named fields that is below 0."""
    for name in names:
        value = getattr(config, name)
        require(value >= 0, f"{name}={value}: must be at least 0")


def require_fraction(config: Any, *names: str) -> None:
    """Raises `ValueError` for the first of the named fields that lies outside [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, f"{name}={value}: must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ByteVocab:
    """The id map: byte b has id b + offset; the other ids are specials or unused."""

    size: int = 512
    """Number of ids, and width of the logits."""
    offset: int = 0
    """The id of byte 0; byte b has id b + offset."""
    pad_id: int = 257
    """Id that fills rows; it is never counted in a loss."""
    bos_id: int = 256
    """Id that starts a text inside the model."""
    eos_id: int = 258
    """Id that ends a document."""

    def __post_init__(self) -> None:
        require_numbers(self, "vocab.")
        require(self.offset >= 0, f"vocab.offset={self.offset}: must be at least 0")
        least = self.offset + 256
        needed = max(least, 259)
        ids = f"256 bytes, pad_id, bos_id and eos_id need at least {needed}"
        require(self.size >= needed, f"vocab.size={self.size}: {ids}")
        specials = {"pad_id": self.pad_id, "bos_id": self.bos_id, "eos_id": self.eos_id}
        for name, value in specials.items():
            inside = 0 <= value < self.size and not self.offset <= value < least
            free = f"0 to {self.size - 1} except the bytes' {self.offset} to {least - 1}"
            require(inside, f"vocab.{name}={value}: choose an id from {free}")
        distinct = len(set(specials.values())) == len(specials)
        require(distinct, f"vocab: pad_id, bos_id and eos_id must differ, got {specials}")


Config = TypeVar("Config")
"""The class of a configuration, for methods that return their own class."""


class ArchitectureConfig:
    """The questions that every architecture answers, with the most common answers.

    Model configurations derive from it, so that no caller has to ask which architecture one is.
    """

    architecture: ClassVar[str]
    """The tag in `config.json`."""
    frozen_prefixes: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of the parameters that training does not change."""
    has_patching_contract: ClassVar[bool] = False
    """Whether a run records the patch lengths of the data it was trained on."""
    cut_stacks: ClassVar[tuple[str, ...]] = ()
    """Prefixes of `heads`, `kv_heads` and `hidden_dim` of the stacks that `train.tensor` cuts."""
    patcher_prefix: ClassVar[str] = ""
    """Prefix of its parameters' names in the model that `patcher_config` describes."""
    transformers_type: ClassVar[str | None] = None
    """The `model_type` by which Hugging Face transformers knows the architecture."""
    has_tied_gradients: ClassVar[bool] = False
    """Whether rounding chooses where a gradient goes when bytes repeat: a maximum of equal values.
    """
    takes_donor: ClassVar[bool] = False
    """Whether the layers of a token model can be its global transformer."""
    causal: bool = True
    """Whether logits depend on earlier bytes alone, so that the model can generate."""
    vocab: ByteVocab

    def parameter_count(self) -> int:
        """Number of parameters, in closed form."""
        raise NotImplementedError(f"{type(self).__name__}.parameter_count")

    def flops_per_byte(self, length: int) -> float:
        """Forward operations per byte for rows of `length` bytes; multiply-add counts as two."""
        raise NotImplementedError(f"{type(self).__name__}.flops_per_byte")

    def uses_per_byte(self, name: str, length: int) -> float:
        """How often the kernel called `name` multiplies something, per byte."""
        return 1.0

    def executed_flops_per_byte(self, length: int) -> float:
        """As `flops_per_byte`, with what is computed for capacity that stays empty."""
        return self.flops_per_byte(length)

    @property
    def transformers_problem(self) -> str | None:
        """Why transformers has no such model, naming the field; None if it has."""
        return f"architecture={self.architecture!r}: transformers has no such model"

    @property
    def uncompilable(self) -> str | None:
        """Why no graph of fixed shapes holds the twin, naming the field; None if one does."""
        return None

    @property
    def layer_count(self) -> int:
        """Layers of all stacks, which are the fields whose names end with `layers`."""
        config: Any = self
        names = [f.name for f in fields(config) if f.name.endswith("layers")]
        return sum(getattr(self, name) for name in names)

    @property
    def longest_input(self) -> int | None:
        """The longest row in bytes; None if there is no limit."""
        return None

    @property
    def logit_width(self) -> int:
        """Number of ids for which the model computes logits."""
        return self.vocab.size

    @property
    def parity_length(self) -> int:
        """Bytes per row when the twins are compared: an odd number, just over four patches."""
        return 35

    def patch_rule(self, threshold: float | None = None) -> str:
        """The patching rule, in a few words.

        `threshold` is the one for which a run was calibrated, None if it was not.
        """
        return "no patches in this architecture"

    def frozen_flops_per_byte(self, length: int) -> float:
        """Forward operations per byte that no backward pass follows."""
        return 0.0

    @property
    def tensor_sizes(self) -> dict[str, int] | None:
        """What `train.tensor` must divide, by field; None for layers that it does not cut."""
        sizes: dict[str, int] = {}
        for stack in self.cut_stacks:
            heads = sizes[f"{stack}heads"] = getattr(self, f"{stack}heads")
            sizes[f"{stack}kv_heads"] = getattr(self, f"{stack}kv_heads") or heads
            sizes[f"{stack}hidden_dim"] = getattr(self, f"{stack}hidden_dim")
        return sizes or None

    @property
    def ineffective(self) -> dict[str, str]:
        """Field → the setting of another field under which it has no effect, as `name=value`."""
        return {}

    @property
    def needs_entropy_model(self) -> bool:
        """Whether a new run takes its patcher from the run of a trained entropy model."""
        return False

    def patcher_config(self) -> Any:
        """The model whose threshold `bytelm calibrate` sets, as a `BLTConfig`.

        Raises `ValueError` for a model whose patches have no threshold.
        """
        why = "cuts no patches by entropy; give a run of an entropy model or of BLT"
        raise ValueError(f"architecture={self.architecture}: {why}")

    def with_vocab(self: Config, vocab: ByteVocab) -> Config:
        """This configuration with another id map; raises `ValueError` if that is impossible."""
        return replace(self, vocab=vocab)  # pyright: ignore[reportArgumentType]

    def with_resets(self: Config, reset_on: str) -> Config:
        """This configuration with segments that start as `reset_on` says."""
        return replace(self, reset_on=reset_on)  # pyright: ignore[reportArgumentType]
