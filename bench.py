"""
Does the clock follow the FLOPs? Step time of a Mixture-of-Depths GPT against a dense GPT of the same shape:

    python bench.py
    python bench.py --n_layer=12 --n_embd=768 --n_head=12 --block_size=1024 --batch_size=4

Predicts first, then measures: training steps of both models in turn, medians, warm-up apart. The last line is JSON.
"""

import dataclasses
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch
from tqdm import tqdm

from configurator import UserError, load, option
from mod import GPT, GPTConfig, forward_flops
from train import TrainConfig, autocast, configure_optimizer, resolve


@dataclass
class BenchConfig:
    n_layer: int = option(6, "blocks")
    n_head: int = option(6, "attention heads")
    n_embd: int = option(384, "width")
    block_size: int = option(256, "context")
    vocab_size: int = option(65, "vocabulary")
    batch_size: int = option(16, "sequences per step")
    capacity: float = option(GPTConfig.capacity, "share of the tokens that a routed block processes")
    route_every: int = option(GPTConfig.route_every, "2: every other block is routed")
    repeats: int = option(10, "timed steps of each model")
    warmup: int = option(2, "untimed steps before them")
    device: str = option("auto", "auto (the best there is), cpu, cuda, mps, ...")
    dtype: str = option("auto", "auto: bfloat16 where the GPU has it", choices=("auto", "float32", "bfloat16"))
    compile: str = option("auto", "torch.compile; auto: on CUDA under Linux", choices=("auto", "True", "False"))


def main(argv=None):
    try:
        print(json.dumps(bench(load(BenchConfig, argv, __doc__.split(":")[0]))))
    except UserError as error:
        sys.exit(f"bench.py: {error}")


def bench(options):
    """The figures as a dict; times in seconds per training step, ratios are MoD over dense."""
    for name, least in (("batch_size", 1), ("repeats", 1), ("warmup", 0), ("route_every", 1)):
        if getattr(options, name) < least:
            raise UserError(f"{name} must be at least {least}, got {getattr(options, name)}")
    names = {field.name for field in dataclasses.fields(GPTConfig)} & asdict(options).keys()
    try:
        mod = GPTConfig(**{name: getattr(options, name) for name in names}, bias=False)
    except ValueError as error:
        raise UserError(str(error)) from None
    if options.route_every > options.n_layer:
        raise UserError(f"route_every {options.route_every} routes none of {options.n_layer} blocks; use more blocks")
    dense = dataclasses.replace(mod, route_every=0)
    flop_ratio = forward_flops(mod, mod.block_size) / forward_flops(dense, mod.block_size)
    print(f"Predicted: a MoD step has {flop_ratio:.3f} of the dense step's FLOPs")

    config = resolve(TrainConfig(device=options.device, dtype=options.dtype, compile=options.compile))
    steps = {name: training_step(c, options.batch_size, config) for name, c in (("mod", mod), ("dense", dense))}
    times = {name: [] for name in steps}
    for repeat in tqdm(range(options.warmup + options.repeats), disable=None, leave=False):
        for name, step in steps.items():  # in turn, so that what slows the machine slows both
            seconds = clocked(step, config.device)
            if repeat >= options.warmup:
                times[name].append(seconds)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    time_ratio = median["mod"] / median["dense"]
    print(f"Measured:  {median['mod']:.4f} s against {median['dense']:.4f} s, ratio {time_ratio:.3f}")
    print(f"The clock is at {time_ratio / flop_ratio:.2f} times the FLOP ratio")
    return {
        "train_time_ratio": round(time_ratio, 4),
        "train_flop_ratio": round(flop_ratio, 4),
        "mod_step_seconds": round(median["mod"], 5),
        "dense_step_seconds": round(median["dense"], 5),
        **asdict(options),
        "device": torch.cuda.get_device_name(config.device) if config.device.startswith("cuda") else config.device,
        "dtype": config.dtype,
        "compile": config.compile,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }


def training_step(model_config, batch_size, config):
    """A function that makes one training step (forward, backward, clipping, AdamW) on random tokens."""
    torch.manual_seed(0)
    model = GPT(model_config).to(config.device)
    optimizer = configure_optimizer(model, config)
    idx = torch.randint(model_config.vocab_size, (batch_size, model_config.block_size), device=config.device)
    if config.compile == "True":
        model.compile()

    def step():
        with autocast(config):
            _, loss = model(idx, idx)
        (loss + model.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def clocked(step, device):
    def synchronize():
        if device != "cpu":  # a GPU works on while Python goes ahead
            torch.accelerator.synchronize(torch.device(device))

    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
