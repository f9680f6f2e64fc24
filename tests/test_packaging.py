"""The wheel holds the tree, all of it and nothing more.

The folders lie at the top level and `pyproject.toml` maps each to `siesta.<name>` by hand, so a new folder or a new
kind of file is easily left out: it works here, from the editable install, and is missing for everybody else. The
opposite slip, a bare `rl` or `data` in site-packages, would collide with other people's packages.
"""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE_ROOTS = ("rl", "rewards", "data", "recipes")
NOT_SHIPPED = {".md"}  # notes for readers of the repository; every other file in a package is there to be used

needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


def run(*command: str, cwd: Path) -> str:
    """Standard output of a command that must succeed; its output is the failure message otherwise."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """What a fresh clone would hold: tracked files and new ones that git does not ignore."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    return sorted({name for name in listed if name and (ROOT / name).is_file()})


@pytest.fixture(scope="module")
def wheel_files(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The file list of a wheel built from a copy, so that nothing stale gets in and nothing is left in the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in sources:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    dist = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(tree), cwd=dist)
    (wheel,) = dist.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


@needs_git
def test_wheel_holds_exactly_the_tree(sources: list[str], wheel_files: list[str]) -> None:
    expected = {
        f"siesta/{name}"
        for name in sources
        if name.split("/")[0] in PACKAGE_ROOTS and Path(name).suffix not in NOT_SHIPPED
    }
    shipped = {name for name in wheel_files if ".dist-info/" not in name}
    assert "siesta/rl/__init__.py" in expected, "the list of sources is empty"
    missing, extra = sorted(expected - shipped), sorted(shipped - expected)
    assert not missing, f"in the tree, not in the wheel (packages or package-data in pyproject.toml): {missing}"
    assert not extra, f"in the wheel, not in the tree: {extra}"


@needs_git
def test_wheel_adds_one_name_to_site_packages(wheel_files: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel_files}
    dist_info = {name for name in top if name.startswith("siesta_rl-") and name.endswith(".dist-info")}
    assert len(dist_info) == 1
    assert top - dist_info == {"siesta"}
    assert f"{dist_info.pop()}/licenses/LICENSE" in wheel_files


@needs_git
def test_every_folder_with_code_is_a_listed_package(sources: list[str]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {
        Path(name).parent.as_posix()
        for name in sources
        if name.endswith(".py") and name.split("/")[0] in PACKAGE_ROOTS
    }
    expected = {f"siesta.{folder.replace('/', '.')}": folder for folder in folders}
    unlisted, stale = expected.keys() - set(settings["packages"]), set(settings["packages"]) - expected.keys()
    assert not unlisted, f"add to packages and package-dir in pyproject.toml: {sorted(unlisted)}"
    assert not stale, f"listed in pyproject.toml, no code there: {sorted(stale)}"
    assert settings["package-dir"] == expected


def test_import_works_from_another_folder(tmp_path: Path) -> None:
    assert run(sys.executable, "-c", "import siesta.rl; print(siesta.rl.__name__)", cwd=tmp_path) == "siesta.rl\n"


@needs_git
@pytest.mark.parametrize(
    ("path", "ignored"),
    [("data/", False), ("data/tasks/new_task.py", False), ("recipes/new.yaml", False), ("outputs/run/log", True)],
)
def test_git_ignores_artefacts_but_not_data(path: str, ignored: bool) -> None:
    """Most templates ignore `data/`, which here is source code. The ignored path is the control."""
    done = subprocess.run(["git", "check-ignore", "--no-index", "-q", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert (done.returncode == 0) == ignored
