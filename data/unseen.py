"""Questions that RL asks and the warm-up has not shown.

On a question it was taught the answer of, a model is right at once, whatever it could do with a new one. RL on such
questions pays `short` for having been taught, and the mode policy learns to answer at once what it cannot answer. So a
share of the questions can be kept from the warm-up, and RL is trained on them alone.
"""

from hashlib import sha256

from siesta.data.errors import DataError
from siesta.data.schema import Example
from siesta.data.sources import normalised


def is_unseen(example: Example, share: float, seed: int) -> bool:
    """Is the item kept from the warm-up?

    A hash of its text decides, so that copies of a question lie on one side, and all items on one context as well,
    whatever the order and number of items.
    """
    about = example.context or normalised(example)
    digest = sha256(f"{seed} {about}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def one_side(examples: list[Example], share: float, seed: int, *, unseen: bool) -> list[Example]:
    """The examples that the warm-up may see, or the others, which are RL's; all of them if `share` is 0.

    Raises:
        DataError: None is left.
    """
    if share == 0:
        return examples
    chosen = [example for example in examples if is_unseen(example, share, seed) == unseen]
    if not chosen:
        stage, change = ("RL", "raise it") if unseen else ("the warm-up", "lower it")
        raise DataError(f"data.unseen_share: {share} of the questions leaves none to {stage}; {change}")
    return chosen
