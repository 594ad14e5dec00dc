"""What is recorded while rollouts are sampled is what a pass over them says; what cannot be recorded gets the pass."""

import random

import pytest
import tiny
import torch
from peft import LoraConfig
from trl import GRPOTrainer, RLOOTrainer
from trl.trainer import grpo_trainer

from entrocraft_trl import EntrocraftGRPOTrainer, EntrocraftRLOOTrainer
from entrocraft_trl.policy import recorder as recorder_module
from entrocraft_trl.policy.eval_mode import active_dropout
from entrocraft_trl.policy.recorder import GenerationRecorder, Turn, reading_of_rollouts
from entrocraft_trl.policy.tokens import TokenReading, loss_mask


LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
PARENT = {EntrocraftGRPOTrainer: GRPOTrainer, EntrocraftRLOOTrainer: RLOOTrainer}


def build(trainer_class=EntrocraftGRPOTrainer, lora=None, model=None, arguments=None, **settings):
    torch.manual_seed(0)
    beta = {"beta": 0.0} if trainer_class is EntrocraftRLOOTrainer else {}  # no reference model to load
    args = tiny.build_config(trainer_class._config_class, **beta, **settings, **tiny.WIDE_OPEN)
    config = LoraConfig(**{**LORA, **lora}) if lora is not None else None
    trainer = tiny.build_trainer(trainer_class, model, args, peft_config=config, **(arguments or {}))
    trainer.model.train()
    trainer.state.max_steps = 1
    return trainer


def read(trainer):
    """Loss inputs as TRL makes them, their mask, the reading and its source."""
    parent = PARENT[type(trainer)]
    with trainer.listening_to_policy() as heard:
        batch = parent._generate_and_score_completions(trainer, tiny.generation_inputs(trainer))
    mask = loss_mask(batch)
    return batch, mask, *trainer.read_policy(batch, mask, heard)


def exact_reading(trainer, batch) -> TokenReading:
    """log p, H and N of each completion token in float64, from the logits of the model without dropout."""
    inputs = {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
    }
    with torch.no_grad():
        logits = trainer.model.eval()(**inputs).logits[:, batch["prompt_ids"].size(1) - 1 : -1]
    trainer.model.train()
    log_p = (logits.double() / trainer.temperature).log_softmax(-1)
    p = log_p.exp()
    h = -(p * log_p).sum(-1)
    chosen = log_p.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)
    return TokenReading(chosen, h, (p**2 * (log_p + h.unsqueeze(-1))).sum(-1))


def assert_equal_readings(found, exact, mask, tolerance=1e-5):
    assert mask.any()
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours[mask.bool()].double(), expected[mask.bool()], rtol=tolerance, atol=tolerance)
        assert torch.isfinite(ours).all() and not ours.requires_grad


# ------------------------------------------------------------------------------------------------ equal to the pass


RECORDED = {
    "as it comes": {},  # prompts of different lengths, hence left padding; end tokens anywhere
    "temperature": {"temperature": 0.7},
    "narrowed sampling": {"top_p": 0.8, "top_k": 5},
    "repetition penalty": {"repetition_penalty": 1.3},  # a processor: what is read are the logits before it
    "minimal length": {"generation_kwargs": {"min_new_tokens": 4}},
    "static cache": {"cache_implementation": "static"},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "padded": {"pad_to_multiple_of": 16},
    "several steps a generation": {"num_iterations": 2},  # TRL runs its pass: the record is there all the same
    "one token": {"max_completion_length": 2},
    "masked truncation": {"mask_truncated_completions": True},
}


@pytest.mark.filterwarnings("ignore:.*narrower distribution")
@pytest.mark.parametrize("trainer_class", PARENT)
@pytest.mark.parametrize("settings", RECORDED.values(), ids=RECORDED)
def test_the_record_is_what_a_pass_says(trainer_class, settings):
    if trainer_class is EntrocraftRLOOTrainer and "pad_to_multiple_of" in settings:
        settings = {"pad_to_multiple_of": 8}
    trainer = build(trainer_class, **settings)
    batch, mask, found, source = read(trainer)
    assert source == "record"
    assert_equal_readings(found, exact_reading(trainer, batch), mask)


def test_left_padding_and_early_ends_are_in_the_case():
    batch, mask, _, _ = read(build())
    assert not batch["prompt_mask"].all() and not mask.all()


def test_the_record_under_an_adapter():
    trainer = build(lora={})
    batch, mask, found, source = read(trainer)
    assert source == "record"
    assert_equal_readings(found, exact_reading(trainer, batch), mask)
    with trainer.model.disable_adapter():
        without = exact_reading(trainer, batch)
    assert (found.entropies - without.entropies)[mask.bool()].abs().max() > 0.01, "the adapter does nothing"


def test_a_conversation():
    trainer = build(arguments=conversations())
    trainer.processing_class.chat_template = CHAT
    trainer._tokenizer.chat_template = CHAT
    batch, mask, found, source = read(trainer)
    assert source == "record"
    assert_equal_readings(found, exact_reading(trainer, batch), mask)


def test_half_precision_is_as_near_to_the_truth_as_the_pass():
    """bf16 keeps eight bits: a pass in it is off by as much as the record, in other tokens."""
    trainer = build(model=tiny.build_model().bfloat16())
    batch, mask, found, source = read(trainer)
    assert source == "record"
    passed = passed_over(trainer, batch, mask)
    trainer.model.float()
    exact = exact_reading(trainer, batch)
    errors = [(r.entropies - exact.entropies)[mask.bool()].abs().mean().item() for r in (found, passed)]
    assert 0 < errors[0] < 2 * errors[1] < 0.1


def passed_over(trainer, batch, mask) -> TokenReading:
    """The reading of a pass of our own."""
    with trainer.listening_to_policy() as heard:
        heard.not_recorded = "this is about the pass"
    found, source = trainer.read_policy(batch, mask, heard)
    assert source == "own_pass"
    return found


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"num_iterations": 2}], ids=str)
def test_the_same_tokens_are_sampled_with_and_without_the_record(settings, monkeypatch):
    listened = build(**settings)
    first = read(listened)
    state = torch.get_rng_state()
    monkeypatch.setattr(EntrocraftGRPOTrainer, "_why_not_recorded", lambda self: "not now")
    second = read(build(**settings))
    assert (first[3], second[3]) == ("record", "old_policy_pass" if settings.get("num_iterations") else "own_pass")
    assert torch.equal(first[0]["completion_ids"], second[0]["completion_ids"])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_keeps_no_hook_even_after_an_error(monkeypatch):
    trainer = build()
    model = trainer._causal_lm()
    hooks = len(model._forward_hooks), len(model._forward_pre_hooks)
    with pytest.raises(KeyError), GenerationRecorder(model, 1.0).listening():
        assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == (hooks[0] + 1, hooks[1] + 1)
        raise KeyError
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks


def test_a_prompts_logits_are_not_kept_alive():
    """With the logits of every position of the prompt, a view of the last would hold all of them."""
    model = tiny.build_model()
    recorder = GenerationRecorder(model, 1.0)
    with torch.no_grad(), recorder.listening():
        model(torch.randint(2, 24, (3, 50)))
    assert recorder._pending.logits.untyped_storage().nbytes() == 3 * tiny.VOCABULARY * 4


def test_evaluation_is_not_recorded(monkeypatch):
    trainer = build()
    trainer.model.eval()
    monkeypatch.setattr(recorder_module.GenerationRecorder, "listening", None)  # a TypeError if it were used
    with trainer.listening_to_policy() as heard:
        GRPOTrainer._generate_and_score_completions(trainer, tiny.generation_inputs(trainer))
    assert heard.turns == []


# --------------------------------------------------------------------------------------------------------- tool calls


CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def length_reward(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def conversations():
    data = tiny.build_dataset().map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    return {"train_dataset": data, "reward_funcs": length_reward}


def with_tool_calls(trainer, monkeypatch):
    """TRL's own tool loop on a model that writes no calls: every first completion is read as a call of `answer`."""
    call = {"type": "function", "function": {"name": "answer", "arguments": {}}}

    def parse(tokenizer, ids, prefix, **kwargs):
        first = len(prefix) < 10 or RESULT[0] not in prefix
        message = {"role": "assistant", "content": tokenizer.decode(ids, skip_special_tokens=True)}
        return {**message, "tool_calls": [call]} if first and len(ids) % 2 else message

    def answer() -> str:
        """The answer."""
        return "42"

    monkeypatch.setattr(grpo_trainer, "parse_response", parse)
    trainer.processing_class.chat_template = trainer._tokenizer.chat_template = CHAT
    trainer.chat_template = CHAT
    trainer._tokenizer.response_schema = {}
    trainer.tools = trainer._standalone_tools = [answer]
    trainer._get_tool_suffix_ids = lambda messages: RESULT


RESULT = [20, 21, 22]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_tool_calls(temperature, monkeypatch):
    trainer = build(temperature=temperature, max_completion_length=12, arguments=conversations())
    with_tool_calls(trainer, monkeypatch)
    batch, mask, found, source = read(trainer)
    tools = (batch["tool_mask"] == 0) & (batch["completion_mask"] == 1)
    called = tools.any(dim=1)
    assert 0 < called.sum() < 8, "the case needs rollouts with and without a call"
    assert source == "record"
    assert_equal_readings(found, exact_reading(trainer, batch), mask)


# ---------------------------------------------------------------------------------------------------------- fallbacks


def broken_logits(self, module, arguments, output):
    raise RuntimeError("nobody is to see this")


def test_a_hook_that_fails_is_not_the_generations_fault(monkeypatch):
    monkeypatch.setattr(recorder_module, "entropy_moments", broken_logits)
    trainer = build()
    batch, mask, found, source = read(trainer)
    assert source == "own_pass"
    assert_equal_readings(found[:2], exact_reading(trainer, batch)[:2], mask)


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"generation_kwargs": {"num_beams": 2}}, {}),
        ({"generation_kwargs": {"guidance_scale": 1.5}}, {}),
    ],
    ids=str,
)
def test_a_generation_of_another_kind_gets_the_pass(settings, arguments):
    trainer = build(**settings, arguments=arguments)
    batch, mask, found, source = read(trainer)
    assert source == "own_pass"
    assert_equal_readings(found[:2], exact_reading(trainer, batch)[:2], mask)


def test_tokens_that_were_not_seen_get_the_pass():
    """A subclass that changes what was generated."""
    trainer = build()
    generate = trainer._generate_single_turn

    def other_end(*args, **kwargs):
        ids, logprobs = generate(*args, **kwargs)
        return [[*row[:-1], 5 if row[-1] != 5 else 6] for row in ids], logprobs

    trainer._generate_single_turn = other_end
    batch, mask, found, source = read(trainer)
    assert source == "own_pass"
    assert_equal_readings(found[:2], exact_reading(trainer, batch)[:2], mask)


@pytest.mark.parametrize(
    ("settings", "recorded"),
    [
        ({"prompt_lookup_num_tokens": 2}, False),  # assisted: candidates, some of them right
        ({"prefill_chunk_size": 2}, False),
        ({"use_cache": False}, True),
        ({}, True),
    ],
    ids=str,
)
def test_passes_over_several_tokens_leave_the_true_numbers_or_none(settings, recorded):
    """Assisted decoding takes one row only, for which TRL never asks."""
    model = tiny.build_model().eval()
    prompt = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    recorder = GenerationRecorder(model, 1.0)
    torch.manual_seed(0)
    with recorder.listening():
        ids = model.generate(prompt, do_sample=True, max_new_tokens=6, **settings)[0, prompt.size(1) :]
    found = recorder.turns(prompt.tolist(), [ids.tolist()])
    for turn in found:
        whole = torch.cat([prompt[0], ids]).unsqueeze(0)
        with torch.no_grad():
            exact = model(whole).logits[:, prompt.size(1) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(turn.numbers[1], -(exact.exp() * exact).sum(-1)[0], rtol=1e-5, atol=1e-5)
    assert bool(found) == recorded


def test_what_is_not_finite_is_no_record():
    numbers = torch.tensor([[-1.0, -1.0], [1.0, torch.inf], [0.1, 0.1]])
    batch = {"prompt_ids": torch.tensor([[0, 7]]), "prompt_mask": torch.tensor([[0, 1]])}
    batch["completion_ids"] = torch.tensor([[8, 9]])
    turns = [Turn((7,), (8, 9), numbers)]
    assert reading_of_rollouts(turns, batch, torch.tensor([[1, 1]])) is None
    assert reading_of_rollouts(turns, batch, torch.tensor([[1, 0]])) is not None  # no loss token


def test_turns_find_their_places():
    """Two rollouts of one prompt, the second with a tool result (9) between its two turns, cut off at the end."""

    def numbers(*values):
        return torch.tensor(values) + torch.tensor([[0.0], [0.5], [0.25]])

    turns = [
        Turn((5, 6), (7, 1), numbers(1, 2)),
        Turn((5, 6), (8,), numbers(3)),
        Turn((5, 6, 8, 9), (7, 7, 1), numbers(4, 5, 6)),
        Turn((6,), (7, 1), numbers(7, 8)),  # of another prompt, which is an end of this one
    ]
    batch = {
        "prompt_ids": torch.tensor([[0, 5, 6], [0, 5, 6]]),
        "prompt_mask": torch.tensor([[0, 1, 1], [0, 1, 1]]),
        "completion_ids": torch.tensor([[7, 1, 0, 0], [8, 9, 7, 7]]),
    }
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 1]])
    found = reading_of_rollouts(turns, batch, mask)
    assert (found.logps * mask).tolist() == [[1, 2, 0, 0], [3, 0, 4, 5]]
    assert (found.entropies * mask).tolist() == [[1.5, 2.5, 0, 0], [3.5, 0, 4.5, 5.5]]
    assert (found.expected * mask).tolist() == [[1.25, 2.25, 0, 0], [3.25, 0, 4.25, 5.25]]
    assert reading_of_rollouts(turns[:2], batch, mask) is None  # the second turn was not recorded
    assert reading_of_rollouts([], batch, mask * 0).logps.tolist() == [[0] * 4] * 2  # nothing to cover


# ------------------------------------------------------------------------------------------------------------ dropout


@pytest.mark.parametrize(
    ("lora", "model", "words"),
    [
        ({"lora_dropout": 0.05}, {}, "lora_dropout"),
        (None, {"attention_dropout": 0.1}, "attention_dropout = 0.1"),
    ],
    ids=["LoRA", "attention"],
)
def test_with_dropout_the_pass_reads_the_model_that_is_trained(lora, model, words, caplog):
    trainer = build(lora=lora, model=tiny.build_model(**model), rejection_rule="entropy_change")
    with caplog.at_level("WARNING"):
        batch, mask, found, source = read(trainer)
        read(trainer)
    assert source == "own_pass"
    assert_equal_readings(found, exact_reading(trainer, batch), mask)
    (message,) = [record.getMessage() for record in caplog.records if "pass of its own" in record.getMessage()]
    assert words in message and "set it to 0" in message  # once, with the place and the cure


def test_dropout_is_found_only_where_it_acts():
    model = tiny.build_model(attention_dropout=0.1)
    assert "self_attn.attention_dropout = 0.1" in active_dropout(model.train())
    assert active_dropout(model.eval()) is None
    assert active_dropout(tiny.build_model().train()) is None
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.2)).train()
    assert active_dropout(plain) == "1.p = 0.2"
    plain[1].p = 0.0
    assert active_dropout(plain) is None


def test_rollouts_of_an_engine_are_not_recorded():
    rollouts = tiny.random_rollouts(8)
    trainer = build(arguments={"rollout_func": tiny.rollout_function(rollouts)})
    batch, mask, found, source = read(trainer)
    assert source == "own_pass"
    assert_equal_readings(found[:2], exact_reading(trainer, batch)[:2], mask)


def test_continuous_batching_is_not_recorded():
    trainer = build()
    trainer.use_transformers_continuous_batching = True
    assert "continuous batching" in trainer._why_not_recorded()


# ------------------------------------------------------------------------------------------------ a pass of our own


def test_rows_of_like_length_are_read_together_without_their_padding():
    random.seed(0)
    trainer = build(arguments={"rollout_func": tiny.rollout_function(tiny.random_rollouts(8))})
    trainer.args.per_device_train_batch_size = 3
    widths = []
    causal_lm = trainer._causal_lm()
    causal_lm.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    batch, mask, found, source = read(trainer)
    longest_prompt = batch["prompt_ids"].size(1)
    lengths = sorted(mask.sum(1).tolist())
    expected = [(3, lengths[2]), (3, lengths[5]), (2, lengths[7])]
    assert [(rows, width - longest_prompt) for rows, width in widths] == expected
    assert_equal_readings(found[:2], exact_reading(trainer, batch)[:2], mask)
