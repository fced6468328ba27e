"""The processes of a run, under torchrun or accelerate launch: what each holds, and how they agree.

Every process trains on its own part of each batch. What trains (mixers, LoRA) is small: all hold the whole of it, and
DDP averages its gradients. What is frozen is nearly all of the memory: sharded, each process holds its part of it, and
FSDP2 gathers a layer while it computes. So no group of FSDP2's mixes the weights' bf16 with the mixers' fp32, which it
refuses, and checkpoints do not depend on how many processes wrote them.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from lizardzoo.errors import LizardzooError


def start() -> Any:
    """Join the processes of this run (accelerate's `PartialState`), if it was launched as several; on CPUs by gloo."""
    from accelerate import PartialState

    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise LizardzooError(
                f"accelerate's {name} would wrap what trains together with what is frozen; "
                f"launch with distributed_type: MULTI_GPU, and pass shard=True (--shard) to share out what is frozen"
            )
    if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        raise LizardzooError(
            f"accelerate's mixed_precision={precision} would change what the kernels compute in; launch with "
            f'mixed_precision: "no", and load the model in the dtype that it shall compute in'
        )
    return PartialState(cpu=True) if launched() > 1 and not torch.accelerator.is_available() else PartialState()


def launched() -> int:
    """How many processes this one was launched with."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return int(os.environ.get("RANK", "0")) == 0


def device_name(device: torch.device) -> str:
    """What it is called, such as "NVIDIA H100 80GB HBM3", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` holds in any process; all have to ask."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return flags.item() > 0


def first_text(text: str | None) -> str | None:
    """The first process's text that is not None; all have to ask."""
    texts = [text]
    if dist.is_initialized():
        texts = [None] * dist.get_world_size()
        dist.all_gather_object(texts, text)
    return next((text for text in texts if text is not None), None)


def means(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The mean over the processes of numbers, or of each entry of dicts of them; all have to have the same keys."""
    if not dist.is_initialized() or not values:
        return values
    numbers = [n for value in values.values() for n in (value.values() if isinstance(value, dict) else [value])]
    summed = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    mean = iter((summed / dist.get_world_size()).tolist())
    return {k: {name: next(mean) for name in v} if isinstance(v, dict) else next(mean) for k, v in values.items()}


def check_shard(model: nn.Module) -> None:
    """Sharding needs processes to share among, and a model that is not whole on one's device already."""
    if launched() < 2:
        raise LizardzooError(
            "shard=True, but there is one process, which has nobody to share with; "
            "launch it with torchrun --nproc-per-node N or accelerate launch, or leave shard out"
        )
    if wrong := {parameter.device.type for parameter in model.parameters()} - {"cpu"}:
        raise LizardzooError(
            f"shard=True, but the model is on {sorted(wrong)[0]}, whole; load it on the CPU, "
            f"and each process takes its part of it to its device"
        )


@contextmanager
def sharded(model: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """A working copy of `model` on `device`: what is frozen shared out by FSDP2, what trains the model's very own.

    The model keeps its frozen weights, on the CPU; they never change, so nothing has to be gathered at the end.
    `model`: a linearized model, a teacher, or what LoRA has wrapped around one.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = {id(p): p if p.requires_grad else nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    working = copy.deepcopy(model, kept)
    try:
        for parameter in trains:
            parameter.data = parameter.data.to(device)
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        whole: Any = next(module for module in working.modules() if isinstance(module, PreTrainedModel))
        for part in (*whole.get_decoder().layers, whole):
            fully_shard(part, mesh=mesh, ignored_params=set(trains))
        yield working
    finally:
        for parameter in trains:
            parameter.data = parameter.data.to("cpu")


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """DDP around a model whose frozen weights are sharded: it looks at what trains alone."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    ignored = frozen + [name for name, _ in model.named_buffers()]
    parallel = nn.parallel.DistributedDataParallel
    parallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return parallel(model, device_ids=None if device.type == "cpu" else [device])
