"""A run's folder: the lock on it, moving an earlier run aside, saving, resuming."""

import contextlib
import itertools
import json
import math
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from support import checkpoint, ranks, untrusted
from support.files import locked, write_json, write_whole
from support.options import Diverged, UserError, command, printable, reason_of, show


@dataclass
class Progress:
    """What changes in a run, apart from weights and optimizer."""

    step: int = 0  # the next step
    rows: list = field(default_factory=list)  # of metrics.jsonl
    best: float = math.inf  # the lowest causal loss among the saved ones
    saved: int | None = None  # the step of the last checkpoint
    loss_sum: float = 0.0  # over the steps since the last evaluation
    aux_sum: float = 0.0
    train_seconds: float = 0.0
    loss: float = math.nan  # of the last step that was read
    unread: list = field(default_factory=list)  # the figures of the steps since then, still on the device

    def add(self, figures, seconds):
        """Count a step. figures (3,): its losses, language model and routing, and the sum of its gradient norms."""
        self.unread.append(figures)
        self.step += 1
        self.train_seconds += seconds

    def read(self, scaler):
        """
        Read the figures of the steps since the last call, all at once, because each read waits for the device. Raises
        Diverged if a gradient was not finite. The weights may then be bad too, so `save` reads before it writes.
        """
        begun = time.perf_counter()
        figures = torch.stack(self.unread).tolist() if self.unread else []
        self.unread.clear()
        self.train_seconds += time.perf_counter() - begun  # the device was busy with these steps
        # In float16 a gradient may overflow. The scaler then skips the update and halves its scale. Below 1 that helps
        # no more: the run has diverged.
        may_overflow = scaler.is_enabled() and scaler.get_scale() >= 1
        for step, (loss, aux, norm) in enumerate(figures, self.step - len(figures)):
            if not math.isfinite(norm) and not (may_overflow and math.isfinite(loss)):
                raise Diverged("norm of the gradient", norm, step, f" (the loss: {loss})")
            self.loss_sum += loss
            self.aux_sum += aux
            self.loss = loss

    def mean_losses(self):
        """The mean training losses since the last evaluation, {} before the first step."""
        steps = self.step - self.rows[-1]["step"] if self.rows else 0
        return {"train_loss": self.loss_sum / steps, "aux_loss": self.aux_sum / steps} if steps else {}


def saved_options(out_dir):
    """The options of the run's last whole checkpoint, "auto" as asked for; None if there is no run."""
    try:
        info, _ = last_whole(out_dir)
    except UserError:
        if is_run(out_dir):
            raise
        return None
    return {**info["config"], **info.get("asked", {})}  # "auto" may mean something else where the run is resumed


def is_run(folder):
    """Whether config.json, last.json or previous.json holds a run's options. Its tensors may be missing or damaged."""
    for path in (folder / f"{name}.json" for name in ("config", "last", "previous")):
        with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
            if path.is_file() and type(json.loads(path.read_bytes())["config"]) is dict:  # a pipe would wait forever
                return True
    return False


def last_whole(out_dir):
    """The JSON of the last whole checkpoint, and the error of a later, damaged one (or None)."""
    try:
        return checkpoint.read(out_dir, "last"), None
    except (UserError, OSError) as damage:
        try:
            return checkpoint.read(out_dir, "previous"), damage
        except (UserError, OSError):
            raise UserError(str(damage)) from None


def best_loss(out_dir, step):
    """The best checkpoint's causal loss; infinity if it was saved after `step`, because those steps are repeated."""
    best = checkpoint.read(out_dir, "best")
    if not best.get("rows"):
        raise UserError(f"{out_dir / 'best.json'} holds no evaluation")
    return best["rows"][-1]["val_loss_causal"] if best["step"] <= step else math.inf


LOCK, EARLIER = "run.lock", r"earlier\.\d+"  # inside an out_dir that cannot be moved


@contextlib.contextmanager
def only_run_in(out_dir):
    """Lock out_dir against a second train.py."""
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The lock is beside the folder, because the folder may be moved aside; inside, if it is one that cannot be moved.
    movable = not os.path.ismount(folder) and os.access(folder.parent, os.W_OK)
    path = folder.with_name(f".{folder.name}.lock") if movable else folder / LOCK
    with locked(out_dir, path, "train.py", "--out_dir"):
        yield


def keep_earlier_run(out_dir):
    """Make `out_dir`. If it holds an earlier run, move that folder to out_dir.1, .2, ..., never over anything."""
    patterns = ("config.json", "metrics.jsonl", *(f"{name}.json" for name in checkpoint.NAMES), "model-*.pt")
    found = [path.name for pattern in patterns for path in out_dir.glob(pattern)]
    if found and not is_run(out_dir):
        raise UserError(f"{out_dir} holds a {found[0]} that is not from a run; name another folder with --out_dir")
    out_dir.mkdir(parents=True, exist_ok=True)
    if found:
        for path in sorted(out_dir.glob("*/config.json")):  # another run, which may be at work, must not move along
            if not re.fullmatch(EARLIER, path.parent.name) and is_run(path.parent):
                raise UserError(f"{out_dir} holds another run, {path.parent}; move that one, or name another --out_dir")
        folder = out_dir.resolve()  # move the folder, not a link to it: the link may lead to a larger disk
        asides = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        aside = next(path for path in asides if not os.path.lexists(path))
        try:
            folder.rename(aside)  # in one move, so that a kill cannot leave half of the run behind
        except OSError:
            aside = move_contents(folder)
        folder.mkdir(exist_ok=True)
        shown = aside if out_dir.is_symlink() else out_dir.parent / aside.relative_to(folder.parent)
        resume = command("python", "train.py", "--resume", f"--out_dir={shown}")
        show(f"The earlier run in {out_dir} moved to {shown}. To continue that one: {resume}")


def move_contents(folder):
    """Move the contents of a folder that cannot be renamed, such as a mount point, to earlier.1, .2, ... in it."""
    contents = [path for path in folder.iterdir() if path.name != LOCK and not re.fullmatch(EARLIER, path.name)]
    contents.sort(key=lambda path: path.name == "config.json")  # last: after a kill, the next start moves the rest
    asides = (folder / f"earlier.{number}" for number in itertools.count(1))
    names = [path.name for path in contents]
    aside = next(a for a in asides if not a.is_symlink() and not any(os.path.lexists(a / name) for name in names))
    aside.mkdir(exist_ok=True)
    for path in contents:
        path.rename(aside / path.name)
    return aside


def load(out_dir, model, stateful, max_iters, info, defaults):
    """
    Load the run's last whole checkpoint into the model and `stateful`; returns its Progress.

    stateful: everything else with a state_dict, {"optimizer": ..., "scaler": ...}. info: what this run saves beside
    them; every option or version that changed is printed. defaults: each option's value, for options that did not exist
    when the run was saved. Raises UserError, before it changes anything, if the run cannot continue like this.
    """
    found, damage = last_whole(out_dir)
    if damage:
        show(f"{damage}. Using the checkpoint before it")
    if found["data"]["sha256"] != info["data"]["sha256"]:
        raise UserError(
            f"{out_dir} was trained on {found['data']['source']!r}, not on {info['data']['source']!r}; "
            "name its data set with --dataset"
        )
    shape = checkpoint.differences({**defaults, **found["model"]}, {**defaults, **asdict(model.config)})
    if shape:
        raise UserError(f"the run in {out_dir} has another model: {shape}. Resume with its own options")
    before, now = {**defaults, **found["config"]}, info["config"]
    # With half the batch and twice the micro-steps, as when memory is short, a step reads the same sequences.
    sizes = ("batch_size", "gradient_accumulation_steps")
    batch = checkpoint.differences(before, now, sizes)
    as_many = math.prod(before[name] for name in sizes) == math.prod(now[name] for name in sizes)
    if batch and (counts_passes(model) or not as_many):
        raise UserError(f"the run in {out_dir} has other batches: {batch}. Resume with its own options")
    if found["step"] > max_iters:
        raise UserError(
            f"the run in {out_dir} is at step {found['step']}, beyond max_iters {max_iters}; raise --max_iters"
        )
    show(f"Resuming {out_dir} at step {found['step']:,}")
    here = {"out_dir": now["out_dir"], "resume": now["resume"]}  # these two may differ
    changed = checkpoint.differences({**before, **here, **found["versions"]}, {**now, **info["versions"]})
    if changed:
        show(f"Changed since it stopped: {changed}")
    weights, state = (checkpoint.tensors(out_dir, found, kind) for kind in ("model", "optimizer"))
    try:
        untrusted.check_optimizer(state, found["step"], **stateful)
    except Exception as error:  # nonsense raises many kinds
        raise UserError(
            f"{out_dir / found['files']['optimizer']['name']} does not fit the run ({reason_of(error)}); "
            "start a new run from its weights with --init_from"
        ) from None
    model.load_state_dict(weights)
    for name, part in stateful.items():
        if state.get(name):  # a scaler that was not in use has an empty state
            part.load_state_dict(state[name])
    # This checkpoint becomes the last one. Otherwise the next save would make a damaged one previous.json, and for a
    # moment no checkpoint would be whole.
    if ranks.is_main():
        checkpoint.commit(out_dir, "last", found)
    try:
        best = best_loss(out_dir, found["step"])
    except (UserError, OSError) as lost:
        if found["rows"]:  # before the first evaluation there is none
            show(f"The best checkpoint is lost ({lost}); the next evaluation replaces it")
        best = math.inf
    return Progress(found["step"], found["rows"], best, saved=found["step"], **state["progress"])


def counts_passes(model):
    """Whether a variant keeps a state that each training pass changes, so that the number of passes matters."""
    return any(name in model.state_dict() for name, _ in model.named_buffers())


def save(out_dir, model, stateful, progress, info, stop):
    """
    Save the run; True if it worked. If the disk is full, training continues and a later save may work.

    stateful: as in `load`. info: what else goes into the checkpoint's JSON. stop: the Stop in force. Raises Diverged
    instead of saving weights that are not finite.
    """
    progress.read(stateful["scaler"])
    if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
        raise Diverged("largest weight", "not finite", progress.step)
    if not ranks.is_main():
        progress.saved = progress.step
        return True
    rows, step = progress.rows, progress.step
    loss = rows[-1]["val_loss_causal"] if rows and rows[-1]["step"] == step else math.inf
    sums = {name: getattr(progress, name) for name in ("loss_sum", "aux_sum", "train_seconds")}
    state = {**{name: part.state_dict() for name, part in stateful.items()}, "progress": sums}
    try:
        if not (out_dir / "config.json").is_file():  # somebody deleted, emptied or renamed the folder
            tqdm.write(printable(f"step {step:,}: {out_dir} is not there any more; making it again"))
            out_dir.mkdir(parents=True, exist_ok=True)
            write_json(out_dir / "config.json", info)
        if not (out_dir / "best.json").is_file():
            progress.best = math.inf
        write_metrics(out_dir, rows)
        checkpoint.save(out_dir, step, model, state, loss < progress.best, {**info, "rows": rows})
    except (OSError, RuntimeError) as error:
        # PyTorch turns a full disk into a RuntimeError, and also a second Ctrl-C while it writes.
        if stop.again:
            raise KeyboardInterrupt(stop.AT_ONCE) from None
        before = "the one before is intact" if (out_dir / "last.json").is_file() else "there is none before it"
        tqdm.write(printable(f"step {step:,}: the checkpoint could not be saved ({error}); {before}"))
        with contextlib.suppress(UserError, OSError):
            progress.best = best_loss(out_dir, step)  # best.json may have been written, and only last.json not
    else:
        progress.saved, progress.best = step, min(progress.best, loss)
    checkpoint.remove_unused(out_dir)
    return progress.saved == step


def write_metrics(out_dir, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(out_dir / "metrics.jsonl", lambda file: file.write(lines.encode("utf-8")))
