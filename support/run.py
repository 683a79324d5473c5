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

from support import checkpoint, ranks
from support.options import UserError


@dataclass
class Progress:
    """How far a run has come: all that changes in it, weights and optimizer apart."""

    step: int = 0  # the step to be made next
    rows: list = field(default_factory=list)  # of metrics.jsonl
    best: float = math.inf  # the lowest causal loss among the saved ones
    saved: int | None = None  # the step of the last checkpoint
    loss_sum: float = 0.0  # over the steps since the last evaluation
    aux_sum: float = 0.0
    train_seconds: float = 0.0

    def add(self, losses, seconds):
        """Count a step with these losses, language model and routing."""
        self.loss_sum = self.loss_sum + losses[0]  # on the device, so that nothing waits for them
        self.aux_sum = self.aux_sum + losses[1]
        self.step += 1
        self.train_seconds += seconds

    def mean_losses(self):
        """The mean training losses since the last evaluation; nothing before the first step."""
        steps = self.step - self.rows[-1]["step"] if self.rows else 0
        sums = {"train_loss": self.loss_sum, "aux_loss": self.aux_sum} if steps else {}
        return {name: float(total) / steps for name, total in sums.items()}


def saved_options(out_dir):
    """The options of the run in out_dir, "auto" as it was asked for; None if there is no run of ours."""
    try:
        info, _ = last_whole(out_dir)
    except UserError:
        try:
            info = json.loads((out_dir / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    try:
        options = checkpoint.with_variant(info["config"])
        return {**options, **info.get("asked", {})}  # "auto" may mean something else where the run goes on
    except (LookupError, TypeError, AttributeError):
        return None


def last_whole(out_dir):
    """The JSON of the last whole checkpoint, and what is wrong with a later one (None: nothing)."""
    try:
        return checkpoint.read(out_dir, "last"), None
    except (UserError, OSError) as damage:
        try:
            return checkpoint.read(out_dir, "previous"), damage
        except (UserError, OSError):
            raise UserError(str(damage)) from None


def best_loss(out_dir, step):
    """The causal loss of the best checkpoint; infinity if it is of steps after `step`, which are made again now."""
    best = checkpoint.read(out_dir, "best")
    return best["rows"][-1]["val_loss_causal"] if best["step"] <= step else math.inf


@contextlib.contextmanager
def only_run_in(out_dir):
    """No second train.py in this folder meanwhile. The lock is the operating system's and ends with the process."""
    if not ranks.is_main():  # rank 0 holds it for all
        yield
        return
    folder = out_dir.resolve()
    if folder in (Path.cwd(), *Path.cwd().parents):
        raise UserError(
            f"out_dir {str(out_dir)!r} is the folder you are in or one above it; name one below, such as out"
        )
    for path in (folder, *folder.parents):
        if path.is_file():
            raise UserError(f"out_dir {out_dir} cannot be a folder: {path} is a file")
    try:
        # Beside the folder, which may be moved aside.
        with filelock.FileLock(folder.with_name(f".{folder.name}.lock"), timeout=0):
            yield
    except filelock.Timeout:
        raise UserError(f"another train.py is at work in {out_dir}; wait for it, or name another --out_dir") from None


def keep_earlier_run(out_dir):
    """Make `out_dir`; where an earlier run stands, its folder moves to out_dir.1, .2, ..."""
    patterns = ("config.json", "metrics.jsonl", *(f"{name}.json" for name in checkpoint.NAMES), "model-*.pt")
    found = [path.name for pattern in patterns for path in out_dir.glob(pattern)]
    if found and saved_options(out_dir) is None:
        raise UserError(f"{out_dir} holds a {found[0]} that is not from a run; name another folder by --out_dir")
    out_dir.mkdir(parents=True, exist_ok=True)
    if found:
        folder = out_dir.resolve()  # of a link the folder moves, not the link: it may lead to a larger disk
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)  # in one move: there is no moment at which half of it is here and half there
        folder.mkdir()
        shown = aside if out_dir.is_symlink() else out_dir.with_name(aside.name)
        print(f"{out_dir} holds an earlier run: moved to {shown} (to go on with it instead: --resume)")


def load(out_dir, model, stateful, max_iters, info, defaults):
    """
    Put the run's last whole checkpoint into the model and `stateful`; returns its Progress.

    stateful: what else has a state_dict, as {"optimizer": ..., "scaler": ...}. info: what this run saves beside it, in
    order to print every option or version that changed. defaults: the value of each option, for those that did not
    exist when the run was saved. Raises UserError if the run cannot continue like this; then nothing has changed.
    """
    found, damage = last_whole(out_dir)
    if damage:
        print(f"{damage}. Using the checkpoint before it")
    if found["data"]["sha256"] != info["data"]["sha256"]:
        raise UserError(
            f"{out_dir} was trained on {found['data']['source']!r}, not on {info['data']['source']!r}; see --dataset"
        )
    shape = checkpoint.differences({**defaults, **found["model"]}, {**defaults, **asdict(model.config)})
    if shape:
        raise UserError(f"the run in {out_dir} has another model: {shape}. Resume with its own options")
    may_differ = ("out_dir", "resume")
    before, now = (
        {name: value for name, value in {**defaults, **each["config"]}.items() if name not in may_differ}
        for each in (found, info)
    )
    batch = ("batch_size", "gradient_accumulation_steps")
    changed = checkpoint.differences({name: before[name] for name in batch}, now)
    if changed:
        raise UserError(f"the run in {out_dir} counts its steps, tokens and FLOPs by another batch: {changed}")
    if found["step"] > max_iters:
        raise UserError(f"the run in {out_dir} is at step {found['step']}, beyond max_iters {max_iters}")
    print(f"Resuming {out_dir} at step {found['step']:,}")
    changed = checkpoint.differences({**before, **found["versions"]}, {**now, **info["versions"]})
    if changed:
        print(f"Not exactly the run that stopped: {changed}")
    state = checkpoint.tensors(out_dir, found, "optimizer")
    model.load_state_dict(checkpoint.tensors(out_dir, found, "model"))
    state["optimizer"]["param_groups"] = stateful["optimizer"].state_dict()["param_groups"]  # options may have changed
    for name, part in stateful.items():
        if state.get(name):  # empty: of a scaler that was not in use
            part.load_state_dict(state[name])
    # Where the last one was damaged, the one before it takes its place: or the next save would make the damaged one
    # previous.json, and for a moment there would be no whole checkpoint.
    if ranks.is_main():
        checkpoint.commit(out_dir, "last", found)
    step = found["step"]
    try:
        best = best_loss(out_dir, step)
    except (UserError, OSError) as lost:
        print(f"The best checkpoint is lost ({lost}); the next evaluation takes its place")
        best = math.inf
    return Progress(step, found["rows"], best, saved=step, **state["progress"])


def save(out_dir, model, stateful, progress, info, stop):
    """
    Save the run as it is now; True if it worked. Where the disk has no room, there may be some the next time.

    stateful: as in `load`. info: what else goes into the checkpoint's JSON. stop: the Stop in force.
    """
    if not ranks.is_main():
        progress.saved = progress.step
        return True
    rows, step = progress.rows, progress.step
    loss = rows[-1]["val_loss_causal"] if rows and rows[-1]["step"] == step else math.inf
    sums = {name: getattr(progress, name) for name in ("loss_sum", "aux_sum", "train_seconds")}
    state = {**{name: part.state_dict() for name, part in stateful.items()}, "progress": sums}
    try:
        write_metrics(out_dir, rows)
        checkpoint.save(out_dir, step, model, state, loss < progress.best, {**info, "rows": rows})
    except (OSError, RuntimeError) as error:
        # PyTorch makes a RuntimeError of a full disk, and of a second Ctrl-C while it writes.
        if stop.again:
            raise KeyboardInterrupt(stop.AT_ONCE) from None
        tqdm.write(f"step {step:,}: the checkpoint could not be saved ({error}); the one before it is whole")
        with contextlib.suppress(UserError, OSError):
            progress.best = best_loss(out_dir, step)  # it may have become the best one without becoming the last
    else:
        progress.saved, progress.best = step, min(progress.best, loss)
    checkpoint.remove_unused(out_dir)
    return progress.saved == step


def write_metrics(out_dir, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    checkpoint.write_whole(out_dir / "metrics.jsonl", lambda file: file.write(lines.encode("utf-8")))


class Stop:
    """
    While it is entered, Ctrl-C, SIGTERM and SIGHUP (the terminal is gone) only ask to stop: `requested` is then the
    signal's number, to be looked at where stopping is safe. A second one stops at once (`again`).
    """

    AT_ONCE = "Stopped at once; what was saved before is whole"
    requested, again = None, False

    def __enter__(self):
        self.handlers = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
                numbers.append(signal.SIGHUP)
            self.handlers = {number: signal.signal(number, self.ask) for number in numbers}
        return self

    def ask(self, number, frame):
        # A scheduler may signal each rank, and torchrun passes on the signal that it got itself: one wish, told twice.
        if self.requested and ranks.under_torchrun():
            return
        if self.requested:
            self.again = True
            raise KeyboardInterrupt(self.AT_ONCE)
        self.requested = number
        if not ranks.is_main():
            return
        once_more = b"" if ranks.under_torchrun() else b". Once more: at once"
        with contextlib.suppress(OSError):  # as when the same Ctrl-C ended the program that reads our lines
            os.write(2, b"\nStopping after this step" + once_more + b"\n")  # print may not be called within a signal

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
