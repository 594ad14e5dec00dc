"""Many steps under the filter on two ranks: flat memory, a complete log, a band that is followed, no drift."""

from statistics import mean, median

from long_run import STEPS


PART, BACKENDS, LIMIT = "long_run", ["cpu_ddp"], 60 + 0.3 * STEPS
# 4,000 more log records take 13 MB (3.1 kB each), and the medians still jump by some 15 MB. A batch of 32 rollouts
# that leaks each step (ids, masks, log-probs: some 20 kB) would take 80 MB more.
GROWTH = 60.0  # MB


def test_a_long_run_under_the_filter(launches):
    ranks = launches.results("cpu_ddp", PART)
    first = ranks[0]
    for rank in ranks:
        assert rank["steps"] == list(range(1, STEPS + 1))  # each step logged, and once
        assert rank["entropies"] == first["entropies"]
        assert rank["directions"] == first["directions"]
        assert rank["checksums"] == first["checksums"] and len(set(rank["checksums"])) == len(rank["checksums"])
        # One reading jumps by 30 MB, as memory goes back to the system or not: medians of ten.
        assert median(rank["memory"][-10:]) - median(rank["memory"][10:20]) < GROWTH, rank["memory"]
    inside = mean(direction == 0 for direction in first["directions"][STEPS // 10 :])
    memory = [round(median(rank["memory"][-10:]) - median(rank["memory"][10:20])) for rank in ranks]
    rejecting = mean(share < 1.0 for share in first["accepted"])
    print(f"{STEPS} steps: {inside:.0%} inside, {rejecting:.0%} reject something, {memory} MB more on the ranks")
    assert inside > 0.8
    assert rejecting > 0.05  # it was the filter that held it
