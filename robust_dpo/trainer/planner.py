"""How a model is run: its head fused or not, its batches packed or padded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial

from accelerate import Accelerator
from accelerate.utils import DistributedType, DynamoBackend
from torch import nn

from robust_dpo.errors import argument_error
from robust_dpo.layout import LayoutPlan, plan_layout
from robust_dpo.trainer.config import RobustDPOConfig
from robust_dpo.trainer.head import LogitTransform, linear_head
from robust_dpo.trainer.head_route import HeadRoute
from robust_dpo.trainer.models import has_sharded_parameters
from robust_dpo.trainer.router import RouterLoss, may_reenter, plan_router_loss
from robust_dpo.trainer.scoring import SequenceScorer
from robust_dpo.trainer.self_check import HeadCheck, check_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScorerPlanner:
    """Tries models before they are trained, where the set-up lets it.

    Args:
        args: of the run.
        accelerator: of the run.
        will_shard: an engine is going to give each rank a part of the model that trains (FSDP, DeepSpeed).
    """

    args: RobustDPOConfig
    accelerator: Accelerator
    will_shard: bool

    def scorer(self, model: nn.Module, name: str, *, trains: bool) -> SequenceScorer:
        """Runs `model`, which messages call `name`.

        Raises:
            ValueError: `head_route`, `layout` or `router_aux_loss_coef` asks for what the model, or its checkpointing,
            cannot take; for the head of a model that ranks share, when it first runs.
        """
        sharded = self.is_sharded(model) if trains else has_sharded_parameters(model)
        layout = self._plan_layout(model, name, trains=trains, sharded=sharded)
        router = self._router(model, sharded) if trains else None
        return SequenceScorer(self._head_route(model, name, sharded), self.args.backend, layout, router)

    def _router(self, model: nn.Module, sharded: bool) -> RouterLoss | None:
        args = self.args
        loss = plan_router_loss(model, args.router_aux_loss_coef, trial=not sharded)
        if loss is None:
            return None
        expected = "use_reentrant=False, without which a model's router logits carry no gradient"
        if args.gradient_checkpointing:
            # Those of the model are replaced when the training begins.
            if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
                raise argument_error("gradient_checkpointing_kwargs", expected, args.gradient_checkpointing_kwargs)
        elif (reentrant := may_reenter(model)) is not None:
            raise argument_error("model", f"one whose checkpoints say {expected}", reentrant)
        return loss

    def is_sharded(self, model: nn.Module) -> bool:
        """Whether ranks hold parts of the parameters of `model`, which trains: from when it was loaded, or soon."""
        return self.will_shard or has_sharded_parameters(model)

    def _plan_layout(self, model: nn.Module, name: str, *, trains: bool, sharded: bool) -> LayoutPlan:
        args = self.args
        if self._compiles:
            plan = LayoutPlan("padded", reason="torch_compile compiles the model's own attention")
        elif sharded:
            plan = LayoutPlan("padded", reason="ranks hold parts of it (FSDP, DeepSpeed), and it is not tried before")
        elif args.n_gpu > 1:
            plan = LayoutPlan("padded", reason="DataParallel cuts batches by rows; start with torchrun to pack them")
        else:
            attention, row_tokens = args.layout_attention, args.layout_row_tokens
            with self.accelerator.autocast():
                plan = plan_layout(model, args.layout, attention=attention, row_tokens=row_tokens, trains=trains)
        if plan.reason and args.layout in ("group", "packed"):
            raise argument_error("layout", f"'auto' or 'padded' for {name}: {plan.reason}", repr(args.layout))
        if plan.reason and args.layout == "auto":
            logger.warning("%s: responses do not share their prompt, which costs time: %s", name, plan.reason)
        return plan

    def _head_route(self, model: nn.Module, name: str, sharded: bool) -> HeadRoute:
        why_not = self._why_no_head(model, sharded)
        route = HeadRoute(partial(self._check_head, name=name, why_not=why_not), by_engine=sharded)
        if why_not or not sharded:
            route.check(model)
        return route

    def _why_no_head(self, model: nn.Module, sharded: bool) -> str:
        """Why a head cannot be fused, where that is known before it runs; empty where it is not."""
        if self.args.head_route == "logits":
            return "head_route='logits'"
        if linear_head(model) is None:
            return "the output layer is not a plain nn.Linear"
        if self._compiles:
            return "torch_compile compiles the model's own head"
        if sharded and self.accelerator.distributed_type == DistributedType.FSDP and not self.accelerator.is_fsdp2:
            return "the first version of FSDP makes one vector of a layer's weights"
        return "DataParallel runs copies of it; start with torchrun to fuse it" if self.args.n_gpu > 1 else ""

    def _check_head(self, model: nn.Module, name: str, why_not: str) -> HeadCheck:
        """Whether the head of `model`, wrapped as it is run, is fused."""
        if why_not:
            check = HeadCheck(None, LogitTransform(), why_not)
        else:
            check = check_head(self.accelerator.unwrap_model(model), model)
        if check.head is None and self.args.head_route != "logits":
            if self.args.head_route == "fused":
                raise argument_error("head_route", f"'auto' or 'logits', for {name}: {check.reason}", "'fused'")
            logger.warning("%s: the head is not fused with the loss, which costs memory: %s", name, check.reason)
        return check

    @property
    def _compiles(self) -> bool:
        """Whether the model will be compiled, by transformers or by an option of accelerate's launcher."""
        return bool(self.args.torch_compile or self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)
