"""What is shown of attention: which layers and heads, the files, the table."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stacking.attention_maps import SHARES, ModelAttention, Sentence
from stacking.attention_maps_figures import Cell, Mosaic, mosaic_image, shares_image
from stacking.errors import ConfigError, UserError
from stacking.report_html import replace_file

CHOSEN, MOST_CHOSEN = 6, 12  # heads side by side; Gong et al. 2019 have six
FORMATS = ("png", "svg")


@dataclass(frozen=True)
class Limits:
    """What a figure shows.

    Attributes:
        layers: most layers of a model in its figure.
        heads: most heads of a layer there.
        chosen: words LAYER:HEAD, counted from 1, of the first model; () takes six spread evenly.
    """

    layers: int
    heads: int
    chosen: Sequence[str] = ()


def write_attention(
    models: Sequence[ModelAttention], sentence: Sentence, out: Path, limits: Limits
) -> tuple[list[Path], list[str]]:
    """Write all figures and shares.csv into `out`: the files, and what the figures leave out."""
    chosen = chosen_heads(models[0], limits.chosen)
    mosaics, notes = {}, []
    for model in models:
        mosaics[f"maps_{model.name}"], left_out = all_maps(model, sentence, limits)
        notes += left_out
    mosaics["side_by_side"], left_out = side_by_side(models, sentence, chosen)
    files = []
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in _contents(models, mosaics):
            replace_file(out / name, content)
            files.append(out / name)
    except OSError as error:
        raise UserError(f"--out {out}: the figures cannot be written there: {error}") from error
    return files, notes + left_out


def _contents(
    models: Sequence[ModelAttention], mosaics: Mapping[str, Mosaic]
) -> Iterator[tuple[str, bytes]]:
    """Each file's name and bytes, drawn when it is asked for."""
    yield "shares.csv", _csv(share_rows(models))
    for file_format in FORMATS:
        yield f"shares.{file_format}", shares_image(models, file_format)
        for name, mosaic in mosaics.items():
            yield f"{name}.{file_format}", mosaic_image(mosaic, file_format)


def chosen_heads(model: ModelAttention, words: Sequence[str]) -> list[tuple[int, int]]:
    """Layer and head, from 0, of words LAYER:HEAD; ConfigError names those that are not there."""
    layers, heads = model.maps.shape[:2]
    if not words:
        return [divmod(place, heads) for place in evenly(layers * heads, CHOSEN)]
    chosen, faults = [], []
    if len(words) > MOST_CHOSEN:
        faults.append(f"--show: got {len(words)} heads; allowed: at most {MOST_CHOSEN}")
    for word in words:
        layer, _, head = word.partition(":")
        numbers = [int(n) if n.isdecimal() and len(n) < 9 else 0 for n in (layer, head)]
        if 1 <= numbers[0] <= layers and 1 <= numbers[1] <= heads:
            chosen.append((numbers[0] - 1, numbers[1] - 1))
        else:
            faults.append(
                f"--show {word}: allowed: LAYER:HEAD from 1:1 to {layers}:{heads}, of {model.name}"
            )
    if faults:
        raise ConfigError(faults)
    return chosen


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of 0 to count - 1, from the first to the last."""
    if count <= most:
        return list(range(count))
    return [0] if most == 1 else [round(i * (count - 1) / (most - 1)) for i in range(most)]


def all_maps(model: ModelAttention, sentence: Sentence, limits: Limits) -> tuple[Mosaic, list[str]]:
    """A row for each layer, a column for each head; and what is left out."""
    maps = model.maps.float().numpy()
    layers, heads = evenly(maps.shape[0], limits.layers), evenly(maps.shape[1], limits.heads)
    mosaic = Mosaic(
        [[("", maps[layer, head]) for head in heads] for layer in layers],
        [f"layer {layer + 1}" for layer in layers],
        [f"head {head + 1}" for head in heads],
        sentence.tokens,
        f"{model.name}: {model.caption}",
    )
    notes = [
        f"{kind} drawn in maps_{model.name}: {len(shown)} of {count} (--{kind})"
        for kind, shown, count in zip(
            ("layers", "heads"), (layers, heads), maps.shape, strict=False
        )
        if len(shown) < count
    ]
    return mosaic, notes


def side_by_side(
    models: Sequence[ModelAttention], sentence: Sentence, chosen: Sequence[tuple[int, int]]
) -> tuple[Mosaic, list[str]]:
    """A column for each chosen head of the first model; below it the heads that came from it.

    A later model has a row for the lowest layer that came from the chosen one, and another for the
    highest where growth made several; heads keep their number. See Gong et al. 2019, figure 4.
    """
    cells, rows, notes = [], [], []
    for model in models:
        copies = [_copies(model, layer) for layer, _ in chosen]
        most = max(map(len, copies))
        if most > 2:
            notes.append(
                f"copies of a layer drawn in side_by_side: of {most} in {model.name} the lowest "
                "and the highest"
            )
        for place in (0, -1)[: max(most, 1)]:
            cells.append(
                [
                    _cell(model, layers, place, head, is_named=model is not models[0])
                    for layers, (_, head) in zip(copies, chosen, strict=True)
                ]
            )
            which = "" if most < 2 else ("\nlowest copy" if place == 0 else "\nhighest copy")
            rows.append(f"{model.name}\n{model.caption}{which}")
    names = [f"layer {layer + 1}, head {head + 1}" for layer, head in chosen]
    title = f"Heads of {models[0].name}" + (", and what became of them" if models[1:] else "")
    return Mosaic(cells, rows, names, sentence.tokens, title), notes


def _copies(model: ModelAttention, layer: int) -> list[int]:
    return [place for place, origin in enumerate(model.origins) if origin == layer]


def _cell(
    model: ModelAttention, layers: Sequence[int], place: int, head: int, *, is_named: bool
) -> Cell:
    """The lowest (0) or highest (-1) of `layers`; None for a second one where there is one."""
    if not layers or (place and len(layers) == 1):
        return None
    layer = layers[place]
    return f"layer {layer + 1}" if is_named else "", model.maps[layer, head].float().numpy()


def share_rows(models: Sequence[ModelAttention]) -> Iterator[dict[str, object]]:
    """For each model, layer and head, and each layer's mean, the shares, which add up to 1."""
    for model in models:
        for layer, shares in enumerate(model.shares, 1):
            named = [("mean", shares.mean(0)), *((str(i), h) for i, h in enumerate(shares, 1))]
            for head, values in named:
                numbers = dict(zip(SHARES, values.tolist(), strict=True))
                yield {"model": model.name, "layer": layer, "head": head, **numbers,
                       "rest": 1 - sum(numbers.values())}  # fmt: skip


def table(models: Sequence[ModelAttention]) -> str:
    """The means of each layer in percent, a block a model."""
    blocks = []
    head = f"{'layer':>5}  {'neighbours':>10}  {'start':>6}  {'separator':>9}  {'rest':>6}"
    for model in models:
        lines = [f"{model.name}: {model.caption}", head]
        means = [(str(number), shares.mean(0)) for number, shares in enumerate(model.shares, 1)]
        means += [("all", model.shares.mean((0, 1))), ("equal", model.uniform)]
        for name, values in means:
            near, start, separator = (100 * value for value in values.tolist())
            rest = 100 - near - start - separator
            lines.append(
                f"{name:>5}  {near:>9.1f}%  {start:>5.1f}%  {separator:>8.1f}%  {rest:>5.1f}%"
            )
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _csv(rows: Iterator[dict[str, object]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["model", "layer", "head", *SHARES, "rest"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()
