"""The library's reference, docs/api.md, from signatures and docstrings.

    python scripts/make_api_docs.py            writes docs/api.md
    python scripts/make_api_docs.py --check    exits with 1 where it is not up to date

The sources are read, not run: nothing is imported, and the page is the same with every Python.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "api.md"
PACKAGE = "lora_one"
# Where the names of ``lora_one.__all__`` may be defined; the same places as in its __getattr__.
HOMES = ("errors", "settings", "library", "optimizers")
# What else a program of one's own may want, with the names shown; none: all public ones.
MODULES: dict[str, tuple[str, ...]] = {
    "inits": (),
    "preconditioners": ("FactorPair",),
    "adapters": ("InitReport",),
    "records": ("RunRecord", "read_record"),
    "toy": (),
}
INTRODUCTION = """\
# API reference

Written by `python scripts/make_api_docs.py` from signatures and docstrings; how the parts go together is in
[library.md](library.md). Shapes stand in the names: `O` output features, `I` input features, `R` adapter
rank, `K` kept singular triplets, so that `B_OR` and `A_RI` are PEFT's `lora_B` and `lora_A`, and `G_OI` is a
weight's gradient.
"""
_WIDTH = 100
_SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Source):$")
_ENTRY = re.compile(r"^(\*{0,2}[\w.]+): (.*)$")

Definition = ast.ClassDef | ast.FunctionDef


@dataclass(frozen=True)
class Documented:
    """One name of the reference."""

    name: str
    node: Definition


def main() -> None:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    page = reference()
    if not check:
        PAGE.write_text(page, encoding="utf-8")
        return
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page:
        print("error: docs/api.md is not up to date; run python scripts/make_api_docs.py", file=sys.stderr)
        sys.exit(1)


def reference() -> str:
    """The whole page."""
    parts = [INTRODUCTION, f"## `{PACKAGE}`\n"]
    parts += [render(item, PACKAGE) for item in exported()]
    for module, names in MODULES.items():
        tree = parse(module)
        parts.append(f"## `{PACKAGE}.{module}`\n")
        if not names:
            parts.append(prose(ast.get_docstring(tree) or "") + "\n")
        items = [item for item in public(tree) if not names or item.name in names]
        parts += [render(item, f"{PACKAGE}.{module}") for item in items]
    return "\n".join(parts)


def parse(module: str) -> ast.Module:
    """The syntax tree of a module of the package."""
    return ast.parse((ROOT / PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def exported() -> list[Documented]:
    """What ``lora_one.__all__`` names, in its order.

    Raises:
        LookupError: If a name is defined in none of the homes.
    """
    assignments = [node for node in parse("__init__").body if isinstance(node, ast.Assign)]
    (names,) = (node.value for node in assignments if names_of(node) == ["__all__"])
    known = {item.name: item for home in HOMES for item in public(parse(home))}
    missing = sorted(set(ast.literal_eval(names)) - known.keys())
    if missing:
        raise LookupError(f"{', '.join(missing)}: in none of {', '.join(HOMES)}; add their module to HOMES")
    return [known[name] for name in ast.literal_eval(names)]


def public(tree: ast.Module) -> Iterator[Documented]:
    """The public functions and classes of a module, and second names of its functions."""
    functions: dict[str, Definition] = {}
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            functions[node.name] = node
            yield Documented(node.name, node)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            for name in names_of(node):
                if node.value.id in functions and not name.startswith("_"):
                    yield Documented(name, functions[node.value.id])


def names_of(node: ast.Assign) -> list[str]:
    """What an assignment gives a value to."""
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


def render(item: Documented, module: str) -> str:
    """A heading, the signature and the docstring of one name, and of its public methods."""
    node, name = item.node, item.name
    lines = [f"### `{module}.{name}`\n"]
    if name != node.name:
        return "\n".join(
            [*lines, f"Another name of [`{node.name}`](#{module.replace('.', '')}{node.name}).\n"]
        )
    shown = class_signature(node) if isinstance(node, ast.ClassDef) else signature(node)
    lines += [f"```python\n{shown}\n```\n", prose(ast.get_docstring(node) or "") + "\n"]
    for method in public_methods(node):
        kind = " (property)" if is_property(method) else ""
        head = method.name if kind else signature(method).removeprefix("def ")
        lines.append(f"**`{' '.join(head.split())}`**{kind}: {prose(ast.get_docstring(method) or '')}\n")
    return "\n".join(lines)


def public_methods(node: Definition) -> list[ast.FunctionDef]:
    """Methods that have a docstring; those that only replace torch's have none to show."""
    body = node.body if isinstance(node, ast.ClassDef) else []
    methods = [part for part in body if isinstance(part, ast.FunctionDef)]
    return [method for method in methods if not method.name.startswith("_") and ast.get_docstring(method)]


def is_property(method: ast.FunctionDef) -> bool:
    """Whether it is read like an attribute."""
    return any(isinstance(mark, ast.Name) and mark.id == "property" for mark in method.decorator_list)


def class_signature(node: ast.ClassDef) -> str:
    """The class with its bases and how it is made: its ``__init__``, or its fields."""
    named = [ast.unparse(base) for base in node.bases]
    bases = ", ".join(base for base in named if not base.startswith("_"))
    head = f"class {node.name}({bases})" if bases else f"class {node.name}"
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return head + "\n" + signature(part, node.name).removeprefix("def ").removesuffix(" -> None")
    fields = [ast.unparse(part) for part in node.body if isinstance(part, ast.AnnAssign)]
    return "\n".join([head, *(f"    {text}" for text in fields)])


def signature(node: ast.FunctionDef, name: str | None = None) -> str:
    """``def name(arguments) -> result``, over several lines where one would be long; without ``self``."""
    own = node.args
    parts = [
        ast.unparse(ast.arguments([], [part], None, [], [], None, [])) for part in own.posonlyargs + own.args
    ]
    for index, default in enumerate(reversed(own.defaults), start=1):
        parts[-index] += (" = " if ": " in parts[-index] else "=") + ast.unparse(default)
    if own.vararg or own.kwonlyargs:
        parts.append(f"*{ast.unparse(own.vararg)}" if own.vararg else "*")
    for part, value in zip(own.kwonlyargs, own.kw_defaults, strict=True):
        parts.append(ast.unparse(part) + (f" = {ast.unparse(value)}" if value else ""))
    if own.kwarg:
        parts.append(f"**{ast.unparse(own.kwarg)}")
    parts = [part for part in parts if part not in ("self", "cls")]
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    line = f"def {name or node.name}({', '.join(parts)}){result}"
    if len(line) <= _WIDTH:
        return line
    inner = "".join(f"    {part},\n" for part in parts)
    return f"def {name or node.name}(\n{inner}){result}"


def prose(docstring: str) -> str:
    """A Google docstring as Markdown: its sections as lists."""
    lines, section, blocks = docstring.replace("``", "`").splitlines(), None, list[str]()
    for line in lines:
        title = _SECTION.match(line)
        text = line.strip()
        if title:
            section = title[1]
            blocks.append(f"\n*{section}*\n")
        elif section is None or not text:
            blocks.append(line.rstrip())
        elif (entry := _ENTRY.match(text)) and line.startswith("    ") and line[4] != " ":
            blocks.append(f"- `{entry[1]}`: {entry[2]}")
        elif section in ("Returns", "Yields", "Source"):
            blocks.append(text)
        else:
            blocks.append(f"  {text}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(blocks)).strip()


if __name__ == "__main__":
    main()
