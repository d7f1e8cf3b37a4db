"""The JobSet and the container files, field by field."""

from __future__ import annotations

import re
import tomllib
from math import prod
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"


@pytest.fixture(scope="module")
def jobset() -> dict:
  return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def test_jobset_fields(jobset):
  """Names and values that the API of jobset.x-k8s.io/v1alpha2 takes."""
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset.keys() == {"apiVersion", "kind", "metadata", "spec"}
  policy = jobset["spec"]["failurePolicy"]
  assert jobset["spec"].keys() == {"failurePolicy", "replicatedJobs"}
  assert policy.keys() == {"maxRestarts", "rules"} and policy["maxRestarts"] > 0
  assert policy["rules"] == [
    {"name": "mistake", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  for job in jobset["spec"]["replicatedJobs"]:
    assert job.keys() == {"name", "replicas", "template"} and job["replicas"] >= 1


def test_jobset_restarts_all_but_mistakes(jobset):
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert job["backoffLimit"] == 0 and job["completionMode"] == "Indexed"
  assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy needs
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob"
  exits = {"containerName": container["name"], "operator": "In", "values": [2]}
  assert rule["onExitCodes"] == exits


def test_jobset_has_a_pod_a_host_with_all_its_chips(jobset):
  job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
  assert job["parallelism"] == job["completions"]
  assert job["parallelism"] * chips == prod(map(int, topology.split("x")))


def test_jobset_runs_jepax_in_a_mounted_workdir(jobset):
  template = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
  assert template["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
  pod = template["spec"]
  (container,) = pod["containers"]
  assert container["command"][0] == "bash" and (ROOT / container["command"][1]).is_file()
  arguments = dict(a.removeprefix("--").split("=") for a in container["args"])
  assert (ROOT / arguments["config"]).is_file()
  mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
  assert arguments["workdir"].startswith(mounts["bucket"] + "/")
  volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
  assert volumes.keys() == mounts.keys()
  options = volumes["bucket"]["csi"]["volumeAttributes"]["mountOptions"]
  assert "rename-dir-limit=" in options  # without it no checkpoint becomes whole


@pytest.mark.parametrize("kind", ["cpu", "cuda", "tpu"])
def test_containerfiles(kind):
  text = (LAUNCH / f"Containerfile.{kind}").read_text()
  lines = [line.split(maxsplit=1) for line in text.splitlines() if line and line[0] != "#"]
  assert {word for word, _ in lines} <= {
    "FROM",
    "ENV",
    "RUN",
    "WORKDIR",
    "COPY",
    "USER",
    "ENTRYPOINT",
  }
  by_word = {word: [rest for other, rest in lines if other == word] for word, _ in lines}
  (base,) = by_word["FROM"]
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  python = re.fullmatch(r"docker\.io/library/python:(3\.\d+)\.\d+-slim-bookworm", base).group(1)
  assert any(entry.endswith(python) for entry in project["classifiers"])
  copied = [path for rest in by_word["COPY"] for path in rest.split()[:-1]]
  assert all((ROOT / path).exists() for path in copied)
  assert {"pyproject.toml", "jepax", "configs", "launch", project["readme"]} <= set(copied)
  (install,) = [rest for rest in by_word["RUN"] if "pip install" in rest]
  extra = re.search(r"\.\[(\w+)\]'$", install)
  assert (extra.group(1) if extra else "cpu") == kind
  assert kind == "cpu" or kind in project["optional-dependencies"]
  assert by_word["ENTRYPOINT"] == ['["python", "-m", "jepax.main"]']
  order = [word for word, _ in lines]
  assert by_word["USER"] == ["jepax"] and order[-2:] == ["USER", "ENTRYPOINT"]  # root no longer
  assert any(rest.startswith("useradd") and rest.endswith(" jepax") for rest in by_word["RUN"])


def test_readme_names_every_file():
  text = (LAUNCH / "README.md").read_text()
  files = {path.name for path in LAUNCH.iterdir() if path.is_file()} - {"README.md"}
  assert [name for name in sorted(files) if f"`{name}`" not in text] == []
