"""The models as transformers knows models: `AutoConfig`, `AutoModelForCausalLM`, `AutoTokenizer`.

    from bytelm_torch import hf
    hf.from_native(bytelm_torch.from_pretrained("exports/tiny")).save_pretrained("hf/tiny")
    hf.tokenizer_for(...).save_pretrained("hf/tiny")

Importing this module registers the classes. The folder that `save_pretrained` writes is also an
export: `bytelm_torch.from_pretrained`, `bytelm import` and `bytelm parity` read it as it is.

transformers reads `logits[:, t]` as the distribution of id t + 1, ours is that of id t: `forward`
appends an id that no logit sees and returns ours from position 1 on. B rows, T ids, V vocabulary.
"""

import sys
from collections.abc import Mapping
from typing import Any, ClassVar, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from bytelm.config import (
    BLTConfig,
    EntropyConfig,
    LFByteConfig,
    MegabyteConfig,
    ModelConfig,
    require,
    to_dict,
)
from bytelm_torch.interop import export
from bytelm_torch.interop.finite import first_non_finite, require_finite
from bytelm_torch.interop.transformers_cache import ByteCache
from bytelm_torch.interop.transformers_tokenizer import ByteLMTokenizer, tokenizer_for
from bytelm_torch.models import build_model

__all__ = [
    "BLTForCausalLM",
    "BLTLMConfig",
    "ByteCache",
    "ByteLMConfig",
    "ByteLMForCausalLM",
    "ByteLMTokenizer",
    "EntropyForCausalLM",
    "EntropyLMConfig",
    "LFByteForCausalLM",
    "LFByteLMConfig",
    "MegabyteForCausalLM",
    "MegabyteLMConfig",
    "from_native",
    "tokenizer_for",
]

_IGNORED = -100
"""The label that transformers leaves out of the loss."""

_PREFIX = "model."
"""What the wrapper's tensors are called beyond their names in an export."""


# ---- configuration --------------------------------------------------------------------------

# transformers makes dataclasses of these, whose generated __init__ type checkers of tests misread.


@no_type_check
class ByteLMConfig(PreTrainedConfig):
    """Carries what an export says of a model, or its `to_dict` alone, in the field `bytelm`.

    The ids of the specials are the vocabulary's. Raises `ValueError` for a field that is unknown.
    """

    model_type: ClassVar[str] = "bytelm"
    native: ClassVar[Any] = MegabyteConfig
    bytelm: dict[str, Any] | None = None

    def __post_init__(self, **fields: Any) -> None:
        kind = type(self).native
        named = {"library": export.LIBRARY, "format_version": export.FORMAT_VERSION}
        config, extra = export.parse_description(named | (self.bytelm or to_dict(kind())))
        why = f"must be {kind.architecture!r} in a {type(self).__name__}"
        require(isinstance(config, kind), f"bytelm.architecture={config.architecture!r}: {why}")
        self.bytelm = export.describe(config, extra)
        super().__post_init__(**fields)
        vocab = config.vocab
        self.vocab_size, self.tie_word_embeddings = vocab.size, False
        self.pad_token_id, self.bos_token_id = vocab.pad_id, vocab.bos_id
        self.eos_token_id = vocab.eos_id

    def to_native(self) -> ModelConfig:
        """The configuration for `build_model`."""
        return export.parse_description(self.bytelm or {})[0]


@no_type_check
class MegabyteLMConfig(ByteLMConfig):
    """Of `MegabyteForCausalLM`."""

    model_type: ClassVar[str] = "bytelm_megabyte"
    native: ClassVar[Any] = MegabyteConfig


@no_type_check
class BLTLMConfig(ByteLMConfig):
    """Of `BLTForCausalLM`."""

    model_type: ClassVar[str] = "bytelm_blt"
    native: ClassVar[Any] = BLTConfig


@no_type_check
class LFByteLMConfig(ByteLMConfig):
    """Of `LFByteForCausalLM`."""

    model_type: ClassVar[str] = "bytelm_lfbyte"
    native: ClassVar[Any] = LFByteConfig


@no_type_check
class EntropyLMConfig(ByteLMConfig):
    """Of `EntropyForCausalLM`."""

    model_type: ClassVar[str] = "bytelm_entropy"
    native: ClassVar[Any] = EntropyConfig


# ---- models ---------------------------------------------------------------------------------


class ByteLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of this library, `model`, behind the interface of transformers.

    In `forward` a row may be padded on either side, as `attention_mask` tells: it changes no logit.
    `loss` is that of transformers, the mean over `labels[:, 1:]` without −100, plus a balance loss.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_cache_class = False

    def __init__(self, config: ByteLMConfig):
        super().__init__(config)
        native = config.to_native()
        require(getattr(native, "causal", True), "causal=False: generation needs a causal model")
        self.model = build_model(native)
        extra = (config.bytelm or {}).get("extra", {})
        self.model.patching = export.patching_of(extra)  # pyright: ignore[reportArgumentType]
        self.register_load_state_dict_pre_hook(_take_names_of_export)
        self.post_init()
        vocab = native.vocab
        known = {*range(vocab.offset, vocab.offset + 256), vocab.eos_id}
        silent = [i for i in range(vocab.size) if i not in known]
        self.generation_config.suppress_tokens = silent  # pyright: ignore[reportOptionalMemberAccess]

    def _init_weights(self, module: Any) -> None:
        """Nothing: `build_model` initialised every parameter."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: ByteCache | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V], or [B, 1, V] of the next id alone with `use_cache=True`."""
        if use_cache and labels is None:
            if past_key_values is None:
                ids, lengths = _left_justified(input_ids, attention_mask)
                capacity = ids.shape[1] + max(64, ids.shape[1] // 2)
                past_key_values = ByteCache(self.model, len(ids), capacity, self._limit())
                logits = past_key_values.prefill(ids, lengths)
            else:
                steps = [past_key_values.append(column) for column in input_ids.T]
                logits = torch.cat(steps, dim=1)
            output = CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values)  # pyright: ignore
        else:
            output = self._uncached(input_ids, attention_mask, labels, num_items_in_batch)
        return output.to_tuple() if return_dict is False else output

    def _uncached(
        self, input_ids: Tensor, mask: Tensor | None, labels: Tensor | None, items: Any
    ) -> CausalLMOutputWithPast:
        ids, _ = _left_justified(input_ids, mask)
        limit, any_byte = self._limit(), self.model.config.vocab.offset
        capacity = limit is None or ids.shape[1] < limit
        require(
            capacity or labels is not None,
            f"max_length={limit}: no room to predict what follows {ids.shape[1]} ids; give fewer",
        )
        output = self.model.outputs(F.pad(ids, (0, 1), value=any_byte) if capacity else ids)
        logits = output.logits[:, 1:]
        if mask is not None:
            shift = _padding(mask)[:, None]
            back = (torch.arange(logits.shape[1], device=ids.device) - shift) % input_ids.shape[1]
            logits = logits.take_along_dim(back.clamp(max=logits.shape[1] - 1)[..., None], dim=1)
        loss = None
        if labels is not None:
            count = input_ids.shape[1] - 1
            wanted = labels[:, 1:].to(logits.device)
            wide = logits[:, :count].to(torch.promote_types(logits.dtype, torch.float32))
            nats = F.cross_entropy(
                wide.flatten(0, 1), wanted.flatten(), ignore_index=_IGNORED, reduction="sum"
            )
            counted = (wanted != _IGNORED).sum().clamp(min=1) if items is None else items
            loss = nats / counted + output.extra_loss.mean()
        return CausalLMOutputWithPast(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]

    def _limit(self) -> int | None:
        native: Any = self.model.config
        return native.longest_input

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: `forward` makes the cache."""
        return False

    def _reorder_cache(self, past: ByteCache, beam_idx: Tensor) -> ByteCache:
        past.reorder_cache(beam_idx)
        return past

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | str = sys.maxsize,
        **options: Any,
    ) -> None:
        """As in transformers; the tensors are called as in an export, and stand in one file."""
        state = self.state_dict() if state_dict is None else state_dict
        plain = _as_exported(state)
        require_finite(first_non_finite(plain))
        super().save_pretrained(
            save_directory,
            is_main_process,
            plain,
            max_shard_size=max_shard_size,
            **options,
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
    ) -> Any:
        """As in torch, by the names of an export or by those of `state_dict()`, but never in part.

        `strict=False`, with which transformers' Trainer resumes, does not help a tensor that is
        missing, unexpected or of another shape: it raises `ValueError`, and nothing is loaded.
        `self.model.load_state_dict` does load parts.
        """
        export.check_state(_as_exported(state_dict), self.model)
        return super().load_state_dict(state_dict, assign=assign)


def _as_exported(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}


def _take_names_of_export(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Calls the tensors of an export as the wrapper calls them, behind other modules too."""
    for name in [name for name in state if name.startswith(prefix)]:
        local = name.removeprefix(prefix)
        if not local.startswith(_PREFIX):
            state[prefix + _PREFIX + local] = state.pop(name)


def _padding(mask: Tensor) -> Tensor:
    """[B] ids of padding before each row's first real one."""
    return (mask != 0).int().argmax(dim=1)


def _left_justified(ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows turned so that their first real id stands in front, and the rows' lengths."""
    length = ids.shape[1]
    if mask is None:
        return ids, torch.full((len(ids),), length, device=ids.device)
    order = (torch.arange(length, device=ids.device) + _padding(mask)[:, None]) % max(length, 1)
    return ids.gather(1, order), (mask != 0).sum(dim=1)


class MegabyteForCausalLM(ByteLMForCausalLM):
    """MEGABYTE."""

    config_class = MegabyteLMConfig


class BLTForCausalLM(ByteLMForCausalLM):
    """Byte Latent Transformer."""

    config_class = BLTLMConfig


class LFByteForCausalLM(ByteLMForCausalLM):
    """LFByteTransformer."""

    config_class = LFByteLMConfig


class EntropyForCausalLM(ByteLMForCausalLM):
    """The plain byte transformer."""

    config_class = EntropyLMConfig


_CLASSES: Any = (MegabyteForCausalLM, BLTForCausalLM, LFByteForCausalLM, EntropyForCausalLM)


def from_native(model: Any, kind: type[ByteLMForCausalLM] | None = None) -> ByteLMForCausalLM:
    """The same model, its parameters shared, behind the interface of transformers.

    `kind` is a subclass to use in place of the registered class. Raises `ValueError` when
    `model` is not one of `build_model`.
    """
    native = getattr(model, "config", None)
    kinds = {kind.config_class.native: kind for kind in _CLASSES}
    require(type(native) in kinds, f"model={type(model).__name__}: must be of build_model")
    chosen: Any = kind or kinds[type(native)]
    with torch.device("meta"):
        made = chosen(chosen.config_class(bytelm=export.describe(model)))
    made.model = model
    made.config.dtype = next(model.parameters()).dtype
    return made


for _kind in _CLASSES:
    AutoConfig.register(_kind.config_class.model_type, _kind.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_kind.config_class, _kind, exist_ok=True)
    AutoTokenizer.register(_kind.config_class, slow_tokenizer_class=ByteLMTokenizer, exist_ok=True)
