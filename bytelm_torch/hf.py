"""The models as transformers knows models: `AutoConfig`, `AutoModelForCausalLM`, `AutoTokenizer`.

    from bytelm_torch import hf
    hf.from_native(bytelm_torch.from_pretrained("exports/tiny")).save_pretrained("hf/tiny")
    hf.tokenizer_for(...).save_pretrained("hf/tiny")

Importing this module registers the classes. The folder that `save_pretrained` writes is also an
export: `bytelm_torch.from_pretrained`, `bytelm import` and `bytelm parity` read it as it is.

transformers reads `logits[:, t]` as the distribution of id t + 1, ours is that of id t: `forward`
appends an id that no logit sees and returns ours from position 1 on. B rows, T ids, V vocabulary,
P bytes a round of the model's decoder.
"""

import contextlib
from collections.abc import Callable
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
    PreTrainedTokenizer,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from bytelm_torch import checkpoint
from bytelm_torch.config import (
    BLTConfig,
    ByteVocab,
    EntropyConfig,
    LFByteConfig,
    MegabyteConfig,
    ModelConfig,
    require,
    to_dict,
)
from bytelm_torch.models import build_model
from bytelm_torch.tokenizer import ByteTokenizer

_IGNORED = -100
"""The label that transformers leaves out of the loss."""


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
        named = {"library": checkpoint.LIBRARY, "format_version": checkpoint.FORMAT_VERSION}
        config, extra = checkpoint.parse_description(named | (self.bytelm or to_dict(kind())))
        why = f"must be {kind.architecture!r} in a {type(self).__name__}"
        require(isinstance(config, kind), f"bytelm.architecture={config.architecture!r}: {why}")
        self.bytelm = checkpoint.describe(config, extra)
        super().__post_init__(**fields)
        vocab = config.vocab
        self.vocab_size, self.tie_word_embeddings = vocab.size, False
        self.pad_token_id, self.bos_token_id = vocab.pad_id, vocab.bos_id
        self.eos_token_id = vocab.eos_id

    def to_native(self) -> ModelConfig:
        """The configuration for `build_model`."""
        return checkpoint.parse_description(self.bytelm or {})[0]


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


# ---- cached decoding ------------------------------------------------------------------------


class _Found(Exception):
    """Ends a round at the byte whose logits are asked for."""


class ByteCache:
    """A decoder's cache for rows whose texts differ in length, one id at a time.

    Rows stand left-justified, so that a row's positions do not depend on its neighbours' padding;
    rows that have come to the same round are decoded together.
    """

    is_compileable = False

    def __init__(self, model: Any, rows: int, capacity: int, limit: int | None):
        patch = model.round_length
        self._model, self._limit = model, limit
        device = next(model.parameters()).device
        self._seen = 0
        self._lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        self._ids = torch.full((rows, 0), model.config.vocab.pad_id, device=device)
        self._capacity = 0
        self._reserve(-(-capacity // patch) * patch)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that `forward` was given so far, padding included."""
        return self._seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was."""
        self._ids, self._lengths = self._ids[beam_idx], self._lengths[beam_idx]
        self._state = _each_tensor(self._state, lambda x: x[beam_idx])

    def prefill(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Takes the prompts [B, T], left-justified; logits [B, 1, V] of each row's next id."""
        self._seen += ids.shape[1]
        self._ids[:, : ids.shape[1]] = ids
        self._lengths = lengths.clone()
        self._fill()
        return self._logits()[:, None]

    def append(self, ids: Tensor) -> Tensor:
        """Takes one more id a row [B]; logits [B, 1, V] of each row's next."""
        self._seen += 1
        if grows := int(self._lengths.max()) + 1 >= self._capacity:
            self._reserve(2 * self._capacity)
        self._ids.scatter_(1, self._lengths[:, None], ids[:, None])
        self._lengths += 1
        if grows:  # only now: the round before the next must be whole
            self._fill()
        return self._logits()[:, None]

    def _reserve(self, capacity: int) -> None:
        patch = self._model.round_length
        if self._limit is not None:
            capacity = min(capacity, self._limit)
            require(
                capacity > self._capacity,
                f"max_length={self._limit}: the text has reached it; generate fewer bytes",
            )
        more, pad = max(capacity, patch) - self._capacity, self._model.config.vocab.pad_id
        self._ids = F.pad(self._ids, (0, more), value=pad)
        self._capacity = self._ids.shape[1]
        self._state = self._model.init_cache(len(self._ids), self._capacity)

    def _fill(self) -> None:
        """Writes the rounds that the longest row has finished, in one pass."""
        patch = self._model.round_length
        whole = int(self._lengths.max()) // patch * patch
        if whole:
            self._state = self._model.prefill(self._ids[:, :whole], self._state)

    def _logits(self) -> Tensor:
        rounds = self._lengths // self._model.round_length
        if bool((rounds == rounds[0]).all()):
            logits, self._state = self._run(self._state, self._ids, self._lengths, int(rounds[0]))
            return logits
        found: list[tuple[Tensor, Tensor]] = []
        for index in rounds.unique().tolist():
            rows = (rounds == index).nonzero()[:, 0]
            part = _each_tensor(self._state, lambda x, rows=rows: x[rows])
            logits, part = self._run(part, self._ids[rows], self._lengths[rows], index)
            _write_rows(self._state, part, rows)
            found.append((rows, logits))
        order = torch.cat([rows for rows, _ in found]).argsort()
        return torch.cat([logits for _, logits in found])[order]

    def _run(self, state: Any, ids: Tensor, lengths: Tensor, index: int) -> tuple[Tensor, Any]:
        """Logits [B, V] of the next id of rows that are all in round `index`, and the cache."""
        patch = self._model.round_length
        start = index * patch
        here = ids[:, start : start + patch]
        pads = torch.full_like(here, self._model.config.vocab.pad_id)
        previous = ids[:, start - patch : start] if index else pads
        places = lengths - start
        last, kept = int(places.max()), []

        def choose(logits: Tensor, i: int) -> Tensor:
            kept.append(logits)
            if i == last and i + 1 < patch:
                raise _Found  # the caches are written in place, so nothing is lost
            return here[:, i]

        with contextlib.suppress(_Found):
            state, _ = self._model.decode_round(state, previous, index, choose)
        rows = torch.arange(len(ids), device=ids.device)
        return torch.stack(kept, dim=1)[rows, places], state


def _each_tensor(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same tree of tuples with `change` applied to every tensor that has rows."""
    if isinstance(tree, Tensor):
        return change(tree) if tree.ndim else tree
    if isinstance(tree, tuple):
        parts = [_each_tensor(part, change) for part in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def _write_rows(tree: Any, part: Any, rows: Tensor) -> None:
    if isinstance(tree, Tensor):
        if tree.ndim:
            tree[rows] = part
    elif isinstance(tree, tuple):
        for old, new in zip(tree, part, strict=True):
            _write_rows(old, new, rows)


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
        self.model.patching = checkpoint.patching_of(extra)  # pyright: ignore[reportArgumentType]
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
        room = limit is None or ids.shape[1] < limit
        require(
            room or labels is not None,
            f"max_length={limit}: no room to predict what follows {ids.shape[1]} ids; give fewer",
        )
        output = self.model.outputs(F.pad(ids, (0, 1), value=any_byte) if room else ids)
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
        paper = isinstance(native, MegabyteConfig) and native.variant == "paper"
        return native.max_length if paper else None

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """False: `forward` makes the cache."""
        return False

    def _reorder_cache(self, past: ByteCache, beam_idx: Tensor) -> ByteCache:
        past.reorder_cache(beam_idx)
        return past

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: Any, state_dict: dict[str, Tensor] | None = None, **options: Any
    ) -> None:
        """As in transformers; the tensors are called as in an export."""
        state = self.state_dict() if state_dict is None else state_dict
        plain = {name.removeprefix("model."): value for name, value in state.items()}
        super().save_pretrained(save_directory, state_dict=plain, **options)


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
        made = chosen(chosen.config_class(bytelm=checkpoint.describe(model)))
    made.model = model
    made.config.dtype = next(model.parameters()).dtype
    return made


# ---- tokenizer ------------------------------------------------------------------------------


class ByteLMTokenizer(PreTrainedTokenizer):
    """Byte b is id b + `offset`; no text becomes a special id, and none is added.

    Pads on the left, as generation wants it. Texts are encoded and ids decoded as `ByteTokenizer`
    does; special ids are written <pad>, <bos>, <eos> unless skipped.
    """

    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012, as transformers has it

    def __init__(
        self,
        size: int = ByteVocab.size,
        offset: int = ByteVocab.offset,
        pad_id: int = ByteVocab.pad_id,
        bos_id: int = ByteVocab.bos_id,
        eos_id: int = ByteVocab.eos_id,
        **options: Any,
    ) -> None:
        vocab = ByteVocab(size=size, offset=offset, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id)
        self._bytes = ByteTokenizer(vocab)
        self._specials = {pad_id: "<pad>", bos_id: "<bos>", eos_id: "<eos>"}
        options.setdefault("padding_side", "left")
        options["split_special_tokens"] = True
        for name in ("pad", "bos", "eos"):
            options[f"{name}_token"] = f"<{name}>"
        super().__init__(
            size=size, offset=offset, pad_id=pad_id, bos_id=bos_id, eos_id=eos_id, **options
        )

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, specials included."""
        return self._bytes.vocab.size

    def get_vocab(self) -> dict[str, int]:
        """Token → id: bytes are the characters of Latin-1."""
        return {self._convert_id_to_token(i): i for i in range(self.vocab_size)}

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        return 0  # the vocabulary is fixed

    def _tokenize(self, text: str, **options: Any) -> list[str]:
        offset = self._bytes.vocab.offset
        return [chr(i - offset) for i in self._bytes.encode(text).tolist()]

    def _convert_token_to_id(self, token: str) -> int | None:
        if len(token) == 1 and ord(token) < 256:
            return ord(token) + self._bytes.vocab.offset
        specials = {name: i for i, name in self._specials.items()}
        return specials.get(token, int(token[1:-1]) if token[1:-1].isdecimal() else None)

    def _convert_id_to_token(self, index: int) -> str:
        code = index - self._bytes.vocab.offset
        return chr(code) if 0 <= code < 256 else self._specials.get(index, f"<{index}>")

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens; special ones are written out."""
        parts = [t.encode("latin-1") if len(t) == 1 else t.encode() for t in tokens]
        return b"".join(parts).decode("utf-8", "replace")

    def _decode(self, token_ids: Any, skip_special_tokens: bool = False, **options: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else list(token_ids)
        tokens = [self._convert_id_to_token(int(i)) for i in ids]
        return self.convert_tokens_to_string(
            [t for t in tokens if len(t) == 1 or not skip_special_tokens]
        )

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str, ...]:
        """Nothing: the id map stands in tokenizer_config.json."""
        return ()


def tokenizer_for(config: ModelConfig) -> ByteLMTokenizer:
    """The tokenizer of a model configuration's vocabulary."""
    return ByteLMTokenizer(**to_dict(config.vocab))


for _kind in _CLASSES:
    AutoConfig.register(_kind.config_class.model_type, _kind.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_kind.config_class, _kind, exist_ok=True)
    AutoTokenizer.register(_kind.config_class, slow_tokenizer_class=ByteLMTokenizer, exist_ok=True)
