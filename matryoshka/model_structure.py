"""Where a model's blocks are, and in a block its attention and its MLP: found by running it.

No name of a module is looked at. The blocks are the members of a list that each read what the one
before left, [batch, seq, d_model]. A block's attention and MLP are the two modules whose outputs
add up to what the block adds to the stream: for a block that reads x and leaves y,

    y = x + attn_out + mlp_out                      norms before them, in turn or side by side
    h = norm(x + attn_out), y = norm(h + mlp_out)   norms after them, as in BERT
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matryoshka.errors import UserError

TOLERANCE = 1e-9  # of sums in float64, relative to the largest of the stream


class Call(NamedTuple):
    """One call of a module: what it got, and what it returned."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def record_calls(modules: Iterator[nn.Module], run: Callable[[], object]) -> list[Call]:
    """The calls of `modules` while `run` runs, in the order in which they return."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        stream = stream_of(output)
        if isinstance(stream, Tensor):
            stream = stream.clone()  # it may be added to in place afterwards
        calls.append(Call(module, args, kwargs, with_stream(output, stream)))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def stream_of(output: Any) -> Any:
    """The stream in what a module returned: it, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


def with_stream(output: Any, stream: Any) -> Any:
    """What a module returned, with another stream in it."""
    return (stream, *output[1:]) if isinstance(output, tuple) and output else stream


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The stream that a module is called with: its first argument, or `hidden_states`."""
    return args[0] if args else kwargs.get("hidden_states")


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, with another stream in them."""
    if args:
        return (stream, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": stream}


# ---------------------------------------------------------------------------------------- blocks


def find_blocks(model: nn.Module, n_layers: int | None, run: Callable[[], object]) -> list[Call]:
    """The calls of the model's blocks in one forward pass, `run`, in order.

    `n_layers`: how many the model says it has, if it does. Raises `UserError` that lists what was
    found where that is not a list of so many blocks.
    """
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    members = {id(member): member for modules in lists.values() for member in modules}
    calls = record_calls(iter(members.values()), run)
    found = {}
    for name, modules in lists.items():
        of_list = [call for call in calls if any(call.module is member for member in modules)]
        if [call.module for call in of_list] == list(modules) and _is_chain(of_list):
            found[name] = of_list
    best = max(found.values(), key=len, default=[])
    if not best or n_layers not in (None, len(best)):
        listed = ", ".join(f"{name} ({len(modules)})" for name, modules in lists.items())
        of_many = "" if n_layers is None else f" of {n_layers}"
        raise UserError(
            f"no list{of_many} blocks that read each other's output was found in "
            f"{type(model).__name__}; its lists of modules are {listed or 'none'}"
        )
    return best


def _is_chain(calls: list[Call]) -> bool:
    """Whether each call reads [batch, seq, d_model], and leaves what the next one reads."""
    streams = [(input_of(call.args, call.kwargs), stream_of(call.output)) for call in calls]
    if not all(isinstance(t, Tensor) and t.ndim == 3 for pair in streams for t in pair):
        return False
    pairs = itertools.pairwise(streams)
    return bool(calls) and all(torch.equal(before[1], after[0]) for before, after in pairs)


# ------------------------------------------------------------------------- a block's two halves


class Parts(NamedTuple):
    """The names in a block of the modules that return attn_out and mlp_out."""

    attn_out: str
    mlp_out: str


def find_parts(call: Call) -> Parts:
    """The attention and the MLP of the block that was called so.

    Raises `UserError` where no two modules' outputs add up as they should.
    """
    block = copy.deepcopy(call.module).double()  # in float64, sums are told apart
    names = {id(module): name for name, module in block.named_modules() if name}
    read = input_of(call.args, call.kwargs)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(read.shape, generator=generator, dtype=torch.float64).to(read.device)
    calls, y = _record_block(block, call, x)
    pair = _pre_norm_pair(calls, x, y) or _post_norm_pair(calls, x, y)
    if pair is None:
        raise UserError(
            f"no attn_out and mlp_out were found: in {type(block).__name__} no two modules' "
            "outputs add up to what the block adds to the stream; --site resid_pre and resid_post "
            "are there"
        )
    first, second = pair
    # Attention is the one that reads other positions: where both do, one reads the other's output.
    elsewhere, _ = _record_block(block, call, torch.cat([x[:, :1] + 1, x[:, 1:]], dim=1))
    if torch.equal(
        stream_of(elsewhere[first].output)[:, -1], stream_of(calls[first].output)[:, -1]
    ):
        first, second = second, first
    return Parts(names[id(calls[first].module)], names[id(calls[second].module)])


def _record_block(block: nn.Module, call: Call, x: Tensor) -> tuple[list[Call], Tensor]:
    """The calls of modules in `block` that return a stream, where it reads `x`; and what it
    leaves. Its other arguments are those of `call`. A stream may be flat, [batch * seq, d_model].
    """
    args, kwargs = with_input(_double(call.args), _double(call.kwargs), x)
    output: list[Any] = []
    modules = (module for module in block.modules() if module is not block)
    with torch.no_grad():
        calls = record_calls(modules, lambda: output.append(block(*args, **kwargs)))
    shaped = [
        call._replace(output=stream_of(call.output).reshape(x.shape))
        for call in calls
        if is_flat_or_whole(stream_of(call.output), x)
    ]
    return shaped, stream_of(output[0])


def is_flat_or_whole(value: Any, x: Tensor) -> bool:
    """Whether `value` has the shape of x, [batch, seq, d_model], or [batch * seq, d_model]."""
    shapes = (x.shape, x.flatten(0, 1).shape)
    return isinstance(value, Tensor) and value.shape in shapes


def _double(value: Any) -> Any:
    """`value` with its float tensors as float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(one) for key, one in value.items()}
    return tuple(map(_double, value)) if isinstance(value, (tuple, list)) else value


def _pre_norm_pair(calls: list[Call], x: Tensor, y: Tensor) -> tuple[int, int] | None:
    """Which two calls' outputs add up to y - x; the first such two."""
    outputs = [call.output for call in calls]
    for i, j in itertools.combinations(range(len(calls)), 2):
        if _same(x + outputs[i] + outputs[j], y):
            return i, j
    return None


def _post_norm_pair(calls: list[Call], x: Tensor, y: Tensor) -> tuple[int, int] | None:
    """Which call's output added to x is what a norm reads, and which one's added to what that norm
    leaves is what the norm reads that leaves y."""
    for norm, last in itertools.combinations(range(len(calls)), 2):
        if not _same(calls[last].output, y):
            continue
        attn = _addend(calls[:norm], calls[norm], x)
        mlp = _addend(calls[:last], calls[last], calls[norm].output)
        if attn is not None and mlp is not None:
            return attn, mlp
    return None


def _addend(calls: list[Call], norm: Call, x: Tensor) -> int | None:
    """Which call's output and x add up to what `norm` reads."""
    read = input_of(norm.args, norm.kwargs)
    if not is_flat_or_whole(read, x):
        return None
    sums = (x + call.output for call in calls)
    return next((i for i, total in enumerate(sums) if _same(total, read.reshape(x.shape))), None)


def _same(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
