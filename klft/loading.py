"""Models and tokenizers by folder or hub id, whole or not at all: the one loader of library, command line and recipes.

A repository's own code runs only where the caller says `trust_remote_code=True`; weights, an adapter's too, are read
from safetensors. What is wrong comes as one ValueError that names the model and, where it is damaged, the file.
"""

import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from klft.hub import check_model_name, nowhere, unreachable, where_to
from klft.models import LOADING_INFO, VALUE_MODULES, check_loading, check_tokenizers, require_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges*", "spiece*", "*.model")


# --- the hub, and errors ---------------------------------------------------------------------------------------------


def _source(name: str) -> dict[str, Any]:
    """Options of from_pretrained: the cache alone where the hub does not answer."""
    return {"local_files_only": True} if unreachable(name) else {}


@contextmanager
def _explained(role: str, name: str):
    """A loader's errors, of many kinds, as one ValueError that names the model."""
    try:
        yield
    except Exception as error:
        if reason := nowhere(name, ask=True):
            raise ValueError(f"{role} {name}: {reason}") from error
        where = where_to(name)
        damaged = _damaged_file(name) if isinstance(error, SafetensorError) else None
        if damaged:
            where = f"{damaged} is damaged, or was not written to its end; copy or save it anew: "
        raise ValueError(f"{role} {name}: {where}{' '.join(str(error).split()) or repr(error)}") from error


def _damaged_file(name: str) -> str | None:
    """The first safetensors file of a folder that cannot be opened."""
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return path.name
    return None


# --- models ----------------------------------------------------------------------------------------------------------


def load_model(
    name: str | os.PathLike,
    role: str = "model",
    *,
    classifier: bool = False,
    trust_remote_code: bool = False,
    is_trainable: bool = False,
    **options: Any,
) -> "PreTrainedModel":
    """A causal language model by folder or hub id, in eval mode; of a PEFT adapter, its base model with the adapter on.

    Args:
        role: what errors call it.
        classifier: a sequence-classification model instead.
        is_trainable: of an adapter, whether its weights ask for gradients.
        options: more arguments of from_pretrained: dtype, device_map, ...; `revision` is that of `name`.

    Raises ValueError, naming the model, for what cannot be loaded, for tensors that are missing, unexpected or of
    another shape (tied heads excepted), for a damaged file (it is named); TypeError for what is no causal language
    model.
    """
    from transformers import AutoConfig

    name, hub = str(name), {key: options.pop(key) for key in ("revision",) if key in options}
    check_model_name(name, role)
    with _explained(role, name):
        adapter = _adapter_config(name, hub)
    base = name if adapter is None else adapter.base_model_name_or_path
    if adapter is not None:
        check_model_name(base, f"{role} {name}: its base model")
    of_base = _source(base) | (hub if adapter is None else {})
    with _explained(role, base):
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code, **of_base)
    auto = _auto_class(config, classifier, f"{role} {name}")
    options = {"use_safetensors": True} | options | LOADING_INFO
    with _explained(role, base):
        model, info = auto.from_pretrained(base, trust_remote_code=trust_remote_code, **options, **of_base)
    if not classifier:
        require_causal_lm(model, f"{role} {name}")
    check_loading(model, info, f"{role} {base}")
    if adapter is not None:
        with _explained(role, name):
            model = _adapted(model, name, adapter, is_trainable, _source(name) | hub)
    return model.eval()


def _auto_class(config: Any, classifier: bool, where: str) -> Any:
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    if classifier:
        return AutoModelForSequenceClassification
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(config, "auto_map"):
        return AutoModelForCausalLM
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        kind = (config.architectures or [type(config).__name__])[0]
        raise TypeError(f"{where}: expected a causal language model (AutoModelForCausalLM), got {kind}")
    return AutoModelForImageTextToText  # a vision-language model, of which texts are scored without images


def _adapter_config(name: str, hub: dict[str, Any]) -> Any:
    """The configuration of a PEFT adapter, or None for any other model."""
    from transformers.utils import find_adapter_config_file

    if find_adapter_config_file(name, **_source(name), **hub) is None:
        return None
    try:
        from peft import PeftConfig
    except ModuleNotFoundError as error:
        raise ValueError("it is a PEFT adapter: pip install klft[peft]") from error
    return PeftConfig.from_pretrained(name, **_source(name), **hub)


def _adapted(model: Any, name: str, config: Any, is_trainable: bool, source: dict[str, Any]) -> Any:
    """The model with a saved adapter on. Raises ValueError, naming tensors, where the adapter's are not the model's."""
    from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
    from transformers.utils import cached_file

    cached_file(name, "adapter_model.safetensors", **source)  # PEFT would go on to a pickle
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found missing adapter keys")  # said below, as an error
        adapted: Any = PeftModel.from_pretrained(model, name, config=config, is_trainable=is_trainable, **source)
    result = set_peft_model_state_dict(adapted, load_peft_weights(name, device="cpu", **source))
    marks = (getattr(adapted.base_model, "prefix", None) or "modules_to_save.default", "modules_to_save.default")
    missing = [key for key in result.missing_keys if any(mark in key for mark in marks) and not _shared(key)]
    unexpected = [key for key in result.unexpected_keys if not VALUE_MODULES & set(key.split("."))]
    if missing or unexpected:
        counts = {"has no place for": unexpected, "finds no": missing}
        said = [
            f"{verb} {len(keys)} tensor(s) ({', '.join(sorted(keys)[:2])})" for verb, keys in counts.items() if keys
        ]
        base = config.base_model_name_or_path
        raise ValueError(
            f"the adapter does not fit {base}, which {' and '.join(said)}: was it trained on another model?"
        )
    return adapted


def _shared(key: str) -> bool:
    """Whether an adapter's tensor repeats one that is saved elsewhere."""
    return any(name in key for name in ("vblora_vector_bank", "tinylora_v", "unilora_theta_d"))


# --- tokenizers ------------------------------------------------------------------------------------------------------


def find_tokenizer(
    name: str | os.PathLike, role: str = "model", *, trust_remote_code: bool = False, revision: str | None = None
) -> "PreTrainedTokenizerBase | None":
    """The tokenizer saved beside a model (an adapter's own, or else its base model's); None where there is none.

    Raises ValueError, naming the model, for one that cannot be loaded.
    """
    from transformers import AutoTokenizer

    name, hub = str(name), {} if revision is None else {"revision": revision}
    with _explained(role, name):
        adapter = _adapter_config(name, hub)
        for each in [name] if adapter is None else [name, adapter.base_model_name_or_path]:
            if _may_hold_tokenizer(each):
                source = _source(each) | (hub if each == name else {})
                return AutoTokenizer.from_pretrained(each, trust_remote_code=trust_remote_code, **source)
    return None


def _may_hold_tokenizer(name: str) -> bool:
    """False for a folder without the files: it would get the empty tokenizer that its model type's class makes."""
    return not Path(name).is_dir() or any(next(Path(name).glob(f), None) for f in TOKENIZER_FILES)


def load_tokenizer(
    name: str | os.PathLike, role: str = "model", *, trust_remote_code: bool = False, revision: str | None = None
) -> "PreTrainedTokenizerBase":
    """`find_tokenizer`; ValueError where there is none."""
    if not str(name):
        raise ValueError(f"{role}: the model was made here, and has no name to load a tokenizer by: pass one")
    tokenizer = find_tokenizer(name, role, trust_remote_code=trust_remote_code, revision=revision)
    if tokenizer is None:
        raise ValueError(f"{role}: there is no tokenizer beside {name}: save one there, or pass one")
    return tokenizer


def check_saved_tokenizer(tokenizer: "PreTrainedTokenizerBase", reference: str) -> None:
    """Raise ValueError where a reference (its name or path) was saved with a tokenizer whose ids mean something else.

    Nothing is said of one that was made here, saved without a tokenizer, or is not on this machine: the hub is not
    asked.
    """
    from transformers import AutoTokenizer

    if not _may_hold_tokenizer(reference):
        return
    try:
        its_own = AutoTokenizer.from_pretrained(reference, trust_remote_code=False, local_files_only=True)
    except Exception:  # the library's own, of many kinds
        return
    check_tokenizers(tokenizer, its_own)
