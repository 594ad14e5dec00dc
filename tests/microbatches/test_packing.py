"""The loss of the micro-batches that are made up anew adds up to that of TRL's, for each kind of mean."""

import pytest
import torch
from torch.testing import assert_close
from trl.trainer.utils import split_tensor_dict

from entrocraft_trl.control.loss_inputs import drop_rollouts
from entrocraft_trl.microbatches.packing import SHARE, UNSLICEABLE, is_sliceable, packed, row_facts, rows_from_facts
from entrocraft_trl.microbatches.plan import plan_window, shares
from entrocraft_trl.normalisation import KEPT, ROW_SCALE, WEIGHT, micro_batch_weight
from entrocraft_trl.policy.tokens import loss_mask


ROWS, PROMPT, COMPLETION = 12, 4, 6


def batch_of(seed=0, **extra):
    """Loss inputs of 12 rollouts of different lengths, padded as TRL pads them; every third has no advantage."""
    source = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, PROMPT + 1, (ROWS,), generator=source)
    completions = torch.randint(1, COMPLETION + 1, (ROWS,), generator=source)
    completion_mask = (torch.arange(COMPLETION) < completions[:, None]).long()
    inputs = {
        "prompt_ids": torch.randint(2, 9, (ROWS, PROMPT), generator=source),
        "prompt_mask": (torch.arange(PROMPT) >= PROMPT - prompts[:, None]).long(),
        "completion_ids": torch.randint(2, 9, (ROWS, COMPLETION), generator=source),
        "completion_mask": completion_mask,
        "advantages": torch.randn(ROWS, generator=source).where(torch.arange(ROWS) % 3 != 0, 0.0),
        "num_items_in_batch": completion_mask.sum(),
        "tokens": torch.randn(ROWS, COMPLETION, generator=source),  # stands for what a loss makes of each token
        **extra,
    }
    inputs["prompt_ids"] *= inputs["prompt_mask"]
    inputs["completion_ids"] *= completion_mask
    return inputs


def repack(window, most, normaliser, kl=False):
    facts = torch.cat([row_facts(inputs, kl_in_loss=kl) for inputs in window])
    rows, widths = rows_from_facts(facts.tolist())
    plans = plan_window([rows], [widths], most)
    return packed(window, plans[0], shares([rows], plans), normaliser), plans[0]


def loss(inputs, normaliser):
    """The four kinds of mean that `NORMALISERS` describes, of `advantage * token`."""
    mask = loss_mask(inputs)
    terms = inputs["advantages"][:, None] * inputs["tokens"] * mask
    means = {
        "tokens": lambda: terms.sum() / inputs["num_items_in_batch"],
        "rows": lambda: terms.sum(1).mean(),
        "row_means": lambda: (terms.sum(1) / mask.sum(1).clamp(min=1)).mean(),
        "local_tokens": lambda: terms.sum() / mask.sum().clamp(min=1),
    }
    return means[normaliser]()


def total(batches, normaliser):
    return sum(micro_batch_weight(inputs, normaliser) * loss(inputs, normaliser) for inputs in batches)


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 4])
@pytest.mark.parametrize("normaliser", ["tokens", "rows", "row_means", "local_tokens"])
def test_the_losses_add_up(normaliser, parts, dropped):
    inputs = batch_of()
    if dropped:
        keep = torch.arange(ROWS) % 4 != 1
        tokens = inputs["completion_mask"][keep].sum().item()
        inputs = drop_rollouts(inputs, keep, token_normaliser=tokens, row_normaliser_share=keep.sum().item() / ROWS)
    window = split_tensor_dict(inputs, parts)
    batches, plan = repack(window, ROWS // parts, normaliser)
    assert sum(len(batch.rows) for batch in plan) == (6 if dropped else 8)
    assert len(batches) < parts or parts == 1
    expected = total(window, normaliser)
    assert expected.abs() > 1e-3
    assert_close(total(batches, normaliser), expected)


def test_a_step_with_the_wrong_weights_is_far_off():
    window = split_tensor_dict(batch_of(), 4)
    for normaliser in ("rows", "row_means", "local_tokens"):
        batches, plan = repack(window, 3, "tokens")  # which needs no weights
        assert [len(batch.rows) for batch in plan] == [3, 3, 2]
        assert (total(batches, normaliser) - total(window, normaliser)).abs() > 1e-2


def test_rows_keep_what_belongs_to_them():
    inputs = batch_of()
    window = split_tensor_dict(inputs, 3)
    batches, plan = repack(window, 4, "rows")
    for made, planned in zip(batches, plan, strict=True):
        assert made["prompt_ids"].shape == (len(planned.rows), planned.prompt_width)
        assert made["completion_ids"].shape == (len(planned.rows), planned.completion_width)
        assert made[WEIGHT] == len(planned.rows) / 4 and made[SHARE].shape == (7,)
        for place, row in enumerate(planned.rows):
            for key in ("prompt_ids", "completion_ids"):
                ids = inputs[key][row][inputs[key.replace("ids", "mask")][row].bool()]
                assert torch.equal(made[key][place][made[key.replace("ids", "mask")][place].bool()], ids)
            assert made["advantages"][place] == inputs["advantages"][row]
            width = planned.completion_width
            assert torch.equal(made["tokens"][place], inputs["tokens"][row, :width])


def test_keys_of_a_drop_become_the_weight():
    keep = torch.arange(ROWS) % 2 == 0
    inputs = drop_rollouts(batch_of(), keep, token_normaliser=9, row_normaliser_share=0.5)
    (made,), (planned,) = repack(split_tensor_dict(inputs, 2), 6, "rows")
    assert KEPT not in made and ROW_SCALE not in made
    assert len(planned.rows) == 4  # six are kept, two of them have no advantage
    assert made[WEIGHT] == 2.0 * 4 / 6


def test_a_filler_leaves_no_trace():
    inputs = batch_of(advantages=torch.zeros(ROWS))
    inputs["old_per_token_logps"] = torch.full((ROWS, COMPLETION), -1e4)
    inputs["importance_sampling_ratio"] = torch.full((ROWS, 1), 1e9)
    (made,), (planned,) = repack(split_tensor_dict(inputs, 2), 6, "rows")
    assert len(planned.rows) == len(planned.fillers) == 1
    assert not loss_mask(made).any() and made["completion_mask"].any()
    assert made["advantages"].tolist() == [0.0]
    assert not made["old_per_token_logps"].any() and made["importance_sampling_ratio"].tolist() == [[1.0]]
    assert inputs["old_per_token_logps"].max() == -1e4  # what the window holds is another iteration's too


# ----------------------------------------------------------------------------------------- which rows carry a gradient


def carrying(inputs, kl=False):
    return row_facts(inputs, kl_in_loss=kl)[:, 0].bool().tolist()


def test_rows_without_advantage_or_loss_token_carry_none():
    inputs = batch_of()
    assert carrying(inputs) == (inputs["advantages"] != 0).tolist()
    inputs["tool_mask"] = torch.ones(ROWS, COMPLETION, dtype=torch.long)
    inputs["tool_mask"][1] = 0
    assert carrying(inputs) == [row % 3 != 0 and row != 1 for row in range(ROWS)]
    inputs["completion_mask"][2] = 0  # truncated, and masked by TRL
    assert carrying(inputs) == [row % 3 != 0 and row not in (1, 2) for row in range(ROWS)]


def test_a_kl_term_acts_on_rows_without_advantage():
    inputs = batch_of()
    inputs["tool_mask"] = torch.ones(ROWS, COMPLETION, dtype=torch.long)
    inputs["tool_mask"][1] = 0
    assert carrying(inputs, kl=True) == [row != 1 for row in range(ROWS)]


def test_advantages_of_tokens():
    inputs = batch_of()
    inputs["advantages"] = inputs["advantages"][:, None] * torch.ones(ROWS, COMPLETION)
    assert carrying(inputs) == [row % 3 != 0 for row in range(ROWS)]
    batches, _ = repack(split_tensor_dict(inputs, 2), 6, "local_tokens")
    assert [made["advantages"].shape for made in batches] == [made["completion_ids"].shape for made in batches]


def test_rloo_reads_the_advantage_alone():
    inputs = batch_of(old_logps=torch.zeros(ROWS))
    inputs["completion_mask"][1] = 0  # a ratio of 1: no gradient, but a loss, which is logged
    assert carrying(inputs) == [row % 3 != 0 for row in range(ROWS)]


# -------------------------------------------------------------------------------------------------- what is left alone


@pytest.mark.parametrize(
    "extra",
    [
        {"num_images": [1] * ROWS},
        {"pixel_values": torch.zeros(2 * ROWS, 3)},
        {"token_type_ids": torch.zeros(ROWS, PROMPT + COMPLETION)},
        {"prompt_mask": torch.ones(ROWS, PROMPT + 1)},
    ],
)
def test_what_cannot_be_sliced(extra):
    inputs = {**batch_of(), **extra}
    assert not is_sliceable(inputs)
    assert set(row_facts(inputs, kl_in_loss=False)[:, 0].tolist()) == {UNSLICEABLE}


def test_what_can_be_sliced():
    extra = {"tool_mask": None, "importance_sampling_ratio": torch.ones(ROWS, 1), KEPT: torch.ones(ROWS).bool()}
    assert is_sliceable({**batch_of(), **extra})
