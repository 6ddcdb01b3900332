"""Schedules: how much of Constitutional AI a round has."""

import numpy as np

from fedsafe_jax.cai import schedule


def test_schedules():
    steps = schedule.SCHEDULES["adaptive"].steps_after_probe
    assert schedule.SCHEDULES["light"].amount(False) == schedule.LIGHT
    assert schedule.SCHEDULES["final"].amount(False) == schedule.NONE
    assert schedule.SCHEDULES["final"].amount(True) == schedule.LIGHT
    assert np.isinf(schedule.SCHEDULES["full"].amount(False).steps)
    assert steps(90.0, 96.0, 95.0, 10) == 0  # it may well be safe
    assert steps(0.0, 5.0, 95.0, 10) == 10
    assert steps(47.5, 61.0, 95.0, 10) == 5
    assert steps(93.0, 94.9, 95.0, 10) == schedule.LEAST  # no probe for every step
