"""The guide for those who come from NeMo-Aligner names all settings that change a result, and keys that exist."""

from __future__ import annotations

import re

import pytest

from draftplus.config import all_keys
from draftplus.rewards.names import REWARDS
from tests.support.processes import ROOT

PAGE = (ROOT / "docs" / "from-nemo-aligner.md").read_text(encoding="utf-8")
THEIRS = re.compile(r"<code>([^<]+)</code>")

# what its scripts read and what changes a result, from conf/draftp_sd.yaml, conf/draftp_sdxl.yaml and the code
CHANGES_A_RESULT = """
trainer.devices trainer.precision trainer.draftp_sd.val_check_interval trainer.draftp_sd.limit_val_batches
trainer.draftp_sd.save_interval trainer.draftp_sd.gradient_clip_val trainer.draftp_sd.max_epochs
trainer.draftp_sd.max_steps trainer.draftp_sd.limit_train_batches
exp_manager.exp_dir exp_manager.explicit_log_dir exp_manager.name exp_manager.create_tensorboard_logger
exp_manager.create_wandb_logger exp_manager.checkpoint_callback_params exp_manager.resume_if_exists
exp_manager.max_time_per_run exp_manager.ema.enable exp_manager.ema.decay exp_manager.ema.every_n_steps
exp_manager.ema.validate_original_weights
model.kl_coeff model.truncation_steps model.micro_batch_size model.global_batch_size model.seed model.precision
model.resume_from_checkpoint
model.optim.name model.optim.lr model.optim.weight_decay model.optim.betas model.optim.sched.name
model.optim.sched.warmup_steps model.optim.sched.hold_steps
model.data.webdataset.local_root_path model.data.train.dataset_path model.data.validation.dataset_path
model.data.webdataset.infinite_sampler model.data.webdataset.chunk_size
model.peft.peft_scheme model.peft.restore_from_path model.peft.lora_tuning.adapter_dim
model.peft.lora_tuning.adapter_dropout model.peft.lora_tuning.column_init_method
model.peft.lora_tuning.row_init_method model.peft.lora_tuning.network_alpha
model.infer.unconditional_guidance_scale model.infer.height model.infer.width model.infer.down_factor
model.infer.inference_steps model.infer.sampler_type model.infer.eta model.infer.vae_batch_size
model.linear_start model.linear_end model.beta_schedule model.timesteps model.parameterization model.scale_factor
model.ckpt_path model.unet_config.from_pretrained model.unet_config.from_NeMo model.unet_config.use_checkpoint
model.unet_config.in_channels model.first_stage_config.from_pretrained model.first_stage_config.from_NeMo
model.first_stage_config.ddconfig model.cond_stage_config model.conditioner_config model.denoiser_config
model.sampling.base.sampler model.sampling.base.width model.sampling.base.height model.sampling.base.steps
model.sampling.base.scale model.sampling.base.discretization model.sampling.base.guider
model.sampling.base.thresholder model.sampling.base.sigma_min model.sampling.base.sigma_max model.sampling.base.rho
model.sampling.base.s_churn model.sampling.base.s_tmin model.sampling.base.s_tmax model.sampling.base.s_noise
model.sampling.base.eta model.sampling.base.order
model.disable_first_stage_autocast model.fsdp model.activation_checkpointing
rm.trainer.precision rm.model.restore_from_path rm.model.precision
+prompt +weight_type
""".split()


def rows() -> list[tuple[list[str], str]]:
    """The settings of NeMo-Aligner in each row of a table, and what stands for them here."""
    cells = [line.strip("|").split("|") for line in PAGE.splitlines() if line.startswith("| <code>")]
    return [(THEIRS.findall(row[0]), row[1].strip()) for row in cells]


def test_every_setting_that_changes_a_result_has_a_row() -> None:
    named = [key for theirs, _ in rows() for key in theirs]
    assert [key for key in CHANGES_A_RESULT if key not in named] == []
    assert sorted(named) == sorted(set(named)), "named twice"


@pytest.mark.parametrize(("theirs", "here"), rows(), ids=[theirs[0] for theirs, _ in rows()])
def test_what_stands_for_it_is_a_key_or_an_option(theirs: list[str], here: str) -> None:
    if here == "none":
        return
    keys = {key for key, _ in all_keys()} | {"model.lora"} | {f"reward.{name}.path" for name in REWARDS}
    named = re.findall(r"`([^`]+)`", here)
    assert named and re.sub(r"`[^`]+`|, ", "", here) == ""
    known = {"--anneal", "--prompt"} if theirs[0].startswith("+") else keys
    assert [key for key in named if key not in known] == []
