"""
Checkpoints: JSON files that name the files of their tensors.

    last.json        model-500.pt, optimizer-500.pt    the run resumes from this one
    previous.json    model-250.pt, optimizer-250.pt    one save earlier, in case the last one is damaged
    best.json        model-500.pt                      the lowest causal loss so far, for sample.py

(model-500-2.pt: step 500 was saved twice, before and after a stop.)
Each JSON holds its name, the model's config, the tokenizer, the step, and the SHA-256 of each file and of itself. They
are checked before anything is loaded, because PyTorch does not notice flipped bits. A save writes its .pt files first,
under names that no JSON uses yet, and last.json at the end. So a kill at any moment leaves whole checkpoints.
"""

import contextlib
import itertools
import json
import os
import re
from dataclasses import asdict

import torch

from mode import build, config_class
from support import untrusted
from support.files import sha256_of, sha256_of_json, write_json, write_whole
from support.options import UserError, command, printable, reason_of, show

FORMAT = 4  # 4 adds the role, which is the JSON's name
READABLE = (2, 3, 4)  # the formats that `read` understands
NAMES = ("last", "previous", "best")


def save(out_dir, step, model, training_state, is_best, info):
    """
    Save a model as the last checkpoint in `out_dir`, and if is_best also as the best one.

    training_state: a dict of what else resuming needs (tensors, numbers, containers of them). Raises OSError or
    RuntimeError if the disk fails. Every checkpoint is then whole, old or new.
    """
    info = {"step": step, "model": asdict(model.config), **info}
    files = {"model": _save_tensors(out_dir, f"model-{step}", model.state_dict())}
    files["optimizer"] = _save_tensors(out_dir, f"optimizer-{step}", training_state)
    if is_best:
        commit(out_dir, "best", {**info, "files": {"model": files["model"]}})
    with contextlib.suppress(UserError):  # there is no last.json yet, or it is damaged
        commit(out_dir, "previous", contents(out_dir, "last"))
    commit(out_dir, "last", {**info, "files": files})


def save_best(out_dir, model, info):
    """Save only a model, to sample from or to start from."""
    info = {"step": 0, "model": asdict(model.config), **info}
    commit(out_dir, "best", {**info, "files": {"model": _save_tensors(out_dir, "model-0", model.state_dict())}})


def commit(out_dir, name, info):
    """Write NAME.json; from here on it is the checkpoint NAME."""
    info = {**info, "format": FORMAT, "role": name}
    write_json(out_dir / f"{name}.json", {**info, "sha256": sha256_of_json(info)})


def read(out_dir, name):
    """The contents of NAME.json. Raises UserError if it or one of its files is missing, damaged or nonsense."""
    return _read(out_dir, name)[0]


def contents(out_dir, name):
    """Like `read`, but does not look at the .pt files."""
    path = out_dir / f"{name}.json"
    if not path.is_file() and (out_dir / "config.json").is_file():
        advice = "continue it with" if (out_dir / "last.json").is_file() else "start it again without"
        raise UserError(f"no checkpoint {path}: the run has not saved one; {advice} --resume")
    if not path.is_file():
        train = command("python", "train.py", "config/shakespeare_mod.py", f"--out_dir={out_dir}")
        advice = "" if os.path.lexists(out_dir) else f", or train one: {train}"
        raise UserError(f"no checkpoint {path}; name another folder with --out_dir{advice}")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        found = info["format"]
        checksum = info.pop("sha256") if found in READABLE else None
        right = checksum == sha256_of_json(info)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise UserError(f"{path} is damaged: it is not the JSON of a checkpoint; train again or use another") from None
    if found not in READABLE:
        raise UserError(f"{path} has format {found!r}, this version of the code reads 2 to {FORMAT}; train again")
    if not right:
        raise UserError(f"{path} is damaged: its SHA-256 differs from the one it states; train again or use another")
    role = info.pop("role", None) if found >= 4 else name
    if role != name:
        raise UserError(f"{path} is the checkpoint {role!r} under another name; rename swapped files back")
    try:
        untrusted.check_contents(info, name)
        return {**info, **{part: with_variant(info[part]) for part in ("model", "config") if part in info}}
    except (ArithmeticError, ValueError, TypeError, LookupError, AttributeError, RecursionError, UserError) as error:
        raise UserError(f"{path} is not from train.py ({reason_of(error)}); train again or use another") from None


def _read(out_dir, name):
    """The contents of NAME.json and the model's tensors."""
    info, path = contents(out_dir, name), out_dir / f"{name}.json"
    for file in info["files"].values():
        file_path = out_dir / file["name"]
        if not file_path.is_file():
            raise UserError(f"{file_path} is missing, {path.name} needs it; train again or use another checkpoint")
        if sha256_of(file_path) != file["sha256"]:
            raise UserError(f"{file_path} is damaged: its SHA-256 is not the one in {path.name}")
    weights = tensors(out_dir, info, "model")
    try:
        untrusted.check_model(info["model"], weights)
    except Exception as error:  # building a model from nonsense raises many kinds
        raise UserError(f"the weights and the model in {path} do not fit together: {reason_of(error)}") from None
    if not all(w.isfinite().all() for w in weights.values()):
        raise UserError(f"the weights of {path} are not finite (NaN or infinite), so it predicts nothing; use another")
    return info, weights


def with_variant(options):
    """Options under their current names. Format 2 wrote selection="stochastic" for variant="stochastic"."""
    if "selection" not in options:
        return options
    variant = options["selection"].replace("learned", "")
    return {name: value for name, value in options.items() if name != "selection"} | {"variant": variant}


def load(out_dir, name, device):
    """The model on `device` in evaluation mode, and the contents of its JSON. Raises UserError if one is damaged."""
    info, weights = _read(out_dir, name)
    model = build(config_class(info["model"])(**info["model"]))
    model.load_state_dict(weights)
    return model.to(device).eval(), info


def start_from(folder, model, meta):
    """
    Copy the weights of the best checkpoint in `folder` into the model.

    That checkpoint may have fewer tokens (a vocabulary that is padded now), a longer context, and no routed blocks.
    Weights that it lacks stay random.
    """
    if not (folder / "best.json").is_file():
        raise UserError(
            f"no checkpoint {folder / 'best.json'} to start from; name a run's folder with --init_from "
            "(python -m support.gpt2 makes one of GPT-2's weights)"
        )
    theirs, info = load(folder, "best", "cpu")
    if any(info["data"].get(name) != meta.get(name) for name in ("tokenizer", "vocab")):
        raise UserError(f"the model in {folder} has other tokens than the data set; they must be the same")
    ours, before = asdict(model.config), asdict(theirs.config)
    must_fit = ["n_layer", "n_head", "n_embd", "bias"]
    if before["vocab_size"] > ours["vocab_size"]:
        must_fit.append("vocab_size")
    if before["block_size"] < ours["block_size"]:
        must_fit.append("block_size")
    if "n_expert" in before and "n_expert" in ours:  # a mixture cannot be copied in part
        must_fit += ["n_expert", "n_noop"]
    shape = differences(before, ours, must_fit)
    if shape:
        raise UserError(f"the model in {folder} does not fit: {shape}")
    weights = theirs.state_dict()
    for name, w in model.state_dict().items():
        if name in ("transformer.wte.weight", "transformer.wpe.weight"):  # the head shares wte
            n = min(len(w), len(weights[name]))
            w[:n] = weights[name][:n]
        elif name in weights and w.shape == weights[name].shape:  # a predictor may have another size
            w.copy_(weights[name])
    show(f"Starting from {folder}: step {info['step']:,} of a run on {info['data']['source']}")


def differences(before, now, names=None):
    """Which of these options changed, as text. names: default those in both."""
    changed = [name for name in now if name in (names or before) and before.get(name) != now[name]]
    pairs = [(name, before[name], now[name]) for name in changed]
    text = ", ".join(f"{name} was {old or repr(old)}, now {new or repr(new)}" for name, old, new in pairs)
    return " ".join(printable(text).split())


def tensors(out_dir, info, kind):
    """The contents of a checkpoint's file, "model" or "optimizer". Loading it cannot run code."""
    path = out_dir / info["files"][kind]["name"]
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # PyTorch raises many kinds, depending on what is wrong with the file
        reason = reason_of(error)
        raise UserError(f"{path} holds no tensors that can be loaded safely ({reason}); do not use it") from None


def remove_unused(out_dir):
    """Delete the .pt files that no checkpoint names and the half-written files of a killed save."""
    used = set()
    for path in (out_dir / f"{name}.json" for name in NAMES):
        try:
            if path.is_file():
                used |= {file["name"] for file in json.loads(path.read_bytes())["files"].values()}
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return  # a damaged JSON may name any file
    for path in out_dir.glob("*.pt*"):
        if re.fullmatch(rf"{untrusted.FILE}(\.tmp)?", path.name) and path.name not in used:
            with contextlib.suppress(OSError):  # on Windows, while another program has it open; deleted next time
                path.unlink()


def _save_tensors(out_dir, name, content):
    # A stopped and resumed run may save the same step twice. Never overwrite a file that a JSON names.
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    path = next(path for path in (out_dir / f"{name}.pt" for name in names) if not path.exists())
    return {"name": path.name, "sha256": write_whole(path, lambda file: torch.save(content, file))}
