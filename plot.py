"""
Compare runs: validation loss over training FLOPs in one picture, and a table of the last and best losses.

    python plot.py out-shakespeare-mod out-shakespeare-dense out-shakespeare-shallow
    python plot.py out-* --x step --out losses.png

Runs that differ in nothing but the seed share a colour, and the table gives their mean and standard deviation.
"""

import argparse
import glob
import json
import statistics
import sys
from pathlib import Path

from matplotlib.figure import Figure  # not pyplot, which would need a screen or change a notebook's settings

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
    parser.add_argument("--out", type=Path, default=Path("losses.png"), help="the picture (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".png", ".pdf", ".svg"):
        sys.exit(f"plot.py: --out is a .png, .pdf or .svg file, got {args.out}")
    # Patterns are expanded here too: the shells of Windows leave that to the command.
    paths = [path for pattern in args.runs for path in (sorted(glob.glob(pattern)) or [pattern])]
    groups = group_by_setting([read_run(path) for path in paths])
    print(table(groups))
    try:
        draw(groups, args.x, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f"plot.py: cannot write the picture {args.out}: {error}")
    print(f"\nPicture: {args.out}")


def read_run(name):
    path = Path(name)
    try:
        facts = json.loads((path / "config.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        facts["config"]["seed"], facts["parameters"], facts["data"]["text_sha256"]
        [(row["val_loss_causal"], row["val_loss_topk"], row["flops"]) for row in (rows[0], rows[-1])]
    except (OSError, ValueError, LookupError, TypeError):
        sys.exit(f"plot.py: {path} is not the out_dir of a run: no config.json and metrics.jsonl of train.py there")
    return {"name": str(name), "facts": facts, "config": facts["config"], "rows": rows}


def group_by_setting(runs):
    """Lists of runs that differ in nothing but seed and folders, each with a name: pairs (name, runs)."""
    by_setting = {}
    for run in runs:
        not_in_key = {"seed", "out_dir", "dataset"}
        if not run["config"]["route_every"]:  # these do nothing in a dense model
            not_in_key |= {"capacity", "variant", "causal_method", "predictor_hidden", "aux_weight"}
            not_in_key |= {"n_expert", "n_noop", "staged"}
        experts = run["config"]["route_every"] and run["config"].get("n_expert")
        not_in_key |= {"expert_capacity"} if not experts else set() if run["config"]["staged"] else {"capacity"}
        setting = {name: value for name, value in run["config"].items() if name not in not_in_key}
        key = json.dumps([setting, run["facts"]["data"]["text_sha256"]], sort_keys=True)
        while any(run["config"]["seed"] == other["config"]["seed"] for other in by_setting.get(key, [])):
            key += " again"  # the same seed twice is no second measurement
        by_setting.setdefault(key, []).append(run)
    return [(name_of(group), group) for group in by_setting.values()]


def name_of(group):
    if len(group) == 1:
        return group[0]["name"]
    config = group[0]["config"]
    kind = "MoD" if "taken" in group[0]["rows"][-1] else "dense"
    if config.get("n_expert") and kind == "MoD":
        kind = "MoDE" if config["staged"] or config["n_noop"] else "MoE"
    return f"{kind} {config['n_layer']} x {config['n_embd']}, {len(group)} seeds: {Path(group[0]['name']).name}, ..."


def table(groups):
    lines = ["| run | parameters | steps | training FLOPs | causal loss | top-k loss | best causal | minutes |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for name, group in groups:
        last = [run["rows"][-1] for run in group]
        best = [min(row["val_loss_causal"] for row in run["rows"]) for run in group]
        cells = [
            name,
            f"{group[0]['facts']['parameters']:,}",
            f"{last[0]['step']:,}",
            f"{last[0]['flops']:.4g}",
            spread([row["val_loss_causal"] for row in last]),
            spread([row["val_loss_topk"] for row in last]) if "taken" in last[0] else "same",
            spread(best),
            f"{statistics.median(row['train_seconds'] for row in last) / 60:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values, form="{:.3f}"):
    """Mean ± standard deviation."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def draw(groups, x, path):
    key, label = AXES[x]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (name, group) in enumerate(groups):
        for run in group:
            axes.plot(
                [row[key] for row in run["rows"]],
                [row["val_loss_causal"] for row in run["rows"]],
                color=f"C{i}",
                linestyle=("-", "--", "-.", ":")[i % 4],  # so that the curves stay apart in greyscale too
                label=name if run is group[0] else None,
            )
    curves = [[row["val_loss_causal"] for row in run["rows"]] for _, group in groups for run in group]
    # From the second evaluation on: the loss before the first step would flatten all the rest.
    axes.set_ylim(min(map(min, curves)) - 0.05, max(curve[:2][-1] for curve in curves) + 0.05)
    axes.set_xlabel(label)
    axes.set_ylabel("validation loss, causal (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
