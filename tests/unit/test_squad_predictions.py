"""SQuAD's answers: by hand, against an exhaustive search, and what no logits may break."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from squad_sets import VERSION_1, VERSION_2, answered, tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers

from stacking.errors import ConfigError, NonFiniteError
from stacking.squad_data import SquadError, SquadExample, read_squad, training_set
from stacking.squad_features import SquadFeatures, WindowSettings, squad_features
from stacking.squad_metrics import score_version_1, score_version_2
from stacking.squad_predictions import (
    AnswerSettings,
    Candidate,
    Prediction,
    predict,
    read_null_odds,
    read_predictions,
    write_predictions,
)

TOKENIZER = tokenizer()
LAMP = SquadExample("q", "When?", "A lamp is lit at  dusk. The lamp is blue.")
# [CLS] when [SEP] and 12 tokens of the context from position 3 on, in one window of 20.
A, THE_LAMP, DUSK, STOP, LAMP_2, BLUE = 3, 4, 8, 9, 11, 13
WHOLE = WindowSettings(20, 10, 1)
Logits = npt.NDArray[np.float32]


def logits(features: SquadFeatures, *peaks: tuple[int, int, float]) -> Logits:
    """0 but at (row, position, value)."""
    values = np.zeros(features.input_ids.shape, np.float32)
    for row, position, value in peaks:
        values[row, position] = value
    return values


def one_window(starts: dict[int, float], ends: dict[int, float], **chosen: int) -> Prediction:
    """The prediction for LAMP in version 2; `chosen` are AnswerSettings."""
    features = squad_features([LAMP], TOKENIZER, WHOLE)
    start = logits(features, *((0, at, value) for at, value in starts.items()))
    end = logits(features, *((0, at, value) for at, value in ends.items()))
    return predict([LAMP], features, start, end, AnswerSettings(**chosen), is_version_2=True)[0]


def oracle(features: SquadFeatures) -> tuple[Logits, Logits]:
    """The logits of a model that knows: one-hot at the answer, at [CLS] where there is none."""
    start, end = (np.zeros(features.input_ids.shape, np.float32) for _ in range(2))
    rows = np.arange(len(start))
    start[rows, features.start_positions] = end[rows, features.end_positions] = 9.0
    return start, end


def test_the_best_span_is_cut_out_of_the_context() -> None:
    said = one_window({7: 4.0}, {DUSK: 3.0}, n_best_size=3)
    assert said.best_text == "at  dusk"  # with its own blanks
    assert said.nbest[0] == Candidate("at  dusk", 4.0, 3.0)
    assert said.null_odds == -7.0
    assert said.text() == "at  dusk"


def test_ends_before_starts_questions_and_long_spans_are_no_answers() -> None:
    assert one_window({LAMP_2: 5.0, DUSK: 3.0}, {STOP: 4.0}).best_text == "dusk."
    assert one_window({1: 9.0, DUSK: 3.0}, {2: 9.0, STOP: 4.0}).best_text == "dusk."
    assert (
        one_window({A: 5.0}, {DUSK: 4.0}, max_answer_length=6).best_text == "A lamp is lit at  dusk"
    )
    assert (
        one_window({A: 5.0}, {DUSK: 4.0}, max_answer_length=5).best_text != "A lamp is lit at  dusk"
    )
    # Behind the context: its [SEP] at 15 and padding.
    assert one_window({BLUE: 5.0}, {15: 9.0, 18: 9.0, 14: 1.0}).best_text == "blue."


def test_only_the_best_starts_and_ends_are_paired() -> None:
    starts, ends = {1: 9.0, 2: 8.0, DUSK: 7.0}, {1: 9.0, 2: 8.0, STOP: 7.0}
    assert one_window(starts, ends, n_best_size=3).best_text == "dusk."
    assert one_window({DUSK: 7.0, LAMP_2: 6.0}, ends, n_best_size=2).best_text == ""
    none = one_window(starts, ends, n_best_size=2)
    assert none.best_text == none.text(1e9) == none.text(-1e9) == ""
    assert none.nbest == (Candidate("", 0.0, 0.0),)
    assert none.null_odds == 0.0


def test_a_text_is_listed_once_with_its_best_place() -> None:
    said = one_window(
        {THE_LAMP: 3.0, LAMP_2: 5.0}, {THE_LAMP: 4.0, LAMP_2: 1.0}, max_answer_length=1
    )
    assert [one for one in said.nbest if one.text == "lamp"] == [Candidate("lamp", 3.0, 4.0)]


def test_equal_scores_keep_the_order_of_their_places() -> None:
    said = one_window({}, {}, n_best_size=20, max_answer_length=1)
    assert [one.text for one in said.nbest] == [
        "A", "lamp", "is", "lit", "at", "dusk", ".", "The", "blue", "",
    ]  # fmt: skip


def test_no_answer_has_its_place_in_the_list_and_is_always_there() -> None:
    starts = {DUSK: 3.0, THE_LAMP: 2.0, BLUE: 1.0, LAMP_2: 0.5}
    ends = {DUSK: 3.0, STOP: 2.0, BLUE: 1.0, LAMP_2: 0.5}
    first = one_window({0: 6.0, **starts}, {0: 5.0, **ends}, n_best_size=4)
    assert [one.text for one in first.nbest] == ["", "dusk", "dusk.", "lamp is lit at  dusk"]
    assert first.null_odds == 5.0
    assert (first.text(), first.text(4.9), first.text(5.0)) == ("", "", "dusk")
    last = one_window({0: -6.0, **starts}, {0: -5.0, **ends}, n_best_size=4)
    assert len(last.nbest) == 5
    assert last.nbest[-1] == Candidate("", -6.0, -5.0)
    assert last.null_odds == -17.0
    alone = one_window({0: 6.0, DUSK: 3.0}, {0: 5.0, DUSK: 3.0}, n_best_size=1)
    assert [one.text for one in alone.nbest] == [""]  # 0 is the best start, and no answer's


def test_probabilities_are_a_softmax_over_the_list() -> None:
    said = Prediction("q", (Candidate("a", 1000.0, 2.0), Candidate("", 999.0, 2.0)), "a", -1.0)
    np.testing.assert_allclose(said.probabilities(), [1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])


def test_version_1_always_answers() -> None:
    features = squad_features([LAMP], TOKENIZER, WHOLE)
    start, end = logits(features, (0, 0, 99.0)), logits(features, (0, 0, 99.0))
    (said,) = predict([LAMP], features, start, end, AnswerSettings(), is_version_2=False)
    assert said.null_odds is None
    assert "" not in {one.text for one in said.nbest}
    assert said.text(-1e9) == said.best_text == said.nbest[0].text != ""


def test_a_question_without_a_window_is_answered_by_nothing() -> None:
    empty = SquadExample("empty", "?", "\u200b")
    features = squad_features([empty, LAMP], TOKENIZER, WHOLE)
    start, end = logits(features, (0, DUSK, 1.0)), logits(features, (0, DUSK, 1.0))
    for is_version_2 in (False, True):
        said = predict(
            [empty, LAMP], features, start, end, AnswerSettings(), is_version_2=is_version_2
        )
        assert [one.best_text for one in said] == ["", "dusk"]
        assert said[0].nbest == (Candidate("", 0.0, 0.0),)


def test_starts_count_only_where_they_have_most_context() -> None:
    """As in test_squad_features: "." has most context in the second of four windows."""
    features = squad_features([LAMP], TOKENIZER, WindowSettings(9, 3, 1))
    assert features.first_token.tolist() == [0, 3, 6, 9]

    def best(row: int, position: int) -> str:
        values = logits(features, (row, position, 9.0))
        answers = AnswerSettings(max_answer_length=1)
        return predict([LAMP], features, values, values, answers, is_version_2=True)[0].best_text

    assert best(1, 6) == "."
    assert best(2, 3) == "A"  # the same token, beside the left edge: nothing else has a peak
    assert best(2, 5) == "lamp"


def test_no_answer_takes_the_window_that_is_surest_of_one() -> None:
    features = squad_features([LAMP], TOKENIZER, WindowSettings(9, 3, 1))
    start = logits(features, (0, 0, 5.0), (1, 0, -2.0), (2, 0, 1.0))
    end = logits(features, (0, 0, 5.0), (1, 0, 1.5), (2, 0, -1.25))
    (said,) = predict([LAMP], features, start, end, AnswerSettings(), is_version_2=True)
    assert Candidate("", -2.0, 1.5) in said.nbest
    assert said.null_odds == -0.5


@pytest.mark.parametrize("path", [VERSION_1, VERSION_2])
@pytest.mark.parametrize("chosen", [WindowSettings(), WindowSettings(75, 20, 12)])
def test_a_model_that_knows_scores_100(path: Path, chosen: WindowSettings) -> None:
    squad = read_squad(path)
    features = squad_features(training_set(squad).examples, TOKENIZER, chosen)
    said = predict(
        squad.examples, features, *oracle(features), AnswerSettings(),
        is_version_2=squad.is_version_2,
    )  # fmt: skip
    texts = {one.id: one.text() for one in said}
    if squad.is_version_2:
        scores = score_version_2(squad.examples, texts)
        assert scores["exact"] == scores["HasAns_f1"] == scores["NoAns_f1"] == 100.0
    else:
        assert score_version_1(squad.examples, texts) == {"exact_match": 100.0, "f1": 100.0}


def test_a_tokenizer_whose_tokens_begin_with_their_blank() -> None:
    pieces = {"[CLS]": 0, "[SEP]": 1, "[PAD]": 2, "\u2581lamp": 3, "\u2581blue": 4}
    blanks = Tokenizer(models.WordLevel(pieces))
    blanks.pre_tokenizer = pre_tokenizers.Metaspace()
    one = SquadExample("q", "blue", "lamp blue lamp", answer_span=(5, 9))
    features = squad_features([one], blanks, WindowSettings(9, 3, 3))
    assert features.token_spans[0].tolist() == [[0, 4], [4, 9], [9, 14]]
    assert features.start_positions.tolist() == features.end_positions.tolist() == [4]
    (said,) = predict([one], features, *oracle(features), AnswerSettings(), is_version_2=False)
    assert said.best_text == "blue"


@settings(max_examples=100)
@given(one=answered(), stride=st.integers(1, 20), query=st.integers(1, 9), spare=st.integers(0, 9))
def test_every_answer_that_a_window_can_hold_is_recovered(
    one: SquadExample, stride: int, query: int, spare: int
) -> None:
    """A window needs the answer twice and the stride: then the start's best window holds it."""
    assert one.answer_span is not None
    begin, end = one.answer_span
    alone = squad_features([SquadExample("", "", one.context[begin:end])], TOKENIZER,
                           WindowSettings(512, 1, 1))  # fmt: skip
    assume(not alone.dropped)
    length = int(alone.context_length[0])
    capacity = stride + 2 * length + 2 + spare
    features = squad_features([one], TOKENIZER, WindowSettings(query + 3 + capacity, stride, query))
    answers = AnswerSettings(max_answer_length=length)
    (said,) = predict([one], features, *oracle(features), answers, is_version_2=False)
    assert said.best_text == one.answers[0].text
    assert score_version_2([one], {"q": said.best_text})["f1"] == 100.0


def test_an_answer_that_its_starts_best_window_cuts_is_lost_as_in_the_original() -> None:
    one = SquadExample("q", "When?", LAMP.context, answer_span=(2, 23))
    features = squad_features([one], TOKENIZER, WindowSettings(10, 1, 1))
    (row,) = np.flatnonzero(features.start_positions).tolist()
    start, end = int(features.start_positions[row]), int(features.end_positions[row])
    begin, behind = features.characters(row, start, end)
    assert one.context[begin:behind] == "lamp is lit at  dusk."
    assert not features.is_max_context[row, start]
    (said,) = predict([one], features, *oracle(features), AnswerSettings(), is_version_2=False)
    assert said.best_text != "lamp is lit at  dusk."


@st.composite
def odd_logits(draw: st.DrawFn, shape: tuple[int, int]) -> Logits:
    """Few values, so that there are ties."""
    seed, digits = draw(st.integers(0, 2**32 - 1)), draw(st.integers(-1, 2))
    values = np.random.default_rng(seed).normal(scale=4.0, size=shape)
    return np.asarray(values.round(digits), np.float32)


@settings(max_examples=60)
@given(data=st.data(), one=answered(most_words=15))
def test_the_list_is_that_of_an_exhaustive_search(data: st.DataObject, one: SquadExample) -> None:
    features = squad_features([one, one], TOKENIZER, WindowSettings(16, 4, 5))
    start, end = (data.draw(odd_logits(features.input_ids.shape)) for _ in range(2))
    most = data.draw(st.integers(1, 6))
    said = predict([one, one], features, start, end, AnswerSettings(10**6, most), is_version_2=True)
    best: dict[str, float] = {}
    null = min((float(start[r, 0]) + float(end[r, 0]) for r in features.rows_of(1)), default=0.0)
    for row in features.rows_of(1):
        context = np.flatnonzero(features.segment_ids[row])[:-1].tolist()
        for first in context:
            for last in range(first, min(first + most, context[-1] + 1)):
                if features.is_max_context[row, first]:
                    begin, behind = features.characters(row, first, last)
                    text = one.context[begin:behind].strip()
                    score = float(start[row, first]) + float(end[row, last])
                    best[text] = max(score, best.get(text, score))
    assert {c.text: c.score for c in said[1].nbest} == best | {"": null}
    assert said[1].null_odds == null - max(best.values(), default=0.0)


@settings(max_examples=60)
@given(data=st.data(), examples=st.lists(answered(), min_size=1, max_size=3))
def test_lists_are_sorted_and_thresholds_monotone(
    data: st.DataObject, examples: list[SquadExample]
) -> None:
    features = squad_features(examples, TOKENIZER, WindowSettings(16, 7, 5))
    start, end = (data.draw(odd_logits(features.input_ids.shape)) for _ in range(2))
    size = data.draw(st.integers(1, 9))
    answers = AnswerSettings(size, data.draw(st.integers(1, 9)))
    said = predict(examples, features, start, end, answers, is_version_2=True)
    assert [one.id for one in said] == [one.id for one in examples]
    for one in said:
        scores = [candidate.score for candidate in one.nbest]
        assert scores == sorted(scores, reverse=True)
        assert len({candidate.text for candidate in one.nbest}) == len(scores) <= size + 1
        assert [candidate.text for candidate in one.nbest].count("") == 1
        assert sum(one.probabilities()) == pytest.approx(1.0)
        assert one.probabilities() == sorted(one.probabilities(), reverse=True)
    thresholds = sorted(data.draw(st.lists(st.floats(-30, 30), min_size=2, max_size=6)))
    silent = [{n for n, one in enumerate(said) if one.text(x) == ""} for x in thresholds]
    assert all(more >= less for more, less in zip(silent, silent[1:], strict=False))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    features = squad_features([LAMP], TOKENIZER, WHOLE)
    with pytest.raises(NonFiniteError, match="logits hold NaN or infinity"):
        predict([LAMP], features, logits(features), logits(features, (0, 3, value)),
                AnswerSettings(), is_version_2=False)  # fmt: skip


def test_the_files_are_the_original_scripts(tmp_path: Path) -> None:
    said = [
        Prediction("one", (Candidate("", 3.0, 2.0), Candidate("caf\u00e9", 2.5, 2.0)),
                   "caf\u00e9", 0.5),
        Prediction("two", (Candidate("b", 1.0, 1.0), Candidate("", 0.0, 0.0)), "b", -2.0),
    ]  # fmt: skip
    write_predictions(tmp_path / "new", said)
    written = {path.name: path.read_text() for path in (tmp_path / "new").iterdir()}
    assert set(written) == {"predictions.json", "nbest_predictions.json", "null_odds.json"}
    assert written["predictions.json"] == '{\n    "one": "",\n    "two": "b"\n}\n'
    assert json.loads(written["null_odds.json"]) == {"one": 0.5, "two": -2.0}
    nbest = json.loads(written["nbest_predictions.json"])
    assert list(nbest["two"][0]) == ["text", "probability", "start_logit", "end_logit"]
    assert nbest["one"][1]["text"] == "caf\u00e9"
    assert nbest["two"][0]["probability"] == pytest.approx(1 / (1 + np.exp(-2)))
    best = {"one": "caf\u00e9", "two": "b"}
    assert read_predictions(tmp_path / "new/nbest_predictions.json") == best
    write_predictions(tmp_path / "new", said, null_score_diff_threshold=0.5)
    assert read_predictions(tmp_path / "new/predictions.json") == best
    assert read_null_odds(tmp_path / "new/null_odds.json") == {"one": 0.5, "two": -2.0}
    write_predictions(tmp_path / "v1", [Prediction("one", (Candidate("a", 1.0, 1.0),), "a", None)])
    assert not (tmp_path / "v1/null_odds.json").exists()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("[]", 'Input should be an object; allowed: {"QUESTION ID": "TEXT", ...}, or an n-'),
        ('{"a": 1}', "a: Input should be a valid string"),
        ("{", "Invalid JSON"),
    ],
)
def test_predictions_of_another_form_are_refused(tmp_path: Path, content: str, fault: str) -> None:
    path = tmp_path / "predictions.json"
    path.write_text(content)
    with pytest.raises(SquadError) as caught:
        read_predictions(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert fault in str(caught.value)


def test_null_odds_are_finite_numbers(tmp_path: Path) -> None:
    path = tmp_path / "null_odds.json"
    path.write_text('{"a": 1, "b": NaN}')
    with pytest.raises(SquadError, match="b: Input should be a finite number; allowed"):
        read_null_odds(path)
    with pytest.raises(SquadError, match="none.json: cannot be read: No such file"):
        read_null_odds(tmp_path / "none.json")


def test_settings_are_refused_with_all_faults() -> None:
    with pytest.raises(ConfigError) as caught:
        AnswerSettings(n_best_size=0, max_answer_length=-1)
    assert caught.value.faults == [
        "n_best_size: got 0; allowed: an integer at least 1",
        "max_answer_length: got -1; allowed: an integer at least 1",
    ]
