"""`ByteTokenizer` as transformers knows tokenizers; `bytelm_torch.hf` registers it."""

from typing import Any

from transformers import PreTrainedTokenizer

from bytelm.config import ByteVocab, ModelConfig, to_dict
from bytelm.tokenizer import ByteTokenizer


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

    def _decode(
        self, token_ids: Any, skip_special_tokens: bool = False, *_: Any, **options: Any
    ) -> str:
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
    """The tokenizer of a model configuration's vocabulary and longest input."""
    limit = config.longest_input
    options = {} if limit is None else {"model_max_length": limit - 1}  # the next id takes a place
    return ByteLMTokenizer(**to_dict(config.vocab), **options)
