"""Small models of TinyModel's shape and rows of TinyModelTokIds' schema, made up from a seed."""

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from matryoshka.tiny_model import BEGIN, PAD

END = 9997  # what a story ends with, where its row is longer


def make_state(
    d_model: int = 32,
    n_layers: int = 2,
    d_mlp: int = 48,
    d_vocab: int = 10_000,
    max_seq_len: int = 256,
    seed: int = 0,
) -> dict[str, Tensor]:
    """A state dict of TinyModel's names. Activations at every layer are of order 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float) -> Tensor:
        return std * torch.randn(shape, generator=generator)

    state = {
        "embed.weight": normal(d_vocab, d_model, std=1.0),
        "pos_embed": normal(1, max_seq_len, d_model, std=0.3),
        "lm_head.weight": normal(d_vocab, d_model, std=d_model**-0.5),
        "lm_head.bias": normal(d_vocab, std=0.1),
    }
    for i in range(n_layers):
        for name in "QKVO":
            state[f"torso.{i}.attn.{name}.weight"] = normal(d_model, d_model, std=d_model**-0.5)
        state[f"torso.{i}.attn.O.bias"] = normal(d_model, std=0.1)
        state[f"torso.{i}.mlp.read_in.weight"] = normal(d_mlp, d_model, std=d_model**-0.5)
        state[f"torso.{i}.mlp.read_in.bias"] = normal(d_mlp, std=0.1)
        state[f"torso.{i}.mlp.write_out.weight"] = normal(d_model, d_mlp, std=d_mlp**-0.5)
        state[f"torso.{i}.mlp.write_out.bias"] = normal(d_model, std=0.1)
    return state


def write_model(path: Path, *, dtype: torch.dtype = torch.float32, **shape: int) -> Path:
    """Writes a .pt state dict with `make_state`'s arguments, and returns its path."""
    torch.save({name: tensor.to(dtype) for name, tensor in make_state(**shape).items()}, path)
    return path


def make_rows(n_rows: int, *, seq: int = 128, seed: int = 0) -> list[list[int]]:
    """Rows as the data has them: [BEGIN], a story, and for most of them [END] and [PAD]s.

    Ids are frequent when small. A story takes up between a quarter and all of its row.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n_rows):
        row = np.minimum(rng.geometric(0.01, size=seq), 9995)
        row[0] = BEGIN
        n_story = int(rng.integers(seq // 4, seq + seq // 4))
        if n_story < seq:
            row[n_story] = END
            row[n_story + 1 :] = PAD
        rows.append(row.tolist())
    return rows


def write_dataset(
    folder: Path, n_rows: int = 200, *, split: str = "train", seq: int = 128, seed: int = 0
) -> Path:
    """Writes `folder`/`split`.jsonl with `make_rows`'s rows, and returns the folder."""
    return write_rows(folder, make_rows(n_rows, seq=seq, seed=seed), split=split)


def write_rows(folder: Path, rows: list[list[int]], *, split: str = "train") -> Path:
    """Writes these rows as `folder`/`split`.jsonl, and returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"tok_ids": row}) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(lines)
    return folder


def fresh_processes(also: Sequence[str] = ()) -> Any:
    """Starts processes that share nothing with this one, without importing torch in each.

    They are forked from a server that has imported what is slow to import, and run nothing. also:
    further modules for it, where it does not run yet.
    """
    context = multiprocessing.get_context("forkserver")
    slow = ["torch", "datasets", "safetensors.torch", "einops", "pytest"]
    context.set_forkserver_preload([*slow, *also])
    return context


def die_with_parent(seconds: float = 600) -> None:
    """In a process of `multiprocessing`: it ends with the one that started it, or after `seconds`.

    So a test run leaves no process behind, whichever way it is interrupted.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
