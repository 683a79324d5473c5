"""Each mistake of a user prints one line (got, expected, what to do) and changes no file."""

import dataclasses
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import plot
import sample
import train
from data.shakespeare_char import prepare
from experiments import bench
from helpers import ROOT, told
from support import checkpoint
from support import data as data_module
from support.files import write_whole
from support.options import command, load

COMMANDS = {"train": train, "sample": sample, "bench": bench, "plot": plot, "prepare": prepare}
RUN = (
    "--dataset=set --device=cpu --block_size=16 --batch_size=4 --n_layer=2 --n_head=2 --n_embd=16 --predictor_hidden=4 "
    "--max_iters=3 --eval_interval=3 --eval_iters=1 --warmup_iters=0"
)
PRESETS = {
    "typo": "learning_rat = 1",
    "text": "n_layer = 'four'",
    "fraction": "n_layer = 4.5",
    "truth": "n_layer = True",
    "nothing": "dropout = None",
    "number": "out_dir = 3",
    "cpu_typo": "cpu = dict(n_layr=3)",
    "cpu_number": "cpu = 3",
    "syntax": "n_layer = ",
    "name": "n_layer = six",
    "exits": "raise SystemExit('gone')",
    "resumes": "resume = True",
    "nanogpt": "import time\nwandb_run_name = str(time.time())",
}


class Code:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('the checkpoint ran code')",))


@pytest.fixture(scope="module")
def place(tmp_path_factory, dataset):
    """A folder with what the mistakes below need: runs, data sets, texts and presets, whole and damaged."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(dataset, place / "set")
    shutil.copytree(ROOT / "config", place / "config", ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in PRESETS.items():
        (place / f"{name}.py").write_text(text)
    (place / "latin").write_bytes("Süd".encode("latin-1"))
    (place / "empty").write_bytes(b"")
    (place / "other").write_text("abcdefghijklmnopqrstuvwxyz A\n" * 50)
    (place / "wide").write_text("".join(map(chr, range(0x10000, 0x20001))), encoding="utf-8")
    (place / "folder.png").mkdir()
    (place / "stranger").mkdir()
    (place / "stranger" / "config.json").write_text("{}")
    (place / "weights").mkdir()
    (place / "weights" / "model-1.pt").write_bytes(b"precious")
    prepare.main(["--input", str(place / "other"), "--out", str(place / "other_set")])

    def data_set(name, file, change):
        shutil.copytree(place / "set", place / name)
        path = place / name / file
        path.write_bytes(change(path.read_bytes()))

    def with_meta(**changes):  # as an earlier version wrote it, without a hash of its own
        return lambda raw: json.dumps({**json.loads(raw), **changes, "meta_sha256": None}).encode()

    val = np.frombuffer((place / "set" / "val.bin").read_bytes(), dtype="<u2").copy()
    val[3] = 28
    data_set("set_cut", "val.bin", lambda raw: raw[:-2])
    data_set("set_odd", "val.bin", lambda raw: raw[:-1])
    data_set("set_none", "val.bin", lambda raw: b"")
    data_set("set_flipped", "train.bin", lambda raw: raw[:50] + bytes([raw[50] ^ 1]) + raw[51:])
    data_set("set_json", "meta.json", lambda raw: b"{")
    data_set("set_dtype", "meta.json", with_meta(dtype="<u4"))
    data_set("set_vocab", "meta.json", with_meta(vocab_size=29))
    data_set("set_tokenizer", "meta.json", with_meta(tokenizer="bpe"))
    data_set("set_words", "meta.json", with_meta(vocab="".join(map(chr, range(97, 125)))))
    data_set("set_edited", "meta.json", lambda raw: raw.replace(b"text.txt", b"texts.tx"))
    data_set("set_lines", "meta.json", with_meta(tokens="x\n\x1b[2J"))
    data_set("set_nested", "meta.json", lambda raw: b"[" * 100_000)
    data_set("set_list", "meta.json", lambda raw: b"[]")
    sha256 = json.loads((place / "set" / "meta.json").read_text())["sha256"]
    sha256["val"] = hashlib.sha256(val.tobytes()).hexdigest()
    data_set("set_beyond", "meta.json", with_meta(sha256=sha256))
    (place / "set_beyond" / "val.bin").write_bytes(val.tobytes())

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train.main([*RUN.split(), "--out_dir=run"])
        train.main([*RUN.split(), "--out_dir=dense", "--route_every=0"])

    def damaged(name, file, change):
        shutil.copytree(place / "run", place / name)
        info = json.loads((place / name / "best.json").read_text(encoding="utf-8"))
        path = place / name / (file if file != "model" else info["files"]["model"]["name"])
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
        return path.parent, info

    damaged("run_cut", "model", lambda raw: raw[: len(raw) // 2])
    damaged("run_flipped", "model", lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:])
    damaged("run_gone", "model", lambda raw: None)
    damaged("run_json", "best.json", lambda raw: b"{")
    damaged("run_list", "best.json", lambda raw: b"[]")
    damaged("run_edited", "best.json", lambda raw: raw.replace(b'"step": 3', b'"step": 4'))
    damaged("run_format", "best.json", lambda raw: raw.replace(b'"format": 4', b'"format": 99'))
    damaged("run_swapped", "best.json", lambda raw: (place / "dense" / "best.json").read_bytes())
    damaged("run_resume", "last.json", lambda raw: b"")
    (place / "run_resume" / "previous.json").write_bytes(b"")
    damaged("run_nothing", "last.json", lambda raw: None)
    (place / "run_nothing" / "previous.json").unlink()
    damaged("run_metrics", "metrics.jsonl", lambda raw: raw[:-9])
    folder, info = damaged("run_shape", "best.json", lambda raw: raw)
    del info["sha256"]
    checkpoint.commit(folder, "best", {**info, "model": {**info["model"], "n_embd": 32}})
    folder, info = damaged("run_code", "best.json", lambda raw: raw)
    del info["sha256"]
    weights = folder / info["files"]["model"]["name"]
    info["files"]["model"]["sha256"] = write_whole(weights, lambda file: torch.save({"w": Code()}, file))
    checkpoint.commit(folder, "best", info)
    return place


# The command, its arguments ("..." stands for the options of a run that works), and part of the line.
ROWS = [
    ("train", "... --learning_rat=1", "unknown option --learning_rat; did you mean --learning_rate?"),
    ("train", "... --lr=1", "unknown option --lr; use --learning_rate"),
    ("sample", "--selection=x", "unknown option --selection; --help lists"),  # nor does it have --variant
    ("sample", "--temp=1", "unknown option --temp; did you mean --temperature?"),
    ("train", "... --learning_rate=1e-5", "min_lr 0.0001 is above learning_rate 1e-05, so the rate would rise; lower"),
    ("train", "... --route_every=3", "route_every 3 routes none of 2 blocks; use more blocks, or --route_every=0"),
    ("train", "... --route_every=0 --capacity=0.5", "capacity 0.5 has no effect in a dense GPT (route_every 0); leave"),
    ("train", "... --route_every=0 --variant=stochastic", "variant stochastic has no effect in a dense GPT"),
    ("train", "... --expert_capacity=0.5", "expert_capacity 0.5 has no effect without experts (n_expert 0); leave it"),
    ("train", "... --n_expert=2 --capacity=0.5", "capacity 0.5 has no effect beside experts that are not staged"),
    # Before the data are looked for, or prepared.
    ("train", "--max_iters=1 --dataset=none --capacity=2", "capacity is a fraction in (0, 1], got 2; for 2% write"),
    ("train", "... --variant=position --causal_method=router", "causal_method router has no effect in the variant"),
    ("train", "... --qqqq=1", "unknown option --qqqq; --help lists them all"),
    ("train", "config/shakespeare_mood.py", "file config/shakespeare_mood.py; did you mean config/shakespeare_mod.py?"),
    ("train", "config/shakespeare_mod.py n_layer=3", "unexpected argument 'n_layer=3'; options are written --name="),
    ("train", "''", "no preset file"),
    ("train", "... --n_layer=four", "--n_layer expects a whole number in digits, got 'four'"),
    ("train", "... --n_layer=4.5", "--n_layer expects a whole number in digits, got '4.5'"),
    ("train", "... --dropout=low", "--dropout expects a number, got 'low'"),
    ("train", "... --bias=maybe", "--bias expects True or False, got 'maybe'"),
    ("train", "... --n_layer", "--n_layer: expected one argument"),
    ("train", "... --out_dir=.", "out_dir '.' is the folder you are in or one above it; name one below, such as out"),
    ("train", "... --out_dir=", "out_dir '.' is the folder you are in or one above it"),
    ("train", "... --out_dir=..", "out_dir '..' is the folder you are in or one above it"),
    ("train", "... --out_dir=stranger", "a config.json that is not from a run; name another folder with --out_dir"),
    ("train", "... --out_dir=weights", "weights holds a model-1.pt that is not from a run; name another folder"),
    ("train", "... --out_dir=latin", "out_dir latin cannot be a folder: "),
    ("train", "... --out_dir=latin/run", "latin is a file"),
    ("train", "... --causal_method=ruter", "--causal_method must be one of predictor, router; got 'ruter'; did you"),
    ("train", "... --selection=stochastic", "unknown option --selection; use --variant"),
    # nanoGPT's presets and options.
    ("train", "config/train_shakespeare_char.py", "did you mean config/shakespeare_mod.py?"),
    ("train", "config/train_gpt2.py", "did you mean config/owt_dense_124m.py?"),
    ("train", "shakespeare_mod.py", "did you mean config/shakespeare_mod.py?"),
    ("train", "shakespeare_mod", "did you mean config/shakespeare_mod.py?"),
    ("train", f"... --gradient_accumulation_steps={10**18}", "must be a number from 1 to 2**53, got 1000"),
    ("sample", f"--out_dir=run --num_samples={10**15}", "sample.py: out of memory; take fewer samples"),
    ("train", f"... --n_embd={10**18}", "train.py: out of memory (Storage size"),
    ("train", "... --init_from=resume", "init_from is the folder of a model; for resume, use --resume"),
    ("train", "... --init_from=scratch", "for scratch, leave it out"),
    ("train", "... --init_from=gpt2-xl", "run python -m support.gpt2 --model=gpt2-xl --out_dir=out-gpt2-xl, then"),
    ("train", "... --always_save_checkpoint=True", "leave it out, every evaluation saves a checkpoint"),
    ("train", "... --lr_decay_iters=5000", "leave it out, the learning rate decays until the end of the run"),
    ("train", "... --wandb_log=True", "use --wandb=PROJECT"),
    ("train", "... --backend=nccl", "leave it out, it follows from the device"),
    ("train", "... --device=gpu", "known names are cpu, cuda, cuda:1 and mps); --device=auto picks"),
    ("train", "nanogpt.py", "nanogpt.py: unknown option 'wandb_run_name'; leave it out, a run is named after its out"),
    ("sample", "--init_from=resume", "unknown option --init_from; name the model's folder with --out_dir"),
    ("sample", "--compile=False", "unknown option --compile; leave it out, sampling is not compiled"),
    ("train", "... --dtype=float8", "--dtype must be one of auto, float32, bfloat16, float16; got 'float8'"),
    ("train", "... --device=tpu9", "device 'tpu9' cannot be used here"),
    ("train", "... --device=meta", "device 'meta' cannot be used here"),
    ("train", "... --capacity=12.5", "capacity is a fraction in (0, 1], got 12.5; for 12.5% write 0.125"),
    ("train", "... --batch_size=0", "batch_size must be a number from 1 to 2**53, got 0"),
    ("train", "... --learning_rate=nan", "learning_rate must be a number from 0 to 2**53, got nan"),
    ("train", "... --seed=18446744073709551616", "seed must be a number from 0 to 2**53, got 18446744073709551616"),
    ("train", "... --beta2=1", "beta2 must be in [0, 1), got 1.0"),
    ("train", "... --max_iters=0", "set the length of the run with --max_iters or --flop_budget"),
    ("train", "... --flop_budget=1", "flop_budget 1 is less than one step, which costs"),
    ("train", "... --block_size=600", "has 500 tokens, block_size 600 needs at least 601; use a longer text or"),
    ("train", "... --predictor_hidden=10000000000000", "halve --batch_size and double --gradient_accumulation_steps"),
    ("train", "... --out_dir=caf\udce9", "--out_dir expects a text in UTF-8, got 'caf\\udce9'"),
    ("train", "... --vocab_size=7", "vocab_size 7 is smaller than the data set's vocabulary, 28"),
    ("train", "... --dataset=shakespear_char", "no data set 'shakespear_char'; data/ has "),
    ("train", "... --dataset=set_cut", "is damaged (meta.json promises"),
    ("train", "... --dataset=set_odd", "is damaged ("),
    ("train", "... --dataset=set_none", "is damaged ("),
    ("train", "... --dataset=set_flipped", "SHA-256 of train.bin is not the one in meta.json); run prepare.py again"),
    ("train", "... --dataset=set_json", "is damaged ("),
    ("train", "... --dataset=set_dtype", "meta.json gives the type '<u4', this version reads '<u2'"),
    ("train", "... --dataset=set_vocab", "(vocab_size is 29, the vocabulary has 28 characters); run prepare.py again"),
    ("train", "... --dataset=set_tokenizer", "(the tokenizer is 'bpe', this version has char and gpt2); run prepare"),
    ("train", "... --dataset=set_words", "(the vocabulary is no list of characters); run prepare.py again"),
    ("train", "... --dataset=set_edited", "(the SHA-256 of meta.json is not the one that it states); run prepare.py"),
    ("train", "... --dataset=set_lines", "(meta.json promises x \u241b[2J tokens, the files hold "),
    ("train", "... --dataset=set_nested", "is damaged ("),
    ("train", "... --dataset=set_list", "is damaged ("),
    ("train", "... --dataset=set_beyond", "val.bin holds the token 28, beyond vocab_size 28"),
    ("train", "... --eval_only --out_dir=none", "no checkpoint"),
    ("train", "... --eval_only --out_dir=run --dataset=other_set", "name the run's data set with --dataset"),
    ("train", "--eval_only --out_dir=run --dataset=other_set", "trained on 'text.txt', but other_set holds 'other'"),
    ("train", "--eval_only --out_dir=run --capacity=0.5", "is not the run's (0.125) and has no effect with --eval"),
    ("train", "--resume --out_dir=run --init_from=dense", "is not the run's ('') and has no effect with --resume"),
    ("train", "resumes.py", "resume belongs on the command line, not in a preset; run train.py --resume"),
    ("train", "... --staged", "staged True has no effect without experts"),
    ("train", "... --n_noop=2", "n_noop 2 has no effect without experts"),
    ("train", "... --route_every=0 --n_expert=2", "n_expert 2 has no effect in a dense GPT"),
    ("train", "... --eval_only --out_dir=run_flipped", "is damaged: its SHA-256 is not the one in best.json"),
    ("train", "--resume", "has no config.json of a run; name the run's folder with --out_dir, one of "),
    ("train", "--resume --out_dir=stranger", "nothing to resume in stranger"),
    ("train", "--resume --out_dir=run_nothing", "no checkpoint"),
    ("train", "--resume --out_dir=run_resume", "is damaged: it is not the JSON of a checkpoint"),
    ("train", "--resume --out_dir=run --n_layer=3", "another model: n_layer was 2, now 3. Resume with its own options"),
    ("train", "--resume --out_dir=run --batch_size=8", "other batches: batch_size was 4, now 8. Resume with its own"),
    ("train", "--resume --out_dir=run --max_iters=2", "is at step 3, beyond max_iters 2; raise --max_iters"),
    ("train", "--resume --out_dir=run --dataset=other_set", "trained on 'text.txt', not on 'other'; name its data set"),
    ("train", "typo.py", "unknown option 'learning_rat'; did you mean learning_rate?"),
    ("train", "text.py", "n_layer expects a whole number in digits, got 'four'"),
    ("train", "fraction.py", "n_layer expects a whole number in digits, got 4.5"),
    ("train", "truth.py", "n_layer expects a whole number in digits, got True"),
    ("train", "nothing.py", "dropout expects a number, got None"),
    ("train", "number.py", "out_dir expects a text in UTF-8, got 3"),
    ("train", "cpu_typo.py", "unknown option 'n_layr'; did you mean n_layer?"),
    ("train", "cpu_number.py", "cpu must be a dict of options, got 3"),
    ("train", "syntax.py", "is not a valid preset: SyntaxError"),
    ("train", "name.py", "is not a valid preset: NameError: name 'six' is not defined"),
    ("train", "exits.py", "is not a valid preset: SystemExit: gone"),
    ("sample", "--out_dir=none", "no checkpoint"),
    ("sample", "--out_dir=run --temprature=1", "unknown option --temprature; did you mean --temperature?"),
    ("sample", "--out_dir=run --start=Q#a", "does not know ['#', 'Q'] in the prompt; it knows '\\n abc"),
    ("sample", "--out_dir=run --start=FILE:none", "cannot read the prompt file none"),
    ("sample", "--out_dir=run --temperature=-1", "temperature must be a number from 0 to 2**53, got -1.0"),
    ("sample", "--out_dir=run --num_samples=0", "num_samples must be a number from 1 to 2**53, got 0"),
    ("sample", "--out_dir=run --top_p=0", "top_p is a probability in (0, 1], got 0"),
    ("sample", "--out_dir=run --device=tpu9", "device 'tpu9' cannot be used here"),
    ("sample", "--out_dir=run --routing_map=a.bmp", "routing_map is a file that ends with .png or .svg or .pdf, got"),
    ("sample", "--out_dir=run --depth_svg=a.png", "depth_svg is a file that ends with .svg, got a.png"),
    ("sample", "--out_dir=run --depth_svg=a.svg --routing_map=a.svg", "depth_svg and routing_map cannot both be a.svg"),
    ("sample", "--out_dir=run --depth_svg=none/a.svg", "there is no folder none; make it first"),
    ("sample", "--out_dir=run --html=a.htm", "html is a file that ends with .html, got a.htm"),
    ("sample", "--out_dir=run --routing_map=folder.png", "cannot write the picture"),
    ("sample", "--out_dir=dense --show_depth", "holds a dense model, in which every token goes through every block"),
    ("sample", "--out_dir=dense --routing_map=a.png", "holds a dense model"),
    ("sample", "--out_dir=dense --html=a.html", "holds a dense model"),
    ("sample", "--out_dir=run_cut", "is damaged: its SHA-256 is not the one in best.json"),
    ("sample", "--out_dir=run_flipped", "is damaged: its SHA-256 is not the one in best.json"),
    ("sample", "--out_dir=run_gone", "is missing, best.json needs it; train again or use another checkpoint"),
    ("sample", "--out_dir=run_json", "is damaged: it is not the JSON of a checkpoint; train again or use another"),
    ("sample", "--out_dir=run_list", "is damaged: it is not the JSON of a checkpoint"),
    ("sample", "--out_dir=run_edited", "best.json is damaged: its SHA-256 differs from the one it states"),
    ("sample", "--out_dir=run_format", "has format 99, this version of the code reads 2 to 4; train again"),
    ("sample", "--out_dir=run_swapped", "is damaged: its SHA-256 is not the one in best.json"),
    ("sample", "--out_dir=run_shape", "do not fit together"),
    ("sample", "--out_dir=run_code", "holds no tensors that can be loaded safely"),
    ("bench", "--repeats=0", "repeats must be a number from 1 to 2**53, got 0"),
    ("bench", "--new_tokens=256", "new_tokens must leave room for a prompt in block_size 256; make it smaller"),
    ("bench", "--against=96", "against is layers x width, the width in heads of 64, such as 1x64; got '96'"),
    ("bench", "--against=1x96", "against is layers x width, the width in heads of 64, such as 1x64; got '1x96'"),
    ("bench", "--part=all", "part must be one of both, training, sampling; got 'all'"),
    ("bench", "--route_every=7", "route_every 7 routes none of 6 blocks; use more blocks"),
    ("bench", "--capacity=2", "capacity is a fraction in (0, 1], got 2; for 2% write 0.02"),
    ("bench", "--part=training --device=cpu --batch_size=1000000000000", "; take a smaller --batch_size or model"),
    ("bench", "--variant=no_gate", "sampling is measured for the paper's MoD only; with experts"),
    ("bench", "--check --device=tpu9", "device 'tpu9' cannot be used here"),
    ("plot", "none", "none is not the out_dir of a run: it needs config.json and metrics.jsonl"),
    ("plot", "run_metrics", "run_metrics is not the out_dir of a run"),
    ("plot", "stranger", "stranger is not the out_dir of a run"),
    ("plot", "run --out=losses.bmp", "--out is a .png, .pdf or .svg file, got losses.bmp"),
    ("plot", "run --out=folder.png", "cannot write the picture folder.png"),
    ("plot", "run --out=none/losses.png", "cannot write the picture none/losses.png"),
    ("prepare", "--input none --out new", "cannot read --input none"),
    ("prepare", "--input empty --out=", "the data set's folder is an empty name; name one, such as data/mine"),
    ("prepare", "--input latin", "latin is not Tiny Shakespeare; name a folder for it, such as --out data/my_text"),
    ("prepare", "--input empty --out new", "empty holds 0 characters, too few to split into train and val"),
    ("prepare", "--input wide --out new", "wide has 65,537 different characters, at most 65,536 fit into uint16"),
    ("prepare", "--input other --out latin", "cannot write to latin"),
]


def argv_of(arguments):
    return shlex.split(arguments.replace("...", f"{RUN} --out_dir=new"))


def files_in(place):
    """Contents of all files except locks, which stay beside an out_dir."""
    paths = (path for path in place.rglob("*") if path.suffix != ".lock")
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize(("command", "arguments", "message"), ROWS, ids=[f"{row[0]} {row[1]}" for row in ROWS])
def test_a_mistake_prints_one_line_and_changes_no_file(place, command, arguments, message, monkeypatch):
    monkeypatch.chdir(place)
    before = files_in(place)
    assert message in told(COMMANDS[command], argv_of(arguments))
    assert files_in(place) == before


@pytest.mark.parametrize("row", [ROWS[0], ROWS[2], *(row for row in ROWS if row[1] in ("--out_dir=run_code", "none"))])
def test_as_a_command_it_is_one_line_on_stderr_and_exit_code_1(place, row):
    command, arguments, message = row
    line = [sys.executable, str(ROOT / f"{command}.py"), *argv_of(arguments)]
    done = subprocess.run(line, cwd=place, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{command}.py: ")


def test_no_script_of_another_folder_is_run(tiny, tmp_path, monkeypatch):
    """A data set's name may come from a stranger's checkpoint."""
    (tmp_path / "gift").mkdir()
    (tmp_path / "gift" / "prepare.py").write_text("raise SystemExit('the script ran')\n")
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(data_module, "DATA", tmp_path / "data")
    for name in (str(tmp_path / "gift"), "../gift"):
        options = dataclasses.asdict(dataclasses.replace(tiny, dataset=name))
        assert "no data set" in told(train, [f"--{name}={value}" for name, value in options.items()])


def test_a_failed_preparation_is_reported(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "DATA", tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "prepare.py").write_text("def main(argv):\n    raise SystemExit('no download worked')\n")
    options = dataclasses.asdict(dataclasses.replace(tiny, dataset="here"))
    assert "no download worked" in told(train, [f"--{name}={value}" for name, value in options.items()])
    assert not Path(tiny.out_dir).exists()


def test_without_any_download_prepare_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(prepare.urllib.request, "urlopen", offline)
    out = ["--out", str(tmp_path / "set")]
    assert "the package index failed too (no route to host); pass a text file" in told(prepare, out)
    assert not (tmp_path / "set").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes into head")
def test_a_reader_that_closes_the_pipe_ends_sampling_silently(place):
    command = [sys.executable, str(ROOT / "sample.py"), "--out_dir=run", "--device=cpu", "--max_new_tokens=3000"]
    process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_our_own_bugs_keep_their_traceback(tiny, monkeypatch):
    monkeypatch.setattr(train, "evaluate", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main([f"--{name}={value}" for name, value in dataclasses.asdict(tiny).items()])


MOVED = {
    "support/gpt2.py": "support.gpt2",
    **{
        f"experiments/{name}.py": f"experiments.{name}"
        for name in ("isoflop", "bench", "routing", "known_depth", "recall", "readme")
    },
    **{
        f"data/{name}/prepare.py": f"data.{name}.prepare"
        for name in ("openwebtext", "shakespeare", "shakespeare_char", "shakespeare_works")
    },
}


@pytest.mark.parametrize("path", MOVED)
def test_an_old_command_prints_the_command_that_replaces_it(path, tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / path), "all"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    (line,) = done.stderr.splitlines()
    assert line.endswith(f": python -m {MOVED[path]}")
    assert not list(tmp_path.iterdir())


# Consoles, paths and folders


def test_a_console_that_lacks_characters_stops_no_command(place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shutil.copy(place / "other", "\u6c34.txt")
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii", write_through=True))
    prepare.main(["--input", "\u6c34.txt", "--out", "set"])
    sys.stdout.reconfigure(errors="strict")
    train.main([*RUN.split(), "--out_dir=\u6c34"])
    sys.stdout.reconfigure(errors="strict")
    plot.main(["\u6c34"])
    sys.stdout.reconfigure(errors="strict")
    sample.main(["--out_dir=\u6c34", "--device=cpu", "--max_new_tokens=3"])
    lines = printed.getvalue().decode("ascii")
    assert "?.txt: 1,450 characters" in lines and "?.txt: 1,305 train" in lines and "| ? | " in lines


def test_a_closed_stderr_does_not_end_training(place, monkeypatch, tmp_path):
    """`2>&-`"""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "stderr", None)
    train.main([*RUN.split(), f"--out_dir={tmp_path / 'run'}"])
    assert checkpoint.read(tmp_path / "run", "last")["step"] == 3


def test_control_characters_in_names_never_reach_the_terminal(place, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    name = "red\x1b[31m"
    shutil.copy(place / "other", name)
    prepare.main(["--input", name, "--out", "set"])
    train.main([*RUN.split(), f"--out_dir={name}-run"])
    train.main([*RUN.split(), f"--init_from={name}-run"])
    plot.main([f"{name}-run"])
    printed = capsys.readouterr().out + told(train, [*RUN.split(), f"--dataset={name}-none"])
    assert printed.count("red\N{SYMBOL FOR ESCAPE}[31m") >= 6 and "\x1b" not in printed


def test_home_is_expanded_in_paths_only(monkeypatch, tmp_path):
    monkeypatch.setenv("USERPROFILE" if os.name == "nt" else "HOME", str(tmp_path))
    config = load(train.TrainConfig, ["--out_dir=~/a", "--dataset=~/b", "--init_from=~/c", "--wandb=~d"], "")
    expected = *(str(tmp_path / name) for name in "abc"), "~d"
    assert (config.out_dir, config.dataset, config.init_from, config.wandb) == expected
    config = load(
        sample.SampleConfig, ["--start=~", "--depth_svg=~/a.svg", "--routing_map=~/a.png", "--html=~/a.html"], ""
    )
    expected = "~", *(str(tmp_path / name) for name in ("a.svg", "a.png", "a.html"))
    assert (config.start, config.depth_svg, config.routing_map, config.html) == expected
    shutil.copy(ROOT / "results/shakespeare_cpu/mod-1/config.json", tmp_path)
    shutil.copy(ROOT / "results/shakespeare_cpu/mod-1/metrics.jsonl", tmp_path)
    plot.main(["~", "--out=~/losses.png"])
    (tmp_path / "text").write_text("to be or not to be")
    prepare.main(["--input=~/text", "--out=~/set"])
    assert (tmp_path / "losses.png").exists() and (tmp_path / "set" / "meta.json").exists()


def test_a_command_to_copy_is_quoted_for_this_shell(monkeypatch):
    words = ["train.py", "--out_dir=it's a run"]
    quoted = []
    for name in ("posix", "nt"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "name", name)
            quoted.append(command(*words))
    assert shlex.split(quoted[0]) == words and quoted[1] == 'train.py "--out_dir=it\'s a run"'


def test_a_preset_is_found_from_any_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = load(train.TrainConfig, ["config/shakespeare_mod.py", "--device=cpu"], "", preset=True)
    assert config.out_dir == "out-shakespeare-mod"
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "shakespeare_mod.py").write_text("out_dir = 'mine'")  # a preset in this folder wins
    assert load(train.TrainConfig, ["config/shakespeare_mod.py"], "", preset=True).out_dir == "mine"
