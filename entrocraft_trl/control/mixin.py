"""Entropy control in a trainer. Wiring only: TRL prepares loss inputs, pure functions decide, TRL trains on."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from transformers import TrainingArguments

from ..constructor import call_of_trls_constructor
from ..normalisation import loss_normaliser
from ..policy.batch_entropy import BatchTotals
from ..policy.tokens import TokenReading, loss_mask, sampled_entropy_term
from . import diagnosis, loss_inputs, rejection, schedule
from .advantages import unit_rewards, without_rounding
from .card import PAPER, card_section
from .config import EntropyControlConfig
from .loss import KeptRolloutsLossMixin
from .reading import EntropyInBandMixin
from .state import EntropyControlState


logger = get_logger(__name__)


class EntropyControlMixin(EntropyInBandMixin, KeptRolloutsLossMixin):
    """
    Entropy control for trainers that prepare loss inputs in `_generate_and_score_completions`, as TRL's GRPO and RLOO
    trainers do: put it before the trainer among the bases, and pass a config that mixes in [`EntropyControlConfig`].

    Two methods of the parent change what they return: `_generate_and_score_completions` measures the batch entropy,
    compares it with the band and takes the rejected rollouts out of the loss inputs; `compute_loss` weighs row means
    by the rows that are left. TRL's passes of the policy are listened to. Evaluation is never filtered. A band that is
    never left gives the parent's training bit for bit.

    A trainer with a `_compute_loss` of its own says in a class attribute `loss_normaliser` what that divides by (see
    [`normalisation.NORMALISERS`]), so that rollouts are judged and dropped as it weighs them. The loss has to mask
    tokens by `completion_mask * tool_mask`, as TRL's do, and all that it returns is weighed.

    Args:
        entropy_band (`Callable[[float], tuple[float, float]]`, *optional*):
            Function from progress in 0..1 to the band's `(low, high)` in `args.entropy_unit`. It replaces the band of
            the config. All other arguments are the parent's.

    Raises:
        TypeError: If `args` is not an entropy-control config, or a loss of one's own has no `loss_normaliser`.
        ValueError: If `entropy_band` returns an invalid band; if `entropy_source="sampling"` has no engine that
            returns log-probs; or if `loss_type` or `loss_normaliser` is unknown. All before a model loads, unless the
            parent has a constructor of its own: then at the latest right after it.
    """

    _config_class = EntropyControlConfig
    _tag_names = ["trl", "entrocraft"]
    _name = "Entrocraft"
    _paper = PAPER

    def __init__(self, *args, entropy_band: Callable[[float], tuple[float, float]] | None = None, **kwargs):
        if entropy_band is not None:
            schedule.check_band_function(entropy_band)
        # By type, wherever a constructor of the user's takes it: what is wrong in it need not wait for the model.
        for value in (*args, *kwargs.values()):
            if isinstance(value, TrainingArguments):
                self._check_config(value)
        call = call_of_trls_constructor(self, EntropyControlMixin, args, kwargs)
        if call is not None:
            given = call.arguments
            if given.get("args") is None:
                model = given["model"]
                name = model if isinstance(model, str) else model.config._name_or_path
                given["args"] = self._config_class(f"{name.split('/')[-1]}-Entrocraft")
            self._check_engine(given["args"], given.get("rollout_func"))
            args, kwargs = call.args, call.kwargs
        self._teaching_rollouts: torch.Tensor | float = 0.0  # of the optimizer step under way
        super().__init__(*args, **kwargs)
        if call is None:
            self._check_config(self.args)
            self._check_engine(self.args, getattr(self, "rollout_func", None))  # RLOO has none
        self._band_in_unit = entropy_band or self.args.band_at
        self.add_callback(EntropyControlState())

    def _check_config(self, config: Any) -> None:
        if not isinstance(config, self._config_class):
            raise TypeError(
                f"{type(self).__name__} needs args of type {self._config_class.__name__}, got "
                f"{type(config).__name__}; it takes the same arguments and adds the entropy band."
            )
        if config.rejected_rollouts == "drop" or config.rejection_rule != "advantage_sign":
            loss_normaliser(type(self), config)

    @property
    def reads_expected_term(self) -> bool:
        return self.args.rejection_rule != "advantage_sign"

    # ------------------------------------------------------------------------------------------------------ the step

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        with self.listening_to_policy() as heard:
            batch = super()._generate_and_score_completions(inputs)
        if not training:
            self._log_kept_column(torch.ones(len(inputs), device=self.accelerator.device))
            return batch
        mask = loss_mask(batch)
        tokens, totals = self._measure(batch, mask, heard)
        band = self._band_now(totals.entropy)
        batch, advantages = self._advantages(batch, band.direction(totals.entropy))
        keep, allowed = self._judge(batch, advantages, mask, tokens, totals, band)
        counts = self._count(keep, advantages, mask, tokens, totals)
        batch = self._take_out(batch, keep, counts)
        self._log_kept_column(keep, batch["advantages"])
        self._report(totals, band, counts, allowed)
        return batch

    def _advantages(self, batch: dict[str, Any], direction: int) -> tuple[dict[str, Any], torch.Tensor]:
        """
        Loss inputs with the advantages to train on, and those `(B,)` by which rollouts are judged and counted: the
        same, but 0 in groups that carry no signal.
        """
        advantages = batch["advantages"]
        rewards = self._rewards_of_all_ranks(len(advantages) * self.accelerator.num_processes)
        weighted = (rewards * self.reward_weights.to(rewards)).nansum(dim=1)
        weighted[torch.isnan(rewards).all(dim=1)] = torch.nan
        first = self.accelerator.process_index * len(advantages)
        if self.args.out_of_band_advantages == "reward":
            # Checked in every batch, on all ranks' rewards: a wrong coding ends the run at once and everywhere.
            signs = unit_rewards(weighted, self.args.reward_coding)
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
        return batch, without_rounding(
            advantages, compared, first, self.num_generations, scaled_over_batch=by_function
        )

    def _rewards_of_all_ranks(self, count: int) -> torch.Tensor:
        """Rewards `(count, functions)` of the last batch, which TRL keeps for its table; NaN: unscored."""
        columns = [list(self._logs["rewards"][name])[-count:] for name in self.reward_func_names]
        return torch.tensor(columns, device=self.accelerator.device).T

    def _judge(
        self,
        batch: dict[str, Any],
        advantages: torch.Tensor,
        mask: torch.Tensor,
        tokens: TokenReading | None,
        totals: BatchTotals,
        band: schedule.Band,
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Keep mask `(B,)` of this rank's rollouts, and the least and most change that the band allows, if it does."""
        if self.args.rejection_rule == "advantage_sign":
            return rejection.accept_by_advantage_sign(advantages, band.direction(totals.entropy)), {}
        all_of_them = torch.ones_like(advantages, dtype=torch.bool)
        if math.isnan(totals.entropy):
            return all_of_them, {}
        memory = self.control_memory
        cushion = rejection.cushion_width(memory.reading_scatter)
        offset = rejection.integrate_offset(memory.change_offset, totals.entropy, *band, cushion=cushion)
        least, most = rejection.allowed_change(totals.entropy, *band, cushion=cushion, offset=offset)
        memory.change_offset = offset
        allowed = {"least_change": least, "most_change": most}
        if (least, most) == (-1.0, 1.0):
            return all_of_them, allowed
        weights = loss_inputs.token_weights(mask, loss_normaliser(type(self), self.args))
        sampled = sampled_entropy_term(tokens.logps, tokens.entropies)
        scores = rejection.entropy_change_scores(advantages, sampled, tokens.expected, mask, weights)
        if self.args.rejection_rule == "influence":
            scores, of_all_ranks = self.accelerator.gather(torch.stack([scores, advantages], dim=1)).T
            if not of_all_ranks.any():
                return all_of_them, allowed
            influence = self._influence_scores(batch, advantages, mask, weights, tokens, totals)
            scores = rejection.both_scores(scores, self.accelerator.gather(influence))
            allowed["influence_agrees"] = diagnosis.share_of_one_sign(scores, of_all_ranks)
        else:
            scores = self.accelerator.gather(scores)
        keep = rejection.accept_by_entropy_change(scores, least, most)
        first = self.accelerator.process_index * len(advantages)
        return keep[first : first + len(advantages)], allowed

    def _influence_scores(
        self,
        batch: dict[str, Any],
        advantages: torch.Tensor,
        mask: torch.Tensor,
        weights: torch.Tensor,
        tokens: TokenReading,
        totals: BatchTotals,
    ) -> torch.Tensor:
        # TRL's own pass ran with whatever dropout there is, which would drown the difference to one without.
        by_trl = any(batch.get(key) is not None for key in ("old_per_token_logps", "old_logps"))
        derivatives = self.log_prob_derivatives(
            batch,
            mask,
            advantages != 0,
            entropy=totals.entropy,
            aggregation=self.args.entropy_aggregation,
            logps=None if by_trl else tokens.logps,
        )
        return rejection.influence_scores(advantages, derivatives, weights)

    def _count(
        self,
        keep: torch.Tensor,
        advantages: torch.Tensor,
        mask: torch.Tensor,
        tokens: TokenReading | None,
        totals: BatchTotals,
    ) -> diagnosis.Counts:
        """What was kept of what, over all ranks."""
        margins = None
        # With a part of the tokens in the loss, margins over all of them would be about other tokens.
        if tokens is not None and getattr(self, "top_entropy_quantile", 1.0) == 1.0:
            sampled = sampled_entropy_term(tokens.logps, tokens.entropies)
            ones = torch.ones_like(advantages)
            # A pass for the sign rule does not read N; the batch mean of S, of which N is the policy's, stands in.
            expected = totals.mean_sampled_term if tokens.expected is None else tokens.expected
            margins = rejection.entropy_change_scores(ones, sampled, expected, mask)
        counts = diagnosis.count_batch(keep, advantages, mask.sum(dim=1), margins)
        return diagnosis.Counts(*self.accelerator.reduce(counts, reduction="sum").tolist())

    def _take_out(self, batch: dict[str, Any], keep: torch.Tensor, counts: diagnosis.Counts) -> dict[str, Any]:
        """Loss inputs without the rejected rollouts; the very same ones if none was rejected on any rank."""
        if counts.kept_rows == counts.rows:
            return batch
        if self.args.rejected_rollouts == "zero_advantage":
            return loss_inputs.zero_advantages(batch, keep)
        floor = self.args.min_accepted_share
        return loss_inputs.drop_rollouts(
            batch,
            keep,
            token_normaliser=max(counts.kept_tokens, floor * counts.tokens),
            row_normaliser_share=max(counts.kept_rows / counts.rows, floor),
        )

    def _report(
        self, totals: BatchTotals, band: schedule.Band, counts: diagnosis.Counts, allowed: dict[str, float]
    ) -> None:
        entropy = totals.entropy
        if math.isnan(entropy):
            return
        direction, distance = band.direction(entropy), band.distance(entropy)
        metrics = {
            "entropy": entropy,
            "entropy_low": band.low,
            "entropy_high": band.high,
            "direction": direction,
            "distance_outside_band": distance,
            "reading_scatter": self.control_memory.reading_scatter,
            **({"unscored_tokens": totals.unscored_share} if self.args.entropy_source == "sampling" else {}),
            **diagnosis.rejection_metrics(counts),
            **allowed,
        }
        memory = self.control_memory
        effect = diagnosis.watch(memory, entropy, distance, direction)
        if effect is not None:
            metrics["realised_effect"] = effect
        rule, agree = self.args.rejection_rule, metrics.get("rules_agree")
        if message := diagnosis.failure_message(memory, entropy, distance, rule, agree):
            logger.warning(message)
        self._log_metrics(metrics)

    # ------------------------------------------------------------------------------------------------------ the loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if self.model.training:
            self._count_empty_step(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _count_empty_step(self, inputs: dict[str, Any]) -> None:
        """Count, and log, the optimizer steps in which no rollout of any rank has an advantage and a loss token."""
        # Only here is it known which rollouts a step is made of: TRL shuffles, and one generation may serve several.
        teaching = (inputs["advantages"] != 0) & loss_mask(inputs).any(dim=1)
        self._teaching_rollouts = self._teaching_rollouts + teaching.sum().float()
        if not self.accelerator.sync_gradients:
            return
        if self.accelerator.reduce(self._teaching_rollouts, reduction="sum").item() == 0:
            self.control_memory.empty_steps += 1
        self._teaching_rollouts = 0.0
        self._log_metrics({"empty_steps": self.control_memory.empty_steps})

    # ------------------------------------------------------------------------------------------- the log and the card

    def card_section(self) -> list[str]:
        """What the model card says of this run's band and rule."""
        initial, in_nats = self.control_memory.initial_entropy, self._band_is_known
        return card_section(
            self.args,
            self.band_at if in_nats else self._band_in_unit,
            in_nats=in_nats,
            initial_entropy=initial,
            own_band=self._band_in_unit != self.args.band_at,
        )

    def _log_kept_column(self, keep: torch.Tensor, advantages: torch.Tensor | None = None) -> None:
        """Completions table: a `kept` column, and the advantages that the loss reads (all ranks' rows)."""
        if not self.log_completions:
            return
        self._logs["extra"]["kept"].extend(gather_object(keep.bool().tolist()))
        if advantages is not None:
            used = gather_object(advantages.tolist())
            for _ in range(min(len(used), len(self._logs["advantages"]))):
                self._logs["advantages"].pop()
            self._logs["advantages"].extend(used)
