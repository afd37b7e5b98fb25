"""Kill training runs at random moments, damage their checkpoints, fill their disk; each must end as the unbroken run.

    bash scripts/torture.sh [--kills 50] [--short] [--seed 0] [--folder DIR]

Every launch runs train.py's own main() in fresh processes, forked from one that has done the imports, so that hundreds
fit into minutes; the last scenario starts them with `accelerate launch`. A run that was killed is started again by the
same command until it ends. What counts is its parameters and every loss it ever logged, bit for bit.
"""

import argparse
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import forge  # noqa: E402
import warm_python  # noqa: E402

ROOT = forge.ROOT


HOURS = 7200.0  # however slow the machine is, a run ends; a hang is told by a process that outlives its peer
AIMED = 0.25  # of the kills wait for a checkpoint that is being written; the others come at any moment


@dataclass
class Scenario:
    name: str
    processes: int
    flags: list[str]
    launcher: bool = False  # start with `accelerate launch`


SCENARIOS = [
    Scenario("1 process", 1, ["--train_batch_size=2"]),
    Scenario("1 process, accumulation 2, 2 workers", 1,
             ["--train_batch_size=2", "--gradient_accumulation_steps=2", "--dataloader_num_workers=2"]),
    Scenario("2 processes, accumulation 2", 2, ["--train_batch_size=1", "--gradient_accumulation_steps=2"]),
    Scenario("2 processes, 2 workers each, safeguard", 2,
             ["--train_batch_size=2", "--dataloader_num_workers=2", "--use_winner_preserving",
              "--winner_preserving_mu=0.5"]),
    Scenario("2 processes by accelerate launch", 2, ["--train_batch_size=2"], launcher=True),
]


class Torture:
    def __init__(self, folder: Path, seed: int, steps: int):
        self.folder, self.steps, self.random = folder, steps, random.Random(seed)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
        build = ("from pathlib import Path; from tests.vocabulary import build_tiny_pipeline; from shapes.pairs import write_pairs;"
                 f"build_tiny_pipeline(Path({str(folder / 'base')!r}), 'sd15'); write_pairs({str(folder / 'pairs')!r}, 40)")
        subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, capture_output=True)
        warm_python.import_heavy()

    # --- one launch ------------------------------------------------------------------------------------------------

    def command(self, scenario: Scenario, output: Path) -> list[str]:
        return [f"--pretrained_model_name_or_path={self.folder / 'base'}", f"--train_data_dir={self.folder / 'pairs'}",
                f"--output_dir={output}", "--resolution=64", "--mixed_precision=no", "--learning_rate=1e-4",
                "--lr_warmup_steps=4", f"--max_train_steps={self.steps}", "--checkpointing_steps=3", "--seed=1",
                "--random_crop", "--report_to=none", *scenario.flags]

    def start(self, scenario: Scenario, output: Path) -> list[int]:
        """Process ids of a launch; its output goes to OUTPUT.log, its losses to OUTPUT.losses."""
        argv = self.command(scenario, output)
        if not scenario.launcher:
            return forge.start(forge.Launch(argv, "train", scenario.processes, f"{output}.log", f"{output}.losses"))
        forge.exit_codes.clear()
        several = ["--multi_gpu", "--num_machines", "1"] if scenario.processes > 1 else ["--cpu"]
        command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", *several, "--num_processes",
                   str(scenario.processes), "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(forge.free_port()), "train.py", *argv]
        with open(f"{output}.log", "a") as log:
            return [subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True).pid]

    def finish(self, scenario: Scenario, output: Path) -> None:
        codes = forge.wait(self.start(scenario, output), HOURS)
        if codes is None or any(codes):
            raise SystemExit(f"FAILED: {scenario.name} ended with {codes}; see {output}.log\n"
                             + Path(f"{output}.log").read_text()[-3000:])

    # --- what a run leaves -----------------------------------------------------------------------------------------

    @staticmethod
    def weights(output: Path) -> str:
        import torch

        state = torch.load(output / "unet.pth", weights_only=True)
        sha = hashlib.sha256()
        for name, tensor in state.items():
            sha.update(name.encode() + tensor.numpy().tobytes())
        return sha.hexdigest()

    @staticmethod
    def losses(output: Path) -> dict[int, set]:
        """Every loss and gradient norm ever logged for a step; one value when all launches agree."""
        found: dict[int, set] = {}
        path = Path(f"{output}.losses")
        for line in path.read_text().splitlines() if path.is_file() else []:
            try:
                values = json.loads(line)
            except ValueError:
                continue  # cut short by the kill
            found.setdefault(values["step"], set()).add((values["train_loss"], values["grad_norm"]))
        return found

    def same(self, output: Path, unbroken: Path, scenario: Scenario) -> bool:
        if not scenario.launcher:
            expected, got = self.losses(unbroken), self.losses(output)
            if any(got[step] != expected[step] for step in got):
                return False
        return self.weights(output) == self.weights(unbroken)

    # --- the ordeals -----------------------------------------------------------------------------------------------

    def unbroken(self, scenario: Scenario) -> tuple[Path, float]:
        output = self.folder / f"unbroken-{SCENARIOS.index(scenario)}"
        begin = time.monotonic()
        self.finish(scenario, output)
        return output, time.monotonic() - begin

    def kill_runs(self, scenario: Scenario, kills: int) -> dict:
        """Start runs and kill them at random moments until `kills` have hit; then all have ended, and are compared."""
        unbroken, seconds = self.unbroken(scenario)
        done, runs, equal, alone, writing = 0, 0, 0, 0, 0
        while done < kills:
            output = self.folder / f"run-{SCENARIOS.index(scenario)}-{runs}"
            ended = False
            while not ended and done < kills:
                pids = self.start(scenario, output)
                aimed = self.random.random() < AIMED
                codes = self.wait_for_writing(pids, output) if aimed else forge.wait(pids, self.random.uniform(0.0, seconds))
                if codes is not None:
                    assert not any(codes), f"{scenario.name} ended with {codes}; see {output}.log"
                    ended = True
                    break
                if scenario.processes > 1 and not scenario.launcher and self.random.random() < 0.5:
                    alone += 1  # one process dies alone: the other must notice by itself
                    victim = self.random.choice(pids)
                    forge.kill([victim])
                    survivor = [pid for pid in pids if pid != victim]
                    if forge.wait(survivor, 120.0) is None:
                        raise SystemExit(f"FAILED: a process outlived its killed peer by two minutes; see {output}.log")
                else:
                    self.kill_tree(pids)
                done += 1
                writing += any(output.glob(".checkpoint-*"))
            if not ended:
                self.finish(scenario, output)
            runs += 1
            equal += self.same(output, unbroken, scenario)
            shutil.rmtree(output)
        result = {"kills": done, "runs": runs, "bit_equal": equal, "one_rank_alone": alone, "while_writing": writing}
        print(f"  {scenario.name}: {done} SIGKILLs ({alone} of one rank alone, {writing} while a checkpoint was written), "
              f"{equal} of {runs} runs bit-equal, every logged loss too", flush=True)
        return result

    def wait_for_writing(self, pids: list[int], output: Path) -> list[int] | None:
        """Until a checkpoint is being written, and a moment more; exit codes where the run ends before."""
        while not any(output.glob(".checkpoint-*")):
            codes = forge.wait(pids, 0.0)
            if codes is not None:
                return codes
        return forge.wait(pids, self.random.uniform(0.0, 0.03))

    def kill_tree(self, pids: list[int]) -> None:
        """The processes, and what a launcher has started, which lives in sessions of its own."""
        import psutil

        children = [child for pid in pids if psutil.pid_exists(pid) for child in psutil.Process(pid).children(True)]
        forge.kill(pids)
        for child in children:
            try:
                child.kill()
            except psutil.NoSuchProcess:
                pass
        psutil.wait_procs(children, 10)

    def signals(self, scenario: Scenario, count: int) -> dict:
        """SIGTERM and SIGINT end a run with code 0 and a checkpoint; the same command then ends as the unbroken run."""
        unbroken, seconds = self.folder / f"unbroken-{SCENARIOS.index(scenario)}", None
        stopped = equal = 0
        for number in range(count):
            output = self.folder / f"signal-{SCENARIOS.index(scenario)}-{number}"
            pids = self.start(scenario, output)
            while not list(output.glob("checkpoint-*")):
                time.sleep(0.05)
            time.sleep(self.random.uniform(0.0, 1.0))
            kind = (signal.SIGTERM, signal.SIGINT)[number % 2]
            target = pids if number % 3 else [self.random.choice(pids)]  # all processes, or one that tells the others
            for pid in target:
                os.kill(pid, kind)
            codes = forge.wait(pids, HOURS)
            stopped += codes is not None and not any(codes)
            self.finish(scenario, output)
            equal += self.same(output, unbroken, scenario)
            shutil.rmtree(output)
        print(f"  {scenario.name}: {stopped} of {count} stopped by SIGTERM or SIGINT with exit code 0, {equal} bit-equal "
              "after that", flush=True)
        return {"signals": count, "stopped": stopped, "bit_equal": equal}

    def corrupt(self, scenario: Scenario, count: int) -> dict:
        """Damage the newest checkpoint in many ways: it must be recognised, and the one before be taken."""
        from training.checkpoints import choose_checkpoint, fault, list_checkpoints

        unbroken = self.folder / f"unbroken-{SCENARIOS.index(scenario)}"
        newest, before = list_checkpoints(unbroken)[-1], list_checkpoints(unbroken)[-2]
        kept = self.folder / "kept-checkpoint"
        shutil.copytree(newest, kept)
        recognised = 0
        ways = [cut_short, empty, flip_bit, append, remove, remove_manifest, break_manifest, zero_block]
        for number in range(count):
            ways[number % len(ways)](newest, self.random)
            with redirect_stderr(io.StringIO()) as warnings:
                taken = choose_checkpoint("latest", unbroken)
            recognised += taken == before and f"{newest} is skipped" in warnings.getvalue()
            shutil.rmtree(newest)
            shutil.copytree(kept, newest)
        assert fault(newest) is None
        output = self.folder / "corrupted-run"  # and the program itself, once
        shutil.copytree(unbroken, output)
        (output / "unet.pth").unlink()
        run_file = output / "run.json"
        run_file.write_text(run_file.read_text().replace(str(unbroken), str(output)))
        flip_bit(list_checkpoints(output)[-1], self.random)
        self.finish(scenario, output)
        skipped = "is skipped" in Path(f"{output}.log").read_text()
        equal = self.same(output, unbroken, scenario)
        print(f"  corrupted checkpoints: {recognised} of {count} recognised and skipped; a run over one ends bit-equal: "
              f"{skipped and equal}", flush=True)
        return {"corrupted": count, "recognised": recognised, "run_bit_equal": skipped and equal}

    def fill_disk(self) -> dict:
        """A disk that has room for a few checkpoints only: one clear line, the last one intact; with room, on to the end."""
        from training.checkpoints import fault, list_checkpoints

        scenario, disk = SCENARIOS[2], self.folder / "disk"
        disk.mkdir()
        unbroken = self.folder / f"unbroken-{SCENARIOS.index(scenario)}"
        size = sum(path.stat().st_size for path in list_checkpoints(unbroken)[-1].iterdir())
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", str(disk)],
                                 capture_output=True).returncode == 0
        output = disk / "run"
        if mounted:
            codes = forge.wait(self.start(scenario, output), HOURS)
        else:  # not allowed to mount: a limit on file sizes fails the same writes
            codes = forge.wait(self._start_limited(scenario, output, size // 3), HOURS)
        log = Path(f"{output}.log")
        lines = [line for line in log.read_text().splitlines() if line.startswith("error: ")] if log.is_file() else []
        good = [path for path in list_checkpoints(output) if fault(path) is None]
        clear = codes is not None and all(codes) and any("cannot write" in line for line in lines) and (
            "Traceback" not in log.read_text())
        intact = len(good) == len(list_checkpoints(output)) and (len(good) > 0 or not mounted)
        if mounted:
            subprocess.run(["mount", "-o", f"remount,size={40 * size}", str(disk)], check=True)
        self.finish(scenario, output)
        equal = self.same(output, unbroken, scenario)
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)
        how = f"tmpfs of {2.5 * size / 2**20:.1f} MiB" if mounted else "a limit on file sizes, as mounting is not allowed"
        print(f"  full disk ({how}): {lines[:1]}; {len(good)} checkpoints intact: {intact}; with room bit-equal: {equal}",
              flush=True)
        return {"clear": clear, "intact": intact, "bit_equal": equal}

    def _start_limited(self, scenario: Scenario, output: Path, limit: int) -> list[int]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            return self.start(scenario, output)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- ways to damage a checkpoint ------------------------------------------------------------------------------------

def _any_file(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(path for path in folder.iterdir() if path.name != "manifest.json"))


def cut_short(folder: Path, rng: random.Random) -> None:
    path = _any_file(folder, rng)
    os.truncate(path, rng.randrange(path.stat().st_size))


def empty(folder: Path, rng: random.Random) -> None:
    os.truncate(_any_file(folder, rng), 0)


def flip_bit(folder: Path, rng: random.Random) -> None:
    path = _any_file(folder, rng)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero_block(folder: Path, rng: random.Random) -> None:
    path = folder / "optimizer.bin"
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) // 2)
    data[start:start + 4096] = bytes(len(data[start:start + 4096]))
    path.write_bytes(data)


def append(folder: Path, rng: random.Random) -> None:
    with open(_any_file(folder, rng), "ab") as file:
        file.write(b"\0")


def remove(folder: Path, rng: random.Random) -> None:
    _any_file(folder, rng).unlink()


def remove_manifest(folder: Path, rng: random.Random) -> None:
    (folder / "manifest.json").unlink()


def break_manifest(folder: Path, rng: random.Random) -> None:
    path = folder / "manifest.json"
    text = path.read_text()
    path.write_text(text[:rng.randrange(1, len(text) - 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill, damage and starve training runs; each must end as if nothing was.")
    parser.add_argument("--kills", type=int, help="SIGKILLs in all (default 50, with --short 4)")
    parser.add_argument("--short", action="store_true", help="less of everything, about a minute on two free cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where the runs are written (default: a temporary folder, removed at the end)")
    args = parser.parse_args()
    temporary = None if args.folder else tempfile.TemporaryDirectory(prefix="torture-")
    folder = Path(args.folder or temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    torture = Torture(folder, args.seed, steps=7 if args.short else 24)
    print(f"Torture, seed {args.seed}", flush=True)

    chosen = [SCENARIOS[1], SCENARIOS[2]] if args.short else SCENARIOS
    kills = args.kills or (4 if args.short else 50)
    shares = [kills // len(chosen) + (number < kills % len(chosen)) for number in range(len(chosen))]
    results = [torture.kill_runs(scenario, share) for scenario, share in zip(chosen, shares)]
    stops = [torture.signals(SCENARIOS[2], 1)] if args.short else [torture.signals(s, 3) for s in SCENARIOS[:4]]
    corrupted = torture.corrupt(chosen[0], 20)
    disk = torture.fill_disk()

    total = {key: sum(result[key] for result in results) for key in results[0]}
    passed = (total["bit_equal"] == total["runs"] and all(s["stopped"] == s["bit_equal"] == s["signals"] for s in stops)
              and corrupted["recognised"] == corrupted["corrupted"] and corrupted["run_bit_equal"] and all(disk.values()))
    print(f"{'PASSED' if passed else 'FAILED'}: {total['kills']} SIGKILLs, {total['bit_equal']} of {total['runs']} runs "
          f"bit-equal, {sum(s['stopped'] for s in stops)} of {sum(s['signals'] for s in stops)} signals with exit 0, "
          f"{corrupted['recognised']} of {corrupted['corrupted']} corrupted checkpoints recognised, full disk "
          f"{'survived' if all(disk.values()) else 'NOT survived'}; {time.monotonic() - begin:.0f} s", flush=True)
    if temporary:
        temporary.cleanup()
    sys.exit(not passed)


if __name__ == "__main__":
    main()
