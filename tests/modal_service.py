"""A stand-in for Modal's service, as far as `modal_tinystories.py` uses it, in a folder.

Calls run in processes of their own, which are started again when they are killed and tried again
when they raise. A `modal.Dict` is a folder of files, the Volume a folder that all share.
"""

import contextlib
import dataclasses
import itertools
import os
import pickle
import signal
import threading
import time
import urllib.parse
import uuid
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import modal
from tiny_factory import die_with_parent, fresh_processes

import modal_tinystories
from matryoshka.files import write_atomically

FUNCTIONS = ("cache_part", "train_one", "compare")
TRIES = 6  # as modal.Retries(max_retries=5)


def put_whole(path: Path, value: Any) -> None:
    write_atomically(path, lambda part: part.write_bytes(pickle.dumps(value)))


class FakeDict:
    """`modal.Dict`: `put(..., skip_if_exists=True)` is true for one caller alone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / urllib.parse.quote(key, safe="").replace("%", "_")[-200:]

    def get(self, key: str) -> Any:
        try:
            return pickle.loads(self._path(key).read_bytes())
        except FileNotFoundError:
            return None

    def put(self, key: str, value: Any, *, skip_if_exists: bool) -> bool:
        assert skip_if_exists
        part = self.folder / f"{uuid.uuid4()}.part"
        part.write_bytes(pickle.dumps(value))
        try:
            os.link(part, self._path(key))
            return True
        except FileExistsError:
            return False
        finally:
            part.unlink()


@dataclasses.dataclass(frozen=True)
class FakeCall:
    """`modal.FunctionCall`."""

    folder: Path
    object_id: str

    def get(self, timeout: float | None = None) -> Any:
        path = self.folder / f"{self.object_id}.result"
        deadline = time.monotonic() + (120 if timeout is None else timeout)
        while not path.exists():
            if time.monotonic() >= deadline:
                raise TimeoutError
            time.sleep(0.01)
        outcome = pickle.loads(path.read_bytes())
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome


@dataclasses.dataclass(frozen=True)
class FakeFunction:
    """`modal.Function`: its calls wait in the folder until the service begins them."""

    folder: Path
    name: str

    def spawn(self, *args: Any) -> FakeCall:
        call_id = f"{self.name}-{uuid.uuid4().hex[:8]}"
        put_whole(self.folder / f"{call_id}.call", (self.name, args))
        return FakeCall(self.folder, call_id)


def stand_in(folder: Path, patch: Callable[[Any, str, Any], None], call_id: str | None) -> None:
    """Puts the service in Modal's place, as a container that works on `call_id` or no container."""
    patch(modal, "is_local", lambda: call_id is None)
    patch(modal, "current_function_call_id", lambda: call_id)
    patch(modal.Dict, "from_name", lambda name, create_if_missing: FakeDict(folder / name))
    patch(modal.FunctionCall, "from_id", lambda i: FakeCall(folder, i))
    for name in FUNCTIONS:
        patch(modal_tinystories, name, FakeFunction(folder, name))
    for name in ("commit", "reload"):
        patch(modal_tinystories, name, lambda: None)


BODIES = {name: getattr(modal_tinystories, name).local for name in FUNCTIONS}


def run_call(folder: Path, call_id: str, before: Callable[[Path, str], None] | None) -> None:
    """A container: the body of a call, and its result."""
    die_with_parent()
    log = os.open(folder / f"{call_id}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    stand_in(folder, setattr, call_id)
    if before is not None:
        before(folder, call_id)
    name, args = pickle.loads((folder / f"{call_id}.call").read_bytes())
    outcome = BODIES[name](*args)
    put_whole(folder / f"{call_id}.result", outcome)


class Service:
    """Begins calls as they come, each in a process; `processes` are those alive, by call."""

    def __init__(self, folder: Path, before: Callable[[Path, str], None] | None = None) -> None:
        self.folder, self.before = folder, before
        self.processes: dict[str, BaseProcess] = {}
        self.begun: list[str] = []  # every call, in order
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        while not self._is_over.wait(0.01):
            for path in sorted(self.folder.glob("[!.]*.call")):
                if path.stem not in self.begun:
                    self.begun.append(path.stem)
                    self._threads.append(threading.Thread(target=self._supervise, args=[path.stem]))
                    self._threads[-1].start()

    def _supervise(self, call_id: str) -> None:
        tries = itertools.count(1)
        while not self._is_over.is_set():
            context = fresh_processes(["modal_tinystories", "evaluate"])
            process = context.Process(target=run_call, args=(self.folder, call_id, self.before))
            process.start()
            self.processes[call_id] = process
            process.join()
            del self.processes[call_id]
            if process.exitcode == 0:
                return
            if (process.exitcode or 0) > 0 and next(tries) == TRIES:  # killed ones do not count
                failed = modal.exception.RemoteError(f"{call_id} failed")
                put_whole(self.folder / f"{call_id}.result", failed)
                return

    def kill(self, call_id: str) -> bool:
        """Kills a call's container, as a preemption does. Whether there was one."""
        process = self.processes.get(call_id)
        if process is None or process.pid is None or not process.is_alive():
            return False
        os.kill(process.pid, signal.SIGKILL)
        return True

    def wait_for(self, there: Callable[[], bool]) -> None:
        """Until `there()`."""
        deadline = time.monotonic() + 60
        while not there():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.01)

    def logs(self) -> str:
        """All that containers have printed."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"--- {path.stem}\n{path.read_text()}" for path in paths)

    def close(self) -> None:
        self._is_over.set()
        for process in list(self.processes.values()):
            with contextlib.suppress(Exception):
                process.kill()
        for thread in self._threads:
            thread.join(20)
