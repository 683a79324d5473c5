"""The lines that a run prints: its model, its progress, its evaluations."""

import contextlib
import dataclasses
import platform
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mod import capacity_in_tokens
from mode import MoDE, forward_flops
from support import ranks
from support.options import UserError

# Peak FLOPs per second of 16-bit matrix products without sparsity, as the makers state them.
PEAK_FLOPS = {
    "V100": 125e12,
    "T4": 65e12,
    "A100": 312e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


def peak_flops(device, dtype):
    """The peak FLOPs per second of all the run's devices, or None if it is unknown, as for float32."""
    if not device.startswith("cuda") or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    known = [key for key in PEAK_FLOPS if re.search(rf"\b{key}\b", name)]  # an L40 is no L4
    return PEAK_FLOPS[max(known, key=len)] * ranks.ranks() if known else None


def step_of(step, max_iters):
    return f"step {step:>{len(f'{max_iters:,}')},}/{max_iters:,}"


def report(row, max_iters):
    line = f"{step_of(row['step'], max_iters)}  val loss {row['val_loss_causal']:.4f}"
    if "bits_per_byte" in row:
        line += f" ({row['bits_per_byte']:.4f} bits per byte)"
    if "taken" not in row:
        return line
    line += f" causal, {row['val_loss_topk']:.4f} top-k  taken {' '.join(f'{share:.1%}' for share in row['taken'])}"
    if "predictor_accuracy" not in row:
        return line
    return (
        f"{line}  predictor {row['predictor_accuracy']:.1%} right "
        f"(base rate {row['predictor_base_rate']:.1%}, recall {row['predictor_recall']:.1%})"
    )


def describe(model, device, dtype, compiled):
    c, routed = model.config, len(model.routed_blocks)
    variant = f", {c.variant}" if c.variant else ""

    def real(capacity):  # a short context rounds it: 12.5% of 4 tokens is 1 token, 25%
        return f"{capacity_in_tokens(capacity, c.block_size) / c.block_size:.1%}"

    shares = sorted({getattr(block, "capacity", c.capacity) for block in model.routed_blocks}, reverse=True)
    capacity = " to ".join(dict.fromkeys(real(share) for share in (*shares[:1], *shares[-1:])))
    kind = f"MoD ({routed} of {c.n_layer} blocks routed at {capacity} capacity{variant})" if routed else "Dense"
    if routed and isinstance(model, MoDE):
        noops = f" and {c.n_noop} no-ops" if c.n_noop else ""
        # Inside a staged block the experts choose among the tokens it takes, so only the option is shown.
        share = f"{c.expert_capacity:.1%}" if c.staged else real(c.expert_capacity)
        what = f"{c.n_expert} experts at {share} capacity{noops}"
        around = f", routed at {real(c.capacity)}" if c.staged else ""
        kind = f"{'MoDE' if c.staged or c.n_noop else 'MoE'} ({routed} of {c.n_layer} blocks with {what}{around})"
    share = model.flops(c.block_size) / forward_flops(dataclasses.replace(c, route_every=0), c.block_size)
    saving = f", {share:.2f} of the dense FLOPs" if routed else ""
    where = device if ranks.ranks() == 1 else f"{ranks.ranks()} ranks, the first on {device}"
    return (
        f"{kind}: {c.n_layer} layers x {c.n_embd} wide, context {c.block_size}, {model.num_parameters():,} parameters"
        f"{saving}; on {where}, {dtype}{', compiled' if compiled else ''}"
    )


def hardware(device):
    """The model of the GPU, or of the CPU and the instructions that PyTorch uses there, on which rounding depends."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    listed = Path("/proc/cpuinfo")  # of Linux; elsewhere `platform` knows the model, or at least its kind
    model = re.search(r"model name\s*: (.*)", listed.read_text(encoding="utf-8") if listed.is_file() else "")
    name = model[1] if model else platform.processor() or platform.machine()
    return f"{name}, {torch.backends.cpu.get_cpu_capability() if device == 'cpu' else device}"


def versions(device):
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "platform": platform.platform(),
        "hardware": hardware(device),
        "threads": torch.get_num_threads(),
        "ranks": ranks.ranks(),
    }


class ProgressLine:
    """
    The line at the bottom of the terminal: percent, time left, loss, tokens/s and, if known, MFU. Without a terminal,
    as in `train.py > log`, each update is a line of its own.
    """

    def __init__(self, progress, max_iters, tokens_per_step, step_flops, device, dtype):
        hidden = None if ranks.is_main() else True  # None: hidden without a terminal
        self.bar = tqdm(total=max_iters, initial=progress.step, disable=hidden, unit="step", dynamic_ncols=True)
        self.max_iters, self.tokens_per_step, self.step_flops = max_iters, tokens_per_step, step_flops
        self.peak = peak_flops(device, dtype)
        self.step, self.seconds = progress.step, progress.train_seconds  # at the last update

    def update(self, progress):
        steps, seconds = progress.step - self.step, progress.train_seconds - self.seconds
        self.step, self.seconds = progress.step, progress.train_seconds
        mfu = f", MFU {steps * self.step_flops / seconds / self.peak:.0%}" if self.peak else ""
        speed = f"{steps * self.tokens_per_step / seconds:,.0f} tokens/s{mfu}"
        self.bar.set_postfix_str(f"loss {progress.loss:.3f}, {speed}", refresh=False)
        self.bar.update(steps)
        if ranks.is_main() and (self.bar.disable or not sys.stdout.isatty()):
            with contextlib.suppress(OSError):  # the Ctrl-C that stops us may also have closed stdout
                print(f"{step_of(progress.step, self.max_iters)}  train loss {progress.loss:.4f}  {speed}", flush=True)

    def close(self):
        self.bar.close()


def import_wandb():
    try:
        import wandb

        if not hasattr(wandb, "init"):  # an empty folder wandb/ can be imported too
            raise ImportError
    except ImportError:
        raise UserError("--wandb needs Weights & Biases: pip install wandb") from None
    return wandb
