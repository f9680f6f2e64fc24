"""The generated tasks against an evaluation that shares no code with them."""

from random import Random

import pytest

from siesta.data.tasks import calc, graph, hop, rule110

TASKS = {"calc": calc, "hop": hop, "rule110": rule110, "graph": graph}
LEVELS = [(name, level) for name, task in TASKS.items() for level in range(1, task.MAX_LEVEL + 1)]
DRAWS = 200


def drawn(task: str, level: int) -> list[dict]:
    rng = Random(f"{task}-{level}")
    return [TASKS[task].fields(rng, level) for _ in range(DRAWS)]


def running_values(query: str) -> list[str]:
    """Python's own arithmetic on the query text, brackets put around every step."""
    _, start, *operations = [word for word in query.split() if word != ";"]
    expression, values = start, []
    for operation in operations:
        expression = f"(({expression}) {operation[0]} {operation[1:]})"
        values.append(str(eval(expression) % 10))
    return values


def hops(context: str, start: str, count: int) -> list[str]:
    """Nodes reached by reading the facts as text, one search of the whole list a step."""
    nodes = [start]
    for _ in range(count):
        (successor,) = [fact[2] for fact in context.split()[2:] if fact.startswith(f"{nodes[-1]}>")]
        nodes.append(successor)
    return nodes[1:]


@pytest.mark.parametrize("level", range(1, 9))
def test_calc_answers_are_right(level: int) -> None:
    for item in drawn("calc", level):
        values = running_values(item["query"])
        assert len(values) == item["meta"]["level"] == level
        assert item["answer"] == values[-1]
        responses = item["meta"]["responses"]
        assert responses["short"] == values[-1]
        assert responses["think"].split() == [*values, "=", values[-1]]


@pytest.mark.parametrize("level", range(1, 9))
def test_calc_operations_fill_fixed_slots(level: int) -> None:
    for item in drawn("calc", level):
        tag, start, *slots = item["query"].split()
        assert (tag, len(slots), item["context"]) == ("<calc>", 8, "")
        assert start in calc.DIGITS
        assert all(slot in calc.OPERATIONS for slot in slots[:level])
        assert slots[level:] == [";"] * (8 - level)


def test_calc_never_sticks_at_a_value() -> None:
    """Every operation permutes the digits, so a late step depends on every step before it."""
    for operation in calc.OPERATIONS:
        assert sorted(calc.apply(value, operation) for value in range(10)) == list(range(10))


def test_calc_level_one_has_the_items_that_the_splits_are_sized_for() -> None:
    rng = Random(0)
    texts = {calc.fields(rng, 1)["query"] for _ in range(20_000)}
    assert len(texts) == 210 == 10 * len(calc.OPERATIONS)


@pytest.mark.parametrize("level", range(1, 5))
def test_hop_answers_follow_the_facts(level: int) -> None:
    for item in drawn("hop", level):
        nodes = hops(item["context"], item["query"], level)
        assert item["meta"]["level"] == level
        assert item["answer"] == nodes[-1]
        responses = item["meta"]["responses"]
        assert responses["short"] == nodes[-1]
        assert responses["think"].split() == [item["query"], *nodes, "=", nodes[-1]]


@pytest.mark.parametrize("level", range(1, 5))
def test_hop_facts_form_one_cycle(level: int) -> None:
    for item in drawn("hop", level):
        tag, k, *facts = item["context"].split()
        assert (tag, k, len(facts)) == ("<ctx>", f"k{level}", 8)
        cycle = hops(item["context"], item["query"], 8)
        assert sorted(cycle) == list("abcdefgh"), "every letter once"
        assert cycle[-1] == item["query"], "and back at the start after eight hops, not before"


def test_hop_query_alone_says_nothing_about_the_answer() -> None:
    items = drawn("hop", 2)
    assert len({item["answer"] for item in items if item["query"] == "a"}) > 4


def automaton(row: list[int], steps: int) -> list[int]:
    """Rule 110 by its number: bit 4 * left + 2 * own + right of 110."""
    for _ in range(steps):
        row = [110 >> (4 * row[i - 1] + 2 * row[i] + row[(i + 1) % len(row)]) & 1 for i in range(len(row))]
    return row


@pytest.mark.parametrize("level", range(1, rule110.MAX_LEVEL + 1))
def test_rule110_answers_follow_the_rule(level: int) -> None:
    for item in drawn("rule110", level)[:50]:
        tag, depth, *words = item["context"].split()
        rows = {words[i]: [int(bit) for bit in words[i + 1 : i + 25]] for i in range(0, 100, 25)}
        steps = int(depth[1:])
        assert (tag, list(rows), steps) == ("<rows>", ["r1", "r2", "r3", "r4"], rule110.DEPTHS[level - 1])
        row = rows[item["query"]]
        answer = str(automaton(row, steps)[0])
        assert item["answer"] == item["meta"]["responses"]["short"] == answer
        work, _, last = item["meta"]["responses"]["think"].partition(" = ")
        assert last == answer
        written = [[int(bit) for bit in part.split()] for part in work.split(" ; ")]
        assert len(written) == -(-steps // max(1, -(-steps // 8))) <= 8
        for place, bits in enumerate(reversed(written)):
            to_go = place * -(-steps // 8)
            whole = automaton(row, steps - to_go)
            around = [whole[i % 24] for i in range(-min(to_go, 12), min(to_go + 1, 12))]
            assert bits == around, "the bits that the answer depends on, and no others"


def test_rule110_by_hand() -> None:
    """The first bit is the lowest: 0 1 1 0 1 0 0 1 becomes 1 1 1 1 1 0 1 1."""
    row = 0b10010110
    assert rule110.bits(row, 8, range(8)) == "0 1 1 0 1 0 0 1"
    assert rule110.bits(rule110.step(row, 8), 8, range(8)) == "1 1 1 1 1 0 1 1"
    assert rule110.work(row, 8, 2) == ["1 1 1", "0"]
    assert rule110.work(row, 8, 1) == ["1"]
    assert rule110.work(row, 8, 32)[0].count(" ") == 7, "a row is never written more than once around"


def test_rule110_answers_are_nearly_balanced_beyond_one_step() -> None:
    for level in range(2, rule110.MAX_LEVEL + 1):
        ones = sum(item["answer"] == "1" for item in drawn("rule110", level))
        assert 0.4 < ones / DRAWS < 0.67


@pytest.mark.parametrize("size", [32, 75])
@pytest.mark.parametrize("level", [1, 5, 16])
def test_graph_answers_follow_the_facts(level: int, size: int) -> None:
    rng = Random(f"graph-{level}-{size}")
    for _ in range(20):
        item = graph.fields(rng, level, size)
        tag, k, *words = item["context"].split()
        assert (tag, k, len(words)) == ("<graph>", f"k{level}", 2 * size)
        node, nodes = item["query"], []
        for _ in range(size):
            node = words[words.index(f"{node}>") + 1]
            nodes.append(node)
        assert len(set(nodes)) == size, "one cycle"
        assert item["answer"] == item["meta"]["responses"]["short"] == nodes[level - 1]
        think = [item["query"], *nodes[:level], "=", nodes[level - 1]]
        assert item["meta"]["responses"]["think"].split() == think


@pytest.mark.parametrize(("task", "level"), LEVELS)
def test_every_word_is_in_the_vocabulary(task: str, level: int) -> None:
    known = set(TASKS[task].WORDS)
    for item in drawn(task, level):
        texts = [item["context"], item["query"], item["answer"], *item["meta"]["responses"].values()]
        assert set(" ".join(texts).split()) <= known


@pytest.mark.parametrize("task", TASKS)
def test_vocabulary_has_no_word_twice(task: str) -> None:
    assert len(set(TASKS[task].WORDS)) == len(TASKS[task].WORDS)


@pytest.mark.parametrize(("task", "level"), LEVELS)
def test_an_item_depends_on_the_generator_alone(task: str, level: int) -> None:
    draw = TASKS[task].fields
    assert draw(Random(3), level) == draw(Random(3), level)
    assert draw(Random(3), level) != draw(Random(4), level)
