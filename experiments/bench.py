"""
Do saved FLOPs become saved time? A Mixture-of-Depths GPT against a dense one, in training and sampling:

    python -m experiments.bench
    python -m experiments.bench --n_layer=12 --n_head=12 --n_embd=768 --block_size=512 --part=sampling
    python -m experiments.bench --check --device=mps

Prints medians of alternating runs, after untimed warm-up runs; the last line is JSON. --check only compares an untested
device's results with the CPU's.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("bench.py runs from the top of the repository: python -m experiments.bench")

import copy
import dataclasses
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from tqdm import tqdm

from cache import KVCache, prefill, set_dtype, step, stream
from experiments.runner import commit
from mod import GPT, GPTConfig
from mode import MoDEConfig, build, forward_flops
from sample import SampleConfig, fetch
from support.options import UserError, at_least, errors_in_one_line, load, pick_device
from support.report import hardware
from train import TrainConfig, configure_optimizer, model_config, resolve, training_step


@dataclass
class BenchConfig(MoDEConfig):
    """All options. Those of the model come from mod.py and mode.py, with other defaults. The comments are the help."""

    n_layer: int = 6
    n_head: int = 6
    n_embd: int = 384
    block_size: int = 256
    vocab_size: int = 65
    bias: bool = False
    n_expert: int = 0
    against: str = ""  # shape of the dense GPT, layers x width as in 1x96; empty: the same shape
    part: Literal["both", "training", "sampling"] = "both"  # what to measure
    batch_size: int = 16  # training: sequences per step; sampling is measured with batches of 1 and 16
    new_tokens: int = 0  # sampling: tokens to generate at the end of the window; 0: a quarter of it, at most 64
    repeats: int = 10  # timed training steps, or generated texts, of each model
    warmup: int = 2  # untimed ones before them
    device: str = "auto"  # auto (the best available), cpu, cuda, mps, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if the GPU has it
    compile: Literal["auto", "True", "False"] = "auto"  # compile training; auto: on CUDA under Linux
    check: bool = False  # only compare the device's results with the CPU's

    def __post_init__(self):
        pass  # not GPTConfig's checks: `model_config` makes them


def main(argv=None):
    with errors_in_one_line("bench.py", "take a smaller --batch_size or model"):
        options = load(BenchConfig, argv, __doc__.split(":")[0])
        if options.check:
            sys.exit(1 if check(options) else 0)
        print(json.dumps(bench(options)))


def bench(options):
    """The results as a dict; times in seconds, *_ratio is MoD over dense, *_speedup dense time over MoD time."""
    new_tokens = options.new_tokens or max(1, min(64, options.block_size // 4))
    options = dataclasses.replace(options, new_tokens=new_tokens)
    at_least(1, options, "batch_size repeats route_every new_tokens")
    at_least(0, options, "warmup")
    if options.part != "training" and options.new_tokens >= options.block_size:
        raise UserError(f"new_tokens must leave room for a prompt in block_size {options.block_size}; make it smaller")
    if options.part != "training" and (options.n_expert or options.variant or options.causal_method != "predictor"):
        raise UserError("sampling is measured for the paper's MoD only; with experts or variants use --part=training")
    if options.route_every > options.n_layer:
        raise UserError(f"route_every {options.route_every} routes none of {options.n_layer} blocks; use more blocks")
    mod = model_config(options, {"vocab_size": 0})
    configs = {"mod": mod, "dense": dense_config(mod, options.against)}
    # train.py's options, all but these at their defaults
    machine = resolve(TrainConfig(device=options.device, dtype=options.dtype, compile=options.compile))
    return {
        **(bench_training(configs, options, machine) if options.part != "sampling" else {}),
        **(bench_sampling(configs, options, machine) if options.part != "training" else {}),
        **asdict(options),
        "device": hardware(machine.device),
        "dtype": machine.dtype,
        "compile": machine.compile,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "commit": commit(),
    }


def dense_config(mod, shape):
    """The dense GPT to compare with: of the given shape, such as "1x96", with heads of the same size as MoD's."""
    if not shape:
        return dataclasses.replace(mod, route_every=0)
    head_size = mod.n_embd // mod.n_head
    n_layer, _, n_embd = (int(part) if part.isdecimal() else 0 for part in shape.partition("x"))
    if not n_layer or not n_embd or n_embd % head_size:
        raise UserError(
            f"against is layers x width, the width in heads of {head_size}, such as 1x{head_size}; got {shape!r}"
        )
    return dataclasses.replace(mod, route_every=0, n_layer=n_layer, n_embd=n_embd, n_head=n_embd // head_size)


def in_turn(measure, options):
    """measure(name, repeat) of both models in turn, so a disturbance hits both: {name: results after the warm-up}."""
    results = {"mod": [], "dense": []}
    for repeat in tqdm(range(options.warmup + options.repeats), disable=None, leave=False):
        for name, kept in results.items():
            kept.append(measure(name, repeat))
    return {name: kept[options.warmup :] for name, kept in results.items()}


def clocked(work, device):
    """The seconds that work() takes, and its result."""
    device = torch.device(device)
    wait = (lambda: None) if device.type == "cpu" else lambda: torch.accelerator.synchronize(device)
    wait()  # a GPU computes while Python continues
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


# Training


def bench_training(configs, options, machine):
    flops = {name: forward_flops(config, config.block_size) for name, config in configs.items()}
    flop_ratio = flops["mod"] / flops["dense"]
    experts = "MoDE" if options.staged or options.n_noop else "MoE"
    kind = experts if isinstance(configs["mod"], MoDEConfig) else "MoD"
    print(f"Training: a {kind} step has {flop_ratio:.3f} of the dense step's FLOPs")
    steps = {name: train_step_of(config, options.batch_size, machine) for name, config in configs.items()}
    seconds = in_turn(lambda name, repeat: clocked(steps[name], machine.device)[0], options)
    mod, dense = statistics.median(seconds["mod"]), statistics.median(seconds["dense"])
    print(f"Training: it takes {mod:.4f} s against {dense:.4f} s, {mod / dense:.3f} of the time")
    print(f"Training: the time ratio is {mod / dense / flop_ratio:.2f} times the FLOP ratio")
    return {
        "train_time_ratio": round(mod / dense, 4),
        "train_flop_ratio": round(flop_ratio, 4),
        "mod_step_seconds": round(mod, 5),
        "dense_step_seconds": round(dense, 5),
    }


def train_step_of(config, batch_size, machine):
    """A function that makes one training step of train.py, always on the same random tokens."""
    torch.manual_seed(0)
    model = build(config).to(machine.device)
    optimizer, scaler = configure_optimizer(model, machine), torch.amp.GradScaler("cpu", enabled=False)
    idx = torch.randint(config.vocab_size, (batch_size, config.block_size), device=machine.device)
    if machine.compile == "True":
        model.compile()
    return lambda: training_step(model, model, optimizer, scaler, lambda *_: (idx, idx), 0, machine)


# Sampling


def bench_sampling(configs, options, machine):
    models = {name: sampling_model(config, machine) for name, config in configs.items()}
    results = {B: sample_batch(B, models, options, machine) for B in (1, 16)}
    return {**results[1], "batch_16": results[16]}


def sample_batch(B, models, options, machine):
    """Measure both models, each generating B texts at once."""
    runs = in_turn(lambda name, seed: generate(models[name], B, seed, options, machine), options)
    results = {}
    for name, kept in runs.items():
        median = {key: statistics.median(run[key] for run in kept) for key in kept[0]}
        results[name] = {
            "tokens_per_second": round(B / median["step_seconds"], 2),
            "prefill_seconds": round(median["prefill_seconds"], 5),
            "cache_bytes": int(median["cache_bytes"]),
        }
    mod, dense = results["mod"], results["dense"]
    ratios = {
        "decode_speedup": round(mod["tokens_per_second"] / dense["tokens_per_second"], 4),
        "cache_bytes_ratio": round(mod["cache_bytes"] / dense["cache_bytes"], 4),
        # A pass over the prompt against a step. Over the whole window it would take a little longer.
        "cache_speedup": round(mod["prefill_seconds"] / B * mod["tokens_per_second"], 2),
        "taken": round(statistics.mean(run["taken"] for run in runs["mod"]), 4),
    }
    print(
        f"Sampling {B:2} at once: {ratios['decode_speedup']:.2f} times as fast "
        f"({mod['tokens_per_second']:,.1f} against {dense['tokens_per_second']:,.1f} tokens/s), "
        f"{ratios['taken']:.1%} taken"
    )
    return {**ratios, **results}


def sampling_model(config, machine):
    """A model of random weights whose predictors take a share of `capacity`; untrained, they would take any share."""
    torch.manual_seed(0)
    model = set_dtype(GPT(config).to(machine.device), getattr(torch, machine.dtype)).eval()  # as sample.py does
    idx = torch.randint(config.vocab_size, (8, config.block_size), device=machine.device)
    with torch.no_grad():
        for block in model.routed_blocks:  # in order, because each block changes what the later ones see
            model(idx, routing="causal")
            block.predictor[-1].bias -= block.logits.float().quantile(1 - config.capacity)
    return model


def generate(model, B, seed, options, machine):
    """One run: prompts of random tokens, then new_tokens tokens that fill the window."""
    torch.manual_seed(seed)
    cache = KVCache(model.config, B)
    prompts = torch.randint(model.config.vocab_size, (B, options.block_size - options.new_tokens)).tolist()
    # As sample.py does, with its options.
    tokens = stream(model, prompts, options.new_tokens + 1, cache, temperature=SampleConfig.temperature)
    prefill_seconds, _ = clocked(lambda: fetch(model, next(tokens), cache.n_read[0]), machine.device)
    seconds, fetched = clocked(lambda: [fetch(model, token, 1) for token in tokens], machine.device)
    return {
        "prefill_seconds": prefill_seconds,
        "step_seconds": seconds / options.new_tokens,
        "cache_bytes": cache.nbytes,
        "taken": torch.stack([taken for _, taken in fetched]).double().mean().item(),  # NaN if no block is routed
    }


# Check a device

# Sequences, tokens in each, width, tokens taken of each sequence.
SIZES = {"shakespeare_mod": (64, 256, 384, 32), "owt_mod_124m": (16, 1024, 768, 128), "half": (16, 1024, 768, 512)}


def check(options):
    """Compare the device with the CPU on what routing needs. Prints a line for each, returns how many differ."""
    device = pick_device(options.device)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=65, n_layer=4, n_head=2, n_embd=128))  # head size 64, as in GPT-2
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3 if p.dim() > 1 else 1)  # so that every block matters
    idx = torch.randint(65, (4, 256))

    def gradient(model, idx, name):
        model.zero_grad()
        _, loss = model(idx, idx)
        (loss + model.routing_loss()).backward()
        return torch.cat([p.grad.flatten() for n, p in model.named_parameters() if name in n])

    def step_by_step(model, idx):
        cache = KVCache(model.config, len(idx))
        first = prefill(model, cache, idx[:, :200].tolist())
        return torch.stack([first, *(step(model, cache, token) for token in idx.T[200:])])

    checks = {}
    for name, (B, T, C, k) in SIZES.items():  # each operation that routing uses, at the sizes of the presets
        r, x = torch.randn(B, T), torch.randn(B * T, C)
        picked = r.topk(k, dim=1).indices
        index = (picked + torch.arange(0, B * T, T)[:, None]).flatten()
        checks |= {
            f"{name}: top-k in order": (lambda r, k=k: r.topk(k, dim=1).indices.int().sort(dim=1).values.long(), r),
            f"{name}: top-k for experts": (lambda r, k=k: r[:, :, None].topk(k, dim=1).indices, r),
            f"{name}: scatter": (lambda r, i: torch.zeros_like(r, dtype=torch.bool).scatter(1, i, True), r, picked),
            f"{name}: gather": (lambda r, i: r.masked_fill(r < 0, 0.0).gather(1, i), r, picked),
            f"{name}: count": (lambda r: (r > 0).sum(dim=1), r),
            f"{name}: stable sort": (lambda r: (r > 0).int().argsort(dim=1, stable=True), r),
            f"{name}: sort for experts": (lambda r: (r > 0).int().view(-1, 4).argsort(dim=0, stable=True), r),
            f"{name}: index_select": (lambda x, i: x.index_select(0, i), x, index),
            f"{name}: index_add": (lambda x, i: x.index_add(0, i, x[: len(i)]), x, index),
        }
    checks |= {
        "a top-k pass": (lambda model, idx: model(idx)[0], model, idx),
        "gradient of the trunk": (lambda model, idx: gradient(model, idx, "transformer"), model, idx),
        "gradient of the routers": (lambda model, idx: gradient(model, idx, "router"), model, idx),
        "gradient of the predictors": (lambda model, idx: gradient(model, idx, "predictor"), model, idx),
        "a causal pass": (lambda model, idx: model(idx, routing="causal")[0], model, idx),
        "with the cache, one text": (step_by_step, model, idx[:1]),
        "with the cache, four texts": (step_by_step, model, idx),
    }
    different = 0
    for name, (work, *inputs) in checks.items():
        expected = work(*inputs)
        try:
            got = work(*(copy.deepcopy(i).to(device) for i in inputs)).cpu()
            difference = (got.double() - expected.double()).abs().max().item()
            same = difference <= (1e-3 * expected.abs().max().item() if expected.is_floating_point() else 0)
            result = "same" if same else f"DIFFERENT by up to {difference:.3g}"
        except (RuntimeError, NotImplementedError) as error:
            same, result = False, f"FAILED: {str(error).splitlines()[0]}"
        different += not same
        print(f"{name:36} {result}")
    print(f"{device} against cpu, PyTorch {torch.__version__}: {different or 'none'} of {len(checks)} different")
    return different


if __name__ == "__main__":
    main()
