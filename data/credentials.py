"""What looks like a credential, by its name or by its form: none belongs in a recipe, or in a verifier's environment.

A recipe is copied into the run directory, the model card and the tracker's files, so a credential in it is published
with the model. Those of the run come from the environment (HF_TOKEN, WANDB_API_KEY), where the libraries look.
"""

import os
import re
from collections.abc import Iterator
from typing import Any

# Of environment variables: wide, since a verifier misses none of them.
VARIABLE = re.compile("token|key|secret|passw|credential|auth(?!or)", re.IGNORECASE)
# Of recipe keys: narrow, since `max_tokens` and a mode's `token` are none.
KEY = re.compile(
    r"(?:^|_)(?:(?:hub|hf|api|auth|access|bearer|secret|private|wandb)_?(?:token|key)|passw(?:or)?d|secret|credentials?)$",
    re.IGNORECASE,
)
LOGIN = re.compile(r"://[^/\s@]+@")  # https://user:password@host
FORM = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-(?=[\w-]*\d)[\w-]{32,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|AKIA[A-Z0-9]{16})"
)
SHORTEST = 12  # characters; a shorter value of a variable may stand in a recipe by chance


def without_credentials(environment: dict[str, str]) -> dict[str, str]:
    """The variables that hold no credential, judged by name, or by a login in a web address."""
    return {
        name: value for name, value in environment.items() if not VARIABLE.search(name) and not LOGIN.search(value)
    }


def credential_in(content: Any) -> str | None:
    """What is wrong with a recipe that holds a credential, as one line that does not repeat it; None if it has none.

    Args:
        content: Mappings and lists of YAML values.
    """
    secrets = {
        name: value
        for name, value in os.environ.items()
        if VARIABLE.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~"))
    }
    for path, value in texts(content):
        own = next((name for name, secret in secrets.items() if secret in value), None)
        if own is not None:
            fault = f"holds the value of the environment variable {own}"
        elif KEY.search(path.rpartition(".")[2]):
            fault = "is a credential"
        elif LOGIN.search(value):
            fault = "holds a web address with a login (user:password@)"
        elif FORM.search(value):
            fault = "looks like an access token"
        else:
            continue
        return (
            f"{path}: {fault}, and a recipe is copied into the run directory and the model card; remove it and log in "
            "by the environment (HF_TOKEN, WANDB_API_KEY) or a netrc file"
        )
    return None


def texts(content: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and value of every text in `content`."""
    if isinstance(content, dict):
        for key, value in content.items():
            below = f"{path}.{key}" if path else str(key)
            yield from texts(value, below)
    elif isinstance(content, list):
        for place, value in enumerate(content):
            yield from texts(value, f"{path}.{place}")
    elif isinstance(content, str) and content:
        yield path, content
