"""Which errors of the Hugging Face hub are temporary, so that a request may succeed later."""

from collections.abc import Iterator

PASSING_STATUS = {408, 425, 429}  # and all from 500 on, which are errors of the hub itself
# Exception classes of the HTTP libraries that the hub's clients use, and of Python itself.
PASSING_CLASSES = {
    *("ConnectionError", "TimeoutError", "Timeout", "gaierror", "IncompleteRead"),
    *("TransportError", "NetworkError", "TimeoutException", "ClientConnectionError"),
}


def is_passing(error: BaseException) -> bool:
    """Whether `error` comes from a request that may succeed later: no connection, 429, 503.

    If one of its causes has an HTTP status, that alone decides; 404 is not temporary.
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
    """`error`, the exception that it was raised from, and so on back to the first one."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
