"""The Triton backend as a whole: when it is chosen, what it compiles to for a GPU, and that it agrees on one."""

import importlib.util
import sys

import pytest
import torch
from support.fused import limits
from support.kernels import close, kernels, replaced
from support.oracles import value_and_gradients

from klft import fused as fused_package
from klft.fused import api, linear_divergence, torch_backend
from klft.heads import LMHead

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed here")
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

# ---- which backend ---------------------------------------------------------------------------------------------------


def divergence_by_triton():
    hidden, head = torch.zeros(2, 3), LMHead(torch.zeros(5, 3))
    return linear_divergence(hidden, head, hidden, head, backend="triton")


def test_triton_on_a_cpu_says_what_to_do():
    assert not kernels().INTERPRETED, "unset TRITON_INTERPRET: the tests set it where they need it"
    with pytest.raises(ValueError, match=r"got tensors on cpu.*TRITON_INTERPRET=1"):
        divergence_by_triton()
    assert api._backend("auto", torch.device("cpu")) is torch_backend
    assert api._backend("auto", torch.device("cuda")) is kernels()


def test_without_triton(monkeypatch):
    monkeypatch.delattr(fused_package, "triton_backend", raising=False)
    monkeypatch.delitem(sys.modules, "klft.fused.triton_backend", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match="pip install triton"):
        divergence_by_triton()
    assert api._backend("auto", torch.device("cuda")) is torch_backend


# ---- compiled, as a GPU would have it --------------------------------------------------------------------------------

FLAGS = dict.fromkeys(("ENTROPY", "REF_ENTROPY", "REVERSE", "FORWARD"), True)
NO_REFERENCE = {"REF_ENTROPY": False, "REVERSE": False, "FORWARD": False}
COMPILED = [
    ("_max_and_sum", {}),
    ("_exact_sums", FLAGS),
    ("_exact_sums", FLAGS | NO_REFERENCE),
    ("_gradient", {}),
    ("_gradient", {"b": None, "c": None, "d": None, "ids": None, "of_id": None}),
]


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize(("name", "constants"), COMPILED)
def test_compiles_for_hopper(monkeypatch, tmp_path, name, constants, narrow):
    """For sm_90, without a GPU: 16 bytes a load where rows are aligned, no atomics. `narrow`: v = 1 is a constant."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(kernels(), name)
    constants = constants | {"BLOCK": kernels().BLOCK} | ({"v": 1} if narrow else {})
    kinds = {"v": "i32", "stride": "i64", "ids": "*i64", "out": "*bf16" if name == "_gradient" else "*fp32"}
    kinds |= dict.fromkeys(("z_stride", "y_stride", "out_stride"), "i64")
    signature = {a: "constexpr" if a in constants else kinds.get(a, "*fp32") for a in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a not in constants}
    source = ASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels().WARPS})
    assert len(made.asm["cubin"]) > 0
    ptx = made.asm["ptx"]
    assert "atom" not in ptx
    assert ("ld.global.v4" in ptx) is not narrow


# ---- at the size it is for -------------------------------------------------------------------------------------------


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "entropy"])
def test_backends_agree_on_a_gpu(name):
    n, d, v = 300, 256, 32_768
    gen = torch.Generator().manual_seed(0)
    hidden, weight, move = (torch.randn(*size, generator=gen) for size in ((n, d), (v, d), (v, d)))
    hidden, weight, ref_weight = (
        t.to("cuda", torch.bfloat16) for t in (hidden, 2 / d**0.5 * weight, 2 / d**0.5 * (weight + 0.1 * move))
    )
    results = []
    for backend in ("triton", "torch"):

        def fn(h, w):
            return linear_divergence(h, LMHead(w), hidden, LMHead(ref_weight), divergence=name, backend=backend)  # noqa: B023

        table, kind, changed = limits("cuda", tile_logits=100 * v)
        with replaced(table, kind, changed):
            results.append(value_and_gradients(fn, [hidden, weight]))
    for ours, theirs in zip(*results, strict=True):
        assert (ours.double() - theirs.double()).norm() <= 1e-3 * theirs.double().norm()
    close(results[0][0], results[1][0])
