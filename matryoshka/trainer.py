"""The trainer: a step of Adam on the Matryoshka loss, for several SAEs at once."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam

from matryoshka.controls import InputScale, Schedule, SparsityController
from matryoshka.cuda_graph import CudaGraph
from matryoshka.dead_latents import Auxiliary, add_auxiliary_gradient, resample
from matryoshka.errors import UserError
from matryoshka.kernels import Objective, Params, Workspace, all_pairs, write_gradient
from matryoshka.kernels.autograd import loss_of
from matryoshka.kernels.dispatch import MAX_REACHES_OF_BY_PREFIX
from matryoshka.kernels.layout import Stats
from matryoshka.prefix_draws import STEPS_A_BLOCK, PrefixDraws, PrefixRule, StepPrefixes
from matryoshka.restart import restart_last
from matryoshka.trainer_config import TrainerConfig, shared_settings
from matryoshka.unhedged import tie
from sae import ACTIVATIONS, OF_K, SAE, Gate, seeded_generator


class Due(NamedTuple):
    """What a step is due for."""

    restart_last: bool  # the latent that comes last may start anew
    restart_dead: bool  # so may all that have been silent for long
    tied: bool  # the step is of the whole SAE with its encoder tied; see unhedged.py


MIN_THRESHOLD = 1e-6  # of jumprelu, for its logarithm is what is trained
STREAM_RESAMPLE = 20  # random numbers of a seed: which samples dead latents start from


class Trainer:
    """Trains independent SAEs of one shape, stepped together.

    Each has its own seed, prefixes, sparsity weight, latent order and gradient clipping, and ends
    where it would have ended alone, to float tolerance.

    Latents are never moved. Their order, by the running mean square of a_j ||d_j||, decides the
    reach of each, and that is all it does; so Adam's moments and the running means stay with their
    latents. `saes` hands out copies whose latents are in order.
    """

    def __init__(
        self,
        saes: Sequence[SAE],
        configs: TrainerConfig | Sequence[TrainerConfig],
        seeds: Sequence[int],
    ):
        """`configs`: one for all, or one an SAE, which may differ in n_prefixes, widths and
        width_weights; `seeds`: one an SAE, of the prefixes that it draws.

        Raises ValueError where their numbers, the SAEs' shapes, activations or devices, or the
        configs' other settings differ, or where a setting is impossible for SAEs of that size.
        """
        configs = [configs] * len(saes) if isinstance(configs, TrainerConfig) else list(configs)
        _check_stack(saes, configs, seeds)
        self.configs, self.seeds, self.n_steps_done = configs, list(seeds), 0
        self.config = shared_settings(configs)
        self.activation, self._about = saes[0].activation, [sae.about for sae in saes]
        self.d_model, self.n_latents = saes[0].d_model, saes[0].n_latents
        flat = torch.stack([_flattened(sae) for sae in saes])  # [n_saes, n_params]
        self._input_scale = InputScale(self.d_model, flat)
        self._controller = SparsityController(self.config, flat, self.activation not in OF_K)
        self._state = {
            "params": flat,
            "adam_mean": torch.zeros_like(flat),
            "adam_square": torch.zeros_like(flat),
            "adam_step": torch.zeros((), device=flat.device),
            "mean_square": flat.new_zeros(len(saes), self.n_latents),
            **self._input_scale.state,
            **self._controller.state,
        }
        if self.activation == "batchtopk":  # the running mean of the least a_j ||d_j|| let through
            self._state["least"] = flat.new_zeros(len(saes))
        if self.config.watches_silence:  # activations since each latent last fired
            self._state["silent"] = flat.new_zeros(len(saes), self.n_latents)
        self._flat_grads = torch.zeros_like(flat)
        # views of these two, into which whatever is written to them is written
        self._params = Params.of(flat, self.d_model, self.n_latents)
        self._grads = Params.of(self._flat_grads, self.d_model, self.n_latents)
        self._workspace = Workspace()
        self._graphs: dict[tuple[object, ...], CudaGraph] = {}
        self._block_numbers: tuple[int, Tensor] | None = None
        self.kernels: tuple[str, ...] = ()  # an SAE each: which computed the last gradient
        self._prefixes = PrefixDraws(
            self.n_latents,
            [self._rule(*of_sae) for of_sae in zip(configs, seeds, strict=True)],
            flat,
            flat.device if self._is_replayed else torch.device("cpu"),
        )
        # Of each SAE, whether its latents keep their places; and those places. An unhedged one has
        # found its features before there are prefixes: then these take what is worth most.
        unhedged = self.config.unhedged > 0
        self._keeps_places = [bool(rule.widths) and not unhedged for rule in self._prefixes.rules]
        self._is_fixed = torch.tensor(self._keeps_places, device=flat.device)[:, None]
        self._places = torch.arange(self.n_latents, device=flat.device).expand(len(saes), -1)

    @torch.inference_mode()
    def step(self, x: Tensor) -> dict[str, Tensor]:
        """One step of Adam on x, [batch, d_model] for all SAEs or [n_saes, batch, d_model].

        Returns tensors on x's device, before the step: l0 [n_saes], sparsity_weight [n_saes],
        grad_norm [n_saes] (before clipping), mean_square [n_saes, n_latents] of a_j ||d_j||.
        Raises ValueError where x is of another shape, holds values that are not finite (on a CPU;
        a GPU would have to be waited for), or where batch is not a multiple of 8 for products in
        bfloat16.
        """
        x, step = self._checked(x), self.n_steps_done
        next_in_warmup = step + 1 < self.config.n_warmup_steps
        due, prefixes = self._due(step), self._prefixes_of(step)
        if self._is_replayed:
            metrics = self._replay(x, prefixes, next_in_warmup, due)
        else:
            metrics = self._step(x, prefixes, self._schedule(step), next_in_warmup, due)
        self.n_steps_done += 1
        return metrics

    def _step(
        self,
        x: Tensor,
        prefixes: StepPrefixes,
        schedule: Schedule,
        next_in_warmup: bool,
        due: Due,
    ) -> dict[str, Tensor]:
        """One step, without counting it; what changes from step to step comes as tensors, so that
        a GPU can replay it. next_in_warmup: whether the next step is in the warm-up."""
        config = self.config
        x = self._input_scale.scale(x, schedule.norm_share)  # [n_saes, batch, d_model]
        objective = self._objective(x, prefixes)
        stats = write_gradient(
            self._grads,
            self._params,
            objective,
            config.gradient,
            config.matmul_dtype,
            self._workspace,
        )
        self.kernels = stats.kernels
        self._follow_threshold(stats, schedule)
        self._follow_silence(objective, stats)
        self._add_auxiliary(objective, stats)
        grad_norm = torch.linalg.vector_norm(self._flat_grads, dim=1, keepdim=True)
        self._flat_grads.mul_((config.max_grad_norm / (grad_norm + 1e-6)).clamp_(max=1))
        self._adam(schedule.lr)
        if due.tied:
            tie(self._params)

        self._state["mean_square"].lerp_(stats.mean_square, 1 - config.order_decay)
        self._restart(objective, due)
        weight = self._controller.weight.clone()
        self._controller.update(stats.l0, next_in_warmup, schedule.next_weight)
        return {
            "l0": stats.l0,
            "sparsity_weight": weight,
            "grad_norm": grad_norm[:, 0],
            "mean_square": stats.mean_square,
        }

    def _due(self, step: int) -> Due:
        config = self.config
        return Due(config.restarts_at(step), config.resamples_at(step), config.is_tied_at(step))

    def _prefixes_of(self, step: int) -> StepPrefixes:
        prefixes = self._prefixes
        return prefixes.whole if self.config.is_tied_at(step) else prefixes.of(step)

    def _objective(self, x: Tensor, prefixes: StepPrefixes) -> Objective:
        """What the step asks for on the scaled x: the reach of a place goes to its latent."""
        reach = torch.empty_like(prefixes.reach).scatter_(1, self.order(), prefixes.reach)
        price = self._controller.weight[:, None] * reach
        config, activation = self.config, self.activation
        sparsity = "l0" if activation == "jumprelu" else config.sparsity
        # the paper's inputs have a mean square norm of 1, and these of d_model
        bandwidth = config.bandwidth * math.sqrt(self.d_model)
        k, unhedged = config.target_l0, config.unhedged > 0
        return Objective(
            x, reach, price, prefixes.ends, sparsity, activation, k, bandwidth, unhedged
        )

    def _rule(self, config: TrainerConfig, seed: int) -> PrefixRule:
        widths = config.widths_of(self.n_latents)
        expected = config.prefixes == "expected"
        return PrefixRule(config.n_prefixes, seed, expected, widths, config.width_weights)

    def _follow_threshold(self, stats: Stats, schedule: Schedule) -> None:
        """The running mean of the least that batchtopk let through: its threshold, once trained."""
        if stats.least is not None:
            least = stats.least.nan_to_num(posinf=0.0)
            self._state["least"].lerp_(least, schedule.norm_share)

    def _follow_silence(self, objective: Objective, stats: Stats) -> None:
        """For how many activations each latent has been silent."""
        if self.config.watches_silence:
            silent = self._state["silent"]
            silent.add_(objective.x.shape[1]).mul_(stats.mean_square == 0)

    def _add_auxiliary(self, objective: Objective, stats: Stats) -> None:
        """Adds the gradient of the dead latents' loss to that of the loss."""
        config = self.config
        if config.auxiliary != "none":
            how = Auxiliary(config.auxiliary_weight, config.auxiliary == "level")
            dead = self._state["silent"] >= config.dead_after
            add_auxiliary_gradient(self._grads, self._params, objective, dead, how, stats.acts)

    def _restart(self, objective: Objective, due: Due) -> None:
        """Gives the last latent, and dead ones, a new start where this step is due for it."""
        state = self._state
        if due.restart_last:
            restart_last(state, self._params, self.order()[:, -1:], objective)
        if due.restart_dead:
            step = self.n_steps_done
            generators = [seeded_generator(seed, STREAM_RESAMPLE, step) for seed in self.seeds]
            which = state["silent"] >= self.config.dead_after
            resample(state, self._params, objective, which, generators)

    def _adam(self, lr: float | Tensor) -> None:
        """Adam on all parameters of all SAEs: one tensor, of which self._params are views, W_dec
        among them."""
        state, (beta1, beta2) = self._state, self.config.betas
        adam(
            [state["params"]],
            [self._flat_grads],
            [state["adam_mean"]],
            [state["adam_square"]],
            [],
            [state["adam_step"]],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    @torch.inference_mode()
    def loss(self, x: Tensor) -> Tensor:
        """The loss that the next step would descend, on x as `step` takes it: [n_saes]."""
        x, step = self._checked(x), self.n_steps_done
        mean_norm = self._input_scale.mean_with(x, self._schedule(step).norm_share)
        objective = self._objective(
            self._input_scale.scaled_by(mean_norm, x), self._prefixes_of(step)
        )
        losses = []
        for i, one in enumerate(objective.x):
            if len(objective.ends_of(i)) > MAX_REACHES_OF_BY_PREFIX:  # the exact mean's
                losses.append(all_pairs.loss_of(self._params.one(i), one, i, objective))
            else:
                losses.append(loss_of(self._params.one(i), one, i, objective)[0])
        return torch.stack(losses)

    def order(self) -> Tensor:
        """Which latent is in each place: [n_saes, n_latents], largest running mean square first;
        where widths are fixed, latents keep their places."""
        if all(self._keeps_places):
            return self._places
        order = self._state["mean_square"].sort(dim=1, descending=True, stable=True).indices
        if any(self._keeps_places):
            order = torch.where(self._is_fixed, self._places, order)
        return order

    @property
    def saes(self) -> list[SAE]:
        """Copies of the SAEs as they stand, their latents in order: largest mean square first, or,
        where widths are fixed, in their places."""
        mean_norm = self._state["mean_norm"]
        mean_norm = torch.where(mean_norm > 0, mean_norm, 1.0)  # 0: of no inputs yet but zeros
        saes = []
        for i, order in enumerate(self.order()):
            one = self._params.one(i)
            tensors = {
                "W_enc": one.W_enc[order].T,
                "b_enc": one.b_enc[0, order],
                "W_dec": one.W_dec[order],
                "b_dec": one.b_dec[0],
                "mean_norm": mean_norm[i],
            }
            if self.activation == "jumprelu":
                tensors["threshold"] = one.log_threshold[0, order].exp()
            elif self.activation == "batchtopk" and self.n_steps_done:
                norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-30)
                tensors["threshold"] = self._state["least"][i] / norms
            k = self.config.target_l0 if self.activation in OF_K else None
            saes.append(SAE.from_tensors(tensors, self.activation, self._about[i], k))
        return saes

    def state_dict(self) -> dict[str, Tensor]:
        """All that an exact resume needs, copied: tensors only, so it saves as safetensors."""
        state = {name: tensor.clone() for name, tensor in self._state.items()}
        return state | {"n_steps_done": torch.tensor(self.n_steps_done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ValueError, and changes nothing, where `state` is of another shape of trainer."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        for name, shape in (wanted | {"n_steps_done": ()}).items():
            if name not in state or tuple(state[name].shape) != shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"trainer state {name}: {shape} wanted, {found} found")
        for name, tensor in self._state.items():
            tensor.copy_(state[name])
        self.n_steps_done = int(state["n_steps_done"])

    def __reduce__(self) -> tuple[object, ...]:
        """For pickle and copy: made anew from its state, for views would come back as copies."""
        return _remade, (type(self), self.saes, self.configs, self.seeds, self.state_dict())

    def _checked(self, x: Tensor) -> Tensor:
        """x as [n_saes, batch, d_model] in the parameters' dtype; see `step`."""
        n_saes, dtype = len(self.seeds), self._flat_grads.dtype
        shapes = ([self.d_model], [n_saes, self.d_model])
        if x.dim() not in (2, 3) or [*x.shape[:-2], x.shape[-1]] != shapes[x.dim() - 2]:
            raise ValueError(
                f"x must be [batch, {self.d_model}] or [{n_saes}, batch, {self.d_model}], got "
                f"{list(x.shape)}"
            )
        if x.shape[-2] == 0:
            raise ValueError("x must hold at least one sample, got a batch of 0")
        self.config.require_eights("the batch", x.shape[-2])
        x = x.to(dtype)
        if x.device.type == "cpu" and not math.isfinite(float(torch.linalg.vector_norm(x))):
            raise ValueError(
                f"step {self.n_steps_done}: x holds values that are not finite, or whose squares "
                f"are not in {dtype}"
            )
        return x.expand(n_saes, -1, -1)

    def _schedule(self, step: int) -> Schedule:
        return Schedule.of(self.config, step)

    def _numbers(self, step: int) -> Tensor:
        """`_schedule` as a tensor on the device, where a block of steps is copied at once."""
        block, row = divmod(step, STEPS_A_BLOCK)
        if self._block_numbers is None or self._block_numbers[0] != block:
            steps = range(block * STEPS_A_BLOCK, (block + 1) * STEPS_A_BLOCK)
            numbers = torch.tensor([self._schedule(t) for t in steps])
            self._block_numbers = block, numbers.to(self._flat_grads.device)
        return self._block_numbers[1][row]

    @property
    def _is_replayed(self) -> bool:
        """Whether a step can be one CUDA graph: in bfloat16, on compute capability 9 or 10.

        Those are H100, H200 and B200. Elsewhere PyTorch's grouped product reads where its blocks
        end back to the host.
        """
        of_bfloat16 = self.config.matmul_dtype == "bfloat16" and self.config.gradient != "autograd"
        if not self._flat_grads.is_cuda or not of_bfloat16 or torch.version.hip:
            return False
        if self.config.watches_silence:  # which latents are dead is read back to the host
            return False
        return torch.cuda.get_device_capability(self._flat_grads.device)[0] in (9, 10)

    def _replay(
        self,
        x: Tensor,
        prefixes: StepPrefixes,
        next_in_warmup: bool,
        due: Due,
    ) -> dict[str, Tensor]:
        """`_step`, of which there is one graph for each shape of x and phase of training."""

        def step(x: Tensor, reach: Tensor, numbers: Tensor, *ends: Tensor) -> dict[str, Tensor]:
            schedule = Schedule(*numbers.unbind())
            return self._step(x, StepPrefixes(reach, ends), schedule, next_in_warmup, due)

        inputs = [x, prefixes.reach, self._numbers(self.n_steps_done), *prefixes.ends]
        key = (x.shape, next_in_warmup, due)
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(inputs)
        return self._graphs[key](step, inputs)


def _check_stack(
    saes: Sequence[SAE], configs: Sequence[TrainerConfig], seeds: Sequence[int]
) -> None:
    """Raises ValueError unless these can be stepped together."""
    if not len(saes) == len(configs) == len(seeds) > 0:
        raise ValueError(
            f"{len(saes)} SAEs, {len(configs)} configs and {len(seeds)} seeds: must be as many"
        )
    first = saes[0]
    for sae in saes:
        for name in ("d_model", "n_latents", "activation"):
            if getattr(sae, name) != getattr(first, name):
                raise ValueError(f"SAEs that are stepped together must have the same {name}")
        if sae.W_enc.device != first.W_enc.device:
            raise ValueError("SAEs that are stepped together must be on the same device")
    if any(config.gradient != "autograd" for config in configs):
        _require_slopes(first.activation)
    for sae, config in zip(saes, configs, strict=True):
        if sae.k is not None and sae.k != config.target_l0:
            raise ValueError(
                f"an SAE of k = {sae.k:g} must have that as target_l0, not {config.target_l0:g}"
            )
        if sae.activation == "relu" and config.auxiliary != "none":
            raise UserError(
                "--auxiliary does nothing for relu: a latent that is silent has no activation to "
                "explain anything with; use --resample-every"
            )
    for config in configs:
        config.check(first.n_latents)
        config.require_eights("d_model", first.d_model)


@torch.inference_mode(False)
def _require_slopes(activation: str) -> None:
    """Raises ValueError where the kernels' gradients would be wrong for an activation function.

    They take its slope to be 1 where it is not 0, and 0 where it is.
    """
    preacts = torch.linspace(-4, 4, 257, dtype=torch.float64, requires_grad=True)
    gate = Gate(torch.ones(1), 100, 0.5 * torch.ones(1) if activation == "jumprelu" else None)
    with torch.enable_grad():
        acts = ACTIVATIONS[activation](preacts[None] * 1.0, gate)[0]
        (slopes,) = torch.autograd.grad(acts.sum(), preacts)
    if not torch.equal(slopes, (acts != 0).to(slopes.dtype)):
        raise ValueError(f'the slope of {activation} is not 0 or 1: train with gradient="autograd"')


def _flattened(sae: SAE) -> Tensor:
    """An SAE's parameters in one row, W_enc a row a latent; half precisions become float32."""
    parts: list[Tensor] = [sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec]
    if sae.activation == "jumprelu" and sae.threshold is not None:
        parts.append(sae.threshold.clamp_min(MIN_THRESHOLD).log())
    flat = torch.cat([part.detach().flatten() for part in parts])
    return flat if flat.dtype == torch.float64 else flat.float()


def _remade(
    kind: type[Trainer],
    saes: Sequence[SAE],
    configs: Sequence[TrainerConfig],
    seeds: Sequence[int],
    state: Mapping[str, Tensor],
) -> Trainer:
    trainer = kind(saes, configs, seeds)
    trainer.load_state_dict(state)
    return trainer
