"""graph: a context of n facts `v3> v7`; the query is the node k hops after a given one, k up to 16.

    context "<graph> k2 v5> v1 v3> v7 v7> v5 ..."      query "v3"      short "v5"      think "v3 v7 v5 = v5"

Like `hop`, deeper and wider: the level is k, and the facts, two words each, form one cycle (after the task Depo in
arXiv 2605.26099). n is at least 2 * 16, so there is no short cut through the inverse.
"""

from random import Random

MAX_LEVEL = 16
SIZE, SIZES = 32, range(2 * MAX_LEVEL, 76)  # nodes
QUERIES = SIZES.start  # every node of the smallest graph
NODES = [f"v{i}" for i in range(SIZES.stop - 1)]
WORDS = ["<graph>", "=", *NODES, *(f"{node}>" for node in NODES), *(f"k{k}" for k in range(1, MAX_LEVEL + 1))]


def draw(rng: Random, size: int) -> dict[str, str]:
    """Each node's successor on a cycle, in the order of the context."""
    cycle = rng.sample(NODES[:size], size)
    facts = list(zip(cycle, [*cycle[1:], cycle[0]], strict=True))
    rng.shuffle(facts)
    return dict(facts)


def ask(successor: dict[str, str], level: int, start: str) -> dict:
    """One query of a context, as the fields of an `Example`."""
    nodes = [start]
    for _ in range(level):
        nodes.append(successor[nodes[-1]])
    answer = nodes[-1]
    return {
        "context": " ".join(["<graph>", f"k{level}", *(f"{a}> {b}" for a, b in successor.items())]),
        "query": start,
        "answer": answer,
        "meta": {"level": level, "responses": {"short": answer, "think": f"{' '.join(nodes)} = {answer}"}},
    }


def fields(rng: Random, level: int, size: int = SIZE) -> dict:
    """Draw one item of `level` hops, as the fields of an `Example`."""
    successor = draw(rng, size)
    return ask(successor, level, rng.choice(list(successor)))


def every_query(rng: Random, level: int, size: int = SIZE) -> list[dict]:
    """Draw one context and list QUERIES of its queries, in an order of their own."""
    successor = draw(rng, size)
    return [ask(successor, level, start) for start in rng.sample(list(successor), QUERIES)]
