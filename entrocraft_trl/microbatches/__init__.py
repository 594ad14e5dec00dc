"""
Only rows that carry gradient are computed: after TRL has made and split a generation batch, each optimizer step's
rows are put into as few micro-batches as hold them, sorted by length and cropped, and what is left over is skipped.
TRL's passes of the old policy and of the reference, where they can wait until then, go over the same micro-batches.

Knows no method, and nothing of entropy: a row carries gradient if it has a loss token, and an advantage or a KL term.
Imports nothing of this package but modules of the bottom line, `policy` and `data`.
"""
