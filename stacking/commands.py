"""How a command of launch/ ends: with its result, or with one message and an exit code."""

import json
import sys
from collections.abc import Callable

from stacking.errors import UserError, is_users

STARTS_ANEW = "stopped; what was not finished does not count, the same command starts anew"
GOES_ON = "stopped; the same command goes on from here"


def exit_code(run: Callable[[], int], *, as_json: bool, stopped: str) -> int:
    """What `run` gives back; 2 after the user's mistake, 3 and `stopped` after Ctrl-C.

    A fault of ours is raised. With `as_json` the message is one line of JSON, on stderr as always.
    """
    try:
        return run()
    except (UserError, OSError) as error:
        if not is_users(error):
            raise
        return _complain(f"{error}", as_json, 2)
    except KeyboardInterrupt:
        return _complain(stopped, as_json, 3)


def _complain(message: str, as_json: bool, code: int) -> int:
    print(json.dumps({"error": message}) if as_json else f"error: {message}", file=sys.stderr)
    return code
