"""CUDA graphs: one launch in place of a hundred, for work that is limited by the host's speed."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Function = Callable[..., dict[str, Tensor]]


class CudaGraph:
    """Calls a function of tensors as one CUDA graph, on the GPU of the first tensor.

    The function may change other tensors in place, as training does. It must not read values back
    from the GPU. Between calls, shapes, the memory addresses of those other tensors, and the Python
    values that the function reads must not change.
    """

    WARM_UP = 3  # plain calls before the graph is recorded, in which libraries set themselves up

    def __init__(self, inputs: Sequence[Tensor]):
        self._inputs = [tensor.clone() for tensor in inputs]  # what the graph reads from
        self._stream: torch.cuda.Stream | None = None
        self._n_calls = 0

    def __call__(self, function: Function, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """`function(*inputs)`. The function, shapes and dtypes must be the same in every call."""
        for held, tensor in zip(self._inputs, inputs, strict=True):
            held.copy_(tensor)
        self._n_calls += 1
        if self._n_calls <= self.WARM_UP:
            return self._call(function)
        if self._n_calls == self.WARM_UP + 1:
            self._record(function)
        self._graph.replay()
        # The next replay overwrites what this one returns.
        return {name: tensor.clone() for name, tensor in self._outputs.items()}

    def _call(self, function: Function) -> dict[str, Tensor]:
        """A plain call, on the stream on which the graph will be recorded."""
        with self._aside() as stream, torch.cuda.stream(stream):
            return function(*self._inputs)

    def _record(self, function: Function) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # thread_local, because another thread may be moving the next batches to the GPU meanwhile
        with (
            self._aside() as stream,
            torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"),
        ):
            self._outputs = function(*self._inputs)

    @contextmanager
    def _aside(self) -> Iterator[torch.cuda.Stream]:
        """Selects the inputs' GPU, and yields a stream of it for the work inside.

        That stream waits for the current stream at the beginning, and the current one for it at the
        end.
        """
        with torch.cuda.device(self._inputs[0].device):
            self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            yield self._stream
            here.wait_stream(self._stream)
