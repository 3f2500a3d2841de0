"""Exact KL of real models over two processes (gloo): the gradients of all parameters are those of one process.

Tensor parallel by transformers, FSDP2 by torch, DDP by accelerate. Run as a script, this file is what each of the
processes does: all cases in one process group, results as files. One process, in the test, uses dense logits.
"""

import sys
import warnings
from pathlib import Path

import conftest  # noqa: F401 - also for the script: no hub, few threads
import pytest
import torch
import transformers
from support.processes import launch

from klft.fused import fused_token_loss, linear_divergence
from klft.heads import LMHead
from klft.models import base_of, hidden_states
from klft.sharding import VocabShard

WORLD = 2
ROWS, LENGTH = 4, 5
# Real tokens of each sequence: with a process for every two, one has 9 tokens and the other 5.
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]], dtype=torch.bool)
PROMPT = torch.tensor([[5, 9, 11], [7, 3, 4]])

LIKE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "initializer_range": 0.25,
    "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": ("Llama", 129, LIKE),
    "qwen3": ("Qwen3", 130, LIKE),
    "gemma2": ("Gemma2", 127, LIKE | {"final_logit_softcapping": 4.0}),  # tied
    "phi": ("Phi", 129, LIKE),  # a bias on the head
    "gpt2": ("GPT2", 129, {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.25,
                           "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1,
                           "eos_token_id": None, "pad_token_id": 0}),  # tied
}  # fmt: skip

# name -> families it is meant for. Those of FSDP2 say how the model is cut into units and when the head is read.
WAYS = {
    "tp": FAMILIES,
    "tp lora": ["llama"],
    "tp probed": ["llama"],
    "ddp": FAMILIES,
    "ddp finding unused": ["llama", "gpt2"],
    "ddp narrow": FAMILIES,
    "fsdp one unit": ["llama", "gpt2"],
    "fsdp root, read after": FAMILIES,
    "fsdp root, read before": FAMILIES,
    "fsdp own unit": ["llama", "qwen3"],
    "fsdp own unit, kept": ["llama", "qwen3"],
    "fsdp tail unit": ["llama", "gemma2"],
    "fsdp lora": ["llama"],
    "fsdp root, probed": ["llama"],
    "fsdp transformers": ["llama", "gemma2"],
    "fsdp rows": FAMILIES,
    "fsdp rows, own unit": ["llama"],
    "hsdp": ["llama"],
    "hsdp, read before": ["llama", "gpt2"],
}
CASES = [(way, family) for way, families in WAYS.items() for family in families]


# transformers has no plan for GPT-2; one that leaves out the embedding, tied to the head, gives wrong logits.
GPT2_PLAN = {"lm_head": "colwise_gather_output", "transformer.wte": "embedding_rowwise"}
CUT = 100  # ids that both models are asked about where a part of the vocabulary is


class OfMyOwn(transformers.LlamaForCausalLM):
    """A class klft does not know: it is probed, by all processes together."""

    def forward(self, *args, **inputs):
        return super().forward(*args, **inputs)


def make(family, seed):
    name, vocab, changed = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(vocab_size=vocab, **changed)
    return getattr(transformers, f"{name}{'LMHeadModel' if family == 'gpt2' else 'ForCausalLM'}")(config)


def tokens(family):
    """(input ids [B, T], the token that is scored at each position [B, T])"""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, FAMILIES[family][1], (ROWS, LENGTH + 1), generator=draw)
    return ids[:, :-1], ids[:, 1:]


def adapted(model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:  # alike in all processes, some of which hold parts only
                p.fill_(0.3 if "lora_B" in name else 0.2)
    return model


# ---- one process, dense logits -----------------------------------------------------------------------------------


def dense(folder, way, family):
    """{parameter: gradient} of the sum over all tokens of KL(p||q), what the model generates, and KL(q||p) over the
    first words, [B, T]."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, reference = load(folder / family / "policy"), load(folder / family / "reference")
    if "lora" in way:
        model = adapted(model)
    ids, _ = tokens(family)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    logp = logits.log_softmax(-1)
    with torch.no_grad():
        ref_logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        ref_logp = ref_logits.log_softmax(-1)
        p, q = (t[..., :CUT].double().log_softmax(-1) for t in (logits, ref_logits))
        cut = (q.exp() * (q - p)).sum(-1)
    ((logp.exp() * (logp - ref_logp)).sum(-1) * MASK).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, generated(model), cut


def generated(model):
    model.eval()
    ids = model.generate(
        input_ids=PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=5, pad_token_id=0
    )
    return ids[:, PROMPT.shape[1] :]


# ---- what each of two processes does -----------------------------------------------------------------------------


def loaded(folder, way, family, accelerator):
    """(the model as it is called, the same to generate with), from disk and spread over the processes."""
    path = folder / family / "policy"
    load = (OfMyOwn if "probed" in way else transformers.AutoModelForCausalLM).from_pretrained
    if way == "fsdp transformers":
        model = load(path, distributed_config=transformers.DistributedConfig(fsdp_size=WORLD))
        return model, model
    if way.startswith("tp"):
        plan = GPT2_PLAN if family == "gpt2" else None
        model = load(path, distributed_config=transformers.DistributedConfig(tp_size=WORLD, tp_plan=plan))
        model = adapted(model) if "lora" in way else model
        return model, model
    model = adapted(load(path)) if "lora" in way else load(path)
    if way == "ddp finding unused":
        return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True), model
    if way.startswith("ddp"):
        return accelerator.prepare(model), model
    fully_sharded(model, way)
    return model, model


def fully_sharded(model, way):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    base, mesh = base_of(model), init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    if "hsdp" in way:
        mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("dp_replicate", "dp_shard"))
    inner = base.base_model
    if way != "fsdp one unit":
        for layer in getattr(inner, "layers", None) or inner.h:
            fully_shard(layer, mesh=mesh)
    if "own unit" in way:
        fully_shard(base.lm_head, mesh=mesh, reshard_after_forward="kept" not in way)
    if way == "fsdp tail unit":
        tail = [inner.norm, base.lm_head] + [inner.embed_tokens] * (base.lm_head.weight is inner.embed_tokens.weight)
        fully_shard(tail, mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "generate")


def kl_gradients(way, family, model, reference):
    """The gradients, the model's own way, and what the head looked like."""
    from torch.distributed.tensor import DTensor

    rank = torch.distributed.get_rank()
    mine = slice(None) if way.startswith("tp") else slice(2 * rank, 2 * rank + 2)
    (ids, labels), mask = tokens(family), MASK[mine]
    ids, labels = ids[mine], labels[mine]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen = {"sharded parameters": [isinstance(p, DTensor) for p in model.parameters()]}
    head = None
    if "before" in way or "rows" in way:
        head = LMHead.from_model(model, shard_rows="rows" in way)
    with hidden_states(model) as kept:
        output = model(**inputs)
    assert output.logits.shape[1] == 0
    weight = base_of(model).get_output_embeddings().weight
    seen["head is a DTensor"] = isinstance(weight, DTensor)
    head = head or LMHead.from_model(model)
    if way == "ddp narrow":
        head = head.narrow(VocabShard.even(head.vocab_size, own_tokens=True))
    with torch.no_grad(), hidden_states(reference) as ref_kept:
        reference(**inputs)
    ref_head = LMHead.from_model(reference)
    seen |= {"rows here": len(head.weight), "rows": head.vocab_size, "shard": head.shard is not None}
    if head.shard is not None:
        sides = kept.hidden[mask], head.cut(CUT), ref_kept.hidden[mask], ref_head.cut(CUT)
        seen["cut"] = linear_divergence(*sides, divergence="forward_kl").detach()
    flat = (kept.hidden[mask], head, labels[mask], ref_kept.hidden[mask], ref_head)
    fused_token_loss(lambda scores: scores.reverse_kl.sum(), *flat).backward()

    def whole(t):
        return t.full_tensor() if isinstance(t, DTensor) else t

    found = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, name
            found[name.removeprefix("module.")] = whole(p.grad).clone()
    model.zero_grad()
    return found, seen


def worker(folder):
    from accelerate import Accelerator

    warnings.filterwarnings("error", "FSDP2-wrapped module .* returned a view")
    accelerator = Accelerator()
    rank = accelerator.process_index
    load = transformers.AutoModelForCausalLM.from_pretrained
    for way, family in CASES:
        result = {"world": torch.distributed.get_world_size(), "device": accelerator.device.type}
        try:
            model, own = loaded(folder, way, family, accelerator)
            extra = {"distributed_config": transformers.DistributedConfig(tp_size=WORLD)} if way == "tp" else {}
            reference = load(folder / family / "reference", **extra if family != "gpt2" else {})
            model.train()
            # Twice: what the first leaves behind must not disturb the second.
            result["first"], result["seen"] = kl_gradients(way, family, model, reference)
            result["second"], _ = kl_gradients(way, family, model, reference)
            result["generated"] = generated(own)
        except Exception as error:  # both processes fail alike, or the launcher ends them
            import traceback

            result["error"] = "".join(traceback.format_exception(error))
        torch.save(result, folder / f"{way} {family} {rank}.pt")
    accelerator.end_training()


# ---- the tests ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both processes have run all cases here."""
    folder = tmp_path_factory.mktemp("two")
    for family in FAMILIES:
        make(family, 0).save_pretrained(folder / family / "policy")
        make(family, 1).save_pretrained(folder / family / "reference")
    done = launch(__file__, folder, processes=WORLD, timeout=500)
    (folder / "stderr").write_text(f"ended with {done.returncode}:\n{done.stderr[-6000:]}")
    return folder


@pytest.fixture(scope="module")
def truth(folder):
    """What one process finds, computed once per family."""
    known = {}

    def of(way, family):
        key = ("lora" in way, family)
        if key not in known:
            known[key] = dense(folder, way, family)
        return known[key]

    return of


@pytest.mark.parametrize(("way", "family"), CASES)
def test_two_processes_have_the_gradients_of_one(way, family, folder, truth):
    expected, text, cut = truth(way, family)
    same_tokens = way.startswith("tp")
    vocab = FAMILIES[family][1]
    for rank in range(WORLD):
        path = folder / f"{way} {family} {rank}.pt"
        assert path.exists(), (folder / "stderr").read_text()
        result = torch.load(path, weights_only=False)
        assert "error" not in result, result["error"]
        assert (result["world"], result["device"]) == (WORLD, "cpu")
        for found in (result["first"], result["second"]):
            assert found.keys() == expected.keys()
            for name, gradient in expected.items():
                # Data-parallel training averages over processes: the sum over all tokens, divided by their number.
                right = gradient if same_tokens else gradient / WORLD
                assert right.norm() > 0, name
                error = ((found[name] - right).norm() / right.norm()).item()
                ratio = (found[name].norm() / right.norm()).item()
                assert error < 1e-5, f"{name}: off by {error:.1e}, {ratio:.4f} times as long"
        assert torch.equal(result["generated"], text), "generate after it says the same"
        assert_really_sharded(way, result["seen"], vocab, rank)
        if "cut" in result["seen"]:
            mine = slice(None) if same_tokens else slice(2 * rank, 2 * rank + 2)
            torch.testing.assert_close(result["seen"]["cut"].double(), cut[mine][MASK[mine]], rtol=1e-4, atol=1e-5)


def assert_really_sharded(way, seen, vocab, rank):
    part = [-(-vocab // 2), vocab // 2][rank]
    assert seen["rows"] == vocab
    parts = way.startswith("tp") or way == "ddp narrow" or "rows" in way
    assert seen["rows here"] == (part if parts else vocab)
    assert seen["shard"] == parts
    if way.startswith("tp"):
        assert seen["head is a DTensor"]
        assert any(seen["sharded parameters"])
    if way.startswith("ddp"):
        assert not any(seen["sharded parameters"])
    if "sdp" in way:
        assert all(seen["sharded parameters"])
        # A unit of its own is freed after the forward; any other is still whole, and FSDP2 reduces its gradient.
        assert seen["head is a DTensor"] == way.endswith("own unit")


def test_the_two_models_are_far_enough_apart_to_show_a_wrong_gradient(truth):
    for family in FAMILIES:
        gradients, text, _ = truth("ddp", family)
        assert min(g.norm() for g in gradients.values()) > 1e-4
        assert text.shape == (2, 5)


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
