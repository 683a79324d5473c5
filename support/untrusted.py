"""
Checks of a checkpoint that may be a stranger's: its hashes can be right and its contents nonsense. Each function raises
an error, of whatever kind, for what `checkpoint.save` never writes.
"""

import dataclasses
import math
import re

import torch

from mode import build, config_class
from support.data import check_tokens
from support.options import convert

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
FILE = r"(model|optimizer)-\d+(-\d+)?\.pt"


def check_contents(info, name):
    """The JSON of the checkpoint NAME, without its hash and its role."""
    kinds = {"step": int, "model": dict, "files": dict, "data": dict}
    if name != "best":
        kinds |= {"config": dict, "versions": dict}
    if name != "best" or "rows" in info:  # weights that support.gpt2 saved have no evaluations
        kinds["rows"] = list
    for part, kind in kinds.items():
        if type(info[part]) is not kind:
            raise TypeError(f"{part} is no {kind.__name__}")
    check_tokens(info["data"])
    if type(info["data"]["source"]) is not str or info["data"]["vocab_size"] > info["model"]["vocab_size"]:
        raise ValueError("data has no source, or more tokens than the model")
    if "config" in info and type(info["data"]["sha256"]) is not dict:
        raise TypeError("data has no hashes")
    if type(info.get("asked", {})) is not dict:
        raise TypeError("asked is no dict")
    if not {"model", *([] if name == "best" else ["optimizer"])} <= info["files"].keys():
        raise ValueError("a file is not named")
    for kind, file in info["files"].items():
        if not re.fullmatch(FILE, file["name"]) or type(file["sha256"]) is not str:
            raise ValueError(f"the {kind}'s file is {file!r}"[:120])
    for value in (*info["model"].values(), *info.get("config", {}).values()):
        if type(value) not in (int, float, bool, str):
            raise TypeError(f"an option is {value!r}"[:80])
    for count in ("batch_size", "eval_iters", "max_iters") if "config" in info else ():
        if type(info["config"][count]) is not int or info["config"][count] < 1:
            raise ValueError(f"{count} is {info['config'][count]!r}")
    steps = [0, *(row["step"] for row in info.get("rows", ())), info["step"]]
    figures = [n for row in info.get("rows", ()) for v in row.values() for n in (v if type(v) is list else [v])]
    if any(type(n) not in (int, float) for n in steps + figures) or steps != sorted(steps):
        raise ValueError("an evaluation is not one of numbers, in the order of steps")
    if not all(math.isfinite(row["val_loss_causal"]) for row in info.get("rows", ())):
        raise ValueError("a loss is not finite")


def check_model(options, weights):
    """A model's options and its tensors. They must fit together, before a model of any size is built."""
    for field in dataclasses.fields(config_class(options)):
        value = options.get(field.name, field.default)
        if convert(field, value, field.name) != value:
            raise ValueError(f"{field.name} is {value!r}")
    if options["n_layer"] > len(weights):
        raise ValueError(f"{options['n_layer']} layers, but {len(weights)} tensors")
    with torch.device("meta"):  # costs no memory
        expected = build(config_class(options)(**options)).state_dict()
    must_be_like(weights, expected)


def check_optimizer(state, step, optimizer, scaler):
    """
    Check an optimizer's file. In `state`, replace tensors by contiguous copies, and options by those of `optimizer` and
    `scaler`. (Fused AdamW checks nothing: moments of another shape or layout would crash it.)
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    moments, scale = state["optimizer"]["state"], state.get("scaler")  # a scaler that was not in use has an empty state
    # A parameter without a gradient has none. Before the first update no parameter does, in float16 for some steps.
    if not moments.keys() <= set(range(len(parameters))) or (step and not moments and not scale):
        raise ValueError(f"it holds moments of {len(moments)} parameters, the model has {len(parameters)}")
    for number, tensors in moments.items():
        p = parameters[number]
        must_be_like(tensors, {"step": torch.zeros(()), "exp_avg": p, "exp_avg_sq": p})
        if {tensors["exp_avg"].dtype, tensors["exp_avg_sq"].dtype} != {p.dtype} or not 0 <= tensors["step"] <= step:
            raise ValueError(f"the moments of parameter {number} have another type or step")
        moments[number] = {name: w.detach().clone(memory_format=torch.contiguous_format) for name, w in tensors.items()}
    # Not the file's param_groups: options may have changed.
    state["optimizer"] = {"state": moments, "param_groups": optimizer.state_dict()["param_groups"]}
    if scale and scaler.is_enabled():
        size, tracker = scale["scale"], scale["_growth_tracker"]
        if not (0 < float(size) < math.inf and type(tracker) is int and 0 <= tracker < 2**31):
            raise ValueError(f"the scaler has the scale {size!r} and grew {tracker!r} steps ago")
        state["scaler"] = {**scaler.state_dict(), "scale": float(size), "_growth_tracker": tracker}
    state["progress"] = {name: float(state["progress"][name]) for name in ("loss_sum", "aux_sum", "train_seconds")}


def must_be_like(tensors, expected):
    """Raise ValueError unless two dicts have the same keys and tensors of the same shapes, in ordinary memory."""
    if tensors.keys() != expected.keys():
        raise ValueError(f"other names: {', '.join(sorted(map(str, tensors.keys() ^ expected.keys())))[:200]}")
    for name, w in tensors.items():
        plain = isinstance(w, torch.Tensor) and w.layout == torch.strided and w.device.type == "cpu"
        if not plain or w.shape != expected[name].shape or w.dtype not in FLOATS:
            shape = list(getattr(w, "shape", []))
            raise ValueError(f"{name} is {type(w).__name__} {shape}, expected floats {list(expected[name].shape)}")
