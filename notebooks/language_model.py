"""What the notebook shows of the stand-in language model, of whatever kinds of SAE there are."""

from collections import Counter
from typing import Any

import numpy as np

from matryoshka.command_line import table
from studies import kept_results, standin_tables, tables

EVALUATION, TRAINING = "standin/evaluation.json", "standin/training.json"
HELD_OUT = {True: "not trained on", False: "TRAINED ON", None: "perhaps trained on"}


class StandIn:
    """What evaluate.py found of the SAEs trained as the write-up has it, over seeds."""

    def __init__(self) -> None:
        evaluation, training = tables.read(EVALUATION), tables.read(TRAINING)
        self.runs = standin_tables.standin_by_kind()
        self.first = next(iter(self.runs.values()))[0]
        name = self.first["source"]
        (self.evaluated,) = (s for s in evaluation["sources"] if s["source"] == name)
        (self.trained,) = (s for s in training["sources"] if s["source"] == name)

    def judged_on(self) -> str:
        """What they were trained and judged on."""
        cache, losses = self.evaluated["cache"], self.evaluated["cross_entropy"]
        spliced = ", ".join(
            f"{np.mean([run['cross_entropy'] for run in runs]):.3f} ({sae})"
            for sae, runs in self.runs.items()
        )
        return (
            f"The SAEs were trained on {self.trained['cache']['n_tokens']:,} activations, in "
            f"{self.trained['passes']:.1f} passes, and scored on {cache['n_tokens']:,} activations "
            f"{HELD_OUT[cache['held_out']]}. The model's own cross-entropy is "
            f"{losses['clean']:.3f} nats, over {losses['predictions']:,} predictions. It is "
            f"{losses['mean']:.3f} if the activations are replaced by their mean, and with "
            f"reconstructions {spliced}."
        )

    def better(self) -> str:
        """In how many seeds which SAE reconstructs best."""
        seeds = list(zip(*self.runs.values(), strict=True))
        best = Counter(min(runs, key=lambda run: run["fvu"])["sae"] for runs in seeds)
        counts = [f"{sae} in **{n} of {len(seeds)}** seeds" for sae, n in best.most_common()]
        return f"The SAE with the lowest FVU is {', '.join(counts)}."

    def by_prefix(self) -> str:
        """FVU from the first latents alone, for some of the prefixes evaluated."""
        prefixes = self.first["fvu_by_prefix"]["prefix"]
        shown = [i for i, m in enumerate(prefixes) if i % 2 == 0 or m == prefixes[-1]]
        rows = []
        for sae, runs in self.runs.items():
            fvus = [[run["fvu_by_prefix"]["fvu"][i] for run in runs] for i in shown]
            rows.append([sae, *(kept_results.spread(fvu, 3) for fvu in fvus)])
        return table(["FVU of the first", *(f"{prefixes[i]:,}" for i in shown)], rows)

    def concepts(self) -> str:
        """By concept: the detector's precision and recall, and what is absorbed, over seeds."""
        rows = []
        for i, concept in enumerate(self.first["concepts"]):
            cells = [
                mean_percent([run["concepts"][i][key] for run in runs])
                for key in ("precision", "recall", "absorption")
                for runs in self.runs.values()
            ]
            rows.append([concept["concept"], *cells])
        titles = ("precision", "recall", "absorbed")
        return table(
            ["concept", *(f"{title}, {sae}" for title in titles for sae in self.runs)], rows
        )


def mean_percent(rates: list[Any]) -> str:
    """The mean of the rates that are known, in percent; "-" where none is."""
    known = [rate for rate in rates if rate is not None]
    return kept_results.percent(np.mean(known) if known else np.nan, 0)
