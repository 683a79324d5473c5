"""The invariants of the method, each test a sentence. In float64 wherever an equality is claimed."""

import collections
import copy
import dataclasses
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import cache as kv
from cache import KVCache, generate, prefill, set_dtype, step, stream
from mod import GPT, Block, CausalSelfAttention, GPTConfig, capacity_in_tokens, pick_token
from mode import build, config_class, forward_flops
from train import TrainConfig, configure_optimizer
from variants import VARIANTS

torch.set_num_threads(1)  # for sizes this small more threads only wait for each other
TINY = dict(block_size=32, vocab_size=23, n_layer=4, n_head=2, n_embd=16, capacity=0.25, predictor_hidden=8)
KINDS = [
    dict(causal_method="predictor"),
    dict(causal_method="router"),
    dict(variant="stochastic"),
    dict(variant="position"),
]
CONTROLS = ("stochastic", "position")
IDS = ["predictor", "router", "stochastic", "position", "moe", "staged", "integrated"]
VARIED = [dict(variant=name) for name in VARIANTS if name not in CONTROLS]
kinds = pytest.mark.parametrize("kind", KINDS, ids=IDS[:4])
# Models with experts (mode.py). They take the tests that hold for every model; their own are in tests/test_mode.py.
EXPERTS = [dict(n_expert=3), dict(n_expert=3, staged=True), dict(n_expert=2, n_noop=2, expert_capacity=0.125)]
all_kinds = pytest.mark.parametrize("kind", KINDS + EXPERTS, ids=IDS)
every_kind = pytest.mark.parametrize("kind", KINDS + EXPERTS + VARIED, ids=[*IDS, *(v["variant"] for v in VARIED)])


def make(seed=0, **changes):
    """A tiny model in float64, its weights large enough that every decision and every update matters."""
    torch.manual_seed(seed)
    model = build(config_class(changes)(**{**TINY, **changes})).double().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2:
                p.mul_(10.0 if "router" in name or "predictor" in name else 5.0)
            else:
                p.add_(0.1 * torch.randn_like(p))
    return model


def tokens(B=3, T=32, seed=1):
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


def inputs(B=3, T=32, C=16, seed=2):
    return torch.randn(B, T, C, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def places(x):
    """Positions (B, T) of sequences that start at 0."""
    return torch.arange(x.size(1)).expand(x.shape[:2])


def run(block, x, routing="topk"):
    return block(x, places(x), routing)


# An independent reference: plain loops, written from the paper and from GPT-2, sharing nothing with mod.py.


def reference_attention(x, p, n_head, turn=None):
    """x (n, C): one sequence; each token attends to itself and those before it in x. turn(q or k) of one head."""
    n, C = x.shape
    hs = C // n_head
    q, k, v = (x @ p["attn.c_attn.weight"].T + p["attn.c_attn.bias"]).split(C, dim=1)
    heads = []
    for h in range(n_head):
        part = slice(h * hs, (h + 1) * hs)
        q_h, k_h = (turn(q[:, part]), turn(k[:, part])) if turn else (q[:, part], k[:, part])
        scores = q_h @ k_h.T / math.sqrt(hs)
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(dim=1) @ v[:, part])
    return torch.cat(heads, dim=1) @ p["attn.c_proj.weight"].T + p["attn.c_proj.bias"]


def reference_norm(x, weight, bias):
    centred = x - x.mean(dim=-1, keepdim=True)
    return centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def reference_update(x, p, n_head, turn=None):
    """What GPT-2's block adds to x (n, C)."""
    a = reference_attention(reference_norm(x, p["ln_1.weight"], p["ln_1.bias"]), p, n_head, turn)
    u = reference_norm(x + a, p["ln_2.weight"], p["ln_2.bias"]) @ p["mlp.c_fc.weight"].T + p["mlp.c_fc.bias"]
    gelu = 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))
    return a + gelu @ p["mlp.c_proj.weight"].T + p["mlp.c_proj.bias"]


def reference_equation_1(x, chosen, p, n_head, turn=None):
    """Equation (1) for one sequence x (T, C); chosen: the picked positions, ascending."""
    f = reference_update(torch.stack([x[i] for i in chosen]), p, n_head, turn) if chosen else None
    rows = []
    for i in range(len(x)):
        r = sum(p["router.weight"][0, c] * x[i, c] for c in range(x.size(1)))
        rows.append(r * f[chosen.index(i)] + x[i] if i in chosen else x[i])
    return torch.stack(rows)


def largest(values, k):
    """Positions of the k largest values, ascending."""
    return sorted(sorted(range(len(values)), key=lambda i: -values[i])[:k])


def reference_chosen(x, block, routing):
    """The positions that a routed block takes of x (T, C)."""
    if routing == "topk":
        k = max(1, math.floor(block.capacity * len(x) + 1e-9))
        return largest([(block.router.weight[0] @ token).item() for token in x], k)
    return [i for i, token in enumerate(x) if (block.predictor or block.router)(token).item() > 0]


def reference_gpt(model, idx, routing="topk", turned=None):
    """The whole forward pass (B, T, vocab_size). turned(v, place): how attention turns a query or key at this place."""
    p = dict(model.named_parameters())
    out = []
    for row in idx:
        x = torch.stack([p["transformer.wte.weight"][t] + p["transformer.wpe.weight"][i] for i, t in enumerate(row)])
        for block in model.transformer.h:
            chosen = list(range(len(x))) if type(block) is Block else reference_chosen(x, block, routing)

            def turn(vectors, chosen=chosen):
                return torch.stack([turned(v, place) for v, place in zip(vectors, chosen)])

            weights = dict(block.named_parameters())
            arguments = weights, model.config.n_head, turn if turned else None
            if type(block) is Block:
                x = x + reference_update(x, *arguments)
            else:
                x = reference_equation_1(x, chosen, *arguments)
        x = reference_norm(x, p["transformer.ln_f.weight"], p["transformer.ln_f.bias"])
        out.append(x @ p["transformer.wte.weight"].T)
    return torch.stack(out)


def bias_decisions(model, amount):
    """Make the predictors take more tokens, or fewer for a negative amount."""
    for module in model.routing_modules:
        if module.predictor is not None:
            module.predictor[-1].bias.data += amount


def close(a, b, tolerance=1e-10):
    return torch.allclose(a, b, rtol=0, atol=tolerance)


# The GPT


@pytest.mark.parametrize("kind", [dict(route_every=0), *KINDS[:2]], ids=["dense", *IDS[:2]])
@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_a_gpt_is_its_blocks_written_out(kind, routing):
    model, idx = make(**kind), tokens(B=2, T=20)
    assert close(model(idx, routing=routing)[0], reference_gpt(model, idx, routing))


class RotaryAttention(CausalSelfAttention):
    """Turns each query and key by its position: the smallest model in which attention must know the positions."""

    def forward(self, x, positions, cache=None):
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, -1).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        angle = positions[:, None, :, None].double()  # (B, 1, T, 1)
        q, k = (torch.cat((z[..., :-2], rotate(z[..., -2:], angle)), dim=-1) for z in (q, k))
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def rotate(pair, angle):
    a, b = pair[..., :1], pair[..., 1:]
    return torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), dim=-1)


def make_rotary():
    model = make()
    for block in model.transformer.h:
        block.attn.__class__ = RotaryAttention
    return model


@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_in_attention_a_picked_token_has_its_place_in_the_text(routing):
    """Not its place among the picked ones, 0 to k - 1: no test of causality would see the difference."""
    model, idx = make_rotary(), tokens(B=2, T=20)

    def turned(vector, place):
        return torch.cat((vector[:-2], rotate(vector[-2:], torch.tensor([float(place)], dtype=torch.float64))))

    expected = reference_gpt(model, idx, routing, turned)
    assert close(model(idx, routing=routing)[0], expected)
    assert not close(make()(idx, routing=routing)[0], expected)  # the turn matters


def test_a_cached_token_keeps_its_position_in_the_text():
    model, idx = make_rotary(), tokens(B=2, T=20)
    cache = KVCache(model.config, 2)
    logits = [prefill(model, cache, [idx[0, :9].tolist(), idx[1, :5].tolist()])]
    logits += [step(model, cache, torch.stack((idx[0, 9 + i], idx[1, 5 + i]))) for i in range(11)]
    for row, first in ((0, 9), (1, 5)):
        expected = model(idx[[row]], routing="causal")[0][0, first - 1 : first + 11]
        assert close(torch.stack([step_logits[row] for step_logits in logits]), expected)


def test_blocks_1_3_5_are_routed_and_block_0_is_not():
    routed = {every: [make(n_layer=6, route_every=every).config.is_routed(i) for i in range(6)] for every in range(4)}
    assert routed == {0: [False] * 6, 1: [True] * 6, 2: [False, True] * 3, 3: [False, False, True] * 2}
    assert [type(b) is Block for b in make().transformer.h] == [True, False, True, False]


def test_an_update_is_what_an_ordinary_block_adds():
    x, block = inputs(), make().transformer.h[1]
    assert close(Block.forward(block, x, places(x)), x + block.update(x, places(x)))


@pytest.mark.parametrize("kind", [dict(), dict(n_expert=4)], ids=["MoD", "MoE"])
def test_at_the_start_weights_are_as_small_as_gpt2s_and_smaller_where_they_add_to_the_residual_stream(kind):
    torch.manual_seed(0)
    model = build(config_class(kind)(n_layer=8, n_embd=96, n_head=3, vocab_size=99, block_size=64, **kind))
    for name, p in model.named_parameters():
        if p.dim() >= 2:
            expected = 0.02 / math.sqrt(16) if "c_proj" in name else 0.02  # 16 = 2 * n_layer
            assert abs(p.std() / expected - 1) < 4 / math.sqrt(2 * p.numel()), name  # four standard errors
        else:
            assert (p == float("ln_" in name and "weight" in name)).all(), name


# The routed block


def test_a_routed_block_is_equation_1_gradients_included():
    block, x = make().transformer.h[1], inputs().requires_grad_()
    p = dict(block.named_parameters())
    chosen = [largest((row @ p["router.weight"][0]).tolist(), 8) for row in x]
    assert all(picked != list(range(picked[0], picked[0] + 8)) for picked in chosen)  # scattered: order matters
    expected = torch.stack([reference_equation_1(x[b], chosen[b], p, n_head=2) for b in range(3)])
    out = run(block, x)
    assert close(out, expected)
    assert [row.nonzero().flatten().tolist() for row in block.taken] == chosen

    weights = [x] + [parameter for name, parameter in p.items() if "predictor" not in name]
    probe = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad((out * probe).sum(), weights), torch.autograd.grad((expected * probe).sum(), weights)
    ):
        assert ours.abs().max() > 0
        assert close(ours, theirs)


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_a_pass_is_equation_1_over_exactly_the_tokens_taken_and_its_gate_is_the_router(kind, routing, bias):
    block, x = make(bias=bias, **kind).transformer.h[1], inputs(B=4)
    x[1], x[2] = (x[0], x[0, 0])  # two equal rows, and one that is the same token over and over: it takes all or none
    out = run(block, x, routing)
    chosen = [row.nonzero().flatten().tolist() for row in block.taken]
    if kind.get("variant") not in CONTROLS and routing == "causal":
        assert len(chosen[0]) == len(chosen[1]) and len(chosen[2]) in (0, 32) and 0 < len(chosen[0]) < 32  # ragged
    p = collections.defaultdict(float, block.named_parameters())  # a bias that is not there is 0
    assert close(out, torch.stack([reference_equation_1(x[b], chosen[b], p, n_head=2) for b in range(4)]))


def test_capacity_1_with_the_gate_held_at_1_is_the_dense_model():
    model = make(capacity=1.0, variant="no_gate")
    dense = GPT(dataclasses.replace(model.config, route_every=0)).double().eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    assert close(model(tokens())[0], dense(tokens())[0])


@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_a_token_that_is_not_taken_is_unchanged_bit_for_bit(routing):
    block, x = make().transformer.h[1], inputs()
    out = run(block, x, routing)
    assert torch.equal(out[~block.taken], x[~block.taken])
    assert (out[block.taken] != x[block.taken]).any(dim=1).all()


def test_a_causal_pass_may_take_no_token_or_every_token():
    block, x = make().transformer.h[1], inputs()
    block.predictor[-1].bias.data.fill_(-1e6)
    assert torch.equal(run(block, x, "causal"), x) and not block.taken.any()
    block.predictor[-1].bias.data.fill_(1e6)
    assert close(run(block, x, "causal"), x + block.router(x) * block.update(x, places(x))) and block.taken.all()


def test_a_row_that_takes_nothing_beside_one_that_does():
    block, x = make(causal_method="router").transformer.h[1], inputs(B=2)
    x[0] = -block.router.weight[0]  # w . x < 0 for each token of row 0
    out = run(block, x, "causal")
    assert torch.equal(out[0], x[0]) and close(out[1:], run(block, x[1:], "causal"))


HOSTILE_GATES = {
    "1": torch.ones_like,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "1e3": lambda r: torch.full_like(r, 1e3),
    "1/r": lambda r: 1 / r,
}


@pytest.mark.parametrize("gate", HOSTILE_GATES.values(), ids=HOSTILE_GATES)
def test_the_padding_of_a_ragged_batch_is_harmless_under_any_gate(gate):
    model, idx = make(route_every=1), tokens(B=4)
    for block in model.routed_blocks:
        block.gate = gate
    together = model(idx, routing="causal")[0]
    counts = [block.taken.sum(dim=1).tolist() for block in model.routed_blocks]
    assert any(len(set(count)) > 1 for count in counts), "no padding in this random model: take another seed"
    assert torch.allclose(together, torch.cat([model(row[None], routing="causal")[0] for row in idx]), atol=1e-9)
    cached = torch.stack(list(stream(model, idx[:, :8], 12, temperature=0)), dim=1)
    assert torch.equal(cached, model.generate(idx[:, :8], 12, temperature=0)[:, 8:])


@pytest.mark.parametrize("T", [1, 2, 3, 4, 7, 8, 31, 32])
@pytest.mark.parametrize("capacity", [0.01, 0.125, 0.3, 1.0])
@kinds
def test_exactly_k_tokens_per_row(kind, capacity, T):
    block = make(capacity=capacity, **kind).transformer.h[1]
    k = max(1, math.floor(capacity * T + 1e-9))
    run(block, inputs(T=T))
    assert block.taken.sum(dim=1).tolist() == [k, k, k]
    run(block, torch.ones(3, T, 16, dtype=torch.float64))  # equal scores for all tokens
    assert block.taken.sum(dim=1).tolist() == [k, k, k]


def test_k_is_not_lost_to_rounding():
    for percent in range(1, 101):
        assert capacity_in_tokens(percent / 100, 100) == percent


def test_a_nan_in_one_row_stays_in_that_row():
    block, x = make().transformer.h[1], inputs()
    x[0, 5] = math.nan
    for routing in ("topk", "causal"):
        assert close(run(block, x, routing)[1:], run(block, x[1:], routing))


@every_kind
def test_a_row_does_not_depend_on_the_other_rows(kind):
    model, idx = make(**kind), tokens(B=4)
    together = model(idx, routing="causal")[0]
    assert close(together, torch.cat([model(row[None], routing="causal")[0] for row in idx]))


def test_the_block_computes_a_batch_at_once():
    for routing in ("topk", "causal"):
        model, calls = make(), []
        for block in model.routed_blocks:
            block.attn.register_forward_hook(lambda module, args, out, calls=calls: calls.append(args[0].shape))
        model(tokens(B=5), routing=routing)
        counts = [int(block.taken.sum(dim=1).max()) for block in model.routed_blocks]
        assert calls == [(5, n, 16) for n in counts]


def test_routing_stays_in_float32_under_autocast():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**TINY))
    block, x = model.transformer.h[1], inputs().float()
    run(block, x)
    expected = block.taken
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run(block, x)
    assert block.logits.dtype == torch.float32
    assert torch.equal(block.taken, expected)
    model = build(config_class(EXPERTS[1])(**{**TINY, **EXPERTS[1]}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens())
    assert {module.logits.dtype for module in model.routing_modules} == {torch.float32}


# Causality


def first_change(model, routing, position):
    """Where the logits first differ after the token at `position` was changed; None: nowhere."""
    idx = tokens(B=4)
    changed = idx.clone()
    changed[:, position] = (changed[:, position] + 1) % TINY["vocab_size"]
    difference = (model(idx, routing=routing)[0] - model(changed, routing=routing)[0]).abs().amax(dim=(0, 2))
    positions = (difference > 1e-10).nonzero().flatten().tolist()
    return positions[0] if positions else None


@every_kind
@pytest.mark.parametrize("route_every", [1, 2])
def test_in_causal_mode_the_future_never_touches_the_past(kind, route_every):
    model = make(route_every=route_every, **kind)
    for position in range(32):
        assert first_change(model, "causal", position) == position


def test_under_topk_a_later_token_can_change_an_earlier_output():
    model = make()
    assert any(first_change(model, "topk", position) < position for position in range(16, 32))


def test_the_gate_is_the_raw_router_weight_and_does_not_depend_on_other_tokens():
    block, x = make(capacity=1.0).transformer.h[1], inputs()
    longer = torch.cat((x, 3 * inputs(T=8, seed=5)), dim=1)
    # A softmax over the sequence would shrink with each further token.
    assert close(run(block, x), run(block, longer)[:, :32])
    assert close(run(block, x), x + (x @ block.router.weight[0]).unsqueeze(-1) * block.update(x, places(x)))


@all_kinds
@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_training_and_evaluation_mode_differ_in_dropout_alone(kind, routing):
    def logits(model):
        torch.manual_seed(0)  # the stochastic control's noise
        return model(tokens(), routing=routing)[0]

    model, dropped = make(**kind), make(dropout=0.5, **kind)
    assert torch.equal(logits(model.train()), logits(model.eval()))
    assert torch.equal(logits(model), logits(dropped.eval()))
    assert not close(logits(model), logits(dropped.train()))


@pytest.mark.parametrize(
    "part", ["drop", "h.1.attn", "h.1.attn.resid_dropout", "h.1.mlp.dropout", "h.1.mlp.experts.dropout"]
)
def test_dropout_acts_on_embeddings_attention_and_mlp(part):
    model = make(dropout=0.5, **(EXPERTS[0] if "experts" in part else {}))
    model.transformer.get_submodule(part).training = True  # this part alone
    assert not close(model(tokens())[0], model.eval()(tokens())[0])


# Losses and gradients


def test_the_loss_is_the_language_models_alone():
    model, idx, targets = make(), tokens(), tokens(seed=9)
    targets[0, :5] = -1  # not counted
    for routing in ("topk", "causal"):
        logits, loss = model(idx, targets, routing)
        assert logits.shape == (3, 32, 23)
        log_p = logits.log_softmax(dim=-1)
        counted = [log_p[b, t, targets[b, t]] for b in range(3) for t in range(32) if targets[b, t] >= 0]
        assert close(loss, -torch.stack(counted).mean())
    assert model(idx)[1] is None


@pytest.mark.parametrize("method", ["predictor", "router"])
def test_the_auxiliary_loss_is_bce_on_membership_over_all_rows_and_routed_blocks(method):
    model, seen = make(causal_method=method), []
    for block in model.routed_blocks:
        block.register_forward_hook(lambda block, args, out: seen.append((block, args[0])))
    model(tokens(), tokens(seed=9))
    terms = []
    for block, x in seen:  # x: the block's input
        for b in range(3):
            r = (x[b] @ block.router.weight[0]).tolist()
            chosen = largest(r, 8)
            for i in range(32):
                z = block.predictor(x[b, i]).item() if method == "predictor" else r[i]
                terms.append(math.log1p(math.exp(-z)) if i in chosen else math.log1p(math.exp(z)))
    assert len(terms) == 2 * 3 * 32
    assert math.isclose(model.routing_loss().item(), sum(terms) / len(terms), abs_tol=1e-10)


@pytest.mark.parametrize("kind", [dict(route_every=0), dict(variant="stochastic"), dict(variant="position")])
def test_where_nothing_is_learned_the_auxiliary_loss_is_zero(kind):
    model = make(**kind)
    model(tokens(), tokens(seed=9))
    assert model.routing_loss().item() == 0 and not any("predictor" in name for name, _ in model.named_parameters())


def test_the_routing_loss_is_refused_after_a_causal_pass():
    """A causal pass leaves its own decisions in `taken`; scored against themselves they would always look right."""
    model, cache = make(), KVCache(make().config, 1)
    for causal_pass in (lambda: model(tokens(), routing="causal"), lambda: prefill(model, cache, [[1, 2, 3]])):
        model(tokens())
        assert model.routing_loss() > 0
        causal_pass()
        with pytest.raises(RuntimeError, match='scores the last pass, which must have routing="topk"'):
            model.routing_loss()


def test_the_router_gets_a_gradient_from_the_language_model_loss():
    model = make()
    _, loss = model(tokens(), tokens(seed=9))
    loss.backward()
    for block in model.routed_blocks:
        assert block.router.weight.grad.abs().min() > 0
        assert all(p.grad is None for p in block.predictor.parameters())


def test_the_auxiliary_loss_reaches_the_predictor_and_nothing_else():
    model = make()
    model(tokens(), tokens(seed=9))
    model.routing_loss().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "predictor" in name} != set()


def test_with_the_router_as_causal_method_the_auxiliary_loss_reaches_the_router():
    model = make(causal_method="router")
    model(tokens(), tokens(seed=9))
    model.routing_loss().backward()
    assert all(block.router.weight.grad.abs().max() > 0 for block in model.routed_blocks)
    assert model.transformer.wte.weight.grad.abs().max() > 0  # there is no stop-gradient: the method's cost


@pytest.mark.slow
@every_kind
def test_a_training_pass_compiles_without_a_graph_break(kind):
    results = []
    for compiled in (False, True):
        model = make(**kind).train()
        if compiled:
            torch.compiler.reset()
            model.compile(backend="aot_eager", fullgraph=True)
        torch.manual_seed(0)
        for T in (32, 16):  # the second length makes T symbolic
            _, loss = model(tokens()[:, :T], tokens(seed=9)[:, :T])
            (loss + model.routing_loss()).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]  # no_gate's routers have none
        results.append([loss.detach(), model.routing_loss().detach(), *gradients])
    assert all(close(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_a_model_can_be_copied_after_a_training_pass():
    model = make()
    model(tokens(), tokens(seed=9))
    twin = copy.deepcopy(model)
    assert twin.routed_blocks[0].taken is None and twin.routed_blocks[0].logits is None
    assert torch.equal(twin(tokens())[0], model(tokens())[0])


@pytest.mark.parametrize("kind", [*KINDS, *EXPERTS, dict(route_every=0)])
def test_one_batch_can_be_memorised(kind):
    torch.manual_seed(0)
    model = build(config_class(kind)(**{**TINY, "n_embd": 32, **kind}))
    idx, targets = tokens(B=4), tokens(B=4, seed=9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        _, loss = model(idx, targets)
        (loss + model.routing_loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


@pytest.mark.parametrize("kind", [*KINDS, *EXPERTS, dict(route_every=0), dict(bias=False)])
def test_every_parameter_is_in_exactly_one_optimizer_group_and_biases_and_norms_have_no_weight_decay(kind):
    model = make(**kind)
    groups = configure_optimizer(model, TrainConfig()).param_groups
    decay = [(id(p), group["weight_decay"] > 0) for group in groups for p in group["params"]]
    expected = [(id(p), "bias" not in name and "ln_" not in name) for name, p in model.named_parameters()]
    assert sorted(decay) == sorted(expected)


# Cost


SHAPES = [
    dict(),
    dict(route_every=0),
    dict(route_every=1, capacity=0.3, n_embd=24, n_head=3),
    dict(route_every=3, n_layer=7, vocab_size=65, predictor_hidden=5),
    dict(causal_method="router", capacity=0.01),
    dict(variant="stochastic"),
    dict(variant="position", capacity=1.0),
    dict(bias=False, n_layer=2),
    *VARIED,
    *EXPERTS,
    dict(n_expert=3, n_noop=1, expert_capacity=0.01, staged=True, capacity=0.5),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [1, 5, 32])
def test_the_flop_formula_equals_pytorchs_counter(shape, T):
    model = make(**shape).to("meta")  # on the CPU the counter gives 0 for attention
    idx = torch.zeros(1, T, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(idx, idx)
    assert counter.get_total_flops() == forward_flops(model.config, T)


@pytest.mark.parametrize(("taking", "seed"), [(-1e3, 0), (1e3, 0), (0.0, 0), (0.0, 1), (0.0, 2)])  # none, all, some
@pytest.mark.parametrize("shape", SHAPES)
def test_the_flop_formula_equals_the_counter_in_a_causal_pass(shape, taking, seed):
    model = make(seed=seed, **shape)
    bias_decisions(model, taking)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(tokens(B=1), routing="causal")
    taken = [int(block.taken.sum()) for block in model.routed_blocks]
    if "n_expert" in shape:  # each expert is given as many tokens as the busiest of the block
        mixtures = [block.mlp for block in model.routed_blocks]
        at_each = [0 if m.taken is None else int(m.taken.sum(dim=(0, 1)).max()) for m in mixtures]
        taken = [(n if shape.get("staged") else 32, m) for n, m in zip(taken, at_each)]
    assert counter.get_total_flops() == forward_flops(model.config, 32, taken)


# Sampling


def by_hand(model, idx, new, routing):
    """Sampling with seed 1, written out."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(new):
        # float32 as in sampling: PyTorch 2.6 draws other tokens from float64.
        p = model(idx, routing=routing)[0][:, -1].float().softmax(dim=-1)
        idx = torch.cat((idx, torch.multinomial(p, 1, generator=generator)), dim=1)
    return idx


@all_kinds
def test_uncached_generate_is_a_causal_pass_per_token(kind):
    model, prompt = make(**kind), tokens(B=8, T=5)
    assert torch.equal(model.generate(prompt, 27, seed=1), by_hand(model, prompt, 27, "causal"))
    if kind.get("variant") not in CONTROLS:
        assert not torch.equal(model.generate(prompt, 27, seed=1), by_hand(model, prompt, 27, "topk"))


@pytest.mark.parametrize(
    ("T", "lengths"), [(3, [3, 4, 5, 6, 7, 8, 4, 5, 6, 7, 8, 4]), (20, [4, 5, 6, 7, 8, 4]), (8, [8, 4, 5]), (9, [4, 5])]
)
def test_a_full_window_restarts_from_its_last_half(T, lengths):
    model, seen = make(block_size=8), []
    model.transformer.wte.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    idx = model.generate(tokens(T=T), len(lengths), seed=1)
    assert [window.size(1) for window in seen] == lengths
    for i, window in enumerate(seen):
        assert torch.equal(window, idx[:, : T + i][:, -lengths[i] :])  # the last tokens so far, in order


def test_sampling_follows_seed_and_temperature():
    model, prompt = make(), tokens(B=2, T=5)
    assert torch.equal(generate(model, prompt, 20, seed=1), generate(model, prompt, 20, seed=1))
    assert not torch.equal(generate(model, prompt, 20, seed=1), generate(model, prompt, 20, seed=2))
    greedy = generate(model, prompt, 20, temperature=0)
    assert torch.equal(generate(model, prompt, 20, top_k=1, seed=1), greedy)
    assert torch.equal(generate(model, prompt, 20, top_p=1e-6, seed=1), greedy)
    assert torch.equal(generate(model, prompt, 20, temperature=1e-4, seed=1), greedy)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (dict(), [0.1, 0.4, 0.2, 0.3]),
        (dict(temperature=0.5), [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        (dict(top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_k=99), [0.1, 0.4, 0.2, 0.3]),
        (dict(top_p=0.65), [0, 4 / 7, 0, 3 / 7]),
        (dict(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
        (dict(top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
        (dict(temperature=1e-40), [0, 1, 0, 0]),
        (dict(temperature=1e-46), [0, 1, 0, 0]),  # 0 in float32
        (dict(top_p=1e-46), [0, 1, 0, 0]),
        (dict(top_k=3, top_p=0.7), [0, 4 / 7, 0, 3 / 7]),  # 0.4 + 0.3 of 0.9: 0.78
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_tokens_are_drawn_with_these_probabilities(options, expected, dtype):
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3], dtype=dtype).log().expand(20_000, -1)
    drawn = pick_token(logits, **options, generator=torch.Generator().manual_seed(1)).bincount(minlength=4) / 20_000
    assert close(drawn.double(), torch.tensor(expected, dtype=torch.float64), 0.015)
    assert [p == 0 for p in drawn] == [p == 0 for p in expected]


def test_top_p_keeps_as_many_tokens_in_bfloat16_as_it_should(monkeypatch):
    logits = (3 * torch.randn(1, 20_000, generator=torch.Generator().manual_seed(0))).bfloat16()
    p, drawn = logits.double().softmax(-1).sort(descending=True).values, []
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: drawn.append(p) or torch.zeros(1, 1).long())
    pick_token(logits, top_p=0.99)
    assert abs(int((drawn[0] > 0).sum()) - int((p.cumsum(-1) - p < 0.99).sum())) <= 3


@pytest.mark.parametrize("options", [dict(top_k=2), dict(top_p=0.5)])
def test_ties_let_no_extra_token_through_top_k_or_top_p(options):
    assert len(pick_token(torch.zeros(1000, 4), **options).unique()) == 2


@pytest.mark.parametrize("sample", [generate, GPT.generate], ids=["cached", "plain"])
def test_generate_leaves_the_training_mode_and_samples_without_dropout_or_gradient(sample):
    model = make(dropout=0.5).train()
    text = sample(model, tokens(B=8, T=5), 10, seed=1)
    assert model.training and not model.routed_blocks[0].logits.requires_grad
    assert torch.equal(text, sample(make(), tokens(B=8, T=5), 10, seed=1))


# The KV cache


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_step_by_step_with_the_cache_equals_a_causal_pass_of_each_row_alone(data):
    """In one: ragged prompts, windows that restart, rows apart from each other, storage that grows, every routing."""
    nh, hs = data.draw(st.sampled_from([(1, 4), (2, 2), (3, 4)]), "heads, head size")
    model = make(
        seed=data.draw(st.integers(0, 9), "seed"),
        **data.draw(st.sampled_from(KINDS + EXPERTS), "kind"),
        block_size=data.draw(st.integers(1, 12), "block_size"),
        n_layer=data.draw(st.integers(1, 4), "n_layer"),
        route_every=data.draw(st.integers(0, 3), "route_every"),
        capacity=data.draw(st.sampled_from([0.05, 0.25, 0.5, 1.0]), "capacity"),
        n_head=nh,
        n_embd=nh * hs,
        bias=data.draw(st.booleans(), "bias"),
    )
    taking = data.draw(st.sampled_from([-1e3, 0.0, 1e3]), "none, some or all taken")
    bias_decisions(model, taking)
    lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=4), "lengths of the prompts")
    new = data.draw(st.integers(1, 15), "new tokens")
    chunk = data.draw(st.integers(1, 4), "chunk")
    seen, torch_seed = [], data.draw(st.integers(0, 9), "seed of the text")
    text = tokens(B=len(lengths), T=20 + new, seed=torch_seed)
    follow = iter(text[:, 20:].T)

    def forced(logits, **options):
        seen.append(logits)
        return next(follow)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv, "pick_token", forced)
        patch.setattr(kv.LayerCache, "CHUNK", chunk)
        list(stream(model, [row[20 - length : 20] for row, length in zip(text, lengths)], new))
    for row, length in enumerate(lengths):
        start = 20 - length
        for i, logits in enumerate(seen):
            if 20 + i - start > model.config.block_size:
                start = 20 + i - max(1, model.config.block_size // 2)
            assert close(logits[row], model(text[[row], start : 20 + i], routing="causal")[0][0, -1])


@every_kind
@pytest.mark.parametrize("options", [dict(), dict(top_k=5, temperature=0.7), dict(top_p=0.8), dict(temperature=0)])
def test_cached_and_uncached_generate_give_the_same_tokens(kind, options):
    model, prompt = make(**kind), tokens(B=4, T=5)
    cached = generate(model, prompt, 70, seed=3, **options)  # the window of 32 restarts three times
    assert cached.shape == (4, 75) and torch.equal(cached, model.generate(prompt, 70, seed=3, **options))


def test_a_routed_block_keeps_and_computes_only_what_it_takes():
    model = make(n_layer=6)
    computed, taken = collections.Counter(), collections.Counter()
    for i, block in enumerate(model.routed_blocks):
        block.mlp.register_forward_hook(lambda module, args, out, i=i: computed.update({i: args[0].shape[:2].numel()}))
    cache = KVCache(model.config, 4)
    logits = prefill(model, cache, tokens(B=4, T=9).tolist())
    prefilled = [list(layer.length) for layer in cache.layers]
    assert prefilled[1::2] == [b.taken.sum(1).tolist() for b in model.routed_blocks] and prefilled[::2] == [[9] * 4] * 3
    computed.clear()
    for _ in range(20):
        logits = step(model, cache, pick_token(logits))
        taken.update({i: int(block.taken.sum()) for i, block in enumerate(model.routed_blocks)})
    assert computed == taken and 0 < taken.total() < 3 * 4 * 20
    held = sum(sum(layer.length) for layer in cache.layers[1::2])
    assert held == taken.total() + sum(sum(length) for length in prefilled[1::2])


def test_storage_follows_what_is_used():
    model = make()
    per_token = 2 * 16 * 8  # keys and values, n_embd, float64
    cache, chunk = KVCache(model.config, 1), kv.LayerCache.CHUNK
    assert cache.nbytes == 0
    for block in model.routed_blocks:
        block.predictor[-1].bias.data.fill_(-1e3)
    prefill(model, cache, [[1, 2, 3]])
    assert [layer.nbytes for layer in cache.layers] == [chunk * per_token, 0] * 2
    cache.clear([0])
    assert cache.nbytes == 0
    layer, sizes = kv.LayerCache(2, block_size=10 * chunk), set()
    for used in range(1, 10 * chunk + 1):
        k = torch.full((1, 2, 1, 8), float(used), dtype=torch.float64)
        slots = kv.Slots([1], [layer.length[1]], 1, batch_size=2, device="cpu")
        keys, values, mask = kv.View(layer, slots, [1]).append(k, -k)
        assert keys[0, 0, :, 0].tolist() == list(range(1, used + 1)) and torch.equal(values, -keys) and mask is None
        allocated = layer.nbytes / (2 * per_token)
        sizes.add(allocated)
        assert used <= allocated <= min(1.5 * used + chunk, 10 * chunk)
    assert layer.length == [0, 10 * chunk] and len(sizes) < 8  # each new size was a copy


def test_rows_of_a_cache_can_be_used_in_any_order():
    model, cache = make(), KVCache(make().config, 3)
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    first = prefill(model, cache, prompts)
    second = step(model, cache, torch.tensor([10, 11, 12]))
    other = KVCache(model.config, 3)
    assert close(prefill(model, other, [prompts[2], prompts[0], prompts[1]], [2, 0, 1]), first[[2, 0, 1]])
    assert close(step(model, other, torch.tensor([11]), [1]), second[[1]])
    assert close(step(model, other, torch.tensor([12, 10]), [2, 0]), second[[2, 0]])
    third = step(model, cache, torch.tensor([13, 14, 15]))
    assert close(step(model, other, torch.tensor([15, 14, 13]), [2, 1, 0]), third[[2, 1, 0]])


def test_what_memory_held_before_does_not_reach_a_text():
    prompts = [[1, 2, 3, 4, 5, 6, 7], [1]]
    clean = torch.stack(list(stream(make(), prompts, 9, temperature=0)))
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN
    try:
        assert torch.equal(torch.stack(list(stream(make(), prompts, 9, temperature=0))), clean)
    finally:
        torch.use_deterministic_algorithms(False)


def test_streams_side_by_side_and_single_steps_are_without_dropout_or_gradient_and_leave_the_training_mode():
    model, prompt = make(dropout=0.5).train(), tokens(B=2, T=5)
    expected = list(generate(make(), prompt, 9, temperature=0)[:, 5:].T)
    short, long = (stream(model, prompt, 3, temperature=0), stream(model, prompt, 9, temperature=0))
    got = []
    for token in long:
        got.append(token)
        next(short, None)
        assert model.training and torch.is_grad_enabled()
    assert torch.equal(torch.stack(got), torch.stack(expected))
    cache, other = KVCache(model.config, 2), KVCache(model.config, 2)
    for logits, again in (
        (prefill(model, cache, prompt.tolist()), prefill(model, other, prompt.tolist())),
        (step(model, cache, prompt[:, 0]), step(model, other, prompt[:, 0])),
    ):
        assert torch.equal(logits, again) and not logits.requires_grad


@pytest.mark.parametrize("kind", [dict(), dict(n_expert=3, staged=True)], ids=["MoD", "staged"])
def test_a_model_stored_in_bfloat16_still_routes_in_float32(kind):
    torch.manual_seed(0)
    model = set_dtype(build(config_class(kind)(**{**TINY, **kind})), torch.bfloat16)
    routing = [p for name, p in model.named_parameters() if ".router." in name or ".predictor." in name]
    assert routing and all(p.dtype == torch.float32 for p in routing)
    assert model.transformer.wte.weight.dtype == model.transformer.h[0].mlp.c_fc.weight.dtype == torch.bfloat16
    cache = KVCache(model.config, 2)
    list(stream(model, [[1, 2, 3], [4]], 40, seed=1, cache=cache))
    assert cache.layers[0].k.dtype == torch.bfloat16
    assert all(module.logits is None or module.logits.dtype == torch.float32 for module in model.routing_modules)
    assert model(tokens(), routing="causal")[0].dtype == torch.bfloat16


def test_the_caller_sees_what_was_taken_on_the_way():
    model, prompt = make(), tokens(B=2, T=5)
    decisions = [torch.stack([b.taken for b in model.routed_blocks]) for _ in stream(model, prompt, 9, temperature=0)]
    text = generate(model, prompt, 9, temperature=0)
    model(text[:, :-1], routing="causal")  # the last new token was never read
    assert torch.equal(torch.cat(decisions, dim=2), torch.stack([b.taken for b in model.routed_blocks]))


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(capacity=12.5), "capacity is a fraction in (0, 1], got 12.5; for 12.5% write 0.125"),
        (dict(capacity=0.0), "capacity is a fraction in (0, 1], got 0"),
        (dict(capacity=math.nan), "capacity is a fraction in (0, 1], got nan"),
        (dict(n_embd=100, n_head=12), "n_embd must be a multiple of n_head, got 100 and 12; 96 would work"),
        (dict(n_layer=0), "n_layer must be at least 1, got 0"),
        (dict(route_every=-1), "route_every is 0 (no block is routed), 1 (every block), 2, ...; got -1"),
        (dict(dropout=1.0), "dropout is a probability in [0, 1), got 1"),
        (dict(causal_method="oracle"), "causal_method must be predictor or router, got 'oracle'"),
        (dict(variant="sigmoid"), f"unknown variant 'sigmoid'; variants.py lists {', '.join(VARIANTS)}"),
    ],
)
def test_a_config_that_cannot_work_is_explained_in_one_line(changes, message):
    with pytest.raises(ValueError) as error:
        GPTConfig(**changes)
    assert message in str(error.value)


def test_a_call_that_cannot_work_is_explained_in_one_line():
    model = make()
    with pytest.raises(ValueError, match='routing must be "topk" or "causal", got \'sample\''):
        model(tokens(), routing="sample")
    for T in (0, 33):
        with pytest.raises(ValueError, match=f"a sequence has 1 to block_size = 32 tokens, got {T}"):
            model(tokens(T=T))
    for wrong in (dict(temperature=-1), dict(temperature=math.nan), dict(top_k=-1), dict(top_p=0), dict(top_p=1.1)):
        with pytest.raises(ValueError, match="sampling needs a temperature >= 0, top_k >= 0"):
            generate(model, tokens(), 1, **wrong)
    cache = KVCache(model.config, 2)
    with pytest.raises(ValueError, match="the cache has 2 rows, but there are 3 prompts"):
        generate(model, tokens(B=3), 1, cache=cache)
    for prompts in ([[1], []], [[1], [2] * 33]):
        with pytest.raises(ValueError, match="a prompt has 1 to block_size = 32 tokens, got"):
            prefill(model, cache, prompts)
    prefill(model, cache, [[1], [2] * 32])
    with pytest.raises(ValueError, match=r"rows \[1\] have read block_size = 32 tokens; prefill them anew"):
        step(model, cache, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="one number per routed block: 2, got 1"):
        forward_flops(model.config, 32, [4])
