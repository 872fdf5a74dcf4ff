"""The texts in files of records: JSON, Parquet, Arrow, WebDataset's tar, ArrayRecord.

Each yields the bytes of a text and then None; records without text, empty or null, are left out. A
record without the field, or with something else than a text in it, is a `ValueError`.
"""

from __future__ import annotations

import codecs
import importlib
import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from bytelm.config import require
from bytelm.data.prepared import Unscored
from bytelm.files import one_line

_LONGEST = 1 << 30
"""Bytes of the longest record that is read: a broken file could be taken for one record."""

_CHUNK = 1 << 20  # bytes, or characters
_ROWS = 512  # of a Parquet file at once
_SEPARATORS = re.compile(r"[\s,]*")
_MESSAGE_HINT = "a message needs 'role' and 'content'"


class Fields(NamedTuple):
    """The fields of a record that make its document.

    That is `text`; or `prompt`, which is not counted, and `completion`; or `chat`, a list of
    messages with `role` and `content`, each written as `<|im_start|>ROLE`, a line feed, CONTENT,
    `<|im_end|>` and a line feed, of which the assistant's content and what ends it are counted.
    """

    text: str = "text"
    prompt: str = ""
    completion: str = ""
    chat: str = ""

    @property
    def masked(self) -> bool:
        """Whether some bytes are read and not counted."""
        return bool(self.prompt or self.chat)

    def names(self) -> list[str]:
        """The fields that are read."""
        if self.chat:
            return [self.chat]
        return [self.prompt, self.completion] if self.prompt else [self.text]

    def hint(self, field: str) -> str:
        """What to do where a record has no `field`, one of `names`, or no text in it."""
        options = {self.prompt: "prompt", self.completion: "completion", self.chat: "chat"}
        option = f"--{options.get(field, 'text')}-field"
        return f"name another with {option}, or take the bytes with --raw"


def optional(name: str, path: str) -> Any:
    """The module `name`, which the extra `data` installs."""
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        install = "pip install 'bytelm[data]'"
        raise ValueError(f"{path}: reading it takes the package {package}; {install}") from None


def fields_of(text: str, prompt: str, completion: str, chat: str, raw: bool) -> Fields:
    """The fields that are asked for; raises `ValueError` for what cannot be meant together."""
    both = bool(prompt) == bool(completion)
    given = f"prompt_field={prompt}" if prompt else f"completion_field={completion}"
    require(both, f"{given}: give both --prompt-field and --completion-field")
    require(not (prompt and chat), f"chat_field={chat}: leave out prompt_field, or this")
    named = f"chat_field={chat}" if chat else given
    masked = bool(prompt or chat)
    require(not (masked and raw), f"{named}: --raw takes all bytes as they are; give one of them")
    unused = masked and text != "text"
    require(not unused, f"text_field={text}: is not read with {named}; leave it out")
    return Fields(text, prompt, completion, chat)


# ---- JSON -------------------------------------------------------------------------------------


def json_lines(stream: Any, path: str, fields: Fields) -> Iterator[bytes | None]:
    """The texts of JSON objects, one a line."""
    decode = json.JSONDecoder().decode
    lines = iter(partial(stream.readline, _LONGEST), b"")
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        require(len(line) < _LONGEST, f"{where}: is longer than {_LONGEST} bytes; repair it")
        if line.isspace():
            continue
        try:
            record = decode(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(_broken(where, error)) from None
        yield from _document(record, fields, where)


def json_values(stream: Any, path: str, fields: Fields) -> Iterator[bytes | None]:
    """The texts of JSON objects in a list, or one after the other."""
    for number, record in enumerate(_json_objects(stream, path), 1):
        yield from _document(record, fields, f"{path}, record {number}")


def _json_objects(stream: Any, path: str) -> Iterator[Any]:
    decode, parse = codecs.getincrementaldecoder("utf-8-sig")().decode, json.JSONDecoder()
    buffer, at, number, ended = "", 0, 0, False
    in_list, begun = False, False
    while True:
        at = _SEPARATORS.match(buffer, at).end()  # pyright: ignore[reportOptionalMemberAccess]
        where = f"{path}, record {number + 1}"
        mark = buffer[at : at + 1]
        if mark == "[" and not begun:
            in_list, begun, at = True, True, at + 1
            continue
        if mark == "]" and in_list:
            in_list, at = False, at + 1
            continue
        if mark:
            begun = True
            try:
                value, at = parse.raw_decode(buffer, at)
                number += 1
                yield value
                continue
            except (ValueError, RecursionError) as error:
                if ended or not _may_go_on(error, buffer):
                    raise ValueError(_broken(where, error, at)) from None
        elif ended:
            break
        require(len(buffer) - at < _LONGEST, f"{where}: is longer than {_LONGEST}; repair it")
        data = stream.read(max(_CHUNK, len(buffer) - at))
        ended = not data
        try:
            buffer, at = buffer[at:] + decode(data, ended), 0
        except UnicodeDecodeError as error:
            raise ValueError(_broken(f"{where} or later", error)) from None
    require(not in_list, f"{path}: its list does not end after record {number}; write it again")


def _may_go_on(error: Exception, buffer: str) -> bool:
    """Whether the error is but that of a value whose end has not been read yet."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated") or error.pos >= len(buffer) - 16


def _broken(where: str, error: Exception, start: int = 0) -> str:
    if isinstance(error, UnicodeDecodeError):
        what = f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    elif isinstance(error, json.JSONDecodeError):
        what = f"not JSON ({error.msg.removesuffix(' at')} at character {error.pos - start + 1})"
    else:
        what = f"not JSON ({one_line(error, 80)})"
    return f"{where}: {what}; repair it, or take the bytes with --raw"


def _document(record: Any, fields: Fields, where: str) -> Iterator[bytes | None]:
    """The pieces of a record's document and then None; nothing of an empty one."""
    if fields.chat:
        pieces = _chat(record, fields, where)
    else:
        pieces = [_text(record, name, where, fields.hint(name)) for name in fields.names()]
        if fields.prompt:
            pieces[0] = Unscored(pieces[0])
    if any(pieces):
        yield from filter(None, pieces)
        yield None


def _chat(record: Any, fields: Fields, where: str) -> list[bytes]:
    field = fields.chat
    messages = _value(record, field, where, fields.hint(field))
    known = messages is None or isinstance(messages, list)
    kind = type(messages).__name__
    require(known, f"{where}: its field {field!r} is no list of messages ({kind})")
    pieces: list[bytes] = []
    for number, message in enumerate(messages or [], 1):
        at = f"{where}, message {number}"
        role, content = (_text(message, n, at, _MESSAGE_HINT) for n in ("role", "content"))
        turn = content + b"<|im_end|>\n"
        pieces += [Unscored(b"<|im_start|>" + role + b"\n")]
        pieces += [turn if role == b"assistant" else Unscored(turn)]
    return pieces


def _value(record: Any, field: str, where: str, hint: str) -> Any:
    is_object = isinstance(record, dict)
    require(is_object, f"{where}: is no object with a field {field!r}; take the bytes with --raw")
    if field not in record:
        known = one_line(", ".join(map(str, record)) or "none", 200)
        raise ValueError(f"{where}: has no field {field!r} (its fields: {known}); {hint}")
    return record[field]


def _text(record: Any, field: str, where: str, hint: str) -> bytes:
    value = _value(record, field, where, hint)
    if value is None:
        return b""
    kind = type(value).__name__
    require(isinstance(value, str), f"{where}: its field {field!r} is no text ({kind}); {hint}")
    try:
        return value.encode()
    except UnicodeEncodeError:
        why = f"its field {field!r} holds half of a surrogate pair, which is no character"
        raise ValueError(f"{where}: {why}; repair it") from None


# ---- Arrow ------------------------------------------------------------------------------------


def arrow_columns(file: Any, kind: str, path: str, fields: Fields) -> Iterator[bytes | None]:
    """The documents in the rows of a Parquet file, or of an Arrow file or stream."""
    pa = optional("pyarrow", path)
    schema, batches = _open_arrow(file, kind, path, fields.names())
    for field in fields.names():
        if schema.get_field_index(field) < 0:
            columns = ", ".join(f"{each.name} {each.type}" for each in schema) or "none"
            known = one_line(columns, 200)
            says = f"has no column {field!r} (its columns: {known}); {fields.hint(field)}"
            raise ValueError(f"{path}: {says}")
    if fields.masked:
        yield from _arrow_records(batches, path, fields)
        return
    field, index = fields.text, schema.get_field_index(fields.text)
    dtype = schema.field(index).type
    dtype = dtype.value_type if pa.types.is_dictionary(dtype) else dtype
    texts = (pa.string(), pa.large_string(), pa.string_view())
    known = dtype in (*texts, pa.binary(), pa.large_binary())
    says = f"its column {field!r} holds {dtype}, no text; {fields.hint(field)}"
    require(known, f"{path}: {says}")
    row = 0
    for batch in batches:
        column = batch.column(field)
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        if dtype in texts:
            _require_utf8(pa, column, row, f"{path}, row", field)
            column = column.cast(pa.large_string())
        for text in column.cast(pa.large_binary()).to_pylist():
            if text:
                yield text
                yield None
        row += len(column)


def _arrow_records(batches: Iterator[Any], path: str, fields: Fields) -> Iterator[bytes | None]:
    row = 0
    for batch in batches:
        try:
            records = batch.select(fields.names()).to_pylist()
        except UnicodeDecodeError as error:
            why = f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
            raise ValueError(f"{path}, row {row + 1} or later: {why}; repair it") from None
        for number, record in enumerate(records, row + 1):
            yield from _document(record, fields, f"{path}, row {number}")
        row += len(records)


def _open_arrow(file: Any, kind: str, path: str, names: list[str]) -> tuple[Any, Iterator[Any]]:
    """The schema, and batches of rows that hold at least the columns `names` if they exist."""
    if kind == "parquet":
        parquet = optional("pyarrow.parquet", path)
        # Without a buffer a whole column of a row group is read at once.
        opened = parquet.ParquetFile(file, pre_buffer=False, buffer_size=_CHUNK)
        return opened.schema_arrow, opened.iter_batches(_ROWS, columns=names, use_threads=False)
    ipc = optional("pyarrow.ipc", path)
    if kind == "arrow stream":
        opened = ipc.open_stream(file)
        return opened.schema, iter(opened)
    opened = ipc.open_file(file)
    return opened.schema, map(opened.get_batch, range(opened.num_record_batches))


def _require_utf8(pa: Any, column: Any, first_row: int, where: str, field: str) -> None:
    """Arrow calls a column text without having looked."""
    try:
        column.validate(full=True)
    except pa.ArrowInvalid:
        for row, text in enumerate(column.cast(pa.large_binary()).to_pylist(), first_row + 1):
            try:
                (text or b"").decode()
            except UnicodeDecodeError as error:
                bad = error.object[error.start]
                why = f"its column {field!r} is not UTF-8 (byte 0x{bad:02x})"
                raise ValueError(f"{where} {row}: {why}; repair it") from None
        raise


# ---- shards of samples ------------------------------------------------------------------------


def tar_samples(stream: Any, path: str, fields: Fields) -> Iterator[bytes | None]:
    """The texts of a WebDataset shard: members in a row whose names differ after the first dot.

    A sample's text is its member .FIELD or .txt, or the field of its member .json.
    """
    _require_text(path, "a tar archive", fields)
    key, members, field = "", dict[str, bytes](), fields.text
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for info in archive:
                folder, name = posixpath.split(info.name)
                if not info.isfile() or name.startswith("."):
                    continue
                stem, _, extension = name.partition(".")
                if members and posixpath.join(folder, stem) != key:
                    yield from _sample(members, fields, f"{path}, sample {key}")
                    members = {}
                key = posixpath.join(folder, stem)
                where = f"{path}, member {info.name}"
                require(extension not in members, f"{where}: comes twice; write the shard again")
                members[extension] = b""
                if extension in (field, "txt", "json"):
                    require(info.size <= _LONGEST, f"{where}: is larger than {_LONGEST} bytes")
                    content = archive.extractfile(info)
                    members[extension] = content.read() if content else b""
    except tarfile.TarError as error:
        why = one_line(error, 80)
        message = f"{path}: is damaged or cut short ({why}); fetch or write it again"
        raise ValueError(message) from None
    if members:
        yield from _sample(members, fields, f"{path}, sample {key}")


def _sample(members: dict[str, bytes], fields: Fields, where: str) -> Iterator[bytes | None]:
    field, hint = fields.text, fields.hint(fields.text)
    known = {field, "txt", "json"} & members.keys()
    found = one_line(", ".join(f".{extension}" for extension in members), 200)
    require(
        bool(known),
        f"{where}: has no member .{field}, .txt or .json (it has {found}); {hint}",
    )
    text = members.get(field, members.get("txt"))
    if text is None:
        try:
            record = json.loads(members["json"].decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(_broken(f"{where}.json", error)) from None
        text = _text(record, field, f"{where}.json", hint)
    if text:
        yield text
        yield None


def _require_text(path: str, what: str, fields: Fields) -> None:
    why = f"{what} has no records with the fields {', '.join(fields.names())}"
    require(not fields.masked, f"{path}: {why}; give JSON, Parquet or Arrow")


def array_record(path: str, fields: Fields) -> Iterator[bytes | None]:
    """The records of an ArrayRecord file, each a text."""
    _require_text(path, "an ArrayRecord file", fields)
    module = optional("array_record.python.array_record_module", path)
    try:
        reader = module.ArrayRecordReader(path)
        count = reader.num_records()
        if not count:  # its library says so of a file that it cannot read, too
            raise RuntimeError("no records")
        for start in range(0, count, _ROWS):
            for text in reader.read(start, min(count, start + _ROWS)):
                if text:
                    yield text
                    yield None
    except RuntimeError as error:
        message = f"{path}: is damaged or no ArrayRecord file ({one_line(error, 80)})"
        raise ValueError(f"{message}; write it again, or take its bytes with --raw") from None
