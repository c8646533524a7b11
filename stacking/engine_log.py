"""Where DeepSpeed's and Python's warnings go: into the run's log file, never onto the screen."""

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from stacking import distributed
from stacking.errors import ConfigError


class _LogFile(logging.FileHandler):
    """A log whose lines are lost when the disk is full: the failing save speaks of that."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Say nothing, in place of a traceback."""


def log_to(log_file: Path | None) -> None:
    """Send DeepSpeed's and Python's warnings to the run's log file, on rank 0; else nowhere."""
    handler: logging.Handler = logging.NullHandler()
    if log_file is not None and distributed.is_main():
        try:
            handler = _LogFile(log_file)
        except OSError as error:
            raise ConfigError(f"{log_file}: cannot be written: {error}") from error
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.captureWarnings(True)
    for name in ("DeepSpeed", "py.warnings"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            logger.removeHandler(old)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("DeepSpeed").setLevel(logging.INFO)


@contextmanager
def prints_to_log() -> Iterator[None]:
    """DeepSpeed's BF16_Optimizer prints lines about memory; tests/unit/test_engine.py tells when
    that is gone.
    """
    with redirect_stdout(io.StringIO()) as printed:
        yield
    for line in printed.getvalue().splitlines():
        logging.getLogger("DeepSpeed").info(line)
