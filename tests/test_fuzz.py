"""
Damage to a run's folder and its data set, by a fixed list of mutators. Three counts must be zero: wrong content
accepted, tracebacks, hangs.

    python -m pytest -m slow tests/test_fuzz.py               # 300 cases
    CASES=10000 python -m pytest -m slow tests/test_fuzz.py -n 4     # -n with pytest-xdist
"""

import collections
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

import sample
import train
from helpers import reseal, same, weights_of
from support import checkpoint
from support.files import sha256_of
from train import TrainConfig

CASES = int(os.environ.get("CASES", 300))
SECONDS = 120  # longer is a hang: a case takes a fifth of a second, or as long as a compilation
pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and alarms")]

SEALED = ("last.json", "previous.json", "best.json", "*.pt")  # a hash covers these files
FILES = (*SEALED, "config.json", "metrics.jsonl", "set/meta.json", "set/*.bin")
ODD = [None, True, -1, 0, 10**9, 10**400, 1.5, float("nan"), float("inf"), "", "x\n\x1b[2J", "\ud800", [], {}, [[]]]


class Hang(BaseException):
    pass


def pick(rng, run, patterns=FILES):
    return rng.choice(sorted(path for pattern in patterns for path in run.glob(pattern)))


def of_a_run(rng):
    return rng.choice(checkpoint.NAMES)


# The mutators. One returns False if it may change content that has no hash or a right one: that cannot be noticed, and
# the content is not compared.


def flip(rng, run):
    path = pick(rng, run)
    raw = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 1, 1, 3])):
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    path.write_bytes(raw)
    return path.name not in ("config.json", "metrics.jsonl")


def cut(rng, run):
    path = pick(rng, run)
    path.write_bytes(path.read_bytes()[: rng.choice([0, 1, rng.randrange(path.stat().st_size)])])


def insert(rng, run):
    path = pick(rng, run)
    raw, at = path.read_bytes(), rng.randrange(path.stat().st_size)
    path.write_bytes(raw[:at] + rng.randbytes(rng.randint(1, 40)) + raw[at + rng.choice([0, 40]) :])


def delete(rng, run):
    pick(rng, run).unlink()


def exchange(rng, run):
    pattern = rng.choice(["*.json", "*.pt", "*.pt", "*"])
    a, b = pick(rng, run, [pattern]), pick(rng, run, [pattern])
    if a.is_dir() or b.is_dir():
        return
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1])
    if rng.random() < 0.7:  # otherwise a copy
        b.write_bytes(contents[0])


def nest(rng, run):
    path = pick(rng, run, ("*.json", "set/meta.json"))
    depth = rng.choice([10, 500, 900, 990, 100_000])
    path.write_text(rng.choice(["[" * depth, '{"format":' * depth, "[" * depth + "]" * depth]))


def nest_inside(rng, run):
    value = []
    for _ in range(rng.choice([5, 100, 300, 450])):
        value = [value]
    part = rng.choice(["step", "model", "files", "data", "rows", "versions", "anything"])
    reseal(run, of_a_run(rng), lambda info: info.update({part: value}))
    return part not in ("versions", "anything")


def link(rng, run):
    names = ["metrics.jsonl", "config.json", "last.json", "previous.json", "best.json", "model-4.pt", "optimizer-4.pt"]
    name = rng.choice([*names, "run.lock", "earlier.1"]) + rng.choice(["", ".tmp", ".tmp"])
    path = run / name
    path.unlink(missing_ok=True)
    path.symlink_to(rng.choice([run.parent / "treasure", run.parent / "nowhere", run.parent, "/dev/zero"]))


def pipe(rng, run):
    path = pick(rng, run, ("*.json", "*.pt"))
    path.unlink()
    os.mkfifo(path)


def tensor(rng, run):
    """Another shape, type or layout, with the right hashes."""
    kind = rng.choice(["model", "optimizer", "optimizer"])

    def change(content):
        group = content
        if kind == "optimizer":
            group = content["optimizer"]["state"][rng.choice(list(content["optimizer"]["state"]))]
        name = rng.choice(list(group))
        w = group[name]
        group[name] = rng.choice([
            lambda: w.reshape(-1)[:1], lambda: torch.zeros(rng.choice([0, 10**6])), lambda: w[None], lambda: w.int(),
            lambda: w.bool(), lambda: torch.complex(w, w), lambda: w.double(), lambda: torch.eye(3).to_sparse(),
            lambda: torch.full_like(w, float("nan")) if kind == "model" else 3, lambda: w.tolist(), lambda: None,
            lambda: torch.empty(w.shape, device="meta"), lambda: w.to(torch.float8_e5m2)[None],
        ])()  # fmt: skip

    reseal(run, "last", change, kind)


def key(rng, run):
    """A key less, more or renamed at any depth of a .pt file, with the right hashes."""
    kind = rng.choice(["model", "optimizer", "optimizer"])

    def change(content):
        group = content
        for _ in range(rng.choice([0, 1, 2, 3])):
            inner = [value for name, value in group.items() if isinstance(value, dict) and value and name != "scaler"]
            group = rng.choice(inner) if inner else group
        name = rng.choice([name for name in group if name != "scaler"])
        value = group.pop(name) if rng.random() < 0.7 else None
        if value is None or rng.random() < 0.5:
            group[rng.choice(["x", 99, "exp_avg", "lm_head.weight"])] = value

    reseal(run, "last", change, kind)
    return False  # of an optimizer's param_groups, for example, nothing is read


def whole_file(rng, run):
    """Anything that torch.load accepts, with the right hashes."""
    content = rng.choice([{}, [], [1, 2], None, torch.zeros(3), {"optimizer": None}, {"optimizer": {"state": {}}}, "x"])
    kind, names = rng.choice(["model", "optimizer"]), ("last", "previous")
    for name in names:
        info = json.loads((run / f"{name}.json").read_text())
        path = run / info["files"][kind]["name"]
        torch.save(content, path) if rng.random() < 0.7 else path.write_bytes(rng.choice([b"", b"PK", b"\x80\x02}."]))
        digest = sha256_of(path)
        reseal(run, name, lambda i, digest=digest: i["files"][kind].update(sha256=digest))


def json_part(rng, run):
    """A key less, or an odd value, at any depth of a JSON, with the right hash."""

    def change(info):
        group = info
        for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
            values = group.values() if isinstance(group, dict) else group
            inner = [value for value in values if isinstance(value, (dict, list)) and value]
            group = rng.choice(inner) if inner else group
        name = rng.choice(list(group) if isinstance(group, dict) else range(len(group)))
        if rng.random() < 0.3:
            del group[name]
        else:
            group[name] = rng.choice(ODD)

    for name in rng.choice([["last"], ["best"], ["last", "previous"]]):
        reseal(run, name, change)
    return False


def meta_part(rng, run):
    """An odd value in meta.json, as if an earlier version had written it."""
    path = run / "set" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["meta_sha256"]
    meta[rng.choice(list(meta))] = rng.choice(ODD)
    path.write_text(json.dumps(meta))
    return False


def config_only(rng, run):
    """No checkpoint, and an odd value in config.json, which has no hash."""
    for name in ("last", "previous"):
        (run / f"{name}.json").unlink()
    path = run / "config.json"
    info = json.loads(path.read_text())
    info["config"][rng.choice(list(info["config"]))] = rng.choice(ODD)
    path.write_text(json.dumps(info))


MUTATORS = [
    flip, cut, insert, delete, exchange, nest, nest_inside, link, pipe, tensor, key, whole_file, json_part, meta_part,
    config_only,
]  # fmt: skip


@pytest.fixture(scope="module")
def original(tmp_path_factory, dataset):
    """A folder with a run of 3 steps, its data set inside, and what a resumed run of 4 steps, sampling and evaluation
    give."""
    place = tmp_path_factory.mktemp("original")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        shutil.copytree(dataset, "run/set")
        options = dict(
            out_dir="run", dataset="run/set", device="cpu", block_size=8, batch_size=2, n_layer=2, n_head=1, n_embd=4,
            predictor_hidden=1, eval_interval=1, eval_iters=1, decay_lr=False,
        )  # fmt: skip
        train.train(TrainConfig(**options, max_iters=3))
        shutil.copytree("run", "start")
        expected = [action(Path("run")) for action in ACTIONS]
    return place / "start", expected


def resumed(run):
    train.main(["--resume", f"--out_dir={run}", f"--dataset={run / 'set'}", "--max_iters=4", "--device=cpu"])
    optimizer = checkpoint.tensors(run, checkpoint.read(run, "last"), "optimizer")["optimizer"]["state"]
    return weights_of(run), optimizer, [json.loads(line)["step"] for line in (run / "metrics.jsonl").open()]


def evaluated(run):
    return train.train(TrainConfig(eval_only=True, out_dir=str(run), dataset=str(run / "set"), device="cpu"))


def sampled(run):
    return sample.sample(sample.SampleConfig(out_dir=str(run), max_new_tokens=4, device="cpu"))


ACTIONS = [evaluated, sampled, resumed]  # the last one writes


@contextlib.contextmanager
def no_longer_than(seconds):
    def ring(number, frame):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(action, run, expected, compare):
    """What happened, and the details."""
    try:
        with no_longer_than(SECONDS):
            found = action(run)
    except Hang:
        return "hang", "".join(traceback.format_exc()[-1500:])
    except (SystemExit, train.UserError) as end:
        line = str(end.code if isinstance(end, SystemExit) else end)
        one_line = line and "\n" not in line and "\x1b" not in line
        return ("one line" if one_line else "traceback"), line
    except OSError as error:  # main() makes one line of it
        return "one line", str(error)
    except Exception:
        return "traceback", traceback.format_exc()[-2500:]
    return ("wrong content" if compare and not same(found, expected) else "right content"), repr(found)[:300]


@pytest.mark.parametrize("first", range(4))  # four parts, so that several processes can share them
def test_damage_is_one_line_or_harmless(original, tmp_path, monkeypatch, capsys, first):
    start, expected = original
    monkeypatch.chdir(tmp_path)
    counts, faults, cases = collections.Counter(), [], range(first, CASES, 4)
    for case in cases:
        rng = random.Random(case)
        place = tmp_path / str(case)
        shutil.copytree(start, place / "run")
        (place / "treasure").write_text("precious")
        mutator = MUTATORS[case % len(MUTATORS)]
        compare = mutator(rng, place / "run") is not False
        for action, right in zip(ACTIONS, expected):
            what, details = outcome(action, place / "run", right, compare)
            if (place / "treasure").read_text() != "precious" or (place / "nowhere").exists():
                what = "wrong content"
            counts[what] += 1
            if what in ("wrong content", "traceback", "hang"):
                faults.append(f"case {case}, {mutator.__name__}, {action.__name__}: {what}\n{details}")
        shutil.rmtree(place)
        capsys.readouterr()
    print(f"{len(cases)} cases: {dict(counts)}")
    assert not faults, f"{len(faults)} faults\n" + "\n\n".join(faults[:20])
    assert counts["one line"] > len(cases) / 2 and counts["right content"] > len(cases) / 4
