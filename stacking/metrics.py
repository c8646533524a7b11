"""Numbers of a run: the metrics file, throughput, FLOPs, and the unigram baseline."""

import errno
import json
import math
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch

from stacking import cost, distributed
from stacking.config import BertConfig, DataConfig, Freeze
from stacking.dataset import MaskedLMBatch
from stacking.errors import UserError

_CPU_INFO = Path("/proc/cpuinfo")


class MetricsLog:
    """Append-only JSON lines; on the main rank only, elsewhere a no-op.

    A disk that is full is told by `settle`, where all ranks can hear of it, not by `write`. After
    the first row that is lost none is written, so that a resumed run finds none missing.
    """

    def __init__(self, path: Path) -> None:
        """Open for appending; a line torn by a kill is cut off first."""
        self._path = path
        self._fault: OSError | None = None
        self._file: IO[bytes] | None = None
        if distributed.is_main():
            try:
                if path.exists() and not path.is_file():
                    raise OSError(errno.EINVAL, "it is no plain file")
                _drop_torn_line(path)
                self._file = path.open("ab", buffering=0)
            except OSError as error:
                self._fault = error

    @property
    def has_failed(self) -> bool:
        """Whether a row was lost, which `settle` would raise."""
        return self._fault is not None

    def settle(self) -> None:
        """UserError if a row was lost."""
        if self._fault is not None:
            raise UserError(
                f"{self._path}: could not be written: {self._fault.strerror}; free some space or "
                "make the folder writable, then run the same command again to continue"
            )

    def write(self, event: str, row: Mapping[str, object]) -> None:
        """Write one row; floats that JSON cannot hold become null."""
        if self._file is None or self.has_failed:
            return
        clean = {key: _jsonable(value) for key, value in row.items()}
        line = json.dumps({"event": event, **clean}).encode() + b"\n"
        try:
            while line:  # a disk that gets full takes a part first
                line = line[self._file.write(line) :]
        except OSError as error:
            self._fault = error

    def clear(self) -> None:
        """Forget all rows: those of an attempt that left no checkpoint."""
        if self._file is not None:
            self._file.truncate(0)

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def last_row(path: Path, event: str = "") -> dict[str, object] | None:
    """The newest row of one kind, or of any; None where there is none."""
    if not path.is_file():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    rows = (_row(line) for line in reversed(lines) if line.endswith(b"\n"))
    return next((row for row in rows if row and event in ("", row["event"])), None)


def _row(line: bytes) -> dict[str, object] | None:
    """A line of the file; None where it is damaged, as a full disk or an editor can leave it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and "event" in row else None


@dataclass(frozen=True)
class WindowRates:
    """Sums over the steps since the last logged one, over all ranks."""

    mlm_loss: float  # nats per masked token
    nsp_loss: float  # nats per sequence pair
    mlm_accuracy: float
    tokens: int
    real_tokens: int
    seconds: float
    data_wait_seconds: float  # this rank's
    steps: int


class Window:
    """Collects steps between two logged ones without touching the host."""

    def __init__(self, device: torch.device) -> None:
        """`device`: where the step's sums live."""
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Forget what was collected and start the clock anew."""
        # MLM loss, NSP loss, correct
        self._sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        # masked tokens, sequences, tokens, real tokens: known to the host, which sends them once
        self._sizes = np.zeros(4)
        self._steps = 0
        self._data_wait = 0.0
        self._began = time.perf_counter()

    def add(self, totals: torch.Tensor, batches: Iterable[MaskedLMBatch], waited: float) -> None:
        """Add one step: `totals` [3] from TrainEngine.train_step and its micro batches."""
        self._sums += totals
        for batch in batches:
            shape = batch.input_ids.shape
            self._sizes += (batch.num_masked, shape[0], shape.numel(), batch.num_real_tokens)
        self._steps += 1
        self._data_wait += waited

    @property
    def steps(self) -> int:
        """Steps collected."""
        return self._steps

    def take(self) -> WindowRates:
        """Sum over ranks, read, and start anew. Collective; synchronises."""
        sizes = torch.from_numpy(self._sizes).to(self.device)
        mlm, nsp, correct, masked, sequences, tokens, real = distributed.sum_over_ranks(
            torch.cat([self._sums, sizes])
        ).tolist()
        seconds = time.perf_counter() - self._began
        rates = WindowRates(
            mlm / max(1, masked), nsp / max(1, sequences), correct / max(1, masked),
            int(tokens), int(real), seconds, self._data_wait, self._steps,
        )  # fmt: skip
        self.restart()
        return rates


def model_flops(
    config: BertConfig, data: DataConfig, rates: WindowRates, freeze: Freeze | None = None
) -> float:
    """FLOPs that the window's *real* tokens needed; recomputation and padding do not count."""
    sequences = rates.tokens / data.max_seq_length
    sizes = data.max_seq_length, data.max_predictions_per_seq
    padded = cost.training_flops(config, 1, *sizes, freeze=freeze)
    return padded * sequences * rates.real_tokens / max(1, rates.tokens)


def measure_matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """This rank's dense matrix-product rate, FLOPs/s: what `mfu` is a share of."""
    size = 1024 if device.type == "cpu" else 8192
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    best = math.inf
    for _ in range(5):
        began = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def device_name(device: torch.device) -> str:
    """What it is sold as; of a CPU as Linux tells it, else the machine's kind; may be empty."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = _CPU_INFO.read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(filter(None, names), platform.machine())


def unigram_loss(batches: Iterable[MaskedLMBatch], counts: np.ndarray) -> float:
    """Mean MLM loss (nats) of predicting training frequencies (add-one smoothed) on `batches`."""
    nats = -np.log((counts + 1.0) / (counts.sum() + len(counts)))
    losses = [nats[ids[ids >= 0]] for ids in (batch.masked_lm_ids.numpy() for batch in batches)]
    return float(np.concatenate(losses).mean())


def _jsonable(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return value


def _drop_torn_line(path: Path) -> None:
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole != len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
