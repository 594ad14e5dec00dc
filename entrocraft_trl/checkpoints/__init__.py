"""
Checkpoints that are complete or not there: written, resumed exactly, stopped by a signal, pushed to the Hub.

Knows trainers of TRL, and nothing of entropy. Imports `policy`, `data` and what lies below.
"""
