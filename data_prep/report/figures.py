"""The figures of a prepared folder's page: counts and seconds -> SVG, drawn without a display.

matplotlib is imported when the first figure is drawn: it takes as long as all the rest of a start.
"""

import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from data_prep.cleaning.funnel import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure = Literal["characters", "documents"]

KEPT, REMOVED, CHANGED, ADDED = "#3b6fb5", "#c8452d", "#d99a00", "#2f8f6b"
READ, MUTED, TRACK = "#3f4756", "#6b7686", "#e3e9f2"
HALF = (4.8, 2.9)  # inches; drawn at 500 pixels on a desk and 350 on a telephone
SLIVER = 0.03  # inches; the least that a bar of something has
MOST_LABELS = 16  # bars of the width of half a page with room for a number each
LOG_ABOVE = 30  # a histogram whose peak is this many times its median bar has a log scale
_STYLE = {
    "svg.hashsalt": "prepared",  # the same counts give the same bytes
    "text.parse_math": False,  # a dollar sign is a dollar sign
    "font.size": 9.5,
    "text.color": "#1b2330",
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#b4bcc8",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e8ebf0",
    "axes.axisbelow": True,
}


@dataclass(frozen=True)
class _Layout:
    """Where the funnel's parts stand, in inches from the top left corner of the figure."""

    width: float
    top: float  # middle of the first row
    row: float  # from row to row
    bar: float  # from the left edge of a bar to that of its numbers
    height: float  # of a bar
    panels: Mapping[Measure, tuple[float, float]]  # bar's left edge, and its middle below its row
    label: tuple[float, str]  # left or right edge of a label, and which of them


_WIDE = _Layout(
    width=10.4,
    top=0.62,
    row=0.36,
    bar=2.15,
    height=0.17,
    panels={"characters": (3.12, 0.0), "documents": (6.95, 0.0)},
    label=(2.98, "right"),
)
_NARROW = _Layout(
    width=3.7,
    top=0.16,
    row=0.68,
    bar=1.95,
    height=0.13,
    panels={"characters": (0.05, 0.2), "documents": (0.05, 0.38)},
    label=(0.05, "left"),
)
_COUNT, _SHARE = 0.56, 1.2  # right edges of a bar's numbers, from its end
_LINE = 34  # characters of a label beside its bar


def funnel(rows: Sequence[Row], is_narrow: bool = False) -> bytes:
    """Draw what was read, what each rule took of what was left, and what was kept.

    `is_narrow`: for a telephone, with the labels above the bars.
    """
    layout = _NARROW if is_narrow else _WIDE
    height = layout.top + layout.row * len(rows) - (0.08 if is_narrow else 0.14)
    with _figure((layout.width, height)) as figure:
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, layout.width), ylim=(height, 0))
        axes.set_axis_off()
        x, side = layout.label
        for index, row in enumerate(rows):
            is_end = index in (0, len(rows) - 1)
            label = row.label.strip() if is_narrow else _wrapped(row.label.strip())
            axes.text(
                x, layout.top + index * layout.row, label, ha=side, va="center", linespacing=1.08,
                weight="bold" if is_end else "normal",
            )  # fmt: skip
        _panel(axes, layout, "characters", rows, not is_narrow)
        _panel(axes, layout, "documents", rows, not is_narrow)
        return _svg(figure)


def document_lengths(counts: Sequence[int]) -> bytes:
    """Draw a histogram of documents; bin i holds those of 2^i to 2^(i + 1) - 1 tokens."""
    held = [index for index, count in enumerate(counts) if count] or [0]
    # A bin of air on each side: a single bar is still a histogram.
    bins = range(max(held[0] - 1, 0), min(held[-1] + 2, len(counts)))
    with _figure(HALF, layout="constrained") as figure:
        axes = figure.add_subplot()
        shown = counts[bins[0] : bins[-1] + 1]
        bars = axes.bar([index + 0.5 for index in bins], shown, 0.92, color=KEPT)
        if len(bins) <= MOST_LABELS:
            texts = [compact(count) if count else "" for count in shown]
            axes.bar_label(bars, texts, padding=2, color=MUTED, size=7)
        edges = range(bins[0], bins[-1] + 2, 1 + len(bins) // 11)
        axes.set_xticks(list(edges), [_binary(1 << edge) for edge in edges])
        axes.set_xlabel("tokens in a document")
        _count_axis(axes, "training documents", counts)
        return _svg(figure)


def row_lengths(counts: Sequence[int]) -> bytes:
    """Draw a histogram of rows; counts[i] rows hold i tokens, special ones with them."""
    with _figure(HALF, layout="constrained") as figure:
        axes = figure.add_subplot()
        edges = [index - 0.5 for index in range(len(counts) + 1)]
        axes.stairs(counts, edges, fill=True, color=KEPT, linewidth=0.4, baseline=0)
        axes.set_xlim(0, len(counts) - 0.5)
        axes.set_xticks(range(0, len(counts), -(-(len(counts) - 1) // 8) or 1))
        axes.set_xlabel("tokens in a row")
        _count_axis(axes, "training rows", counts)
        return _svg(figure)


def seconds(values: Mapping[str, float], texts: Sequence[str], num_bars: int) -> bytes:
    """Draw a bar for each name and its text behind it; as high as a figure of `num_bars`."""
    with _figure((HALF[0], 0.2 + 0.29 * num_bars), layout="constrained") as figure:
        axes = figure.add_subplot()
        thickness = 0.55 * max(len(values), 1) / num_bars
        bars = axes.barh(list(values), list(values.values()), thickness, color=KEPT)
        axes.bar_label(bars, list(texts), padding=4, color=MUTED)
        axes.set_ylim(max(len(values), 1) - 0.5, -0.5)
        axes.set_xlim(0, 1.45 * max([*values.values(), 1e-9]))
        axes.grid(visible=False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(axis="y", length=0, labelcolor="#1b2330")
        return _svg(figure)


def compact(count: int) -> str:
    """Write a count in five characters or so: 7, 9,950, 10.2k, 351M."""
    if abs(count) < 10_000:
        return f"{abs(count):,}"
    value = abs(count) / 1000
    for unit in "kMB":
        if value < 999.5:
            return f"{value:.0f}{unit}" if value >= 99.95 else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:,.1f}T"


def percent(share: float) -> str:
    """Write a share so that neither little reads as nothing nor almost all as all."""
    if 0 < share < 0.00005:
        return "<0.01%"
    if share in (0, 1):
        return f"{share:.0%}"
    return ">99.99%" if 0.99995 <= share < 1 else f"{share:.2%}"


def _panel(
    axes: "Axes", layout: _Layout, measure: Measure, rows: Sequence[Row], has_head: bool
) -> None:
    """Draw one measure's bars: a waterfall from what was read to what was kept."""
    counts = [int(getattr(row, measure)) for row in rows]
    left, below = layout.panels[measure]
    total = max(counts[0], 1)
    # What is left before each rule, which may make text longer.
    before = [counts[0] - sum(counts[1:index]) for index in range(1, len(counts))]
    scale = (layout.bar - 0.1) / max(total, *before)
    if has_head:
        y = layout.top - 0.36
        axes.text(left, y, measure, va="center", color=MUTED, weight="bold")
    for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
        y = layout.top + index * layout.row + below
        sign = ""
        if index in (0, len(rows) - 1):
            _bar(axes, left, y, count * scale, layout.height, KEPT if index else READ)
        else:
            colour, sign = _colour_and_sign(row.label, count)
            low, high = sorted((before[index - 1], before[index - 1] - count))
            _bar(axes, left, y, high * scale, layout.height, TRACK)
            width = max((high - low) * scale, SLIVER) if count else 0.0
            _bar(axes, left + max(0.0, high * scale - width), y, width, layout.height, colour)
        _numbers(axes, left + layout.bar, y, sign, count, total, measure if not has_head else "")


def _colour_and_sign(label: str, count: int) -> tuple[str, str]:
    if count < 0:
        return ADDED, "+"
    is_change = label.strip().startswith(("changed", "joined"))
    return CHANGED if is_change else REMOVED, "\N{MINUS SIGN}" if count else ""


def _bar(axes: "Axes", left: float, y: float, width: float, height: float, colour: str) -> None:
    if width > 0:
        axes.barh(y, width, height, left, color=colour, linewidth=0)


def _numbers(
    axes: "Axes", x: float, y: float, sign: str, count: int, total: int, unit: str
) -> None:
    """Write a bar's count and its share of what was read, in columns or in words with a unit."""
    style: dict[str, Any] = {"va": "center", "ha": "right"}
    colour = "#1b2330" if count else "#aab2be"
    if unit:
        share = f", {percent(abs(count) / total)}" if count else ""
        text = f"{sign}{compact(count)} {unit}{share}"
        axes.text(x, y, text, va="center", ha="left", color=colour, size=8)
        return
    axes.text(x + _COUNT, y, f"{sign}{compact(count)}", color=colour, **style)
    if count:
        axes.text(x + _SHARE, y, percent(abs(count) / total), color=MUTED, **style)


def _wrapped(label: str) -> str:
    """Break a long label in two lines of about one length."""
    if len(label) <= _LINE:
        return label
    spaces = [index for index, character in enumerate(label) if character == " "]
    middle = min(spaces, key=lambda index: abs(index - len(label) / 2), default=0)
    return f"{label[:middle]}\n{label[middle:].strip()}"


def _count_axis(axes: "Axes", label: str, counts: Sequence[int]) -> None:
    """Label the y axis; a log scale where one peak would flatten everything else."""
    held = sorted(count for count in counts if count)
    is_log = bool(held) and held[-1] > LOG_ABOVE * held[len(held) // 2]
    axes.set_yscale("log" if is_log else "linear")
    axes.set_ylim(bottom=0.7 if is_log else 0)
    axes.set_ylabel(f"{label} (log scale)" if is_log else label)
    axes.yaxis.set_major_formatter(lambda value, _: _tick(value))
    axes.tick_params(axis="both", which="both", length=0)


def _tick(value: float) -> str:
    """Write a whole count; nothing between two of them."""
    return compact(round(value)).replace(".0", "") if value == round(value) > 0 else ""


def _binary(count: int) -> str:
    """Write a power of two: 512, 1k, 2M."""
    for unit in ("", "k"):
        if count < 1024:
            return f"{count}{unit}"
        count //= 1024
    return f"{count:,}M"


@contextmanager
def _figure(size: tuple[float, float], layout: str | None = None) -> Iterator["Figure"]:
    # Figure itself, not pyplot: no global state, no display, nothing to close.
    library = importlib.import_module("matplotlib")
    with library.rc_context(_STYLE):
        yield importlib.import_module("matplotlib.figure").Figure(figsize=size, layout=layout)


def _svg(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    content = buffer.getvalue()
    return content[content.index(b"<svg") :]
