"""What is decided without a cluster: places, layouts, bounds of restarts, and the logs that say who failed first."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.test_main_job import CONFIG, make_corpus
from tidar_mega.config import ConfigError, LostError, UserError, load
from tidar_mega.launch import __main__ as launch_main
from tidar_mega.launch import command, jobs, resources, restarts, slurm
from tidar_mega.launch.resources import Resources
from tidar_mega.lifetime import STOP_SIGNALS
from tidar_mega.train import health

ROOT = Path(__file__).parent.parent
TASK = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
}


def test_a_task_takes_its_place_from_slurm():
    env = slurm.distributed_env({**TASK, "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
    assert env["RANK"] == "9" and env["LOCAL_RANK"] == "1" and env["WORLD_SIZE"] == "16"
    assert env["LOCAL_WORLD_SIZE"] == "8" and env["MASTER_ADDR"] == "gpu07"
    assert 10000 <= int(env["MASTER_PORT"]) < 20000
    assert slurm.distributed_env({**TASK, "CUDA_VISIBLE_DEVICES": "1"})["LOCAL_RANK"] == "0", (
        "Slurm shows it one GPU only"
    )
    with pytest.raises(ConfigError, match="one process per GPU"):
        slurm.distributed_env({**TASK, "SLURM_LOCALID": "2", "CUDA_VISIBLE_DEVICES": "0,1"})


def test_steps_of_neighbouring_jobs_have_ports_of_their_own():
    steps = [{"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)} for job in range(100, 140) for step in range(4)]
    assert len({slurm.distributed_env({**TASK, **step})["MASTER_PORT"] for step in steps}) == len(steps)


def test_a_task_in_a_container_whose_hook_sets_ranks_takes_its_whole_place_from_slurm(monkeypatch):
    hook = {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu07", "MASTER_PORT": "61001"}
    monkeypatch.setattr(os, "environ", {**TASK, **hook})
    assert slurm.set_distributed_env()
    assert os.environ["LOCAL_WORLD_SIZE"] == "8" and os.environ["MASTER_PORT"] != "61001"
    monkeypatch.setattr(os, "environ", {**TASK, **hook, "LOCAL_WORLD_SIZE": "2", "RANK": "1"})
    assert slurm.set_distributed_env() and os.environ["RANK"] == "1", "torchrun in a task has the last word"
    monkeypatch.setattr(os, "environ", {"RANK": "3"})
    assert slurm.set_distributed_env(), "any launcher, where Slurm is not"
    monkeypatch.setattr(os, "environ", {**TASK, **hook, "SLURM_STEP_NUM_TASKS": "1", "RANK": "0"})
    assert not slurm.set_distributed_env(), "a single task starts the processes of its layout itself"


def test_layouts_that_do_not_fit_the_job_are_refused():
    resources.check(load(None, ["parallel.tensor=2"]), Resources(nodes=2, gpus=2))
    with pytest.raises(ConfigError, match=r"must divide the 6 processes \(2 nodes x 3\)"):
        resources.check(load(None, ["parallel.tensor=4"]), Resources(nodes=2, gpus=3))
    with pytest.raises(ConfigError, match=r"parallel.data = 2: 4 processes .* set it to 4"):
        resources.check(load(None, ["parallel.data=2"]), Resources(nodes=2, gpus=2))
    with pytest.raises(ConfigError, match="train.global_batch_size"):
        resources.check(load(None), Resources(nodes=8, gpus=8))
    with pytest.raises(ConfigError, match="--time 5"):
        resources.check(load(None), Resources(time="5"))


@pytest.mark.parametrize(
    "time, minutes", [("90", 90), ("12:00:00", 720), ("1:30", 2), ("2-12", 3600), ("1-0:0:30", 1441), ("0:0:59", 1)]
)
def test_times_are_those_of_slurm(time, minutes):
    assert resources.minutes(time) == minutes


def test_gpus_of_a_node():
    lists = {"(null)": 0, "gpu:2": 2, "gpu:a100:8(S:0-1),nvme:1": 8, "nvme:3,gpu:h100:4": 4, "gpu:a:2,gpu:b:2": 4}
    assert {text: resources.gpus_of(text) for text in lists} == lists


def test_a_job_that_has_its_nodes_for_itself_may_use_some_of_their_gpus():
    tasks = {"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "8"}
    for asked in ("4", "h100:4", "0"):
        slurm.check_tasks({**tasks, "SLURM_GPUS_PER_NODE": asked})
    for asked in ({}, {"SLURM_GPUS_PER_NODE": "8"}, {"SLURM_GPUS_PER_NODE": "h100:8"}):
        with pytest.raises(ConfigError, match=r"--ntasks-per-node 4: must be --gpus-per-node \(8\)"):
            slurm.check_tasks({**tasks, **asked})


def test_more_options_reach_sbatch_and_none_that_is_decided_elsewhere(tmp_path, monkeypatch):
    more = ("--account=physics", "--constraint=h100", "--no-kill")
    r = Resources(gpus=8, sbatch=more)
    config = load(None, ["train.global_batch_size=64"])
    resources.check(config, r)
    assert " ".join(jobs.sbatch_command(Path("x.sh"), ["run.yaml"], r)).endswith(f"{' '.join(more)} x.sh run.yaml")
    for wrong, said in {"account=physics": "a long option", "--partition=big": "--partition is decided by"}.items():
        with pytest.raises(ConfigError, match=said):
            resources.check(config, Resources(gpus=8, sbatch=[wrong]))
    words = ["--gpus=2", *(f"--sbatch={option}" for option in more), prepared(tmp_path / "corpus")]
    shown = launch("configs/quickstart.yaml", *words, "--dry-run", PATH="/nowhere")
    assert f"{' '.join(more)} {ROOT}/slurm/pretrain.sh" in shown.stdout, shown.stderr

    fake(monkeypatch, tmp_path, "sinfo", "echo 'big*|4|gpu:8|infinite'")
    fake(monkeypatch, tmp_path, "srun")
    made = {gpus: jobs._executor(tmp_path, Resources(gpus=gpus, sbatch=more), "slurm") for gpus in (8, 4)}
    script = {gpus: executor._executor._make_submission_file_text("", "") for gpus, executor in made.items()}
    for option in (*more, "--requeue"):
        assert f"#SBATCH {option}\n" in script[8] and f"#SBATCH {option}\n" in script[4]
    once = jobs._executor(tmp_path, Resources(gpus=8, sbatch=["--no-requeue"]), "slurm")._executor
    assert "--requeue" not in once._make_submission_file_text("", "")
    for option in ("--exclusive", "--mem=0"):
        assert f"#SBATCH {option}\n" in script[8] and f"#SBATCH {option}\n" not in script[4]


PARTITIONS = """small|2|gpu:2|30:00
big*|4|gpu:h100:8|1-00:00:00
big*|1|(null)|1-00:00:00"""


@pytest.mark.parametrize(
    "partition, environment, asked, found",
    [
        (None, None, {}, "big"),
        ("small", "big", {"gpus": 2, "time": "20"}, "small"),
        (None, "small", {"gpus": 2, "time": "20"}, "small"),
        (None, "small", {"time": "20"}, "--gpus 8: of the 2 nodes of partition small, 0 have so many; the most is 2 "),
        (None, "fast", {}, "SBATCH_PARTITION fast: this cluster has big, small"),
        ("small,big", None, {"gpus": 2, "time": "20"}, "small,big"),
        ("small,big", None, {}, "big"),
        ("small,big", None, {"nodes": 5}, "--time 12:00:00: partition small .*; --gpus 8: of the 5 nodes of .* big, 4"),
        ("small,big", None, {"nodes": 7, "time": "20"}, "--nodes 7: partition small has 2; .* partition big has 5;"),
        ("small,fast", None, {}, "--partition fast: this cluster has big, small"),
    ],
)
def test_partitions_are_those_that_slurm_would_take(partition, environment, asked, found, tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path, "sinfo", f"echo '{PARTITIONS}'")
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    if environment:
        monkeypatch.setenv("SBATCH_PARTITION", environment)
    r = Resources(**{"gpus": 8, "time": "12:00:00", **asked, "partition": partition})
    if " " not in found:
        assert resources._check_nodes(r) == found
    else:
        with pytest.raises(UserError, match=found):
            resources._check_nodes(r)


def test_a_finished_run_is_known_only_with_its_checkpoint(tmp_path):
    config = load(None, [f"run_dir={tmp_path}", "train.steps=60"])
    assert restarts.finished(config) is None
    assert restarts.finish_or_requeue(config, 60) == 0
    assert restarts.finished(config) is None, "no checkpoint is there"
    (tmp_path / "checkpoints" / "step_00000060").mkdir(parents=True)
    assert restarts.finished(config) == 60
    assert restarts.finished(load(None, [f"run_dir={tmp_path}", "train.steps=61"])) is None


def test_a_run_that_goes_on_is_not_finished(tmp_path):
    (tmp_path / "checkpoints" / "step_00000060").mkdir(parents=True)
    restarts.finish_or_requeue(load(None, [f"run_dir={tmp_path}", "train.steps=60"]), 60)
    restarts.begin(load(None, [f"run_dir={tmp_path}", "train.steps=60"]))
    assert list(tmp_path.glob("*.json")), "it does not go on"
    restarts.begin(load(None, [f"run_dir={tmp_path}", "train.steps=61"]))
    assert not list(tmp_path.glob("*.json")), "for whoever waits for its end"
    restarts.begin(load(None, [f"run_dir={tmp_path}", "train.steps=61"]))


def test_a_controller_that_is_away_is_waited_for(tmp_path, monkeypatch):
    """A `scontrol` that fails as Slurm's does, twice or always, or that knows no such job."""
    (tmp_path / "scontrol").write_text(
        f"""#!/bin/sh
        case $4 in
            gone) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1;;
            away) echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1;;
        esac
        echo x >> {tmp_path}/calls
        [ $(wc -l < {tmp_path}/calls) -gt 2 ] && exec echo "JobId=7 JobState=RUNNING"
        echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1
        """
    )
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "_AWAY_SECONDS", 10.0)
    assert slurm.show("7") == {"JobId": "7", "JobState": "RUNNING"}
    assert slurm.show("gone") == {}
    monkeypatch.setattr(slurm, "_AWAY_SECONDS", 0.2)
    with pytest.raises(UserError, match="Unable to contact slurm controller"):
        slurm.show("away")


def fake(monkeypatch, folder: Path, name: str, *lines: str) -> None:
    """A command of Slurm on PATH that notes its words in `calls` and does what `lines` say."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(["#!/bin/sh", f"cd {folder}", f'echo "{name} $@" >> calls', *lines]) + "\n")
    (folder / name).chmod(0o755)
    if not os.environ["PATH"].startswith(f"{folder}:"):
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


AWAY = 'echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1'
RUNNING = "JobId=7 JobState=RUNNING BatchFlag=1 Requeue=1"


@pytest.fixture
def job(monkeypatch):
    """This process is one of job 7 of submitit, in its first start, and may change what signals do."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_requeue_that_nobody_answers_can_be_tried_again(job, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(slurm, "_AWAY_SECONDS", 0.2)
    config = load(None, [f"run_dir={tmp_path / 'run'}"])
    fake(monkeypatch, tmp_path / "bin", "scontrol", AWAY)
    assert restarts.finish_or_requeue(config, 1) == LostError.exit_code
    assert "error: job 7 is not requeued: `scontrol show job --oneliner 7` got no answer" in capsys.readouterr().err
    fake(monkeypatch, tmp_path / "bin", "scontrol", f'echo "{RUNNING}"')
    restarts.after_crash(config, LostError.exit_code)
    assert "scontrol requeue 7" in (tmp_path / "bin" / "calls").read_text(), "no code was noted as final"
    fake(monkeypatch, tmp_path / "bin", "scontrol", f'echo "{RUNNING} Restarts=100"')
    monkeypatch.setenv("SLURM_RESTART_COUNT", "100")
    assert restarts.finish_or_requeue(config, 1) == restarts.GAVE_UP
    assert restarts.after_crash(config, 143) == restarts.GAVE_UP, "noted"


def test_a_command_without_an_answer_in_time_is_tried_again_but_sbatch_is_not(tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path, "scontrol", "[ $(wc -l < calls) -gt 1 ] || exec sleep 5", f'echo "{RUNNING}"')
    fake(monkeypatch, tmp_path, "sbatch", "exec sleep 5")
    monkeypatch.setattr(slurm, "_ANSWER_SECONDS", 2.0)
    monkeypatch.setattr(slurm, "_AWAY_SECONDS", 20.0)
    assert slurm.show("7")["JobState"] == "RUNNING"
    with pytest.raises(LostError, match="nothing within 2 s"):
        slurm.ask(["sbatch", "x.sh"])
    assert (tmp_path / "calls").read_text().count("sbatch") == 1


def test_a_requeue_whose_first_answer_was_lost_still_excludes_the_bad_nodes(job, tmp_path, monkeypatch):
    refused = 'echo "Job is pending execution for job 7" >&2; exit 1'
    known = 'echo "JobId=7 JobState=PENDING Restarts=$(ls again 2>/dev/null | wc -l)"'
    fake(monkeypatch, tmp_path, "scontrol", f"case $1 in show) {known};; requeue) touch again; {refused};; esac")
    slurm.requeue("7", ["node2"])
    assert "scontrol update JobId=7 ExcNodeList=node2" in (tmp_path / "calls").read_text()
    fake(monkeypatch, tmp_path, "scontrol", f"case $1 in show) echo JobId=7 Restarts=0;; requeue) {refused};; esac")
    with pytest.raises(UserError, match="Job is pending execution"):
        slurm.requeue("7", ["node2"])


@pytest.mark.parametrize("code", [0, 1, UserError.exit_code])
def test_a_task_waits_while_its_job_comes_back_and_not_in_one_that_is_cancelled(code, job, tmp_path, monkeypatch):
    """Whoever has requeued it; the job is cancelled at the third question."""
    comes_back = 'echo "JobId=7 JobState=COMPLETING Restarts=1"; exit'
    ended = 'echo "JobId=7 JobState=COMPLETING Restarts=0"'
    fake(monkeypatch, tmp_path / "bin", "scontrol", f"[ $(wc -l < calls) -gt 2 ] || {{ {comes_back}; }}", ended)
    for name in ("ASK_SECONDS", "_END_SECONDS"):
        monkeypatch.setattr(jobs, name, 0.0)
    monkeypatch.setattr(jobs.Pretrain, "_run", lambda self, settings: code)
    (tmp_path / "logs" / "7").mkdir(parents=True)
    with pytest.raises(UserError, match="Slurm ends job 7: cancelled"):
        jobs.Pretrain(None, (f"run_dir={tmp_path}",), str(ROOT))()
    assert (tmp_path / "bin" / "calls").read_text().count("scontrol show") == 3


def test_what_lies_beside_the_script_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_ROOT", tmp_path / "clone")
    for place in ("slurm/env.sh", ".venv/bin/python"):
        (tmp_path / "clone" / place).parent.mkdir(parents=True)
        (tmp_path / "clone" / place).touch()
    monkeypatch.chdir(tmp_path)
    for name in ("TIDAR_ENV", "TIDAR_PYTHON"):
        monkeypatch.delenv(name, raising=False)
    r = resources.Resources(nodes=1, gpus=8)
    found = next(word for word in jobs.sbatch_command(Path("x.sh"), [], r, tmp_path / "code") if "export" in word)
    clone = tmp_path / "clone"
    said = f"TIDAR_CODE={tmp_path}/code,TIDAR_ENV={clone}/slurm/env.sh,TIDAR_PYTHON={clone}/.venv/bin/python"
    assert found == f"--export=ALL,{said}"
    monkeypatch.setenv("TIDAR_ENV", "mine.sh")
    monkeypatch.chdir(clone)
    assert f"--export=ALL,TIDAR_CODE={tmp_path}/code" in jobs.sbatch_command(Path("x.sh"), [], r, tmp_path / "code")
    with pytest.raises(UserError, match="a path with a comma"):
        jobs.sbatch_command(Path("x.sh"), [], r, tmp_path / "a,b")


def test_bad_nodes_that_ranks_note_at_once_are_all_excluded(job, tmp_path, monkeypatch):
    config = load(None, [f"run_dir={tmp_path / 'run'}"])
    assert restarts._bad_nodes(config, "7") == []
    note = "from tidar_mega.config import load; from tidar_mega.launch import note_bad_nodes, slurm; import sys, time\n"
    note += (
        f"config = load(None, ['run_dir={tmp_path / 'run'}']); time.sleep(max(0, float(sys.argv[2]) - time.time()))\n"
    )
    note += "note_bad_nodes(config, [sys.argv[1]])"
    at = str(time.time() + 8)
    ranks = [subprocess.Popen([sys.executable, "-c", note, f"n{rank}", at], cwd=ROOT) for rank in range(6)]
    assert [rank.wait() for rank in ranks] == 6 * [0]
    fake(monkeypatch, tmp_path / "bin", "scontrol", f'echo "{RUNNING}"')
    restarts.after_crash(config, LostError.exit_code)
    assert "ExcNodeList=n0,n1,n2,n3,n4,n5" in (tmp_path / "bin" / "calls").read_text()
    assert restarts._bad_nodes(config, "8") == [], "another job may find them mended"


def test_starts_without_a_new_checkpoint_are_counted(tmp_path):
    config, checkpoints = load(None, [f"run_dir={tmp_path}"]), tmp_path / "checkpoints"
    assert [restarts._count_idle(config, "7", n) for n in (0, 1, 1)] == [1, 2, 2], "once for each start"
    (checkpoints / "step_00000005").mkdir(parents=True)
    assert [restarts._count_idle(config, "7", n) for n in (2, 3)] == [0, 1]
    assert restarts._count_idle(config, "8", 0) == 0, "another job, that of a user who has mended something"


def test_the_rank_that_failed_first_is_found(tmp_path):
    assert "it was killed" in restarts.first_failure(tmp_path)
    (tmp_path / "rank_0.log").write_text("step 1\n[rank 0] ended because rank 3 had failed: OSError\n")
    (tmp_path / "rank_2.log").write_text("[rank 2] failed at step 1, reading:\nTraceback\nConnection reset\n")
    (tmp_path / "rank_3.log").write_text("[rank 3] failed at step 1, saving:\nTraceback\nOSError: full\n")
    assert f"{tmp_path / 'rank_3.log'}: [rank 3] failed at step 1" in restarts.first_failure(tmp_path)
    for rank in (0, 2, 3):
        restarts.mark_start(tmp_path / f"rank_{rank}.log")
    assert "it was killed" in restarts.first_failure(tmp_path), "an earlier start is not to blame"
    with (tmp_path / "rank_0.log").open("a") as log:
        log.write("error: of this start\n")
    assert "error: of this start" in restarts.first_failure(tmp_path)


def test_a_rank_that_crashes_once_the_run_is_finished_changes_nothing(job, tmp_path):
    config = load(None, [f"run_dir={tmp_path}", "train.steps=60"])
    (tmp_path / "checkpoints" / "step_00000060").mkdir(parents=True)
    restarts.finish_or_requeue(config, 60)
    assert restarts.after_crash(config, 134) == 0


def test_code_and_settings_are_copied_as_they_are_now(tmp_path):
    settings = load(
        None, [f"run_dir={tmp_path}", "optimizer.min_lr=1e-5", "train.init_from='null'", "decode.stop=['no', 'a: b']"]
    )
    code = jobs.snapshot(settings)
    assert (code / "tidar_mega" / "rows.py").read_text() == (ROOT / "tidar_mega" / "rows.py").read_text()
    assert (code / "slurm" / "pretrain.sh").stat().st_mode & 0o111
    assert load(code / jobs.SETTINGS) == settings
    shown = [sys.executable, "-P", "-c", "import tidar_mega.config as c; print(c.__file__)"]
    done = subprocess.run(shown, env={**os.environ, "PYTHONPATH": str(code)}, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == str(code / "tidar_mega" / "config" / "__init__.py"), "and it is the copy that runs"


def test_runs_inside_the_repository_are_not_copied_with_the_code(tmp_path, monkeypatch):
    """Checkpoints, data and earlier copies, in a folder that git does not ignore."""
    for name in (
        "tidar_mega/rows.py",
        "slurm/pretrain.sh",
        "outputs/run/checkpoints/step_00000005/weights",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(jobs, "_ROOT", tmp_path)
    config = load(None, [f"run_dir={tmp_path / 'outputs' / 'run'}"])
    jobs.snapshot(config)
    code = jobs.snapshot(config)
    copied = sorted(str(path.relative_to(code)) for path in code.rglob("*") if path.is_file())
    assert copied == ["COMMIT", "settings.yaml", "slurm/pretrain.sh", "tidar_mega/rows.py"]


@pytest.mark.distributed
@pytest.mark.parametrize("executor", ["local", "debug"])
def test_submit_without_slurm_trains_here(tmp_path, monkeypatch, executor):
    make_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = ["parallel.data=null", "train.steps=3", "run_dir=run"]
    job = jobs.submit("run.yaml", settings, executor=executor, time="20")
    if executor == "local":  # while it is about to start; the one in this process has ended
        (tmp_path / "run.yaml").write_text(CONFIG.replace("lr: 3.0e-3", "lr: 9.0e-3"))
    result = job.result()
    assert result == {"finished": True, "step": 3, "run_dir": "run"}
    assert "done: 3 steps" in (tmp_path / "run" / "logs" / "local" / "rank_0.log").read_text()
    assert load(tmp_path / "run" / "config.yaml").optimizer.lr == 3e-3


def test_a_second_sweep_has_folders_of_its_own_and_resumes_what_it_shares(tmp_path, monkeypatch, capsys):
    """The runs are not made: what counts is the folder that each of them is given."""
    make_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(jobs.Pretrain, "_run", lambda self, settings: 0)

    def folders(*overrides: list[str]) -> list[str]:
        made = jobs.sweep("run.yaml", [["parallel.data=null", *own] for own in overrides], executor="debug", time="20")
        return [job.result()["run_dir"] for job in made]

    low, high = folders(["optimizer.lr=1e-3"], ["optimizer.lr=2e-3", "train.seed=1"])
    assert f"{high}: parallel.data=null optimizer.lr=2e-3 train.seed=1" in capsys.readouterr().out
    again, other = folders(["train.seed=1", "optimizer.lr=2e-3"], ["optimizer.lr=3e-3"])
    assert again == high and len({low, high, other}) == 3
    with pytest.raises(UserError, match=f"another run of this sweep is in the same folder, {low}"):
        folders(["optimizer.lr=1e-3"], ["optimizer.lr=1e-3"])
    assert folders(["run_dir=mine"]) == ["mine"]


def test_a_task_of_submitit_that_fails_here_says_why(tmp_path, monkeypatch):
    make_corpus(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    settings = ("parallel.data=1", "run_dir=run")
    with pytest.raises(UserError, match="method = tidra: must be one of"):
        jobs.Pretrain("run.yaml", (*settings, "method=tidra"), str(ROOT))()
    monkeypatch.setattr(jobs.Pretrain, "_run", lambda self, settings: 1)
    with pytest.raises(UserError, match="ended with code 1; "):
        jobs.Pretrain("run.yaml", settings, str(ROOT))()


# Stands for the package that a task runs: says what it is given, and goes on through signals.
CHILD = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: print("got", signal.Signals(n).name, flush=True))
print("pid", os.getpid(), *sorted(name for name in os.environ if name.startswith("SLURM_")), flush=True)
time.sleep(60)
"""


def test_what_ends_a_local_task_reaches_its_run_and_leaves_none_behind(tmp_path):
    """In somebody's batch job, which the run does not see."""
    (tmp_path / "code" / "tidar_mega").mkdir(parents=True)
    (tmp_path / "code" / "tidar_mega" / "__init__.py").touch()
    (tmp_path / "code" / "tidar_mega" / "cli.py").write_text(CHILD)
    made = f"from tidar_mega.launch.jobs import Pretrain; Pretrain('run.yaml', (), '{tmp_path}/code')"
    task = subprocess.Popen(
        [sys.executable, "-c", f"{made}._run(__import__('tidar_mega').config.load(None, ['run_dir=run']))"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": "7", "SUBMITIT_EXECUTOR": "local"},
        cwd=tmp_path,
    )
    log = tmp_path / "run" / "logs" / "local" / "rank_0.log"
    said(log, "pid ")
    task.send_signal(signal.SIGINT)
    pid, *variables = said(log, "got SIGINT").split("pid ")[1].splitlines()[0].split()
    assert not variables and task.poll() is None
    child = psutil.Process(int(pid))
    task.kill()
    task.wait()
    child.wait(10)


def said(log: Path, words: str, seconds: float = 60) -> str:
    """What is in `log` once `words` are."""
    deadline = time.monotonic() + seconds
    while not log.exists() or words not in log.read_text():
        assert time.monotonic() < deadline, f"no {words!r} in {log}"
        time.sleep(0.05)
    return log.read_text()


def test_a_crash_here_does_not_requeue_the_job_that_surrounds_it(job, tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path / "bin", "scontrol", f'echo "{RUNNING}"')
    monkeypatch.setattr(jobs.Pretrain, "_run", lambda self, settings: 1)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    with pytest.raises(UserError, match="ended with code 1; "):
        jobs.Pretrain(None, (f"run_dir={tmp_path}",), str(ROOT))()
    assert not (tmp_path / "bin" / "calls").exists()


def launch(*words: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tidar_mega.cli", "launch", *words]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def prepared(folder: Path) -> str:
    """The setting of a corpus that looks finished."""
    folder.mkdir()
    (folder / "index.json").touch()
    return f"data.path={folder}"


def test_a_dry_run_shows_the_command_and_the_script_and_a_launch_needs_slurm(tmp_path):
    words = ("configs/quickstart.yaml", "--nodes", "2", "--gpus", "1", "--time", "12:00:00", f"run_dir={tmp_path}/run")
    words += (prepared(tmp_path / "corpus"),)
    shown = launch(*words, "--dry-run", PATH="/nowhere")
    assert shown.returncode == 0, shown.stderr
    assert "sbatch --nodes=2 --gpus-per-node=1 --time=12:00:00 --signal=USR2@300" in shown.stdout
    assert (ROOT / "slurm" / "pretrain.sh").read_text() in shown.stdout
    misspelt = launch(*words, "method=tidra", "--dry-run", PATH="/nowhere")
    assert misspelt.returncode == 2 and "method = tidra: must be one of ar, " in misspelt.stderr
    refused = launch(*words, PATH="/nowhere")
    assert refused.returncode == 2 and "sbatch is not on PATH" in refused.stderr
    unprepared = launch(*words, f"data.path=[{tmp_path}/corpus,/nodata]", "--dry-run", PATH="/nowhere")
    assert unprepared.returncode == 2 and "error: data.path = /nodata: no index.json there" in unprepared.stderr
    weightless = launch(*words, "train.init_from=/nonexist", "--dry-run", PATH="/nowhere")
    assert weightless.returncode == 2 and "error: train.init_from = /nonexist: must be a folder" in weightless.stderr
    assert not (tmp_path / "run").exists()


def test_weights_to_begin_with_are_a_model_a_run_or_a_checkpoint(tmp_path):
    data = prepared(tmp_path / "corpus")
    for name in ("model/config.json", "run/checkpoints/step_00000005/meta.json", "new/checkpoints/metrics.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for good in ("model", "run", "run/checkpoints", "run/checkpoints/step_00000005"):
        resources.check_inputs(load(None, [data, f"train.init_from={tmp_path / good}"]))
    for bad in ("new", "model/config.json", "corpus"):
        with pytest.raises(ConfigError, match="train.init_from = "):
            resources.check_inputs(load(None, [data, f"train.init_from={tmp_path / bad}"]))
    resources.check_inputs(load(None, [data, f"train.continue_from={tmp_path / 'run'}"]))
    with pytest.raises(ConfigError, match="train.continue_from = "):
        resources.check_inputs(load(None, [data, f"train.continue_from={tmp_path / 'model'}"]))
    resources.check_inputs(load(None, ["data.path=/nodata", "launch.check_shared=false"]))


def test_a_launch_imports_no_torch():
    code = "import sys, tidar_mega.launch.command; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_cluster_without_srun_is_said(tmp_path):
    for name in ("sbatch", "scontrol"):
        (tmp_path / name).write_text("#!/bin/sh")
        (tmp_path / name).chmod(0o755)
    words = ("configs/quickstart.yaml", "--gpus", "2", f"run_dir={tmp_path}/run", prepared(tmp_path / "corpus"))
    refused = launch(*words, PATH=str(tmp_path))
    assert refused.returncode == 2 and "srun is not on PATH" in refused.stderr


def test_a_run_that_is_launched_again_for_more_steps_is_not_finished(tmp_path, monkeypatch, capsys):
    (tmp_path / "run" / "checkpoints" / "step_00000060").mkdir(parents=True)
    restarts.finish_or_requeue(load(None, [f"run_dir={tmp_path / 'run'}", "train.steps=60"]), 60)
    fake(monkeypatch, tmp_path, "sbatch", "echo 7")
    fake(monkeypatch, tmp_path, "srun")
    fake(monkeypatch, tmp_path, "sinfo")
    fake(monkeypatch, tmp_path, "scontrol", 'echo "JobId=7 JobState=PENDING"')
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = [f"run_dir={tmp_path / 'run'}", "parallel.data=1", prepared(tmp_path / "corpus")]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)
    for steps in (60, 61):
        asked = parser.parse_args(["--gpus=0", "run.yaml", *words, f"train.steps={steps}"])
        assert command.run(asked) == 0
        last = (tmp_path / "calls").read_text().split("sbatch --parsable")[-1].splitlines()[0].split()
        assert load(last[-1]).train.steps == steps, (
            "the job reads a copy of the settings, and nothing that changes them"
        )
        command.run(parser.parse_args(["--status", str(tmp_path / "run")]))
        assert ("\nfinished\n" in capsys.readouterr().out) == (steps == 60)
    fake(monkeypatch, tmp_path, "scontrol", 'echo "JobId=7 JobState=CANCELLED"')
    asked.follow = True
    assert command.run(asked) == 1


def test_every_signal_that_stops_a_run_is_handed_on_to_it():
    assert set(STOP_SIGNALS) == set(health.STOP_SIGNALS)


def test_the_status_names_the_checkpoint_of_the_highest_step(tmp_path, monkeypatch, capsys):
    """Beyond eight digits, and beside what has no number."""
    fake(monkeypatch, tmp_path / "bin", "scontrol", 'echo "JobId=7 JobState=PENDING"')
    (tmp_path / "job.json").write_text(json.dumps({"job": "7"}))
    for name in ("step_99999999", "step_100000000", "step_draft"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(["--status", str(tmp_path)]))
    assert "newest checkpoint: step_100000000\n" in capsys.readouterr().out


def test_a_run_that_was_not_launched_has_no_status(tmp_path):
    (tmp_path / "job.json").write_text(json.dumps({}))
    for option in ("--status", "--cancel"):
        refused = launch(option, str(tmp_path))
        assert refused.returncode == 2 and "has submitted no job" in refused.stderr


@pytest.mark.parametrize(
    "state, steps, gently",
    [("RUNNING", "7.batch 7.0", True), ("RUNNING", "7.batch 7.extern", False), ("PENDING", "", False)],
)
def test_a_run_that_trains_is_cancelled_after_its_save_and_at_once_by_a_second_word(
    state, steps, gently, tmp_path, monkeypatch, capsys
):
    for name in ("scancel", "scontrol", "squeue"):
        said = {"scontrol": f"JobId=7 JobState={state}", "squeue": steps}.get(name, "")
        fake(monkeypatch, tmp_path / "bin", name, f"echo {said}")
    (tmp_path / "job.json").write_text(json.dumps({"job": "7", "output": "x"}))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = []
    for _ in range(2):
        assert command.run(parser.parse_args(["--cancel", str(tmp_path)])) == 0
        words.append([call for call in (tmp_path / "bin" / "calls").read_text().splitlines() if "show" not in call])
        (tmp_path / "bin" / "calls").unlink()
    asked = [call for call in words[0] if not call.startswith("squeue")]
    assert asked == (["scontrol update JobId=7 Requeue=0", "scancel --signal=USR2 7"] if gently else ["scancel 7"])
    assert "scancel 7" in words[1]
    assert (f"tidar launch --cancel {tmp_path} once more ends it at once" in capsys.readouterr().out) == gently
    command.run(parser.parse_args(["--status", str(tmp_path)]))
    assert ("the same command resumes it" in capsys.readouterr().out) == gently


@pytest.mark.parametrize("name", ["pretrain.sh", "evaluate.sh"])
def test_the_scripts_are_valid_shell(name):
    subprocess.run(["bash", "-n", str(ROOT / "slurm" / name)], check=True)


@pytest.mark.parametrize(
    "job, cpus",
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "128(x2)", "SLURM_NTASKS_PER_NODE": "8"}, 16),
        ({"SLURM_JOB_CPUS_PER_NODE": "128(x2),9,96(x3)", "SLURM_NTASKS_PER_NODE": "4"}, 2),
        ({"SLURM_JOB_CPUS_PER_NODE": "128", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_JOB_CPUS_PER_NODE": "2", "SLURM_NTASKS_PER_NODE": "8"}, 1),
    ],
)
def test_a_task_has_its_share_of_the_cpus_of_its_node(job, cpus, tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path, "python")
    fake(monkeypatch, tmp_path, "srun")
    subprocess.run(
        ["bash", str(ROOT / "slurm" / "pretrain.sh"), "run.yaml"],
        env={**os.environ, "TIDAR_PYTHON": "python", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a", **job},
        cwd=tmp_path,
    )
    assert f"srun --cpus-per-task={cpus} " in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("code, after", [(0, "after 0"), (1, "after 1"), (2, None)])
def test_only_a_bad_setting_ends_the_job_before_any_rank_starts(code, after, tmp_path, monkeypatch):
    fake(monkeypatch, tmp_path, "python", f'[ "$4" != logs ] || exit {code}', "exit 5")
    fake(monkeypatch, tmp_path, "srun", "echo $SLURM_EXPORT_ENV >> exported")
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "pretrain.sh"), "run.yaml"],
        env={**os.environ, "TIDAR_PYTHON": str(tmp_path / "python"), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a"},
        cwd=tmp_path,
    )
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == (5 if after else 2)
    assert (f"{after} run.yaml" in calls) if after else ("after" not in calls)
    assert (tmp_path / "exported").exists() == (code == 0)
    if code == 0:
        assert (tmp_path / "exported").read_text() == "ALL\n"


def test_a_file_system_that_fails_is_no_bad_setting(job, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert launch_main.main(["logs", "run.yaml"]) == UserError.exit_code
    (tmp_path / "run.yaml").write_text(CONFIG)
    assert launch_main.main(["logs", str(tmp_path / "run.yaml"), f"run_dir={tmp_path / 'file' / 'run'}"]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_the_file_system_of_a_folder_is_that_of_the_mount_above_it(tmp_path):
    mounts = f"/dev/vda1 / ext4 rw 0 0\nserver:/home {tmp_path} nfs4 rw 0 0\ntmpfs {tmp_path}/a/b tmpfs rw 0 0\n"
    found = {name: resources.mount_of(tmp_path / name, mounts)[1] for name in (".", "a", "a/b", "a/b/runs/8b", "a/bc")}
    assert found == {".": "nfs4", "a": "nfs4", "a/b": "tmpfs", "a/b/runs/8b": "tmpfs", "a/bc": "nfs4"}
    assert resources.mount_of(Path("/runs"), mounts) == ("/", "ext4")
