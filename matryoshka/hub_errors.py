"""Which errors of the Hugging Face hub pass if one waits, and which do not."""

from collections.abc import Iterator

PASSING_STATUS = {408, 425, 429}  # and 500 and above: the hub's own trouble
# Classes of the half dozen HTTP libraries that the hub's clients use, and of Python's own.
PASSING_CLASSES = {
    *("ConnectionError", "TimeoutError", "Timeout", "gaierror", "IncompleteRead"),
    *("TransportError", "NetworkError", "TimeoutException", "ClientConnectionError"),
}


def is_passing(error: BaseException) -> bool:
    """Whether `error` comes of a request that may succeed later: no connection, 429, 503.

    An HTTP status decides, where there is one among its causes; 404 does not pass.
    """
    causes = list(_causes(error))
    for cause in causes:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        status = status or getattr(cause, "status", None)
        if isinstance(status, int):
            return status in PASSING_STATUS or status >= 500
    names = {cls.__name__ for cause in causes for cls in type(cause).__mro__}
    return bool(names & PASSING_CLASSES) and "OfflineModeIsEnabled" not in names


def _causes(error: BaseException) -> Iterator[BaseException]:
    """`error`, and what it was raised from, back to the first."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
