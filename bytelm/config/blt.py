"""The configurations of the Byte Latent Transformer and of its entropy model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

from bytelm.config.base import (
    ArchitectureConfig,
    ByteVocab,
    require,
    require_fraction,
    require_number,
    require_numbers,
    require_positive,
)
from bytelm.config.block import (
    BlockConfig,
    attention_parameters,
    layer_parameters,
    mean_keys,
    require_heads,
)

HASH_PRIMES = (
    1000000007,
    5915587277,
    1500450271,
    3267000013,
    5754853343,
    4093082899,
    9576890767,
    3628273133,
    2860486313,
    5463458053,
    3367900313,
)
"""The base of hash function f is HASH_PRIMES[f]."""


SPLINE_BASES = 11
"""Cubic B-splines over a uniform grid of 8 intervals, its knots extended by 3 on either side."""

SPLINE_EDGE, SPLINE_INTERVALS = 3.0, SPLINE_BASES - 3
"""The grid: `SPLINE_INTERVALS` equal intervals over [−SPLINE_EDGE, SPLINE_EDGE]."""

GUIDE_FEATURES = 8
"""Features that `entropy_attention` adds to queries and keys."""

HISTOGRAM_LIMIT = 255.0
"""The largest threshold of the `histogram` patcher in bits: two such sums fit in a 32-bit integer.
"""


def _blt_vocab() -> ByteVocab:
    """The ids of the public weights: BOE 0, BOS 1, EOS 2, pad 3, then the bytes."""
    return ByteVocab(size=260, offset=4, pad_id=3, bos_id=1, eos_id=2)


@dataclass(frozen=True, kw_only=True)
class EntropyConfig(ArchitectureConfig):
    """A plain causal byte transformer; in BLT its entropies set the patch boundaries."""

    architecture: ClassVar[str] = "entropy"
    cut_stacks: ClassVar[tuple[str, ...]] = ("",)
    patcher_prefix: ClassVar[str] = "patcher."
    vocab: ByteVocab = field(default_factory=_blt_vocab)
    dim: int = 768
    """Width of the layers."""
    layers: int = 14
    """Number of layers."""
    heads: int = 12
    """Attention heads."""
    kv_heads: int = 0
    """Key/value heads; 0 means as many as `heads`."""
    hidden_dim: int = 2048
    """Hidden width of the gated feed-forward layers."""
    window: int = 512
    """Bytes that a byte attends to, itself included; 0 means everything before it."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    dropout: float = 0.0
    """Fraction of activations that training drops."""
    reset_on: Literal["none", "newline", "document"] = "none"
    """What starts a segment that sees nothing before it."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(self, "dim", "layers", "heads", "hidden_dim")
        require_heads("heads", self.dim, self.heads, self.kv_heads)
        require(self.window >= 0, f"window={self.window}: must be at least 0")
        require(self.rope_theta > 0, f"rope_theta={self.rope_theta}: must be above 0")
        require_fraction(self, "dropout")

    def parameter_count(self) -> int:
        """Number of parameters, in closed form."""
        layer = layer_parameters(self.dim, self.heads, self.kv_heads, self.hidden_dim)
        return self.layers * layer + 2 * self.vocab.size * self.dim + self.dim

    def flops_per_byte(self, length: int) -> float:
        """Forward floating-point operations per byte at `length` bytes; causal attention half."""
        layer = layer_parameters(self.dim, self.heads, self.kv_heads, self.hidden_dim)
        keys = mean_keys(length, self.window)
        return 2 * (self.layers * (layer + 2 * self.dim * keys) + self.dim * self.vocab.size)

    def patch_rule(self, threshold: float | None = None) -> str:
        """The patching rule with the calibrated threshold, in a few words."""
        if threshold is None:
            return "no patches: not calibrated yet"
        return replace(self.patcher_config(), threshold=threshold).patch_rule()

    def patcher_config(self) -> BLTConfig:
        """A Byte Latent Transformer with this entropy model, for its patching rules."""
        return BLTConfig(vocab=self.vocab, entropy=self, reset_on=self.reset_on)


@dataclass(frozen=True, kw_only=True)
class BLTConfig(ArchitectureConfig):
    """Byte Latent Transformer (Pagnoni et al. 2024, arXiv 2412.09871); defaults are its 1B model.

    The `patcher` decides where a patch ends: with `entropy` where the entropy of the entropy model
    exceeds `threshold`; with `histogram` where the entropies of the histograms of recent bytes,
    summed since the patch began, exceed it; with `space` after a space-like byte that follows one
    that is not (as in the paper's code, all bytes but Latin letters, digits and UTF-8 continuation
    bytes are space-like); with `word` after the first ASCII byte of a run of separators, which
    older files call `space`; with `fixed` every `patch_size` bytes; with `byte` after every byte.
    The option `whole_characters` has no effect on `byte` and `space`; the public weights were
    trained without it.

    Shapes are static: patches beyond `patch_budget` merge into the last one. A budget of 1 never
    overflows; 0 stands for 1.5 divided by `bytes_per_patch`, plus two patches per 16 bytes if
    newlines reset, because a line's BOS is a patch and the end of a line cuts one short.

    A segment (`reset_on`) begins with BOS and a new patch; attention, positions, n-grams, patches
    and the entropy model see nothing before it.
    """

    architecture: ClassVar[str] = "blt"
    cut_stacks: ClassVar[tuple[str, ...]] = ("encoder_", "decoder_", "global_")
    frozen_prefixes: ClassVar[tuple[str, ...]] = ("patcher.",)
    has_patching_contract = has_tied_gradients = takes_donor = True
    transformers_type: ClassVar[str | None] = "blt"
    vocab: ByteVocab = field(default_factory=_blt_vocab)
    patcher: Literal["entropy", "histogram", "space", "word", "fixed", "byte"] = "entropy"
    """What ends a patch."""
    threshold: float = 1.335442066192627
    """Entropy that ends a patch: in nats (entropy) or bits per patch (histogram)."""
    patch_size: int = 4
    """Bytes per patch under patcher=fixed."""
    whole_characters: bool = True
    """Whether no patch may start inside a UTF-8 character."""
    bytes_per_patch: float = 4.5
    """Expected mean patch length in bytes, from which the budget follows."""
    patch_budget: float = 0.0
    """Patches per byte that the global transformer has capacity for; 0: automatic."""
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    ngram_sizes: tuple[int, ...] = (3, 4, 5, 6, 7, 8)
    """Lengths in bytes of the embedded n-grams; an empty list turns them off."""
    ngram_functions: int = 1
    """Hash functions per n-gram size, each with a table."""
    ngram_rows: int = 500_002
    """Rows of each n-gram table."""
    ngram_combine: Literal["sum", "mean"] = "sum"
    """Whether byte and n-gram embeddings are added or averaged."""
    patch_queries: int = 2
    """Number of vectors into which a patch is pooled and from which it is read back."""
    local_dim: int = 1024
    """Width of the local encoder and decoder."""
    local_window: int = 512
    """Bytes to which a byte attends there; 0 means all bytes before it."""
    encoder_layers: int = 1
    """Layers of the local encoder."""
    encoder_heads: int = 16
    """Attention heads of the local encoder."""
    encoder_kv_heads: int = 0
    """Its key/value heads; 0 means as many as heads."""
    encoder_hidden_dim: int = 2730
    """Hidden width of its feed-forward layers."""
    decoder_layers: int = 9
    """Layers of the local decoder."""
    decoder_heads: int = 16
    """Attention heads of the local decoder."""
    decoder_kv_heads: int = 0
    """Its key/value heads; 0 means as many as heads."""
    decoder_hidden_dim: int = 2816
    """Hidden width of its feed-forward layers."""
    global_dim: int = 2048
    """Width of the global transformer."""
    global_layers: int = 25
    """Layers of the global transformer, which runs once per patch."""
    global_heads: int = 16
    """Attention heads of the global transformer."""
    global_kv_heads: int = 0
    """Its key/value heads; 0 means as many as heads."""
    global_hidden_dim: int = 5632
    """Hidden width of its feed-forward layers."""
    global_block: BlockConfig = field(default_factory=BlockConfig)
    feedforward: Literal["gated", "spline"] = "gated"
    """A gated layer, or one learned spline per channel."""
    entropy_attention: bool = False
    """Whether global attention sees how varied the bytes of each patch are."""
    positions: Literal["rotary", "sinusoidal"] = "rotary"
    """Rotary positions, or sinusoids added to the byte embeddings."""
    rope_theta: float = 500_000.0
    """Base of the rotary frequencies."""
    dropout: float = 0.0
    """Fraction of activations that training drops."""
    reset_on: Literal["none", "newline", "document"] = "none"
    """What starts a segment that sees nothing before it."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def transformers_problem(self) -> str | None:
        """Why transformers has no such model, naming the field; None if it has."""
        return _transformers_problem(self)

    @property
    def parity_length(self) -> int:
        """Bytes per row when the twins are compared: an odd number, just over four patches."""
        varies = self.patcher in ("entropy", "space", "word", "histogram")
        return 4 * (math.ceil(self.bytes_per_patch) if varies else self.patch_size) + 3

    def patch_rule(self, threshold: float | None = None) -> str:
        """The patching rule, in a few words; the threshold is the model's own."""
        units = {"entropy": "nats", "histogram": "bits per patch"}
        unit = units.get(self.patcher)
        cut = f", threshold {self.threshold:.6g} {unit}" if unit else ""
        return f"patcher {self.patcher}{cut}"

    @property
    def ineffective(self) -> dict[str, str]:
        return _ineffective(self)

    @property
    def needs_entropy_model(self) -> bool:
        """Whether a new run takes its patcher from the run of a trained entropy model."""
        return self.patcher == "entropy"

    def patcher_config(self) -> BLTConfig:
        """Itself; raises `ValueError` for a patcher without a threshold."""
        why = "has no threshold; only 'entropy' and 'histogram' have one"
        require(self.patcher in ("entropy", "histogram"), f"patcher={self.patcher!r}: {why}")
        return self

    def with_vocab(self, vocab: ByteVocab) -> BLTConfig:
        """This configuration and its entropy model with another id map.

        Raises `ValueError` for n-gram embeddings, whose hashes depend on ids.
        """
        why = "hashes ids, and other ids would select other rows; keep its vocabulary"
        given = f"vocab: a model with ngram_sizes={self.ngram_sizes}"
        require(self.ngram_tables == 0, f"{given} {why}")
        return replace(self, vocab=vocab, entropy=replace(self.entropy, vocab=vocab))

    def with_resets(self, reset_on: Any) -> BLTConfig:
        """This configuration and its entropy model with segments that start as `reset_on` says."""
        return replace(self, reset_on=reset_on, entropy=replace(self.entropy, reset_on=reset_on))

    @property
    def ngram_tables(self) -> int:
        """Number of n-gram tables."""
        return self.ngram_functions * len(self.ngram_sizes)

    @property
    def reads_histograms(self) -> bool:
        """Whether the model needs the entropies of byte histograms."""
        return self.patcher == "histogram" or self.entropy_attention

    @property
    def rotation_base(self) -> float:
        """The base of the rotary frequencies; 0 if positions are not rotated."""
        return self.rope_theta if self.positions == "rotary" else 0.0

    def budget(self, length: int) -> int:
        """Patches that the global transformer has capacity for at `length` bytes.

        Counts the patches that end before the byte to be predicted; the open patch is not run.
        Never more than one per byte, and exact for the patchers that count bytes, apart from
        resets.
        """
        if self.patcher == "byte":
            return length
        fixed = self.patcher == "fixed"
        if fixed and self.reset_on == "none":
            return min(length, 1 + (length - 1) // self.patch_size)
        often = 1 / self.patch_size if fixed else 1.5 / self.bytes_per_patch
        lines = 2 / 16 if self.reset_on == "newline" else 0.0
        rate = self.patch_budget or min(1.0, often + lines)
        # Eight more, because short texts deviate further from the mean than long ones.
        return min(length, math.ceil(length * rate) + 8)

    def parameter_count(self) -> int:
        """Number of parameters, including the frozen entropy model, in closed form."""
        local, wide, queries = self.local_dim, self.global_dim, self.patch_queries
        count = self.entropy.parameter_count() if self.patcher == "entropy" else 0
        count += (self.vocab.size + self.ngram_tables * self.ngram_rows) * local
        count += self.encoder_layers * self._encoder_layer() + self._encoder_cross()
        count += self.decoder_layers * (self._decoder_layer() + self._decoder_cross())
        count += self.global_layers * self._global_layer() + wide * self.global_block.final_norm
        count += queries * local * (local + wide)  # into queries, back into keys
        if queries * local != wide:
            count += queries * local * wide
        return count + local + local * self.vocab.size

    def flops_per_byte(self, length: int) -> float:
        """Forward operations per byte at this mean patch length; causal attention counts half."""
        local, wide, queries = self.local_dim, self.global_dim, self.patch_queries
        keys, patches = mean_keys(length, self.local_window), length / self.bytes_per_patch
        byte = self.encoder_layers * (self._encoder_layer() + 2 * local * keys)
        byte += self.decoder_layers * (self._decoder_layer() + 2 * local * keys)
        byte += 2 * local * queries * (1 + self.decoder_layers)  # scores and values of both reads
        square = local * local  # the query or output projection of a cross-attention
        byte += self._encoder_cross() - 2 * square + self.decoder_layers * 2 * square
        patch = 2 * square * queries + queries * local * (local + wide)
        patch += self.decoder_layers * queries * (self._decoder_cross() - 2 * square)
        mixed = self.global_heads * self.global_block.head_width(wide, self.global_heads)
        patch += self.global_layers * (self._global_layer() + mixed * patches)
        patch += wide * self.global_block.final_norm
        if queries * local != wide:
            patch += queries * local * wide
        work = 2 * (byte + patch / self.bytes_per_patch + local * self.vocab.size)
        return work + self.frozen_flops_per_byte(length)

    def uses_per_byte(self, name: str, length: int) -> float:
        return _uses_per_byte(self, name)

    def executed_flops_per_byte(self, length: int) -> float:
        return replace(self, bytes_per_patch=length / self.budget(length)).flops_per_byte(length)

    def frozen_flops_per_byte(self, length: int) -> float:
        """The part of `flops_per_byte` that training only runs forward: the entropy model."""
        return self.entropy.flops_per_byte(length) if self.patcher == "entropy" else 0.0

    def _encoder_layer(self) -> int:
        heads = (self.encoder_heads, self.encoder_kv_heads)
        return self._layer(self.local_dim, *heads, self.encoder_hidden_dim)

    def _decoder_layer(self) -> int:
        heads = (self.decoder_heads, self.decoder_kv_heads)
        return self._layer(self.local_dim, *heads, self.decoder_hidden_dim)

    def _global_layer(self) -> int:
        heads = (self.global_heads, self.global_kv_heads)
        guide = 2 * self.global_heads if self.entropy_attention else 0
        more = guide + self.global_block.more_parameters(self.global_dim, *heads)
        return self._layer(self.global_dim, *heads, self.global_hidden_dim) + more

    def _layer(self, width: int, heads: int, kv_heads: int, hidden: int) -> int:
        if self.feedforward == "gated":
            return layer_parameters(width, heads, kv_heads, hidden)
        splines = hidden * (1 + SPLINE_BASES)
        return attention_parameters(width, heads, kv_heads) + 2 * width * hidden + splines

    def _encoder_cross(self) -> int:
        return attention_parameters(self.local_dim, self.encoder_heads, self.encoder_kv_heads)

    def _decoder_cross(self) -> int:
        return attention_parameters(self.local_dim, self.decoder_heads, self.decoder_kv_heads)


def _ineffective(c: BLTConfig) -> dict[str, str]:
    users = {
        "threshold": ("entropy", "histogram"),
        "patch_size": ("fixed",),
        "whole_characters": ("entropy", "histogram", "word", "fixed"),
        "entropy": ("entropy",),
    }
    chosen = f"patcher={c.patcher}"
    found = {name: chosen for name, patchers in users.items() if c.patcher not in patchers}
    if not c.ngram_sizes:
        tables = ("ngram_functions", "ngram_rows", "ngram_combine")
        found |= dict.fromkeys(tables, "no-ngram-sizes")
    block = c.global_block.ineffective
    if c.positions != "rotary":
        found["rope_theta"] = f"positions={c.positions}"
        rotary = (f.name for f in fields(BlockConfig) if f.name.startswith("rope_"))
        block = dict.fromkeys(rotary, found["rope_theta"])
    return found | {f"global_block.{name}": setting for name, setting in block.items()}


def _check(c: BLTConfig) -> None:
    require_numbers(c)
    sizes = ("local_dim", "encoder_layers", "decoder_layers", "global_dim", "global_layers")
    heads = ("encoder_heads", "decoder_heads", "global_heads")
    hidden = ("encoder_hidden_dim", "decoder_hidden_dim", "global_hidden_dim")
    require_positive(c, "patch_size", "patch_queries", "ngram_functions", "ngram_rows")
    require_positive(c, *sizes, *heads, *hidden)
    require_heads("encoder_heads", c.local_dim, c.encoder_heads, c.encoder_kv_heads)
    require_heads("decoder_heads", c.local_dim, c.decoder_heads, c.decoder_kv_heads)
    wide = (c.global_dim, c.global_heads, c.global_kv_heads)
    require_heads("global_heads", *wide, c.global_block.head_dim)
    plain = (c.global_block.norm, c.global_block.norm_eps) == ("before", BlockConfig.norm_eps)
    where = f"global_block.{'norm' if c.global_block.norm == 'after' else 'norm_eps'}"
    why = "has no effect on feedforward=spline; use feedforward=gated"
    require(plain or c.feedforward == "gated", f"{where}: {why}")
    require(c.local_window >= 0, f"local_window={c.local_window}: must be at least 0")
    require(c.rope_theta > 0, f"rope_theta={c.rope_theta}: must be above 0")
    require_fraction(c, "dropout")
    require(
        c.patcher != "histogram" or 0 <= c.threshold <= HISTOGRAM_LIMIT,
        f"threshold={c.threshold}: must be from 0 to {HISTOGRAM_LIMIT:.0f} bits per patch",
    )
    rate = c.bytes_per_patch
    require(rate >= 1, f"bytes_per_patch={rate}: must be at least 1")
    budget = c.patch_budget
    require(0 <= budget <= 1, f"patch_budget={budget}: must be between 0 and 1")
    require(
        isinstance(c.entropy, EntropyConfig),
        f"entropy={type(c.entropy).__name__}: must be an EntropyConfig",
    )
    require(
        c.patcher != "entropy" or c.entropy.vocab == c.vocab,
        f"entropy.vocab={c.entropy.vocab}: must be the model's own, {c.vocab}",
    )
    entropy_resets, model_resets = c.entropy.reset_on, c.reset_on
    require(
        c.patcher != "entropy" or entropy_resets == model_resets,
        f"entropy.reset_on={entropy_resets!r}: must be the model's own, {model_resets!r}; give "
        f"--reset-on {entropy_resets}, or an entropy model that was trained with --reset-on "
        f"{model_resets}",
    )
    _check_ngrams(c)


def _check_ngrams(c: BLTConfig) -> None:
    least, most = min(c.ngram_sizes, default=1), len(HASH_PRIMES)
    require(least >= 1, f"ngram_sizes={c.ngram_sizes}: sizes must be at least 1")
    functions, rows, tables = c.ngram_functions, c.ngram_rows, c.ngram_tables
    require(functions <= most, f"ngram_functions={functions}: must be at most {most}")
    require(tables * rows < 2**31, f"ngram_rows={rows}: {tables} tables pass 2^31 rows in all")


@dataclass(frozen=True, kw_only=True)
class PatchingContract:
    """How the text of a run was divided into patches, to detect data that is divided otherwise.

    `entropy_model` is the SHA-256 of the entropy model's parameters, empty for other patchers.
    `histogram` counts the patches of 1, 2, … bytes, the last entry those of that length or longer,
    in a sample of `sampled_bytes` bytes.
    """

    patcher: Literal["entropy", "histogram", "space", "word", "fixed", "byte"]
    threshold: float
    entropy_model: str
    sampled_bytes: int
    histogram: tuple[int, ...]

    def __post_init__(self) -> None:
        require_number("threshold", self.threshold)
        require_positive(self, "sampled_bytes")
        usable = min(self.histogram, default=-1) >= 0 and sum(self.histogram) > 0
        require(usable, f"histogram={self.histogram}: must hold counts, one of them above 0")

    @property
    def mean_length(self) -> float:
        """Mean length of a patch in bytes."""
        return self.sampled_bytes / sum(self.histogram)


def _uses_per_byte(c: BLTConfig, name: str) -> float:
    """How often a kernel multiplies something; 0 for the entropy model, which has no gradient."""
    read = name.startswith("decoder.cross_attentions.") and (".to_k." in name or ".to_v." in name)
    pooled = name.startswith("encoder.cross_attention.") and (
        ".to_q." in name or ".to_out." in name
    )
    if read or pooled:  # of each vector of a patch
        return c.patch_queries / c.bytes_per_patch
    rare = ("global_transformer.", "to_global.", "decoder.to_memory.", "encoder.to_queries.")
    if name.startswith("patcher."):
        return 0.0
    return 1 / c.bytes_per_patch if name.startswith(rare) else 1.0


def _transformers_problem(c: BLTConfig) -> str | None:
    ids = (c.vocab.offset, c.vocab.bos_id, c.vocab.eos_id)
    plain = {"ngram_combine": "sum", "feedforward": "gated", "entropy_attention": False}
    plain |= {"positions": "rotary", "reset_on": "none"}
    different = c.global_block.difference
    if different is not None:
        return f"global_block.{different}: transformers' BLT has no such layers"
    if c.patcher not in ("entropy", "byte"):
        return f"patcher={c.patcher!r}: transformers only has 'entropy' and 'byte'"
    if c.patcher == "entropy" and c.whole_characters:
        return (
            "whole_characters=True: transformers has no such rule; train with --no-whole-characters"
        )
    if ids != (4, 1, 2):
        return f"vocab: offset, bos_id, eos_id={ids}; transformers has (4, 1, 2)"
    for name, known in plain.items():
        value = getattr(c, name)
        if value != known:
            return f"{name}={value!r}: transformers only supports {known!r}"
    if c.ngram_tables == 0:
        return "ngram_sizes=(): transformers needs at least one"
    if c.dropout != 0:
        return f"dropout={c.dropout}: transformers applies it elsewhere; set it to 0"
    return None
