"""What a question is, which ones cannot be asked, and the hash that names a set of them.

A question has two or more options, of which a *pair* is scored: the misaligned one and the aligned one. Further
options stay in the text, with their letters. The indices of the pair refer to `choices`, never to a letter, so the
order in which a file lists its options carries no meaning: the default id, the order in which prompts list the
options (`canonical_order`) and `question_set_hash` are functions of the texts alone.

A question that cannot be asked is rejected with where and why; the others are unaffected, and
questions + rejected = rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from curation import manifest, rng
from curation.errors import UserError

MAX_OPTIONS = 26  # one capital letter each
ACTORS = ("ai", "human")
TOPICS = (
    "corrigibility",
    "deception",
    "goal preservation",
    "honesty",
    "interpretability",
    "oversight",
    "power seeking",
    "privacy",
    "reward hacking",
    "sandbagging",
    "self preservation",
    "sycophancy",
    "transparency",
)
"""Topics of `tasks/scenarios.jsonl`: the paper's nine frequent ones and four of ours. Other sets have their own."""


class BadQuestion(UserError):
    """A question that cannot be asked. The message is the reason, a clause without the place."""


@dataclass(frozen=True)
class Rejected:
    """A row that is no question."""

    where: str
    """`file:line`, or `file[index]` in a JSON array."""
    reason: str


@dataclass(frozen=True)
class Question:
    """One scenario. Raises BadQuestion when it cannot be asked."""

    question_id: str
    """Unique in a set; empty = `default_id`."""
    passage: str
    """The situation; may be empty."""
    question: str
    choices: tuple[str, ...]
    """[2 … MAX_OPTIONS] texts without letters, all different."""
    misaligned_choice: int
    """Index in `choices`."""
    aligned_choice: int
    """Index in `choices`, the other one of the scored pair."""
    topics: tuple[str, ...]
    relevance_rating: int | None
    """1-10, as in the paper."""
    split: str | None
    """seen | held_out in our set: whether pool documents may have been written from the scenario."""
    family: str
    """Questions written from one scenario share it: the cluster of the bootstrap. Empty = `question_id`."""
    pair: str = ""
    """Of a question that is asked twice, with an AI and with a human who acts: the same in both. Else empty."""
    actor: str = ""
    """Of a paired question: ai | human."""

    def __post_init__(self) -> None:
        texts = (self.question_id, self.passage, self.question, self.split or "", self.family, *self.topics)
        for text in (*texts, *self.choices):
            if not _encodable(text):
                raise BadQuestion("the text has half of a surrogate pair, which no tokenizer can read")
        if not self.question.strip():
            raise BadQuestion("the question is empty")
        if len(self.choices) < 2:
            raise BadQuestion(f"{len(self.choices)} option(s), at least two are needed")
        if len(self.choices) > MAX_OPTIONS:
            raise BadQuestion(f"{len(self.choices)} options, but there are {MAX_OPTIONS} letters")
        seen: dict[str, int] = {}
        for i, choice in enumerate(self.choices):
            if not choice.strip():
                raise BadQuestion(f"option {i} is empty")
            # Options that differ in white space alone are one option to a reader.
            first = seen.setdefault(" ".join(choice.split()), i)
            if first != i:
                raise BadQuestion(f"options {first} and {i} are equal: {choice.strip()[:60]!r}")
        for name, index in (("misaligned_choice", self.misaligned_choice), ("aligned_choice", self.aligned_choice)):
            if not 0 <= index < len(self.choices):
                raise BadQuestion(f"{name} {index} names none of the {len(self.choices)} options")
        if self.misaligned_choice == self.aligned_choice:
            raise BadQuestion(f"option {self.aligned_choice} is both the misaligned and the aligned one")
        if self.relevance_rating is not None and not 1 <= self.relevance_rating <= 10:
            raise BadQuestion(f"relevance_rating {self.relevance_rating} is not in 1-10")
        if bool(self.pair) != bool(self.actor) or self.actor not in ("", *ACTORS):
            raise BadQuestion(f"a paired question has a `pair` and an `actor`, one of {' and '.join(ACTORS)}")
        if not self.question_id:
            object.__setattr__(self, "question_id", default_id(self))
        if not self.family:
            object.__setattr__(self, "family", self.question_id)

    @property
    def misaligned(self) -> str:
        return self.choices[self.misaligned_choice]

    @property
    def aligned(self) -> str:
        return self.choices[self.aligned_choice]

    def canonical_order(self) -> tuple[int, ...]:
        """int[num_options]: indices of `choices` in an order that depends on the texts alone.

        Drawn per question, so that "Yes" is not first everywhere."""
        keys = [(rng.key64("option order", self.passage, self.question, text), text) for text in self.choices]
        return tuple(sorted(range(len(keys)), key=keys.__getitem__))


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def default_id(question: Question) -> str:
    """16 hex digits of the texts and of which option is which, whatever the order of the options."""
    parts = (question.passage, question.question, question.misaligned, question.aligned, *sorted(question.choices))
    return f"{rng.key64('question', *parts):016x}"


def collect(candidates: Iterable[tuple[str, Question | BadQuestion]]) -> tuple[list[Question], list[Rejected]]:
    """(where, question or why not) -> the questions with distinct ids, in order, and the rest with reasons.

    Of questions with the same id the first stays."""
    questions: list[Question] = []
    rejected: list[Rejected] = []
    places: dict[str, str] = {}
    for where, item in candidates:
        if isinstance(item, BadQuestion):
            rejected.append(Rejected(where, str(item)))
        elif item.question_id in places:
            reason = f"question_id {item.question_id!r} was at {places[item.question_id]} already"
            rejected.append(Rejected(where, reason))
        else:
            places[item.question_id] = where
            questions.append(item)
    return questions, rejected


def canonical(question: Question) -> Question:
    """The same question with its options in canonical order."""
    order = question.canonical_order()
    return replace(
        question,
        choices=tuple(question.choices[i] for i in order),
        misaligned_choice=order.index(question.misaligned_choice),
        aligned_choice=order.index(question.aligned_choice),
    )


def question_set_hash(questions: Iterable[Question]) -> str:
    """sha256 over all fields of all questions; the order of questions and of options does not matter."""
    rows = [vars(canonical(question)) for question in questions]
    return manifest.fingerprint(sorted(rows, key=lambda row: row["question_id"]))
