"""SASS as ``nvdisasm -c`` prints it: kernels, their instructions, and where each instruction can go next."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
SECTION = re.compile(r"//-+ \.(\S+?)\s+-+$")
LABEL = re.compile(r"(\S+):$")
TARGET = re.compile(r"`\((\S+?)\)")
INDIRECT = re.compile(r'BRANCH_TARGETS ([^"]+)"')
BARRIER = re.compile(r"\bB\d+\b")
NEVER_RETURNS = ("EXIT", "RET", "KILL", "BPT")


@dataclass(frozen=True)
class Instruction:
    predicate: str  # P0, !P0, UP1; empty where it always executes
    opcode: str
    operands: str

    @property
    def root(self) -> str:
        return self.opcode.split(".")[0]

    def __str__(self) -> str:
        return f"{'@' if self.predicate else ''}{self.predicate} {self.opcode} {self.operands}".strip()


@dataclass(frozen=True)
class Kernel:
    """A kernel's code, the functions that it calls behind it, and the labels that stand before instructions."""

    name: str
    code: tuple[Instruction, ...]
    labels: dict[str, int]

    @cached_property
    def _reconvergences(self) -> dict[str, list[tuple[int, int]]]:
        """For each barrier register, the places that set it up and where they lead, in order."""
        found: dict[str, list[tuple[int, int]]] = {}
        for at, instruction in enumerate(self.code):
            if instruction.root == "BSSY":
                barrier = BARRIER.search(instruction.operands)
                assert barrier is not None, instruction
                found.setdefault(barrier[0], []).append((at, self.labels[TARGET.findall(instruction.operands)[0]]))
        return found

    def _after_barrier(self, at: int) -> int:
        """Where BSYNC leads: mostly to the next instruction, else to where the BSSY before it says."""
        barrier = BARRIER.search(self.code[at].operands)
        known = self._reconvergences.get(barrier[0], []) if barrier else []
        if not known or any(target == at + 1 for _, target in known):
            return at + 1
        return known[max(bisect_right(known, (at, 0)) - 1, 0)][1]

    def successors(self, at: int) -> list[int]:
        """The instructions that may follow; a call is stepped over."""
        instruction = self.code[at]
        root, following = instruction.root, [at + 1] if at + 1 < len(self.code) else []
        if root in NEVER_RETURNS:
            return following if instruction.predicate else []
        if root in ("BRX", "JMX", "BRXU"):
            listed = INDIRECT.search(instruction.operands)
            if listed is None:
                raise ValueError(f"{self.name}: nvdisasm does not tell where `{instruction}` leads")
            targets = [self.labels[label.strip()] for label in listed[1].split(",")]
        elif root in ("BRA", "JMP"):
            targets = [self.labels[label] for label in TARGET.findall(instruction.operands)]
            # `BRA UP0, ...` and `BRA.DIV UR4, ...` carry their condition among the operands
            if not instruction.operands.startswith("`") and not instruction.predicate:
                return sorted({*targets, *following})
        elif root == "BSYNC":
            return [self._after_barrier(at)]
        else:
            return following
        return sorted({*targets, *(following if instruction.predicate else [])})

    def callee(self, at: int) -> int | None:
        """The first instruction of what is called here."""
        instruction = self.code[at]
        names = TARGET.findall(instruction.operands) if instruction.root == "CALL" else []
        return self.labels.get(names[0]) if names else None


def kernels(listing: str) -> Iterator[Kernel]:
    """The kernels of a listing; sections of other kinds are left out."""
    name, code, labels = "", list[Instruction](), dict[str, int]()
    for line in [*listing.splitlines(), "//--- .end ---"]:
        if section := SECTION.match(line):
            if name and code:
                yield Kernel(name, tuple(code), labels)
            name = section[1].removeprefix("text.") if section[1].startswith("text.") else ""
            code, labels = [], {}
        elif not name:
            continue
        elif instruction := INSTRUCTION.match(line):
            code.append(Instruction(instruction[2] or "", instruction[3], instruction[4]))
        elif label := LABEL.match(line):
            labels[label[1]] = len(code)
