import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightlab.merge import (
    backfill_curve,
    backfill_order,
    compatibility_report,
    fit_adapter,
    retrieval_report,
)
from weightlab.merge import retrieval as module


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def labels(n, classes, seed=0):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))


def brute_force(query, gallery, query_labels, gallery_labels, k, exclude_self=False):
    """One query and one item at a time; wrong items first among equals."""
    hits, precisions, skipped = [], [], 0
    for i, x in enumerate(query.tolist()):
        ranked = []
        for j, y in enumerate(gallery.tolist()):
            if exclude_self and i == j:
                continue
            dot = sum(a * b for a, b in zip(x, y, strict=True))
            cosine = dot / math.sqrt(sum(a * a for a in x) * sum(b * b for b in y))
            # Equal up to rounding is equal.
            ranked.append((-round(cosine, 9), query_labels[i] == gallery_labels[j]))
        ranked.sort()
        places = [place for place, (_, right) in enumerate(ranked, 1) if right]
        if not places:
            skipped += 1
            continue
        hits.append(places[0])
        precisions.append(sum(n / place for n, place in enumerate(places, 1)) / len(places))
    cmc = {each: sum(first <= each for first in hits) / len(hits) for each in k}
    return cmc, sum(precisions) / len(precisions), skipped, hits


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(2, 12),
    st.integers(1, 4),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_is_brute_force(q, g, d, classes, exclude_self, seed):
    if exclude_self:
        q = g
    # Few different directions of equal length, so that similarities tie.
    corners = torch.cat([torch.eye(d, dtype=torch.float64), -torch.eye(d, dtype=torch.float64)])
    query, gallery = corners[labels(q, 2 * d, seed)], corners[labels(g, 2 * d, seed + 1)] * 4
    a, b = labels(q, classes, seed + 2), labels(g, classes, seed + 3)
    if exclude_self:
        b = a
    arguments = (query, gallery, a, b)
    others = [(a[i] == b[torch.arange(g) != i] if exclude_self else a[i] == b).any() for i in range(q)]
    if not any(others):
        with pytest.raises(ValueError, match="no query's class"):
            retrieval_report(*arguments, exclude_self=exclude_self)
        return
    report = retrieval_report(*arguments, k=(1, 2, 5), exclude_self=exclude_self)
    cmc, mean_ap, skipped, hits = brute_force(*arguments, (1, 2, 5), exclude_self)
    assert report.cmc == pytest.approx(cmc)
    assert report.mean_ap == pytest.approx(mean_ap)
    assert (report.queries, report.skipped) == (q - skipped, skipped)
    assert report.first_ranks.tolist() == hits


def test_random_embeddings_and_pieces(monkeypatch):
    query, gallery, a, b = gaussian(13, 4), gaussian(29, 4, seed=1), labels(13, 5), labels(29, 5, 1)
    whole = retrieval_report(query, gallery, a, b, k=[1, 3])
    cmc, mean_ap, _, _ = brute_force(query, gallery, a, b, (1, 3))
    assert whole.cmc == pytest.approx(cmc)
    assert whole.mean_ap == pytest.approx(mean_ap)
    monkeypatch.setattr(module, "_CHUNK", 60)
    pieces = retrieval_report(query, gallery, a, b, k=[1, 3])
    assert pieces == whole
    assert torch.equal(pieces.average_precision, whole.average_precision)


def test_only_one_piece_of_similarities_is_held(monkeypatch):
    sizes = []
    ranks = module._ranks

    def watched(similarity, relevant):
        sizes.append(similarity.numel())
        return ranks(similarity, relevant)

    monkeypatch.setattr(module, "_ranks", watched)
    monkeypatch.setattr(module, "_CHUNK", 500)
    retrieval_report(gaussian(64, 3), gaussian(100, 3), labels(64, 3), labels(100, 3))
    assert max(sizes) == 500
    assert sum(sizes) == 6400


def test_ties_count_against_and_the_gallerys_order_does_not_matter():
    gallery = torch.ones(6, 2)
    classes = torch.tensor([0, 0, 1, 1, 1, 1])
    query = torch.ones(1, 2)
    expected = (1 / 5 + 2 / 6) / 2
    for seed in range(4):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        report = retrieval_report(query, gallery, torch.tensor([0]), classes[order], k=[4, 5])
        assert report.cmc == {4: 0.0, 5: 1.0}
        assert report.mean_ap == pytest.approx(expected)


def test_lengths_do_not_matter_and_rotations_neither():
    query, gallery, a, b = gaussian(20, 5), gaussian(30, 5, seed=1), labels(20, 3), labels(30, 3, 1)
    Q = torch.linalg.qr(gaussian(5, 5, seed=2)).Q
    scales = gaussian(30, 1, seed=3).exp()
    assert retrieval_report(query @ Q, 3 * scales * gallery @ Q, a, b) == retrieval_report(
        query, gallery, a, b
    )


def test_an_item_does_not_find_itself():
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]])
    y = torch.tensor([0, 1, 2])
    assert retrieval_report(x, x, y, y, k=[1]).cmc == {1: 1.0}
    with pytest.raises(ValueError, match="no query's class is in the gallery"):
        retrieval_report(x, x, y, y, exclude_self=True)
    report = retrieval_report(
        x, x, torch.tensor([0, 0, 7]), torch.tensor([0, 0, 7]), k=[1], exclude_self=True
    )
    assert (report.queries, report.skipped, report.cmc[1]) == (2, 1, 0.0)


def test_half_precision_is_widened():
    x, y = gaussian(30, 8, dtype=torch.bfloat16), labels(30, 3)
    assert retrieval_report(x, x, y, y, exclude_self=True) == retrieval_report(
        x.float(), x.float(), y, y, exclude_self=True
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "query must be of floating-point type"),
        ({"query": torch.ones(2, 4)}, ValueError, "equally many dimensions, got 4 and 3"),
        ({"query": torch.ones(3)}, ValueError, r"query must have shape \(items, dimensions\), got \(3,\)"),
        ({"gallery": torch.tensor([[1.0, 0, 0], [0, 0, 0]])}, ValueError, "1 rows of gallery are zero.*: 1;"),
        (
            {"query": torch.tensor([[1.0, 0, 0], [math.nan, 0, 0]])},
            ValueError,
            "1 rows of query are not finite: 1;",
        ),
        ({"query_labels": torch.tensor([0, 1, 1])}, ValueError, r"query_labels must have shape \(2,\)"),
        ({"gallery_labels": torch.tensor([0.0, 1.0])}, TypeError, "gallery_labels must be integers"),
        ({"k": [0, 1]}, ValueError, r"k must be positive numbers, got \[0, 1\]"),
        ({"gallery_labels": torch.tensor([5, 6])}, ValueError, "no query's class is in the gallery"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "query": torch.ones(2, 3),
        "gallery": torch.ones(2, 3),
        "query_labels": torch.tensor([0, 1]),
        "gallery_labels": torch.tensor([0, 1]),
    }
    with pytest.raises(error, match=message):
        retrieval_report(**(arguments | change))


def test_exclude_self_needs_one_set():
    with pytest.raises(
        ValueError, match="exclude_self needs query and gallery to be the same items, got 2 and 3"
    ):
        retrieval_report(torch.ones(2, 2), torch.ones(3, 2), labels(2, 1), labels(3, 1), exclude_self=True)


class TestBackfilling:
    def test_order_is_by_distance_to_the_class(self):
        x, y = gaussian(40, 5), labels(40, 4)
        order = backfill_order(x, y)
        unit = x / x.norm(dim=1, keepdim=True)
        closeness = [
            float(torch.nn.functional.cosine_similarity(unit[i], unit[y == y[i]].mean(0), dim=0))
            for i in range(40)
        ]
        assert order.tolist() == sorted(range(40), key=closeness.__getitem__)
        assert backfill_order(x, y, hardest_first=False).tolist() == order.flip(0).tolist()

    def test_curve_is_a_search_of_each_mixture(self):
        old, new, query = gaussian(30, 4), gaussian(30, 4, seed=1), gaussian(20, 4, seed=2)
        a, b = labels(20, 3), labels(30, 3, 1)
        order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
        curve = backfill_curve(query, old, new, a, b, order, fractions=[0, 0.5, 1])
        assert curve.fractions == (0.0, 0.5, 1.0)
        mixed = old / old.norm(dim=1, keepdim=True)
        mixed[order[:15]] = new[order[:15]]
        for place, gallery in enumerate([old, mixed, new]):
            report = retrieval_report(query, gallery, a, b)
            assert curve.top1[place] == report.cmc[1]
            assert curve.mean_ap[place] == pytest.approx(report.mean_ap)
        first, middle, last = curve.top1
        assert curve.area == pytest.approx((first + 2 * middle + last) / 4)
        first, middle, last = curve.mean_ap
        assert curve.area_ap == pytest.approx((first + 2 * middle + last) / 4)

    def test_inputs_stay_as_they_were(self):
        old, new, y = gaussian(6, 3), gaussian(6, 3, seed=1), labels(6, 2)
        before = old.clone()
        backfill_curve(new, old, new, y, y, torch.arange(6))
        assert torch.equal(old, before)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"order": torch.tensor([0, 0, 1])}, "order must hold each of the 3 items"),
            ({"fractions": 1}, "fractions must be at least 2 points, got 1"),
            ({"fractions": [0.5, 1.5]}, "fractions must be different numbers"),
            ({"fractions": [0.5, 0.5]}, "fractions must be different numbers"),
            ({"recomputed": torch.ones(4, 2)}, "must be one gallery"),
        ],
    )
    def test_bad_input(self, change, message):
        x, y = torch.ones(3, 2), torch.tensor([0, 1, 1])
        arguments = {"query": x, "lifted": x, "recomputed": x, "query_labels": y, "gallery_labels": y}
        with pytest.raises(ValueError, match=message):
            backfill_curve(**({**arguments, "order": torch.arange(3)} | change))


class TestCompatibility:
    def data(self):
        y = labels(80, 4)
        new = gaussian(4, 6, seed=1)[y] + 0.5 * gaussian(80, 6, seed=2)
        old = new @ torch.linalg.qr(gaussian(6, 6, seed=3)).Q + 0.8 * gaussian(80, 6, seed=4)
        return new, old, y

    def test_searches_are_what_they_say(self):
        new, old, y = self.data()
        adapter = fit_adapter(new[40:], old[40:], kind="orthogonal")
        arguments = new[:40], old[:40], y[:40], new[40:], old[40:], y[40:]
        report = compatibility_report(adapter, *arguments)
        assert list(report.searches) == [
            "old / old", "new / new", "new / old", "mapped / old", "mapped / mapped", "mapped / lifted",
        ]  # fmt: skip
        expected = retrieval_report(adapter(new[:40]), adapter.lift(old[40:]), y[:40], y[40:])
        assert report.searches["mapped / lifted"] == expected
        # A rotation keeps all angles.
        assert report.self_drop == 0
        assert report.searches["mapped / mapped"].mean_ap == pytest.approx(
            report.searches["new / new"].mean_ap
        )
        better = report.searches["mapped / old"].cmc[1] > report.searches["old / old"].cmc[1]
        assert report.compatible == better

    def test_queries_alone_leave_themselves_out(self):
        new, old, y = self.data()
        adapter = fit_adapter(new, old[:, :4], forward=False)
        report = compatibility_report(adapter, new, old[:, :4], y, k=[5])
        assert list(report.searches) == ["old / old", "new / new", "mapped / old", "mapped / mapped"]
        assert report.searches["old / old"] == retrieval_report(
            old[:, :4], old[:, :4], y, y, k=[1, 5], exclude_self=True
        )

    def test_the_gallery_comes_whole(self):
        new, old, y = self.data()
        with pytest.raises(ValueError, match="go together"):
            compatibility_report(fit_adapter(new, old), new, old, y, new_gallery=new)
