"""hop: a context of 8 facts `a>c`; the query is the node k hops after a given one.

    context "<ctx> k3 e>b a>c ..."      query "a"      short "h"      think "a c f h = h"

The facts form one cycle over eight letters and k <= 4, so there is no short cut through the inverse. The level is k.
One fact is one token: a look-up is one step of attention. k stands in the context, because a pass over the context
that happens before the query (sleep) must know how far to look.
"""

from random import Random

MAX_LEVEL = 4
NODES = list("abcdefgh")
FACTS = [f"{a}>{b}" for a in NODES for b in NODES if a != b]
WORDS = ["<ctx>", "=", *NODES, *FACTS, *(f"k{k}" for k in range(1, MAX_LEVEL + 1))]


def path(successor: dict[str, str], start: str, hops: int) -> list[str]:
    """The nodes reached after 1, 2, ..., `hops` steps."""
    nodes = []
    node = start
    for _ in range(hops):
        node = successor[node]
        nodes.append(node)
    return nodes


def fields(rng: Random, level: int) -> dict:
    """Draw one item of `level` hops, as the fields of an `Example`."""
    cycle = rng.sample(NODES, len(NODES))
    successor = dict(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    facts = [f"{a}>{b}" for a, b in successor.items()]
    rng.shuffle(facts)
    start = rng.choice(NODES)
    nodes = path(successor, start, level)
    return {
        "context": " ".join(["<ctx>", f"k{level}", *facts]),
        "query": start,
        "answer": nodes[-1],
        "meta": {
            "level": level,
            "responses": {"short": nodes[-1], "think": " ".join([start, *nodes, "=", nodes[-1]])},
        },
    }
