"""
Run notebooks from top to bottom and store their outputs:

    python notebooks/run.py                                   # all of them, some minutes
    python notebooks/run.py notebooks/03_sampling_without_the_future.ipynb

This also writes the cells that all notebooks share: the badge, and the setup that fetches the project where it is not.
A hash of the code is stored beside the outputs, so that tests/test_notebooks.py notices code that changed and was not
run again.
"""

import hashlib
import json
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
TIMEOUT = 600  # seconds for a cell

# The project has no public address yet. When it has one, write it here and run this file again.
REPOSITORY = "https://github.com/OWNER/mixture-of-depths"

BADGE = """\
[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}/blob/main/notebooks/{name})
The first code cell finds the project. Opened alone, e.g. on Colab, the notebook fetches it from `REPOSITORY`."""

SETUP = f"""\
import os
import sys

REPOSITORY = "{REPOSITORY}"
if not os.path.exists("classroom.py"):
    if not os.path.exists("mixture-of-depths"):
        !git clone --quiet --depth=1 {{REPOSITORY}} mixture-of-depths
        !{{sys.executable}} -m pip install --quiet -r mixture-of-depths/requirements.txt
    os.chdir("mixture-of-depths/notebooks")
sys.path.insert(0, os.path.abspath(".."))  # mod.py and the other files"""


def notebooks():
    return sorted(HERE.glob("*.ipynb"))


def write_shared_cells(notebook, name):
    """Give the cells with the ids "badge" and "setup" their text. Raises StopIteration if there is none."""
    colab = REPOSITORY.replace("github.com", "colab.research.google.com/github")
    for id, source in (("badge", BADGE.format(colab=colab, name=name)), ("setup", SETUP)):
        next(cell for cell in notebook.cells if cell.get("id") == id).source = source


def code_sha256(notebook):
    """The SHA-256 of the code cells' sources, in order."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256(json.dumps(sources).encode()).hexdigest()


def execute(path):
    """Run the notebook in a new kernel and return it with the new outputs. Raises the error of a cell."""
    notebook = nbformat.read(path, as_version=4)
    write_shared_cells(notebook, path.name)
    client = NotebookClient(notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": HERE}})
    client.execute()
    # Drop what depends on the machine or the time, or each run would change the file.
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata = {
        "code_sha256": code_sha256(notebook),
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main():
    for path in [Path(name) for name in sys.argv[1:]] or notebooks():
        begun = time.perf_counter()
        notebook = execute(path)
        text = nbformat.writes(notebook)  # may fail, so before the file is touched
        path.write_text(text + "\n", encoding="utf-8", newline="\n")
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
