"""The adaptive weight of distillation: projected dual ascent on beta (arXiv:2601.22709).

While the smoothed distillation loss lies above its budget, beta rises and the student is pulled
harder towards the teacher; below it, beta falls and cross-entropy takes over. Pure Python floats:
the state survives JSON exactly, so a resumed run follows the uninterrupted one bit for bit.
"""

from __future__ import annotations

import math

from qatbench.errors import ArtifactError, NumericsError, UsageError


class BetaController:
    """beta <- clip(beta + rate * (EMA(loss) - target), low, high), once per optimizer step.

    target: budget of the loss in nats; must lie inside the range the loss really travels, or beta
    sticks to a bound. rate: change of beta per nat and step, 0 keeps it fixed. initial: beta before
    the first update, in [low, high]. ema: share of the old average kept at each step, in [0, 1).
    Raises: UsageError if the settings contradict each other or are not finite.
    """

    def __init__(
        self, target: float, rate: float, initial: float, low: float, high: float, ema: float
    ) -> None:
        _check_settings(target, rate, initial, low, high, ema)
        self._target, self._rate, self._ema = float(target), float(rate), float(ema)
        self._low, self._high = float(low), float(high)
        self._beta = float(initial)
        self._average: float | None = None

    @property
    def beta(self) -> float:
        """The weight to use now."""
        return self._beta

    @property
    def ema_value(self) -> float | None:
        """The smoothed loss in nats; None before the first update."""
        return self._average

    def update(self, loss: float) -> float:
        """Take one step's loss (nats, averaged over ranks) and return the new beta.

        The average starts at the first loss rather than at 0, so it needs no bias correction.
        Raises: NumericsError if the loss is nan or infinite; the state is left as it was.
        """
        loss = float(loss)
        if not math.isfinite(loss):
            raise NumericsError(
                f"distillation loss is {loss}: beta cannot follow it",
                hint="lower the learning rate, or start again from the last checkpoint",
            )
        if self._average is None:
            self._average = loss
        else:
            self._average = self._ema * self._average + (1.0 - self._ema) * loss
        step = self._rate * (self._average - self._target)
        self._beta = min(max(self._beta + step, self._low), self._high)
        return self._beta

    def state_dict(self) -> dict[str, float]:
        """`beta`, and `ema` once there was an update. Settings belong to the recipe, not here."""
        state = {"beta": self._beta}
        if self._average is not None:
            state["ema"] = self._average
        return state

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from `state_dict()`.

        Raises: ArtifactError if entries are missing, unknown, not finite, or beta is out of bounds.
        """
        if not {"beta"} <= set(state) <= {"beta", "ema"}:
            raise ArtifactError(f"controller state has entries {sorted(state)}: need beta, ema")
        values = {name: float(value) for name, value in state.items()}
        if not all(map(math.isfinite, values.values())):
            raise ArtifactError(f"controller state is not finite: {values}")
        if not self._low <= values["beta"] <= self._high:
            raise ArtifactError(
                f"saved beta {values['beta']} lies outside [{self._low}, {self._high}]",
                hint="resume with the recipe that the run was started with",
            )
        self._beta, self._average = values["beta"], values.get("ema")


def _check_settings(
    target: float, rate: float, initial: float, low: float, high: float, ema: float
) -> None:
    if not all(map(math.isfinite, (target, rate, initial, low, high, ema))):
        raise UsageError("beta controller: every setting must be finite")
    if low > high:
        raise UsageError(f"beta controller: low {low} > high {high}")
    if not low <= initial <= high:
        raise UsageError(f"beta controller: initial {initial} lies outside [{low}, {high}]")
    if low < 0:
        raise UsageError(f"beta controller: low {low} is negative and would reward disagreement")
    if rate < 0:
        raise UsageError(f"beta controller: rate {rate} is negative and would push the wrong way")
    if not 0 <= ema < 1:
        raise UsageError(f"beta controller: ema {ema} lies outside [0, 1)")
