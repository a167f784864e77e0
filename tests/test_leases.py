"""Who works on what: one at a time, whoever is killed or comes late."""

import threading
from typing import Any

import modal
import pytest

from matryoshka import leases
from matryoshka.leases import Joined, Work, holder, last_call


class Book(dict[str, str]):
    """A `modal.Dict` in memory."""

    def put(self, key: str, value: str, *, skip_if_exists: bool) -> bool:
        assert skip_if_exists
        return self.setdefault(key, value) is value


def test_the_first_works_and_the_second_is_told_who_that_is() -> None:
    book, running = Book(), {"one"}
    assert holder(book, "x", "one", running.__contains__) == "one"
    assert holder(book, "x", "two", running.__contains__) == "one"
    assert holder(book, "y", "two", running.__contains__) == "two", "of another thing"
    assert holder(book, "x", "one", running.__contains__) == "one", "killed, and called again"


def test_who_has_ended_is_followed_by_the_next_alone() -> None:
    book, running = Book(), {"one"}
    holder(book, "x", "one", running.__contains__)
    running.clear()
    running |= {"two", "three"}
    assert holder(book, "x", "two", running.__contains__) == "two"
    assert holder(book, "x", "three", running.__contains__) == "two"
    assert last_call(book, "x") == "two"


def test_of_many_at_once_one_succeeds() -> None:
    """All of them have seen that the last one has ended before any of them writes."""
    book, barrier, found = Book(), threading.Barrier(8), []
    holder(book, "x", "old", lambda call: False)

    def is_running(call: str) -> bool:
        if call == "old":
            barrier.wait()
        return call != "old"

    def come(i: int) -> None:
        found.append(holder(book, "x", f"call {i}", is_running))

    threads = [threading.Thread(target=come, args=[i]) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1


@pytest.mark.parametrize(
    ("outcome", "runs"),
    [
        (TimeoutError(), True),
        (7, False),
        (modal.exception.FunctionTimeoutError("it took too long"), False),
        (modal.exception.RemoteError("it was stopped"), False),
        (modal.exception.OutputExpiredError(), False),
        (modal.exception.NotFoundError("no such call"), False),
    ],
)
def test_a_call_runs_until_it_has_an_outcome(
    monkeypatch: pytest.MonkeyPatch, outcome: Any, runs: bool
) -> None:
    monkeypatch.setattr(modal.FunctionCall, "from_id", lambda call_id: Call([outcome]))
    assert leases.is_running("fc-1") is runs


def test_where_modal_cannot_be_asked_nothing_is_assumed(monkeypatch: pytest.MonkeyPatch) -> None:
    trouble = modal.exception.ConnectionError("no network")
    monkeypatch.setattr(modal.FunctionCall, "from_id", lambda call_id: Call([trouble]))
    with pytest.raises(modal.exception.ConnectionError):
        leases.is_running("fc-1")


class Call:
    """A function call with these outcomes, in turn."""

    def __init__(self, outcomes: list[Any]) -> None:
        self.outcomes = outcomes

    def get(self, timeout: float | None = None) -> Any:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


class Function:
    """Whose calls have these outcomes; `n_spawned` of them were begun."""

    def __init__(self, *outcomes: Any) -> None:
        self.outcomes, self.n_spawned = list(outcomes), 0

    def spawn(self) -> Call:
        self.n_spawned += 1
        return Call([self.outcomes.pop(0)])


STOPPED = modal.exception.RemoteError("its app was stopped")


@pytest.mark.parametrize(
    ("own", "others", "n_spawned"),
    [
        ([5], [], 1),
        ([Joined("fc-1")], [5], 1),
        ([Joined("fc-1"), 5], [STOPPED], 2),
        ([Joined("fc-1"), Joined("fc-2")], [STOPPED, 5], 2),
        ([Joined("fc-1"), 5], [4], 2),  # the other's result is not what was asked for
    ],
)
def test_whose_result_it_is(
    monkeypatch: pytest.MonkeyPatch, own: list[Any], others: list[Any], n_spawned: int
) -> None:
    monkeypatch.setattr(modal.FunctionCall, "from_id", lambda call_id: Call([others.pop(0)]))
    function = Function(*own)
    assert Work(Book(), function, None).result(lambda outcome: outcome == 5) == 5
    assert function.n_spawned == n_spawned


def test_what_works_already_is_waited_for_and_nothing_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    book, function = Book(), Function(6)
    holder(book, "x", "fc-1", lambda call: True)
    other = Call([TimeoutError(), 5])  # asked once whether it runs
    monkeypatch.setattr(modal.FunctionCall, "from_id", lambda call_id: other)
    assert Work(book, function, "x").result() == 5
    assert function.n_spawned == 0
    other.outcomes.append(5)  # it has ended
    assert Work(book, function, "x").result() == 6


def test_an_error_of_ones_own_call_is_raised() -> None:
    with pytest.raises(modal.exception.RemoteError):
        Work(Book(), Function(STOPPED), None).result()
