"""
How good a policy is: sampling, scoring, mean@k, pass@k, distinct right answers, token entropy.

Knows models and rewards, no trainer's method. Imports `policy`, `data` and what lies below.
"""
