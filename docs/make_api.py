"""Write docs/api.md from the docstrings of the public names: python docs/make_api.py [--check]."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from pathlib import Path

PAGE = Path(__file__).with_name("api.md")
SECTIONS = {
    "Losses from any training loop": (
        "robust_dpo",
        ["linear_preference_loss", "sequence_logps", "sequence_logps_from_logits", "preference_loss"],
    ),
    "What they give back": ("robust_dpo", ["PreferenceOutput", "SequenceLogps"]),
    "Losses": ("robust_dpo.losses", ["Groups", "register_loss", "available_losses", "resolve", "BoundLoss"]),
    "Robust aggregations": (
        "robust_dpo.robust",
        [
            "KLRobust",
            "DrDPO",
            "Mean",
            "GroupDRO",
            "RobustObjective",
            "ExponentialTilt",
            "Solution",
            "from_mode",
            "register_objective",
        ],
    ),
    "Calibration": (
        "robust_dpo.calibration",
        ["density_ratio", "calibrate_dataset", "CalibrationResult", "CalibrationReport", "group_calibration"],
    ),
    "The authors' published losses": ("robust_dpo.official", ["loss"]),
    "Data": (
        "robust_dpo.data",
        ["load_preferences", "save_preferences", "split_by_prompt", "tokenize_groups", "PreferenceCollator"],
    ),
    "Trainer": ("robust_dpo.trainer", ["RobustDPOTrainer", "RobustDPOConfig"]),
    "Packed rows": (
        "robust_dpo.layout",
        ["pack_groups", "Group", "PackedGroups", "plan_layout", "LayoutPlan", "AttentionBackend", "register_backend"],
    ),
    "Backends": ("robust_dpo", ["backends"]),
    "A backend of your own": ("robust_dpo.dispatch", ["register_backend", "Backend", "BackendStatus"]),
}


class Bare:
    """What prints as it was written: an annotation, or a default."""

    def __init__(self, value: object) -> None:
        self.text = value if isinstance(value, str) else getattr(value, "__name__", str(value))

    def __repr__(self) -> str:
        return str(self.text)


def stable(default: object) -> object:
    """A default that prints the same in every run; the order of a set is another in each."""
    return Bare(f"{{{', '.join(sorted(map(str, default)))}}}") if isinstance(default, frozenset) else default


def signature(value: object) -> str:
    """The call, one argument per line where it is long."""
    try:
        shown = inspect.signature(value)  # type: ignore[arg-type]  # checked by the except
    except (TypeError, ValueError):
        return ""
    # Annotations are strings under `from __future__ import annotations`; shown without their quotes.
    parameters = [
        str(p.replace(annotation=Bare(p.annotation), default=stable(p.default))) for p in shown.parameters.values()
    ]
    keyword_only = [i for i, p in enumerate(shown.parameters.values()) if p.kind is p.KEYWORD_ONLY]
    if keyword_only:
        parameters.insert(keyword_only[0], "*")
    returns = "" if shown.return_annotation is shown.empty else f" -> {Bare(shown.return_annotation)!r}"
    line = f"({', '.join(parameters)}){returns}"
    return line if len(line) <= 100 else "(\n" + "".join(f"    {p},\n" for p in parameters) + f"){returns}"


def entry(module: str, name: str) -> str:
    """One public name: its call and its docstring."""
    home = importlib.import_module("robust_dpo.groups" if name == "Groups" else module)
    value = getattr(home, name)
    big = name == "RobustDPOConfig"  # a hundred fields of transformers; its docstring lists its own
    call = "(...)" if big else signature(value)
    return f"### `{name}`\n\n```python\n{module}.{name}{call}\n```\n\n```text\n{inspect.getdoc(value)}\n```\n"


def page() -> str:
    """The whole page."""
    parts = ["# API\n\nWritten by `docs/make_api.py` from the docstrings.\n"]
    for title, (module, names) in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts.extend(entry(module, name) for name in names)
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where the page is out of date, write nothing")
    if parser.parse_args().check:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == page() else "docs/api.md: out of date, run docs/make_api.py")
    PAGE.write_text(page(), encoding="utf-8")
