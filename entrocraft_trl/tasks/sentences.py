"""Task for a real language model: write one sentence that holds two given words.

The prompt is chat: the instruction, one example, and two nouns such as `"Words: river, candle"`; a right answer is
any single English sentence with both, each once and not as a list, such as `"She lit a candle by the river."`. There
are countless right answers, so that a policy that loses its entropy shows it: its answers become one sentence with two
words exchanged (`self_similarity` of `evaluation/accuracy.py`).

The reward reads the text alone. It cannot tell whether a sentence makes sense; it refuses what is won without writing
one ([`sentence_fault`]).
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

from datasets import Dataset


MAX_COMPLETION_LENGTH = 24  # tokens with the end of turn; the starting policy's sentences have about 14
MIN_WORDS, MAX_WORDS = 6, 18
COPIED_WORDS = 4  # as many words in a row as in the example are a copy of it

# Of the prompts tried on SmolLM2-135M-Instruct the one that it obeys most often. Without an example it writes two in
# three answers past the length limit, and "cat, chair" alone is obeyed less often than "Words: cat, chair".
INSTRUCTION = "Write one short sentence with both words."
EXAMPLE_WORDS, EXAMPLE = ("cat", "chair"), "The cat slept on my old chair."

# Concrete nouns, none of which is a part or a form of another, so that the word itself has to be written.
TRAIN_WORDS = tuple(
    """
    apple artist baker basket bear bell bicycle blanket boat book bottle bread bridge brother camera candle carpet
    castle cave child circle clock cloud coat coffee cow dancer desk diary doctor dog door dream engine farmer
    fence field fire flag flower forest fox friend garden ghost gift girl glass guitar hammer harbor hat hill
    horse hotel island jacket journey kettle king kitchen ladder lamp leaf letter library lion map market mirror
    monkey mouse museum neighbor nurse ocean orange painter park pencil piano pilot pocket poet queen rabbit radio
    river road rope school shadow sheep shop singer snake soldier song spider star
    """.split()
)
TEST_WORDS = tuple(
    """
    actor airport anchor bird box bucket cake cheese church city cousin crown dragon duck egg feather hospital
    lake lawyer lemon mountain needle owl palace pirate potato prince ribbon robot sailor sister spoon stone storm
    student teacher temple tiger tower train umbrella village violin wall whale window winter wolf
    """.split()
)

# Words that hold a sentence together and say little: without them it is a heap of words, of them alone it is nothing.
FUNCTION_WORDS = frozenset(
    """
    a an the this that these those my your his her its our their some any every each no all both many more most other
    another i you he she it we they me him them us who which what whose and or but so yet nor if when while because as
    than though although until since after before where of in on at by for from to with without into onto over under
    through across along around about above below behind beside between near against toward towards upon off out up
    down during within is are was were be been being am has have had do does did will would can could may might must
    shall should not there here very too also just only then one
    """.split()
)
# A text with none of them, and no word in -ed, has no finite verb that could be seen without a parser.
VERBS = frozenset(
    """
    is are was were am has have had do does did will would can could may might must shall should
    ate became began bent blew bit bought bound bled bore broke brought built burnt came caught chose clung cost crept
    cut dealt drank drew drove dug fed fell felt fled flew flung forgot fought found froze gave got grew ground went
    heard held hid hit hung hurt kept knelt knew laid lay leapt led left lent let lit lost made meant met paid put ran
    rang read rode rose said sang sank sat saw sent set sewed shone shook shot shut slept slid sold spent spoke spread
    sprang spun stole stood struck stuck stung sung swam swept swore swung taught thought threw told took tore
    understood went wept woke won wore wove wrote
    becomes begins belongs breaks brings builds buys calls carries catches comes contains covers creates crosses
    dances draws dreams drinks drives eats enjoys falls feels fills finds flies flows follows gets gives goes grows
    guards hangs has hears helps hides holds jumps keeps knows leads lets lies likes lives looks loses loves makes
    meets moves needs opens paints passes plays provides pulls pushes puts reads reminds represents rides rises runs
    says sees sells sends serves shines shows sings sits sleeps smells sounds speaks spreads stands stays stops swims
    takes talks teaches tells thinks throws tries turns uses waits wakes walks wants watches wears works writes
    """.split()
)
# Each opens a group of words: of the function words few can follow it, and no sentence ends with it.
OPENING_WORDS = frozenset("a an the my your our their its every".split())
AFTER_OPENING_WORDS = frozenset("all just many more most one only other some then too very".split())
NEVER_LAST = OPENING_WORDS | frozenset("although and because but if into nor onto or than though while whose".split())
LIST_WORDS = frozenset("and or the a an with of to in is was are were".split())
META_WORDS = frozenset("word words sentence sentences noun nouns example phrase given".split())

_WORD = r"[A-Za-z][a-z]*(?:['’-][a-z]+)*"
_SENTENCE = re.compile(rf"(?=[A-Z]){_WORD}(?:,? {_WORD})*[.!?]")


def sentence_fault(text: str, words: Sequence[str]) -> str | None:
    """
    Why a text is no right answer, in a word or two; `None` for a right one. The first of these that holds:

    - `"form"`: not one sentence of plain words and commas, from a capital letter to one mark at its end;
    - `"length"`: fewer than [`MIN_WORDS`] or more than [`MAX_WORDS`] words;
    - `"words"`: not each of the given words exactly once, as it is given;
    - `"list"`: between two of them stand only articles, "and" and the like;
    - `"about words"`: it speaks of words or sentences;
    - `"repeats"`: a word that is no function word stands there twice, or two words in a row do;
    - `"empty"`: no such word besides the given ones;
    - `"no verb"`: none of [`VERBS`], nor a word in -ed;
    - `"heap"`: less than a quarter or more than two thirds of the words are function words;
    - `"order"`: an article or a possessive before a word that cannot follow it, or an end that cannot be one;
    - `"copy"`: [`COPIED_WORDS`] words in a row are those of the example.
    """
    text = text.strip()
    if not _SENTENCE.fullmatch(text):
        return "form"
    said = re.findall(_WORD, text.lower())
    if not MIN_WORDS <= len(said) <= MAX_WORDS:
        return "length"
    if any(said.count(word) != 1 for word in words):
        return "words"
    places = sorted(said.index(word) for word in words)
    if any(LIST_WORDS.issuperset(said[left + 1 : right]) for left, right in pairwise(places)):
        return "list"
    if META_WORDS.intersection(said):
        return "about words"
    content = [word for word in said if word not in FUNCTION_WORDS]
    if len(set(content)) < len(content) or _repeats_itself(said):
        return "repeats"
    if set(content) <= set(words):
        return "empty"
    if not any(word in VERBS or word.endswith("ed") for word in said if word not in words):
        return "no verb"
    if not len(said) / 4 <= len(said) - len(content) <= len(said) * 2 / 3:
        return "heap"
    if _is_out_of_order(said):
        return "order"
    if _runs(said) & _runs(re.findall(_WORD, EXAMPLE.lower())):
        return "copy"
    return None


def _repeats_itself(said: list[str]) -> bool:
    """Whether a word follows itself, or a pair of words comes twice."""
    pairs = Counter(pairwise(said))
    return max(pairs.values()) > 1 or any(left == right for left, right in pairs)


def _is_out_of_order(said: list[str]) -> bool:
    refused = FUNCTION_WORDS - AFTER_OPENING_WORDS
    return said[-1] in NEVER_LAST or any(left in OPENING_WORDS and right in refused for left, right in pairwise(said))


def _runs(said: list[str]) -> set[tuple[str, ...]]:
    """All runs of [`COPIED_WORDS`] words."""
    return {tuple(said[start : start + COPIED_WORDS]) for start in range(len(said) - COPIED_WORDS + 1)}


def sentence_reward(
    completions: list[list[dict[str, str]] | str], words: list[list[str]], completion_ids: list[list[int]], **kwargs
) -> list[float]:
    """
    Reward function in TRL's signature: 1.0 for a right sentence that ended by itself, 0.0 for anything else.

    Args:
        completions (`list`): Chat messages or texts to score, `(B,)`.
        words (`list[list[str]]`): Dataset column: the given words of each row, `(B, 2)`.
        completion_ids (`list[list[int]]`): Tokens of each completion with its end of turn, `(B, T)` with `T` of any
            length. [`MAX_COMPLETION_LENGTH`] or more have been cut off, or are too many.
        **kwargs: Whatever else TRL passes. Not used.

    Returns:
        `list[float]`: rewards `(B,)`.

    Raises:
        `ValueError`: if the lists differ in length.
    """
    texts = [completion if isinstance(completion, str) else completion[-1]["content"] for completion in completions]
    return [
        float(len(ids) < MAX_COMPLETION_LENGTH and sentence_fault(text, given) is None)
        for text, given, ids in zip(texts, words, completion_ids, strict=True)
    ]


def canonical_sentence(text: str) -> str:
    """The words alone, in lower case: two sentences count as the same if these strings are equal."""
    return " ".join(re.findall(_WORD, text.lower()))


def make_prompt(words: Sequence[str]) -> list[dict[str, str]]:
    """Chat messages: the instruction, the example, the given words."""
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": f"Words: {', '.join(EXAMPLE_WORDS)}"},
        {"role": "assistant", "content": EXAMPLE},
        {"role": "user", "content": f"Words: {', '.join(words)}"},
    ]


def make_dataset(split: str, size: int, seed: int = 0) -> Dataset:
    """
    Prompts of one split, with pairs of its words. Every word appears before any appears again.

    Args:
        split (`str`): `"train"` or `"test"`; their words are disjoint.
        size (`int`): Number of rows.
        seed (`int`, *optional*, defaults to `0`): Seed of the pairs.

    Returns:
        `datasets.Dataset` with the columns `prompt` (chat messages) and `words` (`list[str]`, two).

    Raises:
        `ValueError`: if the split is unknown or the size is not positive.
    """
    if split not in ("train", "test"):
        raise ValueError(f"`split` must be 'train' or 'test', got {split!r}.")
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}.")
    words = TRAIN_WORDS if split == "train" else TEST_WORDS
    rng = random.Random(seed)
    pairs: list[list[str]] = []
    while len(pairs) < size:
        order = rng.sample(words, len(words))
        pairs.extend([first, second] for first, second in zip(order[::2], order[1::2], strict=True))
    pairs = pairs[:size]
    return Dataset.from_dict({"prompt": [make_prompt(pair) for pair in pairs], "words": pairs})
