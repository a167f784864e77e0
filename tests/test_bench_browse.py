"""The benchmark of browsing runs, small, and measures what it says."""

import json

import pytest

from studies import bench_browse, screenshots


def test_everything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(screenshots, "why_not", lambda: "not in this test")
    flags = "--n-latents 40 --d-model 16 --tokens 1024 --l0 4 --repeats 1 --out"
    bench_browse.main([*flags.split(), str(tmp_path)])
    found = json.loads((tmp_path / "browse.json").read_text())
    assert found["l0"] == pytest.approx(4, rel=0.3)
    assert found["passes"]["ratio"] > 0
    assert found["page"]["megabytes"] > 0
    assert found["page"]["not opened"] == "not in this test"
    assert "ratio" in capsys.readouterr().out
