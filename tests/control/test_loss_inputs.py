"""From loss inputs and a keep mask to loss inputs, on hand-made tensors. The gradients: test_drop_equality.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from entrocraft_trl.control import loss_inputs
from entrocraft_trl.normalisation import micro_batch_weight
from entrocraft_trl.policy.tokens import loss_mask


def build_inputs(rows=4, **extra):
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])[:rows]
    return {
        "prompt_ids": torch.arange(rows * 2).view(rows, 2),
        "completion_ids": torch.arange(rows * 3).view(rows, 3),
        "completion_mask": mask,
        "advantages": torch.tensor([0.5, -0.5, 1.0, -1.0])[:rows],
        "num_items_in_batch": mask.sum(),
        **extra,
    }


KEEP = torch.tensor([False, True, False, True])


def drop(inputs, keep=KEEP, token_normaliser=5.0, row_normaliser_share=0.5):
    return loss_inputs.drop_rollouts(
        inputs, keep, token_normaliser=token_normaliser, row_normaliser_share=row_normaliser_share
    )


def test_loss_mask_counts_completion_and_tool_mask():
    inputs = build_inputs()
    assert torch.equal(loss_mask(inputs), inputs["completion_mask"])
    inputs["tool_mask"] = torch.tensor([[1, 0, 1]] * 4)
    expected = torch.tensor([[1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 1]])
    assert torch.equal(loss_mask(inputs), expected)


def test_zero_advantages_touches_the_advantages_alone():
    inputs = build_inputs()
    edited = loss_inputs.zero_advantages(inputs, KEEP)
    assert edited["advantages"].tolist() == [0.0, -0.5, 0.0, -1.0]
    assert inputs["advantages"].tolist() == [0.5, -0.5, 1.0, -1.0], "the given inputs were changed"
    assert edited.keys() == inputs.keys()
    assert all(edited[key] is inputs[key] for key in inputs if key != "advantages")


def test_drop_masks_rows_and_recounts():
    inputs = build_inputs(tool_mask=torch.tensor([[1, 0, 1]] * 4))
    before = {key: value.clone() for key, value in inputs.items()}
    edited = drop(inputs)
    assert edited["tool_mask"].tolist() == [[0, 0, 0], [1, 0, 1]] * 2
    assert edited["tool_mask"].dtype == inputs["tool_mask"].dtype
    assert edited["advantages"].tolist() == [0.0, -0.5, 0.0, -1.0]
    assert edited["num_items_in_batch"].ndim == 0 and edited["num_items_in_batch"] == 5
    assert all(torch.equal(inputs[key], before[key]) for key in inputs), "the given inputs were changed"
    untouched = {"prompt_ids", "completion_ids", "completion_mask"}
    assert all(edited[key] is inputs[key] for key in untouched)


def test_drop_makes_a_tool_mask_where_there_is_none():
    inputs = build_inputs()
    edited = drop(inputs)
    assert edited["tool_mask"].tolist() == [[0, 0, 0], [1, 1, 1]] * 2
    expected = [[0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 1, 1]]
    assert loss_mask(edited).tolist() == expected
    assert loss_mask(edited).dtype == inputs["completion_mask"].dtype


def test_drop_leaves_no_term_that_could_overflow():
    """Log-probs and ratios come token by token from GRPO, row by row from RLOO and from vLLM's sequence modes."""
    tokens = torch.full((4, 3), -200.0)
    extra = {
        "old_per_token_logps": tokens,
        "ref_per_token_logps": tokens,
        "old_logps": torch.tensor([-1.0, -2.0, -3.0, -4.0]),
        "importance_sampling_ratio": torch.full((4, 1), torch.inf),
    }
    edited = drop(build_inputs(**extra))
    assert edited["old_per_token_logps"].tolist() == [[0.0] * 3, [-200.0] * 3] * 2
    assert torch.equal(edited["ref_per_token_logps"][KEEP], tokens[KEEP])
    assert (edited["ref_per_token_logps"][~KEEP] < -1e20).all()  # below any log-prob
    assert edited["old_logps"].tolist() == [0.0, -2.0, 0.0, -4.0]
    assert edited["importance_sampling_ratio"].tolist() == [[1.0], [torch.inf]] * 2
    assert (tokens == -200).all(), "the given inputs were changed"


def test_a_fractional_token_normaliser_is_not_rounded():
    """`min_accepted_share` times the tokens is rarely a whole number; TRL's own count is an integer tensor."""
    inputs = build_inputs()
    assert not inputs["num_items_in_batch"].is_floating_point()
    edited = drop(inputs, token_normaliser=4.5)["num_items_in_batch"]
    assert edited.is_floating_point() and float(edited) == 4.5


def test_drop_keeps_shapes():
    inputs = build_inputs()
    edited = drop(inputs)
    assert all(edited[key].shape == inputs[key].shape for key in inputs)


def test_a_rejected_image_leaves_the_images_of_the_next_rollout_in_place():
    """
    Qwen-VL counts image tokens through the attention mask, and hands out one image shape after the other: without the
    image of a rejected row, the next row would take its shape.
    """
    image, text, size = 2, 5, 28  # tokens; 28 pixels: two patches of 14, merged into one token
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 14},
        image_token_id=image, video_token_id=3, vision_start_token_id=4,
    )  # fmt: skip
    model = Qwen2VLForConditionalGeneration(config).eval()
    # The image of the rejected rollout is one row of four tokens, the other's two by two.
    grids = torch.tensor([[1, 2, 8], [1, 4, 4]])
    pixels = torch.randn(32, 3 * 2 * size * size // 4)
    completions = torch.tensor([[image] * 4 + [text] * 3] * 2)
    inputs = {
        "prompt_ids": torch.tensor([[6, 7]] * 2),
        "completion_ids": completions,
        "completion_mask": torch.ones_like(completions),
        "advantages": torch.tensor([1.0, -1.0]),
        "num_items_in_batch": torch.tensor(14),
    }

    def logits_of_the_kept(batch):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([torch.ones_like(batch["prompt_ids"]), batch["completion_mask"]], dim=1)
        with torch.no_grad():
            output = model(
                input_ids=ids,
                attention_mask=mask,
                pixel_values=pixels,
                image_grid_thw=grids,
                mm_token_type_ids=(ids == image).int(),
            )
        return output.logits[1]

    edited = drop(inputs, torch.tensor([False, True]), 7.0, 0.5)
    assert loss_mask(edited).tolist() == [[0] * 7, [1] * 7]
    torch.testing.assert_close(logits_of_the_kept(edited), logits_of_the_kept(inputs), rtol=0, atol=0)


def test_nothing_left_has_a_finite_weight_above_zero():
    """The loss is 0 by its masks, and what it does not scale (a router loss) is divided by the weight."""
    edited = drop(build_inputs(), torch.zeros(4, dtype=torch.bool), 0.0, 0.0)
    assert float(micro_batch_weight(edited, "rows")) == 1.0
    assert float(micro_batch_weight(edited, "local_tokens")) == 0.25  # as if one row of four were left


@given(keep=st.lists(st.booleans(), min_size=8, max_size=8).filter(any), chunks=st.sampled_from([1, 2, 4]))
def test_weights_after_trls_shuffle_and_split(keep, chunks):
    """Row means weighted by `micro_batch_weight` make up the mean over all accepted rows, whatever the split."""
    keep = torch.tensor(keep)
    inputs = {
        "completion_ids": torch.arange(16).view(8, 2),
        "completion_mask": torch.ones(8, 2, dtype=torch.long),
        "advantages": torch.linspace(-1, 1, 8),
        "num_items_in_batch": torch.tensor(16),
    }
    edited = drop(inputs, keep, 2.0 * keep.sum().item(), keep.float().mean().item())
    row_losses = edited["advantages"] * 3.0
    edited["row_losses"] = torch.where(keep, row_losses, 0.0)
    micro_batches = split_tensor_dict(shuffle_sequence_dict(edited), chunks)
    row_total = bnpo_total = 0.0
    for micro_batch in micro_batches:
        assert micro_batch["num_items_in_batch"] == 2 * keep.sum()
        kept = micro_batch[loss_inputs.KEPT]
        row_mean = micro_batch["row_losses"].mean() / chunks  # TRL divides by the accumulation steps
        row_total += row_mean * micro_batch_weight(micro_batch, "rows")
        token_mean = micro_batch["row_losses"].sum() / kept.sum().clamp(min=1) / chunks  # equal lengths: bnpo's mean
        bnpo_total += token_mean * micro_batch_weight(micro_batch, "local_tokens")
        assert micro_batch_weight(micro_batch, "tokens") == 1.0
    expected = row_losses[keep].mean().item()
    assert float(row_total) == pytest.approx(expected, abs=1e-5)
    assert float(bnpo_total) == pytest.approx(expected, abs=1e-5)
