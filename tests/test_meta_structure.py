"""SAEBench's meta_structure, run by its own code, against its definition in float64."""

import json
import sys

import pytest
import torch

from sae import SAE, seeded_generator
from studies import meta_structure

D_MODEL, N_LATENTS = 16, 96
METRIC = "sae_bench.evals.meta_structure.main"


def sae_of_rows(W_dec: torch.Tensor) -> SAE:
    """An SAE with these decoder rows, of norms from 0.1 to 10."""
    norms = 10 ** (2 * torch.rand(len(W_dec), 1, generator=seeded_generator(1)) - 1)
    sae = SAE(D_MODEL, len(W_dec))
    return sae.with_tensors(W_dec=norms * torch.nn.functional.normalize(W_dec, dim=1))


def random_rows() -> torch.Tensor:
    return torch.randn(N_LATENTS, D_MODEL, generator=seeded_generator(2))


def copied_rows() -> torch.Tensor:
    """Each one of eight unit vectors."""
    return torch.eye(D_MODEL)[:8].repeat(N_LATENTS // 8, 1)


def test_without_sae_bench_there_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sae_bench", None)
    SAE(8, 8).save(tmp_path / "sae.safetensors")
    argv = ["--saes", str(tmp_path / "sae.safetensors"), "--out", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit) as ended:
        meta_structure.main(argv)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "this needs SAEBench" in line
    assert not (tmp_path / "out.json").exists()


def test_what_is_reported_is_its_definition(tmp_path, monkeypatch):
    theirs = pytest.importorskip(METRIC)
    seen = {}

    def keep(meta_structure, decoder, eval_batch_size):
        seen.update(meta=meta_structure, rows=decoder)
        return inner(meta_structure, decoder, eval_batch_size)

    inner = theirs._decoder_variance_metrics
    monkeypatch.setattr(theirs, "_decoder_variance_metrics", keep)
    sae_of_rows(random_rows()).save(tmp_path / "sae.safetensors")
    config = meta_structure.Config(
        saes=(str(tmp_path / "sae.safetensors"),), train_steps=20, out=str(tmp_path / "out.json")
    )
    (run,) = meta_structure.run(config)["runs"]
    assert json.loads((tmp_path / "out.json").read_text())["runs"] == [run]
    rows = torch.nn.functional.normalize(random_rows().double(), dim=1)
    torch.testing.assert_close(seen["rows"].double(), rows, rtol=1e-5, atol=1e-6)
    meta = seen["meta"]
    assert (meta.cfg.d_sae, meta.cfg.k) == (N_LATENTS // 4, 4)
    with torch.no_grad():
        made = meta(seen["rows"]).double()
    total = sum(float((row - rows.mean(0)) @ (row - rows.mean(0))) for row in rows)
    left = sum(float((row - x) @ (row - x)) for row, x in zip(rows, made, strict=True))
    assert run["variance_explained"] == pytest.approx(1 - left / total, abs=1e-5)
    assert run["mse"] == pytest.approx(left / rows.numel(), rel=1e-4)
    assert meta_structure.run(config)["runs"] == [run], "a seed gives the same bits"


def test_rows_that_are_copies_of_a_few_are_explained_better(tmp_path):
    pytest.importorskip(METRIC)
    paths = []
    for name, rows in (("random", random_rows()), ("copied", copied_rows())):
        paths.append(str(tmp_path / f"{name}.safetensors"))
        sae_of_rows(rows).save(paths[-1])
    config = meta_structure.Config(saes=tuple(paths), train_steps=300, out=str(tmp_path / "o.json"))
    random, copied = (run["variance_explained"] for run in meta_structure.run(config)["runs"])
    assert copied > random + 0.2
