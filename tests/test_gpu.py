"""On a CUDA GPU:  python -m pytest -m gpu     Without one, all of these are skipped."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import cache
import sample
import train
from experiments import bench
from helpers import ROOT, compiled_gradient_error, state_of, weights_of
from mod import GPT, GPTConfig
from mode import build, config_class
from test_device import KINDS, decisions, kinds

GPU = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.fixture
def small(tiny):
    return dataclasses.replace(tiny, device=GPU, dtype="float32", compile="False", dropout=0.0, n_layer=4, max_iters=20)


def losses(config, name, **changes):
    """The validation losses of a run, causal and top-k, at each evaluation."""
    out_dir = str(Path(config.out_dir).with_name(name))
    rows = train.train(dataclasses.replace(config, out_dir=out_dir, eval_interval=10, **changes))
    return torch.tensor([[row["val_loss_causal"], row["val_loss_topk"]] for row in rows])


def test_every_operation_of_the_routing_gives_what_the_cpu_gives():
    assert bench.check(bench.BenchConfig(device=GPU)) == 0


@kinds
def test_training_learns_what_it_learns_on_the_cpu(small, kind):
    expected = losses(small, "cpu", device="cpu", **kind)
    for dtype, tolerance in (("float32", 2e-3), ("bfloat16", 0.03), ("float16", 0.03)):
        assert torch.allclose(losses(small, dtype, dtype=dtype, **kind), expected, rtol=0, atol=tolerance), dtype


@kinds
def test_a_training_step_never_waits(small, monkeypatch, kind):
    """PyTorch itself raises an error at any operation that makes Python wait for the GPU."""
    step = train.training_step

    def strict(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    losses(small, "warm", **kind, max_iters=2)  # the first call of a library may wait
    monkeypatch.setattr(train, "training_step", strict)
    losses(small, "strict", **kind)


@pytest.mark.parametrize("kind", ["MoD", "dense", "staged"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_training_never_compiles_again_and_learns_the_same(small, kind, dtype):
    expected = losses(small, "eager", dtype=dtype, max_iters=50, **KINDS[kind])
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = losses(small, "compiled", dtype=dtype, max_iters=50, compile="True", **KINDS[kind])
    assert torch.allclose(compiled, expected, rtol=0, atol=5e-3 if dtype == "float32" else 0.03)


@pytest.mark.parametrize("kind", ["MoD", "dense", "staged"])
def test_the_compiled_model_has_the_eager_gradients(kind):
    assert compiled_gradient_error(KINDS[kind], GPU) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_run_that_stops_and_resumes_equals_one_that_never_stopped(small, dtype):
    config = dataclasses.replace(small, dtype=dtype, decay_lr=False, dropout=0.1)
    whole, part = (dataclasses.replace(config, out_dir=config.out_dir + name) for name in ("-whole", "-part"))
    train.train(whole)
    train.train(dataclasses.replace(part, max_iters=11))
    train.train(dataclasses.replace(part, resume=True))
    ours, theirs = weights_of(part.out_dir), weights_of(whole.out_dir)
    tolerance = 1e-4 if dtype == "float32" else 5e-3  # the attention's backward pass may round differently
    assert all(torch.allclose(w, theirs[name], rtol=0, atol=tolerance) for name, w in ours.items())
    assert [row["step"] for row in state_of(part)[0]][-1] == 20


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_by_nccl_train_as_one_process(small):
    small = dataclasses.replace(small, gradient_accumulation_steps=2, eval_interval=10)
    expected = losses(small, "one")
    argv = [f"--{name}={value}" for name, value in dataclasses.asdict(small).items()]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    subprocess.run([*torchrun, str(ROOT / "train.py"), *argv], check=True, timeout=300, env={**os.environ})
    rows = [json.loads(line) for line in (Path(small.out_dir) / "metrics.jsonl").read_text().splitlines()]
    got = torch.tensor([[row["val_loss_causal"], row["val_loss_topk"]] for row in rows])
    assert torch.allclose(got, expected, rtol=0, atol=2e-3)


def model_of(**kind):
    torch.manual_seed(0)
    options = dict(block_size=32, vocab_size=23, n_layer=4, n_head=2, n_embd=32, predictor_hidden=8) | kind
    model = build(config_class(options)(**options)).double().eval()
    for p in model.parameters():
        p.data *= 5  # so that some tokens are taken and others not
    return model


@kinds
def test_the_text_is_the_cpus_with_and_without_the_cache(kind):
    model, prompt = model_of(**kind), torch.randint(23, (3, 5), generator=torch.Generator().manual_seed(0))
    expected = cache.generate(model, prompt, 60, temperature=0)
    for generate in (cache.generate, GPT.generate):
        assert torch.equal(generate(model.to(GPU), prompt, 60, temperature=0).cpu(), expected)


@kinds
def test_a_decoded_token_waits_once_per_decision(kind):
    model = model_of(**kind).to(GPU)
    list(cache.stream(model, [[1, 2, 3], [4]], 8))
    tokens = cache.stream(model, [[1, 2, 3], [4]], 20, temperature=0)
    next(tokens)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            n = len(list(tokens))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchronizing" in str(w.message)]
    assert bool(decisions(model.config)) <= len(waits) <= n * decisions(model.config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_sample_prints_a_text(small, tmp_path, dtype):
    train.train(small)
    config = sample.SampleConfig(out_dir=small.out_dir, device=GPU, dtype=dtype, max_new_tokens=60, num_samples=3)
    config = dataclasses.replace(config, show_depth=True, routing_map=str(tmp_path / "map.png"))
    assert [len(text) for text in sample.sample(config)] == [61] * 3


def test_a_training_step_of_mod_takes_less_memory_than_a_dense_one():
    peak, machine = {}, train.resolve(train.TrainConfig(device=GPU, compile="False"))
    for route_every in (2, 0):
        config = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, route_every=route_every)
        step = bench.train_step_of(config, 16, machine)
        step()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak[route_every] = torch.cuda.max_memory_allocated()
        del step
    assert peak[2] < 0.8 * peak[0]
