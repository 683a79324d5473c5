"""What the README, docs/ and the other texts quote or link to exists."""

import json
import re

import pytest

from docs import schematic
from helpers import ROOT

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
    for link in re.findall(r"\]\(([^()\s]+)\)", text_of(path)):
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
    assert len(rows) > 15  # the README has about 15 of mod.py, docs/experts.md 5 of mode.py
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
        "![f](no.png) [`g`](other.md#same-2) [h](#comment)\n```bash\n# Comment\n[i](no.md)\n```\n",
        encoding="utf-8",
    )
    assert broken_links(page) == ["no.png", "other.md#same-2", "#comment"]


def test_the_committed_schematics_are_what_the_script_draws(tmp_path):
    def drawn(path):  # shapes, colours and words; other versions of matplotlib write other outlines of letters
        return re.findall(r'<path d=[^>]*>|style="[^"]*"|<!-- .* -->', path.read_text(encoding="utf-8"))

    schematic.main(tmp_path)
    files = sorted(tmp_path.glob("*.svg"))
    assert files and all(len(drawn(path)) > 100 for path in files)
    for path in files:
        assert drawn(path) == drawn(ROOT / "docs" / path.name)
