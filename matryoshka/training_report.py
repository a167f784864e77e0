"""What a training says of itself: in its bar, in its table, and of what is wrong with it."""

from collections.abc import Mapping, Sequence
from typing import Any

from matryoshka.command_line import table
from sae import WITH_K

DEAD_AFTER = 2_000_000  # activations without firing after which training calls a latent dead
L0_MISSED = 0.1  # off its target by more than this share, an SAE's L0 is worth a line at the end
BAR_WIDTH = 58  # characters of a bar's text
MANY_DEAD = 0.2  # and so is a share of dead latents above this


def bar_text(records: Sequence[Mapping[str, Any]]) -> str:
    """FVU and L0 of each SAE, for a bar of 80 columns; metrics.jsonl has the rest.

    Where that is too long, FVU alone, in their order, as many as there is room for.
    """
    parts = (f"{r['sae']} FVU {short(r['fvu'], 3)} L0 {short(r['l0'], 1)}" for r in records)
    named = ", ".join(parts)
    if len(named) <= BAR_WIDTH:
        return named
    text = "FVU " + " ".join(short(r["fvu"], 3).lstrip("0") for r in records)
    return text if len(text) <= BAR_WIDTH else text[: BAR_WIDTH - 3].rsplit(" ", 1)[0] + " ..."


def short(value: float, digits: int) -> str:
    """With so many digits behind the point, but in few characters where it is large."""
    if value < 100:
        return f"{value:.{digits}f}"
    return f"{value:.0f}" if value < 1e4 else f"{value:.0e}"


def share(value: float | None) -> str:
    """As a percentage; "-" where it is not known."""
    return "-" if value is None else f"{value:.1%}"


def problems(results: Mapping[str, Any]) -> list[str]:
    """What is wrong with a finished run, a line each, and what to try; see `is_broken`, too."""
    lines = [f"dropped: {reason}" for reason in results.get("dropped", {}).values()]
    for r in results["runs"]:
        target = r.get("target_l0", results["config"]["target_l0"])
        if is_broken(r):
            lines.append(
                f"the {r['sae']} SAE reconstructs worse than the activations' mean does (FVU "
                f"{r['training_fvu']:.3g}): try a lower --lr, or more --n-steps"
            )
        if abs(r["final_l0"] / target - 1) > L0_MISSED:
            direction = "higher" if r["final_l0"] > target else "lower"
            lines.append(
                f"the {r['sae']} SAE missed its target: L0 {r['final_l0']:.3g} for {target:g}: try "
                f"{_try_for_l0(r, direction)}"
            )
        if (r["dead_share"] or 0) > MANY_DEAD:
            lines.append(
                f"{r['dead_share']:.1%} of the {r['sae']} SAE's latents are dead: try fewer "
                f"--n-latents, a lower --lr{_try_for_dead(r)}"
            )
    return lines


def _try_for_l0(result: Mapping[str, Any], direction: str) -> str:
    if result.get("activation", "relu") in WITH_K:
        return "a lower --target-l0 or --lr: fewer latents have an activation than are asked for"
    return f"more --n-steps, or a {direction} --sparsity-weight"


def _try_for_dead(result: Mapping[str, Any]) -> str:
    if result.get("activation", "relu") in WITH_K:
        return ", --auxiliary all or --resample-every"
    return " or --sparsity-weight, or --resample-every"


def is_broken(result: Mapping[str, Any]) -> bool:
    """Whether the SAE is useless: its FVU is over 1, that of the mean."""
    return not result["training_fvu"] <= 1


def summary(results: Mapping[str, Any]) -> str:
    """What training ended with; held-out figures are `evaluate.py`'s."""
    return table(
        ["at the end of training", "batch FVU", "L0, last 5% of steps", "dead"],
        [
            [
                r["sae"],
                f"{r['training_fvu']:.4f}",
                f"{r['final_l0']:.2f}",
                share(r["dead_share"]),
            ]
            for r in results["runs"]
        ],
    )


def closing(results: Mapping[str, Any]) -> str:
    """How long it took, and what dead means where that is known, or why it is not."""
    waited = results["waited_for_data"] / max(results["seconds"], 1e-9)
    known = all(r["dead_share"] is not None for r in results["runs"])
    return (
        f"Dead: fired on none of the last {DEAD_AFTER:,} activations"
        f"{'' if known else '; -: the run was shorter'}.\n"
        f"{results['seconds']:.0f} s, {waited:.1%} of them waiting for data"
    )
