"""
Draws the pictures of results/ and writes the tables of README.md, docs/speed.md and results/README.md, between the
lines `<!-- results: NAME -->` and `<!-- end -->`:

    python -m experiments.readme
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("readme.py runs from the top of the repository: python -m experiments.readme")

import json
import re
from pathlib import Path

import plot
from experiments import isoflop, known_depth, recall, report, routing, runner

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
FILES = (ROOT / "README.md", ROOT / "docs" / "speed.md", RESULTS / "README.md")


def measured():
    """What results/ holds: of isoflop.py, routing.py, known_depth.py, recall.py, bench.py, the presets."""
    timed = [json.loads(path.read_text(encoding="utf-8")) for path in (RESULTS / "bench").glob("*.json")]
    return (
        report.models_of(runner.read(RESULTS / "isoflop", isoflop.Run)),
        routing.ordered(runner.read(RESULTS / "routing", isoflop.Run)),
        known_depth.ordered(runner.read(RESULTS / "known_depth", known_depth.Run)),
        runner.read(RESULTS / "recall", recall.Run),
        sorted(timed, key=lambda f: (f["n_layer"], f.get("n_expert", 0), f.get("train_flop_ratio", 0))),
        plot.group_by_setting([plot.read_run(path) for path in sorted((RESULTS / "shakespeare_cpu").glob("*-*"))]),
    )


def blocks(models, learned, known, recalled, timed, presets):
    """The generated parts, {NAME: text}."""
    claims, verdicts = report.claims(models, learned, timed)
    return {
        **report.tables(models),
        **routing.tables(learned),
        "known depth": known_depth.table(known),
        "recall": recall.table(64, recalled),
        "claims": claims,
        "verdicts": verdicts,
        "training speed": training_speed(timed),
        "sampling speed": sampling_speed(timed),
        "presets": plot.table(presets),
    }


def training_speed(timed):
    """Step times of bench.py, against a dense GPT."""
    rows = []
    for figures in (figures for figures in timed if figures["part"] != "sampling"):
        kind = "MoD"
        if figures.get("n_expert"):
            kind = "staged MoDE" if figures["staged"] else "integrated MoDE" if figures["n_noop"] else "MoE"
        against = f", against dense {figures['against'].replace('x', '×')}" if figures.get("against") else ""
        ratios = figures["train_flop_ratio"], figures["train_time_ratio"]
        ratios = [f"{ratio:.2f}" for ratio in (*ratios, ratios[1] / ratios[0])]
        rows.append([f"{kind} {shape(figures)}{against}", figures["batch_size"], *ratios])
    return report.markdown(":model | batch | FLOPs / dense | time / dense | time / FLOPs", rows)


def sampling_speed(timed):
    """Sampling speeds of bench.py, MoD against the dense GPT of the same shape."""
    rows = []
    for figures in (figures for figures in timed if figures["part"] != "training"):
        for texts, part in ((1, figures), (16, figures["batch_16"])):
            speeds = [part[name]["tokens_per_second"] for name in ("mod", "dense")]
            cells = [shape(figures), texts, *(f"{speed:,.0f}" for speed in speeds)]
            cells += [f"**{part['decode_speedup']:.2f}**", f"{part['taken']:.1%}"]
            rows.append([*cells, f"{part['cache_bytes_ratio']:.2f}", f"{part['cache_speedup']:.0f}"])
    columns = ":model | texts at once | tokens/s, MoD | tokens/s, dense | speedup"
    columns += " | taken | cache / dense | slowdown without cache"
    return report.markdown(columns, rows)


def shape(figures):
    return f"{figures['n_layer']}×{figures['n_embd']}, context {figures['block_size']}"


def filled(text, parts):
    """`text` with the parts in their places."""
    return re.sub(
        r"(<!-- results: ([a-z ]+) -->\n)(.*?)(<!-- end -->)",
        lambda found: f"{found[1]}{parts[found[2]]}\n{found[4]}",
        text,
        flags=re.DOTALL,
    )


def main():
    measurements = models, learned, known, recalled, _, presets = measured()
    report.draw(models, RESULTS / "isoflop")
    routing.draw(learned, RESULTS / "routing" / "routing.png")
    known_depth.draw(known, RESULTS / "known_depth" / "known_depth.png")
    recall.draw(recalled, RESULTS / "recall" / "recall.png")
    plot.draw(presets, "flops", RESULTS / "shakespeare_cpu" / "losses.png")
    parts = blocks(*measurements)
    for path in FILES:
        path.write_text(filled(path.read_text(encoding="utf-8"), parts), encoding="utf-8", newline="\n")
        print(path)


if __name__ == "__main__":
    main()
