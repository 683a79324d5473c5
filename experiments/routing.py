"""
What does the router learn, and what does giving up look-ahead cost?

    python -m experiments.routing all

Trains one Mixture-of-Depths model with three seeds by the recipe of isoflop.py. Then it measures, on the half of the
validation split that is for reporting: the top-k and the causal loss at several context lengths, how well the predictor
matches top-k during training, and which tokens the routed blocks take.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("routing.py runs from the top of the repository: python -m experiments.routing")

import functools
import statistics

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats

from experiments import isoflop, report, runner
from plot import spread
from support.data import windows
from support.options import errors_in_one_line

MODEL = isoflop.Run(1e13, 6, 96, route_every=2)
LENGTHS = (16, 32, 64, 128)
CLASSES = {
    "start of a word": lambda c, before: c.isalpha() and not before.isalpha(),
    "within a word": lambda c, before: c.isalpha() and before.isalpha(),
    "space": lambda c, before: c == " ",
    "end of line": lambda c, before: c == "\n",
    "other": lambda c, before: not c.isalpha() and c not in " \n",
}


def measure(model, tokens, vocab, rows):
    names = ("step", "predictor_accuracy", "predictor_base_rate", "predictor_recall", "taken")
    return {
        "training": [{name: row[name] for name in names} for row in rows],
        "lengths": {str(T): losses(model, tokens, T) for T in LENGTHS},
        "learned": look(model, tokens, vocab),
    }


@torch.no_grad()
def losses(model, tokens, T):
    """The mean loss over windows of T tokens, top-k and causal."""
    result = {"topk": 0.0, "causal": 0.0}
    starts = np.arange(0, len(tokens) - T, T)
    for part in np.array_split(starts, len(starts) // (8192 // T)):
        x, y = windows(tokens, part, T, "cpu")
        for routing in result:
            result[routing] += model(x, y, routing=routing)[1].item() * len(part) / len(starts)
    return result


@torch.no_grad()
def look(model, tokens, vocab):
    """Statistics of the tokens that each routed block takes under causal routing."""
    T = model.config.block_size
    starts = np.arange(0, len(tokens) - T, T)
    batches = []
    for part in np.array_split(starts, len(starts) // 64):
        x, y = windows(tokens, part, T, "cpu")
        log_p = model(x, y, routing="causal")[0].double().log_softmax(-1)
        entropy, loss = -(log_p.exp() * log_p).sum(-1), -log_p.gather(-1, y[..., None]).squeeze(-1)
        batches.append((x, entropy, loss, torch.stack([block.taken for block in model.routed_blocks], dim=-1)))
    # (N, T) each; taken (N, T, routed blocks), and `blocks` the same as a list
    token, entropy, loss, taken = (torch.cat(parts).cpu().numpy() for parts in zip(*batches))
    blocks = list(np.moveaxis(taken, -1, 0))
    before = np.roll(token, 1, axis=1)  # wrong for the first token of a window, which is left out below
    by_class = {}
    for name, is_one in CLASSES.items():
        table = np.array([[is_one(c, other) for c in vocab] for other in vocab])  # (vocabulary before, vocabulary)
        by_class[name] = taken[:, 1:][table[before, token][:, 1:]].mean(axis=0).tolist()
    depth, independent = taken.sum(-1), np.ones(1)
    for p in taken.mean(axis=(0, 1)):
        independent = np.convolve(independent, [1 - p, p])
    position, pair = np.broadcast_to(np.arange(T), token.shape), token * len(vocab) + before
    return {
        "by_class": by_class,
        "by_entropy": by_tenth(entropy, taken),
        "by_position": taken.mean(axis=(0, 2)).round(4).tolist(),
        # Of the whole model's prediction: the block has already worked on the tokens that it took.
        "entropy_ranks_higher": [ranks_higher(entropy, block) for block in blocks],
        "loss_ranks_higher": [ranks_higher(loss, block) for block in blocks],
        "known_by": {
            "position": [known_by(position, block) for block in blocks],
            "character": [known_by(token, block) for block in blocks],
            "character and the one before": [known_by(pair[:, 1:], block[:, 1:]) for block in blocks],
        },
        "gap_variation": [gap_variation(block) for block in blocks],
        # The share of the tokens that 0, 1, 2, ... routed blocks take; and if the blocks were independent.
        "depth": [(depth == n).mean() for n in range(len(blocks) + 1)],
        "depth_if_independent": independent.tolist(),
        "most_taken": most_taken(np.array(vocab)[token], taken),
    }


def by_tenth(value, taken):
    """The share that each routed block takes among the lowest tenth of the values, the next one, ...: (10, L)."""
    order = value.ravel().argsort(kind="stable")
    flat = taken.reshape(-1, taken.shape[-1])
    return [flat[part].mean(axis=0).tolist() for part in np.array_split(order, 10)]


def ranks_higher(value, taken):
    """The chance that a taken token has a higher value than one that is not; 0.5: no preference. None if undefined."""
    inside, outside = value[taken], value[~taken]
    pairs = len(inside) * len(outside)
    return float(stats.mannwhitneyu(inside, outside, method="asymptotic").statistic / pairs) if pairs else None


def known_by(key, taken):
    """The share of the decision's entropy that the key explains (mutual information): 0 none, 1 all."""
    counts = stats.contingency.crosstab(key.ravel(), taken.ravel()).count  # (keys, 2)
    whole = stats.entropy(counts.sum(axis=0))
    rest = np.average(stats.entropy(counts, axis=1), weights=counts.sum(axis=1))  # when the key is known
    return float(1 - rest / whole) if whole else 0.0


def gap_variation(taken):
    """Standard deviation over mean of the gaps between taken tokens: 0 if evenly spaced, 0.94 for 1/8 at random."""
    gaps = np.concatenate([np.diff(np.flatnonzero(row)) for row in taken])
    return float(gaps.std() / gaps.mean()) if len(gaps) else None


def most_taken(letters, taken, n=6):
    """The characters that each routed block takes most often: [character, share of the picks, share taken of it]."""
    result = []
    names, index, count = np.unique(letters, return_inverse=True, return_counts=True)
    for i in range(taken.shape[-1]):
        hits = np.bincount(index.ravel(), weights=taken[..., i].ravel())
        most = hits.argsort()[::-1][:n]
        result.append([[str(names[j]), hits[j] / max(1, hits.sum()), hits[j] / count[j]] for j in most])
    return result


def ordered(done):
    """The lines with measurements, by seed."""
    return sorted((row for row in done.values() if "learned" in row), key=lambda row: row["run"]["seed"])


def tables(rows):
    """{name: table}"""
    return {"lengths": lengths(rows), "preferences": preferences(rows), "depths": depths(rows)} if rows else {}


def lengths(rows):
    """Top-k and causal loss at several context lengths, and the interval of their difference."""
    cells = []
    for T in LENGTHS:
        topk, causal = ([row["lengths"][str(T)][routing] for row in rows] for routing in ("topk", "causal"))
        costs = [100 * (c / t - 1) for c, t in zip(causal, topk)]
        half = report.t_95(len(costs)) * stats.sem(costs) if len(costs) > 2 else np.inf
        cost = report.signed((statistics.mean(costs), half))
        cells.append([T, spread(topk, "{:.4f}"), spread(causal, "{:.4f}"), cost])
    return report.markdown("tokens of context | top-k | causal | causal against top-k", cells)


def preferences(rows):
    """What each routed block takes."""
    figures = (("entropy_ranks_higher", ".0%"), ("loss_ranks_higher", ".0%"), ("gap_variation", ".2f"))
    cells = []
    for row in rows:
        for i, most in enumerate(row["learned"]["most_taken"]):
            names = [f"`{c}`".replace("\n", "\\n").replace("` `", "space") for c, _, _ in most]
            shown = ", ".join(f"{name} {part:.0%} ({share:.0%})" for name, (_, part, share) in zip(names, most))
            values = [(row["learned"][key][i], form) for key, form in figures]
            values = ["-" if value is None else format(value, form) for value, form in values]
            cells.append([row["run"]["seed"], i + 1, shown, *values])
    characters = ":most frequent characters: share of the block's picks (share of the character's places that it takes)"
    return report.markdown(f"seed | routed block | {characters} | more uncertain | larger loss | spacing", cells)


def depths(rows):
    """How many routed blocks take a token, and in brackets what independent blocks with the same shares would give."""
    cells = []
    for row in rows:
        pairs = zip(row["learned"]["depth"], row["learned"]["depth_if_independent"])
        cells.append([row["run"]["seed"], *(f"{found:.1%} ({independent:.1%})" for found, independent in pairs)])
    return report.markdown(" | ".join(["seed", *(f"taken by {n}" for n in range(len(cells[0]) - 1))]), cells)


@report.style
def draw(rows, path):
    """What the routed blocks take, by kind of character, entropy and position; and the predictor's accuracy."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (classes, entropy), (position, training) = figure.subplots(2, 2)
    learned = [row["learned"] for row in rows]
    places = np.arange(len(CLASSES))
    for i in range(len(learned[0]["most_taken"])):
        color, style, hatch = f"C{i}", ("-", "--", ":")[i % 3], ("", "//", "..")[i % 3]
        shares = np.array([[one["by_class"][name][i] for name in CLASSES] for one in learned])
        x, label = places + 0.25 * (i - 1), f"routed block {i + 1}"
        classes.bar(x, shares.mean(axis=0), 0.25, color=color, alpha=0.6, hatch=hatch, label=label)
        classes.plot(x, shares.T, "k.", markersize=3)
        tenths = np.array([one["by_entropy"] for one in learned])[:, :, i]  # (seeds, 10)
        lines = entropy.plot(np.arange(5, 100, 10), tenths.T, style, color=color)
        lines[0].set_label(label)
    for row in rows:
        position.plot(row["learned"]["by_position"], linewidth=0.8)
        training.plot(*zip(*((line["step"], line["predictor_accuracy"]) for line in row["training"])))
    for axes in (classes, entropy):
        axes.axhline(0.125, color="black", linewidth=0.8)
        axes.set_ylabel("share of the tokens taken, causal")
        axes.legend(fontsize=8)
    classes.set_xticks(places, list(CLASSES), fontsize=8)
    entropy.set_xlabel("entropy of the prediction there, percentile")
    position.set(ylim=(0, 0.3), xlabel="position in the window", ylabel="share taken, all routed blocks")
    training.axhline(0.875, color="black", linewidth=0.8)
    training.text(0, 0.878, "base rate: never take", fontsize=8)
    training.set(ylim=(0.8, 1), xlabel="training step", ylabel="decisions predicted correctly")
    by_character = [x for one in learned for x in one["known_by"]["character"]]
    by_position = [x for one in learned for x in one["known_by"]["position"]]
    ranks = [0.5 if rank is None else rank for one in learned for rank in one["entropy_ranks_higher"]]
    uncertain, certain = sum(rank > 0.6 for rank in ranks), sum(rank < 0.4 for rank in ranks)  # as in claim 7
    last = [row["training"][-1]["predictor_accuracy"] for row in rows]
    classes.set_title(f"The character alone explains {min(by_character):.0%} to {max(by_character):.0%} of a decision")
    entropy.set_title(f"{uncertain} of {len(ranks)} blocks clearly prefer uncertain tokens, {certain} certain ones")
    position.set_title(f"The position explains at most {max(by_position):.1%} (a line for each seed)")
    training.set_title(f"The predictor ends at {min(last):.1%} to {max(last):.1%}")
    report.save(figure, path)


def main(argv=None):
    args = runner.arguments(__doc__, ["all"], "out-routing").parse_args(argv)
    with errors_in_one_line("routing.py", "try fewer --jobs"):
        if args.set != "draw":
            execute = functools.partial(isoflop.execute, measure=measure, eval_interval=250, eval_iters=32)
            run_one = isoflop.prepared(execute, args.results, "shakespeare_works", "cpu")
            wanted = functools.partial(runner.seeds, MODEL)
            runner.run_all(wanted, isoflop.Run, run_one, args.results, args.jobs)
        rows = ordered(runner.read(args.results, isoflop.Run))
        if rows:
            draw(rows, args.results / "routing.png")
        print("\n\n".join(tables(rows).values()) or f"No runs in {args.results} yet")


if __name__ == "__main__":
    main()
