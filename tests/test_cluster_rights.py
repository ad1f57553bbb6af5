"""cluster/object-store/iam: with its policy each job can do its work, and nothing beside it.

The server is moto's, which enforces policies when it is told to.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ldbfr.images import encode_image
from tests import tiny
from tests.archiving import png
from tests.conftest import REPOSITORY
from tests.s3_server import moto_server

boto3 = pytest.importorskip("boto3")

IAM = REPOSITORY / "cluster" / "object-store" / "iam"
BUCKET = "ldbfr-example"
JOBS = ("prepare", "train", "restore", "evaluate", "serve")


@dataclass
class Store:
    """A server, and the keys of a user for each job, who has that job's policy and no other."""

    endpoint: str
    keys: dict[str, dict[str, str]]

    def client(self, job: str) -> Any:
        keys = self.keys[job]
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=keys["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=keys["AWS_SECRET_ACCESS_KEY"],
        )


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    """moto, which refuses what no policy allows."""
    root = {"region_name": "us-east-1", "aws_access_key_id": "root", "aws_secret_access_key": "root"}
    with moto_server() as endpoint:
        s3, iam = (boto3.client(name, endpoint_url=endpoint, **root) for name in ("s3", "iam"))
        s3.create_bucket(Bucket=BUCKET)
        for number, face in enumerate(tiny.blob_faces(8, side=40)):
            s3.put_object(Bucket=BUCKET, Key=f"raw/{number}.png", Body=encode_image(face, "png"))
        for number in range(2):
            s3.put_object(Bucket=BUCKET, Key=f"scans/{number}.png", Body=png(number, 40))
        for prefix in ("testsets", "runs", "faces512", "restored", "evaluation", "secret"):
            s3.put_object(Bucket=BUCKET, Key=f"{prefix}/there", Body=b"there")
        keys = {}
        for job in JOBS:
            iam.create_user(UserName=job)
            iam.put_user_policy(UserName=job, PolicyName=job, PolicyDocument=(IAM / f"{job}.json").read_text())
            key = iam.create_access_key(UserName=job)["AccessKey"]
            keys[job] = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
        enforce = urllib.request.Request(
            f"{endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"}, method="POST"
        )
        with urllib.request.urlopen(enforce):
            yield Store(endpoint, keys)


def denied(call: Any, **arguments: Any) -> bool:
    """Whether the server refuses."""
    from botocore.exceptions import ClientError

    try:
        call(**arguments)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("AccessDenied", "403"):
            raise
        return True
    return False


RIGHTS = {
    "prepare": ({"raw"}, {"faces512"}),
    "train": ({"faces512"}, {"runs"}),
    "restore": ({"scans"}, {"restored"}),
    "evaluate": ({"testsets", "runs"}, {"evaluation"}),
    "serve": ({"scans"}, {"restored"}),
}
PREFIXES = ("raw", "faces512", "runs", "scans", "restored", "testsets", "evaluation", "secret")


@pytest.mark.s3
@pytest.mark.parametrize("job", JOBS)
def test_a_job_reads_and_writes_its_own_prefixes_alone(store: Store, job: str) -> None:
    client, (read, written) = store.client(job), RIGHTS[job]
    for prefix in PREFIXES:
        key = {"Bucket": BUCKET, "Key": f"{prefix}/there"}
        if prefix not in ("raw", "scans"):
            assert denied(client.get_object, **key) == (prefix not in read | written), prefix
        assert denied(client.put_object, Body=b"", Bucket=BUCKET, Key=f"{prefix}/new") == (prefix not in written), (
            prefix
        )
        assert denied(client.delete_object, Bucket=BUCKET, Key=f"{prefix}/new") == (prefix not in written), prefix
    assert denied(client.put_object, Body=b"", Bucket=BUCKET, Key="elsewhere")
    assert denied(client.list_buckets)
    assert denied(client.delete_bucket, Bucket=BUCKET)


@pytest.mark.parametrize("job", JOBS)
def test_lists_are_of_the_jobs_prefixes(job: str) -> None:
    """By the policy's text: moto does not look at this condition."""
    (statement,) = [one for one in json.loads((IAM / f"{job}.json").read_text())["Statement"] if one["Sid"] == "List"]
    prefixes = {prefix.removesuffix("/*") for prefix in statement["Condition"]["StringLike"]["s3:prefix"]}
    assert prefixes == set.union(*RIGHTS[job])


def test_no_policy_is_about_everything() -> None:
    for path in IAM.glob("*.json"):
        for statement in json.loads(path.read_text())["Statement"]:
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            assert statement["Effect"] == "Allow"
            assert not any("*" in action for action in actions), path
            if statement.get("Resource") == "*":
                assert all(action.startswith("ec2:Describe") for action in actions), path


COMMANDS = {
    "prepare": ["shards", "--input", "raw", "--output", "faces512/tiny", "--side", "32", "--val-share", "0.3"],
    "restore": [
        "--input",
        "scans/",
        "--output",
        "restored/scans",
        "--steps",
        "1",
        "--workers",
        "1",
        "--weights",
        "weights",
    ],
    "train": [
        "--data",
        "faces512/tiny",
        "--run",
        "runs/tiny",
        "--preset",
        "tiny",
        "--stage",
        "hq_vqgan",
        "--cpus-per-worker",
        "1",
    ],
}


@pytest.mark.s3
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_jobs_really_do_their_work_with_these_rights(store: Store, tmp_path: Path) -> None:
    tiny.new_pipeline().save_pretrained(tmp_path / "weights")
    for job in ("prepare", "train", "restore"):
        words = []
        for word in COMMANDS[job]:
            in_bucket = word.split("/")[0] in PREFIXES
            words.append(f"s3://{BUCKET}/{word}" if in_bucket else str(tmp_path / word) if word == "weights" else word)
        environment = {
            **os.environ,
            **store.keys[job],
            "AWS_ENDPOINT_URL": store.endpoint,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "LDBFR_CACHE": str(tmp_path / "cache"),
        }
        command = [sys.executable, str(REPOSITORY / "jobs" / f"{job}.py"), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, f"{job}: {done.stdout}{done.stderr}"

    refused = [sys.executable, str(REPOSITORY / "jobs" / "restore.py"), "--input", f"s3://{BUCKET}/raw", "--output"]
    environment = {**environment, **store.keys["restore"]}
    done = subprocess.run(
        [*refused, f"s3://{BUCKET}/restored/raw", "--weights", str(tmp_path / "weights")],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode != 0
    assert "raw" in done.stderr
