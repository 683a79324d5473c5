"""What the README quotes exists."""

import re

from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_equation_table_quotes_lines_and_tests_that_exist():
    code = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("mod.py", "mode.py"))
    tests = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("test_mod.py", "tests/test_mode.py"))
    rows = re.findall(r"^\| .* \| `(.+)` \| `(test_\w+)` \|$", README, flags=re.MULTILINE)
    assert len(rows) > 10
    for line, test in rows:
        assert line in code and f"def {test}(" in tests
