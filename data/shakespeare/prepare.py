"""
Shakespeare, or any text of your own, in GPT-2's tokens:

    python -m data.shakespeare.prepare                                    # downloads Tiny Shakespeare
    python -m data.shakespeare.prepare --input my.txt --out data/my_text  # your text, in UTF-8

As data/shakespeare_char, with the same split (the first 90 % and the last 10 % of the characters), but the tokens are
those of GPT-2, so that a model which has them can be fine-tuned on it.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("prepare.py runs as a module, from the top of the repository: python -m data.shakespeare.prepare")

import sys
from pathlib import Path

from data.shakespeare_char.prepare import decode, find_text, split_at, write
from support import data
from support.options import UserError

HERE = Path(__file__).resolve().parent


def main(argv=None):
    try:
        encoding = data.gpt2_encoding()
    except UserError as error:
        sys.exit(f"prepare.py: {error}")
    raw, source, out = find_text(argv, __doc__.split(":")[0])
    text = decode(raw, source)
    n_train = split_at(text, source)
    train, val = (encoding.encode_ordinary(part) for part in (text[:n_train], text[n_train:]))
    write(train, val, {"tokenizer": "gpt2", "vocab_size": encoding.n_vocab}, text, source, out or HERE)


if __name__ == "__main__":
    main()
