"""Heat maps of attention, and its shares per layer: ModelAttention -> SVG or PNG bytes."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from stacking.attention_maps import ModelAttention
from stacking.report_figures import MUTED, TRAIN, UNIGRAM, drawing, image_bytes

FloatArray = npt.NDArray[np.float32]
Cell = tuple[str, FloatArray] | None
"""Its name, or "", and a map [S,S]; None: an empty place."""

SHARE_TITLES = ("on neighbours (-1, 0, +1)", "on the start token", "on the separator")
COLOURS = ("#3b6fb5", "#d99a00", "#c8452d", "#2f8f6b", "#7a4fa3", "#1f9bb0", "#b0527c", "#6b6b2a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

SHADES = LinearSegmentedColormap.from_list("shades", ["white", "#a9c6e8", TRAIN, "#0d1b33"])

MOST_WIDE, MOST_HIGH = 15.0, 18.0  # inches of maps
LINE = 12  # letters of the sentence an inch
MOST_LABELLED, LONGEST_LABEL = 32, 14  # tokens; letters
TOKEN, SMALLEST, LARGEST = 0.092, 0.7, 2.9  # inches: a token with its label, a map
GAP, NAMED_GAP = 0.1, 0.26  # inches between maps, and where each has its name
TICKS = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Mosaic:
    """Maps in rows and columns.

    Attributes:
        cells: by row, then column.
        rows: a name for each row.
        columns: a name for each column.
        tokens: [S] of the sentence.
        title: one line above all.
    """

    cells: Sequence[Sequence[Cell]]
    rows: Sequence[str]
    columns: Sequence[str]
    tokens: Sequence[str]
    title: str

    @property
    def side(self) -> float:
        """Inches of a map."""
        side = min(max(TOKEN * len(self.tokens), SMALLEST), LARGEST)
        return min(side, MOST_WIDE / len(self.columns), MOST_HIGH / len(self.rows))

    @property
    def labels(self) -> list[str]:
        """The tokens, shortened; none where a map has no room for them."""
        length, longest = len(self.tokens), LONGEST_LABEL
        if length > MOST_LABELLED or self.side < 0.99 * TOKEN * length:
            return []
        return [t if len(t) <= longest else f"{t[: longest - 2]}.." for t in self.tokens]

    @property
    def label_room(self) -> float:
        """Inches that the longest label takes."""
        return 0.06 + 0.054 * max(map(len, self.labels), default=0)

    @property
    def gaps(self) -> tuple[float, float]:
        """Inches between columns and between rows."""
        has_names = any(cell and cell[0] for row in self.cells for cell in row)
        return GAP, NAMED_GAP if has_names else GAP


def mosaic_image(mosaic: Mosaic, file_format: str) -> bytes:
    """All maps in one scale of colours, which is that of the square root."""
    (across, down), side = mosaic.gaps, mosaic.side
    width = max(6.0, len(mosaic.columns) * (side + across) + mosaic.label_room + 1.9)
    sentence = textwrap.fill(" ".join(mosaic.tokens), int(LINE * width), max_lines=3)
    maps_height = len(mosaic.rows) * (side + down)
    height = maps_height + mosaic.label_room + 0.7 + 0.14 * sentence.count("\n")
    # A token may be a dollar, which would begin a formula.
    plain = matplotlib.rc_context({"text.parse_math": False})
    with drawing((width, height)) as (figure, axes), plain:
        figure.set_layout_engine("compressed")  # which knows of images' proportions
        axes.grid(visible=False)
        axes.tick_params(length=0, labelsize=6)
        axes.spines[:].set_visible(False)
        image = _paint(axes, mosaic)
        # Pixels of a vector graphic are the viewer's to scale.
        image.set_interpolation("none" if file_format == "svg" else "auto")
        _name(axes, mosaic)
        bar = figure.colorbar(
            image, ax=axes, ticks=TICKS if maps_height > 2 else TICKS[::2], format="%g",
            fraction=0.02, aspect=25, pad=0.015, anchor=(0.0, 1.0), panchor=(1.0, 1.0),
            shrink=min(1.0, 2.5 / maps_height),
        )  # fmt: skip
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7)
        bar.set_label("attention", fontsize=8)
        figure.suptitle(f"{mosaic.title}\n{sentence}", x=0.01, ha="left", fontsize=8)
        return image_bytes(figure, file_format)


def shares_image(models: Sequence[ModelAttention], file_format: str) -> bytes:
    """For each of SHARES a panel: mean over the heads of each layer, a line a model."""
    with drawing((10.0, 3.6)) as (figure, first):
        first.remove()
        panels = figure.subplots(1, len(SHARE_TITLES), sharey=True)
        deepest = max(len(model.origins) for model in models)
        for kind, (axes, title) in enumerate(zip(panels, SHARE_TITLES, strict=True)):
            for index, model in enumerate(models):
                shares = model.shares[..., kind].mean(1).tolist()
                # The first is the widest: it shows under those that are equal to it.
                width = 1.2 + 2.4 * (len(models) - 1 - index) / max(1, len(models) - 1)
                axes.plot(
                    range(1, len(shares) + 1), shares, color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index % len(MARKERS)], markersize=3 + width, linewidth=width,
                    label=f"{model.name}: {model.caption}",
                )  # fmt: skip
            axes.axhline(float(models[0].uniform[kind]), color=UNIGRAM, linestyle=":",
                         linewidth=1, label="equal attention to all")  # fmt: skip
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("layer")
            axes.set_xlim(0.5, deepest + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel("share of the words' attention")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(handles), 3),
                      fontsize=8)  # fmt: skip
        return image_bytes(figure, file_format)


def _paint(axes: Axes, mosaic: Mosaic) -> AxesImage:
    """The maps as one image, framed; a unit is a token. Where nothing is, it is white."""
    length = len(mosaic.tokens)
    canvas = np.full(_extent(mosaic), np.nan, np.float32)
    frames = []
    for row, cells in enumerate(mosaic.cells):
        for column, cell in enumerate(cells):
            if cell is None:
                continue
            x, y = _corner(mosaic, row, column)
            canvas[y : y + length, x : x + length] = cell[1]
            left, top, right, bottom = x - 0.5, y - 0.5, x + length - 0.5, y + length - 0.5
            frames.append([(left, top), (right, top), (right, bottom), (left, bottom), (left, top)])
            if cell[0]:
                axes.text(x + (length - 1) / 2, top, cell[0], ha="center", va="bottom", fontsize=7)
    lines = LineCollection(frames, colors=MUTED, linewidths=0.5, clip_on=False)
    axes.add_collection(lines, autolim=False)
    return axes.imshow(canvas, cmap=SHADES, norm=PowerNorm(0.5, 0, 1))


def _name(axes: Axes, mosaic: Mosaic) -> None:
    """Names of rows and columns, and the tokens at the left and below where there is room."""
    length, rows, columns = len(mosaic.tokens), len(mosaic.rows), len(mosaic.columns)
    xs = [_corner(mosaic, 0, column)[0] for column in range(columns)]
    ys = [_corner(mosaic, row, 0)[1] for row in range(rows)]
    for x, name in zip(xs, mosaic.columns, strict=True):
        axes.annotate(name, (x + (length - 1) / 2, -0.5), (0, 3), ha="center", va="bottom",
                      textcoords="offset points", fontsize=8)  # fmt: skip
    places = range(len(mosaic.labels))
    axes.set_xticks([x + i for x in xs for i in places], mosaic.labels * columns, rotation=90)
    axes.set_yticks([y + i for y in ys for i in places], mosaic.labels * rows)
    beside = -72 * mosaic.label_room - 4
    for y, name in zip(ys, mosaic.rows, strict=True):
        axes.annotate(name, (-0.5, y + (length - 1) / 2), (beside, 0), ha="right", va="center",
                      textcoords="offset points", fontsize=8)  # fmt: skip


def _corner(mosaic: Mosaic, row: int, column: int) -> tuple[int, int]:
    """x and y of a map's first token."""
    length, per_inch = len(mosaic.tokens), len(mosaic.tokens) / mosaic.side
    across, down = (max(1, round(gap * per_inch)) for gap in mosaic.gaps)
    return column * (length + across), row * (length + down)


def _extent(mosaic: Mosaic) -> tuple[int, int]:
    """Tokens from top to bottom and from left to right."""
    x, y = _corner(mosaic, len(mosaic.rows) - 1, len(mosaic.columns) - 1)
    return y + len(mosaic.tokens), x + len(mosaic.tokens)
