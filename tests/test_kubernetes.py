"""The manifest for Kubernetes: by the schemas of its resources, and the line that its pods run."""

import os
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from torch.distributed.run import parse_args

from ringattn.training import config

from .processes import ROOT

RESOURCES = list(yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text()))
JOB = next(x for x in RESOURCES if x["kind"] == "Job")


@pytest.mark.parametrize("version", ["1.29", kubernetes_validate.latest_version()])
def test_every_resource_is_what_its_schema_says(version):
    for resource in RESOURCES:
        kubernetes_validate.validate(resource, version, strict=True)
    broken = {**JOB, "spec": {**JOB["spec"], "completionMod": "Indexed"}}
    with pytest.raises(kubernetes_validate.ValidationError, match="completionMod"):
        kubernetes_validate.validate(broken, version, strict=True)


@pytest.mark.parametrize("index", [0, 3])
def test_the_line_of_a_pod_is_one_of_torchrun_and_of_train_py(tmp_path, index):
    """Run by its shell, with a torchrun that says what it was given."""
    said = tmp_path / "torchrun"
    said.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    said.chmod(0o755)
    pod = JOB["spec"]["template"]["spec"]
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "RUN": "a-b",
        "JOB_COMPLETION_INDEX": str(index),
    }  # fmt: skip
    command = pod["containers"][0]["command"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    given = parse_args(done.stdout.splitlines())
    assert given.nnodes == str(JOB["spec"]["completions"]) == str(JOB["spec"]["parallelism"])
    assert f"is_host={int(index == 0)}," in given.rdzv_conf and given.rdzv_id == "a-b"
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert int(given.nproc_per_node) == gpus
    # What has to fit into what, and under which names pods find each other.
    assert given.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    service = next(x for x in RESOURCES if x["kind"] == "Service")
    name, port = JOB["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert given.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:{port}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert given.module and given.training_script == "ringattn.training"
    config.composed(given.training_script_args)
    mounts = {m["name"]: m["mountPath"] for m in pod["containers"][0]["volumeMounts"]}
    assert set(mounts) == {v["name"] for v in pod["volumes"]}
    run_dir = next(k for k in given.training_script_args if k.startswith("run_dir="))
    assert Path(run_dir.removeprefix("run_dir=")).is_relative_to(mounts["shared"])
