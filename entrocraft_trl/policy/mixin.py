"""Reading the policy inside a trainer of TRL's. Knows no method: what the numbers are for is the caller's matter."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.logging import get_logger
from peft import PeftModel

from . import influence
from .eval_mode import active_dropout
from .hidden_states import expected_terms
from .passes import find_policy_pass, run_policy_pass
from .recorder import GenerationRecorder, Turn, reading_of_rollouts
from .tokens import TokenReading


logger = get_logger(__name__)


@dataclass
class Heard:
    """What the policy said while a trainer of TRL's prepared a batch of loss inputs."""

    passes: list[TokenReading] = field(default_factory=list)  # TRL's own, over the finished rollouts, if not recorded
    turns: list[Turn] = field(default_factory=list)  # recorded while they were sampled
    # Why nothing could be recorded; "" if it was tried. It follows from settings and the model, as on every rank.
    not_recorded: str = ""


class PolicyReadingMixin:
    """
    For trainers that prepare loss inputs in `_generate_and_score_completions`, as TRL's GRPO and RLOO trainers do: put
    it before the trainer among the bases, and wrap the parent's preparation in `listening_to_policy`.

    Two methods of the parent are listened to, `_generate_single_turn` and `_get_per_token_logps_and_entropies`;
    nothing changes for their callers.
    """

    # Whether N is read along in TRL's own pass too, where it takes one more projection of the hidden states onto the
    # vocabulary. The record of the generation, and a pass of our own, always have it.
    reads_expected_term = False
    _heard: Heard | None = None
    _unwrapped: tuple[torch.nn.Module, torch.nn.Module] | None = None  # `model`, and its causal LM
    _told_source: str | None = None

    @contextmanager
    def listening_to_policy(self) -> Iterator[Heard]:
        """Inside, what the policy says while it samples, or else in TRL's own pass, is kept in what this yields."""
        self._heard = Heard(not_recorded=self._why_not_recorded())
        try:
            yield self._heard
        finally:
            self._heard = None

    def read_policy(self, batch: dict[str, Any], mask: torch.Tensor, heard: Heard) -> tuple[TokenReading, str]:
        """
        What the policy says of the tokens of `batch`, from the cheapest source that is exact, and which one that was:

        - `"record"`: kept while the rollouts were sampled, if that holds every loss token of every rank;
        - `"old_policy_pass"`: the pass that TRL ran for the log-probs of the old policy;
        - `"own_pass"`: a pass in eval mode, which draws no random number.

        Args:
            batch (`dict`): Loss inputs as TRL returns them.
            mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
            heard ([`Heard`]): From `listening_to_policy` around their preparation.
        """
        why = heard.not_recorded
        if not why:
            recorded = reading_of_rollouts(heard.turns, batch, mask)
            missing = torch.tensor(float(recorded is None), device=self.accelerator.device)
            if self.accelerator.reduce(missing, reduction="sum").item() == 0:
                self._tell_source(logging.INFO, "is recorded while the rollouts are sampled, at no cost")
                return recorded, "record"
            why = "what was seen of the generation is not what came out of it"
        found = find_policy_pass(heard.passes, batch, batch["completion_mask"])
        if found is not None and (found.expected is not None or not self.reads_expected_term):
            self._tell_source(logging.INFO, "is read from TRL's pass for the old policy's log-probs")
            return found, "old_policy_pass"
        self._tell_source(logging.WARNING, f"is read in a pass of its own over each batch, which takes time: {why}")
        reading = run_policy_pass(self._read_pass, self.model, batch, self.args.per_device_train_batch_size)
        return reading, "own_pass"

    def _tell_source(self, level: int, text: str) -> None:
        """By the main process, in the first batch and whenever it changes."""
        if text != self._told_source:
            self._told_source = text
            logger.log(level, f"The policy's entropy {text}.")

    def _why_not_recorded(self) -> str:
        if self.use_vllm or getattr(self, "rollout_func", None) is not None:
            return "an engine samples them"
        if self.use_transformers_continuous_batching:
            return "continuous batching mixes them in its forward passes"
        if dropout := active_dropout(self.model):
            return f"they are sampled with dropout ({dropout}), by another model than that of a pass; set it to 0"
        return ""

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs):
        generate = super()._generate_single_turn
        if self._heard is None or self._heard.not_recorded or not self.model.training:
            return generate(prompt_ids, images, multimodal_fields, *args, **kwargs)
        recorder = GenerationRecorder(self._causal_lm(), self.temperature)
        with recorder.listening():
            generated = generate(prompt_ids, images, multimodal_fields, *args, **kwargs)
        if images is None and not multimodal_fields:  # with images, equal tokens may stand for unequal prompts
            ids = generated[0] if isinstance(generated, tuple) else generated  # RLOO returns nothing else
            self._heard.turns += recorder.turns(prompt_ids, ids)
        return generated

    def log_prob_derivatives(
        self,
        batch: dict[str, Any],
        mask: torch.Tensor,
        rows: torch.Tensor,
        *,
        entropy: float,
        aggregation: str,
        logps: torch.Tensor | None,
    ) -> torch.Tensor:
        """
        `D_i` of [`policy.influence`], `(B,)`: how the log-prob of each rollout of this rank moves along the gradient
        of the entropy over all ranks' rollouts, in nats per unit of parameter norm. 0 where that gradient vanishes.

        Args:
            batch (`dict`): Loss inputs as TRL returns them.
            mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
            rows (`torch.Tensor` of shape `(B,)`): Whose derivative is asked for; that of others may be 0.
            entropy (`float`): Of the batch over all ranks, in nats.
            aggregation (`str`): What it is the mean of, see `entropy_sums`.
            logps (`torch.Tensor` of shape `(B, T)`, *optional*): Log-probs, if they were read without dropout.

        Raises:
            FloatingPointError: If the gradient is not finite, on all ranks alike.
        """
        ranks, size, count = self.accelerator.num_processes, self.args.per_device_train_batch_size, len(mask)
        first = self.accelerator.process_index * count
        chosen = influence.rows_for_gradient(first, count, ranks * count)
        gradient, weight = influence.entropy_gradient(
            self._read_pass, self.model, batch, mask, chosen, aggregation=aggregation, batch_size=size
        )
        # Tensor by tensor: a reduction of all at once would need room for the parameters twice more.
        for index, part in enumerate(gradient):
            gradient[index] = self.accelerator.reduce(part, reduction="sum")
        weight = self.accelerator.reduce(torch.tensor(weight, device=mask.device), reduction="sum").item()
        norm = influence.total_norm(gradient)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"The gradient of the policy's entropy at step {self.state.global_step} is not finite (norm {norm}). "
                "The step was refused; lower the learning rate or resume from an earlier checkpoint."
            )
        if norm == 0 or entropy <= 0:
            return torch.zeros(count, device=mask.device)
        for part in gradient:
            part.div_(norm)
        rounds = self.accelerator.mixed_precision != "no" or self.args.tf32 or influence.rounds_products()
        if rounds or not influence.resolves_small_steps(self.model):
            asked = rows.nonzero().flatten().tolist()
            return influence.derivatives_by_gradients(self._read_pass, self.model, batch, mask, asked, gradient)
        step = influence.difference_step(entropy, norm / weight)
        return influence.derivatives_by_difference(
            self._read_pass, self.model, batch, mask, gradient, step=step, logps=logps, batch_size=size
        )

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        heard = self._heard
        # The first: the reference's, which may be by the same model, comes after the old policy's.
        if heard is None or not heard.not_recorded or heard.passes or model is not self.model:
            return super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=compute_entropy, **kwargs)
        # TRL asks for log-probs alone here, although its fused head returns the entropy with them.
        reading, aux_loss = self._read_pass(
            model, *args, with_expected=self.reads_expected_term, trls_log_probs=True, **kwargs
        )
        heard.passes.append(reading)
        return reading.logps, reading.entropies if compute_entropy else None, aux_loss

    def _read_pass(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        *args,
        with_expected=True,
        trls_log_probs=False,
        **kwargs,
    ):
        """One of TRL's passes as a [`TokenReading`], and its router loss. With gradients it has no N."""
        arguments = (input_ids, attention_mask, logits_to_keep, *args)
        kwargs["compute_entropy"] = True
        if torch.is_grad_enabled() or not with_expected:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *arguments, **kwargs)
            return TokenReading(logps, entropies), aux_loss
        with expected_terms(self._causal_lm(), trls_log_probs=trls_log_probs) as terms:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *arguments, **kwargs)
        return TokenReading(logps, entropies, torch.cat(terms)[:, -logits_to_keep:]), aux_loss

    def _causal_lm(self) -> torch.nn.Module:
        """The module whose `forward` has TRL's fused head: without wrappers of ranks and adapters."""
        # Accelerate asks each time whether DeepSpeed is installed, which takes as long as reading a batch.
        if self._unwrapped is None or self._unwrapped[0] is not self.model:
            model = self.accelerator.unwrap_model(self.model)
            self._unwrapped = self.model, model.get_base_model() if isinstance(model, PeftModel) else model
        return self._unwrapped[1]
