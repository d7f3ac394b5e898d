"""`foretoken bench speed`."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foretoken.cli import bench, bench_serve, bench_specinfer, options
from foretoken.cli.bench_output import written
from foretoken.cli.progress import progress_bar
from foretoken.cli.terminal import is_terminal, loading, note
from foretoken.errors import ConfigError

if TYPE_CHECKING:
    from foretoken.bench.speed.settings import SpeedSettings
    from foretoken.bench.workloads import Workload

MAX_TEXTS = 200  # whose bits per character are measured
MODELS_PANEL = "Models of the same training"

EXAMPLES = """
[bold]Examples[/]

foretoken bench speed --model looped/model --output results

foretoken bench speed --model looped/model --shallow shallow/model --deep deep/model \\
  --text stories.txt --output results

foretoken bench speed --model looped/model --inflate hidden=4096 --dtype bfloat16 --exit-loop 1
"""


def _model_option(name: str, metavar: str, help_text: str) -> Any:
    return options._option(name, metavar, help_text, MODELS_PANEL)


Shared = Annotated[
    str, _model_option("--model", "MODEL", "Runs its layers in loops: a directory. Needed.")
]
Shallow = Annotated[
    str | None, _model_option("--shallow", "MODEL", "With as many layers, each run once.")
]
Deep = Annotated[
    str | None, _model_option("--deep", "MODEL", "With as many layers as the loops run.")
]
Text = Annotated[
    list[Path] | None,
    _model_option(
        "--text",
        "FILE",
        "What they were trained on: what train looped held out of it is measured; repeatable.",
    ),
]
HeldOut = Annotated[
    list[Path] | None,
    _model_option("--held-out", "FILE", "Texts to measure on, all of them; repeatable."),
]
ExitLoops = Annotated[
    list[int] | None,
    bench._work("--exit-loop", "N", "Loops before a guess is issued (default 1); repeatable."),
]
Checks = Annotated[
    list[str] | None,
    options._option(
        "--check", "NAME", "eager or lazy; repeatable (default both).", bench.WORK_PANEL
    ),
]
LoopSpec = Annotated[
    str,
    options._option(
        "--loopspec",
        "OPTIONS",
        "Of the drafter loopspec beside it, key=value,...; none leaves it out.",
        bench.WORK_PANEL,
    ),
]
NumPrompts = Annotated[int, bench._work("--num-prompts", "N", "Prompts (default 6).")]
PromptTokens = Annotated[
    int, bench._work("--prompt-tokens", "N", "Of each prompt, at most (default 32).")
]
MaxNewTokens = Annotated[
    int, bench._work("--max-new-tokens", "N", "New tokens per prompt, always all (default 96).")
]
Temperatures = Annotated[
    list[float] | None,
    options._option(
        "--temperature",
        "T",
        "Repeatable (default 0 and 1).",
        bench.WORK_PANEL,
        parser=options._number,
    ),
]


@bench.app.command(epilog=EXAMPLES, no_args_is_help=False)
def speed(
    model: Shared = "",
    shallow: Shallow = None,
    deep: Deep = None,
    text: Text = None,
    held_out: HeldOut = None,
    inflate: bench.Inflate = None,
    exit_loop: ExitLoops = None,
    check: Checks = None,
    loopspec: LoopSpec = "",
    num_prompts: NumPrompts = 6,
    prompt_tokens: PromptTokens = 32,
    max_new_tokens: MaxNewTokens = 96,
    temperature: Temperatures = None,
    batch_size: bench.BatchSizes = None,
    rounds: bench.Rounds = 5,
    seed: bench.Seed = 0,
    output: bench.OutputFolder = None,
    force: bench.Force = False,
    format_name: bench.Format = options.OutputFormat.TEXT,
    dtype: options.DType = "auto",
    device: options.Device = "auto",
    threads: options.Threads = None,
    debug: options.Debug = False,
) -> None:
    """Measure what tokens in flight gain for a model with shared layers, and what it knows."""
    if not debug:
        warnings.simplefilter("ignore")
    counts = {
        "num_prompts": num_prompts,
        "prompt_tokens": prompt_tokens,
        "max_new_tokens": max_new_tokens,
        "rounds": rounds,
    }
    lists = {"exit_loop": exit_loop, "batch_size": batch_size, "threads": threads}
    for name, values in {**counts, **lists}.items():
        bench.check_counts(name, values)
    if not model:
        raise ConfigError(
            "bench speed needs a model that runs its layers in loops",
            hint="train one with foretoken train looped, and give its folder with --model",
        )
    with written(output, _draw, force=force) as write:
        with loading(model):
            settings = _settings(
                {"shared": model, "shallow": shallow, "deep": deep},
                _texts(text, held_out),
                inflate,
                num_prompts,
                max_prompt_tokens=prompt_tokens,
                exit_loops=bench._each(exit_loop, 1),
                checks=tuple(dict.fromkeys(check or ("eager", "lazy"))),
                loopspec=_loopspec(loopspec),
                max_new_tokens=max_new_tokens,
                temperatures=tuple(dict.fromkeys(temperature or (0.0, 1.0))),
                batch_sizes=bench._each(batch_size, 1),
                rounds=rounds,
                seed=seed,
                dtype=dtype,
                device=device,
                threads=threads,
            )
        record = _measure(settings)
        _show(record, format_name)
        write(record)
    bench._check_same_tokens(record)


def _settings(
    models: Mapping[str, str | None],
    texts: Sequence[str],
    inflate: str | None,
    num_prompts: int,
    *,
    threads: int | None,
    **others: Any,
) -> SpeedSettings:
    """Resolve names, measure what the models know, and widen them if asked to."""
    import torch

    from foretoken.bench.speed.settings import SpeedSettings
    from foretoken.engine.names import resolve_model
    from foretoken.models.quiet import silence_libraries
    from foretoken.training.folder import fingerprint

    silence_libraries()
    given = {name: resolve_model(model) for name, model in models.items() if model is not None}
    threads = threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    names = {name: bench_specinfer._shown(path) for name, path in given.items()}
    quality = {name: _quality(path, texts[:MAX_TEXTS]) for name, path in given.items() if texts}
    paths = given
    if inflate is not None:
        others["dtype"] = "float32" if others["dtype"] == "auto" else others["dtype"]
        paths = {name: _widened(path, inflate, others["dtype"]) for name, path in given.items()}
        names = {name: f"{shown} widened to {inflate}" for name, shown in names.items()}
    return SpeedSettings(
        models=paths,
        names=names,
        weights={name: fingerprint(path) for name, path in given.items()},
        quality=quality,
        workload=_workload(texts, num_prompts),
        threads=threads,
        **others,
    )


def _widened(path: str, shape: str, dtype: str) -> str:
    from foretoken.bench.inflate import Shape, cache_folder, inflate

    folder = cache_folder() / "inflated"
    return str(inflate(Path(path), Shape.parse(shape), dtype=dtype, folder=folder))


def _texts(text: list[Path] | None, held_out: list[Path] | None) -> list[str]:
    """Return the texts to measure on, none if no file was named."""
    if text is None and held_out is None:
        return []
    from foretoken.training.looped.documents import read_texts, split_texts

    if held_out is None:
        return split_texts(read_texts(text or [])).held_out
    if text is None:
        return read_texts(held_out)
    return split_texts(read_texts(text), read_texts(held_out)).held_out


def _quality(path: str, texts: Sequence[str]) -> dict[str, Any]:
    """Return what a model knows of texts, at each depth."""
    from foretoken.models.loading import load_config
    from foretoken.models.tokenizer import Tokenizer
    from foretoken.models.trainable import load_trainable
    from foretoken.training.looped.documents import encode_texts
    from foretoken.training.looped.measure import depth_quality

    tokenizer = Tokenizer.load(path)
    if tokenizer is None:
        raise ConfigError(
            f"model {Path(path).name!r} has no tokenizer, so what it knows of texts cannot be "
            "measured",
            hint="leave out --text and --held-out",
        )
    end = load_config(path).eos_token_id
    ids = encode_texts(texts, tokenizer, end[0] if isinstance(end, list) else end)
    model = load_trainable(Path(path), device="cpu")
    num_characters = sum(map(len, texts))
    note(f"measuring what {Path(path).name} knows of {len(texts)} held-out texts")
    return depth_quality(model, ids, num_characters, model.context_limit or 512).described()


def _workload(texts: Sequence[str], num_prompts: int) -> Workload:
    """Return the beginnings of held-out texts; openings of stories where there are none."""
    from foretoken.bench.workloads import Workload, WorkloadPrompt, load_workload

    if not texts:
        return load_workload("stories").take(num_prompts)
    prompts = [
        WorkloadPrompt(prompt=text, place=f"held-out text {number}")
        for number, text in enumerate(texts[:num_prompts], start=1)
    ]
    return Workload("held-out texts", tuple(prompts))


def _loopspec(text: str) -> dict[str, Any] | None:
    from foretoken.core.options import ComponentSpec

    if text == "none":
        return None
    return dict(ComponentSpec.parse(f"loopspec:{text}" if text else "loopspec").options)


def _measure(settings: SpeedSettings) -> dict[str, Any]:
    from foretoken.bench.speed.run import run_speed

    with progress_bar() as report:
        return run_speed(settings, sys.argv, report)


def _show(record: Mapping[str, Any], format_name: str) -> None:
    if format_name == options.OutputFormat.JSON:
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    from rich.console import Console

    from foretoken.bench.speed.report import print_report

    print_report(record, Console(width=None if is_terminal(sys.stdout) else bench.PIPE_WIDTH))


def _draw(record: Mapping[str, Any], folder: Path) -> list[Path]:
    from foretoken.bench.speed.plots import write_plots
    from foretoken.bench.speed.report import as_markdown

    report = folder / "report.md"
    report.write_text(as_markdown(record), encoding="utf-8")
    return [report, *write_plots(record, folder)]


bench_app = bench_serve.bench_app  # with this command in it

__all__ = ["EXAMPLES", "bench_app"]
