"""
Options of the command-line tools: a dataclass of defaults, a preset file, `--key=value` on the command line.

    python train.py config/shakespeare_mod.py --learning_rate=3e-3

A preset is a Python file that assigns values to option names. It may also assign `cpu`, a dict of options for a machine
without a GPU. Later ones win: defaults, preset, its cpu part, command line.

(Why not tyro: there --resume and --bias=True cannot both work, and a preset cannot come first.)
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import os
import re
import runpy
import shlex
import subprocess
import sys
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
NANOGPT_PRESETS = {
    "train_shakespeare_char": "shakespeare_mod",
    "train_gpt2": "owt_dense_124m",
    "finetune_shakespeare": "shakespeare_finetune",
}
INSTEAD = {  # of options that nanoGPT or an earlier version has
    "selection": "use --variant",
    "always_save_checkpoint": "leave it out, every evaluation saves a checkpoint",
    "lr_decay_iters": "leave it out, the learning rate decays until the end of the run",
    "wandb_log": "use --wandb=PROJECT",
    "wandb_project": "use --wandb=PROJECT",
    "wandb_run_name": "leave it out, a run is named after its out_dir",
    "backend": "leave it out, it follows from the device",
    "lr": "use --learning_rate",
    "init_from": "name the model's folder with --out_dir",  # in sample.py
    "compile": "leave it out, sampling is not compiled",
}
# In these options ~ is expanded.
PATHS = ("out_dir", "dataset", "init_from", "model", "depth_svg", "routing_map", "html")
CONTROL_PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {127: 0x2421}
CONTROL_PICTURES |= {i: rf"\x{i:x}" for i in range(128, 160)}


class UserError(Exception):
    """A user's mistake in one line: got, expected, what to do."""


class Diverged(UserError):
    """A loss or a gradient is not finite."""

    def __init__(self, name, value, step, more=""):
        super().__init__(
            f"the {name} is {value} at step {step:,}{more}: the run diverged; the checkpoints before it stay. "
            "Try a lower --learning_rate, a longer --warmup_iters or --dtype=float32"
        )


def reason_of(error):
    """An error as part of one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextlib.contextmanager
def errors_in_one_line(script, smaller):
    """
    Around a tool's work: a user's mistake ends it with one line on stderr. Our own bugs keep their traceback.

    smaller: what to do when memory runs out.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as by `2>&-`; printing to it would fail
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a console may not have every character; stderr escapes them already
    try:
        yield
    except (UserError, OSError) as error:  # OSError: a full disk, an unreadable file
        sys.exit(f"{script}: {printable(str(error))}")
    except (RuntimeError, MemoryError) as error:
        reason = str(error).split("\n")[0]
        # PyTorch has no error class for this on all devices, only words: of CUDA and MPS, of a CPU, for absurd sizes.
        # The last ones are those of a pool of processes, one of which was killed.
        words = ("out of memory", "alloc_cpu", "Storage size calculation overflowed", "terminated abruptly")
        if not (isinstance(error, MemoryError) or any(part in reason for part in words)):
            raise
        sys.exit(f"{script}: out of memory{f' ({reason})' if reason else ''}; {smaller}")
    except KeyboardInterrupt as stopped:
        if str(stopped):
            with contextlib.suppress(OSError):  # the same Ctrl-C may have ended the program that reads our output
                print(stopped, flush=True)
        sys.exit(130)


def load(options_class, argv, description, preset=False, combine=lambda preset, given: {**preset, **given}):
    """
    Parse a command line into an instance of the dataclass `options_class`. Raises UserError for invalid input.

    preset=True: the first argument may be a preset file. combine: a function of the preset's options and those of the
    command line, two dicts, that returns all options that differ from the defaults.
    """
    fields = {field.name: field for field in dataclasses.fields(options_class)}
    comments = field_comments(options_class)
    wide = functools.partial(argparse.HelpFormatter, max_help_position=32, width=120)
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=wide)
    if preset:
        parser.add_argument("preset", nargs="?", help="a file of options, such as those in config/")
    for field in fields.values():
        choices = get_args(field.type)
        kind = "{" + ",".join(choices) + "}" if choices else field.type.__name__.upper()
        text = f"{comments[field.name]} (default: {field.default!r})".replace("%", "%%")
        flag = {"nargs": "?", "const": "True"} if field.type is bool else {}  # --bias is short for --bias=True
        parser.add_argument(f"--{field.name}", metavar=kind, default=argparse.SUPPRESS, help=text, **flag)
    given, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("--"):
        raise UserError(f"unexpected argument {unknown[0]!r}; options are written --name=value")
    if unknown:
        name = unknown[0].split("=")[0]
        hint = _nearest(name, [f"--{field}" for field in fields]) or "; --help lists them all"
        raise UserError(f"unknown option {name}{hint}")
    given = vars(given)
    path = given.pop("preset", None)
    given = {name: convert(fields[name], value, f"--{name}") for name, value in given.items()}

    in_preset, in_cpu_part = _read_preset(path, fields) if path is not None else ({}, {})
    of_a_run = given.get("resume") or given.get("eval_only")  # its options apply, not the preset's
    if in_cpu_part and not of_a_run and pick_device({**in_preset, **given}.get("device", "auto")) == "cpu":
        in_preset |= in_cpu_part
        shown = {name: value for name, value in in_cpu_part.items() if name not in given}
        smaller = ", ".join(f"{name}={v:g}" if isinstance(v, float) else f"{name}={v}" for name, v in shown.items())
        if shown:
            show(f"On a CPU {path} switches to {smaller}")
    return options_class(**combine(in_preset, given))


def printable(text):
    """Show control characters as pictures: raw, they could clear or recolour the terminal. Newline and tab stay."""
    return text.translate(CONTROL_PICTURES)


def show(line):
    """Print a line with names in it that a user or a file chose."""
    print(printable(line))


def command(*words):
    """A command line to copy, quoted for this platform's shell."""
    return printable(subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words))


def expanded(text):
    """A path, with ~ for the home folder: a shell does not expand it in --name=~/path."""
    return Path(os.path.expanduser(text))  # unlike Path.expanduser, it leaves ~nobody as it is


def field_comments(options_class):
    """The comment after each field of a dataclass, {name: text}. A redeclared field may keep its base's comment."""
    found = {}
    for base in reversed(options_class.__mro__[:-1]):
        found |= dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(base), flags=re.MULTILINE))
    return found


def at_least(least, options, names):
    """Check that the options in `names`, a text, are numbers from `least` to 2**53. Raises UserError."""
    for name in names.split():
        if not least <= getattr(options, name) <= 2**53:
            raise UserError(f"{name} must be a number from {least} to 2**53, got {getattr(options, name)}")


def pick_device(name):
    """`name`, or for "auto" the best that this machine has: cuda, mps, cpu."""
    import torch  # not at the top: the processes that tokenize a large corpus import this file and do not need it

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:100]
        if reason.startswith("Expected one of"):  # PyTorch lists twenty kinds of device
            reason = "known names are cpu, cuda, cuda:1 and mps"
        raise UserError(f"device {name!r} cannot be used here ({reason}); --device=auto picks one that can") from None
    return name


def pick_dtype(name, device):
    """`name`, or for "auto" bfloat16 on a GPU that has it and float32 elsewhere."""
    import torch

    if name != "auto":
        return name
    has_it = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_it else "float32"


def _read_preset(path, fields):
    """The options in a preset file, and those in its cpu part."""
    # config/NAME.py means ours, in whatever folder the command runs.
    file = next((file for file in (expanded(path), ROOT / path) if file.is_file()), None)
    if file is None:
        name = NANOGPT_PRESETS.get(Path(path).stem, Path(path).stem)
        near = difflib.get_close_matches(name, [preset.stem for preset in (ROOT / "config").glob("*.py")], n=1)
        raise UserError(f"no preset file {path}" + (f"; did you mean config/{near[0]}.py?" if near else ""))
    try:
        names = runpy.run_path(str(file))
    except (Exception, SystemExit) as error:
        raise UserError(f"{path} is not a valid preset: {reason_of(error)}") from None
    names = {n: value for n, value in names.items() if not (n.startswith("__") or inspect.ismodule(value))}
    cpu = names.pop("cpu", {})
    if not isinstance(cpu, dict):
        raise UserError(f"{path}: cpu must be a dict of options, got {cpu!r}")
    for name in (*names, *cpu):
        if name not in fields:
            raise UserError(f"{path}: unknown option {name!r}{_nearest(name, fields)}")
    return tuple(
        {name: convert(fields[name], value, f"{path}: {name}") for name, value in part.items()} for part in (names, cpu)
    )


def convert(field, value, where):
    """`value`, a text from the command line or a value from Python, as the field's type."""
    if choices := get_args(field.type):
        matches = [choice for choice in choices if choice.lower() == str(value).lower()]
        if not matches:
            hint = _nearest(value, choices)
            raise UserError(f"{where} must be one of {', '.join(choices)}; got {str(value)!r}{hint}")
        return matches[0]
    expected = {bool: "True or False", int: "a whole number in digits", float: "a number", str: "a text in UTF-8"}
    try:
        if field.name in PATHS and isinstance(value, (str, os.PathLike)):
            value = os.path.expanduser(value)
        if field.type is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if isinstance(value, str):
            value.encode("utf-8")  # it goes into JSON files, and a folder's name may be bytes that are no text
        elif isinstance(value, bool) or not isinstance(value, {int: Integral, float: Real}.get(field.type, str)):
            raise ValueError  # Integral and Real: numpy's numbers are welcome
        return field.type(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise UserError(f"{where} expects {expected[field.type]}, got {value!r}") from None


def checked(options):
    """A copy of a dataclass of options, each value as its field's type. Raises UserError for one that does not fit."""
    plain = (bool, int, float, str)  # a subclass may add fields of other types
    fields = [f for f in dataclasses.fields(options) if f.type in plain or get_origin(f.type) is Literal]
    return dataclasses.replace(options, **{f.name: convert(f, getattr(options, f.name), f.name) for f in fields})


def _nearest(name, known):
    instead = INSTEAD.get(str(name).removeprefix("--"), "")
    options = {option.strip("-") for option in known}
    if instead and options.issuperset(re.findall(r"--(\w+)", instead)):  # a command may lack what it names
        return f"; {instead}"
    longer = [option for option in known if str(name).strip("-") and option.startswith(str(name))]
    found = longer or difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {found[0]}?" if found else ""


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)
