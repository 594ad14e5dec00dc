"""The numbers of a distribution from four sums, against their definitions in float64."""

import pytest
import torch

from entrocraft_trl.policy import tokens


def definitions(logits, temperature):
    log_p = (logits.double() / temperature).log_softmax(-1)
    p = log_p.exp()
    h = -(p * log_p).sum(-1)
    return (logits.double() / temperature).logsumexp(-1), h, (p**2 * (log_p + h.unsqueeze(-1))).sum(-1)


@pytest.mark.parametrize("rows", [1, 4, 5])  # a part of a chunk, a whole one, one and a part
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])  # nearly uniform, usual, nearly all on one token
@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_moments_are_those_of_the_distribution(rows, scale, temperature, monkeypatch):
    monkeypatch.setattr(tokens, "CPU_CHUNK", 4 * 5000 + 1)
    logits = scale * torch.randn(rows, 5000, generator=torch.Generator().manual_seed(0)) + 100  # far from 0
    for ours, exact in zip(tokens.entropy_moments(logits, temperature), definitions(logits, temperature), strict=True):
        assert ours.shape == (rows,) and ours.dtype == torch.float32
        # float32 keeps seven digits of log Z near 100 / 0.6, hence 2e-5; sums of 5,000 terms lose one more
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=2e-5)


def test_logits_in_half_precision_are_summed_in_single():
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).bfloat16()
    for ours, exact in zip(tokens.entropy_moments(logits, 1.0), definitions(logits, 1.0), strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-6)


def test_a_certain_token_has_no_entropy():
    logits = torch.full((1, 10), -1000.0)
    logits[0, 3] = 1000.0
    log_z, entropy, expected = tokens.entropy_moments(logits, 1.0)
    assert (log_z.item(), entropy.item(), expected.item()) == (1000.0, 0.0, 0.0)


def test_loss_mask_counts_completion_and_tool_mask():
    inputs = {"completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    assert torch.equal(tokens.loss_mask(inputs), inputs["completion_mask"])
    inputs["tool_mask"] = torch.tensor([[1, 0, 1], [0, 1, 1]])
    assert tokens.loss_mask(inputs).tolist() == [[1, 0, 0], [0, 1, 1]]
