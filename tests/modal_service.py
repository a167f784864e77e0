"""A stand-in for Modal's service, as far as `modal_tinystories.py` uses it, in a folder.

Calls run in processes of their own, which are started again when they are killed and tried again
when they raise. A `modal.Dict` is a folder of files. Each container has a copy of the Volume, as it
was when the container began or reloaded it; others see what it writes when it commits.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import os
import pickle
import shutil
import signal
import threading
import time
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


class Mount:
    """A container's copy of the Volume, beside it under a name as long: so that a path there, in
    whatever is pickled, is replaced by one here."""

    def __init__(self, folder: Path, volume: Path, call_id: str) -> None:
        self.volume, self._requests = volume, folder / "requests"
        self.at = volume.with_name(uuid.uuid4().hex[: len(volume.name)])
        self._requests.mkdir(exist_ok=True)
        self._seen: dict[str, tuple[int, int]] = {}
        self.reload()

    def _files(self) -> dict[str, tuple[int, int]]:
        return {
            str(path.relative_to(self.at)): (path.stat().st_mtime_ns, path.stat().st_size)
            for path in self.at.rglob("[!.]*")
            if path.is_file()
        }

    def uncommitted(self) -> list[str]:
        """What has changed here since it was the Volume's: names, of deleted files too."""
        files = self._files()
        return [n for n in files | self._seen if files.get(n) != self._seen.get(n)]

    def _ask(self, what: str, names: list[str]) -> None:
        path = self._requests / f"{uuid.uuid4().hex}"
        put_whole(path, (what, self.at, self.volume, names))
        while path.exists():
            time.sleep(0.005)
        self._seen = self._files()

    def commit(self) -> None:
        self._ask("commit", self.uncommitted())

    def reload(self) -> None:
        """Modal's would keep what is not committed, and refuse where a file is open."""
        assert not self.uncommitted(), self.uncommitted()
        self._ask("reload", [])

    def inward(self, value: Any) -> Any:
        """A value from elsewhere, with the paths of this copy."""
        return moved(value, self.volume, self.at)

    def outward(self, value: Any) -> Any:
        """A value for elsewhere."""
        return moved(value, self.at, self.volume)


class NoMount:
    """Of the machine that a command is typed on."""

    def inward(self, value: Any) -> Any:
        return value

    outward = inward


def moved(value: Any, old: Path, new: Path) -> Any:
    """By the folder's name alone, which nothing else has: a `Path` is pickled part by part."""
    assert len(old.name) == len(new.name)
    return pickle.loads(pickle.dumps(value).replace(old.name.encode(), new.name.encode()))


def answer(request: Path) -> None:
    """The service's part of a commit or a reload: nothing comes between, nobody kills it."""
    what, at, volume, names = pickle.loads(request.read_bytes())
    if what == "reload":
        shutil.rmtree(at, ignore_errors=True)
        shutil.copytree(volume, at, ignore=shutil.ignore_patterns(".*"))
    for name in names:
        (volume / name).parent.mkdir(parents=True, exist_ok=True)
        if (at / name).exists():
            shutil.copy2(at / name, volume / name)
        else:
            (volume / name).unlink(missing_ok=True)
    request.unlink()


@dataclasses.dataclass(frozen=True)
class FakeDict:
    """`modal.Dict`: `put(..., skip_if_exists=True)` is true for one caller alone."""

    folder: Path
    mount: Any

    def _path(self, key: str) -> Path:
        self.folder.mkdir(exist_ok=True)
        return self.folder / hashlib.sha256(self.mount.outward(key).encode()).hexdigest()

    def get(self, key: str) -> Any:
        try:
            return pickle.loads(self._path(key).read_bytes())
        except FileNotFoundError:
            return None

    def put(self, key: str, value: Any, *, skip_if_exists: bool) -> bool:
        assert skip_if_exists
        path = self._path(key)
        part = path.with_name(f"{uuid.uuid4()}.part")
        part.write_bytes(pickle.dumps(value))
        try:
            os.link(part, path)
            return True
        except FileExistsError:
            return False
        finally:
            part.unlink()


@dataclasses.dataclass(frozen=True)
class FakeCall:
    """`modal.FunctionCall`."""

    folder: Path
    mount: Any
    object_id: str

    def get(self, timeout: float | None = None) -> Any:
        path = self.folder / f"{self.object_id}.result"
        deadline = time.monotonic() + (600 if timeout is None else timeout)
        while not path.exists():
            if time.monotonic() >= deadline:
                raise TimeoutError
            time.sleep(0.01)
        outcome = pickle.loads(path.read_bytes())
        if isinstance(outcome, BaseException):
            raise outcome
        return self.mount.inward(outcome)


@dataclasses.dataclass(frozen=True)
class FakeFunction:
    """`modal.Function`: its calls wait in the folder until the service begins them."""

    folder: Path
    mount: Any
    name: str

    def spawn(self, *args: Any) -> FakeCall:
        if isinstance(self.mount, Mount):
            assert not self.mount.uncommitted(), "the call would not see it"
        call_id = f"{self.name}-{uuid.uuid4().hex[:8]}"
        put_whole(self.folder / f"{call_id}.call", (self.name, self.mount.outward(args)))
        return FakeCall(self.folder, self.mount, call_id)


def stand_in(
    folder: Path, patch: Callable[[Any, str, Any], None], call_id: str | None, mount: Any
) -> None:
    """Puts the service in Modal's place, as a container that works on `call_id` or no container."""
    patch(modal, "is_local", lambda: call_id is None)
    patch(modal, "current_function_call_id", lambda: call_id)
    patch(modal.Dict, "from_name", lambda name, create_if_missing: FakeDict(folder / name, mount))
    patch(modal.FunctionCall, "from_id", lambda i: FakeCall(folder, mount, i))
    for name in FUNCTIONS:
        patch(modal_tinystories, name, FakeFunction(folder, mount, name))
    if isinstance(mount, Mount):
        patch(modal_tinystories, "volume", mount)


BODIES = {name: getattr(modal_tinystories, name).local for name in FUNCTIONS}


def run_call(
    folder: Path, volume: Path, call_id: str, before: Callable[[Path, str], None] | None
) -> None:
    """A container: the body of a call, and its result."""
    die_with_parent(600)
    log = os.open(folder / f"{call_id}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    mount = Mount(folder, volume, call_id)
    stand_in(folder, setattr, call_id, mount)
    if before is not None:
        before(folder, call_id)
    name, args = pickle.loads((folder / f"{call_id}.call").read_bytes())
    outcome = BODIES[name](*mount.inward(args))
    assert not mount.uncommitted(), mount.uncommitted()
    put_whole(folder / f"{call_id}.result", mount.outward(outcome))


class Service:
    """Begins calls as they come, each in a process; `processes` are those alive, by call."""

    def __init__(
        self, folder: Path, volume: Path, before: Callable[[Path, str], None] | None = None
    ) -> None:
        self.folder, self.volume, self.before = folder, volume, before
        volume.mkdir()
        self.processes: dict[str, BaseProcess] = {}
        self.begun: list[str] = []  # every call, in order
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def _serve(self) -> None:
        while not self._is_over.wait(0.01):
            for request in (self.folder / "requests").glob("[!.]*"):
                answer(request)
            for path in sorted(self.folder.glob("[!.]*.call")):
                if path.stem not in self.begun:
                    self.begun.append(path.stem)
                    self._threads.append(threading.Thread(target=self._supervise, args=[path.stem]))
                    self._threads[-1].start()

    def _supervise(self, call_id: str) -> None:
        tries = itertools.count(1)
        while not self._is_over.is_set():
            context = fresh_processes(["modal_tinystories", "evaluate"])
            args = (self.folder, self.volume, call_id, self.before)
            process = context.Process(target=run_call, args=args)
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
        deadline = time.monotonic() + 600
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
