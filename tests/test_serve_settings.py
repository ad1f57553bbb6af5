"""Settings of the endpoint: what is taken, and what is refused with which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ldbfr.errors import ConfigError
from serve.settings import EndpointSettings


def test_the_defaults_fit_together_and_cannot_be_changed() -> None:
    settings = EndpointSettings()

    assert settings.is_loopback
    assert EndpointSettings.from_args({}) == settings
    with pytest.raises(ValidationError, match="frozen"):
        settings.page = False  # type: ignore[misc]


def test_settings_as_a_yaml_file_and_a_command_line_give_them() -> None:
    from_yaml = EndpointSettings.from_args({"max_steps": 9, "job_buckets": ["s3://abc/x", "s3://def"], "page": False})
    from_words = EndpointSettings.from_args({"max_steps": "9", "job_buckets": "s3://abc/x, s3://def", "page": "false"})

    assert from_yaml == from_words
    assert from_yaml.job_buckets == ("s3://abc/x", "s3://def")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"wieghts": "x"}, "wieghts: there is no such setting; there are allowed_hosts, batch_faces"),
        ({"max_steps": 70}, "max_steps 70: Input should be less than or equal to 50"),
        ({"device": "tpu"}, "device 'tpu': Input should be 'cpu' or 'cuda'"),
        ({"max_body_bytes": 0}, "max_body_bytes 0: Input should be greater than 0"),
        ({"max_samples": 9}, "max_samples 9"),
        ({"deadline_seconds": "nan"}, "deadline_seconds"),
        ({"upload_seconds": float("inf")}, "every request must end"),
        ({"host": "0.0.0.0"}, "host 0.0.0.0 can be reached from other machines, and there are no API keys"),
        ({"host": "::"}, "set keys_file"),
        ({"host": "faces.example.org"}, "set keys_file"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is above max_replicas 2"),
        ({"ongoing_per_replica": 4, "batch_faces": 8}, "ongoing_per_replica 4 is below batch_faces 8"),
        ({"batch_wait_seconds": 60}, "batch_wait_seconds 60 is not below deadline_seconds 60"),
        ({"job_buckets": ["archive"]}, "job_buckets 'archive': expected s3://bucket or s3://bucket/prefix"),
        ({"job_buckets": ["s3://archive/../x"]}, "job_buckets 's3://archive/../x'"),
        ({"job_buckets": ["s3://archive//x"]}, "job_buckets"),
        ({"job_buckets": ["s3://"]}, "job_buckets"),
        ({"allowed_hosts": ["http://x"]}, "without scheme and port"),
    ],
)
def test_what_cannot_work_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EndpointSettings.from_args(args)
    assert message in str(caught.value)


def test_everything_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        EndpointSettings.from_args({"batch_faces": -1, "max_steps": 0, "nonsense": 1})

    assert all(name in str(caught.value) for name in ("batch_faces", "max_steps", "nonsense"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("localhost", True), ("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("10.0.0.1", False)],
)
def test_which_addresses_need_keys(host: str, loopback: bool, tmp_path: Any) -> None:
    assert EndpointSettings(host=host, keys_file=tmp_path / "keys.json").is_loopback is loopback
