"""Several ranks train as one process does: same sequences, gradients and losses, also when stopped and resumed."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import train
from helpers import ROOT, same, state_of, told
from support import checkpoint, ranks, report
from support import run as run_module
from support.options import UserError
from support.report import peak_flops

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun's rendezvous is unreliable on Windows")

SCRIPT = """
import sys
import torch
torch.set_default_dtype(torch.{dtype})
torch.set_num_threads(1)
import train
train.main(sys.argv[1:])
"""


@pytest.fixture
def start(tmp_path):
    """start(config, ranks, dtype) starts train.py under torchrun, or without it if ranks is 0."""
    processes = []

    def begin(config, ranks, dtype="float32"):
        script = tmp_path / f"{dtype}.py"
        script.write_text(SCRIPT.format(dtype=dtype))
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
        argv = [f"--{name}={value}" for name, value in dataclasses.asdict(config).items()]
        process = subprocess.Popen(
            [sys.executable, *torchrun, str(script), *argv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        processes.append(process)
        return process

    yield begin
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def finished(process):
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    return out


def called(config, name, **options):
    return dataclasses.replace(config, out_dir=str(Path(config.out_dir).with_name(name)), **options)


@pytest.fixture
def small(tiny):
    return dataclasses.replace(
        tiny, dropout=0.0, batch_size=2, gradient_accumulation_steps=2, max_iters=20, eval_interval=5, warmup_iters=3
    )


slow = pytest.mark.slow


@pytest.mark.parametrize("route_every", [pytest.param(0, id="dense", marks=slow), pytest.param(2, id="MoD")])
def test_two_ranks_equal_two_micro_steps_of_one_process_bit_for_bit(small, start, route_every):
    config = dataclasses.replace(small, route_every=route_every, grad_clip=0.1)
    alone, both = called(config, "alone"), called(config, "both")
    processes = [start(alone, 0), start(both, 2)]
    out = [finished(process) for process in processes][1]
    assert same(state_of(both), state_of(alone))
    assert out.count("Best causal loss") == 1 and "; on 2 ranks, the first on cpu, float32" in out  # only one prints


@slow
@pytest.mark.parametrize(
    "options",
    [
        dict(route_every=0),
        dict(),
        dict(variant="stochastic", dropout=0.2),
        dict(n_expert=2, n_noop=1),
        dict(n_expert=2, staged=True),
    ],
)
def test_one_two_and_four_ranks_agree_in_float64(small, start, options):
    config = dataclasses.replace(small, gradient_accumulation_steps=4, **options)
    states = []
    for n in (0, 2, 4):
        run = called(config, f"ranks-{n}")
        finished(start(run, n, "float64"))
        states.append(state_of(run))
    for rows, weights, *_ in states[1:]:
        assert all(torch.allclose(w, states[0][1][name], rtol=0, atol=1e-9) for name, w in weights.items())
        for row, expected in zip(rows, states[0][0], strict=True):
            assert row.keys() == expected.keys() and row["step"] == expected["step"]
            for name in ("val_loss_causal", "val_loss_topk", "train_loss", "aux_loss"):
                assert name not in row or math.isclose(row[name], expected[name], rel_tol=0, abs_tol=1e-9), name


def until(process, out_dir, step):
    """Wait for the checkpoint of `step`."""
    last = out_dir / "last.json"
    while not last.exists() or json.loads(last.read_text())["step"] < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def ranks_of(process):
    ps = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    pairs = [map(int, line.split()) for line in ps.splitlines()]
    return [pid for pid, parent in pairs if parent == process.pid]


def kill_all(process):
    """Kill torchrun and its ranks, which are not in its process group."""
    for pid in ranks_of(process):
        os.kill(pid, signal.SIGKILL)
    process.kill()


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        pytest.param(signal.SIGKILL, "all", marks=slow), pytest.param(signal.SIGTERM, "torchrun", marks=slow),
        pytest.param(signal.SIGINT, "torchrun", marks=slow), pytest.param(signal.SIGTERM, "the last rank", marks=slow),
    ],
)  # fmt: skip
def test_ranks_that_were_killed_or_stopped_go_on_to_the_same_end(small, start, number, whom):
    config = dataclasses.replace(small, max_iters=300, eval_interval=10)
    whole, stopped = called(config, "whole"), called(config, "stopped")
    first, second = start(whole, 2), start(stopped, 2)
    until(second, Path(stopped.out_dir), 50)
    if whom == "all":
        kill_all(second)
    elif whom == "torchrun":  # as from a scheduler or Ctrl-C; torchrun passes it on
        second.send_signal(number)
    else:  # the ranks stop together
        os.kill(max(ranks_of(second)), number)
    out, _ = second.communicate(timeout=60)
    step = checkpoint.read(Path(stopped.out_dir), "last")["step"]
    assert step < 300 and (
        number == signal.SIGKILL or out.count(f"Stopped and saved at step {step}. Resume with: torchrun") == 1
    )
    assert not (Path(stopped.out_dir) / "model-300.pt").exists()
    out = finished(start(dataclasses.replace(stopped, resume=True), 2))
    assert f"Resuming {stopped.out_dir} at step {step}" in out and "Changed since" not in out
    finished(first)
    assert same(state_of(stopped), state_of(whole))


@slow
def test_three_ranks_that_stop_and_resume_equal_three_that_never_stopped(small, start):
    """Sums over three ranks depend on their order, and so on where a gradient lies in what the ranks exchange."""
    config = dataclasses.replace(small, gradient_accumulation_steps=3, decay_lr=False)
    whole, stopped = called(config, "whole"), called(config, "stopped")
    for run in (whole, dataclasses.replace(stopped, max_iters=10), dataclasses.replace(stopped, resume=True)):
        finished(start(run, 3))
    assert same(state_of(stopped), state_of(whole))


@slow
def test_on_another_number_of_ranks_a_run_goes_on_and_says_so(small, start):
    finished(start(small, 2))
    longer = dataclasses.replace(small, max_iters=22, resume=True)
    out = finished(start(longer, 0))
    assert "Changed since it stopped: max_iters was 20, now 22" in out and "ranks was 2, now 1" in out
    assert checkpoint.read(Path(small.out_dir), "last")["step"] == 22
    evaluation = dataclasses.replace(small, eval_only=True, gradient_accumulation_steps=1)  # it has no micro-steps
    assert finished(start(evaluation, 2)).count("val loss") == 1


def test_micro_steps_that_cannot_be_shared_are_refused(small, start):
    process = start(dataclasses.replace(small, gradient_accumulation_steps=3), 2)
    out, _ = process.communicate(timeout=100)
    assert process.returncode and not Path(small.out_dir).exists()
    line = "train.py: gradient_accumulation_steps 3 cannot be shared by 2 ranks; take a multiple of 2\n"
    assert out.count(line) == 1 and str(ROOT / "train.py") not in out  # no traceback except torchrun's


@slow
def test_an_error_on_the_first_rank_ends_the_others_too(small, start):
    with run_module.only_run_in(Path(small.out_dir)):
        out, _ = start(small, 2).communicate(timeout=100)
    assert out.count("train.py: another train.py is at work in") == 1
    assert str(ROOT / "train.py") not in out


@pytest.mark.parametrize("variant", ["no_gate", "exploring_noise", "expert_threshold"])
def test_a_variant_that_several_ranks_cannot_share_is_refused(small, monkeypatch, variant):
    monkeypatch.setattr(ranks, "ranks", lambda: 2)
    with pytest.raises(UserError, match=f"variant {variant} .*; train on one"):
        train.train(dataclasses.replace(small, variant=variant))
    assert not Path(small.out_dir).exists()


def test_a_rank_has_the_gpu_of_its_place_on_its_machine(monkeypatch):
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name, value in {"RANK": "11", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.device("cuda") == ranks.device("cuda:3") == "cuda:3" and ranks.device("cpu") == "cpu"
    for name in ("cuda:1", "mps"):
        with pytest.raises(UserError, match="under torchrun each rank|several ranks cannot share"):
            ranks.device(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(UserError, match="--nproc_per_node=8, but this machine has 4 GPUs"):
        ranks.device("cuda")


# float16, MFU, Weights & Biases


def test_in_float16_an_update_that_overflows_is_skipped_and_the_scale_halved(tiny, monkeypatch):
    config = dataclasses.replace(tiny, dtype="float16", max_iters=12, dropout=0.0, warmup_iters=0)
    scales, unscale = [], torch.amp.GradScaler.unscale_

    def overflowing(self, optimizer):
        scales.append(self.get_scale())
        if len(scales) in (3, 4):
            optimizer.param_groups[0]["params"][0].grad[0] = math.inf
        return unscale(self, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(torch.amp.GradScaler, "unscale_", overflowing)
        rows = train.train(config)
    assert scales[2:5] == [scales[0], scales[0] / 2, scales[0] / 4] and all(map(math.isfinite, scales))
    assert math.isfinite(rows[-1]["val_loss_causal"])
    saved = checkpoint.tensors(Path(tiny.out_dir), checkpoint.read(Path(tiny.out_dir), "last"), "optimizer")
    assert saved["scaler"]["scale"] == scales[0] / 4


def test_float16_learns_what_float32_learns(tiny):
    losses = []
    for dtype in ("float32", "float16"):
        config = called(tiny, dtype, dtype=dtype, max_iters=60, eval_interval=60, dropout=0.0, learning_rate=1e-2)
        losses.append(train.train(config)[-1]["val_loss_causal"])
    assert math.isclose(*losses, abs_tol=0.02) and losses[0] < 3.0


def test_a_run_in_float16_resumes_with_its_scale(tiny, monkeypatch):
    config = dataclasses.replace(tiny, dtype="float16")
    whole = called(config, "whole", max_iters=12)
    monkeypatch.setattr(
        train.torch.amp, "GradScaler", lambda *a, enabled: SCALER(*a, growth_interval=4, enabled=enabled)
    )
    train.train(whole)
    part = called(config, "part", max_iters=12)
    with pytest.raises(KeyboardInterrupt):
        stopped = SimpleNamespace(calls=0)

        def at(step, config, original=train.learning_rate_at):
            stopped.calls += 1
            if stopped.calls == 14:
                os.kill(os.getpid(), signal.SIGINT)
            return original(step, config)

        with monkeypatch.context() as patch:
            patch.setattr(train, "learning_rate_at", at)
            train.train(part)
    train.train(dataclasses.replace(part, resume=True))
    assert same(state_of(part), state_of(whole))
    scales = [
        checkpoint.tensors(Path(c.out_dir), checkpoint.read(Path(c.out_dir), "last"), "optimizer")["scaler"]
        for c in (part, whole)
    ]
    assert scales[0] == scales[1] and scales[0]["scale"] == 2.0**16 * 2**3


SCALER = torch.amp.GradScaler


def test_mfu_is_shown_only_if_the_peak_is_known(tiny, monkeypatch):
    for name, peak in (
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla T4", 65e12), ("NVIDIA GeForce GTX 1080", None), ("NVIDIA L40S", None),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops("cuda:0", "bfloat16") == peak
        assert peak_flops("cuda:0", "float32") is None
    assert peak_flops("cpu", "float32") is None
    lines, seconds = [], [0.0]
    monkeypatch.setattr(report, "peak_flops", lambda *a: 1e6)
    monkeypatch.setattr(train.tqdm, "set_postfix_str", lambda self, line, refresh: lines.append(line))

    def clock():
        seconds[0] += 0.25  # called twice per step and twice to read its losses: half a second together
        return seconds[0]

    monkeypatch.setattr(train.time, "perf_counter", clock)
    train.train(dataclasses.replace(tiny, log_interval=1))
    facts = json.loads((Path(tiny.out_dir) / "config.json").read_text())
    assert lines[-1].endswith(f", 128 tokens/s, MFU {facts['flops_per_step'] / 0.5 / 1e6:.0%}")


def test_weights_and_biases_gets_every_evaluation_and_is_imported_only_when_asked(tiny, monkeypatch):
    logged, begun = [], []
    run = SimpleNamespace(
        log=lambda row, step: logged.append((step, row["val_loss_causal"])), finish=lambda: logged.append("finished")
    )
    fake = SimpleNamespace(init=lambda **options: begun.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    rows = train.train(dataclasses.replace(tiny, wandb="my-project"))
    assert logged == [*((row["step"], row["val_loss_causal"]) for row in rows), "finished"]
    assert begun[0]["project"] == "my-project" and begun[0]["config"]["n_layer"] == tiny.n_layer
    argv = [f"--{name}={value}" for name, value in dataclasses.asdict(called(tiny, "new", wandb="x")).items()]
    for missing in (None, ModuleType("wandb")):  # not installed; an empty folder wandb/
        monkeypatch.setitem(sys.modules, "wandb", missing)
        assert "--wandb needs Weights & Biases: pip install wandb" in told(train, argv)
    train.main(["--eval_only", f"--out_dir={tiny.out_dir}"])  # evaluation does not need it
    train.train(tiny)
    assert not Path(called(tiny, "new").out_dir).exists()
