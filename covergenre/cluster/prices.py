"""Prices of machines and of storage, and the machine types of a cluster file, for `quote`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from covergenre.errors import ConfigError, did_you_mean
from covergenre.io import storage

_DEFAULT = Path(__file__).with_name("prices.yaml")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Machine(_Strict):
    """A machine type. Prices are in US dollars per hour; None: unknown."""

    on_demand: float | None = Field(None, ge=0)
    spot: float | None = Field(None, ge=0)
    covers_per_second: dict[str, float] = Field(default_factory=dict)
    """Measured rate by the name of the model."""


class StoragePrices(_Strict):
    """US dollars."""

    get_per_1000: float = Field(ge=0)
    put_per_1000: float = Field(ge=0)
    gb_month: float = Field(ge=0)


class Prices(_Strict):
    """See prices.yaml."""

    machines: dict[str, Machine]
    storage: StoragePrices


@dataclass(frozen=True)
class MachineGroup:
    """Machines of one type in a cluster file."""

    type: str
    count: int
    """How many there can be."""
    has_gpu: bool


def read_prices(uri: str | None) -> Prices:
    """The prices in a YAML file; None: the file that comes with covergenre."""
    file = uri or str(_DEFAULT)
    value = _read_yaml(file)
    try:
        return Prices.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{file}: {where}: {problem['msg']}", code="invalid") from error


def read_machine_groups(uri: str) -> list[MachineGroup]:
    """The workers of a Ray cluster file; the head runs no tasks.

    Machines of your own (`provider: type: local`) are of the type "local".
    """
    value = _read_yaml(uri)
    provider = value.get("provider") if isinstance(value, dict) else None
    if not isinstance(provider, dict) or "type" not in provider:
        raise ConfigError(
            f"{uri}: not a Ray cluster file: it has no provider.type", code="no_cluster_file"
        )
    if provider["type"] == "local":
        machines = [provider.get("head_ip"), *provider.get("worker_ips", ())]
        return [MachineGroup("local", len([ip for ip in machines if ip]), False)]
    head = value.get("head_node_type")
    return [
        MachineGroup(
            str(kind.get("node_config", {}).get("InstanceType", name)),
            int(kind.get("max_workers", value.get("max_workers", 0))),
            bool(kind.get("resources", {}).get("GPU")),
        )
        for name, kind in value.get("available_node_types", {}).items()
        if name != head
    ]


def check_machine_type(name: str, prices: Prices) -> None:
    """Raises ConfigError if there is no such machine type among the prices."""
    if name not in prices.machines:
        raise ConfigError(
            f"--machine {name}: not in the table of prices{did_you_mean(name, prices.machines)};"
            " pass a file that has it with --prices",
            code="no_price",
        )


def _read_yaml(uri: str) -> Any:
    try:
        return yaml.safe_load(storage.read_bytes(uri))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{uri}: not valid YAML: {reason}", code="not_yaml") from error
