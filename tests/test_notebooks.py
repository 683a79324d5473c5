"""The notebooks: their stored outputs are those of their code, and they run."""

import re
import sys
from pathlib import Path

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
    for output in [output for cell in cells for output in cell.outputs]:
        assert output.output_type != "error" and output.get("name") != "stderr", output
        text = str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        # No trace of the machine, and no value that was not meant to be shown.
        assert not re.search(r"/tmp|/home|/root|/Users|\\Users|site-packages|Warning|<.* at 0x", text), text


@each_notebook
def test_it_begins_with_the_shared_cells_and_its_run_time_and_uses_one_thread(path):
    notebook = nbformat.read(path, as_version=4)
    sources = [cell.source for cell in notebook.cells]
    run.write_shared_cells(notebook, path.name)
    assert sources == [cell.source for cell in notebook.cells], f"run: python notebooks/run.py {path}"
    assert [cell.id for cell in notebook.cells if cell.id in ("badge", "setup")] == ["badge", "setup"]
    assert "**Run time**" in sources[1] and notebook.cells[2].id == "setup"
    assert "torch.set_num_threads(1)" in sources[3]


@each_notebook
def test_every_picture_has_an_alternative_text(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                assert len(output.metadata.get("image/png", {}).get("alt", "")) > 20, cell.source


@pytest.mark.parametrize("path", [p for p in run.notebooks() if p.stem != "solutions"], ids=lambda path: path.stem)
def test_students_predict_first_and_answers_are_folded(path):
    """Each question is followed by code, which reveals, and only then by a folded answer; the last may end a text."""
    kinds = {"> **Predict first.**": "Q", "<details><summary>Answer</summary>\n\n": "A"}
    story = ""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            story += "c"
        for mark in re.findall("|".join(map(re.escape, kinds)), cell.source) if cell.cell_type == "markdown" else ():
            story += kinds[mark]
    assert story.count("Q") >= 4 and re.fullmatch("(c*Qc+A)+c*", story), story


@each_notebook
def test_cells_are_short(path):
    for cell in code_cells(path):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= 10, cell.source


@pytest.mark.slow
@each_notebook
def test_it_runs_from_top_to_bottom(path):
    for cell in run.execute(path).cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", output


def test_the_setup_cell_fetches_the_project_where_it_is_not(tmp_path, monkeypatch):
    """The cell's Python alone, with IPython's ! commands replaced by a copy of what the notebooks import first."""
    lines = run.SETUP.replace("!git clone", "fetch()  #").replace("!{sys.executable}", "pass  #")

    def fetch():
        (tmp_path / "mixture-of-depths" / "notebooks").mkdir(parents=True)
        (tmp_path / "mixture-of-depths" / "notebooks" / "classroom.py").touch()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for _ in range(2):  # the second time it finds what the first one fetched, also after the kernel was restarted
        exec(lines, {"fetch": fetch})
        assert Path.cwd() == tmp_path / "mixture-of-depths" / "notebooks"
        assert Path(sys.path[0]) == tmp_path / "mixture-of-depths"
        exec(lines, {})  # run again in the same kernel: nothing to fetch
        monkeypatch.chdir(tmp_path)


def test_changed_code_is_seen(tmp_path):
    path = run.notebooks()[0]
    notebook = nbformat.read(path, as_version=4)
    before = run.code_sha256(notebook)
    next(cell for cell in notebook.cells if cell.cell_type == "markdown").source += " more"
    assert run.code_sha256(notebook) == before
    next(cell for cell in notebook.cells if cell.cell_type == "code").source += "\n"
    assert run.code_sha256(notebook) != before
