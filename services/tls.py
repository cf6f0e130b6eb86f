"""The certificates of one process, as gRPC wants them: who it is, and whom it believes.

Inside a deployment both ends of a connection show a certificate of the same authority. Addresses
there are numbers that change, so that one name, which each certificate carries, is what is checked
instead. Files are read again when they change: certificates are renewed while we run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc


class TlsUnusable(Exception):
    """A certificate, a key or an authority's certificate cannot be read; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """PEM files. Without `cert_file` a process can only be a client that shows no certificate."""

    ca_file: Path
    cert_file: Path | None = None
    key_file: Path | None = None
    # None: the host of the address.
    server_name: str | None = None

    def check(self) -> None:
        """Raises `TlsUnusable` for a file that cannot be used."""
        self.channel_credentials()

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Of the files as they are now."""
        key, chain = self._pair() or (None, None)
        return grpc.ssl_channel_credentials(_pem(self.ca_file, "CERTIFICATE"), key, chain)

    def server_credentials(self, *, require_client: bool) -> grpc.ServerCredentials:
        """With `require_client`, who shows no certificate of the authority gets no connection."""
        last = self._configuration(require_client=require_client)
        last_seen = self._modified()

        def changed() -> Any:
            """Asked at every handshake, in a thread of gRPC. None: the last one goes on."""
            nonlocal last_seen
            try:
                seen = self._modified()
                if seen == last_seen:
                    return None
                renewed = self._configuration(require_client=require_client)
            except (OSError, TlsUnusable):  # in the middle of being replaced
                return None
            last_seen = seen
            return renewed

        return grpc.dynamic_ssl_server_credentials(last, changed, require_client)

    def _configuration(self, *, require_client: bool) -> grpc.ServerCertificateConfiguration:
        pair = self._pair()
        if pair is None:
            raise TlsUnusable("a server needs a certificate and its key: tls.cert_file is not set")
        authority = _pem(self.ca_file, "CERTIFICATE") if require_client else None
        return grpc.ssl_server_certificate_configuration([pair], authority)

    def _pair(self) -> tuple[bytes, bytes] | None:
        """(key, certificate chain)"""
        if self.cert_file is None or self.key_file is None:
            return None
        return _pem(self.key_file, "PRIVATE KEY"), _pem(self.cert_file, "CERTIFICATE")

    def _modified(self) -> tuple[int, ...]:
        files = (self.ca_file, self.cert_file, self.key_file)
        return tuple(file.stat().st_mtime_ns for file in files if file is not None)


def _pem(file: Path, what: str) -> bytes:
    """gRPC itself says nothing of what is wrong with a file."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TlsUnusable(f"cannot read {file}: {error.strerror}") from None
    if f"{what}-----".encode() not in content:
        raise TlsUnusable(f"{file} holds no {what.lower()} in PEM form")
    return content
