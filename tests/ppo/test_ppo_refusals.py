"""Policies, references and judges that would train to the end with healthy logs: wrong numbers, or no training."""

import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig
from support import tiny
from transformers import AutoModelForCausalLM, GenerationConfig, OPTConfig, OPTForCausalLM

import klft
from klft.ppo import RewardModel
from klft.ppo.inputs import check_first_ratio, load_policy
from klft.references import AdapterReference, FrozenReference


def lora(**changed):
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changed)


def kl_of(model, reference):
    """The largest KL per token of the model against what klft takes for its base."""
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        logits = model.eval()(ids).logits
    return klft.reverse_kl(logits, reference.logits(ids, torch.ones_like(ids))).max().item()


# ---- the reference that an adapter's policy is given ----------------------------------------------------------------


@pytest.mark.parametrize("changed", [{"bias": "all"}, {"bias": "lora_only"}, {"init_lora_weights": "pissa"},
                                     {"init_lora_weights": "olora"}], ids=str)  # fmt: skip
def test_an_adapter_that_moves_the_base_gets_a_frozen_copy(changed, tmp_path):
    base = tiny.llama(attention_bias=True)
    run = tiny.trainer(tmp_path, copy.deepcopy(base), given={"peft_config": lora(**changed)}, max_steps=2, kl_coef=0.0)
    reference = run.penalty.reference
    assert isinstance(reference, FrozenReference)
    run.train()
    assert kl_of(base, reference) == 0


def corda(base):
    """As peft's preprocess_corda leaves the layers (which needs a package that is not here): here with W's own SVD."""
    for layer in base.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
            u, s, v = torch.linalg.svd(linear.weight.detach())
            linear.eigens = SimpleNamespace(U_WC=u[:, :2], S_WC=s[:2], V_WC=v[:2].T)
    return lora(init_lora_weights="corda", corda_config=CordaConfig())


def loftq(base):
    config = lora()  # the configuration asks for scipy itself
    config.init_lora_weights, config.loftq_config = "loftq", {"loftq_bits": 4, "loftq_iter": 1}
    return config


def rounded(weight, num_bits, reduced_rank, **_):
    """What LoftQ does to a weight, without bitsandbytes: (rounded to few bits, A, B)."""
    step = 2 * weight.abs().max() / 2**num_bits
    rows, columns = weight.shape
    return (weight / step).round() * step, torch.zeros(reduced_rank, columns), torch.zeros(rows, reduced_rank)


@pytest.mark.parametrize("prepare", [corda, loftq])
def test_an_adapter_that_rewrites_the_base_gets_a_copy_made_before(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", rounded)
    base = tiny.llama()
    initial = copy.deepcopy(base)
    run = tiny.trainer(tmp_path, base, given={"peft_config": prepare(base)}, max_steps=2, kl_coef=0.0)
    moved = run.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    assert (moved - initial.model.layers[0].self_attn.q_proj.weight).abs().max() > 1e-2
    assert isinstance(run.penalty.reference, FrozenReference)
    run.train()
    assert kl_of(initial, run.penalty.reference) == 0
    kind = prepare.__name__
    with pytest.raises(ValueError, match=f"'{kind}' rewrites the base weights.*second time"):
        AdapterReference(run.model)


@pytest.mark.filterwarnings("ignore:`init_lora_weights` is 'corda'")
def test_corda_without_its_preparation_is_named(tmp_path):
    with pytest.raises(ValueError, match="preprocess_corda"):
        tiny.trainer(tmp_path, given={"peft_config": lora(init_lora_weights="corda")})


def test_an_ordinary_adapter_is_its_own_reference(tmp_path):
    base = tiny.llama()
    run = tiny.trainer(tmp_path, copy.deepcopy(base), given={"peft_config": lora()}, max_steps=2)
    assert isinstance(run.penalty.reference, AdapterReference)
    run.train()
    assert kl_of(base, run.penalty.reference) < 1e-6


@pytest.mark.parametrize("initial", ["pissa", "olora"])
def test_a_base_that_its_adapter_rewrote_is_no_reference(initial):
    with pytest.raises(ValueError, match=f"{initial}.*rewrites the base weights.*second time"):
        AdapterReference(get_peft_model(tiny.llama(), lora(init_lora_weights=initial)))


def test_a_tokenizer_wider_than_the_head_with_an_adapter(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<a>", "<b>"])
    with pytest.raises(ValueError, match="head has 32 rows, but the tokenizer has 34"):
        tiny.trainer(tmp_path, given={"peft_config": lora(), "processing_class": tokenizer})


# ---- policies that cannot move --------------------------------------------------------------------------------------


def test_a_policy_without_a_trainable_weight(tmp_path):
    with pytest.raises(ValueError, match=r"no weight of the policy is trainable.*requires_grad_"):
        tiny.trainer(tmp_path, tiny.llama().requires_grad_(False))
    get_peft_model(tiny.llama(), lora()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="is_trainable=True"):
        tiny.trainer(tmp_path, PeftModel.from_pretrained(tiny.llama(), str(tmp_path / "adapter")))


@pytest.mark.parametrize("peft", [False, True])
def test_an_optimizer_made_before_is_given_what_klft_added(peft, tmp_path):
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    given = {"optimizers": (optimizer, None)} | ({"peft_config": lora()} if peft else {})
    run = tiny.trainer(tmp_path, model, given=given, max_steps=2)
    before = tiny.parameters(run.model)
    run.train()
    moved = tiny.unequal(before, tiny.parameters(run.model))
    assert any("v_head" in name for name in moved)
    assert any(("lora_" if peft else "q_proj") in name for name in moved)


def test_optimizers_that_could_not_move_the_policy(tmp_path):
    model = tiny.llama()
    others = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    with pytest.raises(ValueError, match="no trainable weight of the policy"):
        tiny.trainer(tmp_path, model, given={"optimizers": (others, None)})
    model = tiny.llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    with pytest.raises(ValueError, match=r"optimizers=\(optimizer, None\)"):
        tiny.trainer(tmp_path, model, given={"optimizers": (optimizer, schedule)})


def test_a_policy_that_no_gradient_reaches(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=2)
    run.model.get_output_embeddings().weight.requires_grad_(False)

    def detach(_module, _args, output):
        output.last_hidden_state = output.last_hidden_state.detach()
        return output

    run.model.model.register_forward_hook(detach)
    with pytest.raises(RuntimeError, match="no gradient reaches the policy"):
        run.train()


# ---- 16 bit ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_given_by_name_is_trained_in_fp32(tmp_path):
    tiny.llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    assert load_policy(name).dtype == torch.float32
    assert load_policy(name, {"dtype": torch.bfloat16}).dtype == torch.bfloat16
    run = tiny.trainer(tmp_path / "out", name, model_init_kwargs='{"dtype": "bfloat16"}')
    assert run.model.dtype == torch.bfloat16
    assert run.model.v_head.weight.dtype == torch.float32
    with pytest.raises(ValueError, match="given by name"):
        tiny.trainer(tmp_path / "out", tiny.llama(), model_init_kwargs={"dtype": "float32"})


def test_sixteen_bit_weights_that_are_trained_are_warned_of(tmp_path, caplog):
    logging.getLogger("klft").addHandler(caplog.handler)
    try:
        run = tiny.trainer(tmp_path, tiny.llama().to(torch.bfloat16), max_steps=1, bf16=True)
    finally:
        logging.getLogger("klft").removeHandler(caplog.handler)
    assert any("16 bits" in r.getMessage() for r in caplog.records)
    run.train()
    assert tiny.step_logs(run)[0]["ppo/ratio/mean"] == pytest.approx(1, abs=0.05)


# ---- one object in two roles ----------------------------------------------------------------------------------------


def judge():
    return tiny.critic()


@pytest.mark.parametrize("wrap", [False, True])
def test_the_judge_is_no_value_model(wrap, tmp_path):
    model = judge()
    model.config._name_or_path = "judge"
    reward = RewardModel(model, tiny.tokenizer())
    with pytest.raises(ValueError, match="reward model 'judge' shares the value model's memory"):
        tiny.trainer(tmp_path, reward=[reward] if wrap else reward, given={"value_model": model})


def test_each_of_two_judges_of_one_name_is_looked_at(tmp_path):
    shared = judge()
    rewards = [RewardModel(shared, tiny.tokenizer()), RewardModel(judge(), tiny.tokenizer())]
    with pytest.raises(ValueError, match="shares the value model's memory"):
        tiny.trainer(tmp_path, reward=rewards, given={"value_model": shared})


@pytest.mark.parametrize("other", ["policy", "reference"])
def test_a_value_model_on_somebody_elses_backbone(other, tmp_path):
    policy, reference, value = tiny.llama(), tiny.llama(), judge()
    value.model = {"policy": policy, "reference": reference}[other].model
    with pytest.raises(ValueError, match="shares the policy's memory"):
        tiny.trainer(tmp_path, policy, given={"value_model": value, "reference": reference})


# ---- noise ----------------------------------------------------------------------------------------------------------


def test_layer_drop_is_off_in_the_loss_too(tmp_path):
    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=32, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=64, layerdrop=0.5, dropout=0.5, init_std=0.3,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    for checkpointing in (False, True):
        run = tiny.trainer(tmp_path, copy.deepcopy(model), max_steps=1, gradient_checkpointing=checkpointing)
        run.train()
        assert tiny.step_logs(run)[0]["ppo/ratio/mean"] == pytest.approx(1, abs=1e-5)


def test_noise_that_would_move_the_first_ratio_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neftune_noise_alpha.*first ratio"):
        tiny.config(tmp_path, neftune_noise_alpha=5.0)
    check_first_ratio(torch.full((8,), 1e-3))
    with pytest.raises(RuntimeError, match=r"first ratio is not 1.*by \d+%"):
        check_first_ratio(torch.randn(8))
    with pytest.raises(RuntimeError, match="first ratio is not 1"):
        check_first_ratio(torch.full((8,), torch.nan))


def test_a_policy_whose_forward_is_random_is_stopped(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=1)
    run.model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0] + torch.randn_like(args[0]),))
    with pytest.raises(RuntimeError, match="first ratio is not 1"):
        run.train()


# ---- resuming -------------------------------------------------------------------------------------------------------


def test_a_path_names_the_checkpoint_it_names(tmp_path):
    run = tiny.trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    again = tiny.trainer(tmp_path, max_steps=4, save_strategy="no")
    again.train(resume_from_checkpoint=Path(tmp_path) / "checkpoint-2")
    assert [row["step"] for row in tiny.step_logs(again)][-2:] == [3, 4]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4") is not None


def test_a_checkpoint_of_the_model_alone_is_not_continued(tmp_path):
    tiny.trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, save_only_model=True).train()
    again = tiny.trainer(tmp_path, max_steps=4)
    for wanted in (True, tmp_path / "checkpoint-2"):
        with pytest.raises(ValueError, match="holds the model only"):
            again.train(resume_from_checkpoint=wanted)


def test_what_the_base_generates_by_stays_as_it_was(tmp_path):
    model = tiny.llama()
    model.generation_config.eos_token_id, model.generation_config.temperature = [2, 9], 0.6
    model.generation_config.do_sample = True
    run = tiny.trainer(tmp_path, model, given={"peft_config": lora()}, max_steps=1)
    run.train()
    run.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    saved = GenerationConfig.from_pretrained(tmp_path / "merged")
    assert (saved.eos_token_id, saved.temperature) == ([2, 9], 0.6)


# ---- what is uploaded -----------------------------------------------------------------------------------------------


class Hub:
    """Instead of the hub: which files were uploaded, and where to."""

    def __init__(self):
        self.uploads = []

    def upload_folder(self, *, folder_path, ignore_patterns=None, path_in_repo=None, **_):
        files = [p.relative_to(folder_path).as_posix() for p in Path(folder_path).rglob("*") if p.is_file()]
        self.uploads.append((path_in_repo, sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns))))
        return SimpleNamespace(done=lambda: True, is_done=lambda: True, result=lambda: None)


@pytest.mark.parametrize(("strategy", "places"), [
    ("end", set()), ("every_save", {None}), ("checkpoint", {None, "last-checkpoint"}),
    ("all_checkpoints", {None, "checkpoint-1", "checkpoint-2"}),
])  # fmt: skip
def test_the_hub_gets_models_and_no_texts(strategy, places, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr(klft.PPOTrainer, "init_hf_repo", lambda self, **_: setattr(self, "hub_model_id", "me/model"))
    monkeypatch.setattr(klft.PPOTrainer, "create_model_card", lambda self, **_: None)
    run = tiny.trainer(
        tmp_path, max_steps=2, save_strategy="steps", save_steps=1, push_to_hub=True, hub_strategy=strategy,
        log_completions=True, kl_log_tokens=1,
    )  # fmt: skip
    run.train()
    assert {place for place, _ in hub.uploads} == places
    run.push_to_hub()
    assert hub.uploads[-1][0] is None
    files = [file for _, uploaded in hub.uploads for file in uploaded]
    assert "model.safetensors" in files
    assert not [file for file in files if file.startswith(("completions/", "kl/"))]
    assert list(tmp_path.glob("completions/*.parquet")), "they are there, on this disk"


def test_a_timeout_that_transformers_ignores_on_a_cpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"ddp_timeout=12 would be ignored on a CPU, .*reward_timeout"):
        tiny.config(tmp_path, ddp_timeout=12)


def test_processes_that_do_not_see_each_other_are_refused(tmp_path, monkeypatch):
    """Here something made accelerate's state before the launcher's variables were there, and it is to be used."""
    assert PartialState(cpu=True).num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = r"^PPOConfig: 2 processes were launched, but this one sees a world of 1: .* Set ACCELERATE_USE_CPU=true on a"
    with pytest.raises(ValueError, match=said):
        tiny.config(tmp_path, accelerator_config={"use_configured_state": True})
