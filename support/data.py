"""
Data sets and tokenizers. A data set is a folder that a prepare.py wrote:

    train.bin, val.bin   token ids as little-endian uint16, nothing else
    meta.json            tokenizer, counts, hashes, source; written last

This file does not import PyTorch at the top, because the processes that tokenize a large corpus do not need it.
"""

import codecs
import contextlib
import hashlib
import json
import runpy
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import tiktoken

from support.files import sha256_of, sha256_of_json, write_json
from support.options import UserError, expanded, printable, reason_of, show

DATA = Path(__file__).resolve().parents[1] / "data"
SPLITS = ("train", "val")
DTYPE = "<u2"
GPT2_FILE = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"


def commit(out, parts, meta):
    """
    Move the files parts["train"] and parts["val"], on the same disk, into the folder `out` and write its meta.json.

    meta: tokenizer, vocab_size, source and text_sha256. Returns the contents of meta.json: these, counts and hashes.
    """
    sizes = {split: parts[split].stat().st_size // 2 for split in SPLITS}
    meta = {**meta, "tokens": sizes, "dtype": DTYPE, "sha256": {split: sha256_of(parts[split]) for split in SPLITS}}
    if meta["tokenizer"] == "gpt2" and sizes["val"]:  # so that the loss can be given in bits per byte of text
        encoding = gpt2_encoding()
        lengths = [len(encoding.decode_single_token_bytes(token)) for token in range(encoding.n_vocab)]
        lengths[encoding.eot_token] = 0  # it separates documents and is no text
        val = np.memmap(parts["val"], dtype=DTYPE, mode="r")
        meta["val_bytes_per_token"] = float(np.array(lengths)[val].mean())
        del val  # on Windows a mapped file cannot be moved
    temporary = parts["train"].with_name("meta.json.part")
    write_json(temporary, {**meta, "meta_sha256": sha256_of_json(meta)})
    # After a kill in between, the hashes in meta.json do not match, and train.py refuses the data set.
    for split in SPLITS:
        parts[split].replace(out / f"{split}.bin")
    temporary.replace(out / "meta.json")
    return meta


def load(folder, check=True):
    """
    The contents of meta.json, and the splits as arrays of token ids, mapped from the disk.

    Raises UserError for files that are damaged or do not belong together. check=False skips the hashes, which take a
    second for each gigabyte.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        # A data set of an earlier version lacks this hash. It still counts, because OpenWebText takes hours to prepare.
        own = meta.pop("meta_sha256", None)
        if own not in (None, sha256_of_json(meta)):
            raise ValueError("the SHA-256 of meta.json is not the one that it states")
        if meta["dtype"] != DTYPE:
            raise ValueError(f"meta.json gives the type {meta['dtype']!r}, this version reads {DTYPE!r}")
        data = {split: np.memmap(folder / f"{split}.bin", dtype=DTYPE, mode="r") for split in SPLITS}
        lengths = {split: len(tokens) for split, tokens in data.items()}
        if lengths != meta["tokens"]:
            raise ValueError(f"meta.json promises {meta['tokens']} tokens, the files hold {lengths}")
        for split, tokens in data.items():
            if check and hashlib.sha256(tokens).hexdigest() != meta["sha256"][split]:
                raise ValueError(f"the SHA-256 of {split}.bin is not the one in meta.json")
        check_tokens(meta)
        if type(meta["source"]) is not str or type(meta["text_sha256"]) is not str:
            raise TypeError("meta.json does not say where the text is from")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(printable(str(error)).split())[:200]
        raise UserError(f"the data in {folder} is damaged ({reason}); run prepare.py again") from None
    return meta, data


def write(out, splits, meta):
    """Write a data set that fits into memory: splits["train"] and splits["val"] are arrays of token ids."""
    out.mkdir(parents=True, exist_ok=True)
    for left in out.glob(".prepare-*"):  # by a killed prepare.py; a recent one may still be in use
        with contextlib.suppress(OSError):  # another prepare.py may delete it first
            if time.time() - left.stat().st_mtime > 3600:
                shutil.rmtree(left)
    # Each call has its own temporary folder, so two at once do not write the same files.
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=out) as folder:
        parts = {split: Path(folder) / split for split in SPLITS}
        for split, part in parts.items():
            part.write_bytes(np.asarray(splits[split], dtype=DTYPE).tobytes())
        return commit(out, parts, meta)


def folder_of(path):
    """The folder that a user means: data/NAME lies in this repository, whatever folder the command runs in."""
    if not str(path):
        raise UserError("the data set's folder is an empty name; name one, such as data/mine")
    in_repository = str(path).replace("\\", "/").startswith("data/")  # ./data/NAME does not
    return DATA.parent / path if in_repository else expanded(path)


# For training and evaluation


def load_dataset(dataset, block_size, vocab_size=0, check=True):
    """
    The data set's meta.json and its splits as arrays of token ids. Runs the data set's prepare.py if they are missing.

    dataset: a folder below data/, or the path of any folder that a prepare.py wrote. vocab_size: the model's; 0: the
    data set's. check=False as in `load`.
    """
    folders = (DATA / dataset, folder_of(dataset))  # an absolute path stays as it is
    found = (folder for name in ("meta.json", "prepare.py") for folder in folders if (folder / name).is_file())
    folder = next(found, folders[0])
    if not (folder / "meta.json").is_file():
        # Run only the scripts in our data/. With --resume the name comes from a checkpoint, which may be a stranger's.
        if not (folder / "prepare.py").is_file() or folder.resolve().parent != DATA.resolve():
            known = ", ".join(sorted(path.name for path in DATA.iterdir() if path.is_dir()))
            raise UserError(
                f"no data set {dataset!r}; data/ has {known}. For a text of your own: "
                "python -m data.shakespeare_char.prepare --input FILE --out data/NAME"
            )
        if folder.name == "openwebtext":
            raise UserError(
                f"{folder} is not prepared; this takes hours and a large disk: python -m data.openwebtext.prepare"
            )
        show(f"Data set {dataset} is missing; running {folder / 'prepare.py'}")
        try:
            runpy.run_path(str(folder / "prepare.py"))["main"]([])
        except SystemExit as error:
            raise (UserError(error.code) if isinstance(error.code, str) else KeyboardInterrupt) from None
    meta, data = load(folder, check)
    vocab_size = vocab_size or meta["vocab_size"]
    if vocab_size < meta["vocab_size"]:
        raise UserError(f"vocab_size {vocab_size} is smaller than the data set's vocabulary, {meta['vocab_size']}")
    for split, tokens in data.items():
        if len(tokens) <= block_size:
            raise UserError(
                f"the {split} split of {dataset} has {len(tokens)} tokens, block_size {block_size} needs "
                f"at least {block_size + 1}; use a longer text or a smaller --block_size"
            )
        if check and tokens.max() >= vocab_size:
            raise UserError(f"{folder / split}.bin holds the token {tokens.max()}, beyond vocab_size {vocab_size}")
    return meta, data


def training_batch(
    tokens, step, batch_size, block_size, seed, device="cpu", micro_step=0, gradient_accumulation_steps=1
):
    """A micro-step's inputs and targets (x, y), each (batch_size, block_size); y is x one token later."""
    # Drawn for the whole step at once, so a step has the same sequences on any number of ranks.
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(len(tokens) - block_size, size=gradient_accumulation_steps * batch_size)
    first = micro_step * batch_size
    return windows(tokens, starts[first : first + batch_size], block_size, device)


def windows(tokens, starts, T, device):
    """Inputs and targets (len(starts), T) cut from `tokens` at `starts`."""
    import torch  # not at the top, see there

    both = torch.from_numpy(np.stack([tokens[start : start + T + 1] for start in starts]).astype(np.int64))
    if torch.device(device).type == "cuda":
        both = both.pin_memory().to(device, non_blocking=True)  # not on MPS: there such a copy reads freed memory
    else:
        both = both.to(device)
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def seed_of(*numbers):
    """One well-mixed seed from several small numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


# Text and tokenizers


def text_of(raw, where):
    """
    The text in a file's bytes, which are UTF-8. A byte order mark at the start is dropped, each line end becomes \\n.

    where: names the file, for the UserError that bytes of another kind raise.
    """
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{where} is in UTF-16; convert it to UTF-8 first")
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is not UTF-8 (byte {error.start}: {error.reason}); convert it first") from None
    if "\0" in text:
        raise UserError(
            f"{where} holds a NUL character (character {text.index(chr(0)):,}), so it may be UTF-16 or no text at all; "
            "convert it to UTF-8 or remove the NULs"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


class Tokenizer:
    """Base class. Subclasses have `encode` (text to a list of token ids) and `decoder`."""

    def decode(self, tokens):
        """The text of these token ids, a list or a tensor (T,)."""
        return "".join(map(self.decoder(), tokens.tolist() if hasattr(tokens, "tolist") else tokens))


class CharTokenizer(Tokenizer):
    """Each character is a token. Its id is its index in the list of all characters."""

    def __init__(self, vocab):
        self.vocab = vocab
        self.ids = {character: token for token, character in enumerate(vocab)}
        self.default_prompt = [self.ids.get("\n", 0)]

    def encode(self, text):
        unknown = sorted(set(text) - self.ids.keys())
        if unknown:  # a vocabulary may have thousands of characters, too many for an error line
            others = f" and {len(unknown) - 8:,} more" if len(unknown) > 8 else ""
            rest = f" and {len(self.vocab) - 99:,} more" if len(self.vocab) > 99 else ""
            known = f"{''.join(self.vocab[:99])!r}{rest}"
            raise UserError(f"the model does not know {unknown[:8]}{others} in the prompt; it knows {known}")
        return [self.ids[character] for character in text]

    def decoder(self):
        """A function that turns a text's tokens, one at a time and in order, into pieces of text."""
        return lambda token: self.vocab[token] if 0 <= token < len(self.vocab) else "\N{REPLACEMENT CHARACTER}"


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte-pair encoding, 50,257 tokens."""

    def __init__(self):
        self.encoding = gpt2_encoding()
        self.default_prompt = self.encoding.encode("\n")

    def encode(self, text):
        return self.encoding.encode(text, allowed_special="all")

    def decoder(self):
        """As in CharTokenizer. A character that is spread over several tokens comes with the last of them."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode

        def piece(token):
            # A token beyond the vocabulary only pads the embedding matrix to a round size.
            known = 0 <= token < self.encoding.n_vocab
            return decode(self.encoding.decode_single_token_bytes(token) if known else b"\xff")

        return piece


def tokenizer_of(meta):
    """The tokenizer of a data set."""
    return CharTokenizer(meta["vocab"]) if meta["tokenizer"] == "char" else GPT2Tokenizer()


def check_tokens(meta):
    """Raise ValueError unless `meta` names a tokenizer of ours and, for characters, holds its vocabulary."""
    name, vocab, size = meta["tokenizer"], meta.get("vocab"), meta["vocab_size"]
    if name not in ("char", "gpt2"):
        raise ValueError(f"the tokenizer is {name!r}, this version has char and gpt2")
    if type(size) is not int or size < 1:
        raise ValueError(f"vocab_size is {size!r}")
    if name == "char" and not (type(vocab) is list and all(type(character) is str for character in vocab)):
        raise ValueError("the vocabulary is no list of characters")
    if name == "char" and not len(set(vocab)) == len(vocab) == size:
        raise ValueError(f"vocab_size is {size}, the vocabulary has {len(set(vocab))} characters")


def gpt2_encoding():
    """tiktoken's GPT-2 encoding. Raises UserError if it cannot be downloaded."""
    try:
        return tiktoken.get_encoding("r50k_base")  # its "gpt2" is the same encoding from two files instead of one
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: a file of another hash
        name = hashlib.sha1(GPT2_FILE.encode()).hexdigest()
        raise UserError(
            f"GPT-2's tokenizer cannot be downloaded ({reason_of(error)}); fetch {GPT2_FILE} elsewhere, save it in a "
            f"folder under the name {name}, and set TIKTOKEN_CACHE_DIR to this folder"
        ) from None
