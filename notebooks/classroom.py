"""
Shared by the notebooks: one style for all pictures, and functions for the pictures that they draw often.

On a projector, in greyscale and for colour-blind viewers the colours stay distinguishable, and a line style, marker or
hatch always repeats what a colour says. Every picture is shown by `show` or `Live`, which give it an alternative text.
"""

import html
import io

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from cycler import cycler
from IPython.display import HTML, Image, display
from matplotlib.colors import ListedColormap

from support.depth import style, visible

DARK, RED, GREY, GOLD, BLUE = "#1b1b1b", "#b5173b", "#8a8a8a", "#e3a008", "#5b8fd6"
HATCHED = [dict(color=c, hatch=h, edgecolor="w") for c, h in ((RED, None), (GREY, "//"), (DARK, "xx"))]
plt.rcParams.update(
    {
        "axes.prop_cycle": cycler(color=[RED, DARK, BLUE, GOLD, GREY])
        + cycler(linestyle=["-", "--", "-.", ":", "-"])
        + cycler(marker=["o", "s", "^", "D", "x"]),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "figure.dpi": 90,
        "figure.figsize": (8, 3),
        "grid.alpha": 0.3,
        "image.cmap": "cividis",
        "lines.markersize": 4,
    }
)


def picture(figure, description):
    """The figure as a PNG. Its alternative text is the description and the titles, which state the findings."""
    titles = [axes.get_title("left") for axes in figure.axes]
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    return Image(file.getvalue(), alt=". ".join([description, *filter(None, titles)]))


def show(description, figure=None):
    """Show the figure, by default the current one, with a description for those who cannot see it."""
    figure = figure or plt.gcf()
    display(picture(figure, description))
    plt.close(figure)  # otherwise the notebook shows it again at the end of the cell


def columns(axes, x, words, title, marked=(), limit=8):
    """
    Draw x (T, C), whole numbers, as T columns of C cells, channel 0 on top, and frame the marked ones. The shades go
    from orange (-limit) over white (0) to purple (limit).
    """
    x = np.asarray(x.detach())
    axes.pcolormesh(x.T, edgecolors="#cccccc", linewidth=1, cmap="PuOr", vmin=-limit, vmax=limit)
    for i in marked:
        axes.add_patch(plt.Rectangle((i, 0), 1, x.shape[1], fill=False, edgecolor=RED, linewidth=3))
    for (i, c), value in np.ndenumerate(x):
        colour = "w" if abs(value) > 0.6 * limit else "k"
        axes.text(i + 0.5, c + 0.5, f"{value:.0f}".replace("-", "−"), ha="center", va="center", color=colour)
    axes.set_xticks([i + 0.5 for i in range(len(words))], words)
    axes.set_yticks([c + 0.5 for c in range(x.shape[1])], range(x.shape[1]))
    axes.set_ylabel("channel")
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.grid(False)


def bars(axes, values, words, title, marked=()):
    """Draw a bar for each word, the marked ones dark red and hatched."""
    for i, value in enumerate(np.asarray(torch.as_tensor(values).detach())):
        axes.bar(i, value, color=RED if i in marked else GREY, hatch="//" if i in marked else None, edgecolor="w")
    axes.set_xticks(range(len(words)), words)
    axes.axhline(0, color=DARK, linewidth=0.8)
    axes.set_title(title)


def lengths(axes, values, title):
    """Draw a horizontal bar for each name of {name: value}, at most three."""
    for (name, value), look in zip(values.items(), HATCHED):
        axes.barh(name, value, **look)
    axes.invert_yaxis()
    axes.set_title(title)


def parts(axes, values, title, stacked=False):
    """Draw horizontal bars for {part: {name: value}}, the parts of a name side by side or, stacked, end to end."""
    names = list(next(iter(values.values())))
    height, left = 0.7 if stacked else 0.7 / len(values), np.zeros(len(names))
    for i, (part, of_part) in enumerate(values.items()):
        y = np.arange(len(names)) + (0 if stacked else (i - (len(values) - 1) / 2) * height)
        length = np.array([float(of_part[name]) for name in names])
        axes.barh(y, length, height, left=left, label=part, **HATCHED[i])
        left = left + length if stacked else left
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_title(title)


def routing_map(axes, taken, pieces, title, rows):
    """Draw which tokens each row (a block, expert, step or text) took, the first row on top; taken (rows, T)."""
    taken = np.asarray(taken)
    axes.pcolormesh(taken, cmap=ListedColormap(["#ececec", RED]), vmin=0, vmax=1, edgecolors="w", linewidth=1)
    labels = [visible(p).replace(" ", "␣") for p in pieces]
    axes.set_xticks([i + 0.5 for i in range(len(pieces))], labels, parse_math=False)
    axes.set_yticks([i + 0.5 for i in range(len(taken))], rows)
    axes.tick_params(length=0, labelsize=8)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.grid(False)


def coloured(pieces, depths, routed):
    """Show a text whose tokens are darker the more of the `routed` blocks processed them; depths: one per piece."""

    def span(text, depth):
        colour, _, background = style(depth, routed).partition(" on ")  # empty for depth 0
        return f'<span style="color: {colour}; background: {background}">{text}</span>' if depth else text

    legend = " ".join(span(f"&nbsp;{depth}&nbsp;", depth) for depth in range(routed + 1))
    text = "".join(span(html.escape(visible(piece)) + "\n" * (piece == "\n"), d) for piece, d in zip(pieces, depths))
    display(HTML(f"routed blocks that processed a character: {legend}<pre>{text}</pre>"))


def animate(draw, frames, description):
    """
    Show an animation with a picture for each frame, drawn by draw(axes, frame). It is a PNG that plays in any browser,
    without a network; where it cannot, it shows the last frame.
    """
    figure, axes = plt.subplots()
    images = []
    for frame in frames:
        axes.clear()
        draw(axes, frame)
        file = io.BytesIO()
        figure.savefig(file, format="png")
        image = PIL.Image.open(file).convert("RGB")
        # Few colours make a small file; the method keeps white white.
        images.append(image.quantize(palette=images[0]) if images else image.quantize(32, PIL.Image.MAXCOVERAGE))
    plt.close(figure)
    options = {"append_images": images, "default_image": True, "duration": 500, "loop": 0}
    file = io.BytesIO()
    images[-1].save(file, format="png", save_all=True, **options)
    display(Image(file.getvalue(), alt=description))


class Live:
    """A picture that changes while a cell runs: each `update` calls draw(axes), or with several panels draw(panels)."""

    def __init__(self, draw, description, panels=1, figsize=None):
        self.figure, self.axes = plt.subplots(1, panels, figsize=figsize)
        self.draw, self.description, self.handle = draw, description, display(display_id=True)
        plt.close(self.figure)  # otherwise the notebook shows it again at the end of the cell

    def update(self):
        for axes in self.figure.axes:
            axes.clear()
        self.draw(self.axes)
        self.handle.update(picture(self.figure, self.description))
