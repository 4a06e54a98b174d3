"""Who may enter a cluster: its token, its certificate authority, and the certificates of its nodes.

`make` makes them once for each cluster, below `~/.forge-ray/clusters/NAME`, readable by their owner alone:

```
node/token            what Ray asks of every client; never in YAML, in a command line or in a log
node/ca.pem           the authority: nodes trust who has a certificate of it
node/ca-key.pem       with which a node signs its own
```

The launcher copies `node/` to every node, also to those that the autoscaler starts later, and `cluster/node.sh` runs
this module there before Ray starts: it signs a certificate for the node's own addresses. So nothing has to be online to
hand certificates out, a node that comes at night has one, and its key never leaves it. The price: whoever reads a
node's files can sign more of them. Ray's TLS knows no node from another, so such a thief is in the cluster already; an
authority serves one cluster alone. On Kubernetes the same files are a Secret.

Imports nothing of Ray.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import secrets
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from forge_ray import runtime
from forge_ray.errors import ConfigError, StorageError

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

HOME = "~/.forge-ray/clusters"
"""On the machine from which clusters are started."""
NODE = "node"
"""Below a cluster's folder there: what its nodes get."""
ON_NODES = "~/.forge-ray/node"
"""Where nodes get it; their own certificate lies in `tls` beside it."""
TOKEN, CA, CA_KEY, CERTIFICATE, KEY = "token", "ca.pem", "ca-key.pem", "cert.pem", "key.pem"
_CA_DAYS, _NODE_DAYS, _RENEW_DAYS = 1825, 365, 30
_SKEW = datetime.timedelta(hours=1)


def folder(name: str) -> Path:
    """Where a cluster's identity lies, and what we know of it."""
    return Path(HOME).expanduser() / name


def make(name: str) -> Path:
    """A cluster's identity, made if there is none; never half of it.

    Returns:
        Its folder.

    Raises:
        StorageError: It cannot be kept.
        ConfigError: There is half of one, or others can read it and its mode cannot be mended.
    """
    place = folder(name)
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not (place / NODE).exists():
            new = Path(tempfile.mkdtemp(prefix=".new-", dir=place))
            try:
                _write_new(new, name)
                new.rename(place / NODE)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        tighten(place / NODE)
    except OSError as error:
        raise StorageError(
            f"a cluster's token and certificates cannot be kept: {error.strerror}",
            got=place,
            do="make room in your home folder, or mend its rights",
        ) from None
    return place


def tighten(node: Path) -> None:
    """Takes an identity's files from group and others.

    Raises:
        ConfigError: One is missing, or others can read it and its mode cannot be mended.
    """
    missing = [name for name in (TOKEN, CA, CA_KEY) if not (node / name).is_file()]
    if missing:
        raise ConfigError(
            "a cluster's identity is not whole",
            got=f"{node} lacks {', '.join(missing)}",
            do="bring it back from where the cluster was started, or remove the folder and start the cluster anew",
        )
    for name in (TOKEN, CA, CA_KEY):
        runtime.tighten(node / name)


def token(name: str) -> str:
    """What Ray asks of clients of a cluster.

    Raises:
        ConfigError: The cluster was not started from this machine.
    """
    try:
        return (folder(name) / NODE / TOKEN).read_text(encoding="ascii").strip()
    except OSError:
        raise ConfigError(
            "nothing is known here of this cluster's token",
            got=f"{name}: no {folder(name) / NODE / TOKEN}",
            do=f"start it with `forge cluster up`, or copy {HOME}/{name} from where that was done",
        ) from None


def issue(node: Path, out: Path) -> bool:
    """A certificate for this machine's addresses, unless there is one that is still good.

    Args:
        node: Folder with the authority.
        out: Folder for the certificate and its key.

    Returns:
        Whether it is a new one.

    Raises:
        ConfigError: The authority is not whole.
    """
    from cryptography.hazmat.primitives import serialization

    tighten(node)
    ca = _certificate(node / CA)
    if _still_good(out, ca):
        return False
    key = serialization.load_pem_private_key((node / CA_KEY).read_bytes(), password=None)
    own = _new_key()
    certificate = _signed(socket.gethostname(), own, ca, key, _NODE_DAYS, _addresses())
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    # The certificate last: without it, or with that of another key, nothing starts and the next try makes both again.
    (out / CERTIFICATE).unlink(missing_ok=True)
    put(out / KEY, _pem_of_key(own))
    put(out / CERTIFICATE, _pem(certificate))
    return True


def _write_new(node: Path, name: str) -> None:
    key = _new_key()
    put(node / TOKEN, secrets.token_hex(32).encode())
    put(node / CA_KEY, _pem_of_key(key))
    put(node / CA, _pem(_signed(f"forge-ray {name}"[:64], key, None, key, _CA_DAYS, [])))


def put(path: Path, data: bytes) -> None:
    """A file that only its owner reads, from its first byte on; it is whole or not there."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as sink:
        sink.write(data)
        sink.flush()
        os.fsync(sink.fileno())
    new.rename(path)


def _still_good(out: Path, ca: x509.Certificate) -> bool:
    """Whether a certificate of this authority is there with its key, for all addresses, and for a while yet."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    try:
        found = _certificate(out / CERTIFICATE)
        key = serialization.load_pem_private_key((out / KEY).read_bytes(), password=None)
        found.verify_directly_issued_by(ca)
    except (OSError, ValueError, TypeError, InvalidSignature):
        return False
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    wanted = {str(address) for address in _addresses()}
    until = found.not_valid_after_utc - datetime.timedelta(days=_RENEW_DAYS)
    return (
        key.public_key() == found.public_key()
        and wanted <= {str(address) for address in names.get_values_for_type(x509.IPAddress)}
        and datetime.datetime.now(datetime.UTC) < until
    )


def _addresses() -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """All of this machine's, loopback among them: which of them Ray takes for its own is Ray's business."""
    families = (socket.AF_INET, socket.AF_INET6)
    rows = [row for rows in psutil.net_if_addrs().values() for row in rows if row.family in families]
    return sorted({ipaddress.ip_address(row.address.partition("%")[0]) for row in rows}, key=str)


def _certificate(path: Path) -> x509.Certificate:
    from cryptography import x509

    return x509.load_pem_x509_certificate(path.read_bytes())


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _signed(
    name: str,
    own: EllipticCurvePrivateKey,
    ca: x509.Certificate | None,
    ca_key: EllipticCurvePrivateKey,
    days: int,
    addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address],
) -> x509.Certificate:
    """A certificate for a key; an authority's own where none is given."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca.subject if ca else subject)
        .public_key(own.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=0 if ca is None else None), critical=True)
    )
    if ca is not None:
        names = [x509.DNSName("localhost"), x509.DNSName(socket.gethostname())]
        names += [x509.IPAddress(address) for address in addresses]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _pem_of_key(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def main() -> None:
    """On a node: a certificate for it, from what the launcher copied there."""
    node = Path(ON_NODES).expanduser()
    if issue(node, node.with_name("tls")):
        print(f"forge-ray: a certificate for {socket.gethostname()}", flush=True)


if __name__ == "__main__":
    main()
