"""
Rival methods: what others do about the entropy of a policy, each in a file of its own as a config and a trainer, with
the one thing that it changes of TRL's GRPO, the variant that is implemented, and what could not be verified.

`base` has what all of them check, `loss_pass` the place between TRL's forward pass and its loss, `signed_rewards` the
raw rewards, `sampled_policy` what the sampling policy says of each token, `state` what checkpoints keep. The official
semantics of Entrocraft is no file here: it is `EntrocraftGRPOTrainer` with `out_of_band_advantages="reward"` and
`rejected_rollouts="zero_advantage"`, as the head of each recipe says. All methods have their names, for the command
and for comparisons, in `methods.py`.

Imports `services`, `policy` and what lies below; never `control`.
"""
