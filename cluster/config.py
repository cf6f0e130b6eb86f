"""What a user may set, read once at the command line and validated.

Three sources, the later wins: one YAML file, environment variables MODEL1_SECTION__KEY, flags.
This is the only module that reads the process's environment. Each component is handed its own
section, never the whole. Knows nothing of Ray, models or sockets.
"""

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

ENVIRONMENT_PREFIX = "MODEL1_"
ENVIRONMENT_SEPARATOR = "__"
MIB = 2**20


class SettingsError(Exception):
    """A setting is unknown or out of range; the message names its source, key and value."""


def _not_empty(value: object) -> object:
    if value == "":
        raise ValueError("it is empty; leave it out instead")
    return value


# Roles run in processes whose working folder is another one.
AbsolutePath: TypeAlias = Annotated[
    Path, BeforeValidator(_not_empty), AfterValidator(Path.absolute)
]


class _Section(BaseModel):
    # Without protected_namespaces pydantic warns of every name that starts with `model`.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ModelSettings(_Section):
    path: AbsolutePath | None = Field(
        None, description="checkpoint directory; none: the shipped model"
    )
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: Literal["cpu", "cuda"] = "cpu"


class TlsSettings(_Section):
    """Of every process of the deployment, on each node; none: no TLS anywhere. Between the roles
    both ends show their certificate."""

    ca_file: AbsolutePath | None = Field(None, description="PEM: who signed the certificates")
    cert_file: AbsolutePath | None = Field(None, description="PEM: what each process shows")
    key_file: AbsolutePath | None = Field(None, description="PEM: its private key")
    server_name: str = Field(
        "model1", min_length=1, description="a DNS name that every certificate has"
    )

    @model_validator(mode="after")
    def _all_or_none(self) -> Self:
        files = {"ca_file": self.ca_file, "cert_file": self.cert_file, "key_file": self.key_file}
        missing = [name for name, file in files.items() if file is None]
        if missing and len(missing) < len(files):
            raise ValueError(f"{' and '.join(missing)} must be set too, or none of the three files")
        return self


class TopologySettings(_Section):
    attention_workers: int = Field(1, ge=1, le=1024)
    expert_groups: int = Field(2, ge=1, le=1024)
    expert_replicas: int = Field(1, ge=1, le=1024)
    gateways: Literal["one", "per_node"] = Field(
        "one", description="per_node: one on each node with attention workers"
    )


class GatewaySettings(_Section):
    host: str = "127.0.0.1"
    port: int = Field(50051, ge=0, le=65535, description="0: any free port")
    # Empty would be every address there is.
    metrics_host: str = Field("127.0.0.1", min_length=1)
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="of /metrics over HTTP; none: off, 0: any free port"
    )

    require_client_certificate: bool = Field(
        False, description="of clients too, signed by tls.ca_file"
    )
    tokens_file: AbsolutePath | None = Field(
        None, description="bearer tokens that are accepted, one a line; none: nobody needs one"
    )

    default_max_tokens: int = Field(256, ge=1, description="of a request that names no maximum")
    max_active_requests: int = Field(256, ge=1)
    continue_patience_seconds: float = Field(
        30.0, ge=0, description="that a request waits for a worker where none can be reached"
    )
    silent_worker_seconds: float = Field(
        10.0, gt=0, description="without a token until a worker is asked whether it is there"
    )

    @model_validator(mode="after")
    def _each_listens_on_a_port_of_its_own(self) -> Self:
        if self.port and self.port == self.metrics_port:
            raise ValueError(f"metrics_port {self.metrics_port} is the port of gRPC already")
        return self

    @property
    def endpoint(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class AttentionSettings(_Section):
    """Of each attention worker."""

    max_batch_tokens: int = Field(512, ge=1, description="in one forward step")
    max_sequences: int = Field(64, ge=1, description="in the batch at once")
    max_waiting_requests: int = Field(256, ge=1)
    kv_tokens: int = Field(65536, ge=1, description="of all sequences in the batch together")
    kv_bytes: int | None = Field(
        None, ge=1, description="of the device for KV; then kv_tokens is what fits into it"
    )
    kv_format: Literal["native", "fp8"] = Field(
        "native", description="native: KV in the model's dtype; fp8: about half of its bytes"
    )
    hot_entries: int | None = Field(
        None,
        ge=1,
        description="CSA entries a layer that the device holds, host memory all; unset: all",
    )
    crossing_timeout_seconds: float = Field(60.0, gt=0, description="routed experts of one layer")

    @model_validator(mode="after")
    def _each_sequence_fits_a_step(self) -> Self:
        if self.max_sequences > self.max_batch_tokens:
            raise ValueError(
                f"max_sequences {self.max_sequences} is more than max_batch_tokens "
                f"{self.max_batch_tokens}: each sequence decodes one token a step"
            )
        return self


class KvSettings(_Section):
    """Where KV state goes that the device has no room for, and how long it stays. Sizes are those
    of each node."""

    enabled: bool = Field(True, description="a KV store on each node with attention workers")
    ram_bytes: int = Field(256 * MIB, ge=MIB, description="shared memory, taken at the start")
    disk_path: AbsolutePath | None = Field(
        None, description="a folder of each node; none: KV and sessions end with the deployment"
    )
    disk_bytes: int = Field(4096 * MIB, ge=MIB, description="of KV in that folder")
    disk_fsync: Literal["never", "interval", "always"] = Field(
        "interval", description="what a power cut may take: anything, a second or nothing"
    )
    redis: str = Field(
        "embedded", description="a server of our own, off, or a redis:// or rediss:// URL"
    )
    redis_password: SecretStr | None = Field(None, description="from the environment only")
    redis_password_file: AbsolutePath | None = Field(None, description="on each node, instead")
    redis_ca_file: AbsolutePath | None = Field(
        None, description="who signed the server's certificate"
    )
    redis_bytes: int = Field(256 * MIB, ge=MIB, description="of all that we keep there")
    redis_ttl_seconds: int = Field(7 * 86400, ge=1, description="of what nobody writes again")
    resume_every_blocks: int = Field(
        8, ge=1, description="of 128 tokens, between two positions a sequence can be resumed at"
    )
    idle_seconds: float = Field(300.0, gt=0, description="until unused blocks leave the device")
    load_timeout_seconds: float = Field(
        10.0, gt=0, description="that a request waits for the tiers before it computes"
    )
    load_patience_seconds: float = Field(
        1.0, gt=0, description="that it waits even where computing is predicted to be faster"
    )
    staging_bytes: int = Field(
        256 * MIB, ge=MIB, description="of what resuming needs, in each worker's own memory"
    )
    max_writeback_bytes: int = Field(
        64 * MIB, ge=MIB, description="that wait on the device for the store"
    )

    @field_validator("redis")
    @classmethod
    def _says_where_redis_is(cls, value: str) -> str:
        if value in ("embedded", "off"):
            return value
        url = urlsplit(value)
        if url.scheme not in ("redis", "rediss") or not url.hostname:
            shown = "it" if "@" in value else repr(value)  # there may be a password before the @
            raise ValueError(
                f"{shown} is neither 'embedded' nor 'off' nor a redis:// or rediss:// URL"
            )
        try:
            _ = url.port
        except ValueError:
            raise ValueError("the URL's port is not a number from 0 to 65535") from None
        if url.password is not None:
            raise ValueError(
                "the URL has a password in it: set MODEL1_KV__REDIS_PASSWORD, or name a file "
                "in kv.redis_password_file"
            )
        return value


class ClusterSettings(_Section):
    """How the roles are run on Ray."""

    ray_address: str | None = Field(None, description="none: a Ray of our own on this machine")
    temp_dir: AbsolutePath | None = Field(None, description="of our own Ray; kept when it is given")
    start_timeout_seconds: float = Field(180.0, gt=0)
    drain_seconds: float = Field(30.0, ge=0)
    restart_timeout_seconds: float = Field(
        120.0, gt=0, description="without a role that serving needs; then the deployment ends"
    )
    spare_routers: bool = Field(
        True, description="a process a node that waits to take a dead router's place: some 100 MB"
    )
    spare_experts: bool = Field(
        False, description="likewise of an expert replica, with a slot or a core: some 250 MB"
    )
    node_timeout_seconds: float = Field(
        5.0, gt=0, description="without an answer of any actor there, until a node counts as lost"
    )
    slot_timeout_seconds: float = Field(
        300.0, gt=0, description="for a node with a free slot, when scaling up"
    )
    rebalance_seconds: float | None = Field(
        None, gt=0, description="between two moves of hot experts; none: when asked to"
    )
    expert_redundancy: float = Field(
        0.125, ge=0, description="that a replica has room for beyond its group's, as a share"
    )


class ScalingLimits(_Section):
    """How many replicas a role may have, and what is aimed at; the policy is autoscale.py's."""

    min_replicas: int = Field(1, ge=1, le=1024)
    max_replicas: int = Field(8, ge=1, le=1024)
    busy_share: float = Field(0.7, gt=0, le=1, description="of what a replica can do")
    tolerance: float = Field(0.1, ge=0, description="of busy_share: so close to it is as good")
    queue_seconds: float = Field(0.5, gt=0, description="that work waits; longer asks for more")
    max_factor: float = Field(2.0, gt=1, description="of one change, up or down")
    up_after_seconds: float = Field(10.0, ge=0, description="that all ask for more")
    down_after_seconds: float = Field(300.0, ge=0, description="that all ask for fewer")

    @model_validator(mode="after")
    def _there_is_a_number_in_between(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas {self.min_replicas} is more than max_replicas {self.max_replicas}"
            )
        return self


class ExpertScalingLimits(ScalingLimits):
    """Of each expert group."""

    # Rows that wait hold up a whole step, at each layer.
    queue_seconds: float = Field(0.02, gt=0, description="that rows wait; longer asks for more")


class AutoscaleSettings(_Section):
    """Whether the supervisor scales by itself, and within which limits."""

    enabled: bool = False
    interval_seconds: float = Field(5.0, gt=0, description="between two looks at the load")
    experts: ExpertScalingLimits = ExpertScalingLimits()
    attention: ScalingLimits = ScalingLimits()


class ClientSettings(_Section):
    """What the verbs that ask a gateway show to it, and whom they believe. Unset: as the sections
    `tls` and `gateway` say."""

    ca_file: AbsolutePath | None = Field(
        None, description="PEM: who signed the gateway's certificate; then TLS is spoken"
    )
    cert_file: AbsolutePath | None = Field(None, description="PEM: a certificate to be shown")
    key_file: AbsolutePath | None = Field(None, description="PEM: its private key")
    server_name: str | None = Field(
        None, min_length=1, description="in the gateway's certificate, instead of its host"
    )
    token: SecretStr | None = Field(None, description="from the environment only")
    token_file: AbsolutePath | None = Field(None, description="whose first line it is, instead")

    @model_validator(mode="after")
    def _certificate_and_key_go_together(self) -> Self:
        if (self.cert_file is None) != (self.key_file is None):
            missing = "cert_file" if self.cert_file is None else "key_file"
            raise ValueError(f"{missing} must be set too: a certificate is shown with its key")
        if self.cert_file is not None and self.ca_file is None:
            raise ValueError("ca_file must be set too: a certificate is shown over TLS alone")
        return self


class Settings(_Section):
    model: ModelSettings = ModelSettings()
    tls: TlsSettings = TlsSettings()
    topology: TopologySettings = TopologySettings()
    gateway: GatewaySettings = GatewaySettings()
    attention: AttentionSettings = AttentionSettings()
    kv: KvSettings = KvSettings()
    cluster: ClusterSettings = ClusterSettings()
    autoscale: AutoscaleSettings = AutoscaleSettings()
    client: ClientSettings = ClientSettings()

    @model_validator(mode="after")
    def _nothing_goes_around_tls(self) -> Self:
        if self.tls.ca_file is None:
            if self.gateway.require_client_certificate:
                raise ValueError(
                    "gateway.require_client_certificate is of no use without tls.ca_file"
                )
        elif (
            self.cluster.ray_address is not None and self.kv.enabled and self.kv.redis == "embedded"
        ):
            raise ValueError(
                "with tls.ca_file and cluster.ray_address, kv.redis must not be embedded: its "
                "traffic between nodes would be the only one without TLS; give a rediss:// URL, "
                "or off"
            )
        return self


def load_settings(
    file: Path | None = None,
    *,
    flags: Mapping[str, object] | None = None,
    defaults: Mapping[str, object] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Settings:
    """Merge the sources and validate the result. `flags` maps `section.key` to a value, `defaults`
    is what one verb prefers to the usual.

    Raises `SettingsError` for the first thing that is wrong.
    """
    tree: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for key, value in (defaults or {}).items():
        _put(tree, key, value)
    for key, (value, source) in _from_file(file).items():
        _put(tree, key, value)
        sources[key] = source
    for key, (value, source) in _from_environment(
        os.environ if environment is None else environment
    ).items():
        _put(tree, key, value)
        sources[key] = source
    for key, value in (flags or {}).items():
        _put(tree, key, value)
        sources[key] = "--" + key.rpartition(".")[2].replace("_", "-")
    for key in _secret_keys() & sources.keys():
        if sources[key] != known_keys()[key]:
            raise SettingsError(f"{sources[key]}: '{key}' is a secret: set {known_keys()[key]}")
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_explain(error, sources)) from None


def known_keys() -> dict[str, str]:
    """Every `section.key`, with its environment variable. Some sections have sections."""
    return {
        key: ENVIRONMENT_PREFIX + key.replace(".", ENVIRONMENT_SEPARATOR).upper()
        for key in _keys_below(Settings)
    }


def _keys_below(section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from (f"{name}.{key}" for key in _keys_below(field.annotation))
        else:
            yield name


def _secret_keys() -> set[str]:
    """Those that only the environment may hold: files are copied around, flags are seen in `ps`."""
    sections: dict[str, type[BaseModel]] = {"kv": KvSettings, "client": ClientSettings}
    return {
        f"{name}.{key}"
        for name, section in sections.items()
        for key, field in section.model_fields.items()
        if field.annotation == SecretStr | None
    }


def _from_file(file: Path | None) -> dict[str, tuple[object, str]]:
    if file is None:
        return {}
    try:
        raw = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SettingsError(f"cannot read the config file {file}: {reason}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-45
        raise SettingsError(f"{file} is not YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise SettingsError(f"{file}: expected sections such as 'topology:', got {raw!r}")
    return {key: (value, str(file)) for key, value in _flat(raw)}


def _flat(section: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from ((f"{name}.{key}", each) for key, each in _flat(value))
        elif value != {}:  # a section of nothing says nothing
            yield str(name), value


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    values: dict[str, tuple[object, str]] = {}
    for name in sorted(environment):
        if not name.startswith(ENVIRONMENT_PREFIX) or ENVIRONMENT_SEPARATOR not in name:
            continue
        key = name.removeprefix(ENVIRONMENT_PREFIX).lower().replace(ENVIRONMENT_SEPARATOR, ".")
        # An empty variable is how a shell or a chart says "not set".
        values[key] = (environment[name] or None, name)
    return {key: value for key, value in values.items() if value[0] is not None}


def _put(tree: dict[str, Any], key: str, value: object) -> None:
    section, dot, rest = key.partition(".")
    if not dot:
        tree[section] = value
        return
    keys = tree.setdefault(section, {})
    if isinstance(keys, dict):
        _put(keys, rest, value)


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    # Of a section as a whole: whichever source set one of its keys.
    parts = (text for name, text in sources.items() if name.startswith(f"{key}."))
    source = sources.get(key) or next(parts, "settings")
    if first["type"] == "extra_forbidden":
        candidates = [*known_keys(), *Settings.model_fields]
        nearest = difflib.get_close_matches(key, candidates, n=1, cutoff=0.0)
        return f"{source}: unknown key '{key}'; the nearest valid one is '{nearest[0]}'"
    if first["type"] == "model_type":
        return f"{source}: '{key}' is a section of keys, got {first['input']!r}"
    if first["type"] == "value_error":  # of a section as a whole: the message has the numbers
        words = first["msg"].removeprefix("Value error, ")
        if not key:  # of several sections: whichever source set a key that is named
            named = (text for name, text in sources.items() if name in words)
            return f"{next(named, source)}: {words}"
        return f"{source}: {key}: {words}"
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{source}: {key} = {first['input']!r} is not valid: {reason}"
