"""Every relative link of README, docs and notebook leads somewhere, and every page is linked to."""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "notebooks" / "Toy_Experiments.ipynb"
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)\)")


def without_code(text: str) -> str:
    """The text without fenced blocks, in which brackets are no links."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def links_of(text: str) -> list[str]:
    return [target for target in LINK.findall(without_code(text)) if not re.match(r"[a-z]+:", target)]


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings."""
    anchors: list[str] = []
    for title in re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).strip().lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        anchors.append(slug if slug not in anchors else f"{slug}-{anchors.count(slug)}")
    return set(anchors)


def broken(page: Path, text: str) -> list[str]:
    """The links that lead nowhere."""
    found = []
    for link in links_of(text):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        is_there = target.exists() and ROOT in (target, *target.parents)
        if is_there and anchor and target.suffix == ".md":
            is_there = anchor in anchors_of(target.read_text())
        found += [link] * (not is_there)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


def test_links_of_the_notebook():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    own = [link for link in links_of(text) if link.startswith("#")]
    # Jupyter's anchors are the headings themselves, spaces as hyphens.
    titles = {title.replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    assert len(own) == 6
    assert {link[1:] for link in own} <= titles
    assert [link for link in broken(NOTEBOOK, text) if link not in own] == []


def test_every_page_is_linked_from_the_readme_or_the_guide():
    sources = (ROOT / "README.md", ROOT / "docs" / "guide.md")
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page in sources
        for link in links_of(page.read_text())
    }
    assert [page.name for page in PAGES[1:] if page not in linked] == []


def test_a_broken_link_is_found(tmp_path):
    """The tests above would find one."""
    page = ROOT / "docs" / "guide.md"
    text = "[a](nowhere.md) [b](guide.md#no-such) [c](../../outside.md) [d](guide.md#install) ![e](f.png)"
    assert broken(page, text) == ["nowhere.md", "guide.md#no-such", "../../outside.md", "f.png"]
    assert links_of("```sh\n[x](y.md)\n```\n[z](https://example.org)") == []
    assert anchors_of("# A `b`, γ!\n## A b γ") == {"a-b-γ", "a-b-γ-1"}
