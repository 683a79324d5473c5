"""
Convert GPT-2's weights from Hugging Face to a checkpoint of ours:

    python -m support.gpt2 --model=gpt2 --out_dir=out-gpt2
    python sample.py --out_dir=out-gpt2 --start="The depth of a thought"
    python train.py config/shakespeare_finetune.py

Needs transformers: pip install transformers. --model is gpt2 (124M, downloads 0.5 GB), gpt2-medium, gpt2-large,
gpt2-xl, or the folder of a model that transformers saved.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it from the top of the repository: python -m support.gpt2")

from dataclasses import dataclass
from pathlib import Path

from mod import GPT, GPTConfig
from support import checkpoint
from support.options import UserError, errors_in_one_line, load, reason_of, show

# Revisions of the models' repositories. A name alone would download whatever is newest.
REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
# mod.py has these values of GPT-2 built in.
EXPECTED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
    "add_cross_attention": False,
}


@dataclass
class ConvertConfig:
    model: str = "gpt2"  # gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the folder of a saved model
    out_dir: str = "out-gpt2"  # a new folder for the checkpoint


def main(argv=None):
    with errors_in_one_line("gpt2.py", "use a smaller --model"):
        convert(load(ConvertConfig, argv, __doc__.split(":")[0]))


def convert(config):
    out_dir = Path(config.out_dir)
    if out_dir.exists():
        raise UserError(f"{out_dir} exists already; name another folder with --out_dir")
    folder = Path(config.model)
    if not folder.is_dir() and config.model not in REVISIONS:
        raise UserError(f"--model is {', '.join(REVISIONS)} or the folder of a saved model, got {config.model}")
    # Safetensors, because a pickle may hold code.
    pinned = {} if folder.is_dir() else {"revision": REVISIONS[config.model], "use_safetensors": True}
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise UserError("this needs transformers: pip install transformers") from None
    try:
        theirs = GPT2LMHeadModel.from_pretrained(config.model, **pinned)
    except Exception as error:  # the hub, damaged files and other kinds of models all raise their own
        raise UserError(f"{config.model} could not be loaded ({reason_of(error)}); --help names the models") from None
    model = from_transformers(theirs)
    out_dir.mkdir(parents=True)
    data = {"tokenizer": "gpt2", "vocab_size": model.config.vocab_size, "source": config.model}
    checkpoint.save_best(out_dir, model, {"data": data})
    show(f"{out_dir}: {config.model}, {model.num_parameters():,} parameters")


def from_transformers(theirs):
    """Our dense GPT with the weights of a transformers GPT2LMHeadModel. Raises UserError for another architecture."""
    c = theirs.config
    other = [f"{name} {getattr(c, name)!r}" for name, value in EXPECTED.items() if getattr(c, name) != value]
    if c.n_inner not in (None, 4 * c.n_embd):
        other.append(f"n_inner {c.n_inner}")
    if other:
        raise UserError(f"this is not GPT-2's architecture: {', '.join(other)}")
    sizes = dict(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, vocab_size=c.vocab_size, block_size=c.n_positions)
    model = GPT(GPTConfig(**sizes, bias=True, route_every=0))
    weights = {name: w for name, w in theirs.state_dict().items() if name in model.state_dict()}
    for name, w in weights.items():
        # Theirs compute x @ w, nn.Linear computes x @ w.T.
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weights[name] = w.T
    model.load_state_dict(weights)
    return model


if __name__ == "__main__":
    main()
