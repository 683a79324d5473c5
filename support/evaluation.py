"""Losses and routing figures of a model over a split."""

import contextlib

import numpy as np
import torch

from support import data, ranks


@torch.no_grad()
def evaluate(model, tokens, batch_size, eval_iters, dtype="float32", stop=None):
    """
    Losses in nats per token over fixed windows of `tokens`, evenly spaced and never overlapping: eval_iters batches of
    batch_size windows at most, on the model's device.

    val_loss_causal is that of a model that can be sampled from: the one to compare with a dense model's.
    val_loss_topk lets the routed blocks look at the whole window. taken: the share of tokens that each routed block
    processed in the causal pass. The predictor (with causal_method "router" the router; the controls have none) is
    judged within the top-k pass: how often it agrees with top-k, beside the accuracy of the better constant guess
    (base rate), and its recall. None if `stop` is requested on the way, by any rank.
    """
    T, device = model.config.block_size, model.lm_head.weight.device
    training = model.training
    model.eval()
    n_windows = min(eval_iters * batch_size, (len(tokens) - 1) // T)
    starts = np.linspace(0, len(tokens) - 1 - T, n_windows).astype(int)
    starts = [starts[i : i + batch_size] for i in range(0, n_windows, batch_size)]
    routed = model.routed_blocks
    # A row for each batch, filled in by the rank that has it, then summed over the ranks: the sum of the rows is the
    # same to the last bit, however many there are.
    table = torch.zeros(len(starts), 6 + len(routed), dtype=torch.float64)
    for i in ranks.share(len(starts)):
        if stop is not None and stop.requested:
            break
        x, y = data.windows(tokens, starts[i], T, device)
        torch.manual_seed(data.seed_of(0, i))  # the stochastic control draws its noise from here
        with autocast(device, dtype):
            # .forward runs eagerly, also where the model is compiled: the size of a causal batch depends on the data.
            _, topk_loss = model.forward(x, y, routing="topk")
            decisions = [(one.taken, one.logits > 0) for one in model.deciders]
            _, causal_loss = model.forward(x, y, routing="causal") if routed else (None, topk_loss)
        agree = sum((taken == foretold).sum().item() for taken, foretold in decisions)
        hit = sum((taken & foretold).sum().item() for taken, foretold in decisions)
        member = sum(taken.sum().item() for taken, _ in decisions)
        made = sum(taken.numel() for taken, _ in decisions)
        taken = [(block.taken.sum() / T).item() for block in routed]
        losses = [causal_loss.item() * len(x), topk_loss.item() * len(x)]
        table[i] = torch.tensor([*losses, agree, hit, member, made, *taken], dtype=torch.float64)
    model.train(training)
    if ranks.any_rank(stop is not None and stop.requested):
        return None
    columns = zip(*ranks.sum_over_ranks(table).tolist())
    causal, topk, agree, hit, member, made, *taken = (sum(column) for column in columns)
    result = {"val_loss_causal": causal / n_windows, "val_loss_topk": topk / n_windows}
    if routed:
        result["taken"] = [round(tokens_taken / n_windows, 5) for tokens_taken in taken]
    if model.deciders and model.config.selection == "learned":
        capacity = member / made
        result |= {
            "predictor_accuracy": agree / made,
            "predictor_base_rate": max(capacity, 1 - capacity),
            "predictor_recall": hit / member,
        }
    return result


def autocast(device, dtype):
    """A context in which matrix products are computed in `dtype`, the name of a PyTorch type."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, dtype=getattr(torch, dtype))
