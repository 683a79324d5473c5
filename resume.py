"""
What keeps a run from being lost: its folder and the lock on it, going on from its last checkpoint, stopping when asked.
"""

import contextlib
import json
import math
import os
import signal
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path

import filelock
from tqdm import tqdm

import checkpoint
from configurator import UserError


@dataclass
class Progress:
    """How far a run has come: all that changes in it, weights and optimizer apart."""

    step: int = 0  # the step to be made next
    rows: list = field(default_factory=list)  # of metrics.jsonl
    best: float = math.inf  # the lowest causal loss among the saved ones
    saved: int = None  # the step of the last checkpoint
    loss_sum: float = 0.0  # over the steps since the last evaluation
    aux_sum: float = 0.0
    train_seconds: float = 0.0


def saved_options(out_dir, name):
    """The options in the config.json, or a checkpoint's JSON, of a run; None if there is no such file of ours."""
    try:
        content = json.loads((out_dir / name).read_text(encoding="utf-8"))
        return {**content["config"], **content.get("asked", {})}  # "auto" is for the machine that goes on to resolve
    except (OSError, ValueError, LookupError, TypeError):
        return None


def keep_earlier_run(out_dir):
    """Make `out_dir`; where an earlier run stands, its folder moves to out_dir.1, .2, ..."""
    if out_dir.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(
            f"out_dir {str(out_dir)!r} is the folder you are in or one above it; name one below, such as out"
        )
    names = [
        "config.json",
        "metrics.jsonl",
        *(f"{name}.{kind}" for name in checkpoint.NAMES for kind in ("json", "pt")),
    ]
    found = [name for name in names if (out_dir / name).exists()]
    if found and saved_options(out_dir, "config.json") is None:
        raise UserError(f"{out_dir} holds a {found[0]} that is not from a run; name another folder by --out_dir")
    out_dir.mkdir(parents=True, exist_ok=True)
    if found:
        with only_run_in(out_dir):
            number = 1
            while (aside := out_dir.with_name(f"{out_dir.name}.{number}")).exists():
                number += 1
        out_dir.rename(aside)  # in one move: there is no moment at which half of it is here and half there
        out_dir.mkdir()
        print(f"{out_dir} holds an earlier run: moved to {aside} (to go on with it instead: --resume)")


@contextlib.contextmanager
def only_run_in(out_dir):
    """No second train.py in this folder meanwhile. The lock is the operating system's and ends with the process."""
    try:
        with filelock.FileLock(out_dir / "lock", timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(f"another train.py is at work in {out_dir}; wait for it, or name another --out_dir") from None


def load(out_dir, model, optimizer, config, info):
    """
    Put the run's last whole checkpoint into model and optimizer; returns its Progress.

    info: what this run would save beside it; prints what of it is not as it was. Raises UserError where the run cannot
    go on like this; nothing has changed then.
    """
    with only_run_in(out_dir):  # or the checkpoint read now may not be the last
        pass
    try:
        found = checkpoint.read(out_dir, "last")
    except (UserError, OSError) as damage:
        try:
            found = checkpoint.read(out_dir, "previous")
        except (UserError, OSError):
            raise damage from None
        print(f"{damage}. Using the checkpoint before it")
    if found["data"]["text_sha256"] != info["data"]["text_sha256"]:
        raise UserError(
            f"{out_dir} was trained on {found['data']['source']!r}, not on {info['data']['source']!r}; see --dataset"
        )
    shape = differences(found["model"], asdict(model.config))
    if shape:
        raise UserError(f"the run in {out_dir} has another model: {shape}. Resume with its own options")
    free = ("out_dir", "resume")
    before, now = ({k: v for k, v in each["config"].items() if k not in free} for each in (found, info))
    batch = ("batch_size", "gradient_accumulation_steps")
    changed = differences({name: before[name] for name in batch}, now)
    if changed:
        raise UserError(f"the run in {out_dir} counts its steps, tokens and FLOPs by another batch: {changed}")
    if found["step"] > config.max_iters:
        raise UserError(f"the run in {out_dir} is at step {found['step']}, beyond max_iters {config.max_iters}")
    print(f"Resuming {out_dir} at step {found['step']:,}")
    changed = differences({**before, **found["versions"]}, {**now, **info["versions"]})
    if changed:
        print(f"Not exactly the run that stopped: {changed}")
    state = checkpoint.tensors(out_dir, found, "optimizer")
    model.load_state_dict(checkpoint.tensors(out_dir, found, "model"))
    state["optimizer"]["param_groups"] = optimizer.state_dict()["param_groups"]  # options may have changed
    optimizer.load_state_dict(state["optimizer"])
    # Where the last one was damaged, the one before it takes its place: or the next save would make the damaged one
    # previous.json, and for a moment there would be no whole checkpoint.
    checkpoint.commit(out_dir, "last", found)
    best = math.inf
    try:
        best_info = checkpoint.read(out_dir, "best")
        if best_info["step"] <= found["step"]:  # a later one is of steps that are made again now, after a kill
            best = best_info["rows"][-1]["val_loss_causal"]
    except (UserError, OSError) as damage:
        print(f"The best checkpoint is lost ({damage}); the next evaluation takes its place")
    step = found["step"]
    return Progress(step, found["rows"], best, saved=step, **state["progress"])


def save(out_dir, model, optimizer, progress, info, stop):
    """
    Save the run as it is now; True if it worked. Where the disk has no room, there may be some the next time.

    stop: the Stop in force. info: what else goes into the checkpoint's JSON.
    """
    rows, step = progress.rows, progress.step
    loss = rows[-1]["val_loss_causal"] if rows and rows[-1]["step"] == step else math.inf
    sums = {name: getattr(progress, name) for name in ("loss_sum", "aux_sum", "train_seconds")}
    state = {"optimizer": optimizer.state_dict(), "progress": sums}
    try:
        write_metrics(out_dir, rows)
        checkpoint.save(out_dir, step, model, state, loss < progress.best, {**info, "rows": rows})
    except (OSError, RuntimeError) as error:  # PyTorch makes a RuntimeError of a full disk
        if stop.again:
            raise KeyboardInterrupt(stop.AT_ONCE) from None  # and of a second Ctrl-C
        tqdm.write(f"step {step:,}: the checkpoint could not be saved ({error}); the one before it is whole")
    else:
        progress.saved, progress.best = step, min(progress.best, loss)
    checkpoint.remove_unused(out_dir)
    return progress.saved == step


def differences(before, now):
    changed = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name} was {before[name]}, now {now[name]}" for name in changed)


def write_metrics(out_dir, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    checkpoint.write_whole(out_dir / "metrics.jsonl", lambda file: file.write(lines.encode("utf-8")))


class Stop:
    """
    While it is entered, Ctrl-C and SIGTERM only ask to stop: `requested` is then the signal's number, to be looked at
    where stopping is safe. A second one stops at once (`again`).
    """

    AT_ONCE = "Stopped at once; what was saved before is whole"
    requested, again = None, False

    def __enter__(self):
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.handlers = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def ask(self, number, frame):
        if self.requested:
            self.again = True
            raise KeyboardInterrupt(self.AT_ONCE)
        self.requested = number
        os.write(2, b"\nStopping after this step. Once more: at once\n")  # print may not be called within a signal

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
