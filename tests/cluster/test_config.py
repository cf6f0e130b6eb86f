"""Settings: which source wins, and what a wrong key or value is told."""

import operator
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from cluster.config import KvSettings, Settings, SettingsError, known_keys, load_settings


def write(folder: Path, text: str) -> Path:
    file = folder / "model1.yaml"
    file.write_text(text)
    return file


def test_without_any_source_everything_has_a_default() -> None:
    assert load_settings(environment={}) == Settings()


def test_the_environment_overrides_the_file_and_flags_override_both(tmp_path: Path) -> None:
    file = write(tmp_path, "topology: {attention_workers: 2, expert_groups: 2, expert_replicas: 2}")
    environment = {"MODEL1_TOPOLOGY__EXPERT_GROUPS": "3", "MODEL1_TOPOLOGY__EXPERT_REPLICAS": "3"}
    settings = load_settings(file, environment=environment, flags={"topology.expert_replicas": "4"})
    wanted = settings.topology
    assert (wanted.attention_workers, wanted.expert_groups, wanted.expert_replicas) == (2, 3, 4)


def test_sections_within_a_section_merge_key_by_key(tmp_path: Path) -> None:
    file = write(tmp_path, "autoscale: {enabled: true, experts: {min_replicas: 2}, attention: {}}")
    environment = {"MODEL1_AUTOSCALE__EXPERTS__MAX_REPLICAS": "5"}
    autoscale = load_settings(file, environment=environment).autoscale
    assert autoscale.enabled
    assert (autoscale.experts.min_replicas, autoscale.experts.max_replicas) == (2, 5)
    assert autoscale.experts.queue_seconds == 0.02  # the role's own default
    assert autoscale.attention == Settings().autoscale.attention


def test_a_default_of_the_verb_gives_way_to_every_source(tmp_path: Path) -> None:
    defaults = {"gateway.port": 0}
    assert load_settings(environment={}, defaults=defaults).gateway.port == 0
    file = write(tmp_path, "gateway: {port: 7000}")
    assert load_settings(file, environment={}, defaults=defaults).gateway.port == 7000


@pytest.mark.parametrize("key", sorted(known_keys()))
def test_every_key_can_be_set_by_its_environment_variable(key: str) -> None:
    section, name = key.split(".")[0], key.split(".")[-1]
    values = {
        "dtype": "bfloat16",
        "min_replicas": "3",
        **dict.fromkeys(("busy_share", "tolerance"), "0.5"),
        "device": "cuda",
        "enabled": "False",
        "kv_format": "fp8",
        "disk_fsync": "always",
        "redis": "rediss://user@cache:6380/1",
        **dict.fromkeys(("path", "disk_path", "temp_dir"), "/somewhere"),
        **dict.fromkeys(("redis_password_file", "redis_ca_file"), "/somewhere/file"),
        **dict.fromkeys(("ca_file", "cert_file", "key_file"), "/somewhere/pem"),
        **dict.fromkeys(("token_file", "tokens_file"), "/somewhere/tokens"),
        **dict.fromkeys(("require_client_certificate", "spare_experts"), "True"),
        "spare_routers": "False",
        "gateways": "per_node",
    }
    value = values.get(name, "67108864" if name.endswith("_bytes") else "64")
    # Files that are of use only together.
    pem = {
        f"MODEL1_{name}__{part}": "/somewhere/pem"
        for name in ("TLS", "CLIENT")
        for part in ("CA_FILE", "CERT_FILE", "KEY_FILE")
        if section in ("tls", "client") or (name == "TLS" and "certificate" in key)
    }
    settings = load_settings(environment={**pem, known_keys()[key]: value})
    found = operator.attrgetter(key)(settings)
    if isinstance(found, SecretStr):
        found = found.get_secret_value()
    assert str(found).removesuffix(".0") == value


def test_every_key_of_kv_is_described() -> None:
    fields = KvSettings.model_fields
    assert [name for name, field in fields.items() if not field.description] == []


def test_an_empty_environment_variable_sets_nothing() -> None:
    assert load_settings(environment={"MODEL1_GATEWAY__PORT": ""}).gateway.port == 50051


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("topology: {expert_group: 2}", "'topology.expert_group'.*'topology.expert_groups'"),
        ("topolgy: {expert_groups: 2}", "'topolgy'.*'topology'"),
        ("topology: {expert_groups: 0}", "topology.expert_groups = 0"),
        ("topology: 3", "'topology' is a section"),
        ("gateway: {port: 70000}", "gateway.port = 70000.*65535"),
        ("gateway: {metrics_port: 70000}", "gateway.metrics_port = 70000.*65535"),
        ("gateway: {metrics_port: http}", "gateway.metrics_port = 'http'.*integer"),
        ("gateway: {metrics_host: ''}", "gateway.metrics_host = ''.*at least 1"),
        ("gateway: {port: 7000, metrics_port: 7000}", "gateway: metrics_port 7000 is the port of"),
        ("model: {dtype: float8}", "model.dtype = 'float8'.*'float32' or 'bfloat16'"),
        ("attention: {max_sequences: 9, max_batch_tokens: 8}", "max_sequences 9 .* 8"),
        ("kv: {redis: localhost}", "kv.redis: 'localhost' is neither 'embedded' nor 'off' nor a"),
        ("kv: {redis: 'http://u:hush@cache'}", "kv.redis: it is neither 'embedded' nor 'off'"),
        ("kv: {redis: 'redis://cache:x'}", "kv.redis: the URL's port is not a number"),
        ("kv: {disk_path: ''}", "kv.disk_path: it is empty"),
        ("kv: {redis_bytes: 2026-13-45}", "is not YAML: month must be in"),
        ("kv: {redis: 'redis://:hush@cache'}", "kv.redis: the URL has a password in it"),
        ("kv: {redis_password: hush}", "'kv.redis_password' is a secret: set MODEL1_KV__REDIS_P"),
        ("kv: {ram_bytes: 64}", "kv.ram_bytes = 64"),
        ("tls: {ca_file: ca.crt, key_file: tls.key}", "tls: cert_file must be set too"),
        ("client: {ca_file: ca.crt, key_file: a.key}", "client: cert_file must be set too"),
        ("client: {cert_file: a.crt, key_file: a.key}", "client: ca_file must be set too"),
        ("client: {token: hush}", "'client.token' is a secret: set MODEL1_CLIENT__TOKEN"),
        (
            "gateway: {require_client_certificate: true}",
            r"gateway\.require_client_certificate is of no use without tls\.ca_file",
        ),
        (
            "{tls: {ca_file: a, cert_file: b, key_file: c}, cluster: {ray_address: auto}}",
            r"kv\.redis must not be embedded",
        ),
        ("autoscale: {experts: {max: 3}}", r"'autoscale\.experts\.max'; .*experts\.max_"),
        ("autoscale: {experts: {min_replicas: 9}}", r"autoscale\.experts: min_replicas 9 is more"),
        ("autoscale: {attention: 3}", r"'autoscale\.attention' is a section"),
        ("autoscale: {attention: {busy_share: 2}}", r"autoscale\.attention\.busy_share = 2"),
        ("- 3", "expected sections"),
        ("topology: {", "is not YAML"),
    ],
)
def test_a_wrong_file_is_told_what_and_where(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(file, environment={})
    assert str(file) in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_message_names_the_variable_or_the_flag_that_is_wrong() -> None:
    with pytest.raises(SettingsError, match=r"MODEL1_GATEWAY__PRT.*'gateway\.port'"):
        load_settings(environment={"MODEL1_GATEWAY__PRT": "1"})
    with pytest.raises(SettingsError, match=r"--expert-groups: .* = 'two'"):
        load_settings(environment={}, flags={"topology.expert_groups": "two"})


def test_the_source_named_is_that_of_the_key_and_not_of_a_longer_one(tmp_path: Path) -> None:
    file = write(tmp_path, "kv: {redis_bytes: 1073741824}")
    with pytest.raises(SettingsError, match=r"^MODEL1_KV__REDIS: kv\.redis"):
        load_settings(file, environment={"MODEL1_KV__REDIS": "localhost"})


def test_a_relative_path_counts_from_where_the_command_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings(environment={}, flags={"kv.disk_path": "kv", "model.path": "../model"})
    assert settings.kv.disk_path == tmp_path / "kv"
    assert settings.model.path == tmp_path / "../model"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"gone\.yaml: No such file"):
        load_settings(tmp_path / "gone.yaml", environment={})


def test_an_ipv6_host_stands_in_brackets() -> None:
    flags = {"gateway.host": "::1", "gateway.port": "7000"}
    assert load_settings(environment={}, flags=flags).gateway.endpoint == "[::1]:7000"


def test_a_secret_is_not_shown() -> None:
    settings = load_settings(environment={"MODEL1_KV__REDIS_PASSWORD": "hush"})
    assert settings.kv.redis_password is not None
    assert settings.kv.redis_password.get_secret_value() == "hush"
    assert "hush" not in repr(settings) + settings.model_dump_json()
    with pytest.raises(SettingsError, match="--redis-password") as caught:
        load_settings(environment={}, flags={"kv.redis_password": "hush"})
    assert "hush" not in str(caught.value)


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Settings().gateway.port = 1  # type: ignore[misc]
