"""Each class of variants.py changes what it says and nothing else, and works wherever mod.py's routed block does."""

import dataclasses
import os
import signal

import pytest
import torch

import train
from cache import KVCache, prefill
from helpers import equal, told, weights_of
from mod import GPT, GPTConfig, RoutedBlock
from support import checkpoint
from test_mod import close, inputs, make, places, run, tokens
from variants import VARIANTS

variants = pytest.mark.parametrize("variant", VARIANTS)


# What holds for all of them; test_mod.py has more


@variants
def test_a_variant_is_recorded_and_resumes_to_the_same_weights(variant, tiny, capsys):
    whole = dataclasses.replace(tiny, variant=variant, capacity=0.3)
    train.train(whole)
    assert f"{variant})" in capsys.readouterr().out
    model, info = checkpoint.load(train.Path(whole.out_dir), "last", "cpu")
    assert info["model"]["variant"] == variant and type(model.routed_blocks[0]) is VARIANTS[variant]
    half = dataclasses.replace(whole, out_dir=whole.out_dir + "-half")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "report", lambda row, n: str(row["step"] == 3 and os.kill(os.getpid(), signal.SIGTERM)))
        train.train(half)
    line = told(train, ["--resume", f"--out_dir={half.out_dir}", "--variant="])
    assert f"another model: variant was {variant}, now ''" in line
    train.main(["--resume", f"--out_dir={half.out_dir}"])
    assert equal(weights_of(half.out_dir), weights_of(whole.out_dir))


# Gates and scores


@pytest.mark.parametrize("name, gate", [("no_gate", lambda r: 1.0), ("sigmoid_gate", torch.sigmoid)])
@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_another_gate_changes_the_weight_of_the_update_and_nothing_else(name, gate, routing):
    block, x = make(variant=name).transformer.h[1], inputs()
    y, expected = run(block, x, routing), x.clone()
    for b in range(3):
        taken = block.taken[b].nonzero().flatten()
        assert 0 < len(taken) < 32
        part = x[b : b + 1, taken]
        expected[b, taken] += (gate(block.router(part)) * block.update(part, places(part)))[0]
    assert close(y, expected)


def test_without_a_gate_the_router_gets_no_gradient():
    model = make(variant="no_gate")
    model(tokens(), tokens(seed=9))[1].backward()
    assert all(block.router.weight.grad is None for block in model.routed_blocks)


def test_a_loud_router_is_the_router_times_ten():
    block, x = make(variant="loud_router").transformer.h[1], inputs()
    plain = RoutedBlock(GPTConfig(**{**vars(make().config)}), layer=1).double().eval()
    plain.load_state_dict(block.state_dict())
    plain.router.weight.data *= 10
    assert close(run(block, x), run(plain, x))


def test_the_explorers_noise_is_3_standard_deviations_at_first_and_half_every_250_passes_of_training():
    block, r = make(variant="exploring_noise").routed_blocks[0].train(), 7 * inputs()[..., 0]
    for passes, noise in ((0, 3), (250, 1.5), (750, 0.375)):
        block.passes.fill_(passes)
        torch.manual_seed(0)
        scores = block.scores(r)
        torch.manual_seed(0)
        assert close(scores, r + noise * r.std() * torch.randn_like(r)) and block.passes == passes + 1
    assert torch.equal(block.eval().scores(r), r) and block.passes == 751


# Controls


def test_the_position_control_is_one_comb_under_both_routings():
    block = make(variant="position", capacity=0.125).transformer.h[1]
    for routing in ("topk", "causal"):
        run(block, inputs(), routing)
        assert block.taken.nonzero()[:, 1].tolist() == [7, 15, 23, 31] * 3
    for percent in range(1, 101):
        block = make(variant="position", capacity=percent / 100, block_size=100).transformer.h[1]
        for T in (1, 7, 50, 100):
            taken = {}
            for routing in ("topk", "causal"):
                run(block, inputs(B=1, T=T), routing)
                taken[routing] = block.taken[0].nonzero().flatten().tolist()
            if percent * T >= 100:
                assert taken["topk"] == taken["causal"]
            else:
                assert taken == {"topk": [0], "causal": []}


def test_the_stochastic_control_ignores_the_router_and_keeps_its_density():
    block = make(variant="stochastic", capacity=0.25, block_size=4000).transformer.h[1]
    x = inputs(B=1, T=4000)
    run(block, x)
    first = block.taken
    run(block, x)
    assert not torch.equal(first, block.taken)  # new noise in every pass
    chance = (first & block.taken).sum() / 1000
    assert 0.2 < chance < 0.3
    run(block, x, "causal")
    assert 0.22 < block.taken.double().mean() < 0.28
    one, other = make(variant="stochastic").routed_blocks
    assert not torch.equal(one.rule, other.rule)


# Other blocks, capacities and causal rules


@pytest.mark.parametrize("routing", ["topk", "causal"])
def test_attention_only_routes_attention_and_gives_every_token_its_mlp(routing):
    block, x = make(variant="attention_only").transformer.h[1], inputs(B=2)
    y = run(block, x, routing)
    for b in range(2):
        taken = block.taken[b].nonzero().flatten()
        assert 0 < len(taken) < 32
        h = x[b].clone()
        part = x[b : b + 1, taken]
        h[taken] += block.router(part)[0] * block.attn(block.ln_1(part), places(part))[0]
        assert close(y[b], h + block.mlp(block.ln_2(h)))


def test_falling_capacity_falls_with_the_depth():
    model = make(variant="falling_capacity", n_layer=8, capacity=0.25)
    assert [block.capacity for block in model.routed_blocks] == [0.4375, 0.3125, 0.1875, 0.0625]
    model(tokens())
    assert [int(block.taken[0].sum()) for block in model.routed_blocks] == [14, 10, 6, 2]
    assert make(variant="falling_capacity", capacity=1.0).routed_blocks[0].capacity == 1.0


def test_the_expert_threshold_is_the_moving_mean_of_the_smallest_weight_that_topk_took():
    block = make(variant="expert_threshold").transformer.h[1].train()
    smallest, weights = [], []
    for seed in range(40):
        x = inputs(seed=seed)
        run(block, x)
        r = (x @ block.router.weight[0]).masked_fill(~block.taken, torch.inf)
        smallest.append(r.amin(dim=1).mean().item())
        weights = [0.95 * w for w in weights] + [0.05]
        threshold = sum(w * s for w, s in zip(weights, smallest)) / sum(weights)  # unbiased from the first step on
        assert torch.isclose(block.mean / block.ones, torch.tensor(threshold, dtype=torch.float64))
    block.eval()
    x = inputs(B=200, seed=99)
    run(block, x, "causal")
    assert torch.equal(block.taken, x @ block.router.weight[0] > block.mean / block.ones)
    assert abs(block.taken.double().mean() - 0.25) < 0.03
    before = block.mean.clone()
    run(block, x)  # evaluation leaves it alone
    assert torch.equal(block.mean, before)


def test_a_new_variant_is_a_class_and_a_name(monkeypatch):
    """What the top of variants.py promises, from the config to the cache."""

    class HalfGate(RoutedBlock):
        def gate(self, r):
            return r / 2

    monkeypatch.setitem(VARIANTS, "half_gate", HalfGate)
    model = GPT(GPTConfig(block_size=32, vocab_size=23, n_layer=2, n_head=2, n_embd=16, variant="half_gate"))
    assert type(model.routed_blocks[0]) is HalfGate
    assert model.flops(32) == make(n_layer=2, predictor_hidden=32, capacity=0.125).flops(32)
    prefill(model, KVCache(model.config, 1), [[1, 2, 3]])
