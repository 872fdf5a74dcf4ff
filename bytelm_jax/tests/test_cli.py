"""The command line: every command on a real run, and every kind of bad input."""

import io
import json
import math
import os
import random
import shutil
import struct
import subprocess
import sys
import wave
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import bytelm_torch
from bytelm import tolerances
from bytelm.inspection import Inspection
from bytelm_jax.cli import main as cli
from bytelm_jax.inference import generate as generation
from bytelm_jax.parity.twins import make_twin
from bytelm_jax.training import evaluate as evaluation
from bytelm_jax.training.checkpoint import load_run
from bytelm_torch.training.loss import token_nats

TINY = [
    *("--model.patch-size", "4", "--model.global-dim", "8", "--model.local-dim", "16"),
    *("--model.global-layers", "1", "--model.local-layers", "1", "--model.global-heads", "2"),
    *("--model.local-heads", "2", "--model.max-length", "64", "--sequence-length", "64"),
    *("--batch-size", "8", "--warmup-steps", "5", "--devices", "1"),
]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    source = random.Random(5)
    words = ["".join(source.choices("abcdefghéß", k=source.randint(2, 7))) for _ in range(50)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(source.choices(words, k=4000)), "utf-8")
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory, text):
    """A finished run folder."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    steps = ["--steps", "30", "--checkpoint-every", "20", "--eval-every", "10"]
    argv = ["train", "megabyte_tiny", *TINY, *steps, "--data", str(text), "--run-dir", str(folder)]
    assert cli.main(argv) == 0
    return folder


@pytest.fixture(scope="session")
def export(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "tiny"
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    return out


def refused(capsys, *argv):
    """The one line on standard error with which the command refuses."""
    assert cli.main([str(a) for a in argv]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.strip().splitlines()
    assert len(lines) == 1, output.err
    assert lines[0].startswith("bytelm")
    return lines[0]


def contents(folder):
    return {p: p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def evaluated(capsys, *argv):
    assert cli.main(["eval", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("size", [1, 7, 200_003])
def test_eval_counts_every_byte_once_and_agrees_with_torch(size, run, export, tmp_path, capsys):
    file = tmp_path / "bytes.bin"
    file.write_bytes(np.random.default_rng(size).bytes(size))
    capsys.readouterr()
    result = evaluated(capsys, run, "--data", file, "--batch-size", "64")
    assert result["bytes"] == size
    assert result["bits_per_byte"] == pytest.approx(result["nats"] / size / np.log(2))
    twin = bytelm_torch.from_pretrained(export)
    raw = np.frombuffer(file.read_bytes(), np.uint8).astype(np.int64)
    nats = 0.0
    with torch.no_grad():
        whole = raw[: size // 64 * 64].reshape(-1, 64)
        for rows in (*np.array_split(whole, 20), raw[size // 64 * 64 :][None]):
            if rows.size:
                ids = torch.from_numpy(rows.copy())
                nats += token_nats(twin(ids), ids).double().sum().item()
    assert abs(result["nats"] - nats) / nats <= tolerances.OTHER_PLACE["float32"]


def test_eval_in_float64_agrees_with_torch_in_float64(run, export, text, capsys):
    capsys.readouterr()
    result = evaluated(capsys, run, "--data", text, "--dtype", "float64", "--window", "32")
    twin = bytelm_torch.from_pretrained(export, dtype=torch.float64)
    raw = torch.from_numpy(np.frombuffer(text.read_bytes(), np.uint8).astype(np.int64))
    with torch.no_grad():
        nats = sum(token_nats(twin(r[None]), r[None]).sum().item() for r in raw.split(32))
    assert abs(result["nats"] - nats) / nats <= tolerances.OTHER_PLACE["float64"]


def test_bfloat16_stays_close(run, text, capsys):
    capsys.readouterr()
    exact = evaluated(capsys, run, "--data", text)
    rough = evaluated(capsys, run, "--data", text, "--dtype", "bfloat16")
    assert rough["nats"] != exact["nats"]
    assert abs(rough["nats"] - exact["nats"]) / exact["bytes"] <= tolerances.BF16_MEAN_KL


def test_no_json_holds_nan_or_infinity(run, text, capsys, monkeypatch):
    for nats in (math.nan, math.inf):
        seen = np.full((1, 5), nats), np.ones((1, 5), bool)
        monkeypatch.setattr(evaluation, "evaluated_batches", lambda *_, seen=seen: [seen])
        line = refused(capsys, "eval", run, "--data", text, "--json")
        assert f"data: their loss is {nats} in float32" in line
    shown = np.array([1.0, math.nan, math.inf], np.float32)
    inspected = Inspection(b"abc", shown, shown, None, "")
    assert inspected.to_dict()["surprise"] == inspected.to_dict()["entropy"] == [1.0, None, None]


HUGE = {
    "generate RUN --max-new-bytes 3000000000": "max_new_bytes=3000000000: must be at most 21",
    "generate RUN --seed 4294967296": "seed=4294967296: choose one from 0 to 4294967295",
    "generate RUN --seed -1": "seed=-1: choose one from 0 to 4294967295",
    "generate RUN --temperature 1e39": "temperature=1e+39: must be a finite value, at most 3.40",
    "generate RUN --top-k 3000000000": "top_k=3000000000: must be at most 2147483647",
    "eval RUN --data TEXT --batch-size 10000000000": "batch_size=10000000000: must be at most 2147",
    "eval RUN --data TEXT --window -1": "--window -1: must be at least 1, or 0",
    "export RUN --out OUT --format stablehlo --length 0": "--length 0: must be at least 1",
    "export RUN --out no/folder --format stablehlo": "--out no/folder: name a file in a folder",
    "export RUN --out OUT --vocab-size 2147483647": "vocab.size=2147483647: does not fit into mem",
    "calibrate RUN --data TEXT --windows 10000000000": "windows=10000000000: must be at most 214",
    "inspect hi --model RUN --max-bytes 10000000000": "max_bytes=10000000000: must be at most 214",
    "parity RUN --length 2147483647": "length=2147483647: must be at most the model's max_len",
    "parity RUN --data TEXT --rows 2147483647": "rows=2147483647: times length=19 it must be at",
    "serve RUN --port 99999": "--port 99999: must be from 0 to 65535",
    "serve RUN --time-limit inf": "time_limit=inf: must be a finite value",
    "doctor --limit inf": "limit=inf: must be a finite value, at most 3.402823e+38",
    "train megabyte_tiny --run-dir OUT --train.seed 4294967296": "seed=4294967296: choose one from",
    "train megabyte_tiny --run-dir OUT --batch-size 10000000000": "batch_size=10000000000: must be",
    "train megabyte_tiny --run-dir OUT --batch-size 2147483644": "batch_size=2147483644: the log",
    "train megabyte_tiny --run-dir OUT --patch-size 1 --global-dim 99999996": "model: parameters a",
    "train lfbyte_tiny --run-dir OUT --sequence-length 2147483647": "sequence_length=2147483647: t",
    "train megabyte_tiny --run-dir OUT --epochs 1e300": "epochs=1e+300: must be at most ",
}


@pytest.mark.parametrize("line", HUGE)
def test_numbers_too_large_are_refused_at_once(line, run, text, tmp_path, capsys):
    places = {"RUN": run, "TEXT": text, "OUT": tmp_path / "out"}
    argv = [places.get(word, word) for word in line.split()]
    if argv[0] == "train":
        argv += ["--data", text, "--devices", "1"]
    assert HUGE[line] in refused(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_generate_streams_whole_characters_and_repeats_with_a_seed(run, capsys):
    argv = ["generate", str(run), "--prompt", "é", "--max-new-bytes", "40", "--seed", "3"]
    capsys.readouterr()
    assert cli.main(argv) == 0
    first = capsys.readouterr().out
    assert first.startswith("é") and len(first) > 10
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == first
    assert cli.main([*argv[:-1], "4"]) == 0
    assert capsys.readouterr().out != first


class TextAlone(io.StringIO):
    """A standard output without bytes beneath it, as in a notebook."""

    encoding = "ascii"


def test_generate_writes_where_the_locale_cannot(run, capsys, monkeypatch):
    argv = ["generate", str(run), "--prompt", "é – ", "--max-new-bytes", "20", "--seed", "3"]
    capsys.readouterr()
    assert cli.main(argv) == 0
    expected = capsys.readouterr().out
    for encoding in ("ascii", "cp1252"):
        sink = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", sink)
        assert cli.main(argv) == 0
        assert sink.buffer.getvalue().decode("utf-8") == expected
    alone = TextAlone()
    monkeypatch.setattr(sys, "stdout", alone)
    assert cli.main(argv) == 0
    assert alone.getvalue() == expected.encode("ascii", "replace").decode("ascii")
    ascii_alone = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_alone)
    assert cli.main(["--help"]) == 0  # its dots are no ASCII


def test_a_prompt_file_of_one_hyphen_is_standard_input(run, capsysbinary, monkeypatch):
    options = ["--max-new-bytes", "10", "--seed", "3"]
    assert cli.main(["generate", str(run), "--prompt", "some é", *options]) == 0
    expected = capsysbinary.readouterr().out
    piped = io.TextIOWrapper(io.BytesIO("some é".encode()), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", piped)
    assert cli.main(["generate", str(run), "--prompt-file", "-", *options]) == 0
    assert capsysbinary.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO("some é"))
    assert cli.main(["generate", str(run), "--prompt-file", "-", *options]) == 0
    assert capsysbinary.readouterr().out == expected
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"x" * 60)))
    assert cli.main(["generate", str(run), "--prompt-file", "-", *options]) == 2
    refusal = capsysbinary.readouterr()
    assert refusal.out == b"" and b"prompts: 60 bytes and max_new_bytes=10 make 70" in refusal.err


def test_export_import_there_and_back(run, export, tmp_path, text, capsys):
    again = tmp_path / "again"
    assert cli.main(["import", str(export), "--out", str(again)]) == 0
    second = tmp_path / "second"
    assert cli.main(["export", str(again), "--out", str(second)]) == 0
    for name in ("model.safetensors",):
        assert (second / name).read_bytes() == (export / name).read_bytes()
    capsys.readouterr()
    assert evaluated(capsys, again, "--data", text) | {"step": 30} == evaluated(
        capsys, run, "--data", text
    )
    assert "not an empty folder" in refused(capsys, "import", export, "--out", again)


@pytest.mark.parametrize(
    "options, why",
    [
        (["--license", "mit"], "--license: needs --format hf"),
        (["--format", "hf", "--max-shard-size", "5XB"], "max_shard_size=5XB: give a size"),
        (["--format", "hf", "--license", "a b"], "license='a b': give an identifier"),
    ],
)
def test_options_of_a_folder_for_transformers_are_refused(options, why, run, tmp_path, capsys):
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out"), *options]) == 2
    assert why in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_folder_for_transformers_has_a_model_card(run, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["export", str(run), "--out", str(out), "--format", "hf", "--license", "mit"]
    assert cli.main(argv) == 0 and cli.main(argv) == 0  # in place of the first
    assert os.listdir(tmp_path) == ["out"]
    card = (out / "README.md").read_text("utf-8")
    record = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    bits = [each["validation_bits_per_byte"] for each in record if "validation_loss" in each][-1]
    for part in ("license: mit\n", "`words.txt`", f"{bits:.4f} on", "Not checked when"):
        assert part in card
    assert str(run.parent.parent) not in card  # no place on this machine
    assert bytelm_torch.from_pretrained(out).config == load_run(run)[0].model


def test_parity_passes_and_names_the_first_difference(run, export, tmp_path, text, capsys):
    argv = ["--data", str(text), "--length", "11"]
    records = tmp_path / "records.jsonl"  # of which the loss is that of the completions
    records.write_text('{"prompt": "what is one?", "completion": "one is one."}\n' * 9)
    fields = ["--prompt-field", "prompt", "--completion-field", "completion"]
    masked = ["--data", str(records), "--length", "19", *fields]
    assert cli.main(["parity", str(export), *masked]) == 0
    assert "equal: every tensor within tolerance" in capsys.readouterr().out
    # An export whose torch side is not what JAX reads: one tensor of the twin is disturbed.
    with pytest.MonkeyPatch.context() as patch:
        original = bytelm_torch.from_pretrained

        def disturbed(path, **options):
            twin = original(path, **options)
            with torch.no_grad():
                twin.local_transformer.layers[0].feedforward.up.bias[3] += 1e-5
            return twin

        patch.setattr(bytelm_torch, "from_pretrained", disturbed)
        assert cli.main(["parity", str(export), *argv]) == 1
    output = capsys.readouterr().out
    assert "DIFFERENT from local_transformer.layers.0.feedforward.up on" in output


def test_prepared_file_evaluates_like_its_source(run, text, tmp_path, capsys):
    out = tmp_path / "packed.bytes"
    assert cli.main(["prepare", str(text), "--out", str(out)]) == 0
    assert f"1 documents, {text.stat().st_size} bytes" in capsys.readouterr().out
    packed = evaluated(capsys, run, "--data", out)
    assert packed == evaluated(capsys, run, "--data", text)


def test_bad_data(run, text, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "nothing.txt").touch()
    before = contents(run)
    capsys.readouterr()
    for argv in (["eval", run], ["train", "megabyte_tiny", *TINY, "--run-dir", tmp_path / "new"]):
        assert "missing.txt" in refused(capsys, *argv, "--data", tmp_path / "missing.txt")
        assert "empty" in refused(capsys, *argv, "--data", tmp_path / "empty")
        assert "nothing.txt" in refused(capsys, *argv, "--data", tmp_path / "nothing.txt")
    assert not (tmp_path / "new" / "config.json").exists()
    assert "--data" in refused(capsys, "eval", run, "--data")
    assert "nothing.txt" in refused(
        capsys, "prepare", tmp_path / "nothing.txt", "--out", tmp_path / "out"
    )
    assert "empty" in refused(capsys, "prepare", text, "--out", tmp_path / "empty")
    assert contents(run) == before


def test_bad_names_and_values(run, capsys):
    train = ("train", "megabyte_tiny")
    assert "did you mean megabyte_tiny?" in refused(capsys, "train", "megabyte_tini")
    assert "unknown command" in refused(capsys, "trane")
    assert "did you mean --model.patch-size?" in refused(capsys, *train, "--model.patch-sizes", "4")
    assert "--model.patch-size" in refused(capsys, *train, "--patch-size", "x")
    assert "max_length=1024: must be a multiple of patch_size=3" in refused(
        capsys, *train, "--patch-size", "3"
    )
    assert "steps=0: must be at least 1" in refused(capsys, *train, "--steps", "0")
    assert "variant" in refused(capsys, *train, "--variant", "paperback")
    assert "batch_size=9" in refused(capsys, *train, "--batch-size", "9", "--run-dir", run / "x")
    assert "devices=99" in refused(capsys, *train, "--devices", "99", "--run-dir", run / "x")
    assert "--run-dir: needs a value" in refused(capsys, *train, "--run-dir")
    assert "top_p" in refused(capsys, "generate", run, "--top-p", "0")
    assert "checkpoint=7: choose latest, best or one of" in refused(
        capsys, "eval", run, "--data", __file__, "--checkpoint", "7"
    )
    assert "no config.json" in refused(capsys, "eval", run / "nowhere", "--data", __file__)
    assert "max_length=64" in refused(capsys, "generate", run, "--max-new-bytes", "100")


def test_a_file_where_a_folder_should_be(run, export, text, tmp_path, capsys):
    before = text.read_bytes()
    assert "is a file" in refused(
        capsys, "train", "megabyte_tiny", *TINY, "--data", text, "--run-dir", text
    )
    assert str(text) in refused(capsys, "export", run, "--out", text)
    assert str(text) in refused(capsys, "import", export, "--out", text)
    assert str(text) in refused(capsys, "eval", text, "--data", text)
    assert text.read_bytes() == before
    hint = f"belongs to an export, not to a run; `bytelm import {export} --out RUN` makes a run"
    for argv in (["generate", export], ["plot", export], ["eval", export, "--data", text]):
        assert hint in refused(capsys, *argv)


def test_damaged_checkpoints(run, text, tmp_path, capsys):
    """Commands that only read refuse; `train` continues from the one before, if undamaged."""
    capsys.readouterr()

    def copy_with(name, *damages):
        copy = tmp_path / name
        shutil.copytree(run, copy)
        for step, damage in damages:
            whole = contents(copy / "checkpoints" / step / "params")
            victim = max(whole, key=lambda p: len(whole[p]))
            middle = len(whole[victim]) // 2
            victim.write_bytes(damage(whole[victim], middle))
        return copy, contents(copy)

    def truncate(data, middle):
        return data[:middle]

    def flip(data, middle):
        return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]

    train = ["train", "megabyte_tiny", *TINY, "--steps", "40", "--data", text, "--run-dir"]
    for name, damage in (("truncated", truncate), ("flipped", flip)):
        copy, before = copy_with(name, ("30", damage))
        for argv in (["eval", copy, "--data", text], ["export", copy, "--out", tmp_path / "out"]):
            line = refused(capsys, *argv)
            assert "checkpoint 30" in line and "damaged" in line
        assert contents(copy) == before
        assert not (tmp_path / "out").exists()
    copy, before = copy_with("both", ("20", truncate), ("30", flip))
    line = refused(capsys, *train, copy)
    assert "checkpoint 30" in line and "no undamaged one" in line
    assert contents(copy) == before

    copy = tmp_path / "truncated"
    known = contents(copy / "checkpoints" / "30")
    assert cli.main([str(a) for a in (*train, copy, "--checkpoint-every", "20")]) == 0
    error = capsys.readouterr().err
    assert "checkpoint 30" in error and f"is now {copy / 'damaged' / '30'}" in error
    assert "resuming megabyte_tiny" in error and "step 20" in error
    moved = contents(copy / "damaged" / "30")
    assert [moved[p] for p in sorted(moved)] == [known[p] for p in sorted(known)]
    broken = tmp_path / "config"
    shutil.copytree(run, broken)
    (broken / "config.json").write_text('{"name": "x", "modle": 1}')
    assert "modle" in refused(capsys, "eval", broken, "--data", text)
    (broken / "config.json").write_text("{")
    assert "not JSON" in refused(capsys, "eval", broken, "--data", text)


def test_checkpoint_of_another_model(run, text, tmp_path, capsys):
    copy = tmp_path / "other"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["local_dim"] = 32
    (copy / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert "checkpoint 30" in refused(capsys, "eval", copy, "--data", text)


def test_read_only_and_full_places(run, text, tmp_path, capsys):
    # Root may write anywhere but to /proc, so /proc stands for a read-only place.
    train = ["train", "megabyte_tiny", *TINY, "--data", text]
    assert "/proc/bytelm" in refused(capsys, *train, "--run-dir", "/proc/bytelm")
    assert "/proc/bytelm" in refused(capsys, "export", run, "--out", "/proc/bytelm")

    # A full disk, as the limit on a file's size: nothing larger than 4 kB can be written.
    before = contents(run)
    command = [sys.executable, "-m", "bytelm_jax.cli", *train, "--run-dir", run, "--steps", "40"]
    command += ["--checkpoint-every", "20", "--eval-every", "10"]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 4; exec "$@"', "-", *map(str, command)],
        # Its compiled modules would be cut off as well, and stay.
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("bytelm train: ")
    after, changed = contents(run), {run / "metrics.jsonl", run / "config.json"}
    unchanged = {p for p in before if p.parent != run / "progress"} - changed
    assert all(after[p] == before[p] for p in unchanged)


def sounds_and_pictures(folder):
    """Two WAV and two PNG files of simple patterns; how many bytes they hold."""
    for i in (1, 2):
        with wave.open(str(folder / f"{i}.wav"), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(8000)
            tone = 3000 * np.sin(np.arange(3000) * i / 8)
            file.writeframes(tone.astype("<i2").tobytes())
        grey = np.add.outer(np.arange(64) * i, np.arange(64)).astype(np.uint8)
        rows = b"".join(b"\0" + row.tobytes() for row in grey)
        header = struct.pack(">IIBBBBB", 64, 64, 8, 0, 0, 0, 0)
        chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b"")]
        with open(folder / f"{i}.png", "wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n")
            for kind, body in chunks:
                check = zlib.crc32(kind + body)
                file.write(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check))
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.slow
def test_bytes_that_are_no_text_train_and_evaluate(tmp_path, capsys):
    files, run = tmp_path / "files", tmp_path / "run"
    files.mkdir()
    size = sounds_and_pictures(files)
    model = "--embed-dim 16 --num-layers 1 --adapt-dim 8 --rank 2 --kernel-length 8 --hidden-mult 1"
    rest = "--seq_len 64 --batch_size 8 --devices 1 --lr 1e-2 --warmup-steps 5 --epochs 3 "
    rest += "--validation-fraction 0"  # one function less to compile
    argv = ["train", "lfbyte_tiny", *model.split(), *rest.split(), "--data", str(files)]
    assert cli.main([*argv, "--save_path", str(run)]) == 0
    capsys.readouterr()
    result = evaluated(capsys, run, "--data", files)
    assert result["bytes"] == size
    assert result["bits_per_byte"] < 5  # of 8 for noise


def line_nats(run, lines):
    """Nats of each line alone, by the torch twin of the run."""
    recipe, params, _ = load_run(run)
    twin = make_twin(recipe.model, params)
    rows = [torch.tensor([list(line)]) for line in lines]
    return math.fsum(float(token_nats(twin(ids), ids).sum().detach()) for ids in rows)


def test_resets_are_chosen_at_evaluation_and_generation(run, tmp_path, capsys, monkeypatch):
    lines = [b"one\n", b"\n", b"two and\n", b"three"]
    path, other = tmp_path / "lines.txt", tmp_path / "next.txt"
    path.write_bytes(b"".join(lines))
    other.write_bytes(b"more")
    argv = ["eval", str(run), "--data", str(path), str(other), "--json", "--reset-on"]
    for mode, texts in (
        ("newline", [*lines[:3], b"threemore"]),
        ("document", [b"".join(lines), b"more"]),
    ):
        assert cli.main([*argv, mode]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["bytes"] == sum(map(len, texts))  # the ends of documents are not counted
        wanted = line_nats(run, texts)
        assert abs(result["nats"] - wanted) <= tolerances.OTHER_PLACE["float32"] * wanted
    models = []
    monkeypatch.setattr(generation, "stream", lambda model, *_, **__: models.append(model) or [])
    assert cli.main(["generate", str(run), "--reset-on", "newline"]) == 0
    assert cli.main(["generate", str(run)]) == 0
    assert [model.config.reset_on for model in models] == ["newline", "none"]
