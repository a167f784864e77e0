"""Writes latents in Neuronpedia's JSON: a file for each latent, with Neuronpedia's names."""

from pathlib import Path
from typing import Any

import numpy as np

from matryoshka.files import write_json
from matryoshka.latent_data import Outputs, Shown
from matryoshka.page_data import Source, Vocabulary, number, numbers


def write_sae(folder: Path, source: Source, k: int, shown: Shown, outputs: Outputs | None) -> None:
    """Writes NAME/INDEX.json to `folder` for every latent of the SAE number k, called NAME."""
    below = folder / source.saes[k].name
    below.mkdir(parents=True)
    for latent in range(source.saes[k].sae.n_latents):
        write_json(below / f"{latent}.json", feature_of(source, k, shown, outputs, latent))


def feature_of(
    source: Source, k: int, shown: Shown, outputs: Outputs | None, latent: int
) -> dict[str, Any]:
    """The object of one latent, which "modelId", "layer" and "index" identify.

    "activations" are examples, each with lists of tokens and values: the strongest ones, then those
    of quantiles, then random ones.
    """
    one, vocabulary = source.saes[k], source.vocabulary
    about, examples = one.sae.about, one.examples
    filled = np.flatnonzero(examples.histogram[latent])
    heights = examples.histogram[latent, : filled[-1] + 1] if len(filled) else np.zeros(0)
    width = float(examples.bin_width[latent])
    first, stop = shown.first[latent], shown.first[latent + 1]
    return {
        "modelId": str(about.get("model", "")),
        "layer": f"{about.get('layer', '')}-{one.name}",
        "index": str(latent),
        "frac_nonzero": number(int(examples.fired[latent]) / examples.n_tokens),
        "maxActApprox": number(float(examples.largest[latent])),
        "freq_hist_data_bar_heights": heights.astype(int).tolist(),
        "freq_hist_data_bar_values": [number((k + 0.5) * width) for k in range(len(heights))],
        **_outputs(outputs, vocabulary, latent),
        "activations": [_activation(source, shown, i) for i in range(first, stop)],
    }


def _outputs(outputs: Outputs | None, vocabulary: Vocabulary, latent: int) -> dict[str, Any]:
    if outputs is None:
        return {}
    low, width = float(outputs.low[latent]), float(outputs.width[latent])
    counts = outputs.counts[latent].tolist()
    return {
        "pos_str": [vocabulary.text(i) for i in outputs.promoted[latent].tolist()],
        "pos_values": numbers(outputs.promoted_by[latent]),
        "neg_str": [vocabulary.text(i) for i in outputs.suppressed[latent].tolist()],
        "neg_values": numbers(outputs.suppressed_by[latent]),
        "logits_hist_data_bar_heights": counts,
        "logits_hist_data_bar_values": [
            number(low + (k + 0.5) * width) for k in range(len(counts))
        ],
    }


def _activation(source: Source, shown: Shown, i: int) -> dict[str, Any]:
    """Example i: a window of tokens, and the latent's activation on each."""
    windows, text = shown.windows, source.text
    start, stop = int(windows.starts[i]), int(windows.stops[i])
    values = windows.values[windows.places[i] : windows.places[i + 1]]
    return {
        "tokens": [source.vocabulary.text(tok_id) for tok_id in text.tok_ids[start:stop].tolist()],
        "values": numbers(values),
        "maxValue": number(float(values.max())),
        "maxValueTokenIndex": int(values.argmax()),
        "minValue": number(float(values.min())),
        "dataIndex": str(int(text.rows[start])),
        "kind": shown.kinds[i],
    }
