"""What stands between a strategy and who answers it lets everything through."""

from __future__ import annotations

import pytest

from thrifty.contracts import OutOfBudget, RowFailed, Talk
from thrifty.engines.relay import relayed


def passed_on(request: object) -> Talk:
    return (yield request)


def test_requests_are_passed_on_and_answers_come_back():
    def talk() -> Talk:
        return [(yield "one"), (yield "two")]

    between = relayed(talk(), passed_on)
    assert next(between) == "one"
    assert between.send(1) == "two"
    with pytest.raises(StopIteration) as end:
        between.send(2)
    assert end.value.value == [1, 2]


@pytest.mark.parametrize("signal", [OutOfBudget("spent"), RowFailed("gone", "timeout")])
def test_a_signal_reaches_the_talk(signal):
    def talk() -> Talk:
        try:
            yield "one"
        except type(signal) as seen:
            return seen

    between = relayed(talk(), passed_on)
    next(between)
    with pytest.raises(StopIteration) as end:
        between.throw(signal)
    assert end.value.value is signal


def test_being_closed_reaches_the_talk():
    seen = []

    def talk() -> Talk:
        try:
            yield "one"
        finally:
            seen.append("closed")

    between = relayed(talk(), passed_on)
    next(between)
    between.close()
    assert seen == ["closed"]


def test_a_talk_that_goes_on_when_closed_is_told_so():
    def talk() -> Talk:
        try:
            yield "one"
        except GeneratorExit:
            yield "two"

    between = relayed(talk(), passed_on)
    next(between)
    with pytest.raises(RuntimeError):
        between.close()
