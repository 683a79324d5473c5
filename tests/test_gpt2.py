"""GPT-2's weights: exact conversion, and training that starts from them or from another run."""

import dataclasses
import math
import re
import sys
from pathlib import Path

import pytest
import torch

import train
from helpers import ROOT, told
from mode import forward_flops
from support import checkpoint, gpt2
from support.options import load
from train import TrainConfig


def theirs(**changes):
    """A transformers GPT-2 with random weights, biases and LayerNorms included."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, n_positions=32, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize(
    "shape", [{}, dict(n_layer=1, n_head=1), dict(n_embd=96, n_head=12), dict(vocab_size=130, n_positions=7, n_layer=5)]
)
def test_our_logits_are_theirs(shape):
    their_model = theirs(**shape)
    model = gpt2.from_transformers(their_model).eval()
    for T in (1, their_model.config.n_positions):
        idx = torch.randint(their_model.config.vocab_size, (3, T))
        for routing in ("topk", "causal"):
            logits, _ = model(idx, routing=routing)
            assert (logits - their_model(idx).logits).abs().max() < 1e-5
    assert model.num_parameters() == sum(p.numel() for p in their_model.parameters())


def test_a_saved_model_becomes_a_checkpoint_that_starts_a_run(tmp_path, tiny):
    their_model = theirs()
    their_model.save_pretrained(tmp_path / "theirs")
    argv = [f"--model={tmp_path / 'theirs'}", f"--out_dir={tmp_path / 'ours'}"]
    gpt2.main(argv)
    model, info = checkpoint.load(tmp_path / "ours", "best", "cpu")
    idx = torch.arange(32)[None]
    assert (model(idx)[0] - their_model(idx).logits).abs().max() < 1e-5
    assert info["data"]["tokenizer"] == "gpt2" and info["data"]["vocab_size"] == 61
    assert "ours does not come from train.py" in told(train, ["--eval_only", f"--out_dir={tmp_path / 'ours'}"])
    assert "ours exists already; name another folder with --out_dir" in told(gpt2, argv)
    assert "could not be loaded (" in told(gpt2, [f"--model={tmp_path}", f"--out_dir={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()


def test_a_download_is_of_one_revision_and_runs_no_code(tmp_path, monkeypatch):
    GPT2LMHeadModel = pytest.importorskip("transformers").GPT2LMHeadModel

    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        return theirs()

    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", from_pretrained)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"):
        gpt2.main([f"--model={name}", f"--out_dir={tmp_path / name}-ours"])
        assert asked[-1][0] == name and asked[-1][1]["use_safetensors"] is True
        assert re.fullmatch("[0-9a-f]{40}", asked[-1][1]["revision"])
    line = told(gpt2, ["--model=somebody/else", f"--out_dir={tmp_path / 'new'}"])
    assert "--model is gpt2, gpt2-medium, gpt2-large, gpt2-xl or the folder of a saved model, got somebody/else" in line
    assert len(asked) == 4 and len({options["revision"] for _, options in asked}) == 4


def test_another_architecture_is_refused(tmp_path):
    for change in (
        dict(activation_function="relu"),
        dict(n_inner=100),
        dict(layer_norm_epsilon=1e-6),
        dict(scale_attn_by_inverse_layer_idx=True),
    ):
        theirs(**change).save_pretrained(tmp_path / "theirs")
        line = told(gpt2, [f"--model={tmp_path / 'theirs'}", f"--out_dir={tmp_path / 'new'}"])
        assert f"not GPT-2's architecture: {next(iter(change))} {next(iter(change.values()))!r}" in line


def test_without_transformers_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "this needs transformers: pip install transformers" in told(gpt2, [f"--out_dir={tmp_path / 'new'}"])


# Starting from a checkpoint, GPT-2's or of a run


@pytest.fixture
def dense(tiny):
    """A dense run, to start others from."""
    config = dataclasses.replace(tiny, route_every=0, out_dir=tiny.out_dir + "-dense", dropout=0.0)
    train.train(config)
    return config


def started(config, **options):
    """The weights at step 0, and the first loss."""
    config = dataclasses.replace(config, **options, max_iters=1, learning_rate=0.0, min_lr=0.0, weight_decay=0.0)
    rows = train.train(config)
    return checkpoint.load(Path(config.out_dir), "last", "cpu")[0].state_dict(), rows[0]["val_loss_topk"]


def test_a_dense_run_starts_where_the_other_ended(dense, tiny):
    before, info = checkpoint.load(Path(dense.out_dir), "best", "cpu")
    weights, loss = started(dense, init_from=dense.out_dir, out_dir=tiny.out_dir)
    assert all(torch.equal(weights[name], w) for name, w in before.state_dict().items())
    assert math.isclose(loss, info["rows"][-1]["val_loss_topk"], abs_tol=1e-6)


def test_a_routed_model_with_a_padded_vocabulary_takes_what_there_is(dense, tiny):
    before = checkpoint.load(Path(dense.out_dir), "best", "cpu")[0].state_dict()
    options = dict(route_every=2, vocab_size=40, block_size=8)
    random, _ = started(dense, **options, out_dir=tiny.out_dir + "-random")
    weights, _ = started(dense, **options, out_dir=tiny.out_dir, init_from=dense.out_dir)
    for name, w in weights.items():
        if ".router." in name or ".predictor." in name:
            assert torch.equal(w, random[name])
        else:
            n = min(len(w), len(before[name]))
            assert torch.equal(w[:n], before[name][:n]) and torch.equal(w[n:], random[name][n:])
    assert weights["transformer.wte.weight"].shape[0] == 40 and weights["transformer.wpe.weight"].shape[0] == 8


def test_a_predictor_of_another_size_begins_at_random(tiny):
    train.train(tiny)
    config = dataclasses.replace(tiny, predictor_hidden=5, init_from=tiny.out_dir)
    before = checkpoint.load(Path(tiny.out_dir), "best", "cpu")[0].state_dict()
    weights, _ = started(config, out_dir=tiny.out_dir + "-next")
    assert torch.equal(weights["transformer.h.1.router.weight"], before["transformer.h.1.router.weight"])
    assert weights["transformer.h.1.predictor.0.weight"].shape[0] == 5


def test_a_resumed_run_does_not_start_again(dense, tiny):
    config = dataclasses.replace(dense, out_dir=tiny.out_dir, init_from=dense.out_dir, max_iters=3)
    train.train(config)
    last = checkpoint.read(Path(config.out_dir), "last")
    rows = train.train(dataclasses.replace(config, resume=True, init_from="gone"))
    assert rows == last["rows"]


def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(dense, tiny, tmp_path):
    argv = [f"--{name}={value}" for name, value in dataclasses.asdict(tiny).items() if name != "init_from"]

    def line(*more):
        return told(train, [*argv, f"--init_from={dense.out_dir}", *more])

    assert "does not fit: block_size was 16, now 20, n_layer was 2, now 3" in line("--n_layer=3", "--block_size=20")
    assert "does not fit: bias was " in line(f"--bias={not tiny.bias}")
    assert "no checkpoint" in told(train, [*argv, f"--init_from={tmp_path}"])
    best = checkpoint.read(Path(dense.out_dir), "best")
    vocab = best["data"]["vocab"][::-1]
    checkpoint.commit(Path(dense.out_dir), "best", {**best, "data": {**best["data"], "vocab": vocab}})
    assert "has other tokens than the data set; they must be the same" in line()
    assert not Path(tiny.out_dir).exists()


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda path: path.stem)
def test_a_preset_and_the_figures_in_its_notes(path):
    config = train.resolve(load(TrainConfig, [str(path), "--device=cpu"], "", preset=True))
    if not path.name.startswith("owt"):
        return
    model = train.model_config(config, {"vocab_size": 50257})
    sequences = config.batch_size * config.gradient_accumulation_steps
    flops = forward_flops(model, model.block_size)
    steps = train.number_of_steps(config, 3 * sequences * flops)
    notes = path.read_text(encoding="utf-8")
    assert f"{steps:,} steps, {steps * sequences * 1024 / 1e9:.0f} billion tokens" in notes
    if model.route_every:
        assert f"{flops / forward_flops(dataclasses.replace(model, route_every=0), 1024):.3f} of the dense" in notes
        hours = [config.flop_budget / (n * 989e12 * 0.4) / 3600 for n in (1, 8, 16)]
        assert "176 hours on 1,\n# 22 on 8, 11 on 16" in notes and [round(h) for h in hours] == [176, 22, 11]
