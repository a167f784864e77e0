"""An axis whose positions are the features of a tree, grouped and labelled."""

import dataclasses
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.transforms import ScaledTranslation

from matryoshka.plot_style import FAINT, INK, WIDTH, height_of

if TYPE_CHECKING:
    from toy_model import FeatureTree


@dataclasses.dataclass(frozen=True)
class TreeAxis:
    """Features along an axis: each topmost parent with all below it, and then the rare ones."""

    order: list[int]  # position -> feature
    starts: list[int]  # the first position of each group
    labels: list[str]  # the label of each group
    marks: list[str]  # for each position: P, c, or nothing

    def spans(self) -> list[tuple[int, int, str]]:
        """(first position, last position, label) of each group."""
        ends = [*self.starts[1:], len(self.order)]
        return [(a, b - 1, s) for a, b, s in zip(self.starts, ends, self.labels, strict=True)]


def tree_axis(tree: "FeatureTree") -> TreeAxis:
    """The order, groups and marks of a tree's features along an axis."""
    groups: dict[int, list[int]] = {}  # topmost feature, or -1 for rare ones -> features
    top: list[int] = []
    for feature, above in enumerate(tree.parent):
        top.append(feature if above is None else top[above])  # pre-order: above comes first
        groups.setdefault(-1 if tree.kind[feature] == "rare" else top[feature], []).append(feature)
    if -1 in groups:
        groups[-1] = groups.pop(-1)  # to the end
    order = [feature for members in groups.values() for feature in members]
    sizes = [len(members) for members in groups.values()]
    return TreeAxis(
        order=order,
        starts=[sum(sizes[:i]) for i in range(len(sizes))],
        labels=["rare" if g < 0 else tree.ids[g].replace("_", " ") for g in groups],
        marks=[{"parent": "P", "child": "c", "rare": ""}[tree.kind[f]] for f in order],
    )


def mark_features(ax: Axes, layout: TreeAxis, axis: str) -> None:
    """Marks the features along the `axis` "x" or "y".

    It writes P and c, draws a bracket and a label for each group, and lines between groups.
    """
    on_x = axis == "x"
    ax.set_xticks([]) if on_x else ax.set_yticks([])
    box = ax.get_position()
    size = WIDTH * box.width if on_x else height_of(ax) * box.height
    pitch = 72 * size / len(layout.order)  # points a feature

    def note(text: str, at: float, off: float, fontsize: float, **kwargs: Any) -> None:
        ax.annotate(
            text,
            (at, 0) if on_x else (0, at),
            (0, -off) if on_x else (-off, 0),
            xycoords=("data", "axes fraction") if on_x else ("axes fraction", "data"),
            textcoords="offset points",
            ha="center" if on_x else "right",
            va="top" if on_x else "center",
            fontsize=fontsize,
            **kwargs,
        )

    letters = any(layout.marks) and pitch >= 6
    if letters:
        for at, mark in enumerate(layout.marks):
            note(mark, at, 2, 7, color=INK, weight="bold" if mark == "P" else "normal")
    off = 12 if letters else 3
    scale = ax.figure.dpi_scale_trans
    if on_x:
        place = ax.get_xaxis_transform() + ScaledTranslation(0, -off / 72, scale)
    else:
        place = ax.get_yaxis_transform() + ScaledTranslation(-off / 72, 0, scale)
    for first, last, label in layout.spans():
        along, across = (first - 0.35, last + 0.35), (0, 0)
        ax.add_artist(
            Line2D(
                *((along, across) if on_x else (across, along)), color=FAINT, linewidth=1.2,
                clip_on=False, transform=place, solid_capstyle="butt",
            )
        )  # fmt: skip
        text, rotation = _fitted(label, pitch * (last - first + 1), upright=not on_x)
        note(text, (first + last) / 2, off + 2, 7.5, rotation=rotation, linespacing=1.05)
        if first:
            (ax.axvline if on_x else ax.axhline)(first - 0.5, color="#A8A8A8", linewidth=0.6)


def _fitted(label: str, room: float, upright: bool) -> tuple[str, float]:
    """`label` and a rotation with which it fits in `room` points along the axis; "" if none does.

    It is written along the axis if that fits, in one line, or broken at its spaces, or shortened;
    otherwise across the axis.
    """
    short = label if len(label) <= 10 else label[:9] + "…"
    along = 90 if upright else 0
    for text in (label, label.replace(" ", "\n"), short):
        lines = text.split("\n")
        if 4.3 * max(map(len, lines)) <= room and len(lines) <= 2:
            return text, along
    return (short, 90 - along) if room >= 8 else ("", 0)


def feature_key(layout: TreeAxis, what: str) -> str:
    """A line that says what `what`, such as "Columns", are, and what P and c mean."""
    return f"{what}: features" + (" (P parent, c child)" if any(layout.marks) else "")
