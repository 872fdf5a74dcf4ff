"""Damaged and hostile files end in one clear error, or change nothing; pickles are never run."""

import contextlib
import importlib.util
import io
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import bytelm_torch
from bytelm.export import INDEX_FILE
from bytelm.files import one_line
from bytelm_jax.cli import main as cli
from bytelm_jax.interop import convert, formats
from bytelm_jax.interop import hf_blt as convert_blt
from bytelm_jax.models import abstract_params
from bytelm_torch.training import checkpoint as run_checkpoint
from parity_tests.damage import MODELS, make_folders

SCRIPT = Path(__file__).parent.parent / "scripts" / "check" / "fuzz_files.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("whole"))


def test_many_trials(folders, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("fuzz_files", SCRIPT)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for module in (convert, convert_blt):  # the script replaces them by a cached one
        monkeypatch.setattr(module, "abstract_params", abstract_params)
    counts, failures = script.fuzz(150, 7, tmp_path, folders)
    assert not failures
    outcomes = Counter()
    for (_, outcome), count in counts.items():
        outcomes[outcome] += count
    assert outcomes["error"] > 200 and outcomes["equal"] > 0
    # The judge can tell: a model of other weights is neither an error nor equal.
    other, original = script.load_torch(folders["lfbyte"]), {}
    assert script.outcome(lambda _: other, tmp_path, original) == "DIFFERENT"
    assert script.outcome(lambda _: 1 // 0, tmp_path, original).startswith("ZeroDivisionError")


def loaders(name):
    return [formats.import_any] + [bytelm_torch.from_pretrained] * (
        name not in ("hf-blt", "shards")
    )


@pytest.mark.parametrize("name", ["megabyte", "hf-blt", "torch"])
def test_other_weights_and_other_configurations_are_noticed(name, folders, tmp_path):
    source = folders[name]
    for file, old, new in (
        ("model.safetensors", None, None),
        ("config.json", b'"threshold": 9.0', b'"threshold": 9.5'),
        ("config.json", b"500000.0", b"500001.0"),
        ("config.json", b'"dropout": 0.1', b'"dropout": 0.2'),
        ("config.json", b'"init_std": 0.02', b'"init_std": 0.03'),
    ):
        data = (source / file).read_bytes()
        if old is None:
            changed = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
        elif old in data:
            changed = data.replace(old, new)
        else:
            continue
        for intact in ("model.safetensors", "config.json"):
            (tmp_path / intact).write_bytes((source / intact).read_bytes())
        (tmp_path / file).write_bytes(changed)
        for load in loaders(name):
            with pytest.raises(ValueError, match=r"SHA-256\); give an undamaged copy"):
                load(tmp_path)


def test_what_another_program_wrote_has_no_sums_and_loads(folders, tmp_path):
    (tmp_path / "config.json").write_bytes((folders["lfbyte"] / "config.json").read_bytes())
    save_file(load_file(folders["lfbyte"] / "model.safetensors"), tmp_path / "model.safetensors")
    config, params = convert.load_export(tmp_path)
    assert config == MODELS["lfbyte"]
    assert len(bytelm_torch.from_pretrained(tmp_path).state_dict()) == len(params)


@pytest.mark.parametrize("name", ["hf-blt", "shards", "export-shards"])
def test_weights_that_are_not_finite_are_not_imported(name, folders, tmp_path):
    folder = tmp_path / name
    shutil.copytree(folders[name], folder)
    file = max(folder.glob("*.safetensors"))
    tensors = load_file(file)
    bad = min(tensors)
    tensors[bad].reshape(-1)[-1] = -np.inf
    save_file(tensors, file)
    error = f"{bad}: holds NaN or infinity; take the weights of an earlier checkpoint"
    for load in loaders(name):
        with pytest.raises(ValueError) as caught:
            load(folder)
        assert str(caught.value) == f"{file}: {error}"


@pytest.mark.parametrize("name", ["shards", "export-shards"])
@pytest.mark.parametrize("target", ["link", "../megabyte/model.safetensors", "/etc/hostname", ".."])
def test_an_index_leads_nowhere_else(name, target, folders, tmp_path):
    index = folders[name] / INDEX_FILE
    (tmp_path / "config.json").write_bytes((folders[name] / "config.json").read_bytes())
    (tmp_path / "link").symlink_to(folders["hf-blt"] / "model.safetensors")
    text = index.read_text().replace("model-1-of-2.safetensors", target)
    (tmp_path / INDEX_FILE).write_text(text)
    for load in loaders(name):
        with pytest.raises(ValueError) as caught:
            load(tmp_path)
        why = "must name files of this folder, not links out of it"
        assert str(caught.value) == f"{tmp_path / INDEX_FILE}: weight_map: {target!r}: {why}"


@pytest.mark.parametrize("name", ["shards", "export-shards"])
def test_a_damaged_shard_is_named(name, folders, tmp_path):
    folder = tmp_path / name
    shutil.copytree(folders[name], folder)
    file = folder / "model-2-of-2.safetensors"
    whole = file.read_bytes()

    def problem(load):
        with pytest.raises(ValueError) as caught:
            load(folder)
        return str(caught.value)

    for load in loaders(name):
        file.write_bytes(whole[:-4])
        assert problem(load).startswith(f"{file}: cannot be read (")
        file.write_bytes(whole[:-4] + bytes(4))
        assert problem(load).startswith(f"{file}: the tensors differ from those that were written")
        file.write_bytes((folder / "model-1-of-2.safetensors").read_bytes())
        assert problem(load).startswith(f"{file}: ")
        assert problem(load).endswith(": stands in another shard, too")
        file.unlink()
        assert problem(load).startswith(f"{file}: cannot be read (No such file or directory)")
        file.write_bytes(whole)
    (folder / INDEX_FILE).write_text('{"weight_map": {"x": "model-2-of-2.safetensors"}}')
    missing = problem(bytelm_torch.from_pretrained) if name == "export-shards" else ""
    assert name == "shards" or missing.startswith(f"{folder / INDEX_FILE}: ")


def test_one_whole_file_counts_before_an_index(folders, tmp_path):
    for source in ("entropy", "export-shards"):
        shutil.copytree(folders[source], tmp_path, dirs_exist_ok=True)
    for load in loaders("export-shards"):
        load(tmp_path)
        (tmp_path / INDEX_FILE).write_text("no JSON")
        load(tmp_path)
        (tmp_path / "model.safetensors").rename(tmp_path / "aside")
        with pytest.raises(ValueError, match=f"{INDEX_FILE}: "):
            load(tmp_path)
        (tmp_path / "aside").rename(tmp_path / "model.safetensors")


def test_a_giant_in_the_configuration_is_refused_before_it_is_built(folders, tmp_path):
    for name, field, loads in (
        ("hf-blt", b'"num_hidden_layers": 1', [formats.import_any]),
        ("blt", b'"decoder_layers": 1', [formats.import_any, bytelm_torch.from_pretrained]),
    ):
        for file in ("config.json", "model.safetensors"):
            (tmp_path / file).write_bytes((folders[name] / file).read_bytes())
        data = (tmp_path / "config.json").read_bytes()
        assert field in data
        (tmp_path / "config.json").write_bytes(data.replace(field, field + b"000000"))
        for load in loads:
            with pytest.raises(ValueError, match=r"parameters, config\.json describes "):
                load(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * (2**24 + 1))
    for load in (convert.load_export, bytelm_torch.from_pretrained):
        with pytest.raises(ValueError, match="a JSON file of at most 16777216 was expected"):
            load(tmp_path)


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "old", "zip"])
def test_no_loader_runs_a_pickle(kind, folders, tmp_path):
    fired, file = tmp_path / "fired", tmp_path / "weights.pt"
    bomb = {"model_state_dict": {"to_logits.weight": torch.zeros(2)}, "x": Bomb(fired)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(bomb, protocol=2))
    else:
        torch.save(bomb, file, _use_new_zipfile_serialization=kind == "zip")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("model.safetensors", "pytorch_model.bin"):
        (folder / name).write_bytes(file.read_bytes())
    (folder / "config.json").write_bytes((folders["megabyte"] / "config.json").read_bytes())
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "3" / "training.pt").write_bytes(file.read_bytes())
    for load in (
        lambda: formats.import_any(file, "megabyte"),
        lambda: formats.import_any(folder),
        lambda: formats.import_any(folder, "megabyte"),
        lambda: bytelm_torch.from_pretrained(folder),
        lambda: run_checkpoint.read_training(tmp_path / "run", 3),
    ):
        with pytest.raises(ValueError) as caught:
            load()
        assert "\n" not in str(caught.value)
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert cli.main(["import", str(file), "--out", str(tmp_path / "out")]) == 2
    assert stderr.getvalue().count("\n") == 1 and not (tmp_path / "out").exists()
    with pytest.raises(pickle.UnpicklingError):  # as the examples of earlier projects load theirs
        torch.load(file)
    assert not fired.exists()


def test_a_small_torch_file_cannot_ask_for_much_memory(tmp_path):
    file = tmp_path / "weights.pt"
    count = (6 * 10**9).to_bytes(5, "little")
    array = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + count + b"\x85R."
    torch.save({"x": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    storage = file.read_bytes().replace(b"K\x02N", b"J\xff\xff\xff\x7fN", 1)
    view = file.read_bytes().replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85", 1)
    run = tmp_path / "run" / "checkpoints" / "3" / "training.pt"
    run.parent.mkdir(parents=True)
    for data, why in (
        (array, r"builtins\.bytearray: not in a file of plain tensors"),
        (storage, r"claims 8589934588 bytes of tensors, the file has \d+"),
        (view, "a tensor that is larger than what is stored of it"),
    ):
        file.write_bytes(data)
        run.write_bytes(data)
        for load in (formats.import_any, lambda _: run_checkpoint.read_training(run.parents[2], 3)):
            with pytest.raises(ValueError, match=why):
                load(file)


def test_no_loader_waits_for_a_pipe_and_names_are_printed_escaped(tmp_path, capsys):
    pipe, file = tmp_path / "pipe.pt", tmp_path / "x.safetensors"
    os.mkfifo(pipe)
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "pytorch_model.bin")
    save_file({"to_embed.weight": np.zeros(2, "f"), "\x1b[2Jevil\u202e": np.zeros(2, "f")}, file)
    for source in (pipe, Path("/dev/zero"), folder, file):
        command = ["import", str(source), "--out", str(tmp_path / "out"), "--format", "megabyte"]
        assert cli.main(command) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all("not a plain file" in line for line in lines[:2])
    assert one_line("a\x1b[2J\nb\u202e") == r"a\x1b[2J b\u202e"
    assert all(line.isprintable() for line in lines)
