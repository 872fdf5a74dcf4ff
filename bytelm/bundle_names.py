"""Which names of a piece of Python are local, so that the others can be renamed."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from typing import Any

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class _Bound(ast.NodeVisitor):
    """The names that statements bind in their own scope; inner scopes are left out."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.globals: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        if not isinstance(node.ctx, ast.Load):
            self.names.add(node.id)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.names.add(node.name)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.names.add(node.name)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        pass

    def visit_Import(self, node: ast.Import | ast.ImportFrom) -> None:
        self.names |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}

    visit_ImportFrom = visit_Import

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> None:
        self.names |= {node.name} if node.name else set()
        self.generic_visit(node)

    def visit_MatchAs(self, node: ast.MatchAs) -> None:
        self.names |= {node.name} if node.name else set()
        self.generic_visit(node)

    def visit_MatchStar(self, node: ast.MatchStar) -> None:
        self.names |= {node.name} if node.name else set()

    def visit_Global(self, node: ast.Global) -> None:
        self.globals |= set(node.names)

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, _COMPREHENSIONS):  # binds in its own scope, but for `:=`
            inner = (each for each in ast.walk(node) if isinstance(each, ast.NamedExpr))
            self.names |= {each.target.id for each in inner}
        else:
            super().generic_visit(node)


def bound_names(statements: Iterable[ast.AST]) -> set[str]:
    """The names that statements bind in the scope in which they stand."""
    bound = _Bound()
    for statement in statements:
        bound.visit(statement)
    return bound.names - bound.globals


def definitions_of(statement: ast.stmt) -> list[tuple[str, ast.stmt]]:
    """Each name that a definition or an assignment makes, with a statement that makes it alone."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return [(statement.name, statement)]
    if isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        made = isinstance(statement.target, ast.Name) and statement.value is not None
        return [(ast.unparse(statement.target), statement)] if made else []
    if not isinstance(statement, ast.Assign):
        return []
    target, value = statement.targets[0], statement.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = zip(target.elts, value.elts, strict=True)
        parts = [ast.Assign([one], each, lineno=statement.lineno) for one, each in pairs]
        return [made for part in parts for made in definitions_of(part)]
    plain = len(statement.targets) == 1 and isinstance(target, ast.Name)
    return [(ast.unparse(target), statement)] if plain else []


class ScopedTransformer(ast.NodeTransformer):
    """A transformer of one top-level statement that knows which names are local where it is."""

    def __init__(self) -> None:
        self._scopes: list[tuple[set[str], bool]] = []
        """From outside in: the names, and whether it is the scope of a class."""

    def is_bound(self, name: str) -> bool:
        """Whether a name is local here; a class's names are so in its body, not in its methods."""
        inner = len(self._scopes) - 1
        return any(
            name in names and not (of_class and i < inner)
            for i, (names, of_class) in enumerate(self._scopes)
        )

    def top_name(self, name: str) -> str:
        """The new name of a definition at the top level."""
        return name

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        self._visit_defaults(node.args)
        if not self._scopes:
            node.name = self.top_name(node.name)
        self._enter(bound_names(node.body) | _parameters(node.args), False, node, "body")
        return node

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self._visit_defaults(node.args)
        self._scopes.append((_parameters(node.args), False))
        node.body = self.visit(node.body)
        self._scopes.pop()
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.decorator_list = [self.visit(each) for each in node.decorator_list]
        node.bases = [self.visit(each) for each in node.bases]
        node.keywords = [self.visit(each) for each in node.keywords]
        if not self._scopes:
            node.name = self.top_name(node.name)
        self._enter(bound_names(node.body), True, node, "body")
        return node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, _COMPREHENSIONS):
            return super().generic_visit(node)
        node.generators[0].iter = self.visit(node.generators[0].iter)  # in the scope around it
        self._scopes.append((bound_names(g.target for g in node.generators), False))
        first = node.generators[0]
        first.target, first.ifs = self.visit(first.target), [self.visit(each) for each in first.ifs]
        node.generators[1:] = [self.visit(each) for each in node.generators[1:]]
        for field in ("elt", "key", "value"):
            if hasattr(node, field):
                setattr(node, field, self.visit(getattr(node, field)))
        self._scopes.pop()
        return node

    def _enter(self, names: set[str], of_class: bool, node: Any, field: str) -> None:
        self._scopes.append((names, of_class))
        setattr(node, field, [self.visit(each) for each in getattr(node, field)])
        self._scopes.pop()

    def _visit_defaults(self, arguments: ast.arguments) -> None:
        arguments.defaults = [self.visit(each) for each in arguments.defaults]
        arguments.kw_defaults = [each and self.visit(each) for each in arguments.kw_defaults]


def _parameters(arguments: ast.arguments) -> set[str]:
    return {node.arg for node in ast.walk(arguments) if isinstance(node, ast.arg)}
