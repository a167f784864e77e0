"""Calls of Modal's functions: what they hand back, and how many are begun and waited for."""

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
    """A `UserError` as a value: handed back, since the same input would be refused again."""

    message: str


def hands_back_refusals(body: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function that returns `Refused` where `body` raises `UserError`: nothing retries.

    An error of the hub that may pass is raised, so that the function's retries wait for it.
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
    """Makes what was written to a Modal Volume visible to other containers, and safe."""
    if not modal.is_local():
        volume.commit()


def reload(volume: Any) -> None:
    """Shows what other containers wrote to a Modal Volume. No file on it may be open."""
    if not modal.is_local():
        volume.reload()


def each(
    function: Any, jobs: Sequence[Any], book: Callable[[], Any], volume_name: str
) -> list[Any]:
    """`function` of each job: in containers side by side, or here without Modal, in turn.

    All of them come to an end; what is at work on a job already, by the `book` of leases, is waited
    for. A job has a `thing`: what no two may work on at once. Raises `UserError` naming those that
    failed, each with its reason.
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
            "kept on the Volume, and the same command goes on from there"
        )
    return outcomes


def here(function: Any, *args: Any) -> Any:
    """What a function's body returns, here; an exception is its outcome."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* is executing locally")
        try:
            return function.local(*args)
        except Exception as error:
            return error


def _outcome(work: Work) -> Any:
    """What a call returns or raises; where Modal cannot be reached, this raises that."""
    try:
        return work.result()
    except modal.exception.ConnectionError:
        raise
    except Exception as error:
        return error


def reason_of(outcome: Any) -> str | None:
    """Why a function failed, by what it returned; None where it did not."""
    if isinstance(outcome, Refused):
        return outcome.message
    if isinstance(outcome, BaseException):
        return f"{type(outcome).__name__}: {outcome}"
    return None
