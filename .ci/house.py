"""How the house stands: sizes, documentation and air of the code, a column per package.

    python .ci/house.py [FOLDER ...]        (default: selector training)

Counts what a reader who would inherit the code looks at; `--walls` lists the functions without any air, `--bare` the
public classes without a runnable example.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import io
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles

LONG = 15
"""Lines of a function's body from which on it should have a blank line or a comment."""

DIRECTIVES = ("# noqa", "# type:", "# pyright:")
"""Beginnings of comments that speak to a tool."""

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


def body_lines(function: Function, lines: Sequence[str]) -> list[str]:
    """The lines of a function's body, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return list(lines[body[0].lineno - 1 : function.end_lineno]) if body else []


def comments_and_code(source: str) -> tuple[int, int]:
    """Comments, and lines of code: neither docstrings nor directives to a linter or type checker count."""
    tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    comments = [each.string for each in tokens if each.type == tokenize.COMMENT]

    # A docstring is a statement of its own: what stands before it is a new line or an indentation.
    layout = {tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER}
    code: set[int] = set()
    before = tokenize.NEWLINE
    for each in tokens:
        alone = each.type == tokenize.STRING and before in layout
        if each.type not in layout and not alone:
            code.update(range(each.start[0], each.end[0] + 1))
        before = each.type
    return sum(not comment.startswith(DIRECTIVES) for comment in comments), len(code)


def is_wall(function: Function, lines: Sequence[str]) -> bool:
    """Whether a long function has neither a blank line nor a comment."""
    body = body_lines(function, lines)
    return len(body) >= LONG and all(line.strip() and "#" not in line for line in body)


def definitions(tree: ast.Module) -> Iterator[tuple[Definition, bool]]:
    """Public classes and functions of a module, and the public methods of its public classes (True)."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node, False
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, Function) and not inner.name.startswith("_"):
                        yield inner, True


def has_example(node: ast.ClassDef) -> bool:
    """Whether the docstring of a class shows it at work and prints something: what prints nothing shows nothing."""
    examples = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
    return any(example.want for example in examples)


def without_example(folder: Path) -> list[str]:
    """The public classes of a package whose docstrings have no example, each as ``selector/errors.py:UsageError``."""
    return [
        f"{folder.name}/{path.relative_to(folder).as_posix()}:{node.name}"
        for path in sorted(folder.rglob("*.py"))
        for node, _ in definitions(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and not has_example(node)
    ]


def measure(folder: Path) -> dict[str, str]:
    """The figures of one package, by what they are of."""
    paths = sorted(folder.rglob("*.py"))
    texts = {path: path.read_text(encoding="utf-8").splitlines() for path in paths}
    trees = {path: ast.parse("\n".join(text)) for path, text in texts.items()}

    functions = [
        (node, texts[path]) for path, tree in trees.items() for node in ast.walk(tree) if isinstance(node, Function)
    ]
    bodies = [body for node, lines in functions if (body := body_lines(node, lines))]
    long = [body for body in bodies if len(body) >= LONG]
    walls = sum(is_wall(node, lines) for node, lines in functions)

    public = [(node, method) for tree in trees.values() for node, method in definitions(tree)]
    top = [bool(ast.get_docstring(node)) for node, method in public if not method]
    methods = [bool(ast.get_docstring(node)) for node, method in public if method]
    examples = [has_example(node) for node, _ in public if isinstance(node, ast.ClassDef)]
    arguments = [
        argument.annotation is not None
        for node, _ in functions
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        if argument.arg not in ("self", "cls")
    ]

    comments, code = map(
        sum, zip(*(comments_and_code(path.read_text(encoding="utf-8")) for path in paths), strict=True)
    )
    sizes = [len(text) for text in texts.values() if text]
    lengths = [node.end_lineno - node.lineno + 1 for node, _ in functions if node.end_lineno]
    blank = sum(not line.strip() for body in long for line in body)
    return {
        "files": str(len(sizes)),
        "lines": f"{sum(sizes):,}",
        "file lines, median / p90 / max": _spread(sizes) + f" / {max(sizes)}",
        "function lines, median / p90": _spread(lengths),
        "annotated arguments": _share(arguments),
        "docstring, public top level": _share(top),
        "docstring, public methods": _share(methods),
        "runnable example, public classes": _share(examples),
        "comments per 100 lines of code": f"{100 * comments / code:.1f}",
        f"blank lines in functions of {LONG} lines and more": f"{100 * blank / max(1, sum(map(len, long))):.0f}%",
        "such functions with neither blank line nor comment": f"{walls} of {len(long)}",
    }


def _spread(values: Sequence[int]) -> str:
    return f"{median(values):.0f} / {quantiles(values, n=10)[-1]:.0f}"


def _share(hits: Sequence[bool]) -> str:
    return f"{100 * sum(hits) / max(1, len(hits)):.0f}% ({sum(hits)}/{len(hits)})"


def main() -> None:
    """Prints the table, or the list of walls."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("selector"), Path("training")])
    parser.add_argument("--walls", action="store_true", help="list the long functions without a blank line or comment")
    parser.add_argument("--bare", action="store_true", help="list the public classes without a runnable example")
    options = parser.parse_args()
    if options.bare:
        print(*(name for folder in options.folders for name in without_example(folder)), sep="\n")
        return

    if options.walls:
        for path in sorted(path for folder in options.folders for path in folder.rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            for node in ast.walk(ast.parse("\n".join(lines))):
                if isinstance(node, Function) and is_wall(node, lines):
                    print(f"{path}:{node.lineno} {node.name}, {len(body_lines(node, lines))} lines")
        return

    columns = {folder.name: measure(folder) for folder in options.folders}
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name in next(iter(columns.values())):
        print(f"| {name} | " + " | ".join(column[name] for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
