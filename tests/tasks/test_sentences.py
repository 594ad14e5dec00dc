"""The sentence task: what counts as a sentence with two given words, and each way to win without writing one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from entrocraft_trl.evaluation.evaluate import sample_and_score
from entrocraft_trl.evaluation.scoring import check_reward
from entrocraft_trl.tasks.sentences import (
    EXAMPLE,
    EXAMPLE_WORDS,
    FUNCTION_WORDS,
    MAX_COMPLETION_LENGTH,
    META_WORDS,
    TEST_WORDS,
    TRAIN_WORDS,
    VERBS,
    canonical_sentence,
    make_dataset,
    sentence_fault,
    sentence_reward,
)
from entrocraft_trl.tasks.task import load_policy, sentence_task


GIVEN = ("candle", "river")


@pytest.mark.parametrize(
    "text",
    [
        "She lit a candle by the river.",
        "The candle drifted down the slow river, and nobody followed it.",
        "Can you see the candle that burns across the river?",
        "My grandmother's candle burned while the well-fed children swam in the river!",
        "Candle light is what the old river gives back at night.",
        " A boat with a candle is on the quiet river.\n",
        "The only candle is what my other boat needs when the river rises.",
    ],
)
def test_right_sentences(text):
    assert sentence_fault(text, GIVEN) is None


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("form", ""),
        ("form", "Words: candle, river"),  # the prompt itself
        ("form", "Candle, river, candle, river, candle, river"),
        ("form", "She lit a candle by the river"),  # no mark at the end
        ("form", "she lit a candle by the river."),
        ("form", "She lit a candle by the river. The end."),
        ("form", "She lit a candle by the river.."),
        ("form", "She lit a candle by the river; nobody saw it."),
        ("form", "Sure: she lit a candle by the river."),
        ("form", "1. She lit a candle by the river."),
        ("form", "She lit a candle\nby the river."),
        ("form", 'The old "candle" was lost in the "river".'),
        ("form", "She lit a CANDLE by the old RIVER."),
        ("form", "She lit a candle,,, by the river."),
        ("form", "She lit a candle <|im_end|> by the river."),
        ("length", "Candle and river."),
        ("length", "The candle met a river."),
        ("length", "She lit a candle by the river and then " + "we all went home because it was late " * 2 + "again."),
        ("words", "She lit a lamp by the small river."),
        ("words", "She lit two candles by the small river."),  # another form
        ("words", "She lit a candlestick by the small river."),
        ("words", "The candle near the candle lit the river."),
        ("words", "The cat slept on a soft wooden chair."),
        ("list", "The candle and the river were beautiful."),
        ("list", "We all admired a river, a candle."),
        ("list", "The candle is a river of hope."),
        ("list", "The river of the candle shone brightly there."),
        ("about words", "The word candle rhymes with no other river."),
        ("about words", "This sentence has a candle near a river."),
        ("repeats", "The light of the candle and the light by the river."),
        ("repeats", "She saw saw the candle by the river."),
        ("repeats", "She lit the the candle by a river."),
        ("repeats", "In the night by the candle we sat in the river."),
        ("empty", "The candle is there by the river."),
        ("empty", "It was the candle that was in the river."),
        ("no verb", "A small white candle by the side of the river."),
        ("heap", "Bright candle burned old green house near quiet river."),
        ("heap", "Candle dog jumped ran river cake house stone."),
        ("order", "The of lit candle by a with river."),
        ("order", "Candle the lit boat a old by river my."),
        ("order", "They burned every candle by the river and."),
        ("heap", "It was then that she had been with the candle that lit up all of their river."),
    ],
)
def test_degenerate_answers(fault, text):
    assert sentence_fault(text, GIVEN) == fault


def test_the_example_and_its_copies_win_nothing():
    assert sentence_fault(EXAMPLE, GIVEN) == "words"
    exchanged = EXAMPLE.replace(EXAMPLE_WORDS[0], GIVEN[0]).replace(EXAMPLE_WORDS[1], GIVEN[1])
    assert exchanged != EXAMPLE and sentence_fault(exchanged, GIVEN) == "copy"


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from([*GIVEN, "The", "is", "lit", ",", ".", "a"])).map(" ".join)))
def test_no_string_raises(text):
    assert sentence_fault(text, GIVEN) is None or isinstance(sentence_fault(text, GIVEN), str)


@settings(max_examples=60, deadline=None)
@given(st.permutations([*GIVEN, "the", "old", "boat", "with"]))
def test_words_in_any_order_without_a_verb_win_nothing(words):
    assert sentence_fault(" ".join(words).capitalize() + ".", GIVEN) is not None


def test_reward_reads_messages_and_texts_and_wants_an_end_of_turn():
    right = "She lit a candle by the river."
    completions = [[{"role": "assistant", "content": right}], right, right, "She lit a candle."]
    ids = [[5] * 9, [5] * (MAX_COMPLETION_LENGTH - 1), [5] * MAX_COMPLETION_LENGTH, [5] * 9]
    rewards = sentence_reward(
        prompts=["Words: candle, river"] * 4, completions=completions, completion_ids=ids, words=[list(GIVEN)] * 4
    )
    assert rewards == [1.0, 1.0, 0.0, 0.0]  # the third was cut off


def test_reward_refuses_lists_of_different_length():
    with pytest.raises(ValueError):
        sentence_reward(completions=["A."], completion_ids=[[1]], words=[list(GIVEN)] * 2)


def test_canonical_sentence_ignores_case_marks_and_blanks():
    assert canonical_sentence(" The cat's hat,  it seems.\n") == "the cat's hat it seems"
    assert canonical_sentence("A hat.") != canonical_sentence("The hat.")


def test_words_of_the_splits_are_disjoint_and_stand_in_no_other_list():
    words = [*TRAIN_WORDS, *TEST_WORDS, *EXAMPLE_WORDS]
    assert len(set(words)) == len(words) and len(TRAIN_WORDS) == 100 and len(TEST_WORDS) == 48
    assert not set(words) & (FUNCTION_WORDS | VERBS | META_WORDS)
    assert not [(word, other) for word in words for other in words if word != other and word in other]


def test_dataset_has_every_word_before_any_twice():
    dataset = make_dataset("train", 100, seed=1)
    first = [word for pair in dataset["words"][:50] for word in pair]
    assert sorted(first) == list(TRAIN_WORDS)
    assert dataset["words"][:50] != dataset["words"][50:]
    assert make_dataset("train", 9, seed=1)["words"][:] == dataset["words"][:9]
    assert {word for pair in make_dataset("test", 60)["words"] for word in pair} == set(TEST_WORDS)


def test_the_prompt_ends_with_the_given_words_and_holds_the_example():
    dataset = make_dataset("test", 3)
    for prompt, (first, second) in zip(dataset["prompt"], dataset["words"], strict=True):
        assert prompt[-1] == {"role": "user", "content": f"Words: {first}, {second}"}
        assert {"role": "assistant", "content": EXAMPLE} in prompt


def test_dataset_refuses_bad_arguments():
    with pytest.raises(ValueError, match="split"):
        make_dataset("validation", 4)
    with pytest.raises(ValueError, match="size"):
        make_dataset("train", 0)


def test_the_task_is_whole(the_real_model):
    task = sentence_task(seed=3, temperature=0.6)
    assert task.policy == the_real_model
    assert {word for pair in task.test["words"] for word in pair} == set(TEST_WORDS) and len(task.test) == 24
    assert (task.generation_config.temperature, task.generation_config.max_new_tokens) == (0.6, MAX_COMPLETION_LENGTH)
    check_reward(task.reward, task.train.column_names)


def test_the_real_model_is_sampled_and_scored(the_real_model):
    task = sentence_task()
    model, tokenizer = load_policy(task)
    records = sample_and_score(
        model,
        tokenizer,
        task.test.select([0]),
        task.reward,
        2,
        generation_config=task.generation_config,
        progress=False,
    )
    for text, reward, tokens in zip(*(records[0][name] for name in ("completions", "rewards", "tokens")), strict=True):
        assert reward == float(tokens < MAX_COMPLETION_LENGTH and sentence_fault(text, task.test["words"][0]) is None)
