"""A site's own key: NIST P-384, in OpenSSH's formats, and a fingerprint that two people can compare by telephone.

P-384 because that is what Flower's fleet routes verify (ECDSA over a NIST curve); OpenSSH's formats because a data
engineer can look into them with `ssh-keygen`. No passphrase: a client that restarts at night has nobody to type one,
so the file's mode guards the key, and `load_private` refuses a file that others can read. Imports no Flower.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    EllipticCurvePublicKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
    load_ssh_public_key,
)

from common.errors import ConfigurationError

MAX_KEY_BYTES = 10_000  # a P-384 key is under 1,000


def generate() -> EllipticCurvePrivateKey:
    """A new private key, from the operating system's entropy."""
    return generate_private_key(SECP384R1())


def private_to_pem(key: EllipticCurvePrivateKey) -> bytes:
    """The key as an OpenSSH private key file without passphrase."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def write_private(path: Path, content: bytes) -> None:
    """Write a secret to a new file that only its owner can read, from its first byte on.

    Raises:
        ConfigurationError: the file exists; a key is never overwritten.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigurationError(f"{path}: exists and would be overwritten; move it away first") from None
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def load_private(path: Path) -> EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        ConfigurationError: no such file, readable by group or others, no OpenSSH private key, passphrase, other curve.
    """
    content = _read(path, secret=True)
    try:
        key = load_ssh_private_key(content, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: it wants a passphrase
        raise ConfigurationError(f"{path}: not an OpenSSH private key without passphrase; make a new one") from None
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise ConfigurationError(f"{path}: key must be on the curve P-384 (nistp384); make a new one")
    return key


def public_line(key: EllipticCurvePublicKey | EllipticCurvePrivateKey) -> str:
    """`ecdsa-sha2-nistp384 AAAA...`: the public half as one line of OpenSSH, without comment or line end."""
    public = key.public_key() if isinstance(key, EllipticCurvePrivateKey) else key
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def load_public(text: str, where: str = "public key") -> EllipticCurvePublicKey:
    """Read one public line; a comment after it is ignored. `where` names the source in errors.

    Raises:
        ConfigurationError: not one OpenSSH line, or another kind of key or curve.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    remedy = "give the line `ecdsa-sha2-nistp384 AAAA...` that the site's `key.pub` holds"
    if "PRIVATE KEY" in text:
        raise ConfigurationError(f"{where}: is a private key, which never leaves its site; {remedy}")
    if len(lines) != 1 or len(text) > MAX_KEY_BYTES:
        raise ConfigurationError(f"{where}: must be one line; {remedy}")
    try:
        key = load_ssh_public_key(lines[0].strip().encode())
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigurationError(f"{where}: not an OpenSSH public key; {remedy}") from None
    if not isinstance(key, EllipticCurvePublicKey) or not isinstance(key.curve, SECP384R1):
        raise ConfigurationError(f"{where}: key must be on the curve P-384 (nistp384); {remedy}")
    return key


def read_public(path: Path) -> EllipticCurvePublicKey:
    """Read a file that holds one public line. Raises ConfigurationError, see `load_public`."""
    try:
        return load_public(_read(path).decode("ascii"), str(path))
    except UnicodeDecodeError:
        raise ConfigurationError(f"{path}: not an OpenSSH public key; name the site's `key.pub`") from None


def as_flower_bytes(public: EllipticCurvePublicKey) -> bytes:
    """The form in which Flower stores and compares a node's key: PEM of SubjectPublicKeyInfo."""
    return public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def fingerprint(public: EllipticCurvePublicKey) -> str:
    """Thirty digits that name the key, in groups of five: `01234 56789 ...`, see `spoken`."""
    return spoken(public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


def spoken(content: bytes) -> str:
    """Thirty decimal digits of the content's sha256, in groups of five.

    Digits, because two people of different tongues read them to each other without a spelling alphabet; thirty,
    because finding another content with the same digits then takes 10^30 (2^99) trials.
    """
    digits = f"{int.from_bytes(hashlib.sha256(content).digest(), 'big') % 10**30:030d}"
    return " ".join(digits[start : start + 5] for start in range(0, 30, 5))


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_KEY_BYTES:
                raise ConfigurationError(f"{path}: not a key file of at most {MAX_KEY_BYTES} bytes; check the path")
            if secret and os.name == "posix" and status.st_mode & 0o077:
                mode = stat.S_IMODE(status.st_mode)
                raise ConfigurationError(f"{path}: mode {mode:04o} lets others read the key; run chmod 600 on it")
            return file.read()
    except FileNotFoundError:
        raise ConfigurationError(f"{path}: no such file; check the path") from None
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read ({type(error).__name__}); check its owner and mode") from None
