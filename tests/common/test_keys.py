"""A site's key: made once, kept to its owner, in OpenSSH's formats, and named by digits that people read aloud."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigurationError
from common.keys import (
    as_flower_bytes,
    fingerprint,
    generate,
    load_private,
    load_public,
    private_to_pem,
    public_line,
    read_public,
    spoken,
    write_private,
)

KEY = generate()
LINE = public_line(KEY)


NEEDS_OPENSSH = pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="ssh-keygen is not installed")


def keygen(*arguments: str) -> str:
    return subprocess.run(["ssh-keygen", "-q", *arguments], capture_output=True, text=True, check=True).stdout


def written(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_a_key_survives_its_file(tmp_path: Path) -> None:
    """What `write_private` wrote `load_private` reads, and its public line is the same."""
    write_private(tmp_path / "key", private_to_pem(KEY))
    assert public_line(load_private(tmp_path / "key")) == LINE
    assert public_line(load_public(LINE)) == LINE


def test_keys_differ() -> None:
    """Two keys have different lines and different digits."""
    other = generate()
    assert public_line(other) != LINE
    assert fingerprint(other.public_key()) != fingerprint(KEY.public_key())


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
def test_a_private_key_is_its_owners_from_the_first_byte(tmp_path: Path) -> None:
    """The file is made with mode 0600, whatever the umask."""
    before = os.umask(0)
    try:
        write_private(tmp_path / "key", private_to_pem(KEY))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_a_private_key_is_never_overwritten(tmp_path: Path) -> None:
    """A second key under the same name is refused, and the first stays."""
    write_private(tmp_path / "key", private_to_pem(KEY))
    with pytest.raises(ConfigurationError, match=r"key: exists and would be overwritten; move it away"):
        write_private(tmp_path / "key", private_to_pem(generate()))
    assert public_line(load_private(tmp_path / "key")) == LINE


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX")
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o777])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    """Group or others with any right: refused, naming the mode and chmod 600."""
    path = written(tmp_path / "key", private_to_pem(KEY), mode)
    with pytest.raises(ConfigurationError, match=f"mode {mode:04o} lets others read the key; run chmod 600"):
        load_private(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (generate_private_key(SECP256R1()), "must be on the curve P-384"),
        (Ed25519PrivateKey.generate(), "must be on the curve P-384"),
        (b"", "not an OpenSSH private key"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nxx\n-----END OPENSSH PRIVATE KEY-----\n", "not an OpenSSH private key"),
        (LINE.encode(), "not an OpenSSH private key"),
        (b"x" * 20_000, "at most"),
    ],
    ids=["P-256", "Ed25519", "empty", "garbage", "public", "large"],
)
def test_only_a_p384_private_key_is_read(tmp_path: Path, content: object, said: str) -> None:
    """Other curves, other kinds of key and what is no key are told apart in one line."""
    if not isinstance(content, bytes):
        content = private_to_pem(content)  # type: ignore[arg-type]  # a key of another kind, on purpose
    with pytest.raises(ConfigurationError, match=said) as refused:
        load_private(written(tmp_path / "key", content))
    assert "\n" not in str(refused.value)


@NEEDS_OPENSSH
def test_a_passphrase_is_refused(tmp_path: Path) -> None:
    """A client that restarts at night has nobody to type one."""
    keygen("-t", "ecdsa", "-b", "384", "-N", "secret", "-f", str(tmp_path / "key"))
    with pytest.raises(ConfigurationError, match="without passphrase"):
        load_private(tmp_path / "key")


@pytest.mark.parametrize("read", [load_private, read_public])
def test_a_missing_file_is_one_line(tmp_path: Path, read: object) -> None:
    """No file, or a folder in its place, names the path."""
    assert callable(read)
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigurationError, match=str(path)):
            read(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be one line"),
        (f"{LINE}\n{LINE}\n", "must be one line"),
        ("ssh-rsa AAAA", "not an OpenSSH public key"),
        (LINE[:-10], "not an OpenSSH public key"),
        (private_to_pem(KEY).decode(), "is a private key, which never leaves its site"),
        ("x" * 20_000, "must be one line"),
    ],
)
def test_a_public_line_is_checked(text: str, said: str) -> None:
    """Anything but one OpenSSH line is refused, saying what to give instead."""
    with pytest.raises(ConfigurationError, match=said):
        load_public(text)


@pytest.mark.parametrize("other", [generate_private_key(SECP256R1()), Ed25519PrivateKey.generate()])
def test_a_public_key_of_another_curve_is_refused(other: object) -> None:
    """Flower verifies NIST curves; we take P-384 only."""
    assert hasattr(other, "public_key")
    line = other.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    with pytest.raises(ConfigurationError, match="P-384"):
        load_public(line)


def test_a_comment_and_blank_lines_are_ignored(tmp_path: Path) -> None:
    """A `.pub` file as people send them: comment after the key, a line end, perhaps an empty line."""
    path = written(tmp_path / "key.pub", f"\n{LINE} someone@north\r\n".encode(), 0o644)
    assert public_line(read_public(path)) == LINE


def test_flower_sees_the_same_key() -> None:
    """The bytes are those that Flower's own function makes."""
    assert as_flower_bytes(KEY.public_key()) == public_key_to_bytes(KEY.public_key())


def test_a_fingerprint_is_thirty_digits_in_fives() -> None:
    """Six groups of five digits, the same for the same key however it was read."""
    said = fingerprint(KEY.public_key())
    assert [len(group) for group in said.split(" ")] == [5] * 6
    assert said.replace(" ", "").isdigit()
    assert fingerprint(load_public(f"{LINE} comment")) == said


@given(st.binary(max_size=50), st.binary(max_size=50))
def test_other_content_has_other_digits(one: bytes, other: bytes) -> None:
    """Digits are a function of the content, and differ where it does."""
    assert (spoken(one) == spoken(other)) == (one == other)


@NEEDS_OPENSSH
def test_openssh_reads_and_writes_these_files(tmp_path: Path) -> None:
    """`ssh-keygen -y` prints the public line of our key, and a key that it made is read."""
    write_private(tmp_path / "ours", private_to_pem(KEY))
    assert keygen("-y", "-f", str(tmp_path / "ours")).split()[:2] == LINE.split()
    keygen("-t", "ecdsa", "-b", "384", "-N", "", "-f", str(tmp_path / "theirs"))
    assert public_line(load_private(tmp_path / "theirs")) == public_line(read_public(tmp_path / "theirs.pub"))
