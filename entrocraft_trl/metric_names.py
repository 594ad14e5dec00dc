"""
Names of the metrics that this package adds to a trainer's log. Written by `control`, read by `reports` and benchmarks.

No other file spells their prefix: they are a promise to whoever reads the logs, see CHANGELOG.md.
"""

PREFIX = "entrocraft/"


def key(name: str) -> str:
    """Name in the log of the metric `name`, as in `key("entropy")`."""
    return PREFIX + name


# Those that are read again. Entropies and edges of the band are in nats, shares lie in 0..1, the others are counts of
# rollouts, or the direction -1, 0 or 1.
ENTROPY = key("entropy")
LOW = key("entropy_low")
HIGH = key("entropy_high")
DIRECTION = key("direction")
ACCEPTED = key("accepted_rollouts")
ACCEPTED_TOKENS = key("accepted_tokens")
EFFECTIVE_BATCH_SIZE = key("effective_batch_size")
REJECTED_POSITIVE = key("rejected_positive")
REJECTED_NEGATIVE = key("rejected_negative")

# What the update computed, and how long it took: see `microbatches.metrics`.
COMPUTED_ROWS = key("computed_rows")
COMPUTED_TOKENS = key("computed_tokens")
SECONDS_GENERATION = key("seconds_generation")
SECONDS_READING = key("seconds_reading")
SECONDS_UPDATE = key("seconds_update")
