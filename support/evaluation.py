"""Losses and routing figures of a model over a split."""

import contextlib
import math
from pathlib import Path

import numpy as np
import torch

from mod import evaluating
from support import checkpoint, data, ranks
from support.options import UserError
from variants import Control


@torch.no_grad()
def evaluate(model, tokens, batch_size, eval_iters, dtype="float32", stop=None):
    """
    Losses in nats per token over fixed windows of `tokens`, evenly spaced and without overlap: at most eval_iters
    batches of batch_size windows, on the model's device.

    Compare val_loss_causal with a dense model's loss, because the causal model is the one that samples. In
    val_loss_topk the routed blocks look ahead. taken: the share of tokens that each routed block processed in the
    causal pass. The predictor, or what decides in its place, is scored in the top-k pass: its accuracy, the accuracy of
    the better constant answer (base rate), and its recall. (Controls are not: they learn nothing.) Returns None if
    `stop` is requested meanwhile on any rank.
    """
    T, device = model.config.block_size, model.lm_head.weight.device
    n_windows = min(eval_iters * batch_size, (len(tokens) - 1) // T)
    starts = np.linspace(0, len(tokens) - 1 - T, n_windows).astype(int)
    starts = [starts[i : i + batch_size] for i in range(0, n_windows, batch_size)]
    routed, measured = model.routed_blocks, {}
    scored = model.routing_modules or [block for block in routed if not isinstance(block, Control)]
    none = torch.zeros(0, dtype=torch.bool, device=device)  # a dense model makes no decisions
    with evaluating(model):
        for i in ranks.share(len(starts)):
            if stop is not None and stop.requested:
                break
            x, y = data.windows(tokens, starts[i], T, device)
            torch.manual_seed(data.seed_of(0, i))  # for variants that draw noise
            with autocast(device, dtype):
                # .forward runs eagerly even if the model is compiled: the size of a causal batch depends on the data.
                _, topk_loss = model.forward(x, y, routing="topk")
                taken = torch.cat([none, *(m.taken.flatten() for m in scored)])
                predicted = torch.cat([none, *(m.logits.flatten() > 0 for m in scored)])
                _, causal_loss = model.forward(x, y, routing="causal") if routed else (None, topk_loss)
            agree, hit, member = (taken == predicted).sum(), (taken & predicted).sum(), taken.sum()
            total = torch.ones_like(taken).sum()  # on the device: a Python number would have to be copied there
            counts = torch.stack([agree, hit, member, total, *(block.taken.sum() for block in routed)])
            measured[i] = torch.stack([causal_loss, topk_loss]) * len(x), counts
    # One row per batch, filled by the rank that has it, then summed over the ranks. So the result is the same to the
    # last bit on any number of ranks.
    table = torch.zeros(len(starts), 6 + len(routed), dtype=torch.float64)
    if measured:  # the figures leave the device only here, those of all batches at once
        losses, counts = (torch.stack(figures).cpu().double() for figures in zip(*measured.values()))
        table[list(measured)] = torch.cat([losses, counts], dim=1)
    if ranks.any_rank(stop is not None and stop.requested):
        return None
    columns = zip(*ranks.sum_over_ranks(table).tolist())
    causal, topk, agree, hit, member, total, *taken = (sum(column) for column in columns)
    result = {"val_loss_causal": causal / n_windows, "val_loss_topk": topk / n_windows}
    if routed:
        result["taken"] = [round(tokens_taken / (n_windows * T), 5) for tokens_taken in taken]
    if total:
        capacity = member / total
        result |= {
            "predictor_accuracy": agree / total,
            "predictor_base_rate": max(capacity, 1 - capacity),
            "predictor_recall": hit / member,
        }
    return result


def bits_per_byte(figures, meta):
    """The causal loss in bits per byte of text, for tokens that are longer than a byte; {} for characters."""
    bytes_per_token = meta.get("val_bytes_per_token")
    return {"bits_per_byte": figures["val_loss_causal"] / math.log(2) / bytes_per_token} if bytes_per_token else {}


def evaluate_checkpoint(config):
    """
    Evaluate the best checkpoint in config.out_dir (config: a TrainConfig) on eval_iters batches of validation windows.
    Returns the row, as in metrics.jsonl, and the run's max_iters. Raises UserError if the data set is not the run's.
    """
    out_dir = Path(config.out_dir)
    model, info = checkpoint.load(out_dir, "best", config.device)
    if "config" not in info:
        raise UserError(f"{out_dir} does not come from train.py, so its data is unknown; name a run's folder")
    with ranks.main_first():
        meta, splits = data.load_dataset(config.dataset, model.config.block_size, check=ranks.is_main())
    if info["data"]["sha256"] != meta["sha256"] or meta["vocab_size"] > model.config.vocab_size:
        raise UserError(
            f"{out_dir} was trained on {info['data']['source']!r}, but {config.dataset} holds {meta['source']!r}; "
            "name the run's data set with --dataset"
        )
    figures = evaluate(model, splits["val"], config.batch_size, config.eval_iters, config.dtype)
    return {"step": info["step"], **figures, **bits_per_byte(figures, meta)}, info["config"]["max_iters"]


def autocast(device, dtype):
    """A context that computes matrix products in `dtype`, the name of a PyTorch type."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))
