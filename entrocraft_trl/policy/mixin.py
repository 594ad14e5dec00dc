"""Reading the policy inside a trainer of TRL's. Knows no method: what the numbers are for is the caller's matter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel

from .hidden_states import expected_terms
from .passes import find_policy_pass, run_policy_pass
from .tokens import TokenReading


class PolicyReadingMixin:
    """
    For trainers that prepare loss inputs in `_generate_and_score_completions`, as TRL's GRPO and RLOO trainers do: put
    it before the trainer among the bases, and wrap the parent's preparation in `listening_to_policy`.

    One method of the parent is listened to, `_get_per_token_logps_and_entropies`, and nothing changes for its caller.
    """

    # Whether N is read along. It takes one more projection of the hidden states onto the vocabulary.
    reads_expected_term = False
    _heard: list[TokenReading] | None = None

    @contextmanager
    def listening_to_policy(self) -> Iterator[list[TokenReading]]:
        """Inside, what TRL's own passes of the policy say is added to the list that this yields."""
        self._heard = []
        try:
            yield self._heard
        finally:
            self._heard = None

    def read_policy(self, batch: dict[str, Any], heard: Sequence[TokenReading]) -> TokenReading:
        """
        What the policy says of the tokens of `batch`: from TRL's old-policy pass if it ran one, else from a pass of
        our own in eval mode, which draws no random number.

        Args:
            batch (`dict`): Loss inputs as TRL returns them.
            heard (`Sequence[TokenReading]`): From `listening_to_policy` around their preparation.
        """
        found = find_policy_pass(heard, batch, batch["completion_mask"])
        if found is not None:
            return found
        return run_policy_pass(self._read_pass, self.model, batch, self.args.per_device_train_batch_size)

    def _get_per_token_logps_and_entropies(self, model, *args, compute_entropy=False, **kwargs):
        if self._heard is None or model is not self.model:
            return super()._get_per_token_logps_and_entropies(model, *args, compute_entropy=compute_entropy, **kwargs)
        # TRL asks for log-probs alone here, although its fused head returns the entropy with them.
        reading, aux_loss = self._read_pass(model, *args, **kwargs)
        self._heard.append(reading)
        return reading.logps, reading.entropies if compute_entropy else None, aux_loss

    def _read_pass(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        """One of TRL's passes, with all that a [`TokenReading`] holds, and its router loss."""
        arguments = (input_ids, attention_mask, logits_to_keep, *args)
        kwargs["compute_entropy"] = True
        if not self.reads_expected_term:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *arguments, **kwargs)
            return TokenReading(logps, entropies), aux_loss
        cast = getattr(self.args, "cast_lm_head_to_fp32", False)
        with expected_terms(self._causal_lm(), self.temperature, cast) as terms:
            logps, entropies, aux_loss = super()._get_per_token_logps_and_entropies(model, *arguments, **kwargs)
        return TokenReading(logps, entropies, torch.cat(terms)[:, -logits_to_keep:]), aux_loss

    def _causal_lm(self) -> torch.nn.Module:
        """The module whose `forward` has TRL's fused head: without wrappers of ranks and adapters."""
        model = self.accelerator.unwrap_model(self.model)
        return model.get_base_model() if isinstance(model, PeftModel) else model
