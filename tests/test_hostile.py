"""What comes from outside and means no good, or goes wrong by itself: verifiers, rows, models, recipes, trackers."""

import json
import logging
import os
import pickle
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, WandbCallback
from trl import GRPOTrainer
from trl.extras.profiling import profiling_context

from siesta.data.credentials import credential_in
from siesta.data.errors import DataError, ModelError, RecipeError
from siesta.data.sources import read_rows, to_examples
from siesta.rewards.isolated import IsolatedVerifier
from siesta.rewards.score import Unscorable
from siesta.rl.callbacks import MetricsFile, SampleFile
from siesta.rl.judge import RewardFunction, build_judge
from siesta.rl.models import load_weights, make_tokenizer, model_config
from siesta.rl.origin import Origin, find_origin
from siesta.rl.recipe import load_recipe
from siesta.rl.tracking import STEADY
from tests.given import GivenRollouts
from tests.helpers import save_tiny_model, tiny_judge
from tests.test_trainer import build

ZOO = Path(__file__).parent
GENEROUS = 60.0
RECIPE = """\
modes:
  short: {token: "<short>", max_tokens: 2}
  think: {token: "<think>", max_tokens: 12, answer_after: "="}
data: {task: calc}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(RECIPE)
    return tmp_path


# ---- verifiers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Iterator[IsolatedVerifier]:
    monkeypatch.chdir(ZOO)
    with IsolatedVerifier("verifier_zoo.act", GENEROUS, memory=1.0) as verifier:
        yield verifier


def assert_unscorable(verifier: IsolatedVerifier, behaviour: str, argument: str, reason: str) -> None:
    """The call fails for this reason, and the next ones are answered."""
    with pytest.raises(Unscorable) as caught:
        verifier(behaviour, argument)
    assert caught.value.reason.startswith(reason)
    verifier.timeout = GENEROUS
    assert verifier("7", "7") == 1.0
    assert verifier("7", "8") == 0.0


def test_a_hang_in_c_code_is_ended(zoo: IsolatedVerifier) -> None:
    zoo.timeout = 0.5
    assert_unscorable(zoo, "hang in C", "", "timed out after 0.5 s")


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [("huge", "OverflowError: int too large"), ("list", "returned list, not a number")],
)
def test_nonsense(zoo: IsolatedVerifier, behaviour: str, reason: str) -> None:
    assert_unscorable(zoo, behaviour, "", reason)


@pytest.mark.parametrize(
    "forged",
    ["[]\n", "{}\n", '{"ready": true}\n', '{"score": 1.0, "failed": ""}\n', "[" * 3000 + "\n", "oops\n", "\xff\n"],
)
def test_what_it_writes_into_our_pipe_is_garbled(zoo: IsolatedVerifier, forged: str) -> None:
    assert_unscorable(zoo, "write everywhere", forged, "the worker sent a garbled reply")


def test_an_endless_reply_is_cut(zoo: IsolatedVerifier) -> None:
    """It would fill the trainer's memory until the deadline."""
    assert_unscorable(zoo, "write for ever", "", "the worker sent a garbled reply")


def test_memory_is_bounded(zoo: IsolatedVerifier) -> None:
    assert zoo("allocate", str(2**28)) == 1.0, "negative control: a quarter of the limit"
    assert_unscorable(zoo, "allocate", str(2**30), "MemoryError")


@pytest.mark.parametrize("memory", [0, -1, float("inf"), float("nan")])
def test_memory_must_be_positive_and_finite(memory: float) -> None:
    with pytest.raises(ValueError, match="positive number of GiB"):
        IsolatedVerifier("verifier_zoo.act", GENEROUS, memory=memory)


@pytest.mark.parametrize("hangs", [False, True])
def test_children_do_not_outlive_the_call(zoo: IsolatedVerifier, tmp_path: Path, hangs: bool) -> None:
    """Nor those that left the process group, or whose parent is gone, whether the call is answered or killed."""
    fifo = tmp_path / "held_open_by_the_children"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    if hangs:
        zoo.timeout = 3.0  # three interpreters have to start
        assert_unscorable(zoo, "leave children and hang", str(fifo), "timed out")
    else:
        assert zoo("leave children", str(fifo)) == 1.0
    poller = select.poll()
    poller.register(reader, select.POLLIN)
    events = poller.poll(GENEROUS * 1000)
    os.close(reader)
    assert events, "a child is still alive"
    assert events[0][1] & select.POLLHUP


def test_what_it_starts_at_its_import_may_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "with_helper.py").write_text(
        "import subprocess\n"
        "helper = subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "def verify(solution, answer):\n"
        "    helper.stdin.write(b'1\\n'), helper.stdin.flush()\n"
        "    return float(helper.stdout.readline())\n"
    )
    monkeypatch.chdir(tmp_path)
    with IsolatedVerifier("with_helper.verify", GENEROUS) as verifier:
        assert [verifier("1", "1") for _ in range(3)] == [1.0] * 3


def test_a_login_in_an_address_stays_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ZOO)
    monkeypatch.setenv("SIESTA_DATABASE", "postgres://me:hunter2@host/db")
    monkeypatch.setenv("SIESTA_HOME_PAGE", "https://host/me")
    with IsolatedVerifier("verifier_zoo.act", GENEROUS) as verifier:
        assert verifier("variable is set", "SIESTA_DATABASE") == 0.0
        assert verifier("variable is set", "SIESTA_HOME_PAGE") == 1.0


def test_training_goes_on_whatever_the_verifier_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(ZOO)
    own = tiny_judge()
    judge = build_judge(
        own.tokenizer, own.modes, {"verifier_zoo.chaos"}, price_per_token=0.0, verifier_timeout=GENEROUS
    )
    judge.verifiers["exact"] = judge.verifiers["verifier_zoo.chaos"]
    trainer = build(tmp_path, judge, GivenRollouts, max_steps=3, per_device_train_batch_size=16, num_generations=8)
    trainer.train()
    assert trainer.state.global_step == 3
    failed = sum(row.get("rollout/unscorable", 0) for row in trainer.state.log_history)
    assert 0 < failed < 48
    assert sum(judge.reasons.values()) == failed
    assert torch.isfinite(torch.cat([p.flatten() for p in cast(torch.nn.Module, trainer.model).parameters()])).all()
    told = [record.getMessage() for record in caplog.records if "a verifier failed" in record.getMessage()]
    assert len(told) == min(5, len(judge.reasons))
    assert all("\n" not in line and "training goes on" in line for line in told)


def test_a_control_token_in_the_middle_is_scored_like_any_other_text() -> None:
    """And flagged: what it costs is up to the recipe."""
    judge = tiny_judge()
    short, think = judge.modes

    def ids(text: str) -> list[int]:
        return judge.tokenizer.encode(text, add_special_tokens=False)

    completions = [
        [think.token_id, *ids("7 <short> <think> = 7")],
        [think.token_id, *ids("= 7 <short>")],  # what follows the marker is no longer just the answer
        [short.token_id, *ids("<think> 7")],
        [short.token_id, *ids("7")],
    ]
    reward = RewardFunction(judge)
    prompts = [[{"role": "user", "content": "3 + 4"}]] * 4
    assert reward(prompts, completions, ["7"] * 4, ["exact"] * 4) == [0.5, -1.0, -1.0, 1.0]
    assert [sample["hacks"] for sample in reward.samples(4)] == [["nested_control"]] * 3 + [[]]


# ---- rows ----------------------------------------------------------------------------------------------------------

SOUND = '{"query": "1", "answer": "1"}\n'


def examples_of(path: str) -> list:
    return to_examples(read_rows(path), path, {}, "exact")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ('{"query": "1"}', "no column 'answer'"),
        ('{"query": " ", "answer": "1"}', "query is empty"),
        ('{"query": ["1"], "answer": "1"}', "column 'query' (field 'query') is a list"),
        ('{"query": {"text": "1"}, "answer": "1"}', "is a dict; text is expected"),
        ('{"query": "1\\u0000", "answer": "1"}', "column 'query' holds a NUL character"),
        ('{"query": "\\ud83d", "answer": "1"}', "column 'query' holds half of a surrogate pair"),
        ('{"query": "1", "answer": "1", "responses": {"think": "\\ud83d"}}', "response 'think' holds half"),
        ('{"query": "1", "answer": "1", "id": "x:1"}\n{"query": "2", "answer": "2", "id": "x:1"}', "stands in row 2"),
        ('"query"', "an object is expected, this is a str"),
        ('{"query": "1", "answer": ' + "9" * 5000 + "}", "not read: Exceeds the limit"),
        ('{"query": ' + "[" * 100_000, "not read: maximum recursion depth"),
        ('{"query": "1", ', "not JSON"),
    ],
)
def test_a_malformed_row_is_named(folder: Path, row: str, what: str) -> None:
    Path("rows.jsonl").write_text(SOUND + row)
    with pytest.raises(DataError) as caught:
        examples_of("rows.jsonl")
    message = str(caught.value)
    assert message.startswith("rows.jsonl, row 3" if "stands in" in what else "rows.jsonl, row 2")
    assert what in message
    assert "\n" not in message
    assert len(message) < 300


def test_a_list_in_a_file_of_lines_is_named(folder: Path) -> None:
    for text in ("[\n" + SOUND + "]", f"[{SOUND.strip()}]"):
        Path("rows.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"^rows\.jsonl, row 1: .* a file that is one list ends in \.json$"):
            examples_of("rows.jsonl")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_byte_order_mark_is_no_fault(folder: Path, name: str) -> None:
    Path(name).write_text(SOUND if name == "rows.jsonl" else f"[{SOUND}]", encoding="utf-8-sig")
    assert [example.query for example in examples_of(name)] == ["1"]


def test_a_damaged_parquet_file_is_named(folder: Path) -> None:
    rows = [{"query": f"{i} " * 50, "answer": str(i)} for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "rows.parquet")
    whole = Path("rows.parquet").read_bytes()
    assert len(examples_of("rows.parquet")) == 500, "negative control"
    for damaged in (whole[: len(whole) // 2], whole[:-1], bytes(1000) + whole[1000:]):
        Path("rows.parquet").write_bytes(damaged)
        with pytest.raises(DataError, match=r"^rows\.parquet: not a Parquet file, or not a whole one: [^\n]*$"):
            examples_of("rows.parquet")


# ---- models and checkpoints ----------------------------------------------------------------------------------------


class Gadget:
    """Makes a folder called canary when it is unpickled."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        return os.mkdir, ("canary",)


def test_negative_control_the_gadget_works(folder: Path) -> None:
    pickle.loads(pickle.dumps(Gadget()))
    assert Path("canary").is_dir()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin", "consolidated.00.pth"])
def test_pickled_weights_are_refused(folder: Path, name: str) -> None:
    save_tiny_model(Path("bad"))
    Path("bad/model.safetensors").unlink()
    torch.save({"weight": Gadget()}, Path("bad") / name)
    with pytest.raises(ModelError, match=rf"^model\.path: bad: its weights are a pickle \({name}\).*safetensors$"):
        find_origin("bad")
    with pytest.raises(ModelError, match=r"^model\.path: bad: [^\n]*safetensors"):  # nor when nobody looked first
        load_weights(Origin("bad"), dtype="float32")
    assert not Path("canary").exists()


def test_pickles_beside_safetensors_are_not_read(folder: Path) -> None:
    save_tiny_model(Path("good"))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save(Gadget(), Path("good") / name)
    load_weights(find_origin("good"), dtype="float32")
    assert not Path("canary").exists()


def test_a_pickled_adapter_is_refused(folder: Path) -> None:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "base"}')
    torch.save({"weight": Gadget()}, "adapter/adapter_model.bin")
    with pytest.raises(
        ModelError, match=r"adapter: only LoRA adapters with adapter_model\.safetensors can be merged$"
    ):
        find_origin("adapter")
    assert not Path("canary").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_with_a_gadget_ends_the_run_and_runs_nothing(folder: Path, name: str) -> None:
    """transformers reads these files of a checkpoint with torch's restricted unpickler."""
    trainer = build(folder, save_strategy="steps", save_steps=1)
    trainer.train()
    checkpoint = folder / "out" / "checkpoint-1"
    assert (checkpoint / name).is_file()
    torch.save(Gadget(), checkpoint / name)
    shutil.copytree(checkpoint, folder / "kept")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        build(folder, max_steps=2).train(resume_from_checkpoint=str(folder / "kept"))
    assert not Path("canary").exists()


@pytest.mark.parametrize("what", ["config", "tokenizer"])
def test_code_of_a_model_is_not_run(folder: Path, what: str) -> None:
    save_tiny_model(Path("own"))
    file = Path("own") / {"config": "config.json", "tokenizer": "tokenizer_config.json"}[what]
    auto = {"config": {"AutoConfig": "code.Own"}, "tokenizer": {"AutoTokenizer": ["code.Own", None]}}[what]
    content = json.loads(file.read_text()) | {"auto_map": auto}
    content |= {"model_type": "own"} if what == "config" else {"tokenizer_class": "Own"}
    file.write_text(json.dumps(content))
    Path("own/code.py").write_text("import os\nos.mkdir('canary')\n")
    recipe = load_recipe("recipe.yaml", ["model.path=own"])
    with pytest.raises(ModelError, match=r"^model\.path: own: it brings Python code [^\n]*trust_remote_code: true"):
        model_config(recipe, make_tokenizer(recipe)[0])
    assert not Path("canary").exists()


# ---- recipes -------------------------------------------------------------------------------------------------------

LAUGHS = "a0: &a0 [ha, ha, ha]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
GROWING = "a0: ha\n" + "".join(f"a{i}: '{f'${{a{i - 1}}}' * 10}'\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("seed: !!python/object/apply:os.mkdir [canary]\n", "could not determine a constructor for the tag"),
        ("seed: !!python/name:os.system\n", "could not determine a constructor for the tag"),
        (LAUGHS, "expansion exceeds the configured limit"),
        (GROWING, "80 interpolations ${...}, at most 24"),
        ("modes: &a [*a]\n", "recursive aliases"),
        ("modes: " + "[" * 5000, "maximum nesting depth"),
        ("modes: " + "{a: " * 5000, "maximum nesting depth"),
        ("".join(" " * i + "a:\n" for i in range(2000)), "maximum nesting depth"),
        ("seed: " + "9" * 5000, "Exceeds the limit"),
        ("seed: \0", "control characters are not allowed"),
    ],
    ids=["apply", "name", "laughs", "growing", "recursive", "lists", "maps", "blocks", "digits", "nul"],
)
def test_a_recipe_that_is_a_bomb(folder: Path, text: str, what: str) -> None:
    Path("bomb.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("bomb.yaml")
    message = str(caught.value)
    assert message.startswith("bomb.yaml: ")
    assert what in message
    assert "\n" not in message
    assert not Path("canary").exists()


# Made up, and in two pieces so that no scanner takes them for real ones.
SECRETS = {
    "HF_TOKEN": "hf" + "_" + "Q7w8e9R0t1Y2u3I4o5P6a7S8d9F0g1H2j3",
    "WANDB_API_KEY": "c0ffee" * 6 + "1234",
    "OPENAI_API_KEY": "sk" + "-" + "proj-n0tARealKey4567890123456789012345678",
}
LOGIN = "hunter2hunter2"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        (f"rl.hub_token={SECRETS['HF_TOKEN']}", "rl.hub_token"),
        ("warmup.hub_token=short", "warmup.hub_token: is a credential"),
        (f"rl.run_name={SECRETS['OPENAI_API_KEY']}", "rl.run_name: looks like an access token"),
        (f"model.path=https://me:{LOGIN}@host/model", "model.path: holds a web address with a login"),
        (f"data.train.path=https://me:{LOGIN}@host/rows.jsonl", "data.train.path: holds a web address with a login"),
        (f"tracking.project=by-{SECRETS['WANDB_API_KEY']}", "environment variable WANDB_API_KEY"),
        ("tracking.project=${oc.env:WANDB_API_KEY}", "environment variable WANDB_API_KEY"),
        ("teachers.short={from: model, path: x, vllm: {hf_token: abc}}", "teachers.short.vllm.hf_token"),
    ],
)
def test_a_recipe_with_a_credential_is_refused_and_not_repeated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, override: str, key: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", SECRETS["WANDB_API_KEY"])
    with pytest.raises(RecipeError) as caught:
        load_recipe("recipe.yaml", [override])
    message = str(caught.value)
    assert message.startswith("recipe.yaml: ")
    assert key in message
    assert "\n" not in message
    assert not [secret for secret in (LOGIN, "short", *SECRETS.values()) if secret in message.replace(key, "")]


@pytest.mark.parametrize(
    "content",
    [
        {"modes": {"short": {"token": "<short>", "max_tokens": 5}}, "rl": {"token_budget": 5, "hub_token": None}},
        {"model": {"path": "owner/sk-model-of-no-particular-name-whatsoever", "revision": "c0ffee" * 6 + "1234"}},
        {"data": {"instruction": "Mail me@host, see https://host/a:b"}, "tracking": {"output_dir": "/data/keys"}},
    ],
)
def test_negative_control_these_are_no_credentials(monkeypatch: pytest.MonkeyPatch, content: dict) -> None:
    monkeypatch.setenv("SSH_KEY_PATH", "/data/keys")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "short")
    assert credential_in(content) is None


# ---- trackers ------------------------------------------------------------------------------------------------------


class DyingWandb:
    """As much of wandb as a callback asks for; its second log and all that follow fail."""

    def __init__(self) -> None:
        self.logged: list[dict] = []
        self.run: Any = SimpleNamespace(summary={}, _label=lambda code: None)
        self.config = SimpleNamespace(update=lambda *args, **kwargs: None)

    def log(self, values: dict, commit: bool = True) -> None:
        self.logged.append(values)
        if len(self.logged) > 1:
            raise BrokenPipeError("the service is gone")


def with_wandb(trainer: Trainer, kind: type[TrainerCallback], wandb: DyingWandb) -> Trainer:
    callback: Any = kind()
    callback._wandb, callback._initialized = wandb, True
    trainer.add_callback(callback)
    return trainer


def test_training_goes_on_when_wandb_dies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("wandb")
    wandb, file = DyingWandb(), tmp_path / "metrics.jsonl"
    trainer = with_wandb(build(tmp_path, kind=GivenRollouts, max_steps=3), STEADY["wandb"], wandb)
    trainer.add_callback(MetricsFile(file, "rl"))
    trainer.train()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows if "rollout/reward" in row] == [1, 2, 3]
    assert len(wandb.logged) == 2, "it is not tried again"
    (line,) = [record.getMessage() for record in caplog.records if "wandb" in record.getMessage()]
    assert line == (
        "wandb is given up: BrokenPipeError: the service is gone; the run goes on, metrics.jsonl is complete"
    )


def test_negative_control_transformers_callback_ends_the_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    with pytest.raises(BrokenPipeError):
        with_wandb(build(tmp_path, kind=GivenRollouts, max_steps=3), WandbCallback, DyingWandb()).train()


def test_trl_hands_nothing_to_wandb_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its timings of a step and its table of completions, where nothing would keep a failure from the run."""
    wandb = pytest.importorskip("wandb")

    def log(values: dict) -> None:
        raise BrokenPipeError("the service is gone")

    monkeypatch.setattr(wandb, "run", object())
    monkeypatch.setattr(wandb, "log", log)
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "wandb", TrainerCallback)
    trainer = build(tmp_path, kind=GivenRollouts, log_completions=True, report_to=["wandb"])
    trainer.train()
    assert list((tmp_path / "out" / "completions").iterdir())
    trainer.args.report_to = ["wandb"]  # negative controls
    with pytest.raises(BrokenPipeError):
        GRPOTrainer.log(trainer, {})
    with pytest.raises(BrokenPipeError), profiling_context(trainer, "step"):
        pass


def test_the_table_of_samples_is_given_up_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wandb = pytest.importorskip("wandb")
    calls: list[dict] = []

    def log(values: dict) -> None:
        calls.append(values)
        raise wandb.Error("no run")

    monkeypatch.setattr(wandb, "log", log)
    own = SampleFile(tmp_path / "samples.jsonl", lambda: [{"response": "7"}], to_wandb=True)
    for step in (1, 2):
        own.on_log(cast(Any, None), TrainerState(global_step=step), cast(Any, None), logs={})
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 2
    assert len(calls) == 1
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1


def test_a_run_without_its_tracker_s_server_is_whole_and_holds_no_secret(tmp_path: Path) -> None:
    """There is a key, and nothing listens where wandb's server should be: offline files, decided before the start."""
    pytest.importorskip("wandb")
    small = ["model.embedded={layers: 1, hidden_size: 16, heads: 2}", "data.train_size=200", "warmup.enabled=false"]
    short = ["evaluate.every=1", "evaluate.items=8", "evaluate.samples=1", "evaluate.resamples=1"]
    steps = [
        "evaluate.every_items=8",
        "evaluate.before=false",
        "rl.max_steps=2",
        "rl.logging_steps=1",
        "rl.save_steps=1",
    ]
    command = [sys.executable, "-m", "siesta.rl.train", "smoke", "tracking.report_to=[wandb]", *small, *short, *steps]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= SECRETS | {"WANDB_BASE_URL": "http://localhost:9", "no_proxy": "localhost"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "cannot be reached" in line]
    assert line.startswith("wandb: localhost cannot be reached")
    rows = [json.loads(line) for line in (tmp_path / "outputs/smoke/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "rollout/reward" in row] == [1, 2]
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"recipe.yaml", "metrics.jsonl", "README.md", "optimizer.pt", "model.safetensors"} <= names
    (offline,) = (tmp_path / "outputs/smoke/wandb").glob("offline-run-*/run-*.wandb")
    media = {file.name.rsplit("_", 2)[0] for file in (offline.parent / "files" / "media").rglob("*.*")}
    assert {"levels", "calibration", "accuracy by level"} <= media, "of validations"
    assert {"samples", "policies", "samples side by side", "accuracy against tokens"} <= media, "of the end"
    assert b"smoke-rl" in offline.read_bytes(), "negative control: what wandb keeps can be searched"
    contents = [(str(file), file.read_bytes()) for file in files] + [("output", (done.stdout + done.stderr).encode())]
    assert [(name, key) for name, text in contents for key, value in SECRETS.items() if value.encode() in text] == []
