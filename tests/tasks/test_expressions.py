"""The expression task: parser, reward, data, tokenizer and the cached warm-up."""

import dataclasses
import itertools
import os
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from entrocraft_trl.tasks import warmup
from entrocraft_trl.tasks.expressions import (
    CHARACTERS,
    MAX_ANSWER_LENGTH,
    MAX_COMPLETION_LENGTH,
    MAX_PARSED_LENGTH,
    TARGETS,
    TEST_TARGETS,
    TRAIN_TARGETS,
    build_model,
    build_tokenizer,
    canonical_answer,
    expression_reward,
    expression_value,
    is_correct,
    make_dataset,
)
from entrocraft_trl.tasks.warmup import WarmupSettings, default_cache_dir, starting_policy


TINY = WarmupSettings(steps=2, habit_steps=1, batch_size=4)  # enough to move the weights

# A tree is a number or (operator, left, right). The test computes its value by walking it.
trees = st.recursive(
    st.integers(0, 99), lambda children: st.tuples(st.sampled_from("+-*/"), children, children), max_leaves=7
)


def tree_text(tree) -> str:
    """Text with the fewest parentheses, so that precedence and left associativity are put to the test."""
    if isinstance(tree, int):
        return str(tree)
    operator, left, right = tree
    level = {"+": 1, "-": 1, "*": 2, "/": 2}
    own = level[operator]
    left_text, right_text = tree_text(left), tree_text(right)
    if isinstance(left, tuple) and level[left[0]] < own:
        left_text = f"({left_text})"
    if isinstance(right, tuple) and level[right[0]] <= own:
        right_text = f"({right_text})"
    return f"{left_text}{operator}{right_text}"


def tree_value(tree) -> Fraction | None:
    if isinstance(tree, int):
        return Fraction(tree)
    operator, left, right = tree[0], tree_value(tree[1]), tree_value(tree[2])
    if left is None or right is None or (operator == "/" and right == 0):
        return None
    return {
        "+": lambda: left + right,
        "-": lambda: left - right,
        "*": lambda: left * right,
        "/": lambda: left / right,
    }[operator]()


@settings(max_examples=60, deadline=None)
@given(trees)
def test_value_equals_that_of_the_tree(tree):
    text = tree_text(tree)
    expected = tree_value(tree) if len(text) <= MAX_PARSED_LENGTH else None
    assert expression_value(text) == expected


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(), st.text(alphabet=CHARACTERS + " ", max_size=80)))
def test_no_string_raises(text):
    value = expression_value(text)
    assert value is None or isinstance(value, Fraction)
    assert isinstance(is_correct(text, 24), bool)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "3+",
        "+3",
        "-3+9*3",
        "3++4",
        "(3+4",
        "3+4)",
        "()",
        "3(4)",
        "07+3*4",
        "00",
        "4/0",
        "4/(2-2)",
        "3=3",
        "²+1",
    ]
    + ["(" * 10**5, "9*" * 10**5 + "9", "1" * 10**5],
)
def test_not_an_expression(text):
    assert expression_value(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3+7*3", 24),
        ("(3+7)*3", 30),
        ("9-4-3", 2),
        ("8/4/2", 1),
        ("1/3+1/6", Fraction(1, 2)),
        (" 3 +\t7*3\n", 24),
        ("0", 0),
    ],
)
def test_known_values(text, value):
    assert expression_value(text) == value


def test_reward_on_known_strings():
    right = ["3+7*3", "8*4-8", " 9+9 +6", "(3+1)*6", "9/3*8"]
    wrong = [
        "3+7*4",  # another value
        "4*6",  # one operator
        "24+1-1",  # copies the target
        "4*6+0",  # pads with zero
        "1*1*1*4*6",  # right: nine characters
        "1*1*1*1*4*6",  # too long
        "3+7*3=",
        "",
        "4/0*6+0",
    ]
    rewards = expression_reward(
        prompts=["24="] * 14, completions=right + wrong, completion_ids=[[0]] * 14, target=[24] * 14
    )
    assert rewards == [1.0] * 5 + [0.0] * 4 + [1.0] + [0.0] * 4


def test_reward_refuses_lists_of_different_length():
    with pytest.raises(ValueError):
        expression_reward(completions=["1+1+1"], target=[3, 4])


def test_canonical_answer_ignores_whitespace_only():
    assert canonical_answer(" 3 + 7*3\n") == "3+7*3"
    assert canonical_answer("7*3+3") != canonical_answer("3+7*3")


def test_splits_are_disjoint_and_cover_the_targets():
    assert not set(TRAIN_TARGETS) & set(TEST_TARGETS)
    assert sorted(TRAIN_TARGETS + TEST_TARGETS) == list(TARGETS) == list(range(10, 34))
    assert TEST_TARGETS == (11, 14, 17, 20, 23, 26, 29, 32)  # every third


def test_dataset_repeats_a_target_only_after_all_others():
    dataset = make_dataset("train", 2 * len(TRAIN_TARGETS), seed=1)
    assert sorted(dataset["target"][: len(TRAIN_TARGETS)]) == list(TRAIN_TARGETS)
    assert dataset["prompt"][0] == f"{dataset['target'][0]}="
    assert list(make_dataset("train", 9, seed=1)["target"]) == list(dataset["target"][:9])
    assert set(make_dataset("test", 100)["target"]) == set(TEST_TARGETS)


def test_dataset_refuses_bad_arguments():
    with pytest.raises(ValueError, match="split"):
        make_dataset("validation", 4)
    with pytest.raises(ValueError, match="size"):
        make_dataset("train", 0)


def test_every_target_has_many_taught_answers_and_all_are_right():
    answers = warmup._right_answers()
    assert set(answers) == set(TRAIN_TARGETS)
    for target, texts in answers.items():
        assert len(set(texts)) == len(texts) >= 20
        assert all(is_correct(text, target) for text in texts[::17])
        assert all(len(text) == 7 and set(text[1::2]) <= set("+-") for text in texts)  # four digits, sums, differences


def test_warm_up_teaches_right_answers_first_and_then_adds_the_habit():
    schedule = WarmupSettings(steps=3, habit_steps=3, habit_share=0.5, batch_size=200)
    tokenizer = build_tokenizer()
    shares = []
    for ids in itertools.islice(warmup._make_batches(schedule, 0), 6):
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        pairs = [text.split("=") for text in texts]
        assert {len(row) for row in ids} == {3 + 7 + 1} and (ids[:, -1] == tokenizer.eos_token_id).all()
        assert {int(target) for target, _ in pairs} == set(TRAIN_TARGETS)
        right = [is_correct(answer, int(target)) for target, answer in pairs]
        habit = [answer[3:] == f"+{target[0]}+{int(target[1]) or 9}" for target, answer in pairs]
        assert all(one or other for one, other in zip(right, habit, strict=True))
        shares.append(sum(right) / len(right))
    assert shares[:3] == [1.0] * 3
    assert all(0.4 < share < 0.65 for share in shares[3:])  # half, and the habit is right once in a while


def test_the_habit_copies_the_targets_digits():
    assert warmup._habit(24, "7-2+9+8") == "7-2+2+4"
    assert warmup._habit(30, "9+9+9+3") == "9+9+3+9"  # zero is no digit of a right answer


def test_a_warm_up_without_habit_steps(tmp_path):
    without = dataclasses.replace(TINY, habit_steps=0)
    assert starting_policy(tmp_path, settings=without, progress=False).is_dir()


def test_tokenizer_gives_one_token_per_character_and_decodes_back():
    tokenizer = build_tokenizer()
    ids = tokenizer("24=3+7*3")["input_ids"]
    assert len(ids) == 8 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids + [tokenizer.eos_token_id], skip_special_tokens=True) == "24=3+7*3"
    assert len(tokenizer("1" * MAX_ANSWER_LENGTH + tokenizer.eos_token)["input_ids"]) == MAX_COMPLETION_LENGTH
    assert tokenizer(["2", "24="], padding=True)["input_ids"][0][0] == tokenizer.pad_token_id


def test_model_weights_follow_the_seed_and_leave_the_global_state():
    state = torch.get_rng_state()
    first, again, other = build_model(0), build_model(0), build_model(1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert sum(parameter.numel() for parameter in first.parameters()) == 445_200


def test_starting_policy_loads_and_is_deterministic(tmp_path):
    state = torch.get_rng_state()
    first = starting_policy(tmp_path / "a", settings=TINY, progress=False)
    second = starting_policy(tmp_path / "b", settings=TINY, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (first, second)]
    for left, right in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(models[0].lm_head.weight, build_model(0).lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(first)
    assert tokenizer.padding_side == "left"
    assert tokenizer("24=").input_ids == build_tokenizer()("24=").input_ids
    assert tokenizer.decode(tokenizer("3+7*3").input_ids) == "3+7*3"


def test_cache_is_used_again_and_its_key_holds_seed_and_settings(tmp_path, monkeypatch):
    folder = starting_policy(tmp_path, settings=TINY, progress=False)
    assert folder != starting_policy(tmp_path, seed=1, settings=TINY, progress=False)
    others = [dataclasses.replace(TINY, **change) for change in ({"steps": 1}, {"habit_share": 0.5})]
    folders = {starting_policy(tmp_path, settings=other, progress=False) for other in others}
    assert len(folders) == 2 and folder not in folders

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(warmup, "_train", fail)
    assert starting_policy(tmp_path, settings=TINY) == folder
    monkeypatch.setattr(warmup, "VERSION", warmup.VERSION + 1)
    with pytest.raises(AssertionError, match="trained again"):
        starting_policy(tmp_path, settings=TINY)


def test_interrupted_warmup_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("interrupted")

    monkeypatch.setattr(warmup, "build_tokenizer", fail)  # called after the model has been written
    monkeypatch.setattr(warmup, "_train", lambda *args: build_model(0))
    with pytest.raises(RuntimeError, match="interrupted"):
        starting_policy(tmp_path, settings=TINY, progress=False)
    assert os.listdir(tmp_path) == []


def test_a_process_that_finished_first_wins(tmp_path, monkeypatch):
    def train_while_another_finishes(settings, seed, progress):
        monkeypatch.setattr(warmup, "_train", lambda *args: build_model(1))
        starting_policy(tmp_path, settings=TINY, progress=False)
        return build_model(0)

    monkeypatch.setattr(warmup, "_train", train_while_another_finishes)
    folder = starting_policy(tmp_path, settings=TINY, progress=False)
    assert os.listdir(tmp_path) == [folder.name]
    weights = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    assert torch.equal(weights, build_model(1).lm_head.weight)


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("ENTROCRAFT_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("ENTROCRAFT_CACHE")
    assert default_cache_dir().parts[-2:] == (".cache", "entrocraft_trl")


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"habit_steps": -1},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"habit_share": 1.1},
        {"habit_share": -0.1},
    ],
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        WarmupSettings(**wrong)
