"""The benchmark measures and checks."""

import dataclasses
import itertools
import json
import math
import re

import pytest
import torch

from experiments import bench
from mod import GPTConfig
from mode import forward_flops
from train import TrainConfig

TINY_BENCH = (
    "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --repeats=3 --warmup=1 --device=cpu".split()
)


def test_bench_measures_and_ends_with_one_json_line(capsys, monkeypatch):
    now = iter(range(1000))
    seconds = {True: 1, False: 4}  # of MoD, of dense

    def clocked(work, device):
        return seconds[next(now) % 2 == 0], work()

    monkeypatch.setattr(bench, "clocked", clocked)
    bench.main([*TINY_BENCH, "--part=training"])
    flops, measured, _, last = capsys.readouterr().out.splitlines()
    assert "a MoD step has 0." in flops and measured.endswith("0.250 of the time")
    figures = json.loads(last)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=65)
    ratio = forward_flops(config, 16) / forward_flops(dataclasses.replace(config, route_every=0), 16)
    assert math.isclose(figures["train_flop_ratio"], ratio, abs_tol=1e-4) and figures["train_time_ratio"] == 0.25
    assert {"device", "torch", "threads", "commit"} <= figures.keys()


def test_bench_compares_with_a_dense_gpt_of_another_shape(capsys):
    bench.main([*TINY_BENCH, "--part=training", "--against=1x24"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    mod = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=65)
    dense = dataclasses.replace(mod, n_layer=1, n_head=3, n_embd=24, route_every=0)
    assert figures["train_flop_ratio"] == round(forward_flops(mod, 16) / forward_flops(dense, 16), 4)
    assert figures["against"] == "1x24"


def test_bench_of_sampling_adds_its_figures(capsys):
    bench.main(TINY_BENCH)
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == 3 * ["Training"] + ["Sampling  1 at once", "Sampling 16 at once"]
    figures = json.loads(last)
    asked = "train_time_ratio train_flop_ratio decode_speedup cache_bytes_ratio device torch"
    assert set(asked.split()) <= figures.keys() and figures["decode_speedup"] > 0
    assert figures["new_tokens"] == 4  # a quarter of the window
    for part in (figures, figures["batch_16"]):
        speed = {name: part[name]["tokens_per_second"] for name in ("mod", "dense")}
        assert math.isclose(part["decode_speedup"], speed["mod"] / speed["dense"], rel_tol=1e-3)
        assert part["cache_bytes_ratio"] == round(part["mod"]["cache_bytes"] / part["dense"]["cache_bytes"], 4)
    assert (
        figures["dense"]["cache_bytes"] == 2 * 2 * 16 * 16 * 4
    )  # blocks, keys and values, the window, n_embd, float32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_brings_the_predictors_to_the_capacity(dtype):
    machine = bench.resolve(TrainConfig(device="cpu", dtype=dtype))
    options = bench.BenchConfig(new_tokens=48)
    model = bench.sampling_model(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=2, n_embd=32), machine)
    run = bench.generate(model, 16, 0, dataclasses.replace(options, block_size=64), machine)
    assert abs(run["taken"] - 0.125) < 0.04
    block = model.routed_blocks[0]  # routing stays in float32
    assert block.router.weight.dtype == block.predictor[0].weight.dtype == torch.float32
    assert block.mlp.c_fc.weight.dtype == model.lm_head.weight.dtype == getattr(torch, dtype)


@pytest.mark.slow
def test_bench_check_reports_what_differs_or_fails(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--check", "--device=cpu"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and all(line.endswith("same") for line in lines) and "none of 34 different" in last

    gather, calls = torch.Tensor.gather, itertools.count()
    monkeypatch.setattr(torch.Tensor, "gather", lambda *a: gather(*a) + next(calls) % 2)  # right, wrong, right, ...
    with pytest.raises(SystemExit) as end:
        bench.main(["--check", "--device=cpu"])
    assert end.value.code == 1 and re.search(r"gather +DIFFERENT by up to 1\n", capsys.readouterr().out)
    monkeypatch.undo()

    monkeypatch.setattr(bench, "pick_device", lambda name: "meta")  # knows no numbers: nothing can be fetched from it
    assert bench.check(bench.BenchConfig()) == 34
    assert "half: gather                         FAILED: " in capsys.readouterr().out


def test_the_figures_of_the_bench_are_what_the_clock_said(capsys, monkeypatch):
    warmup, mod, dense = [1000.0] * 4, [3.0, 8.0], [6.0, 16.0]  # reading the prompt, then four steps
    seconds = iter([*(warmup + 3 * (mod + dense)), *(warmup + 3 * (mod + dense))])
    monkeypatch.setattr(bench, "clocked", lambda work, device: (next(seconds), work()))
    bench.main([*TINY_BENCH, "--part=sampling"])
    assert next(seconds, None) is None
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for B, part in ((1, figures), (16, figures["batch_16"])):
        assert part["decode_speedup"] == 2 and part["dense"]["prefill_seconds"] == 6
        assert part["mod"]["tokens_per_second"] == B * 4 / 8 and part["dense"]["tokens_per_second"] == B * 4 / 16
        assert part["cache_speedup"] == 3 / (8 / 4)


def test_bench_times_the_work_and_hands_on_its_result(monkeypatch):
    monkeypatch.setattr(bench.time, "perf_counter", iter([1.0, 4.5]).__next__)
    assert bench.clocked(lambda: "done", "cpu") == (3.5, "done")
