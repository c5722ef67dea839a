"""Python source as a tree: what it may import, what it reads of other code, and a hash that comments cost nothing."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Source:
    """A Python file's text, parsed once: what it may import, as (dots before the name, name), and the names in it
    that tell what it reads and runs of other code."""

    tree: ast.Module | None
    """None where it cannot be parsed: then its bytes count."""
    imports: tuple[tuple[int, str], ...] = ()
    names: frozenset[str] = frozenset()

    @classmethod
    @lru_cache(maxsize=1024)
    def parse(cls, text: bytes) -> Source:
        try:
            tree = ast.parse(text)  # bytes, as a coding line decides what they say
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return cls(None)
        imports: list[tuple[int, str]] = []
        names: set[str] = set()
        for node in _executed(tree):
            if isinstance(node, ast.Import):
                imports += [(0, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                module = [node.module] if node.module else []
                inner = [".".join([*module, alias.name]) for alias in node.names]
                imports += [(node.level, name) for name in ([".".join(module)] if node.level or module else []) + inner]
                names.update(*(name.split(".") for name in [*module, *inner]))
            elif isinstance(node, ast.Name):
                names.add(node.id)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names.add(node.value)
            elif isinstance(node, ast.Call):
                imports += _imported_by_call(node)
        return cls(tree, tuple(dict.fromkeys(imports)), frozenset(names))


@lru_cache(maxsize=1024)
def digest(text: bytes, *, docstrings: bool, as_written: bool) -> str:
    """Hex sha256 of Python code: of its tree, with docstrings only if `docstrings`; of its bytes if `as_written`."""
    tree = Source.parse(text).tree
    if as_written or tree is None:
        return hashlib.sha256(text).hexdigest()
    found = hashlib.sha256()
    for token in _tokens(tree, docstrings):
        found.update(token.encode("utf-8", "surrogatepass") + b"\0")
    return found.hexdigest()


def _executed(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes but those below `if TYPE_CHECKING:`, which never runs."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in (
            getattr(node.test, "id", None),
            getattr(node.test, "attr", None),
        ):
            stack.extend(node.orelse)
        else:
            stack.extend(ast.iter_child_nodes(node))


def _imported_by_call(call: ast.Call) -> list[tuple[int, str]]:
    """Of `import_module("a.b")` and the like, where the name is written out."""
    function = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    first = call.args[0] if call.args else None
    if function not in ("import_module", "__import__") or not isinstance(first, ast.Constant):
        return []
    name = str(first.value)
    return [(len(name) - len(name.lstrip(".")), name.lstrip("."))]


def _tokens(tree: ast.Module, docstrings: bool) -> Iterator[str]:
    """A tree in an order that says all of it, without positions and absent fields: the same in every Python version.
    A stack of its own, as code can be nested deeper than Python calls."""
    stack: list[object] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.AST):
            fields = {name: value for name, value in ast.iter_fields(node) if value not in (None, [])}
            if not docstrings and _has_docstring(node):
                fields["body"] = fields["body"][1:]
            yield f"{type(node).__name__} {' '.join(fields)}"
            stack.extend(reversed(fields.values()))
        elif isinstance(node, list):
            yield f"list {len(node)}"
            stack.extend(reversed(node))
        else:
            # Python refuses to write very long integers as decimals.
            yield hex(node) if type(node) is int else repr(node)


def _has_docstring(node: ast.AST) -> bool:
    if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
        return False
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
