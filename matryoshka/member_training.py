"""The training of one SAE among several that take the same batches."""

import json
import math
from typing import Any

import torch
from torch import Tensor

from matryoshka.members import Member
from matryoshka.metrics import fvu
from matryoshka.trainer import Trainer
from matryoshka.training_report import DEAD_AFTER
from sae import SAE, WITH_K


def untrained(member: Member, d_model: int) -> SAE:
    """The SAE of `member` before its first step."""
    config = member.config
    k = config.target_l0 if config.activation in WITH_K else None
    return SAE(d_model, config.n_latents, config.seed, config.activation, k)


class MemberTraining:
    """The state of the training of one SAE. It has a trainer of its own, since the SAEs of a
    training may be of any size and kind. So it ends with the weights it would have alone."""

    SAVED_TENSORS = ("silent", "l0_sum", "final_l0_sum")  # in a checkpoint, beside the trainer's

    def __init__(self, member: Member, d_model: int, device: torch.device):
        """Raises `UserError` where products in bfloat16 are impossible with this d_model."""
        config = member.config
        config.require_eights("the activations' number of dimensions", d_model)
        self.member, self.config, self.name = member, config, member.name
        self.trainer = Trainer([untrained(member, d_model).to(device)], config, [config.seed])
        # activations seen since each latent last fired: [n_latents]
        self.silent = torch.zeros(config.n_latents, device=device)
        # sums of the steps' L0 since the last record, and over the last 5% of the steps: [] each
        self.l0_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.final_l0_sum = torch.zeros_like(self.l0_sum)
        self.dropped = ""  # if it has diverged, the message that says so
        self.last_good: dict[str, Any] = {}  # its last record before it diverged

    @property
    def n_final(self) -> int:
        """How many steps the final L0 is averaged over: the last 5%."""
        return max(1, self.config.n_steps // 20)

    def step(self, x: Tensor) -> None:
        """One step on x [batch, d_model]. Raises `ValueError` as `Trainer.step`."""
        metrics = self.trainer.step(x)  # for a stack of one SAE: the first dimension is 1
        self.silent.add_(len(x)).mul_(metrics["mean_square"][0] == 0)
        self.l0_sum += metrics["l0"][0]
        if self.trainer.n_steps_done > self.config.n_steps - self.n_final:
            self.final_l0_sum += metrics["l0"][0]
        self._weight = metrics["sparsity_weight"][0]

    @torch.no_grad()
    def record(
        self, x: Tensor, record_every: int, validation: Tensor | None = None
    ) -> dict[str, Any]:
        """A line of metrics.jsonl: loss and FVU on the batch x [batch, d_model], mean L0 since the
        last record, and FVU and L0 on `validation` [n, d_model] if it is given."""
        n_averaged = (self.trainer.n_steps_done - 1) % record_every + 1
        (sae,) = self.trainer.saes
        record = {
            "step": self.trainer.n_steps_done,
            "sae": self.name,
            "loss": float(self.trainer.loss(x)[0]),
            "fvu": float(fvu(x, sae(x))),
            "l0": float(self.l0_sum) / n_averaged,
            "dead_share": self.dead_share(),
            "sparsity_weight": float(self._weight),
        }
        self.l0_sum.zero_()
        if validation is not None:
            acts = sae.encode(validation)
            record["validation_fvu"] = float(fvu(validation, sae.decode(acts)))
            record["validation_l0"] = float((acts > 0).sum() / len(acts))
        return record

    def dead_share(self) -> float | None:
        """The share of latents that did not fire on any of the last DEAD_AFTER activations, or None
        while there were fewer."""
        if self.trainer.n_steps_done * self.config.batch_size < DEAD_AFTER:
            return None
        return float((self.silent >= DEAD_AFTER).double().mean())

    def diverged(self, record: dict[str, Any], x: Tensor) -> str:
        """If the SAE has diverged by `record`, on the batch x [batch, d_model], a message that
        says so; otherwise ""."""
        if math.isfinite(record["fvu"]):
            return ""
        last = f"last good: {json.dumps(self.last_good) if self.last_good else 'none'}"
        step = record["step"]
        if (x == x[0]).all():
            return (
                f"step {step}: the batch's activations are all the same, so that there is nothing "
                f"to explain; {last}. Try a larger --batch-size"
            )
        return (
            f"step {step}: the {self.name} SAE has an FVU of {record['fvu']}; {last}. "
            "Try a lower --lr"
        )

    def state_dict(self) -> dict[str, Tensor]:
        """All that an exact resume needs; each tensor's name begins with the SAE's name."""
        state = self.trainer.state_dict() | {
            f"of.{name}": getattr(self, name) for name in self.SAVED_TENSORS
        }
        return {f"{self.name}/{name}": tensor for name, tensor in state.items()}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Continues from the tensors of a checkpoint. Raises `KeyError`, `ValueError` or
        `RuntimeError` where they are of another run."""
        prefix = f"{self.name}/"
        state = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.trainer.load_state_dict(state)
        for name in self.SAVED_TENSORS:
            getattr(self, name).copy_(state[f"of.{name}"])
        if not 0 <= self.trainer.n_steps_done <= self.config.n_steps:
            raise ValueError(f"it is of step {self.trainer.n_steps_done}")
