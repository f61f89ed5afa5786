"""The code digest: the same wherever the same code is installed, another when anything in it changes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from common import provenance


@pytest.fixture
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small installation with both rooms; the digest is computed on it afresh."""
    for name, text in (
        ("common/a.py", "a\nb\n"),
        ("client/sub/b.py", "c\n"),
        ("server/s.py", "s"),
        ("common/d.txt", "d"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    return tmp_path


def digest() -> str:
    return provenance.code_digest.__wrapped__()


def test_the_digest_is_of_this_installation() -> None:
    """A sha256, the same twice, over the folder that holds this package."""
    assert len(provenance.code_digest()) == 64
    assert provenance.code_digest() == provenance.code_digest() == digest()
    assert Path(provenance.__file__).resolve().is_relative_to(provenance.ROOT / "common")


def test_line_ends_and_place_do_not_change_it(rooms: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same code elsewhere, or with Windows line ends, or beside other files, has the same digest."""
    before = digest()
    (rooms / "common" / "a.py").write_bytes(b"a\r\nb\r\n")
    (rooms / "server" / "s.py").write_text("other")
    (rooms / "common" / "d.txt").write_text("other")
    assert digest() == before
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(rooms, elsewhere, dirs_exist_ok=True)
    provenance.ROOT = elsewhere  # undone by the fixture
    assert digest() == before


def test_any_change_of_code_changes_it(rooms: Path) -> None:
    """Content, name, a new file, and moving text from one file to the next each give another digest."""
    digests = {digest()}
    (rooms / "common" / "a.py").write_bytes(b"a\nB\n")
    digests.add(digest())
    (rooms / "common" / "a.py").write_bytes(b"a\n")
    (rooms / "client" / "sub" / "b.py").write_bytes(b"b\nc\n")
    digests.add(digest())
    (rooms / "client" / "new.py").write_bytes(b"")
    digests.add(digest())
    (rooms / "client" / "new.py").rename(rooms / "client" / "newer.py")
    digests.add(digest())
    assert len(digests) == 5
