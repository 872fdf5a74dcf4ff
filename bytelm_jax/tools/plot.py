"""`bytelm plot`: the story of a run in one picture, as PNG and as one self-contained HTML file.

What to draw (`panels`) is separate from the drawing (`draw`), so that the values can be tested.
matplotlib, from the extra `plot`, is imported by `draw` alone.
"""

import base64
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Float32

from bytelm import runs
from bytelm.config import PatchingContract, Recipe, to_dict
from bytelm.extras import import_extra
from bytelm.files import replace_file
from bytelm.metrics import METRIC, read_metrics
from bytelm.q_table import MOMENTUM_ACTIONS, moves
from bytelm.remote.copies import local_copy
from bytelm.storage.stores import require_local
from bytelm.trainable import trainable
from bytelm_jax.models import abstract_params, adapters_of
from bytelm_jax.optimizers.build import build_optimizer
from bytelm_jax.optimizers.q_agent import QLearningState
from bytelm_jax.training import checkpoint

_LABELS = {
    "validation_loss": "validation",
    "validation_bits_per_byte": "validation",
    "validation_alignment_loss": "validation",
    "validation_alignment_cosine": "validation",
    "learning_rate_action": "of the learning rate",
    "momentum_action": "of 1 / (1 − momentum)",
}
_MOST_EXPERTS = 12  # lines that a reader can still tell apart
_FAR = 1.5  # times the span of the other values: where a spike begins to hide them
_MOST_ROWS = 20  # names that fit beside a heat map

Points = tuple[list[float], list[float]]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One plot: lines over steps, bars, or a heat map with one row per state."""

    title: str
    y: str
    x: str = "step"
    lines: dict[str, Points] = field(default_factory=dict)
    dotted: tuple[str, ...] = ()
    """Lines of individual decisions, drawn as points."""
    logarithmic: bool = False
    bars: Points | None = None
    heat: Float32[np.ndarray, "states actions"] | None = None
    rows: tuple[int, ...] = ()
    columns: tuple[str, ...] = ()


def panels(run_dir: Path) -> tuple[Recipe, list[Panel]]:
    """The run's recipe, and a panel for everything that the run recorded.

    Raises `ValueError` for a folder that is not a run or has not logged a step yet.
    """
    recipe = runs.load_recipe(run_dir)
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.is_file() else []
    trained = any("loss" in record for record in records)
    if not trained and not any("alignment_loss" in record for record in records):
        raise ValueError(f"{path}: no metrics there yet; train first")
    aligned = {"alignment_loss": "relative to the square of the embeddings", "alignment_cosine": ""}
    candidates = [
        *(
            _over_steps(records, name.replace("_", " ").capitalize(), y, name, f"validation_{name}")
            for name, y in aligned.items()
        ),
        _over_steps(records, "Loss", "nats per byte", "loss", "validation_loss"),
        _over_steps(
            records,
            "Bits per byte",
            "bits per byte",
            "bits_per_byte",
            "validation_bits_per_byte",
        ),
        _by_name(records),
        _over_steps(records, "Learning rate", "", "learning_rate"),
        _over_steps(records, "Momentum", "", "momentum"),
        _over_steps(
            records,
            "Actions of the agent",
            "factor",
            "learning_rate_action",
            "momentum_action",
            dotted=True,
        ),
        _over_steps(records, "Gradient norm", "", "grad_norm", logarithmic=True),
        _expert_load(records),
        _histogram(recipe.patching) if recipe.patching else None,
        *(_tables(run_dir, recipe) if trained else ()),  # `align` has another optimizer state
    ]
    return recipe, [panel for panel in candidates if panel]


def _over_steps(
    records: Sequence[dict[str, Any]],
    title: str,
    y: str,
    *names: str,
    logarithmic: bool = False,
    dotted: bool = False,
) -> Panel | None:
    lines = {}
    for name in names:
        points = _points(records, name)
        if points[0]:
            lines[_LABELS.get(name, "training" if len(names) > 1 else name)] = points
    if not lines:
        return None
    logarithmic = logarithmic and all(min(values) > 0 for _, values in lines.values())
    dots = tuple(lines) if dotted else ()
    return Panel(title=title, y=y, lines=lines, logarithmic=logarithmic, dotted=dots)


def _by_name(records: Sequence[dict[str, Any]]) -> Panel | None:
    """Bits per byte of each source of a mixture and of each validation set that has a name."""
    lines = {}
    for kind, called in (("bits_per_byte/", ""), (f"{METRIC}/", ", validation")):
        found = dict.fromkeys(key for record in records for key in record if key.startswith(kind))
        lines |= {key.removeprefix(kind) + called: _points(records, key) for key in found}
    if not lines:
        return None
    return Panel(title="Bits per byte by source", y="bits per byte", lines=lines)


def _points(records: Sequence[dict[str, Any]], name: str) -> Points:
    holders = [record for record in records if record.get(name) is not None]
    return [float(r["step"]) for r in holders], [float(r[name]) for r in holders]


def _expert_load(records: Sequence[dict[str, Any]]) -> Panel | None:
    """The share of each expert over the steps; if there are many, the last values as bars."""
    columns = {
        int(name.removeprefix("expert_load_")): name
        for record in records
        for name in record
        if name.removeprefix("expert_load_").isdigit()
    }
    experts = sorted(columns)
    if not experts:
        return None
    if len(experts) <= _MOST_EXPERTS:
        lines = {f"expert {expert}": _points(records, columns[expert]) for expert in experts}
        return Panel(title="Expert load", y="share of the bytes", lines=lines)
    last = [record for record in records if columns[experts[0]] in record][-1]
    return Panel(
        title=f"Expert load at step {last['step']}",
        x="expert",
        y="share of the bytes",
        bars=([float(e) for e in experts], [last[columns[e]] or 0.0 for e in experts]),
    )


def _histogram(contract: PatchingContract) -> Panel:
    used = max(i for i, count in enumerate(contract.histogram, 1) if count)
    cut = ", the last bar: and longer" if used == len(contract.histogram) else ""
    return Panel(
        title=f"Patch lengths, mean {contract.mean_length:.2f} ({contract.patcher})",
        x="bytes" + cut,
        y=f"patches of {contract.sampled_bytes:,} bytes",
        bars=(
            [float(i) for i in range(1, used + 1)],
            [float(c) for c in contract.histogram[:used]],
        ),
    )


def _tables(run_dir: Path, recipe: Recipe) -> list[Panel]:
    """The agent's tables in the latest checkpoint, for the states that it has learned about."""
    agent = read_agent(run_dir, recipe)
    if agent is None:
        return []
    optimizer: Any = recipe.optimizer  # one with an agent has the agent's settings
    tables, controller = [], optimizer.controller
    for name, table, actions in (
        ("learning rate", agent.q_learning_rate, moves(controller)[0]),
        ("momentum", agent.q_momentum, MOMENTUM_ACTIONS),
    ):
        values = np.asarray(table, np.float32)
        known, order = np.flatnonzero((values != 0).any(axis=1)), np.argsort(actions)
        tables.append(
            Panel(
                title=f"Q-table of the {name}: {len(known)} of {len(values)} states",
                x="factor",
                y="state",
                heat=values[np.ix_(known, order)],
                rows=tuple(known.tolist()),
                columns=tuple(f"{np.exp(actions[i]):.3f}" for i in order),
            )
        )
    return tables


def read_agent(run_dir: Path, recipe: Recipe) -> QLearningState | None:
    """The Q-learning agent of the latest checkpoint; None if none has been saved."""
    if not recipe.optimizer.has_agent:
        return None
    if not (run_dir / "checkpoints").is_dir():
        return None
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = abstract_params(recipe.model, adapters_of(recipe))
    parts = trainable(recipe, params)
    optimizer = build_optimizer(recipe.optimizer, recipe.train.steps, recipe.train.seed, parts)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree
        )

    state = jax.eval_shape(optimizer.init, params)
    with checkpoint.open_checkpoints(run_dir) as manager:
        if manager.latest_step() is None:
            return None
        step = checkpoint.choose_step(manager, "latest")
        opt_state = checkpoint.restore(manager, step, placed(params), placed(state)).opt_state
    return _agent_in(opt_state)


def _agent_in(state: optax.OptState) -> QLearningState:
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, QLearningState))
    return next(leaf for leaf in leaves if isinstance(leaf, QLearningState))


# ---- drawing ------------------------------------------------------------------------------------


def draw(panels: Sequence[Panel], title: str) -> Any:
    """A matplotlib `Figure` with three panels per row."""
    make_figure = import_extra("matplotlib.figure", "plot").Figure
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = make_figure(figsize=(5.2 * columns, 3.6 * rows + 0.5), layout="constrained", dpi=110)
    figure.suptitle(title)
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        axes.set_title(panel.title, fontsize="medium")
        axes.set_xlabel(panel.x)
        axes.set_ylabel(panel.y)
        _choose(panel)(figure, axes, panel)
    return figure


def _choose(panel: Panel) -> Callable[[Any, Any, Panel], None]:
    if panel.heat is not None:
        return _draw_heat
    return _draw_lines if panel.bars is None else _draw_bars


def _draw_lines(figure: Any, axes: Any, panel: Panel) -> None:
    for name, (steps, values) in panel.lines.items():
        style = {"marker": "o", "markersize": 3} if len(steps) < 30 else {}
        style = {"linestyle": "", "marker": ".", "alpha": 0.6} if name in panel.dotted else style
        axes.plot(steps, values, label=name, **style)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.logarithmic:
        axes.set_yscale("log")
    elif (span := span_without_spikes(panel)) is not None:
        low, high, most = span
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.text(
            0.5, 0.97, f"spikes up to {most:.4g}", transform=axes.transAxes, ha="center", va="top"
        )
    if len(panel.lines) > 1:
        axes.legend(fontsize="small")
    axes.grid(alpha=0.3)


def span_without_spikes(panel: Panel) -> tuple[float, float, float] | None:
    """(lowest, highest without rare spikes, highest) value; None if the spikes are not far off.

    The first values, from which a run falls, and 98 of 100 others are never cut off.
    """
    values = np.array([value for _, line in panel.lines.values() for value in line])
    first = max(line[0] for _, line in panel.lines.values())
    low, most = float(values.min()), float(values.max())
    high = max(first, float(np.quantile(values, 0.98)))
    return (low, high, most) if most - low > _FAR * (high - low) > 0 else None


def _draw_bars(figure: Any, axes: Any, panel: Panel) -> None:
    assert panel.bars is not None
    axes.bar(*panel.bars, width=0.9)
    axes.grid(alpha=0.3, axis="y")


def _draw_heat(figure: Any, axes: Any, panel: Panel) -> None:
    heat = panel.heat
    assert heat is not None
    axes.set_xticks(range(len(panel.columns)), panel.columns, rotation=60, fontsize="small")
    every = -(-len(panel.rows) // _MOST_ROWS) or 1
    named = range(0, len(panel.rows), every)
    axes.set_yticks(named, [panel.rows[i] for i in named], fontsize="small")
    if not heat.size:
        axes.text(0.5, 0.5, "nothing learned yet", transform=axes.transAxes, ha="center")
        return
    most = float(np.abs(heat).max())
    image = axes.imshow(
        heat, aspect="auto", cmap="RdBu", vmin=-most, vmax=most, interpolation="nearest"
    )
    figure.colorbar(image, ax=axes, label="value")


def write_plots(run_dir: Path, out: Path) -> tuple[Path, Path]:
    """Writes OUT/plot.png and OUT/plot.html, each as a whole; returns the two paths.

    The run may be at an address.
    """
    require_local(out, "out")
    with local_copy(run_dir, everything=True) as copy:
        recipe, plots = panels(copy)
    figure = draw(plots, f"{recipe.name}: {recipe.model.architecture}, {recipe.optimizer.name}")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    out.mkdir(parents=True, exist_ok=True)
    png, page = out / "plot.png", out / "plot.html"
    replace_file(png, buffer.getvalue())
    replace_file(page, _page(recipe, plots, buffer.getvalue()).encode())
    return png, page


def _page(recipe: Recipe, panels: Sequence[Panel], png: bytes) -> str:
    name = html.escape(recipe.name)
    picture = base64.b64encode(png).decode("ascii")
    rows = "".join(
        f"<tr><td>{html.escape(panel.title)}</td><td>{html.escape(line)}</td>"
        f"<td>{steps[-1]:,.0f}</td><td>{values[-1]:.6g}</td><td>{min(values):.6g}</td>"
        f"<td>{max(values):.6g}</td></tr>"
        for panel in panels
        for line, (steps, values) in panel.lines.items()
    )
    config = html.escape(json.dumps(to_dict(recipe), indent=2))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>
body {{ font-family: sans-serif; margin: 2em auto; max-width: 1700px; padding: 0 1em }}
img {{ max-width: 100% }} td, th {{ padding: .2em .8em; text-align: right }}
td:nth-child(-n+2), th:nth-child(-n+2) {{ text-align: left }}
</style></head><body>
<h1>{name}</h1>
<p>{html.escape(recipe.model.architecture)}, {recipe.model.parameter_count():,} parameters,
{html.escape(recipe.optimizer.name)}</p>
<img alt="The plots of this run" src="data:image/png;base64,{picture}">
<h2>Numbers</h2>
<table><tr><th>panel</th><th>line</th><th>last step</th>
<th>last</th><th>least</th><th>most</th></tr>
{rows}</table>
<details><summary>Configuration</summary><pre>{config}</pre></details>
</body></html>
"""
