"""
Shakespeare, or any text of your own, in GPT-2's tokens:

    python -m data.shakespeare.prepare                                    # downloads Tiny Shakespeare
    python -m data.shakespeare.prepare --input my.txt --out data/my_text  # your text, in UTF-8

The text is split as in data/shakespeare_char, but has GPT-2's tokens, so that GPT-2 can be fine-tuned on it.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it from the top of the repository: python -m data.shakespeare.prepare")

from pathlib import Path

from data.shakespeare_char.prepare import find_text, write
from support import data
from support.options import errors_in_one_line


def main(argv=None):
    with errors_in_one_line("prepare.py", "use a shorter text"):
        encoding = data.gpt2_encoding()  # first, so that a missing tokenizer shows before the download
        text, source, out = find_text(argv, __doc__.split(":")[0], Path(__file__).resolve().parent)
        write(encoding.encode_ordinary, {"tokenizer": "gpt2", "vocab_size": encoding.n_vocab}, text, source, out)


if __name__ == "__main__":
    main()
