"""
How good a policy is: sampling, scoring, mean@k, pass@k, distinct right answers, token entropy.

`evaluate` is the way from prompts to figures: `sampling` (or `vllm_sampling`), `scoring`, `records`, `accuracy`. The
records of a long one are kept in a `sample_file`. `during_training` adds the same figures to a trainer's evaluations.
Knows models and rewards, no trainer's method. Imports `policy`, `data` and what lies below.
"""
