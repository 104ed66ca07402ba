"""Training loops in plain PyTorch on padded batches, as one writes them by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from robust_dpo.bench.train_step.data import Row
from robust_dpo.bench.train_step.setting import BETA, IGNORE, LAM, MAX_GRAD_NORM, Setting, optimizer_for
from robust_dpo.bench.train_step.turnstile import Turnstile

TokenLogps = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [N, H], head [V, H], targets [N]) -> log-probs [N]."""
SequenceLogps = Callable[[PreTrainedModel, "Padded"], Tensor]
"""(model, batch) -> log-probs of the responses [S]."""


@dataclass(frozen=True)
class Padded:
    """A batch, one row per response.

    Args:
        input_ids: [S, T] int64, padded on the right.
        attention_mask: [S, T] int64.
        targets: [S, T] int64, the token that each position predicts, IGNORE outside of responses.
        calibration: [G] float32.
    """

    input_ids: Tensor
    attention_mask: Tensor
    targets: Tensor
    calibration: Tensor

    @staticmethod
    def collate(rows: Sequence[Row]) -> Padded:
        pairs = [(row["prompt_ids"], response) for row in rows for response in row["response_ids"]]
        ids = [torch.tensor([*prompt, *response]) for prompt, response in pairs]
        # A position predicts the next token, so targets are one to the left of the response.
        targets = [torch.tensor([IGNORE] * (len(prompt) - 1) + [*response, IGNORE]) for prompt, response in pairs]
        return Padded(
            pad_sequence(ids, batch_first=True),
            pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            pad_sequence(targets, batch_first=True, padding_value=IGNORE),
            torch.tensor([row["calibration"] for row in rows]),
        )

    def to(self, device: torch.device) -> Padded:
        return Padded(*(value.to(device) for value in vars(self).values()))


def on_response_rows(token_logps: TokenLogps, model: PreTrainedModel, batch: Padded) -> Tensor:
    """Backbone on everything, head on the rows that predict a token of a response; [S]."""
    hidden = model.base_model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)[0]
    mask = batch.targets != IGNORE
    found = token_logps(hidden[mask], model.lm_head.weight, batch.targets[mask])
    return found.new_zeros(len(mask)).index_add(0, mask.nonzero()[:, 0], found)


def eager(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """log-softmax of all logits, in fp32 at least, gathered."""
    logits = rows @ weight.t()
    return _wide(logits).log_softmax(1).gather(1, targets[:, None])[:, 0]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def cut_cross_entropy(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Apple's linear_cross_entropy: its Triton kernels on a GPU, its torch.compile variant elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, weight = rows.to(dtype), weight.to(dtype)
    implementation = "cce" if device == "cuda" else "torch_compile"
    nll: Tensor = linear_cross_entropy(rows, weight, targets, impl=implementation, reduction="none")
    return -nll.float()


def whole_log_softmax(model: PreTrainedModel, batch: Padded) -> Tensor:
    """The way of the DoRA authors: logits and log-softmax of every position, then gather, mask and sum."""
    logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    table = _wide(logits).log_softmax(-1)
    found = table.gather(2, batch.targets.clamp(min=0)[..., None])[..., 0]
    return (found * (batch.targets != IGNORE)).sum(1)


def dpo(log_ratios: Tensor, calibration: Tensor) -> Tensor:
    """Mean over pairs of −log σ(β (d_chosen − d_rejected)); log-ratios [G, 2]."""
    return -logsigmoid(BETA * (log_ratios[:, 0] - log_ratios[:, 1])).mean()


def calibrated_plackett_luce(log_ratios: Tensor, calibration: Tensor) -> Tensor:
    """λ log mean exp(h ℓ / λ) of the Plackett-Luce loss of each list, best first; log-ratios [G, K]."""
    t = BETA * log_ratios
    rest = t.flip(1).logcumsumexp(1).flip(1)
    losses = (rest - t).mean(1)
    return LAM * ((calibration * losses / LAM).logsumexp(0) - torch.tensor(float(len(losses))).log())


@dataclass(frozen=True)
class PlainLoop:
    """The loop around one way to get the log-probs of responses."""

    logps: SequenceLogps

    def train(self, setting: Setting, rows: list[Row], turnstile: Turnstile) -> PreTrainedModel:
        """All steps; the trained model. The log-probs of a precomputed reference are computed before the first."""
        device = setting.torch_device
        objective = dpo if setting.pairs else calibrated_plackett_luce
        model, reference = (each.to(device) for each in (setting.policy(), setting.reference_model().eval()))
        loader: DataLoader[Row] = DataLoader(rows, setting.groups, collate_fn=Padded.collate)  # type: ignore[arg-type]

        def reference_logps(batch: Padded) -> Tensor:
            with torch.no_grad(), setting.autocast():
                return self.logps(reference, batch)

        known = None if setting.live else [reference_logps(batch.to(device)) for batch in loader]
        if known is not None:
            del reference
        optimizer = optimizer_for(model)
        model.train()
        for step, batch in enumerate(loader):
            batch = batch.to(device)
            with setting.autocast():
                ref_logps = reference_logps(batch) if known is None else known[step]
                log_ratios = self.logps(model, batch) - ref_logps
                loss = objective(log_ratios.view(-1, setting.responses), batch.calibration)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            turnstile(loss.detach())
        return model
