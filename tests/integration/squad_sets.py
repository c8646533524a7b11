"""What tests of SQuAD share: the two small sets, a tokenizer, and contexts with odd characters."""

from pathlib import Path

from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep.tokens.tokenizer import from_tokens
from stacking.squad_data import Answer, SquadExample

DATA = Path(__file__).resolve().parents[1] / "data"
VERSION_1, VERSION_2 = DATA / "squad-v1.1.json", DATA / "squad-v2.0.json"
PAD, UNK, CLS, SEP = 0, 1, 2, 3
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_WORDS = ["the", "lamp", "is", "lit", "at", "dusk", "blue", "when", "it", "mill", "large", "cat"]

# A combining accent, a soft hyphen inside a word and a zero-width space before one: the normaliser
# drops them. A turtle: [UNK]. U+00A0 is a blank for the tokenizer, not for the official script.
ODD_WORDS = (
    "lamp", "the", "mill", "Zo\u00eb", "cafe\u0301", "x\u0301", "coo\u00adkery", "\u200bboat",
    "(1911-1951);", "\u5c0f\u8239", "\U0001f422", "[SEP]", "[PAD]", "10", "it's", "70\u00a0000",
)  # fmt: skip
_BLANKS = (" ", "  ", "\n", "\t \n")


def tokenizer() -> Tokenizer:
    """BERT's rules over single letters and a few words; everything else is [UNK]."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    digits = list("0123456789")
    alone = [*"()[]{}.,;:'?!-", "\u5c0f", "\u8239"]
    pieces = [*letters, *digits, *alone, *_WORDS, *(f"##{one}" for one in [*letters, *digits])]
    return from_tokens([*_SPECIAL, *pieces]).tokenizer


@st.composite
def answered(draw: st.DrawFn, most_words: int = 40, most_in_answer: int = 4) -> SquadExample:
    """A question whose answer is a stretch of whole words of an odd context."""
    words = draw(st.lists(st.sampled_from(ODD_WORDS), min_size=1, max_size=most_words))
    context, places = draw(st.sampled_from(("", " "))), []
    for word in words:
        places.append((len(context), len(context) + len(word)))
        context += word + draw(st.sampled_from(_BLANKS))
    first = draw(st.integers(0, len(words) - 1))
    last = draw(st.integers(first, min(len(words), first + most_in_answer) - 1))
    begin, end = places[first][0], places[last][1]
    question = " ".join(draw(st.lists(st.sampled_from(ODD_WORDS), max_size=12)))
    answer = Answer(text=context[begin:end], answer_start=begin)
    return SquadExample("q", question, context, (answer,), answer_span=(begin, end))
