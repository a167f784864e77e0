"""The README's numbers against results/, and the README's own promises."""

import re
from pathlib import Path

import pytest

import report
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


def test_links_lead_somewhere():
    """Every relative link and picture of the README is a file of the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (Path(report.ROOT) / target).exists(), target
