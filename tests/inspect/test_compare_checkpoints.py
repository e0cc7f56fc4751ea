import csv
import io
import json
import math

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from weightlab.exceptions import UsageError
from weightlab.inspect import Checkpoint, compare_checkpoints, esd, layer_report, pair_layers


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(m, n, rank, seed=7):
    return gaussian(m, rank, seed=seed) @ gaussian(rank, n, seed=seed + 1)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (20, 12, 3, 3)])
@pytest.mark.parametrize("conv", ["slices", "flattened"])
def test_numbers_are_those_of_the_change(shape, conv):
    W = gaussian(*shape)
    D = 0.1 * gaussian(*shape, seed=1) + 0.02 * low_rank(shape[0], math.prod(shape[1:]), 3).reshape(shape)
    comparison = compare_checkpoints({"w": W}, {"w": W + D}, conv=conv, keep_eigenvalues=True)
    (row,) = comparison.rows
    D = (W + D).double() - W.double()
    (before,), (after,), (change,) = (layer_report({"w": x}, conv=conv).rows for x in (W, W + D.float(), D))
    assert (row.name, row.shape, row.status, row.rows) == ("w", shape, "ok", None)
    assert (row.alpha_before, comparison.before.rows) == (before.alpha, (before,))
    assert row.alpha_after == pytest.approx(after.alpha, rel=1e-6)
    assert row.relative_norm == pytest.approx(float(D.norm() / W.double().norm()), rel=1e-6)
    matrices = D.flatten(2).permute(2, 0, 1) if len(shape) > 2 and conv == "slices" else D.flatten(1)
    assert row.spectral_norm == pytest.approx(float(torch.linalg.svdvals(matrices).max()), rel=1e-6)
    assert row.stable_rank == pytest.approx(change.stable_rank, rel=1e-6)
    assert row.effective_rank == pytest.approx(change.effective_rank, rel=1e-6)
    assert row.alpha == pytest.approx(change.alpha, rel=1e-4)
    assert row.n_tail == change.n_tail
    torch.testing.assert_close(comparison.eigenvalues["w"], esd(D, conv=conv), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [1, 5])
def test_a_merged_low_rank_change_has_its_rank(dtype, rank):
    W = (0.02 * gaussian(200, 150)).to(dtype)
    V = (W.double() + 0.005 * low_rank(200, 150, rank).double()).to(dtype)
    (row,) = compare_checkpoints({"w": W}, {"w": V}).rows
    assert row.rank == rank
    # Rounding's noise makes the change full in the strict sense.
    values = torch.linalg.svdvals(V.double() - W.double())
    assert int((values > 1e-12 * values[0]).sum()) == 150


def test_overlap_is_that_of_the_leading_singular_vectors():
    W, V = gaussian(64, 48), gaussian(64, 48) + 0.3 * gaussian(64, 48, seed=1)
    (row,) = compare_checkpoints({"w": W}, {"w": V}).rows
    (U0, _, Vh0), (U1, _, Vh1) = (torch.linalg.svd(x.double()) for x in (W, V))
    assert row.overlap_out == pytest.approx(float((U0[:, :8].mT @ U1[:, :8]).square().sum()) / 8, rel=1e-4)
    assert row.overlap_in == pytest.approx(float((Vh0[:8] @ Vh1[:8].mT).square().sum()) / 8, rel=1e-4)
    assert row.overlap == pytest.approx((row.overlap_out + row.overlap_in) / 2)
    # Rotating the inputs leaves the outputs' space, and the other way round.
    Q = torch.linalg.qr(gaussian(48, 48, seed=2).double()).Q
    (rotated,) = compare_checkpoints({"w": W.double()}, {"w": W.double() @ Q}).rows
    assert rotated.overlap_out == pytest.approx(1, abs=1e-6)
    assert rotated.overlap_in < 0.6


def test_overlap_of_large_matrices_is_told_where_it_is_certain():
    flat = gaussian(600, 520)
    spiked = flat + 20 * low_rank(600, 520, 8)
    moved = spiked + 0.1 * gaussian(600, 520, seed=1)
    certain, uncertain = compare_checkpoints(
        {"spiked": spiked, "flat": flat}, {"spiked": moved, "flat": flat + 0.1 * gaussian(600, 520, seed=1)}
    ).rows
    assert certain.overlap > 0.99
    assert math.isnan(uncertain.overlap)


def test_unchanged_layers():
    W = gaussian(30, 40)
    comparison = compare_checkpoints(
        {"a": W, "b": W.clone()}, {"a": W.clone(), "b": W.double()}, keep_eigenvalues=True
    )
    for row in comparison.rows:
        assert (row.status, row.relative_norm, row.rank, row.overlap) == ("unchanged", 0.0, 0, 1.0)
        assert row.alpha_before == row.alpha_after
    assert [row.dtype for row in comparison.after.rows] == ["float32", "float64"]
    assert comparison.eigenvalues == {}
    assert (comparison.summary["changed"], comparison.summary["unchanged"]) == (0, 2)


def test_layers_that_cannot_be_compared_are_named():
    before = {"both": gaussian(20, 20), "grown": gaussian(20, 20), "old": gaussian(20, 20)}
    after = {"both": gaussian(20, 20, seed=1), "grown": gaussian(30, 20), "new": gaussian(20, 20)}
    comparison = compare_checkpoints(before, after)
    assert [row.name for row in comparison.rows] == ["both"]
    assert comparison.only_before == ("old",)
    assert comparison.only_after == ("new",)
    assert comparison.shapes_differ == {"grown": ((20, 20), (30, 20))}
    assert comparison.summary["shapes_differ"] == 1
    selected = compare_checkpoints(before, after, layers=["both"])
    assert selected.only_before == selected.only_after == ()


@pytest.mark.parametrize("more", ["before", "after"])
def test_resized_tables_of_tokens_are_compared_where_both_have_rows(more):
    small, large = {"embed.weight": gaussian(30, 20)}, {"embed.weight": gaussian(34, 20, seed=1)}
    (row,) = compare_checkpoints(*((large, small) if more == "before" else (small, large))).rows
    assert row.rows == ((34, 30) if more == "before" else (30, 34))
    assert row.shape == (30, 20)
    D = large["embed.weight"][:30] - small["embed.weight"]
    base = (large if more == "before" else small)["embed.weight"][:30]
    assert row.relative_norm == pytest.approx(float(D.norm() / base.norm()), rel=1e-5)
    same = {"embed.weight": torch.cat([small["embed.weight"], torch.ones(4, 20)])}
    assert compare_checkpoints(small, same).rows[0].status == "unchanged"


def test_names_may_differ_by_a_first_part():
    W = {"h.0.w": gaussian(20, 20), "h.1.w": gaussian(20, 20)}
    prefixed = {
        **{f"transformer.{name}": tensor + 1 for name, tensor in W.items()},
        "lm_head": gaussian(9, 9),
    }
    for before, after in ((W, prefixed), (prefixed, W)):
        pairing = pair_layers(Checkpoint(before), Checkpoint(after))
        assert [pair.before.name[-5:] == pair.after.name[-5:] for pair in pairing.pairs] == [True, True]
        assert (pairing.only_before, pairing.only_after) in (((), ("lm_head",)), (("lm_head",), ()))


def test_broken_layers_are_named_and_the_rest_goes_on():
    W = {name: gaussian(20, 20) for name in ("nan", "inf", "good", "zero")} | {"small": gaussian(4, 4)}
    W["zero"].zero_()
    V = {name: tensor + 0.1 * gaussian(*tensor.shape, seed=3) for name, tensor in W.items()}
    W["nan"][0, 0] = math.nan
    V["inf"][0, 0] = math.inf
    comparison = compare_checkpoints(W, V)
    rows = {row.name: row for row in comparison.rows}
    assert (rows["nan"].status, rows["inf"].status) == ("non-finite before", "non-finite after")
    assert (rows["good"].status, rows["small"].status) == ("ok", "too small")
    assert not math.isnan(rows["small"].relative_norm)
    assert math.isinf(rows["zero"].relative_norm)
    assert math.isnan(rows["zero"].overlap)
    assert comparison.new_flags["non-finite"] == ("inf",)
    assert comparison.before.flags["non-finite"] == ("nan",)


def test_8_bit_types_and_layers_over_the_limit():
    W = gaussian(40, 40).to(torch.float8_e4m3fn)
    V = (W.float() * 2).to(torch.float8_e4m3fn)
    (row,) = compare_checkpoints({"w": W}, {"w": V}).rows
    assert row.relative_norm == pytest.approx(1.0, rel=1e-6)
    (large,) = compare_checkpoints({"w": W}, {"w": V}, max_eigenvalues=30).rows
    assert (large.status, large.rank) == ("too large", None)


def test_float32_leaves_out_ranks():
    W, V = gaussian(30, 40), gaussian(30, 40, seed=1)
    (row,) = compare_checkpoints({"w": W}, {"w": V}, dtype=torch.float32).rows
    (exact,) = compare_checkpoints({"w": W}, {"w": V}).rows
    assert row.rank is None
    assert math.isnan(row.effective_rank)
    assert row.relative_norm == pytest.approx(exact.relative_norm, rel=1e-5)


def test_sources_progress_and_one_pair_at_a_time(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 10))
    tuned = {name: tensor + 0.01 for name, tensor in model.state_dict().items()}
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    torch.save(tuned, tmp_path / "tuned.pt")
    loaded, told = [], []
    get = Checkpoint.__getitem__
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: loaded.append(name) or get(self, name))
    comparison = compare_checkpoints(
        tmp_path / "base.safetensors", tmp_path / "tuned.pt", tell=lambda *facts: told.append(facts)
    )
    assert told == [(0, 2, "0.weight"), (1, 2, "2.weight")]
    assert loaded == ["0.weight"] * 2 + ["2.weight"] * 2
    assert comparison.rows == compare_checkpoints(model, tuned).rows


def test_json_csv_table_and_plot(tmp_path):
    before = {"a": gaussian(20, 30), "embed": gaussian(20, 9), "old": gaussian(9, 9)}
    after = {"a": gaussian(20, 30, seed=1), "embed": gaussian(22, 9, seed=1)}
    comparison = compare_checkpoints(before, after)
    content = json.loads(comparison.to_json(tmp_path / "c.json"))
    assert json.loads((tmp_path / "c.json").read_text()) == content
    assert content["rows"][0]["relative_norm"] == comparison.rows[0].relative_norm
    assert content["before"]["rows"][0]["alpha"] == comparison.rows[0].alpha_before
    assert content["only_before"] == ["old"]
    rows = list(csv.DictReader(io.StringIO(comparison.to_csv(tmp_path / "c.csv"))))
    assert (tmp_path / "c.csv").read_text() == comparison.to_csv()
    assert (rows[0]["shape"], rows[0]["rows"], rows[1]["rows"]) == ("20x30", "", "20->22")
    console = Console(width=200, file=io.StringIO())
    console.print(comparison)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "20 → 22 rows" in shown
    assert f"{comparison.rows[0].relative_norm:.3g}" in shown
    above, below = comparison.plot().axes
    assert list(above.lines[0].get_ydata()) == [row.alpha_before for row in comparison.rows]
    assert [bar.get_height() for bar in below.patches] == [row.relative_norm for row in comparison.rows]


def test_bad_input(tmp_path):
    with pytest.raises(UsageError, match=r"no layer of dict is in dict .* they have a 9×9 and b 9×9"):
        compare_checkpoints({"a": gaussian(9, 9)}, {"b": gaussian(9, 9)})
    with pytest.raises(UsageError, match="they have a 9×9 and a 8×9"):
        compare_checkpoints({"a": gaussian(9, 9)}, {"a": gaussian(8, 9)})
    with pytest.raises(UsageError, match="they have a 9×9 and no layers"):
        compare_checkpoints({"a": gaussian(9, 9)}, {"a": gaussian(9)})
    with pytest.raises(UsageError, match="matches x"):
        compare_checkpoints({"a": gaussian(9, 9)}, {"a": gaussian(9, 9)}, layers=["x"])
    save_file({"q.lora_A.weight": gaussian(2, 9)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 2}')
    with pytest.raises(UsageError, match="is an adapter, which has no weights to compare"):
        compare_checkpoints({"q": gaussian(9, 9)}, tmp_path)
