"""
Where the advantage's sign tells how a rollout moves entropy, and where it does not, on the embedded task.

    python -m benchmarks.rules    # about 6 minutes on one thread, 4 of them for policies that are kept for later calls

At each of several policies, from undecided to nearly deterministic: how often both rejection rules agree, and the
predicted and the realised entropy change of a negative-only and of a positive-only update. Writes
`benchmarks/results/rules.{json,md,png}`.
"""

import copy
import json
import math
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch


RESULTS = Path(__file__).parent / "results"
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

    from entrocraft_trl.comparison import expression_arguments, expression_task

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
    from entrocraft_trl import rejection

    half = (2 * logps).log_softmax(dim=-1)
    tokens = rollouts.ids[:, -logps.size(1) :].unsqueeze(-1)
    sampled, half_sampled = (log.gather(-1, tokens).squeeze(-1) for log in (logps, half))
    entropies, half_entropies = (-(log.exp() * log).sum(dim=-1) for log in (logps, half))
    terms = rejection.sampled_entropy_term(sampled, entropies)
    expected = rejection.expected_entropy_term(sampled, entropies, half_sampled, half_entropies)
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


def sign_matches(rows: list[dict], expected: str, realised: str) -> dict[str, str]:
    """
    On how many of the one-sided updates does the realised change have the expected sign, of all updates and of those
    whose change differs from 0 by more than two standard errors?
    """
    right = {"all": [], "clear": []}
    for row in rows:
        for side in ("negative", "positive"):
            change = row[f"{realised}_{side}"]
            if change is None:
                continue
            # What the paper's theorem says: negative-only raises the entropy, positive-only lowers it.
            theorem = 1.0 if side == "negative" else -1.0
            match = (theorem if expected == "theorem" else row[f"{expected}_{side}"]) * change > 0
            right["all"].append(match)
            if abs(change) > 2 * row.get(f"{realised}_{side}_std", math.inf) / math.sqrt(BATCHES):
                right["clear"].append(match)
    return {name: f"{sum(matches)}/{len(matches)}" for name, matches in right.items()}


def markdown(rows: list[dict]) -> str:
    lines = [
        "| # | policy | entropy (nats) | reward | margin, wrong | margin, right | rules agree | weighted by c | "
        "negative-only: predicted | realised | fresh samples | positive-only: predicted | realised | fresh samples |",
        "|---" * 14 + "|",
    ]
    for index, row in enumerate(rows, start=1):
        cells = [str(index), row["policy"], f"{row['entropy']:.3f}", f"{row['reward']:.3f}"]
        cells += [cell(row, "margin_negative", "{:+.3f}"), cell(row, "margin_positive", "{:+.3f}")]
        cells += [cell(row, "agreement", "{:.0%}"), cell(row, "agreement_weighted", "{:.0%}")]
        for side in ("negative", "positive"):
            cells.append(cell(row, f"predicted_{side}", "{:+.1f}", 1e3))
            for name in ("realised", "realised_fresh"):
                cells.append(cell(row, f"{name}_{side}", "{:+.2f}", 1e3))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(row: dict, name: str, form: str, scale: float = 1.0) -> str:
    """A number, with its standard deviation over batches where there is one."""
    if row[name] is None:
        return "–"
    text = form.format(scale * row[name])
    if f"{name}_std" in row:
        text += " ± " + form.replace("+", "").format(scale * row[f"{name}_std"])
    return text


def draw(rows: list[dict]):
    """Agreement and margins against entropy (left), predicted against realised changes (middle and right)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 4.6))
    grid = figure.add_gridspec(2, 3)
    share, margin = (figure.add_subplot(grid[line, 0]) for line in (0, 1))
    share.sharex(margin)
    entropies = [row["entropy"] for row in rows]
    share.plot(entropies, [row["agreement"] for row in rows], "o", color="#009E73", label="of the rollouts")
    weighted = [row["agreement_weighted"] for row in rows]
    share.plot(entropies, weighted, "s", color="#666666", markerfacecolor="none", label="of the sum of |c|")
    number_points(share, zip(entropies, [row["agreement"] for row in rows], strict=True))
    share.set(ylim=(0, 1), ylabel="both rules agree on")
    share.tick_params(labelbottom=False)
    for side, (title, colour, marker) in SIDES.items():
        values = [row[f"margin_{side}"] for row in rows]
        margin.plot(entropies, values, marker, color=colour, label=f"{title} rollouts")
    margin.axhline(0, color="#999999", linewidth=0.8)
    margin.set(xlabel="policy entropy (nats)", ylabel="mean margin (nats)")
    for axis in (share, margin):
        axis.legend(fontsize=7, ncols=2, loc="lower left", bbox_to_anchor=(0, 0.97), frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    for column, name, title in ((1, "realised", "on the same contexts"), (2, "realised_fresh", "on fresh samples")):
        axis = figure.add_subplot(grid[:, column])
        draw_changes(axis, rows, name)
        axis.set_title(f"entropy change {title}", fontsize=10)
    figure.axes[2].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    return figure


SIDES = {"negative": ("wrong", "#0072B2", "v"), "positive": ("right", "#D55E00", "^")}


def draw_changes(axis, rows: list[dict], name: str) -> None:
    """Predicted against realised changes (1e-3 nats), square-root scaled; in the grey quadrants their signs agree."""
    import numpy as np

    def root(values):
        return np.sign(values) * np.abs(values) ** 0.5

    def square(values):
        return values * abs(values)

    reach_x, reach_y = 60.0, 6.0
    for side, (_, colour, marker) in SIDES.items():
        x = [1e3 * row[f"predicted_{side}"] for row in rows]
        y = [1e3 * row[f"{name}_{side}"] for row in rows]
        errors = [1e3 * row[f"{name}_{side}_std"] / math.sqrt(BATCHES) for row in rows]
        axis.errorbar(x, y, yerr=errors, fmt=marker, color=colour, linewidth=1, label=f"{side}-only update")
        number_points(axis, zip(x, y, strict=True), colour)
    axis.axhline(0, color="#999999", linewidth=0.8)
    axis.axvline(0, color="#999999", linewidth=0.8)
    axis.set_xscale("function", functions=(root, square))
    axis.set_yscale("function", functions=(root, square))
    axis.set(xlim=(-reach_x, reach_x), ylim=(-reach_y, reach_y))
    axis.set(xticks=(-50, -20, -5, 0, 5, 20, 50), yticks=(-5, -2, -0.5, 0, 0.5, 2, 5))
    axis.axvspan(0, reach_x, 0.5, 1.0, color="#F0F0F0", zorder=0)
    axis.axvspan(-reach_x, 0, 0.0, 0.5, color="#F0F0F0", zorder=0)
    axis.set(xlabel="predicted (1e-3 nats per unit of step)", ylabel="realised (1e-3 nats)")
    axis.spines[["top", "right"]].set_visible(False)


def number_points(axis, points, colour: str = "#333333") -> None:
    """The policies' numbers in the table beside their points."""
    for index, point in enumerate(points, start=1):
        axis.annotate(str(index), point, textcoords="offset points", xytext=(5, 3), fontsize=7, color=colour)


def summarise(rows: list[dict]) -> dict[str, dict[str, str]]:
    """How often each way to foresee the direction of a one-sided update was right."""
    return {
        f"{expected}_{realised}": sign_matches(rows, expected, realised)
        for expected in ("theorem", "predicted")
        for realised in ("realised", "realised_fresh")
    }


def verdict(summary: dict[str, dict[str, str]]) -> str:
    lines = [
        "| direction of a one-sided update foreseen by | same contexts, all | same contexts, clear "
        "| fresh samples, all | fresh samples, clear |",
        "|---" * 5 + "|",
    ]
    titles = {"theorem": "sign of the advantage", "predicted": "predicted entropy change"}
    for expected, title in titles.items():
        counts = [
            summary[f"{expected}_{realised}"][which]
            for realised in ("realised", "realised_fresh")
            for which in ("all", "clear")
        ]
        lines.append(f"| {title} | " + " | ".join(counts) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = []
    for policy in make_policies():
        rows.append(measure_policy(policy))
        print({name: round(v, 5) if isinstance(v, float) else v for name, v in rows[-1].items()}, flush=True)
    rows.sort(key=lambda row: -row["entropy"])
    summary = summarise(rows)
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"step_kl": STEP_KL, "signs": summary, "rows": rows}
    (RESULTS / "rules.json").write_text(json.dumps(content, indent=2) + "\n")
    text = (
        f"Policies by falling entropy; {BATCHES} batches of {PROMPTS * GROUP} rollouts, {GROUP} a prompt (mean ± "
        "standard deviation over batches). Margin: mean over rollouts of the sum of S - N, N exact. Predicted: minus "
        "the sum of `c_i` over the accepted rollouts, per accepted token and unit of step (1e-3 nats). Realised: "
        f"change of the mean token entropy (1e-3 nats) after one SGD step of KL {STEP_KL:g} per token, on the same "
        "contexts, and on fresh samples (common random numbers). Made by `python -m benchmarks.rules`.\n\n"
        f"{markdown(rows)}\n"
        "Clear: the change is more than two standard errors (over batches) from 0. By the advantage's sign, a "
        "negative-only update raises the entropy and a positive-only one lowers it.\n\n"
        f"{verdict(summary)}"
    )
    (RESULTS / "rules.md").write_text(text)
    print(text)
    draw(rows).savefig(RESULTS / "rules.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
