"""The house's HTML: tables, cards, figures and numbers as text, in one self-contained page."""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

UNKNOWN = "not known yet"
LONG = 16  # characters of a card's value from which it is set smaller
_LETTERS = "kMGTPEZY"  # of powers of 1,000


def page(title: str, lead: str, body: str) -> bytes:
    """The whole file. `title`: plain text; `lead` and `body`: HTML."""
    text = _PAGE.substitute(title=html.escape(title), lead=lead, body=body)
    return text.encode("ascii", "xmlcharrefreplace")


def figure(image: bytes, caption: str, kind: str = "") -> str:
    """An SVG inside the page. `kind`: "wide", or nothing for half the width."""
    return (
        f'<figure class="{kind}"><img alt="{caption}" src="data:image/svg+xml;base64,'
        f'{base64.b64encode(image).decode()}"><figcaption>{caption}</figcaption></figure>'
    )


def cards(contents: Iterable[tuple[str, str, str]]) -> str:
    """Headline numbers: (value, label, note) each."""
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><b{" class=words" if len(value) > LONG else ""}>{value}</b>'
            f"<span>{label}</span><i>{note}</i></div>"
            for value, label, note in contents
        )
        + "</div>"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells that are HTML already; no head where `head` is empty."""
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def number(value: float, digits: int = 3) -> str:
    """A number with thousands' commas; in words where nobody knows it."""
    return f"{value:,.{digits}f}" if math.isfinite(value) else UNKNOWN


def scaled(value: float, form: str = ".1f") -> str:
    """A count of any size: "950", "12.3 k", "10.0 G"; `form`: of what stands before a letter."""
    if not math.isfinite(value):
        return UNKNOWN
    if abs(value) < 9_999.5:
        return f"{value:,.4g}"
    power = 0
    while abs(value) >= 999.95 and power < len(_LETTERS):
        value, power = value / 1000, power + 1
    return f"{value:,{form}} {_LETTERS[power - 1]}"


def signed(value: float) -> str:
    """A change."""
    return f"{value:+.3f}" if math.isfinite(value) else UNKNOWN


def percent(share: float) -> str:
    """A share of 1."""
    return f"{share:.1%}" if math.isfinite(share) else UNKNOWN


def duration(seconds: float) -> str:
    """As in "2 h 5 min"."""
    if not math.isfinite(seconds):
        return UNKNOWN
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def replace_file(path: Path, content: bytes) -> None:
    """Write by rename: a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0; background: #f4f5f7; color: #1b2330;
       font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 60px; }
h1 { margin: 0; font-size: 28px; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 18px; }
.lead { margin: 2px 0 24px; color: #5a6577; }
.banner, li, figcaption { overflow-wrap: anywhere; }
.banner { padding: 10px 14px; background: #fff4d6; border-left: 4px solid #d99a00; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.card, figure, .scroll { background: #fff; border: 1px solid #e1e5eb; border-radius: 8px; }
.card { padding: 14px 16px; min-width: 0; overflow-wrap: anywhere; }
.card b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card b.words { font-size: 14px; line-height: 1.5; }
.card span { display: block; font-size: 13px; }
.card i { display: block; font-size: 12px; font-style: normal; color: #5a6577; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; margin-top: 12px; }
figure { margin: 0; padding: 12px 14px; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; }
figcaption { font-size: 13px; color: #5a6577; }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 13px;
        font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: left; border-bottom: 1px solid #eceff3; }
td { max-width: 340px; overflow-wrap: break-word; }
tbody tr:last-child td { border-bottom: 0; }
th { font-weight: 600; color: #5a6577; }
@media (max-width: 720px) { .figures { grid-template-columns: 1fr; } }
</style>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>
$body
</main>
</html>
""")
