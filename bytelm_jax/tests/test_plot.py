"""`bytelm plot`: the figure's numbers against metrics file, contract and checkpoint."""

import base64
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bytelm import runs
from bytelm.config import (
    MegabyteConfig,
    PatchingContract,
    QLearningConfig,
    QLearningSGDConfig,
    Recipe,
    TrainConfig,
)
from bytelm.q_table import cells
from bytelm_jax.cli import main as cli
from bytelm_jax.models import abstract_params
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.tools import plot
from bytelm_jax.training import checkpoint

MODEL = MegabyteConfig(
    patch_size=4,
    global_dim=8,
    local_dim=16,
    global_heads=2,
    local_heads=2,
    global_layers=1,
    local_layers=1,
    max_length=64,
)
RECORDS = [
    {
        "step": step,
        "loss": 6 - step / 20,
        "bits_per_byte": (6 - step / 20) / np.log(2),
        "learning_rate": 0.1 + step / 1000,
        "grad_norm": 0.3 + (step % 3),
        "momentum": 0.9 - step / 1000,
        "learning_rate_action": [1.0, 1.15, 0.87][step % 3],
        "momentum_action": [1.0, 1.1][step % 2],
        "bytes_per_second": 1e4,
    }
    for step in range(1, 41)
]
VALIDATION = [
    {"step": step, "validation_loss": 5 - step / 20, "validation_bits_per_byte": 7 - step / 20}
    for step in (20, 40)
]
VALIDATION += [{"step": 30, "validation_loss": None, "validation_bits_per_byte": None}]


def make_run(folder, records, **fields):
    folder.mkdir()
    runs.save_recipe(folder, Recipe(name="tiny <1>", model=MODEL, **fields))
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines) + '{"step": 41, "lo')  # a killed write
    return folder


def lines_of(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def logged(folder, name):
    text = (folder / "metrics.jsonl").read_text().splitlines()[:-1]
    return [[r["step"], r[name]] for r in map(json.loads, text) if r.get(name) is not None]


@pytest.fixture(scope="module")
def tables():
    source = np.random.default_rng(3)
    rows = cells(QLearningConfig())
    arrays = np.zeros((rows, 9), np.float32), np.zeros((rows, 7), np.float32)
    arrays[0][[5, 77, 2000]] = source.normal(size=(3, 9))
    arrays[1][[5, 300]] = source.normal(size=(2, 7))
    return arrays


@pytest.fixture(scope="module")
def figure_of_agent(tmp_path_factory, tables):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    optimizer = QLearningSGDConfig()
    folder = make_run(
        tmp_path_factory.mktemp("plot") / "run", [*RECORDS, *VALIDATION], optimizer=optimizer
    )
    recipe = runs.load_recipe(folder)
    shapes = abstract_params(MODEL)
    built = build_optimizer(optimizer, recipe.train.steps, 0)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes, jax.eval_shape(built.init, shapes))
    )
    agent = plot._agent_in(zeros[1])
    wanted = agent._replace(q_learning_rate=jnp.array(tables[0]), q_momentum=jnp.array(tables[1]))
    state = jax.tree.map(
        lambda node: wanted if node is agent else node, zeros[1], is_leaf=lambda node: node is agent
    )
    with checkpoint.open_checkpoints(folder, TrainConfig()) as manager:
        checkpoint.save(manager, 40, zeros[0], state, recipe, "data", None)
        checkpoint.finish(manager)
    _, panels = plot.panels(folder)
    return folder, plot.draw(panels, "title")


def test_the_lines_are_those_of_the_metrics_file(figure_of_agent):
    folder, figure = figure_of_agent
    axes = {a.get_title(): a for a in figure.axes}
    for title, names in {
        "Loss": {"training": "loss", "validation": "validation_loss"},
        "Bits per byte": {"training": "bits_per_byte", "validation": "validation_bits_per_byte"},
        "Learning rate": {"learning_rate": "learning_rate"},
        "Momentum": {"momentum": "momentum"},
        "Gradient norm": {"grad_norm": "grad_norm"},
        "Actions of the agent": {
            "of the learning rate": "learning_rate_action",
            "of 1 / (1 − momentum)": "momentum_action",
        },
    }.items():
        plotted = lines_of(axes[title])
        assert plotted == {label: logged(folder, name) for label, name in names.items()}, title
        assert all(plotted.values())
    assert axes["Gradient norm"].get_yscale() == "log"
    assert not any(word in title for title in axes for word in ("Expert", "Patch", "source"))


def test_the_heat_maps_are_the_tables_of_the_checkpoint(figure_of_agent, tables):
    _, figure = figure_of_agent
    axes = [a for a in figure.axes if a.get_title().startswith("Q-table")]
    for a, table, states in zip(axes, tables, ([5, 77, 2000], [5, 300]), strict=True):
        plotted = np.asarray(a.images[0].get_array())
        factors = [float(label.get_text()) for label in a.get_xticklabels()]
        assert factors == sorted(factors) and 1.0 in factors
        assert [int(label.get_text()) for label in a.get_yticklabels()] == states
        columns = [0, *range(1, len(factors))]
        # The table's order: no change, then factors, each before its inverse.
        order = sorted(columns, key=lambda i: [1.0, *_pairs(len(factors))][i])
        np.testing.assert_array_equal(plotted, table[states][:, order])


def _pairs(count):
    factors = (1.025, 1.05, 1.1, 1.15)[: (count - 1) // 2]
    return [value for f in factors for value in (f, 1 / f)]


def test_a_spike_does_not_hide_the_other_steps(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    spiked = [
        r | ({"loss": 80.0, "bits_per_byte": 115.0} if r["step"] == 30 else {}) for r in RECORDS
    ]
    spiked += [r | {"step": r["step"] + 40} for r in spiked[30:]] * 3
    figure = plot.draw(plot.panels(make_run(tmp_path / "run", spiked))[1], "t")
    axes = {a.get_title(): a for a in figure.axes}
    for title, least, first in (("Loss", 4.0, 5.95), ("Bits per byte", 5.77, 8.584)):
        low, high = axes[title].get_ylim()
        assert low < least and first < high < 1.2 * first, title
        assert "spikes up to" in axes[title].texts[0].get_text()
    plain = plot.draw(plot.panels(make_run(tmp_path / "plain", RECORDS))[1], "t").axes
    assert not any(a.texts for a in plain)


def test_patches_experts_and_sources(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    contract = PatchingContract(
        patcher="space",
        threshold=0.0,
        entropy_model="",
        sampled_bytes=16,
        histogram=(1, 3, 0, 2, 0),
    )
    loads = [{f"expert_load_{e}": (e + r["step"]) / 99 for e in range(3)} for r in RECORDS]
    records = [r | load | {"expert_load_max": 0.9} for r, load in zip(RECORDS, loads, strict=True)]
    records = [r | {"bits_per_byte/web": r["loss"]} if r["step"] % 3 else r for r in records]
    records += [{"step": 40, "validation_bits_per_byte/web": 5.0}]
    folder = make_run(tmp_path / "run", records, patching=contract)
    axes = {a.get_title(): a for a in plot.draw(plot.panels(folder)[1], "t").axes}
    bars = axes["Patch lengths, mean 2.67 (space)"].patches
    assert [(b.get_x() + b.get_width() / 2, b.get_height()) for b in bars] == [
        (pytest.approx(i), count) for i, count in ((1, 1), (2, 3), (3, 0), (4, 2))
    ]
    plotted = lines_of(axes["Expert load"])
    assert plotted == {f"expert {e}": logged(folder, f"expert_load_{e}") for e in range(3)}
    names = {"web": "bits_per_byte/web", "web, validation": "validation_bits_per_byte/web"}
    plotted = lines_of(axes["Bits per byte by source"])
    assert plotted == {label: logged(folder, name) for label, name in names.items()}
    many = [r | {f"expert_load_{e}": e / 78 for e in range(13)} for r in RECORDS]
    axes = plot.draw(plot.panels(make_run(tmp_path / "many", many))[1], "t").axes
    (bars,) = [a.patches for a in axes if a.get_title() == "Expert load at step 40"]
    assert [b.get_height() for b in bars] == [e / 78 for e in range(13)]


def test_files_are_whole_and_the_page_needs_no_other(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    folder = make_run(tmp_path / "run", RECORDS[:3])
    assert cli.main(["plot", str(folder), "--out", str(tmp_path / "out")]) == 0
    png, page = (tmp_path / "out" / name for name in ("plot.png", "plot.html"))
    assert str(png) in capsys.readouterr().out
    text = page.read_text("utf-8")
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(picture) == png.read_bytes()
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert "tiny &lt;1&gt;" in text and "<1>" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "http" not in text
    assert f"{RECORDS[2]['loss']:.6g}" in text


def test_a_run_of_align_has_its_own_lines(tmp_path):
    held_out = {"validation_alignment_loss": 0.75, "validation_alignment_cosine": 0.25}
    records = [
        {"step": 1, "alignment_loss": 1.0, "alignment_cosine": 0.0, "grad_norm": 2.0},
        {"step": 2, "alignment_loss": 0.5, "alignment_cosine": 0.5, "grad_norm": 1.0},
        {"step": 2, **held_out},
    ]
    _, found = plot.panels(make_run(tmp_path / "run", records, optimizer=QLearningSGDConfig()))
    assert [panel.title for panel in found] == [
        "Alignment loss", "Alignment cosine", "Gradient norm"
    ]  # fmt: skip
    assert found[0].lines == {"training": ([1, 2], [1, 0.5]), "validation": ([2], [0.75])}
    assert found[1].lines == {"training": ([1, 2], [0, 0.5]), "validation": ([2], [0.25])}


def test_refusals(tmp_path, capsys, monkeypatch):
    empty = make_run(tmp_path / "empty", VALIDATION)
    for path, says in ((tmp_path, "no config.json"), (empty, "no metrics there yet; train first")):
        assert cli.main(["plot", str(path)]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["plot", str(make_run(tmp_path / "run", RECORDS))]) == 2
    assert "pip install 'bytelm[plot]'" in capsys.readouterr().err
    assert not (tmp_path / "run" / "plot.png").exists()
