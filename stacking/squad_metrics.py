"""Predicted texts in; SQuAD's exact match and F1 out, in per cent, under the official names.

They follow evaluate-v1.1.py and evaluate-v2.0.py to the letter, with their differences: version 1.1
counts a question without a prediction as 0, version 2.0 knows none; where nothing is left of both
texts but articles and punctuation, F1 is 0 in version 1.1 and 1 in version 2.0. No library that
this project uses computes them.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from stacking.squad_data import SquadError, SquadExample

Scores = dict[str, float]
Score = Callable[[str, str], float]

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def score_version_1(examples: Sequence[SquadExample], predictions: Mapping[str, str]) -> Scores:
    """`exact_match` and `f1`, each the mean over all questions of the best over their answers."""
    bare = [one.id for one in examples if not one.answers]
    if bare:
        raise SquadError(
            f"cannot be scored as SQuAD 1.1: {len(bare)} questions have no answer, the first is "
            f"{bare[0]}; give the file with answers"
        )
    exact = f1 = 0.0
    for one in examples:
        if one.id in predictions:
            answers = [answer.text for answer in one.answers]
            exact += _best(exact_match, predictions[one.id], answers)
            f1 += _best(token_f1, predictions[one.id], answers)
    return {"exact_match": 100.0 * exact / len(examples), "f1": 100.0 * f1 / len(examples)}


def score_version_2(
    examples: Sequence[SquadExample],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> Scores:
    """`exact`, `f1` and `total`, the same of questions with (`HasAns_`) and without (`NoAns_`)
    answers, and with null odds the best that a threshold on them could give (`best_`).

    A prediction whose null odds exceed the threshold counts as "". SquadError if a question has no
    prediction or no null odds, or the threshold is no number.
    """
    if math.isnan(threshold):
        raise SquadError("threshold of the null odds: got nan; allowed: a number")
    for what, given in (("prediction", predictions), ("null odds", null_odds)):
        missing = [one.id for one in examples if given is not None and one.id not in given]
        if missing:
            raise SquadError(
                f"cannot be scored as SQuAD 2.0: {len(missing)} of {len(examples)} questions have "
                f"no {what}, the first is {missing[0]}; give those of the same file"
            )
    raw = {
        "exact": {one.id: _best(exact_match, predictions[one.id], _gold(one)) for one in examples},
        "f1": {one.id: _best(_agreement, predictions[one.id], _gold(one)) for one in examples},
    }
    has_answer = {one.id: bool(one.answers) for one in examples}
    scored = raw
    if null_odds is not None:
        silent = silenced(null_odds, threshold)
        scored = {
            name: {k: float(not has_answer[k]) if k in silent else s for k, s in scores.items()}
            for name, scores in raw.items()
        }
    result = _means(scored, list(has_answer), "")
    for prefix, wanted in (("HasAns_", True), ("NoAns_", False)):
        ids = [key for key, has in has_answer.items() if has == wanted]
        result |= _means(scored, ids, prefix) if ids else {}
    if null_odds is not None:
        for name, scores in raw.items():
            best, at = _best_threshold(scores, predictions, null_odds, has_answer)
            result |= {f"best_{name}": best, f"best_{name}_thresh": at}
    return result


def silenced(null_odds: Mapping[str, float], threshold: float) -> set[str]:
    """The questions whose prediction counts as "": their null odds exceed the threshold."""
    return {key for key, odds in null_odds.items() if odds > threshold}


def normalize_answer(text: str) -> str:
    """Lower-cased, without ASCII punctuation and English articles, one blank between words."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 if both are the same when normalised, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words of both, each as often as it stands."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    common = sum((Counter(predicted) & Counter(expected)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(predicted), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def _agreement(prediction: str, answer: str) -> float:
    """Version 2.0's F1: where one of both has no word, 1.0 if the other has none, too."""
    predicted, expected = normalize_answer(prediction), normalize_answer(answer)
    if not predicted or not expected:
        return float(predicted == expected)
    return token_f1(prediction, answer)


def _best(score: Score, prediction: str, answers: Sequence[str]) -> float:
    return max(score(prediction, answer) for answer in answers)


def _gold(one: SquadExample) -> list[str]:
    """Answers that have a word; [""] if there is none."""
    return [answer.text for answer in one.answers if normalize_answer(answer.text)] or [""]


def _means(scores: Mapping[str, Mapping[str, float]], ids: Sequence[str], prefix: str) -> Scores:
    means = {
        f"{prefix}{name}": 100.0 * sum(own[key] for key in ids) / len(ids)
        for name, own in scores.items()
    }
    return means | {f"{prefix}total": len(ids)}


def _best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float],
    has_answer: Mapping[str, bool],
) -> tuple[float, float]:
    """(best mean score, threshold): questions are answered one by one, the surest first.

    As in the official script the best is also looked for among questions of equal odds, between
    which no threshold can tell, and it is 0.0 if nothing should be answered at all.
    """
    current = best = float(sum(not has for has in has_answer.values()))
    threshold = 0.0
    for key in sorted(null_odds, key=lambda key: null_odds[key]):
        if key not in scores:
            continue
        current += scores[key] if has_answer[key] else -float(bool(predictions[key]))
        if current > best:
            best, threshold = current, null_odds[key]
    return 100.0 * best / len(scores), threshold
