"""Boundaries as literal lists on tiny strings, and against a plain loop over CPython's decoder."""

import codecs
import dataclasses
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm import patch_rules
from bytelm.config import BLTConfig
from bytelm.config.blt import HISTOGRAM_LIMIT
from bytelm.tokenizer import ByteTokenizer
from bytelm_jax.models import patching

CONFIG = BLTConfig(patcher="word")
VOCAB = CONFIG.vocab
PATCHERS = ("entropy", "histogram", "space", "word", "fixed", "byte")


def shifted_ids(data: bytes) -> np.ndarray:
    """s [1, T] of a text of T bytes, followed by one byte that nobody may look at."""
    ids = ByteTokenizer(VOCAB).encode(data)
    return np.concatenate([[VOCAB.bos_id], ids])[None].astype(np.int32)


ROOM = 2048
find_starts = jax.jit(patching.patch_starts, static_argnums=0)
make_plan = jax.jit(patching.plan_patches, static_argnums=2)


def starts(config: BLTConfig, data: bytes, entropies=None) -> list[int]:
    """Indices at which patches start, the byte still to come included.

    One length, and so one program, serves all texts: what comes behind changes nothing.
    """
    length = len(data) + 1
    ids = np.full((1, ROOM), VOCAB.pad_id, np.int32)
    ids[:, :length] = shifted_ids(data)
    if entropies is not None:
        entropies = np.resize(np.float32(entropies), (1, ROOM))
    flags = find_starts(config, ids, entropies)
    return np.flatnonzero(np.asarray(flags)[0, : length + 1]).tolist()


def lengths(config: BLTConfig, data: bytes, entropies=None) -> list[int]:
    edges = starts(config, data, entropies)
    return np.diff([*edges, len(data) + 1]).tolist()


def loop_starts(config: BLTConfig, data: bytes, entropies: np.ndarray) -> list[int]:
    """The rules again, one byte after the other, characters by CPython's incremental decoder."""
    starts, decoder = [0, 1], codecs.getincrementaldecoder("utf-8")("replace")
    alphabet = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
    in_run, was_like, summed = False, True, 0.0
    for j, byte in enumerate(data, start=1):
        decoder.decode(bytes([byte]))
        held = decoder.getstate()[0]
        # CPython keeps the beginning of a surrogate back although no character begins so.
        surrogate = held[:1] == b"\xed" and held[1:2] >= b"\xa0"
        pending = held != b"" and not surrogate and config.whole_characters
        separator = byte < 0x80 and byte not in alphabet
        like = byte not in alphabet and not 0x80 <= byte < 0xC0
        summed += np.mean([shannon(data[max(0, j - n) : j]) for n in (3, 5, 7)])
        wanted = {
            "entropy": entropies[j] > config.threshold and not pending,
            "histogram": summed > config.threshold and not pending,
            "space": like and not was_like,
            "word": separator and not in_run and not pending,
            "fixed": j % config.patch_size == 0 and not pending,
            "byte": True,
        }[config.patcher]
        in_run, was_like = separator, like
        starts += [j + 1] if wanted else []
        summed = 0.0 if wanted else summed
    return starts


def shannon(data: bytes) -> float:
    """Entropy in bits of the histogram of some bytes."""
    shares = np.unique(list(data), return_counts=True)[1] / len(data)
    return float(-(shares * np.log2(shares)).sum())


def bytes_of(digits: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(digits), np.uint8)


def published_starts(ids: np.ndarray) -> list[int]:
    """The space patches of the paper's code, from ids of its vocabulary; BOS comes first."""
    byte = ids.astype(int) - 4
    word = np.isin(byte, list(b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    like = ~word & ~((byte >= 0x80) & (byte < 0xC0))
    ends = like & ~np.concatenate([[False], like[:-1]]) | (byte < 0)
    return [0, 1, *(np.flatnonzero(ends[1:]) + 2).tolist()]


# Thirty-four scripts; those beyond the basic plane have characters of four bytes.
SCRIPTS = (
    "naïve русский ελληνικά հայերեն עברית العربية ܣܘܪܝܝܐ ދިވެހި हिन्दी বাংলা ਪੰਜਾਬੀ ગુજરાતી "
    "ଓଡ଼ିଆ தமிழ் తెలుగు ಕನ್ನಡ മലയാളം සිංහල ไทย ລາວ བོད་ཡིག မြန်မာ ქართული 한국어 አማርኛ ᏣᎳᎩ "
    "ᐃᓄᒃᑎᑐᑦ ភាសាខ្មែរ ᠮᠣᠩᠭᠣᠯ 日本 ひらがな カタカナ ⴰⵎⴰⵣⵉⵖ 𐌲𐌿𐍄"
)

TEXTS = {
    "empty": b"",
    "one byte": b"a",
    "newlines": b"\n" * 50,
    "repetitive": b"ab " * 40,
    "scripts": (SCRIPTS + " 🙂👩‍👩‍👧 𝔘𝔫𝔦 \u00a0é").encode() * 3,
    "broken": 3 * bytes.fromhex("e08080eda080f0808080f4908080c080f5ffe28228f09f9820c3c3a980"),
    "random": np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8).tobytes(),
    "leads": bytes(
        np.random.default_rng(1).choice(bytes_of("2061808f909fa0bfc2e0e1edf0f1f4"), 1000)
    ),
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("patcher", PATCHERS)
@pytest.mark.parametrize("whole", [True, False])
def test_boundaries_are_those_of_a_plain_loop(name, patcher, whole):
    config = dataclasses.replace(CONFIG, patcher=patcher, whole_characters=whole, patch_size=3)
    entropies = np.random.default_rng(2).uniform(0, 3, len(TEXTS[name]) + 1).astype(np.float32)
    actual = starts(config, TEXTS[name], entropies)
    assert actual == loop_starts(config, TEXTS[name], entropies)


def test_entropies_of_the_two_examples():
    config = dataclasses.replace(CONFIG, patcher="entropy", threshold=1.0)
    text = b"abcdefg"
    assert lengths(config, text, [9, 0, 9, 0, 9, 0, 0, 9]) == [1, 2, 2, 3, 0]
    assert lengths(config, text, [0] * 8) == [1, 7]
    assert lengths(config, text, [1] * 8) == [1, 7], "the threshold itself is not over it"


def test_entropies_are_required_by_name():
    config = dataclasses.replace(CONFIG, patcher="entropy")
    with pytest.raises(ValueError, match="entropies=None"):
        starts(config, b"ab")


def test_literal_lengths():
    def fixed(size):
        return dataclasses.replace(CONFIG, patcher="fixed", patch_size=size)

    # The first 1 is BOS; a 0 at the end says that the byte still to come starts a patch.
    assert lengths(CONFIG, b"to be,  or not") == [1, 3, 3, 5, 3]
    assert lengths(CONFIG, b"x\n\n\n\ny") == [1, 2, 4]
    assert lengths(CONFIG, b" a") == [1, 1, 1]
    assert lengths(CONFIG, "é ü".encode()) == [1, 3, 2]
    assert lengths(fixed(3), b"abcdefgh") == [1, 3, 3, 2]
    assert lengths(fixed(3), b"abcdef") == [1, 3, 3, 0]
    assert lengths(fixed(2), "aéb".encode()) == [1, 4, 0], "no boundary inside é"
    assert lengths(dataclasses.replace(CONFIG, patcher="byte"), "é".encode()) == [1, 1, 1, 0]


def test_special_ids_are_no_bytes():
    eos, newline = VOCAB.eos_id, ord("\n") + VOCAB.offset
    lead = 0xE2 + VOCAB.offset
    ids = jnp.asarray([[VOCAB.bos_id, newline, eos, newline, lead, eos, newline]], jnp.int32)
    actual = patching.patch_starts(CONFIG, ids)
    assert actual[0].tolist() == [True, True, True, False, True, False, False, True]
    values = patching.to_bytes(ids, VOCAB)
    assert values[0].tolist() == [-1, 10, -1, 10, 0xE2, -1, 10]


def plan(starts_at: list[int], length: int, budget: int, counted: int | None = None):
    row = np.zeros((1, length + 1), bool)
    row[0, starts_at] = True
    counted_mask = np.arange(length)[None] < (length if counted is None else counted)
    return jax.tree.map(lambda x: x[0].tolist(), make_plan(row, counted_mask, budget))


def test_plan_with_room_as_literals():
    actual = plan([0, 1, 3, 5], 8, 6)
    assert actual.patch_of == [0, 1, 1, 2, 2, 3, 3, 3]
    assert actual.read_of == [0, 0, 1, 1, 2, 2, 2, 2]
    assert actual.lengths == [1, 2, 2, 3, 0, 0, 0] and actual.overflow == 0
    assert plan([0, 1, 3, 5, 8], 8, 6).read_of == [0, 0, 1, 1, 2, 2, 2, 3]
    assert plan([], 3, 3) == plan([0, 1], 3, 3), "starts at 0 and 1 are added"


def test_patches_past_the_budget_merge_into_the_last():
    starts_at = [0, 1, 3, 4, 6, 8]
    exact, short = plan(starts_at, 8, 5), plan(starts_at, 8, 2)
    assert exact.overflow == 0 and exact.read_of[-1] == 4
    assert short.patch_of == [0, 1, 1, 2, 2, 2, 2, 2]
    assert short.read_of == [0, 0, 1, 1, 1, 1, 1, 1]
    assert short.lengths == [1, 2, 5] and short.overflow == 3
    assert plan(starts_at, 8, 4).overflow == 1, "the byte still to come wants a patch, too"


def test_padding_is_never_patched():
    actual = plan([0, 1, 3], 6, 4, counted=4)
    assert actual.patch_of == [0, 1, 1, 2, 4, 4]
    assert actual.lengths == [1, 2, 1, 0, 0]
    ids = np.full((1, 7), VOCAB.pad_id, np.int32)
    ids[:, :4] = shifted_ids(b"a b")
    assert patching.patch_starts(CONFIG, jnp.asarray(ids))[0].tolist() == [
        *(True, True, False, True, False),  # BOS, "a", " ", "b", and the first pad
        *(False, False, False),
    ]
    assert patching.present(jnp.asarray(ids), VOCAB).sum() == 4


@pytest.mark.parametrize("patcher", PATCHERS)
def test_a_boundary_never_looks_at_the_byte_behind_it(patcher):
    rng = np.random.default_rng(3)
    config = dataclasses.replace(CONFIG, patcher=patcher, patch_size=3)
    ids = rng.integers(0, VOCAB.size, (64, 20), dtype=np.int32)
    entropies = jnp.asarray(rng.uniform(0, 3, ids.shape), jnp.float32)
    base = np.asarray(find_starts(config, ids, entropies))
    for j in range(20):
        changed = ids.copy()
        changed[:, j:] = rng.integers(0, VOCAB.size, changed[:, j:].shape)
        actual = np.asarray(find_starts(config, changed, entropies))
        assert (actual[:, : j + 1] == base[:, : j + 1]).all()


@pytest.mark.parametrize("name", TEXTS)
def test_lengths_sum_to_the_bytes(name):
    length = len(TEXTS[name]) + 1
    ids = np.full((1, ROOM), VOCAB.pad_id, np.int32)
    ids[:, :length] = shifted_ids(TEXTS[name])
    flags = find_starts(CONFIG, ids, None)
    for budget in (7, ROOM):
        plans = make_plan(flags, ids != VOCAB.pad_id, budget)
        assert plans.lengths.sum() == length and plans.lengths.min() >= 0


def test_starts_from_lengths_as_literals():
    actual = patching.starts_from_lengths(jnp.asarray([[1, 2, 2, 3], [1, 4, 3, 0]]), 8)
    assert np.flatnonzero(actual[0]).tolist() == [0, 1, 3, 5]
    assert np.flatnonzero(actual[1]).tolist() == [0, 1, 5, 8]


def test_the_scripts_are_thirty_four():
    first = {unicodedata.name(word[0]).split(" ")[0] for word in SCRIPTS.split()}
    assert len(SCRIPTS.split()) == len(first) == 34, sorted(first)


def test_space_splits_no_character():
    text = TEXTS["scripts"].decode()
    edges = np.cumsum([0] + [len(c.encode()) for c in text]) + 1
    assert set(starts(CONFIG, text.encode())) <= {0, *edges.tolist()}


def test_the_budget_is_exact_for_patchers_that_count():
    for length in (1, 2, 3, 4, 5, 20):
        for size in (1, 2, 5):
            config = dataclasses.replace(CONFIG, patcher="fixed", patch_size=size)
            data = b"x" * length
            read = [e for e in starts(config, data[:-1]) if e > 0]
            assert config.budget(length) == len(read)
        assert dataclasses.replace(CONFIG, patcher="byte").budget(length) == length
    assert dataclasses.replace(CONFIG, patch_budget=1.0).budget(1000) == 1000
    assert dataclasses.replace(CONFIG, bytes_per_patch=5.0).budget(1000) == 308


def test_the_largest_threshold_sums_without_overflow():
    limit = int(HISTOGRAM_LIMIT * patch_rules.BIT)
    values = np.full((1, ROOM), 2 * patch_rules.BIT, np.int32)
    sums = jax.jit(patching.sums_since_start)(values, np.zeros((1, ROOM), bool), limit)
    # Behind position 0, which ends its own sum, every 128th value of 2 bits passes 255.
    expected = np.concatenate([[1], np.arange(ROOM - 1) % 128 + 1]) * 2 * patch_rules.BIT
    np.testing.assert_array_equal(sums[0], expected)


SPACES = {
    "two words": [1, 4, 5],
    " two": [1, 4],  # BOS is space-like, so the space continues its run
    "a, b": [1, 2, 2],
    "é": [1, 2],
    "aéb": [1, 2, 2],
    "日本語": [1, 4, 3, 2],
    "a 日本": [1, 2, 4, 2],
}
"""Text → the lengths of its space patches by the paper's code, BOS first."""


@pytest.mark.parametrize("text", SPACES)
def test_space_patches_are_those_of_the_paper_s_code(text):
    config, data = BLTConfig(patcher="space"), text.encode()
    assert starts(config, data) == published_starts(shifted_ids(data)[0])
    assert lengths(config, data) == SPACES[text]
