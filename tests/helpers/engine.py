"""What tests of a real vLLM share: engines built alike and forgotten, and the policy's numbers in float64."""

import copy
import functools
import os
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from trl.generation import vllm_generation


BAND = {"entropy_low": [0.9, 0.5], "entropy_high": [0.95, 0.6]}  # multiples of the first entropy; soon left
KV_CACHE_BYTES = 64 * 2**20  # far more than the tests need; by itself vLLM takes a share of the machine's memory


def build_with(options: dict, monkeypatch) -> None:
    """Every engine gets `options` too: TRL has no setting for them. They are looked up when it is built."""
    import vllm
    from vllm import _custom_ops

    LLM = vllm.LLM

    def build(**given):
        return LLM(**{**options, **given})

    monkeypatch.setattr(vllm, "LLM", build)
    monkeypatch.setattr(vllm_generation, "LLM", build)
    # vLLM packs linear weights for oneDNN and throws the originals away, which TRL's weight sync would write to:
    # "'Parameter' object has no attribute 'weight_loader'". Without oneDNN it multiplies by the weights as they are.
    monkeypatch.setattr(_custom_ops, "_supports_onednn", False)


@contextmanager
def forgotten():
    """
    What an engine leaves in the process goes: TRL sets the variables of a launcher, vLLM starts process groups. The
    next trainer would take itself for one rank of several.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    with patch.dict(os.environ):
        try:
            yield
        finally:
            cleanup_dist_env_and_memory()
            AcceleratorState._reset_state(reset_partial_state=True)


def log_probs_of(model, batch, temperature: float) -> torch.Tensor:
    """Log-probs `(B, T, V)` of all tokens at each place of the completions, by a copy of the model in float64."""
    model = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        ).logits
    return (logits[:, batch["prompt_ids"].size(1) - 1 : -1].double() / temperature).log_softmax(-1)


def sampled(log_probs: torch.Tensor, batch) -> torch.Tensor:
    """Those `(B, T)` of the tokens that were sampled."""
    return log_probs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def moment(log_probs: torch.Tensor, power: int) -> torch.Tensor:
    """Mean `(B, T)` of `(-log p) ** power` over the vocabulary: the entropy for 1."""
    return (log_probs.exp() * (-log_probs) ** power).sum(-1)


@functools.cache
def with_memory(trainer_class):
    """A trainer that keeps each generation batch, with the log-probs of the policy that it was sampled from."""

    class Remembers(trainer_class):
        def _generate_and_score_completions(self, inputs):
            batch = super()._generate_and_score_completions(inputs)
            model = self.accelerator.unwrap_model(self.model)
            self.__dict__.setdefault("batches", []).append((batch, log_probs_of(model, batch, self.temperature)))
            return batch

    return Remembers


def assert_read_from_the_policy(trainer) -> None:
    """Logged entropies and the engine's log-probs, against float64 on the same tokens, batch by batch."""
    logged = tiny.history(trainer, "entrocraft/entropy")
    assert len(logged) == len(trainer.batches) == trainer.args.max_steps
    for entropy, (batch, log_probs) in zip(logged, trainer.batches, strict=True):
        mask = batch["completion_mask"].bool()
        assert entropy == pytest.approx(moment(log_probs, 1)[mask].mean().item(), rel=1e-5)
        if "sampling_per_token_logps" in batch:  # RLOO asks for none
            of_engine = batch["sampling_per_token_logps"][mask].double()
            torch.testing.assert_close(of_engine, sampled(log_probs, batch)[mask], rtol=0, atol=1e-4)
