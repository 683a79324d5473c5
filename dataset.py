"""
Data sets and tokenizers. A data set is a folder that a prepare.py wrote:

    train.bin, val.bin   token ids as little-endian uint16, nothing else
    meta.json            tokenizer, counts, hashes, source; written last: where it stands, the data set is whole

This file does without PyTorch: the processes that tokenize a large corpus import it.
"""

import codecs
import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import tiktoken

from configurator import UserError

SPLITS = ("train", "val")
DTYPE = "<u2"
GPT2_FILE = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"


def commit(out, parts, meta):
    """
    Make the files parts["train"] and parts["val"], on the same disk, the data set in the folder `out`.

    Returns the contents of its meta.json. meta says what they cannot: tokenizer, vocab_size, source, text_sha256.
    """
    sizes = {split: parts[split].stat().st_size // 2 for split in SPLITS}
    meta = {**meta, "tokens": sizes, "dtype": DTYPE, "sha256": {split: sha256_of(parts[split]) for split in SPLITS}}
    temporary = parts["train"].with_name("meta.json.part")
    temporary.write_text(json.dumps(meta, indent=1), encoding="utf-8")
    # A half-replaced data set does not have the hashes of its meta.json, and train.py does not take it.
    for split in SPLITS:
        parts[split].replace(out / f"{split}.bin")
    temporary.replace(out / "meta.json")
    return meta


def load(folder, check=True):
    """
    The contents of meta.json, and the splits as arrays of token ids, mapped from the disk.

    check=False trusts the files' contents: their hashes take a second for each gigabyte. Raises UserError for files
    that are damaged or do not belong together.
    """
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        if meta["dtype"] != DTYPE:
            raise ValueError(f"meta.json gives the type {meta['dtype']!r}, this version reads {DTYPE!r}")
        data = {split: np.memmap(folder / f"{split}.bin", dtype=DTYPE, mode="r") for split in SPLITS}
        lengths = {split: len(tokens) for split, tokens in data.items()}
        if lengths != meta["tokens"]:
            raise ValueError(f"meta.json speaks of {meta['tokens']} tokens, the files hold {lengths}")
        for split, tokens in data.items():
            if check and hashlib.sha256(tokens).hexdigest() != meta["sha256"][split]:
                raise ValueError(f"the SHA-256 of {split}.bin is not the one in meta.json")
        if meta["tokenizer"] == "char" and len(meta["vocab"]) != meta["vocab_size"]:
            raise ValueError("meta.json gives two sizes of the vocabulary")
        meta["source"], meta["text_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the data in {folder} is damaged ({error}); run prepare.py again") from None
    return meta, data


def write(out, splits, meta):
    """Write a data set that fits into memory: splits["train"] and splits["val"] are arrays of token ids."""
    out.mkdir(parents=True, exist_ok=True)
    # A folder of its own, so that two at once do not write the same files, and on the same disk.
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=out) as folder:
        parts = {split: Path(folder) / split for split in SPLITS}
        for split, part in parts.items():
            part.write_bytes(np.asarray(splits[split], dtype=DTYPE).tobytes())
        return commit(out, parts, meta)


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# Tokenizers


class CharTokenizer:
    """A character is a token, its id the place in the list of all characters."""

    def __init__(self, vocab):
        self.vocab = vocab
        self.ids = {character: token for token, character in enumerate(vocab)}
        self.default_prompt = [self.ids.get("\n", 0)]

    def encode(self, text):
        unknown = sorted(set(text) - set(self.vocab))
        if unknown:
            raise UserError(f"the model does not know {unknown} in the prompt; it knows {''.join(self.vocab)!r}")
        return [self.ids[character] for character in text]

    def decoder(self):
        """A function that turns a text's tokens, one after the other, into the pieces of the text."""
        return lambda token: self.vocab[token] if token < len(self.vocab) else "\N{REPLACEMENT CHARACTER}"


class GPT2Tokenizer:
    """GPT-2's byte-pair encoding, 50,257 tokens."""

    def __init__(self):
        self.encoding = gpt2_encoding()
        self.default_prompt = self.encoding.encode("\n")

    def encode(self, text):
        return self.encoding.encode(text, allowed_special="all")

    def decoder(self):
        """A character may be spread over several tokens; it then comes with the last of them."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode

        def piece(token):
            # Beyond the vocabulary: an embedding that only pads the matrix to a round size.
            return decode(self.encoding.decode_single_token_bytes(token) if token < self.encoding.n_vocab else b"\xff")

        return piece


def tokenizer_of(meta):
    return CharTokenizer(meta["vocab"]) if meta["tokenizer"] == "char" else GPT2Tokenizer()


def gpt2_encoding():
    """tiktoken's GPT-2 encoding. Raises UserError where it cannot be downloaded."""
    try:
        return tiktoken.get_encoding("r50k_base")  # its "gpt2" is the same encoding from two files instead of one
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; ValueError: a file of another hash
        name = hashlib.sha1(GPT2_FILE.encode()).hexdigest()
        reason = str(error).split("\n")[0][:100]
        raise UserError(
            f"GPT-2's tokenizer cannot be downloaded ({reason}); fetch {GPT2_FILE} elsewhere, put it into a folder "
            f"under the name {name}, and set TIKTOKEN_CACHE_DIR to that folder"
        ) from None
