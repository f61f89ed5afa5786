"""One encrypted way out: to the server of the site file, through its proxy if it names one, and nowhere else.

How much may come in is bounded here, too: each answer, and (`Limit`) a message, by the study's network.

Decisions a reader would question:

- Nothing of the environment counts: no HTTPS_PROXY, no SSL_CERT_FILE, no .netrc. What a data engineer wrote into the
  site file is what happens, and an audit of one file is an audit of the traffic.
- Redirects are not followed, and a request for another host raises: a server cannot send the client elsewhere.
- Only the study's own authority is trusted, not the machine's list. Whoever inspects TLS on the way is refused, too.
- Answers are read up to a bound and never unpacked: a compressed answer could be a thousand times its size.
"""

from __future__ import annotations

import hashlib
import math
import re
import socket
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from common.errors import ConfigurationError, WardroundError
from common.keys import spoken

if TYPE_CHECKING:
    from client.site_file import ServerTerms

ANSWER_BYTES = 1_000_000  # any answer but an object of a message
PIECE_BYTES = 5 * 2**20  # Flower cuts arrays into such pieces
OBJECT_BYTES = PIECE_BYTES + 2**16
MESSAGE_OVERHEAD, OBJECT_OVERHEAD = 65_536, 4_096  # bytes: heads, names, and numpy's 128 an array
OBJECT_PATH = "/v1/fleet/pull-object"
TIMEOUT = 30.0  # seconds without any progress
MAX_CA_BYTES = 200_000

_VERSION, _DIGEST = re.compile(r"[0-9A-Za-z.+-]{1,40}"), re.compile(r"[0-9a-f]{64}")
_EXPIRED, _NOT_YET = 10, 9  # X509_V_ERR_CERT_HAS_EXPIRED, X509_V_ERR_CERT_NOT_YET_VALID
_OTHER_NAME = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


class NetworkError(WardroundError):
    """The server cannot be reached, or is not who it should be: one line with what to do."""


class ContestedError(WardroundError):
    """Another process uses this site's key. No NetworkError: trying again helps nobody."""


class TooLargeError(NetworkError):
    """An answer beyond its bound; the rest of it was not read."""


@dataclass(frozen=True)
class Limit:
    """The most that a message may have: bytes, and objects that Flower cuts it into."""

    nbytes: int
    objects: int

    @staticmethod
    def of(arrays: Iterable[int]) -> Limit:
        """The limit for a message with weights of these sizes in bytes."""
        sizes = list(arrays)
        objects = 4 + sum(1 + math.ceil((size + 128) / PIECE_BYTES) for size in sizes)  # 4: message, content, records
        return Limit(sum(sizes) + objects * OBJECT_OVERHEAD + MESSAGE_OVERHEAD, objects)


@dataclass(frozen=True)
class Health:
    """What the server says of itself to everybody; `certificate` is its TLS certificate in DER, if there is TLS."""

    version: str
    wire: int
    study: str
    code: str
    time: float
    certificate: bytes | None


def http_client(server: ServerTerms, timeout: float = TIMEOUT, trust: ssl.SSLContext | None = None) -> httpx.Client:
    """A client for this server alone, which trusts `trust` or else the authority's file. Raises ConfigurationError."""
    context = None if server.plaintext else trust or tls_context(server)
    proxy = None if server.proxy is None else httpx.Proxy(server.proxy)
    inner = httpx.HTTPTransport(verify=context or _no_tls(), trust_env=False, proxy=proxy)
    return httpx.Client(
        transport=_OneServer(inner, httpx.URL(base_url(server))),
        timeout=timeout,
        follow_redirects=False,
        trust_env=False,
    )


def base_url(server: ServerTerms) -> str:
    """`https://host:port`."""
    return f"{'http' if server.plaintext else 'https'}://{server.address}"


def tls_context(server: ServerTerms) -> ssl.SSLContext:
    """TLS that trusts the authority of the site file and nothing else."""
    return _trusting(_authority(server))


def trusted(server: ServerTerms) -> tuple[str, ssl.SSLContext | None]:
    """sha256 over the authority's certificates and TLS that trusts them, from one reading; "" and None for plaintext.

    Whoever exchanges the file afterwards changes nothing.
    """
    if server.plaintext:
        return "", None
    found = _authority(server)
    return _digest(found), _trusting(found)


def authority_digest(server: ServerTerms) -> str:
    """sha256 over the authority's certificates; "" for plaintext."""
    return "" if server.plaintext else _digest(_authority(server))


def _digest(authority: list[x509.Certificate]) -> str:
    found = sorted(one.public_bytes(Encoding.DER) for one in authority)
    return hashlib.sha256(b"".join(found)).hexdigest()


def _trusting(authority: list[x509.Certificate]) -> ssl.SSLContext:
    context = _no_tls()
    context.load_verify_locations(cadata="".join(one.public_bytes(Encoding.PEM).decode("ascii") for one in authority))
    return context


def authority_spoken(server: ServerTerms) -> str:
    """The authority's digits, as the coordinator's `server init` prints them: for two people and a telephone."""
    return ", ".join(spoken(one.public_bytes(Encoding.DER)) for one in _authority(server))


def health_in(response: httpx.Response, server: ServerTerms) -> Health:
    """What `GET /health` said. Raises NetworkError if that was no wardround server."""
    stranger = NetworkError(
        f"{server.address}: something answers there, but no wardround server; check address and port"
    )
    try:
        found = response.json() if response.status_code == httpx.codes.OK else {}
        health = Health(
            version=_word(found["wardround"], _VERSION),
            wire=int(found["wire"]),
            study=_word(found["study"], _DIGEST),
            code=_word(found["code"], _DIGEST),
            time=float(found["time"]),
            certificate=_certificate(response),
        )
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise stranger from None
    if not math.isfinite(health.time):
        raise stranger
    return health


def _word(found: object, pattern: re.Pattern[str]) -> str:
    """A server's word that people will read: of the form agreed, so that it cannot steer their terminal."""
    if not isinstance(found, str) or not pattern.fullmatch(found):
        raise ValueError
    return found


def _certificate(response: httpx.Response) -> bytes | None:
    stream = response.extensions.get("network_stream")
    tls = stream.get_extra_info("ssl_object") if stream is not None else None
    return tls.getpeercert(True) if tls is not None else None


def explain(error: Exception, server: ServerTerms) -> str:
    """One line on why a request failed: what is wrong, what to do."""
    address, chain = server.address, list(_chain(error))
    for cause in chain:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _explain_certificate(cause, server)
    for cause in chain:
        if isinstance(cause, httpx.ProxyError):
            return f"proxy of the site file: it refused {address} ({cause}); ask IT to allow this one connection"
    through = address if server.proxy is None else f"{address} through the proxy"
    for cause in chain:
        if isinstance(cause, socket.gaierror):
            name = server.host if server.proxy is None else "the proxy's name"
            return f"{name}: name look-up failed; check the address in the site file, and the name server"
        if isinstance(cause, ConnectionRefusedError):
            return f"{through}: refuses connections; check address and port, and whether the server runs"
        if isinstance(cause, ssl.SSLError):
            return f"{through}: does not speak TLS as expected ({cause.reason}); check address and port"
        if isinstance(cause, httpx.TimeoutException | TimeoutError):
            return f"{through}: no answer in time; check that the firewall lets this one connection out"
    kind = type(chain[-1]).__name__
    return f"{through}: the connection failed ({kind}); check the network, and whether the server runs"


def _explain_certificate(error: ssl.SSLCertVerificationError, server: ServerTerms) -> str:
    address = server.address
    if error.verify_code == _EXPIRED:
        return f"{address}: its certificate has expired; check this machine's clock, or ask the coordinator to renew it"
    if error.verify_code == _NOT_YET:
        return f"{address}: its certificate is not valid yet; check this machine's clock"
    if error.verify_code in _OTHER_NAME:
        return (
            f"{address}: its certificate is for another name than `{server.host}`; dial a name that the coordinator "
            "has put into it, or have this one added"
        )
    return (
        f"{address}: its certificate does not come from the authority in {server.ca}; ask the coordinator for ca.crt "
        "over a way that you trust, and do not connect until its fingerprint is confirmed"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _no_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks names, reads no variable, trusts nobody yet
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _authority(server: ServerTerms) -> list[x509.Certificate]:
    path = Path(server.ca or "")
    try:
        with path.open("rb") as file:
            return x509.load_pem_x509_certificates(file.read(MAX_CA_BYTES))
    except (OSError, ValueError) as error:
        raise ConfigurationError(
            f"{path}: holds no certificate authority ({type(error).__name__}); put there the ca.crt that the "
            "coordinator gave to this site"
        ) from None


class _OneServer(httpx.BaseTransport):
    """Passes on requests to one server, and answers of bounded size."""

    def __init__(self, inner: httpx.BaseTransport, server: httpx.URL) -> None:
        self._inner, self._server = inner, server

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        wanted = (request.url.scheme, request.url.host, request.url.port)
        if wanted != (self._server.scheme, self._server.host, self._server.port):
            raise NetworkError(f"a request to another host than {self._server} was stopped; a defect, report it")
        request.headers["accept-encoding"] = "identity"
        response = self._inner.handle_request(request)
        bound = OBJECT_BYTES if request.url.path == OBJECT_PATH else ANSWER_BYTES
        if response.headers.get("content-encoding", "identity") != "identity":
            response.close()
            raise NetworkError(f"{self._server}: sent a compressed answer, which was not asked for; report it")
        assert isinstance(response.stream, httpx.SyncByteStream)
        return httpx.Response(
            response.status_code,
            headers=response.headers,
            stream=_Bounded(response.stream, bound),
            extensions=response.extensions,
        )

    def close(self) -> None:
        self._inner.close()


class _Bounded(httpx.SyncByteStream):
    """A stream that raises beyond its bound."""

    def __init__(self, inner: httpx.SyncByteStream, bound: int) -> None:
        self._inner, self._bound = inner, bound

    def __iter__(self) -> Iterator[bytes]:
        taken = 0
        for part in self._inner:
            taken += len(part)
            if taken > self._bound:
                raise TooLargeError(f"the server sent an answer of more than {self._bound} bytes; report it")
            yield part

    def close(self) -> None:
        self._inner.close()
