"""Calls of Modal functions: how they return errors, and how several are started and waited for."""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import modal

from matryoshka.errors import UserError
from matryoshka.hub_errors import is_passing
from matryoshka.leases import Work


@dataclasses.dataclass(frozen=True)
class Refused:
    """A `UserError` that a function returns. Raised, Modal would retry the same wrong input."""

    message: str


def hands_back_refusals(body: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function that returns `Refused` where `body` raises `UserError`.

    An error of the hub that may be temporary is raised instead, so that Modal retries the call.
    """

    @functools.wraps(body)
    def call(*args: Any) -> Any:
        try:
            return body(*args)
        except UserError as error:
            if is_passing(error) and not modal.is_local():
                raise RuntimeError(f"will be tried again: {error}") from error
            return Refused(str(error))

    return call


def commit(volume: Any) -> None:
    """Saves what was written to a Modal Volume, and makes it visible to other containers."""
    if not modal.is_local():
        volume.commit()


def reload(volume: Any) -> None:
    """Makes visible here what other containers committed. No file of the Volume may be open."""
    if not modal.is_local():
        volume.reload()


def each(
    function: Any, jobs: Sequence[Any], book: Callable[[], Any], volume_name: str
) -> list[Any]:
    """Calls `function` on each job and returns the results.

    On Modal, the calls run in containers at the same time; without it, here, one after another. A
    job has a `thing` that only one call may work on at a time; if the book of leases has another
    call for it, that one is waited for. When all have ended, raises a `UserError` that names the
    jobs that failed, each with its reason.
    """
    calls = [(job, f"{volume_name}:{job.thing}") for job in jobs]
    outcomes: list[Any]
    if modal.is_local():
        outcomes = [here(function, *call) for call in calls]
    else:
        begun = [Work(book(), function, thing, job, thing) for job, thing in calls]
        outcomes = [_outcome(work) for work in begun]
    failures = [
        f"{job}: {reason}"
        for job, outcome in zip(jobs, outcomes, strict=True)
        if (reason := reason_of(outcome))
    ]
    if failures:
        raise UserError(
            f"{len(failures)} of {len(jobs)} failed: {'; '.join(failures)}. What is finished is "
            "kept on the Volume, and the same command continues from there"
        )
    return outcomes


def here(function: Any, *args: Any) -> Any:
    """Runs a function's body in this process; returns its result, or the exception it raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is executing locally")
        try:
            return function.local(*args)
        except Exception as error:
            return error


def _outcome(work: Work) -> Any:
    """Returns a call's result, or the exception it raised. Raises if Modal cannot be reached."""
    try:
        return work.result()
    except modal.exception.ConnectionError:
        raise
    except Exception as error:
        return error


def reason_of(outcome: Any) -> str | None:
    """Why a call failed; None if it did not. outcome: its result, or the exception it raised."""
    if isinstance(outcome, Refused):
        return outcome.message
    if isinstance(outcome, BaseException):
        return f"{type(outcome).__name__}: {outcome}"
    return None
