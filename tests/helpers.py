"""What several test files share, besides the fixtures in conftest.py."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import train
from mode import build, config_class
from support import checkpoint
from support.files import sha256_of, sha256_of_json

torch.set_num_threads(1)  # as in conftest.py, which the processes that a test starts do not import
ROOT = Path(__file__).resolve().parents[1]
compiles_for_a_cpu = pytest.mark.skipif(torch.__version__ < "2.7", reason="train.py refuses it")


def told(command, argv):
    """The one line that `command` leaves with."""
    with pytest.raises(SystemExit) as end:
        command.main(argv)
    assert isinstance(end.value.code, str)  # Python prints it to stderr and exits with 1
    assert "\n" not in end.value.code
    return end.value.code


def run(config, **changes):
    """Train, and return what a run leaves: its rows without the clock, its weights."""
    config = dataclasses.replace(config, **changes)
    rows = [{k: v for k, v in row.items() if k != "train_seconds"} for row in train.train(config)]
    return rows, weights_of(config.out_dir)


def weights_of(out_dir, name="last"):
    return checkpoint.load(Path(out_dir), name, "cpu")[0].state_dict()


def equal(weights, others):
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def compiled_gradient_error(kind, device):
    """How far the gradients of the compiled model lie from the eager ones: the largest relative error of a weight."""
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=30, n_layer=4, n_head=2, n_embd=32)
    model = build(config_class(kind)(**sizes, **kind)).to(device)
    idx = torch.randint(30, (8, 33), device=device)
    torch.compiler.reset()
    gradients = []
    for compiled in (False, True):
        if compiled:
            model.compile(fullgraph=True)
        model.zero_grad()
        _, loss = model(idx[:, :-1], idx[:, 1:])
        (loss + model.routing_loss()).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    return torch.stack([(a - b).norm() / a.norm() for a, b in zip(*gradients)]).max().item()


def state_of(config):
    """All that a run leaves, without its clock: rows, weights, optimizer."""
    out_dir = Path(config.out_dir)
    rows = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [{k: v for k, v in row.items() if k != "train_seconds"} for row in rows]
    last = checkpoint.read(out_dir, "last")
    optimizer = checkpoint.tensors(out_dir, last, "optimizer")["optimizer"]["state"]
    best = checkpoint.read(out_dir, "best")["step"]
    return rows, weights_of(out_dir), weights_of(out_dir, "best"), optimizer, best


def same(a, b):
    """Equal bit for bit, at any depth."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def reseal(out_dir, name, change, kind=None):
    """
    Change a checkpoint and set its hashes right, as a stranger could. change(x) changes x in place or returns another:
    the JSON's contents or, with kind "model" or "optimizer", what that file holds.
    """
    path = Path(out_dir) / f"{name}.json"
    info = json.loads(path.read_text(encoding="utf-8"))
    del info["sha256"]
    if kind:
        file = info["files"][kind]
        content = torch.load(path.with_name(file["name"]), weights_only=True)
        changed = change(content)
        torch.save(content if changed is None else changed, path.with_name(file["name"]))
        file["sha256"] = sha256_of(path.with_name(file["name"]))
    else:
        changed = change(info)
        info = info if changed is None else changed
    path.write_text(json.dumps({**info, "sha256": sha256_of_json(info)}), encoding="utf-8")
