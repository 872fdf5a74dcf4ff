"""The names of the PyTorch MEGABYTE project; the second half needs transformers."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor

from bytelm import config as native
from bytelm_torch.interop import transformers as hf
from bytelm_torch.models.megabyte import Megabyte as _Model
from bytelm_torch.training.loss import cross_entropy


@dataclass(frozen=True)
class MegabyteConfig:
    """The original's fields in its order; the beginning-of-sequence id, which it lacks, is the
    first free id."""

    V: int = 512
    P: int = 8
    D_G: int = 128
    D_L: int = 256
    T_MAX: int = 2048
    g_nheads: int = 16
    g_nlayers: int = 12
    l_nheads: int = 4
    l_nlayers: int = 6
    initializer_range: float = 0.02
    pad_id: int = 257
    eos_id: int = 258

    def to_native(self) -> native.MegabyteConfig:
        """The same as this library's configuration."""
        free = (i for i in range(256, self.V) if i not in (self.pad_id, self.eos_id))
        specials = {"pad_id": self.pad_id, "eos_id": self.eos_id, "bos_id": next(free, 256)}
        return native.MegabyteConfig(
            vocab=native.ByteVocab(size=self.V, **specials),
            patch_size=self.P,
            global_dim=self.D_G,
            local_dim=self.D_L,
            max_length=self.T_MAX,
            global_layers=self.g_nlayers,
            global_heads=self.g_nheads,
            local_layers=self.l_nlayers,
            local_heads=self.l_nheads,
            init_std=self.initializer_range,
        )


class MegabyteOutput(NamedTuple):
    """What a call gives: logits and, if asked for, the mean nats of the ids that are no pads."""

    lm_logits: Float[Tensor, "B T V"]
    loss: Float[Tensor, ""] | None

    @property
    def logits(self) -> Float[Tensor, "B T V"]:
        """`lm_logits`, by the name that this library and transformers have for them."""
        return self.lm_logits


class Megabyte(_Model):
    """This library's model, but for what a call gives."""

    def __init__(self, config: MegabyteConfig):
        super().__init__(config.to_native())

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, ids: Integer[Tensor, "B T"], return_loss: bool = False
    ) -> MegabyteOutput:
        """`lm_logits[:, t]` is the distribution of `ids[:, t]` given `ids[:, :t]`."""
        logits = self.outputs(ids).logits
        if not return_loss:
            return MegabyteOutput(logits, None)
        nats, count = cross_entropy(logits, ids, self.config.vocab.pad_id)
        return MegabyteOutput(logits, nats / count.clamp(min=1))


class MegabyteLMHeadModel(hf.MegabyteForCausalLM):
    """The model behind the interface of transformers."""

    @classmethod
    def from_native_megabyte(cls, megabyte: _Model) -> Any:
        """Shares the parameters of `megabyte`."""
        return hf.from_native(megabyte, cls)


def MegabyteTokenizer(
    eos_token_id: int = 258,
    pad_token_id: int = 257,
    bos_token_id: int = 256,
    vocab_size: int = 512,
) -> hf.ByteLMTokenizer:
    """A tokenizer whose bytes are the ids 0 to 255."""
    specials = {"pad_id": pad_token_id, "bos_id": bos_token_id, "eos_id": eos_token_id}
    return hf.ByteLMTokenizer(size=vocab_size, offset=0, **specials)
