"""The files of `ray up`: what Ray makes of them, what they leave open, and a head on moto's EC2."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

ROOT = Path(__file__).parents[1]
AWS, OWN = ROOT / "cluster.yaml", ROOT / "clusters/on-premises.yaml"
BOTH = pytest.mark.parametrize("file", [AWS, OWN], ids=["aws", "on-premises"])


def loaded(file: Path) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(file.read_text())
    return config


def prepared(file: Path) -> dict[str, Any]:
    """As Ray completes it."""
    from ray.autoscaler._private.util import prepare_config

    config: dict[str, Any] = prepare_config(loaded(file))
    return config


def commands(config: dict[str, Any]) -> str:
    lists = [value for key, value in config.items() if key.endswith("_commands")]
    lists += [
        value
        for kind in config["available_node_types"].values()
        for key, value in kind.items()
        if key.endswith("_commands")
    ]
    return "\n".join(command for one in lists for command in one)


@BOTH
def test_ray_takes_the_file(file: Path) -> None:
    from ray.autoscaler._private.util import validate_config

    config = prepared(file)
    validate_config(config)
    assert config["cluster_name"] == "covergenre"


@BOTH
def test_the_pinned_versions_are_installed_and_nothing_else(file: Path) -> None:
    config = prepared(file)
    assert "ray==2.60.0" in (ROOT / "requirements.txt").read_text().splitlines()
    text = commands(config)
    assert not re.search(r"nightly|latest|\.whl|pip install -U", text), text
    assert text.count("-r ~/covergenre-requirements.txt") >= 1
    assert config["file_mounts"]["~/covergenre-requirements.txt"] == "requirements.txt"
    # As for a developer's environment.
    assert re.findall(r"--python (3\.\d+) ", text) == ["3.11"] * text.count("uv venv")


@BOTH
def test_what_is_sent_to_the_machines_is_there(file: Path) -> None:
    for here in loaded(file)["file_mounts"].values():
        assert here.startswith("~/") or (ROOT / here).is_file()


@BOTH
def test_nobody_gets_in_without_key_and_token(file: Path) -> None:
    config = prepared(file)
    text = commands(config)
    assert "export RAY_AUTH_MODE=token" in text
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in text
    assert not re.search(r"0\.0\.0\.0|::/0", json.dumps(config))
    # Ray would open ssh to the world in a group that it makes, or adds to.
    for kind in config["available_node_types"].values() if file == AWS else ():
        assert kind["node_config"]["SecurityGroupIds"]
    assert "security_group" not in config["provider"]


def test_machines_of_aws() -> None:
    kinds = loaded(AWS)["available_node_types"]
    head = kinds.pop(loaded(AWS)["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert "InstanceMarketOptions" not in head["node_config"]
    assert any(kind["resources"].get("GPU") for kind in kinds.values())
    for kind in (head, *kinds.values()):
        config = kind["node_config"]
        assert re.fullmatch(r"ami-[0-9a-f]{17}", config["ImageId"])
        assert config["IamInstanceProfile"]["Name"].startswith("covergenre-")
        (disk,) = config["BlockDeviceMappings"]
        assert disk["Ebs"]["VolumeSize"] >= 150 and disk["Ebs"]["Encrypted"]
        assert config["MetadataOptions"] == {"HttpTokens": "required"}
    for kind in kinds.values():
        assert kind["min_workers"] == 0 < kind["max_workers"]
        assert kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


@pytest.mark.parametrize("name", ["aws-s3-policy.json", "aws-head-policy.json"])
def test_policies_allow_no_more_than_they_name(name: str) -> None:
    policy = json.loads((ROOT / "docs" / name).read_text())
    for statement in policy["Statement"]:
        actions = statement["Action"]
        for action in [actions] if isinstance(actions, str) else actions:
            assert action.split(":")[1] != "*"
            writes = not re.match(r"ec2:Describe|iam:Get|s3:List|s3:Get|ec2:(Run|Create)", action)
            if writes:
                assert statement["Resource"] != "*" or "Condition" in statement, action


@pytest.fixture
def ec2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The endpoint of moto's AWS, with what docs/cluster.md has one make first."""
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    yield f"http://{host}:{port}"
    server.stop()


def test_ray_up_launches_a_head(ec2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as ssh: moto gives made-up public addresses, so an `ssh` that fails comes first."""
    session = boto3.session.Session()
    cloud, iam = session.client("ec2"), session.client("iam")
    vpc = cloud.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"][0]
    group = cloud.create_security_group(
        GroupName="covergenre", Description="test", VpcId=vpc["VpcId"]
    )["GroupId"]
    for name in ("covergenre-head", "covergenre-worker"):
        iam.create_instance_profile(InstanceProfileName=name)
    image = cloud.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]

    text = AWS.read_text()
    for placeholder, value in (("sg-0123456789abcdef0", group), ("ami-0123456789abcdef0", image)):
        assert placeholder in text
        text = text.replace(placeholder, value)
    (tmp_path / "cluster.yaml").write_text(text)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    home, tools = tmp_path / "home", tmp_path / "tools"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("0" * 64)
    tools.mkdir()
    for name in ("ssh", "scp", "rsync"):
        (tools / name).write_text("#!/bin/sh\nexit 255\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with (tmp_path / "log").open("w") as log:
        ray = str(Path(sys.prefix, "bin/ray"))
        up = subprocess.Popen(
            [ray, "up", "--yes", "--no-config-cache", "cluster.yaml"],
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            head = launched(cloud, up)
        finally:
            up.kill()
            up.wait()
    assert head is not None, (tmp_path / "log").read_text()
    config = loaded(AWS)["available_node_types"]["head"]["node_config"]
    assert head["InstanceType"] == config["InstanceType"]
    assert head["ImageId"] == image
    (profile,) = cloud.describe_iam_instance_profile_associations(
        Filters=[{"Name": "instance-id", "Values": [head["InstanceId"]]}]
    )["IamInstanceProfileAssociations"]
    assert profile["IamInstanceProfile"]["Arn"].endswith("instance-profile/covergenre-head")
    assert [g["GroupId"] for g in head["SecurityGroups"]] == [group]
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert tags["ray-cluster-name"] == "covergenre"
    assert tags["ray-node-type"] == "head"
    (disk,) = cloud.describe_volumes(
        Filters=[{"Name": "attachment.instance-id", "Values": [head["InstanceId"]]}]
    )["Volumes"]
    asked = copy.deepcopy(config["BlockDeviceMappings"][0]["Ebs"])
    assert (disk["Size"], disk["VolumeType"], disk["Encrypted"]) == (
        *(asked["VolumeSize"], asked["VolumeType"]),
        True,
    )
    # Nothing was opened that the user has not opened.
    (found,) = cloud.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    assert found["IpPermissions"] == []


def launched(cloud: Any, up: "subprocess.Popen[bytes]") -> dict[str, Any] | None:
    """The first instance with a name, while `ray up` runs."""
    while up.poll() is None:
        for reservation in cloud.describe_instances()["Reservations"]:
            instance: dict[str, Any]
            for instance in reservation["Instances"]:
                if any(tag["Key"] == "Name" for tag in instance.get("Tags", ())):
                    return instance
        threading.Event().wait(0.2)
    return None
