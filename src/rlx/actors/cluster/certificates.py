"""An authority of certificates that lives for one moment. Needs cryptography, rlx[cluster]."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CLOCK_TOLERANCE = datetime.timedelta(days=1)
"""How much a machine's clock may be behind that of the machine where the key was made."""


class Authority:
    """Signs certificates for `days`; its own key is never written anywhere."""

    def __init__(self, days: int) -> None:
        now = datetime.datetime.now(datetime.UTC)
        self._valid = (now - CLOCK_TOLERANCE, now + datetime.timedelta(days=days))
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("rlx cluster authority")
        uses = _key_usage(key_cert_sign=True, crl_sign=True)
        builder = self._builder(self._name, self._key.public_key(), x509.BasicConstraints(ca=True, path_length=0), uses)
        self._certificate = builder.sign(self._key, hashes.SHA256())
        self.certificate = _pem(self._certificate)

    def issue(self) -> tuple[str, str]:
        """Return a certificate for both sides of TLS, and its private key, in PEM."""
        key = ec.generate_private_key(ec.SECP256R1())
        both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
        uses = _key_usage(digital_signature=True)
        builder = self._builder(_name("rlx cluster"), key.public_key(), x509.BasicConstraints(False, None), uses)
        builder = builder.add_extension(both, critical=False)
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return _pem(builder.sign(self._key, hashes.SHA256())), private.decode()

    def _builder(
        self,
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        basic: x509.BasicConstraints,
        uses: x509.KeyUsage,
    ) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(public_key)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(self._valid[0]).not_valid_after(self._valid[1])
        builder = builder.add_extension(basic, critical=True).add_extension(uses, critical=True)
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        own = x509.SubjectKeyIdentifier.from_public_key(public_key)
        return builder.add_extension(signer, critical=False).add_extension(own, critical=False)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_usage(**uses: bool) -> x509.KeyUsage:
    every = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    every += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**(dict.fromkeys(every, False) | uses))


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(serialization.Encoding.PEM).decode()
