"""What `compare.py` runs: the teacher, the texts and the budget that all variants share, and what has been measured."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_report import EDGES
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from variants import BY_NAME, Variant, shape_of

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.cache import state_bytes
from lizardzoo.distill import Recipe, load_data, recipe_from
from lizardzoo.smollm2 import load_teacher

STAGES = ("start", "transfer", "finetune")
RANKED = "hybrid"
"""The variant that ranks the layers for those that keep softmax in some; for those made of `heavy`, that one."""
OCTAVES = {"window": 2, "heavy": 3}
"""How often a size is halved and doubled where it is shared out."""
CALIBRATION, RANKING = 4, 16
"""Training sequences on which start values are set, and those on which layers are ranked and sizes shared out."""
MOST_KEPT = 8
"""Layers that are chosen, one after the other; a variant takes the first of them."""


class Results:
    """results.json: {"settings", "runs": {"variant, seed": {...}}}, written whole each time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        empty: dict[str, Any] = {"settings": None, "selection": {}, "sizes": {}, "runs": {}}
        self.values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else empty

    def settle(self, settings: dict[str, Any]) -> None:
        """What all runs have in common; another comparison's results are refused."""
        before = self.values["settings"]
        if before is not None and before != settings:
            other = [name for name in settings if before.get(name) != settings[name]]
            raise SystemExit(
                f"{self.path} holds a comparison with another {', '.join(other)}; choose a new --out, or give the same"
            )
        self.values["settings"] = settings

    def save(self) -> None:
        """Beside, then in its place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.values, indent=1) + "\n", encoding="utf-8")
        beside.replace(self.path)


class Comparison:
    """The teacher, the texts and the budget that all variants share."""

    def __init__(self, arguments: argparse.Namespace, results: Results) -> None:
        self.arguments, self.results = arguments, results
        self.out: Path = arguments.out
        self.stages = STAGES[: 1 + arguments.stages]
        self.batch_size = arguments.micro_batch or 4
        dtype = getattr(torch, arguments.dtype)
        if arguments.teacher is None:
            self.teacher, self.tokenizer = load_teacher(dtype)
        else:
            self.teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=dtype)
            self.tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
        self.teacher.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.texts = dict(map(self.read, arguments.text))
        self.train = {seed: self.pack(seed) for seed in arguments.seeds}
        self.ranking_text = torch.tensor(self.train[arguments.seeds[0]][:RANKING]["input_ids"])
        self.calibration = self.ranking_text[:CALIBRATION]
        budget = {
            name: getattr(arguments, name) for name in ("steps", "batch", "tokens", "dtype", "distances", "few_shot")
        }
        files = {path.name: digest(path.read_bytes()) for path in (*arguments.train, *arguments.questions)}
        texts = {name: digest(ids.numpy().tobytes()) for name, ids in self.texts.items()}
        teacher = digest(
            *(p.detach().flatten()[:64].double().cpu().numpy().tobytes() for p in self.teacher.parameters())
        )
        results.settle(
            {**budget, "files": files, "texts": texts, "question_limit": arguments.question_limit, "teacher": teacher}
        )

    def read(self, text: str) -> tuple[str, Tensor]:
        """The name and sequences of FILE[:LENGTH[:SEQUENCES]], tokenized once."""
        name, *numbers = text.split(":")
        length, count = (*map(int, numbers), *((2048, 16)[len(numbers) :]))
        ids = self.cached(
            ("text", length, count), [Path(name)],
            lambda: evaluate.sequences(Path(name), self.tokenizer, length, count).numpy(),
        )  # fmt: skip
        return f"{Path(name).name.partition('.')[0]}, {length} tokens", torch.from_numpy(ids)

    def pack(self, seed: int) -> Any:
        """The training sequences of a seed, tokenized once; as many of each file."""
        import datasets

        length = self.arguments.tokens
        rows = self.cached(
            ("train", length, seed), self.arguments.train,
            lambda: np.array(
                load_data(list(self.arguments.train), self.tokenizer, length, mixing="equal", seed=seed)["input_ids"],
                dtype=np.int32,
            ),
        )  # fmt: skip
        return datasets.Dataset.from_dict({"input_ids": list(rows)})

    def cached(self, what: tuple[Any, ...], files: list[Path], make: Any) -> Any:
        """An array that depends on files and the tokenizer; made once, kept in --out/cache."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items())).encode()
        key = digest(repr(what).encode(), vocabulary, *(path.read_bytes() for path in files))
        path = self.out / "cache" / f"{what[0]}-{key}.npy"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npy", delete=False) as file:
                np.save(file, make())
            Path(file.name).replace(path)
        return np.load(path)

    def learns(self, variant: Variant) -> bool:
        """Whether there is anything to train in stage 1; a bare window has no parameters."""
        mixer = variant.spec_for(self.teacher).build(shape_of(self.teacher.config))
        return any(True for _ in mixer.parameters())

    def is_done(self, variant: Variant, seed: int) -> bool:
        """Whether every stage that is wanted has been measured."""
        return set(self.stages) <= set(self.entry(variant, seed)["stages"])

    def entry(self, variant: Variant, seed: int) -> dict[str, Any]:
        """What is known of a run."""
        return self.results.values["runs"].get(f"{variant.name}, {seed}", {"stages": {}})

    def linearize(self, variant: Variant) -> Any:
        """The student at its start."""
        layers: list[Any] = [variant.spec_for(self.teacher)] * self.teacher.config.num_hidden_layers
        for index in self.ranking(variant)[: variant.chosen] if variant.chosen else ():
            layers[index] = variant.give
        if variant.share:
            layers = self.shared_out(variant, layers)
        return lz.linearize(self.teacher, layers, calibrate=self.calibration)

    def ranking(self, variant: Variant) -> list[int]:
        """Layers by what recall their softmax gives back, best first: of what the variant is made of, after stage 1."""
        values, base = self.results.values["selection"], self.base(variant)
        if base not in values:
            model, of = self.ranked(base, variant)
            keep = min(MOST_KEPT, self.teacher.config.num_hidden_layers)
            ids, answers = self.asked()
            found = lz.select_layers(
                model, ids, keep, layers=BY_NAME[base].spec_for(self.teacher), teacher=self.teacher,
                weights=answers, greedy=True, batch_size=self.batch_size,
            )  # fmt: skip
            values[base] = {"of": of, **found.to_dict()}
            self.results.save()
        return values[base]["kept"]

    def asked(self, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Questions about training text, and weights of which their answers have a share: a few layers must see far."""
        length = self.arguments.tokens
        filler = self.tokenizer.decode(self.ranking_text.flatten(), skip_special_tokens=True)
        return evaluate.recall_sequences(
            filler, self.tokenizer, length, RANKING, distances=(length // 4, length * 5 // 8), seed=1, share=share
        )  # fmt: skip

    def shared_out(self, variant: Variant, layers: list[Any]) -> list[Any]:
        """The layers with the sizes that were chosen, on the same model."""
        values = self.results.values.setdefault("sizes", {})
        if variant.name not in values:
            model, of = self.ranked(self.base(variant), variant)
            if variant.chosen:  # nothing but its start has its layers
                model, of = self.teacher, f"{variant.name} at its start"
            ids, weights = self.asked(variant.by_recall) if variant.by_recall else (self.ranking_text, None)
            found = lz.select_windows(
                model, ids, layers=layers, teacher=self.teacher, weights=weights, field=variant.share,
                octaves=max(OCTAVES[field] for field in variant.share), rounds=variant.rounds,
                batch_size=self.batch_size,
            )  # fmt: skip
            values[variant.name] = {"of": of, **found.to_dict()}
            self.results.save()
        return values[variant.name]["layers"]

    def base(self, variant: Variant) -> str:
        """The variant that ranks for it: one of the same spec and nothing else."""
        spec = variant.spec_for(self.teacher)
        return {lz.Heavy: "heavy", lz.Window: "bare"}.get(type(spec), RANKED)

    def ranked(self, base: str, variant: Variant) -> tuple[Any, str]:
        """The base after stage 1 where that has been run, else the teacher, of which it is made; and what that is."""
        trained = self.folder(base, self.arguments.seeds[0]) / "transfer"
        if trained.is_dir():
            return lz.from_pretrained(trained).to(self.teacher.device), f"{base} after stage 1"
        return self.teacher, f"{base}, calibrated and not trained" if self.learns(variant) else base

    def folder(self, name: str, seed: int) -> Path:
        """Where a variant's models are."""
        return self.out / "runs" / f"{name}-{seed}"

    def run(self, variant: Variant, seed: int) -> None:
        """Train and measure one variant, stage by stage."""
        set_seed(seed)
        entry = self.entry(variant, seed)
        model = self.linearize(variant)
        entry |= {"variant": variant.name, "seed": seed, "differs": variant.differs, "layers": model.config.layers}
        entry["state bytes"] = state_bytes(model) if model.mixers() else 0
        recipe = self.recipe(variant, seed)
        folder = self.folder(variant.name, seed)
        for stage in self.stages:
            found: dict[str, Any] = {}
            idle = stage == "transfer" and not self.learns(variant)
            if stage != "start" and not idle:
                begun = time.monotonic()
                if torch.cuda.is_available():
                    torch.cuda.reset_peak_memory_stats()
                lz.distill(
                    model, tokenizer=self.tokenizer, data=self.train[seed], recipe=recipe, output_dir=folder,
                    stages=[stage], resume=True, progress=False, micro_batch_size=self.arguments.micro_batch,
                )  # fmt: skip
                model.eval()
                found["seconds"] = time.monotonic() - begun
                if torch.cuda.is_available():
                    found["peak MiB"] = torch.cuda.max_memory_allocated() / 2**20
            if stage in entry["stages"]:
                continue
            begun = time.monotonic()
            found |= entry["stages"]["start"] if idle else self.measure(model)
            found["seconds of measuring"] = time.monotonic() - begun
            entry["stages"][stage] = found
            self.results.values["runs"][f"{variant.name}, {seed}"] = entry
            self.results.save()
            kl = ", ".join(f"{name}: {text['all']['kl']:.4f}" for name, text in found["texts"].items())
            print(f"{variant.name}, seed {seed}, {stage}: KL {kl}", flush=True)
        if variant.name != RANKED and not self.arguments.keep_models:
            shutil.rmtree(folder, ignore_errors=True)

    def recipe(self, variant: Variant, seed: int) -> Recipe:
        """The recommended rates, the budget of the command line, the variant's loss."""
        base = recipe_from("recommended")
        sizes = {"batch_size": self.arguments.batch, "sequence_length": self.arguments.tokens}
        steps1, steps2 = self.arguments.steps
        ce, kl = variant.loss
        return dataclasses.replace(
            base,
            name="compare",
            transfer=dataclasses.replace(base.transfer, steps=steps1, **sizes),
            finetune=dataclasses.replace(base.finetune, steps=steps2, ce_weight=ce, kl_weight=kl, **sizes),
            seed=seed,
        )

    def measure(self, model: Any) -> dict[str, Any]:
        """A student beside its teacher: by position on each text, retrieval, questions."""
        found: dict[str, Any] = {"texts": {}}
        for name, ids in self.texts.items():
            report = evaluate.compare({"student": model}, self.teacher, ids, buckets=EDGES)
            rows = {"": report["student"].result, "teacher ": report["teacher"].result}
            found["texts"][name] = {
                f"{prefix}{label}": {"perplexity": bucket.perplexity, "kl": bucket.kl, "tokens": bucket.tokens}
                for prefix, row in rows.items()
                for label, bucket in [*((b.label, b) for b in row.buckets), ("all", row.overall)]
            }
        if self.arguments.distances:
            filler = Path(self.arguments.text[0].partition(":")[0])
            report = evaluate.retrieval(
                {"student": model}, self.teacher, self.tokenizer, filler, distances=self.arguments.distances
            )  # fmt: skip
            found["retrieval"] = report.to_dict()["rows"]
        if self.arguments.questions:
            with tempfile.TemporaryDirectory() as folder:
                tasks = Path(folder) / "tasks"
                names = evaluate.question_tasks(
                    self.arguments.questions, tasks, few_shot=self.arguments.few_shot,
                    examples=self.arguments.few_shot_from, limit=self.arguments.question_limit,
                )  # fmt: skip
                found["tasks"] = {
                    who: evaluate.lm_eval(one, self.tokenizer, names, tasks, batch_size=16, bootstrap_iters=0)
                    for who, one in (("student", model), ("teacher", self.teacher))
                }
        return found


def digest(*parts: bytes) -> str:
    """A short hash."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:16]
