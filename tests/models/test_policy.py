"""The reference is exact: identical models have a margin of exactly 0 under mixed precision, and log 2 as their loss."""

import copy
import json
import math

import pytest
import torch
from diffusers import UNet2DConditionModel

from common.errors import UserError
from common.train_options import MemoryOptions, ModelOptions
from losses import LossConfig, preference_loss
from models.family import open_family
from models.policy import cast_compute_weights, keep_on_host, load_policy, on_device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.fixture(scope="module")
def unets(tiny_sd15, tiny_sdxl, tmp_path_factory):
    """Weights as training leaves them: an untrained norm's ones and zeros would survive any rounding."""
    folder = tmp_path_factory.mktemp("unets")
    for kind, pipeline in (("sd15", tiny_sd15), ("sdxl", tiny_sdxl)):
        unet = UNet2DConditionModel.from_pretrained(pipeline, subfolder="unet")
        generator = torch.Generator().manual_seed(0)
        for name, parameter in unet.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        unet.save_pretrained(folder / kind)
    return folder


SIZE = (64, 64)


class Prepared:
    """Policy and reference in bf16, and a noised batch of three pairs."""

    def __init__(self, pipeline, unets, device="cpu", lora_rank=0):
        kind = "sdxl" if "sdxl" in pipeline.name else "sd15"
        family = self.family = open_family(ModelOptions(str(pipeline), unet_init=str(unets / kind), lora_rank=lora_rank))
        self.device = torch.device(device)
        family.load_encoders(torch.bfloat16, self.device)
        self.policy = load_policy(family, MemoryOptions("bf16"), torch.bfloat16, self.device, needs_reference=True)
        generator = torch.Generator().manual_seed(0)
        latents, noise = (torch.randn(6, *family.latent_shape(*SIZE), generator=generator).to(device) for _ in range(2))
        self.times = family.times(torch.rand(3, generator=generator, dtype=torch.float64).to(device)).repeat(2)
        self.x_t, self.target = family.noise(latents, noise, self.times)
        tokens = {name: ids.to(device) for name, ids in family.tokenize(["a red circle", "", "a dog"]).items()}
        self.text = {name: rows.repeat(2, *[1] * (rows.dim() - 1)) for name, rows in family.encode_text(tokens).items()}

    def predict(self, network):
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.family.predict(network, self.x_t, self.times, self.text, SIZE)

    def both(self):
        with torch.no_grad(), self.policy.as_reference(self.device) as network:
            reference = self.predict(network)
        return self.predict(self.policy.network), reference


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rank", [0, 4], ids=["whole", "lora"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_step_zero_in_bf16_is_the_closed_form_to_the_last_bit(kind, rank, device, request, unets):
    prepared = Prepared(request.getfixturevalue(f"tiny_{kind}"), unets, device, rank)
    policy, reference = prepared.both()
    assert policy.dtype == torch.bfloat16, "the prediction really ran in mixed precision"
    result = preference_loss(policy, reference, prepared.target, LossConfig())
    assert result.margin.abs().max() == 0
    assert result.loss.item() == torch.tensor(math.log(2.0)).item()
    result.loss.backward()
    gradients = [p.grad for p in prepared.policy.network.parameters() if p.requires_grad]
    assert all(g is not None for g in gradients) and any(g.abs().max() > 0 for g in gradients)


def test_a_reference_cast_as_a_whole_would_not_be_exact(tiny_sd15, unets):
    """What the exact reference is for: everything in bf16, norms and all, moves the margin off 0."""
    prepared = Prepared(tiny_sd15, unets)
    policy, _ = prepared.both()
    whole = copy.deepcopy(prepared.policy.network).to(torch.bfloat16).requires_grad_(False)
    prepared.x_t = prepared.x_t.bfloat16()
    with torch.no_grad():
        reference = prepared.family.predict(whole, prepared.x_t, prepared.times, prepared.text, SIZE)
    assert preference_loss(policy, reference, prepared.target, LossConfig()).margin.abs().max() > 0


def test_norms_stay_float32_and_weights_take_half_the_memory(tiny_sd15, unets):
    policy = Prepared(tiny_sd15, unets).policy
    dtypes = {name: p.dtype for name, p in policy.reference.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "norm" in name} == {torch.float32}
    halves = sum(p.numel() for p in policy.reference.parameters() if p.dtype == torch.bfloat16)
    assert halves > 0.95 * sum(p.numel() for p in policy.reference.parameters())
    assert {p.dtype for p in policy.network.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in policy.reference.parameters())


def test_the_adapter_off_is_the_untouched_base(tiny_sd15, unets):
    """After training moved the adapter, the reference is still the base, bit for bit."""
    prepared = Prepared(tiny_sd15, unets, lora_rank=4)
    _, before = prepared.both()
    with torch.no_grad():
        for name, parameter in prepared.policy.network.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    policy, after = prepared.both()
    assert torch.equal(before, after)
    assert not torch.equal(policy, after)
    assert all(parameter.requires_grad for name, parameter in prepared.policy.network.named_parameters() if "lora" in name)


def test_float32_leaves_every_weight_alone(tiny_sd15, unets):
    network = Prepared(tiny_sd15, unets).policy.network
    unchanged = cast_compute_weights(copy.deepcopy(network), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(unchanged.state_dict().values(), network.state_dict().values()))


def test_what_does_not_fit_the_base_is_refused_and_another_size_is_worth_a_warning(tiny_sd15, tiny_sdxl, tmp_path, capsys):
    def load(resolution=None, **options):
        return load_policy(open_family(ModelOptions(str(tiny_sd15), **options)), MemoryOptions("no"), torch.float32,
                           torch.device("cpu"), needs_reference=False, resolution=resolution)

    assert load(64).reference is None and capsys.readouterr().err == ""
    load(128)
    assert "--resolution 128 makes latents of 16 a side, and the base was made for 8" in capsys.readouterr().err
    with pytest.raises(UserError, match="does not fit|not one of SD1.5"):
        load(unet_init=str(tiny_sdxl))
    UNet2DConditionModel.from_pretrained(tiny_sd15, subfolder="unet").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"dropout": 0.1}))
    with pytest.raises(UserError, match="has dropout 0.1"):
        load(unet_init=str(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_reference_comes_and_goes_and_is_never_written_back():
    module = torch.nn.Linear(3, 3).requires_grad_(False)
    keep_on_host(module, torch.device("cuda"))
    home = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    with on_device(module, torch.device("cuda", 0)) as moved:
        assert all(parameter.is_cuda for parameter in moved.parameters())
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == home
    assert all(parameter.is_pinned() for parameter in module.parameters())
