"""Uploading an export to the hub. What can be known to be wrong is found before any work: a name, a token or a
connection that will not do.

The token is where huggingface_hub looks for it (HF_TOKEN, or `hf auth login`); it is never printed, and no text file
of the folder may hold it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from siesta.data.errors import UserError
from siesta.rl.serving import FILE as MODES_FILE

OPTION = "--push-to-hub"
TEXTS = ("*.md", "*.json", "*.yaml", "*.jinja", "*.txt")

# What is raised where there is no way to the hub: OSError, and the base of all errors of the HTTP library below it,
# which is another one from version to version.
NO_ANSWER: Any = HfHubHTTPError.__bases__

T = TypeVar("T")


def check_folder(out: Path) -> None:
    """Raises UserError if the folder holds what no export wrote: it is uploaded whole."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MODES_FILE).is_file())):
        raise UserError(f"{OPTION}: {out}: holds other things, and it is uploaded whole; name a new or empty folder")


@dataclass(frozen=True)
class Target:
    """A model repository that this user may write.

    Args:
        name: owner/name.
        private: Only its owner sees it.
    """

    api: HfApi
    name: str
    private: bool

    @classmethod
    def checked(cls, api: HfApi, name: str, *, private: bool) -> "Target":
        """The target, once name, token, connection and owner have been found to be good. Nothing is made yet.

        Raises:
            UserError: One line.
        """
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(f"{OPTION} {name}: not the name of a hub repository (owner/name)") from error
        if is_offline_mode():
            raise UserError(f"{OPTION}: HF_HUB_OFFLINE is set; unset it, or export without the upload")
        if get_token() is None:
            raise UserError(f"{OPTION}: no token of the hub; log in with `hf auth login`, or set HF_TOKEN")
        user = asked(name, api.whoami)
        owner, _, rest = name.rpartition("/")
        owners = [user["name"], *(own["name"] for own in user.get("orgs", []))]
        if owner and owner not in owners:
            raise UserError(f"{OPTION} {name}: the token is of {', '.join(owners)}, not of {owner}")
        return cls(api, name if owner else f"{user['name']}/{rest}", private)

    def upload(self, folder: Path) -> str:
        """Make the repository if it is not there and upload the folder; its address.

        Raises:
            UserError: One line; the folder stays, and the same command tries again.
        """
        token = get_token()
        for file in (found for pattern in TEXTS for found in folder.glob(pattern)):
            if token and token in file.read_text(encoding="utf-8"):
                raise UserError(f"{OPTION}: {file} holds the token of the hub; nothing was uploaded, remove it there")
        asked(self.name, lambda: self.api.create_repo(self.name, private=self.private, exist_ok=True))
        # A repository that is there already stays as visible as it was.
        if self.private and not asked(self.name, lambda: self.api.model_info(self.name)).private:
            raise UserError(f"{OPTION} {self.name}: it is there and public, {folder} was not uploaded; another name?")
        message = "Export of a siesta run"
        done = asked(
            self.name,
            lambda: self.api.upload_folder(repo_id=self.name, folder_path=folder, commit_message=message),
        )
        return str(done.commit_url)


def asked(name: str, question: Callable[[], T]) -> T:
    """What the hub answers.

    Raises:
        UserError: It refuses, or does not answer.
    """
    try:
        return question()
    except HfHubHTTPError as error:
        status = error.response.status_code
        reasons = {401: "the token is not valid", 403: "the token may not write there", 404: "there is no such owner"}
        what = reasons.get(status, " ".join(str(error).split())[:200])
        raise UserError(f"{OPTION} {name}: the hub refuses ({status}): {what}; see `hf auth whoami`") from error
    except NO_ANSWER as error:
        raise UserError(f"{OPTION} {name}: the hub cannot be reached; leave it out, or try again later") from error
