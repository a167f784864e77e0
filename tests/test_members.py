"""The SAEs that a training is asked for: their names, a file of them, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from matryoshka.errors import UserError
from matryoshka.members import members_of, settings_of
from matryoshka.training_config import TrainingConfig

TABLES: list[dict[str, Any]] = [
    {"name": "small", "n_latents": 40, "target_l0": 4},
    {
        "kind": "matryoshka",
        "activation": "batchtopk",
        "widths": [0.25, 0.5, 1],
        "width_weights": [1, 1, 2],
        "lr": 3e-4,
        "betas": [0.9, 0.999],
    },
    {"kind": "vanilla", "auxiliary": "all", "dead_after": 1e5, "sparsity": "log"},
]
TOML = """
# of three kinds
[[sae]]
name = "small"
n_latents = 40
target_l0 = 4

[[sae]]
kind = "matryoshka"
activation = "batchtopk"
widths = [0.25, 0.5, 1]
width_weights = [1, 1, 2]
lr = 3e-4
betas = [0.9, 0.999]

[[sae]]
kind = "vanilla"
auxiliary = "all"
dead_after = 100_000
sparsity = "log"
"""


def config_with(folder: Path, text: str, name: str = "saes.toml", **settings: Any) -> Any:
    (folder / name).write_text(text)
    return TrainingConfig(members=str(folder / name), **{"n_latents": 64, **settings})


# ------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["matryoshka", "vanilla"]),
        ({"saes": ("vanilla",)}, ["vanilla"]),
        ({"saes": ("vanilla",), "target_l0s": (7.0,)}, ["vanilla"]),
        (
            {"target_l0s": (10.0, 2.5)},
            ["matryoshka_l0_10", "vanilla_l0_10", "matryoshka_l0_2.5", "vanilla_l0_2.5"],
        ),
    ],
)
def test_saes_are_called_by_their_kinds_and_where_need_be_by_their_targets(
    settings: dict[str, Any], names: list[str]
) -> None:
    members = members_of(TrainingConfig(**settings))
    assert [member.name for member in members] == names
    assert [member.kind for member in members] == [name.split("_")[0] for name in names]
    for member in members:
        assert (member.config.n_prefixes == 1) == (member.kind == "vanilla")


def test_a_target_is_of_its_sae_alone() -> None:
    members = members_of(TrainingConfig(target_l0s=(10.0, 2.5)))
    assert [member.config.target_l0 for member in members] == [10.0, 10.0, 2.5, 2.5]
    assert all(member.config.targets == (member.config.target_l0,) for member in members)
    assert members_of(TrainingConfig(target_l0=7.0))[0].config.target_l0 == 7.0


def test_one_target_is_the_same_however_it_is_asked_for() -> None:
    """--target-l0 7 on the command line, and target_l0=7.0 in Python, make the same run."""
    ours, theirs = TrainingConfig(target_l0=7.0), TrainingConfig(target_l0s=(7.0,))
    assert ours.as_json() == theirs.as_json()
    assert ours.as_json()["target_l0"] == 7.0


# ------------------------------------------------------------------------------------------ a file


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_says_what_each_sae_is(tmp_path: Path, suffix: str) -> None:
    text = TOML if suffix == "toml" else json.dumps({"sae": TABLES})
    config = config_with(tmp_path, text, f"saes.{suffix}", target_l0=9.0, n_steps=77, n_prefixes=3)
    small, paper, vanilla = members_of(config)
    assert [small.name, paper.name, vanilla.name] == ["small", "matryoshka", "vanilla"]
    assert [small.kind, paper.kind, vanilla.kind] == ["matryoshka", "matryoshka", "vanilla"]
    assert (small.config.n_latents, small.config.target_l0) == (40, 4.0)
    assert paper.config.widths_of(64) == [16, 32, 64]
    assert paper.config.width_weights == (1.0, 1.0, 2.0)
    assert (paper.config.activation, paper.config.lr) == ("batchtopk", 3e-4)
    assert paper.config.betas == (0.9, 0.999)
    assert (vanilla.config.auxiliary, vanilla.config.dead_after) == ("all", 100_000)
    assert (vanilla.config.sparsity, vanilla.config.n_prefixes) == ("log", 1)
    # what a table does not say is the training's
    assert [member.config.n_prefixes for member in (small, paper)] == [3, 3]
    assert [member.config.target_l0 for member in (paper, vanilla)] == [9.0, 9.0]
    assert {member.config.n_steps for member in (small, paper, vanilla)} == {77}
    assert small.config.lr == vanilla.config.lr == 1e-3


def test_a_run_keeps_what_its_file_said(tmp_path: Path) -> None:
    """So a file that is changed before the run is resumed is noticed, and one that is moved or
    written in another way is not."""
    config = config_with(tmp_path, TOML)
    kept = settings_of(config, members_of(config))
    again = config_with(tmp_path, json.dumps({"sae": TABLES}), "other.json")
    assert settings_of(again, members_of(again)) == kept
    assert json.loads(json.dumps(kept)) == kept
    assert kept["members"][0] == {
        **{"name": "small", "kind": "matryoshka"},
        **{"n_latents": 40, "target_l0": 4.0},
    }
    changed = config_with(tmp_path, TOML.replace("3e-4", "4e-4"))
    assert settings_of(changed, members_of(changed)) != kept
    without = TrainingConfig()
    assert settings_of(without, members_of(without)) == without.as_json()


# ------------------------------------------------------------------------------- what is refused

IMPOSSIBLE: list[tuple[dict[str, Any], str]] = [
    ({"target_l0": 65}, "--target-l0 65.0 is more than there are latents: 64"),
    ({"target_l0": 65, "activation": "topk"}, "--target-l0 65.0 is more than there are"),
    ({"target_l0": 0}, "--target-l0 is 0.0: it must be positive"),
    ({"target_l0": 0.5, "activation": "batchtopk"}, "batchtopk takes a --target-l0 of 1 or more"),
    ({"target_l0": 0.5, "activation": "topk"}, "topk takes a --target-l0 of 1 or more, got 0.5"),
    ({"target_l0": 2.5, "activation": "topk"}, "topk takes a whole number as --target-l0, got 2.5"),
    ({"widths": [8, 4, 64]}, "--widths must rise, got 8 4 64 for 64 latents"),
    ({"widths": [8, 8, 64]}, "--widths must rise"),
    ({"widths": [-1, 64]}, "--widths must rise"),
    ({"widths": [8, 32]}, "--widths must end at --n-latents 64, got 8 32"),
    ({"widths": [0.1, 0.5]}, "--widths must end at --n-latents 64"),
    ({"widths": [8.5, 64]}, "--widths must be whole numbers, or shares"),
    ({"widths": [8, 64], "width_weights": [1, 2, 3]}, "3 --width-weights for 2 --widths"),
    ({"width_weights": [1.0]}, "1 --width-weights for 0 --widths"),
    ({"widths": [8, 64], "width_weights": [1, -1]}, "--width-weights must be 0 or more"),
    ({"widths": [8, 64], "width_weights": [0, 0]}, "--width-weights must be 0 or more, and not"),
    ({"widths": [8, 64], "prefixes": "expected"}, "--widths are fixed, and --prefixes expected"),
    ({"lr": 0}, "--lr is 0.0"),
    ({"auxiliary_weight": 0}, "--auxiliary-weight is 0.0"),
    ({"n_prefixes": 65}, "--n-prefixes 65 is more than there are latents: 64"),
]


@pytest.mark.parametrize(("table", "said"), IMPOSSIBLE)
def test_an_impossible_sae_is_named(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    tables = [{"name": "good"}, {"name": "bad", **table}]
    with pytest.raises(UserError, match="bad: ") as refused:
        members_of(config_with(tmp_path, json.dumps({"sae": tables}), "saes.json"))
    assert said in str(refused.value)


# What a table may not say; of a type that no setting has, or of no setting at all.
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lerning_rate": 1}, "lerning_rate is no setting of an SAE; there are activation,"),
    ({"n_steps": 5}, "n_steps is no setting of an SAE"),  # all have the same batches
    ({"batch_size": 5}, "batch_size is no setting of an SAE"),
    ({"kind": "topk"}, "kind must be one of matryoshka, vanilla, got 'topk'"),
    ({"kind": ["vanilla"]}, "kind must be one of matryoshka, vanilla, got ['vanilla']"),
    ({"name": 3}, "name must be a string, got 3"),
    ({"lr": "fast"}, "lr must be a finite number, got 'fast'"),
    ({"lr": True}, "lr must be a finite number, got True"),
    ({"lr": float("inf")}, "lr must be a finite number, got inf"),
    ({"lr": float("nan")}, "lr must be a finite number, got nan"),
    ({"lr": 10**400}, "lr must be a finite number, got 1000"),
    ({"n_latents": 1.5}, "n_latents must be a whole number, got 1.5"),
    ({"n_latents": float("inf")}, "n_latents must be a whole number, got inf"),
    ({"n_latents": None}, "n_latents must be a whole number, got None"),
    ({"activation": "gelu"}, "activation must be one of relu, topk, batchtopk, jumprelu, got 'g"),
    ({"activation": 1}, "activation must be one of"),
    ({"widths": 64}, "widths must be a list, got 64"),
    ({"widths": ["a"]}, "widths must be a finite number, got 'a'"),
    ({"betas": [0.5]}, "betas must be a list of 2, got [0.5]"),
    ({"kind": "vanilla", "n_prefixes": 3}, "a vanilla SAE has no n_prefixes of its own"),
    ({"kind": "vanilla", "widths": [64]}, "a vanilla SAE has no widths of its own"),
]


@pytest.mark.parametrize(("table", "said"), WRONG)
def test_what_is_no_setting_is_named(tmp_path: Path, table: dict[str, Any], said: str) -> None:
    config = config_with(tmp_path, json.dumps({"sae": [{}, table]}), "saes.json")
    with pytest.raises(UserError, match=r"--members .*saes\.json: ") as refused:
        members_of(config)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ([{}, {}], "two SAEs are called matryoshka"),
        ([{"name": "a"}, {"name": "a", "kind": "vanilla"}], "two SAEs are called a"),
        *(
            ([{"name": name}], "no SAE's file can be called")
            for name in ("", "checkpoint", "a/b", "..", ".a", "../a", "/a", "a\n", "a\0", "a" * 300)
        ),
    ],
)
def test_names_that_cannot_be_files_are_refused(
    tmp_path: Path, tables: list[dict[str, Any]], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        members_of(config_with(tmp_path, json.dumps({"sae": tables}), "saes.json"))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("saes.toml", "[[sae]\nlr = ", "is not TOML: "),
        ("saes.toml", "\xff", "is not TOML: "),
        ("saes.toml", '{"sae": [{}]}', "is not TOML: "),
        ("saes.json", "[[sae]]", "is not JSON: "),
        ("saes.json", "[" * 100_000, "is not JSON: "),
        ("saes.json", '{"sae": []}', "must hold tables [[sae]]"),
        ("saes.json", '{"saes": [{}]}', "must hold tables [[sae]]"),
        ("saes.json", '{"sae": [{}], "lr": 1}', "must hold tables [[sae]], one an SAE, and nothin"),
        ("saes.json", '{"sae": [1]}', "must hold tables [[sae]]"),
        ("saes.json", '{"sae": {"lr": 1}}', "must hold tables [[sae]]"),
        ("saes.json", "[]", "must hold tables [[sae]]"),
        ("saes.toml", "", "must hold tables [[sae]]"),
        ("saes.toml", "[sae]\nlr = 1", "must hold tables [[sae]]"),
    ],
)
def test_what_is_no_file_of_members_is_refused(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=f"--members {path} ") as refused:
        members_of(TrainingConfig(members=str(path)))
    assert said in str(refused.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.toml cannot be read: No such file"):
        members_of(TrainingConfig(members=str(tmp_path / "nowhere.toml")))
    with pytest.raises(UserError, match=r"cannot be read: Is a directory"):
        members_of(TrainingConfig(members=str(tmp_path)))


def test_several_targets_beside_a_file_are_refused(tmp_path: Path) -> None:
    config = config_with(tmp_path, TOML, target_l0s=(3.0, 4.0))
    with pytest.raises(UserError, match="--target-l0 takes one value beside it"):
        members_of(config)


def test_the_same_target_twice_is_refused() -> None:
    with pytest.raises(UserError, match="two SAEs are called matryoshka_l0_3"):
        members_of(TrainingConfig(target_l0s=(3.0, 3.0)))
