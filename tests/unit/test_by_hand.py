"""launch/multi_node/by_hand.sh gives the launcher the variables that its ssh would send."""

import json
import os
import subprocess
import sys
from pathlib import Path

from stacking.doctor_variables import read_env_files

ROOT = Path(__file__).resolve().parents[2]
TOLD = f"""#!{sys.executable}
import json, os, sys
print(json.dumps([sys.argv[1:], dict(os.environ)]))
"""


def test_variables_are_those_that_ssh_would_send_but_for_what_is_set(tmp_path: Path) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (tmp_path / "deepspeed").write_text(TOLD)
    (tmp_path / "deepspeed").chmod(0o755)
    lines = (b"KEY=YWJj=", b"TWO=words of it", b"SET=no", b"SPACED = s \r", b"IN=home")
    (home / ".deepspeed_env").write_bytes(b"\n".join(lines))
    (here / ".deepspeed_env").write_text("EMPTY=\nIN=here\nLAST=a=b==")
    given = {**os.environ, "HOME": str(home), "SET": "yes", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    words = ["bash", str(ROOT / "launch/multi_node/by_hand.sh"), "1", "node1", "--set", "name=a b"]
    done = subprocess.run(words, env=given, cwd=here, capture_output=True, text=True, check=True)
    asked, seen = json.loads(done.stdout)
    values = {**read_env_files([home, here], ".deepspeed_env").values, "SET": "yes"}
    assert values["KEY"] == "YWJj="
    assert {name: seen[name] for name in values} == values
    assert asked[2:6] == ["--no_ssh", "--node_rank", "1", "--master_addr"]
    assert asked[-2:] == ["--set", "name=a b"]


def test_a_place_that_is_no_number_is_refused() -> None:
    words = ["bash", str(ROOT / "launch/multi_node/by_hand.sh"), "node1", "0", "--recipe", "r"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr[:7]) == (2, "usage: ")
