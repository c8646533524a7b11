"""SQuAD's metrics: cases by hand, and what the official scripts print for the two small sets."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from squad_sets import VERSION_1, VERSION_2

from stacking.squad_data import Answer, SquadError, SquadExample, read_squad
from stacking.squad_metrics import (
    Scores,
    exact_match,
    normalize_answer,
    score_version_1,
    score_version_2,
    token_f1,
)

SAID_1 = {
    "mill-when": "In 1764,", "mill-who": "Ada  fenwick of Orrin", "mill-flood": "two geese",
    "mill-end": "a large cat", "mill-empty": "", "mill-long": "Colander!", "mill-middle": "council",
    "zoe-born": "Krakow", "zoe-wrote": "wrote in five", "zoe-boat": "\u5c0f \u8239",
    "zoe-sold": "70 000", "zoe-cafe": "caf\u00e9", "zoe-ten": "10 10", "zoe-card": "the",
    "zoe-kitchen": "coo\u00adkery card", "zoe-sign": "\U0001f422.", "lamp-when": "at dusk",
    "lamp-colour": "lamp of a lamp",
}  # fmt: skip
SAID_2 = {
    "mill-price": "for one crown", "mill-bridge": "1764", "mill-rooms": "nine", "mill-dog": "",
    "mill-books": "", "mill-impossible-long": "", "lamp-lit": "Dusk.", "lamp-green": "the",
    "lamp-what": "A lamp, the lamp", "zoe-day": "May", "zoe-died": "3 May 1931",
}  # fmt: skip
# Not in the order of the questions: among equal odds the file's order decides.
ODDS = {
    "zoe-died": 4.5, "mill-price": -3.0, "lamp-what": 0.5, "mill-bridge": 0.5, "mill-dog": 1.5,
    "lamp-green": -1.0, "mill-rooms": -3.0, "zoe-day": 2.0, "mill-books": 6.0, "lamp-lit": -0.5,
    "mill-impossible-long": 7.25,
}  # fmt: skip

EXPECTED_1 = {"exact_match": 36.8421052631579, "f1": 57.51879699248121}
EXPECTED_2: dict[float, Scores] = {
    1.0: {
        "exact": 54.54545454545455,
        "f1": 67.87878787878788,
        "total": 11,
        "HasAns_exact": 33.333333333333336,
        "HasAns_f1": 57.77777777777777,
        "HasAns_total": 6,
        "NoAns_exact": 80.0,
        "NoAns_f1": 80.0,
        "NoAns_total": 5,
        "best_exact": 54.54545454545455,
        "best_exact_thresh": -3.0,
        "best_f1": 67.87878787878788,
        "best_f1_thresh": 0.5,
    },
    -0.75: {
        "exact": 54.54545454545455,
        "f1": 61.81818181818182,
        "total": 11,
        "HasAns_exact": 16.666666666666668,
        "HasAns_f1": 30.0,
        "HasAns_total": 6,
        "NoAns_exact": 100.0,
        "NoAns_f1": 100.0,
        "NoAns_total": 5,
        "best_exact": 54.54545454545455,
        "best_exact_thresh": -3.0,
        "best_f1": 67.87878787878788,
        "best_f1_thresh": 0.5,
    },
}


def question(key: str, *texts: str) -> SquadExample:
    return SquadExample(key, "?", "", tuple(Answer(text=text, answer_start=0) for text in texts))


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Cat's\tA-Team, an ox!", "cats ateam ox"),
        ("the", ""),
        ("Athens then a", "athens then"),
        ("a.b", "ab"),  # punctuation goes before articles
        ("The\u00a0\u00c9t\u00e9", "\u00e9t\u00e9"),
        ("\u201cquoted\u201d", "\u201cquoted\u201d"),  # ASCII punctuation only
        ("a\u0301", "\u0301"),  # the accent ends the word "a"
        ("\u0130", "i\u0307"),
    ],
)
def test_normalisation(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "answer", "f1"),
    [
        ("red cat", "The cat", 2 / 3),  # precision 1/2, recall 1
        ("cat cat cat", "cat cat dog", 2 / 3),  # each word as often as it stands in both
        ("cat", "dog", 0.0),
        ("", "cat", 0.0),
        ("the", "a", 0.0),
        ("caf\u00e9", "cafe\u0301", 0.0),  # composed and not: other words, as officially
    ],
)
def test_f1_by_hand(prediction: str, answer: str, f1: float) -> None:
    assert token_f1(prediction, answer) == token_f1(answer, prediction) == pytest.approx(f1)
    assert exact_match(prediction, answer) == (prediction == "the")


def test_the_best_of_several_answers_counts_for_each_metric_alone() -> None:
    gold = [question("q", "a big red cat", "dog")]
    assert score_version_1(gold, {"q": "dog."}) == {"exact_match": 100.0, "f1": 100.0}
    assert score_version_1(gold, {"q": "red cat"}) == {"exact_match": 0.0, "f1": pytest.approx(80)}


def test_version_1_counts_a_missing_prediction_as_0_and_ignores_others() -> None:
    gold = [question("q", "cat"), question("r", "dog")]
    assert score_version_1(gold, {"q": "cat", "other": "dog"}) == {"exact_match": 50.0, "f1": 50.0}
    assert score_version_1(gold, {}) == {"exact_match": 0.0, "f1": 0.0}


def test_where_no_word_is_left_the_versions_differ() -> None:
    """F1 of version 1.1 is 0 without a common word; version 2.0 wants "" for such an answer."""
    gold = [question("q", "The")]
    assert score_version_1(gold, {"q": "a"}) == {"exact_match": 100.0, "f1": 0.0}
    scores = score_version_2(gold, {"q": "a"})
    assert (scores["HasAns_f1"], scores["HasAns_total"]) == (100.0, 1)  # it counts as answerable
    assert score_version_2(gold, {"q": "cat"})["f1"] == 0.0
    assert score_version_2([question("q", "The", "cat")], {"q": ""})["f1"] == 0.0


def test_version_2_by_hand() -> None:
    gold = [question("q", "red cat"), question("r", "dog"), question("s"), question("t")]
    said = {"q": "cat", "r": "dog", "s": "", "t": "mouse"}
    assert score_version_2(gold, said) == {
        "exact": 50.0, "f1": pytest.approx(100 * (2 / 3 + 1 + 1) / 4), "total": 4,
        "HasAns_exact": 50.0, "HasAns_f1": pytest.approx(100 * (2 / 3 + 1) / 2), "HasAns_total": 2,
        "NoAns_exact": 50.0, "NoAns_f1": 50.0, "NoAns_total": 2,
    }  # fmt: skip
    odds = {"q": 3.0, "r": -1.0, "s": 0.0, "t": 2.0}
    scores = score_version_2(gold, said, odds, threshold=1.0)  # "q" and "t" fall silent
    assert (scores["exact"], scores["HasAns_f1"], scores["NoAns_exact"]) == (75.0, 50.0, 100.0)
    # Answering "r" alone: itself, "s" and "t" are right. With "q" too 2/3 more, but "t" is lost.
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (75.0, -1.0)
    assert (scores["best_f1"], scores["best_f1_thresh"]) == (75.0, -1.0)
    assert score_version_2(gold, said, odds, threshold=3.0)["HasAns_f1"] == pytest.approx(
        100 * (2 / 3 + 1) / 2
    )  # not exceeded


def test_silence_where_there_is_no_answer_costs_nothing() -> None:
    gold = [question("q", "cat"), question("r")]
    scores = score_version_2(gold, {"q": "cat", "r": ""}, {"q": 1.0, "r": 0.0})
    assert (scores["best_exact"], scores["best_exact_thresh"]) == (100.0, 1.0)


def test_nothing_answered_is_best_at_0() -> None:
    scores = score_version_2([question("q"), question("r")], {"q": "a1", "r": ""}, {"q": 1, "r": 2})
    assert (scores["best_f1"], scores["best_f1_thresh"]) == (100.0, 0.0)
    assert "HasAns_f1" not in scores


def test_version_1_prints_what_the_official_script_prints() -> None:
    """evaluate-v1.1.py on the same two files, "zoe-end" unanswered."""
    assert score_version_1(read_squad(VERSION_1).examples, SAID_1) == EXPECTED_1


@pytest.mark.parametrize("threshold", [1.0, -0.75])
def test_version_2_prints_what_the_official_script_prints(threshold: float) -> None:
    """evaluate-v2.0.py with --na-prob-file and --na-prob-thresh, names and their order too."""
    scores = score_version_2(read_squad(VERSION_2).examples, SAID_2, ODDS, threshold)
    assert list(scores) == list(EXPECTED_2[threshold])
    assert scores == pytest.approx(EXPECTED_2[threshold])


def test_version_2_wants_a_prediction_and_odds_for_each_question() -> None:
    gold = [question("q", "cat"), question("r"), question("s")]
    with pytest.raises(SquadError, match="2 of 3 questions have no prediction, the first is r"):
        score_version_2(gold, {"q": ""})
    with pytest.raises(SquadError, match="1 of 3 questions have no null odds, the first is q"):
        score_version_2(gold, dict.fromkeys("qrs", ""), {"r": 0.0, "s": 0.0})


def test_a_threshold_that_is_no_number_is_refused() -> None:
    with pytest.raises(SquadError, match="threshold of the null odds: got nan; allowed: a number"):
        score_version_2([question("q", "cat")], {"q": ""}, {"q": 0.0}, threshold=math.nan)


def test_version_1_wants_answers() -> None:
    with pytest.raises(SquadError, match="as SQuAD 1.1: 1 questions have no answer, .* is r"):
        score_version_1([question("q", "cat"), question("r")], {})


@given(st.text(max_size=20), st.text(max_size=20))
def test_f1_is_a_share_and_symmetric(first: str, second: str) -> None:
    f1 = token_f1(first, second)
    assert 0.0 <= f1 <= 1.0
    assert f1 == pytest.approx(token_f1(second, first))
    if normalize_answer(first):
        assert token_f1(first, first) == pytest.approx(1.0)
    if exact_match(first, second) and normalize_answer(first):
        assert f1 == pytest.approx(1.0)
