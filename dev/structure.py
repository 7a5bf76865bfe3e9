"""Measures the package's structure: python dev/structure.py [SRC]

SRC is the folder that holds `videorepa`, by default this checkout's src. A cycle is a group of
modules that import each other, directly or by way of others. The floors are the modules on the
longest chain of imports, where a cycle counts as one module. Imports within functions count; those
that only type checkers see are counted in a line of their own. Class names are compared without
leading underscores.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = "videorepa"

Graph = dict[str, set[str]]


def syntax_trees(files: list[Path], source: Path) -> dict[str, ast.Module]:
    """Each module's syntax tree by the module's dotted name."""
    trees = {}
    for path in files:
        parts = path.relative_to(source).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text())
    return trees


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The node and its descendants, except what only type checkers see."""
    yield node
    typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
    for child in node.orelse if typing_only else ast.iter_child_nodes(node):
        yield from run_nodes(child)


def imports(trees: dict[str, ast.Module], typing: bool) -> Graph:
    """The package's modules that each module imports.

    Args:
      trees: Each module's syntax tree by its name.
      typing: Count the imports that only type checkers see, too.
    """
    graph = {}
    for name, tree in trees.items():
        targets = set()
        for node in ast.walk(tree) if typing else run_nodes(tree):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= {each if each in trees else node.module for each in names}
        graph[name] = targets & trees.keys() - {name}
    return graph


def reachable(graph: Graph, start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in graph[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def cycles(graph: Graph) -> list[list[str]]:
    reach = {name: reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other]))
        for name in graph
        if name in reach[name]
    }
    return [list(group) for group in sorted(groups)]


def floors(graph: Graph) -> int:
    group = {name: name for name in graph}
    for members in cycles(graph):
        group |= dict.fromkeys(members, members[0])
    below: Graph = {name: set() for name in group.values()}
    for name, targets in graph.items():
        below[group[name]] |= {group[target] for target in targets} - {group[name]}

    @cache
    def height(name: str) -> int:
        return 1 + max(map(height, below[name]), default=0)

    return max(map(height, below))


def main(source: Path) -> None:
    files = sorted((source / PACKAGE).rglob("*.py"))
    trees = syntax_trees(files, source)
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    classes = Counter(node.name.lstrip("_") for node in nodes if isinstance(node, ast.ClassDef))
    repeated = sorted(name for name, count in classes.items() if count > 1)
    print(f"lines: {sum(len(path.read_text().splitlines()) for path in files):,}")
    at_root = sum(path.parent.name == PACKAGE for path in files)
    print(f"modules: {len(files)}, of which at the root: {at_root}")
    print(f"class names defined more than once: {len(repeated)} ({', '.join(repeated)})")
    for typing, title in ((False, "imports that run"), (True, "with those for type checkers")):
        graph = imports(trees, typing)
        circles = [" and ".join(members) for members in cycles(graph)]
        print(f"{title}: {floors(graph)} floors, {len(circles)} cycles {circles or ''}".rstrip())


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "src")
