r"""How published data sets write their rows, and the row that each becomes.

    gsm8k       {"question": ..., "answer": "Natalia sold 48/2 = <<48/2=24>>24 clips ...\n#### 72"}
    math        {"problem": ..., "solution": "... \\boxed{\\frac{3}{4}}", "level": "Level 3", "answer": optional}
    aime        {"Problem": ..., "Answer": 204, "Solution": ...}, or the same keys in small letters
    deepscaler  {"problem": ..., "answer": ..., "solution": ...}

A format yields `query`, `answer`, `verifier` and, where the data has them, `solution` (worked, without the final
answer's marker), `level` and `id`. A row it cannot read is a DataError that names file and row.
"""

import re
from collections.abc import Callable
from typing import Any

from siesta.data.errors import DataError

# Hub name -> format and, where the data set has several, its configuration.
KNOWN: dict[str, tuple[str, str | None]] = {
    "openai/gsm8k": ("gsm8k", "main"),
    "HuggingFaceH4/MATH-500": ("math", None),
    "EleutherAI/hendrycks_math": ("math", None),
    "HuggingFaceH4/aime_2024": ("aime", None),
    "Maxwell-Jia/AIME_2024": ("aime", None),
    "agentica-org/DeepScaleR-Preview-Dataset": ("deepscaler", None),
}

CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K's notes for a calculator
AIME_ANSWER = re.compile(r"\d{1,3}")
Row = dict[str, Any]


def boxed(text: str) -> str | None:
    r"""What the last \boxed{...} of a solution holds, its own braces included; None if there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin + 1 : place]
    return None


def _text(row: Row, *names: str) -> str:
    """The first of these columns that the row has, whatever its capitals; ValueError names them."""
    for name in names:
        for column, value in row.items():
            if column.lower() == name and value is not None and str(value).strip():
                return str(value).strip()
    raise ValueError(f"no text in column {' or '.join(repr(name) for name in names)}")


def _optional(row: Row, *names: str) -> str | None:
    try:
        return _text(row, *names)
    except ValueError:
        return None


def gsm8k(row: Row) -> Row:
    """The answer stands behind ####, the solution before it."""
    solution, marker, answer = _text(row, "answer").rpartition("####")
    if not marker or not answer.strip():
        raise ValueError("no '#### answer' at the end of column 'answer'")
    worked = CALCULATION.sub("", solution).strip()
    return {"query": _text(row, "question"), "answer": answer.strip().replace(",", ""), "solution": worked}


def math(row: Row) -> Row:
    r"""The answer stands in a column of its own, or in the last \boxed of the solution."""
    solution = _optional(row, "solution")
    answer = _optional(row, "answer") or boxed(solution or "")
    if answer is None:
        raise ValueError("neither an answer nor a \\boxed{...} in the solution")
    found = {"query": _text(row, "problem"), "answer": answer, "solution": solution, "id": _optional(row, "unique_id")}
    level = re.search(r"\d+", _optional(row, "level", "difficulty") or "")
    return found | {"level": level and level.group()}


def aime(row: Row) -> Row:
    """The answer is a whole number from 0 to 999, perhaps with leading zeros."""
    answer = _text(row, "answer")
    if not AIME_ANSWER.fullmatch(answer):
        raise ValueError(f"the answer {answer!r} is not a whole number from 0 to 999")
    found = {"query": _text(row, "problem"), "answer": str(int(answer)), "solution": _optional(row, "solution")}
    return found | {"id": _optional(row, "id")}


def deepscaler(row: Row) -> Row:
    """As MATH, without levels."""
    return {"query": _text(row, "problem"), "answer": _text(row, "answer"), "solution": _optional(row, "solution")}


FORMATS: dict[str, Callable[[Row], Row]] = {"gsm8k": gsm8k, "math": math, "aime": aime, "deepscaler": deepscaler}


def read_as(name: str, row: Row, where: str) -> Row:
    """A raw row of a published data set in our own columns; those it lacks are left out.

    Raises:
        DataError: The row is not of this format; `where` names file and row.
    """
    try:
        found = FORMATS[name](row)
    except ValueError as error:
        raise DataError(f"{where}: not a row of format {name}: {error}") from error
    return {key: value for key, value in found.items() if value is not None} | {"verifier": "math"}
