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
from transformers import GPT2Config, GPT2LMHeadModel

from entrocraft_trl.evaluation.accuracy import evaluate_policy, pass_at_k, sample_completions, summarise
from entrocraft_trl.evaluation.sampling import sample_prompts
from entrocraft_trl.tasks.expressions import build_model, build_tokenizer


SAMPLING = {"max_new_tokens": 5, "progress": False}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model():
    return build_model(0)


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
    first = sample_completions(model, tokenizer, prompts, 6, seed=3, **SAMPLING)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    torch.rand(1)
    assert sample_completions(model, tokenizer, prompts, 6, seed=3, **SAMPLING) == first
    assert sample_completions(model, tokenizer, prompts, 6, seed=4, **SAMPLING) != first
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
    sample_completions(model, tokenizer, ["24="], 1, **SAMPLING)
    assert not any(during)
    assert [module.training for module in model.modules()] == before and True in before


def test_prompts_keep_their_completions_across_batches(model, tokenizer):
    # Near temperature 0 the sampling is greedy, and the answer depends on nothing but the prompt.
    prompts = ["1=", "24=", "345=", "9"]
    batched = sample_completions(model, tokenizer, prompts, 2, temperature=1e-4, batch_size=3, **SAMPLING)
    for prompt, texts in zip(prompts, batched, strict=True):
        alone = sample_completions(model, tokenizer, [prompt], 1, temperature=1e-4, **SAMPLING)[0][0]
        assert texts == [alone, alone]


def test_mode_is_restored_after_an_error(model, tokenizer):
    model.train()
    with pytest.raises(ValueError, match="str"):
        sample_completions(model, tokenizer, [24], 1, **SAMPLING)
    assert model.training


@pytest.mark.parametrize(
    "wrong", [{"n": 0}, {"batch_size": 0}, {"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": -1.0}]
)
def test_sampling_refuses_bad_arguments(model, tokenizer, wrong):
    arguments = {"n": 1, "max_new_tokens": 2, "progress": False} | wrong
    with pytest.raises(ValueError, match=next(iter(wrong))):
        sample_completions(model, tokenizer, ["24="], **arguments)


def test_evaluation_joins_sampling_scoring_and_summary(model, tokenizer):
    dataset = Dataset.from_dict({"prompt": ["24=", "7="], "tag": ["a", "b"]})
    calls = []

    def reward(prompts, completions, tag, **kwargs):
        calls.append((prompts, tag))
        return [None if name == "b" else 0.6 for name in tag]

    result = evaluate_policy(model, tokenizer, dataset, reward, n=3, ks=(1, 3), seed=5, **SAMPLING)
    texts = sample_completions(model, tokenizer, dataset["prompt"], 3, seed=5, **SAMPLING)
    assert calls == [(["24="] * 3 + ["7="] * 3, ["a"] * 3 + ["b"] * 3)]
    assert result["mean@3"] == 0.5 and result["pass@1"] == pytest.approx(0.5) and result["pass@3"] == 0.5
    assert result["distinct_correct"] == len({text.strip() for text in texts[0]}) / 2
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
    result = evaluate_policy(model, tokenizer, dataset, lambda **_: [0.0, 0.0], 1, max_new_tokens=6, progress=False)
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
    greedy = {"temperature": 1e-4, "measure_entropy": True, "max_new_tokens": 4}
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
        sample_prompts(model, tokenizer, [[2, 3]], 2, max_new_tokens=2, measure_entropy=True)
        with pytest.raises(TypeError, match="float64"):
            torch.ones(1).double()


def test_wrong_number_of_rewards_is_refused(model, tokenizer):
    dataset = Dataset.from_dict({"prompt": ["24="]})
    with pytest.raises(ValueError, match="1 rewards for 2"):
        evaluate_policy(model, tokenizer, dataset, lambda **_: [1.0], 2, **SAMPLING)
