"""The tokenizer of a vocabulary of bytes in the format of Hugging Face tokenizers.

`AutoTokenizer.from_pretrained` reads it, without this library: a byte-level BPE that merges
nothing. Byte b is id b + offset; BOS comes first, as the byte latent transformers of transformers
expect it.
"""

from typing import Any

from bytelm.config import ByteVocab


def tokenizer_files(vocab: ByteVocab) -> dict[str, dict[str, Any]]:
    """File name → contents: `tokenizer.json` and `tokenizer_config.json`."""
    names = {"<s>": vocab.bos_id, "</s>": vocab.eos_id, "<pad>": vocab.pad_id}
    tokens = {character: byte + vocab.offset for byte, character in enumerate(_characters())}
    added = [
        {"id": i, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for name, i in names.items()
    ]
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    sequence = {name: {"Sequence": {"id": name, "type_id": 0}} for name in "AB"}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, sequence["A"]],
            "pair": [bos, sequence["A"], bos, sequence["B"]],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [vocab.bos_id], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": names | tokens, "merges": []},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "padding_side": "left",
        "split_special_tokens": True,  # no text becomes a special id
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def _characters() -> list[str]:
    """The character by which byte-level BPE writes each byte (Radford et al. 2019).

    Printable ones of Latin-1 stand for themselves, the others for U+0100 and on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
