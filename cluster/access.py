"""What the settings say of certificates and tokens, in the form that services and clients take it:
who this deployment's processes are, whom a gateway lets in, and what is shown to a gateway.
"""

from dataclasses import dataclass

from cluster.config import ClientSettings, GatewaySettings, Settings, SettingsError, TlsSettings
from services.tls import Tls
from services.tokens import TokenFile, first_token


@dataclass(frozen=True, slots=True)
class Access:
    """A gateway, and what is shown to it."""

    endpoint: str
    tls: Tls | None = None
    token: str | None = None


def access(settings: Settings, endpoint: str | None = None) -> Access:
    """To the gateway of the settings, or to another. What the section `client` leaves open is taken
    from the deployment's own sections, so that its own file is enough on its own machines.

    Raises `TokensUnusable`.
    """
    client = settings.client
    tls = _client_tls(client) or process_tls(settings.tls)
    return Access(endpoint or settings.gateway.endpoint, tls, _token(client, settings.gateway))


def process_tls(settings: TlsSettings) -> Tls | None:
    """Of every process of the deployment; None where it speaks without TLS."""
    if settings.ca_file is None:
        return None
    return Tls(
        ca_file=settings.ca_file,
        cert_file=settings.cert_file,
        key_file=settings.key_file,
        server_name=settings.server_name,
    )


def accepted_tokens(settings: GatewaySettings) -> TokenFile | None:
    """None: everybody is let in. Raises `TokensUnusable`."""
    return None if settings.tokens_file is None else TokenFile(settings.tokens_file)


def _client_tls(client: ClientSettings) -> Tls | None:
    if client.ca_file is None:
        return None
    return Tls(
        ca_file=client.ca_file,
        cert_file=client.cert_file,
        key_file=client.key_file,
        server_name=client.server_name,
    )


def _token(client: ClientSettings, gateway: GatewaySettings) -> str | None:
    if client.token is not None:
        token = client.token.get_secret_value()
        if not token.isascii() or not token.isprintable():
            raise SettingsError("client.token has characters that a header cannot carry")
        return token
    file = client.token_file or gateway.tokens_file
    return None if file is None else first_token(file)
