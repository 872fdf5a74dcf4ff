"""One Python module out of many: the definitions that some code needs, from the packages' sources.

A program that lacks this library can run the result, and so can one that refuses a file which
imports anything that is not installed, wherever in the file that stands, as transformers does.

    bundle("from bytelm.config import require\\ncheck = require", replaced={})

Sources are read and never run. Of each module only those top-level definitions are taken that the
given code reaches by name. Annotations of functions are dropped, since shapes in them come from
jaxtyping; those of the fields of dataclasses stay. Modules follow each other as Python would run
them. A name that two modules define gets the module's name behind it in the later one.
"""

from __future__ import annotations

import ast
import builtins
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from bytelm.bundle_names import ScopedTransformer, definitions_of

_SOURCES = Path(__file__).parents[1]
"""The folder that holds the packages."""

_PACKAGES = ("bytelm", "bytelm_torch")
_START = "_start"
"""What the given code is called as a module."""


class _Definition(NamedTuple):
    """A name that a top-level statement of a module defines."""

    module: str
    name: str


class _External(NamedTuple):
    """A name that an import of another project's module binds."""

    name: str
    module: str
    inner: str | None
    """What is imported from the module; None for the module itself."""


class _Inside(NamedTuple):
    """A module of this library."""

    module: str


class _Source(NamedTuple):
    """What the top level of a module defines and imports."""

    tree: ast.Module
    statements: dict[str, ast.stmt]
    """Name → the statement that defines it."""
    imports: dict[str, tuple[str, str | None]]
    """Local name → module of this library, and the name in it, None for the module itself."""
    externals: dict[str, _External]
    stars: list[str]
    """Modules of this library from which everything is imported."""
    modules: list[str]
    """All modules of this library that it imports, in order."""


def bundle(code: str, replaced: Mapping[str, str], dropped_cases: frozenset[str]) -> str:
    """The text of a module that defines what `code` does, without imports of this library.

    `replaced` is the source of a definition, by its dotted name, to put in place of what stands in
    the module; it sees that module's imports. Of `match` statements the cases are left out that ask
    for a class of `dropped_cases`. Raises `ValueError` for a replacement of a name that does not
    exist, and for code that cannot be moved into one module.
    """
    return _Bundle(code, replaced, dropped_cases).text()


class _Bundle:
    def __init__(self, code: str, replaced: Mapping[str, str], dropped_cases: frozenset[str]):
        self._dropped_cases = dropped_cases
        self._sources = {_START: _parse(_START, code)}
        for dotted, text in replaced.items():
            module, _, name = dotted.rpartition(".")
            source = self._source(module)
            if name not in source.statements:
                raise ValueError(f"{dotted}: no such definition to replace")
            source.statements[name] = ast.parse(text).body[0]
        self._reached: dict[_Definition, ast.stmt] = {}
        self._externals: dict[str, _External] = {}
        self._shadowed: set[_Definition] = set()
        self._names: dict[_Definition, str] = {}
        for name in self._sources[_START].statements:
            self._reach(_Definition(_START, name))

    def text(self) -> str:
        """The module: imports, then all definitions."""
        order = self._in_order()
        self._choose_names(order)
        parts = []
        for definition in order:
            rewrite = _Rewriter(self, definition.module, self._new_name)
            statement = rewrite.visit(self._reached[definition])
            parts.append(ast.unparse(ast.fix_missing_locations(statement)))
        return "\n\n".join([_imports(self._externals.values()), *parts]) + "\n"

    # ---- what is needed ----

    def _reach(self, definition: _Definition) -> None:
        pending = [definition]
        while pending:
            definition = pending.pop()
            if definition in self._reached:
                continue
            source = self._source(definition.module)
            # A copy: a parsed module is kept, and later bundles drop other cases.
            statement = ast.parse(ast.unparse(source.statements[definition.name])).body[0]
            if isinstance(statement, ast.AugAssign):
                raise ValueError(f"{'.'.join(definition)}: is made in several statements")
            strip = _Stripper(self._dropped_cases)
            self._reached[definition] = strip.visit(statement)
            found = partial(self._note, pending)
            _Rewriter(self, definition.module, found).visit(self._reached[definition])

    def _note(self, pending: list[_Definition], found: Any, is_bound: Any, same: bool) -> None:
        if isinstance(found, _External):
            known = self._externals.setdefault(found.name, found)
            if known != found:
                raise ValueError(f"{found.name}: is imported as {known[1:]} and as {found[1:]}")
        else:
            pending.append(found)
            if not same and is_bound(found.name):
                self._shadowed.add(found)

    def resolve(self, module: str, name: str) -> _Definition | _External | _Inside | None:
        """What a name at the top level of a module is; None for a builtin."""
        source = self._source(module)
        if name in source.statements:
            return _Definition(module, name)
        if name in source.imports:
            target, inner = source.imports[name]
            if inner is None:
                return _Inside(target)
            return self.resolve_in(target, inner)
        if name in source.externals:
            return source.externals[name]
        found = (self.resolve(star, name) for star in source.stars)
        return next((each for each in found if each is not None), None)

    def resolve_in(self, module: str, name: str) -> Any:
        """What `module.name` is."""
        inner = f"{module}.{name}"
        if _file_of(inner) is not None and name not in self._source(module).statements:
            return _Inside(inner)
        found = self.resolve(module, name)
        if found is None:
            raise ValueError(f"{inner}: not found")
        return found

    def _source(self, module: str) -> _Source:
        if module not in self._sources:
            source = _parse_file(module)
            self._sources[module] = source._replace(statements=dict(source.statements))
        return self._sources[module]

    # ---- order and names ----

    def _in_order(self) -> list[_Definition]:
        """Modules after those that they import, and definitions as they stand in a module."""
        modules: list[str] = []

        def visit(module: str) -> None:
            if module in seen:
                return
            seen.add(module)
            for imported in self._source(module).modules:
                visit(imported)
            modules.append(module)

        seen: set[str] = set()
        visit(_START)
        return [
            definition
            for module in modules
            for name in self._source(module).statements
            if (definition := _Definition(module, name)) in self._reached
        ]

    def _choose_names(self, order: list[_Definition]) -> None:
        taken = {*self._externals, *dir(builtins)}
        # What the given code defines keeps its names.
        for definition in sorted(order, key=lambda each: each.module != _START):
            name = definition.name
            if name in taken or definition in self._shadowed:
                name = f"{name}_{definition.module.rpartition('.')[2]}"
            if name in taken:
                raise ValueError(f"{'.'.join(definition)}: another definition is called {name}")
            taken.add(name)
            self._names[definition] = name

    def _new_name(self, found: Any, is_bound: Any, same: bool) -> str | None:
        if isinstance(found, _External):
            return None
        name = self._names[found]
        if is_bound(name) and not (same and name == found.name):
            raise ValueError(f"{'.'.join(found)}: a local variable is called {name}")
        return name


class _Rewriter(ScopedTransformer):
    """Tells `change` every reference to the top level of a module, and renames as it answers."""

    def __init__(self, whole: _Bundle, module: str, change: Any):
        super().__init__()
        self._whole, self._module, self._change = whole, module, change

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if self.is_bound(node.id):
            return node
        found = self._whole.resolve(self._module, node.id)
        if isinstance(found, _Inside):
            raise ValueError(f"{self._module}: uses the module {found.module} as a value")
        return node if found is None else self._changed(node, found, node.id)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        found = self._inside(node)
        if found is None or isinstance(found, _Inside):
            return self.generic_visit(node)  # pyright: ignore[reportReturnType]
        return self._changed(node, found, None)

    def top_name(self, name: str) -> str:
        """The new name of a definition at the top level."""
        found = self._whole.resolve(self._module, name)
        return self._change(found, self.is_bound, True) or name

    def _inside(self, node: ast.expr) -> Any:
        """What a dotted name is that begins with a module of this library; otherwise None."""
        if isinstance(node, ast.Name) and not self.is_bound(node.id):
            found = self._whole.resolve(self._module, node.id)
            return found if isinstance(found, _Inside) else None
        if isinstance(node, ast.Attribute):
            within = self._inside(node.value)
            if isinstance(within, _Inside):
                return self._whole.resolve_in(within.module, node.attr)
        return None

    def _changed(self, node: ast.expr, found: Any, written: str | None) -> ast.expr:
        if isinstance(found, _External):
            new = self._change(found, self.is_bound, True) or found.name
        else:
            new = self._change(found, self.is_bound, written == found.name)
        context = node.ctx if isinstance(node, (ast.Name, ast.Attribute)) else ast.Load()
        return node if new is None else ast.Name(new, context)


class _Stripper(ast.NodeTransformer):
    """Drops annotations that nothing reads when the code runs, and cases of other classes."""

    def __init__(self, dropped_cases: frozenset[str]):
        self._dropped_cases, self._kinds = dropped_cases, [""]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        for inner in ast.walk(node.args):
            if isinstance(inner, ast.arg):
                inner.annotation = None
        self._kinds.append("function")
        self.generic_visit(node)
        self._kinds.pop()
        node.body = node.body or [ast.Pass()]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        bases = {ast.unparse(base) for base in node.bases}
        decorated = any("dataclass" in ast.unparse(each) for each in node.decorator_list)
        kind = "dataclass" if decorated or "PreTrainedConfig" in bases else "class"
        self._kinds.append("tuple" if "NamedTuple" in bases else kind)
        node.decorator_list = [d for d in node.decorator_list if not _is(d, "no_type_check")]
        self.generic_visit(node)
        self._kinds.pop()
        node.body = node.body or [ast.Pass()]
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if self._kinds[-1] == "dataclass":
            return node
        if self._kinds[-1] == "tuple":
            node.annotation = ast.Name("object", ast.Load())
            return self.generic_visit(node)
        if node.value is None:
            return None
        return self.generic_visit(ast.Assign([node.target], node.value, lineno=node.lineno))

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """Strings beneath fields go: they are for readers of the source."""
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text and self._kinds[-1] == "tuple" else self.generic_visit(node)

    def visit_Match(self, node: ast.Match) -> ast.AST:
        kept = [case for case in node.cases if not self._asks_for_dropped(case)]
        node.cases = kept
        return self.generic_visit(node)

    def _asks_for_dropped(self, case: ast.match_case) -> bool:
        asked = case.pattern
        return isinstance(asked, ast.MatchClass) and ast.unparse(asked.cls) in self._dropped_cases


def _is(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _imports(externals: Iterable[_External]) -> str:
    """The import statements, one a module."""
    lines, inner = [], defaultdict(list)
    for name, module, taken in sorted(externals, key=lambda each: (each.module, each.name)):
        if taken is None:
            alias = "" if name == module.partition(".")[0] else f" as {name}"
            lines.append(f"import {module}{alias}")
        else:
            inner[module].append(taken if taken == name else f"{taken} as {name}")
    lines += [f"from {module} import {', '.join(names)}" for module, names in inner.items()]
    return "\n".join(lines)


# ---- sources --------------------------------------------------------------------------------


def _file_of(module: str) -> Path | None:
    """The file of a module of this library; None if it is not one."""
    if module.partition(".")[0] not in _PACKAGES:
        return None
    place = _SOURCES.joinpath(*module.split("."))
    files = (place / "__init__.py", place.with_suffix(".py"))
    return next((file for file in files if file.is_file()), None)


@cache
def _parse_file(module: str) -> _Source:
    file = _file_of(module)
    if file is None:
        raise ValueError(f"{module}: not a module of this library")
    return _parse(module, file.read_text("utf-8"))


def _parse(module: str, text: str) -> _Source:
    source = _Source(ast.parse(text), {}, {}, {}, [], [])
    for statement in source.tree.body:
        if isinstance(statement, ast.Import):
            for alias in statement.names:
                _add_import(source, alias)
        elif isinstance(statement, ast.ImportFrom):
            for alias in statement.names:
                _add_from(source, statement.module or "", alias)
        else:
            for name, definition in definitions_of(statement):
                source.statements[name] = definition
    return source


def _add_import(source: _Source, alias: ast.alias) -> None:
    local = alias.asname or alias.name.partition(".")[0]
    if _file_of(alias.name) is not None:
        source.modules.append(alias.name)
        source.imports[local] = (alias.name if alias.asname else local, None)
        return
    source.externals[local] = _External(local, alias.name, None)


def _add_from(source: _Source, module: str, alias: ast.alias) -> None:
    local, inner = alias.asname or alias.name, f"{module}.{alias.name}"
    if _file_of(module) is None:
        source.externals[local] = _External(local, module, alias.name)
        return
    if alias.name == "*":
        source.modules.append(module)
        source.stars.append(module)
    elif _file_of(inner) is not None:
        source.modules.append(inner)  # not the package, which may import the importer
        source.imports[local] = (inner, None)
    else:
        source.modules.append(module)
        source.imports[local] = (module, alias.name)
