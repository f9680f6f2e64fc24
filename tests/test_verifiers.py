"""The built-in verifiers on answers worked out by hand, and how a recipe's name becomes a callable."""

import subprocess
import sys
from pathlib import Path

import pytest

from siesta.rewards.verifiers import Unscorable, Verifier, build_verifier, exact, math, solution_part


@pytest.fixture(scope="module")
def isolated_math() -> Verifier:
    return build_verifier("math", timeout=60)


@pytest.mark.parametrize(
    ("response", "marker", "solution"),
    [
        ("  42\n", None, "42"),
        ("3+4=7, 7*2=14", "=", "14"),
        ("<think>6*7=41? no</think>\n42 ", "</think>", "42"),
        ("a</think>b</think>c", "</think>", "c"),
        ("<think>it is 42", "</think>", ""),
        ("so </think>", "</think>", ""),
        ("", "=", ""),
        ("", None, ""),
    ],
)
def test_solution_part(response: str, marker: str | None, solution: str) -> None:
    assert solution_part(response, marker) == solution


@pytest.mark.parametrize(
    ("solution", "answer", "score"),
    [
        ("42", "42", 1.0),
        (" a \n b\t", "a b", 1.0),
        ("ab", "a b", 0.0),
        ("42.0", "42", 0.0),
        ("Paris", "paris", 0.0),
        ("", "42", 0.0),
    ],
)
def test_exact(solution: str, answer: str, score: float) -> None:
    assert exact(solution, answer) == score


@pytest.mark.parametrize("answer", ["", "  \n"])
def test_exact_without_an_answer_is_a_data_error(answer: str) -> None:
    with pytest.raises(ValueError, match="empty"):
        exact("", answer)
    with pytest.raises(Unscorable, match="ValueError: the gold answer is empty"):
        build_verifier("exact", timeout=1)("", answer)


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("42", "42"),
        ("The answer is 42.", "42"),
        ("\\boxed{42}", "42"),
        ("$42$", "\\boxed{42}"),
        ("so we box it: \\boxed{\\frac{2}{4}}", "\\frac{1}{2}"),
        ("1/2", "\\frac{1}{2}"),
        ("0.5", "1/2"),
        ("\\frac{1}{2}", "0.5"),
        ("1234567", "1,234,567"),
        ("1,234,567", "1234567"),
        ("She pays $1,080 in total", "1,080"),
        ("$18.00", "18"),
        ("18", "$18"),
        ("-3", "-3"),
        ("50%", "50\\%"),
        ("$(x+1)^2$", "x^2+2x+1"),
        ("\\boxed{x=5}", "5"),
        ("\\boxed{\\text{blue}}", "\\text{blue}"),
        ("\\boxed{(1, 2)}", "(1,2)"),
    ],
)
def test_math_accepts(isolated_math: Verifier, solution: str, answer: str) -> None:
    assert isolated_math(solution, answer) == 1.0


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("41", "42"),
        ("42, or rather 43", "42"),
        ("-42", "42"),
        ("1/3", "0.5"),
        ("1.234", "1,234"),
        ("\\boxed{(2, 1)}", "(1,2)"),
        ("$x^2+2x$", "x^2+2x+1"),
        ("", "42"),
        ("no idea", "42"),
        ("\\boxed{", "42"),
        ("\\boxed{((((}", "42"),
        ("1" * 6000, "42"),
        ("\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", "42"),
        ("\\frac{0}{0}", "42"),
    ],
)
def test_math_rejects(isolated_math: Verifier, solution: str, answer: str) -> None:
    assert isolated_math(solution, answer) == 0.0


@pytest.mark.parametrize("answer", ["", "((((", "\\boxed{", "\\boxed{}", "@@"])
def test_math_with_an_unreadable_answer_is_a_data_error(isolated_math: Verifier, answer: str) -> None:
    with pytest.raises(Unscorable, match=r"ValueError: the gold answer .* does not parse"):
        isolated_math("42", answer)
    assert isolated_math("42", "42") == 1.0


def test_math_itself_raises_on_an_unreadable_answer() -> None:
    with pytest.raises(ValueError, match="does not parse"):
        math("42", "((((")


def test_math_that_never_ends_is_unscorable() -> None:
    verifier = build_verifier("math", timeout=0.5)
    with pytest.raises(Unscorable, match=r"timed out after 0\.5 s"):
        verifier("$9^{9^{9^9}}$", "5")


def test_build_exact() -> None:
    assert build_verifier("exact", timeout=1)(" 42 ", "42") == 1.0


def test_build_dotted_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    verifier = build_verifier("verifier_zoo.act", timeout=60)
    assert verifier("7", "7") == 1.0
    assert verifier("7", "8") == 0.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mth",
            r"unknown verifier 'mth': use one of exact, math, reasoning_gym, or a dotted .* Did you mean 'math'\?$",
        ),
        (
            "zzz",
            r"unknown verifier 'zzz': .* exact, math, reasoning_gym, or a dotted path package\.module\.function\.$",
        ),
        ("", "unknown verifier ''"),
        ("no_such_module.verify", "cannot be loaded: ModuleNotFoundError"),
        (".verify", "cannot be loaded: ValueError"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_verifier(name, timeout=60)
    assert "\n" not in str(caught.value)


def test_rewards_import_nothing_heavy() -> None:
    program = (
        "import sys, siesta.rewards.reward, siesta.rewards.verifiers, siesta.rewards.worker\n"
        "heavy = {'torch', 'transformers', 'trl', 'sympy', 'math_verify', 'numpy', 'siesta.rl'}\n"
        "print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
