"""Train the embedded model pair `stories`: one command, every stage resumable.

python recipes/stories/train.py --data DATA --work WORK [--export ASSETS]
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import agreement
import cards
import corpus
import distill
import measure
import publish
import runlog
import sample
import shapes
import torch
import vocabulary
from pretrain import PretrainSettings, Worker, pretrain
from torch import distributed, multiprocessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

STAGES = ("split", "tokenizer", "target", "samples", "draft", "evaluate", "export")
OPENINGS = 64


class Recipe:
    """The stages, in order; each leaves its output below `work` and is skipped if it is there."""

    def __init__(
        self, data: Path, work: Path, assets: Path | None, options: argparse.Namespace
    ) -> None:
        self.data = data
        self.work = work
        self.assets = assets
        self.compiled: bool = options.compile
        self.workers: int = options.workers
        self.log = runlog.RunLog(work / "run.json")

    def run(self, stages: list[str]) -> None:
        """Run the named stages and write their durations into the run record."""
        for stage in stages:
            print(f"== {stage}", flush=True)
            began = time.monotonic()
            done = getattr(self, stage)()
            if done:
                self.log.update(stage, done | {"last_run_s": round(time.monotonic() - began, 1)})
            else:
                print("already there, skipped", flush=True)

    def split(self) -> dict[str, object] | None:
        """Write train.jsonl and held_out.jsonl."""
        if (self.work / "held_out.jsonl").exists():
            return None
        parts = corpus.split(corpus.read_stories(self.data))
        for name, stories in parts.items():
            corpus.save(stories, self.work / f"{name}.jsonl")
        return {
            name: {"stories": len(part), "characters": sum(len(story.text) for story in part)}
            for name, part in parts.items()
        }

    def tokenizer(self) -> dict[str, object] | None:
        """Train the tokenizer."""
        folder = self.work / "tokenizer"
        if (folder / "tokenizer.json").exists():
            return None
        stories = corpus.load(self.work / "train.jsonl")
        tokenizer = vocabulary.train_tokenizer(stories)
        tokenizer.save_pretrained(folder)
        encoded = vocabulary.encode(tokenizer, stories)
        tokens = sum(map(len, encoded))
        characters = sum(len(story.text) for story in stories)
        return {"entries": len(tokenizer), "characters_per_token": round(characters / tokens, 3)}

    def target(self) -> dict[str, object] | None:
        """Train the target, with one process a worker."""
        if (self.work / "target" / "model.safetensors").exists():
            return None
        if self.workers == 1:
            return train_target(0, self.work, 1, self.compiled)
        (self.work / "target.rendezvous").unlink(missing_ok=True)
        arguments = (self.work, self.workers, self.compiled)
        multiprocessing.spawn(_target_worker, arguments, nprocs=self.workers)
        return json.loads((self.work / "target.json").read_text())

    def samples(self) -> dict[str, object] | None:
        """Let the target write texts for the draft to learn from."""
        path = self.work / "samples.pt"
        if path.exists():
            return None
        settings = distill.DistillSettings()
        tokenizer, train, _ = load(self.work)
        rows = sample.sample_texts(
            self._model("target"),
            vocabulary.encode(tokenizer, train),
            settings.sampled_tokens,
            list(settings.temperatures),
            settings.seed,
        )
        torch.save(rows, path)
        return {"texts": len(rows), "tokens": sum(map(len, rows))}

    def draft(self) -> dict[str, object] | None:
        """Distil the target into the draft."""
        folder = self.work / "draft"
        if (folder / "model.safetensors").exists():
            return None
        settings = distill.DistillSettings()
        tokenizer, train, _ = load(self.work)
        teacher = self._teacher(vocabulary.encode(tokenizer, train), settings)
        torch.manual_seed(settings.seed)
        model = shapes.build(shapes.DRAFT, tokenizer.bos_token_id, tokenizer.eos_token_id)
        result = distill.distill(model, teacher, settings)
        model.to(torch.bfloat16).save_pretrained(folder)
        return {
            "settings": asdict(settings),
            "shape": shapes.DRAFT,
            "parameters": shapes.parameters(model),
            "teacher_tokens": len(teacher.tokens),
            "kept_probability": distill.kept_share(teacher),
            **result,
        }

    def evaluate(self) -> dict[str, object]:
        """Measure both models as exported; print five samples."""
        tokenizer, _, held_out = load(self.work)
        target, draft = self._model("target"), self._model("draft")
        encoded = vocabulary.encode(tokenizer, held_out)
        prompts = agreement.openings(held_out, OPENINGS, seed=64)
        bits = measure.bits_per_character(target, held_out, encoded, vocabulary.CONTEXT)
        result: dict[str, object] = {
            "bits_per_character": bits,
            "draft_bits_per_character": measure.bits_per_character(
                draft, held_out, encoded, vocabulary.CONTEXT
            ),
            "pair": agreement.compare(target, draft, tokenizer, prompts),
            "cost": agreement.cost_ratio(target, draft),
        }
        for name, value in result.items():
            print(f"{name}: {value}")
        for text in agreement.texts(target, tokenizer, prompts[:5], 0.7, new_tokens=300):
            print(f"---\n{tokenizer.decode(text.ids, skip_special_tokens=True)}")
        return result

    def export(self) -> dict[str, object] | None:
        """Write the folders that ship, and the openings."""
        if self.assets is None:
            print("no --export folder given")
            return None
        tokenizer, _, held_out = load(self.work)
        record = self.log.read()
        sizes = {}
        for name in ("target", "draft"):
            weights = (self.work / name / "model.safetensors").stat().st_size
            card = (
                cards.target_card(record, weights)
                if name == "target"
                else cards.draft_card(record, weights, agreement.DEPTH)
            )
            sizes[name] = publish.export_model(
                self._model(name), tokenizer, self.assets / name, card, record
            )
        lines = agreement.openings(held_out, OPENINGS, seed=64)
        (self.assets / "openings.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return {"weights_bytes": sizes}

    def _teacher(
        self, stories: list[list[int]], settings: distill.DistillSettings
    ) -> distill.Teacher:
        """The target's distributions over the stories and the samples, computed once."""
        path = self.work / "teacher.pt"
        if path.exists():
            return distill.Teacher(**torch.load(path))
        chosen = distill.some_of(stories, settings.story_tokens, settings.seed)
        rows = [ids[: vocabulary.CONTEXT + 1] for ids in chosen]
        rows += torch.load(self.work / "samples.pt")
        teacher = distill.teach(self._model("target"), rows, settings.kept)
        torch.save(vars(teacher), path)
        return teacher

    def _model(self, name: str) -> LlamaForCausalLM:
        return LlamaForCausalLM.from_pretrained(self.work / name, dtype=torch.float32)


def load(
    work: Path,
) -> tuple[PreTrainedTokenizerFast, list[corpus.Story], list[corpus.Story]]:
    """The tokenizer, the training stories and the held-out stories."""
    tokenizer = vocabulary.load_tokenizer(work / "tokenizer")
    train = corpus.load(work / "train.jsonl")
    return tokenizer, train, corpus.load(work / "held_out.jsonl")


def train_target(rank: int, work: Path, workers: int, compiled: bool) -> dict[str, object]:
    """Train the target as one of `workers`; the first one measures and saves it."""
    settings = PretrainSettings()
    tokenizer, train, held_out = load(work)
    torch.manual_seed(settings.seed)
    model = shapes.build(shapes.TARGET, tokenizer.bos_token_id, tokenizer.eos_token_id)
    third = held_out[::3]
    encoded = vocabulary.encode(tokenizer, third)

    def validate() -> float:
        with torch.compiler.set_stance("force_eager"):
            bits = measure.bits_per_character(model, third, encoded, vocabulary.CONTEXT)
        model.train()
        return bits["all"]

    result = pretrain(
        model,
        vocabulary.encode(tokenizer, train),
        settings,
        work / "target.checkpoint.pt",
        Worker(rank, workers, compiled),
        validate,
    )
    if rank == 0:
        model.to(torch.bfloat16).save_pretrained(work / "target")
    return {
        "settings": asdict(settings),
        "workers": workers,
        "shape": shapes.TARGET,
        "parameters": shapes.parameters(model),
        **result,
    }


def _target_worker(rank: int, work: Path, workers: int, compiled: bool) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(work / "target.rendezvous"), workers)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    result = train_target(rank, work, workers, compiled)
    if rank == 0:
        (work / "target.json").write_text(json.dumps(result, indent=1))
    distributed.barrier()
    distributed.destroy_process_group()


def main() -> None:
    """Parse the command line and run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with the story files")
    parser.add_argument("--work", type=Path, required=True, help="folder for what stages leave")
    parser.add_argument("--export", type=Path, help="folder that gets target/ and draft/")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--workers", type=int, default=2, help="processes that train the target")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    recipe = Recipe(arguments.data, arguments.work, arguments.export, arguments)
    recipe.log.start(sys.argv[1:])
    recipe.run(arguments.stages)


if __name__ == "__main__":
    main()
