"""Global memory accesses in the assembly of a GPU kernel: how wide they are, and which are repeated in a loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Access(NamedTuple):
    """One load or store instruction.

    Args:
        kind: "load" or "store".
        width: bytes that one thread moves.
        in_loop: whether it lies in a loop that holds no other loop.
    """

    kind: str
    width: int
    in_loop: bool


class Jump(NamedTuple):
    """Where a statement sends control: to labels, and to the next statement where it `falls_through`."""

    labels: tuple[str, ...]
    falls_through: bool


@dataclass(frozen=True)
class Dialect:
    """How to read one assembly language.

    Args:
        comment: what begins a comment.
        separator: what ends a statement, beside the end of the line.
        access: (kind, width) of a statement that touches global memory, else None.
        jump: where a statement sends control, None where simply on.
    """

    comment: str
    separator: str
    access: Callable[[str], tuple[str, int] | None]
    jump: Callable[[str], Jump | None]


@dataclass
class _Block:
    """Statements that run one after the other, and the blocks that may come next."""

    statements: list[str]
    labels: list[str]
    falls_through: bool = True


# "name:" but not the first half of "ld.global.L1::evict_last"
_LABEL = re.compile(r"([.$\w]+):(?!:)")
_PTX_TARGET = re.compile(r"\$L[\w$]+")
_PTX_OPCODE = re.compile(r"(?:@!?%\w+\s+)?([.\w:]+)")
_PTX_TYPE = re.compile(r"bf16|[bfsu](?:8|16|32|64|128)")
_AMD_ACCESS = re.compile(r"(?:global|buffer|flat)_(load|store)_(?:lds_)?(?:(dword)(?:x(\d))?|[us]?(short|byte))")


def global_accesses(assembly: str, dialect: Dialect) -> list[Access]:
    """Every load from and store to global memory, in the order of the text.

    Asynchronous copies to shared memory count as loads; atomics do not count.

    Raises:
        ValueError: control flow that cannot be followed (jumps to computed addresses).
    """
    blocks = _blocks(assembly, dialect)
    return [
        Access(*found, in_loop)
        for block, in_loop in zip(blocks, _in_loops(blocks, dialect), strict=True)
        for statement in block.statements
        if (found := dialect.access(statement)) is not None
    ]


def _blocks(assembly: str, dialect: Dialect) -> list[_Block]:
    """Basic blocks: a label begins one, a jump ends one."""
    blocks = [_Block([], [])]
    for line in assembly.splitlines():
        text = line.split(dialect.comment, 1)[0].strip()
        if label := _LABEL.match(text):
            blocks.append(_Block([], [label[1]]))
            text = text[label.end() :].strip()
        for piece in text.split(dialect.separator):
            if statement := piece.strip():
                blocks[-1].statements.append(statement)
                if (jump := dialect.jump(statement)) is not None:
                    blocks[-1].falls_through = jump.falls_through
                    blocks.append(_Block([], []))
    return blocks


def _in_loops(blocks: Sequence[_Block], dialect: Dialect) -> list[bool]:
    """Of each block, whether it lies in a loop that holds no other loop."""
    index_of = {label: index for index, block in enumerate(blocks) for label in block.labels}
    successors: list[list[int]] = []
    for index, block in enumerate(blocks):
        following = [index + 1] if block.falls_through and index + 1 < len(blocks) else []
        for statement in block.statements:
            if (jump := dialect.jump(statement)) is not None:
                following += [index_of[label] for label in jump.labels]
        successors.append(following)
    loops = _natural_loops(successors)
    innermost = set().union(*(loop for loop in loops if not any(other < loop for other in loops)))
    return [index in innermost for index in range(len(blocks))]


def _natural_loops(successors: Sequence[Sequence[int]]) -> list[set[int]]:
    """Of every edge back to a node that each way to its source goes through: what lies between the two."""
    live, pending = {0}, [0]
    while pending:
        found = set(successors[pending.pop()]) - live
        live |= found
        pending += found
    predecessors: dict[int, list[int]] = {node: [] for node in sorted(live)}
    for node in predecessors:
        for successor in successors[node]:
            predecessors[successor].append(node)
    dominators = _dominators(predecessors)
    loops = []
    for source in predecessors:
        for header in dominators[source].intersection(successors[source]):
            loop, pending = {header, source}, [source]
            while pending:
                node = pending.pop()
                if node != header:
                    pending += [each for each in predecessors[node] if each not in loop]
                    loop.update(predecessors[node])
            loops.append(loop)
    return loops


def _dominators(predecessors: Mapping[int, Sequence[int]]) -> dict[int, set[int]]:
    """Of each node, the nodes that every way to it from the first one goes through, and itself."""
    first, *others = predecessors
    dominators = {first: {first}, **{node: set(predecessors) for node in others}}
    changed = True
    while changed:
        changed = False
        for node in others:
            found = {node} | set.intersection(*(dominators[each] for each in predecessors[node]))
            changed |= found != dominators[node]
            dominators[node] = found
    return dominators


def _ptx_access(statement: str) -> tuple[str, int] | None:
    opcode = _PTX_OPCODE.match(statement)
    parts = opcode[1].split(".") if opcode else []
    if "global" not in parts or parts[0] not in ("ld", "st", "cp"):
        return None
    if parts[0] == "cp":
        if parts[1] != "async" or "bulk" in parts:
            return None
        return "load", int(statement.split(",")[2].strip(), 0)
    kind = next(part for part in reversed(parts) if _PTX_TYPE.fullmatch(part))
    count = next((int(part[1:]) for part in parts if re.fullmatch(r"v[248]", part)), 1)
    return "load" if parts[0] == "ld" else "store", count * int(re.sub(r"\D", "", kind)) // 8


def _ptx_jump(statement: str) -> Jump | None:
    opcode = _PTX_OPCODE.match(statement)
    name = opcode[1].split(".") if opcode else [""]
    conditional = statement.startswith("@")
    if name[0] == "bra":
        return Jump(tuple(_PTX_TARGET.findall(statement)), conditional)
    if name[0] == "brx":
        raise ValueError("brx jumps through a table: loops cannot be told")
    if name[0] in ("ret", "exit", "trap"):
        return Jump((), conditional)
    return None


def _amd_access(statement: str) -> tuple[str, int] | None:
    found = _AMD_ACCESS.match(statement)
    if found is None:
        return None
    kind, dword, count, narrow = found.groups()
    return kind, 4 * int(count or 1) if dword else {"short": 2, "byte": 1}[narrow]


def _amd_jump(statement: str) -> Jump | None:
    opcode, _, operand = statement.partition(" ")
    if opcode == "s_branch":
        return Jump((operand.strip(),), False)
    if opcode.startswith("s_cbranch"):
        return Jump((operand.strip(),), True)
    if opcode == "s_endpgm":
        return Jump((), False)
    if opcode == "s_setpc_b64":
        raise ValueError("s_setpc_b64 jumps to a computed address: loops cannot be told")
    return None


PTX = Dialect("//", ";", _ptx_access, _ptx_jump)
# ";" begins a comment here; no statement holds a line break
AMDGCN = Dialect(";", "\n", _amd_access, _amd_jump)
