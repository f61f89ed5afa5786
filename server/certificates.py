"""The study's own certificate authority, and the server's certificate from it.

An authority of its own, because hospitals then trust this study's server and nothing else, whatever public
authorities a hospital's machines trust. Its certificate lasts ten years, longer than a study; the server's lasts 397
days and is renewed without asking the hospitals, who hold the authority's. P-384 throughout.
"""

from __future__ import annotations

import datetime
import ipaddress
import re

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common.errors import ConfigurationError

AUTHORITY_DAYS, SERVER_DAYS, RENEW_DAYS = 3653, 397, 30
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_HOST = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.I)
_EARLIER = datetime.timedelta(days=1)  # a hospital's clock may be behind


def check_name(name: str) -> str:
    """A host name or an address, as sites dial it. Raises ConfigurationError."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        if not _HOST.fullmatch(name):
            raise ConfigurationError(
                f"name {name!r}: must be a host name or an IP address, without port, path or `*`; give what sites dial"
            ) from None
        return name.lower()


def authority(key: EllipticCurvePrivateKey, study: str) -> x509.Certificate:
    """A self-signed certificate of a study's authority, for ten years."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"wardround study {study}"[:64])])
    return (
        _builder(name, name, key, AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(authority=True), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def server_certificate(
    key: EllipticCurvePrivateKey,
    names: tuple[str, ...],
    issuer: x509.Certificate,
    issuer_key: EllipticCurvePrivateKey,
) -> x509.Certificate:
    """A certificate for `names` and this machine, for 397 days. Raises ConfigurationError: a name is none."""
    everyone = dict.fromkeys([*(check_name(name) for name in names), *LOOPBACK])
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "wardround server")])
    return (
        _builder(subject, issuer.subject, key, SERVER_DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in everyone]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        .sign(issuer_key, hashes.SHA384())
    )


def key_pem(key: EllipticCurvePrivateKey) -> bytes:
    """A private key in the form that TLS libraries read, which is not OpenSSH's."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def pem(certificate: x509.Certificate) -> bytes:
    """As it stands in a file."""
    return certificate.public_bytes(Encoding.PEM)


def days_left(certificate: x509.Certificate) -> float:
    """Days until it expires; negative once it has."""
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left / datetime.timedelta(days=1)


def _builder(subject: x509.Name, issuer: x509.Name, key: EllipticCurvePrivateKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
