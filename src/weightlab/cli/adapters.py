"""`weightlab adapt` and `weightlab merge-adapters`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import typer

from weightlab.cli.common import (
    Debug,
    Json,
    Stopped,
    app,
    command_line,
    names,
    print_json,
    stderr,
    stdout,
)
from weightlab.exceptions import UsageError


@app.command()
def adapt(
    model: Annotated[
        str, typer.Argument(help="Folder of a causal language model, or its id on the Hugging Face Hub.")
    ],
    data: Annotated[
        str,
        typer.Option(
            help="Text: a file (.txt, .jsonl, .parquet), a folder of such, or a data set's id `owner/name[:config]`."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder to write the adapter to.")],
    method: Annotated[
        str,
        typer.Option(help="lora, rslora, dora, pissa, eva, orthogonal, bone, sorsa or svfit."),
    ] = "lora",
    rank: Annotated[
        int | None, typer.Option(help="Rank (Bone: block size). Default: 16; svfit: by energy.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Scales the update by alpha/rank. Default: rank.")
    ] = None,
    targets: Annotated[
        str, typer.Option(help="Layers to adapt by comma, e.g. `q_proj,v_proj`. Default: all but the head.")
    ] = "all-linear",
    variant: Annotated[
        str | None,
        typer.Option(
            help="Form of the method: bone affine, affine_row, additive, mini; eva covariance, incremental, sketch; "
            "orthogonal orthogonal, gaussian, hadamard; sorsa coupled, decoupled."
        ),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", help="A further setting NAME=VALUE of the method, e.g. `rho=1`; repeatable."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Peak learning rate, the first thing to tune. Default: the method's.",
            rich_help_panel="Training",
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the text.", rich_help_panel="Training")] = 1.0,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, instead of --epochs.", rich_help_panel="Training")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Blocks in a batch.", rich_help_panel="Training")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches in a step.", rich_help_panel="Training")] = 1,
    block_size: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a block. Default: 512, or the model's limit.", rich_help_panel="Training"
        ),
    ] = None,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Base model and products in bfloat16.", rich_help_panel="Training"),
    ] = False,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Recompute activations instead of keeping them.",
            rich_help_panel="Training",
        ),
    ] = False,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Leave the GPU alone.", rich_help_panel="Training")
    ] = False,
    seed: Annotated[
        int,
        typer.Option(help="For data order, dropout and random starts.", rich_help_panel="Training"),
    ] = 0,
    eval_fraction: Annotated[
        float,
        typer.Option(
            help="Share of the text, its end, on which the loss is taken before and after.",
            rich_help_panel="Text",
        ),
    ] = 0.1,
    text_field: Annotated[
        str, typer.Option(help="Column that holds the text.", rich_help_panel="Text")
    ] = "text",
    split: Annotated[str, typer.Option(help="Part of a data set.", rich_help_panel="Text")] = "train",
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or id of the tokenizer. Default: MODEL.", rich_help_panel="Text"),
    ] = None,
    as_lora: Annotated[
        bool,
        typer.Option(
            "--as-lora",
            help="Write a plain LoRA, which loads without weightlab (not Bone's affine forms).",
            rich_help_panel="Output",
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel="Output"),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what --out holds, and start over.", rich_help_panel="Output"),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune a causal language model on a text by few parameters, and write a PEFT adapter.

    Ctrl-C keeps a checkpoint; the same command with --resume continues. Adapters by bone, sorsa and svfit load in
    PEFT after `import weightlab.adapters; weightlab.adapters.register()`.

    **Examples**

    `weightlab adapt ./model --data notes.txt --out notes-adapter --method eva`

    `weightlab adapt owner/model --data pages.jsonl --out pages --method bone --variant affine --rank 64 --bf16`
    """
    from weightlab.adapters import finetune

    settings = finetune.Settings(
        model=model, data=data, out=out, method=method, rank=rank, alpha=alpha, targets=tuple(names(targets)),
        variant=variant, options=_options(options or []), lr=lr, epochs=epochs, steps=steps, batch_size=batch_size,
        accumulate=accumulate, block_size=block_size, bf16=bf16, gradient_checkpointing=gradient_checkpointing,
        cpu=cpu, seed=seed, eval_fraction=eval_fraction, text_field=text_field, split=split, tokenizer=tokenizer,
        as_lora=as_lora,
    )  # fmt: skip
    display = finetune.Display(quiet=as_json, console=stderr)
    try:
        report = finetune.finetune(
            settings, resume=resume, force=force, display=display, command=command_line()
        )
    except KeyboardInterrupt as error:
        raise Stopped(str(error)) from None
    if as_json:
        print_json(report)
    else:
        stdout.print(finetune.summary(report), markup=False, highlight=False, soft_wrap=True)


def _options(settings: Sequence[str]) -> dict[str, Any]:
    """Read settings `name=value`, values in JSON if they are that, else as text."""
    import json

    found: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not (name.isidentifier() and equals):
            raise UsageError(f"--set {setting!r} is not NAME=VALUE, e.g. --set rho=1")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


class MergeMethod(StrEnum):
    """What merging writes."""

    cat = "cat"
    sum = "sum"


@app.command("merge-adapters")
def merge_adapters(
    adapters: Annotated[list[str], typer.Argument(help="Folders of adapters of one base model.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="Factor of each by comma, e.g. `0.6,0.6`; they need not add up to 1. Default: 1 each."
        ),
    ] = None,
    method: Annotated[
        MergeMethod, typer.Option(help="cat: one LoRA whose rank is the sum; sum: the base model, merged.")
    ] = MergeMethod.cat,
    base: Annotated[
        str | None,
        typer.Option(help="Base model, where one is needed: folder or Hub id. Default: the adapter's own."),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace what --out holds.", rich_help_panel="Output"),
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Add up adapters exactly, into one LoRA or into the base model.

    Plain LoRAs are concatenated without loading the base model; adapters by sorsa and svfit become LoRAs first, which
    needs it.

    **Examples**

    `weightlab merge-adapters cat dog --out both --weights 0.6,0.6`

    `weightlab merge-adapters cat dog --out model-with-both --method sum --base ./model`
    """
    from weightlab.adapters import merge_files

    try:
        factors = [float(weight) for weight in names(weights)] if weights is not None else None
    except ValueError:
        raise UsageError(f"--weights takes numbers by comma, e.g. 0.6,0.6, not {weights!r}") from None
    result = merge_files.command(
        adapters,
        out,
        weights=factors,
        method=method.value,
        base=base,
        force=force,
        console=stderr,
        quiet=as_json,
    )
    if as_json:
        print_json(result)
    else:
        stdout.print(merge_files.summary(result), markup=False, highlight=False, soft_wrap=True)
