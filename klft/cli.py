"""The command line: `klft report`, `klft diff`, `klft doctor`, `klft completion`.

Models, statistics and pages are klft.diagnostics' business, imported when a command runs.
"""

import math
import os
import sys
import time
import webbrowser
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from klft._deprecated import moved
from klft._version import __version__
from klft.arguments import check_writable, one_line_errors
from klft.choices import DTYPES, TURNS, check_choice, check_suffix, check_temperature, check_there
from klft.hub import check_model_name
from klft.writing import escaping_output, print_error, visible

if TYPE_CHECKING:
    from klft.diagnostics.comparison import Comparison
    from klft.scoring import ScoredTexts

# --- klft report, klft diff ------------------------------------------------------------------------------------------

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Token-level KL between two language models: where in the text do they part? Add --debug for tracebacks.",
    epilog="Exit codes: 1 failed while running, 2 bad usage, 3 above --fail-above, 130 Ctrl-C.",
)  # fmt: skip
Page = Annotated[Path, typer.Option("--output", "-o", help="The page to write: one HTML file, opened from disk.")]
Opened = Annotated[bool, typer.Option("--open", help="Open the page in a browser.")]
Sequences = Annotated[int, typer.Option(min=0, help="Sequences to show in full: the worst, and random ones.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to show of each.")]
Seed = Annotated[int, typer.Option(help="For the random ones.")]
PROGRESS_SECONDS = 5.0  # between two lines of progress, where stderr is no terminal


def _version(asked: bool) -> None:
    if asked:
        print(f"klft {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of klft itself."""


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="A run's output_dir, a folder of Parquet files, or one file.")],
    output: Page = Path("report.html"),
    sequences: Sequences = 200,
    tokens: Tokens = 1000,
    seed: Seed = 0,
    opened: Opened = False,
) -> None:
    """Make the page of a run, or of a table of tokens."""
    from klft.diagnostics import write_report

    with one_line_errors():
        check_writable(output)
        write_report(source, output, sequences=sequences, tokens=tokens, seed=seed)
    _written(output, opened, sys.stdout)


@app.command()
def diff(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The policy: a folder or hub id, also an adapter's.")],
    reference: Annotated[str | None, typer.Argument(metavar="REF", help="The reference, likewise.")] = None,
    texts: Annotated[str | None, typer.Option(help=".txt (a text per line), .jsonl, .json, .parquet or .csv.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset's hub id or folder, instead of --texts.")] = None,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "train",
    column: Annotated[str | None, typer.Option(help="Default: text, or prompt and completion, or messages.")] = None,
    turns: Annotated[str, typer.Option(help="Assistant turns of a chat to score: last or all.")] = "last",
    output: Page = Path("diff.html"),
    sequences: Sequences = 200,
    save: Annotated[list[Path] | None, typer.Option(help=".parquet (tokens), .json, .md; or several of them.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers, and nothing else, on stdout.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="The summary, and nothing else, on stdout.")] = False,
    full: Annotated[bool, typer.Option("--full", help="All percentiles, and the tokens with the largest KL.")] = False,
    fail_above: Annotated[float | None, typer.Option(help="Exit 3 if the mean reverse KL is above (nats).")] = None,
    hide_text: Annotated[bool, typer.Option("--hide-text", help="Ids in place of texts, in all output.")] = False,
    adapter: Annotated[bool, typer.Option("--adapter", help="MODEL is a PEFT adapter; compare with its base.")] = False,
    max_texts: Annotated[int | None, typer.Option(min=1, help="Take the first so many texts.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Cut texts to so many tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    temperature: Annotated[float, typer.Option(help="Divides both models' logits.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest tokens of both models to keep.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 (hides KLs under 2e-4) or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Of MODEL's, not REF's.")] = False,
    revision: Annotated[str | None, typer.Option(help="MODEL's branch, tag or commit on the hub.")] = None,
    ref_revision: Annotated[str | None, typer.Option(help="REF's.")] = None,
    opened: Opened = False,
) -> None:
    """Compare two causal language models with one vocabulary on texts: exact KL of every token, both ways.

    The texts are given, not sampled from MODEL, so there is no sampled estimate (k1, k2, k3) of a KL. Reverse KL is
    KL(MODEL || REF), which --fail-above takes the mean of, in nats per token; forward KL is KL(REF || MODEL).
    """
    with one_line_errors():
        _check_names(reference, adapter, texts, dataset)  # all that needs no library, before any is imported
        _check_outputs(output, save or [], as_json and as_markdown, fail_above)
        _check_inputs(model, reference, texts, temperature, turns, dtype)
        from klft.diagnostics import write_report
        from klft.diagnostics.comparison import compare, quoting_nothing
        from klft.diagnostics.loading import quiet, read_texts

        quiet()
        with quoting_nothing(hide_text):
            given = read_texts(texts or dataset or "", split=split, column=column, max_texts=max_texts)
        comparison = compare(
            model, reference, given, turns=turns, max_length=max_length, batch_size=batch_size, temperature=temperature,
            top_k=top_k, dtype=dtype, device=device, trust_remote_code=trust_remote_code, revision=revision,
            ref_revision=ref_revision, hide_text=hide_text, track=_with_progress,
        )  # fmt: skip
    write_report((comparison.table, comparison.metadata), output, sequences=sequences)  # before anything is printed
    for path in save or []:
        comparison.save(path)
    if turns == "all" and comparison.turns is None:
        print("--turns all did nothing: none of the texts is a conversation", file=sys.stderr)
    _print(comparison, as_json, as_markdown, full)
    _written(output, opened, sys.stderr if as_json or as_markdown else sys.stdout)
    _check_limit(comparison.mean_reverse_kl, fail_above)


def _check_names(reference: str | None, adapter: bool, texts: str | None, dataset: str | None) -> None:
    if (reference is None) != adapter:
        raise ValueError("name two models, MODEL and REF; or one PEFT adapter with --adapter, without REF")
    if (texts is None) == (dataset is None):
        raise ValueError("name the texts to compare on: one of --texts FILE and --dataset NAME")


def _check_inputs(
    model: str, reference: str | None, texts: str | None, temperature: float, turns: str, dtype: str
) -> None:
    _check_models(model, reference)
    check_temperature(temperature)
    check_choice("turns", turns, TURNS)
    check_choice("dtype", dtype, DTYPES)
    if texts is not None:
        check_there(texts)
        if os.path.isdir(texts):
            raise ValueError(f"--texts {texts} is a folder: name a file in it, or say --dataset {texts}")


def _check_models(model: str | None, reference: str | None) -> None:
    for role, name in (("model", model), ("reference", reference)):
        if name is not None:
            check_model_name(name, role)


def _check_outputs(page: Path, save: list[Path], both: bool, fail_above: float | None) -> None:
    if both:
        raise ValueError("--json and --markdown both want stdout to themselves: have the other by --save FILE")
    if fail_above is not None and not 0 <= fail_above < math.inf:
        raise ValueError(f"--fail-above must be a finite number of nats, 0 or more, got {fail_above}")
    for path in (page, *map(check_suffix, save)):
        check_writable(path)


def _check_limit(mean: float, limit: float | None) -> None:
    if limit is not None and not mean <= limit:  # NaN is above too
        print_error(f"the mean reverse KL, {mean:.4g} nats per token, is above --fail-above {limit:g}")
        raise typer.Exit(3)


def _with_progress(batches: "Iterable[ScoredTexts]", count: int) -> "Iterator[ScoredTexts]":
    """The batches of `count` texts: a bar on a terminal, else a line every PROGRESS_SECONDS; on stderr."""
    from rich.console import Console
    from rich.progress import Progress

    console, done = Console(stderr=True), 0
    begun = said = time.monotonic()
    if not console.is_terminal:
        print(f"scoring {count:,} texts", file=sys.stderr, flush=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("scoring", total=count)
        try:
            for batch in batches:
                yield batch
                done += len(batch.sample_ids)
                bar.update(task, completed=done)
                now = time.monotonic()
                if not console.is_terminal and now - said >= PROGRESS_SECONDS:
                    said, left = now, (now - begun) / done * (count - done)
                    print(f"scored {done:,} of {count:,} texts, {left:.0f} s to go", file=sys.stderr, flush=True)
        except (TypeError, ValueError) as error:  # NaN weights, say: no bad usage
            raise RuntimeError(str(error)) from error


def _print(comparison: "Comparison", as_json: bool, as_markdown: bool, full: bool) -> None:
    from rich.console import Console

    from klft.diagnostics.terminal import summary_table, worst_table

    print(comparison.to_json() if as_json else comparison.to_markdown(full) if as_markdown else comparison)
    if full and not as_json and not as_markdown:
        Console().print(summary_table(comparison.statistics), worst_table(comparison.statistics))


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The policy: a folder or hub id.")] = None,
    reference: Annotated[str | None, typer.Option(help="The reference. Default: MODEL itself, a second time.")] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="MODEL is a PEFT adapter; the reference is its base.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Of MODEL's, not the reference's.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A list of checks: name, status, text.")] = False,
) -> None:
    """Check this machine, and a model with its reference, before you train. Exit code 1: there is a problem."""
    import json
    from dataclasses import asdict

    with one_line_errors():
        if model is None and (reference or adapter):
            raise ValueError("name MODEL too: klft doctor MODEL --reference REF, or klft doctor ADAPTER --adapter")
        if reference and adapter:
            raise ValueError("--adapter compares with the adapter's own base: leave --reference out")
        _check_models(model, reference)
        from klft import doctor

        checks = list(doctor.environment())
        if model is not None:
            checks += doctor.models(
                model, reference, dtype=dtype, device=device, trust_remote_code=trust_remote_code, adapter=adapter
            )
    print(json.dumps([asdict(check) for check in checks], indent=2) if as_json else doctor.render(checks))
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(1)


@app.command()
def completion(shell: Annotated[str, typer.Argument(metavar="bash|zsh")]) -> None:
    """Print a script that completes commands, options and file names: eval "$(klft completion bash)"."""
    with one_line_errors():
        if shell not in ("bash", "zsh"):
            raise ValueError(f"there is a completion for bash and for zsh, got {shell!r}")
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    options = {name: [o for p in command.params for o in p.opts if o[0] == "-"] for name, command in commands.items()}
    cases = "\n".join(f"    {name}) choices='{' '.join([*words, '--help'])}' ;;" for name, words in options.items())
    bash_in_zsh = "autoload -U +X compinit bashcompinit && compinit && bashcompinit\n" if shell == "zsh" else ""
    print(f"""{bash_in_zsh}_klft() {{
  local choices='{" ".join(options)} --help --version'
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  COMPREPLY=($(compgen -W "$choices" -- "${{COMP_WORDS[COMP_CWORD]}}"))
}}
complete -o default -F _klft klft""")


def _written(page: Path, opened: bool, file: TextIO) -> None:
    print(f"The page: {visible(str(page))}", file=file)
    if opened:
        webbrowser.open(page.resolve().as_uri())


def main() -> None:
    """The command line `klft`. Exit codes: 1 failed while running, 2 bad usage, 3 above `--fail-above`, 130 Ctrl-C;
    errors in one line."""
    stdout = sys.stdout
    with escaping_output():
        try:
            _run()
        finally:
            try:
                stdout.flush()
            except OSError:  # said already; what is left to print goes nowhere, or Python itself would fail with it
                os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())


def _run() -> None:
    code = 0
    try:
        given = [each for each in sys.argv[1:] if each != "--debug"]
        code = app(given or ["--help"], prog_name="klft", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as `| head` does
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        usage = hasattr(error, "format_message")  # click's, or of the copy of click that typer brings
        print_error(error.format_message() if usage else f"{type(error).__name__}: {error}")  # pyright: ignore
        sys.exit(2 if usage else 1)
    sys.exit(code)


__getattr__ = moved(__name__, dict.fromkeys(("check_yaml", "fits", "hints", "parse_arguments"), "klft.arguments"))

if __name__ == "__main__":
    main()
