"""
Shakespeare, or any text of your own, in GPT-2's tokens:

    python data/shakespeare/prepare.py                                    # downloads Tiny Shakespeare
    python data/shakespeare/prepare.py --input my.txt --out data/my_text  # your text, in UTF-8

As data/shakespeare_char, with the same split (the first 90 % and the last 10 % of the characters), but the tokens are
those of GPT-2, so that a model which has them can be fine-tuned on it.
"""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, this file's own folder stands there alone
from data.shakespeare_char.prepare import decode, find_text, split_at, write  # noqa: E402
from support import data  # noqa: E402
from support.options import UserError  # noqa: E402


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
