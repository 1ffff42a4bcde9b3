"""docs/api.md is what the docstrings say now, in full."""

import ast
import subprocess
import sys

from conftest import ROOT, load_script

import lora_one

api = load_script("make_api_docs")
SOURCE = '''
class Base:
    """A base."""

    def __init__(self, size: int, *, rate: float = 0.5, **others: int) -> None:
        """Not shown."""

    @property
    def double(self) -> int:
        """Twice it."""

    def _hidden(self) -> None:
        """Hidden."""


def act(first, second=1, *rest: str, third: "int | None" = None) -> bool:
    """Acts on ``first``.

    More of it.

    Args:
        first: What it
            acts on.
        second: Nothing.

    Returns:
        Whether it did: always.

    Raises:
        UserError: Never.
    """


again = act
_no = act
CONSTANT = 3
'''


def rendered(name: str) -> str:
    (item,) = [item for item in api.public(ast.parse(SOURCE)) if item.name == name]
    return api.render(item, "m")


def test_the_committed_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_api_docs.py", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_page_that_is_not_is_said_to_be_not(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(api, "PAGE", tmp_path / "api.md")
    monkeypatch.setattr(sys, "argv", ["make_api_docs.py", "--check"])
    try:
        api.main()
    except SystemExit as exited:
        assert exited.code == 1
    assert "run python scripts/make_api_docs.py" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["make_api_docs.py"])
    api.main()
    assert (tmp_path / "api.md").read_text() == api.reference()


def test_everything_public_is_on_it():
    page = api.PAGE.read_text()
    for name in lora_one.__all__:
        assert f"### `lora_one.{name}`\n" in page
    assert [item.name for item in api.exported()] == lora_one.__all__
    undocumented = [item.name for item in api.exported() if not ast.get_docstring(item.node)]
    assert undocumented == []


def test_a_function():
    assert rendered("act") == (
        "### `m.act`\n\n```python\n"
        "def act(first, second=1, *rest: str, third: 'int | None' = None) -> bool\n```\n\n"
        "Acts on `first`.\n\nMore of it.\n\n*Args*\n\n- `first`: What it\n  acts on.\n"
        "- `second`: Nothing.\n\n"
        "*Returns*\n\nWhether it did: always.\n\n*Raises*\n\n- `UserError`: Never.\n"
    )


def test_a_class():
    assert rendered("Base") == (
        "### `m.Base`\n\n```python\nclass Base\n"
        "Base(size: int, *, rate: float = 0.5, **others: int)\n```\n\nA base.\n\n"
        "**`double`** (property): Twice it.\n"
    )


def test_second_names_and_what_is_private():
    assert [item.name for item in api.public(ast.parse(SOURCE))] == ["Base", "act", "again"]
    assert rendered("again") == "### `m.again`\n\nAnother name of [`act`](#mact).\n"


def test_long_signatures_are_broken():
    node = ast.parse(f"def f({', '.join(f'argument_{i}: int' for i in range(9))}) -> None: ...").body[0]
    shown = api.signature(node)
    assert shown.splitlines()[:2] == ["def f(", "    argument_0: int,"]
    assert shown.endswith(",\n) -> None")
