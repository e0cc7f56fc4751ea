"""Numbers and verdicts in words: the phrases that the terminal table and the HTML page share."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from weightlab.trial.result import ArmReport, TrialReport, Versus
from weightlab.trial.spec import Scalar

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]+")


def plain(text: object) -> str:
    r"""Return text on one line without control characters, safe to send to a terminal.

    Example:
        >>> plain("a\x1b[31m\nb")
        'a [31m b'
    """
    return _CONTROL.sub(" ", str(text)).strip()


def listed(names: Sequence[str]) -> str:
    """Join names as in a sentence.

    Example:
        >>> listed(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def number(value: Scalar | None, digits: int = 4) -> str:
    """Write one number by significant digits; anything else as it is.

    Example:
        >>> number(0.00123456), number(123456.7), number(3.0), number(True), number(None)
        ('0.001235', '123,457', '3', 'True', '-')
    """
    if value is None:
        return "-"
    if isinstance(value, (bool, str)) or not math.isfinite(value):
        return plain(value)
    if isinstance(value, int) and abs(value) < 1e9:
        return f"{value:,}"
    if 10**digits <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


@dataclass(frozen=True)
class Rounding:
    """How the numbers of one column are rounded, so that they line up and claim no false precision.

    Attributes:
        places: Decimals; `None` for two digits after the point in scientific notation.
    """

    places: int | None

    def __call__(self, value: float, *, signed: bool = False) -> str:
        """Write a number; `signed` puts a plus before what is above zero."""
        if not math.isfinite(value):
            return f"{value:+}" if signed else f"{value}"
        text = f"{value:.2e}" if self.places is None else f"{value:.{self.places}f}"
        if float(text) == 0:
            return text.lstrip("-")
        return f"+{text}" if signed and value > 0 else text

    def range(self, interval: tuple[float, float], *, signed: bool = True) -> str:
        """Write an interval in brackets, or say that there is none."""
        if not any(map(math.isfinite, interval)):
            return "no interval"
        low, high = (self(bound, signed=signed) for bound in interval)
        return f"[{low}, {high}]"


def rounding(spreads: Iterable[float], values: Iterable[float]) -> Rounding:
    """Choose decimals so that the smallest spread shows two significant digits.

    Args:
        spreads: Standard deviations or half-widths of intervals; zero and non-finite ones don't count.
        values: The numbers to write; they decide when no spread does, with four significant digits.

    Example:
        >>> rounding([0.0123, 0.4], [1.5])(1.51777)
        '1.518'
        >>> rounding([], [1.5])(1.51777)
        '1.518'
    """
    sizes = [abs(value) for value in values if math.isfinite(value) and value != 0]
    widths = [spread for spread in spreads if math.isfinite(spread) and spread > 0]
    if widths:
        places = 1 - math.floor(math.log10(min(widths)))
    else:
        places = 3 - math.floor(math.log10(max(sizes))) if sizes else 3
    if max(sizes, default=0) >= 1e7:
        return Rounding(None)
    if places > 6:
        # More decimals than a reader takes in: fall back on the numbers' own size.
        return Rounding(6) if max(sizes, default=1.0) >= 1e-4 else Rounding(None)
    return Rounding(max(0, places))


def score_rounding(report: TrialReport) -> Rounding:
    """Return the rounding of all scores of a report."""
    return rounding([arm.std for arm in report.arms], [arm.mean for arm in report.arms])


def difference_rounding(report: TrialReport) -> Rounding:
    """Return the rounding of all differences and intervals of a report."""
    found = [arm.versus for arm in report.arms if arm.versus is not None]
    spreads = [(versus.interval[1] - versus.interval[0]) / 2 for versus in found]
    return rounding(spreads, [versus.difference for versus in found])


def _three(value: float) -> str:
    """Write a positive number with three significant digits, trailing zeros kept."""
    places = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{min(max(places, 0), 6)}f}"


def duration(seconds: float | None) -> str:
    """Write a length of time.

    Example:
        >>> duration(0.042), duration(12.34), duration(125), duration(4000), duration(None)
        ('42.0 ms', '12.3 s', '2 min 05 s', '1 h 07 min', '-')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 1:
        return f"{_three(seconds * 1000)} ms"
    if seconds < 99.95:
        return f"{_three(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02} min"


def memory(mebibytes: float | None) -> str:
    """Write an amount of memory given in MiB.

    Example:
        >>> memory(0.25), memory(6.4), memory(512.4), memory(20480.0), memory(None)
        ('256 KiB', '6.40 MiB', '512 MiB', '20.0 GiB', '-')
    """
    if mebibytes is None or not math.isfinite(mebibytes):
        return "-"
    if mebibytes >= 1000:
        return f"{_three(mebibytes / 1024)} GiB"
    if 0 < mebibytes < 1:
        return f"{_three(mebibytes * 1024)} KiB"
    return f"{_three(mebibytes)} MiB"


def ratio(value: float | None, reference: float | None) -> str:
    """Write how many times the reference a value is; empty when either is missing.

    Example:
        >>> ratio(3.0, 2.0), ratio(None, 2.0)
        ('1.50x', '')
    """
    if value is None or not reference or not math.isfinite(value / reference):
        return ""
    times = value / reference
    return f"{times:.2f}x" if times < 10 else f"{times:,.0f}x"


def speed(speedup: float | None) -> str:
    """Say how much faster a challenger is; empty when that is not known.

    Example:
        >>> speed(1.5), speed(0.5), speed(None)
        ('1.50x faster', '2.00x slower', '')
    """
    if not speedup:
        return ""
    return f"{ratio(speedup, 1.0)} faster" if speedup >= 1 else f"{ratio(1.0, speedup)} slower"


def percent(share: float) -> str:
    """Write a share as a percentage.

    Example:
        >>> percent(0.95), percent(0.975)
        ('95%', '97.5%')
    """
    return f"{100 * share:.3g}%"


def settings(hyperparameters: Mapping[str, Scalar]) -> str:
    """Write hyper-parameters compactly.

    Example:
        >>> settings({"lr": 0.0031622, "nesterov": True})
        'lr=0.00316, nesterov=True'
    """
    return ", ".join(f"{plain(name)}={number(value, 3)}" for name, value in hyperparameters.items())


def challengers(report: TrialReport) -> list[tuple[ArmReport, Versus]]:
    """Return the arms that were held against the baseline, in the report's order."""
    return [(arm, arm.versus) for arm in report.arms if arm.versus is not None]


def improvement(report: TrialReport, difference: float) -> float:
    """Return a difference of the metric signed so that positive is better."""
    return -difference if report.mode == "min" else difference


def side(report: TrialReport, difference: float) -> str:
    """Return `"better"`, `"worse"` or `"no different"`."""
    gain = improvement(report, difference)
    return "better" if gain > 0 else "worse" if gain < 0 else "no different"


def direction(report: TrialReport) -> str:
    """Say which way the metric should go."""
    return "lower is better" if report.mode == "min" else "higher is better"


def wins(versus: Versus) -> str:
    """Say in how many seeds the challenger was better; a tie counts half.

    Example:
        >>> from types import SimpleNamespace
        >>> wins(SimpleNamespace(win_rate=0.9, differences=[0.0] * 5))
        '4.5 of 5'
    """
    seeds = len(versus.differences)
    return f"{versus.win_rate * seeds:.3g} of {seeds}"


def relative(report: TrialReport, difference: float) -> str:
    """Write a difference as a percentage of the baseline's score; empty where that says nothing."""
    baseline = report.arm(report.baseline).mean
    if not (math.isfinite(difference) and math.isfinite(baseline)) or abs(baseline) < 1e-12:
        return ""
    share = abs(difference / baseline)
    return f"{100 * share:.2g}%" if 1e-5 < share < 0.995 else ""


def gain(report: TrialReport, versus: Versus) -> str:
    """Say how far a challenger is from the baseline, e.g. `0.052 lower loss (3.3%)`."""
    if versus.difference == 0:
        return f"the same {plain(report.metric)}"
    amount = difference_rounding(report)(abs(versus.difference))
    share = relative(report, versus.difference)
    way = "lower" if versus.difference < 0 else "higher"
    return f"{amount} {way} {plain(report.metric)}" + (f" ({share})" if share else "")


def headline(report: TrialReport) -> str:
    """Say in one short sentence who won."""
    baseline = plain(report.baseline)
    rivals = challengers(report)
    if not rivals:
        arm = report.arm(report.baseline)
        form = score_rounding(report)
        return f"{baseline} reaches {plain(report.metric)} {form(arm.mean)}; no challenger was on trial"
    held = sorted(
        (pair for pair in rivals if pair[1].verdict == "held"),
        key=lambda pair: improvement(report, pair[1].difference),
        reverse=True,
    )
    if held:
        names = [plain(arm.name) for arm, _ in held]
        best, versus = held[0]
        if len(held) == 1:
            return f"{names[0]} beats {baseline}: {gain(report, versus)}"
        return f"{listed(names)} beat {baseline}; {plain(best.name)} by the most: {gain(report, versus)}"
    margin = f" by {number(report.minimal_effect)} or more" if report.minimal_effect else ""
    open_ = [plain(arm.name) for arm, versus in rivals if versus.verdict == "inconclusive"]
    if not open_:
        if len(rivals) == 1:
            return f"{plain(rivals[0][0].name)} does not beat {baseline}{margin}"
        return f"No challenger beats {baseline}{margin}"
    if len(rivals) == 1:
        return f"Too close to call: {open_[0]} may or may not beat {baseline}{margin}"
    return f"No challenger is shown to beat {baseline}{margin}; {listed(open_)} may"


def _reason(report: TrialReport, versus: Versus) -> str:
    zero = report.minimal_effect == 0
    claim = number(report.minimal_effect)
    if versus.verdict == "held":
        mark = "zero" if zero else f"the claimed gain of {claim}"
        return f"the whole interval clears {mark}"
    if versus.verdict == "not held":
        if zero:
            return "the claim needed any gain at all"
        if side(report, versus.difference) == "better":
            return f"the whole interval falls short of the claimed gain of {claim}"
        return f"the claim needed at least {claim} better"
    seeds = len(versus.differences)
    if not any(map(math.isfinite, versus.adjusted_interval)):
        return f"{seeds} {'seed gives' if seeds == 1 else 'seeds give'} no interval, run at least 5"
    doubt = f"the interval reaches both sides of {'zero' if zero else f'the claimed gain of {claim}'}"
    if versus.seeds_needed is None:
        return f"{doubt}, and no number of seeds under 10,000 would settle it"
    if versus.seeds_needed <= seeds:
        return f"{doubt}; a few more than {seeds} seeds may settle it"
    return f"{doubt}; about {versus.seeds_needed:,} seeds would settle it (now {seeds})"


def reason(report: TrialReport, arm: ArmReport) -> str:
    """Say why the verdict on a challenger is what it is, as half a sentence; empty for the baseline."""
    versus = arm.versus
    if versus is None:
        return ""
    form = difference_rounding(report)
    corrected = form.range(versus.adjusted_interval)
    text = _reason(report, versus)
    if corrected != form.range(versus.interval):
        text += f" (corrected for {len(challengers(report))} challengers: {corrected})"
    return text


def sentence(report: TrialReport, arm: ArmReport) -> str:
    """Say in plain English what the verdict on a challenger is and why; empty for the baseline."""
    versus = arm.versus
    if versus is None:
        return ""
    form = difference_rounding(report)
    known = any(map(math.isfinite, versus.interval))
    interval = f" {form.range(versus.interval)}" if known else ""
    return (
        f"{plain(arm.name)} vs {plain(versus.baseline)}: {versus.verdict}: "
        f"{form(versus.difference, signed=True)}{interval} in {plain(report.metric)}, "
        f"{side(report, versus.difference)}; {reason(report, arm)}."
    )


def warnings(report: TrialReport) -> list[str]:
    """Return what a reader must know: the report's notes, then what they leave unsaid."""
    notes = [plain(note) for note in report.notes]

    def said(*words: str) -> bool:
        return any(all(word.lower() in note.lower() for word in words) for note in notes)

    for arm in report.arms:
        name = plain(arm.name)
        if arm.failures and not said(name, "fail"):
            notes.append(
                f"{name}: {arm.failures} of {len(arm.runs)} report runs failed and count with the "
                "untrained model's score"
            )
        for edge in map(plain, arm.edges):
            if not said(name, edge):
                notes.append(f"{name}: tuning chose {edge}; a better value may lie beyond")
    if not report.paired and len(report.arms) > 1 and not said("pair"):
        notes.append("arms did not share initial weights and data order in every seed: pairing is broken")
    return notes
