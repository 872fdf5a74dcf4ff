"""Stores by address, through fsspec: which package opens one, and how patient we are with it.

fsspec and what it needs are imported only for addresses.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from bytelm.config import require
from bytelm.files import one_line

T = TypeVar("T")

_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(?=[^/])")
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "s3": "s3", "s3a": "s3"}
"""The extra that installs what a protocol needs; those of all others are in `data`."""

_PAUSES = (0.5, 1, 2, 4, 8, 8, 8, 8, 8, 8, 8)
"""Seconds before each further attempt: a store that is away for a minute is waited for."""

_PASSING_NUMBERS = {
    errno.EIO, errno.EBUSY, errno.EAGAIN, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH,
}  # fmt: skip
_NETWORK = {"aiohttp", "requests", "urllib3", "http", "httpx", "httpx2", "ssl"}
_BOTOCORE = ("Connect", "Timeout", "HTTPClient", "Incomplete")


def is_address(text: str | os.PathLike[str]) -> bool:
    """Whether this names an object or a folder on a store: PROTOCOL://…

    `pathlib` makes `gs:/bucket` of it, which counts as well.
    """
    return bool(_ADDRESS.match(os.fspath(text)))


def tidy(address: str | os.PathLike[str]) -> str:
    """The address with both slashes, and without one at its end."""
    text = _ADDRESS.sub(r"\1://", os.fspath(address), count=1)
    return text if protocol_of(text) in ("http", "https") else text.rstrip("/")


def is_remote(folder: str | os.PathLike[str]) -> bool:
    """Whether a run folder is an address, and there is no folder of that name here."""
    return is_address(folder) and not os.path.lexists(folder)


def called(path: str | os.PathLike[str]) -> str:
    """What a person calls a path: an address is written with both slashes."""
    return tidy(path) if is_remote(path) else os.fspath(path)


def require_local(path: str | os.PathLike[str], what: str) -> None:
    """Raises `ValueError` for an address where only folders of this machine will do."""
    require(not is_remote(path), f"{what}={called(path)}: is an address; name a folder here")


def protocol_of(address: str) -> str:
    """What stands before `://`."""
    return address.partition(":")[0]


def open_store(address: str) -> Any:
    """The fsspec file system of an address; raises `ValueError` if its package is not installed."""
    protocol = protocol_of(address)
    extra = f"pip install 'bytelm[{_EXTRAS.get(protocol, 'data')}]'"
    try:
        import fsspec
    except ImportError:
        raise ValueError(f"{address}: needs the package fsspec; {extra}") from None
    if protocol in ("gs", "gcs") and os.environ.get("STORAGE_EMULATOR_HOST"):
        # Otherwise gcsfs asks Google, at every call, of which kind the bucket is.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    for name in ("gcsfs", "fsspec", "s3fs", "aiobotocore", "botocore", "huggingface_hub"):
        # They log, with tracebacks, the errors that they also raise.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        store = fsspec.filesystem(protocol, use_listings_cache=False)
    except ImportError as error:
        from fsspec.registry import known_implementations

        known = known_implementations.get(protocol, {}).get("err", "")
        told = protocol in _EXTRAS or protocol in ("http", "https", "hf") or not known
        raise ValueError(
            f"{address}: needs a package that is not installed "
            f"({one_line(error)}); {extra if told else known}"
        ) from None
    except ValueError:
        raise ValueError(
            f"{address}: {protocol}:// is no kind of store; use gs://, s3://, hf://, https:// or "
            "another that fsspec knows"
        ) from None
    store.invalidate_cache()
    return store


def patiently(address: str, work: Callable[[], T]) -> T:
    """What `work` returns; tried again, with pauses, while the store does not answer.

    Raises `FileNotFoundError` and `FileExistsError` as they come, and `ValueError`, one line that
    names `address`, in the end.
    """
    for pause in (*_PAUSES, None):
        try:
            return work()
        except Exception as error:  # each store's library has its own types
            if pause is None or not is_passing(error):
                if isinstance(error, (FileExistsError, FileNotFoundError)) and pause is not None:
                    raise
                raise ValueError(failure(address, error, len(_PAUSES) + 1)) from error
            time.sleep(pause)
    raise AssertionError


def failure(address: str, error: BaseException, attempts: int) -> str:
    """What to say of an error of a store."""
    if not is_passing(error):
        hint = "check the address and your rights to it"
        return f"{address}: cannot be reached ({_reason(error)}); {hint}"
    hint = "check the address and the network, and run the same command again"
    return f"{address}: no answer after {attempts} attempts ({_reason(error)}); {hint}"


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None and isinstance(error, FileNotFoundError):
        error = error.__cause__
    return one_line(error, 160) or type(error).__name__


def is_passing(error: BaseException) -> bool:
    """Whether an error of a store may go away by itself: a 5xx answer, or no connection."""
    for each in _chain(error):
        if isinstance(each, ValueError):
            return False
        status = getattr(each, "status", None) or getattr(each, "code", None)
        status = status or getattr(getattr(each, "response", None), "status_code", None)
        if isinstance(status, int) or (isinstance(status, str) and status.isdecimal()):
            return int(status) >= 500 or int(status) in (408, 429)
        if isinstance(each, (ConnectionError, TimeoutError)):
            return True
        if isinstance(each, OSError) and each.errno in _PASSING_NUMBERS:
            return True
        module, name = type(each).__module__.partition(".")[0], type(each).__name__
        if module in _NETWORK:
            return True
        if "botocore" in module and any(word in name for word in _BOTOCORE):
            return True
    return type(error).__name__ == "FSTimeoutError"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error; for "not found", which fsspec also makes of others, what it came from first."""
    if isinstance(error, FileNotFoundError):
        if error.__cause__ is not None:
            yield from _chain(error.__cause__)
        return
    yield error
    if error.__cause__ is not None:
        yield from _chain(error.__cause__)
