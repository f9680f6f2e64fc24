"""The serving benchmark against a stand-in for vLLM's server: transformers behind HTTP, obedient or not."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread

import pytest
from transformers import GenerationConfig

from benchmarks.serving import Answer, Reference, is_up, measure, row, same, split_at_dashes, wished
from benchmarks.serving_tables import write_page
from siesta.data.prompts import Messages, messages, prompt_ids
from siesta.data.schema import Example
from siesta.rl.serving import Choice, RequestError, find_rules, write_rules
from tests.helpers import tell_apart, tiny_judge, tiny_model

Decide = Callable[[Choice], Choice]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("export")
    judge, model = tiny_judge(), tiny_model()
    tell_apart(model, judge.tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    model.save_pretrained(folder)
    judge.tokenizer.save_pretrained(folder)
    write_rules(folder, judge.modes, eos_id=1, instruction="")
    return Reference(folder, find_rules(str(folder)), "cpu")


class Server(ThreadingHTTPServer):
    request_queue_size = 64  # the benchmark opens 32 connections at once; more than 5 that wait would be reset


@contextmanager
def standing_in(reference: Reference, decide: Decide) -> Iterator[str]:
    """A server that answers with `reference`, under what `decide` makes of a request's choice; its URL."""
    lock = Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200 if self.path == "/health" else 404, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                choice = reference.rules.choice(body["vllm_xargs"])
            except RequestError as error:
                self.reply(400, {"error": {"message": str(error)}})
                return
            ids = prompt_ids(reference.tokenizer, body["messages"])
            with lock:
                (written,) = reference.written([ids], decide(choice), 1)
            said = {"token_ids": [*written, reference.rules.eos_id]}
            self.reply(200, {"prompt_token_ids": ids, "choices": [said]})

        def reply(self, code: int, content: dict) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            """Say nothing."""

    served = Server(("127.0.0.1", 0), Handler)
    Thread(target=served.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{served.server_port}"
    finally:
        served.shutdown()
        served.server_close()


def asked() -> list[Messages]:
    return [messages(Example("", "", query, "")) for query in ("a b c", "c a", "b", "<ctx> k1 a>b")]


def test_an_obedient_server(reference: Reference, tmp_path: Path) -> None:
    with standing_in(reference, lambda choice: choice) as url:
        assert is_up(url)
        result = measure(url, asked(), reference)
    assert not is_up(url)
    kinds = result["requests"]
    assert [kind.split()[0] for kind in kinds] == ["auto", "short", "think", "threshold"]
    for numbers in kinds.values():
        assert numbers["requests"] == numbers["answered"] == 8
        assert numbers["obeyed"] == numbers["opened_by_a_mode"] == 1.0
        assert numbers["same_as_transformers"] == numbers["mixed_same_as_transformers"] == 1.0
    assert (kinds["short"]["last_mode"], kinds["think"]["last_mode"]) == (0.0, 1.0)
    assert result["bad"] == {"requests": 4, "status": {"400": 4}}
    assert result["same_prompts"] == 1.0
    file = tmp_path / "serving" / "tiny.json"
    file.parent.mkdir()
    write_page(file, result | {"machine": {"device": "CPU", "torch": "2"}, "items": 4})
    page = (tmp_path / "serving.md").read_text()
    assert "| short | 8 of 8 | 100.0 | 100.0 | 100.0 |" in page
    assert "Of 4 bad requests were answered: 4 with HTTP 400." in page


def test_a_server_that_forgets_the_mode_is_found_out(reference: Reference) -> None:
    with standing_in(reference, lambda choice: Choice("short")) as url:
        kinds = measure(url, asked(), reference)["requests"]
    assert kinds["think"]["obeyed"] == 0.0
    assert kinds["think"]["same_as_transformers"] == 0.0
    assert kinds["short"]["obeyed"] == 1.0


def test_what_a_request_should_get(reference: Reference) -> None:
    policy = reference.policy([prompt_ids(reference.tokenizer, each) for each in asked()])
    short, think = reference.rules.token_ids
    highest = float(policy[:, -1].max())
    kinds = wished(reference.rules, policy, highest)
    assert kinds["think"] == ({"mode": "think"}, [think] * 4)
    (threshold,) = [kind for kind in kinds if kind.startswith("threshold")]
    assert kinds[threshold] == ({"threshold": highest}, [short] * 4), "none lies above the highest"


def test_the_numbers_of_a_row_by_hand() -> None:
    """Two prompts, modes 5 and 7: one answer in the wrong mode when alone, one not answered when mixed."""
    alone = [Answer(200, [], [5, 1], 10.0), Answer(200, [], [5, 1, 1], 30.0)]
    mixed = [Answer(200, [], [5, 1], 1.0), Answer(500, [], [], 1.0)]
    numbers = row([5, 7], [[5, 1], [7, 1]], alone, mixed, [5, 7])
    assert numbers["answered"] == 3
    assert (numbers["obeyed"], numbers["opened_by_a_mode"]) == (0.5, 0.75)
    assert (numbers["same_as_transformers"], numbers["tokens"]) == (0.5, 2.5)
    assert numbers["milliseconds"] == [15.0, 20.0, 25.0]
    assert same([[1], [2]], [[1], [3]]) == 0.5


def test_what_stands_behind_the_dashes_is_for_the_server() -> None:
    """Options of both programs, and a second `--` that is the server's own."""
    assert split_at_dashes(["run", "--out", "x.json", "--", "--port", "1", "--", "y"]) == (
        ["run", "--out", "x.json"],
        ["--port", "1", "--", "y"],
    )
    assert split_at_dashes(["run", "--items", "3"]) == (["run", "--items", "3"], [])
