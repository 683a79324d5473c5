"""
A task with known answers to "which tokens need depth?": does the router pick exactly these?

    python -m experiments.known_depth all

Each text is 64 letters with eight numbers from 0 to 4 in a row, at a random place:

    h w q o 3 1 4 1 3 0 1 2 k e b ...

After a number, predict whatever number followed its previous occurrence; a new number predicts itself:

            3 1 4 4 1 0 3 2

This takes two steps of attention, and the second needs the result of the first: find the previous occurrence, then see
what followed it. Two blocks learn this; one almost does. The target after a letter is random, so a letter has
nothing to compute. One token in eight is a number, as many as a routed block with 12.5% capacity can take.

In a second version each letter predicts itself. That is easy, and letters outnumber numbers seven to one.

All models train with the same FLOPs. Learning rates and seeds are chosen as in isoflop.py. A run takes less than a
minute; Ctrl-C finishes the runs under way.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("known_depth.py runs from the top of the repository: python -m experiments.known_depth")

import functools
import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from experiments import report, runner
from mod import GPT, GPTConfig, evaluating
from plot import spread
from support.options import errors_in_one_line
from train import TrainConfig, configure_optimizer, training_step

T, LENGTH, LETTERS, NUMBERS = 64, 8, 26, 5
VOCABULARY = LETTERS + NUMBERS
BATCH, MEASURED = 32, 1024  # texts
AROUND = (-8, 2 * LENGTH)  # places to measure, counted from the first number
BUDGET = 7.5e11  # training FLOPs

MODELS = {
    "dense, 2 layers": {"route_every": 0},
    "dense, 1 layer": {"route_every": 0, "n_layer": 1},  # the MoD model without its routed block
    "MoD": {},
    "stochastic routing": {"variant": "stochastic"},
    "position-only routing": {"variant": "position"},
    "MoD, letters with an answer": {"letters": "copied"},
    "dense, 2 layers, letters with an answer": {"route_every": 0, "letters": "copied"},
    "dense, 1 layer, letters with an answer": {"route_every": 0, "n_layer": 1, "letters": "copied"},
}


@dataclass(frozen=True)
class Run:
    model: str  # a name in MODELS
    learning_rate: float = 4e-3  # where the search begins
    seed: int = runner.SEEDS[0]
    budget: float = BUDGET

    @property
    def name(self):
        return f"{self.model}, {self.learning_rate:g}, seed {self.seed}"


def model_of(options):
    """The model for options of GPTConfig."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": T, "vocab_size": VOCABULARY, "bias": False}
    return GPT(GPTConfig(**{**shape, **options}))


def texts(seed, n, letters="random"):
    """n texts and their targets (n, T), and where their numbers begin (n,). Letters: "random" or "copied"."""
    rng = np.random.default_rng(seed)
    x = rng.integers(LETTERS, size=(n, T))
    random = rng.integers(LETTERS, size=(n, T))
    y = x.copy() if letters == "copied" else random
    start = rng.integers(T - LENGTH + 1, size=n)
    numbers = rng.integers(NUMBERS, size=(n, LENGTH))
    row, place = np.arange(n)[:, None], start[:, None] + np.arange(LENGTH)
    x[row, place], y[row, place] = LETTERS + numbers, LETTERS + answers(numbers)
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(start)


def answers(numbers):
    """The targets of numbers (n, LENGTH)."""
    result = numbers.copy()
    for place in range(LENGTH):
        for earlier in range(place):  # the latest equal number overwrites those before it
            equal = numbers[:, earlier] == numbers[:, place]
            result[equal, place] = numbers[equal, earlier + 1]
    return result


def learn(model, batch, steps, learning_rate, seed, look=None, every=1):
    """
    Train the model by train.py's recipe on batch(step), inputs and targets (B, T); returns the last loss.

    look(step) is called in evaluation mode before every `every`-th step, and after the last one.
    """
    config = TrainConfig(
        learning_rate=learning_rate, min_lr=learning_rate / 10, max_iters=steps, warmup_iters=steps // 20,
        seed=seed, device=str(model.lm_head.weight.device), dtype="float32",
    )  # fmt: skip
    optimizer, scaler = configure_optimizer(model, config), torch.amp.GradScaler("cpu", enabled=False)
    for step in range(steps):
        if look and step % every == 0:
            with evaluating(model):
                look(step)
        figures = training_step(model, model, optimizer, scaler, lambda step, _: batch(step), step, config)
    model.eval()
    if look:
        look(steps)
    return figures[0].item()


def execute(run, folder):
    """Train one run; returns its line, measured on two sets of new texts: to choose by and to report. Saves nothing."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    options = dict(MODELS[run.model])
    letters = options.pop("letters", "random")
    model = model_of(options)
    row, diverged = train_one(run, model, lambda step: texts((run.seed, step), BATCH, letters)[:2], BATCH)
    return row | {name: None if diverged else measure(model, seed) for name, seed in (("choose", 1), ("report", 2))}


def train_one(run, model, batch, B):
    """Train the model for run.budget FLOPs, B sequences a step. Returns its line so far, and whether it diverged."""
    T = model.config.block_size
    step_flops = 3 * B * model.flops(T)
    steps = int(run.budget // step_flops)
    loss = learn(model, batch, steps, run.learning_rate, run.seed)
    row = {"run": asdict(run), "steps": steps, "flops": steps * step_flops}
    row |= {"parameters": model.num_parameters(), "forward_flops_per_token": model.flops(T) / T}
    return row, not math.isfinite(loss)


@torch.no_grad()
def measure(model, seed):
    """Loss and accuracy on the numbers of new texts, and what the routed block takes there."""
    x, y, start = texts(seed, MEASURED)
    inside = start[:, None] + torch.arange(LENGTH)  # (n, LENGTH)
    around = start[:, None] + torch.arange(*AROUND)  # (n, places)
    there = (around >= 0) & (around < T)
    result = {}
    for routing in ("topk", "causal"):
        logits, _ = model(x, routing=routing)
        right = (logits.argmax(-1) == y).gather(1, inside).double()
        losses = F.cross_entropy(logits.transpose(1, 2), y, reduction="none").gather(1, inside)
        result[f"val_loss_{routing}"] = losses.mean().item()
        result[f"accuracy_{routing}"] = right.mean().item()
        for block in model.routed_blocks:  # at most one here
            hit = block.taken.gather(1, around.clamp(0, T - 1)) & there
            shares = (hit.sum(dim=0) / there.sum(dim=0)).tolist()
            result[f"taken_{routing}"] = block.taken.double().mean().item()
            result[f"numbers_taken_{routing}"] = block.taken.gather(1, inside).double().mean().item()
            result[f"taken_around_{routing}"] = [round(share, 4) for share in shares]
    return result


def ordered(done):
    """Each model at its best learning rate, in the order of MODELS."""
    return sorted(report.models_of(done), key=lambda model: list(MODELS).index(model.run.model))


def share_of_numbers(found):
    """The share of numbers among the tokens that the routed block takes in the causal pass."""
    return found["numbers_taken_causal"] * LENGTH / T / found["taken_causal"] if found["taken_causal"] else 0.0


def table(models):
    """Accuracy on the numbers, and what the routed block takes (a share for each seed)."""
    rows = []
    for model in models:
        found = [row["report"] for row in model.rows]
        cells = [model.run.model, f"{model['forward_flops_per_token']:,.0f}", f"{model['steps']:,}"]
        cells += [f"{model.run.learning_rate:g}", spread([one["accuracy_causal"] for one in found])]
        if "taken_causal" not in found[0]:  # dense
            rows.append([*cells, "same", "", ""])
            continue
        shares = [[one["numbers_taken_causal"] for one in found], [share_of_numbers(one) for one in found]]
        shares = [", ".join(f"{share:.0%}" for share in of_seeds) for of_seeds in shares]
        rows.append([*cells, spread([one["accuracy_topk"] for one in found]), *shares])
    columns = ":model | FLOPs/token | steps | rate | accuracy | with top-k | numbers taken | numbers among taken"
    return report.markdown(columns, rows)


@report.style
def draw(models, path):
    """The accuracy of each model, and what the routed block takes on the numbers and around them."""
    shown = [model for model in models if model.run.model in ("MoD", "MoD, letters with an answer")]
    figure = Figure(figsize=(6 + 4 * len(shown), 3.6), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    for y, model in enumerate(reversed(models)):
        accuracy = [row["report"]["accuracy_causal"] for row in model.rows]
        look = report.LOOKS["MoD" if "taken_causal" in model["report"] else "dense"]
        first.plot(accuracy, [y] * len(accuracy), look["marker"], color=look["color"], alpha=0.6)
        first.plot(np.mean(accuracy), y, "|", color=look["color"], markersize=16)
    names = [f"{model.run.model}\n{model['forward_flops_per_token']:,.0f} FLOPs/token" for model in reversed(models)]
    first.set_yticks(range(len(models)), names, fontsize=8)
    first.grid(False, axis="y")
    first.set(xlim=(0.6, 1.02), xlabel="share of right answers, causal (a mark for each seed)")
    first.set_title("Answers to the numbers, at equal training FLOPs")
    for axes, model in zip(others, shown):
        for row, style in zip(model.rows, ("o-", "s--", "^:")):
            look = dict(color=report.LOOKS["MoD"]["color"], markersize=4, label=f"seed {row['run']['seed']}")
            axes.plot(range(*AROUND), row["report"]["taken_around_causal"], style, **look)
        mean = np.mean([row["report"]["numbers_taken_causal"] for row in model.rows])
        axes.axvspan(-0.5, LENGTH - 0.5, color="black", alpha=0.08)
        axes.set(ylim=(-0.03, 1.03), ylabel="share that the routed block takes")
        axes.set_xlabel("place after the first number (grey: numbers)")
        axes.set_title(f"{model.run.model}\ntakes {mean:.0%} of the numbers")
        axes.legend(fontsize=8)
    report.save(figure, path)


def main(argv=None):
    args = runner.arguments(__doc__, ["all"], "out-known-depth").parse_args(argv)
    with errors_in_one_line("known_depth.py", "try fewer --jobs"):
        if args.set != "draw":
            wanted = functools.partial(runner.tuned, [Run(name) for name in MODELS])
            runner.run_all(wanted, Run, execute, args.results, args.jobs)
        models = ordered(runner.read(args.results, Run))
        if models:
            draw(models, args.results / "known_depth.png")
        print(table(models) or f"No runs in {args.results} yet")


if __name__ == "__main__":
    main()
