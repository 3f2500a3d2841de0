"""The token table: rows against float64 loops, files that are whole or refused, the log of a training loop."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import oracles, tiny
from support.vocabularies import byte_level

from klft.diagnostics import (
    SCHEMA,
    SCHEMA_VERSION,
    Metadata,
    Statistics,
    TokenKLLog,
    TokenRecord,
    read_records,
    records_table,
    scalars,
    write_records,
)
from klft.scores import score_logits

TOP = 3


def scored(rows=3, length=7, seed=0, top=TOP):
    """Two tiny models' opinions of random tokens: scores [B, T], token ids, mask, is_prompt, both models' logits."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCABULARY, (rows, length + 1), generator=generator)
    with torch.no_grad():
        logits, ref_logits = (tiny.llama(seed=s).eval()(ids).logits[:, :-1] for s in (1, 2))
    token_ids = ids[:, 1:]
    scores = score_logits(logits, ref_logits, token_ids)
    both = SimpleNamespace(**vars(scores))
    if top:
        both.top_p, both.top_ids = logits.softmax(-1).topk(top)
        both.ref_top_p, both.ref_top_ids = ref_logits.softmax(-1).topk(top)
    mask = torch.rand(rows, length, generator=generator) < 0.8
    is_prompt = torch.arange(length).expand(rows, -1) < 2
    return both, token_ids, mask, is_prompt, logits, ref_logits


def table_of(seed=0, **columns):
    scores, token_ids, mask, is_prompt, *_ = scored(seed=seed)
    return records_table(scores, token_ids, mask, tiny.tokenizer(), is_prompt=is_prompt, **columns)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_the_columns_are_those_of_token_record_in_order():
    assert SCHEMA.names == list(TokenRecord.__dataclass_fields__)
    assert SCHEMA.names == [
        "step",
        "rank",
        "sample_id",
        "position",
        "is_prompt",
        "sampled",
        "token_id",
        "token",
        "logp",
        "ref_logp",
        "reverse_kl",
        "forward_kl",
        "entropy",
        "ref_entropy",
        "reward",
        "advantage",
        "weight",
        "top_ids",
        "top_p",
        "ref_top_ids",
        "ref_top_p",
    ]
    assert SCHEMA.field("step").type == pa.int64()
    assert SCHEMA.field("position").type == pa.int32()
    assert SCHEMA.field("ref_top_p").type == pa.list_(pa.float32())
    assert not SCHEMA.field("is_prompt").nullable
    assert SCHEMA.field("ref_logp").nullable


def test_rows_are_what_a_float64_loop_finds():
    scores, token_ids, mask, is_prompt, logits, ref_logits = scored()
    rewards, advantages, weights = torch.rand(3), torch.rand(3, 7), torch.rand(3, 7)
    tokenizer = tiny.tokenizer()
    table = records_table(
        scores, token_ids, mask, tokenizer, step=4, rank=2, sample_ids=[70, 71, 99], is_prompt=is_prompt,
        rewards=rewards, advantages=advantages, weights=weights,
    )  # fmt: skip
    assert table.schema == SCHEMA
    rows = table.to_pylist()
    found = iter(rows)
    for b in range(3):
        for t in range(7):
            if not mask[b, t]:
                continue
            row = next(found)
            p, q = (torch.softmax(x[b, t].double(), -1) for x in (logits, ref_logits))
            token = int(token_ids[b, t])
            assert (row["step"], row["rank"], row["sample_id"], row["position"]) == (4, 2, [70, 71, 99][b], t)
            assert (row["is_prompt"], row["token_id"], row["token"]) == (t < 2, token, f"w{token - 3}")
            expected = {
                "logp": math.log(p[token]),
                "ref_logp": math.log(q[token]),
                "reverse_kl": oracles.reverse_kl(logits[b, t], ref_logits[b, t]).item(),
                "forward_kl": oracles.forward_kl(logits[b, t], ref_logits[b, t]).item(),
                "entropy": oracles.entropy(logits[b, t]).item(),
                "ref_entropy": oracles.entropy(ref_logits[b, t]).item(),
                "reward": rewards[b].item(),
                "advantage": advantages[b, t].item(),
                "weight": weights[b, t].item(),
            }
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)
            for ids, probabilities, x in (("top_ids", "top_p", p), ("ref_top_ids", "ref_top_p", q)):
                likeliest = sorted(range(len(x)), key=lambda v: -x[v])[:TOP]
                assert row[ids] == likeliest
                assert row[probabilities] == pytest.approx([x[v].item() for v in likeliest], rel=1e-5)
    assert next(found, None) is None
    assert len(rows) == int(mask.sum()) > 10


def test_what_is_missing_is_null():
    _, token_ids, mask, *_ = scored()
    logp = torch.full(mask.shape, -1.0)
    table = records_table(SimpleNamespace(logp=logp, reverse_kl=None), token_ids, mask, tiny.tokenizer())
    missing = [name for name in SCHEMA.names if table[name].null_count == len(table)]
    assert missing == [
        "ref_logp",
        "reverse_kl",
        "forward_kl",
        "entropy",
        "ref_entropy",
        "reward",
        "advantage",
        "weight",
        "top_ids",
        "top_p",
        "ref_top_ids",
        "ref_top_p",
    ]
    assert sum(column.null_count for column in table.columns) == len(missing) * len(table)
    assert table["sample_id"].to_pylist() == mask.nonzero()[:, 0].tolist()


def test_what_was_not_scored_is_shown_with_null_scores():
    scores, token_ids, mask, *_ = scored()
    counts = mask & (torch.arange(7) > 2)
    table = records_table(scores, token_ids, mask, tiny.tokenizer(), scored=counts)
    whole = records_table(scores, token_ids, mask, tiny.tokenizer())
    assert table["token"].to_pylist() == whole["token"].to_pylist()
    for row, same in zip(table.to_pylist(), whole.to_pylist(), strict=True):
        for name in ("logp", "ref_logp", "reverse_kl", "forward_kl", "entropy", "ref_entropy", "top_ids", "ref_top_p"):
            assert row[name] == (same[name] if row["position"] > 2 else None)
    alone = records_table(scores, token_ids, counts, tiny.tokenizer())
    assert scalars(Statistics.of(table)) == scalars(Statistics.of(alone))


def test_no_top_list_is_null_and_no_token_is_no_row():
    scores, token_ids, mask, *_ = scored(top=0)
    scores.top_ids = scores.ref_top_ids = torch.zeros(*mask.shape, 0, dtype=torch.long)
    table = records_table(scores, token_ids, mask, tiny.tokenizer())
    assert table["top_ids"].null_count == len(table)
    empty = records_table(scores, token_ids, torch.zeros_like(mask), tiny.tokenizer())
    assert len(empty) == 0
    assert empty.schema == SCHEMA


def test_any_precision_and_gradients_are_taken():
    scores, token_ids, mask, *_ = scored()
    half = SimpleNamespace(logp=scores.logp.bfloat16().requires_grad_(), reverse_kl=scores.reverse_kl.double())
    table = records_table(half, token_ids.int(), mask.long(), tiny.tokenizer())
    assert table["logp"].to_pylist() == scores.logp.bfloat16().float()[mask].tolist()
    assert table["reverse_kl"].to_pylist() == scores.reverse_kl[mask].tolist()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"token_ids": torch.zeros(3, 6, dtype=torch.long)}, r"token_ids is \[3, 6\].*\[3, 7\]"),
        ({"sample_ids": [1, 2]}, r"sample_ids is \[2\]"),
        ({"is_prompt": torch.zeros(3, dtype=torch.bool)}, r"is_prompt is \[3\]"),
        ({"rewards": torch.zeros(7)}, r"rewards is \[7\]"),
        ({"advantages": torch.zeros(3, 7, 1)}, r"advantages is \[3, 7, 1\]"),
        ({"weights": torch.zeros(3)}, r"weights is \[3\]"),
        ({"mask": torch.ones(7)}, r"mask is \[7\]"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(changed, message):
    scores, token_ids, mask, *_ = scored()
    given = {"token_ids": token_ids, "mask": mask} | changed
    with pytest.raises(ValueError, match=message):
        records_table(scores, tokenizer=tiny.tokenizer(), **given)
    scores.top_p = scores.top_p[..., 0]
    with pytest.raises(ValueError, match=r"top_p is \[3, 7\]"):
        records_table(scores, token_ids, mask, tiny.tokenizer())


# --- files -----------------------------------------------------------------------------------------------------------


def metadata_of(table, **common):
    return Metadata.of(table, tiny.tokenizer(), **{"model": "p", "reference": "q"} | common)


def test_a_file_gives_back_what_was_written(tmp_path):
    table = table_of(rewards=torch.rand(3))
    metadata = metadata_of(table, temperature=0.7, total_sequences=4096)
    path = write_records(table, tmp_path / "tokens.parquet", metadata)
    again, found = read_records(path)
    assert again.equals(table)
    assert found == metadata
    shown = {i for name in ("top_ids", "ref_top_ids") for ids in table[name].to_pylist() for i in ids}
    assert set(found.vocabulary) == set(found.classes) == shown | set(table["token_id"].to_pylist())
    assert all(text == f"w{i - 3}" for i, text in found.vocabulary.items() if i > 2)
    assert os.listdir(tmp_path) == ["tokens.parquet"]
    assert pq.ParquetFile(path).metadata.row_group(0).column(0).compression == "ZSTD"


def test_folders_runs_and_lists_are_joined(tmp_path):
    run = tmp_path / "run"
    (run / "kl").mkdir(parents=True)
    tables = [table_of(seed=s, step=s) for s in range(3)]
    for s, table in enumerate(tables):
        write_records(table, run / "kl" / f"tokens_{s:06d}-r0.parquet", metadata_of(table))
    (run / "kl" / ".tokens_000009-r0.parquet.77.tmp").write_bytes(b"half")
    files = sorted((run / "kl").glob("*.parquet"))
    for source in (run, run / "kl", str(run), files, [run, files[0]], [files[0], str(run / "kl")]):
        table, metadata = read_records(source)
        assert table.equals(pa.concat_tables(tables))
        assert set(table["token_id"].to_pylist()) <= set(metadata.vocabulary)
        assert metadata.total_sequences is None
    part = replace(metadata_of(tables[0]), total_sequences=100)
    write_records(tables[0], files[0], part)
    assert read_records(run)[1].total_sequences == 106


def test_what_does_not_belong_together_is_refused(tmp_path):
    table = table_of()
    first = write_records(table, tmp_path / "a.parquet", metadata_of(table))
    for changed in ({"model": "other"}, {"reference": "r"}, {"temperature": 0.5}):
        second = write_records(table, tmp_path / "b.parquet", metadata_of(table, **changed))
        with pytest.raises(ValueError, match=rf"a\.parquet.*b\.parquet.*{next(iter(changed))}.*folder of their own"):
            read_records([first, second])
        with pytest.raises(ValueError, match="belong together"):
            read_records(tmp_path)
    another = replace(metadata_of(table), tokenizer_hash="0" * 16)
    write_records(table, tmp_path / "b.parquet", another)
    with pytest.raises(ValueError, match="tokenizer_hash"):
        read_records(tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path):
    table = table_of()
    good = write_records(table, tmp_path / "good.parquet", metadata_of(table))
    whole = good.read_bytes()
    bad = tmp_path / "bad.parquet"
    for content in (
        b"",
        b"PAR1",
        whole[: len(whole) // 2],
        whole[:-1],
        b"not parquet at all" * 99,
        whole[:40] + whole[60:],
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.parquet is truncated or no Parquet file.*delete it"):
            read_records(bad)
        with pytest.raises(ValueError, match=r"bad\.parquet"):
            read_records(tmp_path)
    pq.write_table(pa.table({"a": [1]}), bad)
    with pytest.raises(ValueError, match=r"bad\.parquet is not a token table.*'klft'"):
        read_records(bad)
    for name, kind in (("logp", None), ("ref_top_p", None), ("token", pa.list_(pa.int32()))):
        other = table.drop_columns([name])
        if kind is not None:
            other = other.append_column(name, pa.nulls(len(table), kind))
        other = other.replace_schema_metadata({b"klft": metadata_of(table).to_json().encode()})
        pq.write_table(other, bad)
        with pytest.raises(ValueError, match=rf"bad\.parquet is not a token table.*{name}.*it needs step"):
            read_records(bad)
    newer = replace(metadata_of(table), schema_version=4, klft_version="9.0")
    write_records(table, bad, newer)
    with pytest.raises(ValueError, match=r"bad\.parquet has schema version 4.*klft that wrote it, 9\.0"):
        read_records(bad)


def older(path, table, version, *lacks):
    """A file as an earlier schema version had it."""
    metadata = replace(metadata_of(table), schema_version=version)
    first = table.drop_columns(list(lacks))
    pq.write_table(first.replace_schema_metadata({b"klft": metadata.to_json().encode()}), path)


def test_a_file_of_the_first_version_is_read_without_saying_that_its_tokens_were_sampled(tmp_path):
    table = table_of()
    older(tmp_path / "a.parquet", table, 1, "sampled", "weight")
    write_records(table, tmp_path / "b.parquet", metadata_of(table))
    found, again = read_records(tmp_path / "a.parquet")
    assert found["sampled"].null_count == len(table)
    assert again.schema_version == SCHEMA_VERSION
    assert "kl/k1/mean" not in scalars(Statistics.of(found))
    assert "kl/k1/mean" in scalars(Statistics.of(read_records(tmp_path)[0]))


def test_a_file_of_the_second_version_is_read_without_weights(tmp_path):
    table = table_of()
    older(tmp_path / "a.parquet", table, 2, "weight")
    found, again = read_records(tmp_path / "a.parquet")
    assert again.schema_version == SCHEMA_VERSION
    assert found["weight"].null_count == len(table)
    assert found.drop_columns(["weight"]).equals(table.drop_columns(["weight"]))


def test_a_column_in_another_order_or_width_is_put_right(tmp_path):
    table = table_of()
    other = table.set_column(1, "rank", table["rank"].cast(pa.int64())).select(SCHEMA.names[::-1])
    other = other.append_column("more", table["rank"])
    path = tmp_path / "tokens.parquet"
    pq.write_table(other.replace_schema_metadata({b"klft": metadata_of(table).to_json().encode()}), path)
    assert read_records(path)[0].equals(table)


@pytest.mark.parametrize(
    ("place", "message"),
    [("nowhere", "nowhere does not exist"), ("empty", r"empty holds no \*\.parquet, .*--kl_log_tokens N")],
)
def test_nothing_to_read_is_said(tmp_path, place, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / place)
    with pytest.raises(ValueError, match="list is empty"):
        read_records([])


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    table = table_of()
    path = write_records(table, tmp_path / "tokens.parquet", metadata_of(table))
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_records(table_of(seed=1), path, metadata_of(table))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["tokens.parquet"]
    with pytest.raises(ValueError, match=r"the table is not a token table.*token_id"):
        write_records(table.drop_columns(["token_id"]), path, metadata_of(table))


def test_metadata_of_a_later_klft_is_read_as_far_as_it_is_known():
    metadata = metadata_of(table_of())
    text = json.dumps(json.loads(metadata.to_json()) | {"weather": "fine"})
    assert Metadata.from_json(text) == metadata


# --- the log of a training loop --------------------------------------------------------------------------------------


def batches(steps=3):
    return [scored(seed=10 * step + i)[:3] for step in range(steps) for i in range(2)]


def test_a_loop_logs_its_tokens(tmp_path):
    given, logged = batches(), []
    with TokenKLLog(tmp_path, tiny.tokenizer(), model="p", reference="q", temperature=0.9) as log:
        for i, (scores, token_ids, mask) in enumerate(given):
            log.add(scores, token_ids, mask, step=i // 2, rewards=torch.full((3,), float(i)))
            logged.append(log.scalars())
    files = sorted(os.listdir(tmp_path / "kl"))
    assert files == [f"tokens_{step:06d}-r0.parquet" for step in range(3)]
    table, metadata = read_records(tmp_path)
    assert (metadata.model, metadata.reference, metadata.temperature) == ("p", "q", 0.9)
    assert len(table) == sum(int(mask.sum()) for *_, mask in given)
    rows = table.to_pylist()
    for i, (numbers, (scores, _, mask)) in enumerate(zip(logged, given, strict=True)):
        mine = [row for row in rows if row["reward"] == i]
        assert {(row["step"], row["sample_id"]) for row in mine} == {(i // 2, 3 * (i % 2) + b) for b in range(3)}
        assert numbers["kl/tokens/count"] == len(mine)
        for name, column in (("kl/reverse/mean", "reverse_kl"), ("kl/forward/mean", "forward_kl")):
            assert sum(row[column] for row in mine) == pytest.approx(numbers[name] * len(mine), rel=1e-6)
        k1 = sum(row["logp"] - row["ref_logp"] for row in mine) / len(mine)
        assert numbers["kl/k1/mean"] == pytest.approx(k1, rel=1e-6)
        assert numbers["kl/sequence/reverse/mean"] == pytest.approx(
            (scores.reverse_kl * mask).sum().item() / 3, rel=1e-5
        )
        assert numbers["kl/top1_agree/frac"] == pytest.approx(scores.top1_agree[mask].double().mean().item())


def test_scalars_are_of_what_was_added_since_the_last_time(tmp_path):
    log = TokenKLLog(tmp_path, tiny.tokenizer())
    assert log.scalars() == {}
    given = batches()
    for i, batch in enumerate(given):
        log.add(*batch, step=i // 2)
    everything = log.statistics()
    assert everything.tokens == sum(int(mask.sum()) for *_, mask in given)
    assert log.scalars() == {}
    log.close()
    log.close()
    assert scalars(everything) == pytest.approx(scalars(Statistics.of(*read_records(tmp_path))), rel=1e-12)


def test_steps_are_written_when_they_end_and_only_once(tmp_path):
    (a, *_, b), kl = batches(2), tmp_path / "kl"
    log = TokenKLLog(tmp_path, tiny.tokenizer())
    log.add(*a, step=5)
    assert os.listdir(kl) == []
    log.add(*b, step=6)
    assert os.listdir(kl) == ["tokens_000005-r0.parquet"]
    with pytest.raises(ValueError, match=r"step 5 is already in .*kl"):
        log.add(*a, step=5)
    log.add(a[0], a[1], torch.zeros_like(a[2]), step=7)
    log.close()
    assert sorted(os.listdir(kl)) == ["tokens_000005-r0.parquet", "tokens_000006-r0.parquet"]
    with TokenKLLog(tmp_path, tiny.tokenizer()) as resumed:
        resumed.add(*a, step=6)
    assert read_records(kl / "tokens_000006-r0.parquet")[0]["logp"].to_pylist() == a[0].logp[a[2]].tolist()


def test_a_folder_of_another_run_is_refused(tmp_path):
    batch = batches(1)[0]
    with TokenKLLog(tmp_path, tiny.tokenizer(), model="p", temperature=1.0) as log:
        log.add(*batch)
    TokenKLLog(tmp_path, tiny.tokenizer(), model="p", temperature=1.0).close()
    for changed in ({"model": "other"}, {"model": "p", "reference": "q"}, {"model": "p", "temperature": 0.5}):
        with pytest.raises(ValueError, match=r"tokens_000000-r0\.parquet and this run do not belong together"):
            TokenKLLog(tmp_path, tiny.tokenizer(), **changed)
    with pytest.raises(ValueError, match="tokenizer_hash"):
        TokenKLLog(tmp_path, byte_level(), model="p")


RANK = """
import json, sys
import torch, torch.distributed as dist
from transformers import PreTrainedTokenizerFast
from klft.diagnostics import Statistics, TokenKLLog, scalars
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
with TokenKLLog(f"{folder}/run", PreTrainedTokenizerFast.from_pretrained(folder)) as log:
    for i, batch in enumerate(torch.load(f"{folder}/batches.pt", weights_only=False)):
        if i % 2 == rank:
            log.add(*batch, step=i // 2)
    states = [None, None]
    dist.all_gather_object(states, json.dumps(log.statistics().to_dict()))
if rank == 0:
    a, b = (Statistics.from_dict(json.loads(state)) for state in states)
    print(json.dumps(scalars(a.merge(b))))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_log_what_one_does(tmp_path):
    tiny.tokenizer().save_pretrained(tmp_path)
    torch.save(batches(), tmp_path / "batches.pt")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    files = sorted(os.listdir(tmp_path / "run" / "kl"))
    assert files == [f"tokens_{step:06d}-r{rank}.parquet" for step in range(3) for rank in range(2)]
    with TokenKLLog(tmp_path / "one", tiny.tokenizer()) as log:
        for i, batch in enumerate(batches()):
            log.add(*batch, step=i // 2)
    table, two = read_records(tmp_path / "one")[0], read_records(tmp_path / "run")[0]
    assert json.loads(outputs[0][0]) == pytest.approx(scalars(Statistics.of(table)), rel=1e-9)
    assert scalars(Statistics.of(two)) == pytest.approx(scalars(Statistics.of(table)), rel=1e-9)
    assert sorted(two["reverse_kl"].to_pylist()) == sorted(table["reverse_kl"].to_pylist())


def test_five_hundred_thousand_tokens_take_a_second_or_two():
    rows, length = 1000, 512
    ids = torch.randint(3, tiny.VOCABULARY, (rows, length))
    scores = SimpleNamespace(logp=-torch.rand(rows, length), top_ids=ids[..., None].expand(-1, -1, 2))
    table = records_table(scores, ids, torch.ones_like(ids), tiny.tokenizer())
    assert len(table) == rows * length
    assert np.array_equal(table["position"].to_numpy().reshape(rows, length)[7], np.arange(length))
    assert table["token"][513].as_py() == f"w{int(ids[1, 1]) - 3}"
