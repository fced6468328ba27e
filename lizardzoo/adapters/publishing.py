"""How a linearized model is saved, published and loaded: transformers' own ways, with a stub, a card and no pickles."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedConfig

from lizardzoo.adapters.bases import base_hash, load_base, load_the_base, name_base
from lizardzoo.adapters.fit import check_fit
from lizardzoo.config import LINEARIZED
from lizardzoo.errors import LizardzooError
from lizardzoo.hub import Pushed, push_folder, write_card
from lizardzoo.hub.difference import DIFFERENCE, Base, changed, difference_of, join
from lizardzoo.hub.low_rank import LOW_RANK, LowRank, low_rank_shapes, pack, read, write_updates
from lizardzoo.hub.stub import auto_map, write_stub
from lizardzoo.hub.weights import check_object, find_file, pinned, tensor_shapes, weight_files, where

SHARD_SIZE = "5GB"
"""Largest file of a published model: an interrupted upload goes on with the next file."""


class Published:
    """Mixin of all linearized models."""

    config: Any
    published_classes: ClassVar[tuple[type, ...]] = ()
    """Config, base model and causal LM of the family; `register_adapter` sets it."""
    low_rank_updates: Mapping[str, LowRank] = MappingProxyType({})
    """What `lizardzoo.distill` merged into the base's weights, by name: a difference holds it instead of the weight."""

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any) -> None:
        """As transformers', and beside it the stub by which the folder loads with trust_remote_code=True.

        Of a model that was finetuned here also low_rank.safetensors, by which a difference made later is small.
        """
        push = kwargs.pop("push_to_hub", False)
        arguments: dict[str, Any] = {}
        if push:
            arguments = {
                name: kwargs.pop(name) for name in ("commit_message", "create_pr", "private") if name in kwargs
            }
            arguments["repo_id"] = kwargs.pop("repo_id", Path(save_directory).name)
        if self.published_classes:
            self.config.auto_map = auto_map(*self.published_classes)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]
        saved = is_main_process and (Path(save_directory) / "config.json").is_file()  # an adapter alone has none
        if saved and self.published_classes:
            write_stub(save_directory, self.published_classes)
            write_updates(save_directory, self.low_rank_updates)
        if push and is_main_process:
            push_folder(save_directory, token=kwargs.get("token"), **arguments)

    def save_difference(
        self,
        save_directory: str | Path,
        base: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> None:
        """Save only what the base does not have, in difference.safetensors; loads by the same calls, base and all.

        Projections that `lizardzoo.distill` merged LoRA into are saved as its factors, once it is seen that these give
        back the very weights; every other weight that is not the base's is saved whole.

        Args:
            save_directory: gets config.json, generation_config.json, the stub and difference.safetensors.
            base: the model that this one was made from: its Hub id, or the folder that
                `lizardzoo.smollm2.teacher_folder` made; `config.base_model_name_or_path` by default.
            revision: of the base, main by default; noted as the commit it is now, so that later ones change nothing.
            token: for a base that is not public.

        Raises:
            LizardzooError: no base is known, or none that others find, or it is of another family, or no weight is its.
                Nothing is written then.
        """
        place = base or getattr(self.config, "base_model_name_or_path", None)
        named, source, look = name_base(place, revision, token)
        teacher = load_base(source, self._base_type(), look)
        found = replace(named, sha256=base_hash(teacher))
        config = copy.deepcopy(self.config)
        setattr(config, DIFFERENCE, found.to_dict())
        difference_of(config)  # a revision that could not be loaded again is refused
        weights: Mapping[str, Any] = self.state_dict()  # type: ignore[attr-defined]
        whole, updates = changed(weights, teacher.state_dict(), self.low_rank_updates)
        if not weights.keys() - whole.keys():
            raise LizardzooError(
                f"not one weight of this model is that of {found}, so a difference would hold all of it; name the base "
                f"and the revision that it was made from, or publish the whole model"
            )
        factors, metadata = pack(updates)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config.base_model_name_or_path = found.name  # not a folder of this machine
        config.dtype = str(self.dtype).removeprefix("torch.")  # type: ignore[attr-defined]
        config.architectures = [type(self).__name__]
        config.auto_map = auto_map(*self.published_classes)
        save_file(whole | factors, folder / f"{DIFFERENCE}.safetensors", metadata=metadata)
        config.save_pretrained(folder)
        self.generation_config.save_pretrained(folder)  # type: ignore[attr-defined]
        write_stub(folder, self.published_classes)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        tokenizer: Any = None,
        difference: bool = False,
        base: str | None = None,
        base_revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload model",
        commit_description: str | None = None,
        create_pr: bool = False,
        max_shard_size: str | int = SHARD_SIZE,
        report: Any = None,
        recipe: Any = None,
        license: str | None = None,
        datasets: Sequence[str] = (),
        tags: Sequence[str] = (),
        force: bool = False,
    ) -> Pushed:
        """Publish the model with its card, in one commit; trying again after an interruption sends what is missing.

        Args:
            repo_id: "me/name"; made if it is not there.
            tokenizer: travels along.
            difference: publish only what differs from the base (see `save_difference`).
            base: the base model, see `save_difference`; `config.base_model_name_or_path` by default.
            base_revision: for a difference, where the base has changed since: its commit or branch; main by default.
            private, token, revision, commit_message, commit_description, create_pr: as transformers'; private=True for
                a repository that is public already is refused.
            max_shard_size: the largest weight file.
            report, recipe, license, datasets, tags: for the card, see `lizardzoo.hub.write_card`.
            force: replace a README.md on the Hub that was written by hand; otherwise it stays.

        Raises:
            LizardzooError: the Hub refuses or fails; the repository is as it was.
        """
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if difference:
                self.save_difference(folder, base, base_revision, token)
            else:
                self.save_pretrained(folder, max_shard_size=max_shard_size)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
            facts = {"base": base, "license": license, "datasets": datasets, "tags": tags}
            write_card(folder, repo_id=repo_id, report=report, recipe=recipe, force=True, **facts)
            return push_folder(
                folder,
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                commit_description=commit_description,
                create_pr=create_pr,
                force=force,
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', from safetensors only, strict about every parameter; a difference gets its base.

        `base=`: where a difference's base is, a folder or a Hub id, if not where the difference says; it has to be the
        very one all the same.

        Raises:
            LizardzooError: pickled weights, an unfinished or damaged checkpoint, parameters that are not exactly the
                config's (before anything is allocated), or a base that is not the one the difference was made to.
        """
        name = pretrained_model_name_or_path
        parent: Any = super()
        base = kwargs.pop("base", None)
        adapter = (kwargs.get("adapter_kwargs") or {}).get("_adapter_model_path")  # one that was asked for
        if name is None or kwargs.get("state_dict") is not None or kwargs.get("gguf_file") is not None:
            return parent.from_pretrained(name, *args, **kwargs)
        if kwargs.get("use_safetensors") is False:
            raise LizardzooError("use_safetensors=False asks for pickled weights, which run code; leave it out")
        look = pinned(name, **where(kwargs))
        kwargs |= {key: value for key, value in look.items() if key != "force_download"}  # what was forced has come
        kwargs.pop("force_download", None)
        if adapter is None and find_file(name, "adapter_config.json", **look) is not None:
            raise LizardzooError(
                f"{name} holds adapter_config.json, by which weights of another model would be loaded; remove it, or "
                f"load the model that the adapter is for and put it on with peft.PeftModel.from_pretrained"
            )
        check_object(name, "generation_config.json", **look)
        config = kwargs.get("config")
        if not isinstance(config, PreTrainedConfig):
            config = cls.config_class.from_pretrained(config or name, **look)  # type: ignore[attr-defined]
        difference = difference_of(config)
        if difference is not None:
            return cls._from_difference(name, difference, base, config, args, kwargs)
        if base is not None:
            raise LizardzooError(f"{name} is a whole model, and base={str(base)!r} is for a difference; leave it out")
        files = weight_files(name, variant=kwargs.get("variant"), **look)
        renamed = kwargs.get("key_mapping") or kwargs.get("ignore_mismatched_sizes")
        if not renamed and getattr(config, "quantization_config", None) is None:
            cls.check_fit(config, tensor_shapes(files), name)
        loaded = parent.from_pretrained(name, *args, **kwargs, **({} if "use_safetensors" in kwargs else SAFE))
        beside = Path(name) / (look.get("subfolder") or "") / LOW_RANK
        if beside.is_file() and hasattr(cls, "base_model_class"):
            _model_of(loaded).low_rank_updates = read(beside)[1]
        return loaded

    @classmethod
    def check_fit(cls, config: Any, found: Mapping[str, Any], source: Any) -> None:
        """Refuse a causal LM whose file does not hold exactly its parameters, in their shapes."""
        if hasattr(cls, "base_model_class"):  # a base model may be read from a causal LM's file
            check_fit(cls, config, found, source)

    @classmethod
    def _from_difference(
        cls, source: Any, base: Base, given: Any, config: Any, args: Any, kwargs: dict[str, Any]
    ) -> Any:
        look = where(kwargs)
        file, *more = weight_files(source, stem=DIFFERENCE, **look)
        if more:
            raise LizardzooError(f"{source} has its difference in {1 + len(more)} files, and one was expected")
        config = copy.deepcopy(config)
        delattr(config, DIFFERENCE)
        shapes = low_rank_shapes(tensor_shapes([file]), f"{file.name} of {source}")
        teacher, place = load_the_base(base, given, cls._base_type(), source, look)
        tensors = teacher.state_dict()
        cls.check_fit(config, {name: tuple(tensor.shape) for name, tensor in tensors.items()} | shapes, source)
        dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
        whole, updates = read(file)
        joined = join(tensors, whole, updates, dtype)
        wanted = kwargs.get("dtype", kwargs.get("torch_dtype"))
        rest = {
            name: value
            for name, value in kwargs.items()
            if name not in (*look, "config", "dtype", "torch_dtype", "use_safetensors", "force_download", "variant")
        }
        parent: Any = super()
        loaded = parent.from_pretrained(
            None, *args, config=config, state_dict=joined, dtype=dtype if wanted in (None, "auto") else wanted, **rest
        )
        model = _model_of(loaded)
        if hasattr(cls, "base_model_class"):
            model.low_rank_updates = updates
        model.config._name_or_path = model.name_or_path = str(source)
        model.config.base_model_name_or_path = place
        if (generation := find_file(source, "generation_config.json", **look)) is not None:
            model.generation_config = GenerationConfig.from_pretrained(generation.parent)
        return loaded

    @classmethod
    def _base_type(cls) -> str:
        return str(cls.config_class.model_type).removeprefix(LINEARIZED)  # type: ignore[attr-defined]


SAFE = {"use_safetensors": True}


def _model_of(loaded: Any) -> Any:
    """What from_pretrained gave, without output_loading_info."""
    return loaded[0] if isinstance(loaded, tuple) else loaded
