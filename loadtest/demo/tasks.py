"""What the demo's agents work on: real text that every machine has, Python's own library.

A language model of 135M parameters does not call tools. So each agent *program* scripts its calls:
it opens files, lists folders, searches and calculates for real between the turns, and feeds the
results back as tool messages; the model only answers. What the demo is about does not depend on
that: long conversations that grow by tool results, with pauses of unknown length in between.
"""

from __future__ import annotations

import ast
import operator
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

LIBRARY = Path(sysconfig.get_paths()["stdlib"])

SYSTEM_PROMPT = """\
You help programmers to understand the source code of Python's standard library. An agent program \
works for you: it runs tools between your answers and shows you what they returned.

Tools:
open_file(path: string, first_line: integer): lines of a source file, with line numbers.
list_folder(path: string): the files of a folder, with their sizes in bytes.
search(pattern: string, path: string): lines of a file that match a regular expression.
calculate(expression: string): the value of an arithmetic expression.

Rules: answer in one or two short sentences. Name files, classes and functions exactly as they are \
written in the source. Say which line you rely on. If the tool results do not answer the question, \
say what to open next. Do not repeat the tool results. Do not invent code that you were not shown.
"""

MODULES = (
    "json/decoder.py", "argparse.py", "csv.py", "heapq.py", "textwrap.py", "difflib.py",
    "shlex.py", "configparser.py", "fractions.py", "statistics.py", "queue.py", "string.py",
    "tempfile.py", "zipfile.py" if (LIBRARY / "zipfile.py").exists() else "tarfile.py",
    "sched.py", "copy.py",
)  # fmt: skip


class ToolError(Exception):
    """A call that a tool refuses."""


@dataclass(frozen=True, slots=True)
class Call:
    """One scripted tool call."""

    tool: str
    arguments: dict[str, str | int]

    def __str__(self) -> str:
        return f"{self.tool}({', '.join(repr(value) for value in self.arguments.values())})"


@dataclass(frozen=True, slots=True)
class Step:
    """One turn: what the agent calls before it, and what it asks."""

    call: Call | None
    question: str


def steps(module: str) -> Iterator[Step]:
    """The work on one module; goes on for as long as anybody asks."""
    path = LIBRARY / module
    folder = str(Path(module).parent)
    yield Step(None, f"We study {module}. Which of its parts would you look at first, and why?")
    yield Step(
        Call("open_file", {"path": module, "first_line": 1}),
        "What is this module for, according to its first lines?",
    )
    yield Step(
        Call("search", {"pattern": r"^\s*(def|class) ", "path": module}),
        "Which of these definitions is the entry point for a user?",
    )
    yield Step(
        Call("list_folder", {"path": folder}),
        f"Which of these files is most closely related to {module}?",
    )
    lines = path.read_text(encoding="utf-8").count("\n")
    yield Step(
        Call("calculate", {"expression": f"{lines} * 100 / {path.stat().st_size}"}),
        f"That is the number of lines in 100 bytes of {module}. Is the code dense or airy?",
    )
    first = 30
    while True:
        yield Step(
            Call("open_file", {"path": module, "first_line": first % max(lines - 20, 1)}),
            "What do these lines do, in one sentence?",
        )
        first += 61


FINAL_STEP = Step(None, "Sum up in two sentences what we have learnt about this module.")


def run_tool(call: Call, max_chars: int) -> str:
    """Executes a call on the library's folder; the result is cut at ``max_chars``. Raises
    ToolError, also for a path outside."""
    result = _TOOLS[call.tool](**call.arguments)
    return result if len(result) <= max_chars else result[: max_chars - 4] + "\n..."


def _inside(path: str) -> Path:
    resolved = (LIBRARY / path).resolve()
    if not resolved.is_relative_to(LIBRARY.resolve()):
        raise ToolError(f"{path} is outside the library")
    return resolved


def _open_file(path: str, first_line: int) -> str:
    with _inside(path).open(encoding="utf-8") as file:
        numbered = enumerate(islice(file, first_line - 1, first_line + 120), first_line)
        return "".join(f"{number} {line}" for number, line in numbered)


def _list_folder(path: str) -> str:
    files = sorted(child for child in _inside(path).iterdir() if child.suffix == ".py")
    return "\n".join(f"{child.name} {child.stat().st_size}" for child in files)


def _search(pattern: str, path: str) -> str:
    matcher = re.compile(pattern)
    with _inside(path).open(encoding="utf-8") as file:
        hits = [f"{n} {line}" for n, line in enumerate(file, 1) if matcher.search(line)]
    return "".join(hits)


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def _calculate(expression: str) -> str:
    def value(node: ast.expr) -> float:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise ToolError(f"not arithmetic: {ast.unparse(node)}")

    return f"{expression} = {value(ast.parse(expression, mode='eval').body):.6g}"


_TOOLS: dict[str, Callable[..., str]] = {
    "open_file": _open_file,
    "list_folder": _list_folder,
    "search": _search,
    "calculate": _calculate,
}
