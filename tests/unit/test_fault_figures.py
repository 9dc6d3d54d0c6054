"""The verdict of a campaign of `make faults`."""

from __future__ import annotations

from fault_figures import Figures


def test_a_campaign_within_its_targets_has_nothing_to_say():
    figures = Figures(noticed=[0.2, 9.0, 0.3], cold=[4.0, 4.2], again=[4.8, 5.0], cancelled=[0.01] * 99 + [3.0])
    assert figures.late == []
    assert Figures().late == []


def test_a_campaign_that_was_too_slow_says_in_what():
    figures = Figures(noticed=[0.2, 2.5, 3.0], cold=[4.0], again=[5.1], cancelled=[0.01] * 9 + [0.2])
    assert [text.partition(" is to")[0] for text in figures.late] == ["a killed rank", "a pool", "Cancel"]
