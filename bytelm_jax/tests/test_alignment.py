"""Alignment of a byte encoder with a token model: prepared text, the loss, the stage."""

from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load, save

from bytelm import alignment
from bytelm.config import Recipe, TrainConfig
from bytelm.metrics import read_metrics
from bytelm_jax.cli import main as cli
from bytelm_jax.models import define_model
from bytelm_jax.training import checkpoint
from bytelm_jax.training.alignment import alignment_loss
from parity_tests.test_alignment import MODEL, Words

TEXT = "the café of\nthe 日本 end"
WIDTH = MODEL.global_dim


@pytest.fixture
def tokenizer():
    tokenizers = pytest.importorskip("tokenizers", reason="the tokenizers library is not installed")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet)
    made.train_from_iterator([TEXT] * 9, trainer)
    return made


class Letters:
    """A tokenizer whose tokens are characters; that of a letter of ASCII is 1, any other 2."""

    def encode_batch(self, texts, add_special_tokens):
        spans = ([(i, i + 1) for i in range(len(text))] for text in texts)
        ids = ([1 if c.isascii() else 2 for c in text] for text in texts)
        return [SimpleNamespace(ids=a, offsets=b) for a, b in zip(ids, spans, strict=True)]


def table(rows):
    return np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)


def test_tokens_end_where_their_bytes_do(tokenizer, tmp_path):
    """Of a text with characters of several bytes, in pieces; what is not UTF-8 has no tokens."""
    file, embeddings = tmp_path / "x.tokens", table(300)
    documents = [TEXT.encode(), b"\xff\xfe the", b"", (TEXT + "\n").encode() * 4000]
    made = alignment.prepare(documents, tokenizer, embeddings, 7, file)
    aligned = alignment.open_aligned(file)
    assert aligned.text.tobytes() == b"".join(documents) and made.skipped == 1
    every = [len(tokenizer.encode(each).ids) for each in (TEXT, TEXT + "\n")]
    assert made.tokens + made.left_out == every[0] + 4000 * every[1]
    assert made.left_out == (every[0] - np.count_nonzero(aligned.token[: len(documents[0])])) * 4001
    skipped, wrote, left = made.lines(file)
    assert skipped == "1 piece of text is not UTF-8 and without tokens"
    assert f"{made.tokens} tokens of " in wrote and f"left out {made.left_out} tokens" in left
    np.testing.assert_array_equal(aligned.embeddings[aligned.begin - 1], embeddings[7])
    first = len(TEXT.encode())
    position, expected = 0, {}
    encoding = tokenizer.encode(TEXT)
    for number, (_, stop) in zip(encoding.ids, encoding.offsets, strict=True):
        position = len(TEXT[:stop].encode())
        expected[position - 1] = embeddings[number]
    assert position == first
    for at in range(first):
        row = aligned.token[at]
        assert (row > 0) == (at in expected)
        if row:
            np.testing.assert_array_equal(aligned.embeddings[row - 1], expected[at])
    assert not aligned.token[first : first + 6].any()
    last = aligned.token[-first - 1 : -1]
    np.testing.assert_array_equal(last, aligned.token[:first])


def test_long_texts_are_cut_between_characters(tmp_path):
    """Without lines and spaces; what is not UTF-8 is cut, too, and ends."""
    for character in "é", "日", "𝄞":
        document = b"x" + character.encode() * 50_000
        pieces = list(alignment._pieces(document))
        assert b"".join(pieces) == document and len(pieces) > 1
        assert all(set(piece.decode()) <= {"x", character} for piece in pieces)
    assert [len(p) for p in alignment._pieces(b"\x80" * 70_000)] == [65_536, 4_464]
    text = ("x" + "日" * 50_000).encode()
    made = alignment.prepare([text], Letters(), table(3), None, tmp_path / "x")
    assert (made.tokens, made.skipped) == (50_001, 0)


def test_a_tokenizer_neither_truncates_nor_pads(tokenizer, tmp_path):
    whole = tokenizer.encode(TEXT).ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=99)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 7}')
    opened, begin = alignment.open_tokenizer(tmp_path)
    assert opened.encode(TEXT).ids == whole and begin == 7


def refused(capsys, *command):
    """What a command says that is refused, in one line."""
    assert cli.main([str(part) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def test_no_text_is_written_over(tmp_path, capsys):
    """Only a file of the command's own is replaced, and none that is among the text."""
    text, tokens, folder = tmp_path / "a.txt", tmp_path / "x.tokens", tmp_path / "folder"
    alignment.prepare([b"some words"], Words(), table(9), None, tokens)
    text.write_text(TEXT)
    folder.mkdir()
    (folder / "b.txt").symlink_to(text)
    for data, out, why in [
        (text, text, "is among the text"),
        (folder, folder / "b.txt", "is among the text"),
        (folder / "b.txt", text, "is among the text"),
        (tokens, tokens, "is among the text"),
        (tmp_path, tokens, "is among the text"),
        (tokens, text, "exists, and `bytelm align-data` did not write it"),
        (text, folder, "is a folder"),
        (text, text / "x.tokens", f"{text} is a file, not a folder"),
    ]:
        assert why in refused(capsys, "align-data", tmp_path, "--data", data, "--out", out)
    for donor, why in (text, "is a file"), (tmp_path / "none", "does not exist"):
        made = refused(capsys, "align-data", donor, "--data", text, "--out", tmp_path / "new")
        assert f"{donor}: {why}" in made
    assert text.read_text() == TEXT and not (tmp_path / "new").exists()
    alignment.check_output(tokens, [str(text)])


def test_a_file_with_faults_is_refused_and_one_without_a_sum_is_opened(tmp_path):
    """In one line that says what is wrong; the identity covers tokens and embeddings."""
    file = tmp_path / "x.tokens"
    alignment.prepare([b"some words of a text"], Words(), table(9), 0, file)
    whole, tensors, identity = file.read_bytes(), load(file.read_bytes()), ""
    for embeddings in table(9), table(9) * 2:
        alignment.prepare([b"some words of a text"], Words(), embeddings, 0, file)
        assert identity != (identity := alignment.open_aligned(file).identity)
    for flipped in 1, 30, 100:  # of the text, the tokens, the embeddings
        damaged = bytearray(whole)
        damaged[-flipped] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="differs from what was written"):
            alignment.open_aligned(file)
    nan, one = tensors["embeddings"] * np.float32("nan"), np.ones(1, np.uint8)
    for changes, begin, why in [
        ({}, "1", ""),
        ({}, "6", r"begin=6: it has 5 embeddings"),
        ({}, "-1", "begin=-1"),
        ({"embeddings": nan}, "1", "holds NaN or infinity"),
        ({"embeddings": tensors["embeddings"][:1]}, "1", "names embeddings that it lacks"),
        ({"text": one}, "1", "do not fit each other"),
        ({"text": None}, "1", "tensor text: missing"),
        ({"token": None}, "1", "tensor token: missing"),
        ({"embeddings": None}, "1", "tensor embeddings: missing"),
        ({"token": tensors["token"].astype(np.int64)}, "1", "tensor token: I64, and not U16"),
    ]:
        kept = {name: value for name, value in (tensors | changes).items() if value is not None}
        file.write_bytes(save(kept, {"bytelm_alignment": "1", "begin": begin}))
        with pytest.raises(ValueError, match=why) if why else nullcontext():
            alignment.open_aligned(file)


def test_the_loss_is_that_of_the_words_one_by_one():
    """Against a plain loop over patches, which are cut by hand."""
    bind, init = define_model(MODEL)
    params, embeddings = jax.jit(init, static_argnums=0)(0), table(5)
    text = b"ab cd efg h"
    ids = jnp.asarray(np.frombuffer(text, np.uint8)[None].astype(np.int32) + MODEL.vocab.offset)
    token = np.zeros(ids.shape, np.int32)
    token[0, [0, 1, 4, 7, 10]] = [1, 2, 3, 5, 4]  # that of the last byte is in an open patch

    @jax.jit
    def run(params):
        model = bind(params)
        encoded = model.encode(ids)
        loss = alignment_loss(model, ids, jnp.asarray(token), jnp.asarray(embeddings), 4)
        return model.widen(encoded.pooled), loss

    patches, (loss, cosine) = run(params)
    # BOS, "ab ", "cd ", "efg ", and "h", which is open.
    targets = [embeddings[3], embeddings[:2].mean(axis=0), embeddings[2], embeddings[4]]
    errors, cosines = [], []
    for patch, target in zip(np.asarray(patches[0]), targets, strict=False):
        errors.append(np.square(patch - target).mean())
        cosines.append(patch @ target / np.linalg.norm(patch) / np.linalg.norm(target))
    np.testing.assert_allclose(loss, np.mean(errors) / np.square(embeddings).mean(), rtol=1e-5)
    np.testing.assert_allclose(cosine, np.mean(cosines), rtol=1e-5)


@pytest.mark.slow
def test_the_stage_trains_the_encoder_alone_and_resumes(tokenizer, tmp_path, capsys):
    """Three steps and two more are five steps, bit for bit; what does not fit is refused."""
    _, init = define_model(MODEL)
    train = TrainConfig(batch_size=4, devices=1, log_every=1, eval_every=0, checkpoint_every=0)
    recipe = Recipe(name="imported", model=MODEL, train=train)
    checkpoint.create_run(tmp_path / "run", recipe, jax.jit(init, static_argnums=0)(0))
    tokens = tmp_path / "x.tokens"
    alignment.prepare([TEXT.encode() * 40], tokenizer, table(300), None, tokens)

    def align(folder, steps, *more):
        command = ["align", str(tmp_path / "run"), "--tokens", str(tokens), "--steps", str(steps)]
        command += ["--sequence-length", "24", "--learning-rate", "0.01", *more]
        return cli.main([*command, "--run-dir", str(tmp_path / folder)])

    assert align("whole", 5) == 0 and align("parts", 5, "--checkpoint-every", "3") == 0
    for newer in (tmp_path / "parts" / "checkpoints").glob("5"):
        newer.rename(tmp_path / "gone")
    assert align("parts", 5, "--checkpoint-every", "3") == 0
    assert "resuming aligned" in capsys.readouterr().out
    _, before, _ = checkpoint.load_run(tmp_path / "run")
    whole, parts = (checkpoint.load_run(tmp_path / name)[1] for name in ("whole", "parts"))
    for name, value in whole.items():
        np.testing.assert_array_equal(value, parts[name])
        trained = name.startswith(("encoder.", "to_global."))
        assert (value != before[name]).any() == trained, name
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    losses = [line["alignment_loss"] for line in lines if "alignment_loss" in line]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert lines[-1]["validation_alignment_loss"] > 0
    assert align("whole", 5, "--batch-size", "2") == 2
    assert "started with 4; keep that value or name another folder" in capsys.readouterr().err
    alignment.prepare([TEXT.encode() * 40], tokenizer, table(300) * 2, None, tokens)
    assert align("whole", 5) == 2
    assert "not the bytes that" in capsys.readouterr().err
    alignment.prepare([TEXT.encode() * 40], tokenizer, table(300)[:, 1:], None, tokens)
    assert align("new", 5) == 2
    assert "make both with the same donor" in capsys.readouterr().err
    alignment.prepare([TEXT.encode() * 40], tokenizer, table(300), None, tokens)
    assert align("new", 5, "--sequence-length", "9999") == 2
    assert "less than two windows" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
