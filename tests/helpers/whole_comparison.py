"""A comparison that takes a second: a file with something of every kind, on a policy that is hardly warmed up."""

WHOLE = {
    "task": {"name": "expressions", "steps": 2, "habit_steps": 1, "batch_size": 8},
    "training": {"max_steps": 4, "per_device_train_batch_size": 16},
    "seeds": [0, 1],
    "evaluation": {"temperature": 0.6, "samples": 4},
    "band_width": 0.1,
    "bands": {"constant": 0.85, "linear": [[0, 1.0], [1, 0.5]]},
    "methods": {
        "grpo": {},
        "bonus": {"method": "adaptive_bonus", "follow": {"entropy_target": "centre"}},
        "rule": {"method": "entrocraft", "rejection_rule": "entropy_change"},
    },
    "tuning": {"seed": 9, "band": "linear", "candidates": {"bonus": [{"entropy_coef_delta": 0.04}, {}]}},
    "quick": {"training": {"max_steps": 2}, "seeds": [0], "bands": {"constant": None}},
}
