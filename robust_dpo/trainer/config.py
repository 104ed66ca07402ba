"""Arguments of RobustDPOTrainer."""

from __future__ import annotations

import dataclasses
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

import torch
from transformers import TrainingArguments

from robust_dpo import losses
from robust_dpo.calibration.density_ratio import Form
from robust_dpo.calibration.reduce import REDUCTIONS
from robust_dpo.checks import NON_NEGATIVE, check_number
from robust_dpo.dispatch import check_backend
from robust_dpo.errors import argument_error, type_error
from robust_dpo.layout import LAYOUTS, available_backends
from robust_dpo.losses import BoundLoss
from robust_dpo.robust import MODES, Mean, RobustObjective, from_mode
from robust_dpo.robust import resolve as resolve_objective
from robust_dpo.window import ROUTES, SCOPES

HEAD_ROUTES = ("auto", "fused", "logits")
BAD_ROW_POLICIES = ("error", "drop")
NONFINITE_POLICIES = ("stop", "skip")
TRUNCATION_MODES = ("keep_end", "keep_start")
OPTION_FIELDS = ("model_init_kwargs", "ref_model_init_kwargs", "loss_options", "robust_options", "calibration_options")


@dataclass
class RobustDPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` and what preference training adds; TRL's names where they mean the same.

    Defaults that differ from TrainingArguments: `learning_rate` 1e-6 and `logging_steps` 10 (as in TRL),
    `remove_unused_columns` False (the collator needs columns that the model does not take), and what keeps the host
    from waiting for the device at every micro-batch: `logging_nan_inf_filter` False, `accelerator_config.non_blocking`
    True. `gradient_checkpointing_kwargs` that do not say so get `use_reentrant=False`.
    `per_device_train_batch_size` counts groups (prompts), each with all of its responses.

    Raises:
        ValueError, TypeError: a value cannot be used; the message names the argument.
    """

    # transformers reads these from a JSON string where they come from a command line.
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*TrainingArguments._VALID_DICT_FIELDS, *OPTION_FIELDS]

    learning_rate: float = field(default=1e-6, metadata={"help": "Initial learning rate of AdamW."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two logs."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Has to stay False."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Read every loss back to leave it out of the log; on_nonfinite does without."}
    )
    dataloader_persistent_workers: bool | None = field(
        default=None, metadata={"help": "Keep data workers from epoch to epoch; default: where there are any."}
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained where the model is given as a path or name."}
    )
    ref_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The same for a reference given as a path or name."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "Train without dropout, as TRL does."})

    max_length: int | None = field(default=1024, metadata={"help": "Tokens of prompt and response together."})
    max_prompt_length: int | None = field(default=None, metadata={"help": "Tokens of the prompt."})
    truncation_mode: str = field(
        default="keep_end",
        metadata={"help": "Which part of a prompt that is too long stays.", "choices": list(TRUNCATION_MODES)},
    )
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Pad batches to a multiple of this."})
    on_bad_row: str = field(
        default="error",
        metadata={"help": "A row that cannot be used: error or drop.", "choices": list(BAD_ROW_POLICIES)},
    )

    domain_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the rows that names the domain of each, for aggregations over domains (group_dro); they "
            "read `domain` by default."
        },
    )

    precompute_ref_log_probs: bool = field(
        default=False, metadata={"help": "Run the reference once over the data before training, then release it."}
    )
    precompute_ref_batch_size: int | None = field(
        default=None, metadata={"help": "Groups per batch of that pass; default: the batch size of the data set."}
    )

    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Directory for what can be kept between runs: token ids of the rows, reference log-probs. Default: "
            "log-probs in output_dir/reference_cache, token ids nowhere."
        },
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise the rows."})

    loss_type: str = field(default="sigmoid", metadata={"help": "Name of a registered preference loss."})
    beta: float | None = field(default=None, metadata={"help": "Scale of the reward; default: the loss's own."})
    label_smoothing: float | None = field(
        default=None, metadata={"help": "Probability of a flipped label, for losses that have it (cdpo, robust)."}
    )
    loss_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further options of the loss by name."}
    )

    sft_weight: float = field(
        default=0.0,
        metadata={
            "help": "Add this times the negative log-likelihood per token of the best responses of the global batch."
        },
    )

    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Add this times the loss that balances the load of a model's experts, over all tokens of the "
            "global batch. Default: the model's own where its configuration has output_router_logits=True, else 0."
        },
    )

    mode: str = field(
        default="dro",
        metadata={"help": "What is minimised over the groups of a batch.", "choices": list(MODES)},
    )
    lam: float | None = field(
        default=None, metadata={"help": "Robustness λ: large is the mean, small the worst group. Default: 1."}
    )
    radius: float | None = field(default=None, metadata={"help": "KL radius ρ; λ is then found from it."})
    robust: str | None = field(
        default=None, metadata={"help": "Aggregation by name, in place of the one that the mode implies."}
    )
    robust_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of that aggregation by name."}
    )
    robust_scope: str = field(
        default="global_batch",
        metadata={
            "help": "What the weights are normalised over: global_batch (all micro-batches and ranks of an optimizer "
            "step), or micro_batch, as in published code.",
            "choices": list(SCOPES),
        },
    )
    robust_route: str = field(
        default="auto",
        metadata={
            "help": "How weights over the global batch are had: one_pass, two_pass (another forward pass), or auto.",
            "choices": list(ROUTES),
        },
    )
    calibration_form: Form = field(default="paper", metadata={"help": "How probs become a density ratio."})
    calibration_reduce: str = field(
        default="mean", metadata={"help": "How the ratios of a group's responses become the group's."}
    )
    calibration_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of robust_dpo.calibration.density_ratio by name."}
    )

    layout: str = field(
        default="auto",
        metadata={
            "help": "How a batch is laid out: group runs a prompt once for all of its responses, packed once for each "
            "without padding, padded with it; auto: the first that the model can take.",
            "choices": list(LAYOUTS),
        },
    )
    layout_attention: str = field(
        default="auto", metadata={"help": "Attention over packed rows: auto, flex, flash, segments or sdpa."}
    )
    layout_row_tokens: int | None = field(
        default=None, metadata={"help": "Tokens of a packed row; default: that of the attention, mostly one row."}
    )
    head_route: str = field(
        default="auto",
        metadata={
            "help": "auto: fuse the head with the loss where the self-check passes; fused: or stop; logits: never.",
            "choices": list(HEAD_ROUTES),
        },
    )
    backend: str = field(default="auto", metadata={"help": "Backend of the fused operators."})
    on_nonfinite: str = field(
        default="stop",
        metadata={"help": "An optimizer step whose loss is not finite.", "choices": list(NONFINITE_POLICIES)},
    )

    def __post_init__(self) -> None:
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        own_accelerator: Any = self.accelerator_config
        if self.use_cpu or not torch.accelerator.is_available():
            # torch warns of it, once for each loader.
            self.dataloader_pin_memory = False
        super().__post_init__()
        if own_accelerator is None:
            # Otherwise a copy from pinned memory waits for all that the device has to do before.
            self.accelerator_config.non_blocking = self.dataloader_pin_memory
        # transformers has two names for them, of which older versions know the second only.
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            options = getattr(self, name, None)
            if isinstance(options, dict):
                # What transformers takes where there are no options at all; torch would take the other form.
                setattr(self, name, {"use_reentrant": False, **options})
        loss_type: object = self.loss_type
        if isinstance(loss_type, list) and len(loss_type) == 1:
            # TRL's DPOConfig holds a list of losses to add up.
            loss_type = loss_type[0]
        if not isinstance(loss_type, str):
            raise type_error("loss_type", "the name of one loss", loss_type)
        self.loss_type = loss_type
        if self.remove_unused_columns:
            raise argument_error("remove_unused_columns", "False: the collator needs every column", True)
        if self.batch_eval_metrics:
            raise argument_error("batch_eval_metrics", "False: evaluation solves one objective over all groups", True)
        if self.cache_dir is not None:
            if not isinstance(self.cache_dir, str | os.PathLike):
                raise type_error("cache_dir", "the path of a directory, or None", self.cache_dir)
            self.cache_dir = os.fspath(self.cache_dir)
        if self.domain_column is not None and not isinstance(self.domain_column, str):
            raise type_error("domain_column", "the name of a column, or None", self.domain_column)
        self._check_choices()
        check_backend(self.backend, self.device)
        self._check_counts()
        self.sft_weight = check_number("sft_weight", self.sft_weight, NON_NEGATIVE)
        if self.router_aux_loss_coef is not None:
            self.router_aux_loss_coef = check_number("router_aux_loss_coef", self.router_aux_loss_coef, NON_NEGATIVE)
        for name in OPTION_FIELDS:
            if getattr(self, name) is None:
                setattr(self, name, {})
            elif not isinstance(getattr(self, name), dict):
                raise type_error(name, "a dictionary", getattr(self, name))
        if self.robust_options and self.robust is None:
            raise argument_error("robust_options", "none without robust", self.robust_options)
        for name in ("lam", "radius"):
            if getattr(self, name) is not None and self.robust is not None:
                expected = f"None beside robust={self.robust!r}, whose parameters are robust_options"
                raise argument_error(name, expected, getattr(self, name))
        if self.lam is not None and self.radius is not None:
            raise argument_error("lam", f"None beside radius={self.radius}, from which λ is found", self.lam)
        if self.radius is not None and isinstance(from_mode(self.mode)[0], Mean):
            raise argument_error("radius", f"None with mode={self.mode!r}, which has no worst case", self.radius)
        self.bound_loss()
        self.objective()
        if self.robust_scope == "micro_batch" and self.objective().needs_domains:
            expected = f"'global_batch' with {self.robust}, whose weights take a step at each optimizer step"
            raise argument_error("robust_scope", expected, repr(self.robust_scope))
        if self.robust_scope == "micro_batch" and self._couples_groups:
            few = self.per_device_train_batch_size == 1 and self.weighs_groups
            warnings.warn(
                'robust_scope="micro_batch": the objective depends on how the batch is cut into micro-batches and ranks'
                + (f", and with one group in each mode={self.mode!r} weighs nothing." if few else "."),
                UserWarning,
                stacklevel=3,
            )

    def options(self, name: str) -> dict[str, Any]:
        """A copy of one of OPTION_FIELDS."""
        return dict(getattr(self, name))

    def bound_loss(self) -> BoundLoss:
        """The loss with its options. Raises what `losses.resolve` raises."""
        options = self.options("loss_options")
        if self.label_smoothing is not None:
            if "label_smoothing" in options:
                raise argument_error("label_smoothing", "one value, not also one in loss_options", self.label_smoothing)
            options["label_smoothing"] = self.label_smoothing
        return losses.resolve(self.loss_type, self.beta, options)

    def objective(self) -> RobustObjective:
        """The aggregation over groups: of the mode, or the one that `robust` names."""
        of_mode, _ = from_mode(self.mode, lam=1.0 if self.lam is None else self.lam, radius=self.radius)
        if self.robust is None:
            return of_mode
        named = resolve_objective(self.robust)
        options = self.options("robust_options")
        known = [entry.name for entry in dataclasses.fields(named)]  # type: ignore[arg-type]  # all are dataclasses
        unknown = [name for name in options if name not in known]
        if unknown:
            expected = f"parameters of {self.robust!r}: {', '.join(known) or 'none'}"
            raise argument_error("robust_options", expected, ", ".join(unknown))
        return dataclasses.replace(named, **options)  # type: ignore[type-var]

    @property
    def calibrated(self) -> bool:
        """Whether the mode uses the calibration of the groups."""
        return from_mode(self.mode)[1]

    @property
    def weighs_groups(self) -> bool:
        """Whether the objective gives the groups of a batch weights that depend on their losses."""
        return not isinstance(self.objective(), Mean)

    @property
    def _couples_groups(self) -> bool:
        """Whether the objective is more than a mean over groups."""
        adds_terms = self.sft_weight > 0 or (self.router_aux_loss_coef or 0) > 0
        return self.weighs_groups or adds_terms or self.bound_loss().couples_groups

    @property
    def reward_beta(self) -> float:
        """β of the logged rewards: the one in force, or 1 for a loss that has none."""
        return float(dict(self.bound_loss().arguments).get("beta", 1.0))

    def _check_choices(self) -> None:
        for name, allowed in (
            ("mode", MODES),
            ("truncation_mode", TRUNCATION_MODES),
            ("calibration_form", get_args(Form)),
            ("calibration_reduce", tuple(REDUCTIONS)),
            ("on_bad_row", BAD_ROW_POLICIES),
            ("on_nonfinite", NONFINITE_POLICIES),
            ("robust_scope", SCOPES),
            ("robust_route", ROUTES),
            ("head_route", HEAD_ROUTES),
            ("layout", LAYOUTS),
            ("layout_attention", ("auto", *available_backends())),
        ):
            if getattr(self, name) not in allowed:
                raise argument_error(name, f"one of {', '.join(allowed)}", repr(getattr(self, name)))

    def _check_counts(self) -> None:
        for name in (
            "max_length",
            "max_prompt_length",
            "pad_to_multiple_of",
            "precompute_ref_batch_size",
            "dataset_num_proc",
            "layout_row_tokens",
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise type_error(name, "an integer of at least 1, or None", value)
            if value < 1:
                raise argument_error(name, "at least 1, or None", value)
        if self.max_length is not None and (self.max_prompt_length or 0) >= self.max_length:
            raise argument_error("max_prompt_length", f"less than max_length={self.max_length}", self.max_prompt_length)
