"""What the policy says of each token while it samples it: read from the logits that generation computes anyway."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .tokens import TokenReading, entropy_moments


class Turn(NamedTuple):
    """
    One completion of one generation call: token ids of its prompt and its own, and their numbers `(3, T)`, ordered as
    in [`TokenReading`].
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    numbers: torch.Tensor


class _Distributions(NamedTuple):
    """Of one forward pass; the next pass shows which tokens were sampled from them."""

    logits: torch.Tensor  # (B, V), as the model returns them
    log_normaliser: torch.Tensor  # (B,), of the logits over the temperature
    entropies: torch.Tensor  # (B,)
    expected: torch.Tensor  # (B,)


class GenerationRecorder:
    """
    Listens to the forward passes of one call of `generate` and keeps what they say of the sampled tokens.

    The forward hook sees the logits of the next token before any processor touches them, which is what a pass over the
    rollouts reads; the pre-hook of the next pass sees which token was sampled. Nothing of the model is replaced, no
    random number is drawn, and nothing is raised: whatever looks unfamiliar (beams, guidance, assisted decoding, a
    compiled model) leaves a record that does not fit what `generate` returned, and [`turns`] is where that shows.

    Args:
        model (`torch.nn.Module`): The causal LM, without wrappers.
        temperature (`float`): Of the sampling.
    """

    def __init__(self, model: torch.nn.Module, temperature: float):
        self.model, self.temperature = model, temperature
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []  # sampled tokens `(B,)`, their numbers `(3, B)`
        self._pending: _Distributions | None = None
        self._prompt_width = 0
        self._familiar = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        hooks = (
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _before(self, module, arguments, keywords) -> None:
        if not self._familiar:
            return
        try:
            ids = keywords["input_ids"] if "input_ids" in keywords else arguments[0]
            if self._pending is None:
                self._prompt_width = ids.size(1)
                return
            # With a cache each pass sees one new token, without one all of them. Other passes look at candidates, or
            # at a further part of the prompt: their last token was not drawn from the distribution before.
            passes = len(self._steps) + 1
            self._familiar = ids.size(1) in (1, self._prompt_width + passes)
            self._finish_step(ids[:, -1])
        except Exception:  # never the generation's fault: the record is given up, and a pass takes its place
            self._familiar = False

    def _after(self, module, arguments, output) -> None:
        # What a compiled graph returns is overwritten by its next replay.
        if not self._familiar or torch.compiler.is_compiling():
            self._familiar = False
            return
        try:
            logits = output.logits
            # A view would keep the logits of a whole prompt alive until the next pass.
            last = logits[:, -1].clone() if logits.size(1) > 1 else logits[:, -1]
            self._pending = _Distributions(last, *entropy_moments(last, self.temperature))
        except Exception:
            self._familiar = False

    def _finish_step(self, tokens: torch.Tensor) -> None:
        pending, self._pending = self._pending, None
        chosen = pending.logits.gather(-1, tokens.to(pending.logits.device).unsqueeze(-1)).squeeze(-1)
        logps = chosen.float() / self.temperature - pending.log_normaliser
        self._steps.append((tokens, torch.stack([logps, pending.entropies, pending.expected])))

    def turns(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Turn]:
        """
        The record as one [`Turn`] for each completion; empty if other tokens were seen than those that came out.

        Args:
            prompts, completions (`Sequence[Sequence[int]]`): Token ids that went into `generate` and came out of it,
                completions up to and with their end token.
        """
        if not self._familiar or self._pending is None or len(self._pending.logits) != len(completions):
            return []
        # The last tokens were sampled, but went into no further pass. Rows that had ended before have none.
        last = len(self._steps)
        ends = [ids[last] if len(ids) > last else 0 for ids in completions]
        self._finish_step(torch.tensor(ends, device=self._pending.logits.device))
        if any(len(tokens) != len(completions) for tokens, _ in self._steps):
            return []
        seen = torch.stack([tokens for tokens, _ in self._steps], dim=1).tolist()  # (B, T)
        if any(list(ids) != row[: len(ids)] for ids, row in zip(completions, seen, strict=True)):
            return []
        rows = torch.stack([numbers for _, numbers in self._steps], dim=-1).unbind(dim=1)  # (3, T) each
        return [
            Turn(tuple(prompt), tuple(ids), numbers[:, : len(ids)])
            for prompt, ids, numbers in zip(prompts, completions, rows, strict=True)
        ]


def reading_of_rollouts(turns: Sequence[Turn], batch: dict[str, Any], mask: torch.Tensor) -> TokenReading | None:
    """
    Put recorded turns in their places in the rollouts `(B, T)` of a batch; `None` if a loss token is not covered, or
    one of its numbers is not finite.

    A turn belongs to a rollout that begins with the turn's prompt and goes on with its tokens: the whole completion,
    or one call of the model between two tool results. Rollouts that are equal token by token have equal numbers.

    Args:
        turns (`Sequence[Turn]`): Recorded while the rollouts were generated.
        batch (`dict`): Loss inputs with `prompt_ids`, `prompt_mask` `(B, P)`, `completion_ids` `(B, T)`.
        mask (`torch.Tensor` of shape `(B, T)`): 1 on loss tokens.
    """
    by_prompt: dict[tuple[int, ...], list[Turn]] = {}
    for turn in turns:
        by_prompt.setdefault(turn.prompt, []).append(turn)
    lengths = sorted({len(prompt) for prompt in by_prompt})
    numbers = torch.full((len(TokenReading._fields), *mask.shape), torch.nan, device=mask.device)
    prompt_rows, completions = batch["prompt_ids"].tolist(), batch["completion_ids"].tolist()
    for row, (prompt_mask, prompt_row, completion) in enumerate(
        zip(batch["prompt_mask"].tolist(), prompt_rows, completions, strict=True)
    ):
        prompt = [token for token, real in zip(prompt_row, prompt_mask, strict=True) if real]
        whole = (*prompt, *completion)
        for length in lengths:
            for turn in by_prompt.get(whole[:length], ()) if length >= len(prompt) else ():
                following = whole[length : length + len(turn.ids)]  # cut off where the rollout is
                if following == turn.ids[: len(following)]:
                    start = length - len(prompt)
                    numbers[:, row, start : start + len(following)] = turn.numbers[:, : len(following)]
    if not torch.isfinite(numbers[:, mask.bool()]).all():
        return None
    return TokenReading(*numbers.nan_to_num(nan=0.0))
