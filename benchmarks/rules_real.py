"""
Which rule foresees how a rollout moves the entropy of a real language model.

    make real-model && python -m benchmarks.rules_real                # about 20 minutes on one core
    python -m benchmarks.rules_real --adapter FOLDER                 # LoRA checkpoint of a run; its name is the row's

One batch is sampled as a training samples it, and each rule keeps what it would keep far below a band. Of what it
keeps: the share of the rise that all right-way rollouts of influence promise together; the cosine with the entropy's
gradient over all rollouts; and what the entropy does after one small step, on the same contexts and on those of a
fresh batch: a normalised gradient step, and a step along the gradient's sign, as Adam's first. Writes
`benchmarks/results/rules_real.{json,md}`, a table for each policy.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.runs import RESULTS, one_quiet_thread


ROLLOUTS, GROUP = 64, 4
ROWS = 16  # of one pass
# Nats: the gradient step is as long as one that would move the entropy by this much along its own gradient; the sign
# step is as long as that in the norm, which spreads it evenly over all parameters.
STEP = 0.02


def observed_trainer(adapter: str | None):
    """A trainer of ours on the sentence task, and a list that takes what its rule sees and scores in each batch."""
    import torch
    from peft import PeftModel

    from entrocraft_trl import EntrocraftGRPOConfig, EntrocraftGRPOTrainer
    from entrocraft_trl.tasks.sentences import MAX_COMPLETION_LENGTH
    from entrocraft_trl.tasks.task import load_policy, sentence_task

    seen: list[dict[str, Any]] = []

    class Observed(EntrocraftGRPOTrainer):
        def _judge(self, batch, advantages, mask, tokens, totals, band):
            seen.append({"batch": batch, "advantages": advantages, "mask": mask, "tokens": tokens, "totals": totals})
            return super()._judge(batch, advantages, mask, tokens, totals, band)

        def _influence_scores(self, *args):
            seen[-1]["influence"] = super()._influence_scores(*args)
            return seen[-1]["influence"]

    torch.manual_seed(0)
    task = sentence_task()
    model, tokenizer = load_policy(task)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload().requires_grad_()
    args = EntrocraftGRPOConfig(
        "runs/rules-real",
        per_device_train_batch_size=ROLLOUTS,
        num_generations=GROUP,
        max_completion_length=MAX_COMPLETION_LENGTH,
        max_steps=1,
        entropy_unit="nats",
        entropy_low=[100.0],  # far above any entropy: a full rise is called for
        entropy_high=[101.0],
        rejection_rule="influence",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = Observed(
        model=model, reward_funcs=task.reward, args=args, train_dataset=task.train, processing_class=tokenizer
    )
    return trainer, seen


def kept_by(observation: dict[str, Any]) -> dict[str, Any]:
    """Rollouts `(B,)` that each rule keeps where the largest rise is called for."""
    from entrocraft_trl.control import rejection
    from entrocraft_trl.policy.tokens import sampled_entropy_term

    advantages, tokens, influence = observation["advantages"], observation["tokens"], observation["influence"]
    sampled = sampled_entropy_term(tokens.logps, tokens.entropies)
    change = rejection.entropy_change_scores(advantages, sampled, tokens.expected, observation["mask"])
    both = rejection.both_scores(change, influence)
    return {
        "all": advantages != 0,
        "positive advantages": advantages > 0,
        "negative advantages (sign rule)": advantages < 0,
        "S - N (entropy change)": change < 0,
        "influence": influence < 0,
        "both, each by its mean size": both < 0,
    }


def gradients(trainer, observation: dict[str, Any], coefficients) -> list:
    """Gradient of `sum_i coefficients_i log pi(y_i)`, one tensor a parameter."""
    import torch

    from entrocraft_trl.policy.eval_mode import eval_mode
    from entrocraft_trl.policy.influence import trainable_parameters
    from entrocraft_trl.policy.passes import pass_of_rows, select_rows

    parameters = trainable_parameters(trainer.model)
    total = [torch.zeros_like(parameter) for parameter in parameters]
    with torch.enable_grad(), eval_mode(trainer.model):
        for rows in coefficients.nonzero().flatten().split(ROWS):
            rows = rows.tolist()
            reading = pass_of_rows(trainer._read_pass, trainer.model, select_rows(observation["batch"], rows), ROWS)
            logps = torch.where(observation["mask"][rows].bool(), reading.logps, 0.0).sum(dim=1)
            parts = torch.autograd.grad((coefficients[rows] * logps).sum(), parameters, materialize_grads=True)
            for ours, part in zip(total, parts, strict=True):
                ours.add_(part)
    return total


def entropy_at(trainer, observations: list[dict[str, Any]], values: list | None = None) -> list[float]:
    """Mean token entropy of each observation's rollouts in nats, with the parameters at `values`."""
    from contextlib import nullcontext

    from entrocraft_trl.policy.influence import held_at, trainable_parameters
    from entrocraft_trl.policy.passes import run_policy_pass

    found = []
    with held_at(trainable_parameters(trainer.model), values) if values else nullcontext():
        for observation in observations:
            reading = run_policy_pass(trainer._read_pass, trainer.model, observation["batch"], ROWS)
            mask = observation["mask"].bool()
            found.append(reading.entropies[mask].double().mean().item())
    return found


def measure(adapter: str | None) -> dict[str, Any]:

    from entrocraft_trl.policy.influence import entropy_gradient, total_norm, trainable_parameters

    trainer, seen = observed_trainer(adapter)
    batches = iter(trainer.get_train_dataloader())
    trainer.model.train()
    trainer.state.max_steps = 1  # the horizon of the schedule, which `train` would set
    for _ in range(2):  # the second one is the fresh batch
        trainer._generate_and_score_completions(next(batches))
    here, fresh = seen
    mask, influence = here["mask"], here["influence"]
    direction, count = entropy_gradient(
        trainer._read_pass,
        trainer.model,
        here["batch"],
        mask,
        range(len(mask)),
        aggregation="token",
        batch_size=ROWS,
    )
    norm = total_norm(direction)
    length = STEP / (norm / count)
    before = entropy_at(trainer, [here, fresh])
    parameters = trainable_parameters(trainer.model)
    size = sum(parameter.numel() for parameter in parameters)
    rows = []
    for rule, keep in kept_by(here).items():
        gradient = gradients(trainer, here, here["advantages"] * keep)
        own = total_norm(gradient)
        cosine = sum((a * b).sum().item() for a, b in zip(gradient, direction, strict=True)) / own / norm
        row = {"rule": rule, "kept": int(keep.sum()), "cosine": cosine}
        promised = (-influence).clamp(min=0).sum()
        row["share_of_rise"] = (-influence[keep].sum() / promised).item()
        agreeing = (keep == (influence < 0))[here["advantages"] != 0]
        row["decisions_of_influence"] = agreeing.float().mean().item()
        for name, steps in (
            ("gradient", [part * (length / own) for part in gradient]),
            ("sign", [part.sign() * (length / size**0.5) for part in gradient]),
        ):
            for step, parameter in zip(steps, parameters, strict=True):
                step.add_(parameter.detach())
            after = entropy_at(trainer, [here, fresh], steps)
            row[f"{name}_step"], row[f"{name}_step_fresh"] = (a - b for a, b in zip(after, before, strict=True))
            del steps
        print({key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}, flush=True)
        rows.append(row)
    return {
        "policy": Path(adapter).name if adapter else "start",
        "entropy": before[0],
        "rollouts": len(mask),
        "rows": rows,
    }


def table(found: dict[str, Any]) -> str:
    lines = [
        f"Policy: {found['policy']}; entropy {found['entropy']:.3f} nats; {found['rollouts']} rollouts.",
        "",
        "| kept | rollouts | decisions as influence | share of the rise that influence promises | cosine with the "
        "entropy's gradient | gradient step (fresh contexts), 1e-3 nats | sign step (fresh contexts), 1e-3 nats |",
        "|---" * 7 + "|",
    ]
    for row in found["rows"]:
        steps = [
            f"{1e3 * row[f'{name}_step']:+.2f} ({1e3 * row[f'{name}_step_fresh']:+.2f})"
            for name in ("gradient", "sign")
        ]
        lines.append(
            f"| {row['rule']} | {row['kept']} | {row['decisions_of_influence']:.0%} | {row['share_of_rise']:+.2f} | "
            f"{row['cosine']:+.2f} | {' | '.join(steps)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    from entrocraft_trl.tasks.real_model import PROVENANCE

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--adapter", help="Folder of a LoRA adapter of the study. Default: the model at its start.")
    options = parser.parse_args()
    one_quiet_thread()
    file = RESULTS / "rules_real.json"
    policies = json.loads(file.read_text())["policies"] if file.exists() else []
    found = measure(options.adapter)
    policies = [known for known in policies if known["policy"] != found["policy"]] + [found]
    file.write_text(json.dumps({"policies": policies}, indent=1) + "\n", encoding="utf-8")
    text = "\n".join(table(policy) for policy in policies)
    (RESULTS / "rules_real.md").write_text(f"{PROVENANCE}\n\n{text}", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
