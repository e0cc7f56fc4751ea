import csv
import dataclasses
import io
import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from weightlab.exceptions import UsageError
from weightlab.inspect import (
    FLAGS,
    Checkpoint,
    esd,
    layer_report,
    layer_rows,
    make_report,
    randomized_control,
    walk_layers,
)


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy(m, n, seed=0, power=0.7):
    """A matrix whose spectrum falls off as a power."""
    U, _, Vh = torch.linalg.svd(gaussian(m, n, seed=seed).double(), full_matrices=False)
    return (U * torch.arange(1, min(m, n) + 1).double().pow(-power) @ Vh).float()


def published(weight):
    """WeightWatcher's published rules in float64, by SVD, loops and products: α, D, xmin, tail, ERG."""
    W = weight.double().numpy()
    if W.ndim > 2:
        slices = np.moveaxis(W.reshape(*W.shape[:2], -1), -1, 0) * np.sqrt(0.5)
        evals = np.sort(np.concatenate([np.linalg.svd(one, compute_uv=False) ** 2 for one in slices]))
    else:
        evals = np.sort(np.linalg.svd(W, compute_uv=False) ** 2)
    x = evals[evals > 1e-5]
    n = len(x)
    best = (1.0, 0.0, 0.0)
    for i in range(n - 1):
        m = n - i
        if n < 20 and m < 8:
            continue
        alpha = 1 + (m - (n < 20)) / np.log(x[i:] / x[i]).sum()
        D = np.abs(1 - (x[i:] / x[i]) ** (1 - alpha) - np.arange(m) / m).max() if alpha > 1 else 1.0
        if best[0] > D:
            best = (D, alpha, x[i])
    D, alpha, xmin = best
    scaled = evals * len(evals) / evals.sum()
    erg = next(k for k in range(1, len(evals) + 1) if np.prod(scaled[-k:]) < 1)
    return alpha, D, xmin, int((evals >= xmin).sum()), erg


@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (12, 40), (16, 8, 3, 3), (64, 4, 5), (50, 50)])
@pytest.mark.parametrize("make", [gaussian, heavy])
def test_parity_with_the_published_rules(shape, make):
    weight = make(shape[0], math.prod(shape[1:])).reshape(shape)
    (row,) = layer_report({"w": weight}).rows
    alpha, D, xmin, tail, erg = published(weight)
    assert row.status == "ok"
    assert row.alpha == pytest.approx(alpha, rel=1e-6)
    assert row.ks == pytest.approx(D, rel=1e-6)
    assert row.xmin == pytest.approx(xmin, rel=1e-6)
    assert (row.n_tail, row.erg_count, row.erg_gap) == (tail, erg, erg - tail)


def test_scalars_are_their_definitions():
    weight = heavy(40, 60)
    (row,) = layer_report({"w": weight}).rows
    s = torch.linalg.svdvals(weight.double())
    x, p, q = s.square(), s.square() / s.square().sum(), s / s.sum()
    expected = {
        "n_eigenvalues": 40,
        "alpha_hat": row.alpha * math.log10(x[0]),
        "xmax": x[0],
        "stable_rank": x.sum() / x[0],
        "effective_rank": torch.exp(-(q * q.log()).sum()),
        "matrix_rank": 40,
        "entropy": -(p * p.log()).sum() / math.log(40),
        "log_norm": math.log10(x.sum()),
        "log_spectral_norm": math.log10(x[0]),
        "log_alpha_norm": math.log10(x.pow(row.alpha).sum()),
        "orthogonality": (x - 1).square().mean().sqrt(),
    }
    for name, value in expected.items():
        assert getattr(row, name) == pytest.approx(float(value), rel=1e-8), name


def test_scale_moves_norms_alone():
    weight = heavy(40, 60)
    (plain,), (scaled,) = (layer_report({"w": W}).rows for W in (weight, 8 * weight))
    for name in ("alpha", "ks", "sigma", "stable_rank", "effective_rank", "entropy"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name), rel=1e-9), name
    for name in ("n_tail", "erg_count", "erg_gap", "matrix_rank"):
        assert getattr(scaled, name) == getattr(plain, name)
    assert scaled.alpha_hat - plain.alpha_hat == pytest.approx(2 * plain.alpha * math.log10(8))
    (divided,) = layer_report({"w": weight}, normalize="1/N").rows
    assert divided.log_norm == pytest.approx(plain.log_norm - math.log10(60))
    assert divided.orthogonality == pytest.approx(plain.orthogonality)


def test_what_leaves_singular_values_leaves_the_row():
    weight = heavy(40, 60).double()
    Q = torch.linalg.qr(gaussian(40, 40, seed=5).double()).Q
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    (plain,) = layer_report({"w": weight}).rows
    for same in (weight.mT, weight[:, order], weight.flip(0), Q @ weight):
        (row,) = layer_report({"w": same}).rows
        for name in ("alpha", "ks", "xmin", "alpha_hat", "erg_eigenvalue", "entropy", "orthogonality"):
            assert getattr(row, name) == pytest.approx(getattr(plain, name), rel=1e-9), name
        assert (row.n_tail, row.erg_count, row.matrix_rank) == (
            plain.n_tail,
            plain.erg_count,
            plain.matrix_rank,
        )


def test_orthonormal_weights_have_no_deviation():
    Q = torch.linalg.qr(gaussian(30, 12)).Q
    kernel = torch.stack([torch.linalg.qr(gaussian(12, 9, seed=seed)).Q for seed in range(4)], -1).reshape(
        12, 9, 2, 2
    )
    for row in layer_report({"matrix": Q, "conv": kernel}).rows:
        assert row.orthogonality < 1e-6
        assert row.n_eigenvalues == row.matrix_rank


def test_rank_of_low_rank_weights():
    low = gaussian(40, 3) @ gaussian(3, 50, seed=1)
    exact = gaussian(40, 3).double() @ gaussian(3, 50, seed=1).double()
    for weight in (low, exact, low.bfloat16()):
        (row,) = layer_report({"w": weight}).rows
        full = int(torch.linalg.matrix_rank(weight.to(torch.promote_types(weight.dtype, torch.float32))))
        assert row.matrix_rank == full
        assert ("rank-deficient" in row.flags) == (full < 40)


def test_statuses_and_the_rest_goes_on():
    broken = gaussian(20, 20)
    broken[3, 4] = math.nan
    report = layer_report(
        {
            "broken": broken,
            "infinite": torch.full((20, 20), -math.inf).bfloat16(),
            "zero": torch.zeros(20, 30),
            "small": gaussian(3, 30),
            "wide": gaussian(70, 80),
            "identity": torch.eye(20),
            "good": heavy(40, 60),
        },
        max_eigenvalues=60,
    )
    assert {row.name: row.status for row in report.rows} == {
        "broken": "non-finite",
        "infinite": "non-finite",
        "zero": "too few",
        "small": "too small",
        "wide": "too large",
        "identity": "degenerate",
        "good": "ok",
    }
    assert report.flags["non-finite"] == ("broken", "infinite")
    assert set(report.flags) <= set(FLAGS)
    for row in report.rows[:-1]:
        assert math.isnan(row.alpha)
        assert row.n_tail is None
    assert report.rows[3].log_norm == pytest.approx(math.log10(float(esd(gaussian(3, 30)).sum())))
    assert report.summary["layers"] == 7
    assert report.summary["fitted"] == 1
    assert report.summary["alpha"] == report.rows[-1].alpha


def test_flags_follow_alpha():
    # λᵢ = i^(−2·power) has the exponent 1 + 1/(2·power).
    report = layer_report({"flat": heavy(60, 90, power=0.05), "steep": heavy(60, 90, power=2.0)})
    flat, steep = report.rows
    assert flat.alpha > 6
    assert "under-trained" in flat.flags
    assert steep.alpha < 2
    assert "over-trained" in steep.flags


def test_summary_is_the_plain_mean():
    report = layer_report({"a": heavy(40, 60), "b": heavy(30, 60, seed=1), "c": gaussian(2, 2)})
    a, b, _ = report.rows
    for name in ("alpha", "alpha_hat", "log_norm", "erg_gap"):
        assert report.summary[name] == pytest.approx((getattr(a, name) + getattr(b, name)) / 2)
    assert report.summary["parameters"] == 40 * 60 + 30 * 60 + 4


def test_float32_reports_only_what_it_supports():
    weight = heavy(40, 60)
    (exact,), (single,) = (
        layer_report({"w": weight}, dtype=dtype).rows for dtype in (torch.float64, torch.float32)
    )
    assert single.alpha == pytest.approx(exact.alpha, abs=1e-4)
    assert single.n_tail == exact.n_tail
    assert single.matrix_rank is None
    assert math.isnan(single.entropy)
    assert math.isnan(single.effective_rank)


def test_sources_agree(tmp_path):
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 32))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    reports = [
        layer_report(source)
        for source in (model, model.state_dict(), tmp_path, tmp_path / "model.safetensors")
    ]
    assert all(report.rows == reports[0].rows for report in reports)
    assert [row.kind for row in reports[0].rows] == ["conv", "matrix"]


def test_progress_and_spectra():
    told = []
    weights = {"a": heavy(20, 30), "b": heavy(30, 20)}
    report = layer_report(weights, keep_eigenvalues=True, tell=lambda *facts: told.append(facts))
    assert told == [(0, 2, "a"), (1, 2, "b")]
    assert torch.equal(report.eigenvalues["a"], esd(weights["a"]))
    assert layer_report(weights).eigenvalues == {}


def test_rows_are_read_as_they_are_asked_for_and_do_not_depend_on_those_before():
    weights = {f"w{i}": heavy(40, 60, seed=i) for i in range(3)} | {"wide": heavy(200, 210)}
    loaded = []
    found = [
        dataclasses.replace(layer, load=lambda layer=layer: (loaded.append(layer.name), layer.load())[1])
        for layer in walk_layers(Checkpoint(weights))
    ]
    rows = layer_rows(found, randomize=True)
    assert loaded == []
    first, eigenvalues = next(rows)
    assert loaded == ["w0"]
    assert torch.equal(eigenvalues, esd(weights["w0"]))
    rest = [row for row, _ in layer_rows(found[1:], randomize=True)]
    report = layer_report(weights, randomize=True)
    assert (first, *rest) == report.rows
    assert make_report("dict", [first, *rest]) == report
    with pytest.raises(ValueError, match="min_eigenvalues must be at least 2"):
        next(layer_rows(found, min_eigenvalues=1))


def test_randomized_control_is_added_on_demand():
    spiked = gaussian(40, 60)
    spiked[3, 4] = 60.0
    weights = {"spiked": spiked, "conv": heavy(16, 72).reshape(16, 8, 3, 3)}
    plain = layer_report(weights)
    assert all(row.n_traps is None and math.isnan(row.rand_max) for row in plain.rows)
    report = layer_report(weights, randomize=True, seed=3)
    assert [row.alpha for row in report.rows] == [row.alpha for row in plain.rows]
    for row in report.rows:
        control = randomized_control(weights[row.name], seed=3)
        assert (row.rand_max, row.rand_softrank, row.n_traps) == (
            control.max_eigenvalue,
            control.softrank,
            control.n_traps,
        )
    assert report.flags["traps"] == ("spiked",)
    (divided, _) = layer_report(weights, randomize=True, seed=3, normalize="1/N").rows
    assert divided.rand_max == pytest.approx(report.rows[0].rand_max / 60)
    assert divided.rand_softrank == pytest.approx(report.rows[0].rand_softrank)


def test_a_lora_folder_has_the_spectra_of_its_changes(tmp_path):
    A, B = gaussian(10, 50), gaussian(40, 10, seed=1)
    name = "base_model.model.q.lora_{}.weight"
    save_file({name.format("A"): A, name.format("B"): B}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "lora_alpha": 20}')
    (row,) = layer_report(tmp_path, randomize=True).rows
    expected = torch.linalg.svdvals(2 * B.double() @ A.double())[:10].square()
    assert (row.name, row.kind, row.shape, row.n_eigenvalues) == ("q", "delta", (40, 50), 10)
    assert row.log_norm == pytest.approx(math.log10(expected.sum()))
    assert "rank-deficient" not in row.flags
    assert row.n_traps is None
    (divided,) = layer_report(tmp_path, normalize="1/N").rows
    assert divided.log_norm == pytest.approx(row.log_norm - math.log10(50))


def test_json_csv_and_table(tmp_path):
    report = layer_report({"good": heavy(40, 60), "small": gaussian(3, 3)})
    content = json.loads(report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == content
    assert content["rows"][0]["alpha"] == report.rows[0].alpha
    assert content["rows"][1]["alpha"] is None
    assert content["summary"] == report.summary
    rows = list(csv.DictReader(io.StringIO(report.to_csv(tmp_path / "report.csv"))))
    assert (tmp_path / "report.csv").read_text() == report.to_csv()
    assert [row["name"] for row in rows] == ["good", "small"]
    assert float(rows[0]["alpha"]) == report.rows[0].alpha
    assert (rows[1]["alpha"], rows[0]["shape"]) == ("", "40x60")
    console = Console(width=200, file=io.StringIO())
    console.print(report)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "good" in shown
    assert f"{report.rows[0].alpha:.3g}" in shown
    assert "too small" in shown


def test_plot_shows_the_fitted_layers(tmp_path):
    report = layer_report({"a": heavy(40, 60), "small": gaussian(3, 3), "b": heavy(30, 60, power=0.05)})
    figure = report.plot()
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
    assert list(axes.lines[0].get_ydata()) == [report.rows[0].alpha, report.rows[2].alpha]  # type: ignore[call-overload]
    figure.savefig(tmp_path / "alpha.png")
    assert (tmp_path / "alpha.png").read_bytes().startswith(b"\x89PNG")
    assert layer_report({"small": gaussian(3, 3)}).plot().axes


def test_notebooks_show_the_table():
    shown = layer_report({"good": heavy(40, 60)})._repr_mimebundle_([], [])  # type: ignore[arg-type]
    assert "good" in shown["text/html"]


@pytest.mark.parametrize(
    ("weight", "dtype"),
    [(torch.full((9, 9), 1e30), torch.float32), (torch.eye(9).double() * 1e160, torch.float64)],
)
def test_entries_whose_squares_overflow(weight, dtype):
    report = layer_report({"w": weight, "good": heavy(40, 60)}, dtype=dtype)
    assert [row.status for row in report.rows] == ["out of range", "ok"]


def test_bad_input():
    with pytest.raises(ValueError, match="min_eigenvalues must be at least 2"):
        layer_report({"w": gaussian(9, 9)}, min_eigenvalues=1)
    with pytest.raises(ValueError, match="normalize must be"):
        layer_report({"w": gaussian(9, 9)}, normalize="N")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="w is on the meta device"):
        layer_report({"w": torch.empty(9, 9, device="meta")})
    with pytest.raises(UsageError, match="no layer of dict matches x"):
        layer_report({"w": gaussian(9, 9)}, layers=["x"])
