"""A `gateway.toml` is right, or its first mistake is named with file, key, value and remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from contract.errors import ConfigurationError
from contract.limits import SHARDS
from gateway.access import store_settings
from gateway.settings import GatewaySettings, load_settings, parse_settings

LEAST: dict[str, Any] = {"broker": {"url": "mqtt://broker"}, "lake": {"url": "file:///lake"}}


def parse(**changes: Any) -> GatewaySettings:
    return parse_settings({**LEAST, **changes}, source="gateway.toml", folder=Path("/etc/headwater"))


def test_the_least_file_is_broker_and_lake_and_keeps_to_this_machine():
    settings = parse()
    assert settings.shards == tuple(range(SHARDS))
    assert settings.up_filters == ("hw/v1/up/+/+/+",)
    assert (settings.http.host, settings.http.port) == ("127.0.0.1", 8080)
    assert settings.flush_interval_s == 1.0
    assert settings.flush_bytes == 16 * 2**20
    assert settings.memory_bytes_max == 256 * 2**20
    assert settings.flush_workers == 2


def test_every_shard_is_owned_by_exactly_one_of_n_replicas():
    for count in (1, 2, 3, 7, 64):
        owned = [shard for number in range(count) for shard in parse(replica=f"{number}/{count}").shards]
        assert sorted(owned) == list(range(SHARDS))
    assert parse(replica="1/3").up_filters[:2] == ("hw/v1/up/1/+/+", "hw/v1/up/4/+/+")


def test_paths_are_relative_to_the_file(tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text(
        '[broker]\nurl = "mqtts://b"\nusername = "gw"\npassword_file = "pw"\nca_file = "/etc/ca.pem"\n'
        '[lake]\nurl = "s3://bucket/lake"\ncredentials_file = "keys.toml"\n'
    )
    settings = load_settings(path)
    assert settings.broker.password_file == str(tmp_path / "pw")
    assert settings.broker.ca_file == "/etc/ca.pem"
    assert settings.lake.credentials_file == str(tmp_path / "keys.toml")


@pytest.mark.parametrize(
    ("changes", "key", "shown", "remedy"),
    [
        ({"flush_interval": 1}, "flush_interval", "1", "unknown key; remove it, or use one of: broker"),
        ({"http": {"prot": 1}}, "[http] prot", "1", "use one of: host, port"),
        ({"replica": "2/2"}, "replica", "'2/2'", 'write "0/1"'),
        ({"replica": "0/65"}, "replica", "'0/65'", 'write "0/1"'),
        ({"flush_interval_s": 0}, "flush_interval_s", "0", "choose a value in that range"),
        ({"flush_interval_s": float("nan")}, "flush_interval_s", "nan", "choose a value in that range"),
        ({"flush_workers": "two"}, "flush_workers", "'two'", "write a whole number, without quotes"),
        ({"memory_bytes_max": 1}, "memory_bytes_max", "1", "raise it, or lower payload_bytes_max"),
        ({"limits": {"rows_max": 65_537}}, "rows_max", "65537", "choose a value in that range"),
        ({"http": {"host": "0.0.0.0"}}, "[http] host", "'0.0.0.0'", "allow_remote_http = true"),
        ({"http": {"host": "gateway.example"}}, "[http] host", "'gateway.example'", "allow_remote_http = true"),
        ({"broker": {"url": "http://b"}}, "[broker] url", "'http://b'", "write mqtt://host:1883"),
        ({"broker": {"url": "mqtt://b", "ca_file": "x"}}, "[broker] url", "'mqtt://b'", "write mqtts://"),
        ({"broker": {"url": "mqtt://b", "password_file": "x"}}, "password_file", "x'", "add username"),
        ({"broker": {"url": "mqtts://b", "key_file": "k"}}, "key_file", "'k'", "give both, or neither"),
        ({"broker": {"url": "mqtt://b", "client_id_prefix": "a/b"}}, "client_id_prefix", "'a/b'", "use 1 to 64"),
        ({"lake": {"url": "file:///l", "credentials_file": "x"}}, "credentials_file", "file:///l", "remove it"),
        ({"lake": {}}, "[lake] url", "missing", "add it"),
    ],
)
def test_a_mistake_is_named_with_file_key_value_and_remedy(changes, key, shown, remedy):
    with pytest.raises(ConfigurationError) as told:
        parse(**changes)
    text = str(told.value)
    assert text.startswith("gateway.toml: ")
    assert key in text
    assert shown in text
    assert remedy in text


def test_a_secret_in_the_wrong_place_is_not_shown():
    for changes in (
        {"broker": {"url": "mqtt://b", "password": "hunter2"}},
        {"broker": {"url": "mqtt://user:hunter2@b"}},
        {"lake": {"url": "s3://b/l", "secret_key": "hunter2"}},
    ):
        with pytest.raises(ConfigurationError) as told:
            parse(**changes)
        assert "hunter2" not in str(told.value)


def test_http_may_be_reached_from_elsewhere_only_when_asked_for():
    assert parse(http={"host": "0.0.0.0", "allow_remote_http": True}).http.host == "0.0.0.0"
    for host in ("127.0.0.2", "::1", "localhost"):
        assert parse(http={"host": host}).http.host == host


def test_files_that_are_no_settings_are_named(tmp_path):
    missing, broken, binary = tmp_path / "none.toml", tmp_path / "broken.toml", tmp_path / "binary.toml"
    broken.write_text("replica = ")
    binary.write_bytes(b"\xff\xfe")
    for path, remedy in ((missing, "give the path"), (broken, "mend that line"), (binary, "save it as UTF-8")):
        with pytest.raises(ConfigurationError) as told:
            load_settings(path)
        assert str(path) in str(told.value)
        assert remedy in str(told.value)


def test_what_the_file_leaves_out_of_the_lake_comes_from_the_environment(tmp_path):
    environ = {
        "AWS_ACCESS_KEY_ID": "id",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "eu-west-1",
        "AWS_ENDPOINT_URL": "https://store.example",
    }
    found = store_settings(parse(lake={"url": "s3://bucket/lake"}).lake, environ)
    assert (found.access_key, found.secret_key, found.region, found.endpoint) == (
        "id",
        "secret",
        "eu-west-1",
        "https://store.example",
    )
    keys = tmp_path / "keys.toml"
    keys.write_text('access_key = "other"\nsecret_key = "s"\n')
    lake = parse(
        lake={
            "url": "s3://bucket/lake",
            "region": "us-east-2",
            "endpoint": "http://127.0.0.1:1",
            "allow_http": True,
            "credentials_file": str(keys),
        }
    ).lake
    found = store_settings(lake, environ)
    assert (found.access_key, found.secret_key, found.region) == ("other", "s", "us-east-2")
    assert found.endpoint == "http://127.0.0.1:1"


def test_a_plain_http_endpoint_needs_a_word():
    with pytest.raises(ConfigurationError, match="allow_http = true"):
        store_settings(parse(lake={"url": "s3://bucket/lake", "endpoint": "http://store:9000"}).lake, {})


def test_a_bucket_without_credentials_ends_the_start_unless_the_credentials_file_has_them(tmp_path):
    nobody = {"AWS_EC2_METADATA_DISABLED": "true"}
    with pytest.raises(ConfigurationError, match="no credentials are set; set AWS_ACCESS_KEY_ID"):
        store_settings(parse(lake={"url": "s3://bucket/lake"}).lake, nobody)
    keys = tmp_path / "keys.toml"
    keys.write_text('access_key = "a"\nsecret_key = "s"\n')
    found = store_settings(parse(lake={"url": "s3://bucket/lake", "credentials_file": str(keys)}).lake, nobody)
    assert found.access_key == "a"
