"""A word problem in two: what is known (context), and what is asked about it (query), so that sleep has a context.

    "Mr. Day has 3.5 kg of rice. He eats 1 kg a week. If he buys 2 kg, how much is left after a week?"

    context  "Mr. Day has 3.5 kg of rice. He eats 1 kg a week."
    query    "If he buys 2 kg, how much is left after a week?"     with facts of its own (`query_has_facts`)

Every sentence that asks goes to the query, wherever it stands, so that no part of the question is known beforehand;
the others are the context. A question that carries facts keeps them: cut at its comma, "if he buys 2 kg" would turn
from a supposition into something that happened. Such items are flagged, not mended: a sleep over their context lacks
something. The rules are for English prose; they are rules, and sometimes wrong.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from siesta.data.schema import Example

# A name or a number follows: they end a sentence only before a word that is neither (STARTS).
BEFORE_NAMES = re.compile(
    r"mr|mrs|ms|mx|dr|prof|rev|hon|st|mt|gen|col|capt|sgt|lt|gov|sen|rep|pres|fr|sr|jr|vs|ave|blvd|rd|inc|"
    r"ltd|co|corp|dept|e\.g|i\.e|cf|viz|approx|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|(?:[a-z]\.)*[a-z]"
)
# They stand at the end as well as inside: a capital letter after them begins a sentence, a number does not.
MAY_END = re.compile(
    r"a\.m|p\.m|etc|no|fig|eq|in|ft|lbs?|oz|hrs?|mins?|secs?|yds?|mi|kgs?|km|cm|mm|ml|sq|pt|qt|gal|doz|wks?|yrs?|mph"
)
STARTS = re.compile(
    r"he|she|they|it|we|you|i|the|a|an|his|her|their|its|our|your|my|this|that|these|those|there|then|if|in|on|at|for|"
    r"how|what|which|who|when|where|why|after|before|each|every|both|all|some|one|two|another|find|calculate|determine"
)

END = re.compile(r"(?:\.{2,}|…|[.?!])+[\"'”’)\]}$*\\]*")
BREAK = re.compile(r"\n\s*\n|\n(?=\s*(?:\d{1,2}[.)]|[-*•])\s)")  # a paragraph or an item of a list ends what is before
GLUED = re.compile(r"[A-Z](?:[a-z']|\s)")  # "each.How": a space was forgotten
QUOTED = re.compile(r"(?<![\w\"])\"[^\"\n]*\"|“[^”\n]*”|\([^()\n]*\)")
LIST_MARK = re.compile(r"\s*(?:\d{1,2}|[a-zA-Z])\.")

# At the start of a sentence; in its middle ("If x = 3, find y.") only what cannot be a noun or a relative pronoun.
SOLVE = r"find|compute|calculate|determine|evaluate"
FRONT = (
    rf"(?:{SOLVE}|simplify|solve|estimate|prove|show that|figure out|work out|factor|expand|convert|"
    r"(?:express|list|name|state|write|give|enter|separate|leave|round)(?: down| off| up)? "
    r"(?:your|the|to|all|an?|its|each)|tell (?:me|us|him|her)|"
    r"(?:how|what|which|whose|why)\b(?! (?:he|she|they|it|we)\b))"
)
LEAD = r"(?:(?:so|then|now|and|next|please|first|finally|thus|hence|therefore|also|in total|on average),? )*"
ASKS = re.compile(rf"^\W*{LEAD}{FRONT}\b|[,;:]\s+{LEAD}(?:{SOLVE})\b", re.IGNORECASE)
# Only if no other sentence asks, since stories have these too: "..., how many are left." and "She wonders how many."
LATE = re.compile(r"[,;:]\s+(?:at )?(?:how (?:many|much|long|far|old|tall|fast|often)|what)\b", re.IGNORECASE)
TOLD = re.compile(
    r"\b(?:wonder|know|curious|ask|figure out|find out|tell)\w*\b.*\b(?:how|what|which)\b", re.IGNORECASE | re.DOTALL
)
SUPPOSES = re.compile(
    r"\b(?:if|given|assum(?:e|es|ing)|suppos(?:e|ing)|provided|considering|knowing|since|because|unless|as long as)\b",
    re.IGNORECASE,
)
# Numbers in words, and their digits where they may stand for them. "one" is left out: it says as little as "a".
AMOUNTS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9"}
AMOUNTS |= {
    "ten": "10",
    "eleven": "11",
    "twelve": "12",
    "fifteen": "15",
    "twenty": "20",
    "thirty": "30",
    "fifty": "50",
}
OTHER_AMOUNTS = re.compile(
    r"\b(?:\w+teen|forty|sixty|seventy|eighty|ninety|hundred|thousand|million|half|twice|thrice|double|triple|dozen|"
    r"thirds?|quarters?|fifths?|tenths?|percent)\b"
)


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order; joined they are the text up to white space."""
    found = []
    for part in BREAK.split(text):
        start = 0
        inside = [match.span() for match in QUOTED.finditer(part)]
        for mark in END.finditer(part):
            enclosed = any(a < mark.start() and mark.end() < b for a, b in inside)
            if not enclosed and ends(part[start : mark.end()], mark.group(), part[mark.end() :]):
                found.append(part[start : mark.end()])
                start = mark.end()
        found.append(part[start:])
    return [sentence.strip() for sentence in found if sentence.strip()]


def ends(sentence: str, mark: str, rest: str) -> bool:
    """Whether a sentence is over at `mark`, its last characters, or goes on with `rest`."""
    if not rest.strip():
        return True
    word = re.findall(r"\S+$", sentence[: -len(mark)])
    before = word[0].lstrip("\"'“‘([{$").lower() if word else ""
    if not rest[0].isspace():  # 3.5, U.S.A, example.com; but "each.How", and a formula as in TeX
        word_ends = len(mark) == 1 and len(before) > 2 and before.isalpha()
        return (word_ends or mark.endswith("\\]")) and bool(GLUED.match(rest))
    following = rest.split()[0]
    opening = following.lstrip("\"'“‘([{*")[:1]
    starts = STARTS.fullmatch(re.sub(r"[^a-z]", "", following.lower().removesuffix("'s"))) is not None
    if mark[0] in "?!":
        return not opening.islower() or (mark == "?" and starts)
    if LIST_MARK.fullmatch(sentence):
        return False
    if mark.startswith(("..", "…")):
        return opening.isupper()
    if MAY_END.fullmatch(before):
        return opening.isupper() or following[0] in '"“'
    if BEFORE_NAMES.fullmatch(before):
        return opening.isupper() and starts
    return starts if opening.islower() else True


def asks(sentence: str) -> bool:
    """Whether a sentence asks for something: a question mark at its end, an imperative, a question word up front."""
    return sentence.rstrip("\"'”’)]}$* ").endswith("?") or ASKS.search(sentence) is not None


def quotes(sentence: str) -> bool:
    """Whether the question is somebody's in the story."""
    return re.search(r"[?.][\"”]", sentence) is not None


def amounts(text: str) -> set[str]:
    """The numbers of a text, in digits or words."""
    digits = {number.replace(",", "") for number in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)}
    words = {AMOUNTS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in AMOUNTS}
    return digits | words | set(OTHER_AMOUNTS.findall(text.lower()))


@dataclass(frozen=True)
class Parts:
    """A problem in two.

    Args:
        questions: Sentences that ask.
        query_has_facts: The query supposes something, or has a number that the context lacks.
    """

    context: str
    query: str
    questions: int
    query_has_facts: bool


def split(text: str) -> Parts | None:
    """A problem in two; None if nothing asks, or if nothing is left for the context."""
    every = sentences(text)
    asking = [i for i, sentence in enumerate(every) if asks(sentence) and not quotes(sentence)]
    for last_resort in (asks, LATE.search, TOLD.search):
        asking = asking or [i for i, sentence in enumerate(every) if last_resort(sentence)][-1:]
    context = " ".join(sentence for i, sentence in enumerate(every) if i not in asking)
    query = " ".join(every[i] for i in asking)
    if not context or not query:
        return None
    facts = SUPPOSES.search(query) is not None or bool(amounts(query) - amounts(context))
    return Parts(context, query, len(asking), facts)


@dataclass
class SplitCount:
    """What became of the items of a source: those that had a context already are not among them."""

    items: int = 0
    failed: int = 0
    with_facts: int = 0

    def __str__(self) -> str:
        return (
            f"{self.failed} of {self.items} items are left out, which have no question sentence or nothing beside it; "
            f"{self.with_facts} of the others have facts in their question"
        )


def stateful(examples: Iterable[Example]) -> tuple[list[Example], SplitCount]:
    """The examples with a context each. One that has no context and cannot be split is left out: sleep has nothing
    to work on, and a run that mixes it with the others would measure something else.
    """
    kept, count = [], SplitCount()
    for example in examples:
        if example.context:
            kept.append(example)
            continue
        count.items += 1
        parts = split(example.query)
        if parts is None:
            count.failed += 1
            continue
        count.with_facts += parts.query_has_facts
        meta = example.meta | {"query_has_facts": parts.query_has_facts, "questions": parts.questions}
        kept.append(replace(example, context=parts.context, query=parts.query, meta=meta))
    return kept, count
