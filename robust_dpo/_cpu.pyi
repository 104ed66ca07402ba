def usable_isas() -> list[str]: ...
def thread_runtime() -> str: ...
def row_logprob(
    *,
    isa: str,
    tile: int,
    tile_dtype: int,
    tile_stride: int,
    rows: int,
    vocab: int,
    targets: int,
    bias: int,
    softcap: float,
    scale: float,
    logp: int,
    lse: int,
    entropy: int,
    grad: int,
    grad_dtype: int,
    grad_stride: int,
    row_scale: int,
    threads: int,
) -> None: ...

HEAD_VOCAB_BLOCK: int

class HeadInputs:
    def __init__(
        self,
        *,
        x: int,
        weight: int,
        targets: int,
        bias: int,
        rows: int,
        hidden: int,
        vocab: int,
        x_stride: int,
        weight_stride: int,
        scale: float,
        softcap: float,
        threads: int,
    ) -> None: ...

class HeadTile:
    def __init__(self, *, values: int, references: int, target_logp: int, target_derivative: int) -> None: ...

def head_forward(inputs: HeadInputs, *, bf16: bool, logp: int, lse: int, entropy: int, tile: HeadTile) -> None: ...
def head_backward(
    inputs: HeadInputs,
    *,
    bf16: bool,
    tile: HeadTile,
    lse: int,
    coefficients: int,
    grad_x: int,
    grad_x_stride: int,
    grad_weight: int,
    grad_weight_stride: int,
    grad_bias: int,
    overwrites_weight: bool,
) -> None: ...
def group_losses() -> list[tuple[str, list[str]]]: ...
def group_epilogue(
    *,
    loss: int,
    first: float,
    second: float,
    token_logps: int,
    ref_token_logps: int,
    counted: int,
    seq_offsets: int,
    group_offsets: int,
    lengths: int,
    scores: int,
    calibration: int,
    logps: int,
    ref_logps: int,
    losses: int,
    derivative: int,
    coefficients: int,
    state: int,
    live: bool,
    tilted: bool,
    first_group: int,
    last_group: int,
    temperature: float,
    headroom: float,
    threads: int,
) -> None: ...
def calibration_weights(
    *,
    probs: int,
    prob_dtype: int,
    betas: int,
    gammas: int,
    weights: int,
    responses: int,
    classifiers: int,
    slots: int,
    period: int,
    paper: bool,
    offset: float,
    clip: float,
    threads: int,
) -> None: ...

class _Formulas:
    """csrc/formulas.h and csrc/group_losses.h in one precision."""

    def negative_log_sigmoid(self, u: float) -> tuple[float, float]: ...
    def capped(self, z: float, softcap: float) -> tuple[float, float]: ...
    def softmax_minus_one(self, logp: float) -> float: ...
    def merged(self, parts: list[list[float]], logit: float) -> list[float]: ...
    def tilted_score(self, loss: float, calibration: float, temperature: float) -> float: ...
    def advanced(self, shift: float, total: float, highest: float, headroom: float) -> list[float]: ...
    def group_loss(
        self,
        loss: int,
        first: float,
        second: float,
        logps: list[float],
        ref_logps: list[float],
        lengths: list[float],
        quality: list[float],
    ) -> tuple[float, list[float]]: ...

class formulas:
    float64: _Formulas
    float32: _Formulas
