"""
What the policy says of each sampled token: its log-prob, the entropy of its distribution, and what the prediction of
entropy changes is made of. Decides nothing, knows no method.

Imports torch, transformers, accelerate, peft, TRL and itself.
"""
