"""A cluster's token and certificates: made once, read by their owner alone; nodes sign their own, TLS takes them."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from forge_ray.cluster import identity
from forge_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


def _modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()}


def test_it_is_made_once_and_nobody_else_reads_it() -> None:
    place = identity.make("c")
    token = identity.token("c")
    assert len(token) == 64
    assert _modes(place) == {0o600}
    assert stat.S_IMODE((place / identity.NODE).stat().st_mode) == 0o700
    (place / identity.NODE / identity.TOKEN).chmod(0o644)
    assert identity.make("c") == place
    assert identity.token("c") == token
    assert _modes(place) == {0o600}
    assert not list(place.glob(".new-*"))
    identity.make("d")
    assert identity.token("d") != token


def test_half_of_one_and_none_are_errors() -> None:
    with pytest.raises(ConfigError, match="nothing is known"):
        identity.token("c")
    place = identity.make("c")
    (place / identity.NODE / identity.CA_KEY).unlink()
    with pytest.raises(ConfigError, match="not whole") as caught:
        identity.make("c")
    assert identity.CA_KEY in str(caught.value.got)


def test_a_node_keeps_its_certificate_until_it_no_longer_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, out = identity.make("c") / identity.NODE, tmp_path / "tls"
    assert identity.issue(node, out)
    assert not identity.issue(node, out)
    assert _modes(out) == {0o600}
    (out / identity.KEY).write_bytes(identity._pem_of_key(identity._new_key()))
    assert identity.issue(node, out), "a certificate without its key"
    assert identity.issue(identity.make("d") / identity.NODE, out), "of another authority"
    assert identity.issue(node, out)
    monkeypatch.setattr(identity, "_RENEW_DAYS", identity._NODE_DAYS + 1)
    assert identity.issue(node, out), "about to end"
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    other = [*identity._addresses(), identity.ipaddress.ip_address("192.0.2.7")]
    monkeypatch.setattr(identity, "_addresses", lambda: other)
    assert identity.issue(node, out), "for an address that it has not"


def _shake_hands(server: Path, client: Path, server_ca: Path, client_ca: Path) -> bool:
    """Whether two who ask each other for a certificate come together, at an address and not at a name."""
    listening = socket.create_server(("127.0.0.1", 0))
    ends = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ends.load_cert_chain(server / identity.CERTIFICATE, server / identity.KEY)
    ends.load_verify_locations(server_ca)
    ends.verify_mode = ssl.CERT_REQUIRED

    def serve() -> None:
        try:
            connection, _ = listening.accept()
            with ends.wrap_socket(connection, server_side=True) as safe:
                safe.sendall(b"yes")
        except (OSError, ssl.SSLError):
            pass

    thread = threading.Thread(target=serve)
    thread.start()
    begins = ssl.create_default_context(cafile=client_ca)
    begins.load_cert_chain(client / identity.CERTIFICATE, client / identity.KEY)
    try:
        with (
            socket.create_connection(listening.getsockname()) as connection,
            begins.wrap_socket(connection, server_hostname="127.0.0.1") as safe,
        ):
            return safe.recv(3) == b"yes"
    except (OSError, ssl.SSLError):
        return False
    finally:
        thread.join()
        listening.close()


def test_nodes_of_a_cluster_trust_each_other_and_nobody_else(tmp_path: Path) -> None:
    ca = {name: identity.make(name) / identity.NODE / identity.CA for name in ("c", "d")}
    for place, name in (("one", "c"), ("two", "c"), ("foreign", "d")):
        identity.issue(ca[name].parent, tmp_path / place)
    assert _shake_hands(tmp_path / "one", tmp_path / "two", ca["c"], ca["c"])
    assert not _shake_hands(tmp_path / "one", tmp_path / "foreign", ca["c"], ca["c"])
    assert not _shake_hands(tmp_path / "foreign", tmp_path / "two", ca["d"], ca["c"])
