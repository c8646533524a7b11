"""funnel: read less the rules is kept, merged or not, through JSON or not."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning.funnel import RULES, Counts, Funnel
from data_prep.errors import DataError

ADDED = st.lists(
    st.tuples(st.sampled_from(RULES), *[st.integers(-5, 10**12)] * 3).map(
        lambda item: (item[0], Counts(*item[1:]))
    )
)


def _funnel(added: list[tuple[str, Counts]]) -> Funnel:
    funnel = Funnel()
    for rule, counts in added:
        funnel.add(rule, counts.documents, counts.paragraphs, counts.characters)
    return funnel


def test_the_table_has_the_rules_that_did_something_in_their_order() -> None:
    funnel = Funnel()
    funnel.add("duplicate_document", 1, 2, 30)
    funnel.add("read", 5, 9, 200)
    funnel.add("redirect", documents=2)
    funnel.add("empty", documents=1)
    funnel.add("pipes")
    assert [tuple(row) for row in funnel.rows()] == [
        ("read", 7, 9, 200),
        ("  skipped: redirects", 2, 0, 0),
        ("  removed: empty documents", 1, 0, 0),
        ("  removed: exact duplicate documents", 1, 2, 30),
        ("kept", 3, 7, 170),
    ]


@given(ADDED)
def test_each_column_of_the_table_adds_up(added: list[tuple[str, Counts]]) -> None:
    read, *rules, kept = _funnel(added).rows()
    for column in ("documents", "paragraphs", "characters"):
        taken = sum(getattr(rule, column) for rule in rules)
        assert getattr(read, column) - taken == getattr(kept, column)


@given(ADDED, ADDED)
def test_merged_funnels_count_as_one(
    left: list[tuple[str, Counts]], right: list[tuple[str, Counts]]
) -> None:
    merged = _funnel(left)
    merged.merge(_funnel(right))
    assert merged.rows() == _funnel(left + right).rows()


@given(ADDED)
def test_json_and_back_is_the_same(added: list[tuple[str, Counts]]) -> None:
    funnel = _funnel(added)
    data = json.loads(json.dumps(funnel.as_dict()))
    assert data["kept"]["documents"] == funnel.kept.documents
    assert Funnel.from_dict(data) == funnel


@pytest.mark.parametrize(
    "data", [{"cleverness": {"documents": 1}}, {"read": {"pages": 1}}, {"read": 3}, {"read": None}]
)
def test_other_json_is_refused(data: dict[str, dict[str, int]]) -> None:
    with pytest.raises(DataError, match="not the counts of a funnel"):
        Funnel.from_dict(data)


def test_an_unknown_rule_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="'empties' is not one of"):
        Funnel().add("empties")
