"""
Checkpoints: JSON files that name the files of their tensors.

    last.json        model-500.pt, optimizer-500.pt    what a run goes on from
    previous.json    model-250.pt, optimizer-250.pt    the same one save earlier, should the last one be damaged
    best.json        model-500.pt                      the lowest causal loss so far: what sample.py uses

(model-500-2.pt: step 500 was saved twice, before and after a stop.)
A JSON holds all it takes to use them (the model's config, the tokenizer, the step) and the SHA-256 of each file and of
itself; they are checked before anything is loaded. (PyTorch itself would load a file with flipped bits without a word.)
A save writes its .pt files first, under names that no JSON has, and last.json at the end: killed at any moment, it
leaves every JSON with the files that belong to it.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from dataclasses import asdict

import torch

from mode import build, config_class
from support.data import sha256_of
from support.options import UserError

FORMAT = 3
READABLE = (2, 3)  # what `read` understands
NAMES = ("last", "previous", "best")


def save(out_dir, step, model, training_state, is_best, info):
    """
    Make step `step` the last checkpoint in `out_dir`, and the best one too if it is.

    training_state: a dict of what else a run needs to go on (tensors, numbers, and containers of them). Raises OSError
    or RuntimeError where the disk does not do it: every checkpoint is whole then, the old one or already the new one.
    """
    info = {"format": FORMAT, "step": step, "model": asdict(model.config), **info}
    files = {"model": _save_tensors(out_dir, f"model-{step}", model.state_dict())}
    files["optimizer"] = _save_tensors(out_dir, f"optimizer-{step}", training_state)
    if is_best:
        commit(out_dir, "best", {**info, "files": {"model": files["model"]}})
    last = out_dir / "last.json"
    if last.is_file():
        write_whole(out_dir / "previous.json", lambda file: file.write(last.read_bytes()))
    commit(out_dir, "last", {**info, "files": files})


def save_best(out_dir, model, info):
    """A checkpoint of a model alone, to sample from or to start from."""
    info = {"format": FORMAT, "step": 0, "model": asdict(model.config), **info}
    commit(out_dir, "best", {**info, "files": {"model": _save_tensors(out_dir, "model-0", model.state_dict())}})


def commit(out_dir, name, info):
    """Write NAME.json: from here on this is what the checkpoint NAME is."""
    write_json(out_dir / f"{name}.json", {**info, "sha256": _checksum(info)})


def read(out_dir, name):
    """The contents of NAME.json; it and its files are whole. Raises UserError if they are not."""
    path = out_dir / f"{name}.json"
    if not path.is_file():
        raise UserError(
            f"no checkpoint {path}; train one, as by python train.py config/shakespeare_mod.py --out_dir={out_dir}, "
            "or name another folder by --out_dir"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        found = info["format"]
        checksum = info.pop("sha256") if found in READABLE else None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged: it is not the JSON of a checkpoint; train again or use another") from None
    if found not in READABLE:
        raise UserError(f"{path} has format {found!r}, this version of the code reads 2 and 3; train again")
    if checksum != _checksum(info):
        raise UserError(f"{path} is damaged: its SHA-256 is not the one that it gives; train again or use another")
    for file in info["files"].values():
        weights = out_dir / file["name"]
        if not weights.is_file():
            raise UserError(f"{weights} is missing, {path.name} needs it; train again or use another checkpoint")
        if sha256_of(weights) != file["sha256"]:
            raise UserError(f"{weights} is damaged: its SHA-256 is not the one in {path.name}")
    options = {part: with_variant(info[part]) for part in ("model", "config") if part in info}
    return {**info, **options, "format": FORMAT}


def with_variant(options):
    """Options as they are named now. Format 2 had selection="stochastic" for what is variant="stochastic"."""
    if "selection" not in options:
        return options
    variant = options["selection"].replace("learned", "")
    return {name: value for name, value in options.items() if name != "selection"} | {"variant": variant}


def load(out_dir, name, device):
    """The model on `device` in evaluation mode, and its JSON's contents. Raises UserError if either is damaged."""
    info = read(out_dir, name)
    try:
        model = build(config_class(info["model"])(**info["model"]))
        model.load_state_dict(tensors(out_dir, info, "model"))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the weights and the model in {out_dir / name}.json do not fit together: {reason}") from None
    return model.to(device).eval(), info


def start_from(folder, model, meta):
    """
    Give the model the weights of the best checkpoint in `folder`.

    It may have fewer tokens (a vocabulary that is padded now) and a longer context, and need not have routed blocks:
    the weights that it lacks stay random.
    """
    theirs, info = load(folder, "best", "cpu")
    if any(info["data"].get(name) != meta.get(name) for name in ("tokenizer", "vocab")):
        raise UserError(f"the model in {folder} has other tokens than the data set; they must be the same")
    ours, before = asdict(model.config), asdict(theirs.config)
    must_fit = ["n_layer", "n_head", "n_embd", "bias"]
    if before["vocab_size"] > ours["vocab_size"]:
        must_fit.append("vocab_size")
    if before["block_size"] < ours["block_size"]:
        must_fit.append("block_size")
    if "n_expert" in before and "n_expert" in ours:  # a mixture cannot be taken over in part
        must_fit += ["n_expert", "n_noop"]
    shape = differences({name: before[name] for name in must_fit}, ours)
    if shape:
        raise UserError(f"the model in {folder} does not fit: {shape}")
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, w in model.state_dict().items():
            if name in ("transformer.wte.weight", "transformer.wpe.weight"):  # the head is wte
                n = min(len(w), len(weights[name]))
                w[:n] = weights[name][:n]
            elif name in weights and w.shape == weights[name].shape:  # a predictor may have another size
                w.copy_(weights[name])
    print(f"Starting from {folder}: step {info['step']:,} of a run on {info['data']['source']}")


def differences(before, now):
    changed = [name for name in now if name in before and before[name] != now[name]]
    return ", ".join(f"{name} was {before[name]}, now {now[name]}" for name in changed)


def tensors(out_dir, info, kind):
    """The contents of a checkpoint's file, "model" or "optimizer"; nothing in it can run code."""
    path = out_dir / info["files"][kind]["name"]
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # PyTorch raises many kinds, depending on what is wrong with the file
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} holds no tensors that can be loaded safely ({reason}); do not use it") from None


def remove_unused(out_dir):
    """Delete the .pt files that no checkpoint names, and what a save that was killed left half written."""
    used = set()
    for name in NAMES:
        try:
            used |= {file["name"] for file in json.loads((out_dir / f"{name}.json").read_bytes())["files"].values()}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return  # it cannot be told what a damaged one names
    for path in out_dir.glob("*.pt*"):
        if re.fullmatch(r"(model|optimizer)-\d+(-\d+)?\.pt(\.tmp)?", path.name) and path.name not in used:
            with contextlib.suppress(OSError):  # Windows deletes no file that another program has open; the next time
                path.unlink()


def write_json(path, content):
    text = json.dumps(content, indent=1, ensure_ascii=False)
    write_whole(path, lambda file: file.write(text.encode("utf-8")))


def write_whole(path, write):
    """
    Write a file through a temporary name beside it, so that `path` is at any time the old file or the new one, whole.

    Returns its SHA-256.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        sha256 = sha256_of(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return sha256


def _save_tensors(out_dir, name, content):
    # Where a run was stopped and went on, the same step may be saved twice: never over a file that a JSON names.
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    path = next(path for path in (out_dir / f"{name}.pt" for name in names) if not path.exists())
    return {"name": path.name, "sha256": write_whole(path, lambda file: torch.save(content, file))}


def _checksum(content):
    """Of a JSON's contents, in whatever order and with whatever spaces they are written."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8")).hexdigest()
