"""How well and how fast sentence splitters find gold boundaries, ours beside the usual libraries.

    python benchmarks/sentences.py --conllu en_ewt-ud-dev.conllu [--text FILE]

The gold text is any Universal Dependencies file with `# newpar` and `# text` comments; sentences of
a paragraph are joined with one space. Precision, recall and F1 are those of the boundaries inside
paragraphs; the last F1 also counts the paragraphs' ends, which every splitter is given. Speed is
that of one core on FILE (plain text, a line a paragraph; else the gold paragraphs, repeated).
Libraries that are not installed, or fail, are shown as such. The last line is one JSON object.
"""

import argparse
import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.cleaning.plain_text import normalise
from data_prep.text_block import TextBlock
from data_prep.tokens.encoder import WordEncoder
from data_prep.tokens.sentences import split_sentences
from data_prep.tokens.tokenizer import SPECIAL_TOKENS, from_tokens

Splitter = Callable[[str], Sequence[str]]

SECONDS_EACH = 5.0  # of timing for a splitter; the slow ones do not get through the text
BLOCK_CHARS = 4 << 20
ROUNDS = 3
OURS = "ours, paragraph by paragraph"
OURS_IN_BLOCKS = "ours, in blocks"


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one splitter did; the shares are of boundaries."""

    precision: float
    recall: float
    f1: float
    f1_with_paragraph_ends: float
    changed_paragraphs: int
    """Paragraphs whose characters came back changed; they count as not split."""
    megabytes_per_second: float


def main() -> None:
    """Score every splitter, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--conllu", type=Path, required=True, help="gold sentences (UD)")
    parser.add_argument("--text", type=Path, help="plain text to measure the speed on")
    arguments = parser.parse_args()
    gold = read_paragraphs(arguments.conllu)
    if arguments.text:
        timed = normalise(arguments.text.read_text(encoding="utf-8")).split("\n")
    else:
        timed = [normalise(" ".join(sentences)) for sentences in gold] * 20
    results: dict[str, Score | str] = {}
    makers = {OURS: _ours, "pysbd": _pysbd, "syntok": _syntok, "blingfire": _blingfire,
              "nltk punkt": _punkt}  # fmt: skip
    for name, make in makers.items():
        try:
            results[name] = score(make(), gold, timed)
        except (ImportError, LookupError) as error:  # a library or its model is not installed
            said = [line.strip() for line in str(error).splitlines() if line.strip(" *")]
            results[name] = f"fails: {type(error).__name__}: {said[0] if said else ''}"
    ours = results[OURS]
    assert isinstance(ours, Score), ours
    rate = {"megabytes_per_second": block_speed(timed)}
    results = {OURS_IN_BLOCKS: Score(**(vars(ours) | rate)), **results}
    print_results(results)


def read_paragraphs(path: Path) -> list[list[str]]:
    """Return the sentences of each gold paragraph."""
    paragraphs: list[list[str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# newpar") or (line.startswith("# newdoc") and not paragraphs):
            paragraphs.append([])
        elif line.startswith("# text = "):
            paragraphs[-1].append(" ".join(line.removeprefix("# text = ").split()))
    return [paragraph for paragraph in paragraphs if paragraph]


def score(split: Splitter, gold: Sequence[Sequence[str]], timed: Sequence[str]) -> Score:
    """Compare boundaries, counted in characters that are not white space, and time the splitter."""
    hits = found = right = changed = 0
    for sentences in gold:
        ours = split(" ".join(sentences))
        is_changed = _letters(ours) != _letters(sentences)
        expected, got = _inner_ends(sentences), set() if is_changed else _inner_ends(ours)
        changed += is_changed
        hits, found, right = hits + len(expected & got), found + len(got), right + len(expected)
    ends = len(gold)
    return Score(
        precision=hits / max(found, 1),
        recall=hits / max(right, 1),
        f1=2 * hits / (found + right),
        f1_with_paragraph_ends=2 * (hits + ends) / (found + right + 2 * ends),
        changed_paragraphs=changed,
        megabytes_per_second=speed(split, timed),
    )


def speed(split: Splitter, paragraphs: Sequence[str]) -> float:
    """Return MB/s over as many paragraphs as the time allows."""
    num_bytes = 0
    start = time.perf_counter()
    for paragraph in paragraphs:
        split(paragraph)
        num_bytes += len(paragraph.encode())
        if time.perf_counter() - start > SECONDS_EACH:
            break
    return num_bytes / 1e6 / (time.perf_counter() - start)


def block_speed(paragraphs: Sequence[str]) -> float:
    """Return MB/s of cutting inside `WordEncoder`: what it takes longer than with a sentence a
    line. The best of some rounds each, as the difference is small.
    """
    blocks: list[TextBlock] = []
    current: list[str] = []
    num_chars = 0
    for paragraph in filter(None, paragraphs):
        current.append(paragraph)
        num_chars += len(paragraph)
        if num_chars > BLOCK_CHARS:
            blocks.append(TextBlock.from_texts(current))
            current, num_chars = [], 0
    blocks.append(TextBlock.from_texts(current))
    rules = min(_encode_seconds(blocks, "rules") for _ in range(ROUNDS))
    lines = min(_encode_seconds(blocks, "lines") for _ in range(ROUNDS))
    num_bytes = sum(len(block.text) for block in blocks)
    return num_bytes / 1e6 / max(rules - lines, 1e-9)


def _encode_seconds(blocks: Sequence[TextBlock], sentences: Literal["rules", "lines"]) -> float:
    encoder = WordEncoder(from_tokens(list(SPECIAL_TOKENS.values())), sentences=sentences)
    start = time.perf_counter()
    for block in blocks:
        encoder.encode(block)
    return time.perf_counter() - start


def print_results(results: dict[str, Score | str]) -> None:
    """Print the table, and all of it as one JSON line."""
    names = ("precision", "recall", "F1", "F1 with ends", "changed", "MB/s")
    print(f"{'splitter':<30}" + "".join(f"{name:>14}" for name in names))
    for name, result in results.items():
        if isinstance(result, str):
            print(f"{name:<30}  {result}")
            continue
        *shares, changed, rate = vars(result).values()
        cells = [f"{share:.3f}" for share in shares] + [str(changed), f"{rate:.2f}"]
        print(f"{name:<30}" + "".join(f"{cell:>14}" for cell in cells))
    content = {
        name: result if isinstance(result, str) else vars(result)
        for name, result in results.items()
    }
    print(json.dumps(content))


def _letters(sentences: Sequence[str]) -> str:
    return "".join("".join(sentences).split())


def _inner_ends(sentences: Sequence[str]) -> set[int]:
    """Return the offsets, white space left out, at which sentences but the last end."""
    ends: set[int] = set()
    position = 0
    for sentence in sentences[:-1]:
        position += len(_letters([sentence]))
        ends.add(position)
    return ends


def _ours() -> Splitter:
    return split_sentences


def _pysbd() -> Splitter:
    segmenter: Any = importlib.import_module("pysbd").Segmenter(language="en", clean=False)
    return lambda text: list(segmenter.segment(text))


def _syntok() -> Splitter:
    segmenter: Any = importlib.import_module("syntok.segmenter")

    def split(text: str) -> list[str]:
        """Cut by the offsets of first tokens: the tokens' own texts are changed."""
        sentences = [s for paragraph in segmenter.process(text) for s in paragraph if s]
        starts = [0, *(sentence[0].offset for sentence in sentences[1:]), len(text)]
        return [text[a:b] for a, b in zip(starts, starts[1:], strict=False)]

    return split


def _blingfire() -> Splitter:
    library: Any = importlib.import_module("blingfire")
    return lambda text: str(library.text_to_sentences(text)).split("\n")


def _punkt() -> Splitter:
    library: Any = importlib.import_module("nltk.tokenize.punkt")
    return library.PunktTokenizer("english").tokenize  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
