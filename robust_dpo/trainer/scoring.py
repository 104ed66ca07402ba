"""From a model and a batch to sequence log-probs, through the fused head or through the model's own logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from robust_dpo import ops
from robust_dpo.expert_load import RouterPass
from robust_dpo.layout import LayoutPlan, PackedGroups, groups_of
from robust_dpo.layout.choice import PADDED, model_output
from robust_dpo.layout.packing import IGNORED
from robust_dpo.output import PreferenceOutput
from robust_dpo.trainer.head import in_place_of_head
from robust_dpo.trainer.head_route import HeadRoute
from robust_dpo.trainer.router import CountedPlaces, RouterLoss, packed_places, padded_places, router_pass
from robust_dpo.trainer.self_check import HeadCheck

Batch = dict[str, Any]
T = TypeVar("T")


def shifted_targets(batch: Batch) -> Tensor:
    """[S, T] int64, the token that each position predicts; -100 where there is none (prompt, padding, last)."""
    targets: Tensor = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    return targets


def response_lengths(batch: Batch) -> Tensor:
    """[S] int64, tokens of each response."""
    lengths: Tensor = (batch["labels"][:, 1:] != IGNORED).sum(1)
    return lengths


@dataclass(frozen=True)
class SequenceScorer:
    """Runs one kind of model.

    Args:
        head: whether its head may be fused, and what it does to its logits.
        backend: backend of the fused operators.
        layout: how batches are laid out for it.
        router: the auxiliary loss of its routers; None where it has none or that is not wanted.
    """

    head: HeadRoute
    backend: str = "auto"
    layout: LayoutPlan = PADDED
    router: RouterLoss | None = None

    def for_copy(self, model: nn.Module) -> SequenceScorer:
        """The scorer of a whole copy of the model that this one is for, which is not trained."""
        return replace(self, head=self.head.for_copy(model), router=None)

    def laid_out(self, batch: Batch) -> Batch:
        """The batch with its groups under `packed` as this model takes them; the collator's where it made them.

        The `group_sizes` of a packed batch are on the CPU, so that nothing has to be read from the device.
        """
        if self.layout.kind == "padded":
            return batch
        packed: PackedGroups | None = batch.get("packed")
        if packed is None or packed.shared != (self.layout.kind == "group"):
            packed = self.layout.pack(groups_of(batch))
        packed = packed.to(batch["input_ids"].device)
        return {**batch, "packed": packed, "group_sizes": packed.group_sizes}

    def preference_output(
        self, model: nn.Module, batch: Batch, objective: dict[str, Any], routers: list[RouterPass] | None = None
    ) -> PreferenceOutput:
        """The loss of a batch, differentiable.

        Args:
            model: the wrapped one, so that hooks of its engine run.
            batch: what the collator gives.
            objective: arguments of the operators, from `loss` on.
            routers: the routers of the pass are added to it, where they are to be balanced.
        """
        batch, check = self.laid_out(batch), self.head.check(model)
        if check.head is None:
            logps = self._logps_of_logits(model, batch, routers)
            return ops.preference_loss(logps, lengths=response_lengths(batch), **objective)

        def operate(**head: Any) -> PreferenceOutput:
            return ops.linear_preference_loss(**head, **objective)

        result, output = self._through_head(check, model, batch, operate, routers)
        if self.head.by_engine:
            # Zero; an engine prepares the backward pass of a module when the gradient of its output comes by.
            result = replace(result, loss=result.loss + output.logits.sum())
        return result

    def logps(self, model: nn.Module, batch: Batch, routers: list[RouterPass] | None = None) -> Tensor:
        """[S] float32, log-prob of each response; arguments as of `preference_output`. Not for a backward pass."""
        batch, check = self.laid_out(batch), self.head.check(model)
        if check.head is None:
            return self._logps_of_logits(model, batch, routers)
        logps, _ = self._through_head(check, model, batch, ops.sequence_logps, routers)
        assert isinstance(logps, Tensor)
        return logps

    def _logps_of_logits(self, model: nn.Module, batch: Batch, routers: list[RouterPass] | None) -> Tensor:
        logits = self._predicting(self._run(model, batch, routers).logits, batch)
        logps = ops.sequence_logps_from_logits(logits, **self._targets(batch), backend=self.backend)
        assert isinstance(logps, Tensor)
        return logps

    def _through_head(
        self,
        check: HeadCheck,
        model: nn.Module,
        batch: Batch,
        operate: Callable[..., T],
        routers: list[RouterPass] | None,
    ) -> tuple[T, Any]:
        """What a fused operator gives, and the model's output."""
        head, transform = check.head, check.transform
        assert head is not None

        def run(hidden: Tensor) -> T:
            return operate(
                hidden=self._predicting(hidden, batch),
                **self._targets(batch),
                weight=head.weight,
                bias=head.bias,
                softcap=transform.softcap,
                logit_scale=transform.logit_scale,
                backend=self.backend,
            )

        with in_place_of_head(head, run, by_engine=self.head.by_engine) as results:
            output = self._run(model, batch, routers)
        (result,) = results
        return result, output

    def _run(self, model: nn.Module, batch: Batch, routers: list[RouterPass] | None) -> Any:
        router = None if routers is None else self.router
        # Not every model takes the option.
        options = {} if router is None else {"output_router_logits": True}
        if self.layout.kind == "padded":
            ids, mask = batch["input_ids"], batch["attention_mask"]
            output = model(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        else:
            output = model_output(model, batch["packed"], self.layout, **options)
        if router is not None and routers is not None:
            routers.append(router_pass(router, output, self._places(batch), len(batch["group_sizes"])))
        return output

    def _places(self, batch: Batch) -> CountedPlaces:
        if self.layout.kind == "padded":
            return padded_places(batch["attention_mask"], batch["group_sizes"])
        return packed_places(batch["packed"])

    def _predicting(self, values: Tensor, batch: Batch) -> Tensor:
        """[S, T, ...] of a padded batch, [N, ...] of a packed one: one row per token that `_targets` names."""
        if self.layout.kind == "padded":
            # Without the virtual tokens that prompt-learning adapters put in front.
            return values[:, -batch["input_ids"].shape[1] :]
        return values.flatten(0, 1).index_select(0, batch["packed"].rows)

    def _targets(self, batch: Batch) -> dict[str, Any]:
        if self.layout.kind == "padded":
            return {"targets": shifted_targets(batch)}
        return {"targets": batch["packed"].targets, "seq_lens": batch["packed"].seq_lens}
