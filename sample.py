"""
Sample text from a checkpoint that train.py wrote, with causal routing:

    python sample.py --out_dir=out-shakespeare-mod
    python sample.py --start="ROMEO:" --num_samples=3 --temperature=0.8

Needs the checkpoint alone, not the data set.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import checkpoint
from configurator import UserError, load, option, pick_device


@dataclass
class SampleConfig:
    out_dir: str = option("out-shakespeare-mod", "folder of the run; its best checkpoint is used")
    start: str = option("", "the text to continue, or FILE:path of a file that holds it; empty: a new line")
    num_samples: int = option(1, "how many continuations")
    max_new_tokens: int = option(500, "length of each continuation in tokens")
    temperature: float = option(0.8, "below 1 safer, above 1 wilder; 0: always the likeliest token")
    top_k: int = option(0, "sample among the top_k likeliest characters only; 0: all. Nothing to do with routing")
    seed: int = option(1337, "the same seed gives the same text")
    device: str = option("auto", "auto (the best there is), cpu, cuda, mps, ...")


def main(argv=None):
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a Windows console may not know every character
    try:
        for text in sample(load(SampleConfig, argv, __doc__.split(",")[0])):
            print(text, "-" * 80, sep="\n")
    except UserError as error:
        sys.exit(f"sample.py: {error}")


def sample(config):
    """The texts, prompt included, as a list of num_samples strings."""
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0), ("top_k", 0), ("seed", 0)):
        if not least <= getattr(config, name) < 2**63:
            raise UserError(f"{name} must be a finite number, at least {least}; got {getattr(config, name)}")
    device = pick_device(config.device)
    model, info = checkpoint.load(Path(config.out_dir), "best", device)
    vocab = info["data"]["vocab"]
    prompt = encode(read_prompt(config.start) or ("\n" if "\n" in vocab else vocab[0]), vocab)
    idx = torch.tensor([prompt] * config.num_samples, device=device)
    idx = model.generate(idx, config.max_new_tokens, config.temperature, config.top_k or None, config.seed)
    return ["".join(vocab[token] for token in row) for row in idx.tolist()]


def read_prompt(start):
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the prompt file {path} is not UTF-8; convert it first") from None


def encode(text, vocab):
    ids = {character: token for token, character in enumerate(vocab)}
    unknown = sorted(set(text) - set(ids))
    if unknown:
        raise UserError(f"the model does not know {unknown} in the prompt; it knows {''.join(vocab)!r}")
    return [ids[character] for character in text]


if __name__ == "__main__":
    main()
