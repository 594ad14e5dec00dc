"""What computing only some rows relies on beside `behaviour`. Each check's docstring is the name of its hook."""

from .behaviour import build, first_batch
from .names import require


TWO_MICRO_STEPS = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "steps_per_generation": 2,
}


def buffer(trainer: str, config: str) -> None:
    """micro-batches lie in a list, a new one for each generation, and are handed out as they lie there"""
    built = build(trainer, config, **TWO_MICRO_STEPS)
    rows = next(iter(built.get_train_dataloader()))
    handed, lists = [], []
    for step in range(3):
        built._step = step
        handed.append(built._prepare_inputs(rows))
        lists.append(built._buffered_inputs)
    require(isinstance(lists[0], list) and len(lists[0]) == 2, f"for two micro-steps there is a {type(lists[0])}")
    require(lists[1] is lists[0] and lists[2] is not lists[0], "a list is not new exactly when rollouts are")
    places = [micro_batch is lists[step][step % 2] for step, micro_batch in enumerate(handed)]
    require(all(places), f"what is handed out is the micro-batch of the micro-step: {places}")


def skipped_step(trainer: str, config: str) -> None:
    """a training step that is left in _prepare_inputs has done nothing yet"""

    class Leave(Exception):
        pass

    def leave(inputs):
        raise Leave

    built = build(trainer, config)
    built._prepare_inputs = leave
    left = False
    try:
        built.training_step(built.model, {}, None)
    except Leave:
        left = True
    require(left, "what _prepare_inputs raises does not come out of training_step")
    require(built._step == 0, f"_step is {built._step}, and would be counted twice")
    require(built._current_train_step_time == 0.0, "the time of the step is counted already")
    require(all(parameter.grad is None for parameter in built.model.parameters()), "there is a gradient")


def logged_means(trainer: str, config: str) -> None:
    """metrics that the loss takes over the rows of a micro-batch, one value each"""
    from ..microbatches.metrics import RESTORED

    for loss_type in ("dapo", "cispo", "vespo") if trainer == "GRPOTrainer" else (None,):
        built = build(trainer, config, **({"loss_type": loss_type} if loss_type else {}))
        batch = first_batch(built)
        built.current_gradient_accumulation_steps = 1
        logged = built._metrics["train"]
        before = {name: len(values) for name, values in logged.items()}
        built._compute_loss(built.model, batch)
        added = {name: len(values) - before.get(name, 0) for name, values in logged.items()}
        added = {name: count for name, count in added.items() if count}
        require(set(added.values()) == {1}, f"the loss logs {added}, not one value of each")
        unknown = sorted(set(added) - set(RESTORED))
        require(not unknown, f"what do {unknown} mean where only some rows are computed?")


def settings_of_the_loss() -> None:
    """GRPOTrainer: attributes that tell whether a row without advantage has a gradient"""
    built = build("GRPOTrainer", "GRPOConfig")
    names = ("beta", "_entropy_bonus_enabled", "top_entropy_quantile", "aux_loss_enabled", "pad_to_multiple_of")
    missing = [name for name in names if not hasattr(built, name)]
    require(not missing, f"gone: {missing}")
    adaptive = build("GRPOTrainer", "GRPOConfig", entropy_coef=0.1)
    found = built._entropy_bonus_enabled, adaptive._entropy_bonus_enabled
    require(found == (False, True), f"without and with an entropy bonus _entropy_bonus_enabled is {found}")


def positions() -> None:
    """transformers: a config tells of rotary positions, which do not mind cropped padding, in rope_parameters"""
    from transformers import GPT2Config, Qwen3Config

    from ..microbatches.exactness import what_can_be_cropped

    found = what_can_be_cropped(Qwen3Config()), what_can_be_cropped(GPT2Config())
    require(found == ((True, True), (False, True)), f"of Qwen3 and GPT-2, {found} is said")


def deferrable_passes(trainer: str, config: str) -> None:
    """log-probs of the passes of old policy and reference go into loss inputs, and nowhere else before the loss"""
    import torch

    from ..microbatches.deferred_passes import key_of

    grpo = trainer == "GRPOTrainer"
    settings = {"num_iterations": 2, "beta": 0.1} if grpo else {}  # RLOO takes its KL term from rewards
    built, placeholders = build(trainer, config, peft_config=_lora(), **settings), []

    def unread(model, ids, attention_mask, width, *args, **kwargs):
        require(not torch.is_grad_enabled() and not kwargs.get("compute_entropy"), "a pass is asked for more")
        placeholders.append(torch.full((len(ids), width), torch.nan))
        return placeholders[-1], None, None

    built._get_per_token_logps_and_entropies = unread
    batch = first_batch(built)
    keys = [key_of(batch, placeholder) for placeholder in placeholders]
    expected = ["old_per_token_logps", "ref_per_token_logps"] if grpo else ["old_logps"]
    require(keys == expected, f"its passes, in their order, are those for {keys}, not for {expected}")
    read = [key for key, value in batch.items() if key not in keys and value.float().isnan().any()]
    logged = [name for name, values in built._metrics["train"].items() if torch.tensor(values).isnan().any()]
    require(not read + logged, f"log-probs are read for {read + logged}")


def reference_of_an_adapter() -> None:
    """GRPOTrainer: the reference's pass is by the policy's model with its adapter disabled, or with one called ref"""
    from peft import get_peft_model

    from ..microbatches.deferred_passes import adapter_in_use, computing_with
    from ..tasks import build_model

    model = get_peft_model(build_model(), _lora())
    model.add_adapter("other", _lora())
    with computing_with(model, "other"), computing_with(model, None):
        require(adapter_in_use(model) is None, "an adapter that is disabled counts as in use")
    require(adapter_in_use(model) == "default", f"after a context the adapter in use is {adapter_in_use(model)}")
    for named_ref, expected in ((False, ["default", None]), (True, ["default", "ref"])):
        built = build("GRPOTrainer", "GRPOConfig", peft_config=_lora(), num_iterations=2, beta=0.1)
        if named_ref:
            built.model.add_adapter("ref", _lora())
        run, found = built._get_per_token_logps_and_entropies, []

        def spy(model, *args, run=run, found=found, **kwargs):
            found.append(adapter_in_use(model))
            return run(model, *args, **kwargs)

        built._get_per_token_logps_and_entropies = spy
        first_batch(built)
        require(found == expected, f"the passes are by the adapters {found}, not by {expected}")


def _lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)


OF_BOTH = (buffer, skipped_step, logged_means, deferrable_passes)
OTHERS = (settings_of_the_loss, positions, reference_of_an_adapter)
