"""
Where the depth went: a text coloured by how many routed blocks processed each token, and the map of which ones did.

A token's depth is that number, 0 to the number of routed blocks; None where it is not known.
"""

import io
import re

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from support.checkpoint import write_whole

MARKS = ".123456789abcdefghijklmnopqrstuvwxyz"  # a sign for each depth, for where there is no colour
END_OF_LINE = "\N{PILCROW SIGN}"


class PlainPrinter:
    """Prints a text token by token."""

    def legend(self):
        pass

    def add_all(self, pieces, depths):
        for piece, depth in zip(pieces, depths):
            self.add(piece, depth)

    def add(self, piece, depth):
        """The next token's text, and its depth."""
        print(piece, end="", flush=True)

    def close(self):
        print()


class DepthPrinter(PlainPrinter):
    """
    Prints a text token by token, with the depth of each: by colour, or, where there is none or too little (a file, a
    pipe, NO_COLOR, a terminal of 16 colours), by a line of marks under each line of text.
    """

    def __init__(self, routed, console=None):
        self.routed = routed
        self.console = console or Console(highlight=False)
        # With 16 colours several depths would look the same.
        self.colour = self.console.color_system in ("256", "truecolor") and not self.console.no_color
        self.column = 0
        self.line = self.marks = ""  # what waits for the end of the line, where there is no colour

    def legend(self):
        self.print(f"How many of the {self.routed} routed blocks processed a token: ")
        if self.colour:
            for depth in range(self.routed + 1):
                self.print(f" {depth} ", depth)
            self.print("\n\n")
        else:
            self.print("the mark under it, '.' for none\n\n")

    def add(self, piece, depth):
        piece = visible(piece)
        width = cell_len(piece)
        if self.column + width > self.console.width:
            self.new_line()
        self.column += width
        if self.colour:
            self.print(piece, depth)
        else:
            self.line += piece
            self.marks += mark(depth).ljust(width)[:width]
        if piece.endswith(END_OF_LINE):
            self.new_line()

    def new_line(self):
        self.column = 0
        self.print("\n" if self.colour else f"{self.line}\n{self.marks.rstrip()}\n")
        self.line = self.marks = ""

    def close(self):
        if self.column:
            self.new_line()

    def print(self, text, depth=None):
        self.console.print(Text(text, style=style(depth, self.routed)), end="", soft_wrap=True)


def visible(piece):
    """A token's text with the ends of lines as signs, so that they too can bear a colour or a mark."""
    return "".join(END_OF_LINE if c == "\n" else c if c.isprintable() else " " for c in piece)


def mark(depth):
    return " " if depth is None else MARKS[min(depth, len(MARKS) - 1)]


def style(depth, routed):
    """
    Colours that read alike on dark and light terminals: nothing at depth 0, else a background from pale yellow to dark
    red with its own text colour. It darkens steadily, so it also reads in greyscale.
    """
    if not depth:
        return ""
    share = depth / routed
    red, green, blue = 255 - round(115 * share**2), round(240 * (1 - share)), round(140 * (1 - share))
    bright = 0.2126 * (red / 255) ** 2.2 + 0.7152 * (green / 255) ** 2.2 + 0.0722 * (blue / 255) ** 2.2 > 0.18
    return f"{'#000000' if bright else '#ffffff'} on rgb({red},{green},{blue})"


def save_svg(pieces, depths, routed, path):
    """The coloured text as a picture."""
    console = Console(
        file=io.StringIO(), record=True, width=88, force_terminal=True, color_system="truecolor", no_color=False
    )
    printer = DepthPrinter(routed, console)
    printer.legend()
    printer.add_all(pieces, depths)
    printer.close()
    svg = console.export_svg(title="where the depth went")
    svg = re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL)  # fonts from the web; any monospace does
    write_whole(path, lambda file: file.write(svg.encode("utf-8")))


def routing_map(taken, pieces, layers, path):
    """
    The paper's picture: tokens along one axis, routed blocks along the other, dark where the block processed the token.

    taken (L, T) bool; pieces: the T tokens' texts; layers: the L routed blocks' numbers. Long texts take several rows.
    """
    import matplotlib

    matplotlib.use("Agg")  # draws to a file, needs no screen
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    longest = max(len(piece) for piece in pieces)
    per_row = 100 if longest == 1 else 50
    starts = range(0, len(pieces), per_row)
    height = 0.16 * len(layers) + 0.35 + 0.07 * longest
    figure, rows = plt.subplots(
        len(starts), 1, figsize=(14, 0.6 + height * len(starts)), layout="constrained", squeeze=False
    )
    for axes, start in zip(rows[:, 0], starts):
        part = taken[:, start : start + per_row]
        axes.pcolormesh(part, cmap=ListedColormap(["#e8e8e8", "#8c1d40"]), vmin=0, vmax=1, edgecolors="w", linewidth=1)
        axes.set_xlim(0, per_row)
        labels = [visible(piece).replace(" ", "\N{OPEN BOX}") for piece in pieces[start : start + per_row]]
        axes.set_xticks([i + 0.5 for i in range(len(labels))], labels, rotation=0 if longest == 1 else 90)
        axes.set_yticks([i + 0.5 for i in range(len(layers))], [f"block {layer}" for layer in layers])
        axes.tick_params(length=0, labelsize=8)
        axes.tick_params(axis="x", labelfontfamily="monospace", pad=1)
        for spine in axes.spines.values():
            spine.set_visible(False)
    share = taken.mean()
    figure.suptitle(f"Dark: the block processed the token ({share:.0%} of all). Light: the token went around it.")
    write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower(), dpi=110))
    plt.close(figure)
