"""No run is lost: after a kill, a stop, a full disk or damage it resumes and ends bit for bit the same."""

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import sample
import train
from data.shakespeare_char import prepare
from helpers import ROOT, reseal, same, state_of, told
from support import checkpoint, files, report, untrusted
from support import data as data_module
from support import run as run_module
from support.files import sha256_of
from support.options import PATHS, UserError, load
from train import TrainConfig

forks = pytest.mark.skipif(sys.platform != "linux", reason="kills many processes, so it forks them")
KILLS = int(os.environ.get("KILLS", 10))  # at random moments; docs/resuming.md reports a run with 200


def in_a_process(work, *args):
    """Run work(*args) in another process; returns the process."""
    # Forked from a server that only has imported these modules. In a fork of the test process, a lock that another of
    # its threads holds would never be released.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "pytest", "hypothesis"])
    process = context.Process(target=work, args=args, daemon=True)
    process.start()
    return process


def train_on(config):
    train.train(go_on(config))


def go_on(config):
    """What a user does after a kill: resume, or start again if no checkpoint was saved."""
    saved = any((Path(config.out_dir) / f"{name}.json").exists() for name in ("last", "previous"))
    return dataclasses.replace(config, resume=saved)


def elsewhere(config, name):
    return dataclasses.replace(config, out_dir=str(Path(config.out_dir).with_name(name)))


# Killed


def points_of(config):
    """The fsync and rename calls of a run: the points to kill it at."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace"):
            original = getattr(os, name)
            patch.setattr(os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a)))
        train.train(config)
    return calls


def kill_at(config, point, half):
    """Train until the call number `point`, there optionally cut the file in half, and die by SIGKILL."""
    count = 0
    fsync, replace = os.fsync, os.replace

    def counted(original, *args):
        nonlocal count
        if count == point:
            if half and original is fsync:
                os.ftruncate(args[0], os.fstat(args[0]).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return original(*args)

    os.fsync = lambda *a: counted(fsync, *a)
    os.replace = lambda *a: counted(replace, *a)
    train.train(config)


@pytest.mark.slow
@forks
def test_killed_at_any_point_of_a_save_a_run_resumes_to_the_same_end(tiny):
    whole = elsewhere(tiny, "whole")
    calls = points_of(whole)
    expected = state_of(whole)
    assert len(calls) > 25
    for point, call in enumerate(calls):
        config = elsewhere(tiny, f"killed-{point}")
        process = in_a_process(kill_at, config, point, point % 4 == 0)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, (point, call)
        train.train(go_on(config))
        assert same(state_of(config), expected), (point, call)
        assert not list(Path(config.out_dir).glob("*.tmp"))
        shutil.rmtree(config.out_dir)


@forks
def test_killed_at_random_moments_a_run_resumes_to_the_same_end(tiny):
    long = dataclasses.replace(tiny, max_iters=60, eval_interval=7, warmup_iters=5)
    whole, config, rng = elsewhere(long, "whole"), elsewhere(long, "killed"), random.Random(0)
    begun = time.perf_counter()
    train.train(whole)
    seconds = time.perf_counter() - begun
    expected = state_of(whole)
    kills = 0
    while kills < KILLS:
        process = in_a_process(train_on, config)
        process.join(rng.uniform(0, 1.2 * seconds))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0 and same(state_of(config), expected)
            shutil.rmtree(config.out_dir)
    train.train(go_on(config))
    assert same(state_of(config), expected)


# Stopped


def stop_in(config, where, signals):
    """Run train.main and send `signals` at the n-th call of a function, where = (name, n), in train or support.data."""
    calls = 0
    name, at = where
    module = train if hasattr(train, name) else data_module
    original = getattr(module, name)

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == at:
            for number in signals:
                os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, counted)
        train.main([f"--{key}={value}" for key, value in dataclasses.asdict(config).items()])


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to itself")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", [("windows", 30), ("windows", 9), ("evaluate", 1), ("learning_rate_at", 5)])
def test_ctrl_c_and_sigterm_save_and_the_run_goes_on_to_the_same_end(tiny, where, number, capsys):
    config = dataclasses.replace(tiny, max_iters=12, eval_interval=5, gradient_accumulation_steps=2)
    whole = elsewhere(config, "whole")
    train.train(whole)
    capsys.readouterr()
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as end:
        stop_in(config, where, [number])
    assert end.value.code == 130 and [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    message = capsys.readouterr().out.splitlines()[-1]
    step, command = re.fullmatch(
        r"Stopped and saved at step (\d+)\. Resume with: python train\.py (.*)", message
    ).groups()
    assert checkpoint.read(Path(config.out_dir), "last")["step"] == int(step) < 12
    for name in checkpoint.NAMES:
        if (Path(config.out_dir) / f"{name}.json").exists():
            checkpoint.read(Path(config.out_dir), name)
    train.main(command.split())
    assert all(checkpoint.read(Path(config.out_dir), name) for name in checkpoint.NAMES)
    assert f"Resuming {config.out_dir} at step {step}" in capsys.readouterr().out
    assert same(state_of(config), state_of(whole))
    seconds = [row["train_seconds"] for row in checkpoint.read(Path(config.out_dir), "last")["rows"]]
    assert seconds == sorted(seconds)


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to itself")
def test_a_closed_terminal_stops_a_run_except_under_nohup(tiny):
    config, handler = dataclasses.replace(tiny, max_iters=12), signal.getsignal(signal.SIGHUP)
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
        stop_in(config, ("learning_rate_at", 9), [signal.SIGHUP])
        assert checkpoint.read(Path(config.out_dir), "last")["step"] == 12
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(SystemExit):
            stop_in(config, ("learning_rate_at", 9), [signal.SIGHUP] * 2)  # both the shell and the system send it
        assert checkpoint.read(Path(config.out_dir), "last")["step"] == 5
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to itself")
def test_a_run_stopped_in_its_first_evaluation_is_to_be_resumed(tiny):
    with pytest.raises(SystemExit):
        stop_in(tiny, ("evaluate", 1), [signal.SIGTERM, signal.SIGTERM])
    assert "best.json: the run has not saved one; continue it with --resume" in told(
        sample, [f"--out_dir={tiny.out_dir}"]
    )
    train.train(dataclasses.replace(tiny, resume=True))
    assert checkpoint.read(Path(tiny.out_dir), "best")


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to itself")
def test_a_second_ctrl_c_stops_at_once_without_harm(tiny, capsys):
    config = dataclasses.replace(tiny, max_iters=12)
    with pytest.raises(SystemExit) as end:
        stop_in(config, ("learning_rate_at", 9), [signal.SIGINT, signal.SIGINT])  # twice per step: in step 4
    assert end.value.code == 130
    assert capsys.readouterr().out.splitlines()[-1] == "Stopped at once; earlier saves are intact"
    assert checkpoint.read(Path(config.out_dir), "last")["step"] == 3
    train.train(dataclasses.replace(config, resume=True))
    train.train(elsewhere(config, "whole"))
    assert same(state_of(config), state_of(elsewhere(config, "whole")))


# Resumed


def test_resume_takes_the_runs_own_options_and_says_what_differs(tiny, capsys):
    train.train(tiny)
    capsys.readouterr()
    argv = ["--resume", f"--out_dir={tiny.out_dir}"]
    train.main(argv)
    out = capsys.readouterr().out
    assert "Resuming" in out and "at step 6" in out and "Changed since" not in out  # it had finished
    train.main([*argv, "--max_iters=9", "--learning_rate=0.5"])
    out = capsys.readouterr().out
    assert "Changed since it stopped: max_iters was 6, now 9, learning_rate was 0.001, now 0.5\n" in out
    assert checkpoint.read(Path(tiny.out_dir), "last")["step"] == 9
    train.main(
        [*argv, f"--flop_budget={json.loads((Path(tiny.out_dir) / 'config.json').read_text())['flops_per_step'] * 11}"]
    )
    assert checkpoint.read(Path(tiny.out_dir), "last")["step"] == 11
    train.main([*argv, "--max_iters=12", "--weight_decay=0.25", "--beta1=0.5"])
    last = checkpoint.read(Path(tiny.out_dir), "last")
    group = checkpoint.tensors(Path(tiny.out_dir), last, "optimizer")["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.25 and group["betas"][0] == 0.5


def test_with_half_the_batch_and_twice_the_micro_steps_a_run_goes_on(tiny, capsys):
    tiny = dataclasses.replace(tiny, dropout=0.0, batch_size=4, gradient_accumulation_steps=1, decay_lr=False)
    whole = train.train(dataclasses.replace(tiny, out_dir=tiny.out_dir + "-whole"))
    train.train(dataclasses.replace(tiny, max_iters=tiny.max_iters // 2))
    half = dataclasses.replace(tiny, batch_size=2, gradient_accumulation_steps=2, eval_iters=2 * tiny.eval_iters)
    rows = train.train(dataclasses.replace(half, resume=True))
    assert "batch_size was 4, now 2" in capsys.readouterr().out
    assert rows[-1]["step"] == whole[-1]["step"]
    for name in ("train_loss", "val_loss_causal"):
        assert math.isclose(rows[-1][name], whole[-1][name], rel_tol=1e-5)
    with pytest.raises(UserError, match="has other batches: batch_size was 2, now 4"):
        train.train(dataclasses.replace(half, resume=True, batch_size=4))
    noisy = dataclasses.replace(tiny, variant="exploring_noise", out_dir=tiny.out_dir + "-noisy")
    train.train(noisy)
    with pytest.raises(UserError, match="has other batches"):  # it counts passes, and there would be twice as many
        train.train(dataclasses.replace(noisy, resume=True, batch_size=2, gradient_accumulation_steps=2))


def test_a_damaged_last_checkpoint_is_reported_and_the_one_before_it_used(tiny, capsys):
    config = dataclasses.replace(tiny, max_iters=12)
    whole = elsewhere(config, "whole")
    train.train(whole)
    out_dir = Path(config.out_dir)
    for kind in ("model", "optimizer", "json"):
        with pytest.raises(SystemExit):
            stop_in(config, ("learning_rate_at", 15), [signal.SIGINT])  # in step 7
        assert [checkpoint.read(out_dir, name)["step"] for name in ("last", "previous")] == [8, 6]
        path = out_dir / ("last.json" if kind == "json" else f"{kind}-8.pt")
        content = path.read_bytes()
        # Cut a .pt file short; in the JSON change an option, which must not be used either.
        path.write_bytes(content.replace(b'"n_layer": 2', b'"n_layer": 3') if kind == "json" else content[:100])
        assert train.options_of_the_run({}, {"resume": True, "out_dir": config.out_dir})["n_layer"] == 2
        capsys.readouterr()
        with pytest.raises(SystemExit):  # at once, before any save: the resumed checkpoint must be last.json again
            stop_in(dataclasses.replace(config, resume=True), ("learning_rate_at", 1), [signal.SIGINT, signal.SIGINT])
        out = capsys.readouterr().out
        assert checkpoint.read(out_dir, "last")["step"] == 6
        rows = (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(rows[-1])["step"] == 6
        train.train(dataclasses.replace(config, resume=True))
        assert f"{path} is damaged" in out and "Using the checkpoint before it" in out and "at step 6" in out
        assert same(state_of(config), state_of(whole))
        shutil.rmtree(out_dir)


def test_only_the_tensors_that_a_checkpoint_names_are_kept(tiny):
    train.train(dataclasses.replace(tiny, max_iters=30))
    out_dir = Path(tiny.out_dir)
    named = {f["name"] for name in checkpoint.NAMES for f in checkpoint.read(out_dir, name)["files"].values()}
    assert {path.name for path in out_dir.glob("*.pt")} == named and 4 <= len(named) <= 5


def test_on_another_machine_auto_is_resolved_anew(tiny, monkeypatch, capsys):
    argv = [f"--{name}={value}" for name, value in dataclasses.asdict(tiny).items() if name != "compile"]
    train.main([*argv, "--compile=auto"])
    resolve, seen = train.resolve, []
    monkeypatch.setattr(train, "resolve", lambda config: (seen.append(config), resolve(config))[1])
    monkeypatch.setattr(report, "hardware", lambda device: "abacus")
    capsys.readouterr()
    train.main(["--resume", f"--out_dir={tiny.out_dir}"])
    assert (seen[0].compile, seen[0].dtype, seen[0].device) == ("auto", "auto", "cpu")
    assert re.search("Changed since it stopped: hardware was .*, now abacus\n", capsys.readouterr().out)


def test_what_was_evaluated_is_saved_before_it_is_reported(tiny, monkeypatch):
    def unwritable(line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train.tqdm, "write", unwritable)
    with pytest.raises(OSError):
        train.train(tiny)
    assert [row["step"] for row in checkpoint.read(Path(tiny.out_dir), "last")["rows"]] == [0]


def test_files_that_a_damaged_checkpoint_may_name_are_kept(tiny):
    train.train(tiny)
    out_dir = Path(tiny.out_dir)
    (out_dir / "previous.json").write_bytes(b"{")
    before = sorted(path.name for path in out_dir.iterdir())
    checkpoint.remove_unused(out_dir)
    assert sorted(path.name for path in out_dir.iterdir()) == before


def test_a_best_checkpoint_of_repeated_steps_does_not_count(tiny, monkeypatch):
    """After a kill between best.json and last.json, the best checkpoint is later than the last one."""
    train.train(tiny)
    out_dir = Path(tiny.out_dir)
    checkpoint.commit(out_dir, "best", checkpoint.read(out_dir, "last"))
    checkpoint.commit(out_dir, "last", checkpoint.read(out_dir, "previous"))
    train.train(dataclasses.replace(tiny, resume=True))
    best = checkpoint.read(out_dir, "best")
    assert best["step"] == 6 and best["files"]["model"] == checkpoint.read(out_dir, "last")["files"]["model"]


# Out of space


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files as only POSIX can")
@pytest.mark.parametrize("full_at", [(2,), (3,), (2, 3)])
def test_a_full_disk_is_reported_and_training_goes_on_when_there_is_space(tiny, full_at, monkeypatch, capsys):
    import resource

    whole, out_dir = elsewhere(tiny, "whole"), Path(tiny.out_dir)
    train.train(whole)
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save, calls = checkpoint.save, 0

    def limited(*args):
        nonlocal calls
        calls += 1
        there = [name for name in checkpoint.NAMES if (out_dir / f"{name}.json").exists()]
        before = [checkpoint.read(out_dir, name) for name in there]
        if calls in full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        try:
            return save(*args)
        except (OSError, RuntimeError):
            assert [checkpoint.read(out_dir, name) for name in there] == before
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(checkpoint, "save", limited)
    if 3 in full_at:  # the last evaluation of the run, which then tries once more
        full_at += (4,)
        with pytest.raises(UserError, match="of step 6 could not be saved; free disk space, then --resume"):
            train.train(tiny)
        train.train(dataclasses.replace(tiny, resume=True))
    else:
        train.train(tiny)
    reports = re.findall(
        r"step (\d): the checkpoint could not be saved \(.*\); the one before is intact", capsys.readouterr().out
    )
    assert reports == [str(3 * (call - 1)) if call < 4 else "6" for call in full_at]
    assert same(state_of(tiny), state_of(whole))


@pytest.mark.parametrize("moment", ["load", "keep_earlier_run", "write_metrics"])
def test_a_folder_is_locked_before_anything_in_it_is_read_or_changed(tiny, monkeypatch, moment):
    train.train(tiny)
    original, met = getattr(run_module, moment), []

    def meanwhile(*args, **options):
        if not met:
            met.append(moment)
            with pytest.raises(UserError, match="another train.py is at work"):
                train.train(dataclasses.replace(tiny, resume=True))
        return original(*args, **options)

    monkeypatch.setattr(run_module, moment, meanwhile)
    train.train(dataclasses.replace(tiny, resume=moment == "load"))
    assert met


def test_a_second_run_in_the_same_folder_is_refused(tiny, monkeypatch):
    evaluate = train.evaluate
    met = []

    def meanwhile(*args):
        before = {path: path.read_bytes() for path in Path(tiny.out_dir).iterdir()}
        for second in (tiny, dataclasses.replace(tiny, resume=True)):
            with pytest.raises(
                UserError, match="another train.py is at work .*; wait for it, or name another --out_dir$"
            ):
                train.train(second)
            met.append(second)
        assert {path: path.read_bytes() for path in Path(tiny.out_dir).iterdir()} == before
        return evaluate(*args)

    monkeypatch.setattr(train, "evaluate", meanwhile)
    train.train(tiny)
    assert len(met) == 6


WAITS_FOR_INPUT = """
import sys
import train
original = train.learning_rate_at
def at(step, config):
    if step == 4:
        print("waiting", flush=True)
        sys.stdin.readline()
    return original(step, config)
train.learning_rate_at = at
train.main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGSTOP")
def test_a_suspended_run_keeps_its_folder_and_ends_the_same(tiny):
    train.train(whole := elsewhere(tiny, "whole"))
    argv = [f"--{name}={value}" for name, value in dataclasses.asdict(tiny).items()]
    piped = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", WAITS_FOR_INPUT, *argv], cwd=ROOT, env=environment, **piped)
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    process.send_signal(signal.SIGSTOP)  # as Ctrl-Z does
    before = {path: path.read_bytes() for path in Path(tiny.out_dir).iterdir()}
    assert "another train.py is at work" in told(train, ["--resume", f"--out_dir={tiny.out_dir}"])
    assert {path: path.read_bytes() for path in Path(tiny.out_dir).iterdir()} == before
    process.send_signal(signal.SIGCONT)
    process.communicate()  # closes its input, so it continues
    assert process.returncode == 0 and same(state_of(tiny), state_of(whole))


def test_files_of_the_users_are_not_removed(tiny):
    train.train(tiny)
    for name in ("model-3-backup.pt", "model-mine.pt", "notes.txt"):
        (Path(tiny.out_dir) / name).write_text("mine")
    train.train(dataclasses.replace(tiny, max_iters=12, resume=True))
    for name in ("model-3-backup.pt", "model-mine.pt", "notes.txt"):
        assert (Path(tiny.out_dir) / name).read_text() == "mine"


def test_a_failed_attempt_leaves_no_trace_in_the_next(tiny, capsys):
    train.train(tiny)
    argv = ["--resume", f"--out_dir={tiny.out_dir}"]
    with pytest.raises(SystemExit):
        train.main([*argv, "--max_iters=40", "--eval_interval=40", "--learning_rate=1e15"])
    (Path(tiny.out_dir) / "config.json").write_bytes(b"")  # not needed either
    capsys.readouterr()
    train.main(argv)
    assert "Changed since" not in capsys.readouterr().out


@pytest.mark.parametrize("at", [1, 4, 8])
def test_an_earlier_run_in_a_folder_that_cannot_be_renamed_moves_into_it(tiny, monkeypatch, at):
    """A mount point, or a folder in a read-only one."""
    out_dir, rename, moved = Path(tiny.out_dir), Path.rename, []

    def only_within(self, target):
        if self == out_dir:
            raise OSError(16, "Device or resource busy")
        if len(moved) == at:  # killed once, in the middle
            moved.append("killed")
            raise InterruptedError
        moved.append(self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_within)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out_dir)
    train.train(tiny)
    files = {path.name: path.read_bytes() for path in out_dir.iterdir() if path.name != "run.lock"}
    assert len(files) in (9, 10) and not list(out_dir.parent.glob(".*.lock"))
    with pytest.raises(InterruptedError):
        train.train(tiny)
    train.train(dataclasses.replace(tiny, seed=2))
    assert {path.name: path.read_bytes() for path in (out_dir / "earlier.1").iterdir()} == files
    train.train(tiny)
    seeds = [json.loads((out_dir / name / "config.json").read_text())["config"]["seed"] for name in ("earlier.2", "")]
    assert seeds == [2, tiny.seed] and not (out_dir / "earlier.3").exists()


def test_in_a_read_only_folder_the_lock_lies_inside_out_dir(tiny, monkeypatch):
    access = os.access
    parent = Path(tiny.out_dir).parent
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != parent and access(path, mode))
    with run_module.only_run_in(Path(tiny.out_dir)):
        with pytest.raises(UserError, match="another train.py is at work"):
            train.train(tiny)
    assert [path.name for path in parent.rglob("*.lock")] == ["run.lock"]


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "Operation not supported"), NotImplementedError()])
def test_without_locks_a_run_goes_on_and_says_so(tiny, monkeypatch, capsys, error):
    def unsupported(*args, **kwargs):
        raise error

    monkeypatch.setattr(files.filelock.FileLock, "acquire", unsupported)
    train.train(tiny)
    assert capsys.readouterr().out.count("has no locks; make sure that no second train.py uses this folder\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="links to folders need rights there")
def test_a_linked_out_dir_keeps_its_link_when_the_run_moves(tiny, tmp_path, capsys):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large_disk" / "run")
    (tmp_path / "large_disk" / "run").mkdir()
    config = dataclasses.replace(tiny, out_dir=str(tmp_path / "link"))
    train.train(config)
    train.train(config)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "large_disk" / "run.1" / "last.json").exists()
    assert f"moved to {tmp_path / 'large_disk' / 'run.1'}" in capsys.readouterr().out
    assert checkpoint.read(tmp_path / "large_disk" / "run", "last")


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to itself")
def test_ctrl_c_saves_also_after_the_reader_has_closed_the_pipe(tiny):
    """`train.py 2>&1 | tee log`: the same Ctrl-C ends tee."""
    script = (
        "import os, signal, sys\nimport train\n"
        "original = train.learning_rate_at\n"
        "def at(step, config):\n"
        "    if step == 4 and sys.stdin.readline():\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return original(step, config)\n"
        "train.learning_rate_at = at\ntrain.main(sys.argv[1:])\n"
    )
    options = {**dataclasses.asdict(tiny), "log_interval": 1}  # so that a line is due between the signal and the save
    argv = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-u", "-c", script, *argv]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while "step 4/6" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait() == 130
    assert checkpoint.read(Path(tiny.out_dir), "last")["step"] == 5


@pytest.mark.parametrize("at", ["all", "optimizer", "last"])
def test_best_is_the_best_of_those_that_were_saved(tiny, at, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5])  # at steps 0, 3, 6 and 9
    save, calls = checkpoint.save, []

    def fails_once(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return save(*args)

    def full(tensors, out_dir, name, content):
        if name == "optimizer-3":
            raise OSError(28, "No space left on device")
        return tensors(out_dir, name, content)

    def evaluated(*args):
        loss = next(losses)
        return {"val_loss_causal": loss, "val_loss_topk": loss}

    commit = checkpoint.commit

    def commits(out_dir, name, info):
        if name == "last" and info["step"] == 3:
            raise OSError(28, "No space left on device")
        return commit(out_dir, name, info)

    if at == "all":
        monkeypatch.setattr(checkpoint, "save", fails_once)
    elif at == "last":  # best.json was written before
        monkeypatch.setattr(checkpoint, "commit", commits)
    else:  # only the larger file
        tensors = checkpoint._save_tensors
        monkeypatch.setattr(checkpoint, "_save_tensors", lambda *a: full(tensors, *a))
    monkeypatch.setattr(train, "evaluate", evaluated)
    train.train(tiny)
    best = 3 if at == "last" else 6
    assert checkpoint.read(Path(tiny.out_dir), "best")["step"] == best
    train.train(dataclasses.replace(tiny, max_iters=9, resume=True))
    assert checkpoint.read(Path(tiny.out_dir), "best")["step"] == best  # the resumed run knows it


def test_a_loss_better_than_the_last_but_not_the_best_is_not_the_best(tiny, monkeypatch):
    losses = iter([1.0, 3.0, 2.0])  # causal; by the others, of top-k, the second would be the best
    monkeypatch.setattr(train, "evaluate", lambda *a: {"val_loss_causal": (x := next(losses)), "val_loss_topk": -x})
    train.train(tiny)
    assert checkpoint.read(Path(tiny.out_dir), "best")["step"] == 0


@pytest.mark.parametrize("call", ["save", "fsync", "replace"])
def test_a_failed_save_leaves_the_last_checkpoint_whole(tiny, monkeypatch, call):
    train.train(tiny)
    out_dir = Path(tiny.out_dir)
    model, _ = checkpoint.load(out_dir, "best", "cpu")
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}

    def full(*args):
        if call == "save":
            args[1].write(b"the first bytes of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch if call == "save" else os, call, full)
    with pytest.raises(OSError):
        checkpoint.save(out_dir, 7, model, {}, True, {})
    assert {path.name: path.read_bytes() for path in out_dir.iterdir()} == before


# Properties


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_option_comes_back_from_the_command_line_and_from_the_saved_config(data):
    field = data.draw(st.sampled_from(dataclasses.fields(TrainConfig)))
    choices = typing.get_args(field.type)
    kind = str if choices else field.type
    values = {
        bool: st.booleans(),
        int: st.integers(-(2**70), 2**70),
        float: st.floats(allow_nan=False),
        str: st.sampled_from(choices) if choices else st.text(),
    }[kind]
    value = data.draw(values)
    config = load(TrainConfig, [f"--{field.name}={value}"], "")
    expected = os.path.expanduser(value) if field.name in PATHS else value
    assert getattr(config, field.name) == expected and type(getattr(config, field.name)) is kind
    saved = json.loads(json.dumps(dataclasses.asdict(config)))
    assert TrainConfig(**saved) == config
    preset = load(TrainConfig, [], "", combine=lambda preset, given: saved)
    assert preset == config


@pytest.fixture(scope="module")
def finished(small_run):
    """A small run and the contents of its checkpoints."""
    return small_run, contents(small_run)


def contents(out_dir):
    return [
        (checkpoint.read(out_dir, name), checkpoint.load(out_dir, name, "cpu")[0].state_dict())
        for name in checkpoint.NAMES
    ]


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_damage_to_a_checkpoint_is_detected_or_harmless(finished, data):
    out_dir, expected = finished
    path = data.draw(
        st.sampled_from(
            sorted(p for p in out_dir.iterdir() if p.suffix in (".pt", ".json") and p.name != "config.json")
        )
    )
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "zeros"]))
    damaged = {
        "flip": whole[:position] + bytes([whole[position] ^ data.draw(st.integers(1, 255))]) + whole[position + 1 :],
        "cut": whole[:position],
        "insert": whole[:position] + data.draw(st.binary(min_size=1, max_size=9)) + whole[position:],
        "zeros": whole[:position] + bytes(len(whole) - position),
    }[kind]
    path.write_bytes(damaged)
    try:
        found = contents(out_dir)
        assert damaged == whole or (path.suffix == ".json" and same(found, expected))  # a .pt file's hash covers it all
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        path.write_bytes(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals to itself")
def test_a_step_that_is_saved_twice_leaves_both_checkpoints_whole(tiny):
    config = dataclasses.replace(tiny, max_iters=12)
    with pytest.raises(SystemExit):
        stop_in(config, ("evaluate", 3), [signal.SIGINT])  # the evaluation at step 6, so that the save has no row
    last = checkpoint.read(Path(config.out_dir), "last")
    assert last["step"] == 6 and last["rows"][-1]["step"] == 3
    with pytest.raises(SystemExit):
        stop_in(dataclasses.replace(config, resume=True), ("learning_rate_at", 1), [signal.SIGINT, signal.SIGINT])
    last, previous = (checkpoint.read(Path(config.out_dir), name) for name in ("last", "previous"))
    assert last["step"] == previous["step"] == 6 and last["rows"][-1]["step"] == 6


@pytest.mark.parametrize("variant, selection", [("", "learned"), ("stochastic", "stochastic")])
def test_a_run_of_format_2_is_read_and_resumed(tiny, variant, selection):
    whole = dataclasses.replace(tiny, variant=variant)
    train.train(whole)
    half = dataclasses.replace(whole, out_dir=whole.out_dir + "-half")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "report", lambda row, n: str(row["step"] == 3 and os.kill(os.getpid(), signal.SIGTERM)))
        train.train(half)

    def before(info):
        info["format"] = 2
        del info["role"]
        for part in ("model", "config"):
            del info[part]["variant"]
            info[part]["selection"] = selection

    for name in checkpoint.NAMES:
        reseal(half.out_dir, name, before)
    assert checkpoint.load(Path(half.out_dir), "best", "cpu")[0].config.variant == variant
    train.main(["--resume", f"--out_dir={half.out_dir}"])
    assert same(state_of(half), state_of(whole))
    assert checkpoint.read(Path(half.out_dir), "last")["format"] == checkpoint.FORMAT


def test_an_option_that_did_not_exist_when_a_run_was_saved_counts_as_its_default(tiny, capsys):
    train.train(tiny)

    def before(info):
        del info["model"]["variant"], info["config"]["variant"], info["config"]["grad_clip"]
        info["versions"]["threads"] = []  # a stranger's may be anything

    for name in checkpoint.NAMES:
        reseal(tiny.out_dir, name, before)
    resume = ["--resume", f"--out_dir={tiny.out_dir}"]
    assert "another model: variant was '', now sigmoid_gate" in told(train, [*resume, "--variant=sigmoid_gate"])
    capsys.readouterr()
    train.main([*resume, "--grad_clip=0.5"])
    assert "Changed since it stopped: grad_clip was 1.0, now 0.5, threads was [], now" in capsys.readouterr().out


def test_on_resume_a_preset_only_says_which_folder(tiny, tmp_path, capsys):
    train.train(dataclasses.replace(tiny, dropout=0.0))
    preset = tmp_path / "preset.py"
    preset.write_text(f"out_dir = {tiny.out_dir!r}\ndropout = 0.3\ncpu = dict(n_embd=64)\n", encoding="utf-8")
    train.main([str(preset), "--resume", "--max_iters=8"])
    last = checkpoint.read(Path(tiny.out_dir), "last")
    assert (last["step"], last["config"]["dropout"], last["config"]["n_embd"]) == (8, 0.0, 16)
    train.main([str(preset), "--eval_only"])
    assert "switches to" not in capsys.readouterr().out


def test_the_text_may_come_from_a_file_whose_name_is_not_utf8(tiny, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "set")
    name = b"\xe9.txt".decode("utf-8", "surrogateescape")  # as Python gives the name on Linux
    prepare.write_characters("to be or not to be\n" * 400, name, tmp_path / "set")
    config = dataclasses.replace(tiny, dataset=str(tmp_path / "set"))
    train.train(config)
    train.train(dataclasses.replace(config, max_iters=8, resume=True))
    last = checkpoint.read(Path(tiny.out_dir), "last")
    assert last["step"] == 8 and last["data"]["source"] == name


# A stranger's folder


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_no_write_follows_a_link_in_out_dir(tiny, tmp_path, monkeypatch):
    """An untrusted out_dir may hold a link under each name that a run writes, also the temporary ones."""
    whole = elsewhere(tiny, "whole")
    written, replace = {"run.lock"}, os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: (written.update({Path(a).name, Path(b).name}), replace(a, b)))
        train.train(whole)
    config, out_dir = dataclasses.replace(tiny, max_iters=9, resume=True), Path(tiny.out_dir)
    assert {"metrics.jsonl.tmp", "config.json.tmp", "previous.json.tmp", "best.json", "model-6.pt.tmp"} <= written
    treasure = tmp_path / "treasure"
    treasure.write_text("precious")
    shutil.copytree(whole.out_dir, out_dir)
    written |= {"model-9.pt", "model-9.pt.tmp", "optimizer-9.pt", "optimizer-9.pt.tmp"}
    names = [name for name in written if not (out_dir / name).exists()]
    for name in [*names, "metrics.jsonl", "config.json"]:
        (out_dir / name).unlink(missing_ok=True)
        (out_dir / name).symlink_to(treasure)
    train.train(config)
    assert treasure.read_text() == "precious" and not (out_dir / "metrics.jsonl").is_symlink()
    assert checkpoint.read(out_dir, "last")["step"] == 9


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("movable", [True, False])
def test_a_link_where_the_lock_belongs_is_an_error(tiny, tmp_path, movable, monkeypatch):
    treasure, out_dir = tmp_path / "treasure", Path(tiny.out_dir)
    treasure.write_text("precious")
    out_dir.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: not movable)
    (out_dir.with_name(".run.lock") if movable else out_dir / "run.lock").symlink_to(treasure)
    with pytest.raises(UserError, match="run.lock is a link, a lock must be a file of its own; delete the link"):
        train.train(tiny)
    assert treasure.read_text() == "precious" and not list(out_dir.glob("*.json"))


@pytest.mark.skipif(sys.platform == "win32", reason="links to folders need rights there")
def test_an_earlier_run_does_not_move_through_a_link(tiny, tmp_path, monkeypatch):
    train.train(tiny)
    out_dir, rename = Path(tiny.out_dir), Path.rename
    (tmp_path / "treasure").mkdir()
    (out_dir / "earlier.1").symlink_to(tmp_path / "treasure")
    (out_dir.with_name("run.1")).symlink_to(tmp_path / "nowhere")

    def only_within(self, target):
        if self == out_dir:
            assert target.name == "run.2"  # not over the link
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", only_within)
    train.train(tiny)
    assert not list((tmp_path / "treasure").iterdir()) and (out_dir / "earlier.2" / "last.json").exists()


def moments(content, number=0):
    return content["optimizer"]["state"][number]


NONSENSE = {  # what a stranger's files hold: which file (None: the JSON), the change, the line
    "optimizer, other shape": ("optimizer", lambda c: moments(c).update(exp_avg=torch.zeros(1)), "expected floats"),
    "optimizer, larger": ("optimizer", lambda c: moments(c).update(exp_avg_sq=torch.zeros(10**6)), "expected floats"),
    "optimizer, float64": ("optimizer", lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].double()), "type"),
    "optimizer, integers": ("optimizer", lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].int()), "expected"),
    "moments, sparse": ("optimizer", lambda c: moments(c).update(exp_avg=moments(c)["exp_avg"].to_sparse()), "floats"),
    "optimizer, a number": ("optimizer", lambda c: moments(c).update(exp_avg=3.0), "exp_avg is float"),
    "optimizer, step": ("optimizer", lambda c: moments(c).update(step=torch.zeros(7)), "step is Tensor"),
    "optimizer, later": ("optimizer", lambda c: moments(c).update(step=torch.tensor(99.0)), "another type or step"),
    "optimizer, no moment": ("optimizer", lambda c: moments(c).__delitem__("exp_avg"), "other names: exp_avg"),
    "optimizer, one more": ("optimizer", lambda c: c["optimizer"]["state"].update({99: {}}), "does not fit the run"),
    "optimizer, no state": ("optimizer", lambda c: c["optimizer"].update(state={}), "moments of 0 parameters"),
    "optimizer, a list": ("optimizer", lambda c: c["optimizer"].update(state=[1]), "does not fit the run"),
    "optimizer, empty": ("optimizer", lambda c: {}, "does not fit the run"),
    "optimizer, no dict": ("optimizer", lambda c: torch.zeros(3), "holds no tensors that can be loaded safely"),
    "progress": ("optimizer", lambda c: c["progress"].update(loss_sum="much"), "does not fit the run"),
    "model, no tensor": ("model", lambda c: c.popitem() and None, "do not fit together"),
    "model, other shape": ("model", lambda c: c.update({"lm_head.weight": torch.zeros(3)}), "do not fit together"),
    "model, integers": ("model", lambda c: c.update({k: w.int() for k, w in c.items()}), "do not fit together"),
    "model, float8": ("model", lambda c: {k: w.to(torch.float8_e4m3fn) for k, w in c.items()}, "do not fit together"),
    "model, text": ("model", lambda c: c.update({"lm_head.weight": "w"}), "do not fit together"),
    "model, a list": ("model", lambda c: [1, 2], "holds no tensors that can be loaded safely"),
    "a huge model": (None, lambda i: i["model"].update(n_embd=10**8), "do not fit together"),
    "a deep model": (None, lambda i: i["model"].update(n_layer=10**9), "do not fit together"),
    "half a head": (None, lambda i: i["model"].update(n_head=2.0), "do not fit together"),
    "an option is a list": (None, lambda i: i["model"].update(n_layer=[]), "is not from train.py"),
    "no rows": (None, lambda i: i.pop("rows") and None, "is not from train.py"),
    "a row is text": (None, lambda i: i["rows"].append("alias ls=rm"), "is not from train.py"),
    "a row holds text": (None, lambda i: i["rows"][0].update(taken="alias ls=rm"), "is not from train.py"),
    "a row without loss": (None, lambda i: i["rows"][-1].pop("val_loss_causal") and None, "is not from train.py"),
    "a row from the future": (None, lambda i: i["rows"][-1].update(step=10**6), "is not from train.py"),
    "step is a text": (None, lambda i: i.update(step="3"), "is not from train.py"),
    "a huge loss": (None, lambda i: i["rows"][-1].update(val_loss_causal=10**400), "is not from train.py"),
    "no files": (None, lambda i: i.update(files={}), "is not from train.py"),
    "no hash of a file": (None, lambda i: i["files"]["model"].pop("sha256") and None, "is not from train.py"),
    "another file": (None, lambda i: i["files"].update(x=3), "is not from train.py"),
    "a selection": (None, lambda i: i["model"].update(selection=3), "is not from train.py"),
    "a file elsewhere": (None, lambda i: i["files"]["model"].update(name="../model-3.pt"), "is not from train.py"),
    "asked is a number": (None, lambda i: i.update(asked=3), "is not from train.py"),
    "no data": (None, lambda i: i.update(data=None), "is not from train.py"),
    "other tokens": (None, lambda i: i["data"].update(tokenizer="bpe"), "the tokenizer is 'bpe'"),
    "no vocabulary": (None, lambda i: i["data"].update(vocab={}), "the vocabulary is no list of characters"),
    "no source": (None, lambda i: i["data"].pop("source") and None, "is not from train.py"),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_nonsense_with_the_right_hash_is_one_line_and_changes_no_file(small_run, tmp_path, what):
    kind, change, line = NONSENSE[what]
    out_dir = tmp_path / "run"
    shutil.copytree(small_run, out_dir)
    for name in ("last", "previous"):
        reseal(out_dir, name, change, kind)
    before = {path: path.read_bytes() for path in out_dir.iterdir()}
    assert line in told(train, ["--resume", f"--out_dir={out_dir}", "--n_layer=2", "--n_embd=4", "--n_head=1"])
    assert {path: path.read_bytes() for path in out_dir.iterdir()} == before


def test_moments_in_another_layout_are_copied(small_run):
    """They have the right shapes, but fused AdamW would write outside the memory of an expanded one."""
    model, info = checkpoint.load(small_run, "last", "cpu")
    state = checkpoint.tensors(small_run, info, "optimizer")
    for values in state["optimizer"]["state"].values():
        values["exp_avg"] = torch.ones(()).expand(values["exp_avg"].shape)
        if values["exp_avg_sq"].dim() == 2:
            values["exp_avg_sq"] = values["exp_avg_sq"].t().contiguous().t()
    optimizer = train.configure_optimizer(model, TrainConfig(**info["config"]))
    untrusted.check_optimizer(state, info["step"], optimizer, torch.amp.GradScaler("cpu", enabled=False))
    for values in state["optimizer"]["state"].values():
        assert all(values[name].is_contiguous() for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"null", b"\xff"])
def test_a_file_without_any_structure_is_one_line(small_run, tmp_path, content):
    for file in ("json", "pt"):
        out_dir = tmp_path / file
        shutil.copytree(small_run, out_dir)
        for name in ("config", *checkpoint.NAMES) if file == "json" else ():
            (out_dir / f"{name}.json").write_bytes(content)
        for path in out_dir.glob("*.pt") if file == "pt" else ():
            path.write_bytes(content)
        for name in checkpoint.NAMES if file == "pt" else ():
            sha256 = sha256_of(next(out_dir.glob("*.pt")))
            reseal(out_dir, name, lambda i, s=sha256: [f.update(sha256=s) for f in i["files"].values()] and None)
        told(train, ["--resume", f"--out_dir={out_dir}"])
        told(train, ["--eval_only", f"--out_dir={out_dir}"])


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, dataset):
    out_dir = tmp_path_factory.mktemp("small") / "run"
    train.train(TrainConfig(
        out_dir=str(out_dir), dataset=str(dataset), device="cpu", block_size=8, batch_size=2, n_layer=2, n_head=1,
        n_embd=4, predictor_hidden=1, max_iters=3, eval_interval=1, eval_iters=1,
    ))  # fmt: skip
    return out_dir


@pytest.mark.parametrize("pair", [("best", "last"), ("last", "previous"), ("best", "previous")])
def test_exchanged_checkpoints_of_one_run_are_noticed(small_run, tmp_path, pair, capsys):
    out_dir = tmp_path / "run"
    shutil.copytree(small_run, out_dir)
    a, b = (out_dir / f"{name}.json" for name in pair)
    whole = {path: path.read_bytes() for path in (a, b)}
    a.write_bytes(whole[b])
    b.write_bytes(whole[a])
    for name, other in (pair, pair[::-1]):
        with pytest.raises(UserError, match=f"{name}.json is the checkpoint '{other}' under another name"):
            checkpoint.read(out_dir, name)
    argv = ["--resume", f"--out_dir={out_dir}"]
    capsys.readouterr()
    if "previous" not in pair:  # it is whole
        train.main(argv)
        out = capsys.readouterr().out
        assert "last.json is the checkpoint 'best' under another name" in out and "at step 2" in out
        assert checkpoint.read(out_dir, "best")["step"] and checkpoint.read(out_dir, "last")["step"] == 3
    elif "last" in pair:
        assert "last.json is the checkpoint 'previous' under another name" in told(train, argv)
    else:
        train.main(argv)
        assert "The best checkpoint is lost" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [None, [], {}, ""])
def test_a_best_checkpoint_without_evaluations_counts_as_lost(tiny, rows, capsys):
    train.train(tiny)
    reseal(tiny.out_dir, "best", lambda i: i.pop("rows") and None if rows is None else i.update(rows=rows))
    train.main(["--resume", f"--out_dir={tiny.out_dir}", "--max_iters=9"])
    assert "The best checkpoint is lost" in capsys.readouterr().out
    assert checkpoint.read(Path(tiny.out_dir), "best")["rows"]


def test_a_damaged_last_json_does_not_replace_a_whole_previous_one(small_run, tmp_path):
    out_dir = tmp_path / "run"
    shutil.copytree(small_run, out_dir)
    (out_dir / "last.json").write_bytes(b"{")
    model, info = checkpoint.load(out_dir, "previous", "cpu")
    state = checkpoint.tensors(out_dir, info, "optimizer")
    checkpoint.save(
        out_dir, 7, model, state, False, {name: info[name] for name in ("data", "config", "versions", "rows")}
    )
    assert [checkpoint.read(out_dir, name)["step"] for name in ("last", "previous")] == [7, 2]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
def test_a_model_that_predicts_nan_is_one_line(small_run, dataset, tmp_path, value, capsys):
    out_dir = tmp_path / "run"
    shutil.copytree(small_run, out_dir)
    for name in checkpoint.NAMES:
        reseal(out_dir, name, lambda c: c.update({"lm_head.weight": torch.full((28, 4), value)}), "model")
    line = "of .*best.json are not finite" if value != 1e38 else "predicts NaN or infinity|has the loss (nan|inf)"
    for temperature in (0.8, 0) if value != 1e38 else (0.8,):
        argv = [f"--out_dir={out_dir}", "--device=cpu", f"--temperature={temperature}", "--max_new_tokens=3"]
        assert re.search(line, told(sample, argv))
    assert capsys.readouterr().out.strip() == ""
    assert re.search(line, told(train, ["--eval_only", f"--out_dir={out_dir}", f"--dataset={dataset}"]))
    if value != 1e38:
        assert re.search(line, told(train, [f"--init_from={out_dir}", f"--dataset={dataset}", "--max_iters=1"]))
        assert "last.json are not finite" in told(train, ["--resume", f"--out_dir={out_dir}"])


@pytest.mark.parametrize("how", ["deleted", "renamed", "emptied"])
@pytest.mark.parametrize("step", [3, 5])
def test_a_folder_that_is_gone_is_made_again_with_everything_in_it(tiny, how, step, monkeypatch, capsys):
    config, whole, at = dataclasses.replace(tiny, max_iters=9), elsewhere(tiny, "whole"), train.learning_rate_at
    train.train(dataclasses.replace(whole, max_iters=9))
    out_dir, losses = Path(config.out_dir), iter([1.0, 3.0, 2.5, 2.0])
    evaluate = train.evaluate

    def gone(now, config):
        if now == step and out_dir.exists() and not list(out_dir.parent.glob("elsewhere")):
            shutil.copytree(out_dir, out_dir.with_name("elsewhere"))
            if how == "emptied":
                [path.unlink() for path in out_dir.iterdir()]
            elif how == "renamed":
                out_dir.rename(out_dir.with_name("mine"))
            else:
                shutil.rmtree(out_dir)
        return at(now, config)

    monkeypatch.setattr(train, "evaluate", lambda *a: evaluate(*a) | {"val_loss_causal": next(losses)})
    monkeypatch.setattr(train, "learning_rate_at", gone)
    capsys.readouterr()
    train.train(config)
    assert capsys.readouterr().out.count(f"step 6: {out_dir} is not there any more; making it again\n") == 1
    saved = {name: checkpoint.read(out_dir, name) for name in checkpoint.NAMES}
    assert [saved[name]["step"] for name in ("last", "previous", "best")] == [9, 6, 9]
    assert len((out_dir / "metrics.jsonl").read_text().splitlines()) == 4
    original = json.loads((out_dir.with_name("elsewhere") / "config.json").read_text())
    assert json.loads((out_dir / "config.json").read_text()) == original
    assert same(state_of(config)[1], state_of(whole)[1])


def test_a_failed_first_save_does_not_claim_an_earlier_checkpoint(tiny, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(UserError, match="could not be saved; free disk space"):
        train.train(tiny)
    out = capsys.readouterr().out
    assert out.count("; there is none before it\n") == 4 and "is intact" not in out


def test_a_run_without_a_checkpoint_is_told_to_start_again(tiny, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.train(tiny)
    line = told(train, ["--resume", f"--out_dir={tiny.out_dir}"])
    assert "last.json: the run has not saved one; start it again without --resume" in line and "preset" not in line
    assert "config/" not in line and "config/" not in told(sample, [f"--out_dir={tiny.out_dir}"])


def test_every_flipped_bit_of_a_data_sets_json_is_noticed_or_harmless(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "set")
    path = tmp_path / "set" / "meta.json"
    raw = path.read_bytes()
    meta, _ = data_module.load(dataset)
    noticed = 0
    for bit in range(8 * len(raw)):
        path.write_bytes(raw[: bit // 8] + bytes([raw[bit // 8] ^ (1 << bit % 8)]) + raw[bit // 8 + 1 :])
        try:
            found, _ = data_module.load(tmp_path / "set", check=False)
            # In the hash's own name a flip leaves a data set without one, as an earlier version wrote it.
            assert {name: found[name] for name in meta} == meta and len(found) <= len(meta) + 1
        except UserError:
            noticed += 1
    assert noticed > 0.8 * 8 * len(raw)


def test_a_data_set_that_an_earlier_version_prepared_is_read(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "set")
    path = tmp_path / "set" / "meta.json"
    meta = json.loads(path.read_text())
    assert meta.pop("meta_sha256")
    path.write_text(json.dumps(meta))
    assert data_module.load(tmp_path / "set")[0] == meta == data_module.load(dataset)[0]


def test_a_tokenizer_with_more_tokens_than_the_model_is_one_line(small_run, monkeypatch):
    monkeypatch.setattr(sample, "tokenizer_of", lambda meta: data_module.CharTokenizer(list(map(chr, range(200)))))
    line = told(sample, [f"--out_dir={small_run}", "--device=cpu", "--start=z"])
    assert "has fewer tokens than its tokenizer; use another one" in line
