"""The written rules of the house that a machine can check, so that nobody has to argue them in review.

Size limits and module docstrings keep files readable; `getattr` with a default, `hasattr` and silent `except` are
banned because they turn a wrong assumption into a run that learns nothing. A rule over every text file keeps machine
paths and hosts out. Each rule is a function from a text to its violations, so that the negative controls at the end
can show that it fires.
"""

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
NO_DEFENCE = ("rl/", "rewards/", "data/", "benchmarks/")
CATCH_ALL = {"Exception", "BaseException"}

# An absolute path of one machine. What stands before the slash tells it from `outputs/home`, `{folder}/work` and web
# addresses.
MACHINE_PATH = re.compile(r"(?<![\w.~$}\])*-])(?<!:/)/(?:work|root|home)\b(?!-)")
# Written in two pieces, so that this file passes its own rule.
FORBIDDEN_WORDS = (
    "py" + "pi.org",
    "python" + "hosted.org",
    "ana" + "conda.org",
    "npm" + "js.",
    "arti" + "factory",
    "dev" + "pi/",
    "bash" + "_jobs",
    "." + "library/",
    "work" + "place",
    "this " + "session",
    "device " + "machine",
)

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


def repository_files() -> list[str]:
    """Tracked files and new ones that git does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted({name for name in listed if name and (ROOT / name).is_file()})


def texts() -> Iterator[tuple[str, str]]:
    """Name and content of every file that is text."""
    for name in repository_files():
        content = (ROOT / name).read_bytes()
        if b"\0" not in content:
            yield name, content.decode("utf-8")


def modules() -> Iterator[tuple[str, str]]:
    return ((name, text) for name, text in texts() if name.endswith(".py"))


def size_violations(name: str, source: str) -> Iterator[str]:
    length = len(source.splitlines())
    if length > MAX_FILE_LINES and not name.startswith("tests/"):
        yield f"{name}: {length} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def docstring_violations(name: str, source: str) -> Iterator[str]:
    if not (ast.get_docstring(ast.parse(source)) or "").strip():
        yield f"{name}: no module docstring"


def defence_violations(name: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "getattr" and len(node.args) == 3:
                yield f"{name}:{node.lineno}: getattr with a default"
            if node.func.id == "hasattr":
                yield f"{name}:{node.lineno}: hasattr"


def hidden_error_violations(name: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield f"{name}:{node.lineno}: bare except"
            elif _names(node.type) & CATCH_ALL and all(_does_nothing(statement) for statement in node.body):
                yield f"{name}:{node.lineno}: except {ast.unparse(node.type)} that does nothing"
        elif isinstance(node, ast.Call) and "suppress" in _names(node.func):
            caught = {word for argument in node.args for word in _names(argument)} & CATCH_ALL
            if caught:
                yield f"{name}:{node.lineno}: suppress({', '.join(sorted(caught))})"


def _names(node: ast.expr) -> set[str]:
    """The identifiers in an expression, attributes included: {contextlib, suppress} for contextlib.suppress."""
    parts = ast.walk(node)
    return {
        part.id if isinstance(part, ast.Name) else part.attr
        for part in parts
        if isinstance(part, ast.Name | ast.Attribute)
    }


def _does_nothing(statement: ast.stmt) -> bool:
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)  # `...` or a string
    return constant or isinstance(statement, ast.Pass | ast.Continue)


def text_violations(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), start=1):
        if MACHINE_PATH.search(line):
            yield f"{name}:{number}: absolute path of one machine: {line.strip()[:80]}"
        for word in FORBIDDEN_WORDS:
            if word in line.lower():
                yield f"{name}:{number}: `{word}`"


def report(violations: list[str]) -> str:
    return "\n".join([f"{len(violations)} broken house rules:", *violations])


def test_the_rules_see_the_repository() -> None:
    names = {name for name, _ in texts()}
    assert {"pyproject.toml", "rl/__init__.py", "tests/test_house_rules.py"} <= names


def test_files_and_functions_are_short() -> None:
    violations = [line for name, source in modules() for line in size_violations(name, source)]
    assert not violations, report(violations)


def test_modules_say_what_they_are_for() -> None:
    outside_tests = ((name, source) for name, source in modules() if not name.startswith("tests/"))
    violations = [line for name, source in outside_tests for line in docstring_violations(name, source)]
    assert not violations, report(violations)


def test_code_does_not_defend_against_itself() -> None:
    own = ((name, source) for name, source in modules() if name.startswith(NO_DEFENCE))
    violations = [line for name, source in own for line in defence_violations(name, source)]
    assert not violations, report(violations)


def test_errors_are_not_hidden() -> None:
    violations = [line for name, source in modules() for line in hidden_error_violations(name, source)]
    assert not violations, report(violations)


def test_texts_name_no_machine() -> None:
    violations = [line for name, text in texts() for line in text_violations(name, text)]
    assert not violations, report(violations)


LONG_FUNCTION = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (size_violations, "x = 1\n" * (MAX_FILE_LINES + 1), "x = 1\n" * MAX_FILE_LINES),
        (size_violations, LONG_FUNCTION, LONG_FUNCTION.replace("    x = 1\n", "", 1)),
        (size_violations, f"async {LONG_FUNCTION}", "class C:\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (docstring_violations, "x = 1\n", '"""What and why."""\n'),
        (docstring_violations, '"""  """\n', '"""What and why."""\nx = 1\n'),
        (defence_violations, "getattr(a, 'b', None)\n", "getattr(a, 'b')\n"),
        (defence_violations, "if hasattr(a, 'b'): pass\n", "a.hasattr('b')\n"),
        (hidden_error_violations, "try: f()\nexcept: raise\n", "try: f()\nexcept ValueError: pass\n"),
        (hidden_error_violations, "try: f()\nexcept Exception: pass\n", "try: f()\nexcept Exception: raise\n"),
        (
            hidden_error_violations,
            "try: f()\nexcept (KeyError, Exception): ...\n",
            "try: f()\nexcept Exception: log()\n",
        ),
        (hidden_error_violations, "with contextlib.suppress(Exception): f()\n", "with suppress(KeyError): f()\n"),
        (
            text_violations,
            "see " + "/" + "work/main",
            "outputs/work, ./work, {folder}/work, https://home.org/home, /workers",
        ),
        (text_violations, "file://" + "/" + "root/x", "$ROOT/root"),
        (text_violations, "FROM=" + "/" + "home/me/.cache", "/" + "homeward, $HOME/.cache"),
        (text_violations, "https://" + "PyP" + "I.org/simple", "a package index"),
    ],
)
def test_each_rule_fires_on_bad_text_only(rule: Callable[[str, str], Iterator[str]], bad: str, good: str) -> None:
    assert len(list(rule("rl/sample.py", bad))) == 1
    assert list(rule("rl/sample.py", good)) == []
