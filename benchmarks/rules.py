"""
Where the advantage's sign tells how a rollout moves entropy, and where it does not, on the embedded task.

    python -m benchmarks.rules    # about 6 minutes on one thread, 4 of them for policies that are kept for later calls

At each of several policies, from undecided to nearly deterministic: how often both rejection rules agree, and the
predicted and the realised entropy change of a negative-only and of a positive-only update. Writes
`benchmarks/results/rules.{json,md,png}`.
"""

import copy
import math
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch

from benchmarks.runs import one_quiet_thread


FOLDER = Path("runs/rules")
PROMPTS, GROUP, BATCHES = 64, 8, 3  # 512 rollouts a batch
FRESH_SEED = 1_000_000  # of the samples that an update was not computed from
GRPO_STEPS = (40, 100, 200, 300)
INVERTED_STEPS = (5, 10)  # rewarding wrong answers makes a policy confidently wrong
# Every update is one plain SGD step of this mean KL per token (nats). A typical log-prob then moves by 0.015: small
# enough to be first order, and the entropy by 1e-4 to 1e-2 nats, far above the 1e-7 of float32.
STEP_KL = 1e-4


class Rollouts(NamedTuple):
    """Sampled sequences `(B, 3 + T)`, mask of their completion tokens `(B, T)` and GRPO advantages `(B,)`."""

    ids: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    rewards: torch.Tensor


class Policy(NamedTuple):
    """A named policy, loaded on demand; `sharpness` multiplies its logits."""

    name: str
    folder: Path
    sharpness: float = 1.0


def make_policies() -> list[Policy]:
    """Policies of different confidence: warm-ups, checkpoints along plain GRPO, and sharpened ones."""
    from entrocraft_trl.tasks import WarmupSettings, starting_policy

    start = starting_policy(progress=False)
    undecided = starting_policy(settings=WarmupSettings(steps=120, habit_steps=1, habit_share=0.0), progress=False)
    right = starting_policy(settings=WarmupSettings(habit_share=0.0), progress=False)
    run = grpo_checkpoints(start, GRPO_STEPS)
    inverted = grpo_checkpoints(right, INVERTED_STEPS, inverted=True)
    return [
        Policy("short warm-up, no habit", undecided),
        Policy("right answers only", right),
        *[
            Policy(f"right answers, {step} GRPO steps on wrongness", inverted / f"checkpoint-{step}")
            for step in INVERTED_STEPS
        ],
        Policy("start (82% habit)", start),
        *[Policy(f"start, {step} GRPO steps", run / f"checkpoint-{step}") for step in GRPO_STEPS],
        Policy("start, logits x 2", start, 2.0),
        Policy("start, logits x 4", start, 4.0),
    ]


def grpo_checkpoints(start: Path, steps: tuple[int, ...], inverted: bool = False) -> Path:
    """Folder of a plain GRPO run from `start` with a checkpoint at each of `steps`; trained if missing."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from entrocraft_trl.tasks.task import expression_arguments, expression_task

    folder = FOLDER / f"grpo-{start.name}"
    if all((folder / f"checkpoint-{step}").is_dir() for step in steps):
        return folder
    task = expression_task(progress=False)

    def reward(**inputs):
        rewards = task.reward(**inputs)
        return [1.0 - value for value in rewards] if inverted else rewards

    arguments = expression_arguments(str(folder), max_steps=max(steps)) | {"disable_tqdm": True}
    arguments |= {"save_strategy": "steps", "save_steps": math.gcd(*steps), "save_only_model": True}
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(start),
        reward_funcs=reward,
        args=GRPOConfig(**arguments),
        train_dataset=task.train,
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return folder


def load(policy: Policy) -> torch.nn.Module:
    """The policy's model. The embeddings are tied, so scaling the last norm's weight scales the logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(policy.folder).eval()
    model.model.norm.weight.data.mul_(policy.sharpness)
    return model


@torch.no_grad()
def sample(model: torch.nn.Module, tokenizer, seed: int) -> Rollouts:
    """
    `PROMPTS * GROUP` rollouts at temperature 1.

    Two policies sampled with one seed share their random numbers, token by token: the same noise decides between the
    same candidates, so that close policies draw nearly the same rollouts.
    """
    from entrocraft_trl.tasks import MAX_COMPLETION_LENGTH, expressions

    data = expressions.make_dataset("train", PROMPTS, seed)
    prompts = [prompt for prompt in data["prompt"] for _ in range(GROUP)]
    ids = tokenizer(prompts, return_tensors="pt")["input_ids"]
    prompt_length = ids.size(1)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.empty(len(prompts), MAX_COMPLETION_LENGTH, model.config.vocab_size)
    noise.exponential_(generator=generator).log_().neg_()  # Gumbel: its argmax with the logits is a sample
    cache, last, ended = None, ids, torch.zeros(len(prompts), dtype=torch.bool)
    for position in range(MAX_COMPLETION_LENGTH):
        output = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        last = (output.logits[:, -1] + noise[:, position]).argmax(dim=-1, keepdim=True)
        last[ended] = tokenizer.pad_token_id
        ended |= last.squeeze(1) == tokenizer.eos_token_id
        ids = torch.cat([ids, last], dim=1)
    completions = ids[:, prompt_length:]
    eos = (completions == tokenizer.eos_token_id).long()
    mask = (eos.cumsum(dim=1) - eos) == 0
    texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
    targets = [target for target in data["target"] for _ in range(GROUP)]
    rewards = torch.tensor(expressions.expression_reward(texts, targets))
    groups = rewards.view(PROMPTS, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    return Rollouts(ids, mask, advantages.flatten(), rewards)


def token_logps(model: torch.nn.Module, rollouts: Rollouts) -> torch.Tensor:
    """Log-probs `(B, T, V)` of the whole vocabulary at each completion token, teacher-forced."""
    length = rollouts.mask.size(1)
    return model(input_ids=rollouts.ids[:, :-1]).logits[:, -length:].log_softmax(dim=-1)


def mean_entropy(logps: torch.Tensor, mask: torch.Tensor) -> float:
    """Mean over the masked tokens, in nats; in double precision, since differences of it are wanted."""
    logps = logps[mask].double()
    return -(logps.exp() * logps).sum(dim=-1).mean().item()


def margins(logps: torch.Tensor, rollouts: Rollouts) -> torch.Tensor:
    """Sum of S - N over each rollout's tokens, `(B,)`, N exact, by the functions that the trainer uses."""
    from entrocraft_trl.control import rejection
    from entrocraft_trl.policy.tokens import entropy_moments, sampled_entropy_term

    tokens = rollouts.ids[:, -logps.size(1) :].unsqueeze(-1)
    sampled = logps.gather(-1, tokens).squeeze(-1)
    _, entropies, expected = (value.view_as(sampled) for value in entropy_moments(logps.flatten(0, 1), 1.0))
    terms = sampled_entropy_term(sampled, entropies)
    return rejection.entropy_change_scores(torch.ones_like(rollouts.advantages), terms, expected, rollouts.mask)


def update(model: torch.nn.Module, rollouts: Rollouts, accept: torch.Tensor, logps: torch.Tensor) -> torch.nn.Module:
    """A copy of `model` after one SGD step of size `STEP_KL` on the accepted rollouts' policy gradient."""
    stepped = copy.deepcopy(model)
    tokens = rollouts.ids[:, -rollouts.mask.size(1) :].unsqueeze(-1)
    taken = token_logps(stepped, rollouts).gather(-1, tokens).squeeze(-1)
    weights = rollouts.mask * (rollouts.advantages * accept).unsqueeze(1)
    (-(weights * taken).sum() / (rollouts.mask * accept.unsqueeze(1)).sum()).backward()
    gradients = [parameter.grad for parameter in stepped.parameters()]
    rate = 1e-3 / math.sqrt(sum((gradient**2).sum().item() for gradient in gradients))
    step, moved = rate, 0.0
    with torch.no_grad():
        # The KL is quadratic in the step: two corrections reach the wanted one.
        for attempt in range(3):
            for parameter, gradient in zip(stepped.parameters(), gradients, strict=True):
                parameter.sub_(gradient, alpha=step - moved)
            moved = step
            if attempt < 2:
                after = token_logps(stepped, rollouts)[rollouts.mask].double()
                before = logps[rollouts.mask].double()
                divergence = (before.exp() * (before - after)).sum(dim=-1).mean().item()
                step *= math.sqrt(STEP_KL / max(divergence, 1e-12))
    return stepped


def measure_batch(model: torch.nn.Module, tokenizer, seed: int) -> dict[str, float | None]:
    """Agreement of the rules on one batch, and both one-sided updates from it. Changes are in nats."""
    rollouts = sample(model, tokenizer, seed)
    with torch.no_grad():
        logps = token_logps(model, rollouts)
    margin = margins(logps, rollouts)
    signs = {"negative": rollouts.advantages < 0, "positive": rollouts.advantages > 0}
    either = signs["negative"] | signs["positive"]
    weights = (rollouts.advantages * margin).abs()
    before = mean_entropy(logps, rollouts.mask)
    figures = {
        "entropy": before,
        "reward": rollouts.rewards.mean().item(),
        "agreement": (margin > 0)[either].float().mean().item() if either.any() else None,
        "agreement_weighted": (weights[margin > 0].sum() / weights.sum()).item() if either.any() else None,
    }
    fresh = sample(model, tokenizer, FRESH_SEED + seed)
    with torch.no_grad():
        fresh_before = mean_entropy(token_logps(model, fresh), fresh.mask)
    for name, accept in signs.items():
        keys = ("margin", "predicted", "realised", "realised_fresh", "rollouts")
        if not accept.any():
            figures |= {f"{key}_{name}": None for key in keys}
            continue
        stepped = update(model, rollouts, accept, logps)
        scores = (rollouts.advantages * margin)[accept]
        accepted_tokens = (rollouts.mask * accept.unsqueeze(1)).sum()
        resampled = sample(stepped, tokenizer, FRESH_SEED + seed)
        with torch.no_grad():
            after = mean_entropy(token_logps(stepped, rollouts), rollouts.mask)
            fresh_after = mean_entropy(token_logps(stepped, resampled), resampled.mask)
        values = (
            margin[accept].mean().item(),
            (-scores.sum() / accepted_tokens).item(),
            after - before,
            fresh_after - fresh_before,
            int(accept.sum()),
        )
        figures |= {f"{key}_{name}": value for key, value in zip(keys, values, strict=True)}
    return figures


def measure_policy(policy: Policy) -> dict:
    """Means over `BATCHES` batches, and standard deviations of the changes."""
    from transformers import AutoTokenizer

    model, tokenizer = load(policy), AutoTokenizer.from_pretrained(policy.folder)
    batches = [measure_batch(model, tokenizer, seed) for seed in range(BATCHES)]
    row = {"policy": policy.name}
    for name in batches[0]:
        values = [batch[name] for batch in batches if batch[name] is not None]
        row[name] = mean(values) if values else None
        if name.startswith(("predicted", "realised")) and len(values) > 1:
            row[f"{name}_std"] = stdev(values)
    return row


def main() -> None:
    from benchmarks.rules_report import write_report

    one_quiet_thread()
    rows = []
    for policy in make_policies():
        rows.append(measure_policy(policy))
        print({name: round(v, 5) if isinstance(v, float) else v for name, v in rows[-1].items()}, flush=True)
    write_report(rows)


if __name__ == "__main__":
    main()
