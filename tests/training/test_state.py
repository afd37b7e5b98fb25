"""What is in a checkpoint: nothing that runs, and what an earlier version wrote."""

import hashlib
import json
import os
import pickle
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from common.errors import UserError
from tests.runs import continue_from, equal, weights
from tests.tasks import fit_fake
from training.checkpoints import PROGRESS, fault, write_manifest
from training.state import refuse_pickles


class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("file", ["unet.pth", "optimizer.bin", "random_states_0.pkl", "custom_checkpoint_0.pkl"])
def test_a_pickle_in_a_checkpoint_is_refused_and_does_not_run(fresh_accelerate, tmp_path, file):
    """The manifest is made anew, as an attacker would, so that the digests fit."""
    mark, checkpoint = tmp_path / "payload-ran", tmp_path / "run" / "checkpoint-1"
    fit_fake(tmp_path / "run", "--max_train_steps=1")
    torch.save({"state": Payload(mark)}, checkpoint / file)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)
    assert fault(checkpoint) is None
    with pytest.raises(UserError) as error:
        fit_fake(tmp_path / "run", "--max_train_steps=2")
    assert "\n" not in str(error.value) and str(checkpoint) in str(error.value) and not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))
    assert mark.exists()  # it does run where it is let


def test_sharded_checkpoints_are_taken_from_the_own_folder_alone(tmp_path):
    """torch and DeepSpeed unpickle theirs, so that one from elsewhere is not to be trusted."""
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        run = SimpleNamespace(accelerator=SimpleNamespace(distributed_type=kind, process_index=0), output_dir=tmp_path / "run")
        refuse_pickles(run, tmp_path / "run" / "checkpoint-5")
        with pytest.raises(UserError, match="can run code when loaded"):
            refuse_pickles(run, tmp_path / "elsewhere" / "checkpoint-5")


def test_a_checkpoint_of_another_network_is_told_and_so_is_one_that_lacks_a_file(fresh_accelerate, tmp_path):
    fit_fake(tmp_path / "run", "--max_train_steps=1")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    whole = checkpoint.rename(tmp_path / "whole")
    for change in (lambda: torch.save({"weight": torch.zeros(2, 2)}, checkpoint / "unet.pth"), (checkpoint / "optimizer.bin").unlink):
        shutil.copytree(whole, checkpoint)
        change()
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)
        with pytest.raises(UserError, match="does not fit this Linear|cannot be resumed"):
            fit_fake(tmp_path / "run", "--max_train_steps=2")
        shutil.rmtree(checkpoint)


# --- a run of an earlier version ------------------------------------------------------------------------------------------

# As commit c25c604's train.py wrote them for the tiny SD1.5: run.json, and of a checkpoint its progress.json, its files, and
# a digest of its weights' names, shapes and dtypes.
EARLIER = json.loads((Path(__file__).parent / "earlier_run.json").read_text())


def names_and_shapes(state: dict) -> str:
    lines = [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in sorted(state.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def as_earlier(folder: Path) -> None:
    """Turn a run's folder into one that the earlier version left: its records, with this run's values."""
    def settings(now: dict) -> dict:
        unknown = ("optimizer", "winner_preserving_mu", "dmpo_alpha")  # where the version says something else
        return {name: value if name in unknown else now[name] for name, value in EARLIER["run"].items()}

    run_file = folder / "run.json"
    run_file.write_text(json.dumps(settings(json.loads(run_file.read_text())), indent=1))
    for path in folder.glob(f"checkpoint-*/{PROGRESS}"):
        now = json.loads(path.read_text())
        assert now["lr_scheduler"].keys() == EARLIER["progress"]["lr_scheduler"].keys()
        record = {name: now["record"][name] for name in EARLIER["record"]}
        path.write_text(json.dumps({"step": now["step"], "lr_scheduler": now["lr_scheduler"], "record": record,
                                    "settings": settings(now["settings"])}))
        (path.parent / "manifest.json").unlink()
        write_manifest(path.parent)


def test_a_run_of_the_earlier_version_is_continued_to_the_bit(unbroken, train_run, tmp_path):
    checkpoint = unbroken.output / "checkpoint-2"
    assert sorted(path.name for path in checkpoint.iterdir()) == EARLIER["files"]
    assert names_and_shapes(weights(checkpoint)) == EARLIER["weights"]
    continue_from(unbroken.output, tmp_path / "run", "checkpoint-4", "checkpoint-6")
    as_earlier(tmp_path / "run")
    assert train_run([*unbroken.flags, "--output_dir", tmp_path / "run"])[-1]["train_loss"] == unbroken.logs[-1]["train_loss"]
    assert equal(weights(tmp_path / "run"), weights(unbroken.output))


def test_a_changed_run_of_the_earlier_version_is_refused_by_name(unbroken, train_run, tmp_path):
    continue_from(unbroken.output, tmp_path / "run", "checkpoint-4", "checkpoint-6")
    as_earlier(tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a different run \(beta_dpo was 5000.0, is 2000.0\)"):
        train_run([*unbroken.flags, "--output_dir", tmp_path / "run", "--beta_dpo", 2000])


def test_a_lora_run_of_the_earlier_version_is_continued_to_the_bit(unbroken, train_run, tmp_path):
    flags = [*unbroken.flags, "--lora_rank", 2, "--max_train_steps", 2, "--checkpointing_steps", 1]
    train_run([*flags, "--output_dir", tmp_path / "whole"])
    lora = load_file(tmp_path / "whole" / "checkpoint-1" / "pytorch_lora_weights.safetensors")
    assert names_and_shapes(lora) == EARLIER["lora"]
    continue_from(tmp_path / "whole", tmp_path / "run", "checkpoint-2")
    as_earlier(tmp_path / "run")
    train_run([*flags, "--output_dir", tmp_path / "run"])
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_every_file_of_a_run_is_as_readable_as_any_other(unbroken, train_run, tmp_path):
    before = os.umask(0o022)
    try:
        train_run([*unbroken.flags, "--lora_rank", 2, "--max_train_steps", 1, "--output_dir", tmp_path])
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode)
             for path in tmp_path.rglob("*") if path.is_file()}
    assert {"unet.pth", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "run.json",
            "pytorch_lora_weights.safetensors", "checkpoint-1/pytorch_lora_weights.safetensors"} <= modes.keys()
    assert {name: oct(mode) for name, mode in modes.items() if mode != 0o644} == {}
