"""The trainer: a step of Adam on the Matryoshka loss, for several SAEs at once."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from matryoshka.controls import InputScale, LatentOrder, Phase, Schedule, SparsityController
from matryoshka.cuda_graph import CudaGraph
from matryoshka.dead_latents import Auxiliary, add_auxiliary_gradient, resample
from matryoshka.kernels import Objective, Params, Workspace, losses, write_gradient
from matryoshka.kernels.layout import Stats
from matryoshka.prefix_draws import STEPS_A_BLOCK, PrefixDraws, PrefixRule, StepPrefixes
from matryoshka.restart import restart_last
from matryoshka.stacked_saes import check_stack, flattened, in_order
from matryoshka.trainer_config import TrainerConfig, shared_settings
from matryoshka.unhedged import tie
from sae import SAE, WITH_K, seeded_generator

THRESHOLD_RATE = 10  # learning rate of jumprelu's log thresholds, as a multiple of --lr
STREAM_RESAMPLE = 20  # a seed's random numbers that choose the samples dead latents start from


class Trainer:
    """Trains independent SAEs of one shape, stepped together.

    Each SAE has its own seed, prefixes, sparsity weight, latent order and gradient clipping. It
    ends where it would have ended alone, to float tolerance.

    Latents are never moved. They are ordered by the running mean square of a_j ||d_j||, and this
    order only decides which prefixes contain a latent: its reach. So Adam's moments and the running
    means stay with their latents. `saes` returns copies whose latents are in order.
    """

    def __init__(
        self,
        saes: Sequence[SAE],
        configs: TrainerConfig | Sequence[TrainerConfig],
        seeds: Sequence[int],
    ):
        """`configs`: one for all SAEs, or one for each; these may differ in n_prefixes, widths and
        width_weights alone. `seeds`: one for each SAE, from which its prefixes are drawn.

        Raises ValueError where there are not as many configs and seeds as SAEs, where the SAEs'
        shapes, activations or devices or the configs' other settings differ, or where a setting is
        impossible for SAEs of that size.
        """
        configs = [configs] * len(saes) if isinstance(configs, TrainerConfig) else list(configs)
        check_stack(saes, configs, seeds)
        self.configs, self.seeds, self.n_steps_done = configs, list(seeds), 0
        self.config = shared_settings(configs)
        self.activation, self._about = saes[0].activation, [sae.about for sae in saes]
        self.d_model, self.n_latents = saes[0].d_model, saes[0].n_latents
        flat = torch.stack([flattened(sae) for sae in saes])  # [n_saes, n_params]
        self._input_scale = InputScale(self.d_model, flat)
        self._controller = SparsityController(self.config, flat, self.activation not in WITH_K)
        self._latent_order = LatentOrder(configs, self.n_latents, flat)
        self._state = {  # updated in place, and saved in checkpoints
            "params": flat,
            "adam_mean": torch.zeros_like(flat),
            "adam_square": torch.zeros_like(flat),
            "adam_step": torch.zeros((), device=flat.device),
            **self._latent_order.state,
            **self._input_scale.state,
            **self._controller.state,
        }
        if self.activation == "batchtopk":  # running mean of the smallest a_j ||d_j|| it kept
            self._state["least"] = flat.new_zeros(len(saes))
        if self.config.tracks_silence:  # activations seen since each latent last fired
            self._state["silent"] = flat.new_zeros(len(saes), self.n_latents)
        self._flat_grads = torch.zeros_like(flat)
        # W_enc, W_dec and so on as views: writing into a view writes into its flat tensor
        self._params = Params.of(flat, self.d_model, self.n_latents)
        self._grads = Params.of(self._flat_grads, self.d_model, self.n_latents)
        self._workspace = Workspace()
        self._graphs: dict[tuple[object, ...], CudaGraph] = {}
        self._block_schedule: tuple[int, Tensor] | None = None
        self.kernels: tuple[str, ...] = ()  # for each SAE, which kernel wrote its last gradient
        rules = [
            PrefixRule.of(config, seed, self.n_latents)
            for config, seed in zip(configs, seeds, strict=True)
        ]
        ends_on = flat.device if self._is_replayed else torch.device("cpu")
        self._prefixes = PrefixDraws(self.n_latents, rules, flat, ends_on)

    @torch.inference_mode()
    def step(self, x: Tensor) -> dict[str, Tensor]:
        """One step of Adam on x, [batch, d_model] for all SAEs or [n_saes, batch, d_model].

        Returns tensors on x's device that describe the SAEs before the step: l0 [n_saes],
        sparsity_weight [n_saes], grad_norm [n_saes] (before clipping), and mean_square
        [n_saes, n_latents] of a_j ||d_j||. Raises ValueError where x has another shape, where batch
        is not a multiple of 8 for products in bfloat16, or where x holds values that are not finite
        (checked on a CPU only, since reading them from a GPU would make it wait).
        """
        x, step = self._checked(x), self.n_steps_done  # x [n_saes, batch, d_model]
        prefixes, phase = self._prefixes_of(step), Phase.of(self.config, step)
        if self._is_replayed:
            metrics = self._replay(x, prefixes, phase)
        else:
            metrics = self._step(x, prefixes, self._schedule(step), phase)
        self.n_steps_done += 1
        return metrics

    def _step(
        self, x: Tensor, prefixes: StepPrefixes, schedule: Schedule, phase: Phase
    ) -> dict[str, Tensor]:
        """One step, which `step` counts. Whatever changes between two steps of the same phase is in
        the other arguments, so that a GPU can replay a recorded step on other tensors."""
        config = self.config
        mean_norm = self._input_scale.update(x, schedule.batch_share)
        x = self._input_scale.scaled_by(mean_norm, x)  # [n_saes, batch, d_model]
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
        self._track_threshold(stats, schedule.batch_share)
        self._track_silence(stats, x.shape[1])
        self._add_auxiliary(objective, stats)
        grad_norm = self._clip()
        self._adam(schedule.lr)
        if phase.is_tied:
            tie(self._params)

        self._latent_order.update(stats.mean_square, config.order_decay)
        self._restart(objective, phase)
        weight = self._controller.weight.clone()  # this step's; `update` overwrites it
        self._controller.update(stats.l0, phase.next_is_in_warmup, schedule.next_warmup_weight)
        return {
            "l0": stats.l0,
            "sparsity_weight": weight,
            "grad_norm": grad_norm,
            "mean_square": stats.mean_square,
        }

    def _schedule(self, step: int) -> Schedule:
        """The scheduled values of step `step`; studies/ablate_toy.py overrides this."""
        return Schedule.of(self.config, step)

    def _prefixes_of(self, step: int) -> StepPrefixes:
        """The prefixes of step `step`; while the encoder is tied, the only one is all latents."""
        prefixes = self._prefixes
        return prefixes.all_latents if self.config.is_tied_at(step) else prefixes.of(step)

    def _objective(self, x: Tensor, prefixes: StepPrefixes) -> Objective:
        """The loss of this step, on the scaled x [n_saes, batch, d_model]."""
        # `prefixes` has the reach of each place: give it to the latent that is in that place
        reach = torch.empty_like(prefixes.reach).scatter_(1, self.order(), prefixes.reach)
        price = self._controller.weight[:, None] * reach  # [n_saes, n_latents], as reach
        config, is_jumprelu = self.config, self.activation == "jumprelu"
        return Objective(
            x=x,
            reach=reach,
            price=price,
            ends=prefixes.ends,
            sparsity="l0" if is_jumprelu else config.sparsity,
            activation=self.activation,
            k=config.target_l0,
            # --bandwidth is for inputs of mean square norm 1, and that of x is about d_model
            bandwidth=config.bandwidth * math.sqrt(self.d_model),
            unhedged=config.unhedged > 0,  # no change while tied, when all reaches are 1
        )

    def _track_threshold(self, stats: Stats, share: float | Tensor) -> None:
        """Updates the running mean of the smallest a_j ||d_j|| that batchtopk kept. `saes` turns it
        into the threshold of the trained SAE."""
        if stats.least_kept is not None:
            least_kept = stats.least_kept.nan_to_num(posinf=0.0)  # infinite where none was active
            self._state["least"].lerp_(least_kept, share)

    def _track_silence(self, stats: Stats, batch: int) -> None:
        """Counts for how many activations each latent has not fired."""
        if self.config.tracks_silence:
            silent = self._state["silent"]
            silent.add_(batch).mul_(stats.mean_square == 0)

    def _add_auxiliary(self, objective: Objective, stats: Stats) -> None:
        """Adds the gradient of the auxiliary loss, which dead latents learn from."""
        config = self.config
        if config.auxiliary != "none":
            auxiliary = Auxiliary(config.auxiliary_weight, config.auxiliary == "level")
            dead = self._state["silent"] >= config.dead_after  # [n_saes, n_latents]
            add_auxiliary_gradient(
                self._grads, self._params, objective, dead, auxiliary, stats.acts
            )

    def _clip(self) -> Tensor:
        """Clips each SAE's gradient to max_grad_norm. Returns the norms before that: [n_saes]."""
        norm: Tensor = torch.linalg.vector_norm(self._flat_grads, dim=1)
        factor = (self.config.max_grad_norm / (norm + 1e-6)).clamp_(max=1)
        self._flat_grads.mul_(factor[:, None])
        return norm

    def _restart(self, objective: Objective, phase: Phase) -> None:
        """Restarts the last latent and resamples dead ones, in the steps in which `phase` may."""
        state = self._state
        if phase.may_restart_last:
            restart_last(state, self._params, self.order()[:, -1:], objective)
        if phase.may_resample_dead:
            step = self.n_steps_done
            generators = [seeded_generator(seed, STREAM_RESAMPLE, step) for seed in self.seeds]
            dead = state["silent"] >= self.config.dead_after  # [n_saes, n_latents]
            resample(state, self._params, objective, dead, generators)

    def _adam(self, lr: float | Tensor) -> None:
        """Updates every parameter of every SAE, W_dec among them: self._params are views of the one
        tensor that Adam steps.

        The log thresholds of jumprelu take THRESHOLD_RATE times the others' step. Adam moves a
        parameter by about lr a step, however large its gradient, and a threshold may have to grow a
        thousandfold: at the others' rate L0 would reach its target too late.
        """
        state, (beta1, beta2) = self._state, self.config.betas
        thresholds = self._params.log_threshold  # empty unless the SAEs are jumprelu's
        before = thresholds.clone()
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
        if thresholds.numel():  # extrapolates to before + THRESHOLD_RATE * (thresholds - before)
            thresholds.lerp_(before, 1 - THRESHOLD_RATE)

    @torch.inference_mode()
    def loss(self, x: Tensor) -> Tensor:
        """The loss whose gradient the next step would take, on x as `step` takes it: [n_saes]."""
        x, step = self._checked(x), self.n_steps_done
        mean_norm = self._input_scale.mean_with(x, self._schedule(step).batch_share)
        x = self._input_scale.scaled_by(mean_norm, x)
        return losses(self._params, self._objective(x, self._prefixes_of(step)))

    def order(self) -> Tensor:
        """The index of the latent in each place: int64 [n_saes, n_latents]; see `LatentOrder`."""
        return self._latent_order.latents()

    @property
    def saes(self) -> list[SAE]:
        """Copies of the SAEs as they are now, with their latents in order; see `LatentOrder`."""
        mean_norm = self._state["mean_norm"]
        mean_norm = torch.where(mean_norm > 0, mean_norm, 1.0)  # 0 if all inputs were 0
        saes = []
        for i, order in enumerate(self.order()):
            tensors = {**in_order(self._params.one(i), order), "mean_norm": mean_norm[i]}
            if self.activation == "batchtopk" and self.n_steps_done:
                norms = tensors["W_dec"].norm(dim=1).clamp_min(1e-30)
                tensors["threshold"] = self._state["least"][i] / norms
            k = self.config.target_l0 if self.activation in WITH_K else None
            saes.append(SAE.from_tensors(tensors, self.activation, self._about[i], k))
        return saes

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all that an exact resume needs, in tensors, so that safetensors can hold it."""
        state = {name: tensor.clone() for name, tensor in self._state.items()}
        return state | {"n_steps_done": torch.tensor(self.n_steps_done)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continues from a `state_dict`. Raises ValueError, and changes nothing, where a tensor is
        missing or has another shape."""
        wanted = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        for name, shape in (wanted | {"n_steps_done": ()}).items():
            if name not in state or tuple(state[name].shape) != shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(f"trainer state {name}: {shape} wanted, {found} found")
        for name, tensor in self._state.items():
            tensor.copy_(state[name])
        self.n_steps_done = int(state["n_steps_done"])

    def __reduce__(self) -> tuple[object, ...]:
        """How pickle and copy make this trainer again: from its state, since views of one tensor
        would come back as separate copies."""
        return _remade, (type(self), self.saes, self.configs, self.seeds, self.state_dict())

    def _checked(self, x: Tensor) -> Tensor:
        """x as [n_saes, batch, d_model] in the parameters' dtype. Raises as `step` says."""
        n_saes, dtype = len(self.seeds), self._flat_grads.dtype
        expected = [self.d_model] if x.dim() == 2 else [n_saes, self.d_model]  # around the batch
        if x.dim() not in (2, 3) or [*x.shape[:-2], x.shape[-1]] != expected:
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

    def _schedule_on_device(self, step: int) -> Tensor:
        """`_schedule` as a tensor [3] on the GPU, to which a block of steps is copied at once."""
        block, row = divmod(step, STEPS_A_BLOCK)
        if self._block_schedule is None or self._block_schedule[0] != block:
            steps = range(block * STEPS_A_BLOCK, (block + 1) * STEPS_A_BLOCK)
            schedules = torch.tensor([self._schedule(t) for t in steps])  # [STEPS_A_BLOCK, 3]
            self._block_schedule = block, schedules.to(self._flat_grads.device)
        return self._block_schedule[1][row]

    @property
    def _is_replayed(self) -> bool:
        """Whether steps run as a CUDA graph: in bfloat16, on compute capability 9 or 10.

        These are H100, H200 and B200. On other GPUs PyTorch's grouped product reads the ends of its
        blocks back to the host, which a graph cannot do.
        """
        config = self.config
        is_grouped = config.matmul_dtype == "bfloat16" and config.gradient != "autograd"
        if not self._flat_grads.is_cuda or not is_grouped or torch.version.hip:
            return False
        if config.tracks_silence:  # the host reads which latents are dead
            return False
        return torch.cuda.get_device_capability(self._flat_grads.device)[0] in (9, 10)

    def _replay(self, x: Tensor, prefixes: StepPrefixes, phase: Phase) -> dict[str, Tensor]:
        """`_step` as a CUDA graph, of which each shape of x and each phase has its own."""

        def step(x: Tensor, reach: Tensor, schedule: Tensor, *ends: Tensor) -> dict[str, Tensor]:
            return self._step(x, StepPrefixes(reach, ends), Schedule(*schedule.unbind()), phase)

        schedule = self._schedule_on_device(self.n_steps_done)
        inputs = [x, prefixes.reach, schedule, *prefixes.ends]
        key = (x.shape, phase)
        if key not in self._graphs:
            self._graphs[key] = CudaGraph(inputs)
        return self._graphs[key](step, inputs)


def _remade(
    kind: type[Trainer],
    saes: Sequence[SAE],
    configs: Sequence[TrainerConfig],
    seeds: Sequence[int],
    state: Mapping[str, Tensor],
) -> Trainer:
    """A trainer that continues from `state`; see `Trainer.__reduce__`."""
    trainer = kind(saes, configs, seeds)
    trainer.load_state_dict(state)
    return trainer
