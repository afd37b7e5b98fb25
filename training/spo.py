"""SPO's online training: sample pairs from the policy's own denoising steps, learn from them, sample again.

A round samples spo_sample_batch_size prompts a device, gathers the kept pairs, deals them out evenly and takes the
optimizer steps they are enough for. train.py hands over to train() with --train_method spo. What is random follows from
(seed, epoch, prompt), so the number of processes changes nothing but rounding, and resuming needs a round's number alone.
"""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import pad_across_processes, set_seed
from diffusers import DDIMScheduler
from torch import Tensor
from tqdm.auto import tqdm

from losses.spo import clipped_ratio, ddim_gaussian, gaussian_log_prob, spo_loss
from spm.model import StepAwarePreferenceModel, load_spm, load_spm_tokenizer
from training.arguments import TrainArguments, warn
from training.checkpoints import (claim_output_dir, find_checkpoint, load_checkpoint, register_hooks, save_checkpoint,
                                  save_result, write_run_file)
from training.data import tokenize
from training.draws import epoch_order, seeded_generator
from training.errors import UserError
from training.guidance import PromptConditioning, condition_on_prompts, decode_latents, guided_prediction
from training.logs import StepScalars, peak_memory_gb
from training.models import (Models, adapters_off, cast_compute_weights, load_frozen_encoders,
                             load_policy_and_reference, load_tokenizers_and_scheduler)
from training.optimizers import effective_learning_rate, make_optimizer, make_schedule, optimizer_name
from training.resampler import (Comparison, Pairs, Score, ddim_scheduler, empty_pairs, previous_timestep,
                                prompt_generator, resample, resampler_config)
from training.spo_arguments import SPOArguments, load_prompts
