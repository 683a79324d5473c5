"""
The paper's comparison in miniature: dense GPTs and Mixture-of-Depths at equal training FLOPs.

    python -m experiments.isoflop laptop                           # one budget, about three hours on 2 cores
    python -m experiments.isoflop draw --results=results/isoflop   # the tables and pictures of this project's results

Each finished run is a line of out-isoflop/runs.jsonl (or of another folder, by --results) and is not trained again.
Ctrl-C stops a set, and the same command resumes it inside its unfinished runs. At the end it draws and prints.

Read from top to bottom: what a run is, which runs are declared, which one is needed next, how a run is trained.
experiments/runner.py trains several runs at once, experiments/report.py makes the tables and pictures.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("isoflop.py runs from the top of the repository: python -m experiments.isoflop")

import contextlib
import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from experiments import report, runner
from experiments.runner import FRESH, SEEDS, mean_loss, search, seeds, tuned
from mode import forward_flops
from support import checkpoint
from support.data import load_dataset
from support.evaluation import evaluate
from support.options import Diverged, UserError, errors_in_one_line, pick_device
from train import TrainConfig, model_config, number_of_steps, train

TOKENS_PER_STEP = 1024
HEAD_SIZE = 32


@dataclass(frozen=True)
class Run:
    """One training run. `options` holds what all runs share."""

    budget: float  # training FLOPs
    n_layer: int
    n_embd: int
    route_every: int  # 0: dense
    learning_rate: float = 5e-3  # where the search begins
    seed: int = SEEDS[0]
    capacity: float = 0.125
    causal_method: str = "predictor"
    block_size: int = 128
    variant: str = ""  # a routed block of variants.py
    n_expert: int = 0
    n_noop: int = 0
    expert_capacity: float = 0.25
    staged: bool = False

    @property
    def base(self):
        """The run of this size with every other option at its default."""
        return Run(self.budget, self.n_layer, self.n_embd, self.route_every, self.learning_rate, self.seed)

    @property
    def plain(self):
        """Whether it belongs to the isoFLOP comparison: dense, or MoD as the paper recommends it."""
        return self.route_every in (0, 2) and self == self.base

    @property
    def experts(self):
        """Its name in EXPERTS; None without experts."""
        return next((name for name, options in EXPERTS.items() if replace(self.base, **options) == self), None)

    @property
    def name(self):
        """The name of its folder, different for each run."""
        kind = "mod" if self.route_every else "dense"
        special = {name: value for name, value in asdict(self).items() if value != getattr(Run, name, None)}
        digest = hashlib.sha256(json.dumps(special).encode()).hexdigest()[:8]
        return f"{self.budget:.0e}-{kind}-{self.n_layer}x{self.n_embd}-{self.learning_rate:g}-{self.seed}-{digest}"


# The declared runs. Sizes are (layers, width) of the dense models. The MoD model of a size has a routed block after
# each of these layers, so twice as many. Its baseline is the dense model of the size: the same without routed blocks.
SIZES = {
    1e12: ((1, 32), (1, 64), (1, 96), (1, 128), (2, 32), (2, 64)),
    3e12: ((1, 32), (1, 64), (1, 96), (1, 128), (2, 32), (2, 64), (2, 96), (3, 32), (3, 64)),
    1e13: ((1, 64), (1, 96), (1, 128), (1, 192), (2, 64), (2, 96), (2, 128), (3, 32), (3, 64), (3, 96), (3, 128),
           (4, 64)),
    3e13: ((2, 96), (2, 128), (3, 96), (3, 128), (4, 128)),
}  # fmt: skip
GPU_SIZES = {  # these budgets read the complete works 2 to 8 times, 3 to 11 times, and 3 to 14 times
    1e14: ((2, 128), (2, 192), (3, 128), (3, 192), (4, 128), (4, 192)),
    3e14: ((2, 192), (3, 192), (3, 256), (4, 192), (4, 256), (6, 192)),
    1e15: ((3, 256), (4, 256), (4, 384), (6, 256), (6, 384), (8, 256)),
}
LONG_SIZES = ((2, 128), (3, 128), (2, 192), (1, 192), (4, 128), (3, 96), (3, 64), (2, 64))  # trained in this order
CONTENDER = 1.03  # at its first rate with seed 1, a size of the set long may lie this far above the best of its kind
ABLATED = 3e12  # the budget at which one thing at a time is changed in the best MoD model
VARIANTS = ("stochastic", "position", "no_gate", "sigmoid_gate", "loud_router", "exploring_noise")
CAUSAL = ({}, {"causal_method": "router"}, {"variant": "expert_threshold"})  # three ways to decide without look-ahead
EXPERTS = {  # in every other block, the ones that MoD would route
    "MoE": dict(n_expert=4),
    "MoE, lowered capacity": dict(n_expert=4, expert_capacity=0.125),
    "staged MoDE": dict(n_expert=4, staged=True),
    "integrated MoDE": dict(n_expert=4, n_noop=4, expert_capacity=0.125),
}


def at_one_budget(budget, sizes, done):
    """
    The runs that are still needed to compare dense and MoD at one budget.

    First each size at learning rates around its best one, with one seed (two at the budgets for a GPU). Then the other
    seeds, at that learning rate, for the three best sizes of each kind and for the baseline of the best MoD model. Then
    fresh seeds for the models in the paper's claims, where the best model has the lowest mean over the seeds so far.
    "Best" always refers to the half of the validation split that is for choosing.
    """
    chosen_by = SEEDS[:2] if budget in GPU_SIZES else SEEDS[:1]
    todo, kinds = [], {0: [], 2: []}
    for route_every, runs in kinds.items():
        for n, width in sizes:
            run, missing = search(Run(budget, n * (2 if route_every else 1), width, route_every), done, chosen_by)
            todo += missing
            runs.append(run)
    if todo:
        return todo
    dense, mod = (sorted(runs, key=lambda run: mean_loss(run, done, chosen_by)) for runs in kinds.values())
    baselines = [run for run in dense[3:] if (run.n_layer, run.n_embd) == (mod[0].n_layer // 2, mod[0].n_embd)]
    if todo := [again for run in dense[:3] + mod[:3] + baselines for again in seeds(run, done)]:
        return todo
    found = report.candidates(report.models_of(done), budget).values()
    runs = dict.fromkeys(model.run for model in found if model)  # without duplicates
    # All seeds, because a model of the claims may not be among the three best.
    return [again for run in runs for again in seeds(run, done, SEEDS[1:] + FRESH)]


def changed(run):
    """The MoD model with one thing changed; for another context also its baseline, to compare with."""
    return [
        *(replace(run, capacity=share) for share in (0.0625, 0.25, 0.5, 1.0)),
        *(replace(run, route_every=n) for n in (1, 3) if n <= run.n_layer),
        *(replace(run, **options) for options in CAUSAL[1:]),
        *(replace(run, variant=name) for name in VARIANTS),
        *(replace(run, block_size=T) for T in (64, 256)),
        *(replace(run, block_size=T, route_every=0, n_layer=run.n_layer // 2) for T in (64, 256)),
    ]


def at_budgets(sizes, done):
    """The comparison at each budget, the cheap ones first, so a set that is stopped has complete budgets."""
    todo = []
    for budget in sizes:
        missing = at_one_budget(budget, sizes[budget], done)
        if budget == ABLATED and not missing:
            base = report.best_of(report.plain(report.models_of(done), budget, "MoD")).run
            causal = [replace(base, **options) for options in CAUSAL]
            missing = tuned(changed(base), done) or tuned(causal, done, wanted=FRESH)
        todo += missing
    return todo


def experts(done):
    """MoD, MoE and MoDE of one shape, and the dense GPTs with and without the blocks that MoD routes."""
    shape = Run(1e13, 4, 128, 2)
    dense = replace(shape, route_every=0)
    with_experts = [replace(shape, **options) for options in EXPERTS.values()]
    return tuned([shape, dense, replace(dense, n_layer=2), *with_experts], done)


def long(done):
    """
    Trained ten times longer than at 1e13: a MoD of width 64 against the same model without its routed blocks. Then the
    same pair at 1e13; other sizes at 1e14, wider too; the pair at 3e13; random and position routing.

    At 1e14 each size first trains with seed 1, and the contenders go on (see CONTENDER). Two seeds choose the rates and
    the best size of each kind. Fresh seeds report the pairs, the controls, the best sizes and the best MoD's baseline.
    """
    mod, dense = Run(report.LONG, 4, 64, 2, 2.5e-3), Run(report.LONG, 2, 64, 0, 2.5e-3)
    dense_sizes = [replace(dense, n_layer=n, n_embd=width) for n, width in LONG_SIZES]
    mod_sizes = [replace(mod, n_layer=2 * n, n_embd=width) for n, width in LONG_SIZES]
    both = SEEDS[:2]

    def pair_at(budget):
        return [replace(run, budget=budget, learning_rate=5e-3) for run in (mod, dense)]

    def contenders(runs):
        first = [mean_loss(run, done, both[:1]) for run in runs]
        return [run for run, loss in zip(runs, first) if loss <= CONTENDER * min(first)]

    def best(runs):
        return min(contenders(runs), key=lambda run: mean_loss(search(run, done, both)[0], done, both))

    def finalists():
        two = best(dense_sizes), best(mod_sizes)
        return dict.fromkeys([*two, replace(two[1], n_layer=two[1].n_layer // 2, route_every=0)])  # without duplicates

    return (
        tuned([mod, dense], done, both, FRESH)
        or tuned(pair_at(1e13), done, both, FRESH)
        or [again for pair in zip(dense_sizes, mod_sizes) for run in pair for again in seeds(run, done, both[:1])]
        or tuned(contenders(dense_sizes) + contenders(mod_sizes), done, both, ())
        or tuned(finalists(), done, both, FRESH)
        or tuned(pair_at(3e13), done, both, FRESH)
        or tuned([replace(mod, variant=name) for name in ("stochastic", "position")], done, both, FRESH)
    )


SETS = {
    "smoke": functools.partial(at_budgets, {5e9: ((1, 32), (1, 64))}),
    "laptop": functools.partial(at_budgets, {ABLATED: SIZES[ABLATED]}),
    "full": functools.partial(at_budgets, SIZES),
    "gpu": functools.partial(at_budgets, GPU_SIZES),
    "long": long,
    "experts": experts,
}


# One run


def options(run, vocabulary, dataset, out_dir, device):
    """The run as options of train.py, with everything that all runs share."""
    config = TrainConfig(
        out_dir=str(out_dir),
        dataset=dataset,
        **{name: value for name, value in asdict(run).items() if name != "budget"},
        n_head=run.n_embd // HEAD_SIZE,
        batch_size=TOKENS_PER_STEP // run.block_size,
        flop_budget=run.budget,
        min_lr=run.learning_rate / 10,
        eval_iters=1,  # `execute` evaluates properly, once, at the end
        device=device,
        dtype="float32",
        compile="False",
    )
    flops = 3 * config.batch_size * forward_flops(model_config(config, {"vocab_size": vocabulary}), run.block_size)
    steps = number_of_steps(config, flops)
    return replace(config, warmup_iters=steps // 20, eval_interval=math.ceil(steps / 4))  # it saves when it evaluates


def execute(run, out_dir, dataset, device, measure=None, **more):
    """
    Train and evaluate one run in this process, with one thread; returns its line of runs.jsonl.

    measure(model, tokens, vocabulary, rows) returns more fields for the line; `more` are other options of train.py.
    """
    torch.set_num_threads(1)
    log_file, out_dir = out_dir / "log.txt", out_dir / "run"
    out_dir.mkdir(parents=True, exist_ok=True)
    meta, data = load_dataset(dataset, run.block_size)
    config = replace(options(run, meta["vocab_size"], dataset, out_dir, device), **more)
    row = {"run": asdict(run), "data": meta["text_sha256"][:16], "choose": None, "report": None}
    with open(log_file, "a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            rows = train(replace(config, resume=(out_dir / "last.json").is_file()))
        except Diverged:
            return row
        model, info = checkpoint.load(out_dir, "last", config.device)
    # Choices may be made on the first half of the validation split only.
    first, second = np.split(data["val"], [len(data["val"]) // 2])
    return row | {
        "choose": evaluate(model, first, batch_size=64, eval_iters=len(first)),
        "report": evaluate(model, second, batch_size=64, eval_iters=len(second)),
        "parameters": model.num_parameters(),
        "forward_flops_per_token": model.flops(run.block_size) / run.block_size,
        "steps": rows[-1]["step"],
        **{name: rows[-1][name] for name in ("flops", "train_loss", "train_seconds")},
        "versions": {name: info["versions"][name] for name in ("torch", "hardware", "threads")},
        **(measure(model, second, meta["vocab"], rows) if measure else {}),
    }


def prepared(execute, results, dataset, device):
    """execute(run, folder) with its other arguments filled in, once data and device are known to work."""
    meta, _ = load_dataset(dataset, TrainConfig.block_size)
    if any(row["data"] != meta["text_sha256"][:16] for row in runner.read(results, Run).values()):
        raise UserError(f"{results} holds runs on another text; choose another folder with --results")
    return functools.partial(execute, dataset=dataset, device=pick_device(device))


def main(argv=None):
    parser = runner.arguments(__doc__, SETS, "out-isoflop")
    parser.add_argument("--dataset", default="shakespeare_works", help="as in train.py (%(default)s)")
    parser.add_argument("--device", help="as in train.py (cpu; for the set gpu: auto)")
    args = parser.parse_args(argv)
    with errors_in_one_line("isoflop.py", "try fewer --jobs"):
        device = args.device or ("auto" if args.set == "gpu" else "cpu")
        if args.set == "gpu" and not args.device and pick_device(device) == "cpu":
            raise UserError("the set gpu found no GPU; on a CPU it takes days and needs --device=cpu")
        if args.set != "draw":
            run_one = prepared(execute, args.results, args.dataset, device)
            runner.run_all(SETS[args.set], Run, run_one, args.results, args.jobs)
        models = report.models_of(runner.read(args.results, Run))
        report.draw(models, args.results)
        nothing = f"Nothing to compare in {args.results} yet: the best models need all seeds"
        print("\n\n".join(report.tables(models).values()) or nothing)


if __name__ == "__main__":
    main()
