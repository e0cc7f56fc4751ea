"""Fine-tuning a causal language model on a text: the body of `weightlab adapt`."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from weightlab._lazy import require
from weightlab.adapters._peft import LoraConfig, PeftConfig, PeftModel, TrainerCallback, peft
from weightlab.adapters.finetune.display import Display
from weightlab.adapters.finetune.files import Workplace
from weightlab.adapters.finetune.methods import (
    ALL_LINEAR,
    method_named,
    peft_config,
    start_adapter,
    target_shapes,
)
from weightlab.adapters.finetune.model import block_size_for, check_vocabulary, load_model, quiet_libraries
from weightlab.adapters.finetune.text import Blocks, cut, read_documents, tokenize
from weightlab.exceptions import UsageError, WeightlabError

WARM_UP = 0.03
CHECKPOINT_SECONDS = 120.0
_MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is fine-tuned on what, and how.

    Attributes:
        model: Folder of a causal language model as transformers saves it, or its id on the Hugging Face Hub.
        data: The text; see `text.read_documents`.
        out: Folder to write the adapter to.
        method: One of `methods.METHODS`.
        rank: Default: the method's.
        alpha: Default: the rank.
        targets: Names, or ends of names, of the layers to adapt. Default: all linear ones but the head.
        variant: The method's main choice.
        options: Further settings of the method.
        lr: Peak learning rate, reached after 3 % of the steps; from there it falls by a cosine. Default: the method's.
        epochs: Passes over the text.
        steps: Optimizer steps, instead of `epochs`.
        batch_size: Blocks in a batch.
        accumulate: Batches in a step.
        block_size: Tokens in a block. Default: 512, or as many as the model can take.
        eval_fraction: Share of blocks, from the end of the text, on which the loss is taken before and after.
        tokenizer: Folder or id of the tokenizer. Default: the model's.
        text_field: Column of the text in tables.
        split: Part of a data set.
        bf16: Whether the base model is kept, and products are made, in bfloat16; adapters stay in float32.
        gradient_checkpointing: Whether to recompute activations instead of keeping them.
        cpu: Whether to leave accelerators alone.
        as_lora: Whether to write a plain LoRA, which any program loads, where the method's update has that form.
        seed: For data order, dropout and random starts.

    Raises:
        UsageError: If a value is out of range.
    """

    model: str
    data: str
    out: str
    method: str = "lora"
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] = (ALL_LINEAR,)
    variant: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    block_size: int | None = None
    eval_fraction: float = 0.1
    tokenizer: str | None = None
    text_field: str = "text"
    split: str = "train"
    bf16: bool = False
    gradient_checkpointing: bool = False
    cpu: bool = False
    as_lora: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        method_named(self.method)
        for name, least in (("steps", 1), ("batch_size", 1), ("accumulate", 1), ("block_size", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} must be at least {least}; got {value}")
        for name in ("lr", "epochs", "alpha"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} must be above 0 and finite; got {value}")
        if not 0 <= self.eval_fraction < 1:
            raise UsageError(f"eval_fraction must be in [0, 1); got {self.eval_fraction}")
        if not self.targets:
            raise UsageError(f"no targets given; name layers, or {ALL_LINEAR}")


def finetune(
    settings: Settings,
    *,
    resume: bool = False,
    force: bool = False,
    display: Display | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Fine-tune a causal language model on a text, and write the adapter.

    The text is cut into blocks of equal length. AdamW without weight decay trains the adapter by transformers'
    `Trainer`, with gradients clipped to norm 1. While it runs, all lies in `<out>.unfinished`, with a checkpoint every
    two minutes and at Ctrl-C; `out` appears at the end, as a whole.

    Args:
        settings: What to do.
        resume: Go on from the last checkpoint, if there is one. On one machine the result is the same, bit for bit, as
            without the interruption.
        force: Replace the adapter in `settings.out`, and start over.
        display: Where to show progress; on standard error by default.
        command: The command line, for the report.

    Returns:
        The report, which is also in the folder as `weightlab.json`: sizes, losses, seconds, peak memory.

    Raises:
        UsageError: If the request cannot be met: data, model, tokenizer, layers or settings are missing or do not fit.
        WeightlabError: If the loss stops being finite.
        KeyboardInterrupt: If stopped by Ctrl-C or SIGTERM; the message says how to go on.
        MissingDependencyError: If transformers, accelerate or PEFT is missing.
    """
    require("accelerate", "adapters")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("adapt trains in one process; for several, write a script around the Trainer")
    display = display or Display()
    workplace = Workplace(settings.out, asdict(settings), resume=resume, force=force)
    if resume and not workplace.kept:
        display.say("nothing to resume: starting from the beginning")
    try:
        with quiet_libraries():
            return _carry_out(settings, workplace, display, command)
    except KeyboardInterrupt:
        step = workplace.step
        raise KeyboardInterrupt(
            f"Stopped after step {step}, which is kept; the same command with --resume continues."
            if step
            else "Stopped before the first checkpoint; nothing is kept."
        ) from None
    finally:
        workplace.clean()


def _carry_out(settings: Settings, workplace: Workplace, display: Display, command: str) -> dict[str, Any]:
    documents = read_documents(settings.data, field=settings.text_field, split=settings.split)
    with display.phase(f"loading {settings.model}"):
        base, tokenizer = load_model(settings.model, tokenizer=settings.tokenizer, bf16=settings.bf16)
    block_size = block_size_for(base, settings.block_size)
    with display.phase("reading the text"):
        tokens = tokenize(documents, tokenizer)
    check_vocabulary(tokens, base)
    train, held_out = cut(tokens, block_size, settings.eval_fraction)
    state = {"text": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(), "seconds": {"training": 0.0}}
    state |= _resumed_state(workplace, state["text"])

    started = time.perf_counter()
    arguments = _training_arguments(settings, workplace, len(train))
    base.to(arguments.device)
    model = _adapted(settings, workplace, base, train, display)
    state["seconds"].setdefault("start", time.perf_counter() - started)
    trainer = _trainer(settings, model, arguments, train, held_out)
    if "loss_before" not in state:
        state["loss_before"] = _evaluate(trainer, held_out, "evaluating before", display)
    workplace.write(state)
    _train(trainer, workplace, state, display)
    report = {
        "method": settings.method,
        "model": settings.model,
        "data": settings.data,
        "adapter": settings.out,
        "parameters": {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "all": sum(p.numel() for p in model.parameters()),
        },
        "loss": {
            "before": state["loss_before"],
            "after": _evaluate(trainer, held_out, "evaluating after", display),
            "train": next(
                (log["loss"] for log in reversed(trainer.state.log_history) if "loss" in log), None
            ),
        },
        "lr": arguments.learning_rate,
        "steps": arguments.max_steps,
        "blocks": {"size": block_size, "train": len(train), "evaluation": len(held_out)},
        "seconds": state["seconds"],
        "peak_memory_mb": _peak_memory(arguments.device),
        "device": str(arguments.device),
        "settings": asdict(settings),
        "command": command,
        "versions": {name: version(name) for name in ("weightlab", "torch", "transformers", "peft")},
    }
    with display.phase("writing the adapter"):
        workplace.publish(_save(settings, workplace, model), report)
    return report


def _resumed_state(workplace: Workplace, text: str) -> dict[str, Any]:
    state = workplace.read() if workplace.kept else {}
    if state and state["text"] != text:
        raise UsageError("the text has changed since the unfinished run; start over with --force")
    return state


def _training_arguments(settings: Settings, workplace: Workplace, blocks: int) -> Any:
    batches = math.ceil(blocks / settings.batch_size)
    steps = settings.steps or math.ceil(settings.epochs * math.ceil(batches / settings.accumulate))
    cuda = torch.cuda.is_available() and not settings.cpu
    arguments_class = require("transformers", "adapters").TrainingArguments
    recompute: dict[str, Any] = {}
    if settings.gradient_checkpointing:
        new = "activation_checkpointing" in arguments_class.__dataclass_fields__
        name = "activation_checkpointing" if new else "gradient_checkpointing"
        recompute = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    arguments = arguments_class(
        output_dir=str(workplace.folder),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.lr or method_named(settings.method).lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(WARM_UP * steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=settings.bf16,
        use_cpu=settings.cpu,
        seed=settings.seed,
        save_strategy="no",
        save_total_limit=2,
        logging_steps=math.ceil(steps / 100),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=cuda,
        **recompute,
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # Several GPUs would be driven by DataParallel, which adapters break.
    return arguments


def _adapted(
    settings: Settings, workplace: Workplace, base: nn.Module, train: Blocks, display: Display
) -> PeftModel:
    """Put the adapter on the model: a fresh one, or one that the checkpoint's values fit into."""
    method = method_named(settings.method)
    shapes = target_shapes(base, settings.targets)
    config, arguments = peft_config(
        settings.method,
        shapes,
        targets=settings.targets,
        rank=settings.rank,
        alpha=settings.alpha,
        variant=settings.variant,
        options=settings.options,
    )
    checkpoint = workplace.checkpoint
    if checkpoint is not None:
        config = PeftConfig.from_pretrained(str(checkpoint))
        config.inference_mode = False
    require("transformers", "adapters").set_seed(settings.seed)
    with display.phase(f"starting {settings.method} on {len(shapes)} layers"):
        try:
            model = peft.get_peft_model(base, config)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{settings.method}: {error}") from error
        if not (checkpoint is not None and method.reads_data):
            shuffled = torch.Generator().manual_seed(settings.seed)
            batches = DataLoader(train, settings.batch_size, shuffle=True, generator=shuffled)
            moved = ({name: t.to(base.device) for name, t in batch.items()} for batch in batches)
            start_adapter(settings.method, model, moved, arguments, key=workplace.out.name)
    if settings.as_lora:
        _lora_export(model)  # Fails now rather than after the training.
    if method.changes_base and checkpoint is None:
        _save_start(model, workplace.folder / "start")
    return model


def _save_start(model: PeftModel, folder: Path) -> None:
    """Keep the start of an adapter that was taken out of the base weight, so that saving can subtract it."""
    config = model.peft_config[model.active_adapters[0]]
    assert isinstance(config, LoraConfig)
    start, config.init_lora_weights = config.init_lora_weights, True
    model.save_pretrained(str(folder))
    config.init_lora_weights = start


def _trainer(settings: Settings, model: PeftModel, arguments: Any, train: Blocks, held_out: Blocks) -> Any:
    transformers = require("transformers", "adapters")
    callback = method_named(settings.method).callback
    callbacks: list[Any] = [_Guard()]
    if callback:
        callbacks.append(getattr(require("weightlab.adapters", "adapters"), callback)())
    trainer = transformers.Trainer(
        model,
        arguments,
        data_collator=transformers.default_data_collator,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _evaluate(trainer: Any, held_out: Blocks, name: str, display: Display) -> float | None:
    if not len(held_out):
        return None
    with display.phase(name):
        return float(trainer.evaluate()["eval_loss"])


def _train(trainer: Any, workplace: Workplace, state: dict[str, Any], display: Display) -> None:
    """Train to the end, or raise KeyboardInterrupt at the end of the step in which a signal came."""
    done, total = workplace.step, trainer.args.max_steps
    started = time.perf_counter()
    if done >= total:
        trainer.model.load_adapter(
            str(workplace.checkpoint), trainer.model.active_adapters[0], is_trainable=True
        )
        return
    with display.training(total, done) as watch, _signals(display) as stopped:
        trainer.add_callback(watch)
        trainer.add_callback(_Checkpoints(stopped))
        trainer.train(resume_from_checkpoint=str(workplace.checkpoint) if done else None)
    state["seconds"]["training"] += time.perf_counter() - started
    workplace.write(state)
    if trainer.state.global_step < total:
        raise KeyboardInterrupt
    display.say(f"training: {total} steps in {time.perf_counter() - started:.1f} s")


@contextmanager
def _signals(display: Display) -> Iterator[Callable[[], bool]]:
    """Answer the first Ctrl-C or SIGTERM by asking to stop, and further ones at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        display.say("stopping after this step")

    heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in heard}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Checkpoints(TrainerCallback):
    """Keeps a checkpoint from time to time and at the end, and ends training with one when asked to."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self.asked, self.last = asked, time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.asked()
        now = time.monotonic()
        if control.should_training_stop or now - self.last >= CHECKPOINT_SECONDS:
            control.should_save, self.last = True, now


class _Guard(TrainerCallback):
    """Ends training with an error when the loss is not finite."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(loss):
            raise WeightlabError(
                f"the loss is {loss} at step {state.global_step}; lower --lr (now {args.learning_rate:g}) and start "
                "over with --force"
            )


def _save(settings: Settings, workplace: Workplace, model: PeftModel) -> Path:
    folder = workplace.folder / "adapter"
    if settings.as_lora and _lora_export(model, folder):
        return folder
    start = workplace.folder / "start" if method_named(settings.method).changes_base else None
    model.save_pretrained(
        str(folder), path_initial_model_for_weight_conversion=None if start is None else str(start)
    )
    return folder


def _lora_export(model: PeftModel, folder: Path | None = None) -> bool:
    """Write an adapter as a plain LoRA; False if it is one already."""
    from weightlab.adapters.lora_export import to_lora
    from weightlab.adapters.tuner import AdapterModel

    if not isinstance(model.base_model, AdapterModel):
        return False
    if folder is not None:
        folder.mkdir(exist_ok=True)
    try:
        to_lora(model, model.active_adapters[0], folder)
    except TypeError as error:
        raise UsageError(f"--as-lora: {error}") from error
    return True


def _peak_memory(device: torch.device) -> float | None:
    """Peak in MiB: of the device's allocations, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _MIB
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / _MIB if sys.platform == "darwin" else peak / 1024


def summary(report: Mapping[str, Any]) -> str:
    """Say in a few lines what came of it.

    Args:
        report: What `finetune` returns.
    """
    parameters, loss, memory = report["parameters"], report["loss"], report["peak_memory_mb"]
    share = 100 * parameters["trained"] / parameters["all"]
    lines = [
        f"{report['method']}: {parameters['trained']:,} parameters trained ({share:.2g} %), {report['steps']} steps, "
        f"{report['seconds']['training']:.1f} s, start {report['seconds']['start']:.1f} s"
        + ("" if memory is None else f", peak memory {memory:,.0f} MiB")
    ]
    if loss["before"] is not None:
        lines.append(f"loss on held-out text: {loss['before']:.4f} before, {loss['after']:.4f} after")
        if not loss["after"] < loss["before"]:
            lines.append("! it did not fall: try a lower --lr, or fewer steps")
    lines.append(f"adapter: {report['adapter']}")
    return "\n".join(lines)
