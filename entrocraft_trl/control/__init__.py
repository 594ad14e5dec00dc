"""
The method, in the order of a step: `schedule` (the band) -> `rejection` (Algorithm 1, and which rollouts go) ->
`loss_inputs` (how they go) -> `diagnosis` (what it did). `advantages` are what rollouts are judged by, `card` is what
the model card says, `state` what checkpoints keep; `mixin` wires them into a trainer.

Imports torch, transformers, accelerate, peft, TRL, `policy` and itself; never a service.
"""
