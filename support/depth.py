"""
Show routing: a text coloured by how many routed blocks processed each token, and a map of which blocks did.

A token's depth is the number of routed blocks that processed it, or None if it is not known.
"""

import io
import re
import warnings

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from support.files import write_whole
from support.options import printable

MARKS = ".123456789abcdefghijklmnopqrstuvwxyz"  # a sign for each depth, if there is no colour
END_OF_LINE = "\N{PILCROW SIGN}"


class PlainPrinter:
    """Prints a text token by token."""

    def legend(self):
        pass

    def add_all(self, pieces, depths):
        for piece, depth in zip(pieces, depths):
            self.add(piece, depth)

    def add(self, piece, depth):
        """Print the next token's text. `depth` is its depth."""
        print(printable(piece), end="", flush=True)

    def close(self):
        print()


class DepthPrinter(PlainPrinter):
    """
    Prints a text token by token and shows each depth as a colour. With fewer than 256 colours (a file, a pipe,
    NO_COLOR, some terminals) it prints a line of marks under each line of text instead.
    """

    def __init__(self, routed, console=None):
        self.routed = routed
        self.console = console or Console(highlight=False)
        # With 16 colours several depths would look the same.
        self.colour = self.console.color_system in ("256", "truecolor") and not self.console.no_color
        self.column = 0
        self.line = self.marks = ""  # without colour, the line so far

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
            mark = " " if depth is None else MARKS[min(depth, len(MARKS) - 1)]
            self.line += piece
            self.marks += mark.ljust(width)[:width]
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
    """A token's text on one line: signs for line ends and control characters, spaces for other invisible ones."""
    return "".join(c if c.isprintable() else " " for c in printable(piece.replace("\n", END_OF_LINE)))


def style(depth, routed):
    """
    No colour for depth 0, else a background from pale yellow to dark red and a text colour that is readable on it. It
    looks the same on dark and light terminals and darkens steadily, so it also works in greyscale.
    """
    if not depth:
        return ""
    share = depth / routed
    red, green, blue = 255 - round(115 * share**2), round(240 * (1 - share)), round(140 * (1 - share))
    bright = 0.2126 * (red / 255) ** 2.2 + 0.7152 * (green / 255) ** 2.2 + 0.0722 * (blue / 255) ** 2.2 > 0.18
    return f"{'#000000' if bright else '#ffffff'} on rgb({red},{green},{blue})"


def save_svg(pieces, depths, routed, path):
    """Write the coloured text as a picture."""
    console = Console(
        file=io.StringIO(), record=True, width=88, force_terminal=True, color_system="truecolor", no_color=False
    )
    printer = DepthPrinter(routed, console)
    printer.legend()
    printer.add_all(pieces, depths)
    printer.close()
    svg = console.export_svg(title="where the depth went")
    svg = re.sub(r"@font-face {.*?}", "", svg, flags=re.DOTALL)  # no fonts from the web; any monospace font will do
    write_whole(path, lambda file: file.write(svg.encode("utf-8")))


def routing_map(taken, pieces, layers, path):
    """
    Draw the paper's picture: tokens on one axis, routed blocks on the other, dark where the block processed the token.

    taken: (L, T) bool; pieces: the T tokens' texts; layers: the L routed blocks' numbers. Long texts take several rows.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure  # not pyplot, which would need a screen

    longest = max(len(piece) for piece in pieces)
    per_row = 100 if longest == 1 else 50
    starts = range(0, len(pieces), per_row)
    height = 0.16 * len(layers) + 0.35 + 0.07 * longest
    figure = Figure(figsize=(14, 0.6 + height * len(starts)), layout="constrained")
    for axes, start in zip(figure.subplots(len(starts), squeeze=False)[:, 0], starts):
        part = taken[:, start : start + per_row]
        axes.pcolormesh(part, cmap=ListedColormap(["#e8e8e8", "#8c1d40"]), vmin=0, vmax=1, edgecolors="w", linewidth=1)
        axes.set_xlim(0, per_row)
        labels = [visible(piece).replace(" ", "\N{OPEN BOX}") for piece in pieces[start : start + per_row]]
        rotation = 0 if longest == 1 else 90
        axes.set_xticks([i + 0.5 for i in range(len(labels))], labels, rotation=rotation, parse_math=False)
        axes.set_yticks([i + 0.5 for i in range(len(layers))], [f"block {layer}" for layer in layers])
        axes.tick_params(length=0, labelsize=8)
        axes.tick_params(axis="x", labelfontfamily="monospace", pad=1)
        axes.spines[:].set_visible(False)
    figure.suptitle(f"Dark: the block processed the token ({taken.mean():.0%} of all). Light: the token skipped it.")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        write_whole(path, lambda file: figure.savefig(file, format=path.suffix[1:].lower(), dpi=110))
