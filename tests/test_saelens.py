"""Against SAELens itself (`pip install -e '.[peers]'`): the same SAE there and here."""

import dataclasses
import json

import pytest
import torch
from run_factory import write_run
from sae_zoo import D_MODEL, N_LATENTS, any_sae, inputs

import evaluate
import train
from matryoshka import convert
from matryoshka.cache_reader import ActivationCache
from matryoshka.conversion_check import compare
from matryoshka.errors import UserError
from sae import SAE

sae_lens = pytest.importorskip("sae_lens")

from studies import bench_cases, saelens_standin  # noqa: E402 - it needs sae_lens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A training run of this project, with its caches and its evaluation."""
    folder = write_run(tmp_path_factory.mktemp("made"))
    evaluate.run(
        evaluate.Config(
            run=str(folder / "run"),
            cache=str(folder / "validation"),
            concepts=str(folder / "concepts.json"),
            device="cpu",
        )
    )
    return folder


@pytest.mark.parametrize("activation", ["relu", "topk", "batchtopk", "jumprelu"])
def test_saelens_makes_the_same_sae_of_it(activation, tmp_path):
    for seed in range(10):
        sae = any_sae(activation, seed)
        x = inputs(sae, seed)
        report = convert.export(sae, "saelens", tmp_path / str(seed), x)
        assert report["read_by"] == "SAELens"
        comparison = compare(sae, convert.saelens_codec(tmp_path / str(seed)), x)
        assert comparison.largest_error <= 1e-6
        assert comparison.n_different == 0


def test_one_line_of_saelens_reproduces_the_fvu_in_our_table(made, tmp_path):
    cache = ActivationCache(made / "validation")
    x = cache.acts(0, cache.n_tokens).float()
    evaluation = json.loads((made / "run" / "evaluation.json").read_text())
    for run in evaluation["runs"]:
        sae = SAE.load(made / "run" / f"{run['sae']}.safetensors")
        convert.export(sae.requires_grad_(False), "saelens", tmp_path / run["sae"], x)
        theirs = sae_lens.SAE.load_from_disk(tmp_path / run["sae"])
        fvu = float((x - theirs(x)).square().sum() / (x - x.mean(0)).square().sum())
        assert fvu == pytest.approx(run["fvu"], rel=1e-5)
        assert float((theirs.encode(x) > 0).sum(1).float().mean()) == pytest.approx(
            run["l0"], rel=1e-3
        )


def test_an_sae_trained_here_as_batchtopk_has_the_same_l0_in_saelens(made, tmp_path):
    train.run(
        train.Config(
            cache=str(made / "train"),
            n_latents=40,
            activation="batchtopk",
            widths=(8.0, 16.0, 40.0),
            saes=("matryoshka",),
            target_l0=5.0,
            n_steps=60,
            batch_size=256,
            out=str(tmp_path / "run"),
            device="cpu",
        )
    )
    sae = SAE.load(tmp_path / "run" / "matryoshka.safetensors").requires_grad_(False)
    assert (sae.activation, sae.about["widths"]) == ("batchtopk", [8, 16, 40])
    cache = ActivationCache(made / "validation")
    x = cache.acts(0, cache.n_tokens).float()
    convert.export(sae, "saelens", tmp_path / "out", x)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    n_theirs, n_ours = (int((encode(x) > 0).sum()) for encode in (theirs.encode, sae.encode))
    assert n_theirs == pytest.approx(n_ours, rel=1e-3)  # float32 may round one over its threshold
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-4, atol=1e-4)


def test_saelens_knows_what_it_was_trained_on(made, tmp_path):
    sae = SAE.load(made / "run" / "matryoshka.safetensors").requires_grad_(False)
    convert.export(sae, "saelens", tmp_path / "out", convert.noise(sae))
    metadata = sae_lens.SAE.load_from_disk(tmp_path / "out").cfg.metadata
    assert metadata.hook_name == "blocks.1.hook_resid_pre"
    assert metadata.l0 == sae.about["l0"]
    assert metadata.matryoshka_sae["about"] == sae.about


@pytest.mark.parametrize("kind", saelens_standin.KINDS)
@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in"])
def test_saes_that_saelens_trained_score_the_same_here(kind, normalize, made, tmp_path):
    config = saelens_standin.Config(
        cache=str(made / "train"),
        validation_cache=str(made / "validation"),
        lrs=(1e-2,),
        n_latents=40,
        k=5.0,
        widths=(8, 16, 40),
        n_steps=40,
        batch_size=256,
        normalize=normalize,
        saes=str(tmp_path / "saes"),
    )
    cache, held_out = ActivationCache(config.cache), ActivationCache(config.validation_cache)
    theirs = saelens_standin.one_run(config, kind, 1e-2, cache, held_out)
    results = evaluate.run(
        evaluate.Config(
            run=config.saes,
            cache=config.validation_cache,
            concepts=str(made / "concepts.json"),
            out=str(tmp_path / "out"),
            device="cpu",
        )
    )
    (ours,) = results["runs"]
    for name in ("fvu", "l0", "dead_share"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-5)


def test_runs_of_two_machines_in_one_file_say_so(made, tmp_path, monkeypatch):
    """What one machine began another goes on with; each run names its own."""
    trained = []

    def one_run(config, kind, lr, *_):
        trained.append((kind, lr))
        return {"sae": kind, "lr": lr}

    monkeypatch.setattr(saelens_standin, "one_run", one_run)
    base = saelens_standin.Config(
        cache=str(made / "train"),
        validation_cache=str(made / "validation"),
        lrs=(1e-2,),
        out=str(tmp_path / "results.json"),
    )
    first = dataclasses.replace(base, kinds=("batchtopk",))
    saelens_standin.run(first)
    saelens_standin.run(first)
    monkeypatch.setattr(saelens_standin, "environment", lambda _: {"device": "another"})
    results = saelens_standin.run(base)
    assert trained == [("batchtopk", 1e-2), ("matryoshka_batchtopk", 1e-2)]
    assert [run["source"] for run in results["runs"]] == ["saelens", "saelens_1"]
    assert [s["source"] for s in results["sources"]] == ["saelens", "saelens_1"]
    assert results["sources"][1]["environment"]["device"] == "another"
    with pytest.raises(UserError, match="other settings"):
        saelens_standin.run(dataclasses.replace(base, k=3.0))
    with pytest.raises(UserError, match="--kinds nonsense"):
        saelens_standin.run(dataclasses.replace(base, kinds=("nonsense",)))


TRAINING = {
    "batchtopk": (sae_lens.BatchTopKTrainingSAE, sae_lens.BatchTopKTrainingSAEConfig),
    "topk": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig),
    "standard": (sae_lens.StandardTrainingSAE, sae_lens.StandardTrainingSAEConfig),
    "jumprelu": (sae_lens.JumpReLUTrainingSAE, sae_lens.JumpReLUTrainingSAEConfig),
}


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("for_inference", [True, False])
def test_whatever_saelens_saves_is_read_the_same(name, for_inference, tmp_path):
    torch.manual_seed(0)  # SAELens draws from the global generator
    made_of, config_of = TRAINING[name]
    k = {"k": 4} if "topk" in name else {}
    sae = made_of(config_of(d_in=D_MODEL, d_sae=N_LATENTS, **k))
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.normal_()
        sae.W_dec.mul_(torch.rand(N_LATENTS, 1) + 0.5)
        if name == "batchtopk":
            sae.topk_threshold.fill_(0.05)
    (sae.save_inference_model if for_inference else sae.save_model)(tmp_path / "in")
    sae.save_inference_model(tmp_path / "inference")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "inference", dtype="float64")
    ours = convert.load(tmp_path / "in").requires_grad_(False)
    x = torch.randn(200, D_MODEL, dtype=torch.float64)
    comparison = compare(ours, (theirs.encode, theirs.decode), x)
    assert comparison.n_fired > 0
    assert comparison.is_same, str(comparison)


def test_a_gated_sae_is_refused_by_name(tmp_path):
    config = sae_lens.GatedTrainingSAEConfig(d_in=D_MODEL, d_sae=N_LATENTS)
    sae_lens.GatedTrainingSAE(config).save_inference_model(tmp_path / "in")
    with pytest.raises(UserError, match="'gated' cannot be read here"):
        convert.load(tmp_path / "in")


def test_the_timed_step_of_saelens_is_from_our_weights_and_leaves_them(monkeypatch):
    for name, value in (("D_MODEL", 16), ("N_LATENTS", 64), ("BATCH", 32), ("L0", 4)):
        monkeypatch.setattr(bench_cases, name, value)
    case = bench_cases.Case.fresh(torch.device("cpu"), "batchtopk", 4)
    made = []
    monkeypatch.setattr(
        sae_lens,
        "MatryoshkaBatchTopKTrainingSAE",
        lambda config, kind=sae_lens.MatryoshkaBatchTopKTrainingSAE: (
            made.append(kind(config)) or made[0]
        ),
    )
    step = bench_cases.saelens_step(case)
    losses = [float(step().loss) for _ in range(3)]
    assert 0 < losses[0] == pytest.approx(losses[2], rel=1e-4)
    (theirs,) = made
    assert theirs.cfg.matryoshka_widths == [2, 6, 14, 30, 64]
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(
            getattr(theirs, name), getattr(case.sae, name), atol=1e-5, rtol=0
        )
