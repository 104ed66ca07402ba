"""Checks of what the head operators are called with; none of them waits for a device."""

from __future__ import annotations

import torch
from torch import Tensor

from robust_dpo.checks import FINITE, POSITIVE, check_number
from robust_dpo.errors import argument_error, type_error
from robust_dpo.groups import GroupLayout
from robust_dpo.ops import row_selection
from robust_dpo.ops.host import fetch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def check_floating(name: str, value: object) -> Tensor:
    """A tensor of fp32, bf16, fp16 or float64."""
    if not isinstance(value, Tensor):
        raise type_error(name, "a floating tensor", value)
    if value.dtype not in FLOATING:
        raise argument_error(name, "dtype float32, bfloat16, float16 or float64", value.dtype)
    return value


def check_integers(name: str, value: object, device: torch.device | None = None) -> Tensor:
    """A tensor of int64 or int32, on `device` if that is given."""
    if not isinstance(value, Tensor):
        raise type_error(name, "an integer tensor", value)
    if value.dtype not in INTEGERS:
        raise argument_error(name, "dtype int64 or int32", value.dtype)
    if device is not None and value.device != device:
        raise argument_error(name, f"a tensor on {device}", value.device)
    return value


def check_sizes(name: str, value: object, device: torch.device) -> Tensor:
    """Integers that are read on the host: on the CPU or on `device`."""
    sizes = check_integers(name, value)
    if sizes.device != device and sizes.device.type != "cpu":
        raise argument_error(name, f"a tensor on {' or '.join(dict.fromkeys(('cpu', str(device))))}", sizes.device)
    return sizes


def check_vector(name: str, value: object, sizes: tuple[int, ...], what: str, device: torch.device) -> Tensor:
    """A floating vector whose length is one of `sizes`; `what` says in the message what the sizes are."""
    tensor = check_floating(name, value)
    if tensor.ndim != 1 or tensor.shape[0] not in sizes:
        raise argument_error(name, f"shape {' or '.join(f'[{size}]' for size in sizes)}, {what}", list(tensor.shape))
    if tensor.device != device:
        raise argument_error(name, f"a tensor on {device}", tensor.device)
    return tensor


def check_head(prefix: str, hidden: object, weight: object, bias: object) -> tuple[Tensor, Tensor]:
    """Hidden states [B, T, H] or [N, H], weight [V, H] and bias [V] of one head, alike in dtype and device."""
    states = check_floating(f"{prefix}hidden", hidden)
    matrix = check_floating(f"{prefix}weight", weight)
    if states.ndim not in (2, 3):
        raise argument_error(f"{prefix}hidden", "shape [B, T, H] or [N, H]", list(states.shape))
    if matrix.ndim != 2 or matrix.shape[1] != states.shape[-1] or matrix.shape[0] == 0:
        raise argument_error(f"{prefix}weight", f"shape [V, {states.shape[-1]}]", list(matrix.shape))
    if matrix.device != states.device:
        raise argument_error(f"{prefix}weight", f"a tensor on {states.device}, as hidden", matrix.device)
    if bias is not None:
        check_vector(f"{prefix}bias", bias, (matrix.shape[0],), "one value per token", states.device)
    return states, matrix


def check_targets(targets: object, leading: torch.Size, seq_lens: object, device: torch.device, owner: str) -> int:
    """Targets shaped like the leading dimensions of `owner`; returns the number of responses S.

    [B, T] has a response in every row; [N] needs `seq_lens` [S].
    """
    tokens = check_integers("targets", targets, device)
    if tokens.shape != leading:
        forms = "" if tokens.ndim == len(leading) else " ([B, T] padded, or [N] packed)"
        expected = f"shape {list(leading)}, the leading dimensions of {owner}{forms}"
        raise argument_error("targets", expected, list(tokens.shape))
    if len(leading) == 2:
        if seq_lens is not None:
            raise argument_error("seq_lens", f"None beside {owner} with a row for every response", "a tensor")
        return leading[0]
    if seq_lens is None:
        raise argument_error("seq_lens", f"the lengths [S] of the responses packed in {owner}", None)
    lens = check_sizes("seq_lens", seq_lens, device)
    if lens.ndim != 1:
        raise argument_error("seq_lens", "shape [S]", list(lens.shape))
    if lens.device.type == "cpu" and not torch.compiler.is_compiling():
        # Said here where it costs nothing: a missing length would otherwise be taken for a group that is not whole.
        (lengths,) = fetch(lens)
        row_selection.check_lengths(min(lengths, default=0), sum(lengths), leading[0])
    return lens.shape[0]


def check_logit_transform(softcap: object, logit_scale: object) -> tuple[float | None, float]:
    """A softcap > 0 or None, and a finite factor."""
    cap = None if softcap is None else check_number("softcap", softcap, POSITIVE)
    return cap, check_number("logit_scale", logit_scale, FINITE)


def check_tile_dtype(tile_dtype: object, dtype: torch.dtype) -> torch.dtype | None:
    """None, or a dtype that is the inputs' own or, for half precision, float32."""
    if tile_dtype is None:
        return None
    if not isinstance(tile_dtype, torch.dtype):
        raise type_error("tile_dtype", "a torch.dtype such as torch.float32, or None", tile_dtype)
    allowed = (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)
    if tile_dtype not in allowed:
        expected = f"None or {' or '.join(map(str, allowed))} for inputs of {dtype}"
        raise argument_error("tile_dtype", expected, tile_dtype)
    return tile_dtype


def check_lengths(lengths: object, responses: int, device: torch.device) -> Tensor:
    """Tokens of each response, integers or floats."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in (*INTEGERS, *FLOATING):
        raise type_error("lengths", "a tensor of integers or floats", lengths)
    if lengths.shape != (responses,):
        raise argument_error("lengths", f"shape [{responses}], one value per response", list(lengths.shape))
    if lengths.device != device:
        raise argument_error("lengths", f"a tensor on {device}", lengths.device)
    return lengths


def count_groups(responses: int, group_size: object, group_sizes: object, device: torch.device) -> int:
    """G ≥ 1, from `group_size` (groups of equal size) or `group_sizes` [G].

    Raises:
        TypeError, ValueError: what says how responses form groups is no such thing, the size does not divide their
            number, or there are none.
    """
    if group_sizes is not None:
        sizes = check_sizes("group_sizes", group_sizes, device)
        if sizes.ndim != 1 or sizes.shape[0] == 0:
            raise argument_error("group_sizes", "shape [G] with at least one group", list(sizes.shape))
        return sizes.shape[0]
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise type_error("group_size", "a whole number", group_size)
    if group_size < 1 or responses % group_size:
        raise argument_error("group_size", f"a divisor of the {responses} responses", group_size)
    if responses == 0:
        raise argument_error("group_size", "at least one group", "no responses")
    return responses // group_size


def check_group_vectors(
    responses: int,
    groups: int,
    device: torch.device,
    ref_logps: object,
    calibration: object,
    scores: object,
    log_normalizer: object,
) -> None:
    """Shapes, dtypes and devices of what accompanies the responses; None where it is not given."""
    for name, vector in (("ref_logps", ref_logps), ("scores", scores)):
        if vector is not None:
            check_vector(name, vector, (responses,), "one value per response", device)
    if calibration is not None:
        check_vector("calibration", calibration, (groups, responses), "per group or per response", device)
    if log_normalizer is not None and check_floating("log_normalizer", log_normalizer).ndim:
        raise argument_error("log_normalizer", "a scalar tensor", "a tensor with dimensions")


def check_values(ref_logps: Tensor | None, calibration: Tensor | None, scores: Tensor | None) -> None:
    """Contents of the same; reads them back from the device."""
    refuse_values(fetch(value_flags(ref_logps, calibration, scores))[0], ref_logps, calibration, scores)


def value_flags(ref_logps: Tensor | None, calibration: Tensor | None, scores: Tensor | None) -> Tensor | None:
    """[m] int64 on the device, 1 for each of those given that has a value it must not have; None without any."""
    given = _given(ref_logps, calibration, scores)
    if not given:
        return None
    valid = [valid_calibration(each) if name == "calibration" else each.isfinite() for name, each in given]
    return torch.stack([~each.all() for each in valid]).long()


def refuse_values(
    flags: list[int], ref_logps: Tensor | None, calibration: Tensor | None, scores: Tensor | None
) -> None:
    """Raise for the first of `value_flags` that is set."""
    for flag, (name, vector) in zip(flags, _given(ref_logps, calibration, scores), strict=True):
        if flag:
            expected = "finite values of at least 0" if name == "calibration" else "finite values"
            raise argument_error(name, expected, vector.tolist())


def _given(ref_logps: Tensor | None, calibration: Tensor | None, scores: Tensor | None) -> list[tuple[str, Tensor]]:
    named = {"calibration": calibration, "ref_logps": ref_logps, "scores": scores}
    return [(name, each) for name, each in named.items() if each is not None]


def valid_calibration(calibration: Tensor) -> Tensor:
    """Where h is what it may be, finite and at least 0."""
    return calibration.isfinite() & (calibration >= 0)


def group_calibration(calibration: Tensor | None, layout: GroupLayout, dtype: torch.dtype) -> Tensor | None:
    """[G] h of each group; a calibration per response is averaged."""
    if calibration is None:
        return None
    values = calibration.to(dtype)
    return values if len(values) == layout.num_groups else layout.group_mean(values)
