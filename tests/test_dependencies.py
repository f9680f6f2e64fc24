"""No version with a known hole is allowed, and the lock file is what pyproject.toml asks for. Needs no network."""

import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements.lock"
# Extras that are not in the lock file: tools of development and of the docs, and vLLM, which brings its own torch.
NOT_LOCKED = {"dev", "docs", "vllm"}

# Package -> first version without the hole, and what it was.
FIXED = {
    "torch": ("2.10.0", "memory corruption in the restricted unpickler, CVE-2026-24747 (2.6: CVE-2025-32434)"),
    "transformers": ("5.3.0", "code run by a config without trust_remote_code, CVE-2026-4372, CVE-2026-1839"),
    "vllm": ("0.14.0", "code of auto_map run whatever trust_remote_code says, CVE-2026-22807"),
}


def declared() -> Iterator[tuple[str, Requirement]]:
    """Extra ("" for none) and requirement, for everything in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            yield extra, Requirement(line)


def locked() -> dict[str, tuple[Version, int]]:
    """Package -> version and number of hashes in the lock file."""
    found = {}
    for block in re.split(r"\n(?=[A-Za-z0-9])", LOCK.read_text()):
        if match := re.match(r"([\w.-]+)==(\S+) \\\n", block):
            found[canonicalize_name(match[1])] = Version(match[2]), block.count("--hash=sha256:")
    return found


def allows(requirement: Requirement, fixed: str) -> bool:
    """Does the requirement admit a version before `fixed`? Judged by its lower bound, which it must have."""
    bounds = [Version(s.version) for s in requirement.specifier if s.operator in (">=", "==", "~=")]
    return not bounds or max(bounds) < Version(fixed)


@pytest.mark.parametrize("package", FIXED)
def test_lower_bounds_exclude_known_holes(package: str) -> None:
    fixed, hole = FIXED[package]
    bounds = [requirement for _, requirement in declared() if requirement.name == package]
    assert bounds, f"{package} is not a dependency: drop its row"
    assert not [str(r) for r in bounds if allows(r, fixed)], f"{package} before {fixed}: {hole}"


@pytest.mark.parametrize(("bound", "admits"), [("x", True), ("x<3", True), ("x>=2.9", True), ("x>=2.10,<3", False)])
def test_negative_control_bounds_by_hand(bound: str, admits: bool) -> None:
    assert allows(Requirement(bound), "2.10.0") == admits


def test_what_is_installed_is_what_is_declared() -> None:
    installed = {canonicalize_name(d.metadata["Name"]): Version(d.version) for d in importlib.metadata.distributions()}
    for extra, requirement in declared():
        version = installed.get(canonicalize_name(requirement.name))
        assert version is not None or extra, f"{requirement.name} is not installed"
        if version is not None:
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: {version} is installed"


def test_the_lock_file_is_what_is_declared() -> None:
    """After a change in pyproject.toml: make lock."""
    pins = locked()
    for extra, requirement in declared():
        if extra not in NOT_LOCKED:
            version, _ = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{requirement}: {version} is locked; make lock"


def test_the_lock_file_is_all_pins_and_hashes_and_names_no_place() -> None:
    text = LOCK.read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    pins = [line for line in lines if re.fullmatch(r"[\w.-]+==\S+ \\", line)]
    hashes = [line for line in lines if re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line)]
    assert len(pins) + len(hashes) == len(lines)
    assert len(pins) == len(locked()) > 100
    assert min(count for _, count in locked().values()) >= 1
    assert "://" not in text
