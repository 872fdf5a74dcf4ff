"""transformers' Trainer: what it saves is what it resumes from, whichever the architecture."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import bytelm_torch
from bytelm_torch.interop import transformers as hf
from parity_tests.cases import quick
from parity_tests.examples import run_example
from parity_tests.tiny_models import CONFIGS

STEPS = 3
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def wrapped(name: str, seed: int) -> hf.ByteLMForCausalLM:
    torch.manual_seed(seed)
    return hf.from_native(bytelm_torch.build_model(CONFIGS[name]))


def trainer(model: Any, folder: Path, best: bool = False) -> Trainer:
    """Saves every step; the best is that of the *highest* loss, which is not the last."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps" if best else "no",
        load_best_model_at_end=best,
        metric_for_best_model="loss",
        greater_is_better=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [torch.full((8,), 4 + i) for i in range(8)]
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    return Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data[:2])


def state(model: hf.ByteLMForCausalLM) -> dict[str, torch.Tensor]:
    """A copy of the weights, by their names in an export."""
    return {name: value.clone() for name, value in model.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("name", quick(CONFIGS, "megabyte"))
def test_a_run_is_resumed_and_its_best_model_loaded(name: str, tmp_path: Path) -> None:
    model = wrapped(name, seed=0)
    whole = trainer(model, tmp_path, best=True)
    whole.train()
    saved = [load_file(tmp_path / f"checkpoint-{step}" / WEIGHTS) for step in range(1, STEPS + 1)]
    assert whole.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert same(state(model), saved[0]) and not same(saved[0], saved[-1])

    other = wrapped(name, seed=1)
    resumed = trainer(other, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(state(other), saved[-1])
    assert same(bytelm_torch.from_pretrained(tmp_path / "checkpoint-2").state_dict(), saved[1])


def test_a_checkpoint_of_other_tensors_is_refused(tmp_path: Path) -> None:
    model = wrapped("entropy", seed=0)
    run = trainer(model, tmp_path)
    run.train()
    folder, before = tmp_path / "checkpoint-2", state(model)
    whole = load_file(folder / WEIGHTS)
    name, value = next(iter(whole.items()))
    for damaged, problem in (
        ({n: v for n, v in whole.items() if n != name}, "missing; "),
        (whole | {"more": value.clone()}, "unexpected; "),
        (whole | {name: value[:1].clone()}, "shape "),
    ):
        save_file(damaged, folder / WEIGHTS, {"format": "pt"})
        with pytest.raises(ValueError, match=f"^(more|{name}): {problem}"):
            run.train(resume_from_checkpoint=str(folder))
        assert same(state(model), before), "nothing is loaded before all is known to fit"


def test_tensors_by_either_name_and_behind_other_modules() -> None:
    source, target = wrapped("entropy", seed=0), wrapped("entropy", seed=1)
    bare, long = source.model.state_dict(), source.state_dict()
    for given in (bare, long):
        target.load_state_dict({n: torch.zeros_like(v) for n, v in long.items()})
        target.load_state_dict(given)
        assert same(state(target), state(source))
    around = torch.nn.ModuleDict({"module": wrapped("entropy", seed=2)})
    around.load_state_dict({f"module.{name}": value for name, value in bare.items()})
    assert same(around.state_dict(), {f"module.{name}": value for name, value in long.items()})


def test_the_example_of_fine_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    bytelm_torch.save_pretrained(bytelm_torch.build_model(CONFIGS["entropy"]), tmp_path / "export")
    (tmp_path / "text").write_bytes(b"def main(argument):\n    return argument\n" * 9)
    options = ("--data", tmp_path / "text", "--length", 32, "--steps", 3, "--out", tmp_path / "new")
    run_example(
        "finetune_with_transformers", tmp_path / "export", *options, monkeypatch=monkeypatch
    )
    line = capsys.readouterr().out.splitlines()[-1]
    before, after = map(float, re.findall(r"([\d.]+) bits per byte before, ([\d.]+)", line)[0])
    assert after < before
