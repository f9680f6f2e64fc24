"""The docs build as a site without a warning, its pages ask for nothing over the network, and every link holds."""

import logging
import posixpath
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config
from mkdocs.exceptions import Abort

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
GITHUB = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]
# Elements that a browser fetches at once; a link that a reader may follow is none.
FETCHED = re.compile(r"<(?:script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"?((?:https?:)?//[^\s\">]+)")
LINK = re.compile(r"\]\((?!https?://)([^()\s]+)\)")


def load_hooks() -> Any:
    """The module of the hooks, by its path as mkdocs loads it."""
    spec = spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


site_hooks = load_hooks()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder))
        build(config)
    return folder


def built(page: Path, site: Path) -> str:
    return (site / page.relative_to(ROOT / "docs").with_suffix(".html")).read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_every_page_is_built_with_its_tables_and_formulas(site: Path) -> None:
    for page in PAGES:
        html = built(page, site)
        tables = re.findall(r"^\|[-| :]+\|$", prose(page), re.MULTILINE)
        assert html.count("<table>") == len(tables), f"{page.name}: a table is not one on the site"
        formulas = re.findall(r"^```math$|\$`", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert html.count("<math ") == len(formulas), page.name
        text = html.partition("<article")[2].partition("</article>")[0]
        assert not re.search(r"<p>\s*- ", text), f"{page.name}: a list is not one on the site"


def test_pages_ask_for_nothing_over_the_network(site: Path) -> None:
    assert FETCHED.search('<script defer src="https://host/x.js">')  # the search would find one
    for file in site.rglob("*.html"):
        assert not FETCHED.findall(file.read_text(encoding="utf-8")), file.name
    for file in site.rglob("*.css"):
        assert not re.findall(r"url\(\"?https?:|@import \"?https?:", file.read_text(encoding="utf-8")), file.name


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("page", GITHUB, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_hold_on_github_too(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        target, _, anchor = link.partition("#")
        file = Path(posixpath.normpath(page.parent / target)) if target else page
        assert file.exists(), f"{page.name}: {link} leads nowhere"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", prose(file), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {file.name} has no heading #{anchor}"


@pytest.mark.parametrize("fault", ["[x](gone.md)", "[x](index.md#gone)", "[x](../rl/gone.py)"])
def test_negative_control_a_broken_link_ends_the_build(fault: str, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Home\n\n{fault}\n")
    settings = "site_name: x\nplugins: []\nhooks: [hooks.py]\nvalidation: {anchors: warn}\n"
    (tmp_path / "mkdocs.yml").write_text(settings)
    (tmp_path / "hooks.py").write_text((ROOT / "docs" / "site_hooks.py").read_text())
    config = load_config(str(tmp_path / "mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    with pytest.raises(Abort):
        build(config)


def test_a_link_to_what_is_no_page_is_text_or_leads_into_the_repository(caplog: pytest.LogCaptureFixture) -> None:
    link = site_hooks.LINK.search("see [`rl/loss.py`](../rl/loss.py#L1) there")
    inner = site_hooks.LINK.search("[x](../loss.md)")
    folder = site_hooks.LINK.search("[data](speed)")
    gone = site_hooks.LINK.search("[x](../../rl/gone.py)")
    assert link
    assert inner
    assert folder
    assert gone
    with caplog.at_level(logging.WARNING):
        assert site_hooks.outward(link, "loss.md", ROOT, None) == "`rl/loss.py`"
        found = site_hooks.outward(link, "loss.md", ROOT, "https://host/me/siesta/")
        assert found == "[`rl/loss.py`](https://host/me/siesta/blob/main/rl/loss.py#L1)"
        assert site_hooks.outward(folder, "results/speed.md", ROOT, None) == "data"
        assert site_hooks.outward(inner, "results/speed.md", ROOT, None) == "[x](../loss.md)"
        assert not caplog.records
        site_hooks.outward(gone, "results/speed.md", ROOT, None)
        assert "results/speed.md: links to rl/gone.py, which does not exist" in caplog.text


def test_formulas_become_mathml() -> None:
    text = site_hooks.formulas("a $`x^2`$ b\n\n```math\n\\pi^*\n```\n\n```bash\necho $x `y`\n```\n")
    assert text.count("<math ") == 2
    assert '<div class="formula"><math ' in text
    assert "echo $x `y`" in text
