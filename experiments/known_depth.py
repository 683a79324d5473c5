"""
A task of which it is known which tokens need depth: does the router send exactly these through?

    python experiments/known_depth.py all

Each text is 64 letters with one expression among them, at a random place: a number and seven operations,

    h w q o 1 r s r t t s r k e b ...

The answer to a letter is the letter itself, which takes no thought. The answer to the number is the number; to each
operation, what it makes of the answer before it (the operations are permutations of 0, 1, 2, and do not commute). So a
model must hand on a result from token to token, the further the deeper: an answer after seven operations takes several
layers. One token in eight is part of the expression: as many as a routed block of 12.5 % capacity can take.

Measured on expressions that were held out. (Their beginnings were not: there are few short ones.) Dense and routed
models are trained with the same FLOPs; learning rates, seeds and lines of runs.jsonl as in isoflop.py. A run that is
stopped begins anew.
"""

import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # run as a script, this file's own folder stands there alone
import mod  # noqa: E402
from configurator import errors_in_one_line  # noqa: E402
from experiments import report, runner  # noqa: E402
from experiments.variants import VARIANTS  # noqa: E402
from mod import GPT, GPTConfig, forward_flops  # noqa: E402
from train import TrainConfig, configure_optimizer, learning_rate_at, seed_of  # noqa: E402

T, LENGTH, LETTERS = 64, 8, 26
OPERATIONS = np.array([[1, 2, 0], [1, 0, 2], [0, 2, 1]])  # what each makes of 0, 1, 2
VOCABULARY = LETTERS + 3 + len(OPERATIONS)
# All expressions, (6561, LENGTH): the number, then the operations. One in eight is never trained on.
EXPRESSIONS = np.indices((3,) * LENGTH).reshape(LENGTH, -1).T
HELD_OUT = np.arange(len(EXPRESSIONS)) % 8 == 0
BATCH, MEASURED = 32, 1024  # sequences
AROUND = (-8, 2 * LENGTH)
BUDGET = 5e12  # training FLOPs

MODELS = {
    "dense, 4 layers": {"route_every": 0},
    "dense, 2 layers": {"route_every": 0, "n_layer": 2},  # the MoD model without its routed blocks
    "MoD": {},
    "MoD, picks explored": {"variant": "explores"},
    "stochastic routing": {"selection": "stochastic"},
    "position-only routing": {"selection": "position"},
}


@dataclass(frozen=True)
class Run:
    model: str  # a name in MODELS
    learning_rate: float = 2e-3
    seed: int = runner.SEEDS[0]
    budget: float = BUDGET

    @property
    def name(self):
        return f"{self.model}, {self.learning_rate:g}, seed {self.seed}"


def texts(seed, n, held_out=False):
    """n texts and their answers (n, T), and where their expressions begin (n,). Either kind has its own expressions."""
    rng = np.random.default_rng(seed)
    x = rng.integers(LETTERS, size=(n, T))
    y = x.copy()
    start = rng.integers(T - LENGTH + 1, size=n)
    row = np.arange(n)
    kind = EXPRESSIONS[HELD_OUT if held_out else ~HELD_OUT]
    value, *operations = kind[rng.integers(len(kind), size=n)].T
    x[row, start] = y[row, start] = LETTERS + value
    for i, operation in enumerate(operations, start=1):
        value = OPERATIONS[operation, value]
        x[row, start + i] = LETTERS + 3 + operation
        y[row, start + i] = LETTERS + value
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(start)


def execute(run, folder):
    """Train and measure one run; returns its line of runs.jsonl. It keeps nothing in the folder."""
    torch.set_num_threads(1)
    torch.manual_seed(run.seed)
    settings = dict(MODELS[run.model])
    variant = VARIANTS.get(settings.pop("variant", ""), mod.RoutedBlock)
    with mock.patch.object(mod, "RoutedBlock", variant), runner.ending_at_once():
        shape = {"n_layer": 4, "n_head": 2, "n_embd": 64, "block_size": T, "vocab_size": VOCABULARY, "bias": False}
        model = GPT(GPTConfig(**{**shape, **settings}))
        step_flops = 3 * BATCH * forward_flops(model.config, T)
        steps = int(run.budget // step_flops)
        config = TrainConfig(learning_rate=run.learning_rate, min_lr=run.learning_rate / 10, max_iters=steps)
        config = replace(config, warmup_iters=steps // 20)
        optimizer = configure_optimizer(model, config)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            torch.manual_seed(seed_of(run.seed, step))
            x, y, _ = texts((run.seed, step), BATCH)
            _, loss = model(x, y, routing="topk")
            (loss + config.aux_weight * model.aux_loss).backward()
            for part in (".predictor.", ""):  # apart, as in train.py
                parameters = [p for name, p in model.named_parameters() if (".predictor." in name) == bool(part)]
                torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            optimizer.step()
            optimizer.zero_grad()
        row = {"run": asdict(run), "steps": steps, "flops": steps * step_flops}
        row |= {"parameters": model.num_parameters(), "forward_flops_per_token": forward_flops(model.config, T) / T}
        model.eval()
        if not math.isfinite(loss.item()):
            return row | {"choose": None, "report": None}
        return row | {"choose": measure(model, 1), "report": measure(model, 2)}


@torch.no_grad()
def measure(model, seed):
    """Loss and accuracy within the expressions of held-out texts, and what the routed blocks took."""
    x, y, start = texts(seed, MEASURED, held_out=True)
    inside = start[:, None] + torch.arange(LENGTH)  # (n, LENGTH)
    result = {}
    for routing in ("topk", "causal"):
        logits, _ = model(x, y, routing=routing)
        right = (logits.argmax(-1) == y).gather(1, inside).double()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), y, reduction="none").gather(1, inside)
        result[f"val_loss_{routing}"] = losses.mean().item()
        result[f"accuracy_{routing}"] = right.mean().item()
        result[f"by_operations_{routing}"] = [round(share, 4) for share in right.mean(dim=0).tolist()]
        taken = [block.taken for block in model.routed_blocks]
        result[f"taken_{routing}"] = [t.double().mean().item() for t in taken]
        result[f"expression_taken_{routing}"] = [t.gather(1, inside).double().mean().item() for t in taken]
        result[f"taken_around_{routing}"] = [around(t, start) for t in taken]
    return result


def around(taken, start):
    """The share taken at each place from AROUND[0] to AROUND[1], counted from where the expression begins."""
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
    lines = ["| model | FLOPs/token | steps | rate | accuracy | with top-k | expression tokens taken, block by block |"]
    lines.append("|---|--:|--:|--:|--:|--:|---|")
    for model in models:
        taken = [[f"{share:.0%}" for share in row["report"]["expression_taken_causal"]] for row in model.rows]
        cells = [
            model.run.model,
            f"{model['forward_flops_per_token']:,.0f}",
            f"{model['steps']:,}",
            f"{model.run.learning_rate:g}",
            report.spread([row["report"]["accuracy_causal"] for row in model.rows], "{:.3f}"),
            report.spread([row["report"]["accuracy_topk"] for row in model.rows], "{:.3f}"),
            "; ".join(" ".join(one) for one in taken if one),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(models, path):
    """Accuracy by the number of operations, and what the routed blocks take in and around the expressions."""
    shown = [model for model in models if model.run.model in ("MoD", "MoD, picks explored")]
    figure, panels = plt.subplots(1, 1 + len(shown), figsize=(6 + 4 * len(shown), 4.2), layout="constrained")
    looks = zip(
        ("o-", "s--", "^-", "v:", "D-.", "x:"), ("#1f4e79", "#7a7a7a", "#d1495b", "#e39b00", "#4b7f52", "#8d6fae")
    )
    for model, (style, color) in zip(models, looks):
        curve = np.mean([row["report"]["by_operations_causal"] for row in model.rows], axis=0)
        panels[0].plot(curve, style, color=color, label=model.run.model, markersize=5)
    panels[0].axhline(1 / 3, color="black", linewidth=0.8, linestyle=":")
    panels[0].text(0, 1 / 3, "chance", va="bottom", fontsize=8)
    panels[0].set_xlabel("operations before the answer")
    panels[0].set_ylabel("share of right answers, causal")
    panels[0].set_title(f"At {report.short(BUDGET)} training FLOPs (mean of 3 seeds)", loc="left", fontsize=10)
    panels[0].legend(fontsize=8)
    for axes, model in zip(panels[1:], shown):
        for row in model.rows:
            for i, share in enumerate(row["report"]["taken_around_causal"]):
                axes.plot(
                    range(*AROUND),
                    share,
                    ("-", "--", ":")[i % 3],
                    color=f"C{i}",
                    alpha=0.8,
                    label=f"routed block {i + 1}" if row is model.rows[0] else None,
                )
        axes.axvspan(-0.5, LENGTH - 0.5, color="black", alpha=0.08)
        axes.set_ylim(-0.03, 1.03)
        axes.set_xlabel("place, counted from the start of the expression (grey)")
        axes.set_ylabel("share of the tokens taken, causal")
        mean = np.mean([row["report"]["expression_taken_causal"] for row in model.rows])
        axes.set_title(f"{model.run.model}: {mean:.0%} of the expression taken", loc="left", fontsize=10)
        axes.legend(fontsize=8)
    report.save(figure, path)


def main(argv=None):
    sets = {"all": wanted, "draw": runner.nothing}
    args = runner.arguments(__doc__.split(":")[0], sets, "out-known-depth").parse_args(argv)
    with errors_in_one_line("known_depth.py", "try fewer --jobs"):
        done = runner.run_all(sets[args.set], Run, execute, args.results, args.jobs)
        models = ordered(done)
        if models:
            draw(models, args.results / "known_depth.png")
        print(table(models))


if __name__ == "__main__":
    main()
