"""`kl_log_tokens`: what a run leaves behind about its tokens equals what it logged and what the models say."""

import json
import math
import re

import pytest
import torch
from support import tiny

from klft.diagnostics import Statistics, read_records

LOGGED = {
    "reverse_kl": "kl/reverse/mean",
    "forward_kl": "kl/forward/mean",
    "entropy": "entropy/policy/mean",
    "ref_entropy": "entropy/reference/mean",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = tiny.trainer(
        folder, given={"reference": tiny.llama(5)}, kind=tiny.SeenTrainer, max_steps=3, kl_log_tokens=1, temperature=0.7
    )
    initial = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    run.train()
    table, metadata = read_records(folder)
    return run, folder, table, metadata, initial


def test_sums_over_the_table_are_the_logged_scalars(finished):
    run, _, table, _, _ = finished
    logs = tiny.step_logs(run)
    assert len(logs) == 3
    frame = table.to_pandas()
    for step, log in enumerate(logs, start=1):
        mine = frame[(frame.step == step) & ~frame.is_prompt]
        assert len(mine) > 10
        for column, name in LOGGED.items():
            assert mine[column].mean() == pytest.approx(log[name], rel=1e-6), name
        assert (mine.logp - mine.ref_logp).mean() == pytest.approx(log["kl/k1/mean"], rel=1e-5, abs=1e-6)
        sums = mine.groupby("sample_id").reverse_kl.sum()
        assert sums.mean() == pytest.approx(log["kl/sequence/reverse/mean"], rel=1e-6)
        assert mine.reverse_kl.max() == pytest.approx(log["kl/reverse/max"], rel=1e-6)


def test_rows_are_what_the_models_say(finished):
    """Float64, from each model's own logits, with no padding."""
    run, _, table, metadata, initial = finished
    policy, reference = tiny.llama(0), run.penalty.reference.model.double()
    policy.load_state_dict(initial, strict=False)
    policy = policy.double().eval()
    frame = table.to_pandas()
    frame = frame[frame.step == 1]
    assert metadata.temperature == 0.7
    for sample in frame.sample_id.unique():
        rows = frame[frame.sample_id == sample].sort_values("position")
        ids = torch.tensor(rows.token_id.to_numpy())[None].long()
        with torch.no_grad():
            lp, lq = ((m(ids).logits[0, :-1] / 0.7).log_softmax(-1) for m in (policy, reference))
        kl = (lp.exp() * (lp - lq)).sum(-1)
        for i, row in enumerate(rows.itertuples()):
            if row.is_prompt:
                assert math.isnan(row.logp)
                continue
            assert row.logp == pytest.approx(lp[i - 1, row.token_id].item(), abs=1e-5)
            assert row.reverse_kl == pytest.approx(kl[i - 1].item(), abs=1e-5)
            assert row.top_ids.tolist() == lp[i - 1].topk(5).indices.tolist()
            assert row.ref_top_p == pytest.approx(lq[i - 1].exp().topk(5).values.numpy(), abs=1e-5)
    run.penalty.reference.model.float()


def test_rewards_and_advantages_are_kept(finished):
    _, _, table, _, _ = finished
    frame = table.to_pandas()
    mine = frame[~frame.is_prompt]
    assert mine.reward.notna().all()
    assert mine.advantage.notna().all()
    assert mine.advantage.std() > 0


def test_the_page_and_the_statistics_count_completions_only(finished):
    _, folder, table, metadata, _ = finished
    page = (folder / "kl" / "report.html").read_text()
    assert "Content-Security-Policy" in page
    (data,) = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, flags=re.DOTALL)
    json.loads(data, parse_constant=pytest.fail)  # NaN is no JSON
    stats = Statistics.of(table, metadata)
    frame = table.to_pandas()
    assert stats.to_dict()
    assert stats.quantities["reverse"].count == (~frame.is_prompt).sum()


def test_every_second_rollout_and_the_last(tmp_path):
    tiny.trainer(tmp_path, max_steps=8, num_ppo_epochs=2, kl_log_tokens=2).train()
    names = sorted(p.name for p in (tmp_path / "kl").glob("*.parquet"))
    assert names == ["tokens_000001-r0.parquet", "tokens_000005-r0.parquet", "tokens_000007-r0.parquet"]


def test_the_last_rollout_is_always_kept(tmp_path):
    tiny.trainer(tmp_path, max_steps=4, kl_log_tokens=8).train()
    assert sorted(p.name[7:13] for p in (tmp_path / "kl").glob("*.parquet")) == ["000001", "000004"]


def test_nothing_is_written_by_default(tmp_path):
    tiny.trainer(tmp_path, max_steps=1).train()
    assert not (tmp_path / "kl").exists()
