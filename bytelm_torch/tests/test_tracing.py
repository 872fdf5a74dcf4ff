"""A traced run, and its count of time, in PyTorch alone."""

import json

from bytelm.config import DataConfig, MegabyteConfig, Recipe, TrainConfig
from bytelm.metrics import read_metrics
from bytelm_torch.training import loop

MODEL = MegabyteConfig(
    patch_size=4,
    global_dim=4,
    local_dim=8,
    max_length=16,
    global_layers=1,
    global_heads=1,
    local_layers=1,
    local_heads=1,
)


def test_some_steps_are_traced_and_all_time_is_counted(tmp_path, capsys):
    text, run_dir = tmp_path / "text", tmp_path / "run"
    text.write_bytes(b"a few bytes to learn from; " * 40)
    recipe = Recipe(
        name="traced",
        model=MODEL,
        data=DataConfig(paths=(str(text),), sequence_length=16, validation_fraction=0.0),
        train=TrainConfig(steps=5, batch_size=4, log_every=1, profile_steps="2:3"),
    )
    loop.train(recipe, run_dir)
    said = capsys.readouterr().err
    assert f"the trace of steps 2 to 3 is in {run_dir / 'profile'}" in said
    assert "goodput " in said and "; the rest: " in said
    (trace,) = (run_dir / "profile").glob("*.pt.trace.json")
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert names >= {"train step 2", "train step 3"} and "train step 4" not in names
    records = read_metrics(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 5]
    end = records[-1]
    parts = [value for name, value in end.items() if name.startswith("wall_seconds/")]
    assert abs(sum(parts) - end["wall_seconds"]) < 0.01 and 0 < end["goodput"] < 1
