"""What is printed of an evaluation, from results made up here."""

from typing import Any

import pytest

from matryoshka.evaluation_tables import concept_table, norm_line, report, summary


def concept(name: str, **changed: Any) -> dict[str, Any]:
    usual = {
        "concept": name,
        "tokens": 12,
        "precision": 0.75,
        "recall": 0.5,
        "miss_rate": 0.25,
        "absorption": 0.125,
        "specific_latents": 3,
    }
    return {**usual, **changed}


def run(name: str, **changed: Any) -> dict[str, Any]:
    usual = {
        "sae": name,
        "fvu": 0.25,
        "fvu_without_outliers": 0.25,
        "l0": 19.876,
        "dead_share": 0.015,
        "loss_recovered": 0.876,
        "mean_highest_cosine": 0.4321,
        "absorption": 0.125,
        "cross_entropy": 3.25,
        "concepts": [concept("names"), concept("verbs", absorption=None)],
    }
    return {**usual, **changed}


def results(*runs: dict[str, Any], **changed: Any) -> dict[str, Any]:
    usual = {
        "cache": {"n_tokens": 54321, "make": {"split": "validation"}, "held_out": True},
        "left_out": {},
        "concepts": {"words": 0, "words_left_out": 0},
        "cross_entropy": {"predictions": 9876, "clean": 1.5, "mean": 8.75},
        "norms": {"p99_9_over_median": 1.5, "max_over_median": 2.25, "outliers": 0},
        "runs": list(runs),
    }
    return {**usual, **changed}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_an_sae_is_a_row_whatever_it_is_called():
    lines = summary(results(run("k=30, wide"), run("b", loss_recovered=None))).splitlines()
    assert cells(lines[0]) == [
        *("SAE", "FVU", "L0", "dead", "loss recovered", "highest cosine", "absorption")
    ]
    assert cells(lines[2]) == ["k=30, wide", "0.2500", "19.88", "1.5%", "87.6%", "0.432", "12.5%"]
    assert cells(lines[3])[0] == "b"
    assert cells(lines[3])[4] == "-"
    assert lines[5].startswith(
        "54,321 tokens of validation, not trained on. Cross-entropy on 9,876"
    )
    assert lines[5].endswith("1.500 nats clean, 8.750 with the mean, 3.250 k=30, wide, 3.250 b.")


@pytest.mark.parametrize(
    ("held_out", "said"), [(False, "TRAINED ON"), (None, "whether trained on is not known")]
)
def test_it_is_said_where_the_tokens_were_trained_on_or_that_is_not_known(held_out, said):
    one = results(run("a"))
    one["cache"]["held_out"] = held_out
    assert f"of validation, {said}." in summary(one)


def test_a_concept_and_sae_are_a_row():
    lines = concept_table(results(run("a"), run("b"))).splitlines()
    rows = [cells(line) for line in lines[2:]]
    assert [row[:2] for row in rows] == [
        *(["names", "a"], ["names", "b"], ["verbs", "a"], ["verbs", "b"])
    ]
    assert rows[0][2:] == ["12", "75.0%", "50.0%", "25.0%", "12.5%", "3"]
    assert rows[2][2:] == ["12", "75.0%", "50.0%", "25.0%", "-", "3"]


def test_where_no_token_decides_fvu_only_the_norms_are_said():
    one = results(run("a", fvu_without_outliers=0.1))
    assert norm_line(one) == (
        "Norms: the 99.9th percentile is 1.50 times the median, the largest 2.25 times."
    )
    one["norms"]["p99_9_over_median"] = None
    assert norm_line(one) == "The median of the activations' norms is 0."


def test_fvu_without_outliers_is_said_where_it_is_another():
    norms = {"p99_9_over_median": 1.5, "max_over_median": 99.0, "outliers": 1234}
    for without, is_said in ((0.27, False), (0.23, False), (0.28, True), (0.22, True)):
        one = results(run("a"), run("b", fvu_without_outliers=without), norms=norms)
        assert ("FVU IS DECIDED BY 1,234 OF 54,321 TOKENS" in norm_line(one)) is is_said
    one = results(run("a"), run("b", fvu_without_outliers=None), norms=norms)
    assert norm_line(one).endswith(
        "whose norm is over 10 times the median. Without them: 0.2500 a, not defined b."
    )


def test_what_was_left_out_is_said():
    one = results(
        run("a", loss_recovered=None, cross_entropy=None, absorption=None, concepts=[]),
        cross_entropy=None,
        left_out={"cross_entropy": "it is an encoder", "absorption": "there are no token ids"},
    )
    one["cache"]["make"] = {}  # of arrays
    lines = report(one).splitlines()
    assert lines[0] == "No absorption: there are no token ids."
    assert cells(lines[4]) == ["a", "0.2500", "19.88", "1.5%", "-", "0.432", "-"]
    assert lines[6] == "54,321 activations, not trained on. No cross-entropy: it is an encoder."


def test_words_that_were_left_out_are_counted():
    one = results(run("a"), concepts={"words": 1243, "words_left_out": 12})
    assert "Left out, because they are not a single token: 12 of 1,243 words." in report(one)
    assert "left out" not in report(results(run("a")))
