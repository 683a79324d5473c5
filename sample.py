"""
Sample text from a trained model, with causal routing and a KV cache:

    python sample.py --start="ROMEO:"                      # the small model that comes with the repository
    python sample.py --out_dir=out-shakespeare-mod         # a model that train.py trained
    python sample.py --show_depth --routing_map=map.png

This needs the checkpoint but not the data set. In a script or notebook, call `load`.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from cache import KVCache, set_dtype, stream
from support import checkpoint, depth, options, page
from support.data import text_of, tokenizer_of
from support.files import write_whole
from support.options import UserError, at_least, errors_in_one_line, expanded, pick_device, pick_dtype

PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "shakespeare_mod"


@dataclass
class SampleConfig:
    out_dir: str = ""  # folder of a run, whose best checkpoint is used; empty: the model that comes with the repository
    start: str = ""  # the text to continue, or FILE:path of a file that holds it; empty: a new line
    num_samples: int = 1  # how many continuations; the first is printed as it comes
    max_new_tokens: int = 500  # length of each continuation in tokens
    temperature: float = 0.8  # below 1 safer, above 1 wilder; 0: always the likeliest token
    top_k: int = 0  # sample among the top_k likeliest tokens only; 0: all. Nothing to do with routing
    top_p: float = 1.0  # sample among the fewest likeliest tokens whose probabilities add up to this; 1: all
    seed: int = 1337  # the same seed gives the same text
    show_depth: bool = False  # colour each token by how many routed blocks processed it
    depth_svg: str = ""  # draw the first sample, coloured as by --show_depth, to this .svg file
    routing_map: str = ""  # draw which routed block processed which of its tokens to this .png, .svg or .pdf file
    html: str = ""  # write the first sample as a page to explore in a browser to this .html file
    device: str = "auto"  # auto (the best available), cpu, cuda, mps, ...
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the weights; auto: bfloat16 if the GPU has it


def main(argv=None):
    with errors_in_one_line("sample.py", "take fewer samples at once by a smaller --num_samples"):
        try:
            sample(options.load(SampleConfig, argv, __doc__.split(",")[0]))
        except BrokenPipeError:  # the reader closed the pipe, e.g. `| head`
            # Otherwise Python prints an error when it flushes stdout at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)


def load(out_dir=PRETRAINED, device="auto"):
    """
    The best model of the run in out_dir (a path or string), ready to sample from, and its tokenizer, which has
    `encode` (text to a list of token ids) and `decode` (token ids to text). Without out_dir, the small model that comes
    with the repository. Raises UserError for a folder without an intact checkpoint.
    """
    model, info = checkpoint.load(expanded(out_dir), "best", pick_device(device))
    return model, tokenizer_of(info["data"])


def sample(config):
    """Print the samples, the first as it comes; returns the texts, prompt included, a list of num_samples strings."""
    config = options.checked(config)
    names = ("depth_svg", "routing_map", "html")
    pictures = {name: Path(getattr(config, name)) for name in names if getattr(config, name)}
    check(config, pictures)
    device = pick_device(config.device)
    model, tokenizer = load(config.out_dir or PRETRAINED, device)
    set_dtype(model, getattr(torch, pick_dtype(config.dtype, device)))
    layers = [layer for layer in range(model.config.n_layer) if model.config.is_routed(layer)]
    if not layers and (config.show_depth or pictures):
        raise UserError(
            f"{config.out_dir} holds a dense model, in which every token goes through every block; "
            "drop --show_depth, --depth_svg, --routing_map and --html"
        )
    if config.html:
        page.check(model)
    prompt = tokenizer.encode(read_prompt(config.start)) or tokenizer.default_prompt
    if max(prompt) >= model.config.vocab_size:
        raise UserError(f"the model in {config.out_dir} has fewer tokens than its tokenizer; use another one")

    printer = depth.DepthPrinter(len(layers)) if config.show_depth else depth.PlainPrinter()
    printer.legend()
    try:
        texts, taken, seconds, cache_bytes, ids = follow(model, prompt, tokenizer, config, printer)
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise UserError(f"the model in {config.out_dir} predicts NaN or infinity; use another one") from None
    unread = len(texts[0]) - taken.size(2)
    depths = [[None] * unread + row for row in taken.sum(dim=0).tolist()]
    for text, row in zip(texts[1:], depths[1:]):
        print("-" * 80)
        printer.add_all(text, row)
        printer.close()
    routed = f"; the routed blocks took {taken.double().mean():.1%} of the tokens" if layers else ""
    print(
        f"{config.num_samples} x {config.max_new_tokens} tokens in {seconds:.2f} s, "
        f"{config.num_samples * config.max_new_tokens / seconds:,.0f} tokens/s; "
        f"KV cache {cache_bytes / 1e6:.2f} MB{routed}",
        file=sys.stderr,
    )
    try:
        if config.depth_svg:
            depth.save_svg(texts[0], depths[0], len(layers), pictures["depth_svg"])
        if config.routing_map:
            depth.routing_map(taken[:, 0].numpy(), texts[0][unread:], layers, pictures["routing_map"])
        if config.html:
            whole = page.page(model, tokenizer, ids[unread:])
            write_whole(pictures["html"], lambda file: file.write(whole.encode("utf-8")))
    except (OSError, ValueError) as error:  # ValueError: matplotlib's, for a text too long to draw
        raise UserError(f"cannot write the picture: {error}") from None
    return ["".join(text) for text in texts]


def follow(model, prompt, tokenizer, config, printer):
    """
    Generate, and print the first text as it comes.

    Returns the texts as lists of token texts; which routed block took which token, bool (routed blocks, num_samples,
    tokens read); the seconds spent after the prompt was read; the cache's peak size in bytes; the first text's tokens.
    """
    cache = KVCache(model.config, config.num_samples)
    decoders = [tokenizer.decoder() for _ in range(config.num_samples)]
    texts = [[decode(t) for t in prompt] for decode in decoders]
    taken, seconds, cache_bytes, ids = [], 0.0, 0, list(prompt)
    # A token's depth is known only when the next step reads it. So ask for one token more, and print one step behind.
    options = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "seed")}
    new_tokens = stream(model, [prompt] * config.num_samples, config.max_new_tokens + 1, cache, **options)
    clock = time.perf_counter()
    for i, tokens in enumerate(new_tokens):
        new = cache.n_read[0] if i == 0 else 1  # tokens read in this step: the prompt (at most a window of it), then 1
        tokens, decisions = fetch(model, tokens, new)
        if i > 0:
            seconds += time.perf_counter() - clock
        cache_bytes = max(cache_bytes, cache.nbytes)
        taken.append(decisions)
        if i == 0:
            printer.add_all(texts[0][:-new], [None] * (len(prompt) - new))
        printer.add_all(texts[0][-new:], taken[-1][:, 0].sum(dim=0).tolist())
        if i < config.max_new_tokens:
            ids.append(tokens[0])
            for text, decode, t in zip(texts, decoders, tokens):
                text.append(decode(t))
        clock = time.perf_counter()
    printer.close()
    return texts, torch.cat(taken, dim=2), seconds, cache_bytes, ids


def fetch(model, tokens, new):
    """
    Bring the result of a step from the device: its tokens (B,) as a list, and which routed block took which of the
    `new` tokens that it read, bool (routed blocks, B, new).
    """
    decisions = [block.taken[:, -new:] for block in model.routed_blocks]
    step = torch.cat([tokens[:, None], *decisions], dim=1).cpu()  # in one copy, because each waits for the device
    return step[:, 0].tolist(), step[:, 1:].bool().unflatten(1, (len(decisions), new)).transpose(0, 1)


def check(config, pictures):
    at_least(1, config, "num_samples max_new_tokens")
    at_least(0, config, "temperature top_k seed")
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p is a probability in (0, 1], got {config.top_p}")
    endings = {"depth_svg": (".svg",), "routing_map": (".png", ".svg", ".pdf"), "html": (".html",)}
    for name, path in pictures.items():
        if path.suffix.lower() not in endings[name]:
            raise UserError(f"{name} is a file that ends with {' or '.join(endings[name])}, got {path}")
        if not path.parent.is_dir():
            raise UserError(f"{name}: there is no folder {path.parent}; make it first")
    if len(set(pictures.values())) < len(pictures):
        raise UserError(f"depth_svg and routing_map cannot both be {pictures['depth_svg']}; name two files")


def read_prompt(start):
    if not start.startswith("FILE:"):
        return start
    path = expanded(start.removeprefix("FILE:"))
    try:
        return text_of(path.read_bytes(), f"the prompt file {path}")
    except OSError as error:
        raise UserError(f"cannot read the prompt file {path}: {error.strerror}") from None


if __name__ == "__main__":
    main()
