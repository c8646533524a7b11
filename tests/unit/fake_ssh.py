"""An ssh for tests, put on the PATH: runs the command here and changes what the host answers.

`$FAKE_SSH/HOST.json`: {"exit": N, "says": TEXT}, {"hangs": true}, or {"answers": {section: {...}}}.
torch is not loaded: the devices are those of the plan, by default a CPU's.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CPU = {"gpus": [], "supports_bf16": True}


def main() -> int:
    host, command = sys.argv[-2], sys.argv[-1]
    if "-G" in sys.argv:
        print("hostname", "no..name" if sys.argv[-1] == "unknown" else "127.0.0.1")
        return 0
    plan = json.loads((Path(os.environ["FAKE_SSH"]) / f"{host}.json").read_text())
    if plan.get("hangs"):
        subprocess.Popen(["sleep", "60"])  # as a jump host's ssh: it holds the pipe, too
        time.sleep(60)
    if "exit" in plan:
        print(plan["says"], file=sys.stderr)
        return int(plan["exit"])
    print("Welcome to this host, where shell start files print")
    return relay(command, plan["answers"])


def relay(command: str, changes: dict[str, Any]) -> int:
    """Between the doctor and the probe, which runs here."""
    devices = json.dumps({"devices": {**CPU, **changes.pop("devices", {})}})
    probe = subprocess.Popen(
        ["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert probe.stdin is not None
    assert probe.stdout is not None
    settings = json.loads(sys.stdin.readline())
    probe.stdin.write(json.dumps({**settings, "devices": False}) + "\n")
    probe.stdin.flush()
    for line in probe.stdout:
        ((name, section),) = json.loads(line.removeprefix("doctor ")).items()
        if name == "ready":
            print("doctor " + devices, flush=True)
        print("doctor " + json.dumps({name: changed(section, changes.get(name))}), flush=True)
        if name in ("ready", "reached"):
            asked = sys.stdin.readline()
            if asked:
                probe.stdin.write(asked)
                probe.stdin.flush()
            else:
                probe.stdin.close()
    return probe.wait()


def changed(section: object, change: object) -> object:
    """The section with some of its values, or another one."""
    if isinstance(section, dict) and isinstance(change, dict):
        return {**section, **change}
    return section if change is None else change


if __name__ == "__main__":
    sys.exit(main())
