"""
Puts the figures of results/ into README.md and results/README.md, between the lines `<!-- results: NAME -->` and
`<!-- end -->`:

    python experiments/readme.py
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, this file's own folder stands there alone
import isoflop  # noqa: E402
from experiments import known_depth, report, routing, runner  # noqa: E402

FILES = (ROOT / "README.md", ROOT / "results" / "README.md")


def blocks():
    """The generated parts, {NAME: text}."""
    results = ROOT / "results"
    models = report.models_of(runner.read(results / "isoflop", isoflop.Run))
    learned = sorted(runner.read(results / "routing", isoflop.Run).values(), key=lambda row: row["run"]["seed"])
    known = known_depth.ordered(runner.read(results / "known_depth", known_depth.Run))
    return {
        "claims": report.claims(models, learned),
        "isoflop": report.table(models),
        "crossover": report.crossover(models),
        "changes": report.ablation_table(models),
        "experts": report.expert_table(models),
        "lengths": routing.table(learned),
        "preferences": routing.preferences(learned),
        "known depth": known_depth.table(known),
    }


def filled(text, parts):
    """`text` with the parts in their places."""
    return re.sub(
        r"(<!-- results: ([a-z ]+) -->\n)(.*?)(<!-- end -->)",
        lambda found: f"{found[1]}{parts[found[2]]}\n{found[4]}",
        text,
        flags=re.DOTALL,
    )


def main():
    parts = blocks()
    for path in FILES:
        path.write_text(filled(path.read_text(encoding="utf-8"), parts), encoding="utf-8", newline="\n")
        print(path)


if __name__ == "__main__":
    main()
