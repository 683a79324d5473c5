"""The notebooks: their stored outputs are those of their code, and they run."""

import re

import pytest

pytest.importorskip("nbclient", reason="needs the packages of the extra `notebooks`")
import nbformat  # noqa: E402

from notebooks import run  # noqa: E402

each_notebook = pytest.mark.parametrize("path", run.notebooks(), ids=lambda path: path.stem)


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@each_notebook
def test_the_stored_outputs_are_of_this_code_and_of_one_clean_run(path):
    notebook, cells = nbformat.read(path, as_version=4), code_cells(path)
    assert notebook.metadata.get("code_sha256") == run.code_sha256(notebook), f"run: python notebooks/run.py {path}"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    for output in outputs:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        # No trace of the machine, and no value that was not meant to be shown.
        assert not re.search(r"/tmp|/home|/root|/Users|\\Users|site-packages|Warning|<.* at 0x", text), text


@each_notebook
def test_cells_are_short_and_the_header_says_how_long_it_takes(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and "**Run time**" in cells[0].source
    for cell in code_cells(path):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 10, cell.source


@pytest.mark.slow
@each_notebook
def test_it_runs_from_top_to_bottom(path):
    for cell in run.execute(path).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output


def test_changed_code_is_seen(tmp_path):
    path = run.notebooks()[0]
    notebook = nbformat.read(path, as_version=4)
    before = run.code_sha256(notebook)
    next(cell for cell in notebook.cells if cell.cell_type == "markdown").source += " more"
    assert run.code_sha256(notebook) == before
    next(cell for cell in notebook.cells if cell.cell_type == "code").source += "\n"
    assert run.code_sha256(notebook) != before
