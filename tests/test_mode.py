"""The invariants of mode.py that mod.py does not share; those that hold for all models are in test_mod.py."""

import copy
import dataclasses
import os
import signal

import pytest
import torch
from torch.nn import functional as F

import mode
import sample
import train
from helpers import equal, weights_of
from mod import capacity_in_tokens
from support.options import UserError
from test_mod import EXPERTS, close, inputs, make, places, run, tokens

experts = pytest.mark.parametrize("kind", EXPERTS, ids=["moe", "staged", "integrated"])
biased = pytest.mark.parametrize("bias", [True, False])


def reference_expert(x, p, e):
    """Expert e for one token x (C,), written out."""
    h = x @ p["experts.c_fc"][e]
    if "experts.c_fc_bias" in p:
        h = h + p["experts.c_fc_bias"].view(len(p["experts.c_fc"]), -1)[e]
    y = F.gelu(h, approximate="tanh") @ p["experts.c_proj"][e]
    if "experts.c_proj_bias" in p:
        y = y + p["experts.c_proj_bias"].view(len(p["experts.c_fc"]), -1)[e]
    return y


def reference_mixture(x, p, n_expert, k, routing):
    """A mixture of experts over x (B, T, C), token by token and expert by expert, from its definition."""
    rows = []
    for row in x:
        probabilities = torch.stack([(p["router.weight"] @ token).softmax(dim=0) for token in row])  # (T, all experts)
        out = [torch.zeros_like(token) for token in row]
        for e in range(n_expert):
            if routing == "topk":
                ranked = sorted(range(len(row)), key=lambda t: probabilities[t, e].item(), reverse=True)
                chosen = ranked[:k]
            else:
                chosen = [t for t in range(len(row)) if reference_logits(row[t], p)[e] > 0]
            for t in chosen:
                out[t] = out[t] + probabilities[t, e] * reference_expert(row[t], p, e)
        rows.append(torch.stack(out))
    return torch.stack(rows)


def reference_logits(x, p):
    h = F.gelu(p["predictor.0.weight"] @ x + p["predictor.0.bias"])
    return p["predictor.2.weight"] @ h + p["predictor.2.bias"]


@experts
@biased
@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_a_mixture_is_its_definition_gradients_included(kind, bias, routing):
    model = make(**kind, bias=bias)
    mixture = model.routed_blocks[0].mlp
    mixture.routing = routing
    x = inputs(T=12).requires_grad_()
    k = capacity_in_tokens(model.config.expert_capacity, 12)
    p = dict(mixture.named_parameters())
    y, expected = mixture(x), reference_mixture(x, p, model.config.n_expert, k, routing)
    assert close(y, expected) and y.abs().max() > 0.01
    assert torch.equal(y.abs().amax(dim=-1) > 0, mixture.taken.any(dim=-1))  # zero where no expert takes the token
    trained = [w for name, w in p.items() if "predictor" not in name]
    weight = inputs(T=12, seed=5)
    for ours, theirs in zip(
        torch.autograd.grad((y * weight).sum(), [x, *trained]),
        torch.autograd.grad((expected * weight).sum(), [x, *trained]),
    ):
        assert close(ours, theirs)


@experts
@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_a_block_is_attention_then_experts_and_a_staged_one_gates_both(kind, routing):
    model = make(**kind)
    block = model.routed_blocks[0]
    x = inputs(B=1, T=12)
    y = run(block, x, routing)
    mixture = copy.deepcopy(block.mlp)
    if not kind.get("staged"):
        h = x + block.attn(block.ln_1(x), places(x))
        update = mixture(block.ln_2(h))
        expected = h + update
        assert torch.equal(block.taken, (update != 0).any(dim=-1))
    else:
        taken = block.taken[0].nonzero().flatten()
        assert 0 < len(taken) < 12
        part = x[:, taken]
        h = block.attn(block.ln_1(part), places(part))
        expected = x.clone()
        expected[:, taken] += block.router(part) * (h + mixture(block.ln_2(part + h)))
    assert close(y, expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_ops_alone_add_nothing():
    block = mode.MixtureBlock(mode.MoDEConfig(n_expert=0, n_noop=3, n_embd=16, n_head=2)).double()
    x = inputs()
    for routing in ("topk", "causal"):
        assert torch.equal(run(block, x, routing), x + block.attn(block.ln_1(x), places(x)))


@experts
@pytest.mark.parametrize("T", [1, 2, 7, 32])
def test_each_expert_takes_exactly_its_capacity_of_each_row(kind, T):
    model = make(**kind)
    model(tokens(T=T))
    n = capacity_in_tokens(model.config.capacity, T) if kind.get("staged") else T
    for block in model.routed_blocks:
        assert block.mlp.taken.shape[:2] == (3, n)
        assert (block.mlp.taken.sum(dim=1) == max(1, int(model.config.expert_capacity * n))).all()


def test_a_staged_block_that_takes_no_token_leaves_no_old_decisions():
    model = make(n_expert=3, staged=True)
    block = model.routed_blocks[0]
    run(block, inputs())
    block.predictor[-1].bias.data -= 1e3
    run(block, inputs(), "causal")
    assert not block.taken.any() and block.mlp.taken is None


@pytest.mark.parametrize(
    "before, now", [(dict(), dict(n_expert=2)), (dict(n_expert=2), dict(n_expert=3)), (dict(n_expert=2), {})]
)
def test_a_run_resumes_only_with_its_own_experts(tiny, before, now):
    train.train(dataclasses.replace(tiny, **before))
    with pytest.raises(UserError, match="another model: n_expert was"):
        train.train(dataclasses.replace(tiny, **now, resume=True))


def test_a_mixture_starts_from_a_dense_model_and_not_from_another_mixture(tiny, capsys):
    start = dataclasses.replace(tiny, n_expert=2, out_dir=tiny.out_dir + "-start")
    train.train(start)
    after = dataclasses.replace(tiny, init_from=start.out_dir, n_expert=3)
    with pytest.raises(UserError, match="does not fit: n_expert was 2, now 3"):
        train.train(after)
    train.train(dataclasses.replace(after, n_expert=2))
    dense = dataclasses.replace(tiny, route_every=0, out_dir=tiny.out_dir + "-dense")
    train.train(dense)
    train.train(dataclasses.replace(tiny, init_from=dense.out_dir, n_expert=3))


@experts
def test_the_router_of_the_experts_learns_from_the_language_model_and_the_predictor_only_from_the_auxiliary_loss(kind):
    model = make(**kind)
    _, loss = model(tokens(), tokens(seed=9))
    loss.backward(retain_graph=True)
    mixtures = [block.mlp for block in model.routed_blocks]
    assert all(m.router.weight.grad.abs().max() > 0 for m in mixtures)
    assert all(p.grad is None for m in mixtures for p in m.predictor.parameters())
    model.zero_grad()
    model.routing_loss().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained and all(".predictor." in name for name in trained)
    assert {name for name, _ in model.named_parameters() if "mlp.predictor" in name} <= trained


@experts
def test_the_auxiliary_loss_is_the_mean_over_all_routing_modules(kind):
    model = make(**kind)
    model(tokens(), tokens(seed=9))
    losses = []
    for block in model.routed_blocks:
        for decider in [block, block.mlp] if kind.get("staged") else [block.mlp]:
            p = decider.logits.sigmoid()
            losses.append(-torch.where(decider.taken, p.log(), (1 - p).log()).mean())
    assert close(model.routing_loss(), torch.stack(losses).mean())


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n_expert=-1), "n_expert \\+ n_noop must be at least 2, got -1 \\+ 0"),
        (dict(n_expert=1), "the softmax over a single expert is always 1, so its router would learn nothing"),
        (dict(n_expert=0, n_noop=1), "n_expert \\+ n_noop must be at least 2, got 0 \\+ 1"),
        (dict(n_expert=2, expert_capacity=12.5), "expert_capacity is a fraction in"),
        (dict(n_expert=2, variant="stochastic"), "causal_method must be predictor and variant empty"),
        (dict(n_expert=2, causal_method="router"), "causal_method must be predictor and variant empty"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mode.MoDEConfig(**options)


@experts
def test_a_run_with_experts_resumes_to_the_same_weights_samples_and_says_what_it_is(kind, tiny, capsys):
    whole = dataclasses.replace(tiny, **kind)
    train.train(whole)
    said = capsys.readouterr().out
    name = "MoE (1 of 2 blocks with 3 experts at 25.0% capacity)"
    if kind.get("staged"):
        name = "MoDE (1 of 2 blocks with 3 experts at 25.0% capacity, routed at 12.5%)"
    if kind.get("n_noop"):
        name = "MoDE (1 of 2 blocks with 2 experts at 12.5% capacity and 2 no-ops)"
    assert name in said and "predictor" in said
    half = dataclasses.replace(whole, out_dir=whole.out_dir + "-half")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "report", lambda row, n: str(row["step"] == 3 and os.kill(os.getpid(), signal.SIGTERM)))
        train.train(half)
    train.train(dataclasses.replace(half, resume=True))
    ours, theirs = weights_of(half.out_dir), weights_of(whole.out_dir)
    assert equal(ours, theirs)
    capsys.readouterr()
    sample.main([f"--out_dir={whole.out_dir}", "--max_new_tokens=20", "--device=cpu", "--show_depth"])
    assert "the routed blocks took" in capsys.readouterr().err
