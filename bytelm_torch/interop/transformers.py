"""The models as transformers knows models: `AutoConfig`, `AutoModelForCausalLM`, `AutoTokenizer`.

    from bytelm_torch import hf
    hf.from_native(bytelm_torch.from_pretrained("exports/tiny")).save_pretrained("hf/tiny")
    hf.tokenizer_for(...).save_pretrained("hf/tiny")

Importing this module registers the classes. The folder that `save_pretrained` writes is also an
export: `bytelm_torch.from_pretrained`, `bytelm import` and `bytelm parity` read it as it is.

transformers reads `logits[:, t]` as the distribution of id t + 1, ours is that of id t: `forward`
appends an id that no logit sees and returns ours from position 1 on. B rows, T ids, V vocabulary.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, no_type_check

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

from bytelm.config import MODEL_CONFIGS, ModelConfig, require, to_dict
from bytelm.export import (
    FORMAT_VERSION,
    LIBRARY,
    one_line,
    parse_description,
    patching_of,
    refuse_non_finite,
    training_length_of,
)
from bytelm_torch.interop import export
from bytelm_torch.interop.finite import first_non_finite
from bytelm_torch.interop.transformers_cache import ByteCache, given_cache
from bytelm_torch.interop.transformers_inputs import (
    check_labels,
    check_positions,
    checked_ids,
    checked_mask,
    largest,
    left_justify,
    refuse,
)
from bytelm_torch.interop.transformers_tokenizer import ByteLMTokenizer, tokenizer_for
from bytelm_torch.models import build_model

__all__ = [
    "ByteCache",
    "ByteLMConfig",
    "ByteLMForCausalLM",
    "ByteLMTokenizer",
    "from_native",
    "tokenizer_for",
]

_IGNORED = -100
"""The label that transformers leaves out of the loss."""

_OUTPUTS = {field.name for field in fields(CausalLMOutputWithPast)}
_CACHE = "cache" if "cache" in _OUTPUTS else "past_key_values"
"""What transformers calls a cache: `past_key_values` before release 5.24."""

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
    native: ClassVar[Any] = MODEL_CONFIGS[0]
    bytelm: dict[str, Any] | None = None

    def __post_init__(self, **fields: Any) -> None:
        kind = type(self).native
        named = {"library": LIBRARY, "format_version": FORMAT_VERSION}
        config, extra = parse_description(named | (self.bytelm or to_dict(kind())))
        why = f"must be {kind.architecture!r} in a {type(self).__name__}"
        require(isinstance(config, kind), f"bytelm.architecture={config.architecture!r}: {why}")
        self.bytelm = export.describe(config, extra)
        for name in ("max_position_embeddings", "num_hidden_layers"):
            fields.pop(name, None)  # the model says it, not a file
        super().__post_init__(**fields)
        vocab = config.vocab
        self.vocab_size, self.tie_word_embeddings = vocab.size, False
        self.pad_token_id, self.bos_token_id = vocab.pad_id, vocab.bos_id
        self.eos_token_id = vocab.eos_id
        self.num_hidden_layers = config.layer_count  # a cache that `generate` makes asks for it
        if config.longest_input is not None:  # else no attribute: programs ask whether there is one
            self.max_position_embeddings = config.longest_input - 1  # `forward` appends an id

    def to_native(self) -> ModelConfig:
        """The configuration for `build_model`."""
        return parse_description(self.bytelm or {})[0]


# ---- models ---------------------------------------------------------------------------------


class ByteLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of this library, `model`, behind the interface of transformers.

    `loss` is that of transformers, the mean over `labels[:, 1:]` without −100, plus a balance loss.
    What `attention_mask` leaves out, at either end of a row or inside it, changes no logit.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_cache_class = False

    def __init__(self, config: ByteLMConfig):
        super().__init__(config)
        native = config.to_native()
        require(native.causal, "causal=False: generation needs a causal model")
        self.model = build_model(native)
        extra = (config.bytelm or {}).get("extra", {})
        self.model.patching = patching_of(extra)
        self.model.training_length = training_length_of(extra)
        self.register_load_state_dict_pre_hook(_take_names_of_export)
        self.post_init()
        vocab = native.vocab
        known = {*range(vocab.offset, vocab.offset + 256), vocab.eos_id}
        silent = [i for i in range(vocab.size) if i not in known]
        self.generation_config.suppress_tokens = silent

    def _init_weights(self, module: Any) -> None:
        """Nothing: `build_model` initialised every parameter."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *arguments: Any, **options: Any
    ) -> Any:
        """As in transformers, but never in part: raises `ValueError` for the first tensor that is
        missing, unexpected, of another shape or not finite.
        """
        report = options.pop("output_loading_info", False)
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *arguments, **options)
        model, loading = loaded
        problem = _loading_problem(loading, model)
        require(problem is None, f"{pretrained_model_name_or_path}: {problem}")
        return (model, loading) if report else model

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        return_dict: bool | None = None,
        cache: Any = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V], those behind each id.

        `attention_mask` is 0 where an id is none of its row's, wherever that is: at its logits
        stands what follows the ids before it. `past_key_values` is a cache that an earlier call
        gave; the mask spans its ids, too, and may leave out others of them than before. From
        release 5.24 on transformers calls it `cache`; either name is taken.
        `use_cache=True` without a past gives one, and the logits of the next id alone, [B, 1, V].
        `position_ids` must be those of one text a row. A row as long as the model allows has NaN
        in the place of its last logits, and is taken with `labels` alone.

        Raises `ValueError` for another argument that is neither None nor False, and for a
        combination that cannot be honoured.
        """
        refuse(others)
        past = given_cache(past_key_values, cache)
        ids = checked_ids(input_ids, self.model.config.vocab)
        seen = 0 if past is None else past.get_seq_length()
        real = checked_mask(attention_mask, (len(ids), seen + ids.shape[1]))
        if past is not None or use_cache:
            require(labels is None, "labels: a loss has no cache; leave out use_cache and the past")
            past = ByteCache(self.model, len(ids), self._limit()) if past is None else past
            logits = past.extend(ids, real, position_ids)
            named: dict[str, Any] = {_CACHE: past}
            output = CausalLMOutputWithPast(logits=logits, **named)
        else:
            check_labels(labels, (len(ids), ids.shape[1]))
            output = self._uncached(ids, real, position_ids, labels, num_items_in_batch)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _uncached(
        self,
        ids: Tensor,
        real: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None,
        items: Any,
    ) -> CausalLMOutputWithPast:
        vocab = self.model.config.vocab
        rows = left_justify(ids, real, vocab.pad_id)
        check_positions(position_ids, real, rows.counts - 1)
        held, limit = rows.ids, self._limit()
        if real is not None and limit is not None and held.shape[1] >= limit:
            held = held[:, : largest(rows.lengths)]
        capacity = limit is None or held.shape[1] < limit
        require(
            capacity or labels is not None,
            f"max_length={limit}: no room to predict what follows {held.shape[1]} ids; give fewer",
        )
        output = self.model.outputs(F.pad(held, (0, 1), value=vocab.offset) if capacity else held)
        logits = output.logits if capacity else F.pad(output.logits, (0, 0, 0, 1), value=math.nan)
        if real is None:
            logits = logits[:, 1:]
        else:
            logits = logits.take_along_dim(rows.counts[..., None], dim=1)
        loss = None
        if labels is not None:
            wanted = labels[:, 1:].to(logits.device)
            wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
            nats = F.cross_entropy(
                wide.flatten(0, 1), wanted.flatten(), ignore_index=_IGNORED, reduction="sum"
            )
            counted = (wanted != _IGNORED).sum().clamp(min=1) if items is None else items
            loss = nats / counted + output.extra_loss.mean()
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def _prepare_position_ids_for_generation(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *_: Any
    ) -> None:
        """None: positions follow from the mask, here for padding on the right, too."""

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
        refuse_non_finite(_non_finite(plain))
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
        missing, unexpected, of another shape or not finite: it raises `ValueError`, and nothing is
        loaded.
        `self.model.load_state_dict` does load parts.
        """
        plain = _as_exported(state_dict)
        export.check_state(plain, self.model)
        refuse_non_finite(_non_finite(plain))
        return super().load_state_dict(state_dict, assign=assign)


def _as_exported(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(_PREFIX): value for name, value in state.items()}


def _loading_problem(loading: Mapping[str, Any], model: ByteLMForCausalLM) -> str | None:
    """What transformers' report of loading says is wrong, in one line, or which tensor is."""
    lines = [f"{name}: missing; give whole weights" for name in loading["missing_keys"]]
    why = "unexpected; the configuration has no such tensor"
    lines += [f"{name}: {why}" for name in loading["unexpected_keys"]]
    for name, shape, expected in loading["mismatched_keys"]:
        lines.append(f"{name}: shape {tuple(shape)}; expected {tuple(expected)}")
    lines += map(one_line, loading["error_msgs"])
    if lines:
        return min(lines).removeprefix(_PREFIX)
    bad = _non_finite(_as_exported(model.state_dict()))
    return bad and f"{bad}: holds NaN or infinity; take the weights of an earlier checkpoint"


def _non_finite(state: Mapping[str, Tensor]) -> str | None:
    """The first tensor that holds NaN or infinity, but for those that a device map left on disk."""
    return first_non_finite({n: value for n, value in state.items() if not value.is_meta})


def _take_names_of_export(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Calls the tensors of an export as the wrapper calls them, behind other modules too."""
    for name in [name for name in state if name.startswith(prefix)]:
        local = name.removeprefix(prefix)
        if not local.startswith(_PREFIX):
            state[prefix + _PREFIX + local] = state.pop(name)


# ---- one configuration and one model for each architecture ----------------------------------


def _register(native: type[ModelConfig]) -> Any:
    """`MegabyteForCausalLM` of `MegabyteConfig`, which the Auto classes know from then on.

    Its `config_class` is `MegabyteLMConfig`.
    """
    stem, home = native.__name__.removesuffix("Config"), {"__module__": __name__}
    kind = {"model_type": f"bytelm_{native.architecture}", "native": native}
    about = {"__doc__": f"Of `{stem}ForCausalLM`."}
    config: Any = type(f"{stem}LMConfig", (ByteLMConfig,), home | kind | about)
    about = {"__doc__": f"`{stem}` behind the interface of transformers.", "config_class": config}
    model: Any = type(f"{stem}ForCausalLM", (ByteLMForCausalLM,), home | about)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForCausalLM.register(config, model, exist_ok=True)
    AutoTokenizer.register(config, slow_tokenizer_class=ByteLMTokenizer, exist_ok=True)
    return model


_MODELS: dict[type[ModelConfig], Any] = {native: _register(native) for native in MODEL_CONFIGS}

CLASSES: dict[str, Any] = {
    kind.__name__: kind for model in _MODELS.values() for kind in (model.config_class, model)
}
"""The classes by name; each is an attribute of this module, where pickle looks for it."""

globals().update(CLASSES)
__all__ += list(CLASSES)  # pyright: ignore[reportUnsupportedDunderAll]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...


def from_native(model: Any, kind: type[ByteLMForCausalLM] | None = None) -> ByteLMForCausalLM:
    """The same model, its parameters shared, behind the interface of transformers.

    `kind` is a subclass to use in place of the registered class. A model compiled by
    `torch.compile` is unwrapped first. Raises `ValueError` when `model` is not one of
    `build_model`.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile put around it
    native: Any = getattr(model, "config", None)
    why = f"model={type(model).__name__}: must be of build_model"
    require(isinstance(native, MODEL_CONFIGS), why)
    chosen: Any = kind or _MODELS[type(native)]
    with torch.device("meta"):
        made = chosen(chosen.config_class(bytelm=export.describe(model)))
    made.model = model
    made.config.dtype = next(model.parameters()).dtype
    return made
