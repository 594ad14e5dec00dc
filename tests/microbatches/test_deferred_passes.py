"""
TRL's passes of the old policy and of the reference, over the rows that are computed: the same log-probs, of the same
model, adapter and time, from fewer rows; and TRL's own pass wherever somebody may read them before the loss.
"""

import contextlib

import pytest
import tiny
import torch
from equality import LORA
from peft import LoraConfig, get_peft_model
from test_equality import SPLITS, compare, computed_rows
from test_resume_windows import half_right
from transformers import ProcessorMixin
from trl import GRPOTrainer

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer
from entrocraft_trl.baselines.base import BaselineTrainer
from entrocraft_trl.microbatches.deferred_passes import filled, key_of
from entrocraft_trl.microbatches.exactness import passes_can_wait
from entrocraft_trl.microbatches.mixin import _NothingToCompute
from entrocraft_trl.policy.tokens import loss_mask


OLD, REFERENCE, SUMS = "old_per_token_logps", "ref_per_token_logps", "old_logps"
KEYS = {OLD, REFERENCE, SUMS}


def build(trainer_class=EntrocraftGRPOTrainer, adapter=None, reference_folder=None, dropout=0.0, **settings):
    """Samples for itself: rollouts that are forced are not recorded, and then TRL's pass is wanted at once."""
    band = tiny.TOO_LOW if issubclass(trainer_class, EntrocraftGRPOTrainer | EntrocraftRLOOTrainer) else {}
    settings = {"beta": 0.1, "learning_rate": 0.02, **SPLITS["two windows"], **band, **settings}
    args = tiny.build_config(trainer_class._config_class, **settings)
    model = tiny.build_model()
    model.config._name_or_path = str(reference_folder)
    torch.manual_seed(5)
    lora = LoraConfig(**LORA, lora_dropout=dropout)
    arguments = {"peft_config": lora} if adapter == "new" else {}
    if adapter == "trained further":  # TRL keeps what it was as an adapter called ref
        model = get_peft_model(model, lora)
    trainer = tiny.build_trainer(trainer_class, model, args, reward_funcs=half_right, **arguments)
    if adapter == "trained further":
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B.default" in name:
                    parameter.mul_(-1)
    return trainer


def prepare(trainer, accumulation=None):
    """Micro-batches of the first generation batch, as TRL splits them and as they are computed."""
    trainer.model.train()
    trainer.state.max_steps = 4
    trainer.current_gradient_accumulation_steps = accumulation or trainer.args.gradient_accumulation_steps
    repacked, split = trainer._repacked, []
    trainer._repacked = lambda buffer: split.extend(buffer) or repacked(buffer)
    torch.manual_seed(1)
    with contextlib.suppress(_NothingToCompute):
        trainer._prepare_inputs(tiny.generation_inputs(trainer))
    return split, [inputs for inputs in trainer._buffered_inputs if inputs]


def waiting(trainer, **arguments):
    """Which log-probs are not there yet when TRL has split a generation batch."""
    split, _ = prepare(trainer, **arguments)
    return {key: any(inputs[key].isnan().any().item() for inputs in split) for key in KEYS & split[0].keys()}


def rows_of(buffer, key) -> dict[tuple, torch.Tensor]:
    """Log-probs under `key` of each row that has a loss token, by its tokens, or their sum."""
    found = {}
    for inputs in buffer:
        mask = loss_mask(inputs).bool()
        for row in mask.any(dim=1).nonzero().flatten().tolist():
            real = inputs["completion_mask"][row].bool()
            prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
            value = inputs[key][row]
            tokens = (*prompt.tolist(), *inputs["completion_ids"][row][real].tolist())
            found[tokens] = value[real] if value.ndim else value
    return found


def count_rows(trainer) -> list[int]:
    """Rows of each forward pass without gradient that is one over whole rollouts."""
    counts = []

    def count(module, arguments, keywords):
        if keywords.get("fused_lm_head") and not torch.is_grad_enabled():
            counts.append(len(keywords["input_ids"]))

    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            model.register_forward_pre_hook(count, with_kwargs=True)
    return counts


@pytest.mark.parametrize(
    ("trainer_class", "adapter", "keys", "settings"),
    [
        (EntrocraftGRPOTrainer, None, {OLD, REFERENCE}, {}),
        (EntrocraftGRPOTrainer, "new", {OLD, REFERENCE}, {"gradient_checkpointing": True}),
        (EntrocraftGRPOTrainer, "trained further", {OLD, REFERENCE}, {"temperature": 0.7}),
        (EntrocraftGRPOTrainer, "new", {REFERENCE}, SPLITS["4x4"]),
        (EntrocraftRLOOTrainer, None, {SUMS}, {"beta": 0.0}),
        (BaselineTrainer, None, {OLD}, {"beta": 0.0}),
    ],
)
def test_the_log_probs_are_trls_from_fewer_rows(trainer_class, adapter, keys, settings, reference_folder):
    some, every = (
        build(trainer_class, adapter, reference_folder, compute_all_rows=rows, **settings) for rows in (None, True)
    )
    adapters = {name: p.requires_grad for name, p in some.model.named_parameters()}
    seen, of_all = count_rows(some), count_rows(every)
    (_, ours), (_, theirs) = prepare(some), prepare(every)
    assert KEYS & ours[0].keys() == keys
    for key in keys:
        found, expected = rows_of(ours, key), rows_of(theirs, key)
        assert found and found.keys() <= expected.keys()
        for tokens, logps in found.items():
            torch.testing.assert_close(logps, expected[tokens], rtol=1e-5, atol=1e-5)
        assert not any(inputs[key].isnan().any() for inputs in ours)
    if len(keys) == 2:  # the models can be told apart
        pairs = zip(rows_of(ours, OLD).values(), rows_of(ours, REFERENCE).values(), strict=True)
        assert max((old - reference).abs().max() for old, reference in pairs) > 1e-2
    assert sum(of_all) == 16 * len(keys)
    assert sum(seen) == sum(len(inputs["advantages"]) for inputs in ours) * len(keys) < sum(of_all)
    assert {name: p.requires_grad for name, p in some.model.named_parameters()} == adapters
    assert adapter is None or some.model.active_adapter == "default" and some.model.has_active_enabled_adapter


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("split", ["two windows", "two iterations", "two generations a step"])
def test_steps_are_those_of_all_rows(split, loss_type):
    """Four optimizer steps, two of them off policy, with the reference of an adapter."""
    settings = {**SPLITS[split], "loss_type": loss_type, "beta": 0.1, "max_steps": 4, "lora": True}
    assert max(computed_rows(compare(EntrocraftGRPOTrainer, **settings, **tiny.TOO_LOW))) < 0.9


@pytest.mark.parametrize("split", ["two windows", "two iterations"])
def test_steps_with_a_reference_model_are_those_of_all_rows(split, reference_folder):
    settings = {**SPLITS[split], "beta": 0.1, **tiny.TOO_LOW}
    assert max(computed_rows(compare(EntrocraftGRPOTrainer, reference_folder, **settings))) < 0.9
    compare(BaselineTrainer, reference_folder, **SPLITS[split], beta=0.1)


# ----------------------------------------------------------------------------------------- who may read them meanwhile


class Reader(EntrocraftGRPOTrainer):
    def _generate_and_score_completions(self, inputs):
        return super()._generate_and_score_completions(inputs)


class OtherPass(EntrocraftGRPOTrainer):
    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return super()._get_per_token_logps_and_entropies(*args, **kwargs)


BOTH_WAIT, NONE_WAITS, REFERENCE_WAITS = ({OLD: old, REFERENCE: ref} for old, ref in ((1, 1), (0, 0), (0, 1)))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, BOTH_WAIT),
        ({"trainer_class": BaselineTrainer}, BOTH_WAIT),
        ({"rejection_rule": "influence"}, BOTH_WAIT),
        ({"compute_all_rows": True}, NONE_WAITS),
        ({"top_entropy_quantile": 0.5}, NONE_WAITS),
        ({"dropout": 0.1}, NONE_WAITS),
        ({"dropout": 0.1, "compute_all_rows": False}, REFERENCE_WAITS),  # the entropy is read in TRL's pass
        ({"trainer_class": Reader}, NONE_WAITS),
        ({"trainer_class": OtherPass}, NONE_WAITS),
        ({"trainer_class": EntrocraftRLOOTrainer}, {SUMS: False}),  # a KL term in rewards
        ({"trainer_class": EntrocraftRLOOTrainer, "beta": 0.0}, {SUMS: True}),
    ],
    ids=str,
)
def test_which_passes_wait(arguments, expected):
    assert waiting(build(adapter="new", **arguments)) == expected


def test_the_entropy_is_read_in_trls_pass_where_nothing_is_recorded(monkeypatch):
    monkeypatch.setattr(EntrocraftGRPOTrainer, "_why_not_recorded", lambda self: "as where an engine samples")
    assert waiting(build(adapter="new")) == REFERENCE_WAITS


def test_a_correction_for_an_engine_takes_the_old_policys_log_probs_at_once():
    trainer = build(BaselineTrainer, adapter="new")
    rollouts = tiny.random_rollouts(16)
    trainer._generate_single_turn = lambda *_, **__: (rollouts, [[-1.0] * len(ids) for ids in rollouts])
    trainer.use_vllm, trainer._last_loaded_step = True, 0
    trainer._why_not_recorded = lambda: ""  # nor does anyone read the entropy there
    assert waiting(trainer) == REFERENCE_WAITS


def test_an_epoch_that_cuts_a_step_short():
    assert waiting(build(adapter="new"), accumulation=1) == NONE_WAITS


def test_images():
    trainer = build(adapter="new")
    assert passes_can_wait(trainer)
    trainer.processing_class = object.__new__(ProcessorMixin)
    assert not passes_can_wait(trainer)


def test_evaluations_and_others_who_ask_get_trls_pass():
    trainer = build(adapter="new")
    trainer.state.max_steps = 4
    for training in (True, False):
        trainer.model.train(training)
        batch = trainer._generate_and_score_completions(tiny.generation_inputs(trainer))
        assert not any(batch[key].isnan().any() for key in (OLD, REFERENCE))


class Odd(EntrocraftGRPOTrainer):
    """Loss inputs that cannot be cropped, as nobody knows before they are made."""

    def _take_out(self, batch, keep, counts):
        return {**super()._take_out(batch, keep, counts), "odd": torch.zeros(len(keep), 99)}


def test_rows_that_cannot_be_taken_out_have_their_log_probs_all_the_same():
    (split, ours), (_, theirs) = (prepare(build(Odd, "new", compute_all_rows=rows)) for rows in (None, True))
    for key in (OLD, REFERENCE):
        assert all(inputs[key].isnan().any() for inputs in split)
        found, expected = rows_of(ours, key), rows_of(theirs, key)
        assert found.keys() == expected.keys()
        for tokens, logps in found.items():
            torch.testing.assert_close(logps, expected[tokens], rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------ pure functions


def test_what_is_filled_in():
    nan, mask = torch.nan, torch.tensor([[1, 1], [1, 0], [1, 1]])
    logps = torch.tensor([[-1.0, -2.0], [-3.0, -4.0], [-5.0, -6.0]])
    column = torch.tensor([[nan, nan], [nan, nan], [-1e30, -1e30]])
    assert filled(column, logps, mask).tolist() == [[-1.0, -2.0], [-3.0, -4.0], column[2].tolist()]
    assert filled(torch.tensor([nan, nan, 0.0]), logps, mask).tolist() == [-3.0, -3.0, 0.0]
    assert filled(column, logps.bfloat16(), mask).dtype == torch.bfloat16  # as TRL hands them on


def test_a_pass_that_trl_makes_something_else_of_ends_the_run(monkeypatch):
    placeholder = torch.full((2, 3), torch.nan)
    assert key_of({"advantages": torch.zeros(2), REFERENCE: placeholder}, placeholder) == REFERENCE
    assert key_of({SUMS: placeholder.sum(dim=1)}, placeholder) == SUMS
    original = GRPOTrainer._generate_and_score_completions

    def copied(self, inputs):
        batch = original(self, inputs)
        return {**batch, OLD: batch[OLD].clone()}

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", copied)
    with pytest.raises(
        RuntimeError, match=r"no longer hands on .* inputs are \['advantages', .*compute_all_rows=True"
    ):
        prepare(build(adapter="new"))
    assert waiting(build(adapter="new", compute_all_rows=True)) == NONE_WAITS
