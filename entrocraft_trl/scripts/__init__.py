"""Files to hand to other programs: `train_job.py` is for `uv run` and `hf jobs uv run`."""
