"""Small objects written under a precondition: only if there is none yet, or only over one we read.

Google Cloud Storage compares generations, S3 compares ETags (`If-None-Match`, `If-Match`).
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, Protocol

from bytelm.storage.stores import open_store, patiently, protocol_of


class Version(NamedTuple):
    """The contents of an object, and what a write over exactly these contents has to name."""

    data: bytes
    tag: str


class Conditional(Protocol):
    """An object of a store that is written under preconditions; both may raise errors of stores."""

    def read(self) -> Version | None:
        """What the object holds; None if there is none."""
        ...

    def write(self, data: bytes, tag: str | None) -> str | None:
        """Writes over the version `tag`, or where there is none (None).

        Returns the new tag; None if the object has another version.
        """
        ...

    def remove(self) -> None:
        """Removes the object, whatever its version."""
        ...


def conditional(address: str) -> Conditional:
    """The object at an address; raises `ValueError` for a store that has no preconditions."""
    kinds: dict[str, Any] = {"gs": _GCSObject, "s3": _S3Object}
    if protocol_of(address) not in kinds:
        raise ValueError(f"{address}: run folders live on disks, gs:// and s3://; take one of them")
    return kinds[protocol_of(address)](address)


class _Object:
    def __init__(self, address: str) -> None:
        self.address, self._store = address, open_store(address)
        self._bucket, self._key = self._store.split_path(address)[:2]

    def remove(self) -> None:
        """Removes the object, whatever its version."""
        patiently(self.address, lambda: self._store.rm_file(self.address))


class _GCSObject(_Object):
    def read(self) -> Version | None:
        try:
            # One request: what it holds and its generation belong together.
            headers, data = self._store.call(
                "GET", "b/{}/o/{}", self._bucket, self._key, alt="media"
            )
        except FileNotFoundError:
            return None
        return Version(bytes(data), str(headers["X-Goog-Generation"]))

    def write(self, data: bytes, tag: str | None) -> str | None:
        kind = "application/octet-stream"
        # In two parts, as gcsfs sends it: emulators ignore the precondition of the simpler form.
        part = f"Content-Type: application/json\r\n\r\n{json.dumps({'name': self._key})}"
        text = f"--==0==\r\n{part}\r\n--==0==\r\nContent-Type: {kind}\r\n\r\n"
        try:
            written = self._store.call(
                "POST",
                f"{self._store._location}/upload/storage/v1/b/{self._bucket}/o",
                uploadType="multipart",
                ifGenerationMatch=tag or "0",
                data=text.encode() + data + b"\r\n--==0==--",
                headers={"Content-Type": 'multipart/related; boundary="==0=="'},
                json_out=True,
            )
        except (FileExistsError, FileNotFoundError):  # 412; 404 if it was removed
            return None
        return str(written["generation"])


class _S3Object(_Object):
    def read(self) -> Version | None:
        from fsspec.asyn import sync

        async def get() -> Version:
            found = await self._store._call_s3("get_object", Bucket=self._bucket, Key=self._key)
            async with found["Body"] as body:
                return Version(await body.read(), found["ETag"])

        try:
            return sync(self._store.loop, get)
        except FileNotFoundError:
            return None

    def write(self, data: bytes, tag: str | None) -> str | None:
        condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
        try:
            written = self._store.call_s3(
                "put_object", Bucket=self._bucket, Key=self._key, Body=data, **condition
            )
        except FileNotFoundError:
            if tag is None:
                raise  # no such bucket
            return None
        except OSError as error:
            if _code(error) in ("PreconditionFailed", "412"):
                return None
            raise
        return str(written["ETag"])


def _code(error: BaseException) -> str:
    """The code by which S3 names an error."""
    response = getattr(error.__cause__, "response", None) or getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
