"""Token tables: one row per token with the scores of both models, written whole or not at all.

`TokenRecord` documents the columns, `records_table` fills them from scores, `write_records` and `read_records` keep
them in Parquet, `TokenKLLog` does all of it inside a training loop. Scores come in ready.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from klft._version import __version__
from klft.diagnostics.stats import SEQUENCE, Statistics, scalars
from klft.diagnostics.vocabulary import token_classes, token_texts
from klft.models import tokenizer_hash
from klft.penalty import TokenKL
from klft.scores import TokenScores
from klft.writing import atomic_write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA_VERSION = 3
ADDED = {1: ("sampled", "weight"), 2: ("weight",)}  # to a file of an older version: what it lacks, null

Int32 = Annotated[int, pa.int32()]
Int64 = Annotated[int, pa.int64()]
Bool = Annotated[bool, pa.bool_()]
Float32 = Annotated[float, pa.float32()]
Int32s = Annotated[list[int], pa.list_(pa.int32())]
Float32s = Annotated[list[float], pa.list_(pa.float32())]


@dataclass
class TokenRecord:
    """One row of the table. In nats; None (null) where a run has no such number: no reference, no reward, no top lists.
    The KLs are the token's own, whatever its weight.

    (step, rank, sample_id) names a sequence, position orders its tokens.
    """

    step: Int64  # optimizer step
    rank: Int32  # process that scored the token
    sample_id: Int64  # sequence within the step and process, from 0: the page and errors call number 0 "text 1"
    position: Int32  # column of the token in the caller's [B, T] tensors, so padding and prompt count
    is_prompt: Bool  # given, not generated: shown, but left out of all statistics
    sampled: Bool | None  # from the policy that is scored: only then is the log-ratio an estimate of a KL (k1, k2, k3)
    token_id: Int32
    token: Annotated[str, pa.string()]  # see token_texts
    logp: Float32 | None  # log p(token) of the policy; null where it was not scored: nothing predicts a first token
    ref_logp: Float32 | None  # log q(token) of the reference
    reverse_kl: Float32 | None  # KL(p||q) over the vocabulary
    forward_kl: Float32 | None  # KL(q||p) over the vocabulary
    entropy: Float32 | None  # of p
    ref_entropy: Float32 | None  # of q
    reward: Float32 | None  # the token's, or its sequence's on every token
    advantage: Float32 | None  # the token's, or its sequence's on every token
    weight: Float32 | None  # of its KL in the penalty, as a token rule gave it; null without a rule, where all weigh 1
    top_ids: Int32s | None  # what p would rather have said, likeliest first; never an empty list
    top_p: Float32s | None  # with these probabilities
    ref_top_ids: Int32s | None  # what q would rather have said, likeliest first
    ref_top_p: Float32s | None  # with these probabilities


def _schema() -> pa.Schema:
    columns = []
    for name, hint in get_type_hints(TokenRecord, include_extras=True).items():
        of, *rest = get_args(hint)  # (Annotated, None) or the parts of an Annotated
        columns.append(pa.field(name, of.__metadata__[0] if NoneType in rest else rest[0], NoneType in rest))
    return pa.schema(columns)


SCHEMA = _schema()
SCORES: tuple[str, ...] = ("logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy")
LISTS: tuple[str, ...] = ("top_ids", "top_p", "ref_top_ids", "ref_top_p")


@dataclass
class Metadata:
    """Metadata of a table, common to its rows; JSON under the key "klft" of the Parquet file's metadata.

    `vocabulary` and `classes` hold text and class (one of TOKEN_CLASSES) of every id in token_id, top_ids and
    ref_top_ids, so that a reader needs no tokenizer. `total_sequences` is how many there were where the table holds
    only a part of them, else None. `places`: where the text of each sample_id is from, such as "reviews.txt line 31".
    """

    schema_version: int = SCHEMA_VERSION
    klft_version: str = __version__
    model: str = ""
    reference: str = ""
    temperature: float = 1.0
    tokenizer_hash: str = ""
    vocabulary: dict[int, str] = field(default_factory=dict)
    classes: dict[int, str] = field(default_factory=dict)
    total_sequences: int | None = None
    places: list[str] = field(default_factory=list)

    @staticmethod
    def of(table: pa.Table, tokenizer: "PreTrainedTokenizerBase", **common: Any) -> "Metadata":
        """The metadata of a table whose ids are this tokenizer's; `common`: model, reference, temperature, ..."""
        return Metadata(tokenizer_hash=tokenizer_hash(tokenizer), **common).naming(table, tokenizer)

    def naming(self, table: pa.Table, tokenizer: "PreTrainedTokenizerBase") -> "Metadata":
        """The same with the texts and classes of the ids in a table."""
        columns = [table["token_id"], *(table[name].combine_chunks().flatten() for name in LISTS[::2])]
        ids = sorted(set().union(*(column.unique().to_pylist() for column in columns)))
        texts, kinds = token_texts(tokenizer, ids), token_classes(tokenizer, ids)
        return replace(self, vocabulary=dict(zip(ids, texts, strict=True)), classes=dict(zip(ids, kinds, strict=True)))

    def to_json(self) -> str:
        classes: dict[str, list[int]] = {}
        for token_id, kind in self.classes.items():
            classes.setdefault(kind, []).append(token_id)
        return json.dumps(vars(self) | {"classes": classes})

    @staticmethod
    def from_json(text: str | bytes) -> "Metadata":
        """Entries that this version does not know are ignored."""
        state = {name: value for name, value in json.loads(text).items() if name in {f.name for f in fields(Metadata)}}
        state["vocabulary"] = {int(token_id): name for token_id, name in state.get("vocabulary", {}).items()}
        state["classes"] = {token_id: kind for kind, ids in state.get("classes", {}).items() for token_id in ids}
        return Metadata(**state)


# --- Parquet ---------------------------------------------------------------------------------------------------------


def write_records(table: pa.Table, path: str | os.PathLike, metadata: Metadata) -> Path:
    """Write a table with SCHEMA's columns to `path`, Parquet with zstd; the file appears whole or not at all.

    Raises ValueError where columns are missing or of another kind.
    """
    path = Path(path)
    table = _conform(table, "the table").replace_schema_metadata({b"klft": metadata.to_json().encode()})
    with atomic_write(path) as file:
        pq.write_table(table, file, compression="zstd")
    return path


def read_records(source: str | os.PathLike | Sequence[str | os.PathLike]) -> tuple[pa.Table, Metadata]:
    """Read and join tables: a file, a folder of files, a run's output_dir (its `kl/`), or a list of those.

    Raises ValueError, naming the file and the way out, for no file, a truncated or foreign file, missing columns,
    another schema version, and for files that do not belong together (other models, temperature or tokenizer).
    """
    sources = [source] if isinstance(source, (str, os.PathLike)) else source
    files = list(dict.fromkeys(file.resolve() for each in sources for file in _files(Path(each))))
    if not files:
        raise ValueError("no token table to read: the list is empty; name a Parquet file or the folder of a run")
    tables, metadata = zip(*map(_read, files), strict=True)
    joined = replace(metadata[0])
    for file, other in zip(files, metadata, strict=True):
        _check_same(metadata[0], other, f"{files[0]} and {file}")
        joined.vocabulary = joined.vocabulary | other.vocabulary
        joined.classes = joined.classes | other.classes
        joined.places = joined.places if other.places == joined.places else []
    totals = [other.total_sequences for other in metadata]
    if any(total is not None for total in totals):  # None: the table holds all of its sequences
        held = (len(table.group_by(list(SEQUENCE)).aggregate([])) for table in tables)
        joined.total_sequences = sum(n if total is None else total for total, n in zip(totals, held, strict=True))
    return pa.concat_tables(tables), joined


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    files = sorted((path / "kl").glob("*.parquet")) or sorted(path.glob("*.parquet"))
    if not files:
        lacks = f"holds no *.parquet, nor does {path / 'kl'}" if path.exists() else "does not exist"
        raise ValueError(
            f"{path} {lacks}; name a Parquet file, a folder of them, or the output_dir of a run with tokens: "
            "--kl_log_tokens N, or PPOConfig(kl_log_tokens=N), logs them in every N-th rollout"
        )
    return files


def _read(path: Path) -> tuple[pa.Table, Metadata]:
    try:
        with pq.ParquetFile(path) as file:
            text = (file.schema_arrow.metadata or {}).get(b"klft")
            if text is None:
                raise ValueError(f"{path} is not a token table: its metadata has no entry 'klft'; name one klft wrote")
            metadata = Metadata.from_json(text)
            if metadata.schema_version not in (*ADDED, SCHEMA_VERSION):
                raise ValueError(
                    f"{path} has schema version {metadata.schema_version}, klft {__version__} reads up to "
                    f"{SCHEMA_VERSION}: read it with the klft that wrote it, {metadata.klft_version}"
                )
            table = file.read()
            for name in ADDED.get(metadata.schema_version, ()):
                table = table.append_column(SCHEMA.field(name), pa.nulls(len(table), SCHEMA.field(name).type))
            return _conform(table, str(path)), replace(metadata, schema_version=SCHEMA_VERSION)
    except (pa.ArrowException, OSError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated or no Parquet file: {error}; delete it, or write it again") from error


def _conform(table: pa.Table, where: str) -> pa.Table:
    """SCHEMA's columns, and no others."""
    try:
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where} is not a token table: {error}; it needs {', '.join(SCHEMA.names)}") from error


def _check_same(a: Metadata, b: Metadata, where: str) -> None:
    for name in ("model", "reference", "temperature", "tokenizer_hash"):
        values = getattr(a, name), getattr(b, name)
        if values[0] != values[1]:
            raise ValueError(
                f"{where} do not belong together: {name} is {values[0]!r} in the first, {values[1]!r} in the second; "
                "keep each run's tables in a folder of their own"
            )


# --- from scores -----------------------------------------------------------------------------------------------------


def _array(values: Tensor, null: "np.ndarray | None") -> pa.Array:
    """Values [N], or [N, k] as lists, null where `null` [N] is True."""
    flat = (values.float() if values.is_floating_point() else values).flatten().numpy()
    if values.ndim == 1:
        return pa.array(flat, mask=null)
    ends = pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32())
    return pa.ListArray.from_arrays(ends, pa.array(flat), mask=None if null is None else pa.array(null))


def records_table(
    scores: TokenScores,
    token_ids: Tensor,
    mask: Tensor,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    step: int = 0,
    rank: int = 0,
    sample_ids: Sequence[int] | Tensor | None = None,
    is_prompt: Tensor | None = None,
    scored: Tensor | None = None,
    rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    weights: Tensor | None = None,
) -> pa.Table:
    """One row per True in `mask` [B, T], sequence after sequence, with SCHEMA's columns.

    `scored` [B, T]: False where a token, as a text's first, is only shown: null scores, in no statistic. Default: mask.
    `scores` is klft's TokenScores or anything with its attributes, [B, T] each and [B, T, k] for top_*; what is missing
    becomes null, but for `sampled`, then true of all but the prompt. `position` is the column index t. `sample_ids` [B]
    are 0 ... B-1 by default. `rewards`, `advantages`: [B, T], or [B] for a whole sequence; `weights` [B, T]: a rule's.
    Raises ValueError naming the tensor whose shape does not fit.
    """
    mask = mask.detach().bool().cpu()
    if mask.ndim != 2:
        raise ValueError(f"mask is {list(mask.shape)}, which is not [B, T]")
    row, position = mask.nonzero(as_tuple=True)
    unscored = torch.zeros(len(row), dtype=torch.bool) if scored is None else ~scored.detach().bool().cpu()[mask]

    def pick(name: str, given: Any, column: str = "") -> pa.Array:
        """The values [N] or [N, k] that the mask keeps of [B, T], [B, T, k] or, where that will do, [B]."""
        kind = SCHEMA.field(column or name).type
        if given is None or (name in LISTS and not given.shape[-1]):
            return pa.nulls(len(row), kind)
        given = torch.as_tensor(given).detach().cpu()
        by_sequence = name in ("sample_ids", "rewards", "advantages") and given.shape == mask.shape[:1]
        if not by_sequence and (given.shape[:2] != mask.shape or given.ndim != 2 + (name in LISTS)):
            raise ValueError(f"{name} is {list(given.shape)}, which does not fit the mask, {list(mask.shape)}")
        kept = given[row] if by_sequence else given[mask]
        return _array(kept, unscored.numpy() if name in (*SCORES, *LISTS, "weights") else None).cast(kind)

    prompt = torch.zeros_like(mask) if is_prompt is None else is_prompt.bool().cpu()
    columns = {name: pick(name, getattr(scores, name, None)) for name in (*SCORES, *LISTS)}
    distinct = pick("token_ids", token_ids, "token_id").dictionary_encode()
    texts = pa.array(token_texts(tokenizer, distinct.dictionary.to_pylist()), pa.string())
    columns |= {
        "step": pa.repeat(step, len(row)),
        "rank": pa.repeat(rank, len(row)),
        "sample_id": pick("sample_ids", range(len(mask)) if sample_ids is None else sample_ids, "sample_id"),
        "position": pa.array(position.numpy()),
        "is_prompt": pick("is_prompt", prompt),
        "sampled": pick("sampled", ~prompt if (given := getattr(scores, "sampled", None)) is None else given),
        "token_id": distinct.dictionary.take(distinct.indices),
        "token": texts.take(distinct.indices),
        "reward": pick("rewards", rewards, "reward"),
        "advantage": pick("advantages", advantages, "advantage"),
        "weight": pick("weights", weights, "weight"),
    }
    return _conform(pa.table(columns), "the table")


class TokenKLLog:
    """The table of a training loop: `folder/kl/tokens_{step:06d}-r{rank}.parquet`, one file per step and process.

    Example:
        penalty = KLPenalty(ref_model)
        with TokenKLLog("run", tokenizer, model="policy", reference="base") as log:
            logits = model(input_ids, attention_mask).logits
            log.add(penalty.measure(logits, input_ids, attention_mask, completion_mask), step=1)
            print(log.scalars())
        write_report("run", "run/report.html")

    `model`, `reference`, `temperature`, `total_sequences` (where only some are added): see Metadata. A file is written,
    atomically, when the step changes and at `close`; a step without a token leaves none. A file of the same step from
    an earlier run, of which this one is the continuation, is replaced.
    Raises ValueError where the folder already holds tables of other models, another temperature or tokenizer, and for a
    step that this log has already written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        model: str = "",
        reference: str = "",
        temperature: float = 1.0,
        total_sequences: int | None = None,
    ):
        self._folder = Path(folder) / "kl"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer = tokenizer
        self._metadata = Metadata(
            model=model, reference=reference, temperature=temperature, tokenizer_hash=tokenizer_hash(tokenizer),
            total_sequences=total_sequences,
        )  # fmt: skip
        for file in sorted(self._folder.glob("*.parquet"))[:1]:
            _check_same(_read(file)[1], self._metadata, f"{file} and this run")
        self._rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        self._written: set[int] = set()
        self._step, self._samples = 0, 0
        self._tables: list[pa.Table] = []  # of the step
        self._recent = Statistics()

    def add(
        self,
        scores: TokenScores | TokenKL,
        token_ids: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        step: int = 0,
        sample_ids: Tensor | Sequence[int] | None = None,
        is_prompt: Tensor | None = None,
        scored: Tensor | None = None,
        rewards: Tensor | None = None,
        advantages: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        """Take the whole sequences of a batch; shapes of all, of `rewards` and `advantages` too, as in `records_table`.

        `log.add(kl, step=step)` takes what KLPenalty.measure gave: its scores, token ids, mask and weights. With
        `mask=attention_mask` the rest of each text is shown as well, as its prompt (`is_prompt`), in no statistic.
        Without `sample_ids` the sequences are counted through from batch to batch of a step.
        Raises ValueError where token_ids or mask are neither given nor in a TokenKL.
        """
        if isinstance(scores, TokenKL):
            kl, scores = scores, scores.scores
            if mask is not None:  # more than what counts
                scored, is_prompt = kl.mask if scored is None else scored, ~kl.mask if is_prompt is None else is_prompt
            mask = kl.mask if mask is None else mask
            token_ids = kl.token_ids if token_ids is None else token_ids
            weights = kl.weight if weights is None else weights
        if token_ids is None or mask is None:
            raise ValueError(
                "TokenKLLog.add: token_ids and mask [B, T] are missing: pass them with the scores, or the TokenKL that "
                "KLPenalty.measure gives, which has both (measure_scores: where it was given token_ids)"
            )
        step = int(step)
        if step != self._step:
            self.close()
        if step in self._written:
            raise ValueError(
                f"step {step} is already in {self._folder}: add all batches of a step before the next step"
            )
        self._step = step
        if sample_ids is None:
            sample_ids = range(self._samples, self._samples + len(mask))
        self._samples += len(mask)
        table = records_table(
            scores, token_ids, mask, self._tokenizer, step=step, rank=self._rank, sample_ids=sample_ids,
            is_prompt=is_prompt, scored=scored, rewards=rewards, advantages=advantages, weights=weights,
        )  # fmt: skip
        self._tables.append(table)
        self._recent = self._recent.merge(Statistics.of(table, self._metadata.naming(table, self._tokenizer)))

    def statistics(self) -> Statistics:
        """Statistics of this process's tokens since the last call of this or `scalars`; merge them over ranks."""
        recent, self._recent = self._recent, Statistics()
        return recent

    def scalars(self) -> dict[str, float]:
        """The kl/... numbers of this process's tokens since the last call of `statistics` or `scalars`."""
        return scalars(self.statistics())

    def close(self) -> None:
        """Write the step that is pending."""
        tables, self._tables, self._samples = self._tables, [], 0
        if any(map(len, tables)):
            table = pa.concat_tables(tables)
            path = self._folder / f"tokens_{self._step:06d}-r{self._rank}.parquet"
            write_records(table, path, self._metadata.naming(table, self._tokenizer))
            self._written.add(self._step)

    def __enter__(self) -> "TokenKLLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
