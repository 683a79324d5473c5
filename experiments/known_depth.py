"""
A task of which it is known which tokens need depth: does the router send exactly these through?

    python -m experiments.known_depth all

Each text is 64 letters, among them eight numbers from 0 to 4, at a random place:

    h w q o 3 1 4 1 3 0 1 2 k e b ...

The answer to a number is the number that followed it the last time, a number that is new answers itself:

            3 1 4 4 1 0 3 2

A model must find out which number stands before each number, and then find the last one that stands after a number such
as this: two looks back, and the second needs what the first has found. Two blocks learn that, one does not quite. The
answer to a letter is a throw of dice, so there is nothing to find. One token in eight is a number: as many as a routed
block of 12.5 % capacity can take.

Some models are trained on other letters, whose answer is the letter itself: easily learned, and there are more of them.

Dense and routed models are trained with the same FLOPs; learning rates, seeds and lines of runs.jsonl as in isoflop.py.
A run that is stopped begins anew.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit(
        "known_depth.py runs as a module, from the top of the repository: python -m experiments.known_depth"
    )

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments import report, runner
from mod import GPT, GPTConfig, evaluating
from plot import spread
from support.data import seed_of
from support.options import errors_in_one_line
from train import TrainConfig, clip_gradients, configure_optimizer, learning_rate_at

T, LENGTH, LETTERS, NUMBERS = 64, 8, 26, 5
VOCABULARY = LETTERS + NUMBERS
BATCH, MEASURED = 32, 1024  # texts
AROUND = (-8, 2 * LENGTH)
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


def texts(seed, n, letters="dice"):
    """n texts and their answers (n, T), and where their numbers begin (n,). Letters: "dice" or "copied"."""
    rng = np.random.default_rng(seed)
    x = rng.integers(LETTERS, size=(n, T))
    dice = rng.integers(LETTERS, size=(n, T))
    y = x.copy() if letters == "copied" else dice
    start = rng.integers(T - LENGTH + 1, size=n)
    numbers = rng.integers(NUMBERS, size=(n, LENGTH))
    row, place = np.arange(n)[:, None], start[:, None] + np.arange(LENGTH)
    x[row, place], y[row, place] = LETTERS + numbers, LETTERS + answers(numbers)
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(start)


def answers(numbers):
    """The right answers to numbers (n, LENGTH)."""
    result = numbers.copy()
    for place in range(LENGTH):
        for earlier in range(place):  # the last one that is equal overwrites those before it
            equal = numbers[:, earlier] == numbers[:, place]
            result[equal, place] = numbers[equal, earlier + 1]
    return result


def learn(model, batch, steps, learning_rate, seed, look=None, every=1):
    """
    Train the model by train.py's recipe on batch(step), inputs and targets (B, T); returns the last loss.

    look(step), if given, is called in evaluation mode at every `every`-th step, before it, and after the last one.
    """
    config = TrainConfig(learning_rate=learning_rate, min_lr=learning_rate / 10, max_iters=steps)
    config = replace(config, warmup_iters=steps // 20)
    optimizer = configure_optimizer(model, config)
    for step in range(steps):
        if look and step % every == 0:
            with evaluating(model):
                look(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, config)
        x, y = batch(step)
        torch.manual_seed(seed_of(seed, step))  # the stochastic control's noise
        _, loss = model(x, y, routing="topk")
        (loss + config.aux_weight * model.routing_loss()).backward()
        clip_gradients(model, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    if look:
        look(steps)
    return loss.item()


def execute(run, folder):
    """Train and measure one run; returns its line of runs.jsonl. It keeps nothing in the folder."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    options = dict(MODELS[run.model])
    letters = options.pop("letters", "dice")
    model = model_of(options)
    step_flops = 3 * BATCH * model.flops(T)
    steps = int(run.budget // step_flops)
    with runner.ending_at_once():
        last = learn(
            model, lambda step: texts((run.seed, step), BATCH, letters)[:2], steps, run.learning_rate, run.seed
        )
        row = {"run": asdict(run), "steps": steps, "flops": steps * step_flops}
        row |= {"parameters": model.num_parameters(), "forward_flops_per_token": model.flops(T) / T}
        if not math.isfinite(last):
            return row | {"choose": None, "report": None}
        return row | {"choose": measure(model, 1), "report": measure(model, 2)}


@torch.no_grad()
def measure(model, seed):
    """Loss and accuracy on the numbers of texts that no run is trained on, and what the routed block took."""
    x, y, start = texts(seed, MEASURED)
    inside = start[:, None] + torch.arange(LENGTH)  # (n, LENGTH)
    result = {}
    for routing in ("topk", "causal"):
        logits, _ = model(x, routing=routing)
        right = (logits.argmax(-1) == y).gather(1, inside).double()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none").gather(1, inside)
        result[f"val_loss_{routing}"] = losses.mean().item()
        result[f"accuracy_{routing}"] = right.mean().item()
        for block in model.routed_blocks:  # one in all models here
            taken = block.taken
            result[f"taken_{routing}"] = taken.double().mean().item()
            result[f"numbers_taken_{routing}"] = taken.gather(1, inside).double().mean().item()
            result[f"taken_around_{routing}"] = around(taken, start)
    return result


def around(taken, start):
    """The share taken at each place from AROUND[0] to AROUND[1], counted from where the numbers begin."""
    places = start[:, None] + torch.arange(*AROUND)  # (n, places)
    there = (places >= 0) & (places < T)
    hit = taken.gather(1, places.clamp(0, T - 1)) & there
    return [round(share, 4) for share in (hit.sum(dim=0) / there.sum(dim=0)).tolist()]


def wanted(done):
    """Each model at the best of its learning rates, with all seeds."""
    todo = []
    for name in MODELS:
        run, missing = runner.search(Run(name), done)
        todo += missing or runner.seeds(run, done)
    return todo


def ordered(done):
    """Each model at its best learning rate, in the order of MODELS."""
    return sorted(report.models_of(done), key=lambda model: list(MODELS).index(model.run.model))


def table(models):
    lines = [
        "| model | FLOPs/token | steps | rate | accuracy | with top-k | of the numbers, taken | of the taken, numbers |"
    ]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|")
    for model in models:
        found = [row["report"] for row in model.rows]
        recall = precision = [""]
        if "taken_causal" in found[0]:
            recall = [f"{one['numbers_taken_causal']:.0%}" for one in found]
            precision = [f"{share_of_numbers(one):.0%}" for one in found]
        cells = [
            model.run.model,
            f"{model['forward_flops_per_token']:,.0f}",
            f"{model['steps']:,}",
            f"{model.run.learning_rate:g}",
            spread([one["accuracy_causal"] for one in found]),
            spread([one["accuracy_topk"] for one in found]) if recall[0] else "same",
            ", ".join(recall),
            ", ".join(precision),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def share_of_numbers(found):
    """Of the tokens that the routed block takes in the causal pass, how many are numbers."""
    return found["numbers_taken_causal"] * LENGTH / T / found["taken_causal"] if found["taken_causal"] else 0.0


def draw(models, path):
    """The accuracy of each model, and what the routed block takes on the numbers and around them."""
    shown = [model for model in models if model.run.model in ("MoD", "MoD, letters with an answer")]
    figure = Figure(figsize=(6 + 4 * len(shown), 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + len(shown), squeeze=False)[0]
    for y, model in enumerate(reversed(models)):
        accuracy = [row["report"]["accuracy_causal"] for row in model.rows]
        look = report.LOOKS["dense" if "dense" in model.run.model else "MoD"]
        panels[0].plot(accuracy, [y] * len(accuracy), look["marker"], color=look["color"], alpha=0.6)
        panels[0].plot(np.mean(accuracy), y, "|", color=look["color"], markersize=16)
    panels[0].set_yticks(
        range(len(models)),
        [f"{model.run.model}\n{model['forward_flops_per_token']:,.0f} FLOPs/token" for model in reversed(models)],
        fontsize=8,
    )
    panels[0].set_xlim(0.6, 1.02)
    panels[0].grid(axis="x", alpha=0.3)
    panels[0].set_xlabel("share of right answers, causal (a mark for each seed)")
    panels[0].set_title("Answers to the numbers, at equal training FLOPs", loc="left", fontsize=10)
    for axes, model in zip(panels[1:], shown):
        for row, style in zip(model.rows, ("o-", "s--", "^:")):
            share = row["report"]["taken_around_causal"]
            seed = f"seed {row['run']['seed']}"
            axes.plot(range(*AROUND), share, style, color=report.LOOKS["MoD"]["color"], markersize=4, label=seed)
        axes.axvspan(-0.5, LENGTH - 0.5, color="black", alpha=0.08)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("place, from the first number on (grey: numbers)")
        axes.set_ylabel("share that the routed block takes")
        mean = np.mean([row["report"]["numbers_taken_causal"] for row in model.rows])
        axes.set_title(f"{model.run.model}\ntakes {mean:.0%} of the numbers", loc="left", fontsize=10)
        axes.legend(fontsize=8)
    report.save(figure, path)


def main(argv=None):
    sets = {"all": wanted, "draw": lambda done: []}
    args = runner.arguments(__doc__.split(":")[0], sets, "out-known-depth").parse_args(argv)
    with errors_in_one_line("known_depth.py", "try fewer --jobs"):
        done = runner.run_all(sets[args.set], Run, execute, args.results, args.jobs)
        models = ordered(done)
        if models:
            draw(models, args.results / "known_depth.png")
        print(table(models))


if __name__ == "__main__":
    main()
