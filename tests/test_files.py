"""Files that appear in one piece."""

import os

import pytest

from lora_one.files import whole_file, write_text


def test_two_programs_may_write_one_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "report.md"
    with whole_file(path) as mine:
        mine.write_text("mine")
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            write_text(path, "theirs")
        assert path.read_text() == "theirs"
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_on_the_way_leaves_the_old_file(tmp_path):
    path = tmp_path / "plot.png"
    write_text(path, "old")
    with pytest.raises(RuntimeError), whole_file(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
