"""SVFit: the leading singular values of each weight train, between frozen singular vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn

from weightlab.adapters._peft import BufferDict
from weightlab.adapters.low_rank import Factors, LowRankLayer, Roles
from weightlab.adapters.registration import register
from weightlab.adapters.singular_values import (
    CLOSE,
    EnergyKind,
    Rank,
    SingularValues,
    Triples,
    check_energy,
    check_rank,
    leading_triples,
)
from weightlab.adapters.tuner import AdapterConfig, AdapterModel, check
from weightlab.linalg.singular_triples import SVDMethod

__all__ = ["SingularValues", "SvfitConfig", "SvfitLayer", "SvfitModel"]

# Stands for a rank that the layer has to find.
_OPEN = 0


@dataclass
class SvfitConfig(AdapterConfig):
    r"""Settings of SVFit.

    Each weight's r leading singular triples, W ≈ U diag(σ) Vᵀ, are found once; U and V stay frozen, and the r
    singular values train: r numbers a layer. What is stored is the change δ, zeros at the start:
    :math:`\Delta W = U \operatorname{diag}(\delta) V^\top`. The paper trains s = σ + δ over the rest W − U diag(σ) Vᵀ,
    with the same gradient; with δ the model starts exactly as it was in every precision, the base can be shared or
    quantised, and weight decay pulls to the pre-trained values instead of to zero. Values may cross zero or change
    order.

    So few numbers need a large learning rate, ten to a hundred times LoRA's: tune it between 1e-2 and 1. A pure rescaling
    of directions that are there can be too weak for data far from the base's.

    Attributes:
        r: How many singular values train; `"all"` for min(out, in). Default None: as many as hold `energy`. The paper's
            sixteen-fold saving over a LoRA of rank 8 is that of `"all"`.
        energy: Share of a weight that the trained values hold. The paper says more than 99 %, by a measure that it does
            not define.
        energy_kind: `"squared"`: of Σσ². `"nuclear"`: of Σσ.
        relative: Train factors instead: s = σ (1 + δ), so that an optimizer that normalises moves large and small
            values in proportion. Not from the paper.
        save_factors: Save U and V with the adapter (default), r·(out + in) numbers a layer. If False they are
            computed anew at loading, and only δ, σ and a checksum are saved: then the base must be the same to the bit
            and the singular values distinct, which is checked.
        svd: `"full"`, `"randomized"`, or `"auto"`, the latter where it pays and its certificate holds; see
            `weightlab.linalg.top_svd`. In float32 always. Full if `save_factors` is False or r is None.
        found_ranks: Filled in where r is None: the rank found, by the layer's name.

    Raises:
        ValueError: If a field is out of range; or later, if r exceeds a weight's rank, a weight is not finite, or factors
            that were not saved cannot be computed anew.

    Complexity:
        Start: one decomposition a weight, of order out·in·min(out, in) if full, out·in·r if randomized; equal weights
        are decomposed once in a process. Frozen factors and a step, for a square layer of side d and T tokens, beside the
        base's d² numbers and 4·T·d² FLOP (forward and backward, its weight frozen):

        | r | numbers kept | FLOP of a step | for backward |
        | --- | --- | --- | --- |
        | r | 2·r·d | 8·T·r·d | T·r |
        | d/8 | d²/4 | T·d² | T·d/8 |
        | `"all"` | 2·d² | 8·T·d² | T·d |

        So `"all"` trains little and costs much: three times the layer's memory and time. Merged, it costs nothing.

    Paper:
        "SVFit: Parameter-Efficient Fine-Tuning of Large Pre-Trained Models Using Singular Values", arXiv 2409.05926.

    Example:
        >>> from peft import get_peft_model
        >>> base = nn.Sequential(nn.Linear(8, 6))
        >>> x = torch.ones(1, 8)
        >>> y = base(x)
        >>> model = get_peft_model(base, SvfitConfig(r="all", target_modules=["0"]))
        >>> bool((model(x) == y).all()), sum(p.numel() for p in model.parameters() if p.requires_grad)
        (True, 6)
    """

    method = "svfit"

    r: Rank = None  # pyright: ignore[reportIncompatibleVariableOverride]
    energy: float = 0.99
    energy_kind: EnergyKind = "squared"
    relative: bool = False
    save_factors: bool = True
    svd: SVDMethod = "auto"
    found_ranks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rank(self.r)
        r, self.r = self.r, self.r if isinstance(self.r, int) else 1  # the base class knows numbers only
        super().__post_init__()
        self.r = r  # pyright: ignore
        check_energy(self.energy, self.energy_kind)
        check(
            f"svd={self.svd!r}", self.svd in get_args(SVDMethod), f"one of {', '.join(get_args(SVDMethod))}"
        )
        check(
            f"svd={self.svd!r}",
            self.save_factors or self.svd != "randomized",
            "full or auto if save_factors=False, so that the vectors can be computed anew",
        )


class SvfitLayer(LowRankLayer):
    """A layer whose leading singular values train."""

    prefix = "svfit_"
    roles = Roles(left="frozen", values="trained", right="frozen")
    svfit_sigma: Any
    svfit_checksum: Any

    def make_containers(self) -> None:
        """Create empty containers."""
        super().make_containers()
        for name in _UNSAVED:
            setattr(self, name, BufferDict(persistent=False))
        self.relative: dict[str, bool] = {}
        self.computed: dict[str, Triples] = {}
        self.register_load_state_dict_post_hook(_check_loaded)

    def reset_adapter(self, name: str, config: SvfitConfig, r: int, initialize: bool) -> None:  # type: ignore[override]
        """Create δ, zeros, and decompose the weight if the factors do not come from a file.

        Raises:
            ValueError: If the rank exceeds the matrix's, the weight is not finite or has no values, or factors are not to
                be saved that could not be computed anew.
        """
        triples = None
        if r == _OPEN and config.r == "all":
            r = min(self.shape)
        elif r == _OPEN:
            if initialize:
                triples = self._decompose(config, None)
                config.found_ranks[self.key] = triples.values.numel()
            elif self.key not in config.found_ranks:
                raise ValueError(
                    f"r=None, but {self.key!r} has no values to find its rank from, nor a rank in found_ranks; give r"
                )
            r = config.found_ranks[self.key]
        super().reset_adapter(name, config, r, initialize=False)
        self.ranks[name] = r
        self.relative[name] = config.relative
        self.svfit_sigma[name] = self.new_buffer(r)
        self.svfit_checksum[name] = self.new_buffer(1).long()
        if not config.save_factors:
            for factor in ("left", "right"):
                self._container(f"unsaved_{factor}")[name] = self._container(factor).pop(name)
        if triples is None and (initialize or not config.save_factors):
            triples = self._decompose(config, r)
        if triples is None:
            return
        containers = [self._frozen(factor, name) for factor in ("left", "right")]
        containers[0][name], containers[1][name] = triples.left, triples.right
        if not config.save_factors:
            self.computed[name] = triples._replace(left=triples.left[:0], right=triples.right[:, :0])
        if initialize:
            self.svfit_sigma[name], self.svfit_checksum[name] = triples.values, triples.checksum
            self._unfilled.discard(name)

    def _decompose(self, config: SvfitConfig, r: int | None) -> Triples:
        svd = config.svd if config.save_factors else "full"
        triples = leading_triples(
            self.start_matrix(), r, energy=config.energy, energy_kind=config.energy_kind, svd=svd
        )
        index = None if config.save_factors else triples.indistinct()
        if index is not None:
            raise ValueError(
                f"save_factors=False, but singular values {index} and {index + 1} of {self.key!r} are equal to within "
                f"{CLOSE:g} of the largest, so that another machine may find other vectors; set save_factors=True or "
                "another r"
            )
        return triples

    def _frozen(self, factor: str, name: str) -> Any:
        """Return the container that has a frozen factor."""
        unsaved = self._container(f"unsaved_{factor}")
        return unsaved if name in unsaved else self._container(factor)

    def factors(self, name: str) -> Factors:
        """Return U, what the values have changed by, and Vᵀ."""
        values = self._container("values")[name]
        if self.relative[name]:
            values = values * self.svfit_sigma[name]
        return Factors(self._frozen("left", name)[name], values, self._frozen("right", name)[name])

    def prepare(self, names: Sequence[str]) -> None:
        """Make sure that adapters created without factors have got some since.

        Raises:
            RuntimeError: If one has not.
        """
        for name in self._unfilled.intersection(names):
            if not self.svfit_checksum[name].any():
                raise RuntimeError(
                    f"adapter {name!r} of {self.key!r} was created with init_weights=False, and nothing has been loaded "
                    "into it; load it by PeftModel.from_pretrained, or set init_weights=True"
                )
            self._unfilled.discard(name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter."""
        super().delete_adapter(adapter_name)
        self.computed.pop(adapter_name, None)


_UNSAVED = ("svfit_unsaved_left", "svfit_unsaved_right")
SvfitLayer.other_param_names = (
    *SvfitLayer.other_param_names,
    "svfit_sigma",
    "svfit_checksum",
    *_UNSAVED,
    "relative",
)


def _check_loaded(layer: nn.Module, incompatible_keys: object) -> None:
    """Refuse values for singular vectors that are not those of this base weight."""
    assert isinstance(layer, SvfitLayer)
    for name, triples in layer.computed.items():
        checksum, sigma = layer.svfit_checksum[name].cpu(), layer.svfit_sigma[name].cpu()
        if not checksum.any():
            continue
        same = torch.equal(checksum, triples.checksum.cpu())
        expected: Tensor = triples.values.cpu().to(sigma.dtype)
        if not (same and torch.allclose(sigma, expected, rtol=0, atol=10 * CLOSE * float(expected[0]))):
            what = "the base weight" if not same else "its singular values"
            raise ValueError(
                f"adapter {name!r} was saved without its singular vectors, and {what} of {layer.key!r} differs from "
                "what it was trained on; load the same base in the same dtype, or save with save_factors=True"
            )


class SvfitModel(AdapterModel):
    """A model with SVFit adapters."""

    prefix = "svfit_"
    tuner_layer_cls = SvfitLayer

    def rank(self, config: AdapterConfig, key: str, layer: nn.Module) -> int:
        """Return the rank that an adapter gets in the layer called `key`, or that the layer is to find it."""
        r: Rank = super().rank(config, key, layer)
        return r if isinstance(r, int) else _OPEN


register()
