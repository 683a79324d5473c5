"""Training, evaluation, presets and options: the commands, as sentences."""

import dataclasses
import itertools
import json
import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from helpers import ROOT, compiled_gradient_error, compiles_for_a_cpu, equal, run
from mod import GPT
from mode import forward_flops
from support import checkpoint
from support.data import load_dataset, training_batch
from support.evaluation import evaluate
from support.options import UserError, load
from train import TrainConfig

NAMES = ("mod", "dense", "shallow", "moe", "mode_staged", "mode_integrated")
PRESETS = [ROOT / "config" / f"shakespeare_{name}.py" for name in NAMES]


# Training


def test_a_run_leaves_metrics_checkpoints_config_and_versions(tiny):
    rows = train.train(tiny)
    out_dir = Path(tiny.out_dir)
    assert [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()] == rows
    assert [row["step"] for row in rows] == [0, 3, 6]
    facts = json.loads((out_dir / "config.json").read_text())
    assert facts["config"]["device"] == "cpu" and facts["config"]["dtype"] == "float32"
    assert facts["config"]["seed"] == tiny.seed and facts["versions"]["torch"] == str(torch.__version__)
    for name, row in (("last", rows[-1]), ("best", min(rows, key=lambda row: row["val_loss_causal"]))):
        model, info = checkpoint.load(out_dir, name, "cpu")
        assert info["step"] == row["step"] and info["rows"][-1] == row
        again = evaluate(model, load_dataset(tiny.dataset, tiny.block_size)[1]["val"], tiny.batch_size, tiny.eval_iters)
        assert again["val_loss_causal"] == row["val_loss_causal"]
    assert not list(out_dir.glob("*.tmp"))


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tiny):
    (rows, weights), (again, weights_again), (other, _) = run(tiny), run(tiny), run(tiny, seed=1)
    assert rows == again and equal(weights, weights_again)
    assert rows != other


def test_evaluation_and_logging_do_not_change_training(tiny):
    _, weights = run(tiny, eval_interval=1, log_interval=1, eval_iters=1)
    assert equal(weights, run(tiny, eval_interval=100)[1])


def test_the_predictors_loss_leaves_the_trunk_bit_equal_over_clipped_steps(tiny):
    norms = []
    original = torch.nn.utils.clip_grad_norm_

    def recorded(parameters, limit):
        norms.append(original(parameters, limit))
        return norms[-1]

    torch.nn.utils.clip_grad_norm_ = recorded
    try:
        _, with_loss = run(tiny, grad_clip=0.1, aux_weight=1.0)
    finally:
        torch.nn.utils.clip_grad_norm_ = original
    _, without = run(tiny, grad_clip=0.1, aux_weight=0.0)
    assert min(norms[::2]) > 0.1  # the trunk was clipped at each step
    trunk = {name for name in with_loss if ".predictor." not in name}
    assert all(torch.equal(with_loss[name], without[name]) for name in trunk)
    assert not any(torch.equal(with_loss[name], without[name]) for name in with_loss.keys() - trunk if "weight" in name)


def batches_of(tokens, step, config):
    names = ("batch_size", "block_size", "seed", "device", "gradient_accumulation_steps")
    options = {name: getattr(config, name) for name in names}
    return [training_batch(tokens, step, micro_step=i, **options) for i in range(config.gradient_accumulation_steps)]


def test_a_run_is_adamw_over_the_batches_of_its_steps(tiny):
    """The recipe written out: two models, the loop by hand; whole-batch gradients, PyTorch's own unfused AdamW."""
    config = dataclasses.replace(tiny, dropout=0.0, gradient_accumulation_steps=2, grad_clip=0.5)
    config = dataclasses.replace(config, warmup_iters=2, aux_weight=0.3, eval_interval=6)
    rows, weights = run(config)
    _, data = load_dataset(config.dataset, config.block_size)
    torch.manual_seed(config.seed)
    model = GPT(train.model_config(config, {"vocab_size": 28}))
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in named.values()],
        betas=(0.9, 0.99), fused=False,
    )  # fmt: skip
    cosine = [1e-4 + 9e-4 * (1 + math.cos(math.pi * part / 4)) / 2 for part in range(4)]
    losses = []
    for step, rate in enumerate([1e-3 / 3, 2e-3 / 3, *cosine]):
        for group in optimizer.param_groups:
            group["lr"] = rate
        x, y = (torch.cat(part) for part in zip(*batches_of(data["train"], step, config)))
        _, loss = model(x, y)
        optimizer.zero_grad()
        (loss + 0.3 * model.routing_loss()).backward()
        for kind in (True, False):
            group = [p.grad for name, p in named.items() if ("predictor" in name) == kind]
            norm = torch.sqrt(sum((grad**2).sum() for grad in group))
            for grad in group:
                grad.mul_((0.5 / (norm + 1e-6)).clamp(max=1))
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.allclose(weights[name], p, atol=1e-5) for name, p in model.state_dict().items())
    assert math.isclose(rows[-1]["train_loss"], np.mean(losses), abs_tol=1e-5)
    assert rows[-1]["flops"] == 6 * 3 * 8 * forward_flops(model.config, 16)
    assert rows[-1]["tokens"] == 6 * 8 * 16


def test_dropout_is_new_in_each_micro_step_of_each_step(tiny, monkeypatch):
    masks, build = [], train.build

    def recorded(config):
        model = build(config)
        model.transformer.drop.register_forward_hook(lambda *call: masks.append(bytes(call[-1].flatten() == 0)))
        return model

    monkeypatch.setattr(train, "build", recorded)
    monkeypatch.setattr(train, "evaluate", lambda *args: {"val_loss_causal": 0.0})
    train.train(dataclasses.replace(tiny, dropout=0.5, gradient_accumulation_steps=2))
    assert len(masks) == len(set(masks)) == 2 * 6


def test_the_training_loss_is_the_mean_since_the_last_evaluation(tiny):
    each, _ = run(tiny, eval_interval=1)
    by_three, _ = run(tiny, eval_interval=3)
    for i, row in enumerate(by_three[1:]):
        expected = np.mean([row["train_loss"] for row in each[1 + 3 * i : 4 + 3 * i]])
        assert math.isclose(row["train_loss"], expected, abs_tol=1e-6)


def test_the_training_clock_stands_still_during_evaluation(tiny, monkeypatch):
    now, evaluate = [0.0], train.evaluate
    monkeypatch.setattr(train.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        train, "learning_rate_at", lambda *args, f=train.learning_rate_at: now.__setitem__(0, now[0] + 0.5) or f(*args)
    )
    monkeypatch.setattr(train, "evaluate", lambda *args: now.__setitem__(0, now[0] + 100) or evaluate(*args))
    assert [row["train_seconds"] for row in train.train(tiny)] == [0, 3, 6]


def test_targets_are_the_next_tokens_and_every_window_of_the_split_can_come(tiny):
    tokens, starts = np.arange(tiny.block_size + 2, dtype=np.uint16), set()
    for step in range(20):
        for x, y in batches_of(tokens, step, tiny):
            assert torch.equal(y, x + 1) and x.shape == (tiny.batch_size, tiny.block_size)
            starts |= set(x[:, 0].tolist())
    assert starts == {0, 1}


def test_each_seed_step_and_micro_step_has_windows_of_its_own():
    tokens, starts = np.arange(5000, dtype=np.uint16), set()
    for seed, step, micro_step in itertools.product((1, 2), (0, 1), (0, 1)):
        x, _ = training_batch(tokens, step, 4, 16, seed, "cpu", micro_step, 2)
        starts.add(tuple(x[:, 0].tolist()))
    assert len(starts) == 8


def test_grad_clip_0_does_not_clip(tiny):
    assert equal(run(tiny, grad_clip=0.0)[1], run(tiny, grad_clip=1e9)[1])


def test_of_two_lengths_the_shorter_one_holds():
    config = TrainConfig(max_iters=7, flop_budget=1000.0)
    assert [train.number_of_steps(config, step_flops) for step_flops in (100.0, 200.0)] == [7, 5]


@pytest.mark.parametrize(
    "cuda, mps, bf16, platform, expected",
    [
        (True, True, True, "linux", ("cuda", "bfloat16", "True")),
        (True, False, False, "linux", ("cuda", "float32", "True")),
        (True, False, True, "win32", ("cuda", "bfloat16", "False")),
        (False, True, True, "linux", ("mps", "float32", "False")),
        (False, False, True, "linux", ("cpu", "float32", "False")),
    ],
)
def test_auto_is_the_best_device_its_dtype_and_compiles_on_cuda_under_linux(
    cuda, mps, bf16, platform, expected, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    with monkeypatch.context() as patch:
        patch.setattr(train.sys, "platform", platform)
        found = train.resolve(TrainConfig(max_iters=1))
    assert (found.device, found.dtype, found.compile) == expected


def test_the_learning_rate_warms_up_and_its_cosine_ends_with_the_run():
    config = TrainConfig(max_iters=1000, warmup_iters=100, learning_rate=1.0, min_lr=0.1)
    rates = [train.learning_rate_at(step, config) for step in range(1000)]
    assert np.allclose(rates[:101], np.arange(1, 102) / 101, rtol=0, atol=1e-12)
    assert all(a > b for a, b in zip(rates[100:], rates[101:]))
    assert math.isclose(rates[550], 0.55) and 0.1 <= rates[-1] < 0.1001
    assert train.learning_rate_at(900, dataclasses.replace(config, decay_lr=False)) == 1.0


def test_a_run_says_what_is_not_as_asked(tiny, capsys):
    """A short context rounds the capacity, and a long warm-up never ends."""
    train.train(dataclasses.replace(tiny, block_size=4, warmup_iters=6))
    out = capsys.readouterr().out
    assert "routed at 25.0% capacity" in out and "The warm-up takes 6 steps, the run 6" in out


def test_it_learns(tiny):
    rows, _ = run(tiny, max_iters=150, eval_interval=150, learning_rate=1e-2, dropout=0.0)
    assert rows[-1]["val_loss_causal"] < rows[0]["val_loss_causal"] - 0.5
    assert abs(rows[0]["val_loss_causal"] - math.log(28)) < 0.2  # at the start all characters are equally likely


# Each option, with a value that differs from that of `tiny`: what comes out of the run must differ too.
OTHER_VALUES = dict(
    eval_interval=2, eval_iters=1, block_size=8, vocab_size=40, n_layer=3, n_head=4, n_embd=32, dropout=0.0, bias=True,
    capacity=0.5, route_every=1, variant="stochastic", causal_method="router", predictor_hidden=5, max_iters=7,
    flop_budget=4e6, batch_size=5, gradient_accumulation_steps=2, learning_rate=1e-2, min_lr=1e-3, decay_lr=False,
    warmup_iters=3, weight_decay=0.5, beta1=0.8, beta2=0.9, grad_clip=0.01, aux_weight=0.5, seed=2, dtype="bfloat16",
    n_expert=2, n_noop=2, expert_capacity=0.5, staged=True,
)  # fmt: skip


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_every_option_reaches_the_model_or_the_loop(tiny, name):
    if name in ("n_noop", "expert_capacity", "staged"):
        tiny = dataclasses.replace(tiny, n_expert=2)
    rows, weights = run(tiny)
    assert getattr(tiny, name) != OTHER_VALUES[name]
    other_rows, other_weights = run(tiny, **{name: OTHER_VALUES[name]})
    assert rows != other_rows or not equal(weights, other_weights)


def test_no_option_is_left_out_above():
    elsewhere = "out_dir resume dataset eval_only log_interval device compile init_from wandb".split()  # tests around
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    assert names == {*OTHER_VALUES, *elsewhere}, "give a new option another value above, or test and name it elsewhere"


compiled_kinds = pytest.mark.parametrize(
    "kind",
    [dict(route_every=0), dict(), dict(causal_method="router"), dict(n_expert=2, staged=True)],
    ids=["dense", "MoD", "router", "staged"],
)


@pytest.mark.slow
@compiles_for_a_cpu
@compiled_kinds
def test_the_compiled_model_has_the_eager_gradients(kind):
    assert compiled_gradient_error(kind, "cpu") < 1e-4


def test_pytorch_2_6_does_not_compile_for_a_cpu(tiny, monkeypatch):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.6.0+cu124"))
    with pytest.raises(UserError, match="PyTorch 2.6 compiles wrong gradients for a CPU"):
        train.train(dataclasses.replace(tiny, compile="True"))
    train.resolve(tiny)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.10.0"))
    assert train.resolve(dataclasses.replace(tiny, compile="True")).compile == "True"


@compiles_for_a_cpu
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@compiled_kinds
def test_a_compiled_run_compiles_once(tiny, monkeypatch, kind, backend):
    """Fifty steps with an evaluation after every ten: a second compilation would be an error."""
    compile_model = torch.nn.Module.compile
    monkeypatch.setattr(GPT, "compile", lambda self: compile_model(self, backend=backend, fullgraph=True))
    torch.compiler.reset()
    config = dataclasses.replace(tiny, **kind, max_iters=50, eval_interval=10, gradient_accumulation_steps=2)
    eager = train.train(config)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = train.train(dataclasses.replace(config, compile="True"))
    assert math.isclose(compiled[-1]["val_loss_causal"], eager[-1]["val_loss_causal"], abs_tol=1e-3)


@compiles_for_a_cpu
def test_compile_compiles_and_log_interval_paces_the_progress_line(tiny, monkeypatch):
    compiled, updates = [], []
    monkeypatch.setattr(GPT, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(train.tqdm, "set_postfix_str", lambda self, text, refresh: updates.append(text))
    run(tiny, log_interval=2)
    assert len(updates) == 3 and "tokens/s" in updates[0] and not compiled
    run(tiny, compile="True")
    assert len(compiled) == 1


def test_without_a_terminal_the_training_loss_is_printed_in_lines(tiny, capsys):
    train.train(dataclasses.replace(tiny, log_interval=2))
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss" in line]  # as `grep loss` finds them
    steps = [re.match(r"step (\d)/6  (train loss \d\.\d{4}  [\d,]+ tokens/s|val loss )", line) for line in lines[:-1]]
    assert [match[1] for match in steps] == ["0", "2", "3", "4", "6", "6"]
    assert lines[-1].startswith("Best causal loss: ")


def test_a_run_ends_with_its_best_loss_both_its_times_and_what_to_do_next(tiny, capsys):
    rows = train.train(tiny)
    best = min(rows, key=lambda row: row["val_loss_causal"])
    *_, loss, times, after = capsys.readouterr().out.splitlines()
    assert loss == f"Best causal loss: {best['val_loss_causal']:.4f} at step {best['step']}."
    assert re.fullmatch(r"Trained for \d+\.\d minutes in all; this command took \d+\.\d, with evaluation\.", times)
    assert after.startswith("Next: python sample.py ") and tiny.out_dir in after


def test_eval_only_gives_the_best_checkpoints_loss_and_changes_no_file(tiny, tmp_path, capsys):
    rows = train.train(tiny)
    before = {path: path.read_bytes() for path in Path(tiny.out_dir).iterdir()}
    # The shape is the run's, whatever the options say.
    windows = {"batch_size": tiny.batch_size, "eval_iters": tiny.eval_iters}
    options = {"out_dir": tiny.out_dir, "dataset": tiny.dataset, "device": "cpu"}
    (row,) = train.train(TrainConfig(eval_only=True, **options, **windows))
    assert row["val_loss_causal"] == min(row["val_loss_causal"] for row in rows)
    assert {path: path.read_bytes() for path in Path(tiny.out_dir).iterdir()} == before
    train.main(["--eval_only", f"--out_dir={tiny.out_dir}"])  # the data set is the run's too
    assert f"val loss {row['val_loss_causal']:.4f}" in capsys.readouterr().out.splitlines()[-1]
    model, _ = checkpoint.load(Path(tiny.out_dir), "best", "cpu")
    _, splits = load_dataset(tiny.dataset, tiny.block_size)
    one = evaluate(model, splits["val"], 1, 1)["val_loss_causal"]
    train.main(["--eval_only", f"--out_dir={tiny.out_dir}", "--batch_size=1", "--eval_iters=1"])
    assert (
        f"val loss {one:.4f}" in capsys.readouterr().out.splitlines()[-1] and abs(one - row["val_loss_causal"]) > 1e-3
    )
    # A resumed run may evaluate fewer batches. Those of the best checkpoint apply.
    train.main(["--resume", f"--out_dir={tiny.out_dir}", "--max_iters=9", "--learning_rate=1", "--eval_iters=1"])
    saved = [checkpoint.read(Path(tiny.out_dir), name)["config"]["eval_iters"] for name in ("best", "last")]
    assert saved == [tiny.eval_iters, 1]
    capsys.readouterr()
    train.main(["--eval_only", f"--out_dir={tiny.out_dir}"])
    assert f"val loss {row['val_loss_causal']:.4f}" in capsys.readouterr().out.splitlines()[-1]
    (tmp_path / "best").mkdir()  # a folder like pretrained/
    for name in ("best.json", checkpoint.read(Path(tiny.out_dir), "best")["files"]["model"]["name"]):
        (tmp_path / "best" / name).write_bytes((Path(tiny.out_dir) / name).read_bytes())
    train.main(["--eval_only", f"--out_dir={tmp_path / 'best'}"])
    assert f"val loss {row['val_loss_causal']:.4f}" in capsys.readouterr().out.splitlines()[-1]


def test_an_earlier_run_is_moved_aside_not_overwritten(tiny):
    train.train(tiny)
    first = (Path(tiny.out_dir) / "config.json").read_bytes()
    train.train(dataclasses.replace(tiny, seed=2))
    train.train(dataclasses.replace(tiny, seed=3))
    assert (Path(tiny.out_dir + ".1") / "config.json").read_bytes() == first
    seeds = [json.loads((Path(tiny.out_dir + end) / "config.json").read_text())["config"]["seed"] for end in (".2", "")]
    assert seeds == [2, 3]


def test_options_from_python_are_checked_before_the_earlier_run_moves(tiny):
    train.train(dataclasses.replace(tiny, out_dir=Path(tiny.out_dir), compile=False))  # a path and a bool are plain
    for changes, line in (
        ({"variant": None}, "variant expects a text in UTF-8, got None"),
        ({"dtype": "bf16"}, "must be one of auto, float32, bfloat16, float16; got 'bf16'; did you mean bfloat16?"),
        ({"max_iters": "two"}, "max_iters expects a whole number in digits, got 'two'"),
        ({"n_layer": 2.0}, "n_layer expects a whole number in digits, got 2.0"),
    ):
        with pytest.raises(UserError, match=re.escape(line)):
            train.train(dataclasses.replace(tiny, **changes))
    with pytest.raises(UserError, match="cannot be shared|max_iters must"):  # numpy's numbers are numbers
        train.train(dataclasses.replace(tiny, learning_rate=np.float32(1e-3), max_iters=np.int64(-1)))
    with pytest.raises(UserError, match="temperature expects a number, got None"):
        sample.sample(sample.SampleConfig(out_dir=tiny.out_dir, temperature=None))
    assert not Path(tiny.out_dir + ".1").exists()


def test_a_run_with_damaged_files_is_moved_aside_too(tiny):
    train.train(tiny)
    out_dir = Path(tiny.out_dir)
    (out_dir / "config.json").write_text("{")
    next(out_dir.glob("model-*.pt")).unlink()
    train.train(tiny)
    assert Path(f"{out_dir}.1", "config.json").read_text() == "{" and checkpoint.read(out_dir, "last")


def test_what_is_not_a_run_is_never_moved_or_overwritten(tiny):
    out_dir = Path(tiny.out_dir)
    out_dir.mkdir()
    (out_dir / "config.json").write_text("{}")
    with pytest.raises(UserError, match="holds a config.json that is not from a run"):
        train.train(tiny)
    (out_dir / "config.json").rename(out_dir / "notes.txt")
    with pytest.MonkeyPatch.context() as patch:  # a run that ends before its first evaluation is a run, too
        patch.setattr(train, "evaluate", None)
        with pytest.raises(TypeError):
            train.train(tiny)
    train.train(dataclasses.replace(tiny, out_dir=str(out_dir / "inner")))
    with pytest.raises(UserError, match="run holds another run, .*inner; move that one"):  # it may be at work
        train.train(tiny)
    assert (out_dir / "inner" / "last.json").exists() and not out_dir.with_name("run.1").exists()
    (out_dir / "inner").rename(out_dir.with_name("elsewhere"))
    train.train(tiny)
    train.train(tiny)
    assert (out_dir.with_name("run.1") / "notes.txt").exists()


def test_a_run_that_diverges_stops_and_says_what_to_try(tiny):
    message = r"the norm of the gradient is (nan|inf) at step \d+ \(the loss: .*\): the run diverged; .* Try a lower --"
    with pytest.raises(UserError, match=message):
        train.train(dataclasses.replace(tiny, learning_rate=1e15, warmup_iters=0, max_iters=50, eval_interval=50))
    model, info = checkpoint.load(Path(tiny.out_dir), "last", "cpu")
    assert info["step"] == 0 and all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("how", ["gradient, evaluated", "gradient, stopped", "weight, stopped"])
def test_weights_that_are_not_finite_are_never_saved_though_gradients_are_read_late(tiny, how, monkeypatch):
    calls, clip = itertools.count(), train.clip_gradients
    what, _, end = how.partition(", ")

    def broken(model, limit):
        step = next(calls)
        if step == 5 and what == "gradient":
            next(model.parameters()).grad[0, 0] = math.nan
        if step == 7 and what == "weight":
            next(model.parameters()).data[0, 0] = math.inf
        if step == 7 and end == "stopped":
            signal.raise_signal(signal.SIGINT)
        return clip(model, limit)

    monkeypatch.setattr(train, "clip_gradients", broken)
    line = {
        "gradient": r"norm of the gradient is nan at step 5 \(the loss: 3\.",
        "weight": "largest weight is not finite at",
    }
    with pytest.raises(UserError, match=line[what]):
        train.train(dataclasses.replace(tiny, max_iters=9, eval_interval=100, log_interval=100))
    model, info = checkpoint.load(Path(tiny.out_dir), "last", "cpu")
    assert info["step"] == 0 and next(calls) == (8 if end == "stopped" else 9)


# Evaluation


@pytest.mark.parametrize("variant", ["", "expert_threshold"])
def test_evaluation_is_over_fixed_windows_of_the_whole_split(tiny, variant):
    config = dataclasses.replace(tiny, variant=variant, eval_iters=1000)
    _, data = load_dataset(config.dataset, config.block_size)
    torch.manual_seed(0)
    model = GPT(train.model_config(config, {"vocab_size": 28})).eval()
    val = torch.from_numpy(data["val"][: 31 * 16].astype(np.int64))  # 30 windows: the last token has no target
    result = evaluate(model, val.numpy(), config.batch_size, config.eval_iters)
    starts = np.linspace(0, len(val) - 17, (len(val) - 1) // 16).astype(int).tolist()
    assert all(16 <= b - a <= 17 for a, b in zip(starts, starts[1:]))  # no overlap, next to no gap
    losses, agree, hit, taken = {"topk": [], "causal": []}, [], [], []
    for start in starts:
        x, y = val[None, start : start + 16], val[None, start + 1 : start + 17]
        for routing in losses:
            losses[routing].append(model(x, y, routing)[1].item())
            (block,) = model.routed_blocks
            if routing == "causal":
                taken.append(block.taken.double().mean().item())
            else:
                agree.append(((block.logits > 0) == block.taken).double().mean().item())
                hit.append(((block.logits > 0) & block.taken).sum().item() / 2)  # k = 2 of 16
    for routing in losses:
        assert math.isclose(result[f"val_loss_{routing}"], np.mean(losses[routing]), abs_tol=1e-5)
    assert math.isclose(result["predictor_accuracy"], np.mean(agree), abs_tol=1e-6)
    assert math.isclose(result["predictor_recall"], np.mean(hit), abs_tol=1e-6)
    assert result["predictor_base_rate"] == 0.875
    assert math.isclose(result["taken"][0], np.mean(taken), abs_tol=1e-4)


@pytest.mark.parametrize("variant", ["stochastic", "exploring_noise"])  # they draw noise
def test_evaluating_twice_gives_the_same_without_dropout_and_leaves_the_training_mode(tiny, variant):
    config = dataclasses.replace(tiny, variant=variant, dropout=0.5)
    _, data = load_dataset(config.dataset, config.block_size)
    model = GPT(train.model_config(config, {"vocab_size": 28}))
    first, second = (evaluate(model, data["val"], config.batch_size, config.eval_iters) for _ in range(2))
    assert model.training and first == second == evaluate(model.eval(), data["val"], 4, config.eval_iters)
    assert not model.training
    rounded = evaluate(model, data["val"], config.batch_size, config.eval_iters, "bfloat16")
    assert 0 < abs(rounded["val_loss_causal"] - first["val_loss_causal"]) < 0.02


def test_a_dense_model_has_one_loss_and_nothing_to_say_of_routing(tiny):
    rows, _ = run(tiny, route_every=0)
    assert rows[-1]["val_loss_causal"] == rows[-1]["val_loss_topk"]
    assert not {"taken", "predictor_accuracy"} & rows[-1].keys()


# Presets and options


def on(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_presets_train_with_equal_flops(device, monkeypatch):
    on(device, monkeypatch)
    budgets, differ = [], []
    for path in PRESETS:
        config = load(TrainConfig, [str(path)], "", preset=True)
        step = 3 * config.batch_size * forward_flops(train.model_config(config, {"vocab_size": 65}), config.block_size)
        steps = train.number_of_steps(config, step)
        budgets.append(steps * step / config.flop_budget)
        differ.append(dataclasses.asdict(config))
        if device == "cuda" and "dense" in path.name:
            assert steps == 5000
    assert all(0.999 < used <= 1 for used in budgets)
    mod, dense, shallow, *with_experts = differ
    assert {name for name in mod if mod[name] != dense[name]} == {"out_dir", "route_every"}
    assert {name for name in mod if mod[name] != shallow[name]} == {"out_dir", "route_every", "n_layer"}
    assert shallow["n_layer"] == mod["n_layer"] / 2  # the unrouted half
    for other in with_experts:
        changed = {name for name in mod if mod[name] != other[name]}
        assert changed <= {"out_dir", "n_expert", "n_noop", "expert_capacity", "staged"}


def test_without_a_gpu_a_preset_switches_to_a_smaller_model_and_says_so(monkeypatch, capsys):
    on("cpu", monkeypatch)
    config = load(TrainConfig, [str(PRESETS[0]), "--n_embd=64"], "", preset=True)
    assert (config.n_layer, config.n_embd, config.block_size) == (4, 64, 128)  # preset, command line, cpu part
    out = capsys.readouterr().out
    assert out.startswith("On a CPU ") and "n_layer=4" in out and out.count("\n") == 1
    assert "n_embd" not in out  # the user's own value is not the preset's
    on("cuda", monkeypatch)
    assert load(TrainConfig, [str(PRESETS[0])], "", preset=True).n_embd == 384
    assert capsys.readouterr().out == ""


def test_values_are_typed_and_later_ones_win(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("learning_rate = 1\ncompile = False\nbatch_size = 3\nseed = 4\n", encoding="utf-8")
    argv = [str(path), "--batch_size=5", "--bias=True", "--flop_budget=1e12", "--out_dir=a=b", "--device=cpu"]
    config = load(TrainConfig, argv, "", preset=True)
    assert (config.learning_rate, config.compile, config.batch_size, config.seed) == (1.0, "False", 5, 4)
    assert (config.bias, config.flop_budget, config.out_dir) == (True, 1e12, "a=b")
    assert isinstance(config.learning_rate, float)


def test_help_names_every_option(capsys):
    for command, options in ((train, TrainConfig), (sample, sample.SampleConfig)):
        with pytest.raises(SystemExit) as end:
            command.main(["--help"])
        assert end.value.code == 0
        out = capsys.readouterr().out
        assert all(f"--{field.name} " in out for field in dataclasses.fields(options))
