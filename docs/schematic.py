"""
Draw the idea of Mixture-of-Depths, the picture at the top of README.md:

    python -m docs.schematic    # writes docs/idea-light.svg, docs/idea-dark.svg; experts-*.svg: the same for mode.py

The pictures are illustrations: no model computed the router weights, or chose the experts.
"""

from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from mod import Block, GPTConfig

TOKENS = "Not every word needs the same work .".split()
WEIGHTS = {1: [0.3, -0.2, 1.4, 0.5, 0.1, -0.3, 1.1, 0.2], 3: [0.6, 1.6, 0.2, 1.2, -0.4, 0.1, 0.7, 0.3]}  # by block
K = 2  # of 8 tokens: a capacity of 25%

LIGHT = dict(ink="#1f2328", quiet="#57606a", line="#8c959f", ordinary="#1f4e79", routed="#b5173b", on_block="#ffffff")
DARK = dict(ink="#e6edf3", quiet="#9ea7b3", line="#7d8590", ordinary="#2c68a6", routed="#d63a5e", on_block="#ffffff")

# In pixels, from the lower left corner, as are all lengths below.
WIDTH, HEIGHT = 684, 470
PITCH = 54  # from one token's line to the next
COLUMNS = [38 + PITCH * i for i in range(len(TOKENS))]
LABELS = COLUMNS[-1] + 46
BOTTOMS = [62, 178, 262, 378]  # lower edges of the blocks
BLOCK = 52  # height of a block
ROUTER = 33  # from the router weights up to their block


class Canvas:
    """A Figure to draw on in pixels, in the colours for one background."""

    def __init__(self, width, height, dark):
        self.colours = DARK if dark else LIGHT
        self.figure = Figure(figsize=(width / 96, height / 96), dpi=96, layout="none")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def text(self, x, y, words, colour="ink", size=16, weight="normal", align="center"):
        font = dict(family="DejaVu Sans", size=0.75 * size, weight=weight)  # 0.75: from pixels to points
        self.axes.text(x, y, words, color=self.colours[colour], ha=align, va="center_baseline", **font)

    def box(self, x, y, width, height, colour, frame=False):
        """A box centred on x that stands on y; frame: dashed, and empty."""
        colour = self.colours[colour]
        look = dict(fc="none", ec=colour, lw=1.2, ls=(0, (4, 3))) if frame else dict(fc=colour, lw=0)
        self.axes.add_patch(FancyBboxPatch((x - width / 2, y), width, height, "round,pad=0,rounding_size=7", **look))

    def line(self, x, bottom, top, colour="line", width=1.5, head=0.7):
        style = f"-|>,head_length={head},head_width={head / 2}" if head else "-"
        look = dict(arrowstyle=style, color=self.colours[colour], lw=width, shrinkA=0, shrinkB=0, mutation_scale=10)
        self.axes.annotate("", (x, top), (x, bottom), arrowprops=look)


def draw(dark=False):
    """A Figure: eight tokens travel up through four blocks. All enter blocks 0 and 2, two of them blocks 1 and 3."""
    canvas = Canvas(WIDTH, HEIGHT, dark)
    middle, width = sum(COLUMNS) / len(COLUMNS), PITCH * len(COLUMNS)
    ends = [42] * len(COLUMNS)  # how far each token's line is drawn
    for x, token in zip(COLUMNS, TOKENS):
        canvas.text(x, 22, token, weight="bold" if token == "." else "normal")
    for block, bottom in enumerate(BOTTOMS):
        if block in WEIGHTS:
            canvas.box(middle, bottom, width, BLOCK, "routed", frame=True)
            top_k = sorted(WEIGHTS[block])[-K:]
            for i, (x, weight) in enumerate(zip(COLUMNS, WEIGHTS[block])):
                ends[i] = route(canvas, x, ends[i], bottom, weight, weight in top_k)
            label(canvas, bottom + BLOCK / 2, "routed block", f"router picks the top k = {K};", "the others skip it")
            canvas.text(LABELS, bottom - ROUTER, "router weight r", "quiet", align="left")
        else:
            canvas.box(middle, bottom, width, BLOCK, "ordinary")
            canvas.text(middle, bottom + BLOCK / 2, "attention + MLP", "on_block")
            for x, end in zip(COLUMNS, ends):
                canvas.line(x, end, bottom)
            ends = [bottom + BLOCK] * len(COLUMNS)
            label(canvas, bottom + BLOCK / 2, "ordinary block", f"all {len(TOKENS)} tokens enter")
    for x, end in zip(COLUMNS, ends):
        canvas.line(x, end, HEIGHT - 10)
    return canvas.figure


def route(canvas, x, end, bottom, weight, picked, block="routed"):
    """Continue a token's line to its router weight and, if it is picked, into the block. Returns the line's new end."""
    y, number = bottom - ROUTER, f"{weight:.1f}".replace("-", "\N{MINUS SIGN}")
    canvas.line(x, end, y - 12, head=0)
    if not picked:
        canvas.text(x, y, number, size=15)
        return y + 12
    canvas.box(x, y - 13, 44, 26, "routed")
    canvas.text(x, y, number, "on_block", size=15, weight="bold")
    canvas.line(x, y + 12, bottom, "routed", width=2.2, head=0.8)
    canvas.box(x, bottom, 44, BLOCK, block)
    return bottom + BLOCK


def label(canvas, y, title, *lines):
    """A title and the lines below it, together centred on y."""
    y += 11 * len(lines)
    canvas.text(LABELS, y, title, weight="bold", align="left")
    for i, line in enumerate(lines):
        canvas.text(LABELS, y - 22 * (i + 1), line, "quiet", align="left")


def draw_experts(dark=False):
    """
    A Figure: staged MoDE beside integrated MoDE, and below each the FLOPs of attention and experts as shares of an
    ordinary block's. A token that no expert takes is drawn as a no-op, because both add nothing.
    """
    canvas = Canvas(828, 378, dark)
    panel(canvas, 14, "staged MoDE", "first the router picks, then the experts", {2: "E1", 6: "E2"}, staged=True)
    experts = {1: "E2", 2: "E1", 4: "E2", 6: "E1"}
    panel(canvas, 430, "integrated MoDE", "attention for all, then experts or no-ops", experts, staged=False)
    return canvas.figure


def panel(canvas, left, title, subtitle, experts, staged):
    """One of the two. experts: {token: the expert that takes it}."""
    pitch, width, attention, mixture = 48, 384, 148, 224  # the last two: the lower edges of attention and experts
    middle = left + width / 2
    canvas.text(left, 358, title, weight="bold", align="left")
    canvas.text(left, 335, subtitle, "quiet", align="left")
    if staged:
        canvas.box(middle, attention, width, mixture + BLOCK - attention, "routed", frame=True)
    else:
        canvas.box(middle, mixture, width, BLOCK, "routed", frame=True)
        canvas.box(middle, attention, width, BLOCK, "ordinary")
        canvas.text(middle, attention + BLOCK / 2, "attention", "on_block")
    for i, weight in enumerate(WEIGHTS[1]):
        x, end, inside = left + pitch * (i + 0.5), 84, mixture + BLOCK / 2
        if staged:
            end = route(canvas, x, end, attention, weight, i in experts, "ordinary")
            if i in experts:
                canvas.text(x, attention + BLOCK / 2, "attn", "on_block", size=15)
        else:
            canvas.line(x, end, attention)
            end = attention + BLOCK
        if i in experts:
            canvas.line(x, end, mixture, "routed", width=2.2, head=0.8)
            canvas.box(x, mixture, 44, BLOCK, "routed")
            canvas.text(x, inside, experts[i], "on_block", weight="bold")
            end = mixture + BLOCK
        elif not staged:
            canvas.line(x, end, inside - 12, head=0)
            canvas.text(x, inside, "no-op", size=13)
            end = inside + 12
        canvas.line(x, end, 314)
    with torch.device("meta"):
        block, T = Block(GPTConfig(n_embd=384, n_head=6)), 256  # as in config/shakespeare_mod.py
    flops = block.attn.flops(T * K // 8 if staged else T), block.mlp.flops(T * len(experts) // 8)
    part, rest = (n / block.flops(T) for n in flops)
    canvas.box(middle, 38, width, 26, "line", frame=True)
    canvas.box(left + width * part / 2, 38, width * part, 26, "ordinary")
    canvas.box(left + width * (part + rest / 2) + 2, 38, width * rest, 26, "routed")
    canvas.text(left, 18, f"attention {part:.0%} + experts {rest:.0%} of a block's FLOPs", "quiet", 15, align="left")


def main(folder=Path(__file__).parent):
    # Text as outlines, because the fonts of a viewer have other widths. Salt and no date: the same bytes each time.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "schematic"}):
        for name, dark in (("light", False), ("dark", True)):
            draw(dark).savefig(folder / f"idea-{name}.svg", transparent=True, metadata={"Date": None})
            draw_experts(dark).savefig(folder / f"experts-{name}.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
