"""Every number on a page against brute force over the cache; and what may not be overwritten."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_factory import write_cache
from page_factory import (
    CHILD,
    D_MODEL,
    DEAD,
    HOSTILE,
    LAYER,
    N_LATENTS,
    PARENT,
    activations,
    flags,
    matryoshka,
    script_arguments,
    write_world,
)

import browse
from matryoshka.array_files import cache_arrays
from matryoshka.cache_reader import ActivationCache
from matryoshka.contexts import Text
from matryoshka.errors import UserError
from matryoshka.example_files import read
from matryoshka.latent_data import characteristic_tokens, output_effects, reach_of
from matryoshka.page_data import LATENTS_A_FILE, number
from matryoshka.tiny_model import TinyModel
from matryoshka.top_examples import _keys
from sae import SAE
from studies import screenshots

SAMPLED = (PARENT, CHILD, DEAD, 7, 33)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = write_world(tmp_path_factory.mktemp("browse"))
    (folder / "labels.json").write_text(json.dumps({"matryoshka": {"7": "seven <b>"}}))
    browse.main(flags(folder, folder / "page", labels=folder / "labels.json"))
    return folder


@pytest.fixture(scope="module")
def about(world):
    (about,) = script_arguments(world / "page" / "data" / "run.js")
    return about


@pytest.fixture(scope="module")
def columns(world):
    k, columns = script_arguments(world / "page" / "data" / "0" / "list.js")
    assert k == 0
    return columns


@pytest.fixture(scope="module")
def acts(world):
    return activations(world, matryoshka())


def latent_of(world: Path, j: int, k: int = 0):
    path = world / "page" / "data" / str(k) / f"latents_{j // LATENTS_A_FILE}.js"
    of, file, latents = script_arguments(path)
    assert (of, file) == (k, j // LATENTS_A_FILE)
    return latents[j % LATENTS_A_FILE]


def close(found: float, expected: float) -> bool:
    return abs(found - expected) <= 0.006 * abs(expected) + 1e-9


def test_the_list_is_what_the_cache_says(columns, acts):
    assert columns["fired"] == (acts > 0).sum(0).tolist()
    assert all(map(close, columns["largest"], acts.amax(0).tolist()))
    means = acts.sum(0) / (acts > 0).sum(0).clamp(min=1)
    assert all(map(close, columns["mean"], means.tolist()))
    assert columns["level"] == [(j + 1).bit_length() - 1 + (j & (j + 1) > 0) for j in range(64)] + [
        7
    ] * (N_LATENTS - 64)
    assert columns["parent"][CHILD] == PARENT
    assert columns["given"][CHILD] == 1
    assert columns["fired"][DEAD] == 0
    assert columns["tokens"][DEAD] == []


def test_an_example_is_its_row_with_the_activations_there(world, about, acts):
    cache = ActivationCache(world / "validation")
    tok_ids, rows, positions = (t.tolist() for t in cache.tokens(0, cache.n_tokens))
    at = {place: i for i, place in enumerate(zip(rows, positions, strict=True))}
    texts = json.loads((world / "tokens.json").read_text())
    texts = {k: v.encode("utf-8", "replace").decode() for k, v in texts.items()}
    for j in SAMPLED:
        latent = latent_of(world, j)
        every = [*latent["top"], *sum(latent["quantiles"], []), *latent["random"]]  # noqa: RUF017
        assert bool(every) == (j != DEAD)
        for row, position, place, tokens, pairs in every:
            start = at[row, position]
            here = slice(start, start + len(tokens))
            assert set(rows[here]) == {row}
            assert [about["texts"][t] for t in tokens] == [texts[str(i)] for i in tok_ids[here]]
            values = acts[here, j].tolist()
            assert pairs[::2] == [i for i, value in enumerate(values) if value > 0]
            assert all(map(close, pairs[1::2], [value for value in values if value > 0]))
            assert values[place] > 0


def test_the_examples_are_the_strongest_and_a_sample_by_quantile(world, acts):
    for j in (PARENT, 7):
        latent, values = latent_of(world, j), acts[:, j].double().numpy()
        fires = np.flatnonzero(values > 0)
        keys = _keys(0, np.full(len(fires), j), fires)
        sample = fires[np.argsort(keys)][:100]
        shown = [[pairs[pairs[::2].index(place) * 2 + 1] for _, _, place, _, pairs in part]
                 for part in latent["quantiles"]]  # fmt: skip
        for part, own in zip(shown, np.array_split(np.sort(values[sample]), 10), strict=True):
            assert len(part) == min(5, len(own))
            assert all(own[0] * 0.994 <= value <= own[-1] * 1.006 for value in part)
        top = [pairs[pairs[::2].index(place) * 2 + 1] for _, _, place, _, pairs in latent["top"]]
        assert close(top[0], values.max())
        assert top == sorted(top, reverse=True)
        width, counts = latent["histogram"]
        assert counts == np.histogram(values[fires], np.arange(65) * width)[0].tolist()


def test_relations_are_those_of_the_whole_cache(world, acts):
    fires = (acts > 0).double()
    both, n = fires.T @ fires, fires.sum(0)
    W_dec = matryoshka().W_dec
    for j in SAMPLED:
        latent = latent_of(world, j)
        for other, overlap in latent["coactive"]:
            assert close(overlap, float(both[j, other] ** 2 / n[j] / n[other]))
        for parent, given, back, excess, _, cosine in latent["parents"]:
            base = float(n[parent]) / len(acts)
            assert close(given, float(both[parent, j] / n[j]))
            assert close(back, float(both[parent, j] / n[parent]))
            assert close(excess, (float(both[parent, j] / n[j]) - base) / (1 - base))
            assert excess >= 0.6
            expected = torch.cosine_similarity(W_dec[parent], W_dec[j], dim=0)
            assert abs(cosine - float(expected)) < 0.006
    assert latent_of(world, CHILD)["parents"][0][0] == PARENT


def test_neighbours_are_of_the_highest_cosine(world):
    own, other = matryoshka(), SAE.load(world / "run" / "vanilla.safetensors")
    for j in SAMPLED:
        latent = latent_of(world, j)
        cosines = torch.cosine_similarity(own.W_dec[j], own.W_dec, dim=1)
        cosines[j] = -2
        assert [i for i, _ in latent["similar"]] == cosines.topk(10).indices.tolist()
        cosines = torch.cosine_similarity(own.W_dec[j], other.W_dec.detach(), dim=1)
        [(k, nearest, cosine)] = latent["nearest"]
        assert (k, nearest) == (1, int(cosines.argmax()))
        assert abs(cosine - float(cosines.max())) < 0.006


def test_outputs_are_the_decoder_through_the_head(world, about):
    model = TinyModel.from_pretrained(world / "model.pt")
    sae, texts = matryoshka(), json.loads((world / "tokens.json").read_text())
    direction = sae.W_dec / sae.W_dec.norm(dim=1, keepdim=True)
    effects = direction @ model.lm_head.weight.T  # [n_latents, d_vocab]
    effects = effects - effects.mean(1, keepdim=True)
    found = output_effects(sae, model)
    for j in SAMPLED:
        latent = latent_of(world, j)
        for side, sign in (("promoted", 1), ("suppressed", -1)):
            expected = (sign * effects[j]).topk(10)
            assert [about["texts"][t] for t, _ in latent[side]] == [
                texts[str(i)].encode("utf-8", "replace").decode() for i in expected.indices.tolist()
            ]
            assert all(map(close, [v for _, v in latent[side]], (sign * expected.values).tolist()))
        low, width, counts = latent["effects"]
        assert sum(counts) == model.d_vocab
        assert close(low, float(effects[j].min()))
        assert close(width * 40, float(effects[j].max() - effects[j].min()))
        assert counts == found.counts[j].tolist()
        edges = float(found.low[j]) + float(found.width[j]) * np.arange(41)
        expected_counts = np.histogram(effects[j].numpy(), edges)[0]
        assert np.abs(np.cumsum(expected_counts) - np.cumsum(counts)).max() <= 3, "but for rounding"


def test_characteristic_tokens_are_more_frequent_there_than_in_the_text(world, about, columns):
    assert columns["tokens"][PARENT]
    examples, _, _ = read(world / "run" / "examples" / "matryoshka.safetensors")
    text = Text.of(ActivationCache(world / "validation"))
    for j in SAMPLED:
        found = characteristic_tokens(examples, text, j)
        tokens = examples.sample_tokens[j]
        values = examples.sample_values[j][tokens >= 0]
        ids = text.tok_ids[tokens[tokens >= 0]]
        scores = {}
        for i in set(ids.tolist()):
            here = values[ids == i].sum() / values.sum() * (1 - 1 / np.sqrt((ids == i).sum()))
            if here > 0:
                scores[i] = here * np.log(here / (text.tok_ids == i).mean())
        best = sorted((s for s in scores.values() if s > 0), reverse=True)[:5]
        np.testing.assert_allclose([scores[i] for i in found], best, rtol=1e-5)


def test_what_the_run_says(about):
    assert [sae["name"] for sae in about["saes"]] == ["matryoshka", "vanilla"]
    assert about["saes"][0]["widths"] == [1, 2, 4, 8, 16, 32, 64, 70]
    assert about["saes"][1]["widths"] == [50]
    assert about["labels"] == {"matryoshka": {"7": "seven <b>"}}
    assert about["of"]["layer"] == LAYER
    assert HOSTILE[0] in about["texts"]
    assert "/" not in about["of"]["model"], "no path of a machine"


def test_reach_falls_from_one():
    sae = matryoshka()
    reach = reach_of(sae)
    assert reach[0] == pytest.approx(1)
    assert (np.diff(reach) <= 1e-12).all()
    sae.about = {"widths": [10, 70]}
    assert reach_of(sae).tolist() == [1.0] * 10 + [0.5] * 60
    sae.about = {}
    assert (reach_of(sae) == 1).all()


def test_numbers_are_short():
    assert [number(x) for x in (0.0, 3.0, 0.123456, 12345.6, -1e-9)] == [
        0, 3, 0.123, 12300, -1e-9]  # fmt: skip


def test_a_page_is_written_again_and_nothing_else_is_touched(world, tmp_path, capsys):
    out = tmp_path / "page"
    for _ in range(2):
        browse.main(flags(world, out, saes="matryoshka"))
        (out / "stale.txt").write_text("of an earlier page")
    browse.main(flags(world, out, saes="vanilla"))
    assert not (out / "stale.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    assert "50 latents of vanilla" in capsys.readouterr().out
    (out / "browse.json").unlink()
    with pytest.raises(SystemExit):
        browse.main(flags(world, out))
    assert "--out" in capsys.readouterr().err
    assert (out / "index.html").exists()


def test_neuronpedia_has_a_file_a_latent(world, tmp_path, acts):
    browse.main(flags(world, tmp_path / "np", to="neuronpedia"))
    files = sorted((tmp_path / "np" / "matryoshka").iterdir())
    assert len(files) == N_LATENTS
    feature = json.loads((tmp_path / "np" / "matryoshka" / "7.json").read_text())
    values = acts[:, 7]
    assert feature["index"] == "7"
    assert close(feature["frac_nonzero"], float((values > 0).double().mean()))
    assert close(feature["maxActApprox"], float(values.max()))
    assert len(feature["pos_str"]) == len(feature["neg_values"]) == 10
    assert sum(feature["freq_hist_data_bar_heights"]) == int((values > 0).sum())
    first = feature["activations"][0]
    assert close(first["maxValue"], float(values.max()))
    assert first["values"][first["maxValueTokenIndex"]] == first["maxValue"]
    assert len(first["tokens"]) == len(first["values"])
    dead = json.loads((tmp_path / "np" / "matryoshka" / f"{DEAD}.json").read_text())
    assert dead["activations"] == []
    assert dead["frac_nonzero"] == 0


def test_without_a_model_or_its_head_there_are_no_outputs(world, tmp_path):
    browse.main(flags(world, tmp_path / "page", model="none"))
    path = tmp_path / "page" / "data" / "0" / "latents_0.js"
    assert "promoted" not in script_arguments(path)[2][0]


def test_a_cache_of_arrays_without_token_ids_has_a_page_too(world, tmp_path):
    cache_arrays(tmp_path / "arrays", [torch.randn(300, D_MODEL, generator=torch.Generator())])
    browse.main(flags(world, tmp_path / "page", cache=tmp_path / "arrays"))
    (about,) = script_arguments(tmp_path / "page" / "data" / "run.js")
    assert about["texts"] == []
    _, _, latents = script_arguments(tmp_path / "page" / "data" / "0" / "latents_0.js")
    assert set(latents[3]["top"][0][3]) == {-1}


def test_a_model_of_another_width_is_refused_for_a_cache_of_arrays(world, tmp_path):
    cache = cache_arrays(tmp_path / "arrays", [torch.zeros(3, D_MODEL + 1)])
    config = browse.Config(model=str(world / "model.pt"))
    with pytest.raises(UserError, match=f"has d_model {D_MODEL}, --cache .* {D_MODEL + 1}"):
        browse.load_model(config, cache, torch.device("cpu"))


BAD = [
    ({"run": "{W}/nowhere"}, "nowhere"),
    ({"run": "{W}/validation"}, "holds no SAEs"),
    ({"cache": "{W}/nowhere"}, "nowhere"),
    ({"cache": "{W}/wide"}, "d_model"),
    ({"saes": "other"}, "--saes other"),
    ({"model": "{W}/nothing.pt"}, "nothing.pt"),
    ({"tokens": "{W}/model.pt"}, "--tokens"),
    ({"tokens": "{W}/labels.json"}, "--tokens"),
    ({"labels": "{W}/tokens.json"}, "--labels"),
    ({"labels": "{W}/nowhere.json"}, "--labels"),
    ({"labels": "{W}/strangers.json"}, "the run has no SAE 'stranger'"),
    ({"labels": "{W}/far.json"}, "'matryoshka' has no latent '4000'"),
    ({"seed": "-1"}, "--seed"),
    ({"out": "{W}/run"}, "--out"),
    ({"out": "{W}/tokens.json"}, "--out"),
    ({"to": "html"}, "--to"),
    ({"run": "{W}/layers"}, "layer is 1"),
    ({"cache": "{W}/none"}, "no activations"),
]


@pytest.mark.parametrize(("changed", "words"), BAD)
def test_bad_input_is_one_line(changed, words, world, tmp_path, capsys):
    wide, layers, none = world / "wide", world / "layers", world / "none"
    if not wide.exists():
        make_bad(world, wide, layers, none)
    changed = {key: value.format(W=world) for key, value in changed.items()}
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    with pytest.raises(SystemExit) as stopped:
        browse.main(flags(world, **{"out": tmp_path / "o", **changed}))
    error = capsys.readouterr().err.strip().splitlines()
    error = [line for line in error if "%|" not in line]
    assert stopped.value.code == 2
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert words in error[0]
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before
    assert not (tmp_path / "o").exists()


def make_bad(world: Path, wide: Path, layers: Path, none: Path) -> None:
    """A cache of another width, one of no tokens, and an SAE of another layer."""
    write_cache(wide, 60, d_model=D_MODEL * 2)
    layers.mkdir()
    sae = matryoshka()
    sae.about = {**sae.about, "layer": LAYER + 1}
    sae.save(layers / "matryoshka.safetensors")
    shutil.copytree(world / "validation", none)
    manifest = json.loads((none / "manifest.json").read_text())
    (none / "manifest.json").write_text(json.dumps(manifest | {"n_tokens": 0}))


def test_pictures_of_no_page_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        screenshots.main(["--page", str(tmp_path)])
    assert "holds no index.html" in capsys.readouterr().err
