"""The policy sharded by FSDP2 over two processes: exact at step 0, whole on disk, resumed to the bit."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from safetensors.torch import load_file

from common.train_options import ModelOptions
from models.devices import shard_by
from models.family import open_family
from models.lora import LORA_FILE
from models.networks import load_network
from tests.flow_pipelines import KINDS, build_flow_pipeline
from tests.runs import continue_from
from training.records import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_family_names_the_blocks_that_are_sharded_one_by_one(kind, built_once):
    family = open_family(ModelOptions(str(built_once(kind, partial(build_flow_pipeline, kind=kind)))))
    network = load_network(family)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    shard_by(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)), family.compiled_blocks)
    wrapped = fsdp2_prepare_auto_wrap_policy(plugin, network)
    assert {type(block) for block in network.modules() if wrapped(block)} == set(family.compiled_blocks)
    stacks = [stack for stack in network.children() if isinstance(stack, torch.nn.ModuleList) and len(stack) > 0]
    assert stacks and all(wrapped(block) for stack in stacks for block in stack)


@pytest.fixture
def base(request, tiny_sd15, tmp_path):
    return tiny_sd15 if request.param == "sd15" else build_flow_pipeline(tmp_path / "base", request.param)


@pytest.mark.slow
@pytest.mark.parametrize("base, rank", [("sd15", 0), ("sd3", 0), ("sd3", 4)], indirect=["base"])
def test_fsdp2_trains_saves_and_resumes(base, rank, pairs_dir, tmp_path, train):
    settings = yaml.safe_load((ROOT / "configs" / "accelerate" / "fsdp2.yaml").read_text())["fsdp_config"]
    environment = {name.upper(): str(value) for name, value in settings.items()}
    environment |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_CPU": "false"}
    flags = ["--pretrained_model_name_or_path", base, "--lora_rank", rank, "--train_data_dir", pairs_dir, "--resolution", 64,
             "--mixed_precision", "bf16", "--max_train_steps", 2, "--lr_warmup_steps", 0, "--learning_rate", 1e-4,
             "--train_batch_size", 1, "--seed", 1, "--checkpointing_steps", 1]
    prelude = "import tests.training.fsdp_on_cpu"
    train([*flags, "--output_dir", tmp_path / "whole"], 2, prelude=prelude, **environment)
    first = read_metrics(tmp_path / "whole" / "metrics.jsonl")[0]
    assert first["margin_mean"] == first["margin_std"] == 0, "the reference is exact under bf16 and sharding"
    assert first["grad_norm"] > 0

    resumed = tmp_path / "resumed"
    continue_from(tmp_path / "whole", resumed, "checkpoint-2")
    told = train([*flags, "--output_dir", resumed], 2, prelude=prelude, **environment)
    assert "after step 1" in told
    states = [load_file(folder / LORA_FILE if rank else next(path for path in folder.glob("*/diffusion_pytorch_model.safetensors")
                                                             if path.parent.name in ("unet", "transformer")))
              for folder in (tmp_path / "whole", resumed)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert {value.dtype for value in states[0].values()} == {torch.float32}
