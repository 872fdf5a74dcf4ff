"""Exports to the Hugging Face Hub, through `huggingface_hub`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from bytelm.config import require
from bytelm.files import one_line
from bytelm.shards import WEIGHT_PATTERNS
from bytelm.storage.stores import is_passing

T = TypeVar("T")

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write"


def check_push(name: str) -> None:
    """Raises `ValueError` unless `push_folder` has a token that the Hub knows: before anything.

    `name` is USER/NAME. Whether the token may write there shows when it does.
    """
    known = find_spec("huggingface_hub") is not None
    require(known, f"push={name}: needs the package huggingface_hub; pip install 'bytelm[hub]'")
    from huggingface_hub.utils import validate_repo_id

    owner, slash, short = name.partition("/")
    require(bool(owner and slash and short), f"push={name!r}: write USER/NAME")
    try:
        validate_repo_id(name)
    except ValueError as error:
        raise ValueError(f"push={name!r}: {one_line(error)}") from None
    _asked(name, lambda: _api().whoami())


def push_folder(folder: Path, name: str, public: bool) -> str:
    """Uploads all files of `folder` in one commit; the address of the repository.

    A repository that does not exist yet is made, private unless `public`. Weights that it holds
    from before, and `folder` does not, are deleted. Raises `ValueError`, one line, where the Hub
    refuses or does not answer; then the repository stays as it was, or empty.
    """
    api = _api()
    _asked(name, lambda: api.create_repo(name, private=not public, exist_ok=True))
    _asked(
        name,
        lambda: api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="bytelm export",
            delete_patterns=list(WEIGHT_PATTERNS),
        ),
    )
    return f"{api.endpoint}/{name}"


def _api() -> Any:
    from huggingface_hub import HfApi

    from bytelm import __version__

    return HfApi(library_name="bytelm", library_version=__version__)


def _asked(name: str, work: Callable[[], T]) -> T:
    """What `work` returns; every error of the Hub is a `ValueError` of one line."""
    try:
        return work()
    except Exception as error:  # the HTTP library's types are its own
        raise ValueError(f"push={name}: {_why(error)}") from error


def _why(error: BaseException) -> str:
    while isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__  # of "Error while uploading", which says nothing else
    status = getattr(getattr(error, "response", None), "status_code", None)
    told = one_line(getattr(error, "server_message", None) or error, 160)
    match type(error).__name__, status:
        case "LocalTokenNotFoundError", _:
            return f"there is no token for the Hub; {_LOGIN}"
        case "OfflineModeIsEnabled", _:
            return "HF_HUB_OFFLINE is set; unset it, or leave out --push"
        case _, 401:
            return f"the Hub does not know the token ({told}); {_LOGIN}"
        case _, 403 | 404:
            return f"the token may not write there ({told}); {_LOGIN}"
        case _ if is_passing(error):
            return f"the Hub does not answer ({told}); run the same command again"
        case _:
            return f"the Hub refuses ({told})"
