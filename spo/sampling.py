"""A round of SPO: every process samples its share of the prompts, and the kept pairs are dealt out evenly.

What is random follows from (seed, epoch, prompt), so the number of devices changes nothing but rounding.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from common.errors import UserError
from common.train_options import TrainOptions
from data.bad_pairs import usable_captions
from data.draws import epoch_order, seeded_generator
from data.layouts import caption_column
from data.table import column_values, load_table
from models.family import Family, Text
from models.guidance import encode_with_empty, guided, select
from models.tokens import tokenize
from prompts import read_group
from spo.options import SPOOptions
from spo.preference_model.model import StepAwarePreferenceModel, load_spm, load_spm_tokenizer, resize_then_clamp
from spo.resampler import Comparison, Pairs, ResamplerConfig, prompt_generator, resample
from training.run import Run


def load_prompts(options: TrainOptions) -> list[str]:
    """The prompts to train on, in file order. Raises UserError for a file that cannot be read or holds none."""
    spo, data = options.more[0], options.data
    if spo.spo_prompts is None:
        table = load_table(data, options.model.cache_dir)
        column = caption_column(table.column_names, data)
        if column not in table.column_names:
            raise UserError(f"the dataset has no column '{column}' to take prompts from; it has "
                            f"{', '.join(table.column_names)}: choose one with --caption_column")
        prompts = [text for text in dict.fromkeys(usable_captions(column_values(table, column))) if text]
    else:
        prompts = read_group(spo.spo_prompts)
    if not prompts:
        raise UserError(f"{spo.spo_prompts or data.source} holds no prompts")
    if data.max_train_samples is not None and data.max_train_samples < len(prompts):
        chosen = np.random.default_rng([options.run.seed, 2]).permutation(len(prompts))[:data.max_train_samples]
        prompts = [prompts[i] for i in sorted(chosen)]
    return prompts


@dataclass
class Judge:
    """The step-aware preference model, frozen, with its tokenizer. It scores in float32, without autocast, as the official
    program does: rounding to bf16 moves scores by 0.01 to 0.08, and a pool's often lie closer together."""

    spm: StepAwarePreferenceModel
    tokenizer: PreTrainedTokenizerBase


def load_judge(spo: SPOOptions, cache_dir: str | None, device: torch.device) -> Judge:
    tokenizer = load_spm_tokenizer(spo.spm_tokenizer, cache_dir)
    spm = load_spm(spo.spm_clip, spo.spm_checkpoint, cache_dir).requires_grad_(False).eval()
    return Judge(spm.to(device), tokenizer)


@dataclass
class Progress:
    """Where a run stands; every checkpoint keeps it. `prompts` and `round` count the prompts and rounds that the epoch
    has had: a round's size may change when a run is resumed. The others count the epoch's comparisons, kept pairs, pairs
    learned from, and its largest difference of probabilities in a pool."""

    epoch: int = 0
    prompts: int = 0
    round: int = 0
    compared: int = 0
    kept: int = 0
    learned: int = 0
    widest: float = 0.0


@dataclass
class Round:
    """What one round gave. prompts: of all devices. text: theirs, row by row; empty: one row. pairs: this device's, whose
    `prompt` is a row of text. logs: about the round, of all devices."""

    prompts: list[str]
    text: Text
    empty: Text
    pairs: Pairs
    logs: dict[str, float]


class Sampler:
    """sampler(progress) -> the round that follows; adds what it saw to the epoch's counts. Every process must call it."""

    def __init__(self, run: Run, family: Family, network: nn.Module, judge: Judge, prompts: list[str]):
        """network: of the policy, as it is while it learns."""
        spo, resolution = run.options.more[0], run.options.data.resolution
        self.run, self.family, self.network, self.judge, self.prompts = run, family, network, judge, prompts
        self.config = ResamplerConfig(spo.spo_num_steps, spo.spo_divert_start_step, spo.spo_k, spo.spo_num_inner_step,
                                      spo.spo_threshold)
        self.size, self.guidance = (resolution, resolution), spo.spo_guidance
        self.eta = family.eta if spo.spo_eta is None else spo.spo_eta
        self.times, self.next_times = family.walk(spo.spo_num_steps, self.size)
        self.prompts_per_round = run.accelerator.num_processes * spo.spo_sample_batch_size

    def transition(self, prediction: Tensor, x_t: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The family's, of denoising steps by number (N,)."""
        times, next_times = (values.to(steps.device)[steps] for values in (self.times, self.next_times))
        return self.family.transition(prediction, x_t, times, next_times, self.eta)

    def __call__(self, progress: Progress) -> Round:
        run, accelerator = self.run, self.run.accelerator
        order = epoch_order(len(self.prompts), run.seed, progress.epoch, shuffle=True)
        chosen = order[progress.prompts:progress.prompts + self.prompts_per_round]
        prompts = [self.prompts[i] for i in chosen]
        text, empty = encode_with_empty(self.family, prompts, run.device)
        pairs, comparisons = self.sample(text, empty, chosen, progress.epoch)
        logs = round_statistics(comparisons, progress, self.config.num_steps, accelerator)
        pairs = deal_out(pairs, run.seed, progress, accelerator)
        logs["spo/pairs"] = len(pairs) * accelerator.num_processes
        progress.learned += len(pairs) * accelerator.num_processes
        progress.round += 1
        progress.prompts += len(chosen)
        return Round(prompts, text, empty, pairs, logs)

    @torch.no_grad()
    def sample(self, text: Text, empty: Text, chosen: np.ndarray, epoch: int) -> tuple[Pairs, list[Comparison]]:
        """This device's share of a round: pairs, whose `prompt` is a row of `text`, and comparisons.

        chosen: the round's prompts, of all devices, as positions in `prompts`; the last round of an epoch may have fewer
        of them than there are devices.
        """
        device, accelerator, judge = self.run.device, self.run.accelerator, self.judge
        shape = self.family.latent_shape(*self.size)
        own = np.array_split(np.arange(len(chosen)), accelerator.num_processes)[accelerator.process_index]
        if len(own) == 0:
            return Pairs.none(shape, self.config, device), []
        generators = [prompt_generator(self.run.seed, epoch, int(chosen[i])) for i in own]
        input_ids = tokenize(judge.tokenizer, [self.prompts[chosen[i]] for i in own]).to(device)
        text_features = judge.spm.text_features(input_ids)
        own = torch.from_numpy(own).to(device)

        def predict(latents: Tensor, t: float, rows: Tensor) -> Tensor:
            times = torch.full((len(latents),), t, device=device)
            with accelerator.autocast():
                return guided(self.family, self.network, latents, times, select(text, own[rows]), empty, self.size,
                              self.guidance)

        def score(latents: Tensor, t: float, rows: Tensor) -> Tensor:
            times = torch.full((len(latents),), t, device=device)
            pixels = resize_then_clamp(self.family.decode(latents), judge.spm.image_size)
            return judge.spm.score(pixels, times, text_features[rows])

        pairs, comparisons = resample(predict, score, self.transition, self.times, self.config, generators, shape, device)
        pairs.prompt = own[pairs.prompt]
        return pairs, comparisons


def deal_out(pairs: Pairs, seed: int, progress: Progress, accelerator: Accelerator) -> Pairs:
    """Gather every device's pairs, shuffle them with one permutation and give each device the same number.

    Every process must call this. Pairs beyond a multiple of the number of devices are dropped; with fewer pairs than
    devices all get none. The permutation follows from the seed, the epoch and how many rounds of it were before.
    """
    world, rank = accelerator.num_processes, accelerator.process_index
    counts = accelerator.gather(torch.tensor([len(pairs)], device=accelerator.device))
    if counts.sum() == 0:
        return pairs
    if world > 1:
        longest = int(counts.max())
        present = (torch.arange(longest, device=counts.device)[None] < counts[:, None]).flatten()
        pairs = Pairs(**{field.name: accelerator.gather(_pad(getattr(pairs, field.name), longest))[present]
                         for field in fields(Pairs)})
    # One order for any number of devices: by prompt and step, then permuted.
    pairs = pairs[torch.argsort(pairs.prompt * (int(pairs.step.max()) + 1) + pairs.step)]
    shuffled = torch.randperm(len(pairs), generator=seeded_generator(seed, 5, progress.epoch, progress.round))
    return pairs[shuffled[:len(pairs) // world * world][rank::world].to(pairs.step.device)]


def _pad(tensor: Tensor, length: int) -> Tensor:
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])


def round_statistics(comparisons: list[Comparison], progress: Progress, num_steps: int,
                     accelerator: Accelerator) -> dict[str, float]:
    """The round's share of pairs kept, over all and for each denoising step, and the scores' mean and their spread
    within a pool, over all devices; adds the counts to the epoch's. Every process must call this."""
    sums = torch.zeros(num_steps, 4)
    widest = 0.0
    for comparison in comparisons:
        scores = comparison.scores.float()
        sums[comparison.step] += torch.stack([torch.tensor(float(scores.shape[1])), comparison.kept.float().sum(),
                                              scores.mean(dim=0).sum(), scores.std(dim=0).sum()])
        difference = scores.amax(dim=0) - scores.amin(dim=0)
        widest = max(widest, float(torch.tanh(difference / 2).max()))
    sums = accelerator.reduce(sums.to(accelerator.device), reduction="sum").cpu()
    widest = float(accelerator.gather(torch.tensor([widest], device=accelerator.device)).max())

    compared, kept, score, spread = sums.sum(dim=0).tolist()
    progress.compared += int(compared)
    progress.kept += int(kept)
    progress.widest = max(progress.widest, widest)
    logs = {"spo/kept_share": kept / compared, "spo/score_mean": score / compared, "spo/score_spread": spread / compared,
            "spo/epoch": progress.epoch + 1}
    return logs | {f"spo/kept_share_step_{step:02d}": float(row[1] / row[0]) for step, row in enumerate(sums) if row[0]}
