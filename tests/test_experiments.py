"""The experiments: what is run next, what is measured, and that the README says what the results say."""

import functools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import isoflop, known_depth, readme, recall, report, routing, runner
from helpers import ROOT
from mod import GPT, GPTConfig
from mode import forward_flops
from support import workers
from support.data import load
from support.report import hardware

# The runner


@dataclass(frozen=True)
class FakeRun:
    name: str
    learning_rate: float = 4.0
    seed: int = 1
    budget: float = 1.0


def line(run, loss):
    return {"run": run.__dict__, "choose": None if loss is None else {"val_loss_causal": loss}, "report": None}


@pytest.mark.parametrize("best", [0.5, 4.0, 64.0])
def test_the_search_goes_on_until_the_best_rate_has_worse_ones_on_both_sides(best):
    done = {}
    while (found := runner.search(FakeRun("a"), done))[1]:
        for run in found[1]:
            assert run not in done
            done[run] = line(run, abs(math.log(run.learning_rate / best)))
    assert found[0].learning_rate == best
    assert {best / 2, best, best * 2} <= {run.learning_rate for run in done}


def test_the_search_ranks_a_diverged_run_last():
    done = {}
    while (found := runner.search(FakeRun("a"), done))[1]:
        for run in found[1]:
            done[run] = line(run, None if run.learning_rate > 1 else abs(math.log(run.learning_rate / 0.5)))
    assert found[0].learning_rate == 0.5


def test_two_seeds_choose_a_rate_together_and_not_beside_a_cliff():
    def chosen(losses):
        """The rate that the search chooses. losses: {rate: loss of seed 1, loss of seed 2}"""
        done = {}
        while (found := runner.search(FakeRun("a"), done, chosen_by=(1, 2)))[1]:
            for run in found[1]:
                assert run not in done
                done[run] = line(run, losses[run.learning_rate][run.seed - 1])
        assert found[0].seed == 1
        return found[0].learning_rate

    assert chosen({2: (1.0, 1.4), 4: (1.1, 1.1), 8: (1.12, 1.12)}) == 4  # seed 1 alone would go to lower rates
    assert chosen({1: (1.3, 1.3), 2: (1.15, 1.15), 4: (1.1, 1.1), 8: (1.1, 1.3)}) == 2
    assert chosen({1: (1.3, 1.3), 2: (1.15, 1.15), 4: (1.1, 1.1), 8: (None, 1.1)}) == 2
    assert chosen({2: (1.3, 1.3), 4: (1.1, 1.1), 8: (1.1, 1.3)}) == 4  # between two cliffs


def execute_fake(run, folder):
    if run.name == "fails":
        raise ValueError("this run fails")
    if run.name == "slow":
        time.sleep(1)
    return {"run": run.__dict__, "choose": None, "report": {"val_loss_causal": run.seed / 10}}


@pytest.fixture
def threads(monkeypatch):
    """Runs in threads, because each new process would import PyTorch first."""
    monkeypatch.setattr(runner.concurrent.futures, "ProcessPoolExecutor", lambda *a, **k: ThreadPoolExecutor(8))


def test_what_is_done_is_not_run_again_and_a_deleted_line_is(tmp_path, threads):
    runs = [FakeRun("a", seed=seed) for seed in (1, 2, 3)]
    path = tmp_path / "runs.jsonl"

    def wanted(done):
        return [run for run in runs if run not in done]

    def again():
        runner.run_all(wanted, FakeRun, execute_fake, tmp_path, jobs=2)
        return runner.read(tmp_path, FakeRun)

    assert set(again()) == set(runs)
    whole = path.read_bytes()
    assert set(again()) == set(runs) and path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[1:]))
    assert set(again()) == set(runs) and sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)


def test_no_run_is_begun_before_there_is_room_for_it(tmp_path, threads):
    """Otherwise it would wait in the pool, and begin even after Ctrl-C or when results have made it needless."""
    runs, now, most = [FakeRun("a", seed=seed) for seed in range(1, 7)], set(), []

    def execute(run, folder):
        now.add(run)
        most.append(len(now))
        time.sleep(0.3 if run.seed == 1 else 0.05)
        now.remove(run)
        return execute_fake(run, folder)

    runner.run_all(lambda done: [run for run in runs if run not in done], FakeRun, execute, tmp_path, jobs=2)
    assert max(most) == 2 and len(most) == 6


def test_each_line_says_which_code_and_which_machine_made_it(tmp_path, dataset, monkeypatch):
    monkeypatch.setattr(runner, "commit", lambda: "0123456789ab")
    run = isoflop.Run(1e9, 1, 32, 0)
    execute = functools.partial(isoflop.execute, dataset=dataset, device="cpu")
    runner.run_all(lambda done: [] if done else [run], isoflop.Run, execute, tmp_path, jobs=1)
    row = runner.read(tmp_path, isoflop.Run)[run]
    assert row["commit"] == "0123456789ab" and row["cpu"] == row["versions"]["hardware"] == hardware("cpu")


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_the_commit_of_changed_code_is_marked(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # a hook sets GIT_DIR: another repository
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")

    def git(*arguments):
        who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True)

    (tmp_path / "experiments").mkdir()
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "experiments" / "runner.py"))
    assert runner.commit() == "unknown"
    (tmp_path / "mod.py").write_text("k = 1\n")
    (tmp_path / "runs.jsonl").write_text("")
    git("init"), git("add", "."), git("commit", "-m", "first")
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "in" / "a" / "folder" / "of" / "it.py"))
    (tmp_path / "in" / "a" / "folder").mkdir(parents=True)
    assert runner.commit() == "unknown"  # somebody else's repository
    monkeypatch.setattr(runner, "__file__", str(tmp_path / "experiments" / "runner.py"))
    (tmp_path / "runs.jsonl").write_text("{}\n")
    clean = runner.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    (tmp_path / "mod.py").write_text("k = 2\n")
    assert runner.commit() == clean + " + changes"


def test_what_is_under_way_is_finished_and_kept_when_another_run_fails(tmp_path):
    runs = [FakeRun("fails"), FakeRun("slow"), FakeRun("never begun")]
    with pytest.raises(ValueError, match="this run fails"):
        runner.run_all(lambda done: [run for run in runs if run not in done], FakeRun, execute_fake, tmp_path, jobs=2)
    assert list(runner.read(tmp_path, FakeRun)) == [FakeRun("slow")]


def test_runs_on_another_text_do_not_get_into_the_same_file(tmp_path, dataset):
    line = {"run": isoflop.Run(1e9, 1, 32, 0).__dict__, "data": "another text"}
    (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    with pytest.raises(runner.UserError, match="holds runs on another text"):
        isoflop.prepared(isoflop.execute, tmp_path, dataset, "cpu")


def test_jobs_below_1_are_refused(tmp_path):
    with pytest.raises(runner.UserError, match="--jobs must be at least 1, got 0"):
        runner.run_all(None, FakeRun, None, tmp_path, jobs=0)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal that a process can ignore")
def test_a_second_ctrl_c_ends_workers_that_ignore_signals():
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the worker inherits it
    worker.start()
    signal.signal(signal.SIGTERM, before)
    with pytest.raises(KeyboardInterrupt, match="Stopped at once"), runner.StopAll():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
    worker.join(30)
    ended = worker.exitcode
    worker.kill()  # otherwise pytest would wait for its end
    assert ended == -signal.SIGKILL


def test_a_pool_has_at_most_61_processes_on_windows(monkeypatch):
    for platform, expected in (("win32", 61), ("linux", 64)):
        monkeypatch.setattr(workers.sys, "platform", platform)
        assert (workers.at_most(64), workers.at_most(2)) == (expected, 2)


WORKER = """
import multiprocessing
import time
from experiments import runner
def work():
    runner.ignore_signals()
    print("begun", flush=True)
    time.sleep(600)
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work)
    process.start()
    process.join()
"""


def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "worker.py"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    process.kill()
    assert process.communicate(timeout=60)[0] == ""  # which waits for the worker to close its output


SET_OF_TWO = """
import signal
import sys
from experiments import isoflop
runs = [isoflop.Run(2e10, 2, 32, 2, seed=seed) for seed in (1, 2)] + [isoflop.Run(1e9, 1, 32, 0)]
if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup, which ignores it
    isoflop.SETS["two"] = lambda done: [run for run in runs if run not in done]
    isoflop.main(["two", *sys.argv[1:]])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM that asks")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])  # SIGHUP: a closed terminal
def test_a_set_that_is_stopped_goes_on_inside_its_runs_and_ends_the_same(tmp_path, dataset, name):
    script = tmp_path / "set_of_two.py"
    script.write_text(SET_OF_TWO, encoding="utf-8")

    def start(results):
        command = [sys.executable, script, f"--results={results}", f"--dataset={dataset}", "--jobs=2", "--device=cpu"]
        return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)

    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    results, stops, resumed = tmp_path / "stopped", 0, False
    while True:
        process = start(results)
        # Stopped once, when a run has its first checkpoint; how long that takes depends on the machine.
        while process.poll() is None and (stops or not list(results.glob("under-way/*/run/last.json"))):
            time.sleep(0.05)
        if process.poll() is not None:
            assert process.returncode == 0, process.stderr.read()
            break
        process.send_signal(getattr(signal, name))
        assert process.wait() == 130, process.stderr.read()
        stops += 1
        resumed |= any("Resuming" in log.read_text(encoding="utf-8") for log in results.glob("under-way/*/log.txt"))
    assert stops > 0 and (resumed or stops == 1)
    assert not list(results.glob("under-way/*"))

    def lines(folder):
        done = runner.read(folder, isoflop.Run)
        return {run: {k: v for k, v in row.items() if k != "train_seconds"} for run, row in done.items()}

    assert lines(results) == lines(tmp_path / "whole") and len(lines(results)) == 3


def test_the_runs_of_another_experiment_are_not_this_ones(tmp_path, capsys):
    for name, experiment in (("recall", isoflop), ("isoflop", recall), ("isoflop", known_depth)):
        with pytest.raises(SystemExit, match="line 1 of .*runs.jsonl is not a run of this experiment .*--results"):
            experiment.main(["draw", f"--results={ROOT / 'results' / name}"])
    routing.main(["draw", f"--results={ROOT / 'results' / 'isoflop'}"])  # the same kind of run, but not measured so
    assert capsys.readouterr().out.startswith("No runs in")


def test_draw_prints_the_table_of_the_set_long(tmp_path, capsys):
    lines = (ROOT / "results" / "isoflop" / "runs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    long = "".join(line for line in lines if json.loads(line)["run"]["budget"] == report.LONG)
    (tmp_path / "runs.jsonl").write_text(long, encoding="utf-8")
    isoflop.main(["draw", f"--results={tmp_path}"])
    assert "| 1e14 | MoD, 4×64 | 215,106 |" in capsys.readouterr().out


def test_a_line_that_is_no_run_is_named(tmp_path):
    (tmp_path / "runs.jsonl").write_text('{"run": {"name": "a"}}\n{"run": {"nam', encoding="utf-8")
    with pytest.raises(runner.UserError, match="line 2 of .*runs.jsonl is not a run of this experiment"):
        runner.read(tmp_path, FakeRun)


# The sets


def finish(wanted, loss):
    """Do all that a set wants, with made-up losses; returns what was done, in order."""
    done = {}
    while todo := wanted(done):
        assert len(set(todo)) == len(todo) and not set(todo) & set(done)
        run = todo[0]
        half = {"val_loss_causal": loss(run)}
        size = run.n_layer * run.n_embd**2
        cost = size / (2 if run.route_every else 1)
        done[run] = {"choose": half, "report": half, "parameters": size, "forward_flops_per_token": cost}
    return done


def test_a_comparison_gives_seeds_to_the_three_best_of_each_kind_and_fresh_ones_to_the_best_and_the_baseline():
    rng = random.Random(0)
    quality = {}

    def loss(run):
        size = (run.n_layer, run.n_embd, run.route_every)
        if run.route_every == 2 and (run.n_layer, run.n_embd) == (6, 64):
            quality[size] = -1.0  # the best MoD; its baseline is among the worst of the dense models
        if not run.route_every and (run.n_layer, run.n_embd) == (3, 64):
            quality[size] = 10.0
        return quality.setdefault(size, rng.random()) + abs(math.log(run.learning_rate / 0.01)) + 0.001 * run.seed

    sizes = isoflop.SIZES[3e12]
    done = finish(lambda done: isoflop.at_one_budget(3e12, sizes, done), loss)
    for route_every in (0, 2):
        of_kind = [run for run in done if run.route_every == route_every]
        assert {(run.n_layer // (2 if route_every else 1), run.n_embd) for run in of_kind} == set(sizes)
        repeated = {(run.n_layer, run.n_embd) for run in of_kind if run.seed > 1}
        order = sorted({(run.n_layer, run.n_embd) for run in of_kind}, key=lambda size: quality[(*size, route_every)])
        assert repeated >= {*order[:3], *([] if route_every else [(3, 64)])}
        for size in repeated:
            seeds = {run.seed for run in of_kind if (run.n_layer, run.n_embd) == size and run.learning_rate == 0.01}
            compared = size in ([(6, 64)] if route_every else [order[0], (3, 64)])
            # others may be those of claims 3 and 4
            assert seeds >= {*runner.SEEDS, *(runner.FRESH if compared else ())}
            assert size in order[:3] or seeds >= set(runner.FRESH)


def test_fresh_seeds_go_to_the_best_of_each_kind_and_to_the_cheaper_model_of_the_claims():
    def loss(run):  # the larger the better
        return abs(math.log(run.learning_rate / 0.005)) - run.n_embd / 1000

    done = finish(lambda done: isoflop.at_one_budget(3e12, ((1, 32), (1, 64), (1, 96)), done), loss)
    fresh = {(run.n_layer, run.n_embd) for run in done if run.seed in runner.FRESH}
    assert fresh == {(1, 96), (2, 96), (2, 64)}  # 2 x 64: 0.89 of the size of 1 x 96, 0.44 of its FLOPs


def test_a_lucky_first_seed_does_not_choose_the_model_that_gets_fresh_seeds():
    def loss(run):
        lucky = run.route_every and run.n_embd == 96 and run.seed == 1
        return run.n_embd / 1000 + abs(math.log(run.learning_rate / 0.005)) - 0.1 * lucky

    done = finish(lambda done: isoflop.at_one_budget(3e12, ((1, 64), (1, 96)), done), loss)
    fresh = {(run.n_layer, run.n_embd) for run in done if run.seed in runner.FRESH}
    assert fresh == {(1, 64), (2, 64)} and {run.seed for run in done} == {*runner.SEEDS, *runner.FRESH}


def test_the_long_set_reports_by_seeds_that_did_not_choose():
    def loss(run):
        best_rate = 1.25e-3 if run.route_every else 2.5e-3
        # More than 3% above the best of its kind: a width, and the baseline of the best MoD.
        far = 0.1 if run.n_embd == 96 or (run.n_layer, run.n_embd) == (3, 128) else 0
        more = 0.01 * abs(math.log(run.learning_rate / best_rate)) + 0.001 * (run.seed == 1)
        layers = min(run.n_layer, 12 - run.n_layer)  # six layers are best
        return 2 - 0.005 * layers + far + more

    done = finish(isoflop.long, loss)
    fresh = {}  # {(budget, layers, width, variant): rates}, in the order of the set
    for run in (run for run in done if run.seed in runner.FRESH):
        fresh.setdefault((run.budget, run.n_layer, run.n_embd, run.variant), []).append(run.learning_rate)
    pairs = {budget: [(budget, 4, 64, ""), (budget, 2, 64, "")] for budget in (1e14, 1e13, 3e13)}
    controls = [(1e14, 4, 64, name) for name in ("stochastic", "position")]
    larger = [(1e14, 6, 128, ""), (1e14, 4, 128, ""), (1e14, 3, 128, "")]  # the best of each kind, and MoD's baseline
    rates = {run.learning_rate for run in done if run.budget == 1e14 and not run.route_every}
    assert rates == {1.25e-3, 2.5e-3, 5e-3}  # the baseline's search, too, begins at 2.5e-3
    assert set(fresh) == {*pairs[1e14], *pairs[1e13], *larger, *pairs[3e13], *controls}
    assert set(list(fresh)[:4]) == {*pairs[1e14], *pairs[1e13]} and list(fresh)[-2:] == controls
    assert all(len(rates) == 6 and len(set(rates)) == 1 for rates in fresh.values())
    assert {run.seed for run in done} == {1, 2, *runner.FRESH}
    for kind, layers in ((0, 1), (2, 2)):  # MoD has twice the layers
        searched = [run for run in done if (run.budget, run.route_every, run.variant) == (1e14, kind, "")]
        sizes = {(layers * n, width) for n, width in isoflop.LONG_SIZES}
        assert {(run.n_layer, run.n_embd) for run in searched} == sizes
        far = [run for run in searched if run.n_embd == 96]
        assert [(run.learning_rate, run.seed) for run in far] == [(2.5e-3, 1)]
        assert {(run.n_layer, run.n_embd) for run in searched if run.seed == 2} == {s for s in sizes if s[1] != 96}
    order = [run.seed for run in done if run.budget == 1e14 and run.seed in runner.FRESH][:12]
    assert order == sorted(2 * list(runner.FRESH))  # a set that is stopped has pairs


def test_the_table_and_the_picture_of_the_long_set(tmp_path):
    def lines(run, loss, seeds):
        runs = [replace(run, seed=seed) for seed in seeds]
        return {run: row_of(run, loss + 0.01 * (run.seed % 2)) for run in runs}

    def table():
        text = report.long_table(report.models_of(done)).splitlines()[2:]
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in text]

    mod, dense = isoflop.Run(1e14, 4, 64, 2, 1.25e-3), isoflop.Run(1e14, 2, 64, 0, 2.5e-3)
    done = lines(mod, 1.47, (1, 2)) | lines(replace(mod, learning_rate=2.5e-3), 1.6, (1, 2)) | lines(dense, 1.5, (1, 2))
    (ours, baseline) = table()
    assert ours[1] == "MoD, 4×64" and ours[5:7] == ["0.00125", "1, 2"]
    assert ours[8] == "its baseline 2×64: -1.99% (seeds: 1, 2) (-1.99, -1.99)" and baseline[8] == ""
    # Fresh seeds report as soon as both models have them. A larger dense model has none yet, and another has only
    # seed 1. The losses are of the second half for all.
    done |= lines(mod, 1.47, runner.FRESH)
    assert table()[0][6:] == ["5, 6, 7, 8, 9, 10", "1.4750 ± 0.0055", ours[8]]
    done |= lines(dense, 1.5, runner.FRESH)
    done |= lines(replace(dense, n_layer=3), 1.4, (1, 2)) | lines(replace(dense, n_layer=4), 1.6, (1,))
    for row in done.values():
        row["choose"] = {name: 1.1 * loss for name, loss in row["choose"].items()}
    assert [row[1] for row in table()] == ["MoD, 4×64", "dense, 2×64", "dense, 3×64", "dense, 4×64"]
    assert [row[6] for row in table()[2:]] == ["1, 2", "1"]
    error = 2.5706 * math.sqrt(2 * np.var(3 * [0, 0.01], ddof=1) / 6)  # Student's t of five degrees of freedom
    ours = table()[0]
    assert ours[6:8] == ["5, 6, 7, 8, 9, 10", "1.4750 ± 0.0055"]
    assert ours[8].split("; ") == [
        f"its baseline 2×64: {100 * (1.475 / 1.505 - 1):.2f}% ± {100 * error / 1.505:.2f} (-1.99, -1.99)",
        "the best dense 3×64: +4.98% (seeds: 1, 2) (+4.98, +4.98)",
    ]
    # The same pair with a tenth of the budget, and a control.
    done |= lines(replace(mod, budget=1e13), 1.7, (1, 2, *runner.FRESH))
    done |= lines(replace(dense, budget=1e13), 1.7, (1, 2, *runner.FRESH))
    done |= lines(replace(mod, variant="stochastic"), 1.47, (1, 2, *runner.FRESH))
    rows = table()
    assert [row[:2] for row in rows[:2]] == [["1e13", "MoD, 4×64"], ["1e13", "dense, 2×64"]]
    assert rows[0][8].startswith("its baseline 2×64: +0.00% ±") and "best dense" not in rows[0][8]
    (control,) = (row for row in rows if row[1] == "stochastic, 4×64")
    assert [text.split(":")[0] for text in control[8].split("; ")] == [
        "its baseline 2×64", "MoD 4×64", "the best dense 3×64",
    ]  # fmt: skip
    models = at_budgets(1.648, 1.632) + report.models_of(done)
    assert list(report.long_pairs(models)) == [1e13, 1e14]
    # The best models are a distance of their own as soon as both have fresh seeds; dense 3×64 has none yet.
    assert list(report.distances(models)) == [1e11, 1e12]
    fresh = lines(replace(dense, n_layer=3), 1.4, runner.FRESH)
    for row in fresh.values():
        row["choose"] = {name: 1.1 * loss for name, loss in row["choose"].items()}
    done |= fresh
    models = at_budgets(1.648, 1.632) + report.models_of(done)
    assert list(report.distances(models)) == [1e11, 1e12]  # one MoD alone is not the best of its kind
    done |= lines(replace(mod, n_layer=6), 1.9, (1,))
    models = at_budgets(1.648, 1.632) + report.models_of(done)
    assert list(report.distances(models)) == [1e11, 1e12, 1e14]
    assert report.distances(models)[1e14][0] == pytest.approx(100 * (1.475 / 1.405 - 1))
    assert report.crossover(models).startswith("For ten times the budget the gap changes by +0.78")
    report.draw(models, tmp_path)  # the crossover with hollow marks
    assert (tmp_path / "crossover.png").stat().st_size > 10_000


def test_the_ablations_change_one_thing_each_at_a_rate_of_their_own(monkeypatch):
    def loss(run):
        return run.n_embd / 1000 + abs(math.log(run.learning_rate / 0.0025)) + 0.001 * run.seed

    monkeypatch.setattr(isoflop, "ABLATED", 1e13)
    done = finish(lambda done: isoflop.at_budgets({1e13: isoflop.SIZES[1e13]}, done), loss)
    base = report.best_of(report.plain(report.models_of(done), 1e13, "MoD")).run
    for other in isoflop.changed(base):
        different = {name for name in vars(base) if getattr(other, name) != getattr(base, name)}
        assert len(different) == 1 or different == {"block_size", "route_every", "n_layer"}
        assert all(replace(other, learning_rate=0.0025, seed=seed) in done for seed in runner.SEEDS)
    for options in ({}, {"causal_method": "router"}, {"variant": "expert_threshold"}):
        causal = replace(base, learning_rate=0.0025, **options)
        assert all(replace(causal, seed=seed) in done for seed in runner.FRESH)


@pytest.mark.parametrize("name", [pytest.param("full", marks=pytest.mark.slow), "gpu"])
def test_all_runs_of_a_budget_cost_the_same_and_name_different_folders(name):
    done = finish(isoflop.SETS[name], lambda run: abs(math.log(run.learning_rate / 0.005)))
    assert len({run.name for run in done}) == len(done)
    chosen_by = runner.SEEDS[:2] if name == "gpu" else runner.SEEDS[:1]
    assert all(replace(run, seed=seed) in done for run in done for seed in chosen_by)
    for run in {replace(run, learning_rate=0.005, seed=1) for run in done}:  # neither changes the cost
        config = isoflop.options(run, 84, "none", Path("none"), "cpu")
        flops = 3 * config.batch_size * forward_flops(isoflop.model_config(config, {"vocab_size": 84}), run.block_size)
        assert config.batch_size * config.block_size == isoflop.TOKENS_PER_STEP
        steps = isoflop.number_of_steps(config, flops)
        assert 0.99 * run.budget < steps * flops <= run.budget


def test_the_set_for_a_gpu_does_not_begin_without_one_unasked(monkeypatch, tmp_path):
    monkeypatch.setattr(isoflop, "pick_device", lambda name: "cpu")
    with pytest.raises(SystemExit) as end:
        isoflop.main(["gpu", f"--results={tmp_path}"])
    assert "found no GPU" in end.value.code and not list(tmp_path.iterdir())


def test_draw_needs_no_data(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(isoflop, "load_dataset", None)
    isoflop.main(["draw", f"--results={tmp_path}"])
    assert "Nothing to compare" in capsys.readouterr().out


# One run


@pytest.fixture
def dataset(tmp_path):
    """The second half of the validation split is of another kind than all the rest, so that it can be told."""
    from support import data as data_module

    rng = np.random.default_rng(0)
    even, any_letter = rng.integers(4, size=9000) * 2, rng.integers(8, size=1000)
    meta = {"tokenizer": "char", "vocab": list("abcdefgh"), "vocab_size": 8, "source": "test", "text_sha256": "0" * 64}
    val = np.concatenate([even[8000:], any_letter])
    data_module.write(tmp_path / "data", {"train": even[:8000], "val": val}, meta)
    return str(tmp_path / "data")


def test_a_run_reports_the_held_out_half_and_repeats_exactly(tmp_path, dataset):
    run = isoflop.Run(2e9, 2, 32, 2, learning_rate=1e-2)
    first, second = (isoflop.execute(run, tmp_path / name, dataset, "cpu") for name in ("a", "b"))
    assert first["choose"]["val_loss_causal"] < 1.6 < 2.1 < first["report"]["val_loss_causal"]
    assert first["flops"] <= run.budget and first["steps"] > 10
    for row in (first, second):
        row.pop("train_seconds")
    assert first == second
    json.dumps(first)


def test_a_run_that_diverges_is_a_line_without_losses(tmp_path, dataset):
    row = isoflop.execute(isoflop.Run(2e9, 2, 32, 2, learning_rate=1e15), tmp_path / "a", dataset, "cpu")
    assert row["choose"] is None and row["report"] is None


# Known depth


def test_the_answers_of_the_known_task_follow_from_its_definition():
    for letters in ("random", "copied"):
        x, y, start = known_depth.texts((1, 2), 50, letters)
        for text, answers, begin in zip(x.tolist(), y.tolist(), start.tolist()):
            numbers = text[begin : begin + 8]
            assert all(26 <= t < 31 for t in numbers)
            assert all(t < 26 for t in text[:begin] + text[begin + 8 :])
            follower = {}
            for t, number in enumerate(numbers):
                if t:
                    follower[numbers[t - 1]] = number
                assert answers[begin + t] == follower.get(number, number)
            outside = [(a, b) for i, (a, b) in enumerate(zip(text, answers)) if not begin <= i < begin + 8]
            assert all(b < 26 for _, b in outside)
            assert all(a == b for a, b in outside) == (letters == "copied")
    example = torch.tensor([3, 1, 4, 1, 3, 0, 1, 2])
    assert known_depth.answers(example[None].numpy()).tolist() == [[3, 1, 4, 4, 1, 0, 3, 2]]
    again, _, _ = known_depth.texts((1, 2), 50)
    other, _, _ = known_depth.texts((1, 3), 50)
    assert torch.equal(x, again) and not torch.equal(x, other)


def test_the_known_tasks_measurements_see_a_model_that_knows_it_all():
    class Knows(GPT):
        def forward(self, idx, targets=None, routing="topk"):
            super().forward(idx, targets, routing)
            for block in self.routed_blocks:  # exactly the numbers
                block.taken = idx >= 26
            x, y, _ = known_depth.texts(1, known_depth.MEASURED)
            assert torch.equal(idx, x)
            return torch.nn.functional.one_hot(y, known_depth.VOCABULARY) * 100.0, None

    model = Knows(GPTConfig(block_size=64, vocab_size=known_depth.VOCABULARY, n_layer=2, n_head=2, n_embd=16))
    found = known_depth.measure(model, 1)
    assert found["accuracy_causal"] == found["accuracy_topk"] == 1
    assert found["numbers_taken_causal"] == 1 and found["taken_topk"] == 0.125
    assert known_depth.share_of_numbers(found) == 1
    assert found["taken_around_causal"][7:17] == [0.0, *[1.0] * 8, 0.0]
    assert found["val_loss_causal"] < 1e-6


# Recall


@pytest.mark.parametrize("T, codes", [(64, 2), (256, 4), (512, 8)])
def test_exactly_the_digits_that_were_there_before_can_be_recalled(T, codes):
    tokens, letters = np.arange(5000) % 84, 84
    x, y, recall_mask = recall.texts((1, 2), 30, T, tokens, letters)
    for text, targets, mask in zip(x.tolist(), y.tolist(), recall_mask.tolist()):
        assert text[1:] == targets[:-1]
        follower = {}
        for t, (token, target) in enumerate(zip(text, targets)):
            assert mask[t] == (target in follower.values() and follower.get(token) == target)
            if min(token, target) >= letters:
                follower.setdefault(token, target)
        digits = [token for token in (*text, targets[-1]) if token >= letters]
        assert len(digits) == 8 * codes and digits == digits[:8] * codes and len(set(digits)) == 8
        rest = [token for token in (*text, targets[-1]) if token < letters]
        assert all((b - a) % 84 == 1 for a, b in zip(rest, rest[1:]))  # ordinary text, in order
    assert 0.08 < recall_mask.double().mean() < 0.11
    assert abs((x >= letters).double().mean() - (0.25 if T == 64 else 0.125)) < 0.003
    assert torch.equal(x, recall.texts((1, 2), 30, T, tokens, letters)[0])
    assert not torch.equal(x, recall.texts((1, 3), 30, T, tokens, letters)[0])


def test_a_told_block_takes_exactly_the_digits():
    model = recall.model_of("MoD told the digits, 1 + 1", 256, 84)
    x, _, _ = recall.texts(1, 5, 256, np.arange(5000) % 84, 84)
    for how in ("topk", "causal"):
        model(x, routing=how)
        (block,) = model.routed_blocks
        digits = x >= 84  # one less than k where the last digit is only a target
        assert torch.equal(block.taken & digits, digits)
        assert how == "topk" or torch.equal(block.taken, digits)


def test_recalls_measurements_see_a_model_that_knows_it_all():
    x, y, mask = recall.texts(1, 100, 256, np.arange(5000) % 84, 84)

    class Knows(GPT):
        seen = 0

        def forward(self, idx, targets=None, routing="topk"):
            super().forward(idx, targets, routing)
            for block in self.routed_blocks:
                block.taken = idx >= 84
            start = self.seen % len(x)
            Knows.seen += len(idx)
            assert torch.equal(idx, x[start : start + len(idx)])
            known = mask[start : start + len(idx), :, None]
            return torch.nn.functional.one_hot(y[start : start + len(idx)], 94) * 100.0 * known, None

    model = Knows(GPTConfig(block_size=256, vocab_size=94, n_layer=2, n_head=2, n_embd=16))
    found = recall.measure(model, x, y, mask)
    assert found["recalled_causal"] == found["recalled_topk"] == 1 and found["digits_taken_causal"] == [1]
    assert found["recall_loss_causal"] < 1e-6 and math.isclose(found["rest_loss_causal"], math.log(94), rel_tol=1e-6)
    share = mask.double().mean().item()
    assert math.isclose(found["val_loss_topk"], (1 - share) * found["rest_loss_topk"], rel_tol=1e-5)


def test_the_table_and_picture_of_recall_are_by_the_fresh_seeds_at_the_best_rate(tmp_path):
    done, tables = {}, []
    while todo := [run for run in recall.wanted(64, done) if "MoD" in run.model and "1 + 1" in run.model]:
        tables.append(recall.table(64, done))
        for run in todo[:3]:
            loss = 5 + abs(math.log(run.learning_rate / 2e-3)) / 10 + run.seed / 100
            half = {"val_loss_causal": loss, "recalled_causal": loss - 4.165, "rest_loss_causal": loss + 1}
            half["recall_loss_causal"] = loss + 2
            row = {"run": run.__dict__, "choose": half, "report": half | {"digits_taken_causal": [0.25]}}
            done[run] = row | {"steps": 5, "forward_flops_per_token": 7, "text": "a$\n1" * 16, "picks": "0101" * 16}
    assert {run.seed for run in done} == {1, 2, *runner.FRESH}
    models = [name for name in recall.MODELS if "MoD" in name and "1 + 1" in name]
    expected = "| 0.002 | 4 of 6 | 0.910 ± 0.020 | 7.075 ± 0.020 | 6.075 ± 0.020 | 5.075 ± 0.020 |"  # seeds 5 to 10
    assert tables[0] == "" and all(text.count("| 0.002 |") == text.count(expected) for text in tables)
    assert recall.table(64, done).count(expected) == len(models) and recall.table(512, done) == ""
    done[next(run for run in done if run.seed == 5)]["report"] = None  # a seed that diverged
    assert recall.table(64, done).count(expected) == len(models) - 1
    recall.draw(done, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").stat().st_size > 10_000


def test_a_run_of_the_known_task_spends_its_budget_and_is_measured_on_two_sets_of_texts():
    step = 3 * known_depth.BATCH * known_depth.model_of({}).flops(known_depth.T)
    row = known_depth.execute(known_depth.Run("MoD", budget=3.5 * step), None)
    assert (row["steps"], row["flops"]) == (3, 3 * step) and row["choose"] != row["report"]


def test_a_run_of_recall_spends_its_budget_and_is_measured_on_both_halves(dataset, monkeypatch):
    monkeypatch.setattr(recall, "load_dataset", lambda name, T: load(Path(dataset)))
    step = 3 * 16 * recall.model_of("MoD, 1 + 1", 64, 8).flops(64)
    row = recall.execute(recall.Run("MoD, 1 + 1", 64, 3.5 * step), None)
    assert (row["steps"], row["flops"]) == (3, 3 * step) and row["choose"] != row["report"]
    assert len(row["text"]) == len(row["picks"]) == 64


def test_look_sees_a_block_that_takes_exactly_the_spaces():
    model = recall.model_of("MoD told the digits, 1 + 1", 64, 84).eval()  # takes the last ten tokens
    tokens = np.random.default_rng(0).integers(94, size=64 * 66)
    with torch.no_grad():
        found = routing.look(model, tokens, ["a"] * 40 + ["\n"] * 22 + ["."] * 22 + [" "] * 10)
    assert found["known_by"]["character"] == pytest.approx([1]) and found["known_by"]["position"][0] < 0.1
    taken = {name: share for name, [share] in found["by_class"].items()}
    assert taken.pop("space") == 1 and not any(taken.values())
    assert len(found["depth"]) == 2 and len(found["by_position"]) == 64


# Learn


def test_learn_looks_at_the_model_without_changing_what_it_learns():
    seen, weights = [], []
    for look in (None, seen.append):
        torch.manual_seed(1)
        model = known_depth.model_of({})
        known_depth.learn(model, lambda step: known_depth.texts(step, 4)[:2], 5, 1e-3, seed=1, look=look, every=2)
        weights.append(model.state_dict())
        assert not model.training
    assert seen == [0, 2, 4, 5]
    assert all(torch.equal(a, b) for a, b in zip(weights[0].values(), weights[1].values()))


# What the router learned


def test_what_is_known_of_a_decision_is_all_or_nothing_at_the_ends():
    rng = np.random.default_rng(0)
    key = rng.integers(10, size=(100, 200))
    assert routing.known_by(key, key < 3) == pytest.approx(1)
    assert routing.known_by(key, rng.random(key.shape) < 0.1) < 0.01


def test_ranks_higher_is_the_share_of_the_pairs():
    rng = np.random.default_rng(0)
    value, taken = rng.random((4, 20)), rng.random((4, 20)) < 0.3
    pairs = [a > b for a in value[taken] for b in value[~taken]]
    assert routing.ranks_higher(value, taken) == pytest.approx(np.mean(pairs))


def test_most_taken_ranks_characters_by_number_of_picks():
    letters = np.array([list("aaaaaaaabc")])
    taken = np.array([[1, 1, 1, 0, 0, 0, 0, 0, 1, 0]], dtype=bool)[..., None]
    assert routing.most_taken(letters, taken, n=2) == [[["a", 0.75, 0.375], ["b", 0.25, 1.0]]]


def learned(ranks=(0.9, 0.5, 0.1), gap=0.5, character=0.5):
    """What routing.look returns, made up, as far as tables and claims need it."""
    return {
        "most_taken": [[["a", 0.75, 0.375], [" ", 0.25, 1.0], ["\n", 0.0, 0.0]]] * len(ranks),
        "entropy_ranks_higher": list(ranks),
        "loss_ranks_higher": list(ranks),
        "gap_variation": [gap] * len(ranks),
        "depth": [0.7, 0.2, 0.07, 0.03],
        "depth_if_independent": [0.67, 0.29, 0.03, 0.01],
        "known_by": {
            "character": [character] * len(ranks),
            "character and the one before": [0.8] * len(ranks),
            "position": [0.001] * len(ranks),
        },
    }


def test_the_tables_of_what_the_router_learned():
    found = {"run": {"seed": 2}, "learned": learned(ranks=(0.9, None, 0.1), gap=None)}
    lines = routing.preferences([found]).splitlines()
    assert lines[2] == "| 2 | 1 | `a` 75% (38%), space 25% (100%), `\\n` 0% (0%) | 90% | 90% | - |"
    assert lines[3].endswith(" | - | - | - |")
    assert routing.depths([found]).splitlines() == [
        "| seed | taken by 0 | taken by 1 | taken by 2 | taken by 3 |",
        "|--:|--:|--:|--:|--:|",
        "| 2 | 70.0% (67.0%) | 20.0% (29.0%) | 7.0% (3.0%) | 3.0% (1.0%) |",
    ]


def test_the_table_of_shorter_contexts_has_the_interval_of_the_difference():
    losses = [{"topk": 2.0, "causal": 2.0 * (1 + percent / 100)} for percent in (1.0, 2.0, 3.0)]
    rows = [{"lengths": {str(T): loss for T in routing.LENGTHS}} for loss in losses]
    # Student's t: 4.303 times a standard deviation of 1 over the root of 3
    assert routing.lengths(rows).splitlines()[2] == "| 16 | 2.0000 ± 0.0000 | 2.0400 ± 0.0200 | +2.00% ± 2.48 |"


@pytest.mark.parametrize(
    "options, verdict",
    [
        (dict(ranks=(0.61, 0.9, 0.7)), "reproduced"),
        (dict(ranks=(0.59, 0.9, 0.7)), "partly: structured, not by entropy"),
        (dict(character=0.1), "not reproduced"),
    ],
)
def test_the_seventh_claims_verdict(options, verdict):
    assert report.claim_7([{"learned": learned(**options)}])[1] == verdict
    here, _ = report.claim_7([{"learned": learned()}])
    assert "of 3 routed blocks 1 clearly prefer uncertain tokens, 1 certain ones" in here


def test_gaps_of_a_comb_do_not_vary_and_those_of_coins_do():
    comb = np.zeros((3, 800), dtype=bool)
    comb[:, 7::8] = True
    assert routing.gap_variation(comb) == 0
    coins = np.random.default_rng(0).random((30, 800)) < 1 / 8
    assert routing.gap_variation(coins) == pytest.approx(math.sqrt(7 / 8), abs=0.05)


def test_the_tenths_are_of_the_lowest_values_first():
    value = np.arange(100.0).reshape(2, 50)
    taken = (value >= 90)[..., None]
    assert routing.by_tenth(value, taken) == [[0.0]] * 9 + [[1.0]]


# The report


def row_of(run, loss, choice=None):
    half = {"val_loss_causal": loss, "val_loss_topk": loss, "predictor_accuracy": 0.98, "taken": [0.12]}
    return {
        "run": dict(vars(run)),
        "choose": dict.fromkeys(("val_loss_causal", "val_loss_topk"), choice or loss),
        "report": half,
        "parameters": run.n_layer * run.n_embd**2,
        "forward_flops_per_token": run.n_embd**2 * (0.56 if run.route_every else 1) * run.n_layer,
        "steps": 100,
        "train_seconds": 10.0,
    }


def lines_of(run, losses, choice=None):
    """Lines for seed 1, 2, ... with these losses."""
    runs = [replace(run, seed=i) for i in range(1, len(losses) + 1)]
    return {run: row_of(run, loss, choice) for run, loss in zip(runs, losses)}


def replace_loss(row, choose, report):
    return {**row, "choose": {"val_loss_causal": choose}, "report": {"val_loss_causal": report}}


MOD = isoflop.Run(1e13, 4, 64, 2)
DENSE = isoflop.Run(1e13, 2, 64, 0)


def made_up(mod_losses):
    return {
        **lines_of(DENSE, [9.9, 1.599, 1.600, 1.601], choice=1.5),
        **lines_of(replace(DENSE, learning_rate=1e-2), [0.1], choice=1.6),
        **lines_of(replace(DENSE, n_embd=32), [2.0]),  # another size of each kind, worse
        **lines_of(replace(MOD, n_embd=32), [2.0]),
        **lines_of(MOD, mod_losses, choice=1.5),
    }


def pair(mod_losses):
    models = report.models_of(made_up(mod_losses))
    return [report.best_of(report.plain(models, 1e13, kind)) for kind in ("dense", "MoD")]


def test_the_figures_are_of_the_seeds_that_chose_nothing_and_the_rate_of_the_one_that_did():
    dense, mod = pair([9.9, 1.5, 1.6, 1.7])
    assert dense.run.learning_rate == 5e-3 and dense.mean() == pytest.approx(1.6)
    assert statistics.stdev(mod.losses()) == pytest.approx(0.1) and mod.complete


def test_fresh_seeds_give_the_figures_as_soon_as_all_of_them_are_there():
    early, fresh = [9.9, 1.5, 1.6, 1.7], [1.3, 1.4, 1.5, 1.3, 1.4, 1.5]
    assert pair(early + fresh[:-1])[1].mean() == pytest.approx(1.6)
    dense, mod = pair(early + fresh)
    assert mod.mean() == pytest.approx(1.6) and mod.choice == pair(early)[1].choice
    assert report.final({"dense": dense, "MoD": mod})["MoD"] is mod  # compared by the same seeds, so not one alone
    mod = report.final({"MoD": mod, "baseline": None})["MoD"]
    # Fresh seeds chose nothing, so they report on both halves of the text. On the other one each has a loss of 1.5.
    assert mod.losses() == pytest.approx([(loss + 1.5) / 2 for loss in fresh]) and mod.complete
    percent, half = report.difference(mod, mod)
    assert percent == 0 and half == pytest.approx(2.571 * math.sqrt(0.008 / 4 * 2 / 6) / 1.45 * 100, rel=1e-3)
    worse = replace(mod, rows=[replace_loss(row, 1.6, 1.45) for row in mod.rows])
    assert report.compared(worse, mod).startswith("+5.17% ±") and report.compared(worse, mod).endswith(
        " (+6.67, +3.57)"
    )


def test_the_mean_of_all_seeds_chooses_among_those_that_have_them():
    lucky = lines_of(replace(MOD, n_embd=96), [1.4, 1.9, 1.9, 1.9]) | lines_of(replace(MOD, n_embd=128), [1.3])
    models = report.models_of(lucky | lines_of(MOD, [1.6, 1.7, 1.6, 1.7]))
    assert [report.best_of(models[:n]).run.n_embd for n in (1, 2, 3)] == [96, 96, 64]
    assert report.best_of(models[1:2]).run.n_embd == 128


def test_the_interval_of_a_difference_is_students():
    dense, mod = pair([9.9, 1.6, 1.7, 1.8])
    percent, half = report.difference(mod, dense)
    assert percent == pytest.approx(100 * 0.1 / 1.6)
    assert half == pytest.approx(4.303 * math.hypot(0.1, 0.001) / math.sqrt(3) / 1.6 * 100, rel=1e-3)


def test_models_without_all_seeds_are_compared_on_the_seeds_that_both_have():
    models = lines_of(DENSE, [1.6, 1.2]), lines_of(MOD, [1.8]), lines_of(replace(MOD, n_embd=96), [1.9, 1.5, 1.4, 1.3])
    dense, lucky, complete = (report.models_of(done)[0] for done in models)
    assert report.difference(lucky, dense) == (pytest.approx(12.5), math.inf)  # seed 1 alone
    assert report.difference(dense, lucky) == (pytest.approx(100 * (1.6 / 1.8 - 1)), math.inf)
    assert report.difference(lucky, complete) == (pytest.approx(100 * (1.8 / 1.9 - 1)), math.inf)
    assert report.difference(complete, dense) == (pytest.approx(100 * (3.4 / 2.8 - 1)), math.inf)
    assert report.compared(complete, dense).startswith("+21.43% (seeds: 1, 2) (")


def test_the_trend_is_the_slope_of_the_line_and_its_interval():
    slope, half = report.trend({1e12: (2.0, 0.3), 1e13: (1.0, 0.4)})  # the difference of the two, for a factor of ten
    assert slope == pytest.approx(-1) and half == pytest.approx(0.5)
    slope, half = report.trend({1e12: (3.0, 0.1), 1e13: (2.0, 5.0), 1e14: (1.0, 0.1)})  # the middle one has no say
    assert slope == pytest.approx(-1) and half == pytest.approx(math.hypot(0.1, 0.1) / 2)


def at_budgets(*mod_losses):
    """Three seeds' worth of a dense model of loss 1.6, and MoD models of these losses at 1e11, 1e12, ..."""
    done = {}
    for budget, loss in zip((1e11, 1e12, 1e13), mod_losses):
        done |= lines_of(replace(DENSE, budget=budget), [1, 1.5999, 1.6, 1.6001])
        done |= lines_of(replace(MOD, budget=budget), [1, loss - 0.0001, loss, loss + 0.0001])
        done |= lines_of(replace(DENSE, budget=budget, n_embd=32), [2.0])
        done |= lines_of(replace(MOD, budget=budget, n_embd=32), [2.0])
    return report.models_of(done)


def test_a_budget_of_the_crossover_is_named_only_when_three_budgets_and_a_clear_slope_say_it(tmp_path):
    assert "at zero at 1e14 FLOPs" in report.crossover(at_budgets(1.648, 1.632, 1.616))
    for unclear in (at_budgets(1.648, 1.632), at_budgets(1.616, 1.616, 1.616)):
        assert "it stays open" in report.crossover(unclear)
    assert "crossover" not in report.tables(at_budgets(1.648))
    report.draw(at_budgets(1.648, 1.632), tmp_path)
    assert (tmp_path / "crossover.png").stat().st_size > 10_000


def test_a_baseline_that_diverged_is_left_out_of_the_tables():
    other = lines_of(replace(DENSE, n_layer=1), [1.4, 1.5, 1.5, 1.5]) | lines_of(replace(DENSE, n_layer=3), [2.0])
    models = report.models_of(made_up([1, 1.6, 1.6, 1.7]) | other)
    alone = [model for model in models if model.run.n_layer != 2]
    assert "| baseline of the best MoD, 2×64 |" in report.isoflop_table(models)
    assert "baseline" not in report.isoflop_table(alone) and "best MoD" in report.isoflop_table(alone)


@pytest.mark.parametrize(
    "losses, verdict",
    [
        ([1, 1.619, 1.620, 1.621], "not reproduced, at 1e13"),
        ([1, 1.579, 1.580, 1.581], "reproduced, at 1e13"),
        ([1, 1.500, 1.600, 1.700], "no difference seen, at 1e13"),
    ],
)
def test_the_first_claims_verdict(losses, verdict):
    assert f"| {verdict} |" in report.claims(report.models_of(made_up(losses)), [], [])[0].splitlines()[2]


def test_one_size_alone_is_no_comparison():
    done = lines_of(DENSE, [1, 1.6, 1.6, 1.7]) | lines_of(MOD, [1, 1.6, 1.6, 1.7])
    assert not report.comparisons(report.models_of(done))
    assert list(report.comparisons(report.models_of(done | made_up([1, 1.6, 1.6, 1.7])))) == [1e13]


def test_a_budget_without_all_seeds_is_in_no_table_and_a_model_that_diverged_is_in_none():
    assert not report.comparisons(report.models_of(made_up([1.6, 1.6, 1.6])))
    done = made_up([9.9, 1.5, 1.6, 1.7])
    done[replace(MOD, seed=3)]["report"] = None
    assert [model.run.n_embd for model in report.plain(report.models_of(done), 1e13, "MoD")] == [32]


def test_a_claim_about_what_was_not_run_is_open():
    done = made_up([1, 1.619, 1.620, 1.621])
    asked = [dict(capacity=c) for c in (0.0625, 0.25, 0.5)] + [dict(route_every=1), dict(variant="stochastic")]

    def fifth():
        return report.claims(report.models_of(done), [], [])[0].splitlines()[6]

    for change in asked:
        assert "| open |" in fifth()
        done |= lines_of(replace(MOD, **change), [1, 1.659, 1.660, 1.661])
    assert "| reproduced, at 1e13 |" in fifth()
    done |= lines_of(replace(MOD, capacity=0.25), [1, 1.61, 1.61, 1.62])
    worse = "capacity 0.0625, capacity 0.5, every block routed, stochastic routing"
    assert f"| partly (worse: {worse}; not: capacity 0.25), at 1e13 |" in fifth()


def test_the_last_claim_needs_all_its_models_in_one_shape_and_is_printed_without_any_other_comparison():
    done = lines_of(MOD, [1, 1.619, 1.620, 1.621])
    losses = {"MoE": 1.640, "MoE, lowered capacity": 1.640, "staged MoDE": 1.600, "integrated MoDE": 1.630}

    def last():
        return report.claim_8(report.models_of(done))

    for name, loss in losses.items():
        run = replace(MOD, **isoflop.EXPERTS[name])
        assert run.experts == name and not run.plain
        done |= lines_of(run, [1, loss, loss, loss + 0.001])
    done |= lines_of(replace(MOD, route_every=0), [1, 1.7, 1.7, 1.7])
    done |= lines_of(replace(DENSE, n_embd=32), [1, 1.5, 1.5, 1.5])  # of another width
    assert last()[1] == "open"
    done |= lines_of(DENSE, [1, 1.61, 1.61, 1.611])  # MoD's shape without its routed blocks
    assert last()[1] == "reproduced, at 1e13" and "staged MoDE against MoE -2.44%" in last()[0]
    tables = report.tables(report.models_of(done))
    assert list(tables) == ["experts"] and tables["experts"].count("\n") == 8
    best = [line.split(" | ")[1] for line in tables["experts"].splitlines()[2:4]]
    assert best == ["staged MoDE, 4×64", "dense, without these blocks, 2×64"]
    done |= lines_of(DENSE, [1, 1.59, 1.59, 1.591])
    assert last()[1] == "partly, at 1e13"
    for name, loss in losses.items():
        done |= lines_of(replace(MOD, **isoflop.EXPERTS[name]), [1, loss - 0.1, loss, loss + 0.1])
    assert last()[1] == "no difference seen, at 1e13"
    done |= lines_of(replace(MOD, **isoflop.EXPERTS["staged MoDE"]), [1, 1.64, 1.64, 1.641])
    assert last()[1] == "not reproduced, at 1e13"


def test_a_kind_of_experts_that_somebody_adds_has_its_own_row(monkeypatch):
    monkeypatch.setitem(isoflop.EXPERTS, "eight experts", dict(n_expert=8, expert_capacity=0.125))
    done = {}
    for options in isoflop.EXPERTS.values():
        done |= lines_of(replace(MOD, **options), [1, 1.6, 1.6, 1.61])
    assert {model.run.experts for model in report.models_of(done)} == set(isoflop.EXPERTS)
    assert report.expert_table(report.models_of(done)).count("eight experts") == 1


def test_the_time_of_a_training_step_is_that_of_the_bench_for_the_same_two_models():
    done = made_up([1, 1.619, 1.620, 1.621]) | lines_of(replace(MOD, n_embd=48), [1, 1.619, 1.620, 1.621], choice=1.8)

    def third(timed):
        return report.claims(report.models_of(done), [], timed)[0].splitlines()[4]

    bench = {"n_layer": 4, "n_embd": 48, "against": "2x64", "train_time_ratio": 0.777}
    assert "0.78 of the time of a training step" in third(
        [{"n_layer": 4, "n_embd": 48, "train_time_ratio": 0.5}, bench]
    )
    assert "time not measured" in third([{**bench, "against": "1x64"}])


def test_changes_of_any_routing_interval_have_a_name():
    assert report.change_name("route_every", 4) == "one block in 4 routed"


def test_another_context_is_compared_with_its_baseline():
    done = made_up([1, 1.619, 1.620, 1.621])
    done |= lines_of(replace(MOD, block_size=256), [1, 1.509, 1.510, 1.511])
    assert "context" not in report.ablation_table(report.models_of(done))  # not without it
    done |= lines_of(replace(DENSE, block_size=256), [1, 1.499, 1.500, 1.501])
    done |= lines_of(replace(MOD, route_every=0), [1, 1.7, 1.7, 1.7])
    table = report.ablation_table(report.models_of(done))
    assert "context 256, against its baseline" in table and "+0.67% ±" in table and "no block routed" in table


def test_the_numbers_of_the_claims_follow_from_the_runs():
    """Most numbers of the claims once more, from the lines alone; and those of the causal rules."""
    text = (ROOT / "results/README.md").read_text(encoding="utf-8")
    claims = [line for line in text.splitlines() if "| `exp" in line]
    rows, learned = (
        [json.loads(line) for line in (ROOT / f"results/{name}/runs.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("isoflop", "routing")
    )

    def found(budget, name, routed, seeds=range(5, 11), **options):
        layers, width = map(int, name.split("×"))
        run = {"budget": budget, "n_layer": layers, "n_embd": width, "route_every": 2 * routed, "variant": ""}
        run |= {"capacity": 0.125, "causal_method": "predictor", "block_size": 128, "n_expert": 0, **options}
        some = [row for row in rows if run.items() <= ({"n_expert": 0} | row["run"]).items()]
        some = [row for row in some if row["run"]["seed"] in seeds]
        assert len(some) == len(seeds)
        return some

    def losses(some, routing="causal"):
        return np.array([[row[half][f"val_loss_{routing}"] for half in ("choose", "report")] for row in some])

    def expected(ours, theirs):
        """By six fresh seeds on both halves, or by seeds 2 to 4 on the second."""
        a, b = losses(ours), losses(theirs)
        (mean_a, mean_b), t = ((x.mean(1) for x in (a, b)), 2.5706) if len(a) == 6 else ((a[:, 1], b[:, 1]), 4.3027)
        error = math.hypot(*(np.std(x, ddof=1) / math.sqrt(len(x)) for x in (mean_a, mean_b))) / mean_b.mean()
        first, second = 100 * (a.mean(0) / b.mean(0) - 1)
        percent = 100 * (mean_a.mean() / mean_b.mean() - 1)
        return f"{percent:+.2f}% ± {100 * t * error:.2f} ({first:+.2f}, {second:+.2f})"

    best = {1e12: ("2×64", "1×64"), 3e12: ("2×96", "1×96"), 1e13: ("2×128", "1×128")}
    predicted = []
    for budget, (mod, dense) in best.items():
        short = f"{budget:.0e}".replace("+", "")
        mod, dense = found(budget, mod, 1), found(budget, dense, 0)
        assert f"{short}: {expected(mod, dense)}" in claims[0]
        size, cost = (mod[0][key] / dense[0][key] for key in ("parameters", "forward_flops_per_token"))
        assert f"{short}: {size:.2f} times as many, at {cost:.2f} times the FLOPs" in claims[1]
        for claim in claims[2:4]:
            pair = re.search(rf"{short}: (\S+) against (\S+) ", claim).groups()
            result = expected(found(budget, pair[0], 1), found(budget, pair[1], 0))
            assert f"{short}: {pair[0]} against {pair[1]} {result}" in claim
        cost = 100 * (losses(mod).mean(1) / losses(mod, "topk").mean(1) - 1).mean()
        assert f"{short}: loss {cost:+.2f}%".replace("-0.00", "+0.00") in claims[5]
        predicted += [row[half]["predictor_accuracy"] for row in mod for half in ("choose", "report")]
    assert f"at least {min(predicted):.1%} predicted" in claims[5]
    game = (ROOT / "notebooks/README.md").read_text(encoding="utf-8")
    for name, routed in (("2×128", 1), ("1×128", 0)):
        second = losses(found(1e13, name, routed))[:, 1]
        assert f"{second.mean():.4f} ± {second.std(ddof=1):.4f}" in game

    def changed(**options):
        return found(3e12, "2×96", options.pop("routed", 1), range(2, 5), **options)

    changes = {f"capacity {share}": changed(capacity=share) for share in (0.0625, 0.25, 0.5)}
    changes["every block routed"] = changed(routed=0.5)
    changes["stochastic routing"] = changed(variant="stochastic")
    for name, some in changes.items():
        assert f"{name} {expected(some, changed())}" in claims[4]

    for options in ({"causal_method": "router"}, {"variant": "expert_threshold"}):
        assert f"| {expected(found(3e12, '2×96', 1, **options), found(3e12, '2×96', 1))} |" in text

    learned = [row["learned"] for row in learned]
    shares = [share for one in learned for share in one["known_by"]["character"]]
    assert f"the character explains {min(shares):.0%} to {max(shares):.0%} of a decision's entropy" in claims[6]
    ranks = [rank for one in learned for rank in one["entropy_ranks_higher"]]
    assert f"{sum(rank > 0.6 for rank in ranks)} clearly prefer uncertain tokens" in claims[6]

    def shape(name, routed, **options):
        return found(1e13, name, routed, range(2, 5), **options)

    kinds = {"MoD": shape("4×128", 1), "dense, without these blocks": shape("2×128", 0)}
    for name, experts in isoflop.EXPERTS.items():
        kinds[name] = shape("4×128", 1, **{"staged": False, "n_noop": 0, "expert_capacity": 0.25, **experts})
    pairs = [("staged MoDE", name) for name in ("MoD", "dense, without these blocks", "MoE")]
    for one, other in [*pairs, ("integrated MoDE", "MoE, lowered capacity")]:
        assert f"{one} against {other} {expected(kinds[one], kinds[other])}" in claims[7]

    # Trained long: the pair at both budgets in the table; in the text, how far apart the two differences are.
    at_1e13 = found(1e13, "4×64", 1, learning_rate=0.005), found(1e13, "2×64", 0, learning_rate=0.005)
    at_1e14 = found(1e14, "4×64", 1, learning_rate=0.00125), found(1e14, "2×64", 0, learning_rate=0.0025)
    for pair in (at_1e13, at_1e14):
        assert f"its baseline 2×64: {expected(*pair)}" in text
    (before, half), (after, other_half) = (
        map(float, re.match(r"([-.\d]+)% ± ([.\d]+)", expected(*pair)).groups()) for pair in (at_1e13, at_1e14)
    )
    prose = " ".join(text.split())
    assert f"the two differences are {before - after:.2f} ± {math.hypot(half, other_half):.2f} points apart" in prose
    for path in ("README.md", "results/README.md"):
        below = f"is {-after:.2f}% ± {other_half:.2f} below"
        assert below in " ".join((ROOT / path).read_text(encoding="utf-8").split())
    ours, theirs = ({row["run"]["seed"]: losses([row]).mean() for row in some} for some in at_1e14)
    single = [100 * (1 - ours[seed] / theirs[seed]) for seed in ours]
    assert f"lower with each of the six fresh seeds (by {min(single):.2f} to {max(single):.1f}%, seed by seed)" in prose


def test_the_report_takes_the_rate_at_which_the_search_ended():
    """Also where no other seeds follow, and the best rate lies next to a cliff, or between two."""
    for below, above, chosen in ((1.0, 1.0, 0.004), (1.0, 1.2, 0.002), (1.2, 1.2, 0.004)):
        done, run = {}, replace(MOD, learning_rate=0.004)
        while (found := runner.search(run, done, chosen_by=(1, 2)))[1]:
            for again in found[1]:
                loss = 2 + abs(math.log(again.learning_rate / 0.004)) / 100
                loss *= below if again.learning_rate < 0.004 else above if again.learning_rate > 0.004 else 1
                done[again] = row_of(again, loss)
        (model,) = report.models_of(done)
        assert model.run.learning_rate == found[0].learning_rate == chosen


def test_the_pictures_can_be_drawn(tmp_path, monkeypatch):
    figures, save = {}, report.save
    monkeypatch.setattr(report, "save", lambda figure, path: save(figures.setdefault(path.name, figure), path))
    done = made_up([1, 1.619, 1.620, 1.621]) | lines_of(replace(MOD, capacity=0.5), [1, 1.659, 1.660, 1.661])
    report.draw(report.models_of(done), tmp_path)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    # Not by fresh seeds, which are still missing.
    assert figures["curves.png"].axes[0].get_title(loc="left").endswith("against best dense, by seeds 2 to 4")


@pytest.mark.parametrize(
    "sizes, verdict",
    [
        ([(2.0, 0.9), (2.0, 1.0)], "reproduced"),
        ([(2.0, 1.1), (2.0, 1.0)], "partly"),
        ([(2.0, 1.1), (2.0, 1.1)], "not reproduced"),
        ([(0.9, 0.5)], "not reproduced"),
    ],
)
def test_the_second_claim_is_of_models_that_are_larger_and_no_dearer(sizes, verdict):
    models = [{"parameters": size, "forward_flops_per_token": cost} for size, cost in sizes]
    dense = {"parameters": 1, "forward_flops_per_token": 1}
    assert report.claim_2({10.0**i: {"dense": dense, "MoD": mod} for i, mod in enumerate(models)})[1] == verdict


# The READMEs


def test_each_part_goes_to_its_place():
    text = "a\n<!-- results: x y -->\nold\n<!-- end -->\n<!-- results: z -->\n<!-- end -->\n<!-- c -->\n"
    filled = readme.filled(text, {"x y": "1", "z": "2"})
    assert filled == "a\n<!-- results: x y -->\n1\n<!-- end -->\n<!-- results: z -->\n2\n<!-- end -->\n<!-- c -->\n"


def test_the_readmes_say_what_the_results_say():
    parts, used = readme.blocks(*readme.measured()), 0
    for path in readme.FILES:
        text = path.read_text(encoding="utf-8")
        used += text.count("<!-- results: ")
        assert readme.filled(text, parts) == text, f"python -m experiments.readme, then look at {path.name}"
    assert used == len(parts)


@pytest.mark.parametrize("name", ["isoflop", "routing", "known_depth", "recall"])
def test_the_pictures_are_of_the_runs_beside_them(name):
    folder = ROOT / "results" / name
    pictures = list(folder.glob("*.png"))
    assert pictures
    for path in pictures:
        with Image.open(path) as picture:
            drawn_of = picture.text["Description"]
        assert drawn_of == report.hash_of(folder / "runs.jsonl"), (
            f"python -m experiments.readme, then look at {path.name}"
        )


def test_the_runs_of_the_results_cost_what_they_should():
    done = runner.read(ROOT / "results" / "isoflop", isoflop.Run)
    assert len(done) > 60
    for run, row in done.items():
        assert not row["report"] or 0.99 * run.budget < row["flops"] <= run.budget
