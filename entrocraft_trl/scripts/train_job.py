# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.8",
#     "trl>=1.16.0,<2",
#     "transformers>=5.8.0,<6",
#     "peft>=0.21",
#     "datasets>=4.7",
#     "accelerate>=1.10.1",
#     "matplotlib>=3.9",
#     "math-verify>=0.8",
# ]
# ///
"""
`entrocraft train` as one file, for machines on which nothing is installed but uv:

    PACKAGE="entrocraft_trl @ git+https://github.com/USER/REPOSITORY"    # where you keep the package
    uv run --with "$PACKAGE" train_job.py --config my.yaml
    hf jobs uv run --flavor a10g-large --timeout 8h --secrets HF_TOKEN --with "$PACKAGE" train_job.py \
        --model_name_or_path Qwen/Qwen3-0.6B ... --push_to_hub --hub_model_id USER/MODEL \
        --hub_private_repo true --hub_strategy checkpoint --save_steps 50 --resume_from_checkpoint hub

The checkpoints on the Hub hold rollouts that were still to be trained on, hence prompts and completions; resuming from
them, with DeepSpeed or sharded FSDP, runs code that is put there. Keep that repository private, and your own.

The package itself is not among the dependencies above: it is on no index, and whoever took its name there would run
code in your jobs. Options are those of `entrocraft train`; `--help` lists them.
"""

import sys


def main() -> int:
    """Run `entrocraft train` with the options of this process; returns its exit code."""
    try:
        from entrocraft_trl.cli import main as entrocraft
    except ModuleNotFoundError as error:
        if error.name != "entrocraft_trl":
            raise
        print(
            "train_job: the package entrocraft_trl is not installed. Name where it is kept, for instance: "
            'uv run --with "entrocraft_trl @ git+https://github.com/USER/REPOSITORY" train_job.py ...',
            file=sys.stderr,
        )
        return 2
    return entrocraft(["train", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
