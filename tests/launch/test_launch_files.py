# SPDX-License-Identifier: Apache-2.0
"""The files of launch/: short, honest about what was run, and they keep the contract of exit code
75 (told to stop, state saved: start again). Clusters are stood in for by programs on PATH."""

import json
import os
import pathlib
import re
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(file for file in (ROOT / "launch").rglob("*") if file.is_file())
STOPPED, PEER_LOST = 75, 69


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_launch_file_is_short_and_says_what_was_not_run(file):
    lines = file.read_text().splitlines()
    assert len(lines) < 50
    head = []
    for line in lines:
        if not line.startswith("#"):
            break
        head.append(line)
    head = " ".join(head)
    assert "NOT run" in head and re.search("Run here|Checked here", head)


@pytest.mark.parametrize("file", [f for f in FILES if f.suffix in (".sh", ".env")], ids=str)
def test_every_script_is_bash(file):
    found = subprocess.run(["bash", "-n", str(file)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def stand_ins(folder, programs):
    """Writes bash programs into a folder and returns an environment that finds them first."""
    bin_folder = folder / "bin"
    bin_folder.mkdir()
    for name, body in programs.items():
        (bin_folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    keep = {key: os.environ[key] for key in ("HOME", "LANG") if key in os.environ}
    return {**keep, "PATH": f"{bin_folder}:{os.environ['PATH']}", "LOG": str(folder / "log")}


def run(script, *arguments, env):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


# -- Slurm


def slurm(folder, code, *arguments):
    """Runs slurm.sh where every task ends with `code`; returns (exit code, what was called)."""
    folder.mkdir()
    env = stand_ins(
        folder,
        {
            "srun": 'echo "srun $*" >> "$LOG"; env > "$LOG.env"; exit ' + str(code),
            "scontrol": 'echo "scontrol $*" >> "$LOG"',
        },
    )
    done = run("slurm.sh", *arguments, env={**env, "SLURM_JOB_ID": "4711"})
    log = folder / "log"
    return done.returncode, log.read_text().splitlines() if log.exists() else []


ARGUMENTS = ("configs/siglip_digits.py", "/shared/runs/one", "--config.mesh.fsdp=8")


def test_slurm_requeues_a_job_that_was_stopped_or_lost_a_process_and_no_other(tmp_path):
    for code in (STOPPED, PEER_LOST):
        _, called = slurm(tmp_path / str(code), code, *ARGUMENTS)
        assert called[1:] == ["scontrol requeue 4711"]
    for code in (0, 1, 137, 143):
        found, called = slurm(tmp_path / str(code), code, *ARGUMENTS)
        assert found == code and len(called) == 1


def test_slurm_passes_the_flags_on_and_shares_the_compile_cache(tmp_path):
    _, (command,) = slurm(tmp_path / "x", 0, *ARGUMENTS)
    assert command.endswith(
        "python train.py --distributed=auto --config=configs/siglip_digits.py "
        "--workdir=/shared/runs/one --config.mesh.fsdp=8"
    )
    env = (tmp_path / "x" / "log.env").read_text().splitlines()
    assert "JAX_COMPILATION_CACHE_DIR=/shared/runs/compilation_cache" in env
    assert "JAX_OPTIMIZATION_LEVEL=O1" in env, "the preset reaches the processes"


def test_slurm_without_config_and_workdir_says_how_to_use_it(tmp_path):
    code, called = slurm(tmp_path / "x", 0, "configs/siglip_digits.py")
    assert code == 1 and not called


def test_slurm_signals_every_process_ahead_of_the_limit_and_keeps_its_log():
    options = re.findall(r"^#SBATCH (\S+)", (ROOT / "launch" / "slurm.sh").read_text(), re.M)
    (signal,) = [o for o in options if o.startswith("--signal=")]
    # with "B:" Slurm would signal the batch script alone, and train.py never hear of it
    assert re.fullmatch(r"--signal=TERM@\d+", signal) and int(signal.split("@")[1]) >= 120
    assert {"--requeue", "--open-mode=append"} <= set(options)
    # a task that saw one GPU alone would look for its own number among one
    assert not [o for o in options if o.startswith(("--gpus-per-task", "--gpu-bind"))]


# -- TPU VMs


GCLOUD = """
echo "$*" >> "$LOG"
case "$*" in
  *" describe "*) n=$(grep -c describe "$LOG"); set -- $STATES; echo "${!n}" ;;
  *" ssh "*) n=$(grep -c " ssh " "$LOG"); set -- $CODES; exit "${!n}" ;;
esac
"""


def tpu(folder, *arguments, codes="0", states="ACTIVE", **env):
    """Runs tpu_vm.sh with a gcloud that answers from two lists; returns what it was called with."""
    folder.mkdir()
    base = stand_ins(folder, {"gcloud": GCLOUD, "sleep": "", "git": 'echo "git $*" >> "$LOG"'})
    env = {"ZONE": "z", "ACCELERATOR": "v5litepod-256", "CODES": codes, "STATES": states, **env}
    done = run("tpu_vm.sh", *arguments, env={**base, **env})
    log = folder / "log"
    return done, log.read_text().splitlines() if log.exists() else []


def test_a_tpu_run_starts_again_on_exit_code_75_and_on_no_other(tmp_path):
    train = ("train", "run1", *ARGUMENTS)
    done, called = tpu(tmp_path / "again", *train, codes="75 75 0")
    assert done.returncode == 0 and len(called) == 3 and len(set(called)) == 1
    for code in (1, 69, 137, 255):
        done, called = tpu(tmp_path / str(code), *train, codes=f"{code} 0")
        assert done.returncode == 1 and len(called) == 1


def test_a_tpu_run_starts_on_all_workers_of_all_slices_at_once(tmp_path):
    _, (called,) = tpu(tmp_path / "x", "train", "run1", *ARGUMENTS)
    for flag in ("--node=all", "--worker=all", "--batch-size=all", "--zone=z"):
        assert flag in called.split()


def test_the_command_for_a_tpu_worker_survives_the_shells_on_the_way(tmp_path):
    home = tmp_path / "home"
    (home / "flax_vlm" / ".venv" / "bin").mkdir(parents=True)
    (home / "flax_vlm" / "launch").symlink_to(ROOT / "launch")
    python = home / "flax_vlm" / ".venv" / "bin" / "python"
    python.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > args; env > environment\n')
    python.chmod(0o755)
    odd = "--config.data.name=folder:/data/two words/$HOME"
    _, (called,) = tpu(tmp_path / "x", "train", "run1", *ARGUMENTS[:2], odd)
    command = called.split("--command=", 1)[1]
    # what sshd does with it
    subprocess.run(["bash", "-c", command], cwd=home, env={"HOME": str(home)}, check=True)
    assert (home / "flax_vlm" / "args").read_text().splitlines() == [
        "train.py",
        "--distributed=auto",
        "--config=configs/siglip_digits.py",
        "--workdir=/shared/runs/one",
        odd,
    ]
    env = (home / "flax_vlm" / "environment").read_text()
    assert "JAX_COMPILATION_CACHE_DIR=/shared/runs/compilation_cache\n" in env
    assert "--xla_tpu_enable_data_parallel_all_reduce_opt=true" in env


def test_a_tpu_slice_or_several_are_asked_for_and_waited_for(tmp_path):
    one, called = tpu(tmp_path / "one", "create", "run1", states="WAITING PROVISIONING ACTIVE")
    assert one.returncode == 0 and len(called) == 4
    assert "--node-id=run1" in called[0].split() and "--spot" not in called[0]
    _, called = tpu(tmp_path / "two", "create", "run1", SLICES="2", SPOT="1")
    assert {"--node-count=2", "--node-prefix=run1", "--spot"} <= set(called[0].split())
    assert "--node-id" not in called[0]
    lost, called = tpu(tmp_path / "lost", "create", "run1", states="WAITING FAILED ACTIVE")
    assert lost.returncode == 1 and "run1: FAILED" in lost.stderr and len(called) == 3


@pytest.mark.parametrize(
    ("accelerator", "runtime", "preset"),
    [
        ("v5litepod-16", "v2-alpha-tpuv5-lite", "tpu_v5e"),
        ("v5p-512", "v2-alpha-tpuv5", "tpu_v5p"),
        ("v6e-256", "v2-alpha-tpuv6e", "tpu_v6e"),
    ],
)
def test_every_tpu_gets_its_runtime_and_its_preset(tmp_path, accelerator, runtime, preset):
    _, called = tpu(tmp_path / "create", "create", "run1", ACCELERATOR=accelerator)
    assert f"--runtime-version={runtime}" in called[0].split()
    _, called = tpu(tmp_path / "train", "train", "run1", *ARGUMENTS, ACCELERATOR=accelerator)
    assert f"launch/env/{preset}.env" in called[0]
    assert (ROOT / "launch" / "env" / f"{preset}.env").exists()
    wrong, _ = tpu(tmp_path / "wrong", "create", "run1", ACCELERATOR="v5e-16")
    assert wrong.returncode == 1 and "must be v5litepod-N" in wrong.stderr


# -- Kubernetes


def test_the_jobset_restarts_on_exit_code_75_without_limit_and_otherwise_with_one():
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    policy = jobset["spec"]["failurePolicy"]
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts" and policy["maxRestarts"] > 0
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]

    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    exits, evictions = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert exits == {
        "action": "FailJob",
        "onExitCodes": {
            "containerName": container["name"],
            "operator": "In",
            "values": [STOPPED],
        },
    }
    assert evictions["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    # a Job that replaced single pods would wait for processes that wait for it
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert pod["terminationGracePeriodSeconds"] >= 120


def test_the_jobset_asks_for_every_chip_of_its_topology():
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    per_host = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert int(sides[0]) * int(sides[1]) == job["parallelism"] * per_host
    assert job["completions"] == job["parallelism"]


def test_the_shell_of_a_pod_gives_its_place_to_python_so_that_signals_arrive():
    jobset = yaml.safe_load((ROOT / "launch" / "jobset.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (script,) = pod["containers"][0]["args"]
    assert " exec python train.py " in script


# -- containers


@pytest.mark.parametrize("name", ["cpu", "cuda", "tpu"])
def test_a_container_installs_its_extra_and_lets_signals_reach_python(name):
    lines = (ROOT / "launch" / f"Dockerfile.{name}").read_text().splitlines()
    steps = dict(line.split(" ", 1) for line in lines if line[:1].isupper())
    assert json.loads(steps["ENTRYPOINT"]) == ["python", "train.py"]
    extra = re.search(r"'\.(?:\[(\w+)\])?'$", steps["RUN"]).group(1)
    assert extra == (None if name == "cpu" else name)
    setup = (ROOT / "setup.py").read_text()
    assert extra is None or f'"{extra}": [' in setup
    minimum = re.search(r'python_requires=">=3\.(\d+)"', setup).group(1)
    assert int(re.match(r"python:3\.(\d+)-slim", steps["FROM"]).group(1)) >= int(minimum)
    assert {".git", ".venv", "runs"} <= set((ROOT / ".dockerignore").read_text().split())
