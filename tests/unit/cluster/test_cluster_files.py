"""The files of `ray up`: what Ray makes of them, what they leave open, and a head on moto's EC2."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from covergenre.cluster.autoscaling import max_resources_of

ROOT = Path(__file__).parents[3]
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


@pytest.mark.parametrize(
    ("file", "resource", "most"),
    [
        (AWS, "GPU", 8),
        (AWS, "CPU", 8 * 8 + 16 * 16),
        (OWN, "CPU", 3 * 6),  # what the machines of one's own have, no file says
    ],
)
def test_what_the_cluster_can_ever_have(file: Path, resource: str, most: int) -> None:
    assert max_resources_of(prepared(file), resource, unknown=6) == most


def test_all_kinds_together_are_limited_too() -> None:
    config = prepared(AWS) | {"max_workers": 10}
    assert max_resources_of(config, "GPU", unknown=0) == 8
    assert max_resources_of(config, "CPU", unknown=0) == 10 * 16


def only_pinned(config: dict[str, Any]) -> None:
    """Whatever the machines install comes from the pinned requirements, with a pinned uv."""
    text = commands(config)
    installs = [line for line in text.splitlines() if re.search(r"\binstall\b|\bwget\b", line)]
    allowed = (
        r"command -v uv \|\| curl -LsSf https://astral\.sh/uv/\d+\.\d+\.\d+/install\.sh \| sh",
        r".* uv pip install --quiet --python ~/covergenre-env/bin/python"
        r" -r ~/covergenre-requirements\.txt",
    )
    assert len(installs) >= 2
    for line in installs:
        assert any(re.fullmatch(pattern, line) for pattern in allowed), line
    assert not re.search(r"nightly|latest|\.whl", text), text
    # As for a developer's environment.
    assert re.findall(r"--python (3\.\d+) ", text) == ["3.11"] * text.count("uv venv")
    assert config["file_mounts"]["~/covergenre-requirements.txt"] == "requirements.txt"


@BOTH
def test_the_pinned_versions_are_installed_and_nothing_else(file: Path) -> None:
    only_pinned(prepared(file))
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    assert "ray==2.60.0" in pinned
    assert any(line.startswith("boto3==") for line in pinned)  # the head's autoscaler needs it


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


@dataclass(frozen=True)
class Account:
    """moto's AWS in a process of its own, with what docs/cluster.md has one make first."""

    folder: Path
    """Has cluster.yaml, with everything marked CHANGE filled in."""
    environment: dict[str, str]
    """Of a user of it, whose `ssh` only fails."""
    cloud: Any
    """boto3's client of EC2."""
    group: str
    image: str


_SERVER = """
import sys, threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
"""Not in this process: moto keeps one state a process, and other tests have theirs here."""


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env=clean | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin and server.stdout
    try:
        yield _account(tmp_path_factory.mktemp("account"), server.stdout.readline().strip(), clean)
    finally:
        server.kill()
        server.wait()
        server.stdin.close()
        server.stdout.close()


def _account(folder: Path, endpoint: str, clean: dict[str, str]) -> Account:
    session = boto3.session.Session("none", "none", region_name="us-west-2")
    cloud, iam = (session.client(name, endpoint_url=endpoint) for name in ("ec2", "iam"))
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
    (folder / "cluster.yaml").write_text(text)
    shutil.copy(ROOT / "requirements.txt", folder)
    home, tools = folder / "home", folder / "tools"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray/auth_token").write_text("0" * 64)
    tools.mkdir()
    for name in ("ssh", "scp", "rsync"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {folder}/{name}-was-run\nexit 255\n")
        (tools / name).chmod(0o755)
    environment = clean | {
        "HOME": str(home),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-west-2",
    }
    return Account(folder, environment, cloud, group, image)


@pytest.mark.commands
def test_ray_adds_no_command_of_its_own(account: Account) -> None:
    """To what `ray up` sends to the machines, after the provider has completed it too."""
    complete = (
        "import json, sys, yaml; from ray.autoscaler._private.commands import _bootstrap_config\n"
        "config = _bootstrap_config(yaml.safe_load(open('cluster.yaml')), no_config_cache=True)\n"
        "json.dump(config, open('complete.json', 'w'))\n"
    )
    subprocess.run(
        [sys.executable, "-c", complete],
        cwd=account.folder,
        env=account.environment,
        check=True,
        capture_output=True,
    )
    config = json.loads((account.folder / "complete.json").read_text())
    only_pinned(config)
    ours = loaded(AWS)
    assert config["head_setup_commands"] == ours["setup_commands"]
    assert config["worker_setup_commands"] == ours["setup_commands"]
    for name in ("initialization", "head_start_ray", "worker_start_ray"):
        assert config[f"{name}_commands"] == ours[f"{name}_commands"]


@pytest.mark.commands
def test_ray_up_launches_a_head(account: Account) -> None:
    """As far as ssh: moto gives made-up public addresses, so an `ssh` that fails comes first."""
    with (account.folder / "log").open("w") as log:
        ray = str(Path(sys.prefix, "bin/ray"))
        up = subprocess.Popen(
            [ray, "up", "--yes", "--no-config-cache", "cluster.yaml"],
            cwd=account.folder,
            env=account.environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            # An instance has its name before it has its profile and its disk; by the first ssh
            # EC2 has answered, and it is all there.
            while up.poll() is None and not (account.folder / "ssh-was-run").exists():
                threading.Event().wait(0.1)
        finally:
            up.kill()
            up.wait()
    assert (account.folder / "ssh-was-run").exists(), (account.folder / "log").read_text()
    cloud = account.cloud
    (reservation,) = cloud.describe_instances()["Reservations"]
    (head,) = reservation["Instances"]
    config = loaded(AWS)["available_node_types"]["head"]["node_config"]
    assert head["InstanceType"] == config["InstanceType"]
    assert head["ImageId"] == account.image
    (profile,) = cloud.describe_iam_instance_profile_associations(
        Filters=[{"Name": "instance-id", "Values": [head["InstanceId"]]}]
    )["IamInstanceProfileAssociations"]
    assert profile["IamInstanceProfile"]["Arn"].endswith("instance-profile/covergenre-head")
    assert [g["GroupId"] for g in head["SecurityGroups"]] == [account.group]
    tags = {tag["Key"]: tag["Value"] for tag in head["Tags"]}
    assert tags["ray-cluster-name"] == "covergenre"
    assert tags["ray-node-type"] == "head"
    (disk,) = cloud.describe_volumes(
        Filters=[{"Name": "attachment.instance-id", "Values": [head["InstanceId"]]}]
    )["Volumes"]
    asked = config["BlockDeviceMappings"][0]["Ebs"]
    assert (disk["Size"], disk["VolumeType"]) == (asked["VolumeSize"], asked["VolumeType"])
    assert disk["Encrypted"]
    # Nothing was opened that the user has not opened.
    (found,) = cloud.describe_security_groups(GroupIds=[account.group])["SecurityGroups"]
    assert found["IpPermissions"] == []
