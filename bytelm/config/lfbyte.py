"""The configuration of the LFByteTransformer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from bytelm.config.base import (
    ArchitectureConfig,
    ByteVocab,
    require,
    require_fraction,
    require_numbers,
    require_positive,
)


def _lfbyte_vocab() -> ByteVocab:
    """256 bytes and three special ids, no unused ids."""
    return ByteVocab(size=259)


@dataclass(frozen=True, kw_only=True)
class LFByteConfig(ArchitectureConfig):
    """LFByteTransformer: token mixing, channel mixing and experts of input-adaptive linear layers.

    The value `context="sequence"` needs `causal=False`, which feeds the ids unshifted: the output
    at a position depends on that position's own byte. With `reset_on` the convolution is the plain
    sum over `kernel_length` taps.
    """

    architecture: ClassVar[str] = "lfbyte"
    convolution_chunk: ClassVar[int] = 64
    vocab: ByteVocab = field(default_factory=_lfbyte_vocab)
    embed_dim: int = 512
    """Width of the layers."""
    num_layers: int = 8
    """Number of layers."""
    adapt_dim: int = 512
    """Width of the adaptation vector a."""
    num_experts: int = 4
    """Number of experts of each layer."""
    dropout: float = 0.1
    """Fraction of activations that training drops."""
    adaptation: Literal["low_rank", "full"] = "low_rank"
    """How weights adapt: U diag(S a + s) V of rank `rank`, or a whole matrix."""
    rank: int = 16
    """Rank of the low-rank adaptation."""
    context: Literal["causal", "sequence"] = "causal"
    """a is computed from the inputs up to each position, or from the whole sequence."""
    causal: bool = True
    """False makes an encoder, which can neither be trained on the next byte nor generate."""
    token_mixing: Literal["long_conv", "none"] = "long_conv"
    """A causal convolution over bytes, or none."""
    kernel_length: int = 256
    """Taps of the convolution per channel, in bytes."""
    hidden_mult: int = 4
    """Hidden width in units of `embed_dim`; 0 leaves one adaptive linear layer."""
    top_k: int = 2
    """Experts that serve a position; 0 means all of them, weighted."""
    balance_coefficient: float = 0.01
    """Weight of the loss that spreads the positions of a row over the experts."""
    block: Literal["residual", "plain"] = "residual"
    """"residual" has norms, dropout and residuals; "plain" is the bare composition."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""
    reset_on: Literal["none", "newline", "document"] = "none"
    """What starts a segment that sees nothing before it; needs causal=True."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require_positive(self, "embed_dim", "num_layers", "adapt_dim", "num_experts")
        require_positive(self, "rank", "kernel_length")
        require_fraction(self, "dropout")
        for name in ("hidden_mult", "top_k", "balance_coefficient"):
            value = getattr(self, name)
            require(value >= 0, f"{name}={value}: must be at least 0")
        require(self.init_std > 0, f"init_std={self.init_std}: must be above 0")
        require(
            self.context == "causal" or not self.causal,
            'context="sequence": with causal=True the mean over the sequence would show later '
            'bytes; choose context="causal" or causal=False',
        )
        require(
            self.causal or self.reset_on == "none",
            f"reset_on={self.reset_on}: an encoder reads the whole text at once; use "
            "reset_on=none or causal=True",
        )

    @property
    def ineffective(self) -> dict[str, str]:
        found = {}
        if self.adaptation == "full":
            found["rank"] = "adaptation=full"
        if self.token_mixing == "none":
            found["kernel_length"] = "token_mixing=none"
        return found

    @classmethod
    def original(
        cls,
        *,
        embed_dim: int = 512,
        num_layers: int = 1,
        adapt_dim: int = 256,
        num_experts: int = 4,
    ) -> LFByteConfig:
        """The number of layers in the family it builds on (lfm-torch 0.0.2), for comparison."""
        return cls(
            embed_dim=embed_dim,
            num_layers=num_layers,
            adapt_dim=adapt_dim,
            num_experts=num_experts,
            dropout=0.0,
            adaptation="full",
            context="sequence",
            causal=False,
            token_mixing="none",
            hidden_mult=0,
            top_k=0,
            block="plain",
        )

    @property
    def sparse(self) -> bool:
        """Whether fewer experts serve each position than there are."""
        return 0 < self.top_k < self.num_experts

    @property
    def uncompilable(self) -> str | None:
        if not self.sparse:
            return None
        return f"top_k={self.top_k}: the number of positions that an expert gets varies; take 0"

    @property
    def hidden_dim(self) -> int:
        """Hidden width of channel mixing; 0 if there is none."""
        return self.hidden_mult * self.embed_dim

    @property
    def logit_width(self) -> int:
        """Columns of the output projection: the vocabulary size rounded up to a multiple of 8."""
        return -(-self.vocab.size // 8) * 8

    def parameter_count(self) -> int:
        """Number of parameters, in closed form."""
        dim, width = self.embed_dim, self.logit_width
        ends = self.vocab.size * dim + dim * width + width
        final_norm = 2 * dim if self.block == "residual" else 0
        return ends + final_norm + self.num_layers * self.layer_parameters()

    def layer_parameters(self) -> int:
        """Number of parameters of one layer, in closed form."""
        dim, adapt, experts = self.embed_dim, self.adapt_dim, self.num_experts
        count = dim * adapt + adapt + (adapt * experts + experts)
        count += (1 + experts) * self._linear_parameters(dim, dim)
        if self.hidden_dim:
            count += self._linear_parameters(dim, self.hidden_dim)
            count += self._linear_parameters(self.hidden_dim, dim)
        else:
            count += self._linear_parameters(dim, dim)
        if self.token_mixing == "long_conv":
            count += self.kernel_length * dim
        return count + (6 * dim if self.block == "residual" else dim * dim + dim)

    def flops_per_byte(self, length: int) -> float:
        """Forward floating-point operations per byte at `length` bytes.

        Counts matrix products only. The convolution within chunks is triangular and counts half;
        its Fourier transforms, the products that replace them on accelerators, and the plain sum
        that resets need are not counted.
        """
        dim, experts = self.embed_dim, self.num_experts
        once = 1 / length if self.context == "sequence" else 1.0  # products that involve a alone
        work = once * self.adapt_dim * (dim + experts)
        used = self.top_k if self.sparse else experts
        work += used * self._linear_products(dim, dim, 1.0 if self.sparse else once)
        work += self._linear_products(dim, dim, once)
        if self.sparse and self._low_rank:  # biases of scales, by products with one-hot rows
            work += used * experts * self.rank
        if self.hidden_dim:
            work += self._linear_products(dim, self.hidden_dim, once)
            work += self._linear_products(self.hidden_dim, dim, once)
        else:
            work += self._linear_products(dim, dim, once)
        if self.token_mixing == "long_conv" and self.reset_on == "none":
            work += dim * min(length, self.convolution_chunk) / 2
        if self.block == "plain":
            work += dim * dim
        return 2 * (self.num_layers * work + dim * self.logit_width)

    def uses_per_byte(self, name: str, length: int) -> float:
        """As the base class says: experts run for the bytes that are routed to them."""
        if self.sparse and ".experts." in name:
            return self.top_k / self.num_experts
        shared = self.context == "sequence" and (".adapt." in name or not self._low_rank)
        return 1 / length if shared and not name.startswith("to_logits.") else 1.0

    def cache_bytes(self, length: int, itemsize: int) -> int:
        """Bytes per row of a cache for `length` positions, with `itemsize` bytes per value."""
        sums = (length + 1) * max(itemsize, 4)
        past = (length + min(length, self.kernel_length) - 1) * itemsize
        past = past if self.token_mixing == "long_conv" else 0
        segment_starts = 0 if self.reset_on == "none" else 4 * length
        return self.num_layers * self.embed_dim * (sums + past) + segment_starts

    @property
    def _low_rank(self) -> bool:
        return self.adaptation == "low_rank"

    def _linear_parameters(self, inputs: int, outputs: int) -> int:
        count = inputs * outputs + outputs
        if self._low_rank:
            return count + self.rank * (inputs + outputs + self.adapt_dim + 1)
        return count + (self.adapt_dim + 1) * inputs * outputs

    def _linear_products(self, inputs: int, outputs: int, once: float) -> float:
        if self._low_rank:
            narrow = self.rank * (inputs + outputs + once * self.adapt_dim)
            return inputs * outputs + narrow
        return inputs * outputs * (1 + once * self.adapt_dim)


def require_prediction(config: ArchitectureConfig) -> None:
    """Raises `ValueError` for a model whose logits depend on the very bytes they should predict."""
    require(
        config.causal,
        "model.causal=False: this model sees the bytes that it would predict; "
        "training and evaluation need causal=True",
    )
