"""HTML as a tree: whatever a run wrote is text in it, and can be nothing else."""

import json
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

Child = Element | str


def element(name: str, /, *children: Child, **attributes: str | int | float | None) -> Element:
    """An element with its content.

    Args:
        name: Its tag.
        children: Texts and elements, in order.
        attributes: Without those that are None; ``class_`` is ``class``, and other underscores are hyphens.
    """
    made = Element(name)
    for key, value in attributes.items():
        if value is not None:
            made.set(key.rstrip("_").replace("_", "-"), _clean(str(value)))
    for child in children:
        if isinstance(child, Element):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + _clean(child)
        else:
            made.text = (made.text or "") + _clean(child)
    return made


def table(header: Sequence[str], rows: Sequence[Element], class_: str = "", **attributes: str) -> Element:
    """A table in a box that scrolls sideways by itself."""
    head = element("thead", element("tr", *(element("th", title, scope="col") for title in header)))
    body = element("tbody", *rows)
    return element("div", element("table", head, body, class_=class_, **attributes), class_="scroll")


def notes(lines: Sequence[str]) -> list[Element]:
    """A list of remarks; nothing for none."""
    if not lines:
        return []
    return [element("ul", *(element("li", line) for line in lines), class_="notes")]


def data_block(name: str, value: Any) -> Element:
    """JSON for the page's program."""
    # Serialised as it is: no sign in it may end the block.
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return element("script", text, type="application/json", id=name)


def serialised(tree: Element) -> str:
    """The document."""
    return "<!doctype html>\n" + ElementTree.tostring(tree, encoding="unicode", method="html") + "\n"


def _clean(text: str) -> str:
    # Signs that no file may hold: halves of pairs, and control signs such as a terminal's colours.
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(sign for sign in whole if sign in "\n\t" or ord(sign) >= 32)
