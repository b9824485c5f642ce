"""The private APIs of Ray that ray_internals.py uses are those of Ray 2.60.

A failure names an API that has changed; adapt the function that uses it.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import job_config
from ray._private import node, ray_constants, worker
from ray._private.authentication import authentication_token_setup
from ray.data import DataContext
from ray.data._internal.execution import execution_callback, streaming_executor
from ray.data._internal.planner import planner
from ray.data._internal.usage import UsageCallback
from ray.job_submission import JobSubmissionClient
from ray.train.v2.api import exceptions
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from covergenre.cluster import ray_internals

USED_BY = "used by covergenre/cluster/ray_internals.py; changed in Ray " + ray.__version__


def test_written_for_this_ray() -> None:
    assert ray.__version__.startswith("2.60."), "check every function of ray_internals.py"


@pytest.mark.parametrize("name", [*ray_internals._UNUSED_PROCESSES, ray_internals._LOG_MONITOR])
def test_node_has_a_method_for_each_process(name: str) -> None:
    assert callable(getattr(node.Node, name, None)), f"ray._private.node.Node.{name}: {USED_BY}"


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (node, "self._webui_url"),
        (node.Node, "self.start_api_server("),
        (worker._maybe_modify_runtime_env, "ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV"),
        (worker.connect, "._runtime_env_has_working_dir()"),
        (job_config.JobConfig.__init__, "_py_driver_sys_path"),
        (worker.init, "_temp_dir"),
        (authentication_token_setup, "RAY_AUTH_MODE"),
        (streaming_executor, "on_execution_step("),
        (streaming_executor, "in self._callbacks:"),
        (planner.Planner.plan, "callbacks.append(create_usage_callback("),
        (DataParallelTrainer, "self._register_sigint_handler(controller)"),
        (JobSubmissionClient, "self._do_request("),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_ray_uses_the_replaced_attributes_and_arguments(code: Any, text: str) -> None:
    assert text in inspect.getsource(code), f"{code} has no {text!r}: {USED_BY}"


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (execution_callback.ExecutionCallback.on_execution_step, ["self", "executor"]),
        (execution_callback.ExecutionCallback.before_execution_starts, ["self", "executor"]),
        (DataParallelTrainer._register_sigint_handler, ["self", "controller"]),
        (job_config.JobConfig._runtime_env_has_working_dir, ["self"]),
    ],
)
def test_overridden_methods_have_these_parameters(
    function: Callable[..., Any], parameters: list[str]
) -> None:
    assert list(inspect.signature(function).parameters) == parameters, f"{function}: {USED_BY}"


def test_attributes_and_errors_exist() -> None:
    assert hasattr(DataContext(), "custom_execution_callback_classes"), USED_BY
    assert isinstance(ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV, bool), USED_BY
    assert ray_internals.is_token_auth_enabled() in (True, False)


def test_startup_timeout_is_distinguished_from_other_errors() -> None:
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    timeout = exceptions.ControllerError(WorkerGroupStartupTimeoutError(num_workers=1))
    assert ray_internals.is_startup_timeout(timeout)
    assert not ray_internals.is_startup_timeout(exceptions.ControllerError(ValueError()))
    assert not ray_internals.is_startup_timeout("text")


def test_pipelines_collect_no_usage_statistics() -> None:
    called: list[object] = []

    class Last(execution_callback.ExecutionCallback):
        def before_execution_starts(self, executor: Any) -> None:
            called.append(self)

    ours = [callback() for callback in ray_internals.PIPELINE_CALLBACKS]
    last = Last()
    executor: Any = SimpleNamespace(_callbacks=[*ours, UsageCallback(None), last])  # type: ignore[arg-type]
    for callback in executor._callbacks:  # as the executor does
        callback.before_execution_starts(executor)
    assert executor._callbacks == [*ours, last]
    assert called == [last]


def test_workers_of_a_job_import_installed_code_only() -> None:
    assert ray_internals.InstalledCodeOnly(None)._runtime_env_has_working_dir()


def test_replaced_methods_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setattr(ray_constants, "RAY_ENABLE_UV_RUN_RUNTIME_ENV", True)
    before = node.Node.start_api_server, ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    with ray_internals.without_unused_processes(keep_log_monitor=False):
        assert node.Node.start_api_server is not before[0]
        assert not ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV
    assert (node.Node.start_api_server, ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV) == before
