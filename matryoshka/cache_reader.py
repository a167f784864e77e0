"""Reads a cache: its activations in order, in any range, or as shuffled batches."""

import hashlib
import itertools
import math
import os
import sys
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from matryoshka.cache_format import (
    DTYPES,
    MANIFEST,
    Shard,
    bytes_each,
    read_record,
    whole_number,
    wrong_size,
)
from matryoshka.errors import UserError

# To shuffle, whole chunks are read, and their activations are mixed within a buffer. A chunk of 256
# is 2 to 3 stories and 0.4 MB at d_model 768 in float16; a buffer is over 1,000 stories and 200 MB.
CHUNK = 256  # consecutive activations
CHUNKS_PER_BUFFER = 512
VERIFIERS = 4  # threads that read and hash shards
VERIFIED_AT_ONCE = 8192  # activations: 13 MB at d_model 768 in float16
RESIDENT_SHARE = 0.7  # share of a GPU's free memory that a cache held there may take


class Batch(NamedTuple):
    """Consecutive activations, and where they come from."""

    acts: Tensor  # [n, d_model], float32
    tok_ids: Tensor  # [n], int64
    rows: Tensor  # [n], int64, in the dataset
    positions: Tensor  # [n], int64, in the row


# The numbers of a buffer's chunks, and positions in the buffer -> activations [n, d_model], and the
# indices of those to take from them, in order.
Loader = Callable[[np.ndarray, np.ndarray], tuple[Tensor, Tensor]]
Batches = Generator[Tensor, None, None]  # [batch_size, d_model] each, float32


class ActivationCache:
    """A finished cache. Only `batches` and `verify` keep activations in memory, and say how many.

    n_tokens: use only the first `n_tokens` activations. Raises `UserError` if `folder` holds no
    finished cache, no activations or fewer than that, or if a shard's files are missing or have
    wrong sizes. `verify` checks every byte.
    """

    def __init__(self, folder: str | Path, n_tokens: int | None = None) -> None:
        self.folder = Path(folder)
        if not os.path.exists(self.folder / MANIFEST):
            raise UserError(
                f"{folder} holds no finished cache: run cache_activations.py --out {folder}"
            )
        self.manifest = read_record(self.folder / MANIFEST)
        self.recipe, self.shards = self.manifest.recipe, self.manifest.shards
        self.dtype = DTYPES[self.recipe["dtype"]]
        self.d_model: int = self.recipe["d_model"]
        self.n_tokens = self.manifest.n_tokens
        if not self.n_tokens:
            raise UserError(f"{folder} holds no activations: cache other text")
        if n_tokens is not None:
            if not 0 < n_tokens <= self.n_tokens:
                raise UserError(f"{folder} holds {self.n_tokens} activations, not {n_tokens}")
            self.n_tokens = whole_number("n_tokens", n_tokens, 1)
        self._bytes_each = bytes_each(self.recipe)
        self._resident: Tensor | None = None  # [n_tokens, d_model], kept by `verify`
        self._ends = np.cumsum([shard.n_tokens for shard in self.shards])
        for shard in self.shards:
            wrong = wrong_size(self.folder, shard, self._bytes_each)
            if wrong:
                raise self._damaged(shard, wrong)

    @property
    def content_hash(self) -> str:
        """SHA-256 over `n_tokens` and the shards' checksums of activations: 64 hex digits.

        It does not depend on the folder's path. No activations are read to compute it.
        """
        parts = [str(self.n_tokens), *(shard.acts_sha256 for shard in self.shards)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def _damaged(self, shard: Shard, what: str) -> UserError:
        return UserError(
            f"{self.folder}: shard {shard.name} is damaged ({what}); delete {shard.name}.* there "
            "and cache again: only that shard is computed again"
        )

    def verify(self, hold_on: torch.device | None = None) -> None:
        """Reads everything. Raises `UserError` naming the first shard whose bytes are not right.

        hold_on: a device that keeps the activations, if `batches` would hold them there by default.
        The cache is then read only once, and not a second time by `batches`.
        """
        resident = None
        if hold_on is not None and self._fits(_default_max_resident(hold_on)):
            resident = self._empty_resident(hold_on)
        first_of_shard = 0
        with ThreadPoolExecutor(VERIFIERS) as pool:  # hashing is slower than reading
            checks = []
            for shard in self.shards:
                checks.append(pool.submit(self._verify_shard, shard, first_of_shard, resident))
                first_of_shard += shard.n_tokens
            try:
                for check in checks:
                    check.result()
            finally:
                pool.shutdown(cancel_futures=True)
        self._resident = resident

    def _verify_shard(self, shard: Shard, first: int, resident: Tensor | None) -> None:
        """Like `verify`, for one shard whose first activation is number `first` of the cache."""
        for kind in self._bytes_each:
            digest = hashlib.sha256()
            for start in range(0, shard.n_tokens, VERIFIED_AT_ONCE):
                n_here = min(VERIFIED_AT_ONCE, shard.n_tokens - start)
                raw = np.empty((n_here, self._bytes_each[kind]), dtype=np.uint8)
                self._read_shard(shard, kind, start, raw)
                digest.update(raw.data)
                if resident is not None and kind == "acts":
                    part = resident[first + start : first + start + n_here]  # cut off at n_tokens
                    part.copy_(torch.from_numpy(raw).view(self.dtype)[: len(part)])
            if digest.hexdigest() != getattr(shard, f"{kind}_sha256"):
                raise self._damaged(
                    shard, f"the checksum of {shard.name}.{kind} is not the recorded one"
                )

    def require(self, **expected: Any) -> None:
        """Raises `UserError` unless the recipe has these values: `require(layer=3, d_model=768)`.

        The names are keys of `cache_format.RECIPE_KEYS`, such as `weights_hash` or `split`.
        """
        for key, value in expected.items():
            found = self.recipe.get(key)
            if found != value:
                raise UserError(f"{self.folder}: its {key} is {found}, expected {value}")

    def _count(self, start: int, stop: int) -> int:
        """How many activations a range has. Raises `ValueError` if it is not a range."""
        whole_number("start", start, 0, self.n_tokens)
        return min(whole_number("stop", stop, start), self.n_tokens) - start

    def tokens(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, dataset rows and positions of activations `start` up to `stop`, int64 [n].

        A `stop` past the end means the end. Raises `ValueError` unless `start` and `stop` are whole
        numbers with 0 <= start <= stop and start <= n_tokens.
        """
        raw = np.empty((self._count(start, stop), 3), dtype="<i4")
        self._read("tokens", start, raw.view(np.uint8))
        tok_ids, rows, positions = torch.from_numpy(raw).long().unbind(1)
        return tok_ids, rows, positions

    def acts(self, start: int, stop: int) -> Tensor:
        """Activations `start` up to `stop`, [n, d_model] in the cache's dtype, on the CPU.

        `start` and `stop` are as in `tokens`.
        """
        out = torch.empty(self._count(start, stop), self.d_model, dtype=self.dtype)
        self._read("acts", start, out.view(torch.uint8).numpy())
        return out

    def _read(self, kind: str, start: int, out: np.ndarray) -> None:
        """Fills `out`, uint8 [n, ...], with the bytes of activations `start` up to `start` + n.

        kind: "acts" or "tokens".
        """
        n_done = 0
        while n_done < len(out):
            i = int(np.searchsorted(self._ends, start + n_done, side="right"))  # the shard's number
            first_of_shard = int(self._ends[i - 1]) if i else 0
            n_here = min(len(out) - n_done, int(self._ends[i]) - start - n_done)
            part = out[n_done : n_done + n_here]
            self._read_shard(self.shards[i], kind, start + n_done - first_of_shard, part)
            n_done += n_here

    def _read_shard(self, shard: Shard, kind: str, start: int, out: np.ndarray) -> None:
        """Like `_read`, within one shard; `start` counts from its first activation."""
        view = out.reshape(-1).data
        path = self.folder / f"{shard.name}.{kind}"
        try:
            # Not a memory map, because its pages would count as resident memory.
            with path.open("rb", buffering=0) as file:
                file.seek(start * self._bytes_each[kind])
                while view:
                    n_bytes = file.readinto(view)
                    if not n_bytes:
                        raise self._damaged(shard, f"{path.name} is cut short")
                    view = view[n_bytes:]
        except OSError as error:
            raise self._damaged(shard, f"{path.name}: {error.strerror}") from None

    def sequential(self, batch_size: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """Every activation once, in the dataset's order; the last batch may be smaller.

        Raises `ValueError` unless `batch_size` is a whole number of 1 or more.
        """
        whole_number("batch_size", batch_size, 1)
        starts = range(0, self.n_tokens, batch_size)
        return (self._batch(start, start + batch_size, device) for start in starts)

    def _batch(self, start: int, stop: int, device: str | torch.device) -> Batch:
        acts = self.acts(start, stop).to(device).float()
        return Batch(acts, *(t.to(device) for t in self.tokens(start, stop)))

    def steps_per_pass(self, batch_size: int) -> int:
        """Batches in one pass over the cache. Raises `ValueError` if `batch_size` is below 1."""
        return steps_in(self.n_tokens, batch_size)

    def batches(
        self,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        device: str | torch.device = "cpu",
        max_resident: int | None = None,
    ) -> Batches:
        """Training batches from step `start_step` on, without end: [batch_size, d_model], float32.

        A pass is `steps_per_pass` batches, and takes no activation twice. It leaves out fewer
        activations than a batch has, different ones in each pass. The order depends on the seed
        alone: chunks of 256 consecutive activations come in random order, and are mixed within
        buffers of about 512 chunks. The batch of any step can therefore be computed without the
        batches before it.

        A cache of up to `max_resident` bytes is read once and held on `device`. Of a larger cache
        two buffers are held, one of which is being read ahead. The batches are the same. By
        default, `max_resident` is 1 GiB on the CPU, and 0.7 of the free memory on a GPU.

        Raises `UserError` if the cache holds less than one batch, and `ValueError` unless
        `batch_size` is a whole number of 1 or more, `seed` and `start_step` are whole numbers of 0
        or more, and `max_resident` is not negative.
        """
        device = torch.device(device)
        check_batches(self.folder, self.n_tokens, batch_size, seed, start_step)
        if max_resident is None:
            held = self._resident is not None  # then it takes free memory, and has room already
            max_resident = sys.maxsize if held else _default_max_resident(device)
        if not max_resident >= 0:
            raise ValueError(f"max_resident must be bytes, 0 or more, got {max_resident}")
        return self._batches(batch_size, seed, start_step, device, self._fits(max_resident))

    def _fits(self, max_resident: int) -> bool:
        """Whether the first `n_tokens` activations take at most `max_resident` bytes."""
        return self.n_tokens * self._bytes_each["acts"] <= max_resident

    def _empty_resident(self, device: torch.device) -> Tensor:
        """An uninitialised tensor for the first `n_tokens` activations, [n_tokens, d_model]."""
        return torch.empty(self.n_tokens, self.d_model, dtype=self.dtype, device=device)

    def _batches(
        self, batch_size: int, seed: int, start_step: int, device: torch.device, resident: bool
    ) -> Batches:
        """Like `batches`. resident: hold the whole cache on `device`, not a buffer at a time."""
        load = self._resident_loader(device) if resident else self._streaming_loader(device)
        schedule = self._schedule(batch_size, seed, start_step)
        yield from in_batches((load(*part) for part in schedule), batch_size)

    def _schedule(
        self, batch_size: int, seed: int, start_step: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The buffers from step `start_step` on, without end: their chunks, and the order in them.

        Yields the numbers of a buffer's chunks, [n_chunks], and the positions in the buffer of the
        activations to take, in order. Activations that steps before `start_step` took are not among
        them, nor are those that the pass leaves out, which are in its last buffer.
        """
        steps = self.steps_per_pass(batch_size)
        skip = start_step % steps * batch_size
        n_chunks = math.ceil(self.n_tokens / CHUNK)
        n_buffers = max(1, round(n_chunks / CHUNKS_PER_BUFFER))  # their sizes differ by 1 at most
        for n_pass in itertools.count(start_step // steps):
            left = steps * batch_size
            chunks = shuffle(seed, n_pass, 0).permutation(n_chunks)
            for b, buffer in enumerate(np.array_split(chunks, n_buffers), start=1):
                n_used = min(left, self._buffer_size(buffer))
                if skip < n_used:
                    order = shuffle(seed, n_pass, b).permutation(self._buffer_size(buffer))
                    yield buffer, order[skip:n_used]
                skip, left = max(0, skip - n_used), left - n_used

    def _buffer_size(self, chunks: np.ndarray) -> int:
        """Activations in these chunks. Only the last chunk of the cache may be a short one."""
        return int(np.minimum(CHUNK, self.n_tokens - chunks * CHUNK).sum())

    def _streaming_loader(self, device: torch.device) -> Loader:
        """A loader that reads a buffer's chunks from disk, and returns them on `device`."""

        def load(chunks: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor]:
            size = self._buffer_size(chunks)
            pinned = device.type == "cuda"
            acts = torch.empty(size, self.d_model, dtype=self.dtype, pin_memory=pinned)
            raw, done = acts.view(torch.uint8).numpy(), 0
            for start in (chunks * CHUNK).tolist():
                n_here = min(CHUNK, self.n_tokens - start)
                self._read("acts", start, raw[done : done + n_here])
                done += n_here
            return acts.to(device), torch.from_numpy(order).to(device)

        return load

    def _resident_loader(self, device: torch.device) -> Loader:
        """Reads the whole cache once. The loader returns it, and a buffer's positions in it."""
        resident, self._resident = self._resident, None  # from here on only the loader holds it
        if resident is None or resident.device.type != device.type:
            resident = self._empty_resident(device)
            at_once = CHUNK * CHUNKS_PER_BUFFER
            for start in range(0, self.n_tokens, at_once):
                resident[start : start + at_once] = self.acts(start, start + at_once)

        def load(chunks: np.ndarray, order: np.ndarray) -> tuple[Tensor, Tensor]:
            index = (chunks[:, None] * CHUNK + np.arange(CHUNK)).reshape(-1)
            index = index[index < self.n_tokens]
            return resident, torch.from_numpy(index[order]).to(device)

        return load


def in_batches(
    buffers: Iterator[tuple[Tensor, Tensor]], batch_size: int, stopped: Event | None = None
) -> Batches:
    """Cuts an endless stream of buffers into batches [batch_size, d_model]; one may span buffers.

    A buffer is activations [n, d_model], and the indices of those to take, in order. A thread makes
    the next buffer while one is used. `stopped` is set when the generator is closed.
    """
    parts: list[Tensor] = []  # of the next batch
    n_missing = batch_size  # activations that the next batch still lacks
    with ThreadPoolExecutor(1) as pool:
        try:
            ahead = pool.submit(next, buffers)
            while True:
                acts, index = ahead.result()
                ahead = pool.submit(next, buffers)
                while len(index):
                    parts.append(acts.index_select(0, index[:n_missing]))
                    index = index[n_missing:]
                    n_missing -= len(parts[-1])
                    if n_missing == 0:
                        batch = parts[0] if len(parts) == 1 else torch.cat(parts)
                        parts, n_missing = [], batch_size
                        yield batch.float()
        finally:
            if stopped is not None:
                stopped.set()


def steps_in(n_tokens: int, batch_size: int) -> int:
    """Batches in one pass over `n_tokens`. Raises `ValueError` if `batch_size` is below 1."""
    return n_tokens // whole_number("batch_size", batch_size, 1)


def check_batches(
    name: str | Path, n_tokens: int, batch_size: int, seed: int, start_step: int
) -> None:
    """Raises what `ActivationCache.batches` raises for such arguments. name: the cache's."""
    whole_number("seed", seed, 0)
    whole_number("start_step", start_step, 0)
    if steps_in(n_tokens, batch_size) == 0:
        raise UserError(
            f"{name} holds {n_tokens} activations: too few for one batch of {batch_size}"
        )


def _default_max_resident(device: torch.device) -> int:
    """How many bytes of activations are held on `device` by default."""
    if device.type != "cuda":
        return 2**30
    return int(RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0])


def shuffle(seed: int, n_pass: int, part: int) -> np.random.Generator:
    """The generator for part 0 of a pass, the order of its chunks, or part b, the b-th buffer."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(n_pass, part)))
