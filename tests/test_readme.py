"""What the README, docs/ and the other texts quote or link to exists."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import sample
from data.shakespeare_char import prepare as shakespeare_char
from docs import schematic
from helpers import ROOT
from mod import GPTConfig, RoutedBlock
from support import checkpoint
from support.report import report

PAGES = [
    ROOT / "README.md",
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "results" / "README.md",
    *sorted(ROOT.glob("notebooks/*.ipynb")),
    ROOT / "notebooks" / "README.md",
    *sorted(ROOT.glob("data/*/README.md")),
]


def text_of(path):
    """The Markdown of a page or of a notebook's cells, without fenced code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells)
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text):
    """The anchors that GitHub gives to the headings of a page; the second of two equal ones ends in -1."""
    names = []
    for heading in re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE):
        heading = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)  # of a link only its text counts
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return names


def broken_links(path):
    """The relative links of a page that lead nowhere."""
    broken = []
    for link in re.findall(r'(?:\]\(|src(?:set)?=")([^()\s"]+)[)"]', text_of(path)):
        if re.match(r"[a-z]+:", link):  # https:, mailto:
            continue
        name, _, anchor = link.partition("#")
        target = path.parent / name if name else path
        if not target.exists() or (anchor and anchor not in anchors(text_of(target))):
            broken.append(link)
    return broken


def test_the_equation_tables_quote_lines_and_tests_that_exist():
    files = ("mod.py", "cache.py", "variants.py", "mode.py")
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "test_mod.py", *ROOT.glob("tests/*.py")))
    texts = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    rows = re.findall(r"^\| .* \| `(.+)` \| `(test_\w+)` \|$", texts, flags=re.MULTILINE)
    assert len(rows) == 16  # 11 in the README, 5 in docs/experts.md
    for line, test in rows:
        assert line in code and f"def {test}(" in tests


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_relative_link_leads_to_a_file_and_a_heading(path):
    assert not broken_links(path)


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# What's new, in `mod.py`?\n## Same\n## Same\n", encoding="utf-8")
    page = tmp_path / "page.md"
    page.write_text(
        "# Top\n[a](other.md) [b](other.md#whats-new-in-modpy) [c](other.md#same-1) [d](#top) [e](https://x.org/y#z)\n"
        '![f](no.png) [`g`](other.md#same-2) [h](#comment) <img src="gone.svg" width="7">\n'
        "```bash\n# Comment\n[i](no.md)\n```\n",
        encoding="utf-8",
    )
    assert broken_links(page) == ["no.png", "other.md#same-2", "#comment", "gone.svg"]


def test_the_committed_schematics_are_what_the_script_draws(tmp_path):
    def drawn(path):  # shapes, colours and words; other versions of matplotlib write other outlines of letters
        return re.findall(r'<path d=[^>]*>|style="[^"]*"|<!-- .* -->', path.read_text(encoding="utf-8"))

    schematic.main(tmp_path)
    files = sorted(tmp_path.glob("*.svg"))
    assert files and all(len(drawn(path)) > 100 for path in files)
    for path in files:
        assert drawn(path) == drawn(ROOT / "docs" / path.name)


def test_the_printed_line_is_that_of_the_small_model():
    best = checkpoint.read(sample.PRETRAINED, "best")
    line = report(best["rows"][-1], best["config"]["max_iters"])
    assert line in (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, page="README.md"):
    """The code blocks of the page in this language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_ten_lines_are_the_routed_block():
    code = {}
    exec(next(block for block in blocks("python") if "def routed_block" in block), code)
    torch.manual_seed(0)
    config = GPTConfig(block_size=40, vocab_size=9, n_layer=2, n_head=2, n_embd=16, dropout=0.0)
    block = RoutedBlock(config, layer=1).double()
    x = torch.randn(3, 40, 16, dtype=torch.float64, requires_grad=True)
    expected, got = block(x, torch.arange(40).expand(3, 40)), code["routed_block"](block, x)
    assert torch.allclose(got, expected, rtol=0, atol=1e-12) and not torch.allclose(got, x)
    weights = [x, *(p for name, p in block.named_parameters() if not name.startswith("predictor"))]
    for one, other in zip(
        torch.autograd.grad(got.square().sum(), weights), torch.autograd.grad(expected.square().sum(), weights)
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_the_lines_of_python_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sample.load, "__defaults__", (sample.PRETRAINED, "cpu"))
    [block] = [block for block in blocks("python") if "from sample import load" in block]
    exec(block.replace('load("out-shakespeare-mod")', "load()"), {})
    assert "FLOPs in a forward pass" in capsys.readouterr().out


def test_the_class_to_try_is_a_gate():
    code = {"RoutedBlock": RoutedBlock}
    exec(next(block for block in blocks("python") if "class TanhGate" in block), code)
    block, r = code["TanhGate"](GPTConfig(block_size=8, n_layer=2, n_head=2, n_embd=16), layer=1), torch.randn(2, 8)
    assert torch.equal(block.gate(r), r.tanh())


@pytest.mark.slow
def test_the_commands_run(tmp_path):
    """Those that train, sample or plot, as they stand but for fewer steps, in a copy with a short text."""
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "results", "out*", "*.bin", "notebooks", "tests"))
    (tmp_path / "text.txt").write_text("ROMEO:\nBut, soft! what light through yonder window breaks?\n" * 99, "utf-8")
    shakespeare_char.main([f"--input={tmp_path / 'text.txt'}", f"--out={copy / 'data' / 'shakespeare_char'}"])
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in commands if re.match(r"python (train|sample|plot)\.py", line)]
    assert len(commands) >= 8
    for command in commands:
        _, *argv = shlex.split(command, comments=True)
        if argv[0] == "train.py":
            argv += ["--device=cpu", "--max_iters=2", "--eval_iters=1"]
        done = subprocess.run([sys.executable, *argv], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, (command, done.stderr)
    assert (copy / "losses.png").is_file() and (copy / "map.png").is_file()
    scripts = [block for block in blocks("python") if "from train import" in block]
    for script in [*scripts, *blocks("python", "pretrained/README.md")]:
        script = script.replace("max_iters=200", "max_iters=2, eval_iters=1, device='cpu'")
        done = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, (script, done.stderr)
