"""CachedReference: hidden states written once give the live model's KL, for the very data and tokenizer, or nothing."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from support import tiny
from support.penalties import penalty

from klft import CachedReference, FrozenReference, LMHead
from klft.models import causal_inputs, token_positions
from klft.references import Reference
from klft.scoring import Scorer, score_texts

TEXTS = [[5, 7, 9, 4], [3, 8, 6, 4, 11, 5], [3, 8], [6, 4, 11, 5, 20]]


def padded(texts, side="right", more=0, pad=0):
    """Ids and mask [B, T]."""
    width = max(map(len, texts)) + more
    ids, mask = torch.full((len(texts), width), pad), torch.zeros(len(texts), width, dtype=torch.long)
    for i, text in enumerate(texts):
        where = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[i, where], mask[i, where] = torch.tensor(text), 1
    return ids, mask


def batches():
    return [padded(TEXTS[:2]), padded(TEXTS[2:]), padded(TEXTS[1:3], "left")]


@pytest.fixture(params=[tiny.llama, tiny.gpt2], ids=["llama", "gpt2"])
def live(request):
    return FrozenReference(request.param(5))


@pytest.fixture
def cached(live, tmp_path):
    return CachedReference.write(tmp_path / "cache", live, batches(), tokenizer=tiny.tokenizer())


@pytest.mark.parametrize("side", ["right", "left"])
def test_it_gives_the_live_models_kl_whatever_the_padding(live, cached, side):
    ids, mask = padded([TEXTS[i] for i in (3, 1, 0, 2)], side, more=2, pad=9)
    assert isinstance(cached, Reference)
    policy = tiny.llama().eval()
    logits = policy(**causal_inputs(policy, ids, mask)).logits
    for combination in (("reverse", "exact", "loss"), ("forward", "exact", "loss"), ("reverse", "k1", "reward")):
        got, want = (penalty(*combination, r).measure(logits, ids, mask, mask) for r in (cached, live))
        assert torch.equal(got.mask, want.mask)
        for name, t in want.scores.items():
            where = want.mask
            torch.testing.assert_close(getattr(got.scores, name)[where], t[where], rtol=1e-5, atol=1e-6)
    counted = mask.bool() & mask.roll(1, 1).bool()
    counted[:, 0] = False
    by_scorer = [Scorer(r).score_batch(policy, ids, mask, counted) for r in (cached, live)]
    torch.testing.assert_close(by_scorer[0].reverse_kl, by_scorer[1].reverse_kl, rtol=1e-5, atol=1e-6)
    assert by_scorer[0].reverse_kl.max() > 0.1


def test_what_the_protocol_asks(live, cached):
    assert (cached.vocab_size, cached.max_positions) == (live.vocab_size, live.max_positions)
    assert live.name in cached.name
    assert cached.state_dict() == {}
    cached.to("cpu")
    cached.after_step(tiny.llama())
    cached.check_independent(tiny.llama())
    ids, mask = padded(TEXTS)
    hidden, head = cached.hidden(ids, mask, keep=3)
    whole, _ = live.hidden(ids, mask, keep=3)
    torch.testing.assert_close(hidden[mask[:, -3:] != 0], whole[mask[:, -3:] != 0], rtol=1e-5, atol=1e-5)
    assert (hidden[mask[:, -3:] == 0] == 0).all()
    torch.testing.assert_close(cached.logits(ids, mask, 3), head.logits(hidden))
    assert cached.logits(ids, torch.zeros_like(mask)).shape == (4, 6, tiny.VOCABULARY)


def test_no_body_is_in_memory_and_equal_texts_are_written_once(cached, live):
    def tensors_of(value):
        if isinstance(value, torch.Tensor):
            return [value]
        parts = value.values() if isinstance(value, dict) else vars(value).values() if isinstance(value, LMHead) else ()
        return [t for part in parts for t in tensors_of(part)]

    assert sum(t.numel() for t in tensors_of(vars(cached))) == live.model.lm_head.weight.numel()
    with safe_open(cached.path / "hidden-00000.safetensors", "pt") as file:
        assert len(file.keys()) == len(TEXTS)


def test_a_backbones_arguments_packed_or_not(live, cached):
    ids, mask = padded(TEXTS[:2], "left")
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": token_positions(mask), "use_cache": False}
    got, want = cached.hidden_of(inputs), live.hidden_of(inputs)
    torch.testing.assert_close(got[0][mask != 0], want[0][mask != 0], rtol=1e-5, atol=1e-5)
    packed = {
        "input_ids": torch.tensor([[token for text in TEXTS for token in text]]),
        "attention_mask": None,
        "position_ids": torch.tensor([[i for text in TEXTS for i in range(len(text))]]),
        "cu_seq_lens_q": torch.tensor([0, 4, 10, 12, 17], dtype=torch.int32),
    }
    hidden, _ = cached.hidden_of(packed)
    alone = [cached.hidden_of({"input_ids": torch.tensor([text])})[0][0] for text in TEXTS]
    assert torch.equal(hidden[0], torch.cat(alone))
    for strange in ({"pixel_values": torch.zeros(1, 3)}, {"attention_mask": torch.ones(1, 1, 17, 17)}):
        with pytest.raises(ValueError, match="found by their token ids alone"):
            cached.hidden_of(packed | strange)
    with pytest.raises(ValueError, match="found by their token ids alone"):
        cached.hidden_of({"inputs_embeds": torch.zeros(1, 3, 16)})


def test_other_texts_are_refused_by_name(cached):
    for other in ([5, 7, 9], [5, 7, 9, 4, 4], [7, 5, 9, 4]):
        with pytest.raises(ValueError, match=rf"a text of {len(other)} tokens, \[{other[0]}, .* is not in .*cache"):
            cached.logits(*padded([TEXTS[0], other]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_heads_are_kept_over_several_shards(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("klft.references.cached.SHARD_BYTES", 1)
    live = FrozenReference(tiny.padded(5).to(dtype))
    cached = CachedReference.write(tmp_path / "cache", live, batches())
    assert len(list(cached.path.glob("hidden-*"))) == 2, "the third batch has nothing new"
    hidden, head = cached.hidden(*padded(TEXTS))
    assert (hidden.dtype, head.weight.dtype, head.bias.dtype) == (dtype, dtype, dtype)
    want, whole = live.hidden(*padded(TEXTS))
    assert torch.equal(head.weight, whole.weight)
    assert torch.equal(head.bias, whole.bias)
    mask = padded(TEXTS)[1] != 0
    torch.testing.assert_close(hidden[mask], want[mask], rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-6)


def test_softcap_and_scale_come_back(tmp_path):
    class Capped(FrozenReference):
        def hidden(self, input_ids, attention_mask, keep=0):
            hidden, head = super().hidden(input_ids, attention_mask, keep)
            return hidden, LMHead(head.weight, scale=0.5, softcap=3.0)

    cached = CachedReference.write(tmp_path / "cache", Capped(tiny.llama(5)), batches())
    _, head = CachedReference(cached.path).hidden(*padded(TEXTS))
    assert (head.scale, head.softcap) == (0.5, 3.0)


def test_another_tokenizer_is_refused(cached):
    CachedReference(cached.path, tiny.tokenizer())
    other = tiny.tokenizer()
    other.add_tokens(["w99"])
    with pytest.raises(ValueError, match="written with another tokenizer"):
        CachedReference(cached.path, other)


def test_damage_is_named(cached, tmp_path):
    for name, said in (("index.json", "no readable index.json"), ("hidden-00000.safetensors", "bytes instead of")):
        for cut in (True, False):
            shutil.copytree(cached.path, tmp_path / "copy")
            path = tmp_path / "copy" / name
            path.write_bytes(path.read_bytes()[:-100]) if cut else path.unlink()
            with pytest.raises(ValueError, match=f"copy.*{said}|{name}.*{said}"):
                CachedReference(tmp_path / "copy")
            shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"index\.json"):
        CachedReference(tmp_path / "nowhere")


def test_a_folder_in_use_and_nothing_to_write_are_refused(cached, live, tmp_path):
    before = json.loads((cached.path / "index.json").read_text())
    with pytest.raises(ValueError, match=r"holds another run: index\.json"):
        CachedReference.write(cached.path, live, batches())
    assert json.loads((cached.path / "index.json").read_text()) == before
    with pytest.raises(ValueError, match="there is no batch"):
        CachedReference.write(tmp_path / "empty", live, [])
    with pytest.raises(ValueError, match=r"no readable index\.json"):
        CachedReference(tmp_path / "empty")


def test_texts_are_scored_with_it(tmp_path):
    texts, policy, live = ["w1 w2 w3", "w4 w5"], tiny.llama(), FrozenReference(tiny.apart())
    tokenizer = tiny.tokenizer()
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    cached = CachedReference.write(tmp_path / "c", live, [(encoded["input_ids"], encoded["attention_mask"])])
    got, want = (
        next(iter(score_texts(policy, r, tokenizer, texts, batch_size=2, max_length=8))).scores.reverse_kl
        for r in (cached, live)
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
