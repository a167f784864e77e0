"""Activations that a language model computes during training, so that none are written to disk.

`LiveActivations` has the methods of `ActivationCache` that training needs. Rows are read in the
order of the text, in buffers of about the same size. Each buffer is shuffled; a thread computes the
next one while training uses the current one. Before training, the text is tokenized once without
the model. So it is known which buffer a step is in, a run can resume at any step, and a text that
has changed is noticed.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from threading import Event
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from matryoshka.cache_config import CacheConfig
from matryoshka.cache_format import DTYPES, Recipe, Shard, whole_number
from matryoshka.cache_reader import Batch, Batches, check_batches, in_batches, shuffle, steps_in
from matryoshka.cache_writer import compute_shard, recipe_of, refusing_too_large
from matryoshka.errors import UserError
from matryoshka.sources import Block, Source

BUFFER = 2**17  # activations: 200 MB at d_model 768 in float16, and two are held
# Entries of a recipe that say where something is, and not what it is.
NAMES = ("model", "model_revision", "tokenizer", "dataset")


class Unit(NamedTuple):
    """What is known, without running the model, about the rows of one forward pass."""

    n_tokens: int  # activations
    sha256: bytes  # of their token ids, rows and positions


class Stopped(Exception):
    """Raised in the thread that computes activations when they are no longer needed."""


class Joined(NamedTuple):
    """Several blocks joined to one `Block`."""

    blocks: list[Block]
    stopped: Event  # if set, `activations` raises `Stopped` before the next block

    @property
    def n_rows(self) -> int:
        return sum(block.n_rows for block in self.blocks)

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([block.tokens for block in self.blocks])

    def activations(self) -> Iterator[Tensor]:
        """As `Block.activations`. Raises `Stopped` once `stopped` is set."""
        for block in self.blocks:
            if self.stopped.is_set():
                raise Stopped
            yield from block.activations()


class LiveActivations:
    """The first `config.tokens` activations of `source`, or all if it has fewer.

    `config.batch_size` rows go through the model at once; `config.rows_per_shard` is not used.
    `buffer`: about how many activations are shuffled together; two buffers are held in memory.
    Raises `UserError` if the source has no activations.
    """

    shards: tuple[Shard, ...] = ()  # nothing is on disk

    def __init__(self, source: Source, config: CacheConfig, buffer: int = BUFFER) -> None:
        self._source, self._rows_at_once = source, config.batch_size
        self.folder = source.name  # its name in messages
        self.d_model, self.dtype = source.d_model, DTYPES[config.dtype]
        self.recipe: Recipe = recipe_of(config, source)
        del self.recipe["rows_per_shard"]
        self._units = read_units(source, config.batch_size, config.tokens)
        counts = [unit.n_tokens for unit in self._units]
        self._before = np.cumsum([0, *counts]).clip(max=config.tokens)  # activations before units
        self.n_tokens = int(self._before[-1])
        if self.n_tokens == 0:
            raise UserError(f"{source.name} holds nothing to train on")
        self._buffers = self._in_buffers(whole_number("buffer", buffer, 1))

    def _in_buffers(self, size: int) -> list[tuple[int, int]]:
        """The first unit and the end of each buffer; sizes differ by about one unit at most."""
        n_buffers = max(1, round(self.n_tokens / size))
        wanted = np.arange(1, n_buffers) * self.n_tokens / n_buffers  # activations before a cut
        cuts = np.searchsorted(self._before, wanted)
        edges = np.unique([0, *cuts, len(self._units)])
        return list(itertools.pairwise(edges.tolist()))

    @property
    def content_hash(self) -> str:
        """SHA-256 over the recipe without names, and over the token ids: 64 hex digits.

        It does not depend on where the model and the text are, or on their names.
        """
        of_what = {key: value for key, value in self.recipe.items() if key not in NAMES}
        digest = hashlib.sha256(json.dumps(of_what).encode())
        for unit in self._units:
            digest.update(unit.sha256)
        return digest.hexdigest()

    def verify(self, hold_on: torch.device | None = None) -> None:
        """Does nothing: rows are compared with the counted ones whenever they are read."""

    def steps_per_pass(self, batch_size: int) -> int:
        """The number of batches in one pass. Raises `ValueError` if `batch_size` is below 1."""
        return steps_in(self.n_tokens, batch_size)

    # ------------------------------------------------------------------------------------ batches

    def batches(
        self,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        device: str | torch.device = "cpu",
    ) -> Batches:
        """Training batches float32 [batch_size, d_model] from step `start_step` on, without end.

        A pass has `steps_per_pass` batches and uses each activation at most once; the last ones,
        fewer than a batch, are left out. The order depends on the seed alone, so a run that resumes
        computes no buffer before the one it is in. Raises `UserError` if the text has changed since
        it was counted, and where `compute_shard` does.
        """
        check_batches(self.folder, self.n_tokens, batch_size, seed, start_step)
        stopped = Event()
        n_used = self.steps_per_pass(batch_size) * batch_size  # of a pass
        buffers = self._shuffled(seed, n_used, start_step * batch_size, stopped)
        there = torch.device(device)
        moved = ((acts.to(there), index.to(there)) for acts, index in buffers)
        return in_batches(moved, batch_size, stopped)

    def _shuffled(
        self, seed: int, n_used: int, n_done: int, stopped: Event
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields shuffled buffers without end, after the first `n_done` activations of all passes.

        A pass uses `n_used` activations. A buffer is its activations [n, d_model], and the indices
        of those to use, in order: [at most n].
        """
        n_passes, skip = divmod(n_done, n_used)
        for n_pass in itertools.count(n_passes):
            blocks: Iterator[Block] | None = None
            for b, (first, end) in enumerate(self._buffers):
                before, after = int(self._before[first]), int(self._before[end])
                if after <= skip or before >= n_used:
                    continue
                blocks = blocks or self._blocks(first)
                acts = self._compute(blocks, first, end, stopped)[0]
                order = shuffle(seed, n_pass, b).permutation(after - before)
                taken = order[max(0, skip - before) : n_used - before]
                yield acts, torch.from_numpy(taken)
            skip = 0

    def sequential(self, batch_size: int, device: str | torch.device = "cpu") -> Iterator[Batch]:
        """Every activation once, in the order of the text; the last batch may be smaller.

        Raises `ValueError` if `batch_size` is not a whole number of 1 or more, and `UserError` as
        `batches` does.
        """
        whole_number("batch_size", batch_size, 1)
        return self._sequential(batch_size, torch.device(device))

    def _sequential(self, batch_size: int, device: torch.device) -> Iterator[Batch]:
        blocks, last = self._blocks(0), len(self._units) - 1
        acts = torch.empty(0, self.d_model, dtype=self.dtype, device=device)
        tokens = torch.empty(0, 3, dtype=torch.int64, device=device)
        for i in range(len(self._units)):
            more_acts, more_tokens = self._compute(blocks, i, i + 1, Event())
            acts = torch.cat([acts, more_acts.to(device)])
            tokens = torch.cat([tokens, torch.from_numpy(more_tokens).long().to(device)])
            while len(acts) >= batch_size or (i == last and len(acts) > 0):
                yield Batch(acts[:batch_size].float(), *tokens[:batch_size].unbind(1))
                acts, tokens = acts[batch_size:], tokens[batch_size:]

    # --------------------------------------------------------------------------------- the source

    def _blocks(self, first: int) -> Iterator[Block]:
        """The source's rows from unit `first` on; each block is a unit."""
        rows = self._rows_at_once
        return iter(self._source.blocks(first * rows, None, rows))

    @torch.inference_mode()
    def _compute(
        self, blocks: Iterator[Block], first: int, end: int, stopped: Event
    ) -> tuple[Tensor, np.ndarray]:
        """Computes the activations of units `first` to `end` - 1, the next blocks of `blocks`.

        Returns them, [n, d_model] in the dtype of the recipe, with their token ids, rows and
        positions [n, 3]. Raises `UserError` if the rows are not those that were counted.
        """
        part = Joined(list(itertools.islice(blocks, end - first)), stopped)
        if [unit_of(block).sha256 for block in part.blocks] != [
            unit.sha256 for unit in self._units[first:end]
        ]:
            raise UserError(f"{self.folder} has changed since the run began: its rows differ")
        first_row = first * self._rows_at_once
        where = f"rows {first_row} to {first_row + part.n_rows - 1} of {self.folder}"
        n_used = int(self._before[end] - self._before[first])  # the last rows may bring more
        with refusing_too_large(
            f"{n_used} activations in batches of {self._rows_at_once} rows: give a smaller "
            "--rows-at-once or --buffer"
        ):
            acts = compute_shard(part, self.d_model, self.dtype, where)
        return acts[:n_used], part.tokens[:n_used]


def unit_of(block: Block) -> Unit:
    """The number of activations of a block and its tokens' hash, without running the model."""
    return Unit(len(block.tokens), hashlib.sha256(block.tokens.data).digest())


def read_units(source: Source, rows_at_once: int, n_tokens: int) -> list[Unit]:
    """The units that hold the first `n_tokens` activations of `source`, or all of them.

    It reads the rows but does not run the model. Raises `UserError` if they cannot be read.
    """
    units: list[Unit] = []
    n_left, blocks = n_tokens, iter(source.blocks(0, None, rows_at_once))
    with tqdm(total=n_tokens, unit=" tokens", desc="counting", mininterval=1, delay=1) as bar:
        while n_left > 0 and (block := next(blocks, None)) is not None:
            units.append(unit_of(block))
            n_left -= units[-1].n_tokens
            bar.update(units[-1].n_tokens)
    return units
