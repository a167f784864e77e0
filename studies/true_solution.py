"""Is the true dictionary a minimum of the training loss? Compares it with where training ends.

    python -m studies.true_solution --d-model 14

For each seed, an SAE of each kind is trained as `train_toy.py` does it. Then the loss is fixed: its
sparsity weight is the one at the end of training, and each latent is weighted by the expected share
of prefixes that contain it. Four SAEs are scored by this loss on the same held-out samples:

    trained            the SAE at the end of training
    trained, on        the same, after `--n-steps` more steps of Adam on this loss
    truth              decoder rows are the features; encoder and biases have had as many steps
    truth, on          the same, after as many steps of all parameters

If the loss is higher at "truth" than at "trained, on", a better optimiser of this loss will not
find the features. If "truth, on" has lost features, the truth is not even a local minimum. The kind
"tied" is the first part of unhedged training: each encoder column is parallel to its decoder row,
and there are no prefixes.
"""

import dataclasses
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

import train_toy
from matryoshka.command_line import (
    inherited,
    main_guard,
    parse,
    require_positive,
    setting,
    table,
)
from matryoshka.environment import environment, fix_kernels
from matryoshka.files import make_folder, one_writer, write_json
from matryoshka.kinds import config_of
from matryoshka.metrics import best_cosine, clean_features, decoder_cosines, fvu, l0
from matryoshka.prefix_draws import expected_reach
from matryoshka.toy_progress import Progress
from matryoshka.toy_stack import train_stack
from matryoshka.unhedged import along_decoder
from sae import SAE, matryoshka_loss
from toy_model import FeatureTree, ToyData

RESULTS = "true_solution.json"
KINDS: dict[str, dict[str, Any]] = {  # settings of train_toy.py
    "matryoshka": {"saes": ("matryoshka",)},
    "vanilla": {"saes": ("vanilla",)},
    "tied": {"saes": ("vanilla",), "unhedged": 1.0},
}
LR, BATCH_SIZE = 0.003, 1000
DIGITS = {"loss": 4, "fvu": 4, "l0": 2, "clean": 1}  # the scores, with the decimals shown


@dataclasses.dataclass(frozen=True)
class Config:
    """The tree, the seeds, and the numbers of steps."""

    tree: str = inherited(train_toy.Config, "tree")
    d_model: int = inherited(train_toy.Config, "d_model")
    target_l0: float = inherited(train_toy.Config, "target_l0")
    train_steps: int = setting(40_000, "training steps, as train_toy.py takes them")
    n_steps: int = setting(3_000, "steps of Adam on the fixed loss, with 1,000 samples each")
    seeds: int = setting(3, "how many seeds")
    seed: int = setting(0, "the first seed")
    out: str = setting("runs/true_solution", "folder for true_solution.json")


@dataclasses.dataclass(frozen=True)
class Loss:
    """The fixed training loss of one kind of SAE: a function of its parameters alone."""

    reach: Tensor  # float64 [n_latents]: the expected share of prefixes that contain each latent
    price: float  # the sparsity weight, of a_j ||d_j||
    is_tied: bool

    def __call__(self, x: Tensor, params: Sequence[Tensor]) -> Tensor:
        """The loss on scaled x [n, d_model]; params as `parameters` returns, latents in order."""
        W_enc, b_enc, W_dec, b_dec = params
        if self.is_tied:
            W_enc = along_decoder(W_enc.T, W_dec).T
        acts = torch.relu(x @ W_enc + b_enc)
        weights = self.reach - torch.cat([self.reach[1:], self.reach.new_zeros(1)])
        lengths = 1 + weights.nonzero()[:, 0]  # with one prefix, only the full length has weight
        weights = weights[lengths - 1].float()
        return matryoshka_loss(x, acts, W_dec, b_dec, lengths, weights, self.price)


def parameters(sae: SAE) -> list[Tensor]:
    """Copies of W_enc, b_enc, W_dec and b_dec."""
    return [p.detach().clone() for p in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)]


def in_order(sae: SAE, x: Tensor) -> SAE:
    """The SAE with latents sorted by the mean square of what each adds on x [n, d_model]."""
    size = (sae.encode(x) * sae.W_dec.norm(dim=1)).square().mean(0)
    order = size.argsort(descending=True)
    return sae.with_tensors(
        W_enc=sae.W_enc[:, order], b_enc=sae.b_enc[order], W_dec=sae.W_dec[order]
    )


def descended(sae: SAE, loss: Loss, batches: Any, n_steps: int, holds_decoder: bool = False) -> SAE:
    """The SAE after `n_steps` of Adam on `loss`, with a learning rate that falls linearly to 0."""
    params = parameters(sae)
    free = params[:2] + params[3:] if holds_decoder else params
    for param in free:
        param.requires_grad_(True)
    adam = torch.optim.Adam(free, lr=LR)
    falling = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.0, n_steps)
    for _ in range(n_steps):
        adam.zero_grad()
        loss(next(batches)[0] * sae.scale, params).backward()  # type: ignore[no-untyped-call]
        adam.step()
        falling.step()
    W_enc, b_enc, W_dec, b_dec = (param.detach() for param in params)
    if loss.is_tied:
        W_enc = along_decoder(W_enc.T, W_dec).T
    return sae.with_tensors(W_enc=W_enc, b_enc=b_enc, W_dec=W_dec, b_dec=b_dec)


def true_sae(sae: SAE, directions: Tensor, x: Tensor) -> SAE:
    """An SAE in the units of `sae` whose decoder rows are the features, most important first."""
    rows = directions * sae.scale
    order = (x @ normalize(directions).T).square().mean(0).argsort(descending=True)
    rows = rows[order]
    return sae.with_tensors(
        W_enc=(rows / rows.square().sum(1, keepdim=True)).T,
        b_enc=torch.zeros_like(sae.b_enc),
        W_dec=rows,
        b_dec=torch.zeros_like(sae.b_dec),
    )


@torch.no_grad()
def scores(sae: SAE, loss: Loss, x: Tensor, directions: Tensor) -> dict[str, float]:
    """The scores of an SAE on held-out x [n, d_model]."""
    sae = in_order(sae, x)
    acts = sae.encode(x)
    best = best_cosine(decoder_cosines(sae.W_dec, directions))
    return {
        "loss": float(loss(x * sae.scale, parameters(sae))),
        "fvu": float(fvu(x, sae.decode(acts))),
        "l0": float(l0(acts)),
        "clean": int(clean_features(best).sum()),
    }


def points(config: Config, data: ToyData, sae: SAE, loss: Loss, seed: int) -> dict[str, Any]:
    """The scores of the four SAEs named above, by name, from one trained SAE."""
    _, x = data.held_out(seed, 50_000)
    directions = data.directions(seed)
    batches = data.batches([seed], BATCH_SIZE, torch.device("cpu"))
    start = true_sae(sae, directions, x)
    truth = descended(start, loss, batches, config.n_steps, holds_decoder=True)
    saes = {
        "trained": sae,
        "trained, on": descended(in_order(sae, x), loss, batches, config.n_steps),
        "truth": truth,
        "truth, on": descended(in_order(truth, x), loss, batches, config.n_steps),
    }
    return {name: scores(of_point, loss, x, directions) for name, of_point in saes.items()}


def run(config: Config) -> list[dict[str, Any]]:
    """Trains the SAEs and scores the four points of each; returns a dict for each point."""
    require_positive(config, "d_model", "target_l0", "train_steps", "n_steps", "seeds")
    fix_kernels()
    data = ToyData(FeatureTree.from_json(config.tree), config.d_model)
    seeds = range(config.seed, config.seed + config.seeds)
    runs = []
    for kind, settings in KINDS.items():
        of_kind = train_toy.Config(
            tree=config.tree,
            d_model=config.d_model,
            target_l0=config.target_l0,
            n_steps=config.train_steps,
            n_latents=data.tree.n_features,
            **settings,
        )
        progress = Progress(multiprocessing.get_context(), of_kind.saes)
        stack = train_stack(of_kind, data, seeds, progress)
        n_prefixes = config_of(of_kind.saes[0], of_kind).n_prefixes
        reach = expected_reach(of_kind.n_latents, n_prefixes)
        for i, (seed, sae) in enumerate(zip(seeds, stack.saes, strict=True)):
            price = float(stack.curves["sparsity_weight"][-1, i])
            found = points(config, data, sae, Loss(reach, price, of_kind.unhedged > 0), seed)
            runs += [
                {"kind": kind, "seed": seed, "point": point, "price": price, **values}
                for point, values in found.items()
            ]
            print(f"{kind}, seed {seed}: {found}", flush=True)
    return runs


def summary(runs: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A row of the table for each kind and point: means over seeds."""
    rows = []
    for kind, point in dict.fromkeys((run["kind"], run["point"]) for run in runs):
        of_row = [run for run in runs if (run["kind"], run["point"]) == (kind, point)]
        mean = {name: sum(run[name] for run in of_row) / len(of_row) for name in DIGITS}
        rows.append([f"{kind}, {point}", *(f"{mean[name]:.{n}f}" for name, n in DIGITS.items())])
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    with main_guard():
        config = parse(Config, __doc__ or "", argv)
        out = Path(config.out)
        make_folder(out)
        with one_writer(out):
            runs = run(config)
            results = {"config": dataclasses.asdict(config), "runs": runs}
            results["environment"] = environment(torch.device("cpu"))
            write_json(out / RESULTS, results)
        print(table(["", "loss", "FVU", "L0", "clean > 0.9"], summary(runs)))


if __name__ == "__main__":
    main()
