"""The tables of README.md and docs/ are what results/ say, and nobody types them."""

import re
import shutil

import matplotlib.image
import pytest

from matryoshka.errors import UserError
from studies import report, tables

PAGES = report.pages()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_of_a_page_is_what_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert report.with_tables(text) == text, "python -m studies.report --write"


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_is_on_a_page(name):
    assert any(f"<!-- table {name} -->" in page.read_text(encoding="utf-8") for page in PAGES)


def test_a_wrong_number_would_be_seen():
    made = report.with_tables("before\n<!-- table toy -->\n<!-- end -->\nafter\n")
    wrong = re.sub(r"0\.\d", "0.5", made, count=1) + "0.25 stays\n"
    assert wrong != made + "0.25 stays\n"
    assert report.with_tables(wrong) == made + "0.25 stays\n"


def test_text_around_a_table_stays():
    made = report.with_tables("a\n<!-- table data -->\nold\n<!-- end -->\nb\n")
    assert made == f"a\n<!-- table data -->\n{tables.named('data')}\n<!-- end -->\nb\n"
    assert report.with_tables("no table\n") == "no table\n"


def test_an_unknown_table_is_refused():
    with pytest.raises(UserError, match="no table nonsense"):
        report.with_tables("<!-- table nonsense -->\nx\n<!-- end -->")


def test_the_command_writes_pages_and_figures(tmp_path, monkeypatch, capsys):
    for page in PAGES:
        copy = tmp_path / page.relative_to(report.ROOT)
        copy.parent.mkdir(exist_ok=True)
        marks = r"(<!-- table \S+ -->\n).*?(<!-- end -->)"
        copy.write_text(re.sub(marks, r"\1\2", page.read_text(), flags=re.DOTALL))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    for folder in ("toy", "standin"):
        (tmp_path / "results" / folder).mkdir(parents=True)
    report.main(["--write"])
    for page in PAGES:
        written = tmp_path / page.relative_to(tables.ROOT)
        assert written.read_text() == report.with_tables(page.read_text())
    figures = sorted(path.name for path in tmp_path.rglob("*.png"))
    expected = ["densities.png", "frontier.png", "fvu_by_prefix.png", "refit_cosines.png"]
    assert figures == expected
    for path in tmp_path.rglob("*.png"):
        assert matplotlib.image.imread(path).shape[1] == 1660
    out = capsys.readouterr().out
    assert all(f"{name}\n" in out for name in tables.TABLES)


def test_without_write_nothing_is_touched(tmp_path, monkeypatch, capsys):
    shutil.copy(report.ROOT / "README.md", tmp_path)
    before = (tmp_path / "README.md").stat().st_mtime_ns
    monkeypatch.setattr(report, "ROOT", tmp_path)
    report.main([])
    assert (tmp_path / "README.md").stat().st_mtime_ns == before
    out = capsys.readouterr().out
    assert all(tables.named(name) in out for name in tables.TABLES)
