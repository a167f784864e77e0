"""Scores of files of SAEs."""

import json

from sae import SAE
from studies.score_files import load_saes, score_files


def test_each_file_is_a_run_and_what_was_scored_is_written_before_the_next(tmp_path):
    out, seen = tmp_path / "new" / "scores.json", []
    for n_latents in (4, 6):
        folder = tmp_path / f"run{n_latents}"
        folder.mkdir()
        SAE(8, n_latents).save(folder / "vanilla.safetensors")

    def score(sae):
        seen.append(json.loads(out.read_text())["runs"] if out.exists() else [])
        return {"n": sae.n_latents}

    paths = [str(tmp_path / f"run{n}" / "vanilla.safetensors") for n in (4, 6)]
    source = {"source": "sizes", "config": {"a": 1}}
    results = score_files(load_saes(paths), score, source, out)
    runs = [{"source": "sizes", "run": f"run{n}", "sae": "vanilla", "n": n} for n in (4, 6)]
    assert results == {"sources": [source], "runs": runs} == json.loads(out.read_text())
    assert seen == [[], runs[:1]]
