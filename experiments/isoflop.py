"""
The paper's comparison in miniature: dense GPTs and Mixture-of-Depths at equal training FLOPs.

    python -m experiments.isoflop laptop                           # one budget, some three hours on 2 cores
    python -m experiments.isoflop draw --results=results/isoflop   # the tables and pictures of this project's results

Results go into out-isoflop.

Each finished run is a line of RESULTS/runs.jsonl. What stands there is not trained again; stopped (Ctrl-C) and started
anew, a set goes on inside the runs that were under way. At the end it draws and prints.

Read from top to bottom: a run, what is declared, what is wanted next when so much is known, one run. The pool that
trains several at once is in experiments/runner.py, tables and pictures are in experiments/report.py.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("isoflop.py runs as a module, from the top of the repository: python -m experiments.isoflop")

import contextlib
import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace

import torch

from experiments import report, runner
from experiments.runner import FRESH, SEEDS, loss_for_choice, search, seeds
from mode import forward_flops
from support import checkpoint
from support.data import load_dataset
from support.evaluation import evaluate
from support.options import UserError, errors_in_one_line, pick_device
from train import Diverged, TrainConfig, model_config, number_of_steps, train

TOKENS_PER_STEP = 1024
HEAD_SIZE = 32


@dataclass(frozen=True)
class Run:
    """One training run; all else is the same for all of them (`options`)."""

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
    def plain(self):
        """Of the isoFLOP comparison: dense, or MoD as the paper recommends it."""
        shape = self.budget, self.n_layer, self.n_embd, self.route_every
        return self.route_every in (0, 2) and self == Run(*shape, self.learning_rate, self.seed)

    @property
    def experts(self):
        """Its name in EXPERTS; None without experts."""
        plain = Run(self.budget, self.n_layer, self.n_embd, 2, self.learning_rate, self.seed)
        return next((name for name, options in EXPERTS.items() if replace(plain, **options) == self), None)

    @property
    def name(self):
        """Of its folder: another one for each run."""
        kind = "mod" if self.route_every else "dense"
        special = {name: value for name, value in asdict(self).items() if value != getattr(Run, name, None)}
        digest = hashlib.sha256(json.dumps(special).encode()).hexdigest()[:8]
        return f"{self.budget:.0e}-{kind}-{self.n_layer}x{self.n_embd}-{self.learning_rate:g}-{self.seed}-{digest}"


# What is declared. Sizes are (layers, width) of the dense models; the MoD model of a size has a routed block after each
# of these layers, twice as many. So the dense model of the same size is its honest rival: the same, without the routed
# blocks.


SIZES = {
    1e12: ((1, 32), (1, 64), (1, 96), (1, 128), (2, 32), (2, 64)),
    3e12: ((1, 32), (1, 64), (1, 96), (1, 128), (2, 32), (2, 64), (2, 96), (3, 32), (3, 64)),
    1e13: ((1, 64), (1, 96), (1, 128), (1, 192), (2, 64), (2, 96), (2, 128), (3, 32), (3, 64), (3, 96), (3, 128),
           (4, 64)),
    3e13: ((2, 96), (2, 128), (3, 96), (3, 128), (4, 128)),
}  # fmt: skip
ABLATED = 3e12  # the budget at which one thing at a time is changed
VARIANTS = ("stochastic", "position", "no_gate", "sigmoid_gate", "loud_router", "exploring_noise")
GPU_SIZES = {  # the complete works are read 2 to 8 times here, then 3 to 11 times, then 3 to 14 times
    1e14: ((2, 128), (2, 192), (3, 128), (3, 192), (4, 128), (4, 192)),
    3e14: ((2, 192), (3, 192), (3, 256), (4, 192), (4, 256), (6, 192)),
    1e15: ((3, 256), (4, 256), (4, 384), (6, 256), (6, 384), (8, 256)),
}


def compared(budget, sizes, done):
    """
    The runs that are still needed to compare dense and MoD at one budget.

    First each size at learning rates around its best one, with one seed. Then the other seeds, at that learning rate,
    for the three best sizes of each kind and for the rival of the best MoD model. Then fresh seeds for the models that
    the paper's claims compare, the best by the mean of all seeds before. "Best" is by the half of the validation split
    that is for choosing.
    """
    todo, ranked = [], {}
    for route_every in (0, 2):
        chosen = []
        for n, width in sizes:
            run, missing = search(Run(budget, n * (2 if route_every else 1), width, route_every), done)
            todo += missing
            chosen.append(run)
        if not todo:
            ranked[route_every] = sorted(chosen, key=lambda run: loss_for_choice(run, done))
    if todo:
        return todo
    repeat = ranked[0][:3] + ranked[2][:3]
    top = ranked[2][0]
    repeat += [run for run in ranked[0][3:] if (run.n_layer, run.n_embd) == (top.n_layer // 2, top.n_embd)]
    todo = [again for run in repeat for again in seeds(run, done)]
    if todo:
        return todo
    runs = dict.fromkeys(model.run for model in report.judged(report.models_of(done), budget))  # one may be there twice
    # All seeds: a model of the claims need not be among the three best.
    return [again for run in runs for again in seeds(run, done, SEEDS[1:] + FRESH)]


def ablations(budget, sizes, done):
    """Then the runs that are still needed to change one thing at a time in the best MoD model of the budget."""
    todo = compared(budget, sizes, done)
    if todo:
        return todo
    base = report.best_of(report.plain(report.models_of(done), budget, "MoD"))
    for run in changed(base.run):
        run, missing = search(run, done)
        todo += missing or seeds(run, done)
    return todo


def changed(run):
    """The MoD model with one thing changed."""
    return [
        *(replace(run, capacity=share) for share in (0.0625, 0.25, 0.5, 1.0)),
        *(replace(run, route_every=n) for n in (1, 3) if n <= run.n_layer),
        replace(run, causal_method="router"),
        *(replace(run, variant=name) for name in VARIANTS),
        *(replace(run, block_size=T) for T in (64, 256)),
        # and the rival at those lengths, without which they say nothing
        *(replace(run, block_size=T, route_every=0, n_layer=run.n_layer // 2) for T in (64, 256)),
    ]


EXPERTS = {  # in every other block, those that MoD would route
    "MoE": dict(n_expert=4),
    "MoE, lowered capacity": dict(n_expert=4, expert_capacity=0.125),
    "staged MoDE": dict(n_expert=4, staged=True),
    "integrated MoDE": dict(n_expert=4, n_noop=4, expert_capacity=0.125),
}


def experts(done, budget=1e13):
    """MoD, MoE and MoDE of one shape, dense GPTs with and without the blocks that MoD routes; all at their best."""
    shape = Run(budget, 4, 128, 2)
    dense = replace(shape, route_every=0)
    with_experts = [replace(shape, **options) for options in EXPERTS.values()]
    todo = []
    for run in (shape, dense, replace(dense, n_layer=2), *with_experts):
        run, missing = search(run, done)
        todo += missing or seeds(run, done)
    return todo


def smoke(done):
    return compared(5e9, ((1, 32), (1, 64)), done)


def laptop(done):
    return ablations(ABLATED, SIZES[ABLATED], done)


def full(done):
    """All budgets, the cheap ones first: wherever it is stopped, whole budgets stand there."""
    todo = [(ablations if b == ABLATED else compared)(b, sizes, done) for b, sizes in SIZES.items()]
    return [run for part in todo for run in part]


def gpu(done):
    """What takes a GPU, by the same protocol."""
    return [run for b, sizes in GPU_SIZES.items() for run in compared(b, sizes, done)]


def long(done):
    """Width 64, trained ten times longer than at 1e13: MoD against the same model without its routed blocks."""
    runs = [
        Run(1e14, n_layer, 64, route_every, rate, seed)
        for seed in SEEDS[:2]
        for rate in (2.5e-3, 1.25e-3, 5e-3)
        for n_layer, route_every in ((4, 2), (2, 0))
    ]
    return [run for run in runs if run not in done]


SETS = {"smoke": smoke, "laptop": laptop, "full": full, "long": long, "gpu": gpu, "experts": experts}
SETS["draw"] = lambda done: []  # nothing new


# One run


def options(run, vocabulary, dataset, out_dir, device):
    """The run as options of train.py: all that is the same for all runs stands here."""
    config = TrainConfig(
        out_dir=str(out_dir),
        dataset=dataset,
        **{name: value for name, value in asdict(run).items() if name != "budget"},
        n_head=run.n_embd // HEAD_SIZE,
        batch_size=TOKENS_PER_STEP // run.block_size,
        flop_budget=run.budget,
        min_lr=run.learning_rate / 10,
        eval_iters=1,  # what counts is evaluated once, at the end, by `execute`
        device=device,
        dtype="float32",
        compile="False",
    )
    flops = 3 * config.batch_size * forward_flops(model_config(config, {"vocab_size": vocabulary}), run.block_size)
    steps = number_of_steps(config, flops)
    return replace(config, warmup_iters=steps // 20, eval_interval=math.ceil(steps / 4))  # it saves when it evaluates


def execute(run, out_dir, dataset, device):
    """Train and evaluate one run; returns its line of runs.jsonl. Called in a process of its own, with one thread."""
    return train_one(run, out_dir, dataset, device)["row"]


def train_one(run, out_dir, dataset, device, **more):
    """As `execute`, with `more` options of train.py; returns what there is: model, meta, data, config, rows, row."""
    torch.set_num_threads(1)
    log_file, out_dir = out_dir / "log.txt", out_dir / "run"
    out_dir.mkdir(parents=True, exist_ok=True)
    meta, data = load_dataset(dataset, run.block_size)
    config = replace(options(run, meta["vocab_size"], dataset, out_dir, device), **more)
    half = len(data["val"]) // 2
    row = {"run": asdict(run), "data": meta["text_sha256"][:16], "choose": None, "report": None}
    with open(log_file, "a", encoding="utf-8") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                rows = train(replace(config, resume=(out_dir / "last.json").is_file()))
            except Diverged:
                return {"row": row}
            model, info = checkpoint.load(out_dir, "last", config.device)
    # Whole halves; a choice may be made on the first one only, and every figure is from the second.
    row["choose"] = evaluate(model, data["val"][:half], batch_size=64, eval_iters=len(data["val"]))
    row["report"] = evaluate(model, data["val"][half:], batch_size=64, eval_iters=len(data["val"]))
    row |= {
        "parameters": model.num_parameters(),
        "forward_flops_per_token": model.flops(run.block_size) / run.block_size,
        "steps": rows[-1]["step"],
        "flops": rows[-1]["flops"],
        "train_loss": rows[-1]["train_loss"],
        "train_seconds": rows[-1]["train_seconds"],
        "versions": {name: info["versions"][name] for name in ("torch", "hardware", "threads")},
    }
    return {"model": model, "meta": meta, "data": data, "config": config, "rows": rows, "row": row}


def main(argv=None):
    parser = runner.arguments(__doc__.split(":")[0], SETS, "out-isoflop")
    parser.add_argument("--dataset", default="shakespeare_works", help="as train.py's (%(default)s)")
    parser.add_argument("--device", help="as train.py's (cpu; with the set gpu: auto)")
    args = parser.parse_args(argv)
    with errors_in_one_line("isoflop.py", "try fewer --jobs"):
        device = args.device or "cpu"
        if args.set == "gpu" and not args.device:
            device = pick_device("auto")
            if device == "cpu":
                raise UserError("the set gpu found no GPU; on a CPU it takes days, and begins only with --device=cpu")
        train_one_of_them = args.set != "draw" and prepared(execute, args.results, args.dataset, device)
        done = runner.run_all(SETS[args.set], Run, train_one_of_them, args.results, args.jobs)
        print(report.write(report.models_of(done), args.results))


def prepared(execute, results, dataset, device):
    """execute(run, folder) with the rest given; the data is there, and the lines in `results` are of the same text."""
    meta, _ = load_dataset(dataset, TrainConfig.block_size)
    if any(row["data"] != meta["text_sha256"][:16] for row in runner.read(results, Run).values()):
        raise UserError(f"{results} holds runs on another text; name another folder by --results")
    return functools.partial(execute, dataset=dataset, device=pick_device(device))


if __name__ == "__main__":
    main()
