"""The command line: `klft report`, `klft diff`, `klft doctor`; and one-line errors, which the recipes share.

Models, statistics and pages are klft.diagnostics' business, imported when a command runs. Of the recipes' arguments
TrlParser takes whatever YAML holds: a misspelt key's advice is for developers, the second of two equal keys wins, null
and lists pass for numbers. `parse_arguments` looks at the file first and says file, line, and what to do.
"""

import os
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from klft._deprecated import moved
from klft._version import __version__
from klft.arguments import check_writable, one_line_errors
from klft.writing import escaping_output, print_error, visible

# --- klft report, klft diff ------------------------------------------------------------------------------------------

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Token-level KL between two language models: where in the text do they part? Add --debug for tracebacks.",
)  # fmt: skip
Page = Annotated[Path, typer.Option("--output", "-o", help="The page to write: one HTML file, opened from disk.")]
Opened = Annotated[bool, typer.Option("--open", help="Open the page in a browser.")]
Sequences = Annotated[int, typer.Option(min=0, help="Sequences to show in full: the worst, and random ones.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens to show of each.")]
Seed = Annotated[int, typer.Option(help="For the random ones.")]


@app.command()
def report(
    source: Annotated[Path, typer.Argument(help="A run's output_dir, a folder of Parquet files, or one file.")],
    output: Page = Path("report.html"),
    sequences: Sequences = 32,
    tokens: Tokens = 512,
    seed: Seed = 0,
    opened: Opened = False,
) -> None:
    """Make the page of a run, or of a table of tokens."""
    from klft.diagnostics import write_report

    with one_line_errors():
        check_writable(output)
        write_report(source, output, sequences=sequences, tokens=tokens, seed=seed)
    _written(output, opened)


@app.command()
def diff(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The policy: a folder or hub id, also an adapter's.")],
    reference: Annotated[str | None, typer.Argument(metavar="REF", help="The reference, likewise.")] = None,
    texts: Annotated[str | None, typer.Option(help=".txt (a text per line), .jsonl, .json, .parquet or .csv.")] = None,
    dataset: Annotated[str | None, typer.Option(help="A dataset's hub id or folder, instead of --texts.")] = None,
    split: Annotated[str, typer.Option(help="Of the dataset.")] = "train",
    column: Annotated[str | None, typer.Option(help="Default: text, or prompt and completion, or messages.")] = None,
    output: Page = Path("diff.html"),
    adapter: Annotated[bool, typer.Option("--adapter", help="MODEL is a PEFT adapter; compare with its base.")] = False,
    max_texts: Annotated[int | None, typer.Option(min=1, help="Take the first so many texts.")] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Cut texts to so many tokens.")] = 512,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    temperature: Annotated[float, typer.Option(help="Divides both models' logits.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="Likeliest tokens of both models to keep.")] = 5,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 (hides KLs under 2e-4) or float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="Default: cuda where there is one, else cpu.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Of MODEL's, not REF's.")] = False,
    opened: Opened = False,
) -> None:
    """Compare two causal language models with one vocabulary on texts: exact KL of every token, both ways.

    The texts are given, not sampled from MODEL, so there is no sampled estimate (k1, k2, k3) of a KL.
    """
    from rich.console import Console
    from rich.progress import track

    from klft.diagnostics import Metadata, Statistics, write_report
    from klft.diagnostics.loading import load_models, quiet, read_texts
    from klft.diagnostics.measure import scored_table
    from klft.diagnostics.terminal import summary_table, worst_table
    from klft.prompts import encode_texts
    from klft.scores import check_temperature
    from klft.scoring import score_texts

    with one_line_errors():
        if (reference is None) != adapter:
            raise ValueError("name two models, MODEL and REF; or one PEFT adapter with --adapter, without REF")
        if (texts is None) == (dataset is None):
            raise ValueError("name the texts to compare on: one of --texts FILE and --dataset NAME")
        check_temperature(temperature)
        check_writable(output)
        quiet()
        given = read_texts(texts or dataset or "", split=split, column=column, max_texts=max_texts)
        policy, frozen, tokenizer = load_models(
            model, reference, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        encoded = encode_texts(tokenizer, given, max_length=max_length)
        options = {"batch_size": batch_size, "max_length": max_length, "temperature": temperature, "top_k": top_k}
        batches = score_texts(policy, frozen, tokenizer, encoded, **options)
    count, console = -(-len(encoded.ids) // batch_size), Console(stderr=True)
    shown = track(batches, "scoring", count, console=console, transient=True, disable=not console.is_terminal)
    table = scored_table(shown, tokenizer)
    names = {"model": model, "reference": reference or f"{model} without its adapter"}
    metadata = Metadata.of(table, tokenizer, temperature=temperature, **names)
    statistics = Statistics.of(table, metadata)
    write_report((table, metadata), output)  # before anything is printed
    title = f"{names['model']} against {names['reference']}"
    Console().print(summary_table(statistics, title), worst_table(statistics))
    _written(output, opened)


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

    from klft import doctor

    with one_line_errors():
        if model is None and (reference or adapter):
            raise ValueError("name MODEL too: klft doctor MODEL --reference REF, or klft doctor ADAPTER --adapter")
        if reference and adapter:
            raise ValueError("--adapter compares with the adapter's own base: leave --reference out")
        checks = list(doctor.environment())
        if model is not None:
            checks += doctor.models(
                model, reference, dtype=dtype, device=device, trust_remote_code=trust_remote_code, adapter=adapter
            )
    print(json.dumps([asdict(check) for check in checks], indent=2) if as_json else doctor.render(checks))
    if any(check.status == "problem" for check in checks):
        raise typer.Exit(1)


def _written(page: Path, opened: bool) -> None:
    print(f"The page: {visible(str(page))}")
    if opened:
        webbrowser.open(page.resolve().as_uri())


def main() -> None:
    """The command line `klft`. Exit codes: 1 failed while running, 2 bad usage, 130 Ctrl-C; errors in one line."""
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
        if sys.argv[1:] == ["--version"]:
            print(f"klft {__version__}")
        else:
            code = app([each for each in sys.argv[1:] if each != "--debug"], prog_name="klft", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever reads has seen enough, as `| head` does
        sys.exit(1)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        usage = hasattr(error, "format_message")  # click's, or of the copy of click that typer brings
        text = error.format_message() if usage else f"{type(error).__name__}: {error}"  # pyright: ignore
        if type(error).__name__ == "NoArgsIsHelpError":
            print(text, file=sys.stderr)
            sys.exit(2)
        print_error(text)
        sys.exit(2 if usage else 1)
    sys.exit(code)


__getattr__ = moved(__name__, dict.fromkeys(("check_yaml", "fits", "hints", "parse_arguments"), "klft.arguments"))

if __name__ == "__main__":
    main()
