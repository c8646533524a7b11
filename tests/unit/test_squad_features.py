"""Windows of SQuAD: by hand, and over odd contexts what no setting may break."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from squad_sets import CLS, PAD, SEP, UNK, VERSION_1, answered, tokenizer
from tokenizers import Tokenizer, models

from stacking.errors import ConfigError
from stacking.squad_data import Answer, SquadExample, find_answer, read_squad, training_set
from stacking.squad_features import (
    SquadFeatures,
    WindowSettings,
    cut,
    max_context,
    squad_features,
    with_silent,
)

TOKENIZER = tokenizer()
LAMP = "A lamp is lit at dusk. The lamp is blue."  # 12 tokens, each a piece
SMALL = WindowSettings(max_seq_length=11, doc_stride=3, max_query_length=3)  # 5 for the context


def asked(context: str, text: str | None, start: int = 0, question: str = "when") -> SquadExample:
    if text is None:
        return SquadExample("q", question, context, (), is_impossible=True)
    answer = Answer(text=text, answer_start=start)
    return SquadExample("q", question, context, (answer,), answer_span=find_answer(context, answer))


def pieces(features: SquadFeatures, row: int, first: int = 0, last: int = -2) -> str:
    """The tokens first to last of a window, padding left out."""
    ids = features.input_ids[row].tolist()
    ids = ids[: features.input_mask[row].sum()] if last == -2 else ids[first : last + 1]
    return " ".join(str(TOKENIZER.id_to_token(one)) for one in ids)


def test_windows_by_hand() -> None:
    question = "When is it lit?"  # five tokens, cut to three
    features = squad_features([asked(LAMP, "dusk", 17, question)], TOKENIZER, SMALL)
    assert [pieces(features, row) for row in range(4)] == [
        "[CLS] when is it [SEP] a lamp is lit at [SEP]",
        "[CLS] when is it [SEP] lit at dusk . the [SEP]",
        "[CLS] when is it [SEP] . the lamp is blue [SEP]",
        "[CLS] when is it [SEP] is blue . [SEP]",
    ]
    assert features.input_ids[3, 9:].tolist() == [PAD, PAD]
    assert features.input_mask[3].tolist() == [1] * 9 + [0] * 2
    assert features.segment_ids[3].tolist() == [0] * 5 + [1] * 4 + [0] * 2
    assert features.segment_ids[0].tolist() == [0] * 5 + [1] * 6
    assert features.start_positions.tolist() == features.end_positions.tolist() == [0, 7, 0, 0]
    assert features.first_token.tolist() == [0, 3, 6, 9]
    assert features.context_begin.tolist() == [5] * 4
    assert features.context_length.tolist() == [5, 5, 5, 3]
    assert [np.flatnonzero(row).tolist() for row in features.is_max_context] == [
        [5, 6, 7, 8], [6, 7, 8], [6, 7, 8], [6, 7],
    ]  # fmt: skip


def test_the_window_with_most_context_by_hand() -> None:
    assert max_context([(0, 5), (3, 5), (6, 5), (9, 3)]).tolist() == [
        0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3,
    ]  # fmt: skip
    assert max_context([(0, 4), (2, 4)]).tolist() == [0, 0, 0, 1, 1, 1]
    # In the original's example "bought" (7) has most context in the third window.
    assert max_context([(0, 5), (3, 5), (6, 5)]).tolist()[7] == 2
    # Equal sides: the first of equal windows wins, a longer one against an earlier one.
    assert max_context([(0, 3), (1, 3), (2, 3)]).tolist() == [0, 0, 1, 2, 2]
    assert max_context([(0, 1)]).tolist() == [0]
    # A hundredth of the length: 41 + 3.84 against 42 + 1, and then 40 + 3.84 against 43 + 1.
    assert max_context([(0, 384), (300, 100)]).tolist()[342:344] == [0, 1]


@pytest.mark.parametrize(
    ("num_tokens", "capacity", "stride", "spans"),
    [
        (0, 5, 3, []),
        (5, 5, 3, [(0, 5)]),
        (6, 5, 3, [(0, 5), (3, 3)]),
        (8, 5, 3, [(0, 5), (3, 5)]),
        (9, 4, 7, [(0, 4), (4, 4), (8, 1)]),  # never a gap
    ],
)
def test_cutting_by_hand(
    num_tokens: int, capacity: int, stride: int, spans: list[tuple[int, int]]
) -> None:
    assert cut(num_tokens, capacity, stride) == spans


def test_an_answer_cut_by_every_window_is_no_answer_in_any() -> None:
    five = WindowSettings(max_seq_length=9, doc_stride=3, max_query_length=3)  # for the context
    six = squad_features([asked(LAMP, "at dusk. The lamp is", 14)], TOKENIZER, five)
    assert positions(six, 0) == positions(six, 1) == positions(six, 2) == (0, 0)
    whole = squad_features([asked(LAMP, "dusk. The", 17)], TOKENIZER, five)
    assert [pieces(whole, 1, *positions(whole, 1))] == ["dusk . the"]
    assert positions(whole, 0) == (0, 0)


def positions(features: SquadFeatures, row: int) -> tuple[int, int]:
    return int(features.start_positions[row]), int(features.end_positions[row])


@pytest.mark.parametrize(
    ("text", "start", "found"),
    [
        ("lamp", 27, "lamp"),  # the second lamp
        ("blue.", 35, "blue ."),  # the very end
        (".", 21, "."),  # no blank before it
        ("am", 3, "lamp"),  # a part of a token: the whole token
    ],
)
def test_positions_are_exact_in_characters(text: str, start: int, found: str) -> None:
    one = squad_features([asked(LAMP, text, start)], TOKENIZER, WindowSettings(32, 16, 4))
    first, last = positions(one, 0)
    assert pieces(one, 0, first, last) == found
    begin, end = one.characters(0, first, last)
    assert begin <= start < start + len(text) <= end


def test_an_impossible_question_is_answered_by_cls() -> None:
    features = squad_features([asked(LAMP, None)], TOKENIZER, SMALL)
    assert set(features.start_positions.tolist()) == set(features.end_positions.tolist()) == {0}
    assert set(features.input_ids[:, 0].tolist()) == {CLS}


def test_what_has_no_token_has_no_window_and_is_named() -> None:
    silent = SquadExample("silent", "?", "lamp \u0301 mill", answer_span=(5, 6))
    empty = SquadExample("empty", "?", "\u200b \u0301")
    features = squad_features([empty, silent, asked(LAMP, "A", 0)], TOKENIZER, SMALL)
    assert features.dropped == ("empty", "silent")
    assert set(features.example_index.tolist()) == {2}
    assert [len(features.rows_of(index)) for index in range(3)] == [0, 0, len(features.input_ids)]
    none = squad_features([empty], TOKENIZER, SMALL)
    assert none.input_ids.shape == none.is_max_context.shape == (0, 11)


def test_texts_that_spell_special_tokens_are_text() -> None:
    text = "lamp [SEP] mill [PAD] [CLS]"
    features = squad_features([asked(text, "mill", 11, "[SEP]?")], TOKENIZER, WindowSettings())
    ids = features.input_ids[0]
    assert (ids == SEP).sum() == 2
    assert (ids == CLS).sum() == 1
    assert (ids == PAD).sum() == 384 - features.input_mask.sum()


def test_the_tokenizers_own_padding_truncation_and_template_are_not_used() -> None:
    padding = tokenizer()
    padding.enable_padding(length=64)
    padding.enable_truncation(max_length=6)
    expected = squad_features([asked(LAMP, "dusk", 17)], TOKENIZER, SMALL)
    found = squad_features([asked(LAMP, "dusk", 17)], padding, SMALL)
    np.testing.assert_array_equal(found.input_ids, expected.input_ids)
    assert padding.padding is not None  # and it is left as it was
    assert padding.encode("[SEP]").ids[1] == SEP


def test_other_names_of_the_special_tokens() -> None:
    other = Tokenizer(models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "lamp": 3, "[UNK]": 4}))
    features = squad_features([asked("lamp", None, 0, "lamp")], other, WindowSettings(8, 2, 2))
    assert features.input_ids.tolist() == [[0, 3, 2, 3, 2, 1, 1, 1]]
    nameless = Tokenizer(models.WordLevel({"lamp": 0}))
    with pytest.raises(ConfigError, match=r"no token \[CLS\] or <s> or <cls>") as caught:
        squad_features([], nameless, SMALL)
    assert len(caught.value.faults) == 3


def test_unknown_words_keep_their_place() -> None:
    turtle = "\U0001f422"
    features = squad_features([asked(f"lamp {turtle} is", turtle, 5)], TOKENIZER, SMALL)
    first, last = positions(features, 0)
    assert features.input_ids[0, first] == UNK
    assert features.characters(0, first, last) == (5, 6)


@pytest.mark.parametrize(
    ("text", "spans", "widened"),
    [
        ("ab cd", [(0, 2), (3, 5)], [(0, 2), (3, 5)]),
        ("ab' cd", [(0, 2), (4, 6)], [(0, 3), (4, 6)]),  # behind a token
        ("ab 'cd", [(0, 2), (4, 6)], [(0, 2), (3, 6)]),  # a word's begin
        ("a'b", [(0, 1), (2, 3)], [(0, 2), (2, 3)]),  # between two tokens of a word
        ("' ab '", [(2, 4)], [(2, 4)]),  # a word of its own
        ("'ab'", [(1, 3)], [(0, 4)]),
        ("a' ' 'b", [(0, 1), (6, 7)], [(0, 2), (5, 7)]),
        ("'", [], []),
    ],
)
def test_characters_without_a_token_belong_to_their_word(
    text: str, spans: list[tuple[int, int]], widened: list[tuple[int, int]]
) -> None:
    assert [tuple(one) for one in with_silent(text, spans).tolist()] == widened


def test_settings_are_refused_with_all_faults() -> None:
    with pytest.raises(ConfigError) as caught:
        WindowSettings(max_seq_length=8, doc_stride=0, max_query_length=5)
    assert caught.value.faults == [
        "doc_stride: got 0; allowed: an integer at least 1",
        "max_seq_length: got 8; allowed: more than max_query_length 5 and 3 special tokens, as a "
        "window needs room for its context",
    ]


@given(num_tokens=st.integers(0, 200), capacity=st.integers(1, 60), stride=st.integers(1, 80))
def test_windows_cover_every_token_and_each_has_one_best_window(
    num_tokens: int, capacity: int, stride: int
) -> None:
    spans = cut(num_tokens, capacity, stride)
    covered = {first + i for first, length in spans for i in range(length)}
    assert covered == set(range(num_tokens))
    assert all(1 <= length <= capacity for _, length in spans)
    assert [first for first, _ in spans] == [i * min(stride, capacity) for i in range(len(spans))]
    if not spans:
        return
    for token, window in enumerate(max_context(spans).tolist()):
        # The definition, window by window; the first of equal ones.
        scores = [
            min(token - first, first + length - 1 - token) + 0.01 * length
            if first <= token < first + length
            else -1.0
            for first, length in spans
        ]
        assert window == scores.index(max(scores))


@settings(max_examples=60)
@given(
    one=answered(), capacity=st.integers(1, 30), stride=st.integers(1, 30), query=st.integers(1, 9)
)
def test_each_context_token_is_somewhere_with_its_characters(
    one: SquadExample, capacity: int, stride: int, query: int
) -> None:
    chosen = WindowSettings(query + 3 + capacity, stride, query)
    features = squad_features([one, one], TOKENIZER, chosen)
    (encoding,) = TOKENIZER.encode_batch([one.context.replace("[", "(").replace("]", ")")],
                                         add_special_tokens=False)  # fmt: skip
    assert len(features.token_spans[0]) == len(encoding.ids)
    best = np.zeros(len(encoding.ids), int)
    for row in features.rows_of(1):
        begin, length = int(features.context_begin[row]), int(features.context_length[row])
        first = int(features.first_token[row])
        assert features.input_ids[row, [0, begin - 1, begin + length]].tolist() == [CLS, SEP, SEP]
        assert features.input_mask[row].sum() == begin + length + 1
        assert features.segment_ids[row].sum() == length + 1
        best[first : first + length] += features.is_max_context[row, begin : begin + length]
        begins, ends = features.token_spans[1][first : first + length].T
        assert (begins < ends).all()
    if not features.dropped:
        assert best.tolist() == [1] * len(best)
    # Blanks apart, no character is lost or shared, but those of words without a token.
    spans = features.token_spans[0]
    assert (spans[1:, 0] >= spans[:-1, 1]).all()


def test_the_long_question_is_cut_and_contexts_are_shared() -> None:
    training = training_set(read_squad(VERSION_1))
    features = squad_features(training.examples, TOKENIZER, WindowSettings(80, 30, 20))
    names = [one.id for one in training.examples]
    long = names.index("mill-long")
    assert set(features.context_begin[list(features.rows_of(long))].tolist()) == {22}
    assert features.token_spans[long] is features.token_spans[0]
    assert features.dropped == ()
    answered_rows = features.example_index[features.start_positions > 0]
    assert set(answered_rows.tolist()) == set(range(len(names)))
