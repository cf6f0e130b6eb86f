"""Certificates of an authority of our own, as PEM files."""

from pathlib import Path

import trustme

from services.tls import Tls

SERVER_NAME = "model1"


class Authority:
    def __init__(self, directory: Path) -> None:
        self._authority = trustme.CA()
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.ca_file = directory / "ca.crt"
        self._authority.cert_pem.write_to_path(str(self.ca_file))

    def issue(self, name: str = "tls", *, dns_name: str = SERVER_NAME) -> Tls:
        """Writes NAME.crt and NAME.key, over what was there."""
        certificate = self._authority.issue_cert(dns_name, "127.0.0.1")
        cert_file = self._directory / f"{name}.crt"
        key_file = self._directory / f"{name}.key"
        cert_file.unlink(missing_ok=True)
        for part in certificate.cert_chain_pems:
            part.write_to_path(str(cert_file), append=True)
        certificate.private_key_pem.write_to_path(str(key_file))
        return Tls(
            ca_file=self.ca_file, cert_file=cert_file, key_file=key_file, server_name=SERVER_NAME
        )

    def believed(self) -> Tls:
        """Of a client that shows no certificate."""
        return Tls(ca_file=self.ca_file, server_name=SERVER_NAME)
