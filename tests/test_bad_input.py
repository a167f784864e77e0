"""Bad input to every script: one line on stderr that says what is wrong, exit code 2, nothing lost.

Each case is a command line with names of what lies in the folder, and words that the line must
have.
Scripts are called in this process: what a real command line adds is tested script by script.
"""

import hashlib
import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_factory import config_for, write_sources
from safetensors.torch import save_file
from tiny_factory import write_dataset, write_model

import cache_activations
from matryoshka.array_files import cache_arrays
from sae import SAE

# What {NAME} stands for is made by `world`; a case may not change it.
CASES = [
    # cache_activations.py
    ("cache_activations", "--model {W}/nothing.pt --out {W}/o", "nothing.pt"),
    ("cache_activations", "--model {W}/text.txt --out {W}/o", "text.txt"),
    ("cache_activations", "--model {W}/sae.safetensors --out {W}/o", "embed"),
    ("cache_activations", "{SRC} --layer 9 --out {W}/o", "layer 9"),
    ("cache_activations", "{SRC} --layer -1 --out {W}/o", "layer -1"),
    ("cache_activations", "{SRC} --split nowhere --layer 1 --out {W}/o", "nowhere"),
    ("cache_activations", "--model {W}/model.pt --dataset {W}/none --layer 1 --out {W}/o", "none"),
    ("cache_activations", "{SRC} --tokens 0 --out {W}/o", "--tokens"),
    ("cache_activations", "{SRC} --tokens -3 --out {W}/o", "--tokens"),
    ("cache_activations", "{SRC} --batch-size 0 --out {W}/o", "--batch-size"),
    ("cache_activations", "{SRC} --dtype float8 --out {W}/o", "--dtype"),
    ("cache_activations", "{SRC} --device tpu9 --out {W}/o", "--device tpu9"),
    ("cache_activations", "{SRC} --layer 1 --out {W}/text.txt", "text.txt"),
    ("cache_activations", "{SRC} --token 5 --out {W}/o", "--token"),
    (
        "cache_activations",
        "{SRC} --model-revision v1 --out {W}/o",
        "--model-revision is for the hub",
    ),
    ("cache_activations", "{SRC} --dataset-revision v1 --out {W}/o", "--dataset-revision is for"),
    ("cache_activations", "{SRC} --dataset-config en --out {W}/o", "--dataset-config is for"),
    (
        "cache_activations",
        "--model {W}/model.pt --dataset {W}/floats --layer 1 --out {W}/o",
        "row 0",
    ),
    (
        "cache_activations",
        "--model {W}/model.pt --dataset {W}/empty --layer 1 --out {W}/o",
        "train.jsonl",
    ),
    ("cache_activations", "{SRC} --layer 0 --tokens 1000000 --out {W}/cache", "layer"),
    # cache_activations.py, of arrays
    ("cache_activations", "--activations {W}/nothing.npy --out {W}/o", "nothing.npy"),
    ("cache_activations", "--activations {W}/text.txt --out {W}/o", ".safetensors"),
    ("cache_activations", "--activations {W}/empty --out {W}/o", "folder without"),
    ("cache_activations", "--activations {W}/sae.safetensors --out {W}/o", "holds 5 tensors"),
    ("cache_activations", "--activations {W}/acts.npy {W}/wide.npy --out {W}/o", "wide.npy"),
    ("cache_activations", "--activations {W}/acts.npy {W}/double.npy --out {W}/o", "float64"),
    ("cache_activations", "--activations {W}/acts.npy {W}/ids.npy --out {W}/o", "ids.npy"),
    (
        "cache_activations",
        "--activations {W}/acts.npy --token-ids {W}/ids.npy --out {W}/o",
        "--token-ids have 9 rows",
    ),
    ("cache_activations", "--activations {W}/acts.npy --token-ids {W}/acts.npy", "integers"),
    ("cache_activations", "--token-ids {W}/ids.npy --out {W}/o", "--activations"),
    ("cache_activations", "--activations {W}/acts.npy --layer 2 --out {W}/o", "--layer"),
    ("cache_activations", "--activations {W}/acts.npy --out {W}/cache", "another cache"),
    # train.py
    ("train", "--cache {W}/nowhere --out {W}/o", "nowhere"),
    ("train", "--cache {W}/cache --n-latents 0 --out {W}/o", "--n-latents"),
    (
        "train",
        "--cache {W}/cache --n-latents 8 --n-prefixes 2 --target-l0 9 --out {W}/o",
        "--target-l0 9",
    ),
    ("train", "--cache {W}/cache --n-latents 8 --n-prefixes 9 --target-l0 2 --out {W}/o", "9"),
    ("train", "--cache {W}/cache --target-l0 nan --out {W}/o", "--target-l0"),
    ("train", "--cache {W}/cache --target-l0 inf --out {W}/o", "--target-l0"),
    ("train", "--cache {W}/cache --sparsity-weight inf --out {W}/o", "--sparsity-weight"),
    ("train", "--cache {W}/cache --lr 0 --out {W}/o", "--lr"),
    ("train", "--cache {W}/cache --lr -1 --out {W}/o", "--lr"),
    ("train", "--cache {W}/cache --n-steps 0 --out {W}/o", "--n-steps"),
    ("train", "--cache {W}/cache --batch-size 1 --out {W}/o", "--batch-size"),
    ("train", "--cache {W}/cache --batch-size 99999999 --out {W}/o", "99999999"),
    ("train", "--cache {W}/cache --saes vanila --out {W}/o", "vanila"),
    ("train", "--cache {W}/cache --saes vanilla vanilla --out {W}/o", "vanilla"),
    ("train", "--cache {W}/cache --matmul-dtype bfloat16 --n-latents 64 --out {W}/o", "256"),
    ("train", "--cache {W}/cache --tokens 99999999 --out {W}/o", "99999999"),
    ("train", "--cache {W}/cache --betas 0.5 1.5 --out {W}/o", "--betas"),
    ("train", "--cache {W}/cache --lr-decay 2 --out {W}/o", "--lr-decay"),
    ("train", "--cache {W}/constant --n-latents 16 --target-l0 2 --out {W}/o", "all the same"),
    ("train", "--cache {W}/cache --n-step 5 --out {W}/o", "--n-step"),
    ("train", "--cache {W}/cache --out {W}/text.txt", "text.txt"),
    ("train", "--cache {W}/cache --target-l0 5 5 --out {W}/o", "matryoshka_l0_5"),
    ("train", "--cache {W}/cache --activation topk --target-l0 2.5 --out {W}/o", "whole number"),
    ("train", "--cache {W}/cache --n-latents 64 --widths 8 32 --out {W}/o", "--n-latents 64"),
    ("train", "--cache {W}/cache --members {W}/text.txt --out {W}/o", "text.txt is not JSON"),
    (
        "train",
        "--cache {W}/cache --validation-cache {W}/wide --out {W}/o",
        "/wide: its weights_hash",
    ),
    ("train", "--cache {W}/cache --recipe mine --out {W}/o", "--recipe"),
    ("train_tinystories", "--cache {W}/cache --sae both --out {W}/o", "both"),
    # evaluate.py and refit.py
    ("evaluate", "--run {W}/nowhere --cache {W}/cache", "nowhere"),
    ("evaluate", "--run {W}/saes --cache {W}/nowhere", "nowhere"),
    ("evaluate", "--run {W}/saes --cache {W}/cache --n-tokens 0", "--n-tokens"),
    ("evaluate", "--run {W}/saes --cache {W}/cache --min-precision 2", "--min-precision"),
    ("evaluate", "--run {W}/saes --cache {W}/cache --concepts {W}/text.txt", "--concepts"),
    ("evaluate", "--run {W}/saes --cache {W}/wide", "d_model"),
    ("evaluate", "--run {W}/nan --cache {W}/cache", "not finite"),
    ("evaluate", "--run {W}/later --cache {W}/cache", "format"),
    ("evaluate", "--run {W}/empty --cache {W}/cache", "empty"),
    ("evaluate", "--run {W}/saes --cache {W}/arrays {MODEL}", "not made with a language model"),
    ("evaluate", "--run {W}/saes --cache {W}/arrays --tokenizer {W}/none", "no tokenizer"),
    ("evaluate", "--run {W}/saes --cache {W}/cache --model {W}/none", "--model none"),
    ("evaluate", "--run {W}/saes --cache {W}/cache --tokenizer {W}/text.txt", "text.txt"),
    ("refit", "--sae {W}/nothing.safetensors --cache {W}/cache", "nothing.safetensors"),
    ("refit", "--sae {W}/text.txt --cache {W}/cache", "text.txt"),
    ("refit", "--sae {W}/sae.safetensors --cache {W}/cache --ridge nan", "--ridge"),
    ("refit", "--sae {W}/sae.safetensors --cache {W}/cache --ridge -1", "--ridge"),
    ("refit", "--sae {W}/sae.safetensors --cache {W}/wide", "d_model"),
    ("refit", "--sae {W}/saes --cache {W}/cache", "folder"),
    ("refit", "--sae {W}/sae.safetensors --cache {W}/cache --out {W}/saes", "folder"),
    ("refit", "--sae {W}/sae.safetensors --cache {W}/cache --batch-size 0", "--batch-size"),
    # train_toy.py and studies
    ("train_toy", "--tree {W}/nowhere.json --out {W}/o", "nowhere.json"),
    ("train_toy", "--tree {W}/text.txt --out {W}/o", "text.txt"),
    ("train_toy", "--seeds 0 --out {W}/o", "--seeds"),
    ("train_toy", "--step 5 --out {W}/o", "--step"),
    ("train_toy", "--threshold 1.5 --out {W}/o", "--threshold"),
    ("train_toy", "--n-prefixes 21 --out {W}/o", "21"),
    ("train_toy", "--target-l0 inf --out {W}/o", "--target-l0"),
    ("train_toy", "--n-eval 1 --out {W}/o", "--n-eval"),
    ("train_toy", "--out {W}/text.txt", "text.txt"),
    ("studies.ablate_toy", "--variants none,nothing --out {W}/o", "nothing"),
    ("studies.keep", "--runs {W}/nowhere --to {W}/kept.json", "nowhere"),
    ("studies.bench", "--repeats 0 --out {W}/o", "--repeats"),
    ("studies.bench", "--part step --original {W} --out {W}/o", "sae.py"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its rows, caches good and bad, and SAEs good and bad."""
    folder = tmp_path_factory.mktemp("world")
    write_sources(folder)
    (folder / "text.txt").write_text("neither weights nor a tree")
    for name, row in (("floats", '{"tok_ids": [1.5, 2.5]}\n'), ("empty", "")):
        (folder / name).mkdir()
        (folder / name / "train.jsonl").write_text(row)
    cache_activations.run(config_for(folder, folder / "cache"))
    write_constant(folder / "cache", folder / "constant")
    cache_arrays(folder / "arrays", [np.ones((9, 16))], [np.arange(9)])
    for name, shape, dtype in (
        *(("acts", (10, 16), np.float32), ("wide", (10, 17), np.float32)),
        *(("double", (10, 16), np.float64), ("ids", 9, np.int64)),
    ):
        np.save(folder / f"{name}.npy", np.ones(shape, dtype))
    d_model = 16
    (folder / "saes").mkdir()
    SAE(d_model, 32).save(folder / "sae.safetensors")
    SAE(d_model, 32).save(folder / "saes" / "matryoshka.safetensors")
    wide = folder / "sources_of_wide"
    wide.mkdir()
    write_model(wide / "model.pt", d_model=32, d_mlp=24)
    write_dataset(wide, 100, seq=32)
    cache_activations.run(config_for(wide, folder / "wide"))
    for name in ("nan", "later"):
        (folder / name).mkdir()
    state = {k: v.clone() for k, v in SAE(d_model, 32).state_dict().items()}
    metadata = {"sae": json.dumps({"format": 99, "activation": "relu"})}
    save_file(state, folder / "later" / "matryoshka.safetensors", metadata)
    state["W_dec"][0, 0] = torch.nan
    save_file(state, folder / "nan" / "matryoshka.safetensors")
    return folder


def write_constant(source: Path, target: Path) -> None:
    """A copy of a cache whose activations are all the same, checksums included."""
    shutil.copytree(source, target)
    for acts in target.glob("*.acts"):
        acts.write_bytes(b"\x00\x3c" * (acts.stat().st_size // 2))  # 1.0 in float16
        digest = hashlib.sha256(acts.read_bytes()).hexdigest()
        for path in target.glob("*.json"):
            record = json.loads(path.read_text())
            for shard in record["shards"]:
                if shard["name"] == acts.stem:
                    shard["acts_sha256"] = digest
            path.write_text(json.dumps(record))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` but locks, by its path."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("script", "line", "words"), CASES)
def test_bad_input_is_one_line(
    script: str, line: str, words: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = f"--model {world}/model.pt"
    argv = line.format(W=world, MODEL=model, SRC=f"{model} --dataset {world}").split()
    before = contents(world)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(script).main(argv)
    error = capsys.readouterr().err.strip().splitlines()
    error = [line for line in error if "it/s" not in line and "%|" not in line]  # of bars
    assert stopped.value.code == 2
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert words in error[0]
    assert contents(world) == before
