"""The launchers of many processes: signals, statuses, the one-line reason, and what they set."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.paths import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])


def launch(folder, count, *words, options=(), **environ):
    command = ["bash", str(LAUNCH / "multi_process.sh"), str(count), "--logs", f"{folder}/logs"]
    return subprocess.run(
        [*command, *options, *words],
        env={**os.environ, **environ}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def shell(text):
    return ("bash", "-c", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    # Extras are installed in the interpreter's folder, which may not be on the path.
    scripts = pathlib.Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{scripts}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra `test`)")
    subprocess.run([shellcheck, "-x", f"launch/{script.name}"], cwd=LAUNCH.parent, check=True)


def test_devices_are_shared_out(tmp_path):
    echo = shell("echo $JAX_PROCESS_ID of $JAX_NUM_PROCESSES: $JAX_NUM_CPU_DEVICES $JAX_PLATFORMS")
    done = launch(tmp_path, 2, *echo, options=("--cpu", "8"))
    assert done.returncode == 0
    assert sorted(done.stdout.splitlines()) == ["[0] 0 of 2: 4 cpu", "[1] 1 of 2: 4 cpu"]
    echo = shell('echo "$JAX_LOCAL_DEVICE_IDS $STARFLOW2_DEVICES_PER_PROCESS"')
    done = launch(tmp_path, 2, *echo, options=("--gpu", "8"))
    assert sorted(done.stdout.splitlines()) == ["[0] 0,1,2,3 4", "[1] 4,5,6,7 4"]
    addresses = launch(tmp_path, 3, *shell("echo $JAX_COORDINATOR_ADDRESS")).stdout.split()[1::2]
    assert len(addresses) == 3 and len(set(addresses)) == 1
    assert addresses[0].startswith("127.0.0.1:")


def test_each_run_has_a_token_of_its_own(tmp_path):
    echo = shell("echo token=$STARFLOW2_JOB_TOKEN")
    tokens = [launch(tmp_path, 2, *echo).stdout.split()[1::2] for _ in range(2)]
    assert len(set(tokens[0])) == len(set(tokens[1])) == 1 and tokens[0] != tokens[1]
    assert re.fullmatch("token=[0-9a-f]{32}", tokens[0][0])


@pytest.mark.parametrize(
    "words, message",
    [
        (("two", "true"), "the first argument is the number of processes, not 'two'"),
        (("2",), "no command was given"),
        (("3", "--cpu", "8", "true"), "3 processes do not divide --cpu 8"),
        (("2", "--cpu", "many", "true"), "--cpu needs a number of devices, not 'many'"),
        (("2", "--gpus", "8", "true"), "unknown argument --gpus"),
    ],
)
def test_bad_arguments(words, message):
    command = ["bash", str(LAUNCH / "multi_process.sh"), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"error: {message}\n"


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_processes_end_with_a_launcher_that_is_killed(tmp_path):
    code = "import os, pathlib, sys, time; from starflow2_jax.runtime import child_process as c; "
    code += "c.end_with_parent(); pathlib.Path(sys.argv[1], str(os.getpid())).touch(); "
    code += "time.sleep(60)"
    (tmp_path / "started").mkdir()
    launcher = subprocess.Popen(
        ["bash", str(LAUNCH / "multi_process.sh"), "2", "--logs", str(tmp_path / "logs"),
         sys.executable, "-c", code, str(tmp_path / "started")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while len(os.listdir(tmp_path / "started")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    for name in os.listdir(tmp_path / "started"):
        while pathlib.Path("/proc", name).exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_sigterm_reaches_every_process(tmp_path):
    wait = 'trap "echo told; exit 0" TERM; echo up; for i in $(seq 300); do sleep 0.1; done'
    command = ["bash", str(LAUNCH / "multi_process.sh"), "2", "--logs", f"{tmp_path}/logs"]
    process = subprocess.Popen([*command, *shell(wait)], stdout=subprocess.PIPE, text=True)
    assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] up\n", "[1] up\n"]
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert sorted(output.splitlines()) == ["[0] told", "[1] told"]


ABORT = """F1125 04:00:54 5821 client.h:80] Terminating process because the JAX distributed service
detected fatal errors. absl::Status: UNAVAILABLE: The following tasks are unhealthy (stopped):
1
*** Check failure stack trace: ***
    @     0x7f8872240634  absl::lts_20260107::log_internal::LogMessage::SendToLog()
"""


@pytest.mark.parametrize(
    "text, status, reason",
    [
        ("echo 'error: no such file'; exit 1", 1, "no such file"),
        ("echo 'error: early'; echo 'error: late'; exit 3", 3, "late"),
        ("echo 'x.y.JaxRuntimeError: lost'; echo '  at'; exit 1", 1, "x.y.JaxRuntimeError: lost"),
        (
            f"echo {ABORT!r}; kill -ABRT $$".replace("\\n", "'$'\\n''"), 134,
            "ended by signal 6; its last message: UNAVAILABLE: The following tasks are unhealthy "
            "(stopped): process 1",
        ),
        ("echo step 7; kill -KILL $$", 137, "ended by signal 9; its last message: step 7"),
        ("exit 4", 4, ""),
    ],
)  # fmt: skip
def test_the_reason_comes_last_and_the_status_is_that_of_the_first(tmp_path, text, status, reason):
    """Process 1 fails; process 0 hears of it a second later."""
    late = "sleep 1.5; echo 'error: process 1 stopped'; exit 1"
    both = f"if [ $JAX_PROCESS_ID = 0 ]; then {late}; fi; {text}"
    done = launch(tmp_path, 2, *shell(both))
    assert done.returncode == status
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the first of 2 processes to end: process 1: ")
    assert last.endswith(reason)


def test_those_that_do_not_end_are_ended(tmp_path):
    """Only with a shorter patience than a minute is this a test."""
    script = (LAUNCH / "multi_process.sh").read_text().replace("SECONDS + 60", "SECONDS + 1", 1)
    for name, text in (("multi_process.sh", script), ("one_process.sh", None)):
        (tmp_path / name).write_text(text or (LAUNCH / name).read_text())
    body = shell("[ $JAX_PROCESS_ID = 1 ] && exit 5; trap '' TERM; sleep 300")
    command = ["bash", str(tmp_path / "multi_process.sh"), "2", "--logs", f"{tmp_path}/logs"]
    start_time = time.time()
    done = subprocess.run([*command, *body], capture_output=True, text=True, timeout=100)
    assert done.returncode == 5 and time.time() - start_time < 60
    assert "ended by signal 9" in done.stdout


def test_slurm_batch_file_with_a_faked_cluster(tmp_path):
    """`srun` starts four tasks, as SLURM would, of which the third fails."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "scontrol").write_text("#!/bin/bash\nprintf 'gpu017\\ngpu018\\n'\n")
    (tools / "srun").write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\npids=\n"
        'for i in 0 1 2 3; do SLURM_PROCID=$i "$@" & pids="$pids $!"; done\n'
        "status=0; for pid in $pids; do wait $pid || status=$?; done; exit $status\n"
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    body = shell(
        "echo $SLURM_PROCID $JAX_COORDINATOR_ADDRESS $STARFLOW2_DEVICES_PER_PROCESS"
        " ${#STARFLOW2_JOB_TOKEN};"
        "[ $SLURM_PROCID = 2 ] || { sleep 1; exit 0; }; echo 'error: no data'; exit 1"
    )
    environ = {
        "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "gpu[017-018]",
        "SLURM_JOB_ID": "4005", "SLURM_SUBMIT_DIR": str(LAUNCH.parent), "SLURM_NTASKS": "4",
        "SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "2",
        "STARFLOW2_LOGS": f"{tmp_path}/logs", "JAX_COMPILATION_CACHE_DIR": f"{tmp_path}/cache",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch"), *body],
        env={**os.environ, **environ}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    message = "error: the first of 4 processes to end: process 2: no data"
    assert done.stderr.splitlines()[-1] == message
    assert {f"{i} gpu017:61005 4 32" for i in range(4)} <= set(done.stdout.splitlines())
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = [line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")]
    assert {"--signal=TERM@120", "--requeue", "--ntasks-per-node=1"} <= set(options)


# What a JobSet may hold, as its interface (v1alpha2) is documented.
JOBSET = {
    "replicatedJobs", "network", "successPolicy", "failurePolicy", "startupPolicy", "suspend",
    "coordinator", "managedBy", "ttlSecondsAfterFinished",
}  # fmt: skip
JOB = {"parallelism", "completions", "backoffLimit", "template", "activeDeadlineSeconds"}
POD = {
    "restartPolicy", "terminationGracePeriodSeconds", "hostNetwork", "dnsPolicy", "nodeSelector",
    "serviceAccountName", "containers", "volumes", "tolerations",
}  # fmt: skip


def test_jobset_fits_its_schema_and_itself():
    yaml = pytest.importorskip("yaml")
    (jobset,) = yaml.safe_load_all((LAUNCH / "gke.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    spec = jobset["spec"]
    assert set(spec) <= JOBSET and isinstance(spec["failurePolicy"]["maxRestarts"], int)
    (jobs,) = spec["replicatedJobs"]
    assert set(jobs) <= {"name", "replicas", "template", "groupName", "dependsOn"}
    job = jobs["template"]["spec"]
    assert set(job) <= JOB and job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert set(pod) <= POD and pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    token, *rest = [e for e in container["env"] if e["name"] == "STARFLOW2_JOB_TOKEN"]
    assert token["valueFrom"]["secretKeyRef"]["key"] == "token" and not rest
    environ = {entry["name"]: entry["value"] for entry in container["env"] if entry != token}
    assert all(isinstance(value, str) for value in environ.values())
    chips = container["resources"]["limits"]["google.com/tpu"]
    x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert x * y * z == chips * job["parallelism"]
    assert environ["STARFLOW2_DEVICES_PER_PROCESS"] == str(chips)
    assert environ["STARFLOW2_CLUSTER"] == "auto"
    assert 8482 in [port["containerPort"] for port in container["ports"]]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    assert (LAUNCH.parent / container["command"][1]).exists()
    assert all(isinstance(word, str) for word in [*container["command"], *container["args"]])
