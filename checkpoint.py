"""
Checkpoints: the weights in NAME.pt, and beside them NAME.json with all it takes to use them: the model's config, the
tokenizer, the step, and the SHA-256 of the .pt file.

The JSON is written last and the hash is checked before anything is loaded: a file that is half written, damaged or
swapped is never taken for a model. (PyTorch itself would load a file with flipped bits without a word.)
"""

import hashlib
import json
import os
from dataclasses import asdict

import torch

from configurator import UserError
from mod import GPT, GPTConfig

FORMAT = 1


def save(out_dir, name, model, **info):
    """Write NAME.pt and NAME.json into `out_dir`; `info` goes into the JSON."""
    weights = out_dir / f"{name}.pt"
    sha256 = write_whole(weights, lambda file: torch.save(model.state_dict(), file))
    write_json(out_dir / f"{name}.json", {"format": FORMAT, "sha256": sha256, "model": asdict(model.config), **info})


def load(out_dir, name, device):
    """The model on `device` in evaluation mode, and its JSON's contents. Raises UserError if either is damaged."""
    path, weights = out_dir / f"{name}.json", out_dir / f"{name}.pt"
    if not path.is_file() or not weights.is_file():
        raise UserError(
            f"no checkpoint {weights} with its {path.name}; train one with "
            f"python train.py config/shakespeare_mod.py --out_dir={out_dir}, or name another folder by --out_dir"
        )
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        expected, model_config = info["sha256"], info["model"]
        if len(info["data"]["vocab"]) > model_config["vocab_size"]:
            raise ValueError
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged: it is not the JSON of a checkpoint; train again or use another") from None
    if info.get("format") != FORMAT:
        raise UserError(f"{path} has format {info.get('format')!r}, this version of the code reads {FORMAT}")
    if _sha256(weights) != expected:
        raise UserError(
            f"{weights} is damaged: its SHA-256 is not the one in {path.name} (or a run is just writing it)"
        )
    try:
        model = GPT(GPTConfig(**model_config))
        model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{weights} and the model in {path.name} do not fit together: {reason}") from None
    return model.to(device).eval(), info


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
        sha256 = _sha256(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return sha256


def _sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
