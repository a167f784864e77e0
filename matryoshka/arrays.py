"""Arrays of activations and token ids, whose rows are read and checked a few at a time."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.errors import UserError

ACTS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ID_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NO_ID = -1  # stands in a cache for a token id that is not known
ACTS_AT_ONCE = 4096  # activations that are read and checked at a time
MAX_INT32 = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that can be read a few rows at a time. Error messages call it by its `name`."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]  # rows `start` up to `stop`: [stop - start, *shape[1:]]


def named(arrays: Iterable[Array | Tensor | np.ndarray], kind: str) -> Iterator[Array]:
    """Each as an `Array`, which is called such as "array 3" if it has no name of its own.

    Raises `UserError`.
    """
    if isinstance(arrays, (Tensor, np.ndarray)):  # a loop would take its rows for arrays
        raise UserError(f"expected a list or an iterator of arrays, got one {kind}: give [{kind}]")
    for i, array in enumerate(arrays):
        yield array if isinstance(array, Array) else named_array(f"{kind} {i}", array)


def named_array(name: str, values: Tensor | np.ndarray) -> Array:
    """An array in memory, or mapped into it. Raises `UserError` if torch has no such dtype."""
    if isinstance(values, Tensor):
        if values.layout != torch.strided:
            raise UserError(f"{name} is a sparse tensor, expected a dense one")
        tensor = values.detach()
        return Array(name, tuple(tensor.shape), tensor.dtype, lambda a, b: tensor[a:b].cpu())
    if not isinstance(values, np.ndarray):
        raise UserError(f"{name} is a {type(values).__name__}, expected a tensor or a NumPy array")
    native = values.dtype.newbyteorder("=")
    try:
        dtype = torch.from_numpy(np.empty(0, native)).dtype
    except TypeError:
        raise UserError(
            f"{name} has dtype {values.dtype}, which cannot be read (NumPy has no bfloat16: save "
            "that as .pt or .safetensors)"
        ) from None

    def read(start: int, stop: int) -> Tensor:
        # A copy, because the file is mapped read-only and may have another byte order.
        return torch.from_numpy(np.array(values[start:stop], dtype=native, order="C"))

    return Array(name, tuple(values.shape), dtype, read)


# ------------------------------------------------------------------------------------- their shapes


def checked(arrays: Iterable[Array], check: Callable[[Array, Array], None]) -> Iterator[Array]:
    """The arrays, after `check(array, first array)` of each. Raises what `check` raises."""
    first = None
    for array in arrays:
        first = first or array
        check(array, first)
        yield array


def check_acts(array: Array, first: Array) -> None:
    """Raises `UserError` unless `array` and `first` can be activations of the same cache."""
    if array.dtype not in ACTS_DTYPES:
        raise UserError(
            f"{array.name} has dtype {_name(array.dtype)}; activations are float16, bfloat16, "
            "float32 or float64"
        )
    if len(array.shape) not in (2, 3) or not all(array.shape[1:]):
        raise UserError(
            f"{array.name} has shape {list(array.shape)}; activations are [n, d_model] or "
            "[n_rows, seq, d_model]"
        )
    if array.dtype != first.dtype:
        raise UserError(
            f"{array.name} has dtype {_name(array.dtype)}, but {first.name} {_name(first.dtype)}"
        )
    if array.shape[1:] != first.shape[1:]:
        raise UserError(
            f"{array.name} has shape {list(array.shape)}, but {first.name} {list(first.shape)}: "
            "only the first number may differ"
        )


def check_ids(acts: Array, array: Array, _: Array) -> None:
    """Raises `UserError` unless `array` can hold the token ids of activations like `acts`."""
    if array.dtype not in ID_DTYPES:
        raise UserError(f"{array.name} has dtype {_name(array.dtype)}; token ids are integers")
    if array.shape[1:] != acts.shape[1:-1]:
        shape = "[n]" if len(acts.shape) == 2 else f"[n_rows, {acts.shape[1]}]"
        raise UserError(
            f"{array.name} has shape {list(array.shape)}; token ids are {shape} beside activations "
            f"of shape {list(acts.shape)}"
        )


def sizes(array: Array) -> tuple[int, int]:
    """(seq, d_model) of an array of activations, where an array [n, d_model] has a seq of 1."""
    return (1 if len(array.shape) == 2 else array.shape[1]), array.shape[-1]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ----------------------------------------------------------------------------------- their values


def require_finite(piece: Tensor, stored: Tensor, array: Array, start: int) -> None:
    """Raises `UserError` naming the first row with a value that is not finite.

    piece: [n, ...], the rows of `array` from row `start` on; stored: the same values in the cache's
    dtype, which may be too small for them.
    """
    peak = torch.stack(piece.aminmax()).abs().amax()  # NaN if any value is; faster than isfinite
    if peak.to(stored.dtype).isfinite():
        return
    row = int((~stored.isfinite()).reshape(len(stored), -1).any(1).nonzero()[0])
    values = piece[row].reshape(-1)
    where = f"{array.name} row {start + row}"
    if not values.isfinite().all():
        wrong = float(values[~values.isfinite()][0])
        raise UserError(f"{where} holds {wrong}: activations must be finite")
    dtype = _name(stored.dtype)
    raise UserError(
        f"{where} reaches {float(values.abs().max()):.6g}: {dtype} holds "
        f"{torch.finfo(stored.dtype).max:.6g} at most; use another dtype"
    )


def require_token_ids(piece: Tensor, stored: Tensor, array: Array, start: int) -> None:
    """Raises `UserError` naming the first row of `piece`, [n, ...], with a value that is no id."""
    wrong = ((piece < 0) | (piece > MAX_INT32)).reshape(len(piece), -1)
    if wrong.any():
        row = int(wrong.any(1).nonzero()[0])
        value = int(piece[row].reshape(-1)[wrong[row]][0])
        raise UserError(
            f"{array.name} row {start + row} holds {value}: token ids are 0 to {MAX_INT32}"
        )


# -------------------------------------------------------------------------------------- the blocks

Check = Callable[[Tensor, Tensor, Array, int], None]


def blocks(
    arrays: Iterable[Array], n_rows: int, dtype: torch.dtype, check: Check, limit: int
) -> Iterator[Tensor]:
    """The arrays' first `limit` rows in `dtype`, in blocks [n_rows, ...]; the last may be smaller.

    Calls `check` on each piece that is read, and raises what it raises.
    """
    block, n_done = None, 0  # n_done: rows that the block has so far
    for array, start, stop in pieces(arrays, n_rows, limit):
        if block is None:
            block = torch.empty(n_rows, *array.shape[1:], dtype=dtype)
        piece = array.read(start, stop)  # [n, ...]
        stored = block[n_done : n_done + len(piece)]
        stored.copy_(piece)
        check(piece, stored, array, start)
        n_done += len(piece)
        if n_done == n_rows:
            yield block
            block, n_done = None, 0
    if block is not None:
        yield block[:n_done]


def pieces(arrays: Iterable[Array], n_rows: int, limit: int) -> Iterator[tuple[Array, int, int]]:
    """The ranges of rows to read, in order: (array, start, stop), a few rows each.

    They end after `limit` rows in all. Rows are counted over all arrays, and no range crosses a
    multiple of `n_rows`.
    """
    n_done = 0
    for array in arrays:
        at_once = max(1, ACTS_AT_ONCE // math.prod(array.shape[1:-1]))
        start = 0
        while start < array.shape[0] and n_done < limit:
            n = min(at_once, array.shape[0] - start, n_rows - n_done % n_rows, limit - n_done)
            yield array, start, start + n
            start, n_done = start + n, n_done + n
        if n_done == limit:
            return


def with_ids(
    acts: Iterable[Tensor], ids: Iterable[Tensor] | None, seq: int
) -> Iterator[tuple[int, Tensor, np.ndarray]]:
    """Blocks of activations, flat, together with each activation's token id, row and position.

    acts: blocks [n_rows, d_model] or [n_rows, seq, d_model]; ids: blocks [n_rows] or [n_rows, seq],
    or None. Yields for each block the number of its first row; its activations [n, d_model]; and
    int32 [n, 3]: token id (NO_ID without ids), row, position. Raises `UserError` if there are more
    rows of one than of the other.
    """
    end = object()
    first_row = 0
    pairs: Iterator[Any] = itertools.zip_longest(acts, ids or (), fillvalue=end)
    for block, of_block in pairs:
        n_ids = 0 if of_block is end else len(of_block)
        n_rows = 0 if block is end else len(block)
        if ids is not None and n_ids != n_rows:
            less, more = ("token ids", "activations")[:: 1 if n_ids < n_rows else -1]
            raise UserError(
                f"the {less} end after {first_row + min(n_ids, n_rows)} rows, the {more} go on"
            )
        flat = block.reshape(-1, block.shape[-1])  # [n, d_model]
        row, position = np.divmod(np.arange(len(flat)), seq)
        tok_ids = np.full(len(flat), NO_ID) if ids is None else of_block.reshape(-1).numpy()
        yield first_row, flat, np.stack([tok_ids, row + first_row, position], axis=1).astype("<i4")
        first_row += n_rows
