"""
The method, in the order of a step: `schedule` (the band) -> `rejection` (Algorithm 1, and which rollouts go) ->
`loss_inputs` (how they go) -> `diagnosis` (what it did). `advantages` are what rollouts are judged by, `card` is what
the model card says, `state` what checkpoints keep. Wired into a trainer by `reading` (the batch's entropy, and where
the band lies), `loss` (the weight of what is left) and `mixin` (the step).

Imports torch, transformers, accelerate, peft, TRL, `policy` and itself; never a service.
"""
