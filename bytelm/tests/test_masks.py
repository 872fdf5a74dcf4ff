"""Documents some bytes of which are read and not counted, from files to batches."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytelm.config import ByteVocab
from bytelm.data import (
    Batch,
    Corpus,
    Mixture,
    Windows,
    evaluation_batches,
    memory_corpus,
    open_corpus,
    prepare,
)
from bytelm_jax.training.batches import training_batches as jax_batches
from bytelm_torch.training.batches import training_batches as torch_batches

VOCAB = ByteVocab()
RECORDS = [
    {"prompt": f"what is {n}?", "completion": f" it is {n * n}." if n != 3 else ""}
    for n in range(60)
]
PROMPTS: dict[str, Any] = {"prompt_field": "prompt", "completion_field": "completion"}
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße?"},
    {"role": "assistant", "content": "Grüße!"},
    {"role": "user", "content": "Bye"},
]


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pa = pytest.importorskip("pyarrow")
        table = pa.Table.from_pylist(records)
        if path.suffix == ".parquet":
            import pyarrow.parquet as parquet

            parquet.write_table(table, path)
        else:
            with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as file:
                file.write_table(table)
    return path


def scored(corpus: Corpus) -> list[tuple[bytes, bytes]]:
    """Each document, and its counted bytes."""
    found = []
    for index, length in enumerate(corpus.lengths.tolist()):
        text = corpus.read(index, 0, length)
        found.append((text.tobytes(), text[corpus.counted(index, 0, length)].tobytes()))
    return found


EXPECTED = [
    ((each["prompt"] + each["completion"]).encode(), each["completion"].encode())
    for each in RECORDS
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "arrow"])
def test_prompts_are_read_and_not_counted(tmp_path: Path, suffix: str) -> None:
    corpus = open_corpus([write_records(tmp_path / f"x.{suffix}", RECORDS)], **PROMPTS)
    assert scored(corpus) == EXPECTED
    assert corpus.counted_bytes == sum(len(completion) for _, completion in EXPECTED)
    chosen = corpus.subset([5, 3, 7])
    assert scored(chosen) == [EXPECTED[5], EXPECTED[3], EXPECTED[7]]
    assert chosen.counted_bytes == len(EXPECTED[5][1] + EXPECTED[7][1])
    head, tail = corpus.cut(16)
    assert scored(head) == [(EXPECTED[0][0][:16], EXPECTED[0][1][:6])]
    assert head.counted_bytes + tail.counted_bytes == corpus.counted_bytes
    # The digest is that of the whole document, so the split moves nothing.
    plain = memory_corpus([text for text, _ in EXPECTED])
    assert corpus.digests().tolist() == plain.digests().tolist()


def test_prepared_files_keep_what_is_counted(tmp_path: Path) -> None:
    source = write_records(tmp_path / "x.jsonl", RECORDS)
    (tmp_path / "plain").write_bytes(b"all of it")
    prepare([source], tmp_path / "one", **PROMPTS)
    assert scored(open_corpus([tmp_path / "one"])) == EXPECTED
    prepare([tmp_path / "plain", tmp_path / "one"], tmp_path / "two")
    merged = open_corpus([tmp_path / "two"])
    assert scored(merged) == [(b"all of it", b"all of it"), *EXPECTED]
    content = (tmp_path / "two").read_bytes()
    assert content.endswith(b"BYTELM03")
    damaged = bytearray(content)
    damaged[-32] ^= 255  # in the last run of counted bytes
    (tmp_path / "bad").write_bytes(damaged)
    with pytest.raises(ValueError, match="ends like a prepared file, but"):
        open_corpus([tmp_path / "bad"])
    prepare([tmp_path / "plain"], tmp_path / "three", **PROMPTS)
    assert (tmp_path / "three").read_bytes().endswith(b"BYTELM02")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_of_a_chat_the_assistant_counts(tmp_path: Path, suffix: str) -> None:
    path = write_records(tmp_path / f"x.{suffix}", [{"messages": CHAT}, {"messages": CHAT[2:3]}])
    (text, counted), (_, alone) = scored(open_corpus([path], chat_field="messages"))
    assert text.decode() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nGrüße?<|im_end|>\n"
        "<|im_start|>assistant\nGrüße!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    )
    assert counted.decode() == alone.decode() == "Grüße!<|im_end|>\n"


def test_windows_and_batches_know_it(tmp_path: Path) -> None:
    corpus = open_corpus([write_records(tmp_path / "x.jsonl", RECORDS)], **PROMPTS)
    windows = Windows(corpus, VOCAB, 16, append_eos=True)
    flags = [
        [i >= len(text) - len(counted) for i in range(len(text))] + [bool(counted)]
        for text, counted in EXPECTED
    ]
    flat = np.array([flag for document in flags for flag in document])
    found = np.concatenate([windows.counted(index) for index in range(len(windows))])
    np.testing.assert_array_equal(found[: len(flat)], flat)
    assert not found[len(flat) :].any()
    batches = list(evaluation_batches(windows, 4))
    masks = [batch.counted for batch in batches if batch.counted is not None]
    np.testing.assert_array_equal(np.concatenate(masks).ravel()[: len(flat)], flat)

    mixed = Mixture(
        {"chat": windows, "web": Windows(memory_corpus(b"w" * 400), VOCAB, 16, True)},
        {"chat": 1.0, "web": 1.0},
    )
    for data in (windows, mixed):
        for ours, theirs in islice(
            zip(jax_batches(data, 4, 1, 2), torch_batches(data, 4, 1, 2), strict=True), 3
        ):
            for one, other in zip(ours, theirs, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    np.testing.assert_array_equal(one, other)
            assert ours.counted is not None
            if data is mixed and ours.sources is not None:
                assert ours.counted[ours.sources == 1].all()
    cut = Batch(np.zeros((1, 4), np.int32), counted=np.array([[True, False, False, True]])).cut(2)
    assert cut.rest()["counted"].tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt_field": "prompt"}, "prompt_field=prompt: give both"),
        ({"completion_field": "c"}, "completion_field=c: give both"),
        (PROMPTS | {"chat_field": "m"}, "chat_field=m: leave out prompt_field"),
        (PROMPTS | {"raw": True}, "prompt_field=prompt: --raw takes all bytes"),
        (PROMPTS | {"text_field": "t"}, "text_field=t: is not read with prompt_field=prompt"),
        ({"prompt_field": "ask", "completion_field": "completion"}, "line 1: has no field 'ask'"),
        ({"chat_field": "prompt"}, "line 1: its field 'prompt' is no list of messages"),
    ],
)
def test_fields_that_cannot_be(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    path = write_records(tmp_path / "x.jsonl", RECORDS)
    with pytest.raises(ValueError, match=says):
        open_corpus([path], **fields)
    with pytest.raises(ValueError, match=says):
        prepare([path], tmp_path / "out", **fields)
    assert not (tmp_path / "out").exists()
