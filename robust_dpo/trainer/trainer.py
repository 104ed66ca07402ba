"""RobustDPOTrainer: `transformers.Trainer` with the fused, calibrated, worst-case preference loss."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from robust_dpo.checkpoints import CheckpointedTrainer, RunRecord
from robust_dpo.data import PreferenceCollator, length_statistics
from robust_dpo.data.fingerprint import rows_fingerprint
from robust_dpo.errors import argument_error, type_error
from robust_dpo.output import PreferenceOutput
from robust_dpo.reference_cache import ReferenceCache
from robust_dpo.trainer.config import RobustDPOConfig
from robust_dpo.trainer.data import RowPreparation, Rows
from robust_dpo.trainer.dropout import disable_dropout
from robust_dpo.trainer.evaluation import evaluate_groups
from robust_dpo.trainer.forward import PolicyForward
from robust_dpo.trainer.models import add_adapter, layer_parameters, load_model, load_tokenizer, placed, placed_for_now
from robust_dpo.trainer.monitor import LastLog, TrainingMonitor
from robust_dpo.trainer.planner import ScorerPlanner
from robust_dpo.trainer.precompute import Precomputation, has_ref_logps
from robust_dpo.trainer.reference import FrozenModel, Reference, own_reference
from robust_dpo.trainer.scoring import Batch
from robust_dpo.window import (
    AccumulationWindow,
    BatchObjective,
    GroupTable,
    MicroBatch,
    RoutePlan,
    Weighting,
    make_weighting,
    plan_route,
    refuse_split_model,
    refuse_steps_in_backward,
    refuse_unknown_groups,
)

logger = logging.getLogger(__name__)


class RobustDPOTrainer(CheckpointedTrainer):
    """Preference training with a calibrated worst-case objective (DoRA, arXiv 2504.05831) and a fused LM head.

    Args:
        model: a causal language model, or the path or hub name of one. A PEFT model is trained as it is.
        ref_model: the reference, likewise; None takes the policy as it is now (a frozen copy), or the policy without
            its adapter where there is one. Not used by losses without a reference, nor by rows that have `ref_logps`.
        args: arguments; None takes the defaults and writes to `robust_dpo_output`.
        train_dataset: rows in a format that `robust_dpo.data.load_preferences` knows, or tokenised ones, which
            may hold `calibration` (float) and `ref_logps` (K floats) as well.
        eval_dataset: the same, or a dictionary of data sets by name.
        processing_class: the tokenizer; None loads the one beside the model.
        peft_config: add a fresh adapter of this kind and train nothing else.
        data_collator: in place of `robust_dpo.data.PreferenceCollator`; has to give the same keys.
        callbacks, optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError, TypeError: an argument cannot be used. `head_route="fused"` with a head that cannot be fused.
        DataError: rows cannot be used, or have no `probs` although the mode is a calibrated one.
    """

    args: RobustDPOConfig
    train_dataset: Dataset | None
    eval_dataset: Dataset | dict[str, Dataset] | None
    data_collator: Any

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: RobustDPOConfig | None = None,
        *,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
    ) -> None:
        args = RobustDPOConfig(output_dir="robust_dpo_output") if args is None else args
        if not isinstance(args, RobustDPOConfig):
            raise type_error("args", "a RobustDPOConfig", args)
        if ref_model is not None and ref_model is model and not isinstance(model, str):
            raise argument_error("ref_model", "another object than model, or None for a frozen copy", "the same object")
        policy = load_model(model, args.options("model_init_kwargs"), argument="model")
        refuse_split_model(policy, "model")
        if ref_model is not None:
            ref_model = load_model(ref_model, args.options("ref_model_init_kwargs"), argument="ref_model")
        processing_class = load_tokenizer(processing_class, policy)
        if peft_config is not None:
            policy = add_adapter(policy, peft_config)
        if isinstance(policy, PeftModel) and args.gradient_checkpointing:
            # Checkpointed blocks pass gradients on only if their input asks for one, and the embedding is frozen.
            policy.enable_input_require_grads()
        if args.disable_dropout:
            disable_dropout(policy)

        prepare = RowPreparation(args, processing_class)
        train_rows = None if train_dataset is None else prepare(train_dataset, "train_dataset")
        robust = prepare.objective_for(train_rows)
        self._prepare = replace(prepare, objective=robust)
        super().__init__(
            model=policy,
            args=args,
            data_collator=self._prepare.collator if data_collator is None else data_collator,
            train_dataset=train_rows,
            eval_dataset=_for_each(eval_dataset, lambda rows: self._prepare(rows, "eval_dataset")),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # transformers then divides the loss by the number of micro-batches of a step, which `compute_loss` undoes.
        self.model_accepts_loss_kwargs = False
        self.bound_loss = args.bound_loss()
        self._planner = ScorerPlanner(args, self.accelerator, self.is_fsdp_enabled or self.is_deepspeed_enabled)
        self._scorer = self._planner.scorer(self.model, "the model", trains=True)
        router = self._scorer.router
        self.objective = BatchObjective(
            loss=self.bound_loss,
            robust=robust,
            sft_weight=args.sft_weight,
            router_coefficient=0.0 if router is None else router.coefficient,
        )
        # A subclass may change a batch, and what is laid out has to be what it gives.
        if type(self.data_collator) is PreferenceCollator:
            self.data_collator = self.data_collator.for_layout(self._scorer.layout)
        self.reference = self._build_reference(ref_model)
        self._reference_weights = None if self.reference is None else self.reference.identity.weights
        if self.reference is not None and args.precompute_ref_log_probs:
            self._precompute(self.reference)
        self._forward = PolicyForward(
            self._scorer, self.objective, self.reference, self.accelerator, calibrated=args.calibrated
        )
        self._monitor = TrainingMonitor(
            self.accelerator,
            robust,
            skip_nonfinite=args.on_nonfinite == "skip",
            reward_beta=args.reward_beta,
        )
        self.add_callback(self._monitor.guard)
        self.add_callback(self._monitor.objective_steps)
        self.add_callback(LastLog)
        self._window = self._make_window()
        by_itself = RoutePlan("two_pass" if self.objective.adds_terms else "in_one", "micro_batch")
        self._by_itself = self._make_weighting(by_itself)
        self._evaluated: GroupTable | None = None
        if not args.disable_tqdm:
            self._print_lengths()

    def _print_lengths(self) -> None:
        """Say how long the training data is and what its layout saves."""
        # Rows that were not tokenised by tokenize_groups do not say what was cut.
        if "response_cut" not in getattr(self.train_dataset, "column_names", ()):
            return
        lengths = length_statistics(self.train_dataset, self.args.per_device_train_batch_size)
        self.accelerator.print(lengths)
        kind = self._scorer.layout.kind
        if kind != "padded":
            speedup = lengths.expected_speedup(*layer_parameters(self.model), shared=kind == "group")
            self.accelerator.print(f"layout {kind!r}: expected {speedup:.1f} × as fast as padded batches")

    def _make_window(self) -> AccumulationWindow:
        """What makes the weights of a step those of its global batch."""
        refuse_unknown_groups(self.args, self.accelerator)
        refuse_steps_in_backward(self.args, self.accelerator)
        plan = plan_route(
            self.objective,
            self.args.robust_scope,
            self.args.robust_route,
            accelerator=self.accelerator,
            micro_batches=self.args.gradient_accumulation_steps,
            sharded=self._planner.is_sharded(self.model),
        )
        if plan.reason:
            logger.warning("each step takes a second forward pass of the policy: %s", plan.reason)
        logger.info("robust weights over each %s: %s", self.args.robust_scope, plan.kind)
        return AccumulationWindow(
            self._make_weighting(plan),
            self.accelerator,
            self._prepare_inputs,
            drop_last=self.args.dataloader_drop_last,
            keeps_gradients=self._planner.is_sharded(self.model),
        )

    def _make_weighting(self, plan: RoutePlan) -> Weighting:
        return make_weighting(plan, self.objective, self._forward, self._forward.look, self.accelerator)

    def _build_reference(self, ref_model: nn.Module | None) -> Reference | None:
        """The reference of the run; None where the loss needs none or all rows bring its log-probs."""
        rows = [self.train_dataset, *_values(self.eval_dataset)]
        brought = all(has_ref_logps(dataset) for dataset in rows if dataset is not None)
        if not self.bound_loss.needs_reference or (brought and any(rows)):
            if ref_model is not None:
                reason = "rows have ref_logps" if brought else f"the loss {self.bound_loss.name!r} has no reference"
                raise argument_error("ref_model", f"None: {reason}", type(ref_model).__name__)
            return None
        if ref_model is None:
            copy_policy = not self.args.precompute_ref_log_probs
            return own_reference(self.model, self._scorer, self.accelerator, copy_policy=copy_policy)
        ref_model = placed(ref_model, self.accelerator)
        scorer = self._planner.scorer(ref_model, "ref_model", trains=False)
        return FrozenModel.of(ref_model, scorer, self.accelerator)

    def _precompute(self, ref: Reference) -> None:
        """Add the reference's log-probs to the data sets and release it."""
        run = Precomputation(
            reference=ref,
            policy=self.model,
            collator=self.data_collator,
            accelerator=self.accelerator,
            cache=ReferenceCache(Path(self.args.cache_dir or Path(self.args.output_dir) / "reference_cache")),
            recipe=self._prepare.recipe,
            progress=not self.args.disable_tqdm,
            workers=self.args.dataloader_num_workers,
        )

        def add(dataset: Dataset, name: str, batch_size: int) -> Dataset:
            if has_ref_logps(dataset):
                return dataset
            return run(dataset, batch_size=self.args.precompute_ref_batch_size or batch_size, name=name)

        with placed_for_now(ref.model_in(self.model), self.accelerator):
            if self.train_dataset is not None:
                self.train_dataset = add(self.train_dataset, "the training data", self.args.train_batch_size)
            self.eval_dataset = _for_each(
                self.eval_dataset, lambda rows: add(rows, "the evaluation data", self.args.eval_batch_size)
            )
        self.reference = None

    def get_eval_dataloader(self, eval_dataset: str | Rows | None = None) -> DataLoader[Any]:
        """As in transformers; rows that are not tokenised yet are prepared like those of the constructor."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare(eval_dataset, "eval_dataset")
        loader: DataLoader[Any] = super().get_eval_dataloader(eval_dataset)
        return loader

    def get_test_dataloader(self, test_dataset: Rows) -> DataLoader[Any]:
        """As in transformers; rows that are not tokenised yet are prepared like those of the constructor."""
        loader: DataLoader[Any] = super().get_test_dataloader(self._prepare(test_dataset, "test_dataset"))
        return loader

    def preference_output(self, model: nn.Module, batch: Batch) -> PreferenceOutput:
        """Loss, log-probs and robust weights of one batch by itself, without the SFT term and the routers' loss.

        Args:
            model: the policy, wrapped as it is trained.
            batch: what the collator gives, on the model's device.
        """
        return self._forward(model, batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a micro-batch, and with `return_outputs` the PreferenceOutput it is part of.

        Within a step of `train` it is the micro-batch's part in the objective of the whole step, and in two passes the
        value and the weights of the output are those of the step; otherwise all is of the micro-batch by itself.
        """
        inputs = self._scorer.laid_out(inputs)
        divisor = 1
        if model.training and self._window.is_open:
            weighed, divisor = self._window.run(model, inputs), self.current_gradient_accumulation_steps
        else:
            (inputs,) = self._by_itself.open(model, [MicroBatch(inputs, counts=True)])
            weighed = replace(self._by_itself.run(model, inputs, 0), solution=None)
        if model.training:
            self._monitor.watch(weighed, inputs)
        loss = weighed.loss * divisor
        return (loss, weighed.output) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Tensor | int | None]:
        """The micro-batches of the next optimizer step, as in transformers."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._monitor.begin_step()
        return self._window.open(self.model_wrapped, batches, num_batches), items

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers; gives the objective of the step at its last micro-batch, and 0 before.

        One that is not finite counts as 0 in the sum of transformers, and no read finds that out.
        """
        loss: Tensor = super().training_step(*args, **kwargs)
        if self._window.is_open:
            return torch.zeros_like(loss)
        return self._monitor.step_loss.to(loss.dtype).nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As in transformers; a norm that is not finite keeps the step from being taken.

        DeepSpeed has left the step out by then. With fp16 it adapts its scale to that, as torch's scaler does.
        """
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if isinstance(norm, Tensor):
            self._monitor.guard.watch_norm(norm)
        elif norm is not None and not self.args.fp16:
            self._monitor.guard.watch_norm(torch.tensor(norm))
        return norm

    def worst_groups(self, count: int = 10) -> list[tuple[str, float]]:
        """Ids and weights of the groups with the largest robust weight in the last optimizer step, largest first.

        The weights have sum 1 over the global batch; the groups are those of this process.
        """
        return self._monitor.worst_groups(count)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Tensor, None]:
        """Nothing but the groups with their log-probs, as `GroupTable.to_tensor` writes them."""
        self._evaluated, _ = self._forward.look(model, self._prepare_inputs(inputs))
        return None, self._evaluated.to_tensor(), None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in transformers, with the metrics of GROUP_METRICS and the objective over the whole data set.

        The loss is the objective of all groups together, so it does not depend on the batch size. The predictions are
        a row [10] for each group: loss, calibration, GROUP_METRICS and LOGP_ACCURACIES.
        """
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        assert self._evaluated is not None
        result = evaluate_groups(output.predictions, self._evaluated, self.objective, reward_beta=self.args.reward_beta)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in result.metrics.items()})
        return output._replace(predictions=result.table)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in transformers; logs of training get the metrics gathered since the last one."""
        if "loss" in logs:
            # transformers counts what is not finite as 0.
            logs = {**logs, **self._monitor.logs()}
        if "train_loss" in logs:
            logs = {**logs, "train_loss": self._monitor.guard.mean_loss()}
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in transformers; the training loss is the mean of the steps that were not left out."""
        output: TrainOutput = super().train(*args, **kwargs)
        loss = self._monitor.guard.mean_loss()
        return output._replace(training_loss=loss, metrics={**output.metrics, "train_loss": loss})

    def stateful_parts(self) -> dict[str, Stateful]:
        """The count of skipped steps, and the state of an objective that has one."""
        return {"skipped_steps": self._monitor.guard, **self.parts_of_weights()}

    def parts_of_weights(self) -> dict[str, Stateful]:
        """The state of an objective that has one."""
        robust = self.objective.robust
        return {"objective": robust} if isinstance(robust, Stateful) else {}

    def run_record(self) -> RunRecord:
        """The reference, and what sums, roundings and the order of the rows depend on."""
        layout, head, on_cpu = self._scorer.layout, self._scorer.head.name, self.args.device.type == "cpu"
        return RunRecord(
            self._reference_weights,
            {
                "training data (a hash)": self._training_data,
                "groups per micro-batch": self.args.train_batch_size,
                "micro-batches per step": self.args.gradient_accumulation_steps,
                "processes": self.args.world_size,
                "precision": self.accelerator.mixed_precision,
                "layout": layout.kind,
                "attention": None if layout.attention is None else layout.attention.name,
                "device": self.args.device.type,
                **({} if head is None else {"head": head}),
                **({"threads": torch.get_num_threads()} if on_cpu else {}),
            },
        )

    @cached_property
    def _training_data(self) -> str | None:
        return None if self.train_dataset is None else rows_fingerprint(self.train_dataset)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._monitor.guard.report()
        super()._save_checkpoint(model, trial)


def _values(datasets: Dataset | dict[str, Dataset] | None) -> list[Dataset | None]:
    return [*datasets.values()] if isinstance(datasets, dict) else [datasets]


def _for_each(datasets: Any, function: Callable[[Any], Dataset]) -> Any:
    """`function` of a data set, or of each in a dictionary by name; None stays None."""
    if isinstance(datasets, dict):
        return {name: function(rows) for name, rows in datasets.items()}
    return None if datasets is None else function(datasets)
