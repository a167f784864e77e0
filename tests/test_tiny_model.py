"""TinyModel against a textbook written out in loops, and what it says to weights that are not its.

The textbook shares no code with the module: plain matrices, one head and one row at a time.
"""

import errno
import hashlib
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_factory import make_state, write_model
from torch import Tensor

from matryoshka.errors import UserError
from matryoshka.tiny_model import BEGIN, PAD, TinyModel

N_HEADS = 16
Spoil = Callable[[dict[str, Any]], object]  # changes a state dict
STANDIN = Path(__file__).parents[2] / "shared" / "data" / "standin_lm.pt"


def textbook_residuals(state: dict[str, Tensor], row: list[int], n_heads: int) -> list[Tensor]:
    """The residual stream at each layer for one row of ids: [seq, d_model] each."""
    n_layers = sum(name.endswith("Q.weight") for name in state)
    d_model = state["embed.weight"].shape[1]
    d_head = d_model // n_heads
    x = torch.stack([state["embed.weight"][tok] for tok in row]) + state["pos_embed"][0, : len(row)]
    residuals = [x]
    for i in range(n_layers):
        w = {k.removeprefix(f"torso.{i}."): v for k, v in state.items() if f"torso.{i}." in k}
        heads = []
        for h in range(n_heads):
            cut = slice(h * d_head, (h + 1) * d_head)
            q, k, v = (x @ w[f"attn.{name}.weight"][cut].T for name in "QKV")  # [seq, d_head]
            scores = q @ k.T / math.sqrt(d_head)
            future = torch.ones(len(row), len(row), dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, -math.inf).exp()
            heads.append(weights / weights.sum(1, keepdim=True) @ v)
        x = x + torch.cat(heads, dim=1) @ w["attn.O.weight"].T + w["attn.O.bias"]
        hidden = (x @ w["mlp.read_in.weight"].T + w["mlp.read_in.bias"]).clamp(min=0)
        x = x + hidden @ w["mlp.write_out.weight"].T + w["mlp.write_out.bias"]
        residuals.append(x)
    return residuals


def textbook_log_probs(state: dict[str, Tensor], row: list[int], n_heads: int) -> Tensor:
    """[seq, d_vocab]."""
    logits = textbook_residuals(state, row, n_heads)[-1] @ state["lm_head.weight"].T
    logits = logits + state["lm_head.bias"]
    return logits - logits.exp().sum(1, keepdim=True).log()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_agrees_with_the_textbook(dtype: torch.dtype, close: float) -> None:
    state = make_state(d_model=32, n_layers=3, d_vocab=50, max_seq_len=20)
    model = TinyModel.from_state_dict(state, n_heads=N_HEADS).to(dtype)
    exact = {name: tensor.to(torch.float64) for name, tensor in state.items()}
    tok_ids = torch.randint(50, (4, 17), generator=torch.Generator().manual_seed(1))
    log_probs = model(tok_ids)
    assert log_probs.shape == (4, 17, 50)
    assert log_probs.dtype == dtype
    for layer in range(4):
        residual = model.residual(tok_ids, layer)
        assert residual.shape == (4, 17, 32)
        for row, found in zip(tok_ids.tolist(), residual, strict=True):
            expected = textbook_residuals(exact, row, N_HEADS)[layer]
            torch.testing.assert_close(found.double(), expected, atol=close, rtol=close)
        spliced = model.forward_from(residual, layer)
        torch.testing.assert_close(spliced, log_probs, atol=close, rtol=close)
    for row, found in zip(tok_ids.tolist(), log_probs, strict=True):
        expected = textbook_log_probs(exact, row, N_HEADS)
        torch.testing.assert_close(found.double(), expected, atol=close, rtol=close)


@pytest.mark.skipif(not STANDIN.exists(), reason="the stand-in model is not beside the repository")
def test_stand_in_agrees_with_the_textbook() -> None:
    state = {k: v.double() for k, v in torch.load(STANDIN, weights_only=True).items()}
    row = [9996, *range(5, 60)]
    found = TinyModel.from_pretrained(STANDIN).residual(torch.tensor([row]), 3)[0]
    expected = textbook_residuals(state, row, N_HEADS)[3]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_the_future_changes_nothing() -> None:
    model = TinyModel.from_state_dict(make_state(n_layers=2, d_vocab=50))
    tok_ids = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tok_ids.clone()
    changed[0, 7] = (tok_ids[0, 7] + 1) % 50
    before, after = model(tok_ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=1e-6)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(dim=2).min() > 1e-3


def test_residual_runs_only_the_blocks_it_needs() -> None:
    model = TinyModel.from_state_dict(make_state(n_layers=3, d_vocab=50))
    ran: list[int] = []
    for i, block in enumerate(model.torso):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    model.residual(torch.zeros(1, 4, dtype=torch.long), layer=2)
    assert ran == [0, 1]


def test_gradients_reach_a_spliced_residual() -> None:
    model = TinyModel.from_state_dict(make_state(d_vocab=50))
    residual = model.residual(torch.zeros(1, 4, dtype=torch.long), 1).requires_grad_()
    model.forward_from(residual, 1)[..., 0].sum().backward()  # type: ignore[no-untyped-call]
    assert residual.grad is not None
    assert residual.grad.abs().sum() > 0


def test_same_weights_same_hash_from_every_source(tmp_path: Path) -> None:
    state = make_state(d_vocab=50)
    half = {name: tensor.half() for name, tensor in state.items()}
    torch.save(half, tmp_path / "tiny_model.pt")
    reversed_names = dict(reversed(list(half.items())))
    safetensors.torch.save_file(reversed_names, tmp_path / "w.safetensors")
    models = [
        TinyModel.from_pretrained(tmp_path / "tiny_model.pt"),
        TinyModel.from_pretrained(tmp_path),
        TinyModel.from_pretrained(str(tmp_path / "w.safetensors")),
        TinyModel.from_state_dict({name: tensor.float() for name, tensor in half.items()}),
    ]
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    assert len({model.weights_hash for model in models}) == 1
    assert TinyModel.from_state_dict(state).weights_hash != models[0].weights_hash
    half["lm_head.bias"][3] += 1
    assert TinyModel.from_state_dict(half).weights_hash != models[0].weights_hash


def test_the_hash_is_of_names_shapes_and_values_in_the_names_order() -> None:
    state = make_state(d_model=16, n_layers=1, d_mlp=8, d_vocab=5, max_seq_len=4)
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(f"{name} {list(state[name].shape)}\n".encode())
        digest.update(np.asarray(state[name], dtype="<f4").tobytes())
    assert TinyModel.from_state_dict(state).weights_hash == digest.hexdigest()


def test_a_model_keeps_its_weights_when_their_source_changes() -> None:
    state = make_state(d_vocab=50)
    model = TinyModel.from_state_dict(state)
    before = model.embed.weight.clone()
    state["embed.weight"].zero_()
    assert torch.equal(model.embed.weight, before)


def test_the_number_of_heads_arrives(tmp_path: Path) -> None:
    path = write_model(tmp_path / "w.pt", d_vocab=50)
    tok_ids = torch.arange(10).reshape(1, 10)
    four, sixteen = (TinyModel.from_pretrained(path, n_heads=n)(tok_ids) for n in (4, 16))
    assert (four - sixteen).abs().max() > 1e-3
    assert torch.equal(TinyModel.from_pretrained(path)(tok_ids), sixteen)


def test_the_special_ids_are_those_of_the_vocabulary() -> None:
    assert (BEGIN, PAD) == (9996, 9998)


def test_from_the_hub_at_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "downloaded.pt", d_vocab=50)
    asked = []

    def download(repo: str, file: str, revision: str | None) -> str:
        asked.append((repo, file, revision))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = TinyModel.from_pretrained("someone/tiny", revision="v1")
    assert asked == [("someone/tiny", "tiny_model.pt", "v1")]
    assert model.weights_hash == TinyModel.from_pretrained(path).weights_hash


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"tiny_model.pt of someone/tiny .* local copy"):
        TinyModel.from_pretrained("someone/tiny")


def test_a_download_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/home/me/.cache")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(UserError, match=r"No space left on device: '/home/me/.cache'"):
        TinyModel.from_pretrained("someone/tiny")


def drop(name: str) -> Spoil:
    return lambda state: state.pop(name)


def put(name: str, value: Any) -> Spoil:
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop("embed.weight"), "expected a tensor embed.weight, found none"),
        (drop("torso.1.attn.K.weight"), "expected a tensor torso.1.attn.K.weight, found none"),
        (put("torso.0.ln.weight", torch.ones(32)), "found torso.0.ln.weight, expected none"),
        (put("torso.99999999.ln", torch.ones(32)), "expected a tensor torso.2.attn.Q.weight"),
        (
            put("torso.1.mlp.write_out.weight", torch.ones(32, 47)),
            r"torso.1.mlp.write_out.weight: expected \[32, 48\], found \[32, 47\]",
        ),
        (put("pos_embed", torch.ones(256, 32)), r"pos_embed: expected 3 axes, found.*\[256, 32\]"),
        (put("lm_head.bias", torch.ones(50, dtype=torch.long)), "expected floats, found torch.int"),
        (put("lm_head.bias", 3), "expected names with tensors"),
        (put("pos_embed", torch.ones(1, 0, 32)), "expected sizes above zero"),
    ],
)
def test_wrong_weights_are_named(tmp_path: Path, spoil: Spoil, message: str) -> None:
    state = make_state(d_vocab=50)
    spoil(state)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(UserError, match=message):
        TinyModel.from_pretrained(tmp_path / "w.pt")


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x04\x95", b"PK\x03\x04abc"])
def test_a_file_of_something_else(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        TinyModel.from_pretrained(tmp_path / name)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"embed.weight": Trap()}, tmp_path / "w.pt")
    with pytest.raises(UserError, match="not a state dict"):
        TinyModel.from_pretrained(tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "name", ["missing.pt", "./missing", "a/b/c", "missing", "some/w.pt", "long" * 100]
)
def test_no_such_weights(name: str) -> None:
    with pytest.raises(UserError, match="neither a file nor the name of a hub repo"):
        TinyModel.from_pretrained(name)


def test_impossible_requests(tmp_path: Path) -> None:
    model = TinyModel.from_state_dict(make_state(n_layers=2, d_vocab=50, max_seq_len=8))
    row = torch.zeros(1, 8, dtype=torch.long)
    for layer in (-1, 3, 1.0, math.nan, math.inf):
        with pytest.raises(UserError, match=f"layer {layer} is not there.*0 to 2"):
            model.residual(row, layer)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="rows of 9 tokens: the model has 8 positions"):
        model(torch.zeros(1, 9, dtype=torch.long))
    assert model(row).shape == (1, 8, 50)  # as many tokens as there are positions
    with pytest.raises(UserError, match="n_heads is 5: it must divide the weights' d_model, 32"):
        TinyModel.from_state_dict(make_state(d_vocab=50), n_heads=5)
    with pytest.raises(UserError, match=r"holds no tiny_model\.pt"):
        TinyModel.from_pretrained(tmp_path)
