"""The README's numbers against results/, and the README's own promises."""

import re
from pathlib import Path

import pytest
import torch

import evaluate
import report
from sae import SAE
from script import UserError

README = (report.ROOT / "README.md").read_text()


def test_every_table_in_the_readme_is_what_results_say():
    assert report.with_tables(README) == README


@pytest.mark.parametrize("name", report.TABLES)
def test_every_table_is_in_the_readme(name):
    assert f"<!-- table {name} -->" in README


def test_a_wrong_number_would_be_seen():
    first = re.search(r"<!-- table toy -->\n(.*?)<!-- end -->", README, re.DOTALL)[1]
    digit = re.search(r"0\.\d+", first)[0]
    assert report.with_tables(README.replace(digit, "0.9999")) == README


def test_an_unknown_table_is_refused():
    with pytest.raises(UserError, match="no table nonsense"):
        report.with_tables("<!-- table nonsense -->\nx\n<!-- end -->")


def test_the_own_activations_example_runs_as_it_stands(tmp_path, monkeypatch):
    """Under fifteen lines, and what it prints about prefixes holds."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    saved = SAE.load("sae.safetensors")
    x = names["acts"]
    assert torch.equal(saved(x), names["sae"](x))
    acts = saved.encode(x)
    assert torch.equal(names["x_hat"], saved.decode(acts, prefix=32))
    assert 4 < evaluate.l0(acts) < 12  # the target is 8
    assert evaluate.fvu(x, saved(x)) < 0.9


def test_links_lead_somewhere():
    """Every relative link and picture of the README is a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(report.ROOT) / target).exists(), target
