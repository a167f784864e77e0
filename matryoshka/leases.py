"""Leases: only one call works on a thing at a time, and a later one waits for it.

The book records which call works on which thing. It is a mapping with `get`, and with
`put(key, value, skip_if_exists=True)`, which returns True to only one of several callers, as a
`modal.Dict` has. The calls that worked on a thing form a chain: the key "THING after CALL" has the
call that took over from CALL. Only the last one can be running. A call that takes over from one
that has ended adds itself to the chain; if two try this at once, one succeeds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import modal


@dataclasses.dataclass(frozen=True)
class Joined:
    """Returned instead of a result by a call that finds another call working on its thing."""

    call_id: str


def last_call(book: Any, thing: str) -> str:
    """The last call that took over `thing`; "" if there was none."""
    call_id = ""
    while after := book.get(f"{thing} after {call_id}"):
        call_id = after
    return call_id


def holder(book: Any, thing: str, caller: str, is_running: Callable[[str], bool]) -> str:
    """Leases `thing` to `caller` unless another call is working on it; returns the call that is.

    A caller that was killed and retried still has its lease.
    """
    while True:
        last = last_call(book, thing)
        if last and (last == caller or is_running(last)):
            return last
        if book.put(f"{thing} after {last}", caller, skip_if_exists=True):
            return caller


def is_running(call_id: str) -> bool:
    """Whether a Modal function call has not ended; one that will be retried has not.

    Raises Modal's error if Modal cannot be reached.
    """
    unreachable = (modal.exception.ConnectionError, modal.exception.ServiceError)
    try:
        modal.FunctionCall.from_id(call_id).get(timeout=0)
    except TimeoutError:  # no result yet; a function that timed out raises another class
        return True
    except unreachable:
        raise
    except Exception:  # it failed, was stopped, or Modal has deleted its result
        return False
    return False


class Work:
    """A call of a Modal function on a thing; if another call is working on it, that one.

    The call is started when this is made. thing: None if it is not known yet; then the function
    itself has to find out, and returns `Joined` if another call is working on it.
    """

    def __init__(self, book: Any, function: Any, thing: str | None, *args: Any) -> None:
        self._spawn = functools.partial(function.spawn, *args)
        last = last_call(book, thing) if thing else ""
        self._is_own = not (last and is_running(last))
        self._call = self._spawn() if self._is_own else modal.FunctionCall.from_id(last)

    def result(self, is_it: Callable[[Any], bool] = lambda outcome: True) -> Any:
        """Waits for the function's result, from this call or from the one that was first.

        If that other call fails, is stopped, or returns something for which `is_it` is false, the
        function is called again. Raises what a call of this `Work` raises.
        """
        while True:
            try:
                outcome = self._call.get()
                ended = ""
            except modal.exception.ConnectionError:
                raise
            except Exception as error:
                if self._is_own:
                    raise
                ended = f" ({type(error).__name__})"
            if not ended and isinstance(outcome, Joined):
                print(f"call {outcome.call_id} works on this already: waiting for it", flush=True)
                self._call, self._is_own = modal.FunctionCall.from_id(outcome.call_id), False
            elif not ended and (self._is_own or is_it(outcome)):
                return outcome
            else:
                print(f"that call ended without this result{ended}: calling again", flush=True)
                self._call, self._is_own = self._spawn(), True
