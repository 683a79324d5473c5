"""
Ordinary text with sparse recall: does a routed block pay where some characters need a second layer?

    python -m experiments.recall 64    # or 256 or 512: characters in a window

Each window is Shakespeare with a code of eight different digits, new for each window, at random places:

    ... My noble 70324916gentlemen of Rome, 70324916what news ...

From its second occurrence on, all digits of a code but the first can be recalled: 8 to 11% of all characters. That
takes two steps of attention: each digit notes the one before it, then a digit finds its earlier occurrence and what
followed it there. Two layers can learn that. An ordinary and a routed block could too, if the router picks the digits;
the routed block takes as many characters as there are digits.

All models train with the same FLOPs. Two seeds choose each learning rate on the first half of the validation split, by
the rules of `search` in runner.py. Six fresh seeds report on the second half (with the same codes in other text).
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("recall.py runs from the top of the repository: python -m experiments.recall")

import functools
import statistics
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy import stats
from torch.nn import functional as F

from experiments import report, runner
from experiments.known_depth import train_one
from mod import GPT, GPTConfig, RoutedBlock
from support.data import load_dataset
from support.options import errors_in_one_line

DATASET = "shakespeare_works"
DIGITS, LENGTH = 10, 8  # a code has LENGTH of the DIGITS
TASKS = {  # characters in a window: times that it holds the code, width of the models, training FLOPs
    64: (2, 64, 3e12),
    256: (4, 32, 1e13),
    512: (8, 32, 1e13),
}
TOKENS_PER_STEP, MEASURED = 1024, 512  # MEASURED: windows
LEARNED = 0.9  # from this share of the digits on, a model has learned the task, and a router takes the digits

MODELS = {  # "1 + 1" is an ordinary and a routed block
    "dense, 2 layers": {"n_layer": 2, "route_every": 0},
    "dense, 1 layer": {"n_layer": 1, "route_every": 0},
    "MoD, 1 + 1": {"n_layer": 2},
    "MoD decided by the router, 1 + 1": {"n_layer": 2, "causal_method": "router"},
    "MoD, expert threshold, 1 + 1": {"n_layer": 2, "variant": "expert_threshold"},
    "MoD told the digits, 1 + 1": {"n_layer": 2, "told": True},
    "MoD with exploring noise, 1 + 1": {"n_layer": 2, "variant": "exploring_noise"},
    "stochastic routing, 1 + 1": {"n_layer": 2, "variant": "stochastic"},
    "position-only routing, 1 + 1": {"n_layer": 2, "variant": "position"},
    "dense, 4 layers": {"n_layer": 4, "route_every": 0},
    "MoD, 2 + 2": {"n_layer": 4},
}


@dataclass(frozen=True)
class Run:
    model: str  # a name in MODELS
    block_size: int
    budget: float
    learning_rate: float = 4e-3  # where the search begins
    seed: int = runner.SEEDS[0]

    @property
    def name(self):
        return f"{self.model}, {self.block_size}, {self.learning_rate:g}, seed {self.seed}"


def texts(seed, n, T, tokens, vocab_size):
    """n windows of `tokens` with codes, their targets, and which targets can be recalled; each (n, T)."""
    rng = np.random.default_rng(seed)
    codes = TASKS[T][0]
    plain = T + 1 - codes * LENGTH
    window, recall = np.empty((n, T + 1), dtype=np.int64), np.zeros((n, T + 1), dtype=bool)
    for row in range(n):
        begin = np.sort(rng.integers(plain + 1, size=codes)) + LENGTH * np.arange(codes)
        place = begin[:, None] + np.arange(LENGTH)  # (codes, LENGTH)
        text = np.ones(T + 1, dtype=bool)
        text[place] = False
        start = rng.integers(len(tokens) - plain)
        window[row, text] = tokens[start : start + plain]
        window[row, place] = vocab_size + rng.permutation(DIGITS)[:LENGTH]
        recall[row, place[1:, 1:]] = True
    window, recall = torch.from_numpy(window), torch.from_numpy(recall)
    return window[:, :-1], window[:, 1:], recall[:, 1:]


class ToldBlock(RoutedBlock):
    """Takes the digits, as an ideal router might (under top-k one more, if the last digit is only a target)."""

    has_routing_loss = False

    def scores(self, r):
        return r + 1e4 * self.is_digit

    def causal_logits(self, x, r, positions):
        return self.is_digit - 0.5


class Told(GPT):
    """A GPT whose routed blocks know which tokens are digits: the last ones of the vocabulary."""

    def make_block(self, layer):
        return ToldBlock(self.config, layer) if self.config.is_routed(layer) else super().make_block(layer)

    def trunk(self, idx, *args):
        for block in self.routed_blocks:
            block.is_digit = (idx >= self.config.vocab_size - DIGITS).float()  # (B, T)
        return super().trunk(idx, *args)


def model_of(name, T, vocab_size):
    options = dict(MODELS[name])
    kind = Told if options.pop("told", False) else GPT
    codes, width, _ = TASKS[T]
    shape = {"n_head": 2, "n_embd": width, "block_size": T, "vocab_size": vocab_size + DIGITS, "bias": False}
    return kind(GPTConfig(**shape, capacity=codes * LENGTH / T, **options))


def execute(run, folder):
    """Train and measure one run; returns its line of runs.jsonl. It saves nothing in the folder."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    T, B = run.block_size, TOKENS_PER_STEP // run.block_size
    meta, data = load_dataset(DATASET, T)
    size = meta["vocab_size"]
    model = model_of(run.model, T, size)
    row, diverged = train_one(run, model, lambda step: texts((run.seed, step), B, T, data["train"], size)[:2], B)
    row["data"] = meta["text_sha256"][:16]
    for name, half in zip(("choose", "report"), np.split(data["val"], [len(data["val"]) // 2])):
        windows = texts(0, MEASURED, T, half, size)
        row[name] = None if diverged else measure(model, *windows)
    if row["report"] and model.routed_blocks:  # what the first one takes of the second half's first window, to draw
        model(windows[0][:1], routing="causal")
        row["picks"] = "".join(str(int(taken)) for taken in model.routed_blocks[0].taken[0])
        letters = [*meta["vocab"], *"0123456789"]
        row["text"] = "".join(letters[token] for token in windows[0][0])
    return row


@torch.no_grad()
def measure(model, x, y, recall):
    """Losses and accuracy on the targets that can be recalled, the loss on the rest, and what routed blocks take."""
    digit, result = x >= model.config.vocab_size - DIGITS, {}
    for routing in ("topk", "causal"):
        logits, taken = [], []
        for part in x.split(64):
            logits.append(model(part, routing=routing)[0])
            taken.append([block.taken for block in model.routed_blocks])
        logits, taken = torch.cat(logits), [torch.cat(block) for block in zip(*taken)]
        losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none").double()
        right = logits.argmax(-1) == y
        figures = {"val_loss": losses, "recall_loss": losses[recall], "rest_loss": losses[~recall]}
        figures = {name: value.mean().item() for name, value in figures.items()}
        figures["recalled"] = right[recall].double().mean().item()
        figures["taken"] = [block.double().mean().item() for block in taken]
        figures["digits_taken"] = [block[digit].double().mean().item() for block in taken]
        result |= {f"{name}_{routing}": value for name, value in figures.items()}
    return result


def wanted(T, done):
    """The runs that are still needed. Two seeds choose each learning rate, fresh ones report."""
    return runner.tuned([Run(name, T, TASKS[T][2]) for name in MODELS], done, runner.SEEDS[:2], runner.FRESH)


def finished(T, done):
    """{model: its lines of the fresh seeds}, for models that have all of these and of which none diverged."""
    models = report.models_of({run: row for run, row in done.items() if run.block_size == T})
    fresh = {m.run.model: m.fresh for m in models if m.fresh and m.run.budget == TASKS[T][2]}
    return {name: fresh[name] for name in MODELS if name in fresh}


def interval(values):
    """Mean ± half of its 95% interval."""
    half = report.t_95(len(values)) * stats.sem(values)
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def table(T, done):
    rows = []
    for name, found in finished(T, done).items():
        run, losses = found[0]["run"], [row["report"] for row in found]
        cells = [name, f"{found[0]['forward_flops_per_token']:,.0f}", f"{found[0]['steps']:,}", run["learning_rate"]]
        cells.append(f"{sum(one['recalled_causal'] >= LEARNED for one in losses)} of {len(losses)}")
        for figure in ("recalled", "recall_loss", "rest_loss", "val_loss"):
            cells.append(interval([one[f"{figure}_causal"] for one in losses]))
        blocks = zip(*(one["digits_taken_causal"] for one in losses))
        rows.append([*cells, "; ".join(", ".join(f"{share:.0%}" for share in block) for block in blocks)])
    columns = ":model | FLOPs/token | steps | rate | learned it | recalled | loss on these | on the rest | on all"
    columns += " | digits taken"
    return report.markdown(columns, rows)


@report.style
def draw(done, path, T=64):
    """Recall with each seed, and whether a router takes the digits; what MoD takes with its best and its worst seed."""
    models = finished(T, done)
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    above, *strips = figure.subplots(3, 1, height_ratios=(6, 1, 1))
    above.axvspan(LEARNED, 1.03, color="green", alpha=0.1)
    guess = sum(1 / n for n in range(1, LENGTH)) / (LENGTH - 1)  # among the digits not repeated yet
    above.axvline(guess, color="grey", linestyle=":")
    above.text(guess, -0.8, " guessing by elimination", fontsize=8, color="grey")
    above.text(LEARNED, -0.8, " learned it", fontsize=8, color="green")
    for row, found in enumerate(models.values()):
        for i, line in enumerate(found):
            taken = line["report"]["digits_taken_causal"]  # by each routed block
            color = report.LOOKS["MoD" if taken else "dense"]["color"]
            fill = "full" if any(share >= LEARNED for share in taken) else "none"
            y = row + (i - (len(found) - 1) / 2) / 12  # one above another, where they are equal
            above.plot(line["report"]["recalled_causal"], y, "o", fillstyle=fill, color=color)
    above.set_yticks(range(len(models)), list(models))
    above.set(xlim=(0, 1.03), ylim=(len(models) - 0.5, -1.2), xlabel="share of the digits recalled")
    above.set_title(f"{T} characters, equal training FLOPs. A circle is a seed; filled: a router takes the digits")
    for axes in strips:
        axes.axis("off")
    by_recall = sorted(models.get("MoD, 1 + 1", []), key=lambda row: row["report"]["recalled_causal"])
    for axes, row in zip(strips, [*by_recall[-1:], *by_recall[:1]]):
        seed, recalled = row["run"]["seed"], row["report"]["recalled_causal"]
        axes.set_title(f"What MoD's routed block takes with seed {seed}, which recalls {recalled:.0%}", fontsize=9)
        for place, (letter, pick) in enumerate(zip(row["text"], row["picks"])):
            box = dict(boxstyle="square,pad=0.1", color=report.LOOKS["MoD"]["color"], alpha=0.4)
            look = dict(family="monospace", fontsize=10, parse_math=False, bbox=box if pick == "1" else None)
            axes.text(place / T, 0.5, letter.replace("\n", "↵"), **look)
    report.save(figure, path)


def main(argv=None):
    sets = {str(T): functools.partial(wanted, T) for T in TASKS}
    args = runner.arguments(__doc__, sets, "out-recall").parse_args(argv)
    with errors_in_one_line("recall.py", "try fewer --jobs"):
        if args.set != "draw":
            load_dataset(DATASET, int(args.set))  # here, so that the processes do not each download it
            runner.run_all(sets[args.set], Run, execute, args.results, args.jobs)
        done = runner.read(args.results, Run)
        tables = {T: table(int(T), done) for T in sets}
        if tables["64"]:
            draw(done, args.results / "recall.png")
        shown = [f"{T} characters\n\n{text}" for T, text in tables.items() if text]
        print("\n\n".join(shown) or f"No model in {args.results} has all its runs yet")


if __name__ == "__main__":
    main()
