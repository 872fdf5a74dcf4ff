"""One to N devices of a host: weak and strong scaling, data parallel and fsdp, both forms of step.

    python scripts/bench/bench_scaling.py --pods --devices 1 2 --lines FILE    # 25 rows of two GPUs
    python scripts/bench/bench_scaling.py --devices 1 2 4 --rows megabyte_132m:32 > FILE
    python scripts/bench/bench_scaling.py --plot FILE OUT.png      # efficiencies, and a picture

A row names the recipe and the batch of one device, as in `bench_train.py`, which measures. Weak
scaling keeps the batch of each device, strong scaling that of the whole host (the row's times the
most devices). Lines come as they are measured; efficiency is against one device of the host in the
same run. With fsdp all devices hold one copy of the state together. "collectives" is
their share of the step, waiting for the slowest device included; "kernels_ms" the time of all
kernels of a step and device, more than "ms" where some run side by side; "step_gib" what the
compiled step needs of a device. `--only` takes rows of `bench_train.py` in place of the whole plan.
JSON lines. With `--lines` they are added to a file, and a second call continues with what it lacks;
compiled programs stay beside it. At the end the file is printed as a table.

`--pods` is weak scaling of five models, of which three rehearse large batches and two small ones,
in both forms, with and without fsdp, without profiles.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench_train import Plan, measure_all

PODS: tuple[str, ...] = (
    "megabyte_132m:32",
    "megabyte_132m:128",
    "blt_767m:8:2048:4",
    "blt_767m:32:2048:4",
    "lfbyte_130m:16",
)


def plan(
    rows: list[str],
    counts: list[int],
    forms: list[str],
    kinds: tuple[str, ...] = ("weak", "strong"),
) -> list[dict[str, Any]]:
    """What to measure, each row of `bench_train.py` once."""
    settings: dict[str, dict[str, Any]] = {}
    for row in rows:
        name, batch, *rest = row.split(":")
        for form in forms:
            for count in counts:
                for fsdp in sorted({1, count}):
                    for kind in kinds:
                        total = int(batch) * (count if kind == "weak" else max(counts))
                        full = ":".join([name, str(total), *rest]) + f"@{count}x{fsdp}x{form}"
                        known = {"kinds": [], "model": row, "devices": count, "fsdp": fsdp}
                        settings.setdefault(full, known | {"form": form})["kinds"].append(kind)
    return [{"row": full} | setting for full, setting in settings.items()]


def chosen(only: list[str], rows: list[str], counts: list[int]) -> list[dict[str, Any]]:
    """The settings of the plan for the rows in `only`."""
    whole = {setting["row"]: setting for setting in plan(rows, counts, ["jit", "shard_map"])}
    return [whole[row] for row in only]


def with_efficiency(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Measured records with their bytes per second per device, relative to one device's.

    One device is that of the same form where it was measured, else of `jit`.
    """
    measured = [r for r in records if "ms" in r]
    for record in measured:
        record["rate"] = record["megabytes_per_second"] / record["devices"]
    for record in measured:
        for kind in record["kinds"]:
            alone = {
                r["form"]: r["rate"]
                for r in measured
                if r["devices"] == 1 and r["model"] == record["model"] and kind in r["kinds"]
            }
            form = record["form"] if record["form"] in alone else "jit"
            if form in alone:
                record[f"{kind}_efficiency"] = round(record["rate"] / alone[form], 4)
                record["against"] = form
    return measured


HEAD = ("row of a device", "devices", "form", "fsdp", "ms", "spread", "weak scaling", "MFU", "GiB")


def table(path: Path) -> str:
    """The lines as a Markdown table, with the device, versions and date of the measurement."""
    records = with_efficiency(read_lines(path))
    order = {name: at for at, name in enumerate(dict.fromkeys(r["model"] for r in records))}
    records.sort(key=lambda r: (order[r["model"]], r["devices"], r["form"], r["fsdp"]))
    measured = {
        f"{r['device']}, {r['dtype']}, jax {r['jax']}, flax {r['flax']}, {r['date']}"
        for r in records
    }
    lines = [*sorted(measured), "", f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
    for r in records:
        share, mfu = r.get("weak_efficiency"), r["mfu"]
        values = [r["model"], r["devices"], r["form"], r["fsdp"], r["ms"], r["spread_ms"]]
        values.append("" if share is None or r["devices"] == 1 else f"{100 * share:.1f} %")
        values += [f"{100 * mfu:.1f} %" if mfu else "", r["step_gib"]]
        lines.append("| " + " | ".join(map(str, values)) + " |")
    return "\n".join(lines)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was measured before."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def plot(path: Path, out: Path) -> None:
    """Prints the lines with their efficiencies; draws those of weak scaling, and the state."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = with_efficiency(read_lines(path))
    for record in sorted(records, key=lambda r: (r["model"], r["form"], r["devices"], r["fsdp"])):
        print(json.dumps({k: v for k, v in record.items() if k not in ("kinds", "rate")}))
    records = [r for r in records if "weak_efficiency" in r]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 4), layout="constrained")
    for model in dict.fromkeys(r["model"] for r in records):
        for form in dict.fromkeys(r["form"] for r in records):
            for cut in (False, True):
                line = [
                    r for r in records if (r["model"], r["form"]) == (model, form)
                    and (r["devices"] == 1 or (r["fsdp"] > 1) == cut)
                ]  # fmt: skip
                if len(line) < 2:
                    continue
                line.sort(key=lambda r: r["devices"])
                style = "--" if cut else "-"
                label = f"{':'.join(model.split(':')[:2])} {form}{' fsdp' if cut else ''}"
                x = [r["devices"] for r in line]
                left.plot(x, [r["weak_efficiency"] for r in line], style, marker="o", label=label)
                right.plot(x, [r["state_gib"] for r in line], style, marker="o", label=label)
    left.set(ylabel="weak-scaling efficiency", ylim=(0.7, 1.02))
    right.set(ylabel="parameters and optimizer state, GiB per device", yscale="log")
    counts = sorted({r["devices"] for r in records})
    for axes in (left, right):
        axes.set(xlabel="devices", xticks=counts, xticklabels=counts)
        axes.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.savefig(out, dpi=130)


def measure(settings: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints a line for each row as it is measured, and adds it to `--lines`."""
    lines, rest = options.lines, ["--repeats", str(options.repeats)]
    known = {setting["row"]: setting for setting in settings}
    done = {record["row"] for record in read_lines(lines)} if lines else set()
    missing, kept = [row for row in known if row not in done], None
    if lines:
        kept = lines.with_suffix(".cache")
    for row in measure_all(missing, rest, options.workers, Plan(options.profile, kept=kept)):
        kernels = row.pop("kernels", None)
        if kernels:
            row["collectives"] = round(kernels["collectives"] / row["ms"], 4)
            row["kernels_ms"] = kernels["all kernels"]
        line = json.dumps(known[row["row"]] | row)
        print(line, flush=True)
        if lines and "failed" not in row:
            with lines.open("a") as file:
                file.write(line + "\n")
    if lines and lines.exists():
        print(table(lines))


def main() -> None:
    """Prints one line per row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=["megabyte_132m:32", "blt_767m:8:2048:4"])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--forms", nargs="+", default=["jit", "shard_map"])
    parser.add_argument("--pods", action="store_true", help="weak scaling of five models")
    parser.add_argument("--lines", type=Path, help="a file that lines are added to")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW")
    parser.add_argument("--repeats", type=int, default=5, help="of ten steps each")
    parser.add_argument("--workers", type=int, default=4, help="rows compiled side by side")
    parser.add_argument("--profile", type=int, default=3, help="kernels of each row; 0: none")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("FILE", "OUT"))
    options = parser.parse_args()
    if options.plot:
        plot(*options.plot)
        return
    kinds = ("weak", "strong")
    if options.pods:
        kinds, options.profile = ("weak",), 0
        if options.rows == parser.get_default("rows"):
            options.rows = list(PODS)
    settings = plan(options.rows, options.devices, options.forms, kinds)
    if options.pods:  # one device: in one form
        settings = [s for s in settings if s["devices"] > 1 or s["form"] == options.forms[0]]
    if options.only:
        settings = chosen(options.only, options.rows, options.devices)
    measure(settings, options)


if __name__ == "__main__":
    main()
