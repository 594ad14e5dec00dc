"""What the model card says of entropy control, as Markdown lines: what was done, by which rule, along which band."""

import textwrap
from collections.abc import Callable

from .config import EntropyControlConfig
from .loss_inputs import REJECTED
from .rejection import RULES


# What TRL's own part of the card cites.
PAPER = {
    "title": "Addressing Performance Saturation for LLM RL via Precise Entropy Curve Control",
    "id": "2604.26326",
    # docstyle-ignore
    "citation": textwrap.dedent("""\
        @article{li2026entrocraft,
            title  = {{Addressing Performance Saturation for LLM RL via Precise Entropy Curve Control}},
            author = {Bolian Li and Yifan Wang and Yi Ding and Anamika Lochab and Ananth Grama and Ruqi Zhang},
            year   = 2026,
            eprint = {arXiv:2604.26326},
        }"""),
}
PROGRESS = (0.0, 0.25, 0.5, 0.75, 1.0)


def card_section(
    args: EntropyControlConfig,
    band_at: Callable[[float], tuple[float, float]],
    *,
    in_nats: bool,
    initial_entropy: float | None,
    own_band: bool = False,
) -> list[str]:
    """
    The section, heading included.

    Args:
        args ([`EntropyControlConfig`]): The trainer's config.
        band_at (`Callable[[float], tuple[float, float]]`): Low and high edge at a progress in 0..1.
        in_nats (`bool`): Whether `band_at` gives the band in nats, or its edges in `entropy_unit`, because no batch
            was measured yet.
        initial_entropy (`float`, *optional*): The entropy in nats that the run measured first.
        own_band (`bool`, *optional*, defaults to `False`): Whether the band is a function of the user's, instead of
            the config's.
    """
    return [
        "## Entropy control",
        "",
        *describe_control(args, own_band),
        "",
        *band_table(band_at, "nats" if in_nats or args.entropy_unit == "nats" else "times the initial entropy"),
        *(
            ["", f"The entropy measured first was {initial_entropy:.3f} nats."]
            if in_nats and args.entropy_unit == "initial"
            else []
        ),
    ]


def describe_control(args: EntropyControlConfig, own_band: bool = False) -> list[str]:
    """What was done during training, in sentences."""
    shape = "given by a function" if own_band else f"`{args.entropy_schedule}`"
    return [
        "During training the entropy of the policy was steered along a band: on each generation batch the mean "
        f"entropy of its tokens was measured, and {RULES[args.rejection_rule]}. "
        f"{REJECTED[args.rejected_rollouts]}",
        "",
        f"Rule: `{args.rejection_rule}`; rejected rollouts: `{args.rejected_rollouts}`; schedule: {shape}"
        + ("; width: four times the scatter of one reading." if args.entropy_width == "auto" else "."),
    ]


def band_table(band_at: Callable[[float], tuple[float, float]], unit: str) -> list[str]:
    """Edges of the band over the schedule, in `unit`."""
    lines = [f"| progress of the schedule | low edge ({unit}) | high edge ({unit}) |", "|---|---|---|"]
    for progress in PROGRESS:
        low, high = band_at(progress)
        lines.append(f"| {progress:.0%} | {low:.3f} | {high:.3f} |")
    return lines
