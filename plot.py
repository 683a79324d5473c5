"""
Compare runs: plot validation loss over training FLOPs, and print a table of the last and best losses.

    python plot.py out-shakespeare-mod out-shakespeare-dense out-shakespeare-shallow
    python plot.py out-* --x step --out losses.png

Runs that differ only in the seed share a colour, and the table gives their mean and standard deviation.
"""

import argparse
import glob
import json
import os
import statistics
import sys
import warnings
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot, which would need a screen or change a notebook's settings

from support.files import write_whole
from support.options import UserError, errors_in_one_line, expanded, printable

AXES = {
    "flops": ("flops", "training FLOPs"),
    "step": ("step", "step"),
    "tokens": ("tokens", "training tokens"),
    "time": ("train_seconds", "seconds of training"),
}


def main(argv=None):
    parser = argparse.ArgumentParser(description="Validation losses of several runs, in one picture and one table.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="out_dir of a run of train.py")
    parser.add_argument("--x", choices=AXES, default="flops", help="the horizontal axis (default: %(default)s)")
    parser.add_argument("--out", type=expanded, default=Path("losses.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    with errors_in_one_line("plot.py", "compare fewer runs"):
        if args.out.suffix.lower() not in (".png", ".pdf", ".svg"):
            raise UserError(f"--out is a .png, .pdf or .svg file, got {args.out}")
        runs, left_out = [], []
        for path in [path for name in args.runs for path in matching(str(expanded(name)))]:
            try:
                runs.append(read_run(path))
            except UserError as error:
                left_out.append(error)
        if not runs:
            raise left_out[0]
        groups = group_by_setting(runs)
        print(table(groups))
        for error in left_out:
            print(printable(f"Left out: {error}"), file=sys.stderr)
        try:
            draw(groups, args.x, args.out)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot write the picture {args.out}: {error}") from None
        print(f"\nPicture: {args.out}")


def matching(name):
    """The paths that a pattern matches, because Windows's shells leave patterns to the command; or the path itself."""
    return [name] if os.path.lexists(name) else sorted(glob.glob(name)) or [name]


def read_run(name):
    path = Path(name)
    try:
        facts = json.loads((path / "config.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        if not rows:
            raise UserError(f"{path} has no evaluation yet")
        [facts["config"][name] for name in ("seed", "route_every", "n_layer", "n_embd")]  # raises if one is missing
        facts["parameters"] + 0, facts["data"]["text_sha256"]
        numbers = ("step", "tokens", "flops", "val_loss_causal", "val_loss_topk", "train_seconds")
        [row[name] + 0.0 for row in rows for name in numbers]  # raises if one is no number
    except (OSError, OverflowError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{path} is not the out_dir of a run: it needs config.json and metrics.jsonl") from None
    return {"name": printable(str(name)), "facts": facts, "config": facts["config"], "rows": rows}


def group_by_setting(runs):
    """Group the runs that differ only in seed and folders and are equally long; returns pairs (name, runs)."""
    by_setting = {}
    for run in runs:
        config = run["config"]
        ignored = {"seed", "out_dir", "dataset", "resume"}
        if not config["route_every"]:
            ignored |= {"aux_weight", "predictor_hidden"}  # without effect in a dense model
        setting = {name: value for name, value in config.items() if name not in ignored}
        # The last step belongs to the key: a run that was stopped early is not a second measurement of a finished one.
        key = json.dumps([setting, run["facts"]["data"]["text_sha256"], run["rows"][-1]["step"]], sort_keys=True)
        while any(config["seed"] == other["config"]["seed"] for other in by_setting.get(key, [])):
            key += " again"  # repeating a seed is not a second measurement
        by_setting.setdefault(key, []).append(run)
    return [(name_of(group), group) for group in by_setting.values()]


def name_of(group):
    if len(group) == 1:
        return group[0]["name"]
    config = group[0]["config"]
    kind = "MoD" if "taken" in group[0]["rows"][-1] else "dense"
    if config.get("n_expert") and kind == "MoD":
        kind = "MoDE" if config.get("staged") or config.get("n_noop") else "MoE"
    return f"{kind} {config['n_layer']}×{config['n_embd']}, {len(group)} seeds: {Path(group[0]['name']).name}, ..."


def table(groups):
    rows = []
    for name, group in groups:
        last = [run["rows"][-1] for run in group]
        cells = [
            name,
            f"{group[0]['facts']['parameters']:,}",
            f"{last[0]['step']:,}",
            f"{last[0]['flops']:.4g}",
            spread([row["val_loss_causal"] for row in last]),
            spread([row["val_loss_topk"] for row in last]) if "taken" in last[0] else "same",
            spread([min(row["val_loss_causal"] for row in run["rows"]) for run in group]),
            f"{statistics.median(row['train_seconds'] for row in last) / 60:.1f}",
        ]
        rows.append(cells)
    columns = ":run | parameters | steps | training FLOPs | causal loss | top-k loss | best causal | minutes"
    return markdown(columns, rows)


def markdown(columns, rows):
    """A table. columns: "FLOPs | :model | ...", where a colon aligns left; rows: lists of cells, or {column: cell}."""
    names = [name.removeprefix(":") for name in columns.split(" | ")]
    rule = "|".join("---" if name.startswith(":") else "--:" for name in columns.split(" | "))
    lines = [[row.get(name, "") for name in names] if isinstance(row, dict) else row for row in rows]
    lines = [f"| {' | '.join(map(str, line))} |" for line in lines]
    return "\n".join([f"| {' | '.join(names)} |", f"|{rule}|", *lines]) if rows else ""


def spread(values, form="{:.3f}"):
    """Mean ± standard deviation."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def draw(groups, x, path):
    key, x_label = AXES[x]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    curves = []
    for i, (_, group) in enumerate(groups):
        look = {"color": f"C{i}", "linestyle": ("-", "--", "-.", ":")[i % 4]}  # greyscale can tell them apart too
        for run in group:
            curves.append([row["val_loss_causal"] for row in run["rows"]])
            label = f"group {i}" if run is group[0] else None  # the name follows below
            axes.plot([row[key] for row in run["rows"]], curves[-1], **look, label=label)
    # From the second evaluation on, because the loss before the first step would flatten the rest.
    axes.set_ylim(min(map(min, curves)) - 0.05, max(curve[:2][-1] for curve in curves) + 0.05)
    axes.set(xlabel=x_label, ylabel="validation loss, causal (nats per token)")
    axes.grid(alpha=0.3)
    for text, (name, _) in zip(axes.legend().get_texts(), groups):
        text.set(text=name, parse_math=False)  # a folder's name is not a formula, even with dollar signs
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower(), dpi=150))


if __name__ == "__main__":
    main()
