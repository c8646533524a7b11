"""docs/cluster.md and the README quote messages and a table that are really printed."""

import ast
import mmap
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import deepspeed.launcher
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "cluster.md").read_text()
README = (ROOT / "README.md").read_text()
SECTION = README.split("## From one GPU to a cluster")[1].split("\n## ")[0]
SOURCES = {
    "launcher": Path(deepspeed.launcher.__file__).parent,
    "trainer": ROOT / "stacking",
}
LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
ROWS = re.findall(r"^\| `(.+?)`[^|]*\| (\w+) \|", PAGE, re.MULTILINE)
LONGEST_SECTION = 115  # lines


def fragments(message: str) -> list[str]:
    """What stands between the dots that stand for anything."""
    return [part.strip() for part in message.split("...") if part.strip()]


@cache
def templates(folder: Path) -> list[str]:
    """All string literals, those that stand side by side as one, what is filled in as dots."""
    return [text for path in folder.rglob("*.py") for text in literals(ast.parse(path.read_text()))]


def literals(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = node.values
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else "..." for p in parts)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def is_said(message: str, text: str) -> bool:
    return re.search(".*".join(map(re.escape, fragments(message))), text, re.DOTALL) is not None


def test_there_are_messages_of_everybody() -> None:
    assert {who for _, who in ROWS} == {"launcher", "trainer", "torch", "ssh", "Python", "NCCL"}


@pytest.mark.parametrize(("message", "who"), [row for row in ROWS if row[1] in SOURCES])
def test_a_message_is_one_that_its_source_prints(message: str, who: str) -> None:
    assert any(is_said(message, text) for text in templates(SOURCES[who])), message


@pytest.mark.skipif(not LIBRARY.exists(), reason="torch's library has another name here")
def test_torchs_messages_are_in_its_library() -> None:
    with LIBRARY.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for message in [message for message, who in ROWS if who == "torch"]:
            assert text.find(fragments(message)[0].encode()) >= 0, message


def test_the_readmes_messages_are_those_of_the_page() -> None:
    quoted = re.findall(r"^\| `(.+?)` \|", SECTION.split("message |")[1], re.MULTILINE)
    assert len(quoted) >= 6
    assert set(quoted) <= {message for message, _ in ROWS}


def test_the_readmes_scaling_table_is_what_its_command_prints() -> None:
    pattern = r"```bash\n(python launch/plan\.py.+?)```\n+```\n(.+?)```"
    block, table = re.findall(pattern, SECTION, re.S)[0]
    words = block.replace("\\\n", " ").split()
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shown = [line.split() for line in table.splitlines() if line != "..."]
    printed = [line.split() for line in done.stdout.splitlines()]
    assert len(shown) >= 5
    assert [line for line in shown if line not in printed] == []


def test_the_section_is_short() -> None:
    assert len(SECTION.splitlines()) <= LONGEST_SECTION


def test_the_pages_links_and_the_sections_anchors_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#]+)#([^)]+)\)", SECTION):
        headings = re.findall(r"^#+ (.+)$", (ROOT / target).read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
