"""
A page to explore a text: which routed block takes which token, with causal and with top-k routing, and why.

It is one HTML file that needs no network, made from page.html.
"""

import html
import json
from pathlib import Path

import torch

from mod import evaluating
from mode import MoDE
from support.depth import visible
from support.options import UserError


def show(model, tokenizer, text):
    """The page of a text (a string), to display in a notebook."""
    from IPython.display import HTML

    content = html.escape(page(model, tokenizer, tokenizer.encode(text)))
    # In the sandbox, the page cannot reach the notebook.
    frame = f'<iframe sandbox="allow-scripts" srcdoc="{content}" width="100%" height="800" style="border: 0"></iframe>'
    return HTML(f"<div>{frame}</div>")  # IPython warns of a frame alone


def page(model, tokenizer, ids):
    """
    The page as a string of HTML, for the first block_size of the token ids in a list.

    Raises UserError for a model without routed blocks or with experts.
    """
    check(model)
    data = json.dumps(measure(model, tokenizer, ids), allow_nan=False, separators=(",", ":"))
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    # JSON may write "<" as \u003c. So no text can end the <script> that holds it.
    return template.replace("DATA", data.replace("<", "\\u003c"), 1)


def check(model):
    """Raise UserError for a model that the page cannot show."""
    if not model.routed_blocks or isinstance(model, MoDE):
        raise UserError("the page needs a model with routed blocks and without experts; use another one")


@torch.no_grad()
def measure(model, tokenizer, ids):
    """
    What the page stores. For each routing: r, logits and taken (L, T) of the L routed blocks; loss and entropy (T,) of
    the predictions, in nats. flops.of_block[l][n]: of routed block l if it takes n tokens; flops.rest: of all else.
    """
    blocks, T, device = model.routed_blocks, min(len(ids), model.config.block_size), model.lm_head.weight.device
    idx, targets = torch.tensor([ids[:T]], device=device), torch.tensor(ids[1 : T + 1], device=device)
    piece, of_block = tokenizer.decoder(), [[block.flops(T, n) for n in range(T + 1)] for block in blocks]
    data = {
        "tokens": [visible(piece(token)) for token in ids[:T]],
        "n_tokens": len(ids),
        "n_layer": model.config.n_layer,
        "layers": [layer for layer in range(model.config.n_layer) if model.config.is_routed(layer)],
        "decider": ("predictor" if blocks[0].predictor else "router") if blocks[0].has_routing_loss else "",
        "flops": {"of_block": of_block, "rest": model.flops(T, [0] * len(blocks)) - sum(n[0] for n in of_block)},
    }
    weights = []  # the routers' outputs
    for routing in ("topk", "causal"):
        weights.clear()
        hooks = [block.router.register_forward_hook(lambda *args: weights.append(args[-1])) for block in blocks]
        with evaluating(model):
            logits, _ = model.forward(idx, routing=routing)
        for hook in hooks:
            hook.remove()
        log_p = logits[0].float().log_softmax(-1)  # (T, vocab_size)
        loss = -log_p[: len(targets)].gather(1, targets[:, None])[:, 0]  # the text's last token has no target
        data[routing] = {
            "r": [rounded(r[0, :, 0]) for r in weights],
            "logits": [rounded(block.logits[0]) for block in blocks],
            "taken": [block.taken[0].int().tolist() for block in blocks],
            "loss": rounded(loss) + [None] * (T - len(targets)),
            "entropy": rounded(-(log_p.exp() * log_p).sum(-1)),
        }
    return data


def rounded(values):
    """Six significant digits: unlike six decimals, they keep the sign of a small logit, which is the decision."""
    return [float(f"{value:.6g}") for value in values.tolist()]
