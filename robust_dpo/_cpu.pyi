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
