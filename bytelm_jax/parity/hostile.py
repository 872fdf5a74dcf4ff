"""Bytes that models seldom see in training, on which the twins are compared as well."""

import numpy as np

from bytelm.config import ByteVocab


def hostile_rows(vocab: ByteVocab, length: int) -> dict[str, np.ndarray]:
    """Name → ids int32 [length] of each kind of hostile bytes."""
    characters = [character.encode()[:-1] for character in "漢é🎉ж"]
    kinds = {
        "zeros": b"\0",
        "one byte repeated": b"a",
        "all values": bytes(range(256)),
        "random bytes": np.random.default_rng(0).bytes(max(length, 1)),
        "truncated UTF-8": b"".join(characters),
        "newlines only": b"\n",
    }
    return {
        name: np.resize(np.frombuffer(pattern, np.uint8), length).astype(np.int32) + vocab.offset
        for name, pattern in kinds.items()
    }
