"""Every figure: written whole and readable, in the right order, and by nobody else's settings."""

import itertools
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from matryoshka import heatmaps, plot_style, plots
from matryoshka.heatmaps import toy_activations, toy_cosines
from matryoshka.metrics import density_histogram
from matryoshka.plot_style import colours_of
from matryoshka.tree_axis import tree_axis
from toy_model import FeatureTree

PAPER = FeatureTree.from_json(Path(__file__).parent.parent / "tree.json")
FLAT = FeatureTree.from_dict(
    {
        "active_prob": 1,
        "is_read_out": False,
        "children": [{"active_prob": 0.3}, {"active_prob": 0.1}],
    }
)
# A rare feature first, a child with a child, names too long for the space: all that a tree may do.
ODD = FeatureTree.from_dict(
    {
        "active_prob": 1,
        "is_read_out": False,
        "children": [
            {"active_prob": 0.2, "id": "alone"},
            {
                "active_prob": 0.5,
                "id": "a_name_that_is_much_too_long_for_three_columns",
                "children": [{"active_prob": 0.5, "children": [{"active_prob": 0.5}]}],
            },
        ],
    }
)
ONE = FeatureTree.from_dict({"active_prob": 0.5, "id": "only"})
TREES = {"paper": PAPER, "flat": FLAT, "odd": ODD, "one": ONE}


def truth_of(tree: FeatureTree, n: int = 60) -> np.ndarray:
    return tree.sample(n, torch.Generator().manual_seed(0)).double().numpy()


def absorbed(truth: np.ndarray, tree: FeatureTree) -> np.ndarray:
    """What vanilla makes of `truth` [n, n_features]: a parent is silent where a child fires."""
    acts = truth.copy()
    for feature, above in enumerate(tree.parent):
        if above is not None:
            acts[truth[:, feature] > 0, above] = 0
    return acts


def runs_of(n_seeds: int, tree: FeatureTree = PAPER) -> list[dict[str, Any]]:
    levels = {
        "matryoshka": {"parent": 0.945, "child": 0.93, "rare": 1.0},
        "vanilla": {"parent": 1.0, "child": 0.71, "rare": 1.0},
    }
    runs = []
    for seed in range(n_seeds):
        for sae, by_kind in levels.items():
            best = [by_kind[kind] - 0.002 * (seed % 3) for kind in tree.kind]
            clean = sum(cosine > 0.9 for cosine in best)
            runs.append({"sae": sae, "seed": seed, "best_cosine": best, "clean_features": clean})
    return runs


def curves_of(n_seeds: int, n_points: int = 30, value: float | None = None) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shape = (n_seeds, n_points)
    decay = 0.01 + np.exp(-np.arange(n_points) / 5) * np.exp(0.1 * rng.normal(size=shape))
    return {
        sae: {
            key: decay * rng.uniform(0.5, 2) if value is None else np.full(shape, value)
            for key in ("l0", "fvu", "sparsity_weight")
        }
        for sae in ("matryoshka", "vanilla")
    }


def prefixes_of(n_seeds: int, fvu: float | None = None) -> dict[str, Any]:
    prefix = 2 ** np.arange(8)
    y = np.tile(1 / np.sqrt(prefix), (n_seeds, 1)) if fvu is None else np.full((n_seeds, 8), fvu)
    return {sae: {"prefix": prefix, "fvu": y} for sae in ("matryoshka", "vanilla")}


def nan_column(values: np.ndarray, column: int = 0) -> np.ndarray:
    out = values.copy()
    out[:, column] = np.nan
    return out


def both(values: Any) -> dict[str, Any]:
    return {"matryoshka": values, "vanilla": values}


# A run may hold any number of SAEs of any names: more than there are colours, or room in a row.
MANY = ("topk_width_4096_l0_40", "vanilla", "a_name_that_is_much_too_long_for_any_legend_in_here",
        "matryoshka", *(f"sae {i}" for i in range(9)))  # fmt: skip


def of_many(values: Any) -> dict[str, Any]:
    return dict.fromkeys(MANY, values)


def histograms_of(frequencies: Any, n: int = 10**6) -> list[dict[str, Any]]:
    """The histogram of each row of `frequencies` [n_seeds, n_latents] of latents."""
    fired = (torch.tensor(np.atleast_2d(frequencies)) * n).round().long()
    return [density_histogram(row, n) for row in fired]


def cases() -> dict[str, tuple[Any, ...]]:
    """name -> (function, its arguments after the path)."""
    rng = np.random.default_rng(0)
    steps = np.arange(30) * 1000
    out: dict[str, tuple[Any, ...]] = {}
    for name, tree in TREES.items():
        truth, n = truth_of(tree), tree.n_features
        acts, cosines = truth, rng.uniform(-1, 1, (n, n))
        if tree is not PAPER:  # a column, or a row, of NaN
            acts, cosines = nan_column(acts), nan_column(cosines).T
        out[f"activations, {name}"] = (toy_activations, truth, both(acts), tree)
        out[f"cosines, {name}"] = (toy_cosines, both(cosines), tree, "decoder")
        out[f"seeds, {name}"] = (plots.toy_seeds, runs_of(7, tree), tree)
    nothing = np.zeros((60, 20))
    dead = dict.fromkeys(("sae", "seed")) | {"sae": "vanilla", "clean_features": 0}
    densities = 10 ** rng.uniform(-5, 0, (3, 64))
    return out | {
        "activations, one sample": (
            toy_activations,
            nothing[:1],
            both(nothing[:1]),
            PAPER,
        ),
        "activations, nothing": (toy_activations, nothing, both(nothing), PAPER),
        "activations, all NaN": (toy_activations, nothing, both(nothing + np.nan), PAPER),
        "cosines, one SAE": (toy_cosines, {"vanilla": np.eye(20)}, PAPER, "decoder"),
        "cosines, all NaN": (
            heatmaps.toy_cosines,
            both(np.full((20, 20), np.nan)),
            PAPER,
            "decoder",
        ),
        "curves": (plots.training_curves, steps, curves_of(5), 1.2, 1.1),
        "curves, one seed": (plots.training_curves, steps, curves_of(1), 1.2),
        "curves, one point": (plots.training_curves, [0], curves_of(2, 1), 1.2),
        "curves, constant": (plots.training_curves, steps, curves_of(3, value=1.0), 1.0),
        "curves, zero": (plots.training_curves, steps, curves_of(3, value=0.0), 1.2),
        "curves, NaN": (plots.training_curves, steps, curves_of(3, value=np.nan), 1.2),
        "seeds, one": (plots.toy_seeds, runs_of(1), PAPER),
        "seeds, a hundred": (plots.toy_seeds, runs_of(100), PAPER),
        "seeds, one SAE": (plots.toy_seeds, runs_of(5)[::2], PAPER),
        "seeds, no latents": (plots.toy_seeds, [dead | {"best_cosine": [None] * 20}], PAPER),
        "prefixes": (plots.fvu_by_prefix, prefixes_of(3)),
        "prefixes, one seed": (plots.fvu_by_prefix, prefixes_of(1)),
        "prefixes, constant": (plots.fvu_by_prefix, prefixes_of(3, fvu=0.5)),
        "prefixes, zero": (plots.fvu_by_prefix, prefixes_of(3, fvu=0.0)),
        "prefixes, NaN": (plots.fvu_by_prefix, prefixes_of(3, fvu=np.nan)),
        "densities": (plots.density_histograms, both(histograms_of(densities))),
        "densities, one seed": (plots.density_histograms, both(histograms_of(densities[0])[0])),
        "densities, constant": (plots.density_histograms, both(histograms_of([[0.01] * 64] * 2))),
        "densities, always": (plots.density_histograms, both(histograms_of(np.ones((2, 64))))),
        "densities, rarest": (plots.density_histograms, both(histograms_of([[1e-8]], 10**9))),
        "densities, all dead": (plots.density_histograms, both(histograms_of(np.zeros((2, 64))))),
        "densities, one dead SAE": (
            plots.density_histograms,
            {
                "matryoshka": histograms_of(densities),
                "vanilla": histograms_of(np.zeros((3, 64))),
            },
        ),
        "refit": (plots.refit_cosines, stages_of(7), PAPER),
        "refit, one seed and stage": (plots.refit_cosines, {"as trained": [[1.0] * 20]}, PAPER),
        "refit, another SAE": (plots.refit_cosines, stages_of(3, ODD), ODD, MANY[2]),
        "refit, low": (plots.refit_cosines, {"before": np.zeros((2, 20))}, PAPER, "vanilla", 0.5),
        "many, activations": (
            toy_activations,
            truth_of(PAPER),
            of_many(truth_of(PAPER)),
            PAPER,
        ),
        "many, cosines": (toy_cosines, of_many(np.eye(4)), ODD, "encoder"),
        "many, curves": (plots.training_curves, steps, of_many(curves_of(3)["vanilla"]), 1.2, 1.1),
        "many, seeds": (
            plots.toy_seeds,
            [run | {"sae": sae} for sae in MANY for run in runs_of(3)[::2]],
            PAPER,
        ),
        "many, prefixes": (plots.fvu_by_prefix, of_many(prefixes_of(2)["vanilla"])),
        "many, densities": (plots.density_histograms, of_many(histograms_of(densities))),
    }


def stages_of(n_seeds: int, tree: FeatureTree = PAPER) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    shape = (n_seeds, tree.n_features)
    return {
        "as trained": rng.uniform(0.91, 0.96, shape),
        "decoder\nrefitted": rng.uniform(0.96, 0.99, shape),
        "both refitted": np.ones(shape),
    }


CASES = cases()


def png_size(data: bytes) -> tuple[int, int]:
    """Width and height of a PNG, every chunk's checksum verified. Independent of matplotlib."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, kinds = 8, []
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        body = data[at + 4 : at + 8 + length]
        assert zlib.crc32(body) == struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0]
        kinds.append(body[:4])
        at += 12 + length
    assert (kinds[0], kinds[-1]) == (b"IHDR", b"IEND")
    return struct.unpack(">II", data[16:24])


# Trees and numbers of seeds that change little in what the others draw.
REPEATS = [
    *("activations, flat", "activations, one", "cosines, flat", "cosines, odd", "seeds, one"),
    *("curves, one seed", "densities, one seed", "densities, constant", "prefixes, constant"),
]
OFTEN = [name for name in CASES if name not in REPEATS]


@pytest.mark.parametrize(
    "name", [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in REPEATS)]
)
def test_every_figure_is_one_png_with_all_its_text_and_nothing_else_changes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, *arguments = CASES[name]
    before = dict(matplotlib.rcParams)
    drawn: list[Figure] = []

    def write(path: Path, figure: Figure) -> None:
        drawn.append(figure)
        plot_style.write(path, figure)

    monkeypatch.setattr(sys.modules[function.__module__], "write", write)
    function(tmp_path / "figure.png", *arguments)
    assert dict(matplotlib.rcParams) == before
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]
    data = (tmp_path / "figure.png").read_bytes()
    assert png_size(data)[0] == 1660
    assert len(data) < (300_000 if not name.startswith("many") else 1_000_000)

    [figure] = drawn
    for text in set(figure.findobj(matplotlib.text.Text)) - out_of_view(figure):
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= 0, text
            assert box.x1 <= figure.bbox.x1, text
            assert box.y1 <= figure.bbox.y1, text


def out_of_view(figure: Figure) -> set[matplotlib.text.Text]:
    """The labels of ticks beyond an axis's limits, which matplotlib makes and does not draw."""
    labels = set()
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.majorTicks, *axis.minorTicks]:
                if not low <= tick.get_loc() <= high:
                    labels |= {tick.label1, tick.label2}
    return labels


def test_nested_lists_and_tensors_draw_what_arrays_do(tmp_path: Path) -> None:
    truth = truth_of(PAPER)
    kinds = {"array": truth, "list": truth.tolist(), "tensor": torch.tensor(truth).float()}
    for name, values in kinds.items():
        heatmaps.toy_activations(tmp_path / f"{name}.png", values, both(values), PAPER)
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_the_users_settings_do_not_reach_the_picture(tmp_path: Path) -> None:
    function, *arguments = CASES["curves"]
    function(tmp_path / "a.png", *arguments)
    changes: dict[str, Any] = {"font.size": 20, "lines.linewidth": 9, "savefig.bbox": "tight"}
    with matplotlib.rc_context(changes | {"savefig.transparent": True}):
        function(tmp_path / "b.png", *arguments)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_failure_leaves_the_old_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")

    def fails(self: Figure, file: Path, **_: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        plots.fvu_by_prefix(path, prefixes_of(2))
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


# --- what the figures say


def images(ax: Axes) -> list[np.ma.MaskedArray]:
    return [image.get_array() for image in ax.images]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_activations_are_sorted_by_the_tree_and_absorption_is_marked() -> None:
    truth = truth_of(PAPER, 300)
    by_sae = {"matryoshka": truth, "vanilla": absorbed(truth, PAPER)}
    figure = heatmaps._toy_activations_figure(truth, by_sae, PAPER)
    shown, vanilla, matryoshka = figure.axes[:3]
    titles = [ax.get_title(loc="left") for ax in figure.axes[:3]]
    assert titles == ["Ground truth", "Vanilla SAE", "Matryoshka SAE"]

    [drawn] = images(shown)
    expected = sorted((r for r in truth.tolist() if any(r)), reverse=True)
    assert drawn.tolist() == expected
    acts, missed = images(vanilla)
    assert to_hex(vanilla.images[1].cmap(0)) == plot_style.MISSED.lower()
    assert (~np.ma.getmaskarray(missed) == ((np.array(expected) > 0) & (acts == 0))).all()
    children_active = truth[:, [1, 2, 3, 5, 6, 7, 9, 10, 11]].sum()
    assert (~np.ma.getmaskarray(missed)).sum() == children_active
    assert len(images(matryoshka)) == 1  # nothing to mark
    scales = {ax.images[0].get_clim() for ax in figure.axes[:3]}
    assert scales == {(0, 1)}


def test_a_missing_latent_is_grey_and_not_silent() -> None:
    truth = truth_of(PAPER)
    figure = heatmaps._toy_activations_figure(truth, {"vanilla": nan_column(truth, 4)}, PAPER)
    overlays = figure.axes[1].images[1:]
    assert [to_hex(image.cmap(0)) for image in overlays] == [plot_style.ABSENT.lower()]
    grey = ~np.ma.getmaskarray(overlays[0].get_array())
    assert grey[:, 4].all()
    assert grey.sum() == len(grey)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["feature active, its latent silent", "no latent for the feature"]


def test_too_many_samples_are_thinned_and_counted() -> None:
    truth = np.tile(truth_of(PAPER, 100), (20, 1))
    figure = heatmaps._toy_activations_figure(truth, {"vanilla": truth}, PAPER)
    assert len(images(figure.axes[0])[0]) == heatmaps.MAX_ROWS
    assert figure.axes[0].get_ylabel() == "400 of 2000 samples"


def test_features_are_grouped_by_their_topmost_parent_the_rare_last() -> None:
    assert tree_axis(PAPER).spans() == [
        (0, 3, "parent 0"), (4, 7, "parent 1"), (8, 11, "parent 2"), (12, 19, "rare")
    ]  # fmt: skip
    assert tree_axis(PAPER).marks == ["P", "c", "c", "c"] * 3 + [""] * 8
    assert tree_axis(ODD).order == [1, 2, 3, 0]
    assert tree_axis(ODD).marks == ["P", "P", "c", ""]
    assert tree_axis(FLAT).spans() == [(0, 1, "rare")]
    figure = heatmaps._toy_cosines_figure({"vanilla": np.eye(20)}, PAPER, "decoder")
    for label in ("parent 0", "parent 1", "parent 2", "rare"):
        assert texts(figure.axes[0]).count(label) == 2  # below and beside


def test_cosines_are_in_the_order_of_the_groups_and_centred_on_zero() -> None:
    cosines = np.arange(16).reshape(4, 4) / 16 - 0.5
    figure = heatmaps._toy_cosines_figure({"vanilla": cosines}, ODD, "encoder")
    ax = figure.axes[0]
    order = [1, 2, 3, 0]
    assert (images(ax)[0] == cosines[order][:, order]).all()
    assert ax.images[0].get_clim() == (-1, 1)
    assert min(ax.images[0].cmap(0.5)[:3]) > 0.99  # white
    diagonal = [f"{cosines[i, i]:.2f}" for i in order]
    assert [text for text in texts(ax) if "." in text] == diagonal
    assert "Cosine of encoder and true" in figure.texts[0].get_text()


def test_curves_show_each_seed_their_median_and_the_targets() -> None:
    curves = curves_of(5)
    figure = plots._training_curves_figure(np.arange(30), curves, 1.2338, 1.12)
    for ax, key in zip(figure.axes, ("l0", "fvu", "sparsity_weight"), strict=True):
        assert ax.get_yscale() == ("linear" if key == "l0" else "log")
        assert ax.get_xlabel() == "training step"
        assert ax.get_ylabel()
        for sae, lines in zip(("vanilla", "matryoshka"), ax.collections, strict=True):
            assert to_hex(lines.get_color()[0]) == plot_style.COLOURS[sae].lower()
            drawn = np.array([segment[:, 1] for segment in lines.get_segments()])
            np.testing.assert_array_equal(drawn, curves[sae][key])
        for sae, line in zip(("vanilla", "matryoshka"), ax.lines, strict=False):
            np.testing.assert_array_equal(line.get_ydata(), np.median(curves[sae][key], axis=0))
    assert [line.get_ydata()[0] for line in figure.axes[0].lines[2:]] == [1.2338, 1.12]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [
        "vanilla, median of 5 seeds", "Matryoshka, median of 5 seeds",
        "target L0, 1.234", "true L0, 1.12",
    ]  # fmt: skip


def test_l0_is_framed_by_what_it_settles_at() -> None:
    curves = curves_of(3, 50)
    for of in curves.values():
        of["l0"] = np.full((3, 50), 28.0)
        of["l0"][:, :10] = 3000
    ax = plots._training_curves_figure(np.arange(50), curves, 30, None).axes[0]
    assert ax.get_ylim() == pytest.approx((0, 39))


def test_seeds_show_every_cosine_and_count_the_clean() -> None:
    runs = runs_of(9)
    runs[0]["clean_features"] = 16
    figure = plots._toy_seeds_figure(runs, PAPER, 0.9)
    ax, counts = figure.axes
    dots = [c for c in ax.collections if len(c.get_offsets()) == 9 * 20]
    for sae, drawn in zip(("vanilla", "matryoshka"), dots, strict=True):
        best = np.array([run["best_cosine"] for run in runs if run["sae"] == sae])
        x, y = np.asarray(drawn.get_offsets()).T
        np.testing.assert_array_equal(y, best.ravel())
        assert (np.rint(x) == np.tile(np.arange(20), 9)).all()  # each in its feature's column
    bars = {
        (to_hex(bar.get_facecolor()), round(bar.get_y() + bar.get_height() / 2), bar.get_width())
        for bar in counts.patches
    }
    blue, red = (plot_style.COLOURS[sae].lower() for sae in ("matryoshka", "vanilla"))
    assert bars == {(blue, 20, 8), (blue, 16, 1), (red, 11, 9)}
    assert {"0.9", "0.95", "0.99"} <= set(texts(ax))


def test_two_saes_with_the_same_count_share_its_place() -> None:
    runs = [run | {"clean_features": 20} for run in runs_of(3)]
    counts = plots._toy_seeds_figure(runs, PAPER, 0.9).axes[1]
    spans = sorted((bar.get_y(), bar.get_y() + bar.get_height()) for bar in counts.patches)
    assert len(spans) == 2
    assert 19.5 <= spans[0][0] < spans[0][1] <= spans[1][0] + 1e-9 < spans[1][1] <= 20.5


def test_prefix_figure_says_where_each_curve_ends() -> None:
    curves = prefixes_of(3)
    curves["vanilla"] = {"prefix": [1, 2, 128], "fvu": [[1.0, 0.9, 0.2], [1.0, 0.8, 0.1]]}
    ax = plots._fvu_by_prefix_figure(curves).axes[0]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert set(texts(ax)) == {"vanilla 0.150", "Matryoshka 0.088"}
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1.0, 0.85, 0.15])


def test_densities_account_for_every_latent() -> None:
    densities = np.array([[0, 0, 0.5, 0.01], [0, 1e-5, 1.0, 1.0]])
    figure = plots._density_histograms_figure({"matryoshka": histograms_of(densities)})
    ax = figure.axes[0]
    [dead] = [p for p in ax.patches if isinstance(p, matplotlib.patches.Rectangle)]
    assert dead.get_height() == pytest.approx(37.5)
    stairs = [p for p in ax.patches if isinstance(p, matplotlib.patches.StepPatch)]
    mean = max(stairs, key=lambda p: p.get_linewidth() * (not p.get_fill()))
    values, edges, _ = mean.get_data()
    assert values.sum() + dead.get_height() == pytest.approx(100)
    at = {round(float(edges[i]), 1): float(values[i]) for i in np.flatnonzero(values)}
    assert at == {-5.0: 12.5, -2.0: 12.5, -0.4: 12.5, -0.1: 25.0}
    assert dead.get_x() + dead.get_width() < edges[0], "the dead stand apart"
    assert "dead 37.5%" in figure.legends[0].get_texts()[0].get_text()
    seeds = [p for p in stairs if p.get_linewidth() == 0.7]
    assert [p.get_data().values.sum() for p in seeds] == [50, 75]


@pytest.mark.parametrize("n_saes", [1, 2, 7])
def test_the_dead_of_every_sae_stand_side_by_side_left_of_the_rarest(n_saes: int) -> None:
    [histogram] = histograms_of([[0, 0, 1e-4, 0.1]])
    names = [f"sae {i}" for i in range(n_saes)]
    ax = plots._density_histograms_figure(dict.fromkeys(names, histogram)).axes[0]
    bars = [p for p in ax.patches if isinstance(p, matplotlib.patches.Rectangle)]
    spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
    assert len(spans) == n_saes
    assert spans[0][0] >= ax.get_xlim()[0]
    assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
    assert spans[-1][1] < ax.lines[0].get_xdata()[0] < -4, "the dotted line parts them"
    assert [bar.get_height() for bar in bars] == [50] * n_saes


def test_one_histogram_is_one_seed() -> None:
    [histogram] = histograms_of([[0, 0.1]])
    figures = [
        plots._density_histograms_figure({"vanilla": one}) for one in (histogram, [histogram])
    ]
    labels = [figure.legends[0].get_texts()[0].get_text() for figure in figures]
    assert labels == ["vanilla, 1 seed; dead 50%"] * 2


def test_refits_are_drawn_apart_by_kind_and_named() -> None:
    stages = stages_of(11)
    figure = plots._refit_cosines_figure(stages, PAPER, "matryoshka", 0.9)
    texts_of_figure = [text.get_text() for text in figure.texts]
    assert "Matryoshka SAE, 11 seeds; features a seed: 3 parent, 9 child, 8 rare" in texts_of_figure
    assert {"as trained", "decoder\nrefitted", "both\nrefitted"} <= set(texts_of_figure)
    assert [ax.get_ylabel() for ax in figure.axes] == ["parent", "child", "rare"] * 3
    for i, (ax, kind) in enumerate(zip(figure.axes, ["parent", "child", "rare"] * 3, strict=True)):
        area, outline = ax.patches
        colours = {to_hex(area.get_facecolor()), to_hex(outline.get_edgecolor())}
        assert colours == {plot_style.KIND_COLOURS[kind].lower()}, (
            "one kind a strip: nothing overlaps"
        )
        best = list(stages.values())[i // 3][:, np.array(PAPER.kind) == kind]
        counts = np.histogram(best, np.linspace(0.9, 1, 41))[0]
        np.testing.assert_allclose(ax.patches[0].get_data().values, counts / counts.max())
    boxes = [ax.get_position() for ax in figure.axes]
    assert all(a.y0 >= b.y1 - 1e-9 for a, b in itertools.pairwise(boxes))


def test_what_is_below_the_axis_stands_where_it_begins() -> None:
    figure = plots._refit_cosines_figure({"before": [[0.2] * 20]}, PAPER, "vanilla", 0.9)
    for ax in figure.axes:
        values = ax.patches[0].get_data().values
        assert values[0] == 1
        assert values[1:].sum() == 0


def test_every_sae_has_one_colour_and_those_known_have_theirs() -> None:
    colours = colours_of(["x", "vanilla", "y", "matryoshka", "z"])
    assert colours["vanilla"] == plot_style.COLOURS["vanilla"]
    assert colours["matryoshka"] == plot_style.COLOURS["matryoshka"]
    assert [colours[name] for name in "xyz"] == list(plot_style.CYCLE[:3])
    assert len(set(colours.values())) == len(colours)
    assert not set(plot_style.CYCLE) & set(plot_style.COLOURS.values())


def test_saes_of_any_names_are_drawn_the_known_ones_first() -> None:
    curves = {name: curves_of(2)["vanilla"] for name in ("b", "matryoshka", "a", "vanilla")}
    figure = plots._training_curves_figure(np.arange(30), curves, 1.2, None)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    names = ["vanilla", "Matryoshka", "b", "a"]
    assert labels[:4] == [f"{name}, median of 2 seeds" for name in names]
    colours = [to_hex(line.get_color()) for line in figure.axes[1].lines]
    wanted = [*(plot_style.COLOURS[n] for n in ("vanilla", "matryoshka")), *plot_style.CYCLE[:2]]
    assert colours == [colour.lower() for colour in wanted]
    panels = heatmaps._toy_cosines_figure(
        {"b": np.eye(20), "vanilla": np.eye(20)}, PAPER, "decoder"
    )
    titles = [ax.get_title(loc="left") for ax in panels.axes[:2]]
    assert titles == ["Vanilla SAE", "b"]


def test_a_legend_of_many_saes_makes_the_figure_higher_not_its_axes_smaller() -> None:
    few, many = (
        plots._training_curves_figure(np.arange(30), of, 1.2, None)
        for of in (curves_of(2), of_many(curves_of(2)["vanilla"]))
    )
    assert many.get_figheight() > few.get_figheight()
    for one, other in zip(few.axes, many.axes, strict=True):
        for figure, ax in ((few, one), (many, other)):
            assert ax.figure is figure
        size = [
            ax.get_position().height * figure.get_figheight()
            for figure, ax in ((few, one), (many, other))
        ]
        assert size[0] == pytest.approx(size[1])
    [legend] = many.legends
    box = legend.get_window_extent()
    assert box.x1 <= many.bbox.x1
    assert box.y0 > max(ax.get_tightbbox().y1 for ax in many.axes) - 1


@pytest.mark.parametrize("low", [0.95, 0.7, 0.3, 0.059, 0.02, 0.003, 1e-5])
def test_three_ticks_or_more_of_a_log_axis_have_a_number(low: float) -> None:
    ys = np.geomspace(1, low, 30)
    curves = {"vanilla": {key: ys[None] for key in ("l0", "fvu", "sparsity_weight")}}
    prefixes = {"vanilla": {"prefix": 2 ** np.arange(10), "fvu": ys[::3]}}
    for ax in (
        plots._training_curves_figure(np.arange(30), curves, 1.2, None).axes[1],
        plots._fvu_by_prefix_figure(prefixes).axes[0],
    ):
        ax.figure.canvas.draw()
        assert ax.get_yscale() == "log"
        low_end, high_end = ax.get_ylim()
        labelled = [
            tick
            for tick in (*ax.yaxis.get_major_ticks(), *ax.yaxis.get_minor_ticks())
            if low_end <= tick.get_loc() <= high_end and tick.label1.get_text()
        ]
        assert 3 <= len(labelled) <= 9, [tick.label1.get_text() for tick in labelled]
