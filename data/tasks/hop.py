"""hop: a context of 8 facts `a>c`; the query is the node k hops after a given one.

    context "<ctx> k3 e>b a>c ..."      query "a"      short "h"      think "a c f h = h"

The facts form one cycle over eight letters and k <= 4, so there is no short cut through the inverse. The level is k.
One fact is one token: a look-up is one step of attention. k stands in the context, because a pass over the context
that happens before the query (sleep) must know how far to look.

What such a pass can write are the facts k hops on, one row for each fact of the context; what is kept of a row stands
after its `=`. From those alone a query is one look-up again:

    notes "e b d a = e>a ; a c f h = a>h ; ..."      query "a"      short "h"      think "a h = h"
"""

from random import Random

MAX_LEVEL = 4
NODES = list("abcdefgh")
QUERIES = len(NODES)  # that can be asked of one context
SIZES = range(0)  # nothing to scale
FACTS = [f"{a}>{b}" for a in NODES for b in NODES if a != b]
WORDS = ["<ctx>", "=", ";", *NODES, *FACTS, *(f"k{k}" for k in range(1, MAX_LEVEL + 1))]


def path(successor: dict[str, str], start: str, hops: int) -> list[str]:
    """The nodes reached after 1, 2, ..., `hops` steps."""
    nodes = []
    node = start
    for _ in range(hops):
        node = successor[node]
        nodes.append(node)
    return nodes


def read(context: str) -> tuple[dict[str, str], int]:
    """The facts of a context, in its order, and how many hops are asked for."""
    _, hops, *facts = context.split()
    return dict(fact.split(">") for fact in facts), int(hops.removeprefix("k"))


def notes(context: str) -> str:
    """What a pass over the context is taught to write: for each fact the walk from its start, and where it leads."""
    successor, hops = read(context)
    rows = []
    for start in successor:
        nodes = path(successor, start, hops)
        rows += [start, *nodes, "=", f"{start}>{nodes[-1]}", ";"]
    return " ".join(rows)


def draw(rng: Random, level: int) -> str:
    """The context of an item of `level` hops."""
    cycle = rng.sample(NODES, len(NODES))
    facts = [f"{a}>{b}" for a, b in zip(cycle, [*cycle[1:], cycle[0]], strict=True)]
    rng.shuffle(facts)
    return " ".join(["<ctx>", f"k{level}", *facts])


def ask(context: str, start: str) -> dict:
    """One query of a context, as the fields of an `Example`."""
    successor, hops = read(context)
    nodes = path(successor, start, hops)
    answer = nodes[-1]
    return {
        "context": context,
        "query": start,
        "answer": answer,
        "meta": {
            "level": hops,
            "responses": {"short": answer, "think": " ".join([start, *nodes, "=", answer])},
            "notes": notes(context),
            "responses_with_notes": {"short": answer, "think": f"{start} {answer} = {answer}"},
        },
    }


def fields(rng: Random, level: int) -> dict:
    """Draw one item of `level` hops, as the fields of an `Example`."""
    context = draw(rng, level)
    return ask(context, rng.choice(NODES))


def every_query(rng: Random, level: int) -> list[dict]:
    """Draw one context and list all its queries, in an order of their own."""
    context = draw(rng, level)
    return [ask(context, start) for start in rng.sample(NODES, QUERIES)]
