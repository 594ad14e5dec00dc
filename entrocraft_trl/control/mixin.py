"""Entropy control as a mixin. Wiring only: TRL prepares loss inputs, pure functions decide, TRL trains on the rest."""

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainingArguments
from trl import GRPOTrainer, RLOOTrainer

from ..checkpoints.hub import HubUploadMixin
from ..checkpoints.resume import ExactResumeMixin
from ..config import EntropyControlConfig
from ..data.reward_guard import RewardGuard
from ..data.rows import check_training_rows
from ..evaluation.during_training import EvaluationMetricsMixin
from ..metric_names import key
from ..policy import entropy
from ..policy.half_temperature import half_temperature_head
from ..reports.model_card import ModelCardMixin
from . import card, diagnosis, groups, loss_inputs, rejection, schedule
from .state import ControlMemory, EntropyControlState


logger = get_logger(__name__)


class Reading(NamedTuple):
    """
    What one generation batch shows before the filter. `entropy` (nats; NaN without a token), `mean_sampled_term` and
    `unscored`, the share of loss tokens without a log-prob of the rollout engine, are over all ranks; `policy_pass`
    and `sampled_term`, S of each token `(B, T)`, are this rank's.
    """

    entropy: float
    mean_sampled_term: float
    unscored: float
    policy_pass: entropy.PolicyPass | None
    sampled_term: torch.Tensor | None


class EntropyControlMixin(EvaluationMetricsMixin, ModelCardMixin, HubUploadMixin, ExactResumeMixin):
    """
    Entropy control for trainers that prepare loss inputs in `_generate_and_score_completions`, as TRL's GRPO and RLOO
    trainers do: put it before the trainer among the bases, and pass a config that mixes in [`EntropyControlConfig`].

    Two methods of the parent change what they return: `_generate_and_score_completions` measures the batch entropy,
    compares it with the band and takes the rejected rollouts out of the loss inputs; `compute_loss` weighs row means
    by the rows that are left. Two more only listen: to the old-policy pass and to the rewards. Evaluation is never
    filtered, and reports what [`EvaluationMetricsMixin`] adds. A band that is never left gives the parent's training
    bit for bit. [`ExactResumeMixin`] resumes exactly and stops on SIGTERM.

    A trainer with a `_compute_loss` of its own says in a class attribute `loss_normaliser` what that divides by (see
    [`loss_inputs.NORMALISERS`]), so that rollouts are judged and dropped as it weighs them. The loss has to mask
    tokens by `completion_mask * tool_mask`, as TRL's do, and all that it returns is weighed.

    Args:
        entropy_band (`Callable[[float], tuple[float, float]]`, *optional*):
            Function from progress in 0..1 to the band's `(low, high)` in `args.entropy_unit`. It replaces the band of
            the config. All other arguments are the parent's.

    Raises:
        TypeError: If `args` is not an entropy-control config, or a loss of one's own has no `loss_normaliser`.
        ValueError: If `entropy_band` returns an invalid band, or `entropy_source="sampling"` has no engine that
            returns log-probs; or if `train_dataset` has too few rows, no prompts, or an empty one; or if
            `loss_type` or `loss_normaliser` is unknown. All before a model loads, unless the parent has a constructor
            of its own: then right after it.
    """

    _config_class = EntropyControlConfig
    _tag_names = ["trl", "entrocraft"]
    _name = "Entrocraft"
    _paper = card.PAPER

    def __init__(self, *args, entropy_band: Callable[[float], tuple[float, float]] | None = None, **kwargs):
        if entropy_band is not None:
            schedule.check_band_function(entropy_band)
        # By type, wherever a constructor of the user's takes it: what is wrong in it need not wait for the model.
        for value in (*args, *kwargs.values()):
            if isinstance(value, TrainingArguments):
                self._check_config(value)
        # TRL's constructor loads the model, so what it gets is checked before. A constructor of the user's that stands
        # between may name its arguments as it likes, make them itself or change them: what became of them is only
        # known when it is done, and a guess would refuse what is right or miss what is wrong.
        parent = super().__init__
        is_trls = parent.__func__ in (GRPOTrainer.__init__, RLOOTrainer.__init__)
        if is_trls:
            call = inspect.signature(parent).bind(*args, **kwargs)
            given = call.arguments
            if given.get("args") is None:
                model = given["model"]
                name = model if isinstance(model, str) else model.config._name_or_path
                given["args"] = self._config_class(f"{name.split('/')[-1]}-Entrocraft")
            names = ("train_dataset", "rollout_func", "environment_factory")
            self._check_arguments(given["args"], *(given.get(name) for name in names))
            args, kwargs = call.args, call.kwargs
        self._captured_passes: list[entropy.PolicyPass] | None = None
        self._teaching_rollouts: torch.Tensor | float = 0.0  # of the optimizer step under way
        self._reward_guard = RewardGuard()
        super().__init__(*args, **kwargs)
        if not is_trls:
            names = ("train_dataset", "rollout_func", "environment_factories")  # RLOO has the first only
            self._check_arguments(self.args, *(getattr(self, name, None) for name in names))
        self._entropy_band = entropy_band or self.args.band_at
        self.add_callback(EntropyControlState())

    def _check_config(self, config: Any) -> None:
        if not isinstance(config, self._config_class):
            raise TypeError(
                f"{type(self).__name__} needs args of type {self._config_class.__name__}, got "
                f"{type(config).__name__}; it takes the same arguments and adds the entropy band."
            )
        if config.rejected_rollouts == "drop" or config.rejection_rule == "entropy_change":
            loss_inputs.loss_normaliser(type(self), config)

    def _check_arguments(self, config: Any, train_dataset: Any, rollout_func: Any, environments: Any) -> None:
        self._check_config(config)
        if config.entropy_source == "sampling" and not config.use_vllm and rollout_func is None:
            raise ValueError(
                "entropy_source='sampling' needs a rollout engine that returns log-probs, got use_vllm=False and no "
                "rollout_func; use entropy_source='policy'."
            )
        batch_prompts = config.generation_batch_size // config.num_generations
        check_training_rows(train_dataset, batch_prompts, needs_prompts=environments is None)

    @property
    def control_memory(self) -> ControlMemory:
        """What entropy control carries from step to step and through checkpoints."""
        # Looked up, because transformers may replace callbacks when it restores them from a checkpoint.
        return next(cb for cb in self.callback_handler.callbacks if isinstance(cb, EntropyControlState)).memory

    def entropy_band_at(self, progress: float) -> schedule.Band:
        """
        The band in nats at `progress` in 0..1.

        Raises:
            RuntimeError: If the band is relative to the initial entropy and no batch was measured yet.
        """
        low, high = self._entropy_band(progress)
        if self.args.entropy_unit == "nats":
            return schedule.Band(low, high)
        initial = self.control_memory.initial_entropy
        if initial is None:
            raise RuntimeError("the band is relative to the initial entropy, which this run has not measured yet.")
        return schedule.Band(low * initial, high * initial)

    def card_section(self) -> list[str]:
        initial = self.control_memory.initial_entropy
        in_nats = self.args.entropy_unit == "nats" or initial is not None
        return card.card_section(
            self.args,
            self.entropy_band_at if in_nats else self._entropy_band,
            in_nats=in_nats,
            initial_entropy=initial,
            own_band=self._entropy_band != self.args.band_at,
        )

    # ------------------------------------------------------------------------------------------------ hooks into TRL

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        self._captured_passes = []
        try:
            batch = super()._generate_and_score_completions(inputs)
        finally:
            passes, self._captured_passes = self._captured_passes, None
        if not training:
            self._log_kept_column(torch.ones(len(inputs), device=self.accelerator.device))
            return batch
        return self._control_entropy(batch, passes)

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        # Inside the loss-input preparation, TRL asks for log-probs alone, although the fused head returns the entropy
        # with them. Ask for both and remember them, which makes the measurement free when TRL runs an old-policy pass.
        capturing = self._captured_passes is not None
        logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(
            model, *args, compute_entropy=compute_entropy or (capturing and model is self.model), **kwargs
        )
        if capturing and model is self.model:
            self._captured_passes.append(entropy.PolicyPass(logps, entropies))
        return logps, entropies, aux_loss

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        functions, names = self.reward_funcs, self.reward_func_names
        self.reward_funcs = self._reward_guard.wrap(functions, names)
        try:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions
        self._reward_guard.refuse(rewards, names, self.accelerator.process_index, prompts, completions)
        if self.model.training:
            self._reward_guard.end_without_rewards(rewards, names)
        return rewards

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training:
            self._count_empty_step(inputs)
        # Not in `_compute_loss`: a subclass that computes a loss of its own there would leave the weight out.
        if loss_inputs.KEPT not in inputs:
            return super().compute_loss(model, inputs, *args, **kwargs)
        weight = loss_inputs.micro_batch_weight(inputs, loss_inputs.loss_normaliser(type(self), self.args))
        # TRL adds the router loss of a mixture of experts inside; it is no mean over the rollouts that are left.
        coefficient = self.router_aux_loss_coef
        self.router_aux_loss_coef = coefficient / weight
        try:
            return weight * super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self.router_aux_loss_coef = coefficient

    def _count_empty_step(self, inputs: dict[str, Any]) -> None:
        """Count, and log, the optimizer steps in which no rollout of any rank has an advantage and a loss token."""
        # Only here is it known which rollouts a step is made of: TRL shuffles, and one generation may serve several.
        teaching = (inputs["advantages"] != 0) & loss_inputs.loss_mask(inputs).any(dim=1)
        self._teaching_rollouts = self._teaching_rollouts + teaching.sum().float()
        if not self.accelerator.sync_gradients:
            return
        if self.accelerator.reduce(self._teaching_rollouts, reduction="sum").item() == 0:
            self.control_memory.empty_steps += 1
        self._teaching_rollouts = 0.0
        self._metrics["train"][key("empty_steps")].append(float(self.control_memory.empty_steps))

    # ----------------------------------------------------------------------------------- measure, decide, edit, report

    def _control_entropy(self, batch: dict[str, Any], passes: list[entropy.PolicyPass]) -> dict[str, Any]:
        """One step of Algorithm 1 on a generation batch: loss inputs in, loss inputs out."""
        reading = self._measure(batch, passes)
        if math.isnan(reading.entropy):
            # No rollout has a loss token (all truncated, say): nothing to measure, nothing to learn from.
            band, direction = schedule.Band(0.0, math.inf), 0
        else:
            band = self._band_for(reading.entropy)
            direction = rejection.band_direction(reading.entropy, band.low, band.high)
        batch, advantages = self._advantages(batch, direction)
        keep, bounds = self._accept(batch, advantages, reading, band, direction)
        tokens, margins = self._tokens_and_margins(batch, reading)
        counts = diagnosis.count_batch(keep, advantages, tokens, margins)
        totals = diagnosis.Totals(*self.accelerator.reduce(counts, reduction="sum").tolist())
        batch = self._edit(batch, keep, totals)
        self._log_kept_column(keep, batch["advantages"])
        self._report(reading, band, direction, totals, has_margins=margins is not None, **bounds)
        return batch

    def _advantages(self, batch: dict[str, Any], direction: int) -> tuple[dict[str, Any], torch.Tensor]:
        """
        Loss inputs with the advantages to train on, and those `(B,)` by which rollouts are judged and counted: the
        same, but 0 in groups that carry no signal.
        """
        advantages = batch["advantages"]
        rewards = self._batch_rewards(len(advantages) * self.accelerator.num_processes)
        weighted = (rewards * self.reward_weights.to(rewards)).nansum(dim=1)
        weighted[torch.isnan(rewards).all(dim=1)] = torch.nan
        first = self.accelerator.process_index * len(advantages)
        if self.args.out_of_band_advantages == "reward":
            # Checked in every batch, on all ranks' rewards: a wrong coding ends the run at once and everywhere.
            signs = rejection.unit_rewards(weighted, self.args.reward_coding)
            if direction:
                signs = signs[first : first + len(advantages)].to(advantages)
                return {**batch, "advantages": signs}, signs
        if "old_logps" in batch and self.beta:
            # RLOO takes the KL penalty from the reward, so that rollouts of one reward differ after all.
            return batch, advantages
        by_function = getattr(self, "multi_objective_aggregation", None) == "normalize_then_sum"
        compared = rewards[:, self.reward_weights != 0] if by_function else weighted.unsqueeze(1)
        if clip := getattr(self.args, "reward_clip_range", None):
            compared = compared.clamp(*clip)
        return batch, groups.without_rounding(
            advantages, compared, first, self.num_generations, scaled_over_batch=by_function
        )

    def _batch_rewards(self, count: int) -> torch.Tensor:
        """Rewards `(count, functions)` of the last batch, all ranks, which TRL keeps for its table; NaN: unscored."""
        columns = [list(self._logs["rewards"][name])[-count:] for name in self.reward_func_names]
        return torch.tensor(columns, device=self.accelerator.device).T

    def _tokens_and_margins(self, batch: dict[str, Any], reading: Reading) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Loss tokens and sum of S - N of each rollout, `(B,)`; N is its batch mean, which costs nothing."""
        mask = loss_inputs.loss_mask(batch)
        if reading.sampled_term is None or getattr(self, "top_entropy_quantile", 1.0) < 1.0:
            return mask.sum(dim=1), None  # not measured, or of other tokens than those that are trained on
        ones = torch.ones_like(batch["advantages"])
        margins = rejection.entropy_change_scores(ones, reading.sampled_term, reading.mean_sampled_term, mask)
        return mask.sum(dim=1), margins

    def _measure(self, batch: dict[str, Any], passes: list[entropy.PolicyPass]) -> Reading:
        mask = loss_inputs.loss_mask(batch)
        if self.args.entropy_source == "sampling":
            if "sampling_per_token_logps" not in batch:
                raise ValueError("entropy_source='sampling', but the rollout engine returned no 'logprobs'.")
            policy_pass, sampled = None, None
            logps = batch["sampling_per_token_logps"]
            unscored = (mask.bool() & torch.isnan(logps)).sum().float()
            readings = logps.nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
            sums = entropy.sampling_entropy_sums(logps, mask, self.args.entropy_aggregation)
        else:
            policy_pass = entropy.find_policy_pass(passes, batch, batch["completion_mask"])
            if policy_pass is None or (self._needs_expected_term() and entropy.has_dropout(self.model)):
                # TRL samples, and runs its old-policy pass, with dropout; N comes from a pass without. S of the one
                # policy against N of the other would judge rollouts by the difference of two models.
                policy_pass = self._run_policy_pass(batch)
            unscored = torch.zeros((), device=mask.device)
            sums = entropy.entropy_sums(policy_pass.entropies, mask, self.args.entropy_aggregation)
            sampled = rejection.sampled_entropy_term(*policy_pass)
            readings = policy_pass.entropies + sampled
        terms = entropy.entropy_sums(sampled, mask, "token") if sampled is not None else torch.zeros_like(sums)
        # One reduction carries all: every rank refuses the step, or none does.
        totals = torch.cat([sums, terms, entropy.unreadable_counts(readings, mask), unscored.view(1)])
        total, count, term, tokens, unreadable, rollouts, all_tokens, missing = self.accelerator.reduce(
            totals, reduction="sum"
        ).tolist()
        unscored_share = missing / all_tokens if all_tokens else 0.0
        if unreadable or (all_tokens and not count) or unscored_share > entropy.LARGEST_UNSCORED_SHARE:
            raise FloatingPointError(
                entropy.refusal(
                    self.args.entropy_source, self.state.global_step, unreadable, rollouts, all_tokens, missing
                )
            )
        measured, mean_term = total / count if count else math.nan, term / tokens if tokens else 0.0
        return Reading(measured, mean_term, unscored_share, policy_pass, sampled)

    def _needs_expected_term(self) -> bool:
        return self.args.rejection_rule == "entropy_change" and self.args.entropy_change_baseline == "exact"

    def _run_policy_pass(self, batch: dict[str, Any]) -> entropy.PolicyPass:
        return entropy.run_policy_pass(
            super()._get_per_token_logps_and_entropies, self.model, batch, self.args.per_device_train_batch_size
        )

    def _band_for(self, measured: float) -> schedule.Band:
        memory = self.control_memory
        first = memory.initial_entropy is None
        if first:
            memory.initial_entropy = measured
        memory.horizon = self.args.entropy_schedule_steps or memory.horizon or self.state.max_steps
        band = self.entropy_band_at(schedule.progress_at(self.state.global_step, memory.horizon))
        if first and (measured < band.low / 2 or measured > band.high * 2):
            warnings.warn(
                f"The first measured entropy is {measured:.3f} nats, far outside the band {band.low:.3f} to "
                f"{band.high:.3f} nats: one sign of advantage will be rejected for a long time. Start the band near "
                f"{measured:.3f}, or give it in multiples of the initial entropy (entropy_unit='initial').",
                stacklevel=2,
            )
        return band

    def _accept(
        self,
        batch: dict[str, Any],
        advantages: torch.Tensor,
        reading: Reading,
        band: schedule.Band,
        direction: int,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Keep mask `(B,)` of this rank's rollouts; and, graded, the least and most change the band allows."""
        if self.args.rejection_rule == "advantage_sign":
            return rejection.accept_by_advantage_sign(advantages, direction), {}
        accept_all = torch.ones_like(advantages, dtype=torch.bool)
        # Each branch follows from reduced scalars, so every rank takes the same one.
        if math.isnan(reading.entropy):
            return accept_all, {}
        least, most = self._allowed_change(reading.entropy, band)
        bounds = {"least_change": least, "most_change": most}
        if (least, most) == (-1.0, 1.0):
            return accept_all, bounds
        scores = self._entropy_change_scores(batch, advantages, reading)
        keep = rejection.accept_by_entropy_change(self.accelerator.gather(scores), least, most)
        first = self.accelerator.process_index * len(scores)
        return keep[first : first + len(scores)], bounds

    def _allowed_change(self, measured: float, band: schedule.Band) -> tuple[float, float]:
        memory = self.control_memory
        memory.change_offset = rejection.integrate_offset(memory.change_offset, measured, *band)
        return rejection.allowed_change(measured, *band, offset=memory.change_offset)

    def _entropy_change_scores(
        self, batch: dict[str, Any], advantages: torch.Tensor, reading: Reading
    ) -> torch.Tensor:
        if self.args.entropy_change_baseline == "batch_mean":
            expected = reading.mean_sampled_term
        else:
            with half_temperature_head(self):
                half = self._run_policy_pass(batch)
            expected = rejection.expected_entropy_term(*reading.policy_pass, half.logps, half.entropies)
        mask = loss_inputs.loss_mask(batch)
        weights = loss_inputs.token_weights(mask, loss_inputs.loss_normaliser(type(self), self.args))
        return rejection.entropy_change_scores(advantages, reading.sampled_term, expected, mask, weights)

    def _edit(self, batch: dict[str, Any], keep: torch.Tensor, totals: diagnosis.Totals) -> dict[str, Any]:
        """Loss inputs without the rejected rollouts; the very same ones if none was rejected on any rank."""
        if totals.kept_rows == totals.rows:
            return batch
        if self.args.rejected_rollouts == "zero_advantage":
            return loss_inputs.zero_advantages(batch, keep)
        floor = self.args.min_accepted_share
        return loss_inputs.drop_rollouts(
            batch,
            keep,
            token_normaliser=max(totals.kept_tokens, floor * totals.tokens),
            row_normaliser_share=max(totals.kept_rows / totals.rows, floor),
        )

    def _report(
        self,
        reading: Reading,
        band: schedule.Band,
        direction: int,
        totals: diagnosis.Totals,
        has_margins: bool,
        **more,
    ) -> None:
        memory = self.control_memory
        distance = rejection.distance_outside(reading.entropy, band.low, band.high)
        metrics = {
            "entropy": reading.entropy,
            "entropy_low": band.low,
            "entropy_high": band.high,
            "direction": direction,
            "distance_outside_band": distance,
            **({"unscored_tokens": reading.unscored} if self.args.entropy_source == "sampling" else {}),
            **diagnosis.rejection_metrics(totals, has_margins),
            **more,
        }
        if math.isnan(reading.entropy):
            metrics = {}
        else:
            effect = diagnosis.watch(memory, reading.entropy, distance, direction)
            if effect is not None:
                metrics["realised_effect"] = effect
            agree = metrics.get("rules_agree")
            rule = self.args.rejection_rule
            if message := diagnosis.failure_message(memory, reading.entropy, distance, rule, agree):
                logger.warning(message)
        for name, value in metrics.items():
            self._metrics["train"][key(name)].append(float(value))

    def _log_kept_column(self, keep: torch.Tensor, advantages: torch.Tensor | None = None) -> None:
        """Completions table: a `kept` column, and the advantages that the loss reads (all ranks' rows)."""
        if not self.log_completions:
            return
        kept = gather_object(keep.bool().tolist())
        self._logs["extra"]["kept"].extend(kept)
        if advantages is not None:
            used = gather_object(advantages.tolist())
            for _ in range(min(len(used), len(self._logs["advantages"]))):
                self._logs["advantages"].pop()
            self._logs["advantages"].extend(used)
