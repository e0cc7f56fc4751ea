"""Which parameters of a model are hidden matrices, and which are something else."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

NamedParameters = list[tuple[str, nn.Parameter]]

_EMBEDDING_WORDS = {"emb", "embed", "embeds", "embedding", "embeddings", "wte", "wpe"}
_HEAD_NAMES = {"lm_head", "head", "classifier", "score", "unembed"}


def is_matrix_name(name: str) -> bool:
    """Whether a parameter's dotted name leaves it possible that it is a hidden matrix.

    False, that is an embedding, an output head or a bias, when
    - a component of the name, split at underscores, holds one of the words emb, embed, embeds,
      embedding, embeddings, wte, wpe (`tok_embeddings.weight`, `wte.weight`, `pos_embed`), or ends in
      `_token` or `_tokens` (`cls_token`);
    - a component is lm_head, head, classifier, score or unembed;
    - the module that owns it is called output (`output.weight`, but not `output.dense.weight`);
    - the last component is bias.

    Case does not matter.

    Example:
        >>> [is_matrix_name(n) for n in ("h.0.attn.weight", "model.embed_tokens.weight", "lm_head.weight")]
        [True, False, False]
    """
    components = name.lower().split(".")
    if components[-1] == "bias" or _is_head(components):
        return False
    return not any(
        component.endswith(("_token", "_tokens")) or not _EMBEDDING_WORDS.isdisjoint(component.split("_"))
        for component in components
    )


def _is_head(components: list[str]) -> bool:
    return components[-2:-1] == ["output"] or not _HEAD_NAMES.isdisjoint(components)


def split_named_parameters(
    source: nn.Module | Iterable[tuple[str, nn.Parameter]],
    *,
    is_matrix: Callable[[str, Tensor], bool | None] | None = None,
) -> tuple[NamedParameters, NamedParameters]:
    """Split parameters into hidden matrices and the rest, each parameter once, in order.

    The rule, first match decides:
    1. `is_matrix(name, parameter)`, where it returns True or False.
    2. Fewer than two dimensions (biases, norms, scalars): rest.
    3. `is_matrix_name` says embedding, head or bias: rest.
    4. Only if `source` is a module: the weight of an `nn.Embedding` or `nn.EmbeddingBag`: rest.
    5. Only if `source` is a module: its output head, which is every `nn.Linear` weight that is tied to
       an embedding or whose name rule 3 calls a head; if there is none, the last `nn.Linear` in order
       of registration: rest.
    6. Everything else, convolution kernels and stacks of matrices among them: matrix.

    Rule 5 cannot see a head that is no `nn.Linear`, nor that a body without any head ends in a hidden
    layer; use `is_matrix` there.

    Args:
        source: A module, or pairs as `named_parameters()` gives them. Frozen parameters are kept.
        is_matrix: Overrides the rule: called with each name and parameter, returns True (matrix),
            False (rest) or None (let the rule decide).

    Returns:
        `(matrices, rest)`, two lists of `(name, parameter)`.

    Raises:
        TypeError: If `source` holds parameters without names.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> matrices, rest = split_named_parameters(model)
        >>> [name for name, _ in matrices], [name for name, _ in rest]
        (['0.weight', '2.weight'], ['0.bias', '2.bias', '4.weight', '4.bias'])
    """
    pairs = list(source.named_parameters() if isinstance(source, nn.Module) else source)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                "split_named_parameters needs a module or (name, parameter) pairs, got "
                f"{type(pair).__name__}; pass model.named_parameters()"
            )
    not_hidden = _embeddings_and_heads(source) if isinstance(source, nn.Module) else set()

    matrices: NamedParameters = []
    rest: NamedParameters = []
    for name, parameter in pairs:
        chosen = is_matrix(name, parameter) if is_matrix is not None else None
        if chosen is None:
            chosen = parameter.ndim >= 2 and is_matrix_name(name) and id(parameter) not in not_hidden
        (matrices if chosen else rest).append((name, parameter))
    return matrices, rest


def _embeddings_and_heads(module: nn.Module) -> set[int]:
    """Identities of embedding weights and of the output head's weight."""
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    linears = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    has_head = any(
        id(linear.weight) in embeddings or _is_head([*name.lower().split("."), "weight"])
        for name, linear in linears
    )
    if linears and not has_head:
        embeddings.add(id(linears[-1][1].weight))
    return embeddings
