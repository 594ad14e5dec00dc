"""
What comes in: rows of data sets and the rewards of rollouts, each checked where its fault can still be named.

Imports libraries and itself.
"""
