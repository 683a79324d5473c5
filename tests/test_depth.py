"""The depth of each token in colour, in marks and as a picture."""

import io
import re
import warnings

import numpy as np
import pytest
import rich.style
from matplotlib.figure import Figure

from support import depth


def test_depth_in_colour_is_the_same_text_with_a_background_per_depth():
    console = depth.Console(file=io.StringIO(), force_terminal=True, color_system="truecolor", width=5, no_color=False)
    printer = depth.DepthPrinter(2, console)
    printer.add_all(["a", "b", "c", "\n", "d\te"], [0, 1, 2, 1, None])
    printer.close()
    plain, one, two = "", depth.style(1, 2), depth.style(2, 2)
    assert plain == depth.style(0, 2) == depth.style(None, 2) and len({plain, one, two}) == 3
    out = console.file.getvalue()
    assert re.sub(r"\x1b\[[\d;]*m", "", out) == "abc\N{PILCROW SIGN}\nd e\n"
    assert out.count("\x1b[") == 6  # colour on and off for b, c and the line end


@pytest.mark.parametrize("routed", [1, 2, 6, 12])
def test_the_colours_darken_with_depth_and_the_text_on_them_can_be_read(routed):
    def luminance(colour):
        parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    backgrounds = []
    for d in range(1, routed + 1):
        parsed = rich.style.Style.parse(depth.style(d, routed))
        text, background = luminance(parsed.color.get_truecolor()), luminance(parsed.bgcolor.get_truecolor())
        assert (max(text, background) + 0.05) / (min(text, background) + 0.05) > 4.5  # the minimum of WCAG
        backgrounds.append(background)
    assert backgrounds == sorted(backgrounds, reverse=True) and len(set(backgrounds)) == routed


def test_lines_are_broken_at_the_width_and_marks_stay_under_their_tokens():
    for colour in (None, "truecolor"):
        console = depth.Console(file=io.StringIO(), color_system=colour, force_terminal=colour is not None, width=4)
        printer = depth.DepthPrinter(2, console)
        printer.add_all(
            ["ab", "\N{CJK UNIFIED IDEOGRAPH-6C34}", "e", "\N{COMBINING ACUTE ACCENT}", "\n"], [1, 2, 0, 1, 2]
        )
        printer.close()
        out = re.sub(r"\x1b\[[\d;]*m", "", console.file.getvalue()).splitlines()
        text = ["ab\N{CJK UNIFIED IDEOGRAPH-6C34}", "e\N{COMBINING ACUTE ACCENT}\N{PILCROW SIGN}"]
        assert out == (text if colour else [text[0], "1 2", text[1], ".2"])


def test_the_routing_map_names_its_blocks_and_tokens(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **how: drawn.append(self))
    taken = np.random.default_rng(0).random((2, 130)) < 0.5
    depth.routing_map(taken, list("ab \n" * 32 + "ab"), [1, 3], tmp_path / "map.PNG")
    first, second = drawn[0].axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["block 1", "block 3"]
    assert [label.get_text() for label in second.get_xticklabels()][:4] == list("ab\N{OPEN BOX}\N{PILCROW SIGN}")
    colours = first.collections[0].to_rgba(first.collections[0].get_array()).reshape(200, 4)
    assert (colours == colours[0]).all(axis=1).tolist() == (taken[:, :100] == taken[0, 0]).flatten().tolist()
    assert f"({taken.mean():.0%} of all)" in drawn[0].get_suptitle()


def test_dollar_signs_are_not_math_and_missing_glyphs_do_not_warn(tmp_path):
    taken = np.ones((1, 3), dtype=bool)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        depth.routing_map(taken, ["$$", r"$\frac$", "\N{CJK UNIFIED IDEOGRAPH-6C34}"], [1], tmp_path / "map.svg")
    assert (tmp_path / "map.svg").exists()


def test_control_characters_never_reach_the_terminal(capsys):
    depth.PlainPrinter().add_all(["a\x1b[2J", "\r", "\x9b\x7f", "\n\t\u6c34"], [None] * 4)
    expected = "a\N{SYMBOL FOR ESCAPE}[2J\N{SYMBOL FOR CARRIAGE RETURN}\\x9b\N{SYMBOL FOR DELETE}\n\t\u6c34"
    assert capsys.readouterr().out == expected
    assert depth.visible("\x1b\n\t") == "\N{SYMBOL FOR ESCAPE}\N{PILCROW SIGN} "
