"""README.md and docs/ hold what they promise: code runs, commands parse, links lead somewhere."""

import importlib
import re
import shlex

import pytest
import torch

from matryoshka import comparison, metrics, modal_plan
from matryoshka.command_line import parse
from matryoshka.modal_launch import launch_of
from sae import SAE, matryoshka_loss, sample_prefixes, seeded_generator
from studies import report, tables
from train_tinystories import Config

PAGES = {page.name: page.read_text(encoding="utf-8") for page in report.pages()}
PAGES["CONTRIBUTING.md"] = (tables.ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PYTHON = [
    pytest.param(code, id=f"{name}-{i}")
    for name, text in PAGES.items()
    for i, (language, code) in enumerate(FENCED.findall(text))
    if language == "python" and "Trainer(" not in code  # that block takes longer, and has its test
]


def run_block(code, folder, monkeypatch):
    """The names that a block of Python leaves behind, run as it stands in an empty folder."""
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(compile(code, "a block of the documentation", "exec"), names)
    return names


def block_with(page, text):
    """The only block of Python on a page that holds `text`."""
    blocks = [code for language, code in FENCED.findall(PAGES[page]) if language == "python"]
    (code,) = (code for code in blocks if text in code)
    return code


@pytest.mark.parametrize("code", PYTHON)
def test_every_block_of_python_runs(code, tmp_path, monkeypatch):
    run_block(code, tmp_path, monkeypatch)


@pytest.mark.parametrize("n_prefixes", [1, 4, 12])
def test_the_readmes_loss_is_the_one_that_is_trained_on(n_prefixes, tmp_path, monkeypatch):
    shown = run_block(block_with("README.md", "def matryoshka_loss"), tmp_path, monkeypatch)
    generator = seeded_generator(n_prefixes)
    acts = torch.randn(7, 12, generator=generator, dtype=torch.float64).relu_()
    x, W_dec = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (7, 12))
    b_dec = torch.randn(5, generator=generator, dtype=torch.float64)
    lengths = sample_prefixes(12, n_prefixes, generator).tolist()
    ours = matryoshka_loss(x, acts, W_dec, b_dec, lengths, sparsity_weight=0.3)
    assert torch.allclose(shown["matryoshka_loss"](x, acts, W_dec, b_dec, lengths, 0.3), ours)


def test_training_on_ones_own_activations_gives_what_is_promised(tmp_path, monkeypatch):
    """In fewer than fifteen lines: a file, prefixes that reconstruct, the target L0."""
    code = block_with("README.md", "Trainer(")
    assert len([line for line in code.splitlines() if line.strip()]) < 15
    names = run_block(code.replace("n_steps=2000", "n_steps=500"), tmp_path, monkeypatch)
    x, config = names["acts"], names["config"]
    saved = SAE.load("sae.safetensors")
    acts = saved.encode(x)
    assert torch.equal(saved(x), names["sae"](x))
    assert torch.equal(names["x_hat"], saved.decode(acts, prefix=32))
    assert config.target_l0 / 2 < metrics.l0(acts) < 1.5 * config.target_l0
    assert metrics.fvu(x, saved(x)) < metrics.fvu(x, names["x_hat"]) < 1


def lines_of_code(text):
    """What a page has in code type: the lines of its blocks, and what stands in its sentences."""
    for _, block in FENCED.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    prose = FENCED.sub("", text)
    yield from re.findall(r"^    (\S.*)$", prose, re.MULTILINE)
    yield from (code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose))


def commands():
    """(module, flags) of every command line of a script that a page shows, some of them twice."""
    pattern = re.compile(
        r"(?:^|&& )\s*(?:[A-Z_]+=\d+ )?(?:python|modal run) (?:-m )?([\w.]+)( [^#&|\n]*)?"
    )
    for page, text in PAGES.items():
        for line in lines_of_code(text):
            for name, flags in pattern.findall(line):
                flags = " ".join(flags.split())
                module = name.removesuffix(".py")
                yield pytest.param(module, flags, id=f"{page}: {module} {flags}")


@pytest.mark.parametrize(("module", "flags"), list(commands()))
def test_every_command_shown_is_one_that_the_script_takes(module, flags):
    if module == "modal_tinystories":
        launch = launch_of(shlex.split(flags))
        comparison.parse([word for word in launch.words if word != "--help"], Config)
        return
    config = getattr(importlib.import_module(module), "Config", None)
    flags = re.sub(r"\$\w+", "0", flags)  # of a loop: $seed
    words = [word for word in shlex.split(flags) if word != "--help"]
    if config is None:  # takes no flags, only what to work on
        assert not any(word.startswith("-") for word in words)
    elif words:  # else the script is only named
        parse(config, "", words)


def test_commands_are_found():
    found = [param.values for param in commands()]
    modules = {module for module, _ in found}
    assert {"train_toy", "train_tinystories", "modal_tinystories", "studies.bench"} <= modules
    assert ("studies.bench", "--part step --original FOLDER --saelens") in found
    assert any(module == "refit" and "--encoder --cache" in flags for module, flags in found)


@pytest.mark.parametrize("page", PAGES)
def test_every_marker_names_a_table_and_is_closed(page):
    marks = re.findall(r"<!-- (.*?) -->", PAGES[page])
    for opening, closing in zip(marks[::2], marks[1::2], strict=True):
        assert opening.removeprefix("table ") in tables.TABLES, opening
        assert closing == "end"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    """Of every relative link and picture."""
    (path,) = {*report.pages(), tables.ROOT / "CONTRIBUTING.md"} & {
        tables.ROOT / page,
        tables.ROOT / "docs" / page,
    }
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[page]):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def anchors(text):
    """What links to a page's headings end with, as GitHub makes it of them."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_headings(page):
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", PAGES[page]):
        assert anchor in anchors(PAGES[target.split("/")[-1] or page]), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page):
    """Modules and scripts in code type, as `matryoshka/plots.py`."""
    for name in re.findall(r"`((?:matryoshka|studies|docs|notebooks|tests)/[\w/.]*)`", PAGES[page]):
        assert (tables.ROOT / name).exists(), name


def test_the_readme_is_short():
    assert len(PAGES["README.md"].encode()) <= 12_000


def test_modals_plan_is_the_one_that_is_printed():
    asked = comparison.parse(["--n-latents", "3072", "--target-l0", "30"], Config)
    assert modal_plan.plan_text(asked, "H100", 3) in PAGES["modal.md"]
