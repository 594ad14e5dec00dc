"""
The real model at its start on the sentence task: what there is to learn, and how far one reading scatters.

    make real-model && python -m benchmarks.sentences    # about 15 minutes on two cores

Rollouts are those of a training: prompts of the training split, groups of 8, temperature 1. Every entropy is a mean
over tokens in nats, as the trainer reads it. Writes `benchmarks/results/sentences.{json,md}`.
"""

import json
import time
from collections import Counter
from statistics import mean, stdev

from benchmarks.runs import RESULTS


GROUP = 8
BATCHES = 10
ROLLOUTS = 64  # of a batch; half of each gives the batches of 32
EVALUATED = 32  # completions of each held-out prompt
ALIKE = 100  # right answers that self-similarity is taken of, since it grows with their number


def batch_entropies(records: list[dict], prompts: int) -> list[float]:
    """Mean token entropy of the first `prompts` groups of each batch of `ROLLOUTS`."""
    step = ROLLOUTS // GROUP
    batches = [records[start : start + prompts] for start in range(0, len(records), step)]
    return [
        sum(sum(record["entropy_sums"]) for record in batch) / sum(sum(record["tokens"]) for record in batch)
        for batch in batches
    ]


def right_answers(records: list[dict]) -> list[str]:
    from entrocraft_trl.tasks.sentences import canonical_sentence

    return [
        canonical_sentence(text)
        for record in records
        for text, reward in zip(record["completions"], record["rewards"], strict=True)
        if reward
    ]


def faults(records: list[dict], words: list[list[str]]) -> dict[str, float]:
    """Share of the completions with each fault, the most frequent first."""
    from entrocraft_trl.tasks.sentences import sentence_fault

    counts = Counter(
        "right" if reward else "too long" if cut else sentence_fault(text, given) or "too long"
        for record, given in zip(records, words, strict=True)
        for text, reward, cut in zip(record["completions"], record["rewards"], record["truncated"], strict=True)
    )
    return {fault: count / counts.total() for fault, count in counts.most_common()}


def measure() -> dict:
    from entrocraft_trl.evaluation.accuracy import self_similarity
    from entrocraft_trl.evaluation.evaluate import sample_and_score
    from entrocraft_trl.evaluation.records import summarise_records
    from entrocraft_trl.tasks.sentences import canonical_sentence
    from entrocraft_trl.tasks.task import load_policy, sentence_task

    task = sentence_task()
    model, tokenizer = load_policy(task)

    def sampled(rows, n):
        return sample_and_score(
            model, tokenizer, rows, task.reward, n, generation_config=task.generation_config, batch_size=ROLLOUTS
        )

    def figures(records):
        answers = right_answers(records)[:ALIKE]
        more = {"self_similarity": self_similarity(answers), "self_similarity_of": len(answers)}
        return summarise_records(records, canonical=canonical_sentence) | more

    rows = task.train.select(range(BATCHES * ROLLOUTS // GROUP))
    start = time.perf_counter()
    training = sampled(rows, GROUP)
    seconds = (time.perf_counter() - start) / BATCHES
    scatter = {f"{prompts * GROUP}": batch_entropies(training, prompts) for prompts in (4, 8)}
    return {
        "training": figures(training),
        "held_out": figures(sampled(task.test, EVALUATED)),
        "faults": faults(training, rows["words"]),
        "batch_entropies": scatter,
        "seconds_per_batch": seconds,
        "samples": [[record["prompt"][-1]["content"], *record["completions"][:2]] for record in training[:20]],
    }


def table(result: dict) -> str:
    from entrocraft_trl.tasks.real_model import PROVENANCE

    names = ["mean@8", "pass@8", "mean@32", "pass@32", "distinct_correct", "self_similarity", "entropy", "mean_tokens"]
    lines = [PROVENANCE, "", f"| prompts | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for split in ("training", "held_out"):
        values = [f"{result[split][name]:.3f}" if name in result[split] else "" for name in names]
        lines.append(f"| {split.replace('_', ' ')} | {' | '.join(values)} |")
    lines += ["", "| rollouts of a batch | mean entropy | scatter |", "|---|---|---|"]
    for rollouts, values in result["batch_entropies"].items():
        lines.append(f"| {rollouts} | {mean(values):.3f} | {stdev(values):.3f} |")
    lines += ["", "| answers | share |", "|---|---|"]
    lines += [f"| {fault} | {share:.3f} |" for fault, share in result["faults"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    result = measure()
    (RESULTS / "sentences.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = table(result)
    (RESULTS / "sentences.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"{result['seconds_per_batch']:.0f} s for {ROLLOUTS} rollouts with their entropies")


if __name__ == "__main__":
    main()
