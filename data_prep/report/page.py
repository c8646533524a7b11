"""PrepareReport -> OUT/report.html, one self-contained page: what came in, what was kept, how long
it took and how it can be made again.
"""

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from string import Template

from data_prep.report import figures as prep_figures
from data_prep.report.figures import compact, percent
from data_prep.report.report import PrepareReport
from data_prep.shard_format import SPLITS, Manifest, write_atomically

REPORT = "report.html"
MAX_ROWS = 200  # of a table; manifest.json has all
SHORT_HASH = 12  # hexadecimal digits


def write_page(report: PrepareReport) -> None:
    """Write OUT/report.html, all of it or nothing; raises OSError."""
    content = page(report).encode("ascii", "xmlcharrefreplace")
    write_atomically(report.out / REPORT, content)


def page(report: PrepareReport) -> str:
    """Return the page of a finished report: HTML without scripts, hosts or other files."""
    manifest = report.manifest
    assert manifest is not None, "a page is made at the end of a run"
    assert not report.is_old, "the page of the run that made the folder stands"
    return _PAGE.substitute(
        title=_escaped(report.out.resolve().name or report.out),
        folder=_escaped(report.out),
        banner=_banner(report),
        cards=_cards(report, manifest),
        splits=_split_table(manifest),
        funnel=_funnel(report),
        lengths=_lengths(report, manifest),
        time=_time(report),
        facts=_facts(manifest),
        settings=_settings(manifest),
        shards=_shards(manifest),
    )


def _banner(report: PrepareReport) -> str:
    """Say what was skipped, with the first messages."""
    notes = []
    if report.cut_documents:
        notes.append(f"A very long document was cut in two: {report.cut_documents:,} times.")
    if report.broken_files:
        notes.append(f"{_count(report.broken_files, 'broken file')}.")
    if report.messages:
        notes.append("Some of the input was skipped; the first faults:")
    if not notes:
        return ""
    items = "".join(f"<li>{_escaped(message)}</li>" for message in report.messages)
    return f'<div class="banner">{" ".join(notes)}{f"<ul>{items}</ul>" if items else ""}</div>'


def _cards(report: PrepareReport, manifest: Manifest) -> str:
    facts, documents = manifest.statistics, manifest.num_documents
    sequences = sum(entry.rows for entry in manifest.training)
    cards = [
        (f"{documents['training']:,}", "training documents",
         f"{documents['validation']:,} held out"),
        (compact(round(facts["training_tokens"])), "training tokens", "without special ones"),
        (f"{sequences:,}", "training sequences", f"of {manifest.max_seq_length:,} tokens"),
        (f"{manifest.vocab_size:,}", "word pieces", "in the vocabulary"),
        (percent(facts["training_padding_share"]), "padding", "in training sequences"),
        (f"{report.megabytes_per_second:,.1f} MB/s", "speed",
         f"{report.num_input_bytes / 1e6:,.1f} MB, {_count(report.num_workers, 'worker')}"),
    ]  # fmt: skip
    return "".join(
        f'<div class="card"><b>{value}</b><span>{label}</span><i>{note}</i></div>'
        for value, label, note in cards
    )


def _split_table(manifest: Manifest) -> str:
    """Make a row of each quantity: two columns fit on a telephone."""
    facts = manifest.statistics
    entries = [manifest.entries(split) for split in SPLITS]
    rows = [
        ("documents", *(f"{manifest.num_documents[split]:,}" for split in SPLITS)),
        ("tokens, without special ones", *(f"{facts[f'{s}_tokens']:,.0f}" for s in SPLITS)),
        ("sequences", *(f"{sum(one.rows for one in shards):,}" for shards in entries)),
        ("shards", *(f"{len(shards):,}" for shards in entries)),
        ("padding", *(percent(facts[f"{split}_padding_share"]) for split in SPLITS)),
    ]
    return _table(("", *SPLITS), rows)


def _funnel(report: PrepareReport) -> str:
    """Draw the figure twice, for a screen and for a telephone, and add its exact numbers."""
    rows = report.funnel.rows()
    alt = "Characters and documents: read, removed by each rule, kept"
    picture = (
        '<figure class="wide"><picture><source media="screen and (max-width: 640px)" '
        f'srcset="{_data(prep_figures.funnel(rows, is_narrow=True))}">'
        f'<img alt="{alt}" src="{_data(prep_figures.funnel(rows))}"></picture>'
        "<figcaption>Each rule works on what the ones above it have left: red is taken away, "
        "amber changed, green added. Shares are of what was read; a bar is never drawn too thin "
        "to be seen.</figcaption></figure>"
    )
    lines = [
        (_escaped(row.label.strip()), f"{row.documents:,}", f"{row.paragraphs:,}",
         f"{row.characters:,}", percent(abs(row.characters) / max(rows[0].characters, 1)))
        for row in rows
    ]  # fmt: skip
    head = ("", "documents", "paragraphs", "characters", "share of characters")
    return f'<div class="figures">{picture}</div>{_table(head, lines, "counts ends")}'


def _lengths(report: PrepareReport, manifest: Manifest) -> str:
    rows = report.row_lengths
    padding = manifest.statistics["training_padding_share"]
    return (
        '<div class="figures">'
        + _figure(
            f"Training documents by their tokens, {sum(report.document_lengths):,} in all; a bar "
            "holds those of its left number up to its right one",
            prep_figures.document_lengths(report.document_lengths),
        )
        + _figure(
            f"Training rows by their tokens, special ones included: {percent(padding)} of all "
            f"places are padding, {percent(rows[-1] / sum(rows))} of the rows are full",
            prep_figures.row_lengths(rows),
        )
        + "</div>"
    )


def _time(report: PrepareReport) -> str:
    total = sum(report.seconds.values())
    of_workers = max(sum(report.worker_seconds.values()), 1e-9)
    parts = dict(sorted(report.worker_seconds.items(), key=lambda part: (-part[1], part[0])))
    num_bars = max(len(report.seconds), len(parts), 1)
    steps = [_duration(value) for value in report.seconds.values()]
    shares = [f"{_duration(value)}, {value / of_workers:.0%}" for value in parts.values()]
    return (
        '<div class="figures">'
        + _figure(
            f"Wall time of each step, {_duration(total)} in all",
            prep_figures.seconds(report.seconds, steps, num_bars),
        )
        + _figure(
            f"Time of each part inside {_count(report.num_workers, 'worker')}, "
            f"{_duration(of_workers)} summed",
            prep_figures.seconds(parts, shares, num_bars),
        )
        + "</div>"
    )


def _facts(manifest: Manifest) -> str:
    special = ", ".join(f"{name} {value}" for name, value in manifest.special_token_ids.items())
    masks = manifest.max_predictions_per_seq
    rows = [
        ("dialect", _escaped(manifest.dialect)),
        ("sequence length", f"{manifest.max_seq_length:,} tokens"),
        ("static masks", f"at most {masks:,} a sequence" if masks else "none: drawn when loaded"),
        ("next-sentence labels", _plain(manifest.has_next_sentence_labels)),
        ("seed", f"{manifest.seed}"),
        ("tokenizer sha256", f"<code>{_escaped(manifest.tokenizer_sha256)}</code>"),
        ("special tokens", _escaped(special)),
        ("format version", f"{manifest.format_version}"),
    ]
    return _table((), rows, "facts")


def _settings(manifest: Manifest) -> str:
    # A long name may break behind an underscore.
    rows = [
        (_escaped(key).replace("_", "_<wbr>"), _escaped(value))
        for key, value in _flat(manifest.settings)
    ]
    return _table((), rows, "facts")


def _shards(manifest: Manifest) -> str:
    rows = [
        (_escaped(entry.file), f"{entry.rows:,}", f"<code>{_escaped(entry.sha256[:SHORT_HASH])}"
         "</code>")
        for split in SPLITS
        for entry in manifest.entries(split)
    ]  # fmt: skip
    return _table(("file", "sequences", "sha256"), rows)


def _flat(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield `outer.inner` and the text of each value; a list of plain values is one line."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        if any(isinstance(one, list | tuple | Mapping) for one in value):
            for number, inner in enumerate(value, 1):
                yield from _flat(inner, f"{key} {number}")
        else:
            yield key, ", ".join(_plain(one) for one in value) or "none"
    else:
        yield key, _plain(value)


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _figure(caption: str, image: bytes) -> str:
    return (
        f'<figure><img alt="{caption}" src="{_data(image)}"><figcaption>{caption}</figcaption>'
        "</figure>"
    )


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "counts") -> str:
    """Make a table of escaped cells, of the first MAX_ROWS rows."""
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    # The first cell of a row is its name.
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(f"<td>{cell}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows[:MAX_ROWS]
    )
    top = f"<thead><tr>{cells}</tr></thead>" if head else ""
    more = len(rows) - MAX_ROWS
    rest = f'<p class="more">{more:,} more in manifest.json</p>' if more > 0 else ""
    return (
        f'<div class="scroll"><table class="{kind}">{top}<tbody>{body}</tbody></table>{rest}</div>'
    )


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _escaped(value: object) -> str:
    return html.escape(str(value))


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title: prepared data</title>
<style>
body { margin: 0; background: #f4f5f7; color: #1b2330;
       font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 60px; }
h1 { margin: 0; font-size: 28px; overflow-wrap: anywhere; }
h2 { margin: 36px 0 12px; font-size: 18px; break-after: avoid; }
.lead { margin: 2px 0 24px; color: #5a6577; overflow-wrap: anywhere; }
.banner { margin-bottom: 16px; padding: 10px 14px; background: #fff4d6;
          border-left: 4px solid #d99a00; overflow-wrap: anywhere; }
.banner ul { margin: 4px 0 0; padding-left: 18px; font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.card, figure, .scroll { background: #fff; border: 1px solid #e1e5eb; border-radius: 8px; }
.card { padding: 14px 16px; }
.card b { display: block; font-size: 22px; line-height: 1.3; font-variant-numeric: tabular-nums; }
.card span { display: block; font-size: 13px; }
.card i { display: block; font-size: 12px; font-style: normal; color: #5a6577; }
.figures { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
figure { margin: 0; padding: 12px 14px; min-width: 0; break-inside: avoid; }
figure.wide { grid-column: 1 / -1; }
figure img { display: block; width: 100%; }
figcaption { margin-top: 6px; font-size: 13px; color: #5a6577; }
.scroll { overflow-x: auto; }
.cards + .scroll, .figures + .scroll { margin-top: 12px; }
table { width: 100%; border-collapse: collapse; font-size: 13px;
        font-variant-numeric: tabular-nums; }
th, td { padding: 8px 12px; text-align: left; border-bottom: 1px solid #eceff3; }
tr { break-inside: avoid; }
tbody tr:last-child > * { border-bottom: 0; }
th { font-weight: 600; color: #5a6577; }
tbody th { font-weight: 400; color: inherit; }
.counts td, .counts thead th:not(:first-child) { text-align: right; }
.ends tr:first-child th, .ends tr:last-child > * { font-weight: 600; }
.counts tbody th { min-width: 120px; }
.ends tbody th { min-width: 170px; }
.facts th { width: 30%; color: #5a6577; }
.facts th, .facts td { padding: 5px 12px; vertical-align: top; overflow-wrap: anywhere; }
code { font-size: 12px; }
.more { margin: 0; padding: 8px 12px; font-size: 13px; color: #5a6577; }
@media (max-width: 720px) {
  main { padding: 20px 12px 40px; }
  .figures { grid-template-columns: minmax(0, 1fr); }
  .cards { grid-template-columns: 1fr 1fr; gap: 8px; }
  th, td { padding: 7px 9px; }
  .facts th { width: 42%; }
}
@media print {
  body { background: none; }
  main { max-width: none; padding: 0; }
  .scroll { overflow-x: visible; }
  .figures { grid-template-columns: 1fr 1fr; }
  .cards { grid-template-columns: repeat(3, 1fr); }
}
</style>
<main>
<h1>$title</h1>
<p class="lead">Prepared for BERT pre-training in $folder</p>
$banner
<div class="cards">$cards</div>
$splits
<h2>From raw text to clean text</h2>
$funnel
<h2>Lengths</h2>
$lengths
<h2>Time</h2>
$time
<h2>Format</h2>
$facts
<h2>Settings</h2>
$settings
<h2>Shards</h2>
$shards
</main>
</html>
""")
