"""The scripts in launch/slurm on a real Slurm: two nodes, each in a network namespace of this machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import DID, WHAT, WHEN, WHO, dejavu, last_object, sentences

from dejavu.launch import __path__ as launch_folder

pytestmark = pytest.mark.slurm
SCRIPTS = Path(launch_folder[0]) / "slurm"
CLUSTER = Path(__file__).parent.parent / "support" / "slurm_cluster.sh"
CPU = ("--device", "cpu")
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
_PATIENCE_S = 300


class Cluster:
    """What a user of Slurm does. Jobs run the Python of this process; their results are in ``folder``."""

    def __init__(self, configuration, folder):
        self.folder = folder
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**os.environ, "SLURM_CONF": str(configuration), "PATH": path}

    def run(self, *command, **environment):
        environment = {**self.environment, **{name: str(value) for name, value in environment.items()}}
        return subprocess.run(
            [str(part) for part in command], cwd=self.folder, env=environment, capture_output=True, text=True
        )

    def submit(self, script, *arguments, options=(), **environment):
        """The number of the job."""
        sbatch = ("sbatch", "--parsable", "--output=%j.out", *options, SCRIPTS / f"{script}.sbatch")
        run = self.run(*sbatch, *arguments, **environment)
        assert run.returncode == 0, run.stderr
        return run.stdout.strip()

    def show(self, job):
        """What `scontrol show job` says, by its names."""
        found = self.run("scontrol", "show", "job", "--oneliner", job).stdout
        return dict(field.split("=", 1) for field in found.split() if "=" in field)

    def log(self, job):
        path = self.results(job) / "log.txt"
        return path.read_text() if path.is_file() else ""

    def results(self, job):
        return self.folder / "results" / job

    def wait_until(self, job, true, what):
        """Until ``true()``; fails if the job is over before."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            state, late = self.show(job)["JobState"], time.monotonic() > deadline
            if found := true():
                return found
            assert state not in OVER and not late, f"{what} not seen, {state}:\n{self.log(job)}"
            time.sleep(0.1)

    def wait(self, job):
        """Until the job is over: its state."""
        found = []
        self.wait_until(job, lambda: found.append(self.show(job)["JobState"]) or found[-1] in OVER, "the end")
        return found[-1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    programs = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "ip", "nsenter", "unshare")
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"needs Slurm (.ci/install-tools): no {', '.join(missing)} here")
    if os.geteuid() != 0:
        pytest.skip("needs root, for network namespaces")
    root, folder = tmp_path_factory.mktemp("slurm"), tmp_path_factory.mktemp("jobs")
    up = subprocess.run(["bash", CLUSTER, "up", root], capture_output=True, text=True)
    try:
        if up.returncode != 0 and "Operation not permitted" in up.stderr:
            pytest.skip(f"this machine allows no network namespaces: {up.stderr.strip()}")
        assert up.returncode == 0, up.stderr
        yield Cluster(root / "slurm.conf", folder)
    finally:
        subprocess.run(["bash", CLUSTER, "down", root], check=True)


def process_of(job, rank):
    """The process of a job's rank, if it has begun."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has gone meanwhile
        if b"SLURM_JOB_ID=%d" % int(job) in environment and b"RANK=%d" % rank in environment:
            return int(folder.name)
    return None


def is_generating(process):
    """It notes signals from when its model is loaded."""
    status = Path(f"/proc/{process}/status").read_text() if process else "SigCgt:\t0\n"
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGUSR1 - 1) & 1)


LONG = ("--prompt", "The old man", "--max-new-tokens", 1000, "--ignore-eos", *CPU)


def test_two_nodes_of_two_ranks_give_the_text_of_one_process(cluster):
    generate = ("--prompt", "The old man", "--prompt", "A boy", "--max-new-tokens", 24, *CPU)
    job = cluster.submit("generate", *generate, options=["--nodes=2"], DEJAVU_RANKS=2)
    one = last_object(dejavu("generate", "--json", *generate)[1])
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    four = json.loads((cluster.results(job) / "output.0.json").read_text())
    assert (four["tp"], one["tp"]) == (4, 1)
    assert four["results"] == one["results"]
    assert cluster.log(job) == ""


def test_an_array_shares_the_prompts_of_a_file(cluster):
    prompts = ["The old man", "A boy", "The sea"]
    (cluster.folder / "prompts.txt").write_text("\n\n".join(prompts))
    job = cluster.submit(
        "generate", "--max-new-tokens", 4, *CPU, options=["--array=3-7:2"], PROMPTS="prompts.txt"
    )
    of_task = {}
    for task in (3, 5, 7):
        assert cluster.wait(f"{job}_{task}") == "COMPLETED"
        output = json.loads((cluster.results(f"{job}_{task}") / "output.0.json").read_text())
        of_task[task] = [result["prompt"] for result in output["results"]]
    assert of_task == {3: ["The old man"], 5: ["A boy"], 7: ["The sea"]}


def test_an_array_that_is_no_range_is_refused(cluster):
    (cluster.folder / "prompts.txt").write_text("Once")
    job = cluster.submit("generate", *CPU, options=["--array=3,7"], PROMPTS="prompts.txt")
    assert cluster.wait(f"{job}_7") == "FAILED"
    assert cluster.log(f"{job}_7").startswith("error: the array's tasks are no range")


def test_a_profile_has_a_folder_a_node(cluster):
    generate = ("generate", *CPU, "--prompt", "Once", "--max-new-tokens", "4")
    job = cluster.submit("profile", *generate, options=("--nodes=2",), PROFILER="torch")
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    for node in range(2):
        folder = cluster.results(job) / "profile" / str(node)
        rows = json.loads((folder / "report.json").read_text())["rows"]
        assert rows[0]["rank"] == f"rank {node}" and rows[0]["steps"] == 3
        assert (folder / "timeline.png").exists()


def test_a_training_that_is_requeued_goes_on_where_it_was(cluster):
    text = cluster.folder / "text.txt"
    text.write_text(sentences(450, WHO, DID, WHAT, WHEN))
    config = ("--rank", 16, "--head-rank", 8, "--epochs", 4, "--batch", 256, *CPU)
    one_thread = {"OMP_NUM_THREADS": 1}  # sums of more may round otherwise here than in the job
    job = cluster.submit("train", *config, MODEL="demo", TEXT=text, TOKENS=1500, **one_thread)
    partial = cluster.results(job) / "predictors.partial"
    cluster.wait_until(job, lambda: len(list(partial.glob("*.safetensors"))) >= 2, "the first predictors")
    requeue = cluster.run("scontrol", "requeue", job)
    assert requeue.returncode == 0, requeue.stderr
    cluster.wait_until(job, lambda: cluster.show(job)["Restarts"] == "1", "the requeue")
    before = {path: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    cluster.wait_until(job, lambda: cluster.show(job)["JobState"] == "RUNNING", "the second start")
    same = {path for path, when in before.items() if path.exists() and path.stat().st_mtime_ns == when}
    assert len(same) == len(before) >= 2
    assert cluster.wait(job) == "COMPLETED", cluster.log(job)
    whole = cluster.folder / "whole"
    traces = cluster.results(job) / "traces"
    train = cluster.run("dejavu", "train", "--traces", traces, "--out", whole, *config, **one_thread)
    assert train.returncode == 0, train.stderr
    ours, theirs = (
        folder / "predictors.safetensors" for folder in (cluster.results(job) / "predictors", whole)
    )
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_rank_that_dies_fails_the_job_and_is_named(cluster):
    job = cluster.submit("generate", *LONG, DEJAVU_RANKS=2)
    process = cluster.wait_until(job, lambda: process_of(job, 1), "rank 1")
    cluster.wait_until(job, lambda: is_generating(process), "a generation")
    os.kill(process, signal.SIGKILL)
    began = time.monotonic()
    assert cluster.wait(job) == "FAILED"
    assert time.monotonic() - began < 30
    assert f"error: rank 1 (process {process}) died: SIGKILL" in cluster.log(job).splitlines()
    assert cluster.show(job)["ExitCode"] == "137:0"


def test_a_node_that_is_lost_ends_the_job(cluster):
    job = cluster.submit("generate", *LONG, options=["--nodes=2"], DEJAVU_TIMEOUT=5)
    cluster.wait_until(job, lambda: is_generating(process_of(job, 0)), "a generation")
    began = time.monotonic()
    try:
        assert cluster.run("ip", "link", "set", "vdejavu2", "down").returncode == 0
        said = "lost another rank: rank 1 has given no sign of life for 5 s"
        cluster.wait_until(job, lambda: said in cluster.log(job), "a word")
        assert time.monotonic() - began < 30
    finally:
        cluster.run("ip", "link", "set", "vdejavu2", "up")
    assert cluster.wait(job) == "FAILED"


def run_stubbed(folder, script, *, srun, requeue):
    """A script's run as job 7, where ``srun`` and what queues the job again are lines of shell."""
    stubs = {
        "srun": srun,
        "scontrol": f"if [[ $1 == show ]]; then echo node; else {requeue}; fi",
        "scancel": "true",
    }
    for name, does in stubs.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node", "SLURM_NNODES": "2"}
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(["bash", *script], cwd=folder, env={**os.environ, **slurm, "PATH": path}).returncode


@pytest.mark.parametrize(("status", "over", "requeued"), [(0, 75, True), (77, 77, False)])
def test_a_node_that_slurm_stops_because_another_failed_is_not_requeued(tmp_path, status, over, requeued):
    """Both leave the same file: what the step came to tells them apart."""
    script = ["-c", f'source "{SCRIPTS}/job.sh"; ranks generate']
    step = f"touch results/7/preempted; exit {status}"
    assert run_stubbed(tmp_path, script, srun=step, requeue="touch requeued") == over
    assert (tmp_path / "requeued").is_file() == requeued


def test_texts_are_kept_before_slurm_kills_the_job_that_it_queues_again(tmp_path):
    step = "touch results/7/preempted; echo begun"
    run_stubbed(tmp_path, [SCRIPTS / "generate.sbatch"], srun=step, requeue="kill -KILL $PPID")
    assert (tmp_path / "results/7/output.0.json").read_text() == "begun\n"


def test_gpus_that_do_not_exist_are_refused(cluster):
    script = SCRIPTS / "generate.sbatch"
    run = cluster.run("sbatch", "--gpus-per-node=8", script, "--prompt", "Once")
    assert run.returncode != 0 and "Requested node configuration is not available" in run.stderr


def test_a_generation_that_is_warned_keeps_its_text_and_is_requeued(cluster):
    job = cluster.submit("generate", *LONG, "--prompt", "A boy", "--max-batch", 1, options=["--nodes=2"])
    for rank in (0, 1):
        cluster.wait_until(job, lambda rank=rank: is_generating(process_of(job, rank)), f"rank {rank}")
    # as Slurm warns with --signal=B:USR1@120: the shell of the batch script alone
    assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    cluster.wait_until(job, lambda: cluster.show(job)["Restarts"] == "1", "the requeue")
    assert cluster.run("scancel", job).returncode == 0
    output = json.loads((cluster.results(job) / "output.0.json").read_text())
    assert output["preempted"] and output["tp"] == 2
    begun, waiting = output["results"]
    assert begun["finish_reason"] == waiting["finish_reason"] == "preempted"
    assert 0 < len(begun["token_ids"]) < 1000 and waiting["text"] == ""
    assert "was told to stop" in cluster.log(job)
    assert cluster.wait(job) == "CANCELLED"


def test_a_warned_task_of_an_array_is_requeued_alone(cluster):
    (cluster.folder / "prompts.txt").write_text("Once\n\nThe sea")
    array = ("--array=0-1",)
    job = cluster.submit("generate", *LONG[2:], options=array, PROMPTS="prompts.txt")
    tasks = [f"{job}_{task}" for task in (0, 1)]
    ids = [cluster.show(task)["JobId"] for task in tasks]
    for number in ids:
        cluster.wait_until(number, lambda n=number: is_generating(process_of(n, 0)), "a generation")
    warned = ids.index(job)  # the one that has the number of the array
    assert cluster.run("scancel", "--batch", "--signal=USR1", tasks[warned]).returncode == 0
    cluster.wait_until(tasks[warned], lambda: cluster.show(tasks[warned])["Restarts"] == "1", "the requeue")
    other = cluster.show(tasks[1 - warned])
    assert (other["Restarts"], other["JobState"]) == ("0", "RUNNING")
    assert cluster.run("scancel", job).returncode == 0
    assert cluster.wait(tasks[1 - warned]) == "CANCELLED"


def test_a_job_that_the_user_cancels_is_not_requeued(cluster):
    job = cluster.submit("generate", *LONG)
    cluster.wait_until(job, lambda: process_of(job, 0), "rank 0")
    assert cluster.run("scancel", job).returncode == 0
    assert cluster.wait(job) == "CANCELLED"
    cluster.wait_until(job, lambda: "COMPLETING" not in cluster.show(job)["JobState"], "its end")
    assert cluster.show(job)["Restarts"] == "0"
