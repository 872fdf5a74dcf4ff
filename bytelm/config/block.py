"""What the layers of a transformer stack are made of, and how many parameters they have."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from bytelm.config.base import require, require_numbers


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """How the layers of BLT's global transformer are built; defaults are the paper's.

    With the other values, the decoder layers of token models can be the global transformer: those
    of Llama (arXiv 2302.13971), Qwen2 (arXiv 2407.10671), Qwen3 (arXiv 2505.09388) and
    OLMo 2 (arXiv 2501.00656).
    """

    head_dim: int = 0
    """Width of a head of attention; 0 means the stack's width divided by its heads."""
    norm: Literal["before", "after"] = "before"
    """Whether attention and feed-forward are normalised before they read, or after, as in OLMo 2.
    """
    norm_eps: float = 1e-5
    """What norms add to the mean square."""
    qk_norm: Literal["none", "head", "projection"] = "none"
    """Norms of queries and keys: of each head (Qwen3), or of all heads together (OLMo 2)."""
    bias: Literal["none", "qkv", "all"] = "none"
    """Which linear layers of attention have biases: queries, keys and values (Qwen2), or all."""
    final_norm: bool = False
    """Whether a norm follows the last layer."""
    rope_theta: float = 0.0
    """Base of the rotary frequencies; 0 means that of the model."""
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    """Slower rotation for longer texts: of all pairs, or of the slow ones, as in Llama 3.1."""
    rope_factor: float = 1.0
    """How many times slower."""
    rope_low: float = 1.0
    """llama3: pairs that turn less often than this within `rope_length` are slowed down fully."""
    rope_high: float = 4.0
    """llama3: pairs that turn more often than this within `rope_length` are not slowed down."""
    rope_length: int = 8192
    """llama3: positions of the texts that the unscaled rotation was trained on."""

    def __post_init__(self) -> None:
        require_numbers(self, "global_block.")
        for name in ("head_dim", "rope_theta"):
            value = getattr(self, name)
            require(value >= 0, f"global_block.{name}={value}: must be at least 0")
        width = self.head_dim
        require(width % 2 == 0, f"global_block.head_dim={width}: must be even")
        for name in ("norm_eps", "rope_factor", "rope_low", "rope_length"):
            value = getattr(self, name)
            require(value > 0, f"global_block.{name}={value}: must be above 0")
        low, high = self.rope_low, self.rope_high
        require(high > low, f"global_block.rope_high={high}: must be above rope_low={low}")

    @property
    def ineffective(self) -> dict[str, str]:
        """Field → the setting of another field under which it has no effect, as `name=value`."""
        unused = {"none": ("factor", "low", "high", "length"), "linear": ("low", "high", "length")}
        names = unused.get(self.rope_scaling, ())
        return {f"rope_{name}": f"rope_scaling={self.rope_scaling}" for name in names}

    @property
    def difference(self) -> str | None:
        """The first field that is not the paper's, as `name=value`; None if all of them are."""
        changed = (f.name for f in fields(self) if getattr(self, f.name) != f.default)
        name = next(changed, None)
        return None if name is None else f"{name}={getattr(self, name)!r}"

    def head_width(self, width: int, heads: int) -> int:
        """Width of each of `heads` heads in a stack of this width."""
        return self.head_dim or width // heads

    def more_parameters(self, width: int, heads: int, kv_heads: int) -> int:
        """Parameters of a layer beyond those of `layer_parameters`, in closed form."""
        head, kv_heads = self.head_width(width, heads), kv_heads or heads
        inner, grouped = head * heads, head * kv_heads
        plain = width + width // heads * kv_heads
        count = 2 * width * (inner + grouped - plain)
        count += {"none": 0, "head": 2 * head, "projection": inner + grouped}[self.qk_norm]
        qkv = inner + 2 * grouped
        return count + {"none": 0, "qkv": qkv, "all": qkv + width}[self.bias]


DONORS = ("llama", "qwen2", "qwen3", "olmo2")
"""The `model_type` of the token models whose layers these fields describe."""

PAPER = BlockConfig()
"""The layers of the paper, of which all other stacks are made."""


def require_heads(name: str, width: int, heads: int, kv_heads: int, head_dim: int = 0) -> None:
    """Raises `ValueError` unless heads divide the width evenly, have even width and form groups.

    Heads of a width of their own, `head_dim`, need not divide that of the stack.
    """
    require(
        bool(head_dim) or (width % heads == 0 and width // heads % 2 == 0),
        f"{name}={heads}: must divide the width {width} into heads of even width",
    )
    grouped = name.replace("heads", "kv_heads")
    require(
        kv_heads == 0 or (kv_heads > 0 and heads % kv_heads == 0),
        f"{grouped}={kv_heads}: must be 0 or divide {name}={heads}",
    )


def attention_parameters(width: int, heads: int, kv_heads: int) -> int:
    """Parameters of a cross-attention: two norms, then q, k, v and o."""
    grouped = width // heads * (kv_heads or heads)
    return 2 * width + 2 * width * width + 2 * width * grouped


def layer_parameters(width: int, heads: int, kv_heads: int, hidden: int) -> int:
    """Parameters of a self-attention and a gated feed-forward, each with its norm."""
    return attention_parameters(width, heads, kv_heads) + 3 * width * hidden


def mean_keys(length: int, window: int) -> float:
    """Mean number of keys a byte attends to in `length` bytes; the causal half counts T / 2."""
    window = min(window or length, length)
    return window - window * window / (2 * length) if length else 0.0
