"""What the README quotes exists."""

import re

from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_equation_table_quotes_lines_and_tests_that_exist():
    files = ("mod.py", "cache.py", "variants.py", "mode.py")
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in files)
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "test_mod.py", *ROOT.glob("tests/*.py")))
    rows = re.findall(r"^\| .* \| `(.+)` \| `(test_\w+)` \|$", README, flags=re.MULTILINE)
    assert len(rows) > 10
    for line, test in rows:
        assert line in code and f"def {test}(" in tests
