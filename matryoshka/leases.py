"""One call works on a thing, and whoever comes later waits for that one.

A book says who works on what: a mapping that has `get`, and `put(key, value, skip_if_exists=True)`
that is true for one caller alone, as a `modal.Dict` is. A thing's calls form a chain, "THING after
CALL" -> the call that took over from it. Only the last of them can be at work; who takes over from
a call that has ended writes itself behind it, and of two that try at once one succeeds.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import modal


@dataclasses.dataclass(frozen=True)
class Joined:
    """In place of a result: the call whose result it will be, since that works on the thing."""

    call_id: str


def last_call(book: Any, thing: str) -> str:
    """The call that last worked on `thing`; "" where there was none."""
    call_id = ""
    while after := book.get(f"{thing} after {call_id}"):
        call_id = after
    return call_id


def holder(book: Any, thing: str, caller: str, is_running: Callable[[str], bool]) -> str:
    """The one call that works on `thing` from now on: `caller`, unless another has begun.

    A caller that comes again, since it was killed and retried, finds itself.
    """
    while True:
        last = last_call(book, thing)
        if last and (last == caller or is_running(last)):
            return last
        if book.put(f"{thing} after {last}", caller, skip_if_exists=True):
            return caller


def is_running(call_id: str) -> bool:
    """Whether Modal's function call has not come to an end; one that will be retried has not.

    Raises what Modal raises where it cannot be asked.
    """
    unreachable = (modal.exception.ConnectionError, modal.exception.ServiceError)
    try:
        modal.FunctionCall.from_id(call_id).get(timeout=0)
    except TimeoutError:  # Python's own: no result yet. A function's timeout is of another class
        return True
    except unreachable:
        raise
    except Exception:  # it failed, was stopped, or is long forgotten
        return False
    return False


class Work:
    """A call of a Modal function on a thing: begun at once, unless another call is at it already.

    thing: None where it is not known here; then the function returns `Joined` where it has to.
    """

    def __init__(self, book: Any, function: Any, thing: str | None, *args: Any) -> None:
        self._spawn = functools.partial(function.spawn, *args)
        last = last_call(book, thing) if thing else ""
        self._is_own = not (last and is_running(last))
        self._call = self._spawn() if self._is_own else modal.FunctionCall.from_id(last)

    def result(self, is_it: Callable[[Any], bool] = lambda outcome: True) -> Any:
        """What the function returns, called here or by whoever was first.

        Where that other call fails, is stopped, or returns what is not `is_it`, this one's turn has
        come. Raises what the call raises.
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
                print(f"call {outcome.call_id} is at work on this: waiting for it", flush=True)
                self._call, self._is_own = modal.FunctionCall.from_id(outcome.call_id), False
            elif not ended and (self._is_own or is_it(outcome)):
                return outcome
            else:
                print(f"that call ended without what is wanted here{ended}: going on", flush=True)
                self._call, self._is_own = self._spawn(), True
