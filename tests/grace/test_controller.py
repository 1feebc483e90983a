"""The controller of beta: a trajectory worked out by hand, its bounds, its state."""

from __future__ import annotations

import json
import math

import pytest

from qatbench.errors import ArtifactError, NumericsError, UsageError
from qatbench.grace import BetaController

SETTINGS = {"target": 2.0, "rate": 0.25, "initial": 1.0, "low": 0.5, "high": 1.5, "ema": 0.5}


def controller(**changes: float) -> BetaController:
    return BetaController(**{**SETTINGS, **changes})


def test_trajectory_worked_out_by_hand():
    control = controller()
    #  loss  average            beta
    #  3     3                  1 + (3 - 2) / 4         = 1.25
    #  1     (3 + 1) / 2 = 2    1.25 + 0                = 1.25
    #  0     (2 + 0) / 2 = 1    1.25 + (1 - 2) / 4      = 1.0
    #  2     (1 + 2) / 2 = 1.5  1.0 + (1.5 - 2) / 4     = 0.875
    seen = [(control.update(loss), control.ema_value, control.beta) for loss in (3, 1, 0, 2)]
    want = [(1.25, 3.0), (1.25, 2.0), (1.0, 1.0), (0.875, 1.5)]
    assert seen == [(beta, average, beta) for beta, average in want]  # exact: all are dyadic


def test_positional_order_is_the_documented_one():
    control = BetaController(2.0, 0.25, 1.0, 0.5, 1.5, 0.5)
    assert control.update(3.0) == 1.25
    assert control.update(4.0) == 1.5


def test_average_is_undefined_first_then_starts_at_the_first_loss():
    control = controller(ema=0.99, rate=0.003)
    assert control.ema_value is None
    assert control.beta == 1.0
    control.update(0.1)
    assert control.ema_value == 0.1
    control.update(1.1)
    assert control.ema_value == pytest.approx(0.99 * 0.1 + 0.01 * 1.1, rel=1e-15)


def test_without_smoothing_the_average_is_the_last_loss():
    control = controller(ema=0.0)
    control.update(5.0)
    control.update(1.0)
    assert control.ema_value == 1.0


@pytest.mark.parametrize(("loss", "bound", "opposite"), [(100.0, 1.5, 0.0), (0.0, 0.5, 4.0)])
def test_beta_stops_at_its_bounds_and_leaves_them_at_once(loss, bound, opposite):
    control = controller(ema=0.0)
    assert [control.update(loss) for _ in range(3)][1:] == [bound, bound]
    assert control.update(opposite) == 1.0  # 2 nats to the other side, a quarter each: no wind-up


def test_zero_rate_keeps_beta():
    assert [controller(rate=0.0).update(loss) for loss in (0.0, 9.0)] == [1.0, 1.0]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_raises_and_changes_nothing(loss):
    control = controller()
    with pytest.raises(NumericsError, match="beta"):
        control.update(loss)
    assert control.ema_value is None
    control.update(3.0)
    before = control.state_dict()
    with pytest.raises(NumericsError):
        control.update(loss)
    assert control.state_dict() == before


@pytest.mark.parametrize("updates", [0, 1, 7])
def test_state_survives_json_and_continues_bit_for_bit(updates):
    losses = [2.0 + math.sin(step) / 3 for step in range(20)]
    straight, first, resumed = (controller(ema=0.9, rate=0.01) for _ in range(3))
    want = [straight.update(loss) for loss in losses]
    for loss in losses[:updates]:
        first.update(loss)

    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))

    assert resumed.ema_value == first.ema_value
    assert [resumed.update(loss) for loss in losses[updates:]] == want[updates:]
    assert len(set(want)) == 20  # beta moved at every step


def test_state_is_plain_floats_and_a_copy():
    control = controller()
    assert control.state_dict() == {"beta": 1.0}
    control.update(3)
    state = control.state_dict()
    assert state == {"beta": 1.25, "ema": 3.0}
    assert {type(value) for value in state.values()} == {float}
    state["beta"] = 0.7
    assert control.beta == 1.25


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"ema": 1.0},
        {"beta": 1.0, "average": 1.0},
        {"beta": math.nan},
        {"beta": 1.0, "ema": math.inf},
        {"beta": 1.6},
        {"beta": 0.4},
    ],
)
def test_damaged_or_foreign_state_raises_and_changes_nothing(state):
    control = controller()
    control.update(3.0)
    with pytest.raises(ArtifactError, match=r"beta|finite"):
        control.load_state_dict(state)
    assert control.state_dict() == {"beta": 1.25, "ema": 3.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 1.6}, "low 1.6 > high 1.5"),
        ({"initial": 0.4}, "initial 0.4"),
        ({"initial": 1.6}, "initial 1.6"),
        ({"low": -0.1}, "negative"),
        ({"rate": -0.1}, "rate -0.1"),
        ({"ema": 1.0}, "ema 1.0"),
        ({"ema": -0.1}, "ema -0.1"),
        ({"target": math.nan}, "finite"),
        ({"high": math.inf}, "finite"),
    ],
)
def test_impossible_settings_raise(changes, message):
    with pytest.raises(UsageError, match=message):
        controller(**changes)


def test_bounds_may_coincide():
    control = controller(low=1.0, high=1.0)
    assert control.update(100.0) == 1.0
