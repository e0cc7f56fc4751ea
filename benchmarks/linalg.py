"""The matrix sign: time against the plain iteration of torch.optim.Muon, and accuracy against an SVD.

    python benchmarks/linalg.py --threads 1 2 --out linalg.json
    python benchmarks/linalg.py --only accuracy --write-tables docs/rooms/linalg.md

Contenders take turns, so that a busy machine slows all of them alike; times are medians over the rounds and
are compared with one another, never with numbers of another run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightlab.linalg import COEFFICIENTS, fit_newton_schulz, newton_schulz, orthogonality_error
from weightlab.linalg.coefficients import CoefficientSet
from weightlab.linalg.matrix_sign import newton_schulz_foreach
from weightlab.linalg.sign_method import METHODS, Method, choose_method
from weightlab.linalg.symmetric_products import gram, symmetric_product

Matrices = list[Tensor]
Direction = Callable[[Matrices], Any]

LISTS: dict[str, list[tuple[int, int]]] = {
    "matrices": [(512, 512), (512, 512), (512, 1024), (1024, 512), (1024, 1024)],
    "gpt2-block": [(2304, 768), (768, 768), (3072, 768), (768, 3072)],
    "small": [(128, 128), (384, 128), (512, 128), (128, 512), (120, 128), (128, 500)] * 4,
}
MUON = COEFFICIENTS["muon"].triples[0]


def plain(X: Tensor, dtype: torch.dtype) -> Tensor:
    """What torch.optim.Muon does to one matrix, in a type of choice."""
    a, b, c = MUON
    Y = X.to(dtype, copy=True)
    if X.size(0) > X.size(1):
        Y = Y.T
    Y.div_(Y.norm().clamp(min=1e-7))
    for _ in range(5):
        A = Y @ Y.T
        Y = torch.addmm(Y, torch.addmm(A, A, A, beta=b, alpha=c), Y, beta=a)
    return Y.T if X.size(0) > X.size(1) else Y


def one_by_one(matrices: Matrices, function: Callable[[Tensor], Tensor]) -> Matrices:
    return [function(X) for X in matrices]


def directions(dtype: torch.dtype) -> dict[str, Direction]:
    sign = partial(newton_schulz, dtype=dtype)
    methods: tuple[Method, ...] = METHODS
    return {
        "plain": partial(one_by_one, function=partial(plain, dtype=dtype)),
        **{name: partial(one_by_one, function=partial(sign, method=name)) for name in methods},
        "auto": partial(one_by_one, function=sign),
        "auto, foreach": partial(newton_schulz_foreach, dtype=dtype),
    }


def muon_step(matrices: Matrices) -> Callable[[Matrices], Any]:
    """A whole step of torch.optim.Muon, momentum and weights included."""
    params = [nn.Parameter(torch.zeros_like(X)) for X in matrices]
    for p, X in zip(params, matrices, strict=True):
        p.grad = X
    optimizer = torch.optim.Muon(params)
    return lambda _: optimizer.step()


def race(
    contenders: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Milliseconds of each contender, as the median over rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(-1, rounds):
        for name, run in contenders.items():
            begun = clock()
            run()
            if turn >= 0:
                times[name].append(clock() - begun)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def clock_for(name: str) -> Callable[[], float]:
    return time.process_time if name == "cpu" else time.perf_counter


def drawn(shape: tuple[int, int], spectrum: str, generator: torch.Generator) -> Tensor:
    """A Gaussian matrix, or one whose singular values fall off like 1/√i, as those of momentum do."""
    X = torch.randn(min(shape), max(shape), generator=generator)
    if spectrum == "power-law":
        mixed = torch.randn(min(shape), min(shape), generator=generator)
        X = mixed * torch.arange(1, min(shape) + 1) ** -0.5 @ X
    return X if shape[0] <= shape[1] else X.T.contiguous()


def measure_speed(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    rounds: int,
    clock: str,
    device: str,
    spectrum: str = "gaussian",
) -> dict[str, dict[str, float]]:
    generator = torch.Generator().manual_seed(0)
    matrices = [drawn(shape, spectrum, generator).to(device) for shape in shapes]
    runs: dict[str, Direction] = directions(dtype)
    if dtype == torch.bfloat16:
        runs["torch.optim.Muon"] = muon_step(matrices)

    def timed(run: Direction) -> Any:
        run(matrices)
        if device != "cpu":
            torch.cuda.synchronize()

    times = race({name: partial(timed, run) for name, run in runs.items()}, rounds, clock_for(clock))
    expected = torch.cat(
        [
            plain(X, torch.float64 if device == "cpu" else torch.float32).flatten().float()
            for X in matrices[:5]
        ]
    )
    rows: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        rows[name] = {"ms": times[name], "speedup": times["plain"] / times[name]}
        if name != "torch.optim.Muon":
            found = torch.cat([Y.flatten().float() for Y in run(matrices[:5])])
            rows[name]["error"] = float((found - expected).norm() / expected.norm())
            rows[name]["one_minus_cosine"] = 1 - float(
                torch.nn.functional.cosine_similarity(found.double(), expected.double(), dim=0)
            )
    return rows


def measure_products(rounds: int, clock: str) -> list[dict[str, Any]]:
    """Time of symmetric products over that of plain ones: the table in `symmetric_products`."""
    rows: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for m, n in ((512, 512), (512, 1024), (768, 768), (768, 3072), (1024, 1024)):
            X = (torch.randn(m, n) / (m * n) ** 0.5).to(dtype)
            A = X @ X.mT
            times = race(
                {
                    "plain gram": lambda X=X: X @ X.mT,
                    "gram": lambda X=X: gram(X),
                    "plain square": lambda A=A: torch.addmm(A, A, A, alpha=0.5),
                    "square": lambda A=A: symmetric_product(A, A, [(1.0, A)], alpha=0.5),
                },
                rounds,
                clock_for(clock),
            )
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "m": m,
                    "n": n,
                    "gram": times["gram"] / times["plain gram"],
                    "square": times["square"] / times["plain square"],
                    "gflops": 2e-6 * m * m * n / times["plain gram"],
                }
            )
    return rows


SPECTRA: dict[str, Callable[[Tensor], Tensor] | None] = {
    "Gaussian": None,
    "1/√i": lambda i: i**-0.5,
    "1/i": lambda i: 1 / i,
}
SIDE = 256
ASPECTS = (1.0, 1.5, 4.0, 8.0)
STEPS = (3, 5, 8)


def test_matrix(aspect: float, spectrum: str) -> Tensor:
    """A matrix with 256 rows, in float64, with the spectrum and random singular vectors."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(SIDE, round(SIDE * aspect), dtype=torch.float64, generator=generator)
    law = SPECTRA[spectrum]
    if law is None:
        return X
    u, _, vh = torch.linalg.svd(X, full_matrices=False)
    return u * law(torch.arange(1, SIDE + 1, dtype=torch.float64)) @ vh


def accuracy_table(dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """How near results are to the polar factor, by coefficients, aspect ratio, spectrum and steps.

    Of each result: `rms`, the root mean square of its singular values minus one by a float64 SVD;
    `distance`, `‖Y − U Vᵀ‖_F / ‖U Vᵀ‖_F` with U and V of the input's float64 SVD, which sees a turn of the singular
    vectors as well; `orthogonality`, `orthogonality_error`.
    """
    rows: list[dict[str, Any]] = []
    for spectrum in SPECTRA:
        for aspect in ASPECTS:
            X = test_matrix(aspect, spectrum)
            u, _, vh = torch.linalg.svd(X, full_matrices=False)
            for name, chosen, steps in _accuracy_contenders((X.size(0), X.size(1))):
                Y = newton_schulz(X.float(), chosen, steps, dtype=dtype).double()
                rows.append(
                    {
                        "coefficients": name,
                        "spectrum": spectrum,
                        "aspect": aspect,
                        "steps": steps,
                        "rms": float((torch.linalg.svdvals(Y) - 1).square().mean().sqrt()),
                        "distance": float((Y - u @ vh).norm() / SIDE**0.5),
                        "orthogonality": float(orthogonality_error(Y)),
                    }
                )
    return rows


def _accuracy_contenders(shape: tuple[int, int]) -> list[tuple[str, CoefficientSet, int]]:
    """Every named set at every number of steps that it can do, and sets fitted to a Gaussian of the shape."""
    found: list[tuple[str, CoefficientSet, int]] = []
    for name, chosen in COEFFICIENTS.items():
        single = len(chosen.triples) == 1
        found += [
            (name, chosen, steps)
            for steps in sorted({*STEPS, chosen.steps})
            if single or steps <= chosen.steps
        ]
    for steps in STEPS:
        for shared in (True, False):
            name = "fitted, one triple" if shared else "fitted"
            found.append((name, fit_newton_schulz(shape, steps=steps, shared=shared), steps))
    return found


def accuracy_markdown(rows: list[dict[str, Any]], steps: int | None = 5, figure: str = "rms") -> str:
    """One figure as a Markdown table: a row for each set, a column for each spectrum and aspect ratio.

    `steps=None` takes each set at the number of steps that is its own.
    """
    columns = [(spectrum, aspect) for spectrum in SPECTRA for aspect in ASPECTS]
    lines = [
        "| Coefficients | Steps | " + " | ".join(f"{s} {a:g}" for s, a in columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    for name in dict.fromkeys(row["coefficients"] for row in rows):
        wanted = steps if steps is not None else COEFFICIENTS[name].steps if name in COEFFICIENTS else 8
        cells = {
            (r["spectrum"], r["aspect"]): r[figure]
            for r in rows
            if r["coefficients"] == name and r["steps"] == wanted
        }
        if cells:
            body = " | ".join(_short(cells[column]) for column in columns)
            lines.append(
                f"| `{name}` | {wanted} | {body} |"
                if name in COEFFICIENTS
                else f"| {name} | {wanted} | {body} |"
            )
    return "\n".join(lines)


def write_tables(page: Path, rows: list[dict[str, Any]]) -> None:
    """Replace what stands between a page's marks by the tables of the accuracy."""
    text = page.read_text()
    tables = {
        "rms": accuracy_markdown(rows),
        "own-steps": accuracy_markdown(rows, steps=None),
        "orthogonality": accuracy_markdown(rows, figure="orthogonality"),
    }
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        head, _, rest = text.partition(begin)
        _, found, tail = rest.partition(end)
        if not found:
            raise SystemExit(f"{page} lacks the marks {begin.strip()} and {end}")
        text = f"{head}{begin}{table}\n{end}{tail}"
    page.write_text(text)


def _short(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0095 else f"{value:.0e}".replace("e-0", "e-")


def show_speed(rows: dict[str, dict[str, float]]) -> None:
    print(f"{'':20}{'ms':>10}{'x plain':>9}{'error':>10}{'1 - cos':>10}")
    for name, row in rows.items():
        error = f"{row['error']:10.1e}{row['one_minus_cosine']:10.1e}" if "error" in row else ""
        print(f"{name:20}{row['ms']:10.2f}{row['speedup']:9.2f}{error}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["speed", "products", "accuracy"],
        default=["speed", "products", "accuracy"],
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="wall time, or processor time (for one thread on a machine that is busy)",
    )
    parser.add_argument(
        "--spectrum",
        choices=["gaussian", "power-law"],
        default="gaussian",
        help="of the matrices that are timed: the Gram form in bfloat16 starts afresh more often when it falls off",
    )
    parser.add_argument(
        "--write-tables", type=Path, help="put the accuracy tables between the marks of this page"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    report: dict[str, Any] = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "device": args.device,
        "clock": args.clock,
        "spectrum": args.spectrum,
    }
    if "speed" in args.only:
        report["speed"] = []
        for name in args.lists:
            for dtype in args.dtypes:
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    kind: torch.dtype = getattr(torch, dtype)
                    print(f"\n{name}, {dtype}, {threads} thread(s)")
                    rows = measure_speed(
                        LISTS[name], kind, args.rounds, args.clock, args.device, args.spectrum
                    )
                    show_speed(rows)
                    schedule, device = COEFFICIENTS["muon"].schedule(), torch.device(args.device)
                    chosen = {
                        f"{m}x{n}": choose_method(min(m, n), max(m, n), schedule, kind, device)
                        for m, n in dict.fromkeys(LISTS[name])
                    }
                    print("auto takes", ", ".join(f"{shape} {method}" for shape, method in chosen.items()))
                    report["speed"].append(
                        {"list": name, "dtype": dtype, "threads": threads, "rows": rows, "auto": chosen}
                    )
    if "products" in args.only and args.device == "cpu":
        torch.set_num_threads(args.threads[0])
        report["products"] = measure_products(4 * args.rounds, args.clock)
        print(f"\nsymmetric products, {args.threads[0]} thread(s): time / plain")
        for row in report["products"]:
            print(
                f"{row['dtype']:9}{row['m']:6} x {row['n']:<6}gram {row['gram']:.2f}   square {row['square']:.2f}   "
                f"plain {row['gflops']:.0f} GFLOP/s"
            )
    if "accuracy" in args.only:
        report["accuracy"] = accuracy_table()
        print(
            "\nroot mean square of singular values minus one, 256 rows; columns: spectrum, columns over rows"
        )
        print(accuracy_markdown(report["accuracy"]))
        if args.write_tables:
            write_tables(args.write_tables, report["accuracy"])
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
