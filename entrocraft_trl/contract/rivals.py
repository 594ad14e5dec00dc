"""What rival methods rely on beside `behaviour`. Each check's docstring is the name of its hook."""

from typing import Any

from .behaviour import build, first_batch
from .names import require


def token_advantages() -> None:
    """GRPOTrainer: the loss reads advantages, also of tokens, after its one pass"""
    import torch

    built = build("GRPOTrainer", "GRPOConfig")
    batch = first_batch(built)
    built.current_gradient_accumulation_steps = 1
    run, passes = built._get_per_token_logps_and_entropies, []

    def put(*args, **kwargs) -> Any:
        found = run(*args, **kwargs)
        passes.append(found)
        batch["advantages"] = torch.full_like(found[0], 2.0, requires_grad=True)
        return found

    built._get_per_token_logps_and_entropies = put
    loss = built._compute_loss(built.model, batch)
    require(len(passes) == 1, f"the loss runs {len(passes)} passes")
    # All ratios are 1 here, so that the loss is minus the mean advantage.
    require(abs(loss.item() + 2.0) < 1e-4, f"advantages of 2, put there in the pass, give a loss of {loss.item()}")
    (gradient,) = torch.autograd.grad(loss, batch["advantages"])
    require(bool((gradient != 0).any()), "advantages are cut off from the gradient")


def clip_bounds() -> None:
    """GRPOTrainer: the clip of the ratio is epsilon_low and epsilon_high, which may be infinite"""
    import torch

    built = build("GRPOTrainer", "GRPOConfig", epsilon=0.1, epsilon_high=0.3)
    bounds = built.epsilon_low, built.epsilon_high
    require(bounds == (0.1, 0.3), f"they are {bounds}, not the config's (0.1, 0.3)")
    batch = first_batch(built)
    built.current_gradient_accumulation_steps = 1
    built.epsilon_low = built.epsilon_high = float("inf")
    batch["advantages"] = torch.ones_like(batch["advantages"])
    batch["old_per_token_logps"] = torch.full(batch["completion_ids"].shape, -9.0)  # ratios far above 1
    loss = built._compute_loss(built.model, batch).item()
    require(-float("inf") < loss < -1.5, f"unclipped ratios far above 1 give a loss of {loss}")


def ordinary_logits() -> None:
    """GRPOTrainer: a model with the fused head gives ordinary logits, of as many tokens as asked for, without it"""
    import torch

    built = build("GRPOTrainer", "GRPOConfig", temperature=0.5)
    ids = torch.tensor([[3, 4, 5, 6]])
    asked = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = built.model(**asked, use_cache=False, logits_to_keep=3).logits
        logps, _, _ = built._get_per_token_logps_and_entropies(built.model, ids, asked["attention_mask"], 2)
    require(logits.shape[:2] == (1, 3), f"logits have shape {tuple(logits.shape)} for 3 tokens")
    own = (logits[:, :-1] / 0.5).log_softmax(-1).gather(-1, ids[:, -2:, None]).squeeze(-1)
    require(torch.allclose(own, logps, atol=1e-4), f"they say {own.tolist()} of tokens, TRL's pass {logps.tolist()}")


OTHERS = (token_advantages, clip_bounds, ordinary_logits)
