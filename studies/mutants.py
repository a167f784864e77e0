"""Mutation testing: changes the code in one place, and finds the changes that no test notices.

    python -m studies.mutants --n 100 --seed 0

A mutation changes one operator, comparison, constant or sign, or removes one check. For each, the
repository is copied, the module is mutated in the copy, and the tests of that module are run there.
A mutation that no test notices is printed with its line: either a test is missing, or the change
makes no difference that can be observed. A hundred take half an hour on two cores; CI has none.
"""

import ast
import concurrent.futures
import dataclasses
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from matryoshka.command_line import main_guard, parse, setting, table
from matryoshka.errors import UserError

ROOT = Path(__file__).parents[1]

# The file of tests of each module.
TESTS = {
    "sae.py": "test_sae.py",
    "matryoshka/sae_files.py": "test_sae.py",
    "matryoshka/sae_checks.py": "test_sae.py",
    "toy_model.py": "test_toy_model.py",
    "train.py": "test_train.py",
    "matryoshka/kernels/all_pairs.py": "test_kernels.py",
    "matryoshka/kernels/by_prefix.py": "test_kernels.py",
    "matryoshka/kernels/sparse.py": "test_kernels.py",
    "matryoshka/kernels/dispatch.py": "test_kernels.py",
    "matryoshka/trainer.py": "test_trainer.py",
    "matryoshka/stacked_saes.py": "test_trainer.py",
    "matryoshka/trainer_config.py": "test_trainer_config.py",
    "matryoshka/controls.py": "test_controls.py",
    "matryoshka/prefix_draws.py": "test_prefix_draws.py",
    "matryoshka/restart.py": "test_restart.py",
    "matryoshka/metrics.py": "test_metrics.py",
    "matryoshka/refit.py": "test_refit.py",
    "matryoshka/absorption.py": "test_absorption.py",
    "matryoshka/cache_reader.py": "test_cache_reader.py",
    "matryoshka/cache_writer.py": "test_cache_writer.py",
    "matryoshka/cache_format.py": "test_cache_format.py",
    "matryoshka/token_rows.py": "test_token_rows.py",
    "matryoshka/reconstruction.py": "test_reconstruction.py",
    "matryoshka/saved_runs.py": "test_saved_runs.py",
    "matryoshka/loss_recovered.py": "test_loss_recovered.py",
    "matryoshka/checkpoint.py": "test_checkpoint.py",
    "matryoshka/run_folder.py": "test_run_folder.py",
    "matryoshka/training.py": "test_training.py",
    "matryoshka/training_report.py": "test_training_report.py",
    "matryoshka/toy_stack.py": "test_toy_stack.py",
    "matryoshka/leases.py": "test_leases.py",
    "matryoshka/hub_errors.py": "test_hub_errors.py",
    "matryoshka/comparison.py": "test_comparison.py",
    "matryoshka/volume_caches.py": "test_volume_caches.py",
}

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """How many mutants are tried, and of which modules."""

    n: int = setting(100, "how many mutants to draw, from all mutations of all modules")
    seed: int = setting(0, "seed of the draw")
    only: str = setting("", "only modules whose path contains this")
    workers: int = setting(2, "how many processes run tests at once")
    timeout: int = setting(240, "seconds after which tests count as failed")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mutation of one module."""

    module: str
    line: int
    what: str
    source: str  # the text of the whole mutated module


def mutations(tree: ast.Module) -> Iterator[tuple[ast.AST, str]]:
    """Makes each mutation of `tree` in place, yields (node, description), and then undoes it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            yield from _swapped_in_list(node.ops, COMPARISONS, node)
        elif isinstance(node, ast.BinOp | ast.AugAssign):
            yield from _swapped(node, "op", OPERATORS)
        elif isinstance(node, ast.BoolOp):
            yield from _swapped(node, "op", {ast.And: ast.Or, ast.Or: ast.And})
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not):
            yield from _swapped(node, "op", {type(node.op): ast.UAdd})
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            old: bool | int | float = node.value
            node.value = changed(old)
            yield node, f"{old} -> {node.value}"
            node.value = old
        elif isinstance(node, ast.If) and isinstance(node.body[0], ast.Raise):
            body, node.body = node.body, [ast.Pass()]
            yield node, "check removed"
            node.body = body


def changed(value: bool | int | float) -> bool | int | float:
    """Another constant: the negation of a bool, 0 or 1 plus one, otherwise twice the value."""
    if isinstance(value, bool):
        return not value
    return value + 1 if value in (0, 1) else value * 2


def _swapped(node: ast.AST, field: str, table: Mapping[Any, Any]) -> Iterator[tuple[ast.AST, str]]:
    old = getattr(node, field)
    if type(old) in table:
        setattr(node, field, table[type(old)]())
        yield node, f"{type(old).__name__} -> {table[type(old)].__name__}"
        setattr(node, field, old)


def _swapped_in_list(
    items: list[ast.cmpop], table: dict[type[ast.cmpop], type[ast.cmpop]], node: ast.AST
) -> Iterator[tuple[ast.AST, str]]:
    for i, old in enumerate(items):
        if type(old) in table:
            items[i] = table[type(old)]()
            yield node, f"{type(old).__name__} -> {type(items[i]).__name__}"
            items[i] = old


def mutants_of(module: str) -> list[Mutant]:
    """Every mutant of a module. Docstrings and annotations contain nothing that is mutated."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    return [
        Mutant(module, getattr(node, "lineno", 0), what, ast.unparse(tree))
        for node, what in mutations(tree)
    ]


def is_noticed(mutant: Mutant, timeout: int) -> bool:
    """Whether the module's tests fail, or take too long, on a copy of the repository with it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        skipped = shutil.ignore_patterns(".git", "runs", "cache", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=skipped)
        (copy / mutant.module).write_text(mutant.source, encoding="utf-8")
        test = f"tests/{TESTS[mutant.module]}"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        with subprocess.Popen(
            [*command, test],
            cwd=copy,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:
            try:
                return process.wait(timeout) != 0
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                return True


def run(config: Config) -> tuple[int, list[Mutant]]:
    """Returns how many mutants were tried, and those that no test noticed. Raises `UserError`."""
    modules = [name for name in TESTS if config.only in name and (ROOT / name).exists()]
    every = [mutant for module in modules for mutant in mutants_of(module)]
    if not every:
        raise UserError(f"--only {config.only}: no module of {', '.join(TESTS)} contains this")
    drawn = random.Random(config.seed).sample(every, min(config.n, len(every)))
    modules = sorted({mutant.module for mutant in drawn})
    untouched = [
        Mutant(name, 0, "none", (ROOT / name).read_text(encoding="utf-8")) for name in modules
    ]
    survivors = []
    with concurrent.futures.ThreadPoolExecutor(config.workers) as pool:
        for mutant, noticed in zip(
            untouched, pool.map(lambda m: is_noticed(m, config.timeout), untouched), strict=True
        ):
            if noticed:
                raise UserError(f"tests/{TESTS[mutant.module]} fails as it is: mend that first")
        futures = {pool.submit(is_noticed, mutant, config.timeout): mutant for mutant in drawn}
        done = concurrent.futures.as_completed(futures)
        for future in tqdm(done, "mutants", len(futures)):
            if not future.result():
                survivors.append(futures[future])
    return len(drawn), survivors


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        n, survivors = run(parse(Config, __doc__ or "", argv))
        rows = []
        for mutant in sorted(survivors, key=lambda m: (m.module, m.line)):
            line = (
                (ROOT / mutant.module)
                .read_text(encoding="utf-8")
                .splitlines()[mutant.line - 1]
                .strip()
            )
            rows.append([f"{mutant.module}:{mutant.line}", mutant.what, line])
        if rows:
            print(table(["survived", "mutation", "line"], rows) + "\n")
        print(f"{n - len(survivors)} of {n} mutants noticed")


if __name__ == "__main__":
    main()
