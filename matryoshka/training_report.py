"""What training prints about itself: its progress bar, its table, and warnings."""

from collections.abc import Mapping, Sequence
from typing import Any

from matryoshka.command_line import table
from sae import WITH_K

DEAD_AFTER = 2_000_000  # activations without firing after which a latent counts as dead
L0_MISSED = 0.1  # a warning is printed if L0 misses its target by more than this share
MANY_DEAD = 0.2  # and if more than this share of latents is dead
BAR_WIDTH = 58  # characters of the progress bar's text


def bar_text(records: Sequence[Mapping[str, Any]]) -> str:
    """FVU and L0 of each SAE, for a progress bar of 80 columns; metrics.jsonl has the rest.

    If that is too long, FVU alone, of as many SAEs as there is room for.
    """
    parts = (f"{r['sae']} FVU {short(r['fvu'], 3)} L0 {short(r['l0'], 1)}" for r in records)
    named = ", ".join(parts)
    if len(named) <= BAR_WIDTH:
        return named
    text = "FVU " + " ".join(short(r["fvu"], 3).lstrip("0") for r in records)
    return text if len(text) <= BAR_WIDTH else text[: BAR_WIDTH - 3].rsplit(" ", 1)[0] + " ..."


def short(value: float, digits: int) -> str:
    """A value with `digits` decimals; from 100 on with none, and from 10,000 on as a power."""
    if value < 100:
        return f"{value:.{digits}f}"
    return f"{value:.0f}" if value < 1e4 else f"{value:.0e}"


def share(value: float | None) -> str:
    """A share as a percentage; "-" if it is not known."""
    return "-" if value is None else f"{value:.1%}"


def problems(results: Mapping[str, Any]) -> list[str]:
    """What is wrong with a finished run and what to try, a line each."""
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
    """What to try if L0 missed its target; direction: in which to change the sparsity weight."""
    if result.get("activation", "relu") in WITH_K:
        return "a lower --target-l0 or --lr: fewer latents have an activation than are asked for"
    return f"more --n-steps, or a {direction} --sparsity-weight"


def _try_for_dead(result: Mapping[str, Any]) -> str:
    """What else to try if many latents are dead."""
    if result.get("activation", "relu") in WITH_K:
        return ", --auxiliary all or --resample-every"
    return " or --sparsity-weight, or --resample-every"


def is_broken(result: Mapping[str, Any]) -> bool:
    """Whether the SAE is useless: its FVU is not finite, or above 1, which is that of the mean."""
    return not result["training_fvu"] <= 1


def summary(results: Mapping[str, Any]) -> str:
    """The table of training's last figures; `evaluate.py` computes held-out ones."""
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
    """Lines that say what dead means, or why it is not known, and how long training took."""
    waited = results["waited_for_data"] / max(results["seconds"], 1e-9)
    known = all(r["dead_share"] is not None for r in results["runs"])
    return (
        f"Dead: fired on none of the last {DEAD_AFTER:,} activations"
        f"{'' if known else '; -: the run was shorter'}.\n"
        f"{results['seconds']:.0f} s, {waited:.1%} of them waiting for data"
    )
