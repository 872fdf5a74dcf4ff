"""The tokenizer of a vocabulary of bytes in the format of Hugging Face tokenizers.

`AutoTokenizer.from_pretrained` reads it, without this library: a byte-level BPE that merges
nothing. Byte b is id b + offset.
"""

from collections.abc import Mapping
from typing import Any

from bytelm.config import ByteVocab

_SPECIALS = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"}
"""What `bytelm_torch.hf` calls the special ids."""

BLT_SPECIALS = {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}
"""What the byte latent transformers of transformers call them."""


def tokenizer_files(
    vocab: ByteVocab,
    specials: Mapping[str, str] = _SPECIALS,
    bos_first: bool = False,
    longest: int | None = None,
) -> dict[str, dict[str, Any]]:
    """File name → contents: `tokenizer.json` and `tokenizer_config.json`.

    `bos_first` puts BOS in front of each text. `longest` is the most ids that a model reads.
    """
    bos_name = specials["bos"]
    names = {name: getattr(vocab, f"{kind}_id") for kind, name in specials.items()}
    tokens = {character: byte + vocab.offset for byte, character in enumerate(_characters())}
    added = [
        {"id": i, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for name, i in names.items()
    ]
    bos = {"SpecialToken": {"id": bos_name, "type_id": 0}}
    sequence = {name: {"Sequence": {"id": name, "type_id": 0}} for name in "AB"}
    template = {
        "type": "TemplateProcessing",
        "single": [bos, sequence["A"]],
        "pair": [bos, sequence["A"], bos, sequence["B"]],
        "special_tokens": {bos_name: {"id": bos_name, "ids": [vocab.bos_id], "tokens": [bos_name]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": template if bos_first else None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": names | tokens, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{kind}_token": name for kind, name in specials.items()},
        "padding_side": "left",
        "split_special_tokens": True,  # no text becomes a special id
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    } | ({} if longest is None else {"model_max_length": longest})
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _characters() -> list[str]:
    """The character by which byte-level BPE writes each byte (Radford et al. 2019).

    Printable ones of Latin-1 stand for themselves, the others for U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def special_ids(vocab: ByteVocab) -> dict[str, int]:
    """What a configuration of transformers says of the special ids."""
    return {f"{name}_token_id": getattr(vocab, f"{name}_id") for name in ("bos", "eos", "pad")}


def suppressed_ids(vocab: ByteVocab) -> list[int]:
    """The ids that generation never chooses: all but bytes and the end of a sequence."""
    bytes_or_end = {*range(vocab.offset, vocab.offset + 256), vocab.eos_id}
    return [i for i in range(vocab.size) if i not in bytes_or_end]
