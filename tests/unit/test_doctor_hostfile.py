"""The hostfile's grammar is the launcher's, and all faults come at once."""

from pathlib import Path

import pytest
from deepspeed.launcher import runner
from hypothesis import given, settings
from hypothesis import strategies as st

from stacking.doctor_hostfile import parse_hostfile, read_hostfile, usable_names

PIECES = st.sampled_from(
    ["node1", "node2", "u@10.0.0.1", " ", "\t", "\xa0", "\x0b", "\u2028", "#", "slots=", "slots",
     "=", "0", "8", "12", "\u0664", "9" * 5000, ":", "max_slots=9", "Slots=4", "-1", "\r"]
)  # fmt: skip
ENTRIES = st.builds(
    "{}{}slots={}{}".format,
    st.sampled_from(["node1", "node2", "node3", "#node4", "u@host", "127.0.0.1"]),
    st.sampled_from([" ", "\t", "   ", ""]), st.integers(0, 99),
    st.sampled_from(["", " ", "x", " # why", " slots=3"]),
)  # fmt: skip
LINES = st.one_of(ENTRIES, ENTRIES, st.just(""), st.lists(PIECES, max_size=6).map("".join))
HOSTFILES = st.builds("{}{}".format, st.lists(LINES, max_size=6).map("\n".join),
                      st.sampled_from(["", "\n", "\r\n"]))  # fmt: skip

TEN_FAULTS = """\
# ten faults in thirteen lines
node1 slots=8
node2
node3 slots = 8
node4: 8
node1 slots=4
node6 slots=0

node7:2222 slots=8
node8 slots=4x
NODE1 slots=8
localhost slots=8
node9,node10 slots=8
"""


@settings(max_examples=100, deadline=None)
@given(HOSTFILES)
def test_hosts_and_slots_are_the_launchers_or_both_refuse(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostfile"
    path.write_bytes(text.encode())
    ours = read_hostfile(path)
    try:
        theirs = runner.fetch_hostfile(str(path))
    except ValueError:
        assert ours.refused
    else:
        assert not ours.refused
        assert list(ours.slots.items()) == list(theirs.items())


def test_ten_faults_are_told_at_once_each_with_its_line_and_fix() -> None:
    found = parse_hostfile(TEN_FAULTS)
    fails = [finding for finding in found.findings if finding.status == "fail"]
    assert len(fails) == 10
    lines = [int(finding.found.split(":")[0].removeprefix("line ")) for finding in fails]
    assert lines == [3, 4, 5, 6, 7, 9, 10, 11, 12, 13]
    assert all(finding.fix for finding in fails)
    fixes = {finding.found.split(":")[0]: finding.fix for finding in fails}
    assert fixes["line 4"] == "write node3 slots=8"
    assert fixes["line 5"] == "write node4 slots=8"
    assert fixes["line 3"] == "write one line a host: HOST slots=N"
    assert fixes["line 13"] == "a line each: HOST slots=N"


@pytest.mark.parametrize("text", ["", "\n# nobody\n"])
def test_a_file_without_hosts_is_refused(text: str) -> None:
    (finding,) = parse_hostfile(text).refused
    assert "is empty" in finding.found
    assert "node1 slots=8" in finding.fix


def test_what_ssh_and_pdsh_read_otherwise_is_never_handed_to_them() -> None:
    text = "".join(f"{name} slots=1\n" for name in (
        "-oProxyCommand=x", "a,b", "n[1-2]", "^file", "a:22", "fe80::1", "ok-1.x_y", "u@ok",
        "\ufeffn", "a;b", "$(x)",
    ))  # fmt: skip
    found = parse_hostfile(text)
    assert not found.refused
    assert usable_names(found.slots) == ["ok-1.x_y", "u@ok"]
    assert sum(finding.status == "fail" for finding in found.doubts) == 9


def test_text_behind_the_slots_is_not_read_and_a_comment_may_stand_there() -> None:
    found = parse_hostfile("node1 slots=8 max_slots=9\nnode2 slots=8 # the new one\n")
    assert [finding.status for finding in found.findings] == ["ok", "warn"]
    assert found.slots == {"node1": 8, "node2": 8}


def test_a_file_that_is_not_there_or_no_text_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe slots=1")
    for name, word in (
        ("none", "no such file"),
        ("binary", "cannot be read"),
        (".", "is a folder"),
    ):
        (finding,) = read_hostfile(tmp_path / name).findings
        assert finding.status == "fail"
        assert word in finding.found


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("node11 max_slots=4 slots=2", "write node11 slots=2"),
        ("node11 max_slots=4", "write one line a host: HOST slots=N"),
        ("node8, node9 slots=4", "write one line a host: HOST slots=N"),
        ("node8,node9 slots=4", "a line each: HOST slots=N"),
        ("node8, 4", "write node8 slots=4"),
        ("Slots=4 node8", "write one line a host: HOST slots=N"),
        ("- node8 4", "write one line a host: HOST slots=N"),
    ],
)
def test_the_fix_is_what_was_meant(line: str, fix: str) -> None:
    found = parse_hostfile(f"{line}\nnode1 slots=1\n")
    assert [finding.fix for finding in found.findings] == [fix]


def test_a_byte_order_mark_is_told_once_and_left_out() -> None:
    found = parse_hostfile("\ufeffnode1 slots=8\nnode2\n")
    assert found.slots == {"node1": 8}
    mark, other = found.findings
    assert ("byte-order mark" in mark.found, mark.fix) == (
        True,
        "save the file as UTF-8 without it",
    )
    assert other.found.startswith("line 2: ")


def test_one_of_a_kind_is_no_plural() -> None:
    (found,) = parse_hostfile("node1 slots=1\n").findings
    assert found.found == "1 host, 1 slot"
