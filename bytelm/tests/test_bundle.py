"""Many modules in one: names that clash or are shadowed, and what is refused."""

import ast
from typing import Any

import pytest

from bytelm import bundle as bundling
from bytelm.bundle import bundle

SOURCES = {
    "bytelm.a": """
from __future__ import annotations
import math
from jaxtyping import Float
from bytelm import b
from bytelm.b import size as width, Pair

SIZE, HALF = 4, 2

def helper(x: Float[int, "B"]) -> Float[int, "B"]:
    return x + SIZE

def use(size: Float[int, "B"]) -> Pair:
    helper: Float[int, "B"] = width()
    found = [size for size in range(3)]
    return Pair(b.helper(size), helper, [HALF for HALF in found], math.floor(1.5))

def shadow():
    size = b.size()
    return size
""",
    "bytelm.b": """
from typing import NamedTuple
from jaxtyping import Int

class Pair(NamedTuple):
    a: Int[int, "B"]
    '''Text.'''
    b: Int[int, "B"]
    c: Int[int, "B"]
    d: Int[int, "B"]

def size():
    return 7

def helper(x):
    return x * 10

def unused():
    return helper(1)

def chosen(x):
    match x:
        case Kept():
            return 1
        case Dropped():
            return 2

class Kept: pass
class Dropped: pass
made = 1
made += 1
""",
}


@pytest.fixture(autouse=True)
def sources(monkeypatch):
    known = bundling._file_of
    monkeypatch.setattr(
        bundling, "_file_of", lambda name: __file__ if name in SOURCES else known(name)
    )
    parse = lambda name: bundling._parse(name, SOURCES[name])  # noqa: E731
    monkeypatch.setattr(bundling, "_parse_file", parse)


def run(code, replaced=None, dropped=frozenset()):
    text = bundle(code, replaced or {}, dropped)
    scope: dict[str, Any] = {"__name__": "bundled"}
    exec(compile(text, "bundled", "exec"), scope)
    return text, scope


def test_clashing_and_shadowed_names():
    text, scope = run("from bytelm.a import helper, shadow, use\nentry = (helper, use, shadow)\n")
    assert scope["entry"][0](1) == 5 and scope["entry"][2]() == 7
    assert scope["entry"][1](2) == (20, 7, [0, 1, 2], 1)
    assert "jaxtyping" not in text and "unused" not in text and "HALF =" not in text
    assert "import math\n" in text and "Text." not in text
    names = {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    assert names == {"helper", "helper_b", "size_b", "shadow", "use"}


def test_replacements_and_cases():
    _, scope = run("from bytelm.a import helper\nentry = helper\n", {"bytelm.a.SIZE": "SIZE = 9"})
    assert scope["entry"](1) == 10
    text, _ = run("from bytelm.b import chosen\nentry = chosen\n", None, frozenset({"Dropped"}))
    assert "class Kept" in text and "Dropped" not in text


@pytest.mark.parametrize(
    "code, replaced, why",
    [
        ("x = 1", {"bytelm.a.WIDTH": "WIDTH = 1"}, "bytelm.a.WIDTH: no such definition to replace"),
        ("from bytelm import b\nx = b.nothing", {}, "bytelm.b.nothing: not found"),
        ("from bytelm import b\nx = [b]", {}, "uses the module bytelm.b as a value"),
        ("from bytelm.b import made\nx = made", {}, "bytelm.b.made: is made in several statements"),
    ],
)
def test_what_cannot_be_bundled_is_refused(code, replaced, why):
    with pytest.raises(ValueError, match=why):
        bundle(code, replaced, frozenset())
