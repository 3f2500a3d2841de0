"""Loading models and texts of a comparison by name or file, with errors that say what to do.

`load_models`, `read_texts` and `read_prompts` serve the command line and the recipes. A repository's own code runs only
where the caller says so, and never the reference's; weights are read from safetensors.
"""

import csv
import json
import logging
import os
import shutil
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from klft.choices import BUILDERS, DTYPES, check_choice, check_there, is_text_file
from klft.hub import check_model_name, reachable, unreachable
from klft.loading import find_tokenizer, load_model, load_tokenizer
from klft.models import base_of, check_tokenizers
from klft.prompts import TEMPLATE_COLUMNS, Text
from klft.references import Reference, resolve_reference
from klft.writing import did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

NAMES = (str, os.PathLike)
LARGEST_CELL = 1 << 26  # characters of a CSV cell; the standard library stops at 2^17
COLUMNS = (("text",), ("prompt", "completion"), ("messages",))


def quiet() -> None:
    """No progress bars and no advice from the libraries that load. klft's own warnings come from one process only."""
    import transformers

    warnings.simplefilter("ignore", FutureWarning)
    if "datasets" in sys.modules:
        sys.modules["datasets"].disable_progress_bars()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # half a second to import, which lines do not need
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    if int(os.environ.get("RANK", 0)):
        logging.getLogger("klft").setLevel(logging.ERROR)


# --- models ----------------------------------------------------------------------------------------------------------


def load_models(
    model: str | os.PathLike | nn.Module,
    reference: "str | os.PathLike | nn.Module | Reference | None" = None,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    ref_revision: str | None = None,
) -> tuple[nn.Module, Reference, "PreTrainedTokenizerBase"]:
    """(policy, reference, tokenizer), each as it is or by folder or hub id; of a PEFT adapter, its base model with the
    adapter on.

    Without `reference` the policy has an adapter, and is compared with its own base. `device`, of what is loaded: by
    default "cuda" where there is one, else "cpu". `trust_remote_code` goes to the policy alone. `revision`,
    `ref_revision`: a branch, tag or commit on the hub. Raises ValueError, naming the model, for what cannot be loaded,
    for tokenizers that differ, for a revision of what is not on the hub, and for a dtype or device that is not there;
    TypeError for what is no causal language model.
    """
    check_choice("dtype", dtype, DTYPES)
    device = _device(device)
    reachable.cache_clear()
    tokenizers = [] if tokenizer is None else [tokenizer]
    options: dict[str, dict[str, Any]] = {"model": {"trust_remote_code": trust_remote_code}, "reference": {}}
    for role, given in (("model", model), ("reference", reference)):
        if isinstance(given, NAMES):
            check_model_name(given, role)
    for (role, own), given, at in zip(options.items(), (model, reference), (revision, ref_revision), strict=True):
        if at is not None and (not isinstance(given, NAMES) or Path(given).exists()):
            raise ValueError(f"revision {at!r}: the {role} is not loaded from the hub, which alone has revisions")
        own |= {} if at is None else {"revision": at}
        found = find_tokenizer(given, role, **own) if isinstance(given, NAMES) else None
        tokenizers += [] if found is None else [found]
    for other in tokenizers[1:]:
        check_tokenizers(tokenizers[0], other)
    if not tokenizers and isinstance(model, nn.Module):
        tokenizers = [load_tokenizer(base_of(model).config._name_or_path, "model")]
    if not tokenizers:
        raise ValueError(
            f"there is no tokenizer beside {' or '.join(str(g) for g in (model, reference) if g)}: save one there"
        )
    policy: Any = model
    if not isinstance(model, nn.Module):
        policy = load_model(model, dtype=dtype, **options["model"]).to(device)  # pyright: ignore
        if reference is None and not hasattr(policy, "disable_adapter"):
            raise ValueError(
                f"model {model} is not a PEFT adapter (it has no adapter_config.json): name a reference too"
            )
    if isinstance(reference, NAMES):
        loaded: Any = load_model(
            reference, "reference", dtype=dtype, **options["reference"]
        )  # without the policy's trust
        reference = loaded.to(device)
    return policy, resolve_reference(reference, policy), tokenizers[0]  # pyright: ignore


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}. Say cpu") from error
    return name


# --- texts -----------------------------------------------------------------------------------------------------------


class FileTexts(list[Text]):
    """Texts, and `places`: where each is from, such as "reviews.txt line 31"."""

    places: list[str]


def read_texts(
    name: str | os.PathLike, *, split: str = "train", column: str | None = None, max_texts: int | None = None
) -> FileTexts:
    """The first `max_texts` texts of a file or a dataset, in its order, each as `encode_texts` takes it.

    A .txt file has one text per line, in UTF-8. A .jsonl, .ndjson, .json, .parquet or .csv file (its cells stay text),
    or the `split` of a dataset by name or folder, has a column `column` (texts or messages), or else "text", "prompt"
    and "completion", or "messages".
    The list has `places` too, for the page: where each text is from.
    Raises ValueError that names the file and what is wrong: missing, empty, binary, without such a column.
    """
    if max_texts is not None and max_texts < 1:
        raise ValueError(f"max_texts must be at least 1, got {max_texts}")
    path = Path(name)
    lines = _has_lines(path, name)
    if lines and column:
        raise ValueError(f"{name} has lines and no columns: leave out column {column!r}")
    if lines:
        texts: list[Any] = _lines(path)[:max_texts]
    else:
        rows, choices = _rows(path, str(name), split), [(column,)] if column else COLUMNS
        columns = next((each for each in choices if set(each) <= set(rows.column_names)), None)
        if columns is None:
            wanted = ", or ".join(" and ".join(map(repr, each)) for each in choices)
            way_out = "Name one with `column`"
            if "conversations" in rows.column_names:
                way_out = "Conversations of `from` and `value` (ShareGPT) have to be messages of `role` and `content`"
            raise ValueError(f"{name} has no column {wanted}; it has {rows.column_names}. {way_out}")
        more = [name for name in TEMPLATE_COLUMNS if name in rows.column_names]
        rows = rows.select_columns([*columns, *more]).select(range(min(max_texts or len(rows), len(rows))))
        texts = list(rows)
        if len(columns) == 1:
            texts = [_cell(row, columns[0], f"{name}: row {i}") for i, row in enumerate(texts, 1)]
    if not texts:
        raise ValueError(f"{name} is empty: there is no text in it")
    found = FileTexts(texts)
    found.places = [f"{path.name} {'line' if lines else 'row'} {i}" for i in range(1, len(texts) + 1)]
    return found


def read_prompts(name: str, *, split: str = "train", config: str | None = None, column: str = "prompt") -> "Dataset":
    """The prompts of a file or a dataset, as a datasets.Dataset with a `prompt` column; the other columns with it.

    A .txt file has one prompt per line. Kinds of files and ValueErrors as for read_texts; `config` is a dataset's.
    `column` has the prompts, and is called `prompt` in what is returned, in the place of a column of that name.
    """
    from datasets import Dataset

    path = Path(name)
    lines = _has_lines(path, name)
    rows = Dataset.from_dict({"prompt": _lines(path)}) if lines else _rows(path, name, split, config)
    if column not in rows.column_names:
        guess = did_you_mean(column, rows.column_names)
        raise ValueError(f"{name} has no column {column!r}; it has {rows.column_names}{guess}")
    if not len(rows):
        raise ValueError(f"{name} is empty: there is no prompt in it")
    replaced = [] if column == "prompt" else [each for each in rows.column_names if each == "prompt"]
    return rows.remove_columns(replaced).rename_columns({column: "prompt"})


def _has_lines(path: Path, name: str | os.PathLike) -> bool:
    """Whether this is a file of lines. Raises ValueError for a file that is not there; a name may be a dataset's."""
    if is_text_file(path) or not isinstance(name, str):
        check_there(name)
    return path.suffix.lower() == ".txt" or (path.is_file() and path.suffix.lower() not in BUILDERS)


def _cell(row: dict[str, Any], column: str, where: str) -> Any:
    value = row.pop(column)
    if not isinstance(value, str | list | None):
        raise ValueError(f"{where}: {column!r} must be text or messages, got a {type(value).__name__}, {value!r:.80}")
    return {"messages": value} | row if isinstance(value, list) else value or ""


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if "\0" in text:
        raise ValueError(f"{path} is binary: it holds NUL bytes. Texts are one per line, in UTF-8")
    return text.removesuffix("\n").split("\n") if text else []


@contextmanager
def _cache_alone(name: str):
    """Datasets from the cache alone inside, where the hub does not answer."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    reachable.cache_clear()
    config.HF_HUB_OFFLINE = before or unreachable(name)
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _csv(path: Path) -> Any:
    """The cells as they are written: 007 is no number, NA no missing value."""
    from datasets import Dataset

    csv.field_size_limit(LARGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restval="", strict=True)
        rows = [{name: value for name, value in row.items() if name is not None} for row in reader]
    return Dataset.from_list(rows) if rows else Dataset.from_dict({name: [] for name in reader.fieldnames or ()})


def _wrong_line(path: Path) -> str:
    """Which line is the first that is no JSON object, and why; "" for none. Arrow counts within a block of rows."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f": line {number} is no JSON object"
            except ValueError as error:
                return f": line {number} is no JSON: {getattr(error, 'msg', error)}"
    return ""


@contextmanager
def _without_log_of_datasets():
    """Inside, the library does not log what it raises too."""
    log = logging.getLogger("datasets")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


def _rows(path: Path, name: str, split: str, config: str | None = None) -> Any:
    """A datasets.Dataset. Of a local file nothing stays in a cache."""
    from datasets import Dataset, load_dataset

    suffix = path.suffix.lower()
    try:
        if not path.is_file():
            with _cache_alone(name):
                return load_dataset(name, config, split=split)
        if suffix == ".csv":
            return _csv(path)
        with TemporaryDirectory() as cache, _without_log_of_datasets():
            plain = Path(cache) / f"texts{suffix}"  # a name with * or [ in it would be taken for a pattern
            try:
                plain.symlink_to(path.resolve())
            except OSError:  # Windows asks for a privilege
                shutil.copyfile(path, plain)
            read = getattr(Dataset, f"from_{BUILDERS[suffix]}")  # load_dataset would count the use, on a server
            rows: Any = read(str(plain), cache_dir=cache, keep_in_memory=True)
            rows.data.validate(full=True)  # UTF-8 too: else a row that is none fails without a name when it is read
            return rows
    except Exception as error:  # the library's own, of many kinds; the reason is in the last of the chain
        reason: BaseException = error
        while reason.__cause__ is not None:
            reason = reason.__cause__
        if isinstance(reason, StopIteration):
            raise ValueError(f"{name} is empty: there is no row in it") from error
        said = _wrong_line(path) if suffix in (".jsonl", ".ndjson") and path.is_file() else ""
        said = said or ": " + (" ".join(str(reason).split(" in row ")[0].split()) or repr(reason))
        raise ValueError(f"{name}{said}") from error
