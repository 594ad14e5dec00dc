"""RAFT++: right rollouts alone, with importance ratios and their clip (arXiv 2504.11343)."""

import textwrap
from dataclasses import dataclass

from .base import BaselineTrainer
from .signed_rewards import SignedRewardsConfig, SignedRewardsMixin


@dataclass
class RAFTPlusPlusConfig(SignedRewardsConfig):
    __doc__ = (
        "Configuration of [`RAFTPlusPlusTrainer`]: [`~trl.GRPOConfig`] and the fields below.\n"
        + SignedRewardsConfig.__doc__
    )


class RAFTPlusPlusTrainer(SignedRewardsMixin, BaselineTrainer):
    """
    [`~trl.GRPOTrainer`] whose advantage is 1 for a right rollout and 0 for any other (RAFT++, arXiv 2504.11343).

    What is different: the advantages. Rollouts that are not right stay in the denominator of the loss, and in its KL
    term, where PSR's leave it. Ratio and clip, which make RAFT into RAFT++, are TRL's; while each generation serves
    one optimizer step they do nothing, and this is RAFT.

    Variant: the official code's, where wrong rollouts count nothing. The paper states the rollouts of highest reward
    in their group, which would also train on groups that are all wrong. Not verified: the full text.

    Two methods of TRL's are overridden, `_generate_and_score_completions` and, to keep the rewards,
    `_calculate_rewards`.
    """

    _tag_names = ["trl", "grpo", "raft-plus-plus"]
    _config_class = RAFTPlusPlusConfig
    _name = "RAFT++"
    _paper = {
        "title": "A Minimalist Approach to LLM Reasoning: from Rejection Sampling to Reinforce",
        "id": "2504.11343",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{xiong2025minimalist,
                title  = {{A Minimalist Approach to LLM Reasoning: from Rejection Sampling to Reinforce}},
                author = {Wei Xiong and Jiarui Yao and Yuhui Xu and Bo Pang and Lei Wang and Doyen Sahoo and Junnan Li and Nan Jiang and Tong Zhang and Caiming Xiong and Hanze Dong},
                year   = 2025,
                eprint = {arXiv:2504.11343},
            }"""),  # noqa: E501
    }

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        return self.with_advantages(batch, self.signs_of_all_ranks().clamp(min=0))

    def card_section(self) -> list[str]:
        return ["## RAFT++", "", "The advantage of a right rollout was 1, that of any other 0."]
