"""What both stages share: a Trainer that saves only what trains, and stops before it does harm."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import RandomSampler
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from lizardzoo.adapters.base import is_new_parameter
from lizardzoo.distill import processes
from lizardzoo.distill.recipe import Finetune, Stage
from lizardzoo.errors import LizardzooError

TRAINABLE = "trainable.safetensors"


Measured: TypeAlias = "float | dict[str, float]"


class NonFiniteError(LizardzooError):
    """The loss or a gradient is NaN or infinite; raised before the optimizer step."""


class StageTrainer(Trainer):
    """A stage's Trainer: subclasses compute the loss, and `measure` what the log shall say beside it."""

    optimizer: Any
    model: Any
    """The linearized model itself; what `compute_loss` gets may be wrapped (DDP)."""

    loss_is_scaled_for_ga = False  # the losses are means over the batch (transformers 5.19 and later)

    def __init__(
        self, model: Any, stage: Stage, arguments: TrainingArguments, *, shard: bool = False, **kwargs: Any
    ) -> None:
        self.shard = shard  # the model is a `processes.sharded` one
        super().__init__(model=model, args=arguments, **kwargs)
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False  # the same for transformers before that
        self.stage = stage
        self.measured: list[dict[str, Measured]] = []

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate per group of parameters."""
        if self.optimizer is None:
            groups = parameter_groups(self.model if model is None else model, self.stage)
            self.optimizer = torch.optim.AdamW(groups, betas=self.stage.betas, eps=self.stage.eps)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward; a gradient that is not finite raises before it is clipped or used.

        Looked at when all micro batches are in it: it then is the mean over the processes, and the same in all.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not self.accelerator.sync_gradients:
            return loss
        gradients = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        if not torch.nn.utils.get_total_norm(gradients.values()).isfinite():
            bad = next((n for n, g in gradients.items() if not g.isfinite().all()), "all together")
            self.stop(f"the gradient of {bad} is not finite")
        return loss

    def stop_if_any(self, problem: str | None) -> None:
        """Stop in all processes if one has a problem: the others would wait for it without end."""
        if processes.any_process(problem is not None, self.args.device):
            self.stop(processes.first_text(problem) or "")

    def stop(self, what: str) -> None:
        """Raise, naming the step and the checkpoint to go on from."""
        checkpoint = last_checkpoint(Path(self.args.output_dir))
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "no checkpoint was written before it"
        raise NonFiniteError(
            f"{Path(self.args.output_dir).name}, step {self.state.global_step + 1}: {what}; {kept}; "
            f"try lower learning rates in a new output_dir"
        )

    def eval_attention(self) -> None:
        """Switch the attentions' dropout off, which `train()` has just switched on: the teacher has none."""
        for attention in self.model.attentions():
            attention.eval()

    def measure(self, **values: Measured) -> None:
        """Note numbers of this micro batch for the log, which shows their mean over the step."""
        self.measured.append(values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One entry per step, the mean over the processes; no summary at the end (not exact after a resume)."""
        measured, self.measured = self.measured, []
        if "loss" in logs:
            super().log({**logs, **processes.means(_mean(measured), self.args.device)}, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> RandomSampler:
        """Every epoch's order, without the sequences that fill no whole batch.

        Micro batches and processes would each drop others: an epoch would not be the same on another machine.
        """
        whole = len(self.train_dataset) // self.stage.batch_size * self.stage.batch_size
        return RandomSampler(self.train_dataset, num_samples=whole)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not self.shard:  # that one is there
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """accelerate wraps a model that is whole; a sharded one it would refuse."""
        if self.shard and training:
            return processes.data_parallel(model, self.args.device)
        return super()._wrap_model(model, training, dataloader)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A checkpoint holds only the parameters that train: the rest is in the model it started from."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        names = {n for n, p in self.model.named_parameters() if p.requires_grad}
        values = dict(self.model.named_parameters()) if state_dict is None else state_dict
        save_file({n: values[n].detach().cpu().contiguous() for n in names}, folder / TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        target = {n: p for n, p in (model or self.model).named_parameters() if p.requires_grad}
        saved = load_file(Path(resume_from_checkpoint) / TRAINABLE)
        if saved.keys() != target.keys():
            raise LizardzooError(f"the checkpoint {resume_from_checkpoint} holds the parameters of another model")
        with torch.no_grad():
            for name, value in saved.items():
                target[name].copy_(value)


class StepLog(TrainerCallback):
    """Appends every step to a JSON-lines file, and moves a progress bar."""

    def __init__(self, stage: str, path: Path, progress: bool) -> None:
        self.stage = stage
        self.path = path
        self.progress = progress
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget steps of this stage that an interrupted run took after its last checkpoint."""
        if state.is_world_process_zero:
            others = [entry for entry in read_log(self.path) if entry["stage"] != self.stage]
            done = [{"stage": self.stage, **entry} for entry in state.log_history]
            self.path.write_text("".join(map(_line, others + done)), encoding="utf-8")
            if self.progress:
                self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.stage)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """One line, one tick."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line({"stage": self.stage, **state.log_history[-1]}))
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {state.log_history[-1]['loss']:.4g}", refresh=False)
            self.bar.update(1)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the two newest checkpoints: the newest may hold weights that overflow in its next step."""
        if state.is_world_process_zero:
            for old in checkpoints(Path(args.output_dir))[:-2]:
                shutil.rmtree(old)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """All entries of a log file; none if there is no file. A line cut short by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def training_arguments(
    stage: Stage,
    folder: Path,
    *,
    steps: int,
    seed: int,
    micro_batch_size: int | None,
    checkpoint_every: int | None,
) -> TrainingArguments:
    """The stage's numbers in transformers' words."""
    if checkpoint_every is not None and checkpoint_every < 1:
        raise LizardzooError(f"checkpoint_every={checkpoint_every}: expected a number of steps above 0, or None")
    devices = processes.launched()
    micro = micro_batch_size or stage.batch_size // devices
    if micro < 1 or stage.batch_size % (micro * devices):
        raise LizardzooError(
            f"batch_size {stage.batch_size} cannot be split into micro batches of {micro} on {devices} "
            f"device(s); choose a micro_batch_size that divides it"
        )
    warmup = math.ceil(steps * stage.warmup)
    decay = 0 if stage.schedule == "constant" else steps - warmup
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=stage.batch_size // (micro * devices),
        max_grad_norm=stage.clip,
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={
            "num_decay_steps": decay,
            "decay_type": "linear" if stage.schedule == "linear" else "cosine",
            "min_lr_ratio": stage.floor,
        },
        warmup_steps=warmup,
        seed=seed,
        data_seed=seed,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the log shows what happened
        save_strategy="steps",
        save_steps=checkpoint_every or max(1, steps // 10),
        dataloader_drop_last=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # the losses come from hooks: DDP would find nothing used
        use_cpu=devices > 1 and not torch.accelerator.is_available(),  # else each process would train alone
        report_to=[],
        disable_tqdm=True,
    )
    _ = arguments.device  # counts the GPUs
    arguments._n_gpu = min(arguments.n_gpu, 1)  # nn.DataParallel would copy the model away from its hooks
    return arguments


def parameter_groups(model: nn.Module, stage: Stage) -> list[dict[str, Any]]:
    """AdamW's groups of everything that trains: LoRA, feature maps, projections of the token, scalars."""
    rates = {
        "lora": stage.lora_rate if isinstance(stage, Finetune) else 0.0,
        "feature_map": stage.feature_map_rate,
        "projection": stage.projection_rate,
        "scalar": stage.scalar_rate,
    }
    groups: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[parameter_group(name, parameter)].append(parameter)
    return [
        {"params": groups[name], "lr": rate, "weight_decay": 0.0 if name == "scalar" else stage.weight_decay}
        for name, rate in rates.items()
        if groups[name]
    ]


def parameter_group(name: str, parameter: Tensor) -> str:
    """Which learning rate a parameter has. A plug-in's follow the same rule: by name, then by dimensions."""
    if not is_new_parameter(name):
        return "lora"
    if parameter.ndim < 2:
        return "scalar"
    return "feature_map" if "feature_map" in name else "projection"


@contextmanager
def training(model: Any, names: Iterable[str]) -> Iterator[None]:
    """Inside, exactly the parameters `names` train; afterwards flags, mode and use_cache are as they were."""
    chosen = set(names)
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    mode, use_cache = model.training, getattr(model.config, "use_cache", None)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    try:
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
            parameter.grad = None
        model.train(mode)
        model.config.use_cache = use_cache


@contextmanager
def activation_checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Recompute each layer's activations in the backward pass instead of keeping them."""
    if not on:
        yield
        return
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # before transformers 5.20
    getattr(model, f"{word}_checkpointing_enable")()
    try:
        yield
    finally:
        getattr(model, f"{word}_checkpointing_disable")()


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints by step: the trainer's state is what is written last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next(reversed(checkpoints(folder)), None)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, sort_keys=True) + "\n"  # as checkpoints sort them


def _mean(values: list[Any]) -> Any:
    """The mean of numbers, or of each entry of dicts that have the same keys."""
    if values and isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    return fmean(values) if values else {}
