"""The launch scripts, against stand-ins that record how they were called."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
RUN = ["--config=configs/quickstart.py", '--config.log.wandb=it\'s a "project" $HOME']

# A stand-in appends its name and arguments to `calls`, then answers with the next line of `NAME`:
# an exit status and, after a space, what it prints, as an error where it fails. No line left:
# success.
RECORD = """#!/usr/bin/env bash
{ printf '%q ' "${0##*/}" "$@"; echo; } >>"$FAKE/calls"
"""
ANSWER = """
answers=$FAKE/$answer.answers
[[ -s $answers ]] || exit 0
read -r status text <"$answers"
sed -i 1d "$answers"
if [[ -n $text ]]; then echo "$text" >&$((status ? 2 : 1)); fi
exit "$status"
"""
GCLOUD = """
case $* in
  *describe*) answer=state ;;
  *jepax.main*) answer=run ;;
  *results.json*) answer=done ;;
  *) answer=other ;;
esac
"""


class Fakes:
  """Stand-ins in a folder that comes first on the PATH."""

  def __init__(self, folder: Path):
    self.folder = folder
    self.environment = os.environ | {
      "PATH": f"{folder}:{os.environ['PATH']}",
      "FAKE": str(folder),
      "POLL": "0",
    }

  def add(self, name: str, body: str = "answer=${0##*/}") -> None:
    path = self.folder / name
    path.write_text(f"{RECORD}{body}{ANSWER}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)

  def answers(self, name: str, *lines: str) -> None:
    (self.folder / f"{name}.answers").write_text("".join(f"{line}\n" for line in lines))

  def calls(self) -> list[list[str]]:
    path = self.folder / "calls"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []

  def run(self, *command: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
      ["bash", *map(str, command)],
      env=self.environment,
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=60,
    )


@pytest.fixture
def fakes(tmp_path) -> Fakes:
  folder = tmp_path / "fakes"
  folder.mkdir()
  return Fakes(folder)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
  checker = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  assert subprocess.run(["bash", "-n", script]).returncode == 0
  if checker is None:
    pytest.skip("no shellcheck: pip install '.[test]'")
  done = subprocess.run([checker, script], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


# --- Cloud TPU ------------------------------------------------------------------------------

POD = [LAUNCH / "tpu_pod.sh", "--name=n", "--zone=z", "--type=v5litepod-16", "--bucket=b"]
POD_RUN = [*RUN, "--workdir=/gcs/run"]
NONE = "1 ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource not found"


@pytest.fixture
def pod(fakes) -> Fakes:
  """What the TPU gets is a commit, which a copy without its history doesn't have."""
  fakes.add("gcloud", GCLOUD)
  fakes.add("git")
  return fakes


def pod_steps(fakes: Fakes) -> list[str]:
  """What gcloud was asked for, looks at the state left out."""
  steps = []
  for call in fakes.calls():
    text = " ".join(call)
    names = {
      "queued-resources create": "create",
      "queued-resources delete": "delete",
      "jepax.main": "run",
      "results.json": "look",
      "tpu-vm scp": "copy",
      "tpu_host.sh": "install",
    }
    steps += [name for part, name in names.items() if part in text]
  return steps


def test_tpu_pod_creates_trains_and_deletes(pod):
  pod.answers("state", NONE, NONE, "0 PROVISIONING", "0 ACTIVE")
  done = pod.run(*POD, "--spot", "--", *POD_RUN)
  assert done.returncode == 0, done.stderr
  assert pod_steps(pod) == ["create", "copy", "install", "run", "look", "delete"]
  assert [call[3] for call in pod.calls() if call[0] == "git"] == ["rev-parse", "archive"]
  create = next(call for call in pod.calls() if "create" in call)
  assert {"--node-id=n", "--zone=z", "--accelerator-type=v5litepod-16", "--spot"} < set(create)
  for call in pod.calls():
    assert "--zone=z" in call or call[0] == "git"
    if "scp" in call or any("jepax.main" in word for word in call):
      assert "--worker=all" in call
    if any("results.json" in word for word in call):
      assert "--worker=0" in call


def test_tpu_pod_starts_over_when_it_is_taken_away(pod):
  states = ("0 ACTIVE", "0 ACTIVE", "0 SUSPENDING", "0 SUSPENDED", NONE, "0 ACTIVE")
  pod.answers("state", *states)
  pod.answers("run", "255", "0")
  assert pod.run(*POD, "--keep", "--", *POD_RUN).returncode == 0
  again = ["copy", "install", "run"]
  assert pod_steps(pod) == [*again, "delete", "create", *again, "look"]
  assert not any("--spot" in call for call in pod.calls())


def test_tpu_pod_runs_again_what_was_stopped(pod):
  pod.answers("state", *["0 ACTIVE"] * 3)
  pod.answers("done", "1", "0")  # no results.json after the first run
  assert pod.run(*POD, "--", *POD_RUN).returncode == 0
  start = ["copy", "install", "run", "look"]
  assert pod_steps(pod) == [*start, *start, "delete"]


def test_tpu_pod_gives_up_on_a_run_that_fails(pod):
  pod.answers("state", *["0 ACTIVE"] * 9)
  pod.answers("run", *["2"] * 9)
  done = pod.run(*POD, "--", *POD_RUN)
  assert done.returncode == 1 and "failed, 3 in a row" in done.stdout
  assert pod_steps(pod) == ["copy", "install", "run"] * 3


def test_tpu_pod_asks_again_where_gcloud_can_not_tell(pod):
  """Not knowing is not the same as there being none, which would be created a second time."""
  unavailable = "1 ERROR: UNAVAILABLE: 503 try again"
  pod.answers("state", "0 WAITING_FOR_RESOURCES", unavailable, "0 ACTIVE")
  done = pod.run(*POD, "--keep", "--", *POD_RUN)
  assert done.returncode == 0 and "503 try again" in done.stderr
  assert pod_steps(pod) == ["copy", "install", "run", "look"]
  pod.answers("state", "1 ERROR: PERMISSION_DENIED")  # at the start somebody is there to read it
  done = pod.run(*POD, "--", *POD_RUN)
  assert done.returncode == 2 and "PERMISSION_DENIED" in done.stderr
  assert "whether there is a n in z" in done.stderr


@pytest.mark.parametrize(
  "kind, image",
  [
    ("v4-32", "tpu-ubuntu2204-base"),
    ("v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5p-128", "v2-alpha-tpuv5"),
    ("v6e-256", "v2-alpha-tpuv6e"),
  ],
)
def test_tpu_pod_takes_the_image_of_the_type(pod, kind, image):
  done = pod.run(*POD, f"--type={kind}", "--dry_run", "--", *POD_RUN)
  assert f"--runtime-version={image} " in done.stdout.replace("\n", " ")
  mine = pod.run(*POD, f"--type={kind}", "--runtime=mine", "--dry_run", "--", *POD_RUN)
  assert "--runtime-version=mine " in mine.stdout.replace("\n", " ")
  unknown = pod.run(*POD, "--type=v99-8", "--dry_run", "--", *POD_RUN)
  assert unknown.returncode == 2 and "--runtime=... is missing" in unknown.stderr


def test_tpu_pod_runs_a_preflight_once(pod):
  pod.answers("state", *["0 ACTIVE"] * 2)
  assert pod.run(*POD, "--keep", "--", *POD_RUN, "--dry_run").returncode == 0
  assert pod_steps(pod) == ["copy", "install", "run"]


def test_tpu_pod_dry_run_calls_nothing(pod):
  done = pod.run(*POD, "--dry_run", "--", *POD_RUN)
  assert done.returncode == 0 and pod.calls() == []
  printed = [shlex.split(line)[:5] for line in done.stdout.splitlines()]
  assert [words[0] for words in printed] == ["git", *["gcloud"] * 6]
  assert [words[4] for words in printed[1:]] == ["create", "scp", "ssh", "ssh", "ssh", "delete"]


def test_tpu_pod_without_a_commit_says_so(pod):
  pod.answers("git", "128")
  done = pod.run(*POD, "--", *POD_RUN)
  assert done.returncode == 2 and "git clone" in done.stderr
  assert [call[0] for call in pod.calls()] == ["git"]


def test_arguments_survive_the_shells(pod, tmp_path):
  """What the remote shell makes of the command is what the user wrote."""
  pod.answers("state", *["0 ACTIVE"] * 2)
  pod.run(*POD, "--", *POD_RUN)
  words = next(w for call in pod.calls() for w in call if "jepax.main" in w)
  home = tmp_path / "home"
  (home / "jepax/.venv/bin").mkdir(parents=True)
  (pod.folder / "calls").unlink()
  pod.add("python")
  shutil.copy(pod.folder / "python", home / "jepax/.venv/bin/python")
  command = f"cd {home} && {words.removeprefix('--command=')}"
  subprocess.run(["bash", "-c", command], env=pod.environment, check=True)
  assert pod.calls() == [["python", "-m", "jepax.main", *POD_RUN]]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([*POD, *POD_RUN], "unknown option --config=configs/quickstart.py"),
    (POD, "arguments of jepax.main are missing"),
    ([*POD[:-1], "--", *POD_RUN], "--bucket=... is missing"),
    ([*POD, "--", "--workdir=gs://b/run"], "must lie in /gcs"),
    ([LAUNCH / "slurm.sbatch", *POD_RUN], "stand after --"),
    ([LAUNCH / "slurm.sbatch", "--", *RUN], "--workdir=... is missing"),
    ([LAUNCH / "gke_pod.sh", *RUN], "--workdir=... is missing"),
  ],
)
def test_wrong_use_is_refused(fakes, arguments, message):
  for name in ("gcloud", "srun", "python"):
    fakes.add(name)
  done = fakes.run(*arguments)
  assert done.returncode == 2 and message in done.stderr
  assert fakes.calls() == []


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--", "no-such-program"], "no program 'no-such-program'"),
    (["--grace=nan", "--", "true"], "--grace not negative"),  # which would wait for ever
    (["--processes=0", "--", "true"], "--processes must be at least 1"),
    ([], "after --"),
  ],
)
def test_wrong_use_of_local_is_refused(arguments, message):
  command = [sys.executable, LAUNCH / "local.py", *arguments]
  done = subprocess.run(command, capture_output=True, text=True, timeout=60)
  assert done.returncode == 2 and message in done.stderr
  assert "Traceback" not in done.stderr


# --- SLURM ----------------------------------------------------------------------------------


@pytest.fixture
def slurm(fakes) -> Fakes:
  fakes.add("srun")
  fakes.add("scontrol")
  fakes.environment |= {"SLURM_JOB_ID": "42"}
  return fakes


@pytest.mark.parametrize("end", ["done", "stopped", "early", "failed", "preflight"])
def test_slurm_requeues_what_was_stopped_alone(slurm, tmp_path, end):
  arguments = [*RUN, f"--workdir={tmp_path}", *(["--dry_run"] if end == "preflight" else [])]
  if end == "done":
    (tmp_path / "results.json").touch()
  if end == "failed":
    slurm.answers("srun", "3")
  if end == "early":  # before there was anything to save
    slurm.answers("srun", "143")
  done = slurm.run(LAUNCH / "slurm.sbatch", "--", *arguments)
  assert done.returncode == (3 if end == "failed" else 0)
  first, *rest = slurm.calls()
  assert first == ["srun", "--kill-on-bad-exit=1", "python", "-m", "jepax.main", *arguments]
  assert rest == ([["scontrol", "requeue", "42"]] if end in ("stopped", "early") else [])


def test_slurm_script_outlives_a_signal(slurm, tmp_path):
  slurm.add("srun", "sleep 1; answer=srun")
  command = ["bash", LAUNCH / "slurm.sbatch", "--", f"--workdir={tmp_path}"]
  process = subprocess.Popen(command, env=slurm.environment)
  wait_for(lambda: slurm.calls())
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 0
  assert slurm.calls()[-1] == ["scontrol", "requeue", "42"]


def test_slurm_dry_run_calls_nothing(slurm):
  done = slurm.run(LAUNCH / "slurm.sbatch", "--dry_run", "--", *RUN, "--workdir=/shared/run")
  assert done.returncode == 0 and slurm.calls() == []
  assert shlex.split(done.stdout.splitlines()[0])[-5:] == [
    *("-m", "jepax.main"),
    *RUN,
    "--workdir=/shared/run",
  ]


def test_slurm_directives():
  lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
  found = dict(
    re.fullmatch(r"#SBATCH --([a-z-]+)=?(\S*)", line).groups()
    for line in lines
    if line.startswith("#SBATCH")
  )
  assert found["signal"].startswith("TERM@")  # to the tasks: 'B:' would be this shell alone
  assert int(found["signal"].removeprefix("TERM@")) >= 60
  assert "requeue" in found and found["open-mode"] == "append"
  commands = [i for i, line in enumerate(lines) if line and not line.startswith("#")]
  last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
  assert last < commands[0]  # SLURM reads none after the first command


# --- GKE ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("status", "written", "expected"), [(0, True, 0), (0, False, 143), (2, False, 2)]
)
def test_gke_pod_status(fakes, tmp_path, status, written, expected):
  fakes.add("python")
  fakes.answers("python", str(status))
  if written:
    (tmp_path / "results.json").touch()
  arguments = [*RUN, f"--workdir={tmp_path}"]
  assert fakes.run(LAUNCH / "gke_pod.sh", *arguments).returncode == expected
  assert fakes.calls() == [["python", "-m", "jepax.main", *arguments]]


def test_gke_pod_hands_the_signal_on_once(fakes, tmp_path):
  """As process 1 it alone is signalled; jepax saves at the first signal and dies of a second."""
  trap = "trap 'echo saved >>\"$FAKE/signals\"; (( ++n < 2 )) || exit 9' TERM\n"
  fakes.add("python", trap + 'echo >"$FAKE/ready"; while ! [[ -e $FAKE/end ]]; do sleep .05; done')
  command = ["bash", LAUNCH / "gke_pod.sh", f"--workdir={tmp_path}"]
  process = subprocess.Popen(command, env=fakes.environment)
  wait_for((fakes.folder / "ready").exists)
  process.send_signal(signal.SIGTERM)
  wait_for((fakes.folder / "signals").exists)
  process.send_signal(signal.SIGTERM)
  time.sleep(0.5)  # time enough to die of it, or to hand it on
  assert process.poll() is None
  (fakes.folder / "end").touch()
  assert process.wait(timeout=60) == 143
  assert (fakes.folder / "signals").read_text() == "saved\n"


def test_gke_pod_returns_what_a_stopped_run_fails_with(fakes, tmp_path):
  fakes.add("python", 'trap "exit 1" TERM; echo >"$FAKE/ready"; while true; do sleep .05; done')
  command = ["bash", LAUNCH / "gke_pod.sh", f"--workdir={tmp_path}"]
  process = subprocess.Popen(command, env=fakes.environment)
  wait_for((fakes.folder / "ready").exists)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=60) == 1


def wait_for(condition) -> None:
  deadline = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < deadline, "waited for 30 s"
    time.sleep(0.02)


# --- The README's commands ---------------------------------------------------------------------


def readme_command(start: str) -> list[str]:
  blocks = re.findall(r"```bash\n(.*?)\n```", (LAUNCH / "README.md").read_text(), re.DOTALL)
  return shlex.split(next(block for block in blocks if block.startswith(start)))


def test_readme_commands_are_understood(fakes, tmp_path):
  fakes.add("python")
  script, *options = readme_command("launch/tpu_pod.sh")
  at = options.index("--")
  done = fakes.run(ROOT / script, *options[:at], "--dry_run", *options[at:])
  assert done.returncode == 0, done.stderr
  _, _, script, *arguments = readme_command("sbatch")
  done = fakes.run(ROOT / script, "--dry_run", *arguments)
  assert done.returncode == 0, done.stderr
  xpk = readme_command("xpk")
  (command,) = [word.removeprefix("--command=") for word in xpk if word.startswith("--command=")]
  (tmp_path / "results.json").touch()
  done = fakes.run("-c", command.replace("/gcs/runs/vitb", str(tmp_path)))
  assert done.returncode == 0 and fakes.calls()[0][:3] == ["python", "-m", "jepax.main"]
  for words in (options, arguments, command.split()):
    (config,) = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    assert (ROOT / config).is_file()
