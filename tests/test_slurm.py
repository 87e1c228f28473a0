"""Whole runs on a real Slurm of two nodes (`make test-slurm`): to the end, signals, limits, crashes, bad use."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.test_main_job import losses, make_corpus, metrics, tidar
from tidar_mega import launch
from tidar_mega.launch import jobs, restarts, slurm
from tidar_mega.launch.resources import Resources

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif("TIDAR_SLURM" not in os.environ, reason="needs a Slurm: make test-slurm starts one"),
]

ROOT = Path(__file__).parent.parent
# Steps of a tenth of a second or more, so that what is done to a run in its middle finds it there.
CONFIG = """
model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, num_query_groups: 2}
data: {path: corpus, seq_length: 64}
train: {steps: 30, global_batch_size: 64, micro_batch_size: 2, block: 4, eval_interval: 0, eval_sequences: 8}
optimizer: {lr: 3.0e-3, warmup_steps: 2, schedule: constant}
precision: {dtype: fp32}
checkpoint: {interval: 5}
log: {interval: 1, tensorboard: false}
"""
FOUR_TASKS = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=0")
TWO_TASKS = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0")


def make_work(folder: Path, more_path: str = "") -> Path:
    """A folder with a corpus, a config, and what a cluster's own environment file holds."""
    make_corpus(folder)
    (folder / "run.yaml").write_text(CONFIG)
    (folder / "slurm").mkdir()
    path = f"{ROOT}:{more_path}" if more_path else ROOT
    env = f"export TIDAR_PYTHON={sys.executable} PYTHONPATH={path} OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME=lo\n"
    (folder / "slurm" / "env.sh").write_text(env)
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("cluster"))


@pytest.fixture(scope="module")
def uninterrupted(work) -> dict:
    """The losses of a run of the same layout that Slurm knows not."""
    tidar(work, "pretrain", "run.yaml", "run_dir=local", "parallel.data=4")
    return losses(work, "local")


def sbatch(folder: Path, *settings: str, options: tuple[str, ...] = FOUR_TASKS, config: str = "run.yaml") -> str:
    """Submits slurm/pretrain.sh as a user would; the job's id."""
    command = ["sbatch", "--parsable", "--time=60", *options, str(ROOT / "slurm" / "pretrain.sh"), config, *settings]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def over(job: str) -> bool:
    waiting = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED")
    return not slurm.show(job)["JobState"].startswith(waiting)


def soon(condition, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def end(folder: Path, job: str, state: str = "COMPLETED", seconds: float = 1200) -> str:
    """Waits for the end of a job, which must be in `state`; all that it and its ranks have said."""
    soon(lambda: over(job), seconds)
    logs = [folder / f"tidar-{job}.out", *sorted(folder.glob(f"*/logs/{job}/rank_*.log"))]
    said = "".join(f"--- {path.name}\n{path.read_text()}" for path in logs if path.exists())
    assert slurm.show(job)["JobState"] == state, said
    return said


def restarted(job: str) -> int:
    return int(slurm.show(job)["Restarts"])


def reached(folder: Path, run: str, step: int) -> None:
    soon(lambda: step in metrics(folder, run))


def rank_process(run: str, rank: int) -> psutil.Process:
    """The process of one rank, found by its own command line and environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.NoSuchProcess):
            words = process.info["cmdline"] or []
            ours = f"run_dir={run}" in words or any(f"/{run}/code/" in word for word in words)  # `tidar launch`'s
            ours = ours and "tidar_mega.cli" in words and "srun" not in words[0]
            if ours and process.environ().get("SLURM_PROCID") == str(rank):
                found.append(process)
    assert found, f"rank {rank} of {run} is not there"
    return min(found, key=lambda process: process.create_time())  # the others are writers that it has forked


def test_a_job_trains_to_the_end_with_the_losses_of_a_local_run(work, uninterrupted):
    job = sbatch(work, "run_dir=plain")
    said = end(work, job)
    assert losses(work, "plain") == uninterrupted
    assert "done: 30 steps" in said and "preflight: 4 ranks on 2 node(s)" in said
    assert sorted(p.name for p in (work / "plain" / "logs" / job).iterdir()) == [f"rank_{r}.log" for r in range(4)]
    assert restarted(job) == 0

    again = end(work, sbatch(work, "run_dir=plain"))  # the next of a chain
    assert again.count("already done: 30 steps") == 1 and "resumed" not in again
    assert sorted(evaluated_beside(work, "plain")) == [25, 30], "what checkpoint.keep_last has left"


def evaluated_beside(work: Path, run: str) -> list[int]:
    """Submits slurm/evaluate.sh for all checkpoints of a run, until it is finished; the steps that it has evaluated."""
    words = ["evaluate", run, "--watch", "--prompts=2", "--prompt-tokens=8", "--max-tokens=8", "--sequences=2"]
    options = ["--parsable", "--gpus-per-node=0", "--output=tidar-%j.out"]
    command = ["sbatch", *options, str(ROOT / "slurm" / "evaluate.sh"), *words]
    job = subprocess.run(command, cwd=work, capture_output=True, text=True, check=True).stdout.strip()
    assert f"{run} is finished, and its last checkpoint is evaluated" in end(work, job)
    return [json.loads(line)["step"] for line in (work / run / "evaluations.jsonl").read_text().splitlines()]


def test_one_process_per_gpu_of_every_node(work):
    two = ("--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2")
    said = end(work, sbatch(work, "run_dir=gpus", "train.steps=3", options=two))
    assert "4 process(es)" in said and "done: 3 steps" in said
    uneven = end(work, sbatch(work, "run_dir=gpus", options=("--nodes=2", "--ntasks-per-node=1", two[2])), "FAILED")
    assert "--ntasks-per-node 1: must be --gpus-per-node (2), one process per GPU" in uneven


def test_a_task_has_its_share_of_the_node_s_cpus_and_one_of_its_gpus_may_be_used(work):
    """The nodes have 8 CPUs and 2 GPUs, which a job that has them for itself is given, whatever it asks for."""
    note = 'echo "$SLURM_PROCID of $SLURM_JOB_ID: $SLURM_CPUS_PER_TASK CPUs, GPUs $CUDA_VISIBLE_DEVICES"'
    (work / "counting").write_text(f'#!/bin/bash\n{note} >>cpus.txt\nexec {sys.executable} "$@"\n')
    (work / "counting").chmod(0o755)
    env = (work / "slurm" / "env.sh").read_text() + "export TIDAR_PYTHON=$PWD/counting\n"
    (work / "slurm" / "counting.sh").write_text(env)
    share = ("--oversubscribe", "--mem=4G", "--cpus-per-task=2")
    for asked, cpus in (((), 8), (share, 2)):
        options = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--export=ALL,TIDAR_ENV=slurm/counting.sh")
        job = sbatch(work, "run_dir=counted", "train.steps=3", options=(*options, *asked))
        end(work, job)
        said = [line for line in (work / "cpus.txt").read_text().splitlines() if f" of {job}: {cpus} CPUs" in line]
        assert sorted(set(said)) == [f"{rank} of {job}: {cpus} CPUs, GPUs 0" for rank in (0, 1)]


@pytest.mark.parametrize("how", ["USR2", "TERM"])
def test_a_signal_in_mid_run_saves_requeues_and_goes_on_bit_for_bit(work, uninterrupted, how):
    run = f"signalled_{how}"
    job = sbatch(work, f"run_dir={run}")
    reached(work, run, 7)
    subprocess.run(["scancel", f"--signal={how}", job], check=True)
    said = end(work, job)
    assert f"SIG{how}: stopped at step" in said and f"job {job} is requeued, restart 1" in said
    assert restarted(job) == 1
    stopped_at = int(said.split("stopped at step ")[1].split(";")[0])
    assert f"resumed from {run}/checkpoints/step_{stopped_at:08d}" in said, "nothing is lost"
    assert losses(work, run) == uninterrupted


def test_the_time_limit_in_mid_run_saves_requeues_and_goes_on_bit_for_bit(work):
    """More steps than the limit allows for, until it has come: with this schedule the losses do not depend on them."""
    (work / "long.yaml").write_text(CONFIG.replace("steps: 30", "steps: 100000"))
    options = (*TWO_TASKS, "--time=3", "--signal=USR2@60")
    job = sbatch(work, "run_dir=limited", options=options, config="long.yaml")
    reached(work, "limited", 1)
    soon(lambda: restarted(job) == 1)
    stopped_at = max(metrics(work, "limited"))
    steps = stopped_at + 20
    (work / "long.yaml").write_text(CONFIG.replace("steps: 30", f"steps: {steps}"))
    said = end(work, job)
    assert f"SIGUSR2: stopped at step {stopped_at}" in said and f"step_{stopped_at:08d}, step {stopped_at}" in said
    tidar(work, "pretrain", "long.yaml", "run_dir=unlimited", "parallel.data=2")
    assert losses(work, "limited") == losses(work, "unlimited")
    assert len(losses(work, "limited")) == steps


def test_a_job_that_makes_no_progress_is_not_started_for_ever(work):
    """Rank 1 aborts as it starts, at every start."""
    (work / "slurm" / "broken.sh").write_text(
        (work / "slurm" / "env.sh").read_text() + "export PYTHONPATH=$PYTHONPATH:$PWD/broken\n"
    )
    (work / "broken").mkdir()
    failing = "import os\nif os.environ.get('SLURM_PROCID') == '1' and 'SLURM_STEP_ID' in os.environ: os.abort()\n"
    (work / "broken" / "sitecustomize.py").write_text(failing)
    options = (*TWO_TASKS, "--export=ALL,TIDAR_ENV=slurm/broken.sh")
    job = sbatch(work, "run_dir=loop", "launch.max_idle_restarts=1", options=options)
    said = end(work, job, "FAILED")
    assert restarted(job) == 1
    assert "2 starts in a row have made no new checkpoint in loop, above launch.max_idle_restarts = 1" in said
    assert slurm.show(job)["ExitCode"] == f"{restarts.GAVE_UP}:0"


def test_a_node_that_fails_the_preflight_is_named_and_excluded_from_the_requeue(work):
    """Files of the second node may not grow to the size of the writing test."""
    (work / "small_files").mkdir()
    limit = "import os, resource\nif os.environ.get('SLURMD_NODENAME') == '127.0.0.12':\n"
    limit += "    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))\n"
    (work / "small_files" / "sitecustomize.py").write_text(limit)
    env = (work / "slurm" / "env.sh").read_text() + "export PYTHONPATH=$PYTHONPATH:$PWD/small_files\n"
    (work / "slurm" / "small_files.sh").write_text(env)
    job = sbatch(work, "run_dir=badnode", options=(*TWO_TASKS, "--export=ALL,TIDAR_ENV=slurm/small_files.sh"))
    soon(lambda: slurm.show(job).get("ExcNodeList") == "127.0.0.12")
    assert restarted(job) == 1
    subprocess.run(["scancel", job], check=True)  # there is no third node that it could take
    said = (work / f"tidar-{job}.out").read_text()
    assert "127.0.0.12: badnode cannot be written (File too large)" in said, "named where a user looks first"
    assert "is requeued, restart 1, without 127.0.0.12" in said
    assert not (work / "badnode" / "metrics.jsonl").exists(), "no step was made"


def test_every_step_runs_in_the_container_and_with_the_variables_of_the_cluster(work):
    """Slurm hands on what pyxis would be asked (tests/slurm/container.c); the container's Python notes it."""
    asked = " ".join(f"$TEST_CONTAINER_{name}" for name in ("IMAGE", "MOUNTS", "WORKDIR"))
    note = f'echo "$SLURM_STEP_ID $SLURM_PROCID {asked} $NCCL_DEBUG"'
    (work / "python").write_text(f'#!/bin/bash\n{note} >>steps.txt\nexec {sys.executable} "$@"\n')
    (work / "python").chmod(0o755)
    env = (work / "slurm" / "env.sh").read_text() + "export TIDAR_PYTHON=$PWD/python NCCL_DEBUG=WARN\n"
    (work / "slurm" / "container.sh").write_text(env)
    asked = "--export=ALL,TIDAR_ENV=slurm/container.sh,CONTAINER_IMAGE=image.sqsh,CONTAINER_MOUNTS=/data:/data"
    end(work, sbatch(work, "run_dir=contained", "train.steps=3", options=(*TWO_TASKS, asked)))
    steps = sorted((work / "steps.txt").read_text().splitlines())
    where = f"image.sqsh /data:/data {work} WARN"
    assert steps == [f"0 0 {where}", f"1 0 {where}", f"1 1 {where}", f"2 0 {where}"], "logs, two ranks, after"


def test_restarts_are_bounded(work):
    job = sbatch(work, "run_dir=bounded", "launch.max_restarts=0", options=TWO_TASKS)
    reached(work, "bounded", 3)
    subprocess.run(["scancel", "--signal=USR2", job], check=True)
    said = end(work, job, "FAILED")
    assert "it has been restarted 0 times, launch.max_restarts" in said and restarted(job) == 0
    assert max(metrics(work, "bounded")) < 30


def launched(work: Path, run: str, *settings: str) -> str:
    """Launches a long run of two nodes, and waits for its third step; the job's id."""
    asked = ("--nodes", "2", "--gpus", "0", "--time", "20", f"run_dir={run}", "train.steps=3000", *settings)
    job = re.search(r"job (\d+) is in the queue", tidar(work, "launch", "run.yaml", *asked))[1]
    reached(work, run, 3)
    return job


def test_a_cancelled_job_saves_and_ends_for_good(work):
    """However long a save takes: Slurm's KillWait is 5 s here, and a step waits longer."""
    job = launched(work, "cancelled", "checkpoint.interval=3000")
    assert f"job {job}: RUNNING on 127.0.0.[11-12]" in tidar(work, "launch", "--status", "cancelled")
    paused = rank_process("cancelled", 1)
    paused.suspend()
    assert f"job {job} saves at the next step boundary" in tidar(work, "launch", "--cancel", "cancelled")
    time.sleep(12)
    paused.resume()
    said = end(work, job, "FAILED")
    stopped_at = int(said.split("SIGUSR2: stopped at step ")[1].split(";")[0])
    assert "is requeued" not in said and restarted(job) == 0
    status = tidar(work, "launch", "--status", "cancelled")
    assert f"newest checkpoint: step_{stopped_at:08d}" in status and "the same command resumes it" in status


def test_a_job_that_is_cancelled_twice_ends_at_once(work):
    job = launched(work, "cancelled_twice")
    paused = rank_process("cancelled_twice", 1)
    paused.suspend()
    tidar(work, "launch", "--cancel", "cancelled_twice")
    assert f"job {job} is cancelled" in tidar(work, "launch", "--cancel", "cancelled_twice")
    said = end(work, job, "CANCELLED", seconds=60)
    assert "is requeued" not in said and restarted(job) == 0


BAD = {
    "an unknown key": ("train.stepz=3", "did you mean train.steps"),
    "a layout that does not fit the job": ("parallel.data=2", "parallel.data = 2: 4 processes"),
    "no corpus": ("data.path=nowhere", "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_setting_ends_the_job_and_is_not_requeued(work, name):
    setting, message = BAD[name]
    job = sbatch(work, f"run_dir=bad_{setting.split('.')[0]}_{len(setting)}", setting)
    said = end(work, job, "FAILED")
    assert message in said and "Traceback" not in said
    assert slurm.show(job)["ExitCode"] == "2:0" and restarted(job) == 0


def test_a_run_in_the_batch_shell_itself_is_refused(work):
    command = f"{sys.executable} -m tidar_mega.cli pretrain run.yaml run_dir=shell"
    done = subprocess.run(
        ["sbatch", "--parsable", *FOUR_TASKS, "--output=tidar-%j.out", f"--wrap=PYTHONPATH={ROOT} {command}"],
        cwd=work,
        capture_output=True,
        text=True,
    )
    assert "start the run with srun" in end(work, done.stdout.strip(), "FAILED")


@pytest.mark.parametrize("nodes", ["gpu[07-09,12],cpu1", "node1", "a-b[1-2],c", "r[3-4]n[001-016]", "127.0.0.[11-12]"])
def test_the_first_host_is_the_one_that_slurm_names(nodes):
    named = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    assert slurm.first_host(nodes) == named.stdout.split()[0]


STOPS = {"signal": ["scancel", "--signal=USR2"], "requeue": ["scontrol", "requeue"]}


@pytest.mark.parametrize("by", STOPS)
def test_submit_from_python_gives_the_same_run_also_through_a_stop(by, work, uninterrupted, monkeypatch):
    monkeypatch.chdir(work)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    run_dir = f"submitted_{by}"
    job = launch.submit("run.yaml", [f"run_dir={run_dir}"], nodes=2, tasks=2, time="20", signal_seconds=60)
    job.watcher._delay_s = 2
    reached(work, run_dir, 7)
    subprocess.run([*STOPS[by], job.job_id], check=True)
    assert job.results() == 4 * [{"finished": True, "step": 30, "run_dir": run_dir}]
    assert restarted(job.job_id) == 1
    assert losses(work, run_dir) == uninterrupted
    said = [log.read_text() for log in (work / run_dir / "submitit").rglob("*_log.err")]
    assert len(said) == 4 and "Traceback" not in "".join(said)  # the start that was stopped has left no result


def test_a_task_of_submitit_has_its_share_of_the_node_s_cpus(work, monkeypatch):
    """Of 8, in a job that takes both GPUs of each of its nodes, and so also all else."""
    monkeypatch.chdir(work)
    for asked, found in (({"gpus": 2}, "4"), ({"gpus": 1, "cpus": 3}, "3")):
        r = Resources(nodes=2, time="10", signal_seconds=60, sbatch=["--comment=shares"], **asked)
        job = jobs._executor(work / "shares", r, "slurm").submit(lambda: os.environ["SLURM_CPUS_PER_TASK"])
        job.watcher._delay_s = 2
        assert job.results() == 2 * r.gpus * [found] and slurm.show(job.job_id)["Comment"] == "shares"


def test_a_sweep_of_three(work, monkeypatch):
    monkeypatch.chdir(work)
    rates = [[f"optimizer.lr={rate}", "train.steps=3", "parallel.data=null"] for rate in (1e-3, 2e-3, 3e-3)]
    runs = launch.sweep("run.yaml", rates, nodes=1, tasks=1, time="20", signal_seconds=60)
    for job in runs:
        job.watcher._delay_s = 2
    assert [job.result()["step"] for job in runs] == [3, 3, 3]
    last = [metrics(work, job.result()["run_dir"])[3]["loss"] for job in runs]
    assert len(set(last)) == 3


def test_launch_follows_a_job_that_runs_a_copy_of_the_code(work, monkeypatch):
    asked = ("--nodes", "2", "--gpus", "0", "--tasks", "2", "--time", "20", "run_dir=launched", "train.steps=3")
    asked += ("--sbatch=--comment=more",)
    said = tidar(work, "launch", "run.yaml", *asked, "--follow")
    assert "done: 3 steps" in said and "logs in launched/logs/" in said
    status = tidar(work, "launch", "--status", "launched")
    assert "COMPLETED" in status and "newest checkpoint: step_00000003" in status and "finished" in status
    assert slurm.show(json.loads((work / "launched" / "job.json").read_text())["job"])["Comment"] == "more"
    (copy,) = (work / "launched" / "code").iterdir()
    assert (copy / "tidar_mega" / "cli.py").read_text() == (ROOT / "tidar_mega" / "cli.py").read_text()


IMPOSSIBLE = {
    "a partition": (("--gpus", "2", "--partition", "fast"), "--partition fast: this cluster has far, main, short"),
    "time": (("--gpus", "2", "--time", "2-00:00:00", "--partition", "short"), "partition short allows 30:00"),
    "a shared folder": (("--gpus", "2", "--partition", "far"), "and the nodes are others (192.0.2.1)"),
    "nodes": (("--nodes", "4", "--gpus", "1"), "--nodes 4: partition main has 2"),
    "GPUs": (("--gpus", "4"), "--gpus 4: of the 2 nodes of partition main, 0 have so many; the most is 2"),
    "a layout": (("--gpus", "3", "parallel.tensor=2"), "must divide the 3 processes (1 nodes x 3)"),
    "a setting": (("train.stepz=1",), "did you mean train.steps"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_the_cluster_lacks_is_said_before_anything_is_queued(work, name):
    options, message = IMPOSSIBLE[name]
    said = tidar(work, "launch", "run.yaml", "parallel.data=null", *options, "run_dir=impossible", code=2)
    assert message in said and "Traceback" not in said
    assert not (work / "impossible").exists()
    assert "impossible" not in subprocess.run(["squeue", "-h", "-o", "%o"], capture_output=True, text=True).stdout
