"""The record: what re-measuring a paper's claims gave, one JSON file a paper.

A file holds, for each scale that was run, the claims with their thresholds and results, and what the
numbers depend on: package versions, class of machine, date, cost.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from weightlab.exceptions import WeightlabError
from weightlab.papers.schema import SCALES, Claim, ClaimResult, Scale

PACKAGES = ("weightlab", "torch", "numpy", "scipy", "optuna", "scikit-learn", "transformers", "peft")
_NUMBER_LIST = re.compile(r"\[\s+((?:-?[\d.eE+-]+|null)(?:,\s+(?:-?[\d.eE+-]+|null))*)\s+\]")


def checkout() -> Path | None:
    """Return the root of the source checkout that weightlab is imported from, or `None` for a wheel."""
    root = Path(__file__).resolve().parents[3]
    return root if (root / "pyproject.toml").is_file() and (root / "docs" / "record").is_dir() else None


def folder() -> Path:
    """Return the folder of the record that comes with weightlab.

    That is `docs/record` in a source checkout and a folder inside the package in an installed wheel.
    """
    root = checkout()
    return root / "docs" / "record" if root else Path(__file__).resolve().parent / "record"


def load(slug: str, where: Path | None = None) -> dict[str, Any] | None:
    """Read a paper's record.

    Args:
        slug: The paper.
        where: Folder of records. Default: `folder()`.

    Returns:
        `{"slug": ..., "scales": {scale: {"claims", "versions", "machine", "date", "cost", "failed"}}}`,
        or `None` when nothing has been recorded.

    Raises:
        WeightlabError: When the file cannot be read or is not a record of this paper.

    Example:
        >>> load("no-such-paper") is None
        True
    """
    path = (where or folder()) / f"{slug}.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise WeightlabError(f"cannot read the record {path}: {error.strerror}") from error
    except ValueError as error:
        raise WeightlabError(f"the record {path} is not JSON ({error}); restore or delete it") from error
    if (
        not isinstance(data, dict)
        or data.get("slug") != slug
        or not isinstance(data.get("scales"), dict)
        or not all(scale in SCALES for scale in data["scales"])
    ):
        raise WeightlabError(f"{path} is not a record of {slug!r}; restore or delete it")
    return data


def save(
    slug: str,
    scale: Scale,
    results: Sequence[tuple[Claim, ClaimResult]],
    *,
    failed: Mapping[str, str] | None = None,
    device: str = "cpu",
    where: Path | None = None,
) -> dict[str, Any]:
    """Put one newly run scale into a paper's record; the other scales stay as they are.

    The file is replaced in one step, so it is never half-written.

    Args:
        slug: The paper.
        scale: The scale that was run; what the record held for it is replaced.
        results: The claims that were run, with their results, in order.
        failed: Name -> one line, of claims that did not come to a result.
        device: Torch device string of the run.
        where: Folder of records, made if it is not there. Default: `folder()`.

    Returns:
        The whole record as written.

    Raises:
        WeightlabError: When the record cannot be read or written.
    """
    where = where or folder()
    record = load(slug, where) or {"slug": slug, "scales": {}}
    entry: dict[str, Any] = {
        "claims": [claim_entry(claim, result) for claim, result in results],
        "versions": versions(),
        "machine": machine(device),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "cost": round(sum(result.cost for _, result in results), 1),
    }
    if failed:
        entry["failed"] = [{"name": name, "error": error} for name, error in failed.items()]
    scales = {**record["scales"], scale: entry}
    record = {"slug": slug, "scales": {name: scales[name] for name in SCALES if name in scales}}
    write_json(where / f"{slug}.json", record)
    return record


def claim_entry(claim: Claim, result: ClaimResult) -> dict[str, Any]:
    """Return a claim and its result as the record keeps them."""
    about = {
        "name": claim.name,
        "statement": claim.statement,
        "threshold": claim.threshold,
        "expected": claim.expected,
    }
    return plain({**about, **result.to_dict()})


def plain(value: Any) -> Any:
    """Turn a value into strict JSON types: tuples into lists, NumPy and torch scalars into numbers,
    infinities and NaN into `None`.

    Raises:
        TypeError: For a value that has no such form.

    Example:
        >>> plain({"interval": (0.5, float("inf")), 3: True})
        {'interval': [0.5, None], '3': True}
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [plain(item) for item in value]
    for convert in ("tolist", "item"):
        if hasattr(value, convert):
            return plain(getattr(value, convert)())
    raise TypeError(f"a record cannot hold a {type(value).__name__}: {value!r}")


def write_json(path: Path, data: Any) -> None:
    """Replace a JSON file in one step: readers see the old content or the new, never a part.

    Raises:
        WeightlabError: When the folder cannot be written.
    """
    text = json.dumps(plain(data), indent=2, ensure_ascii=False, allow_nan=False)
    # Curves hold hundreds of numbers: one line a list keeps the file readable and its diffs short.
    text = _NUMBER_LIST.sub(lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise WeightlabError(
            f"cannot write {path}: {error.strerror or error}; give another folder with --out"
        ) from error


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str = "cpu") -> str:
    """Return the class of machine, e.g. `"2-core x86-64 CPU"`, with the accelerator if one is used.

    Example:
        >>> machine().endswith("CPU")
        True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kind = {"x86_64": "x86-64", "AMD64": "x86-64", "aarch64": "ARM64", "arm64": "ARM64"}
    name = f"{cores}-core {kind.get(platform.machine(), platform.machine())} CPU"
    if device.startswith("cuda"):
        import torch

        name = f"{torch.cuda.get_device_name(device)}, {name}"
    return name
