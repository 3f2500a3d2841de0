"""Checkpoints and adapters that are not the model they say: refused by name, before anything is scored."""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from support import oracles, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from klft.diagnostics.loading import load_models
from klft.loading import find_tokenizer, load_model
from klft.ppo.inputs import load_policy
from klft.ppo.rewards import RewardModel
from klft.scoring import score_texts

DOWN = "model.layers.1.mlp.down_proj.weight"


def save(folder, model):
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def edit(folder, change, file="model.safetensors"):
    """Rewrite a folder's weights with what `change` makes of them."""
    tensors = load_file(f"{folder}/{file}")
    save_file({k: v.contiguous() for k, v in change(tensors).items()}, f"{folder}/{file}", metadata={"format": "pt"})
    return folder


FAULTS = [
    (lambda t: {k: v for k, v in t.items() if k != DOWN}, rf"it lacks 1 tensor\(s\) \({DOWN}\)"),
    (lambda t: t | {"lm_head.weight": torch.zeros(40, 16)}, r"lm_head.weight \[40, 16\], not \[32, 16\]"),
    (lambda t: t | {DOWN.replace("1", "2"): t[DOWN] + 1}, rf"no place for, 1 tensor\(s\) \({DOWN.replace('1', '2')}\)"),
    (lambda t: t | {DOWN.replace("weight", "bias"): torch.zeros(16)}, r"no place for, .*down_proj\.bias"),
]


@pytest.mark.parametrize(("change", "said"), FAULTS)
def test_a_checkpoint_that_is_not_the_whole_model_is_refused(change, said, tmp_path):
    good, bad = save(tmp_path / "good", tiny.llama(5)), edit(save(tmp_path / "bad", tiny.llama()), change)
    for given, role in (((bad, good), "model"), ((good, bad), "reference")):
        with pytest.raises(ValueError, match=f"{role} .*bad: the checkpoint is not a whole LlamaForCausalLM.*{said}"):
            load_models(*given)
    with pytest.raises(ValueError, match=f"model .*bad: .*{said}"):
        load_policy(bad)


def test_a_model_without_its_head_is_refused(tmp_path):
    backbone = save(tmp_path / "backbone", tiny.llama().model)
    with pytest.raises(ValueError, match=r"it lacks 1 tensor\(s\) \(lm_head.weight\)"):
        load_models(backbone, save(tmp_path / "good", tiny.llama(5)))


def test_a_judge_without_its_head_is_refused(tmp_path):
    folder = save(tmp_path / "judge", tiny.critic())
    assert RewardModel(folder).model is not None
    edit(folder, lambda t: {k: v for k, v in t.items() if not k.startswith("score")})
    with pytest.raises(ValueError, match=r"reward model .*judge: .*it lacks 1 tensor\(s\) \(score.weight\)"):
        RewardModel(folder)


def test_tied_heads_value_heads_and_old_buffers_are_no_fault(tmp_path):
    tied = save(tmp_path / "tied", tiny.llama(0, tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(f"{tied}/model.safetensors")
    more = {"v_head.weight": torch.zeros(1, 16), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    edit(tied, lambda t: t | more | {"model.layers.0.self_attn.masked_bias": torch.zeros(1)})
    policy, _, _ = load_models(tied, save(tmp_path / "gpt2", tiny.gpt2()))
    assert not tiny.unequal(tiny.parameters(policy), tiny.parameters(tiny.llama(0, tie_word_embeddings=True)))
    load_policy(tied)


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path):
    save(tmp_path / "base", tiny.llama())
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tiny.lora())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {f"x.{k}": v for k, v in t.items()}, r"no place for 8 tensor\(s\) \(x\.base.* finds no 8 tensor"),
        (lambda t: dict(list(t.items())[1:]), r"which finds no 1 tensor\(s\) \(base_model"),
        (
            lambda t: t | {"base_model.model.model.layers.7.q.lora_A.weight": torch.zeros(2, 16)},
            r"no place for 1 .*\.7\.",
        ),
        (lambda t: {k: torch.zeros(2, 9) if "lora_A" in k else v for k, v in t.items()}, "size mismatch"),
    ],
)
def test_an_adapter_of_another_model_is_refused(adapter, change, said):
    edit(adapter, change, "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"model .*adapter: .*{said}"):
        load_models(adapter)


def test_an_adapter_with_ppos_value_head_is_loaded(adapter):
    edit(adapter, lambda t: t | {"base_model.model.v_head.weight": torch.zeros(1, 16)}, "adapter_model.safetensors")
    policy, _, _ = load_models(adapter)
    assert all(p.eq(0.1).all() for name, p in policy.named_parameters() if "lora_B" in name)


# --- a hub that does not answer --------------------------------------------------------------------------------------

ASK = """
import time
from klft.diagnostics.loading import load_models, read_texts

slept, sleep = [], time.sleep  # as libraries do before they try again; what all else takes is the machine's affair
time.sleep = lambda seconds: (slept.append(seconds), sleep(seconds))
for ask in (lambda: load_models("some/model", "another/model"), lambda: read_texts("some/dataset")):
    slept.clear()
    try:
        ask()
    except ValueError as error:
        print(f"{sum(slept):.1f}", " ".join(str(error).split()))
"""


def test_a_hub_that_does_not_answer_is_not_asked_for_a_minute(tmp_path):
    given = {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
    }  # nobody listens there
    done = subprocess.run(
        [sys.executable, "-c", ASK], capture_output=True, text=True, env=os.environ | given, timeout=300, check=True
    )
    model, dataset = done.stdout.splitlines()
    said = "model some/model: there is no such folder, and the hub (http://127.0.0.1:9) does not answer: "
    assert model.split(" ", 1)[1].startswith(said)
    assert dataset.split(" ", 1)[1].startswith("some/dataset: ")
    assert max(float(line.split()[0]) for line in (model, dataset)) < 5, done.stdout


REFUSALS = {  # what the hub answers
    "gated/model": (403, "GatedRepo", "You are trying to access a gated repo"),
    "no/model": (401, "RepoNotFound", "is not a valid model identifier"),
}
REFUSED = """
import sys
from klft.cli import main
from klft.loading import load_model

for name in sys.argv[1:]:
    try:
        load_model(name, "reference")
    except ValueError as error:
        print(str(error))
    sys.argv = ["klft", "diff", name, "some/model", "--texts", "texts.txt"]
    try:
        main()
    except SystemExit as ended:
        print(ended.code)
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for these two models."""

    def do_HEAD(self):
        code, error, _ = next((r for name, r in REFUSALS.items() if name in self.path), (200, "", ""))
        self.send_response(code)
        for name, value in {"X-Error-Code": error, "X-Error-Message": error, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_models_that_the_hub_does_not_give_are_one_line_each(tmp_path):
    (tmp_path / "texts.txt").write_text("w1 w2\n")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        given = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path)}
        command, variables = [sys.executable, "-c", REFUSED, *REFUSALS], os.environ | given
        done = subprocess.run(
            command, capture_output=True, text=True, env=variables, timeout=300, check=True, cwd=tmp_path
        )
        hub.shutdown()
    outputs, errors = done.stdout.splitlines(), done.stderr.splitlines()
    assert (len(outputs), len(errors)) == (4, 2), done
    for (name, (_, _, said)), library, code, error in zip(
        REFUSALS.items(), outputs[::2], outputs[1::2], errors, strict=True
    ):
        assert code == "2"
        for line, role in ((library, "reference"), (error, "error: model")):
            assert line.startswith(f"{role} {name}: there is no such folder, and ")
            assert said in line


# --- vision-language models ------------------------------------------------------------------------------------------


def vision_language(seed):
    """A tiny Qwen2.5-VL: positions of three kinds per token, which of a text are all the same."""
    text = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.25,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = {"image_token_id": 29, "video_token_id": 28, "vision_start_token_id": 27, "vision_end_token_id": 26}
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)).eval()


def test_the_texts_of_a_vision_language_model_are_scored(tmp_path):
    models = {"policy": vision_language(0), "reference": vision_language(5)}
    policy, reference, tokenizer = load_models(*(save(tmp_path / name, model) for name, model in models.items()))
    texts = ["w1 w2 w3 w4 w5", "w6 w7"]
    (batch,) = score_texts(policy, reference, tokenizer, texts, batch_size=2, max_length=32)
    for row, text in enumerate(texts):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (model.double()(input_ids=ids).logits[0, :-1] for model in models.values())
        expected = oracles.reverse_kl(p, q)
        assert expected.min() > 0.05
        found = batch.scores.reverse_kl[row, 1 : ids.shape[1]].double()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    edit(tmp_path / "policy", lambda t: {k: v for k, v in t.items() if "layers.1.mlp.down_proj" not in k})
    with pytest.raises(ValueError, match=r"not a whole Qwen2_5_VLForConditionalGeneration: it lacks 1 tensor"):
        load_models(str(tmp_path / "policy"), str(tmp_path / "reference"))


# --- one loader for all ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.safetensors", "adapter_model.safetensors"])
def test_a_file_that_was_not_written_to_its_end_is_named(file, adapter, tmp_path):
    name = adapter if file.startswith("adapter") else save(tmp_path / "cut", tiny.llama())
    path = Path(name) / file
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"^model .*{name}: {file} is damaged, or was not written to its end") as said:
        load_model(name)
    assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match=f"{file} is damaged"):
        load_policy(name)


def test_an_adapter_in_a_pickle_is_not_read(adapter):
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    Path(f"{adapter}/adapter_model.safetensors").unlink()
    torch.save(tensors, f"{adapter}/adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter.*adapter_model\.safetensors"):
        load_model(adapter)


def test_ppo_trains_an_adapter_given_by_name_and_refuses_one_that_does_not_fit(adapter, tmp_path):
    run = tiny.trainer(tmp_path / "run", adapter)
    trained = [name for name, p in run.model.named_parameters() if p.requires_grad]
    assert any("lora_A" in name for name in trained)
    assert all("lora_" in name or "v_head" in name for name in trained)
    assert all(p.eq(0.1).all() for name, p in run.model.named_parameters() if "lora_B" in name)
    edit(adapter, lambda t: {f"x.{k}": v for k, v in t.items()}, "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"the adapter does not fit .*no place for 8 tensor"):
        tiny.trainer(tmp_path / "run", adapter)


@pytest.mark.parametrize("wanted", [{"classifier": True}, {}])
def test_a_judge_and_a_model_are_loaded_by_one_function(wanted, tmp_path):
    model = tiny.critic() if wanted else tiny.llama()
    loaded = load_model(save(tmp_path / "it", model), dtype=torch.float32, **wanted)
    assert type(loaded) is type(model)
    assert not loaded.training
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), model.parameters(), strict=True))


def test_a_tokenizer_that_is_not_there(tmp_path):
    tiny.llama().save_pretrained(tmp_path / "bare")
    assert find_tokenizer(tmp_path / "bare") is None
    with pytest.raises(ValueError, match="processing_class: there is no tokenizer beside"):
        tiny.trainer(tmp_path / "run", str(tmp_path / "bare"), given={"processing_class": None})
    with pytest.raises(ValueError, match="processing_class: the model was made here, and has no name"):
        tiny.trainer(tmp_path / "run", given={"processing_class": None})


@pytest.mark.parametrize("cached", [False, True])
def test_ppo_compares_the_tokenizers_of_policy_and_reference(cached, tmp_path, monkeypatch):
    other = tiny.tokenizer()
    state = json.loads(other.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["w1"], vocabulary["w2"] = vocabulary["w2"], vocabulary["w1"]
    other._tokenizer = other.backend_tokenizer.from_str(json.dumps(state))
    folder = tmp_path / "other"
    tiny.llama(5).save_pretrained(folder)
    reference = AutoModelForCausalLM.from_pretrained(folder)
    tiny.trainer(tmp_path / "run", given={"reference": reference})  # saved without a tokenizer: sizes are compared
    other.save_pretrained(folder)
    if cached:  # by the name that it has on the hub
        real = AutoTokenizer.from_pretrained
        monkeypatch.setattr(
            AutoTokenizer, "from_pretrained", lambda name, **o: real(folder if name == "some/model" else name, **o)
        )
        reference.config._name_or_path = "some/model"
    with pytest.raises(ValueError, match=r"tokenizers of policy and reference differ in 2 ids: 4 is 'w1' and 'w2'"):
        tiny.trainer(tmp_path / "run", given={"reference": reference})
