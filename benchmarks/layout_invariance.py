"""How much do the trained weights depend on how a step is cut into micro-batches and ranks? Ours, and TRL's DPOTrainer.

    python benchmarks/layout_invariance.py --out benchmarks/results --docs docs/exactness.md

Everybody takes five steps (SGD, clipped) of 64 groups, the same 64 in every layout, on the CPU. The table has the
largest difference of a weight from the run with one micro-batch on one rank, as a share of the largest distance that
any weight of that run has moved. What is exact is at the rounding of the dtype, which TRL's `sigmoid` shows: a plain
mean over groups of equal weight. Writes layout_invariance.json and .md to --out.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel, PrinterCallback, Trainer

from robust_dpo.bench.tables import replace_between
from robust_dpo.bench.train_step.data import Row, make_workload, padding_tokenizer
from robust_dpo.bench.train_step.setting import BETA, MODELS, Setting
from robust_dpo.trainer import RobustDPOConfig, RobustDPOTrainer

GROUPS, STEPS = 64, 5
# Ranks, and groups of a micro-batch on each; the first is what the others are compared with.
# Of every five groups three are of the first.
DOMAINS = ("human", "synthetic")
# What a mixture of experts has in common with the dense model.
SHARED_SHAPE = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "pad_token_id", "eos_token_id"),
}
LAYOUTS = ((1, 64), (1, 16), (1, 4), (2, 8), (4, 4))


@dataclass(frozen=True)
class Contestant:
    """A trainer and its objective.

    Args:
        package: "ours" or "trl".
        options: fields of its configuration.
        responses: of each group; None: two, three and four in turn.
        lora: train an adapter on the attention.
        experts: train a mixture of experts.
    """

    package: str
    options: Mapping[str, Any] = field(default_factory=dict)
    responses: int | None = 2
    lora: bool = False
    experts: bool = False


DORA = {"mode": "dora", "lam": 0.02}
CONTESTANTS = {
    "ours: DoRA, pairs": Contestant("ours", DORA),
    "ours: DoRA, pairs, LoRA": Contestant("ours", DORA, lora=True),
    "ours: DoRA, K = 2, 3, 4": Contestant("ours", {**DORA, "loss_type": "plackett_luce"}, responses=None),
    "ours: DoRA, two passes": Contestant("ours", {**DORA, "robust_route": "two_pass"}),
    "ours: KL ball": Contestant("ours", {"mode": "dora", "radius": 0.2}),
    "ours: CVaR": Contestant("ours", {"mode": "erm", "robust": "cvar"}),
    "ours: group DRO": Contestant(
        "ours", {"mode": "dora", "robust": "group_dro", "robust_options": {"step_size": 1.0}}
    ),
    "ours: aot": Contestant("ours", {"mode": "erm", "loss_type": "aot"}),
    "ours: DoRA and SFT": Contestant("ours", {**DORA, "sft_weight": 0.5}),
    "ours: DoRA, experts": Contestant("ours", {**DORA, "router_aux_loss_coef": 0.1}, experts=True),
    "ours: plain DPO": Contestant("ours", {"mode": "erm"}),
    "ours: DoRA, per micro-batch": Contestant("ours", {**DORA, "robust_scope": "micro_batch"}),
    "TRL: sigmoid (control)": Contestant("trl", {"loss_type": ["sigmoid"]}),
    "TRL: aot": Contestant("trl", {"loss_type": ["aot"]}),
    "TRL: sft": Contestant("trl", {"loss_type": ["sft"]}),
}


def setting(dtype: str, responses: int | None) -> Setting:
    return Setting(
        model=MODELS["tiny"],
        dtype=dtype,
        reference="live",
        responses=responses or 4,
        groups=GROUPS,
        max_length=64,
        warmups=0,
        rounds=STEPS,
        device="cpu",
        attention="eager",
        seed=0,
    )


def arguments(chosen: Setting, ranks: int, size: int, folder: str) -> dict[str, Any]:
    """What both configurations are told."""
    return {
        "output_dir": folder,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": GROUPS // (size * ranks),
        "max_steps": STEPS,
        "optim": "sgd",
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.1,
        "beta": BETA,
        "max_length": chosen.max_length,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "ddp_backend": "gloo" if ranks > 1 else None,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def make_trainer(contestant: Contestant, chosen: Setting, rows: list[Row], common: dict[str, Any]) -> Trainer:
    model, reference = models_for(contestant, chosen)
    options = {**common, **contestant.options}
    transformers.set_seed(0)  # of the adapter
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"]) if contestant.lora else None
    if contestant.package == "ours":
        return RobustDPOTrainer(
            model,
            None if contestant.lora else reference,
            RobustDPOConfig(**options),
            train_dataset=Dataset.from_list(rows),
            processing_class=padding_tokenizer(),
            peft_config=adapter,
        )
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        """Takes rows that are token ids already."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [dict(zip(names, (row["prompt_ids"], *row["response_ids"]), strict=True)) for row in rows]
    return Tokenised(
        model,
        reference,
        args=DPOConfig(**options, gradient_checkpointing=False, disable_dropout=True, bf16=False),
        train_dataset=Dataset.from_list(pairs),
        processing_class=padding_tokenizer(),
    )


def models_for(contestant: Contestant, chosen: Setting) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Policy and reference."""
    policy, reference = chosen.policy(), chosen.reference_model()
    if not contestant.experts:
        return policy, reference
    shape = {name: value for name, value in policy.config.to_dict().items() if name in SHARED_SHAPE}
    config = MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2)
    mixtures = []
    for seed, dense in enumerate((policy, reference)):
        transformers.set_seed(seed)
        mixtures.append(AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dense.dtype))
    return mixtures[0], mixtures[1]


def rows_for(contestant: Contestant, chosen: Setting) -> list[Row]:
    rows = [{**row, "domain": DOMAINS[index % 5 // 3]} for index, row in enumerate(make_workload(chosen, None).rows)]
    if contestant.responses is None:
        rows = [{**row, "response_ids": row["response_ids"][: 2 + index % 3]} for index, row in enumerate(rows)]
    return rows


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def work(folder: Path, ranks: int, dtype: str) -> None:
    """Run every contestant in every layout of that many ranks; on each of them."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for place, (name, contestant) in enumerate(CONTESTANTS.items()):
        chosen = setting(dtype, contestant.responses)
        rows = rows_for(contestant, chosen)
        for size in (size for of_layout, size in LAYOUTS if of_layout == ranks):
            common = arguments(chosen, ranks, size, str(folder / "run"))
            trainer = make_trainer(contestant, chosen, rows, common)
            trainer.remove_callback(PrinterCallback)
            before = trained(trainer.model)
            trainer.train()
            if trainer.is_world_process_zero():
                print(f"{name}: {layout_name(ranks, size)}", file=sys.stderr, flush=True)
                save_file(before, folder / f"{place}-before.safetensors")
                save_file(trained(trainer.model), folder / f"{place}-{ranks}-{size}.safetensors")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def launch(folder: Path, ranks: int, dtype: str) -> None:
    command = [sys.executable, "-W", "ignore"]
    if ranks > 1:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        command += ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", f"--master-port={port}"]
    worker = [__file__, "--work", str(folder), "--ranks", str(ranks), "--dtype", dtype]
    subprocess.run([*command, *worker], check=True)


def largest(values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    return max(float((values[name] - others[name]).abs().max()) for name in others)


def compare(folder: Path) -> dict[str, dict[str, float]]:
    """Contestant → layout → largest difference of a weight over the largest distance moved."""
    table: dict[str, dict[str, float]] = {}
    for place, name in enumerate(CONTESTANTS):
        (ranks, size), *others = LAYOUTS
        end = load_file(folder / f"{place}-{ranks}-{size}.safetensors")
        moved = largest(end, load_file(folder / f"{place}-before.safetensors"))
        table[name] = {
            layout_name(*layout): largest(load_file(folder / f"{place}-{layout[0]}-{layout[1]}.safetensors"), end)
            / moved
            for layout in others
        }
    return table


def layout_name(ranks: int, size: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''} × {GROUPS // (ranks * size)} × {size}"


def markdown(table: dict[str, dict[str, float]], dtype: str) -> str:
    layouts = list(next(iter(table.values())))
    lines = [
        f"Largest difference of a weight after {STEPS} steps, {dtype}, as a share of the largest distance moved; from "
        f"1 rank × 1 × {GROUPS} (ranks × micro-batches × groups).",
        "",
        "| | " + " | ".join(layouts) + " |",
        "|---|" + "---:|" * len(layouts),
    ]
    lines += [f"| {name} | " + " | ".join(f"{row[each]:.1e}" for each in layouts) + " |" for name, row in table.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--docs", type=Path, help="Markdown file to put the table into, between its markers")
    parser.add_argument("--dtype", choices=("fp32", "fp64"), default="fp32", help="of the models")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work is not None:
        work(options.work, options.ranks, options.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        for ranks in dict.fromkeys(ranks for ranks, _ in LAYOUTS):
            launch(Path(folder), ranks, options.dtype)
        table = compare(Path(folder))
    text = markdown(table, options.dtype)
    print(text)
    if options.docs is not None:
        replace_between(options.docs, "layouts", text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "layout_invariance.md").write_text(text)
        versions = {module.__name__: module.__version__ for module in (torch, transformers)}
        record = {"table": table, "dtype": options.dtype, "versions": versions}
        (options.out / "layout_invariance.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
