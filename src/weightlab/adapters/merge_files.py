"""Adding up adapters that lie in folders: into one adapter, without the base model, or into the base model."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightlab._hub import first_line, hub_answers, local_copy
from weightlab._lazy import require
from weightlab._progress import WorkBar
from weightlab.adapters._peft import (
    SAFETENSORS_WEIGHTS_NAME,
    Conv1D,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_pattern_key,
)
from weightlab.adapters.lora_layers import PEFT_PREFIX
from weightlab.adapters.merging import concatenated_config, shared_directions, tied_to
from weightlab.adapters.orthogonal import parse_metadata
from weightlab.adapters.registration import register
from weightlab.exceptions import UsageError, WeightlabError

Method = Literal["cat", "sum"]
Tell = Callable[[str, int, int], None]

_CONFIG = "adapter_config.json"
_FACTOR = re.compile(rf"{re.escape(PEFT_PREFIX)}(.+)\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)")
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_MODELS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


@dataclass(frozen=True)
class _Layer:
    """A, `(r, n)` or a kernel; B, `(m, r)` or a kernel; what scales their product."""

    A: Tensor
    B: Tensor
    scaling: float
    embedding: bool


@dataclass(frozen=True)
class _Adapter:
    config: LoraConfig
    layers: dict[str, _Layer]
    embeddings: dict[str, Tensor]


def merge_files(
    paths: Sequence[str],
    out: str,
    *,
    weights: Sequence[float] | None = None,
    method: Method = "cat",
    base: str | None = None,
    force: bool = False,
    tell: Tell = lambda what, done, total: None,
) -> dict[str, Any]:
    """Add up the adapters in several folders, exactly.

    - ``"cat"`` writes one LoRA whose rank is the sum of the ranks. The base model is not needed, unless some
      adapter is one of ours (SORSA, SVFit, ...), which is turned into a LoRA first.
    - ``"sum"`` writes the base model with ``W + Σ λᵢ·scalingᵢ·BᵢAᵢ`` in place of W, formed in float32 and
      rounded once to W's dtype.

    What is written appears under its name only when it is complete.

    Args:
        paths: Folders with `adapter_config.json` and `adapter_model.safetensors`; at least one.
        out: Folder to write.
        weights: λ of each. Default: 1.
        method: As above.
        base: Folder or Hub id of the base model. Default: the one that the first adapter names.
        force: Whether to replace an adapter or model that is there.
        tell: Called with what is being done, how many steps of it are done, and of how many.

    Returns:
        What was done, in JSON types: `out`, `method`, `adapters` (path, weight, rank, layers), `layers`,
        `rank`, `parameters`, `warnings`, `seconds`.

    Raises:
        UsageError: For folders that hold no LoRA or one that does not add up (DoRA, trained biases, whole
            modules), shapes that disagree, a number of weights that is not that of the adapters, a base model
            that cannot be loaded, or an existing `out`.
        WeightlabError: If adapters hold values that are not finite, or the disk is full.
    """
    started = time.monotonic()
    if method not in ("cat", "sum"):
        raise UsageError(f"unknown method {method!r}; use cat (an adapter) or sum (a model)")
    factors = [1.0] * len(paths) if weights is None else [float(weight) for weight in weights]
    if not paths or len(factors) != len(paths):
        raise UsageError(
            f"{len(factors)} weights for {len(paths)} adapters; give one for each, e.g. --weights 0.6,0.6"
        )
    target = _free(out, paths, force)
    adapters = {}
    for index, path in enumerate(paths):
        tell("reading", index, len(paths))
        # The same folder twice is as good as any two.
        adapters[path if path not in adapters else f"{path} ({index + 1})"] = _read(path, base)
    _check_shapes(adapters)
    ranks: dict[str, int] = {}
    for adapter in adapters.values():
        for key, layer in adapter.layers.items():
            ranks[key] = ranks.get(key, 0) + len(layer.A)
    first = next(iter(adapters.values())).config
    messages = _warnings(adapters)
    with _beside(target) as folder:
        if method == "cat":
            parameters = _write_cat(folder, adapters, factors, ranks, tell)
        else:
            parameters = _write_sum(folder, adapters, factors, base or first.base_model_name_or_path, tell)
    return {
        "out": str(target),
        "method": method,
        "adapters": [
            {"path": path, "weight": weight, "rank": max(len(x.A) for x in adapter.layers.values()), "layers": len(adapter.layers)}
            for (path, adapter), weight in zip(adapters.items(), factors, strict=True)
        ],
        "layers": len(ranks),
        "rank": max(ranks.values()),
        "parameters": parameters,
        "warnings": messages,
        "seconds": round(time.monotonic() - started, 3),
    }  # fmt: skip


def command(
    paths: Sequence[str], out: str, *, console: Console, quiet: bool = False, **settings: Any
) -> dict[str, Any]:
    """Run `merge_files` with a bar and warnings on a console; nothing of either if `quiet`."""
    from weightlab.adapters.finetune.model import quiet_libraries

    with quiet_libraries(), WorkBar(console=console, quiet=quiet) as bar:
        result = merge_files(paths, out, tell=bar.tell, **settings)
    if not quiet:
        for message in result["warnings"]:
            console.print(f"Warning: {message}", markup=False, highlight=False, soft_wrap=True)
    return result


def summary(result: Mapping[str, Any]) -> str:
    """Return what `merge_files` did as a few lines of text."""
    parts = [
        f"{adapter['weight']:g} × {adapter['path']} (rank {adapter['rank']})"
        for adapter in result["adapters"]
    ]
    what = f"rank {result['rank']}" if result["method"] == "cat" else "merged into the weights"
    return (
        f"{' + '.join(parts)}\n{result['layers']} layers, {what}, {result['parameters']:,} parameters, "
        f"{result['seconds']:.1f} s: {result['out']}"
    )


def _free(out: str, paths: Sequence[str], force: bool) -> Path:
    target = Path(out).expanduser().resolve()
    if any(Path(path).expanduser().resolve() == target for path in paths):
        raise UsageError(f"{out} is one of the adapters to merge; give another --out")
    if target.exists() and not force:
        raise UsageError(f"{out} exists; give another --out, or --force to replace it")
    if target.exists() and not ((target / _CONFIG).exists() or (target / "config.json").exists()):
        raise UsageError(
            f"{out} exists and holds neither an adapter nor a model; --force does not replace it"
        )
    return target


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give a folder beside the target, and rename it to the target when all went well."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as place:
            folder = Path(place) / "new"
            folder.mkdir()
            yield folder
            if target.exists():
                os.replace(target, Path(place) / "old")
            os.replace(folder, target)
    except (OSError, SafetensorError) as error:
        raise WeightlabError(f"cannot write {target}: {error}") from error


def _read(path: str, base: str | None) -> _Adapter:
    folder = Path(path).expanduser()
    if not (folder / _CONFIG).is_file():
        raise UsageError(f"no adapter in {path}: it has no {_CONFIG} (looked in {Path.cwd()})")
    register()
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT does not check what it reads.
        raise UsageError(f"{folder / _CONFIG} is no adapter's config: {first_line(error)}") from error
    if isinstance(config, LoraConfig):
        return _parse(path, config, _load(folder))
    from weightlab.adapters.lora_export import to_lora

    model, _ = _base_model(base or config.base_model_name_or_path, config.task_type, path)
    try:
        return _parse(path, *to_lora(PeftModel.from_pretrained(model, str(folder))))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path} cannot be written as a LoRA: {first_line(error)}") from error


def _load(folder: Path) -> dict[str, Tensor]:
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise UsageError(
            f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}"
            + ("; pickles are not read: load and save it with PEFT" if pickled else "")
        )
    try:
        return load_file(file)
    except SafetensorError as error:
        raise UsageError(f"{file} is damaged: {first_line(error)}") from error


def _parse(path: str, config: LoraConfig, state: Mapping[str, Tensor]) -> _Adapter:
    found: dict[str, dict[str, Tensor]] = {}
    embeddings: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise WeightlabError(f"{path}: {name} holds values that are not finite")
        if match := _FACTOR.fullmatch(name):
            found.setdefault(match[1], {})[match[2].removesuffix(".weight")] = tensor
        elif name.endswith(".base_layer.weight"):
            # PEFT saves the base's embedding along with an adapter of it.
            embeddings[name] = tensor
        else:
            raise UsageError(
                f"{path} is no plain LoRA: {name} is neither lora_A nor lora_B, and has no sum; train without DoRA, "
                f"biases and modules_to_save"
            )
    if config.use_dora or not found:
        raise UsageError(
            f"{path} is no plain LoRA: " + ("use_dora is true" if config.use_dora else "no layers")
        )
    layers = {}
    for key, parts in found.items():
        embedding = "embedding_A" in parts or "embedding_B" in parts
        A, B = (parts.get(f"embedding_{x}" if embedding else x) for x in "AB")
        if A is None or B is None or A.shape[0] != B.shape[1]:
            raise UsageError(
                f"{path}: the factors of {key} do not fit: {[*parts]} {[tuple(x.shape) for x in parts.values()]}"
            )
        alphas = config.alpha_pattern or {}
        alpha = alphas.get(get_pattern_key(list(alphas), key), config.lora_alpha)
        layers[key] = _Layer(A, B, alpha / (len(A) ** 0.5 if config.use_rslora else len(A)), embedding)
    return _Adapter(config, layers, embeddings)


def _check_shapes(adapters: Mapping[str, _Adapter]) -> None:
    seen: dict[str, tuple[str, Any]] = {}
    kept: dict[str, tuple[str, Tensor]] = {}
    for path, adapter in adapters.items():
        for key, layer in adapter.layers.items():
            widths = (tuple(layer.A.shape[1:]), layer.B.shape[0], layer.embedding)
            other, theirs = seen.setdefault(key, (path, widths))
            if widths != theirs:
                raise UsageError(
                    f"{key} has {widths[0]} inputs and {widths[1]} outputs in {path}, but {theirs[0]} and {theirs[1]} in "
                    f"{other}: they belong to different base models"
                )
        for name, tensor in adapter.embeddings.items():
            other, theirs = kept.setdefault(name, (path, tensor))
            if not torch.equal(tensor, theirs):
                raise UsageError(
                    f"{name} differs between {other} and {path}: they belong to different base models"
                )


def _warnings(adapters: Mapping[str, _Adapter]) -> list[str]:
    bases = {path: adapter.config.base_model_name_or_path for path, adapter in adapters.items()}
    messages = []
    if len(set(bases.values())) > 1:
        named = ", ".join(f"{path} to {base}" for path, base in bases.items())
        messages.append(f"the adapters name different base models: {named}")
    downs = {
        path: {key: layer.A.flatten(1).float() for key, layer in adapter.layers.items()}
        for path, adapter in adapters.items()
    }
    known = {path: parse_metadata(adapter.config.megatron_core) for path, adapter in adapters.items()}
    return messages + shared_directions(downs, known)


def _write_cat(
    folder: Path,
    adapters: Mapping[str, _Adapter],
    factors: Sequence[float],
    ranks: Mapping[str, int],
    tell: Tell,
) -> int:
    state: dict[str, Tensor] = {}
    for index, key in enumerate(ranks):
        tell("concatenating", index, len(ranks))
        parts = [(adapter.layers[key], factor) for adapter, factor in zip(adapters.values(), factors, strict=True) if key in adapter.layers]  # fmt: skip
        A = torch.cat([layer.A.float() for layer, _ in parts])
        B = torch.cat([layer.B.float() * (factor * layer.scaling) for layer, factor in parts], 1)
        stem = f"{PEFT_PREFIX}{key}.lora_"
        if parts[0][0].embedding:
            state |= {f"{stem}embedding_A": A, f"{stem}embedding_B": B}
        else:
            state |= {f"{stem}A.weight": A, f"{stem}B.weight": B}
    parameters = sum(tensor.numel() for tensor in state.values())
    for adapter in adapters.values():
        state |= adapter.embeddings
    first = next(iter(adapters.values())).config
    config = concatenated_config(
        first, ranks, ranks, _targets([adapter.config for adapter in adapters.values()])
    )
    config.save_pretrained(str(folder))
    tell("writing", 0, 1)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})  # fmt: skip
    return parameters


def _targets(configs: Sequence[LoraConfig]) -> set[str] | None:
    """Unite what selected the layers of each adapter, if that is by names alone."""
    united: set[str] = set()
    for config in configs:
        if (
            not isinstance(config.target_modules, list | set)
            or config.layers_to_transform
            or config.exclude_modules
        ):
            return None
        united |= set(config.target_modules)
    return united


@torch.no_grad()
def _write_sum(
    folder: Path, adapters: Mapping[str, _Adapter], factors: Sequence[float], base: str | None, tell: Tell
) -> int:
    tell("loading the base model", 0, 1)
    paths = list(adapters)
    model, source = _base_model(base, adapters[paths[0]].config.task_type, paths[0])
    modules = dict(model.named_modules())
    work = [
        (key, layer, factor)
        for adapter, factor in zip(adapters.values(), factors, strict=True)
        for key, layer in adapter.layers.items()
    ]
    sums: dict[str, Tensor] = {}
    for index, (key, layer, factor) in enumerate(work):
        tell("adding", index, len(work))
        B = layer.B.flatten(1).float() * (factor * layer.scaling)
        sums[key] = (
            torch.addmm(sums[key], B, layer.A.flatten(1).float())
            if key in sums
            else B @ layer.A.flatten(1).float()
        )
    for key, total in sums.items():
        module: Any = modules.get(key)
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            raise UsageError(f"the base model {base} has no layer {key}; name its own with --base")
        if tied := tied_to(model, module):
            raise UsageError(
                f"{key} shares its weight with {tied}, which the adapters leave alone and a merge would change; use "
                f"--method cat"
            )
        if isinstance(module, nn.Embedding | Conv1D):
            total = total.mT
        if weight.numel() != total.numel() or weight.shape[0] != total.shape[0]:
            raise UsageError(
                f"{key} has a weight of {tuple(weight.shape)} in the base model {base}, but {tuple(total.shape)} in the "
                f"adapters; name their own with --base"
            )
        weight.copy_(
            weight.to(torch.promote_types(weight.dtype, torch.float32)) + total.reshape(weight.shape)
        )
    tell("writing", 0, 1)
    model.save_pretrained(str(folder))  # type: ignore[operator]
    _copy_tokenizer(source, folder)
    return sum(parameter.numel() for parameter in model.parameters())


def _base_model(base: str | None, task: Any, path: str) -> tuple[nn.Module, str]:
    if not base:
        raise UsageError(f"{path} does not say what its base model is; name it with --base")
    source = str(Path(base).expanduser())
    if not Path(source).is_dir():
        if not _REPOSITORY.fullmatch(base):
            raise UsageError(
                f"no folder {base} (looked in {Path.cwd()}); models on the Hub are named owner/name"
            )
        source = str(local_copy(base) or base)
    transformers = require("transformers", "adapters")
    kind = getattr(transformers, _MODELS.get(str(getattr(task, "value", task)), "AutoModel"))
    try:
        return kind.from_pretrained(
            source,
            dtype="auto",
            weights_only=True,
            local_files_only=Path(source).is_dir() or not hub_answers(),
        ), source
    except Exception as error:  # Whatever lies beneath: OSError, ValueError, httpx.
        raise UsageError(f"cannot load the base model {base}: {first_line(error)}") from error


def _copy_tokenizer(source: str, folder: Path) -> None:
    try:
        words = require("transformers", "adapters").AutoTokenizer.from_pretrained(source)
    except Exception:
        return  # Not every model has one.
    words.save_pretrained(str(folder))
