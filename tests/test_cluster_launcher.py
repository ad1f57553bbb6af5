"""cluster/launcher: what `ray up` would take, completed by Ray's own defaults and held against its schema."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
import yaml

from tests.conftest import REPOSITORY

pytest.importorskip("ray.autoscaler")
LAUNCHER = REPOSITORY / "cluster" / "launcher"
every_cloud = pytest.mark.parametrize("cloud", ["aws", "gcp"])


def load(cloud: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load((LAUNCHER / f"{cloud}.yaml").read_text())
    return config


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """As `ray up` completes it before it speaks to the cloud."""
    from ray.autoscaler._private.util import prepare_config

    made: dict[str, Any] = prepare_config(copy.deepcopy(config))
    return made


@every_cloud
def test_ray_accepts_it(cloud: str) -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(prepared(load(cloud)))


@every_cloud
@pytest.mark.parametrize("place", [(), ("auth",), ("docker",), ("available_node_types", "gpu")])
def test_rays_schema_refuses_what_is_misspelt(cloud: str, place: tuple[str, ...]) -> None:
    from ray.autoscaler._private.util import validate_config

    config = prepared(load(cloud))
    target = config
    for step in place:
        target = target[step]
    target["misspelt"] = 1
    with pytest.raises(jsonschema.ValidationError, match="misspelt"):
        validate_config(config)


@every_cloud
def test_nothing_of_rays_defaults_is_installed_or_started(cloud: str) -> None:
    config, made = load(cloud), prepared(load(cloud))
    for name in ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"):
        assert made[name] == []
    for name in ("head_start_ray_commands", "worker_start_ray_commands", "available_node_types"):
        assert set(map(str, made[name])) == set(map(str, config[name]))
    assert "3.0.0.dev0" not in str(made)


@every_cloud
def test_the_head_does_no_work_and_the_workers_are_spot(cloud: str) -> None:
    config = load(cloud)
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
    assert any("--num-cpus=0" in command for command in config["head_start_ray_commands"])
    for name, machine in types.items():
        assert bool(re.search("spot", str(machine["node_config"]), re.I)) == (name != "head"), name
        if name != "head":
            assert 0 == machine["min_workers"] < machine["max_workers"] <= config["max_workers"]
    assert types["gpu"]["resources"]["GPU"] == 1
    (watch,) = [command for command in config["worker_start_ray_commands"] if "preempted.py" in command]
    assert f"preempted.py {cloud} " in watch
    assert (REPOSITORY / "cluster" / "preempted.py").is_file()


@every_cloud
def test_ray_asks_for_a_token_and_is_not_reached_from_outside(cloud: str) -> None:
    config = load(cloud)
    options = " ".join(config["docker"]["run_options"])
    token = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+)", options)
    assert token
    assert token[1] in config["file_mounts"]
    assert "RAY_AUTH_MODE=token" in options
    assert any("--dashboard-host=127.0.0.1" in command for command in config["head_start_ray_commands"])


def test_ray_opens_no_port_beside_the_security_group_that_the_readme_makes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray's own code at moto's EC2, as `ray up` runs it: with our file, and with one that leaves the group to Ray."""
    boto3, moto = pytest.importorskip("boto3"), pytest.importorskip("moto")
    from ray.autoscaler._private.aws import config as rays

    part = (REPOSITORY / "cluster" / "README.md").read_text().split("## 7.")[1]
    assert re.search(r"aws ec2 create-security-group --group-name ldbfr ", part)
    assert re.findall(r"authorize-security-group-ingress --group-id \$GROUP (.+)", part) == [
        "--protocol tcp --port 22 --cidr $MY_ADDRESSES",
        "--protocol all --source-group $GROUP",
    ]
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    config = load("aws")
    types = config["available_node_types"]
    (placeholder,) = {group for machine in types.values() for group in machine["node_config"]["SecurityGroupIds"]}
    assert f"s/{placeholder}/$GROUP/" in part
    with moto.mock_aws():
        ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
        group = ec2.create_security_group(GroupName="ldbfr", Description="as in the README")["GroupId"]
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.0/24"}]}
        inside = {"IpProtocol": "-1", "UserIdGroupPairs": [{"GroupId": group}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh, inside])

        def open_groups(named: bool) -> list[str]:
            made = copy.deepcopy(config)
            for machine in made["available_node_types"].values():
                if named:
                    machine["node_config"]["SecurityGroupIds"] = [group]
                else:
                    del machine["node_config"]["SecurityGroupIds"]
            made = rays._configure_security_group(rays._configure_subnet(made))
            for machine in made["available_node_types"].values():
                assert (machine["node_config"]["SecurityGroupIds"] == [group]) == named
            found = ec2.describe_security_groups()["SecurityGroups"]
            return [one["GroupName"] for one in found if "0.0.0.0/0" in str(one["IpPermissions"])]

        assert open_groups(named=True) == []
        assert open_groups(named=False) == ["ray-autoscaler-ldbfr"], "if Ray has stopped this, our group is needless"
        with pytest.raises((click.ClickException, AssertionError)):  # by whether Ray prints in colours
            rays._configure_subnet(copy.deepcopy(config))
        assert "Failed to detect a security group" in capfd.readouterr().err


@every_cloud
def test_every_file_that_is_copied_to_the_machines_is_made_and_readable_there(cloud: str) -> None:
    """rsync keeps the mode, and the container's user does not own the copy: 0600 would be unreadable."""
    part = (REPOSITORY / "cluster" / "README.md").read_text().split("## 7.")[1]
    for target, source in load(cloud)["file_mounts"].items():
        assert re.search(rf"chmod 644 {re.escape(source)}$", part, re.M), source
        assert re.search(rf"(chmod 700|--mode=700) {re.escape(source.rpartition('/')[0])}\b", part), source
        assert any(f"={target}" in option for option in load(cloud)["docker"]["run_options"]), "nobody reads it"


def test_the_readme_ends_no_cluster_under_a_job_of_the_same_block() -> None:
    text = (REPOSITORY / "cluster" / "README.md").read_text()
    blocks = re.findall(r"```console\n(.*?)```", text, re.S)
    assert any("ray down" in block for block in blocks)
    assert not [block for block in blocks if "ray down" in block and "ray job submit" in block]


@every_cloud
def test_machines_have_roles_of_their_own(cloud: str) -> None:
    roles = {}
    for name, machine in load(cloud)["available_node_types"].items():
        config = machine["node_config"]
        roles[name] = config["IamInstanceProfile"]["Name"] if cloud == "aws" else config["serviceAccounts"][0]["email"]
    assert roles["cpu"] == roles["gpu"] != roles["head"]
    text = Path(REPOSITORY / "cluster" / "object-store" / "README.md").read_text()
    for role in roles.values():
        assert role.split("@")[0] in text, f"{role} is not made anywhere"
