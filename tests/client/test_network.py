"""The way out: to one server, by the site file alone; and one line with a remedy for everything that goes wrong."""

from __future__ import annotations

import select
import socket
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from client.fleet import Fleet
from client.network import Limit, NetworkError, authority_digest, http_client, trusted
from client.site_file import ServerTerms
from common.errors import ConfigurationError
from common.keys import generate
from tests.client.coordinator import Authority, Coordinator
from tests.client.hospitals import write_study


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy that tunnels (CONNECT), and notes who wanted to go where; or refuses."""

    daemon_threads = True

    def __init__(self, *, refuses: bool = False) -> None:
        self.asked: list[bytes] = []
        proxy = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                proxy.asked.append(self.rfile.readline().strip())
                while self.rfile.readline().strip():
                    pass
                method, target, _ = proxy.asked[-1].split(b" ")
                if refuses or method != b"CONNECT":
                    self.wfile.write(b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n")
                    return
                host, port = target.decode().rsplit(":", 1)
                with socket.create_connection((host, int(port))) as beyond:
                    self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    both = [self.connection, beyond]
                    while True:
                        for ready in select.select(both, [], [])[0]:
                            data = ready.recv(65536)
                            if not data:
                                return
                            both[ready is self.connection].sendall(data)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *_exception: object) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ca")


@pytest.fixture
def coordinator(tmp_path: Path, authority: Authority) -> Iterator[Coordinator]:
    with Coordinator(write_study(tmp_path), authority.context()) as server:
        yield server


def terms(port: int, authority: Authority, host: str = "localhost", **more: Any) -> ServerTerms:
    return ServerTerms(address=f"{host}:{port}", ca=str(authority.file), **more)


def fault(server: ServerTerms) -> str:
    """Why the server's health cannot be asked for."""
    with Fleet(server, generate(), timeout=20) as fleet, pytest.raises(NetworkError) as caught:
        fleet.health()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_right_certificate_is_accepted(coordinator: Coordinator, authority: Authority) -> None:
    """The study's authority and a name that the certificate holds: the server is asked, and shows its certificate."""
    for host in ("localhost", "127.0.0.1"):
        with Fleet(terms(coordinator.port, authority, host), generate()) as fleet:
            assert fleet.health().certificate is not None


def test_another_authority_is_refused(coordinator: Coordinator, tmp_path: Path) -> None:
    """A certificate of an authority that is not in the site file is refused, whatever this machine trusts."""
    assert "does not come from the authority" in fault(terms(coordinator.port, Authority(tmp_path / "other")))


@pytest.mark.parametrize(
    ("tls", "expected"),
    [
        ({"name": "other.example"}, "is for another name than `localhost`"),
        ({"days": (-9, -2)}, "has expired; check this machine's clock"),
        ({"days": (2, 5)}, "is not valid yet; check this machine's clock"),
    ],
)
def test_a_wrong_certificate_is_one_line(
    tls: dict[str, Any], expected: str, tmp_path: Path, authority: Authority
) -> None:
    """Another name, an expired certificate and one that is not valid yet each say what to do."""
    with Coordinator(write_study(tmp_path), authority.context(**tls)) as server:
        assert expected in fault(terms(server.port, authority))


def test_a_name_that_nobody_knows(authority: Authority) -> None:
    """A failed look-up names the name."""
    assert "name look-up failed" in fault(terms(8443, authority, "nowhere.invalid"))


def test_nobody_listens(authority: Authority) -> None:
    """A closed port is told from a wrong name."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "refuses connections" in fault(terms(port, authority))


def test_no_tls_there(tmp_path: Path, authority: Authority) -> None:
    """A server without TLS is not talked to, and the line says so."""
    with Coordinator(write_study(tmp_path)) as server:
        assert "does not speak TLS as expected" in fault(terms(server.port, authority))


def test_something_else_answers(coordinator: Coordinator, authority: Authority) -> None:
    """A web server that is no wardround server is named as one."""
    coordinator.spoil = lambda _path, _status, headers, _body: (200, headers, b"<html>")
    assert "no wardround server" in fault(terms(coordinator.port, authority))


def test_nobody_answers(authority: Authority) -> None:
    """A connection that is accepted and then silent ends with a line about firewalls."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = terms(silent.getsockname()[1], authority)
        with Fleet(server, generate(), timeout=0.2) as fleet, pytest.raises(NetworkError, match="no answer in time"):
            fleet.health()


def test_variables_of_the_environment_are_not_read(
    coordinator: Coordinator, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HTTPS_PROXY and the like divert nothing, and SSL_CERT_FILE adds nobody to those who are trusted."""
    other = Authority(tmp_path / "other")
    with Proxy() as proxy, Coordinator(write_study(tmp_path), other.context()) as stranger:
        for name in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "https_proxy", "http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            monkeypatch.setenv(name, str(other.file))
        monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys.log"))
        with Fleet(terms(coordinator.port, authority), generate()) as fleet:
            fleet.health()
        assert "does not come from the authority" in fault(terms(stranger.port, authority))
        assert proxy.asked == []
        assert not (tmp_path / "keys.log").exists()


def test_the_site_files_proxy_is_used_for_everything(coordinator: Coordinator, authority: Authority) -> None:
    """With `proxy`, every connection goes through it, to this machine, too; TLS is with the server, not with it."""
    key = generate()
    coordinator.admit(key.public_key())
    with Proxy() as proxy, Fleet(terms(coordinator.port, authority, proxy=proxy.url), key) as fleet:
        assert fleet.health().certificate is not None
        fleet.activate()
        assert fleet.pull(Limit.of([])) is None
        assert set(proxy.asked) == {b"CONNECT localhost:%d HTTP/1.1" % coordinator.port}


def test_a_proxy_that_refuses_is_named(coordinator: Coordinator, authority: Authority) -> None:
    """A proxy's no is told from the server's."""
    with Proxy(refuses=True) as proxy:
        assert "proxy of the site file: it refused localhost" in fault(
            terms(coordinator.port, authority, proxy=proxy.url)
        )


def test_a_proxy_that_is_not_there_is_named(coordinator: Coordinator, authority: Authority) -> None:
    """A proxy that cannot be reached is not the server's fault, and nothing goes round it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert "through the proxy: refuses connections" in fault(
        terms(coordinator.port, authority, proxy=f"http://127.0.0.1:{port}")
    )
    assert coordinator.calls == []


def test_another_host_is_never_asked(authority: Authority) -> None:
    """The client refuses a request for any address but the server's, before a connection is made."""
    server = terms(8443, authority)
    with http_client(server) as client:
        for url in ("https://localhost:1/", "http://localhost:8443/", "https://example.org:8443/"):
            with pytest.raises(NetworkError, match="was stopped"):
                client.get(httpx.URL(url))


def test_the_authoritys_digest_follows_its_certificates(authority: Authority, tmp_path: Path) -> None:
    """Equal certificates, equal digest, whatever stands around them; another authority has another."""
    first = authority_digest(terms(1, authority))
    authority.file.write_bytes(b"# a comment\n" + authority.file.read_bytes())
    assert authority_digest(terms(1, authority)) == first
    assert authority_digest(terms(1, Authority(tmp_path / "other"))) != first
    assert authority_digest(ServerTerms(address="localhost:1", plaintext=True)) == ""


@pytest.mark.parametrize("content", [b"", b"no certificate", None])
def test_a_file_without_an_authority_is_one_line(content: bytes | None, authority: Authority) -> None:
    """A missing or wrong `ca` file says what belongs there."""
    authority.file.unlink()
    if content is not None:
        authority.file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"holds no certificate authority .* put there the ca\.crt"):
        Fleet(terms(1, authority), generate())


def test_an_authority_that_was_read_is_not_read_again(tmp_path: Path) -> None:
    """Digest and trust come from one reading: a file exchanged later changes neither, and no connection opens it."""
    authority = Authority(tmp_path / "ca")
    server = terms(1, authority)
    digest, trust = trusted(server)
    assert digest == authority_digest(server)
    Path(server.ca or "").unlink()
    Fleet(server, generate(), trust=trust).close()
