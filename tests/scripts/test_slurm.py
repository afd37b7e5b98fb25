"""scripts/slurm/train.sbatch with stand-ins of srun and scontrol: two nodes of one machine; the time is up, or the job is
preempted; queued again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forge import free_port
from tests.runs import SMALL

ROOT = Path(__file__).parents[2]

SRUN = """#!/usr/bin/env bash
# Starts the command once a node, and passes SIGTERM on to the tasks, as srun does.
while [[ "$1" == --* ]]; do shift; done
tasks=()
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'kill -TERM "${tasks[@]}"' TERM
code=0
for task in "${tasks[@]}"; do
  while kill -0 "$task" 2>/dev/null; do wait "$task" || true; done
  wait "$task" || code=$?
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") printf '127.0.0.1\\nlocalhost\\n' ;;
  "show job") cat "$REQUEUED-job" 2>/dev/null ;;
  *) echo "$@" >> "$REQUEUED" ;;
esac
"""
LAUNCH = """#!/usr/bin/env bash
# Stands in for training: SIGTERM is counted, and saving takes a second.
signals=0
trap 'signals=$((signals + 1))' TERM
echo $$ > ".$MACHINE_RANK" && mv ".$MACHINE_RANK" "running-$MACHINE_RANK"
until [ "$signals" -gt 0 ] || [ -e finish ]; do sleep 0.05; done
[ -e finish ] || sleep 1
echo "$* of $MACHINE_RANK: $signals SIGTERM" >> said
rm "running-$MACHINE_RANK"
"""
# What `scontrol show job` of Slurm 22.05 said of a job that was preempted within its partition's GraceTime, that scancel ended,
# that ran again after a preemption.
JOB = "   JobState={} Reason=None\n   StartTime=2026-11-25T03:18:30 EndTime=N/A\n   PreemptEligibleTime={} PreemptTime={}\n"
PREEMPTED = JOB.format("RUNNING", "2026-11-25T03:18:30", "2026-11-25T03:18:35")
CANCELLED = JOB.format("CANCELLED", "2026-11-25T03:18:44", "None")
EARLIER = JOB.format("RUNNING", "2026-11-25T03:10:00", "2026-11-25T03:12:00")


@pytest.fixture
def submit(tmp_path, python):
    """submit(*words) starts the job as Slurm would, without waiting for it; returns the process and its log."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    copy = tmp_path / "spool.sh"  # Slurm runs a copy
    copy.write_text((ROOT / "scripts" / "slurm" / "train.sbatch").read_text())
    started = []

    def submit(*words, root=ROOT):
        log = tmp_path / f"log-{len(started)}"
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued"), "PYTHON": sys.executable,
            "SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]",
            "MAIN_PORT": str(free_port()), "NUM_PROCESSES": "1", "SLURM_RESTART_COUNT": str(len(started)),
            "PYTHON_EXEC": python}  # torchrun's: what it starts its processes by
        with open(log, "w") as file:
            job = subprocess.Popen(["bash", str(copy), *map(str, words)], cwd=tmp_path, stdout=file, stderr=file, env=environment)
        started.append(job)
        return job, log

    yield submit
    for job in started:
        if job.poll() is None:
            job.kill()


@pytest.mark.slow
def test_a_job_whose_time_is_up_is_queued_again_and_continues(submit, tiny_sd15, pairs_dir, tmp_path):
    output = tmp_path / "out"
    words = ["sd15_diffusion_dpo", "--pretrained_model_name_or_path", tiny_sd15, "--train_data_dir", pairs_dir, "--output_dir", output,
             *SMALL, "--train_batch_size", 1, "--gradient_accumulation_steps", 1, "--seed", 0, "--report_to", "none",
             "--learning_rate", 1e-6, "--checkpointing_steps", 0]
    job, log = submit(*words, "--max_train_steps", 100_000)
    metrics = output / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and len(metrics.read_text().splitlines()) >= 2, job, log)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=120) == 0, log.read_text()
    told = log.read_text()
    assert "2 pairs per step = 2 device(s) x 1 x 1" in told and "the time is up" in told and "Stopped by SIGTERM" in told
    assert (tmp_path / "requeued").read_text() == "requeue 42\n"
    [checkpoint] = output.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))

    job, log = submit(*words, "--max_train_steps", step + 2)  # queued again; its end brought near
    assert job.wait(timeout=300) == 0, log.read_text()
    assert f"after step {step}" in log.read_text() and (output / "unet.pth").is_file()
    assert (tmp_path / "requeued").read_text() == "requeue 42\n", "a job that came to its end is not"


@pytest.mark.parametrize("about, requeued, batch_is_told", [(PREEMPTED, True, False), (PREEMPTED, True, True), (CANCELLED, False, True)])
def test_a_preempted_job_saves_and_is_queued_again(submit, tmp_path, about, requeued, batch_is_told):
    """Slurm sends SIGTERM to the tasks, and at the grace time's end to the batch script, too."""
    root = tmp_path / "root"
    for path, text in (("scripts/train/launch.sh", LAUNCH), ("configs/train/x.yaml", "")):
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text(text)
    (tmp_path / "requeued-job").write_text(about)
    job, log = submit("x", "--seed", 0, root=root)
    wait_for(lambda: len(list(root.glob("running-*"))) == 2, job, log)
    for pid in [int(path.read_text()) for path in root.glob("running-*")] + [job.pid] * batch_is_told:
        os.kill(pid, signal.SIGTERM)
    assert job.wait(timeout=30) == 0, log.read_text()
    assert sorted((root / "said").read_text().splitlines()) == ["x --seed 0 of 0: 1 SIGTERM", "x --seed 0 of 1: 1 SIGTERM"]
    assert (tmp_path / "requeued").exists() == requeued

    (root / "finish").touch()  # the next start comes to its end, and Slurm still knows of the preemption
    (tmp_path / "requeued").unlink(missing_ok=True)
    (tmp_path / "requeued-job").write_text(EARLIER)
    job, log = submit("x", "--seed", 0, root=root)
    assert job.wait(timeout=30) == 0 and not (tmp_path / "requeued").exists(), log.read_text()


def wait_for(condition, job, log, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_what_is_missing_is_one_line(submit, tmp_path):
    job, log = submit("no_such_preset")
    assert job.wait(timeout=30) == 2 and "name a preset, one of" in log.read_text()
