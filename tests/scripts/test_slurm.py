"""scripts/slurm/train.sbatch with stand-ins of srun and scontrol: two nodes of one machine, the time is up, queued again."""

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
if [ "$1" = show ]; then printf '127.0.0.1\\nlocalhost\\n'; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.fixture
def submit(tmp_path):
    """submit(*words) starts the job as Slurm would, without waiting for it; returns the process and its log."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    copy = tmp_path / "spool.sh"  # Slurm runs a copy
    copy.write_text((ROOT / "scripts" / "slurm" / "train.sbatch").read_text())
    started = []

    def submit(*words):
        log = tmp_path / f"log-{len(started)}"
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "REQUEUED": str(tmp_path / "requeued"), "PYTHON": sys.executable,
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "42", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[0-1]",
            "MAIN_PORT": str(free_port()), "NUM_PROCESSES": "1", "SLURM_RESTART_COUNT": str(len(started))}
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
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 300
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
        assert job.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
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


def test_what_is_missing_is_one_line(submit, tmp_path):
    job, log = submit("no_such_preset")
    assert job.wait(timeout=30) == 2 and "name a preset, one of" in log.read_text()
