"""Activations of a language model as it computes them: training without a disk.

`LiveActivations` has what training needs of an `ActivationCache`. Rows are taken in the order of
the text, in buffers of about so many activations; each buffer is shuffled, and the next one is
computed in a thread while training uses the present one. The text is tokenized once before
training, without the model: so the buffer that a step is in is known, a run goes on at any step,
and a text that has changed is noticed.
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
# Of a recipe: where things are, not what they are.
NAMES = ("model", "model_revision", "tokenizer", "dataset")


class Unit(NamedTuple):
    """What is known of the rows of one forward pass without the model."""

    n_tokens: int  # activations
    sha256: bytes  # of their token ids, rows and positions


class Stopped(Exception):
    """Nobody wants the activations that are being computed."""


class Joined(NamedTuple):
    """Several blocks as one `Block`."""

    blocks: list[Block]
    stopped: Event  # ends `activations` between two blocks

    @property
    def n_rows(self) -> int:
        return sum(block.n_rows for block in self.blocks)

    @property
    def tokens(self) -> np.ndarray:
        return np.concatenate([block.tokens for block in self.blocks])

    def activations(self) -> Iterator[Tensor]:
        """As `Block.activations`. Raises `Stopped`."""
        for block in self.blocks:
            if self.stopped.is_set():
                raise Stopped
            yield from block.activations()


class LiveActivations:
    """The first `config.tokens` activations of `source`, or all where it has fewer.

    `config.batch_size` rows go through the model at once; `config.rows_per_shard` means nothing
    here. `buffer`: activations that are shuffled among each other, about; two buffers are held.
    Raises `UserError` where the source holds nothing.
    """

    shards: tuple[Shard, ...] = ()  # nothing is on disk

    def __init__(self, source: Source, config: CacheConfig, buffer: int = BUFFER) -> None:
        self._source, self._rows_at_once = source, config.batch_size
        self.folder = source.name  # what messages call it
        self.d_model, self.dtype = source.d_model, DTYPES[config.dtype]
        self.recipe: Recipe = recipe_of(config, source)
        del self.recipe["rows_per_shard"]
        self._units = read_units(source, config.batch_size, config.tokens)
        counts = [unit.n_tokens for unit in self._units]
        self._before = np.cumsum([0, *counts]).clip(max=config.tokens)  # activations before a unit
        self.n_tokens = int(self._before[-1])
        if self.n_tokens == 0:
            raise UserError(f"{source.name} holds nothing to train on")
        self._buffers = self._in_buffers(whole_number("buffer", buffer, 1))

    def _in_buffers(self, size: int) -> list[tuple[int, int]]:
        """The units of each buffer, first and end: buffers of one size, give or take a unit."""
        n_buffers = max(1, round(self.n_tokens / size))
        wanted = np.arange(1, n_buffers) * self.n_tokens / n_buffers  # activations before a cut
        cuts = np.searchsorted(self._before, wanted)
        edges = np.unique([0, *cuts, len(self._units)])
        return list(itertools.pairwise(edges.tolist()))

    @property
    def content_hash(self) -> str:
        """SHA-256 over the recipe, but for names, and the token ids that are read: 64 hex digits.

        Wherever model and text lie, and whatever they are called, it is the same.
        """
        of_what = {key: value for key, value in self.recipe.items() if key not in NAMES}
        digest = hashlib.sha256(json.dumps(of_what).encode())
        for unit in self._units:
            digest.update(unit.sha256)
        return digest.hexdigest()

    def verify(self, hold_on: torch.device | None = None) -> None:
        """Nothing is on disk: rows are compared with those that were counted as they are read."""

    def steps_per_pass(self, batch_size: int) -> int:
        """Batches in one pass. Raises `ValueError` for a batch of less than one."""
        return steps_in(self.n_tokens, batch_size)

    # ------------------------------------------------------------------------------------ batches

    def batches(
        self,
        batch_size: int,
        seed: int,
        start_step: int = 0,
        device: str | torch.device = "cpu",
    ) -> Batches:
        """Training batches from step `start_step` on, without end: [batch_size, d_model], float32.

        A pass is `steps_per_pass` batches, and takes no activation twice; fewer than one batch of
        its last buffer are left out. The order is a function of the seed alone, so that a run
        which goes on computes no buffer before the one that it is in. Raises `UserError` where the
        text is no longer the one that was counted, and as `compute_shard` does.
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
        """Buffers without end, without the first `n_done` activations that all passes take.

        A pass takes `n_used`. Yields a buffer's activations [n, d_model], and which to take in
        turn: [at most n].
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

        Raises `ValueError` where `batch_size` is no whole number of 1 or more, and `UserError` as
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
        """The source's rows from those of unit `first` on, a unit at a time."""
        rows = self._rows_at_once
        return iter(self._source.blocks(first * rows, None, rows))

    @torch.inference_mode()
    def _compute(
        self, blocks: Iterator[Block], first: int, end: int, stopped: Event
    ) -> tuple[Tensor, np.ndarray]:
        """The activations of units `first` up to `end`, which `blocks` is to give next.

        [n, d_model] in the dtype of the recipe, and their token ids, rows and positions [n, 3].
        Raises `UserError` where they are other rows than were counted.
        """
        part = Joined(list(itertools.islice(blocks, end - first)), stopped)
        if [of_block(block).sha256 for block in part.blocks] != [
            unit.sha256 for unit in self._units[first:end]
        ]:
            raise UserError(f"{self.folder} has changed since the run began: its rows are others")
        first_row = first * self._rows_at_once
        where = f"rows {first_row} to {first_row + part.n_rows - 1} of {self.folder}"
        n_used = int(self._before[end] - self._before[first])  # the last rows may bring more
        with refusing_too_large(
            f"{n_used} activations in batches of {self._rows_at_once} rows: give a smaller "
            "--rows-at-once or --buffer"
        ):
            acts = compute_shard(part, self.d_model, self.dtype, where)
        return acts[:n_used], part.tokens[:n_used]


def of_block(block: Block) -> Unit:
    """What is known of the block without the model."""
    return Unit(len(block.tokens), hashlib.sha256(block.tokens.data).digest())


def read_units(source: Source, rows_at_once: int, n_tokens: int) -> list[Unit]:
    """The units that hold the first `n_tokens` activations of `source`, or all of them.

    Only rows are read. Raises `UserError` where they cannot be.
    """
    units: list[Unit] = []
    n_left, blocks = n_tokens, iter(source.blocks(0, None, rows_at_once))
    with tqdm(total=n_tokens, unit=" tokens", desc="counting", mininterval=1, delay=1) as bar:
        while n_left > 0 and (block := next(blocks, None)) is not None:
            units.append(of_block(block))
            n_left -= units[-1].n_tokens
            bar.update(units[-1].n_tokens)
    return units
