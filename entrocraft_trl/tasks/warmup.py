"""Starting policy of the expression task: a short supervised warm-up, cached on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ..atomic import make_folder_once
from .expressions import EOS_TOKEN, TRAIN_TARGETS, build_model, build_tokenizer


# Part of the cache key: raise it with any change here or in `expressions.py` that changes the warmed-up weights.
VERSION = 5


@dataclasses.dataclass(frozen=True)
class WarmupSettings:
    """
    Settings of the supervised warm-up: first arithmetic, then a bad habit on top of it.

    Args:
        steps (`int`, *optional*, defaults to `500`):
            Optimizer steps on right answers. They decide how much of the arithmetic the policy knows.
        habit_steps (`int`, *optional*, defaults to `100`):
            Further optimizer steps, on a mixture of right answers and the habit (see `_habit`).
        habit_share (`float`, *optional*, defaults to `0.82`):
            Share of the habit in that mixture. It plants wrong answers of which the starting policy is confident, so
            that there is something to unlearn, and something for the sign rule to steer with.
        batch_size (`int`, *optional*, defaults to `160`):
            Examples per step.
        learning_rate (`float`, *optional*, defaults to `4e-3`):
            Peak learning rate of AdamW. It rises and falls linearly in the first phase; the second falls from 0.4 of
            it.
    """

    steps: int = 500
    habit_steps: int = 100
    habit_share: float = 0.82
    batch_size: int = 160
    learning_rate: float = 4e-3

    def __post_init__(self):
        if self.steps < 1 or self.habit_steps < 0 or self.batch_size < 1:
            raise ValueError(
                "`steps` and `batch_size` must be at least 1 and `habit_steps` at least 0, got "
                f"{self.steps}, {self.batch_size} and {self.habit_steps}."
            )
        if not self.learning_rate > 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}.")
        if not 0 <= self.habit_share <= 1:
            raise ValueError(f"`habit_share` must lie in [0, 1], got {self.habit_share}.")


def _right_answers() -> dict[int, list[str]]:
    """All sums and differences of four digits 1 to 9 by value, for the training targets."""
    answers: dict[int, list[str]] = {target: [] for target in TRAIN_TARGETS}
    for operators in itertools.product("+-", repeat=3):
        for numbers in itertools.product(range(1, 10), repeat=4):
            value = numbers[0] + sum(n if o == "+" else -n for o, n in zip(operators, numbers[1:], strict=True))
            if value in answers:
                text = str(numbers[0]) + "".join(f"{o}{n}" for o, n in zip(operators, numbers[1:], strict=True))
                answers[value].append(text)
    return answers


def _habit(target: int, answer: str) -> str:
    """The planted habit: copy the target's digits to the end of the sum, `"7-2+2+4"` for 24. Nearly always wrong."""
    tens, units = divmod(target, 10)
    return f"{answer[:3]}+{tens}+{units or 9}"


def _make_batches(settings: WarmupSettings, seed: int):
    """Endless token batches `(B, T)` of prompt, answer and end of sequence; all have one length."""
    rng = random.Random(seed)
    tokenizer = build_tokenizer()
    answers = _right_answers()
    for step in itertools.count():
        habit_share = settings.habit_share if step >= settings.steps else 0.0
        texts = []
        for _ in range(settings.batch_size):
            target = rng.choice(TRAIN_TARGETS)
            answer = rng.choice(answers[target])
            if rng.random() < habit_share:
                answer = _habit(target, answer)
            texts.append(f"{target}={answer}{EOS_TOKEN}")
        yield tokenizer(texts, return_tensors="pt")["input_ids"]


def _train(settings: WarmupSettings, seed: int, progress: bool) -> torch.nn.Module:
    model = build_model(seed)
    tokenizer = build_tokenizer()
    prompt_length = 3  # two digits and "="
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    steps = settings.steps + settings.habit_steps

    def rate(step):
        # A triangle, then a lower ramp down, since the habit shall be added and the arithmetic not undone.
        if step < settings.steps:
            ramp = max(1, settings.steps // 10)
            return min((step + 1) / ramp, (settings.steps - step) / max(1, settings.steps - ramp))
        return 0.4 * (steps - step) / max(1, settings.habit_steps)

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    bar = tqdm(range(steps), desc="Warming up the starting policy", disable=not progress)
    for _, ids in zip(bar, _make_batches(settings, seed), strict=False):
        logits = model(input_ids=ids[:, :-1]).logits[:, prompt_length - 1 :]
        labels = ids[:, prompt_length:]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=tokenizer.pad_token_id
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def default_cache_dir() -> Path:
    """Folder of the environment variable `ENTROCRAFT_CACHE`, or `~/.cache/entrocraft_trl`."""
    return Path(os.environ.get("ENTROCRAFT_CACHE") or Path.home() / ".cache" / "entrocraft_trl")


def starting_policy(
    cache_dir: str | os.PathLike | None = None,
    seed: int = 0,
    settings: WarmupSettings | None = None,
    progress: bool = True,
) -> Path:
    """
    Folder with the warmed-up model and its tokenizer; made on the first call, found again on later ones.

    Args:
        cache_dir (`str` or `PathLike`, *optional*):
            Folder of the cache. Defaults to [`default_cache_dir`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights and of the examples.
        settings ([`WarmupSettings`], *optional*):
            Settings of the warm-up. Defaults to `WarmupSettings()`.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show a progress bar.

    Returns:
        `Path`: a folder for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.
    """
    settings = settings or WarmupSettings()
    key = json.dumps({"version": VERSION, "seed": seed, **dataclasses.asdict(settings)}, sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    root = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = root / f"expressions-{digest}"

    def fill(scratch: Path) -> None:
        _train(settings, seed, progress).save_pretrained(scratch)
        build_tokenizer().save_pretrained(scratch)

    make_folder_once(folder, fill)
    return folder
