"""Two runs are the same where every bit and every row is."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from matryoshka.errors import UserError
from sae import SAE
from studies import same_results
from studies.same_results import differences

ROW = {"sae": "a", "seed": 0, "fvu": 0.125, "best_cosine": [0.5, None], "seconds": 3.0}


@pytest.fixture
def folders(tmp_path):
    """Two folders that hold the same."""
    before, after = tmp_path / "before", tmp_path / "after"
    (before / "refit").mkdir(parents=True)
    SAE(4, 8, seed=1).save(before / "a.safetensors")
    SAE(4, 8, seed=2).save(before / "refit" / "a.safetensors")
    write_rows(before, [ROW, {**ROW, "seed": 1}])
    shutil.copytree(before, after)
    return before, after


def write_rows(folder, rows, **more):
    (folder / "results.json").write_text(json.dumps({**more, "runs": rows}))


def test_copies_are_the_same(folders, capsys):
    assert differences(*folders) == []
    same_results.main(list(map(str, folders)))
    assert capsys.readouterr().out == "the same: 2 files of tensors, 2 rows\n"


def test_one_bit_of_one_tensor_is_seen(folders, capsys):
    path = folders[1] / "refit" / "a.safetensors"
    sae = SAE.load(path)
    W_dec = sae.W_dec.detach().clone()
    W_dec[3, 2] = torch.nextafter(W_dec[3, 2], torch.tensor(9.0))
    sae.with_tensors(W_dec=W_dec).save(path)
    assert differences(*folders) == ["refit/a.safetensors: W_dec"]
    with pytest.raises(SystemExit) as stop:
        same_results.main(list(map(str, folders)))
    assert stop.value.code == 1
    assert "refit/a.safetensors: W_dec" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.nan]), True),
        (torch.tensor(0.0), torch.tensor(-0.0), False),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), False),
        (torch.zeros(2, 3), torch.zeros(3, 2), False),
        (torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16), True),
        (torch.tensor(3), torch.tensor(3), True),
        (torch.zeros(0), torch.zeros(0), True),
    ],
)
def test_bits_are_compared_and_not_numbers(one, other, same):
    assert same_results.same_bits(one, other) is same


def test_a_tensor_that_one_has_alone_is_seen(folders):
    path = folders[0] / "a.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({**tensors, "moments": torch.ones(2)}, path)
    assert differences(*folders) == differences(*reversed(folders)) == ["a.safetensors: moments"]


def test_a_file_that_one_has_alone_is_seen(folders):
    (folders[0] / "a.safetensors").unlink()
    assert differences(*folders) == [f"a.safetensors: not in {folders[0]}"]
    assert differences(*reversed(folders)) == [f"a.safetensors: not in {folders[0]}"]


@pytest.mark.parametrize("order", [1, -1])
def test_what_rows_differ_in_is_named(folders, order):
    changed = {**ROW, "fvu": 0.125 + 1e-12, "more": None}
    write_rows(folders[1], [ROW, {**changed, "seed": 1}])
    assert differences(*folders[::order]) == [
        "results.json, row 1: fvu",
        "results.json, row 1: more",
    ]


def test_a_row_more_is_seen(folders):
    write_rows(folders[1], [ROW])
    assert differences(*folders) == ["results.json: 2 rows and 1"]


def test_when_and_where_a_run_was_made_may_differ(folders):
    rows = [{**ROW, "seconds": 99.0}, {**ROW, "seed": 1}]
    write_rows(folders[1], rows, environment={"cpu": "another"}, config={"out": "elsewhere"})
    assert differences(*folders) == []


def test_folders_without_results_are_not_the_same(folders, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for other in (tmp_path / "empty", tmp_path / "misspelled"):
        with pytest.raises(UserError, match=other.name):
            differences(folders[0], other)
    with pytest.raises(SystemExit) as stop:
        same_results.main([str(tmp_path / "empty")] * 2)
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("content", ["", "[]", '{"config": {}}', '{"runs": [3]}'])
def test_a_damaged_file_is_refused_in_one_line(folders, content):
    (folders[1] / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json is not results\.json of a run"):
        differences(*folders)


def test_damaged_tensors_are_refused(folders):
    (folders[1] / "a.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match=r"a.safetensors cannot be read"):
        differences(*folders)
