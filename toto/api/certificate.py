"""The server's own TLS: a certificate authority that lives in toto's state, and a certificate that it signs.

Machines are given the authority's certificate (`ca.pem`) and trust nothing else. So both are valid for all times: a
machine whose clock is wrong reaches toto, and no certificate runs out. What is not trusted any more is replaced.
"""

import ipaddress
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from toto.base import files, paths

CERTIFICATE: Final = "tls.pem"
KEY: Final = "tls.key"
_BEGIN: Final = datetime(1970, 1, 1, tzinfo=UTC)
_END: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280's word for "no end"


class Files(NamedTuple):
    """PEM files: the authority's certificate for machines, the server's certificate and its private key."""

    ca: Path
    certificate: Path
    key: Path


def authority() -> Path:
    """The authority's certificate, for machines; there is none before the server's first start with TLS of its own."""
    return paths.state_home() / "api" / "ca.pem"


def own(names: Sequence[str]) -> Files:
    """toto's certificate for these host names and addresses; what is missing is made, and made anew for new names."""
    place = paths.private_folder(authority().parent)
    tls = paths.private_folder(place / "tls")  # all that the server itself sees
    made = Files(authority(), tls / CERTIFICATE, tls / KEY)
    issuer, secret = _authority(made.ca, place / "ca.key")
    if made.certificate.exists() and made.key.exists() and _is_for(made.certificate, names, issuer):
        return made
    key = ec.generate_private_key(ec.SECP256R1())
    built = (
        _builder("toto", issuer.subject, key.public_key())
        .add_extension(x509.SubjectAlternativeName(_alternatives(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(secret.public_key()), critical=False)
        .sign(secret, hashes.SHA256())
    )
    files.write_bytes(made.key, _pem(key))
    files.write_bytes(made.certificate, built.public_bytes(serialization.Encoding.PEM))
    return made


def _authority(file: Path, key_file: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    if file.exists() and key_file.exists():
        key = serialization.load_pem_private_key(key_file.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return x509.load_pem_x509_certificate(file.read_bytes()), key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "toto's own authority")])
    built = (
        _builder("toto's own authority", name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    files.write_bytes(key_file, _pem(key))
    files.write_bytes(file, built.public_bytes(serialization.Encoding.PEM), 0o644)
    return built, key


def _builder(called: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, called)]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
    )


def _usage() -> x509.KeyUsage:
    words = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "encipher_only"), False
    )
    return x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, decipher_only=False, **words)


def _alternatives(names: Sequence[str]) -> list[x509.GeneralName]:
    found: list[x509.GeneralName] = []
    for each in sorted({*names}):
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(each)))
        except ValueError:
            found.append(x509.DNSName(each))
    return found


def _is_for(file: Path, names: Sequence[str], authority: x509.Certificate) -> bool:
    found = x509.load_pem_x509_certificate(file.read_bytes())
    has = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    try:
        found.verify_directly_issued_by(authority)
    except (ValueError, InvalidSignature):
        return False
    return {*has} == {*_alternatives(names)}


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
