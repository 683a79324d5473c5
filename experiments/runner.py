"""
Runs a declared set of training runs, several at once, and keeps what they say.

Each finished run is a line of RESULTS/runs.jsonl. What stands there is not trained again; stopped (Ctrl-C, SIGTERM) and
started anew, a set goes on inside the runs that were under way, if `execute` can.

A run is a frozen dataclass with learning_rate, seed, budget and name. A set is a function that gets what is done, as
{run: line}, and returns the runs that are wanted next; it is asked again after each run, so it may depend on results.
"""

import argparse
import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from support.options import UserError

SEEDS = (1, 2, 3, 4)  # the first chooses learning rates, and which models the others are worth
FRESH = (5, 6, 7, 8, 9, 10)  # of the models that are compared in the end, when all choices are made
FACTOR = 2  # between two learning rates


def search(run, done):
    """
    `run` at its best learning rate, and the runs that are still needed to know it.

    From the rate that it has on, in steps of FACTOR, as long as a neighbour is better, so the best one is no edge.
    """
    while True:
        near = [replace(run, learning_rate=run.learning_rate * factor) for factor in (1 / FACTOR, 1, FACTOR)]
        missing = [other for other in near if other not in done]
        best = min(near, key=lambda other: loss_for_choice(other, done))
        if missing or best == run:
            return best, missing
        run = best


def seeds(run, done, wanted=SEEDS[1:]):
    """`run` with those of the seeds that are still missing."""
    return [again for seed in wanted if (again := replace(run, seed=seed)) not in done]


def loss_for_choice(run, done):
    """The causal loss on the data that is for choosing; a run that diverged has none."""
    row = done.get(run)
    return row["choose"]["val_loss_causal"] if row and row["choose"] else math.inf


def read(results, run_class):
    """The lines of runs.jsonl as {run: line}."""
    path = results / "runs.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    done = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            done[run_class(**row["run"])] = row
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"line {number} of {path} is no run ({error}); delete it, and it is trained again"
            ) from None
    return done


def run_all(wanted, run_class, execute, results, jobs):
    """
    Train what `wanted` asks for until it asks for nothing more; returns {run: line}.

    execute(run, folder) trains one run, in a process of its own, and returns its line; folder is for what it keeps on
    the way, to go on from. Where one run fails the others under way are finished first.
    """
    done = read(results, run_class)
    if not wanted(done):
        return done
    results.mkdir(parents=True, exist_ok=True)
    stopped = []  # signals

    def ask_to_stop(number, frame):
        if stopped:
            raise KeyboardInterrupt("Stopped at once; the lines of finished runs are whole")
        stopped.append(number)
        if number == signal.SIGTERM:  # for us alone; a Ctrl-C reaches the workers too
            for process in multiprocessing.active_children():
                process.terminate()  # a training run saves then (Windows knows no such request: there it is lost)

    handlers = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(unit="FLOP", unit_scale=True, initial=cost(done), disable=None, dynamic_ncols=True, smoothing=0)
    context = multiprocessing.get_context("spawn")
    running, failed = {}, None
    try:
        with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=ignore_signals) as pool:
            while True:
                todo = [run for run in wanted(done) if run not in running.values()]
                if not failed and not stopped:
                    for run in todo[: jobs - len(running)]:
                        running[pool.submit(execute, run, results / "under-way" / run.name)] = run
                if not running:
                    break
                bar.total = cost({*done, *todo, *running.values()})
                bar.set_postfix_str(f"{len(done)} runs done, at least {len({*todo, *running.values()})} missing")
                for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                    run = running.pop(future)
                    if future.exception():
                        failed = failed or future.exception()
                        continue
                    done[run] = row = future.result()
                    with open(results / "runs.jsonl", "a", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
                    shutil.rmtree(results / "under-way" / run.name, ignore_errors=True)
                    bar.update(run.budget)
                    loss = f"{row['report']['val_loss_causal']:.4f}" if row["report"] else "diverged"
                    bar.write(f"{run.name}: {loss}")
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped:
        raise KeyboardInterrupt("Stopped; the same command goes on")
    if failed:
        raise failed
    return done


def cost(runs):
    return sum(run.budget for run in runs)


def ignore_signals():
    """In a worker, whenever it is not in training (train.py then has handlers of its own)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def ending_at_once():
    """For a run that keeps nothing on the way: to be asked to stop ends it."""
    handlers = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def arguments(description, sets, results):
    """A parser for what all experiments take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("set", choices=sets, help="what to run; draw: nothing, only what is there is drawn and printed")
    parser.add_argument("--results", type=Path, default=Path(results), help="folder of runs.jsonl (%(default)s)")
    parser.add_argument("--jobs", type=at_least_one, default=torch.get_num_threads(), help="runs at once (%(default)s)")
    return parser


def at_least_one(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number, at least 1; got {text!r}")
    return int(text)
