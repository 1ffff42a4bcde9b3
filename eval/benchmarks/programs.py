"""From what a model wrote to a program: code fences, prose, repeated signatures and odd indentation.

The answer to ``prompt`` is always a completion: ``prompt + completion`` is the program, as in the
files of HumanEval's own tools. Nothing is deleted inside of what is taken over.
"""

import ast
import itertools
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterator, Sequence

_FENCE = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+#.-]*)[^\n]*$", re.MULTILINE)
_STARTS_CODE = re.compile(r"[ \t]*(?:import|from|def|class|async def|@\w|\w+(?:\s*:[^=]+)?\s*=[^=])")
_STARTS_ANEW = re.compile(r"\s*^(?:import|from|def|class|async def|@\w|```|~~~)", re.MULTILINE)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
_ASSIGNMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign)
_LONGEST = 40_000  # of a text to be parsed in this process


def completion_of(text: str, prompt: str, entry_point: str, *, continues: bool = False) -> str:
    """What to put after ``prompt`` so that the whole is the program that the model meant.

    Of code after the function, only definitions, imports and the assignments that these need are kept:
    not its examples, which may fail or wait for input, nor what stands under ``if __name__``. Of
    several versions the last is what the model settled on.

    Args:
        text: As generated.
        prompt: Imports, helpers, and the function's signature and docstring.
        entry_point: The function's name.
        continues: The text was generated right after ``prompt``, so that it starts with the body.

    Returns:
        The completion; ``text`` itself where no part of it makes a program.
    """
    if len(text) > _LONGEST:
        return text
    # What is Python from end to end has no fences, only perhaps lines in a string that look like them.
    is_code = continues or _parse(textwrap.dedent(text)) or _parse(prompt + text)
    fenced = list(_fenced(text))
    chunks, latest = (
        ([text, *fenced], [text, *fenced[::-1]]) if is_code else ([*fenced, text], [*fenced[::-1], text])
    )
    # A body without its function cannot be told from a call of it, which is what later blocks hold.
    as_body = (found for chunk in chunks for found in _as_body(chunk, prompt, entry_point))
    as_function = (found for chunk in latest for found in _as_function(chunk, prompt, entry_point))
    # A base model goes on with the body, and may write the function again and again after it.
    starts_anew = _STARTS_ANEW.match(text) or text.lstrip().startswith(prompt.lstrip().splitlines()[0])
    ways = (as_body, as_function) if continues and not starts_anew else (as_function, as_body)
    return next(itertools.chain(*ways), text)


def defines_function(program: str, entry_point: str) -> bool:
    """Whether this is Python in which the last function of that name does more than describe itself."""
    tree = _parse(program)
    return tree is not None and _does_something(tree, entry_point)


def _fenced(text: str) -> Iterator[str]:
    """What stands between fences, one after the other; and before the first, if that closes a block."""
    marks = list(_FENCE.finditer(text))
    if len(marks) % 2 and not marks[0][2]:
        yield text[: marks[0].start()]  # the opening one stood in the prompt, or the last block is cut off
    while marks:
        opening = marks.pop(0)
        closing = next((mark for mark in marks if not mark[2] and mark[1] == opening[1]), None)
        yield text[opening.end() + 1 : closing.start() if closing else len(text)]
        marks = [mark for mark in marks if closing is not None and mark.start() > closing.start()]


def _as_function(text: str, prompt: str, entry_point: str) -> Iterator[str]:
    """Completions that define the function anew: from a line that may start code to the last that fits."""
    if not re.search(rf"\bdef\s+{re.escape(entry_point)}\b", text):
        return
    lines = text.splitlines(keepends=True)
    for start, line in enumerate(lines):
        if not _STARTS_CODE.match(line):
            continue
        code = _without_future(textwrap.dedent("".join(lines[start:])))
        found = _longest_program(prompt + "\n\n", code, entry_point, own=True)
        if found is not None:
            yield "\n\n" + found


def _as_body(text: str, prompt: str, entry_point: str) -> Iterator[str]:
    """The completion that goes on inside the function: as it is indented, or as it may have been meant.

    The reading that keeps most lines is the one that was meant: others break off where they no longer fit.
    """
    body = text.lstrip("\n") if text.strip() else ""
    if not body:
        return
    gap = "" if prompt.endswith("\n") else "\n"
    if body[0] in " \t":
        found = _longest_program(prompt + gap, body, entry_point, own=False)
        if found is not None:
            yield gap + found
            return
    first, _, rest = body.partition("\n")  # an indented first line may have been stripped, the others not
    variants = [
        "    " + body.lstrip(),
        textwrap.indent(textwrap.dedent(body), "    "),
        textwrap.indent(first.strip() + "\n" + textwrap.dedent(rest), "    "),
    ]
    readings = [_longest_program(prompt + gap, variant, entry_point, own=False) for variant in variants]
    if fitting := [code for code in readings if code is not None]:
        yield gap + max(fitting, key=lambda code: len(code.split()))


def _longest_program(before: str, code: str, entry_point: str, *, own: bool) -> str | None:
    """The first lines of ``code``, as many as make a program after ``before``.

    Args:
        before: What comes first.
        code: What may end in prose, or in the middle of a statement.
        entry_point: The function that the program must define.
        own: The function must be defined in ``code``; otherwise it has begun before.
    """
    lines = code.splitlines(keepends=True)
    while lines:
        part = "".join(lines)
        tree = _parse(before + part)
        if tree is not None:
            kept = _without_the_rest(tree, before, part, entry_point, own=own)
            fits = kept is not None and defines_function(before + kept, entry_point)
            return kept if fits else None
        lines.pop()
    return None


def _without_the_rest(tree: ast.Module, before: str, code: str, entry_point: str, *, own: bool) -> str | None:
    """``code`` to the end of the function, then definitions, none of that name again, and what they need."""
    lines, offset = code.splitlines(keepends=True), before.count("\n")
    functions = [node for node in tree.body if _is_function(node, entry_point)]
    if own:
        functions = [node for node in functions if node.lineno > offset]
    if not functions:
        return None
    # The body goes on after what the prompt has begun; of several whole ones the last is what was settled on.
    function = functions[-1] if own else functions[0]
    assert function.end_lineno is not None
    if function.end_lineno <= offset:
        return None
    head = "".join(lines[: function.end_lineno - offset])
    rest = tree.body[tree.body.index(function) + 1 :]
    definitions = [n for n in rest if isinstance(n, _DEFINITIONS) and not _is_function(n, entry_point)]
    kept = _with_lines(head, definitions, lines, offset)
    if needed := _needed_assignments(rest, before + kept, entry_point):
        kept = _with_lines(head, [n for n in rest if n in definitions or n in needed], lines, offset)
    return kept


def _with_lines(head: str, nodes: Sequence[ast.stmt], lines: Sequence[str], offset: int) -> str:
    """``head``, then the lines of ``nodes``, of which the first ``offset`` are not among ``lines``."""
    parts = [head]
    for node in nodes:
        assert node.end_lineno is not None
        decorators = getattr(node, "decorator_list", [])
        start = min([node.lineno, *(decorator.lineno for decorator in decorators)])
        parts += ["\n", *lines[start - 1 - offset : node.end_lineno - offset]]
    result = "".join(parts)
    return result if result.endswith("\n") else result + "\n"


def _needed_assignments(rest: Sequence[ast.stmt], program: str, entry_point: str) -> list[ast.stmt]:
    """Those after the function that change it, or what ``program`` reads; not the results of examples."""
    if not any(isinstance(node, _ASSIGNMENTS) for node in rest):
        return []
    needed = _global_names(program) | {entry_point}
    found: list[ast.stmt] = []
    for node in reversed(rest):  # an assignment may need an earlier one
        if isinstance(node, _ASSIGNMENTS) and _assigned(node) & needed:
            found.append(node)
            needed |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return found


def _assigned(node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> set[str]:
    """The names that are bound, or whose attributes or items are."""
    names: set[str] = set()
    targets: list[ast.expr] = list(node.targets) if isinstance(node, ast.Assign) else [node.target]
    while targets:
        target = targets.pop()
        if isinstance(target, ast.Name):
            names.add(target.id)
        elif isinstance(target, ast.Tuple | ast.List):
            targets += target.elts
        elif isinstance(target, ast.Attribute | ast.Subscript | ast.Starred):
            targets.append(target.value)
    return names


def _global_names(program: str) -> set[str]:
    """What functions and classes of a program read of its module, and built-ins."""
    names: set[str] = set()
    if _parse(program) is None:  # a statement that was kept shares its line with one that was not
        return names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tables = [symtable.symtable(program, "program", "exec")]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        names |= {
            symbol.get_name()
            for symbol in table.get_symbols()
            if symbol.is_global() and symbol.is_referenced()
        }
    return names


def _is_function(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name


def _does_something(tree: ast.Module, entry_point: str) -> bool:
    functions = [node for node in tree.body if _is_function(node, entry_point)]
    if not functions or not isinstance(functions[-1], ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    rest = functions[-1].body
    while rest and (
        isinstance(rest[0], ast.Import | ast.ImportFrom | ast.Pass)
        or (isinstance(rest[0], ast.Expr) and isinstance(rest[0].value, ast.Constant))
    ):
        rest = rest[1:]
    return bool(rest)


def _without_future(code: str) -> str:
    """They may only stand at the very top, which is the prompt's, and mean nothing at run time here."""
    return re.sub(r"^from __future__ import .*$", "", code, flags=re.MULTILINE)


def _parse(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "program", "exec")  # knows more errors than parsing: a return outside a function
            return ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
