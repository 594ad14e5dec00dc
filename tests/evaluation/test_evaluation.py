"""Evaluation by repeated sampling: estimators against brute force, and sampling on a tiny model."""

import itertools
import math

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from entrocraft_trl import evaluate_policy
from entrocraft_trl.evaluation.accuracy import pass_at_k, pass_at_k_curve, summarise
from entrocraft_trl.evaluation.evaluate import evaluate_blocks, sample_and_score
from entrocraft_trl.evaluation.sampling import Sample, encode_prompt, sample_prompts
from entrocraft_trl.tasks.expressions import build_model, build_tokenizer


PLAIN = GenerationConfig(max_new_tokens=5)
# Near temperature 0 the sampling is greedy, and the answer depends on nothing but the prompt.
GREEDY = GenerationConfig(do_sample=True, temperature=1e-4, max_new_tokens=5)
SAMPLING = {"generation_config": PLAIN, "progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model():
    return build_model(0)


def completions(model, tokenizer, prompts, n, generation_config=PLAIN, **options):
    """Texts `(P, n)`."""
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    samples = sample_prompts(model, tokenizer, ids, n, generation_config, **options)
    return [[sample.text for sample in row] for row in samples]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pass_at_k_equals_the_share_of_subsets_with_a_right_one(data):
    n = data.draw(st.integers(1, 8))
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pass_at_k_equals_the_formula_for_large_n(data):
    n = data.draw(st.integers(1, 3000))
    c = data.draw(st.integers(0, n))
    k = data.draw(st.integers(1, n))
    # Integers of any size: `math.comb` is exact, and so is their ratio up to its rounding.
    assert pass_at_k(n, c, k) == pytest.approx(1 - math.comb(n - c, k) / math.comb(n, k), abs=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5), (0, 0, 1)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}"):
        pass_at_k(n, c, k)


def test_summary_of_a_hand_made_table():
    correct = [[True, True, False, True], [False, False, False, False]]
    answers = [["a", "a", "x", "b"], ["x", "y", "z", "w"]]
    assert summarise(correct, answers, ks=(1, 2, 4)) == {
        "mean@4": 3 / 8,
        "pass@1": pytest.approx(3 / 8),
        "pass@2": pytest.approx(1 / 2),
        "pass@4": pytest.approx(1 / 2),
        "distinct_correct": 1.0,
    }
    assert set(summarise(correct)) == {"mean@4"}


@pytest.mark.parametrize(
    ("correct", "answers"),
    [([], None), ([[]], None), ([[True], [True, False]], None), ([[True]], [["a", "b"]]), ([[True]], [["a"], ["b"]])],
)
def test_summary_refuses_bad_shapes(correct, answers):
    with pytest.raises(ValueError):
        summarise(correct, answers)


def test_sampling_follows_the_seed_and_changes_no_state(model, tokenizer):
    prompts = ["24=", "7="]  # of different lengths, so that one is padded
    model.train()
    state = torch.get_rng_state()
    first = completions(model, tokenizer, prompts, 6, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    torch.rand(1)
    assert completions(model, tokenizer, prompts, 6, seed=3) == first
    assert completions(model, tokenizer, prompts, 6, seed=4) != first
    assert [len(texts) for texts in first] == [6, 6]
    assert len(set(first[0])) > 1


def test_sampling_keeps_the_mode_of_every_module_and_calls_no_train(model, tokenizer, monkeypatch):
    """`train` and `eval` of a model may do more than set flags: transformers' swap the kernels of the Hub."""
    model.train()
    model.model.layers[0].eval()  # a frozen part that the user keeps in eval mode
    before = [module.training for module in model.modules()]
    monkeypatch.setattr(type(model), "train", lambda self, mode=True: pytest.fail(f"train({mode}) was called"))
    generate, during = model.generate, []

    def generate_and_look(*args, **kwargs):
        during.extend(module.training for module in model.modules())
        return generate(*args, **kwargs)

    monkeypatch.setattr(model, "generate", generate_and_look)
    completions(model, tokenizer, ["24="], 1)
    assert not any(during)
    assert [module.training for module in model.modules()] == before and True in before


def test_prompts_keep_their_completions_across_batches(model, tokenizer):
    prompts = ["1=", "24=", "345=", "9"]
    batched = completions(model, tokenizer, prompts, 2, GREEDY, batch_size=3)
    for prompt, texts in zip(prompts, batched, strict=True):
        alone = completions(model, tokenizer, [prompt], 1, GREEDY)[0][0]
        assert texts == [alone, alone]


def test_mode_is_restored_after_an_error(model, tokenizer):
    model.train()
    with pytest.raises(ValueError, match="str"):
        sample_prompts(model, tokenizer, [["24"]], 1, PLAIN)
    assert model.training


@pytest.mark.parametrize("wrong", [{"n": 0}, {"batch_size": 0}])
def test_sampling_refuses_bad_arguments(model, tokenizer, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        completions(model, tokenizer, ["24="], **{"n": 1} | wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "must set `max_new_tokens`, got None"),
        ({"max_new_tokens": 2, "do_sample": True, "temperature": 0.0}, "`temperature` must be positive, got 0.0"),
        ({"max_new_tokens": 2, "do_sample": True, "temperature": -1.0}, "`temperature` must be positive, got -1.0"),
        ({"max_new_tokens": 2, "do_sample": False}, "`do_sample` must be on, got False"),
    ],
)
def test_sampling_refuses_settings_that_give_no_samples(model, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        completions(model, tokenizer, ["24="], 1, GenerationConfig(**settings))


def test_samples_are_those_of_generate_with_the_settings_as_keywords(model, tokenizer):
    """Committed results rest on them: batch by batch from one stream, which starts at the seed."""
    ids = [tokenizer(prompt)["input_ids"] for prompt in ("24=", "17=")]  # of one length: nothing is padded
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_new_tokens": 5}
    samples = sample_prompts(model, tokenizer, ids, 3, GenerationConfig(**settings), batch_size=4, seed=9)
    rows = torch.tensor([row for row in ids for _ in range(3)])
    with torch.random.fork_rng():
        torch.manual_seed(9)
        drawn = [model.generate(part, attention_mask=part >= 0, **settings) for part in (rows[:4], rows[4:])]
    expected = [row for batch in drawn for row in tokenizer.batch_decode(batch[:, 3:], skip_special_tokens=True)]
    assert [sample.text for row in samples for sample in row] == expected


def test_what_the_settings_leave_open_is_off_and_not_the_models_own(model, tokenizer, monkeypatch):
    """The generation config of many models on the Hub has a temperature and filters that no figure would mention."""
    theirs = GenerationConfig(do_sample=True, temperature=0.1, top_p=0.5, top_k=1, repetition_penalty=2.0)
    drawn = completions(model, tokenizer, ["24="], 8)
    seen, generate = [], model.generate

    def generate_and_look(generation_config, **inputs):
        seen.append(generation_config)
        return generate(generation_config=generation_config, **inputs)

    monkeypatch.setattr(model, "generate", generate_and_look)
    monkeypatch.setattr(model, "generation_config", theirs)
    assert completions(model, tokenizer, ["24="], 8) == drawn
    (used,) = seen
    assert (used.do_sample, used.temperature, used.top_p, used.top_k) == (True, 1.0, 1.0, 0)
    assert (used.repetition_penalty, used.max_new_tokens) == (1.0, 5)
    assert PLAIN.temperature is None and PLAIN.eos_token_id is None  # the caller's own is left as it was


def test_evaluation_joins_sampling_scoring_and_summary(model, tokenizer):
    dataset = Dataset.from_dict({"prompt": ["24=", "7="], "tag": ["a", "b"]})
    calls = []

    def reward(prompts, completions, tag, **kwargs):
        calls.append((prompts, tag))
        return [None if name == "b" else 0.6 for name in tag]

    result = evaluate_policy(model, tokenizer, dataset, reward, n=3, ks=(1, 3), seed=5, **SAMPLING)
    texts = completions(model, tokenizer, dataset["prompt"], 3, seed=5)
    assert calls == [(["24="] * 3 + ["7="] * 3, ["a"] * 3 + ["b"] * 3)]
    assert result["mean@3"] == 0.5 and result["pass@1"] == pytest.approx(0.5) and result["pass@3"] == 0.5
    assert result["distinct_correct"] == len({text.strip() for text in texts[0]}) / 2
    assert pass_at_k_curve(result) == {1: result["pass@1"], 3: result["pass@3"]}
    higher = evaluate_policy(model, tokenizer, dataset, reward, n=3, threshold=0.6, seed=5, **SAMPLING)
    assert higher["mean@3"] == 0.0


def test_entropy_equals_that_of_a_uniform_policy(model, tokenizer):
    # With zero embeddings, which are tied to the head, every token is equally likely at every position.
    torch.nn.init.zeros_(model.lm_head.weight)
    dataset = Dataset.from_dict({"prompt": ["24=", "7="]})
    result = evaluate_policy(
        model, tokenizer, dataset, lambda completions, **_: [1.0] * len(completions), 4, **SAMPLING
    )
    assert result["entropy"] == pytest.approx(math.log(len(tokenizer)), rel=1e-5)


def test_entropy_counts_completion_tokens_up_to_the_end_of_sequence(model, tokenizer, monkeypatch):
    dataset = Dataset.from_dict({"prompt": ["24=", "7="]})  # the second prompt is padded on the left
    answers = ["3+7*3", "5+2"]  # and the second answer on the right, after its end of sequence
    ends = [answer + tokenizer.eos_token for answer in answers]
    tail = tokenizer(ends, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, tail], dim=1))
    result = evaluate_policy(model, tokenizer, dataset, lambda **_: [0.0, 0.0], 1, **SAMPLING)
    entropies = []
    for prompt, end in zip(dataset["prompt"], ends, strict=True):
        ids = tokenizer(prompt + end, return_tensors="pt")["input_ids"]
        logits = model.eval()(input_ids=ids).logits[0, len(prompt) - 1 : -1].detach()
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    assert [len(values) for values in entropies] == [6, 4]
    assert result["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)


def test_entropy_of_absolute_positions_does_not_depend_on_left_padding(tokenizer):
    """GPT-2 counts positions from the first column unless it is told them, as `generate` tells it."""
    settings = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=16,
        n_embd=16,
        n_layer=1,
        n_head=2,
        initializer_range=1.0,  # at the usual 0.02 a wrong position would change hardly anything
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(settings)
    greedy = {"generation_config": GREEDY, "measure_entropy": True}
    prompts = [tokenizer(text)["input_ids"] for text in ("7=", "1+2+3+4=")]
    together = sample_prompts(model, tokenizer, prompts, 1, **greedy)
    for prompt, ((padded,)) in zip(prompts, together, strict=True):
        ((alone,),) = sample_prompts(model, tokenizer, [prompt], 1, **greedy)
        assert padded.ids == alone.ids
        assert padded.entropy_sum == pytest.approx(alone.entropy_sum, rel=1e-5)


class NoFloat64(TorchDispatchMode):
    """What Apple's MPS refuses: every tensor of float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 for leaf in tree_leaves(result)):
            raise TypeError(f"{func} makes a float64 tensor")
        return result


def test_sampling_makes_no_float64_tensor(model, tokenizer):
    with NoFloat64():
        sample_prompts(model, tokenizer, [[2, 3]], 2, PLAIN, measure_entropy=True)
        with pytest.raises(TypeError, match="float64"):
            torch.ones(1).double()


def test_wrong_number_of_rewards_is_refused(model, tokenizer):
    dataset = Dataset.from_dict({"prompt": ["24="]})
    with pytest.raises(ValueError, match="1 rewards for 2"):
        evaluate_policy(model, tokenizer, dataset, lambda **_: [1.0], 2, **SAMPLING)


CHAT = "{{ messages[0]['content'] }}{% if think %}+{% endif %}="


def test_text_and_chat_prompts_take_one_path(model, tokenizer):
    """The same tokens as text and as messages: the same samples, and the reward reads each in its form."""
    chat = build_tokenizer()
    chat.chat_template = CHAT
    forms = []

    def reward(prompts, completions, **kwargs):
        forms.append((prompts[0], type(completions[0])))
        return [1.0] * len(completions)

    as_text = Dataset.from_dict({"prompt": ["24+="]})
    as_messages = Dataset.from_dict({"prompt": [[{"role": "user", "content": "24"}]]})
    text = sample_and_score(model, chat, as_text, reward, 3, **SAMPLING)
    thinking = {"chat_template_kwargs": {"think": True}}
    messages = sample_and_score(model, chat, as_messages, reward, 3, **SAMPLING, **thinking)
    assert messages[0]["completions"] == text[0]["completions"]
    assert messages[0]["entropy_sums"] == text[0]["entropy_sums"]
    assert forms == [("24+=", str), ([{"role": "user", "content": "24"}], list)]
    without = sample_and_score(model, chat, as_messages, reward, 3, **SAMPLING)
    assert without[0]["entropy_sums"] != text[0]["entropy_sums"]  # "24=" is another prompt
    figures = evaluate_policy(model, chat, as_messages, reward, 3, **SAMPLING, **thinking)
    assert figures["entropy"] == pytest.approx(sum(text[0]["entropy_sums"]) / sum(text[0]["tokens"]))


def test_blocks_are_saved_one_by_one_and_go_on_after_the_given_records(tokenizer):
    dataset = Dataset.from_dict({"prompt": ["1=", "2=", "3=", "4=", "5="]})
    calls, saved = [], []

    def sampler(prompts, start):
        calls.append((start, tokenizer.batch_decode(prompts)))
        return [[Sample(f"{start}", [5], False, 0.5)] * 2 for _ in prompts]

    def reward(completions, **kwargs):
        return [1.0, 0.0] * (len(completions) // 2)

    options = {"block": 2, "save": saved.append}
    whole = evaluate_blocks(dataset, tokenizer, sampler, reward, **options)
    assert calls == [(0, ["1=", "2="]), (2, ["3=", "4="]), (4, ["5="])]
    assert [len(block) for block in saved] == [2, 2, 1] and sum(saved, []) == whole
    assert [(record["index"], record["prompt"], record["rewards"]) for record in whole] == [
        (index, f"{index + 1}=", [1.0, 0.0]) for index in range(5)
    ]
    calls.clear()
    assert evaluate_blocks(dataset, tokenizer, sampler, reward, records=whole[:2], **options) == whole
    assert [start for start, _ in calls] == [2, 4]
    assert evaluate_blocks(dataset, tokenizer, None, reward, records=whole, **options) == whole


def test_no_prompts_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match="no prompt to evaluate"):
        evaluate_policy(model, tokenizer, Dataset.from_dict({"prompt": []}), lambda **_: [], 2, **SAMPLING)
