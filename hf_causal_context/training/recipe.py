"""Fine-tuning an adapter, whatever its base: one order of steps for denoisers and for language models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Generic, TypeVar, cast

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from ..adapter.config import CausalContextConfig
from ..bases.gap import BaseGap
from ..bases.names import resolve_base_name
from ..bases.quantization import keeps_unpacked
from ..contexts import Context
from ..data import InterventionalData, check_data
from ..data.reweighting import wanted_combinations
from ..errors import UserValueError
from ..evaluation.sampling import adapters_disabled
from ..hub.card import write_card
from ..hub.contents import CardContents
from ..layers import Mechanism
from ..messages.progress import say
from .arguments import AdapterArguments
from .context_losses import ContextLosses
from .data_record import record_data, tell_changed_data
from .dry_run import dry_run, num_taken
from .gap_report import record_gap, report_gap
from .grids import validation_contexts
from .leftovers import set_aside
from .loop.checkpoints import check_start, earlier_run
from .loop.corruption import begun_steps
from .loop.hooks import StepHooks
from .loop.loss_record import kinds_of_contexts
from .loop.memory import memory_for_base
from .loop.objective import Objective
from .loop.optimization import unfinished_warm_up
from .loop.processes import main_process_first
from .loop.sharding import shard_base
from .loop.trainer import Run, fit
from .observational import AnyArguments, check_observational_set, observational_samples, settle_observational_steps
from .reweighting import add_reweighted_contexts
from .weights import check_all_trained, check_weights, parse_weights

T = TypeVar("T")
# Of the frozen weights; the adapter's are float32.
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

KEPT_UNPACKED = (
    "Warning: without --gradient_checkpointing, a step keeps the unpacked weights of this base in memory, as much as "
    "without --quantization or --gguf_file."
)


class FineTuning(ABC, Generic[AnyArguments]):
    """One run: subclasses say what a kind of base does in its own way.

    Args:
        accelerator: from `make_accelerator`.
        arguments: the settings.
        data: data that is loaded already, instead of what `arguments` name.

    Attributes:
        model: the base with its adapter, once it is attached.
        trained: what steps are taken with: that model, or one with further parts of the pipeline.
        num_steps: optimizer steps of the whole run, once the data is known.
        begun_steps: those that it was to have when it began.
    """

    model: PeftModel
    trained: nn.Module
    num_steps: int
    begun_steps: int

    def __init__(self, accelerator: Accelerator, arguments: AnyArguments, data: InterventionalData | None) -> None:
        self.accelerator, self.arguments, self._data = accelerator, arguments, data
        self._of_base: list[Any] = []
        self.process = (accelerator.process_index, accelerator.num_processes)

    @property
    def data(self) -> InterventionalData:
        """What is trained on."""
        assert self._data is not None
        return self._data

    @abstractmethod
    def check_base(self) -> None:
        """Refuse a base that cannot be trained, before anything that takes long."""

    @abstractmethod
    def load_data(self) -> InterventionalData:
        """Load what the arguments name."""

    def check_names(self) -> None:
        """Refuse settings that name what the data does not have, before the base is loaded."""
        arguments, data = self.arguments, self.data
        self.shown = validation_contexts(arguments, arguments.observational_name, data.concepts, data.held_out)
        reweighted = wanted_combinations(arguments.reweighted_contexts, data.concepts)
        weights = parse_weights(arguments.context_weights, arguments.observational_name)
        check_weights(weights, (*data.contexts, *map(str, reweighted)), arguments.observational_name)
        check_all_trained(weights, data.contexts, data.concepts)

    @abstractmethod
    def load_base(self) -> nn.Module:
        """Load the base, unless it is there, check that the data fits it, and return what adapters are attached to."""

    def trained_model(self) -> nn.Module:
        """Return what steps are taken with, now that `model` has its adapter."""
        return self.model

    def place_base(self) -> None:
        """Put on the device what else the measurements before the training need there."""

    @property
    def task_type(self) -> str | None:
        """PEFT's, of language models: it tells how the adapter is loaded, and that it generates."""
        return None

    def token_indices(self) -> list[int] | None:
        """Return the rows of the base's embedding that are trained, too."""
        return None

    @property
    def component(self) -> str | None:
        """The name of what is adapted, where its class does not tell."""
        return None

    @abstractmethod
    def feature_extractor(self) -> tuple[Callable[[Dataset], Tensor], dict[str, Any]]:
        """Return what tells what was intervened on: rows -> features (N, D); and what these depend on, as JSON."""

    @abstractmethod
    def num_rows(self) -> int:
        """Rows of an epoch; not of streams."""

    @abstractmethod
    def make_batches(self, num_batches: int) -> Callable[..., Iterator[Any]]:
        """Batches of this process: called with the first one's number and with `num_observational` samples."""

    @property
    def hooks(self) -> StepHooks | None:
        """What happens around every step."""
        return None

    @property
    def own_rows(self) -> dict[str, int]:
        """Combinations of which the model in training writes rows, and how many it wrote last."""
        return {}

    @abstractmethod
    def objective(self) -> Objective:
        """Batch -> losses."""

    @abstractmethod
    def measure_gap(self) -> BaseGap:
        """How far the base is from the observational set."""

    @abstractmethod
    def losses(self) -> ContextLosses:
        """Return what measures and tells the loss of every context."""

    @abstractmethod
    def enable_gradient_checkpointing(self) -> None:
        """Let the base compute activations again instead of keeping them."""

    def parts(self) -> dict[str, nn.Module]:
        """Return the modules of the base, by names for the user."""
        return {"base": self.model}

    @property
    def idle_parts(self) -> tuple[str, ...]:
        """Which of them `make_room` takes off the device."""
        return ()

    def make_room(self) -> None:
        """Take off the device what steps do not need there."""

    def make_ready(self) -> None:
        """Do what is left before the first step, when the base is where it will be."""

    @property
    @abstractmethod
    def num_shown(self) -> int:
        """Samples per context at validations; 0 for none."""

    @abstractmethod
    def show(self, step: int) -> None:
        """Write and log samples of the base, and of every context; before the first step these are the same."""

    def samples(self, step: int, sample: Callable[[list[Context]], list[T]]) -> list[T]:
        """Return what `sample` makes of the base without its adapter, and after the first step of every context."""
        if not self._of_base:
            with adapters_disabled(self.trained):
                self._of_base = sample([Context()])
        return self._of_base + (sample(self.shown) if step else [])

    def labels(self, step: int) -> list[str]:
        """Return what samples are of: the base, and after the first step the contexts."""
        contexts = self.shown if step else []
        return ["base", *(str(context) or self.arguments.observational_name for context in contexts)]

    def write_beside(self, folder: Path) -> None:
        """Write what belongs beside the adapter."""

    @abstractmethod
    def card_contents(self, folder: Path) -> CardContents:
        """Return what the card says of the finished adapter in a folder."""

    def run(self) -> Path:
        """Fine-tune, and return the folder that holds the result; of a dry run, say what that would take."""
        arguments, accelerator, output_dir = self.arguments, self.accelerator, Path(self.arguments.output_dir)
        check_observational_set(arguments)
        if not arguments.dry_run:
            check_start(arguments, accelerator.num_processes)
        self.check_base()
        digest = self._check_data()
        base = self.load_base()
        self._attach_to(base)
        goes_on = None if arguments.dry_run else check_start(arguments, accelerator.num_processes, self.trained)
        if arguments.reweighted_contexts and not arguments.dry_run:  # their rows are as large as others
            with main_process_first(accelerator, output_dir):  # it estimates what the others read
                self._data = add_reweighted_contexts(self.data, arguments, accelerator, *self.feature_extractor())
        self.num_steps = num_steps = arguments.max_train_steps or (
            arguments.num_train_epochs * arguments.steps_per_epoch(self.num_rows(), accelerator.num_processes)
        )
        if accelerator.is_main_process and (problem := unfinished_warm_up(arguments, num_steps)):
            say(f"Warning: {problem}", f"Warning: {problem}")
        self.begun_steps = begun_steps(goes_on, num_steps)
        self.arguments = arguments = settle_observational_steps(arguments, num_steps)
        with main_process_first(accelerator, output_dir):  # it fills the cache that the others read
            steps = num_steps + (num_taken(arguments) if arguments.dry_run else 0)
            batches = self.make_batches(steps * arguments.gradient_accumulation_steps)
        if arguments.dry_run:
            self.prepare_steps(base)
            run = Run(accelerator, self.trained, self.objective(), arguments, num_steps)
            print(f"\n{dry_run(run, batches(0), self.parts(), self.idle_parts)}", flush=True)
            return output_dir
        return self._fit(base, batches, digest)

    def _check_data(self) -> str:
        """Load the data, unless it is there, refuse what cannot be trained on, and return its digest, where known."""
        self._data = self._data if self._data is not None else self.load_data()
        if self.data.streaming and self.arguments.max_train_steps is None:
            raise UserValueError("A stream has no known length, so it has no epochs. Give --max_train_steps.")
        if self.data.streaming:
            replace(self.arguments, streaming=True)  # refuses what streams do not allow; `data` may be one, too
        digest = ""
        if self.accelerator.is_main_process:
            report = check_data(self.data, num_frames=getattr(self.arguments, "num_frames", None))
            say(report.table(), report.remarks())
            report.raise_for_errors()
            digest = report.digest
        self.check_names()
        return digest

    def _attach_to(self, base: nn.Module) -> None:
        """Give a base, moved to where it is trained, a fresh adapter."""
        arguments, device = self.arguments, self.accelerator.device
        if self.accelerator.is_main_process and not arguments.gradient_checkpointing and keeps_unpacked(base):
            say(KEPT_UNPACKED, KEPT_UNPACKED)
        with memory_for_base(device, arguments):
            self.place_base()
            if not arguments.shard_base:  # else a device may be too small for it
                base.to(device)
        set_seed(arguments.seed)  # the adapter's initial weights
        self.model = attach_adapter(
            base, self.data, arguments, self.task_type, component=self.component, token_indices=self.token_indices()
        )
        self.trained = self.trained_model()

    def _fit(self, base: nn.Module, batches: Callable[..., Iterator[Any]], digest: str) -> Path:
        """Take the steps, with what is measured, shown and written around them, and return the adapter's folder."""
        arguments, accelerator, output_dir = self.arguments, self.accelerator, Path(self.arguments.output_dir)
        with main_process_first(accelerator, output_dir):  # it measures, and the others wait
            gap = report_gap(accelerator, arguments, self.measure_gap)
        losses = self.losses()
        self.prepare_steps(base)
        earlier = earlier_run(arguments)

        def begin(first: int) -> dict[str, float]:
            if first < self.num_steps:
                set_aside(output_dir, earlier)
            losses.begin(first)
            tell_changed_data(self.data.counts, digest, earlier)
            record_data(self.data, digest, output_dir, self.own_rows)
            return record_gap(gap, output_dir)

        seconds: list[float] = []  # of validations

        def validate(step: int) -> None:
            began = perf_counter()
            losses.tell(step)
            if self.num_shown:
                self.show(step)
            seconds.append(perf_counter() - began)

        def finish(folder: Path) -> None:
            self.write_beside(folder)
            record_data(self.data, digest, folder, self.own_rows)
            self._write_card(folder)
            if self.validates:
                known = f"; the one before took {seconds[-1]:.0f} seconds" if seconds else ""
                say(f"Trained, and saved in {folder}. What is left is the last validation{known}.")

        folder = fit(
            accelerator,
            self.trained,
            self.objective(),
            partial(batches, num_observational=observational_samples(arguments, accelerator.num_processes)),
            arguments,
            self.num_steps,
            validate if self.validates else None,
            finish=finish,
            begin=begin,
            hooks=self.hooks,
            preview=self.show if self.num_shown else None,
            kinds=kinds_of_contexts(
                self.data.concepts,
                (*self.data.contexts, *self.data.reweighted, *self.own_rows),
                arguments.observational_name,
            ),
        )
        if accelerator.is_main_process:
            self._write_card(folder)  # again: now there are the last samples, too
        return folder

    def prepare_steps(self, base: nn.Module) -> None:
        """Bring the base with its adapter into the form in which steps are taken."""
        self.make_room()  # first: `shard_base` is for bases that hardly fit
        if self.arguments.gradient_checkpointing:
            self.enable_gradient_checkpointing()
        if self.arguments.shard_base:
            with memory_for_base(self.accelerator.device, self.arguments):
                shard_base(self.model, self.accelerator.device)
        self.make_ready()
        if self.arguments.compile:
            base.compile()

    @property
    def validates(self) -> bool:
        """Whether there is anything to do at validations."""
        return bool(self.num_shown or self.arguments.validation_steps or self.data.held_out)

    def _write_card(self, folder: Path) -> None:
        self.card_contents(folder).save(folder)
        write_card(folder)


def attach_adapter(
    base: nn.Module,
    data: InterventionalData,
    arguments: AdapterArguments,
    task_type: str | None = None,
    exclude_modules: list[str] | None = None,
    component: str | None = None,
    token_indices: list[int] | None = None,
) -> PeftModel:
    """Inject a fresh adapter into a denoiser, a text encoder or a language model, in place."""
    config = CausalContextConfig(
        concepts=data.concepts.names,
        concept_rank=arguments.concept_rank,
        observational_rank=arguments.observational_rank,
        dropout=arguments.dropout,
        mechanism=cast(Mechanism, arguments.mechanism),
        anchored=arguments.anchored,
        target_modules=arguments.target_modules,
        exclude_modules=exclude_modules,
        component=component,
        trainable_token_indices=token_indices,
        task_type=task_type,
        revision=arguments.revision,
    )
    model = cast(PeftModel, get_peft_model(cast(Any, base), config))
    # PEFT looks at the model only, such as a denoiser.
    config.base_model_name_or_path = resolve_base_name(arguments.pretrained_model_name_or_path)
    return model
