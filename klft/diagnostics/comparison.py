"""Two models on given texts: the table of tokens, eight lines that sum it up, and the files and views made of them.

    comparison = klft.compare(model, "my/base", ["Some text.", [{"role": "user", ...}, {"role": "assistant", ...}]])
    comparison                                  # in a notebook: the eight lines and the page
    comparison.save("tokens.parquet")           # or .html, .json, .md

`klft diff` is the same on a command line. All errors are standard errors clustered by text (CR1, see
klft.diagnostics.distributions): the tokens of one text are not independent, nor are the turns of one conversation.
"""

import functools
import html
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch import nn

from klft.choices import TURNS, check_choice, check_suffix, check_temperature, is_text_file, similar_name
from klft.diagnostics.distributions import TINY, Distribution, Tally, moments
from klft.diagnostics.loading import load_models, read_texts
from klft.diagnostics.measure import scored_table
from klft.diagnostics.records import Metadata, write_records
from klft.diagnostics.report import write_report
from klft.diagnostics.stats import Statistics, summary_lines
from klft.models import model_name
from klft.prompts import Text, encode_texts
from klft.references import Reference
from klft.scoring import ScoredTexts, score_texts
from klft.writing import atomic_write, visible

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALONE = 0.2  # share of the KL from which on the headline names the token that carries it
LARGEST = 0.05  # share of the tokens of which the headline says how much of the KL they carry
ROW = ("sample_id", "position", "token_id", "token", "reverse_kl", "forward_kl", "logp", "ref_logp")
IN_NOTEBOOKS: Any = {"sequences": 8, "tokens": 256}
DASH = "\N{EN DASH}"
QUOTES = re.compile(r" \(got |, got ")  # where an error begins to quote a text


class Estimate(NamedTuple):
    """A number and its standard error over texts; None for fewer than two of them."""

    value: float
    standard_error: float | None


@dataclass(repr=False)
class Comparison:
    """Two models on the same texts. `klft.compare` and `klft diff` make it.

    `table`: TokenRecord's columns, one row per token; `metadata`: of both models. `turns`: of conversations ("last" or
    "all", the assistant's turns that count, how many there are), else None.
    """

    table: pa.Table
    metadata: Metadata
    turns: tuple[str, int, int] | None = None

    @functools.cached_property
    def statistics(self) -> Statistics:
        """All statistics of the table."""
        return Statistics.of(self.table, self.metadata)

    @functools.cached_property
    def _scored(self) -> pa.Table:
        """The rows that count: scored, and no prompt."""
        scored = self.table["logp"].is_valid().to_numpy() & ~self.table["is_prompt"].to_numpy()
        return self.table.filter(pa.array(scored))

    def _values(self, name: str) -> np.ndarray:
        return self._scored[name].to_numpy().astype(np.float64)

    @functools.cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Means over tokens; values that are not finite are left out, and a quantity that has no other.

        reverse_kl, forward_kl: exact KL(model || reference) and KL(reference || model), nats per token; the second is
        the "KLD" of llama.cpp. same_top1: share of tokens at which both models' likeliest token is the same.
        delta_p_rms: root mean square of p_model(token) - p_reference(token), percentage points. perplexity_ratio: the
        model's over the reference's, exp(mean of ref_logp - logp), paired token by token.
        """
        logp, ref_logp = self._values("logp"), self._values("ref_logp")
        first, ref_first = (pc.list_element(self._scored[n], 0) for n in ("top_ids", "ref_top_ids"))  # pyright: ignore
        with np.errstate(invalid="ignore"):
            of = {name: self._values(name) for name in ("reverse_kl", "forward_kl")} | {
                "same_top1": pc.equal(first, ref_first).cast(pa.float64()).to_numpy(),  # pyright: ignore
                "delta_p_rms": 1e4 * (np.exp(logp) - np.exp(ref_logp)) ** 2,
                "perplexity_ratio": ref_logp - logp,
            }
        made = {name: estimate for name, values in of.items() if (estimate := self._mean(values)) is not None}
        # To first order, the error of f(mean) is |f'(mean)| times the mean's.
        mean, error = made["delta_p_rms"]
        made["delta_p_rms"] = Estimate(math.sqrt(mean), error and error / (2 * math.sqrt(mean)))
        if "perplexity_ratio" in made:
            mean, error = made["perplexity_ratio"]
            ratio = math.exp(min(mean, 700.0))
            made["perplexity_ratio"] = Estimate(ratio, error and error * ratio)
        return made

    def _mean(self, values: np.ndarray) -> Estimate | None:
        _, sequence = np.unique(self._scored["sample_id"].to_numpy(), return_inverse=True)
        finite = np.isfinite(values)
        of = Distribution(0.0, 0.0, np.array(moments(values, finite, sequence), np.float64), Tally.of(sequence[:0]))
        return Estimate(of.mean, of.standard_error) if finite.any() else None

    @property
    def mean_reverse_kl(self) -> float:
        """Over all tokens, nats: infinite or NaN where one token's is."""
        return float(self._values("reverse_kl").mean())

    @property
    def unbounded(self) -> int:
        """Tokens of which a KL is infinite or undefined; means leave them out."""
        return int((~np.isfinite(self._values("reverse_kl") + self._values("forward_kl"))).sum())

    @property
    def headline(self) -> str:
        """What the comparison comes to: how much of the reverse KL the LARGEST of the tokens carry.

        A token that carries a share of ALONE or more at all its places is named: often the template's, no one's words.
        """
        values = np.sort(self._values("reverse_kl"))
        values = values[np.isfinite(values)]
        total, largest = values.sum(), max(1, round(LARGEST * len(values)))
        said = f"{self.unbounded:,} of {len(self._scored):,} tokens have an infinite KL" if self.unbounded else ""
        if not said and max(values.max(), self._values("forward_kl").max()) <= TINY:
            return "the models agree on every token"
        if total > 0:
            share = f"{largest / len(values):.0%} of the tokens carry {values[-largest:].sum() / total:.0%} of the KL"
            (most,) = self.statistics.by_token(1)
            if most["reverse_share"] >= ALONE:
                share += f"; '{visible(most['token']):.40}' alone carries {most['reverse_share']:.0%} of it"
            said += f"{'; of the others, ' if said else ''}{share}".replace("%", " %")
        return said

    @property
    def summary(self) -> dict[str, str]:
        """The eight lines that `klft diff` prints, by label. +- is a standard error. Free of control characters."""
        stats, of = self.statistics, self.metadata
        said = {name: _with_error(estimate) for name, estimate in self.estimates.items()}
        said["same_top1"] = _with_error(self.estimates.get("same_top1"), 100)
        tails = {
            name: f"; median {q.percentile(50):.4g}, 99 % {q.percentile(99):.4g}, largest {q.high:.4g}"
            for name, q in stats.quantities.items()
        }
        perplexities = [DASH if p is None else f"{p:.4g}" for p in (stats.perplexity, stats.ref_perplexity)]
        counted = "; {1:,} of {2:,} assistant turns (turns: {0})".format(*self.turns) if self.turns else ""
        return {
            "Headline": self.headline,
            "Models": visible(f"{of.model} against {of.reference}, temperature {of.temperature:g}"),
            "Scored": f"{stats.tokens:,} tokens in {stats.sequences:,} sequences{counted}",
            "Mean reverse KL": f"{said.get('reverse_kl', DASH)} nats per token{tails.get('reverse', '')}",
            "Mean forward KL": f"{said.get('forward_kl', DASH)} nats per token{tails.get('forward', '')}",
            "Same top-1": f"{said['same_top1']} % of the tokens",
            "RMS of delta p": f"{said['delta_p_rms']} percentage points",
            "Perplexity": f"{perplexities[0]} / {perplexities[1]} = {said.get('perplexity_ratio', DASH)}",
        }

    @property
    def numbers(self) -> dict[str, Any]:
        """The same and more as numbers, as JSON takes them; None for what there is not. KLs in nats."""
        stats, of = self.statistics, self.metadata
        kls = {f"{name}_kl": q for name, q in stats.quantities.items()}
        made: dict[str, Any] = {name: estimate._asdict() for name, estimate in self.estimates.items()}
        for name in kls.keys() & made.keys():
            made[name] |= {f"p{p:g}": kls[name].percentile(p) for p in (50, 90, 95, 99, 99.9)} | {"max": kls[name].high}
        head = {name: getattr(of, name) for name in ("klft_version", "model", "reference", "temperature")}
        turns = self.turns and dict(zip(("setting", "counted", "total"), self.turns, strict=True))
        head |= {"headline": self.headline, "tokens": stats.tokens, "sequences": stats.sequences, "turns": turns}
        made |= {"unbounded": self.unbounded, "perplexity": stats.perplexity, "ref_perplexity": stats.ref_perplexity}
        return head | made | {"worst": [{name: row[name] for name in ROW} for row in stats.worst_tokens()[:8]]}

    def to_json(self) -> str:
        """`numbers` in JSON."""
        return json.dumps(self.numbers, indent=2, allow_nan=False)

    def to_markdown(self, full: bool = False) -> str:
        """`summary` as a table, for a comment or a model card; full: with `summary_lines`."""
        lines = self.summary
        rows = [*lines.items(), *(summary_lines(self.statistics) if full else ())][1:]
        table = "\n".join(f"| {_markdown(label)} | {_markdown(value)} |" for label, value in rows)
        return f"**{_markdown(lines['Headline'])}**\n\n| | |\n|---|---|\n{table}"

    def save(self, path: str | os.PathLike) -> Path:
        """Write to `path` the page (.html), the table (.parquet, which `klft report` reads), the numbers (.json) or the
        summary (.md); a file that appears whole or not at all. Raises ValueError for another suffix."""
        path = check_suffix(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".html":
            return write_report((self.table, self.metadata), path)
        if path.suffix == ".parquet":
            return write_records(self.table, path, self.metadata)
        with atomic_write(path) as file:
            file.write((self.to_json() if path.suffix == ".json" else self.to_markdown(full=True)).encode() + b"\n")
        return path

    def __str__(self) -> str:
        label, *rest = self.summary.items()
        return "\n".join([label[1], *(f"{name:17}{value}" for name, value in rest)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        with TemporaryDirectory() as folder:
            path = write_report((self.table, self.metadata), Path(folder) / "page.html", **IN_NOTEBOOKS)
            page = path.read_text("utf-8")
        # Without allow-same-origin: the page's script sees nothing of the notebook.
        frame = 'sandbox="allow-scripts" style="width:100%;height:640px;border:0"'
        return f'<pre>{html.escape(str(self))}</pre><iframe {frame} srcdoc="{html.escape(page)}"></iframe>'


def _with_error(estimate: Estimate | None, scale: float = 1.0) -> str:
    if estimate is None:
        return DASH
    value, error = (None if number is None else scale * number for number in estimate)
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text, quote=False))


def compare(
    model: nn.Module | str | os.PathLike,
    reference: Reference | nn.Module | str | os.PathLike | None,
    texts: Sequence[Text] | str | os.PathLike,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    turns: str = "last",
    max_length: int = 512,
    batch_size: int = 8,
    temperature: float = 1.0,
    top_k: int = 5,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    ref_revision: str | None = None,
    hide_text: bool = False,
    track: Callable[[Iterator[ScoredTexts], int], Iterable[ScoredTexts]] | None = None,
) -> Comparison:
    """Two causal language models with one vocabulary on texts: the exact KL of every token, both ways, in nats.

    The texts are given, not sampled from `model`: there is no sampled estimate (k1, k2, k3). `klft diff` is the same.

    Args:
        model, reference: a model, a folder or a hub id, see `load_models`; reference also a klft reference, or None:
            `model` without its adapter. dtype, device, trust_remote_code, revision, ref_revision: of what is loaded.
        texts, turns: strings, conversations, ..., or the file that holds them, see `read_texts`; and which of the
            assistant's turns count, see `encode_texts`.
        tokenizer: by default the one saved beside the models.
        max_length, batch_size, top_k: texts are cut to so many tokens, scored so many at a time, and so many of both
            models' likeliest tokens are kept; temperature divides both models' logits.
        hide_text: puts its id in the place of every token's text, in all that is made of the comparison.
        track: iterates over the batches of so many texts, to show progress.

    Raises what `read_texts`, `load_models`, `encode_texts` and `score_texts` raise; TypeError for texts that are one
    string, and no file's name.
    """
    check_temperature(temperature)
    check_choice("turns", turns, TURNS)
    with quoting_nothing(hide_text):
        texts = _texts(texts)
    policy, frozen, tokenizer = load_models(
        model, reference, tokenizer=tokenizer, dtype=dtype, device=device, trust_remote_code=trust_remote_code,
        revision=revision, ref_revision=ref_revision,
    )  # fmt: skip
    with quoting_nothing(hide_text):
        encoded = encode_texts(tokenizer, texts, max_length=max_length, turns=turns)
    options: Any = {"batch_size": batch_size, "max_length": max_length, "temperature": temperature, "top_k": top_k}
    batches = score_texts(policy, frozen, tokenizer, encoded, **options)
    table = scored_table(batches if track is None else track(batches, len(encoded.ids)), tokenizer)
    name = _label(model, revision)
    ref_name = f"{name} without its adapter" if reference is None else _label(reference, ref_revision)
    head = {"model": name, "reference": ref_name, "places": getattr(texts, "places", [])}
    metadata = Metadata.of(table, tokenizer, temperature=temperature, **head)
    if hide_text:
        table = _without_text(table, metadata)
    chats = encoded.turns.values()
    counts = sum(len(chat.counted) for chat in chats), sum(chat.total for chat in chats)
    return Comparison(table, metadata, (turns, *counts) if chats else None)


def _texts(given: Any) -> Sequence[Text]:
    """A list as it is; the texts of a file by its name."""
    if isinstance(given, os.PathLike) or (isinstance(given, str) and is_text_file(given)):
        return read_texts(given)
    if isinstance(given, (str, dict)):
        kind, near = type(given).__name__, "" if isinstance(given, dict) else similar_name(given)
        file = "to read a file, name it: there is no such file; else texts" if isinstance(given, str) else "texts"
        raise TypeError(f"{file} must be a list of texts or conversations, got a {kind}, {given!r:.40}{near}")
    return given


def _without_text(table: pa.Table, metadata: Metadata) -> pa.Table:
    """Ids in the place of the tokens' texts, also in the vocabulary of `metadata`."""
    metadata.vocabulary = {token_id: f"<id {token_id}>" for token_id in metadata.vocabulary}
    hidden = [f"<id {token_id}>" for token_id in table["token_id"].to_pylist()]
    at = table.column_names.index("token")
    return table.set_column(at, table.schema.field(at), pa.array(hidden))


def _label(given: Any, revision: str | None) -> str:
    named = isinstance(given, (str, os.PathLike))
    name = str(given) if named else model_name(given) if isinstance(given, nn.Module) else given.name
    return f"{name}@{revision}" if revision else name


@contextmanager
def quoting_nothing(hidden: bool) -> Iterator[None]:
    """Inside, if `hidden`, an error of `read_texts` or `encode_texts` loses what it quotes of a text."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if not hidden:
            raise
        raise (TypeError if isinstance(error, TypeError) else ValueError)(QUOTES.split(str(error))[0]) from None
