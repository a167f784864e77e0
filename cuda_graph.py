"""Work that a GPU replays: one launch in place of a hundred, where the host is what takes long."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class CudaGraph:
    """A function of tensors, called as one CUDA graph.

    The function may change other tensors in place, as training does, but must not read a number
    back from the GPU, and neither its shapes nor what it reads of Python may change between calls.
    """

    WARM_UP = 3  # plain calls before the graph is recorded, for libraries to set themselves up

    def __init__(self, function: Callable[..., dict[str, Tensor]], inputs: Sequence[Tensor]):
        self._function = function
        self._inputs = [tensor.clone() for tensor in inputs]  # what the graph reads from
        self._n_calls = 0

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """The function of `inputs`, which have the shapes and dtypes of the first ones."""
        for held, tensor in zip(self._inputs, inputs, strict=True):
            held.copy_(tensor)
        self._n_calls += 1
        if self._n_calls <= self.WARM_UP:
            return self._call_aside()
        if self._n_calls == self.WARM_UP + 1:
            self._record()
        self._graph.replay()
        # The next replay overwrites what this one returns.
        return {name: tensor.clone() for name, tensor in self._outputs.items()}

    def _call_aside(self) -> dict[str, Tensor]:
        """A plain call on a stream of its own, as graphs are recorded on one."""
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            outputs = self._function(*self._inputs)
        here.wait_stream(aside)
        return outputs

    def _record(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: another thread may be moving the next batches to the GPU meanwhile
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = self._function(*self._inputs)
