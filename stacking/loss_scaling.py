"""fp16's loss scale of one DeepSpeed engine: in, out, and when it can fall no further.

`tests/unit/test_engine.py` names every private DeepSpeed attribute used here.
"""

from typing import Any

from stacking.errors import NonFiniteError
from stacking.snapshot import LossScaler


class LossScaling:
    """The loss scaler of an engine; without fp16 there is none and nothing here does anything."""

    def __init__(self, engine: Any) -> None:  # DeepSpeed ships no types
        """`engine`: DeepSpeed's."""
        self._engine = engine
        self._scaler = (
            getattr(engine.optimizer, "loss_scaler", None) if engine.fp16_enabled() else None
        )
        if self._scaler is not None:
            # DeepSpeed would raise a bare Exception at the floor; `check` says what to do.
            self._scaler.raise_error_at_min_scale = False

    @property
    def scale(self) -> float | None:
        """The factor on the loss; None without fp16."""
        return None if self._scaler is None else float(self._scaler.cur_scale)

    def read(self) -> LossScaler | None:
        """Scale and counters."""
        if self._scaler is None:
            return None
        return LossScaler(
            scale=float(self._scaler.cur_scale),
            steps=int(getattr(self._scaler, "cur_iter", 0)),  # a static scale has no counters
            last_overflow=int(getattr(self._scaler, "last_overflow_iter", -1)),
            hysteresis=int(getattr(self._scaler, "cur_hysteresis", 1)),
            skipped_steps=int(self._engine.skipped_steps),
        )

    def write(self, given: LossScaler | None) -> None:
        """Go on where another engine's scaler was."""
        if given is None or self._scaler is None:
            return
        self._engine.skipped_steps = given.skipped_steps
        if getattr(self._scaler, "dynamic", False):
            self._scaler.cur_scale = given.scale
            self._scaler.cur_iter = given.steps
            self._scaler.last_overflow_iter = given.last_overflow
            self._scaler.cur_hysteresis = given.hysteresis

    def check(self, scale_before: float | None) -> None:
        """After a step without update: NonFiniteError unless a lower scale may help.

        `scale_before`: the scale that this step ran with.
        """
        if self._scaler is None:
            raise NonFiniteError("the gradient norm is not finite")
        if not getattr(self._scaler, "dynamic", False):
            raise NonFiniteError(
                f"fp16 gradients overflowed at the fixed loss scale {self.scale:g}; set "
                "fp16.loss_scale to 0, for a dynamic one, or lower"
            )
        floor = float(self._scaler.min_scale)
        if scale_before is not None and scale_before <= floor:
            raise NonFiniteError(
                f"fp16 gradients overflowed at the smallest loss scale, {floor:g} "
                "(fp16.min_loss_scale)"
            )
