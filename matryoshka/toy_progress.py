"""The progress of the toy's training: steps done, in memory that processes share, and figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class Progress:
    """The progress of training, in memory that processes share: steps done, and latest figures."""

    FIGURES = ("l0", "fvu", "sparsity_weight")

    def __init__(self, context: Any, names: Sequence[str]):
        """context: a context of `multiprocessing`; names: the kinds of SAE that are trained."""
        self.names = tuple(names)
        self.stop = context.Event()
        self.steps = context.Value("q", 0)
        self.latest = context.Array("d", [math.nan] * len(names) * len(self.FIGURES))

    def advance(self, steps: int) -> None:
        """Adds to the steps done. Raises `KeyboardInterrupt` if `stop` is set."""
        if self.stop.is_set():
            raise KeyboardInterrupt
        with self.steps.get_lock():
            self.steps.value += steps

    def show(self, record: Mapping[str, np.ndarray]) -> None:
        """Sets the latest figures to those of a stack's first seed. record: the stack's metrics."""
        of_first = [record[what].reshape(len(self.names), -1)[:, 0] for what in self.FIGURES]
        self.latest[:] = np.transpose(of_first).ravel().tolist()

    def text(self, width: int) -> str:
        """The latest figures of every SAE; fewer figures if they do not fit in `width` characters.

        "" if there are none yet.
        """
        rows = np.array(self.latest[:]).reshape(len(self.names), -1)
        if np.isnan(rows).any():
            return ""
        named = list(zip(self.names, *rows.T.tolist(), strict=True))
        forms = (
            [f"{name} L0 {l0:.2f} FVU {fvu:.3f} weight {w:.2g}" for name, l0, fvu, w in named],
            [f"{name} L0 {l0:.2f} FVU {fvu:.3f}" for name, l0, fvu, _ in named],
            [f"{name} {l0:.2f} {fvu:.3f}" for name, l0, fvu, _ in named],
        )
        texts = ["; ".join(form) for form in forms]
        return next((text for text in texts if len(text) <= width), texts[-1])
