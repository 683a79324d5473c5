"""
Draws the pictures of results/ and puts its figures into README.md, docs/speed.md and results/README.md, between the
lines `<!-- results: NAME -->` and `<!-- end -->`:

    python -m experiments.readme
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("readme.py runs as a module, from the top of the repository: python -m experiments.readme")

import json
import re
from pathlib import Path

import plot
from experiments import isoflop, known_depth, report, routing, runner

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results"
FILES = (ROOT / "README.md", ROOT / "docs" / "speed.md", RESULTS / "README.md")


def measured():
    """Models of isoflop.py, lines of routing.py, models of known_depth.py, figures of bench.py, runs of the presets."""
    timed = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((RESULTS / "bench").glob("*.json"))]
    timed.sort(key=lambda figures: (figures["n_layer"], figures.get("n_expert", 0), figures.get("train_flop_ratio", 0)))
    return (
        report.models_of(runner.read(RESULTS / "isoflop", isoflop.Run)),
        routing.ordered(runner.read(RESULTS / "routing", isoflop.Run)),
        known_depth.ordered(runner.read(RESULTS / "known_depth", known_depth.Run)),
        timed,
        [plot.read_run(path) for path in sorted((RESULTS / "shakespeare_cpu").glob("*-*"))],
    )


def blocks(models, learned, known, timed, presets):
    """The generated parts, {NAME: text}."""
    return {
        "presets": plot.table(plot.group_by_setting(presets)),
        "training speed": training_speed(timed),
        "sampling speed": sampling_speed(timed),
        "claims": report.claims(models, learned, timed),
        "isoflop": report.table(models),
        "crossover": report.crossover(models),
        "changes": report.ablation_table(models),
        "experts": report.expert_table(models),
        "lengths": routing.table(learned),
        "preferences": routing.preferences(learned),
        "depths": routing.depths(learned),
        "known depth": known_depth.table(known),
    }


def training_speed(timed):
    """Step times of bench.py, against a dense GPT."""
    lines = ["| model | batch | FLOPs / dense | time / dense | time / FLOPs |", "|---|--:|--:|--:|--:|"]
    for figures in timed:
        if figures["part"] != "sampling":
            flops, seconds = figures["train_flop_ratio"], figures["train_time_ratio"]
            cells = [f"{flops:.2f}", f"{seconds:.2f}", f"{seconds / flops:.2f}"]
            name = f"{kind(figures)} {shape(figures)}"
            if figures.get("against"):
                name += f", against dense {figures['against'].replace('x', ' x ')}"
            lines.append(f"| {name} | {figures['batch_size']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sampling_speed(timed):
    """Sampling of bench.py, MoD against the dense GPT of the same shape."""
    lines = [
        "| model | texts at once | tokens/s, MoD | tokens/s, dense | times as fast | at best "
        "| MoD, dense, of their best | entered | cache / dense | no cache, times as long |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for figures in timed:
        if figures["part"] != "training":
            for texts, part in ((1, figures), (16, figures["batch_16"])):
                both = part["mod"], part["dense"]
                cells = [
                    *(f"{model['tokens_per_second']:,.0f}" for model in both),
                    f"**{part['decode_speedup']:.2f}**",
                    f"{part['decode_ideal_speedup']:.2f}",
                    ", ".join(f"{model['tokens_per_second'] / model['ideal_tokens_per_second']:.0%}" for model in both),
                    f"{part['taken']:.1%}",
                    f"{part['cache_bytes_ratio']:.2f}",
                    f"{part['cache_speedup']:.0f}",
                ]
                lines.append(f"| {shape(figures)} | {texts} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kind(figures):
    if not figures.get("n_expert"):
        return "MoD"
    return "staged MoDE" if figures["staged"] else "integrated MoDE" if figures["n_noop"] else "MoE"


def shape(figures):
    return f"{figures['n_layer']} x {figures['n_embd']}, context {figures['block_size']}"


def filled(text, parts):
    """`text` with the parts in their places."""
    return re.sub(
        r"(<!-- results: ([a-z ]+) -->\n)(.*?)(<!-- end -->)",
        lambda found: f"{found[1]}{parts[found[2]]}\n{found[4]}",
        text,
        flags=re.DOTALL,
    )


def main():
    models, learned, known, timed, presets = measured()
    report.write(models, RESULTS / "isoflop")
    routing.draw(learned, RESULTS / "routing" / "routing.png")
    known_depth.draw(known, RESULTS / "known_depth" / "known_depth.png")
    plot.draw(plot.group_by_setting(presets), "flops", RESULTS / "shakespeare_cpu" / "losses.png")
    parts = blocks(models, learned, known, timed, presets)
    for path in FILES:
        path.write_text(filled(path.read_text(encoding="utf-8"), parts), encoding="utf-8", newline="\n")
        print(path)


if __name__ == "__main__":
    main()
