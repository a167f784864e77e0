"""What a training says of itself."""

from typing import Any

from matryoshka.training_report import bar_text, problems, short


def test_every_problem_has_its_line() -> None:
    good = {"sae": "vanilla", "training_fvu": 0.3, "final_l0": 20.0, "dead_share": 0.0}

    def lines(**figures: Any) -> list[str]:
        runs = [good, good | {"sae": "matryoshka"} | figures]
        return problems({"config": {"target_l0": 20.0}, "runs": runs})

    assert lines() == []
    assert lines(final_l0=21.9, dead_share=0.19, training_fvu=0.99) == []
    assert lines(dead_share=None) == []
    (line,) = lines(final_l0=93.9)
    assert "the matryoshka SAE missed its target: L0 93.9 for 20: try" in line
    assert "a higher --sparsity-weight" in line
    (line,) = lines(final_l0=17.0)
    assert "a lower --sparsity-weight" in line
    (line,) = lines(training_fvu=20.0)
    assert "the matryoshka SAE reconstructs worse than the activations' mean does (FVU 20)" in line
    assert "--lr" in line
    (line,) = lines(dead_share=0.6)
    assert "60.0% of the matryoshka SAE's latents are dead: try fewer --n-latents" in line
    assert len(lines(final_l0=0.0, training_fvu=1.01, dead_share=1.0)) == 3


def test_the_bar_shows_both_saes_in_80_columns() -> None:
    records = [
        {"sae": name, "fvu": 12.345, "l0": 3072.0, "dead_share": 0.1, "sparsity_weight": 1.2}
        for name in ("matryoshka", "vanilla")
    ]
    said = bar_text(records)
    assert said == "matryoshka FVU 12.345 L0 3072, vanilla FVU 12.345 L0 3072"
    assert len("100% 1:23:45<1:23:45, " + said) <= 80
    assert short(5.4e7, 3) == "5e+07"


def test_a_number_is_short_from_a_hundred_on() -> None:
    assert short(99.9994, 3) == "99.999"
    assert short(100.0, 3) == "100"
