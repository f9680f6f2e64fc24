"""Every command and every example of README and docs runs, in the order of its page.

A shell block is run by bash with stand-ins for its programs, which say what it would start; each of these commands is
then done in this process, in a folder that holds a tiny run of the quickstart. `CUT` names what is cut short and why,
`PROGRAMS` what is done about each program: vLLM, lm-eval, Docker and what needs a GPU or a network is not here, and of
those the arguments are read. Python blocks run as they stand; one with a `text` block behind it prints just that.
A block with a title is a file.
"""

import argparse
import io
import json
import re
import runpy
import shutil
import sys
import tomllib
from collections.abc import Callable
from contextlib import redirect_stdout
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser

from siesta.data.sources import TASKS
from siesta.rl import cli
from siesta.rl.recipe import Recipe, load_recipe
from siesta.rl.serving import find_rules
from tests.doc_blocks import Call, blocks, calls

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)

TINY = [
    "model.embedded={layers: 1, hidden_size: 16, heads: 2}",
    "warmup.max_steps=1",
    "warmup.per_device_train_batch_size=8",
    "warmup.check_every=1",
    "warmup.check_items=4",
    "warmup.stop={}",
    "warmup.min_mass=0",
    "warmup.min_share=0",
    "rl.max_steps=1",
    "rl.per_device_train_batch_size=16",
    "rl.save_steps=1",
    "evaluate={items: 8, samples: 1, resamples: 10, every: 0}",
]
FEW = ["data.train_size=200"]
SMALL_RUN = [*FEW, *TINY]
PARSED = None  # arguments, launch file and recipe are read, and that is all

# What a command comes to here -> overrides added to it, and why. First match counts. A training that matches nothing
# fails the test; every other command that matches nothing is run as it stands.
CUT: dict[str, tuple[list[str] | None, str]] = {
    "train quickstart rl.tau=0.3 rl.num_generations=16 tracking.run=warmer --dry-run": (FEW, "20,000 prompts"),
    "train *--dry-run": (PARSED, "names a model of the hub"),
    "train quickstart": (SMALL_RUN, "the run that the other commands need, in seconds"),
    "train recipes/quickstart.yaml": (SMALL_RUN, "the same run, through the launcher"),
    "train quickstart rl.tau=0.3 tracking.run=warmer": (PARSED, "a run that READY has"),
    "train quickstart rl.price_per_token=0.2 tracking.run=frugal": (PARSED, "a run that READY has"),
    "train quickstart seed=[012] tracking.run=quickstart-[012]": (PARSED, "three seeds that READY has"),
    "train hop": (SMALL_RUN, "a run whose model sleeps"),
    "train largest.yaml": (SMALL_RUN, "data and verifier are the page's own"),
    "train recipe.yaml warmup.responses=*": (SMALL_RUN, "responses of the command before"),
    "train recipes/quickstart.yaml rl.max_steps=100 *": (PARSED, "timed runs of a results page"),
    "train recipes/smollm2_135m.yaml": (PARSED, "needs a GPU"),
    "train smollm2_135m *": (PARSED, "needs a GPU and vLLM"),
    "train smollm2_135m": (PARSED, "needs a GPU"),
    "train recipes/thinkless_1.5b_deepscaler.yaml": (PARSED, "needs GPUs"),
    "train recipes/r1_distill_qwen_1.5b.yaml": (PARSED, "needs hosts"),
    "plan quickstart": (FEW, "20,000 prompts"),
    "plan largest.yaml": (FEW, "20,000 prompts"),
    "export * --push-to-hub *": (PARSED, "needs the hub"),
    "eval outputs/a outputs/b outputs/c *": (PARSED, "like that of three seeds on a results page"),
    "report outputs/a outputs/b *": (PARSED, "like that of three runs in the tutorial"),
    "siesta.data.pregenerate *": (PARSED, "120,000 items"),
}
# Runs that a page takes for granted: copies of the tiny one.
READY = ["a", "b", "c", "quickstart-0", "quickstart-1", "quickstart-2", "warmer", "frugal"]
MINE = """\
base: quickstart
teachers: {short: {from: written}, think: {from: written}}
data: {task: calc, train_size: 60}
evaluate: {items: 8, resamples: 10}
"""


DONE: set[tuple[Path, Call]] = set()  # folder and command


class Parsed(BaseException):
    """Arguments were read; raised in the place of what would follow, past whoever reports errors."""


def parsed(main: Callable[[], Any], arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """What a program's own parser makes of arguments."""
    found: list[argparse.Namespace] = []

    def stopping(original: Callable[..., argparse.Namespace]) -> Callable[..., Any]:
        def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
            found.append(original(self, args, namespace))
            raise Parsed

        return stop

    with monkeypatch.context() as patched:
        for name in ("parse_args", "parse_intermixed_args"):
            patched.setattr(argparse.ArgumentParser, name, stopping(vars(argparse.ArgumentParser)[name]))
        patched.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(Parsed):
            main()
    return found[0]


def cut(line: str) -> list[str] | None:
    """What is added to a command, or `PARSED`."""
    for pattern, (overrides, _) in CUT.items():
        if fnmatchcase(line, pattern):
            return overrides
    assert not line.startswith("train "), f"`{line}` is new: say in CUT what it comes to here, and why"
    return []


def siesta(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`siesta COMMAND ...`, and a training however it is started."""
    command, *arguments = call.words[1:]
    more = cut(" ".join([command, *arguments]))
    if more is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(call.stdin))
        assert cli.main([command, *arguments[:1], *more, *arguments[1:]]) == 0, call.line
        return
    options = parsed(import_module(cli.COMMANDS[command][0]).main, arguments, monkeypatch)
    if command == "train":
        load_recipe(options.recipe, options.overrides)


def module(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m NAME ...`: trainings as above, benchmarks by their arguments, other commands whole."""
    if name == "siesta.rl.train":
        siesta(Call(("siesta", "train", *arguments), ""), monkeypatch)
    elif name.startswith("benchmarks.") or cut(" ".join([name, *arguments])) is PARSED:
        parsed(import_module(name).main, arguments, monkeypatch)
    else:
        assert import_module(name).main(arguments) == 0, name


def python(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m ...`, or a file of the page."""
    if call.words[1] == "-m":
        return module(call.words[2], list(call.words[3:]), monkeypatch)
    monkeypatch.setattr(sys, "argv", list(call.words[1:]))
    runpy.run_path(call.words[1], run_name="__main__")
    return None


def accelerate(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch`: its own parser, the launch file, then the module."""
    assert call.words[1] == "launch"
    options = launch_command_parser().parse_args(list(call.words[2:]))
    assert options.module
    assert yaml.safe_load(Path(options.config_file).read_text())["num_processes"] >= 1
    module(options.training_script, options.training_script_args, monkeypatch)


def torchrun(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    options = get_args_parser().parse_args(list(call.words[1:]))
    module(options.training_script, options.training_script_args, monkeypatch)


def make(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for target in call.words[1:]:
        assert target in TARGETS, f"Makefile has no target {target}"


def pip(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pip install -e .`, or extras that there are."""
    assert call.words[1] == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in call.words[2:]:
        named = re.fullmatch(r"siesta-rl\[([\w-]+)\]", word)
        assert word in ("-e", ".") or (named and named[1] in project["optional-dependencies"]), call.line


def vllm(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`vllm serve`, not installed: the folder is one that siesta exported, the options are known ones."""
    _, command, model, *options = call.words
    assert command == "serve"
    assert find_rules(model).modes
    assert set(options[::2]) <= {"--served-model-name"}


def trl(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trl vllm-serve`, which needs a GPU: TRL's own parser."""
    assert call.words[1] == "vllm-serve"
    parser = import_module("trl.scripts.vllm_serve").make_parser()
    parser.parse_args_and_config(args=list(call.words[2:]))


def curl(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to a served model: its body is JSON and asks for what serving knows."""
    body = json.loads(call.words[call.words.index("-d") + 1])
    assert body["messages"][0]["role"] == "user"
    find_rules("outputs/quickstart/export").choice(body["vllm_xargs"])


def lm_eval(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lm-eval run`, not installed: the task has been written, the model is there."""
    options = {name: value for name, value in zip(call.words, call.words[1:], strict=False) if name.startswith("--")}
    assert (Path(options["--include_path"]) / f"{options['--tasks']}.yaml").is_file()
    model = dict(pair.split("=") for pair in options["--model_args"].split(","))
    assert (Path(model["pretrained"]) / "config.json").is_file()


def sbatch(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Path(call.words[1]).read_text().startswith("#!/bin/bash")
    siesta(Call(("siesta", "train", *call.words[2:]), ""), monkeypatch)


def docker(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`docker build` of the repository, `docker run` of a `siesta` command. Docker is not here."""
    if call.words[1] == "build":
        assert call.words[-1] == "."
        assert (ROOT / "Dockerfile").is_file()
    else:
        assert call.words[1] == "run"
        place = call.words.index("siesta", 2)
        siesta(Call(call.words[place:], ""), monkeypatch)


def ci_run(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


PROGRAMS: dict[str, Callable[[Call, pytest.MonkeyPatch], None]] = {
    "siesta": siesta,
    "python": python,
    "accelerate": accelerate,
    "torchrun": torchrun,
    "make": make,
    "pip": pip,
    "vllm": vllm,
    "trl": trl,
    "curl": curl,
    "lm-eval": lm_eval,
    "sbatch": sbatch,
    "docker": docker,
    ".ci/run": ci_run,
}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a checkout after the quickstart: recipes, a tiny run in outputs/quickstart, and copies of it."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        siesta(Call(("siesta", "train", "quickstart"), ""), monkeypatch)
    run = folder / "outputs" / "quickstart"
    shutil.copytree(run / "rl" / "checkpoint-1", run / "rl" / "checkpoint-75")
    for name in READY:
        shutil.copytree(run, folder / "outputs" / name)
    shutil.copytree(run / "export", folder / "owner" / "model")
    for name in ("recipe.yaml", "my.yaml"):
        (folder / name).write_text(MINE)
    return folder


def run_script(script: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do what a shell block starts, but for what an earlier page has done in this folder."""
    for call in calls(script, folder, list(PROGRAMS)):
        if (folder, call) not in DONE:
            PROGRAMS[call.words[0]](call, monkeypatch)
        DONE.add((folder, call))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_examples_run(page: Path, ready: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ready)
    monkeypatch.syspath_prepend(ready)
    with patch.dict(TASKS):  # a page adds one
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.title:
                Path(block.title).write_text(block.text, encoding="utf-8")
            elif block.language == "bash":
                run_script(block.text, ready, monkeypatch)
            elif block.language == "python":
                printed = io.StringIO()
                with redirect_stdout(printed):
                    exec(compile(block.text, str(page), "exec"), {"__name__": "example"})
                assert block.output in (None, printed.getvalue()), f"{page.name} shows another output"
            elif block.language == "yaml":
                sections = set(yaml.safe_load(block.text))
                assert sections <= {"base", *Recipe.model_fields}, f"{page.name}: not sections of a recipe"


def test_the_notebook_runs(ready: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in order, with the settings of the tiny run; and it is stored without outputs."""
    monkeypatch.chdir(ready)
    cells = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]
    assert sources[0].count("overrides = []") == 1
    quick = [*SMALL_RUN, "evaluate={items: 8, samples: 1, resamples: 10, every: 1}", "tracking.run=notebook"]
    sources[0] = sources[0].replace("overrides = []", f"overrides = {quick!r}")
    names: dict[str, Any] = {}
    for number, source in enumerate(sources):
        exec(compile(source, f"cell {number}", "exec"), names)
    assert "always-think" in capsys.readouterr().out
    names["plt"].close("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_within_the_text_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between backticks, of `siesta ...` the command, of `make ...` the target, of `python -m ...` the module."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for line in re.findall(r"`([^`\n]+)`", text):
        match line.split():
            case ["siesta", command, *_]:
                assert command in cli.COMMANDS, line
            case ["make", target, *_]:
                assert target in TARGETS, line
            case ["python", "-m", name, *arguments]:
                assert find_spec(name), line
                if name.startswith("benchmarks."):
                    parsed(import_module(name).main, arguments, monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_stand_in_shell_blocks(page: Path) -> None:
    """A block without a language is not run, so it must not start with a program."""
    fences = page.read_text(encoding="utf-8").split("\n```")[1:]
    plain = [text for text in fences[::2] if text.startswith("\n")]
    assert len(fences) % 2 == 0
    for text in plain:
        assert text.split()[0] not in PROGRAMS, f"{page.name}: name the language of the block with `{text.split()[0]}`"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("frobnicate now", "frobnicate: command not found"),
        ("siesta train quickstart rl.tau=7", "is new: say in CUT"),
        ("make nothing", "Makefile has no target nothing"),
        ("pip install 'siesta-rl[nothing]'", "nothing"),
        ("siesta plan quickstart rl.taw=7", "siesta plan"),
    ],
)
def test_negative_control_a_command_that_is_wrong(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match=re.escape(message)):
        run_script(script, tmp_path, monkeypatch)


def test_a_shell_block_is_read_as_a_shell_would(tmp_path: Path) -> None:
    script = "for i in 1 2; do siesta a$i; done  # twice\nsiesta b 'c d' \\\n  <<'END'\nx\nEND\n"
    page = f"```bash\n{script}```\n\n```text\nout\n```\n"
    (shell, output) = blocks(page)
    assert (shell.output, output.text) == ("out\n", "out\n")
    found = calls(shell.text, tmp_path, ["siesta"])
    assert [(each.line, each.stdin) for each in found] == [
        ("siesta a1", ""),
        ("siesta a2", ""),
        ("siesta b c d", "x\n"),
    ]
