"""
What did the router learn, and what does it cost to go without the future?

    python -m experiments.routing all

Trains one Mixture-of-Depths model with three seeds by isoflop.py's recipe, then looks at the half of the validation
split on which no choice is made: the loss under top-k and under causal routing, at the length of training and shorter;
how well top-k is foretold, over the training; which tokens the routed blocks take.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("routing.py runs as a module, from the top of the repository: python -m experiments.routing")

import math
import statistics
from dataclasses import replace

import numpy as np
import torch
from matplotlib.figure import Figure

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


def wanted(done):
    return [run for seed in runner.SEEDS[1:] if (run := replace(MODEL, seed=seed)) not in done]


def execute(run, folder, dataset, device):
    """Train, then look; returns the run's line of runs.jsonl."""
    one = isoflop.train_one(run, folder, dataset, device, eval_interval=250, eval_iters=32)
    if "model" not in one:  # it diverged
        return one["row"]
    model, row, tokens = one["model"], one["row"], one["data"]["val"]
    tokens = tokens[len(tokens) // 2 :]
    names = ("step", "predictor_accuracy", "predictor_base_rate", "predictor_recall", "taken")
    row["training"] = [{name: line[name] for name in names} for line in one["rows"]]
    row["lengths"] = {str(T): losses(model, tokens, T, device) for T in LENGTHS}
    return row | {"learned": look(model, tokens, one["meta"]["vocab"], device)}


@torch.no_grad()
def losses(model, tokens, T, device):
    """The mean loss over windows of T tokens, top-k and causal."""
    result = {"topk": 0.0, "causal": 0.0}
    starts = np.arange(0, len(tokens) - T, T)
    for part in np.array_split(starts, len(starts) // (8192 // T)):
        x, y = windows(tokens, part, T, device)
        for routing in result:
            result[routing] += model(x, y, routing=routing)[1].item() * len(part) / len(starts)
    return result


@torch.no_grad()
def look(model, tokens, vocab, device):
    """Figures about the tokens that each routed block takes in causal routing."""
    T = model.config.block_size
    starts = np.arange(0, len(tokens) - T, T)
    found = {"token": [], "entropy": [], "loss": [], "taken": []}
    for part in np.array_split(starts, len(starts) // 64):
        x, y = windows(tokens, part, T, device)
        log_p = model(x, y, routing="causal")[0].double().log_softmax(-1)
        found["token"].append(x)
        found["entropy"].append(-(log_p.exp() * log_p).sum(-1))
        found["loss"].append(-log_p.gather(-1, y[..., None]).squeeze(-1))
        found["taken"].append(torch.stack([block.taken for block in model.routed_blocks], dim=-1))
    token, entropy, loss, taken = (
        torch.cat(parts).cpu().numpy() for parts in found.values()
    )  # (N, T), taken (N, T, L)
    # Without the first token of each window, before which there is nothing.
    letters = np.array(vocab)[token]
    kinds = np.full(token.shape, "", dtype=object)
    for name, is_one in CLASSES.items():
        test = np.array([[is_one(c, before) for c in vocab] for before in vocab])
        kinds[:, 1:][test[token[:, :-1], token[:, 1:]]] = name
    depth = taken.sum(-1)
    share = taken.mean(axis=(0, 1))
    independent = [1.0]
    for p in share:
        independent = np.convolve(independent, [1 - p, p])
    position = np.broadcast_to(np.arange(T), token.shape)
    pair = token * len(vocab) + np.roll(token, 1, axis=1)
    return {
        "share": share.tolist(),
        "by_class": {name: taken[kinds == name].mean(axis=0).tolist() for name in CLASSES},
        "by_entropy": by_tenth(entropy, taken),
        "by_position": taken.mean(axis=(0, 2)).round(4).tolist(),
        # The chance that a token which is taken has the higher entropy of two, one taken and one not; 0.5: no relation.
        # Entropy and loss are the whole model's: the block has worked on the tokens that it took.
        "entropy_ranks_higher": [ranks_higher(entropy, taken[..., i]) for i in range(len(share))],
        "loss_ranks_higher": [ranks_higher(loss, taken[..., i]) for i in range(len(share))],
        # The part of the decision that is known with these: 0 none, 1 all.
        "known_by": {
            "position": [known_by(position, taken[..., i]) for i in range(len(share))],
            "character": [known_by(token, taken[..., i]) for i in range(len(share))],
            "character and the one before": [known_by(pair[:, 1:], taken[:, 1:, i]) for i in range(len(share))],
        },
        # Of the distances between two taken tokens: 0 for a comb, about 0.94 for coins of probability 1/8.
        "gap_variation": [gap_variation(taken[..., i]) for i in range(len(share))],
        # The share of the tokens that none, one, two, ... of the routed blocks take; and if these were independent.
        "depth": [(depth == n).mean() for n in range(len(share) + 1)],
        "depth_if_independent": np.asarray(independent).tolist(),
        "most_taken": most_taken(letters, taken),
    }


def by_tenth(value, taken):
    """The share that each routed block takes among the lowest tenth of the values, the next one, ...: (10, L)."""
    order = value.ravel().argsort(kind="stable")
    flat = taken.reshape(-1, taken.shape[-1])
    return [flat[part].mean(axis=0).tolist() for part in np.array_split(order, 10)]


def ranks_higher(value, taken):
    rank = value.ravel().argsort(kind="stable").argsort() + 1.0
    taken = taken.ravel()
    n, m = taken.sum(), (~taken).sum()
    return float((rank[taken].sum() - n * (n + 1) / 2) / (n * m)) if n and m else None


def known_by(key, taken):
    """Mutual information of key and decision, as a part of the decision's entropy."""
    _, index = np.unique(key, return_inverse=True)
    total = np.bincount(index.ravel()).astype(float)
    hit = np.bincount(index.ravel(), weights=taken.ravel())
    whole = binary_entropy(taken.mean())
    return float(1 - (total / total.sum() * binary_entropy(hit / total)).sum() / whole) if whole else None


def binary_entropy(p):
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return -(p * np.log(p) + (1 - p) * np.log(1 - p))


def gap_variation(taken):
    gaps = np.concatenate([np.diff(np.flatnonzero(row)) for row in taken])
    return float(gaps.std() / gaps.mean()) if len(gaps) else None


def most_taken(letters, taken, n=6):
    """
    For each routed block the characters that it takes most often: [character, part of all that the block takes, share
    of this character's places that it takes].
    """
    result = []
    names, index, count = np.unique(letters, return_inverse=True, return_counts=True)
    for i in range(taken.shape[-1]):
        hits = np.bincount(index.ravel(), weights=taken[..., i].ravel())
        most = hits.argsort()[::-1][:n]
        result.append([[str(names[j]), hits[j] / max(1, hits.sum()), hits[j] / count[j]] for j in most])
    return result


def ordered(done):
    """The lines with figures, by seed."""
    return sorted((row for row in done.values() if row["report"]), key=lambda row: row["run"]["seed"])


def table(rows):
    """Losses under top-k and causal routing at several lengths: means, deviations; the interval of the difference."""
    lines = ["| tokens of context | top-k | causal | causal against top-k |", "|--:|--:|--:|--:|"]
    for T in LENGTHS if rows else ():
        topk, causal = ([row["lengths"][str(T)][routing] for row in rows] for routing in ("topk", "causal"))
        costs = [100 * (c / t - 1) for c, t in zip(causal, topk)]
        half = report.T_95[len(costs)] * statistics.stdev(costs) / math.sqrt(len(costs)) if len(costs) > 2 else math.inf
        cost = report.signed((statistics.mean(costs), half))
        lines.append(f"| {T} | {spread(topk, '{:.4f}')} | {spread(causal, '{:.4f}')} | {cost} |")
    return "\n".join(lines)


def preferences(rows):
    """What each routed block takes."""
    lines = [
        "| seed | routed block | the characters that it takes most often: part of its picks (share of theirs) | "
        "more uncertain | larger loss | spacing |",
        "|--:|--:|---|--:|--:|--:|",
    ]
    for row in rows:
        learned = row["learned"]
        for i, characters in enumerate(learned["most_taken"]):
            shown = [
                f"`{c}`".replace("\n", "\\n").replace("` `", "space") + f" {part:.0%} ({share:.0%})"
                for c, part, share in characters
            ]
            cells = [
                f"{row['run']['seed']} | {i + 1}",
                ", ".join(shown),
                *("-" if learned[key][i] is None else f"{learned[key][i]:{form}}" for key, form in SHOWN.items()),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SHOWN = {"entropy_ranks_higher": ".0%", "loss_ranks_higher": ".0%", "gap_variation": ".2f"}


def depths(rows):
    """How many routed blocks take a token, beside what independent blocks of the same shares would."""
    blocks = MODEL.n_layer // MODEL.route_every
    lines = [f"| seed | {' | '.join(f'taken by {n}' for n in range(blocks + 1))} |", "|--:" * (blocks + 2) + "|"]
    for row in rows:
        pairs = zip(row["learned"]["depth"], row["learned"]["depth_if_independent"])
        cells = [f"{found:.1%} ({independent:.1%})" for found, independent in pairs]
        lines.append(f"| {row['run']['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows, path):
    """Four views of what the routed blocks take: kind of character, entropy, position; and how well it is foretold."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    (classes, entropy), (position, training) = figure.subplots(2, 2)
    first = rows[0]["learned"]
    blocks = range(len(first["share"]))
    for i in blocks:
        color, style = f"C{i}", ("-", "--", ":")[i % 3]
        x = np.arange(len(CLASSES)) + 0.25 * (i - 1)
        shares = np.array([[row["learned"]["by_class"][name][i] for name in CLASSES] for row in rows])
        label = f"routed block {i + 1}"
        classes.bar(x, shares.mean(axis=0), 0.25, color=color, alpha=0.6, hatch=("", "//", "..")[i % 3], label=label)
        for one in shares:
            classes.plot(x, one, "k.", markersize=3)
        for row in rows:
            tenths = np.array(row["learned"]["by_entropy"])[:, i]
            entropy.plot(np.arange(5, 100, 10), tenths, style, color=color, label=label if row is rows[0] else None)
    for axes in (classes, entropy):
        axes.axhline(0.125, color="black", linewidth=0.8)
        axes.set_ylabel("share of the tokens taken, causal")
        axes.legend(fontsize=8)
    classes.set_xticks(range(len(CLASSES)), list(CLASSES), fontsize=8)
    known = [value for row in rows for value in row["learned"]["known_by"]["character"] if value is not None]
    classes.set_title(
        f"The character alone tells {min(known):.0%} to {max(known):.0%} of a decision", loc="left", fontsize=10
    )
    entropy.set_xlabel("entropy of the prediction there, percentile")
    ranks = [value for row in rows for value in row["learned"]["entropy_ranks_higher"] if value is not None]
    high = sum(rank > 0.5 for rank in ranks)
    title = f"{high} of {len(ranks)} blocks prefer uncertain places, {len(ranks) - high} certain ones"
    entropy.set_title(title, loc="left", fontsize=10)
    for row in rows:
        position.plot(row["learned"]["by_position"], linewidth=0.8)
        steps = [line["step"] for line in row["training"]]
        training.plot(steps, [line["predictor_accuracy"] for line in row["training"]])
    position.set_ylim(0, 0.3)
    position.set_xlabel("position in the window")
    position.set_ylabel("share taken, all routed blocks")
    known = [value for row in rows for value in row["learned"]["known_by"]["position"] if value is not None]
    position.set_title(f"The position tells at most {max(known):.1%} (a line for each seed)", loc="left", fontsize=10)
    training.axhline(0.875, color="black", linewidth=0.8)
    training.text(0, 0.878, "base rate: never take", fontsize=8)
    training.set_ylim(0.8, 1)
    training.set_xlabel("training step")
    training.set_ylabel("decisions foretold rightly")
    last = [row["training"][-1]["predictor_accuracy"] for row in rows]
    training.set_title(f"The predictor ends at {min(last):.1%} to {max(last):.1%}", loc="left", fontsize=10)
    for axes in (classes, entropy, position, training):
        axes.grid(alpha=0.3)
    report.save(figure, path)


def main(argv=None):
    sets = {"all": wanted, "draw": lambda done: []}
    args = runner.arguments(__doc__.split("\n\n")[0].strip(), sets, "out-routing").parse_args(argv)
    with errors_in_one_line("routing.py", "try fewer --jobs"):
        train_one = args.set != "draw" and isoflop.prepared(execute, args.results, "shakespeare_works", "cpu")
        done = runner.run_all(sets[args.set], isoflop.Run, train_one, args.results, args.jobs)
        rows = ordered(done)
        if rows:
            draw(rows, args.results / "routing.png")
        print("\n\n".join((table(rows), preferences(rows), depths(rows))))


if __name__ == "__main__":
    main()
