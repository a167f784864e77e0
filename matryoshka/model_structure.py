"""Finds a model's blocks, and the attention and MLP of a block, by running the model.

It does not rely on names of modules. The blocks are the members of a list of modules each of which
reads the output of the one before, [batch, seq, d_model]. A block's attention and MLP are the two
modules whose outputs add up to what the block adds to the stream. For a block with input x and
output y, either of these holds:

    y = x + attn_out + mlp_out                      norms before them, in sequence or parallel
    h = norm(x + attn_out), y = norm(h + mlp_out)   norms after them, as in BERT
"""

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from matryoshka.errors import UserError

TOLERANCE = 1e-9  # of equal sums in float64, relative to the stream's largest element


class Call(NamedTuple):
    """One call of a module: its arguments, and what it returned."""

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
            stream = stream.clone()  # the model may add to it in place afterwards
        calls.append(Call(module, args, kwargs, with_stream(output, stream)))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def stream_of(output: Any) -> Any:
    """The stream in a module's output: the output itself, or the first item if it is a tuple."""
    return output[0] if isinstance(output, tuple) and output else output


def with_stream(output: Any, stream: Any) -> Any:
    """A module's output with its stream replaced."""
    return (stream, *output[1:]) if isinstance(output, tuple) and output else stream


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The stream that a module is called with: its first argument, or `hidden_states`."""
    return args[0] if args else kwargs.get("hidden_states")


def with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], stream: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with the stream replaced."""
    if args:
        return (stream, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": stream}


# ---------------------------------------------------------------------------------------- blocks


def find_blocks(model: nn.Module, n_layers: int | None, run: Callable[[], object]) -> list[Call]:
    """The calls of the model's blocks, in order, in one forward pass that `run` makes.

    `n_layers`: the number of blocks, if the model's config has it. Raises a `UserError`, which
    names the model's lists of modules, if none of them is a list of so many blocks.
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
    """Whether each call reads [batch, seq, d_model], and returns what the next call reads."""
    streams = [(input_of(call.args, call.kwargs), stream_of(call.output)) for call in calls]
    if not all(isinstance(t, Tensor) and t.ndim == 3 for pair in streams for t in pair):
        return False
    pairs = itertools.pairwise(streams)
    return bool(calls) and all(torch.equal(before[1], after[0]) for before, after in pairs)


# ------------------------------------------------------------------------- a block's two halves


class Parts(NamedTuple):
    """The names, within a block, of the modules that return attn_out and mlp_out."""

    attn_out: str
    mlp_out: str


def find_parts(call: Call) -> Parts:
    """Finds the attention and the MLP of a block. `call`: a call of this block.

    Raises `UserError` if no two modules' outputs add up as above.
    """
    block = copy.deepcopy(call.module).double()  # float64 tells equal sums from nearly equal ones
    names = {id(module): name for name, module in block.named_modules() if name}
    read = input_of(call.args, call.kwargs)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(read.shape, generator=generator, dtype=torch.float64).to(read.device)
    calls, y = _record_block(block, call, x)
    pair = _pre_norm_pair(calls, x, y) or _post_norm_pair(calls, x, y)
    if pair is None:
        raise UserError(
            f"no attn_out and mlp_out were found: in {type(block).__name__} no two modules' "
            "outputs add up to what the block adds to the stream; use --site resid_pre or "
            "resid_post"
        )
    first, second = pair
    # Attention is the one that depends on other positions. If both do, the MLP reads attention's
    # output, and attention is the first.
    elsewhere, _ = _record_block(block, call, torch.cat([x[:, :1] + 1, x[:, 1:]], dim=1))
    if torch.equal(
        stream_of(elsewhere[first].output)[:, -1], stream_of(calls[first].output)[:, -1]
    ):
        first, second = second, first
    return Parts(names[id(calls[first].module)], names[id(calls[second].module)])


def _record_block(block: nn.Module, call: Call, x: Tensor) -> tuple[list[Call], Tensor]:
    """Runs `block` on `x`; returns the calls of its modules that return a stream, and its output.

    The block's other arguments are those of `call`. A module may return a stream that is flat,
    [batch * seq, d_model]; it is reshaped.
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
    """`value` with its float tensors converted to float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _double(one) for key, one in value.items()}
    return tuple(map(_double, value)) if isinstance(value, (tuple, list)) else value


def _pre_norm_pair(calls: list[Call], x: Tensor, y: Tensor) -> tuple[int, int] | None:
    """The first two calls whose outputs add up to y - x; None if there are none."""
    outputs = [call.output for call in calls]
    for i, j in itertools.combinations(range(len(calls)), 2):
        if _same(x + outputs[i] + outputs[j], y):
            return i, j
    return None


def _post_norm_pair(calls: list[Call], x: Tensor, y: Tensor) -> tuple[int, int] | None:
    """The calls of attention and MLP if norms come after them: h and y are outputs of two norms.

    The first norm reads x + attn_out and returns h; the last reads h + mlp_out and returns y.
    """
    for norm, last in itertools.combinations(range(len(calls)), 2):
        if not _same(calls[last].output, y):
            continue
        attn = _addend(calls[:norm], calls[norm], x)
        mlp = _addend(calls[:last], calls[last], calls[norm].output)
        if attn is not None and mlp is not None:
            return attn, mlp
    return None


def _addend(calls: list[Call], norm: Call, x: Tensor) -> int | None:
    """The first call whose output, added to x, is what `norm` reads; None if there is none."""
    read = input_of(norm.args, norm.kwargs)
    if not is_flat_or_whole(read, x):
        return None
    sums = (x + call.output for call in calls)
    return next((i for i, total in enumerate(sums) if _same(total, read.reshape(x.shape))), None)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to TOLERANCE."""
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max())
