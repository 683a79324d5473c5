"""
Trains a declared set of runs, several at once, and keeps their results.

Each finished run is a line of RESULTS/runs.jsonl and is not trained again. Ctrl-C or SIGTERM stops a set, and the same
command resumes it: inside its unfinished runs if `execute` saves checkpoints, otherwise these are finished first.

A run is a frozen dataclass with learning_rate, seed, budget and name. A set is a function that gets the finished runs,
{run: line}, and returns the runs that it needs next. It is called again after each run, so it may depend on results.

A line is a dict: "run" holds the dataclass's fields; "choose" and "report" are two evaluations with val_loss_causal, or
None if the run diverged. Choices use the first, tables show the second. The smallest experiment is known_depth.py.
"""

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import shutil
import signal
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from support.options import UserError, expanded
from support.report import hardware
from support.stop import Stop
from support.workers import at_most, end_with_parent

SEEDS = (1, 2, 3, 4)  # the first one chooses learning rates (in the sets long and gpu and in recall.py, the first two)
FRESH = (5, 6, 7, 8, 9, 10)  # of the models in the final comparison, trained when all choices are made
FACTOR = 2  # between two learning rates
CLIFF = 1.05  # a cliff: the next rate's loss is more than this many times as high


def search(run, done, chosen_by=SEEDS[:1]):
    """
    `run` with its best learning rate so far, and the runs that are still needed to find the best one.

    Each rate has the mean loss of the seeds `chosen_by`. Several seeds also see a cliff: where twice the best rate is
    far worse, the best one is too risky, and half of it is taken, unless that lies beyond a cliff too.
    """

    def at(factor):
        return replace(run, learning_rate=run.learning_rate * factor)

    def loss(other):
        return mean_loss(other, done, chosen_by)

    while True:  # move by FACTOR while a neighbour is better, so the best rate has a worse one on both sides
        near = [at(1 / FACTOR), run, at(FACTOR)]
        missing = [again for other in near for again in seeds(other, done, chosen_by)]
        best = min(near, key=loss)
        if missing or best == run:
            break
        run = best
    if len(chosen_by) > 1 and not missing and too_risky(*map(loss, near)):
        return near[0], missing
    return best, missing


def too_risky(half, best, twice):
    """Whether a cliff lies above the best rate and none below it. The losses are of half, once and twice this rate."""
    return half <= CLIFF * best < twice


def seeds(run, done, wanted=SEEDS[1:]):
    """`run` with each of the seeds that are still missing."""
    return [again for seed in wanted if (again := replace(run, seed=seed)) not in done]


def tuned(runs, done, chosen_by=SEEDS[:1], wanted=SEEDS[1:]):
    """
    The runs that are still needed to have each of `runs` at its best learning rate with the seeds `wanted`: first those
    that find the rates, then seed by seed for all models.
    """
    found = [search(run, done, chosen_by) for run in runs]
    settled = [best for best, missing in found if not missing]
    todo = [run for _, missing in found for run in missing]
    return todo + [again for seed in wanted for best in settled for again in seeds(best, done, [seed])]


def choice_loss(rows):
    """The mean causal loss of these lines on the data for choosing; infinite if one is missing (None) or diverged."""
    return statistics.mean(row["choose"]["val_loss_causal"] if row and row["choose"] else math.inf for row in rows)


def mean_loss(run, done, chosen_by):
    """The `choice_loss` of the run with these seeds."""
    return choice_loss(done.get(replace(run, seed=seed)) for seed in chosen_by)


def read(results, run_class):
    """The lines of runs.jsonl as {run: line}."""
    path = results / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    done = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            done[run_class(**row["run"])] = row
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(
                f"line {number} of {path} is not a run of this experiment ({error}); "
                "name another folder with --results, or delete a damaged line to train its run again"
            ) from None
    return done


def commit():
    """The commit of this code, "+ changes" if a Python file differs from it, or "unknown" outside a git repository."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root), "--git-dir=.git"]  # these files may lie in somebody else's repository
    try:
        name = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py"]).returncode
    return name[:12] + (" + changes" if changed else "")


class StopAll(Stop):
    """Stops the workers too: with a run's next step if `execute` saves checkpoints, otherwise when the run ends."""

    FIRST, AT_ONCE = b"Stopping", "Stopped at once; the lines of finished runs are complete"

    def ask(self, number, frame):
        try:
            super().ask(number, frame)
        finally:
            for process in multiprocessing.active_children():
                if self.again:
                    process.kill()  # a worker may ignore signals, and the pool would wait for the end of its run
                elif number != signal.SIGINT:  # only this process may have got it; a Ctrl-C reaches the workers too
                    process.terminate()  # `train` then saves (Windows kills the worker, and its run starts again)


def run_all(wanted, run_class, execute, results, jobs):
    """
    Train what the set `wanted` asks for until it asks for nothing more. If a run fails, those under way end first.

    execute(run, folder) trains one run in a process of its own and returns its line; the folder is for its checkpoints.
    """
    if jobs < 1:
        raise UserError(f"--jobs must be at least 1, got {jobs}")
    done = read(results, run_class)
    if not wanted(done):
        return
    results.mkdir(parents=True, exist_ok=True)
    provenance = {"commit": commit(), "cpu": hardware("cpu")}  # of the code and the machine that finish the run
    spent = sum(run.budget for run in done)
    bar = tqdm(unit="FLOP", unit_scale=True, initial=spent, disable=None, dynamic_ncols=True, smoothing=0)
    pool = concurrent.futures.ProcessPoolExecutor(at_most(jobs), multiprocessing.get_context("spawn"), ignore_signals)
    running, failed = {}, None
    with StopAll() as stop, bar, pool:
        while True:
            todo = [run for run in wanted(done) if run not in running.values()]
            if not failed and not stop.requested:
                for run in todo[: jobs - len(running)]:
                    running[pool.submit(execute, run, results / "under-way" / run.name)] = run
            if not running:
                break
            missing = {*todo, *running.values()}
            bar.total = sum(run.budget for run in {*done, *missing})
            bar.set_postfix_str(f"{len(done)} runs done, at least {len(missing)} missing")
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                run = running.pop(future)
                if future.exception():
                    failed = failed or future.exception()
                    continue
                done[run] = row = future.result() | provenance
                results.mkdir(parents=True, exist_ok=True)
                new = [row] if (results / "runs.jsonl").is_file() else done.values()  # all, if somebody deleted it
                with open(results / "runs.jsonl", "a", encoding="utf-8") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
                shutil.rmtree(results / "under-way" / run.name, ignore_errors=True)
                bar.update(run.budget)
                loss = f"{row['report']['val_loss_causal']:.4f}" if row["report"] else "diverged"
                bar.write(f"{run.name}: {loss}")
    if stop.requested:
        raise KeyboardInterrupt("Stopped; the same command resumes")
    if failed:
        raise failed


def ignore_signals():
    """In a worker: only `train` reacts to signals, with its own handlers, and saves."""
    end_with_parent()
    for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
        signal.signal(number, signal.SIG_IGN)


def arguments(doc, sets, results):
    """A parser for the options that all experiments share. doc: the experiment's docstring."""
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    parser.add_argument("set", choices=[*sets, "draw"], help="what to run; draw: draw and print the finished runs")
    parser.add_argument("--results", type=expanded, default=Path(results), help="folder of runs.jsonl (%(default)s)")
    parser.add_argument("--jobs", type=int, default=torch.get_num_threads(), help="runs at once (%(default)s)")
    return parser
