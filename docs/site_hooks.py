"""What the site does to a page that GitHub shows as it stands: links to what is no page, and formulas.

A link to a file outside docs/ (`../rl/loss.py`) or to a folder becomes a link into the repository if mkdocs.yml names
a `repo_url`, else the bare text; one to a file that does not exist is a warning, which ends a strict build.
Formulas, in GitHub's notation, become MathML, which browsers draw without a script.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

LOG = logging.getLogger("mkdocs.hooks.siesta")  # a child of mkdocs' own logger: its warnings count
LINK = re.compile(r"\[(?P<text>[^\[\]]*)\]\((?P<target>(?![a-z]+://|#)[^()\s]+)\)")
BLOCK = re.compile(r"^```math\n(?P<formula>.*?)\n```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"\$`(?P<formula>[^`\n]+)`\$")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """mkdocs' event: the text of a page before it is rendered."""
    root = Path(config["docs_dir"]).parent
    text = LINK.sub(lambda link: outward(link, page.file.src_uri, root, config["repo_url"]), markdown)
    return formulas(text)


def outward(link: re.Match[str], page: str, root: Path, repo_url: str | None) -> str:
    """What stands for a link of a page (its path in docs/) that may lead to no page."""
    target, _, anchor = link["target"].partition("#")
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), target))
    if path.startswith("docs/") and not (root / path).is_dir():
        return link[0]
    if not (root / path).exists():
        LOG.warning("%s: links to %s, which does not exist", page, path)
    if not repo_url:
        return link["text"]
    return f"[{link['text']}]({repo_url.rstrip('/')}/blob/main/{path}{'#' + anchor if anchor else ''})"


def formulas(markdown: str) -> str:
    """Formulas as MathML: fences named `math`, and dollars around backticks."""
    text = BLOCK.sub(
        lambda found: f'<div class="formula">{convert(found["formula"], display="block")}</div>', markdown
    )
    return INLINE.sub(lambda found: convert(found["formula"]), text)
