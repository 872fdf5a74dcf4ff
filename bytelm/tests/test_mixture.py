"""Named sources: their shares, their order, what a run says about them and what it refuses."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytelm import recipes
from bytelm.config import ByteVocab, DataConfig
from bytelm.data import (
    Batch,
    Mixture,
    Windows,
    memory_corpus,
    named_paths,
    open_corpus,
    prepare,
)
from bytelm.data.mixture import BLOCK, _spread
from bytelm.metrics import Evaluation, add_bits, validation_line, validation_record
from bytelm.run_data import RunData, first_lines, open_windows
from bytelm_jax.training.batches import training_batches as jax_batches
from bytelm_torch.training.batches import training_batches as torch_batches

VOCAB = ByteVocab()


def source(letter: str, windows: int) -> Windows:
    """Windows of 4 ids, told apart by the source's letter and three digits."""
    text = "".join(f"{letter}{number:03}" for number in range(windows))
    return Windows(memory_corpus(text.encode()), VOCAB, 4, append_eos=False)


def mixture(**weights: float) -> Mixture:
    sizes = {"web": 90, "code": 7, "wiki": 1}
    return Mixture({name: source(name[0], sizes[name]) for name in weights}, weights)


def names(batch: Batch) -> list[str]:
    return [bytes(row).decode() for row in batch.ids.astype(np.uint8)]


def test_the_shares_of_10_000_batches() -> None:
    mixed = mixture(web=0.7, code=0.3)
    batches = np.array([mixed.locate(row)[0] for row in range(8 * 10_000)]).reshape(-1, 8)
    share = (batches == 0).mean()
    assert abs(share - 0.7) <= 0.005 * 0.3
    # Spread evenly: no batch of 8 is off by more than a row.
    assert set((batches == 0).sum(axis=1)) <= {5, 6}


@pytest.mark.parametrize(
    "weights", [(1.0,), (3.0, 2.0, 1.0), (1e-9, 1.0), (0.1,) * 3, (1e30, 2e30)]
)
def test_each_source_is_read_in_its_own_order(weights: tuple[float, ...]) -> None:
    known = {f"s{index}": source("s", 5) for index in range(len(weights))}
    mixed = Mixture(known, dict(zip(known, weights, strict=True)))
    following = dict.fromkeys(range(len(weights)), 0)
    for position in range(2 * BLOCK):
        index, number = mixed.locate(position)
        assert number == following[index]
        following[index] += 1
    for count, weight in zip(following.values(), weights, strict=True):
        assert count >= 2 and abs(count / 2 - weight / sum(weights) * BLOCK) <= 1
    index, number = mixed.locate(10**15 * BLOCK)
    assert number == 10**15 * following[index] // 2


def test_a_small_pattern() -> None:
    owners, ranks = _spread([3, 2, 1])
    assert "".join("abc"[owner] for owner in owners) == "abacba"
    assert ranks.tolist() == [0, 0, 1, 0, 1, 2]


def test_a_sequence_of_all_windows() -> None:
    mixed = mixture(web=1, code=1, wiki=1)
    rows = ["".join(map(chr, row)) for row in mixed]
    assert len(mixed) == len(rows) == 98
    assert (rows[0], rows[89], rows[90], rows[97]) == ("w000", "w089", "c000", "w000")
    assert bytes(mixed[-1]) == bytes(mixed[97])
    with pytest.raises(IndexError, match="window 98 of 98"):
        mixed[98]


@pytest.fixture(scope="module")
def whole() -> list[Batch]:
    return list(islice(jax_batches(mixture(web=0.7, code=0.3), 8, 3, 0), 60))


def test_an_exhausted_source_repeats_reshuffled(whole: list[Batch]) -> None:
    rows = [name for batch in whole for name in names(batch)]
    sources = np.concatenate([batch.sources for batch in whole if batch.sources is not None])
    assert [name[0] == "c" for name in rows] == sources.astype(bool).tolist()
    code = [name for name in rows if name[0] == "c"]
    epochs = [tuple(code[begin : begin + 7]) for begin in range(0, len(code) - 6, 7)]
    assert len(epochs) == 20 and len(set(epochs)) > 10
    assert all(sorted(epoch) == [f"c{number:03}" for number in range(7)] for epoch in epochs)
    web = [name for name in rows if name[0] == "w"]
    assert len(set(web[:90])) == 90 and web[:90] != sorted(web[:90])


@pytest.mark.parametrize("batches", [jax_batches, torch_batches])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_the_same_rows_from_any_step_in_any_number_of_processes(
    batches: Any, count: int, whole: list[Batch]
) -> None:
    starts = random.Random(count).sample(range(58), 10 if count == 1 else 2)
    for start in starts:  # as after a kill
        sizes = (mixture(web=0.7, code=0.3), 8, 3, start)
        parts: list[Iterator[Batch]] = [batches(*sizes, index, count) for index in range(count)]
        for step, shares in zip(range(start, start + 2), zip(*parts, strict=True), strict=False):
            for name in ("ids", "sources"):
                joined = np.concatenate([getattr(share, name) for share in shares])
                np.testing.assert_array_equal(joined, getattr(whole[step], name))
                assert joined.dtype == np.int32


def test_a_batch_in_shorter_rows() -> None:
    batch = Batch(np.arange(12, dtype=np.int32).reshape(2, 6), np.array([0, 1], np.int32))
    cut = batch.cut(3)
    assert cut.ids.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert cut.rest()["sources"].tolist() == [0, 0, 1, 1]
    assert Batch(batch.ids).cut(2).rest() == {}


# ---- runs -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 60), ("b", 60)):
        lines = [json.dumps({"text": f"{name}{n:03}" * 25}) + "\n" for n in range(count)]
        Path(f"{name}.jsonl").write_text("".join(lines))
    Path("c.txt").write_text("c" * 1000)
    Path("name=d.txt").write_text("d" * 1000)
    return tmp_path


def opened(*paths: str, weights: tuple[str, ...] = (), valid: tuple[str, ...] = ()) -> RunData:
    recipe = recipes.megabyte_tiny()
    how = replace(recipe.data, paths=paths, weights=weights, validation_fraction=0.1, valid=valid)
    return open_windows(replace(recipe, data=how))


def test_names_of_paths(folder: Path) -> None:
    assert named_paths(["a.jsonl", "name=d.txt", "gs://a/b=c"], "data.paths") == {
        "": ["a.jsonl", "name=d.txt", "gs://a/b=c"]
    }
    assert named_paths(["x=a", "y=b", "x=name=d.txt"], "data.paths") == {
        "x": ["a", "name=d.txt"],
        "y": ["b"],
    }
    assert named_paths(["name=*.txt"], "data.paths") == {"": ["name=*.txt"]}
    for paths, says in {
        ("c.txt", "x=c.txt"): "data.paths=c.txt: has no name, but x has; write NAME=PATH for all",
        ("x=",): "data.paths=x=: names no path; write NAME=PATH",
    }.items():
        with pytest.raises(ValueError, match=says):
            named_paths(paths, "data.paths")


def test_a_run_of_several_sources(folder: Path) -> None:
    found = opened("web=a.jsonl", "code=b.jsonl", "web=c.txt", weights=("web=7", "code=3"))
    assert found.names == ("web", "code") == tuple(found.validation)
    assert isinstance(found.windows, Mixture)
    assert found.windows.shares == pytest.approx({"web": 0.7, "code": 0.3}, abs=1e-4)
    code = found.windows.sources["code"].corpus
    assert code.documents + found.validation["code"].corpus.documents == 60
    alone = opened("b.jsonl")
    assert alone.windows.corpus.fingerprint() == code.fingerprint()  # pyright: ignore

    recipe = recipes.megabyte_tiny()
    how = replace(recipe.data, paths=("web=a.jsonl", "code=b.jsonl", "web=c.txt"))
    how = replace(how, sequence_length=256)
    recipe = replace(recipe, data=how, train=replace(recipe.train, steps=10, batch_size=10))
    lines = first_lines(recipe, found, 9999, "2 cpu")
    assert lines[1].startswith("data web: a.jsonl, c.txt: 7,000 bytes; ")
    assert f"{code.total_bytes:,} in {code.documents} documents to train on" in lines[2]
    epochs = 30 / len(found.windows.sources["code"])
    assert lines[2].endswith(f"held out by content; 30.0% of rows, {epochs:,.2f} epochs")
    assert lines[3].startswith("10 steps of 10 windows of 256; all windows once are ")


def test_shares_without_weights_are_those_of_the_bytes(folder: Path) -> None:
    windows = opened("x=c.txt", "y=a.jsonl").windows
    assert isinstance(windows, Mixture)
    sizes = [part.corpus.total_bytes for part in windows.sources.values()]
    assert windows.shares["x"] == pytest.approx(sizes[0] / sum(sizes), abs=1e-4)


def test_the_identity_has_names_and_weights(folder: Path) -> None:
    usual = ("x=a.jsonl", "y=b.jsonl"), ("x=1", "y=2")
    same = opened(*usual[0], weights=usual[1]).identity
    moved = Path("elsewhere")
    moved.mkdir()
    Path("a.jsonl").rename(moved / "a.jsonl")
    assert opened("x=elsewhere/a.jsonl", "y=b.jsonl", weights=usual[1]).identity == same
    others = [
        opened("z=elsewhere/a.jsonl", "y=b.jsonl", weights=("z=1", "y=2")),
        opened("x=elsewhere/a.jsonl", "y=b.jsonl", weights=("x=1", "y=3")),
        opened("x=elsewhere/a.jsonl", "y=b.jsonl"),
        opened("x=b.jsonl", "y=elsewhere/a.jsonl", weights=usual[1]),
        opened("elsewhere/a.jsonl", "b.jsonl"),
    ]
    assert len({same, *(other.identity for other in others)}) == 6


def test_validation_sets_of_the_user_s_choice(folder: Path) -> None:
    found = opened("a.jsonl", valid=("books=b.jsonl", "c=c.txt", "books=name=d.txt"))
    assert isinstance(found.windows, Windows) and found.windows.corpus.documents == 60
    sizes = {name: part.corpus.documents for name, part in found.validation.items()}
    assert sizes == {"books": 61, "c": 1}
    one = opened("x=a.jsonl", "y=c.txt", valid=("b.jsonl",))
    assert one.names == ("x", "y") and list(one.validation) == [""]
    usual = opened("a.jsonl")
    identities = [usual, found, one, opened("a.jsonl", valid=("b.jsonl",))]
    identities += [opened("a.jsonl", valid=("z=b.jsonl",))]
    assert len({each.identity for each in identities}) == 5

    recipe = recipes.megabyte_tiny()
    valid = ("books=b.jsonl", "c=c.txt", "books=name=d.txt")
    recipe = replace(recipe, data=replace(recipe.data, paths=("a.jsonl",), valid=valid))
    lines = first_lines(recipe, found, 9999, "2 cpu")
    assert lines[1].endswith("6,000 in 60 documents to train on, none held out")
    assert lines[2] == "valid books: b.jsonl, name=d.txt: 7,000 bytes in 61 documents"
    assert not any("warning" in line for line in lines)


def test_validation_on_what_is_trained_on_is_said(folder: Path) -> None:
    Path("link.jsonl").hardlink_to("a.jsonl")
    found = opened("x=a.jsonl", valid=("v=link.jsonl", "w=c.txt"))
    notes = [part.corpus.notes for part in found.validation.values()]
    assert notes == [("valid v: trains and validates on the same 1 file; leave it out of one",), ()]
    with pytest.raises(ValueError, match="has no name, but v has"):
        opened("a.jsonl", valid=("v=b.jsonl", "c.txt"))


def test_equal_files_are_read_once(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a", "b"):  # two files of equal content
        (folder / name).write_bytes(b"one")
    (folder / "c").hardlink_to(folder / "a")
    corpus = open_corpus([folder, folder / "a"])
    assert (corpus.documents, corpus.total_bytes) == (2, 6)
    assert corpus.notes[0].startswith(f"{folder / 'c'}: is the same file as {folder / 'a'}, and 1 ")
    prepared = prepare([folder, folder / "c"], tmp_path / "out")
    assert prepared.documents == 2 and prepared.notes == corpus.notes
    assert open_corpus([tmp_path / "out"]).documents == 2


def test_runs_begun_before_read_a_file_as_often_as_it_was_named(folder: Path) -> None:
    twice = replace(recipes.megabyte_tiny().data, paths=("c.txt", "c.txt"), validation_fraction=0.0)
    for rule, size in (("content", 1000), ("rank", 2000)):
        how = replace(twice, split_rule=rule)
        windows = open_windows(replace(recipes.megabyte_tiny(), data=how)).windows
        assert isinstance(windows, Windows) and windows.corpus.total_bytes == size


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        (("x",), "weights=x: write NAME=NUMBER, as web=0.7"),
        (("x=1", "x=2"), "weights=x=2: x is given twice"),
        (("x=much",), "weights=x=much: 'much' is no number"),
        *((("x=" + bad,), f"weights=x={bad}: must be a finite number above 0") for bad in
          ("0", "-1", "nan", "inf")),
        (("x=1", "z=1"), "weights=z: no such data; the names are x, y"),
        (("x=1",), "weights: y has none; give --weights y=NUMBER, too"),
    ],
)  # fmt: skip
def test_weights_that_cannot_be(folder: Path, weights: tuple[str, ...], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        opened("x=a.jsonl", "y=c.txt", weights=weights)


def test_weights_of_plain_paths_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="weights=x=1: no data have a name; write --data NAME="):
        opened("a.jsonl", weights=("x=1",))
    with pytest.raises(ValueError, match="weights=x=1: no data have a name"):
        opened(weights=("x=1",))
    assert DataConfig().weights == ()


# ---- figures --------------------------------------------------------------------------------


def test_figures_by_source() -> None:
    two = {"web": Evaluation(10.0, 10), "code": Evaluation(20.0, 10), "none": Evaluation(0.0, 0)}
    record = validation_record(two)
    assert record["validation_loss"] == 1.5
    bits = {key: value for key, value in record.items() if "bits" in key}
    assert [round(value, 4) for value in bits.values()] == [2.164, 1.4427, 2.8854]
    assert list(bits)[1:] == ["validation_bits_per_byte/web", "validation_bits_per_byte/code"]
    line = "step 3: validation 2.1640 bits per byte (web 1.4427, code 2.8854)"
    assert validation_line(3, record) == line
    plain = validation_record({"": two["web"]})
    assert list(plain) == ["validation_loss", "validation_bits_per_byte"]
    assert validation_line(3, plain) == "step 3: validation 1.4427 bits per byte"
    plain["validation_bits_per_byte"] = float("nan")
    assert validation_line(3, plain) == "step 3: validation is not finite"

    values = {"loss": 2.0, "grad_norm": 1.0, "loss/web": 2.0, "loss/code": float("nan")}
    add_bits(values)
    assert values.keys() == {"loss", "grad_norm", "loss/web", "bits_per_byte", "bits_per_byte/web"}
