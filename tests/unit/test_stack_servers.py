"""What the embedded servers are told: loopback, bounds, nothing sent home, secrets readable by their owner only."""

from __future__ import annotations

import json
import stat
import tomllib
from pathlib import Path

import pytest

from contract.errors import ConfigurationError
from contract.limits import DEFAULT_LIMITS
from headwater.stack.broker import Iotcore, Mosquitto, MosquittoSettings, MosquittoTls
from headwater.stack.objectstore import Seaweed, SeaweedSettings


def iotcore(folder: Path) -> Iotcore:
    return Iotcore(folder, log=folder / "log", ports={"mqtt": 1883, "mqtt311": 1884})


def mosquitto(folder: Path, settings: MosquittoSettings | None = None) -> Mosquitto:
    return Mosquitto(folder, log=folder / "log", ports={"mqtt": 1883}, settings=settings)


def seaweed(folder: Path, settings: SeaweedSettings | None = None) -> Seaweed:
    ports = {name: 9000 + number for number, name in enumerate(Seaweed.PORTS)}
    return Seaweed(folder, log=folder / "log", ports=ports, settings=settings)


def directives(text: str) -> dict[str, str]:
    return dict(line.split(" ", 1) for line in text.splitlines())


def test_iotcore_listens_on_loopback_only_and_takes_every_payload_of_the_protocol(tmp_path: Path) -> None:
    config = tomllib.loads(iotcore(tmp_path).config())
    listeners = [config["v5"]["1"], config["v4"]["1"]]
    assert [listener["listen"] for listener in listeners] == ["127.0.0.1:1883", "127.0.0.1:1884"]
    for listener in listeners:
        assert listener["connections"]["max_payload_size"] > DEFAULT_LIMITS.payload_bytes_max
    router = config["router"]
    assert router["max_segment_size"] * router["max_segment_count"] == 32 * 1024 * 1024


def test_mosquitto_listens_on_loopback_only_and_is_bounded(tmp_path: Path) -> None:
    config = directives(mosquitto(tmp_path).config())
    assert config["listener"] == "1883 127.0.0.1"
    assert int(config["max_packet_size"]) > DEFAULT_LIMITS.payload_bytes_max
    for bound in ("max_inflight_messages", "max_inflight_bytes", "max_queued_messages", "max_queued_bytes"):
        assert int(config[bound]) > 0, "0 means no bound"
    assert config["persistence"] == "false"
    assert config["allow_anonymous"] == "true"


def test_durable_mosquitto_saves_at_every_change(tmp_path: Path) -> None:
    config = directives(mosquitto(tmp_path, MosquittoSettings(durable=True)).config())
    assert config["persistence"] == "true"
    assert config["persistence_location"] == f"{tmp_path}/"
    assert (config["autosave_on_changes"], config["autosave_interval"]) == ("true", "1")


def test_mosquitto_with_passwords_lets_nobody_in_without(tmp_path: Path) -> None:
    settings = MosquittoSettings(
        password_file=tmp_path / "passwords", acl_file=tmp_path / "acl", username="stack", password="secret"
    )
    config = directives(mosquitto(tmp_path, settings).config())
    assert config["allow_anonymous"] == "false"
    assert config["password_file"] == str(tmp_path / "passwords")
    assert config["acl_file"] == str(tmp_path / "acl")
    with pytest.raises(ConfigurationError, match="username"):
        mosquitto(tmp_path, MosquittoSettings(password_file=tmp_path / "passwords"))


def test_mosquitto_with_tls_takes_the_device_from_its_certificate(tmp_path: Path) -> None:
    tls = MosquittoTls(certificate=tmp_path / "cert", key=tmp_path / "key", ca=tmp_path / "ca")
    broker = mosquitto(tmp_path, MosquittoSettings(tls=tls))
    config = directives(broker.config())
    assert (config["require_certificate"], config["use_identity_as_username"]) == ("true", "true")
    assert broker.url == "mqtts://127.0.0.1:1883"


def test_seaweed_listens_on_loopback_only_and_sends_nothing_home(tmp_path: Path) -> None:
    argv = seaweed(tmp_path).spec().argv
    for flag in ("-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false", "-webdav=false", "-admin.ui=false"):
        assert flag in argv
    ports = [int(flag.split("=")[1]) for flag in argv if ".port" in flag]
    used = [port for port in ports if port]
    assert len(used) == len(set(used)) == len(Seaweed.PORTS), "each of its doors has a port that was chosen for it"


def test_credentials_are_made_once_and_readable_by_the_owner_only(tmp_path: Path) -> None:
    first, second = seaweed(tmp_path / "a"), seaweed(tmp_path / "a")
    assert first.access == second.access
    assert first.access.secret != seaweed(tmp_path / "b").access.secret
    assert len(first.access.secret) >= 40
    path = tmp_path / "a" / "credentials.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    prepare = first.spec().prepare
    assert prepare is not None
    prepare()
    config = tmp_path / "a" / "s3.json"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    identities = json.loads(config.read_bytes())["identities"]
    assert [identity["credentials"] for identity in identities] == [
        [{"accessKey": first.access.key, "secretKey": first.access.secret}]
    ]


def test_the_secret_is_not_shown_in_logs(tmp_path: Path) -> None:
    access = seaweed(tmp_path).access
    assert access.secret not in repr(access)
    assert access.secret not in f"{access}"
    assert (access.url, access.bucket) == ("s3://headwater/lake", "headwater")


def test_damaged_credentials_are_named_and_the_remedy_told(tmp_path: Path) -> None:
    (tmp_path / "credentials.json").write_bytes(b"{")
    with pytest.raises(ConfigurationError, match="objects stay"):
        seaweed(tmp_path)


def test_flags_of_an_earlier_start_are_forgotten(tmp_path: Path) -> None:
    store = seaweed(tmp_path)
    left = tmp_path / "objects" / "mini.options"
    left.parent.mkdir()
    left.write_text("s3.port=1\n")
    prepare = store.spec().prepare
    assert prepare is not None
    prepare()
    assert not left.exists()
