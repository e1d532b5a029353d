# SPDX-License-Identifier: Apache-2.0
"""PTX as text, taken apart into kernels: parameters, registers, instructions with operands, targets."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

# As in machine/program.h.
NONE, SINK, REGISTER, SPECIAL, IMMEDIATE, VECTOR, ADDRESS = range(7)
SPECIALS = [
    f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"
] + ["%laneid", "%warpid"]  # fmt: skip

Operand = tuple[int, bool, int, int, tuple["Operand", ...]]
WIDTHS = {"pred": 1, "b8": 8, "u8": 8, "s8": 8, "b16": 16, "u16": 16, "s16": 16, "f16": 16}
WIDTHS |= {f"{kind}{bits}": bits for kind in "busf" for bits in (32, 64)}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.\w+[^{;]*?)*)\{", re.DOTALL)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(r"^\.(?:reg|shared)\b")
_GLOBAL = re.compile(r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)\s*(?:\[(\d*)\])?\s*;")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)$", re.DOTALL)


class SyntaxProblem(ValueError):
    """PTX that this reader does not know."""


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    offset: int
    size: int


@dataclass
class Instruction:
    mnemonic: str
    text: str
    line: int
    predicate: int = -1
    unless: bool = False
    operands: tuple[Operand, ...] = ()
    targets: list[int] = field(default_factory=list)


@dataclass
class Kernel:
    """One entry function. `widths` are the registers' bits, `shared` bytes of static shared memory."""

    name: str
    parameters: list[Parameter]
    widths: list[int]
    instructions: list[Instruction]
    labels: dict[str, int]
    shared: int
    threads: int

    @property
    def parameter_bytes(self) -> int:
        return max((p.offset + p.size for p in self.parameters), default=0)


def kernels(text: str) -> list[Kernel]:
    """Every entry function of a PTX module, in order."""
    # Comments keep their line breaks, so that line numbers stay those of the text.
    text = _COMMENT.sub(lambda m: "\n" * m.group().count("\n"), text)
    module_shared = _module_shared(text)
    return [_Reader(text, match, module_shared).kernel() for match in _ENTRY.finditer(text)]


def kernel(text: str, name: str | None = None) -> Kernel:
    """The entry function called `name`, or the only one."""
    found = [k for k in kernels(text) if name is None or k.name == name]
    if len(found) != 1:
        raise SyntaxProblem(f"expected one kernel {name or ''}, found {len(found)}")
    return found[0]


def _module_shared(text: str) -> dict[str, int]:
    """Shared variables outside of functions: dynamic ones begin at 0, where nothing static precedes them."""
    depth, places = 0, {}
    for line in text.split("\n"):
        if depth == 0 and (match := _GLOBAL.search(line)):
            if match.group(4):
                raise SyntaxProblem(f"static shared memory outside of a kernel: {line.strip()}")
            places[match.group(3)] = 0
        depth += line.count("{") - line.count("}")
    return places


class _Reader:
    """Reads the body of one entry. Names declared inside braces are known inside these only."""

    def __init__(self, text: str, match: re.Match[str], shared: dict[str, int]) -> None:
        self.name = match.group(1)
        self.parameters = _parameters(match.group(2))
        threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", match.group(3) or "")
        self.threads = int(threads.group(1)) if threads else 0
        self.body, self.line = text[match.end() :], text.count("\n", 0, match.end()) + 1
        self.dynamic, self.shared, self.static = shared, dict[str, int](), 0
        self.scopes: list[dict[str, object]] = [{}]
        self.registers: dict[str, int] = {}
        self.ranges: list[tuple[str, int, int]] = []
        self.widths: list[int] = []
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.waiting: list[tuple[Instruction, list[str], tuple[int, ...]]] = []
        self.tables: dict[str, list[str]] = {}
        self.blocks = 0
        self.path: tuple[int, ...] = ()

    def kernel(self) -> Kernel:
        self._read()
        for instruction, names, path in self.waiting:
            instruction.targets = [self._label(name, path) for name in names]
        return Kernel(
            self.name, self.parameters, self.widths, self.instructions, self.labels, self.static, self.threads
        )

    def _label(self, name: str, path: tuple[int, ...]) -> int:
        for depth in range(len(path), -1, -1):
            if (key := f"{name}@{path[:depth]}") in self.labels:
                return self.labels[key]
        raise SyntaxProblem(f"{self.name}: no label {name}")

    def _read(self) -> None:
        position, line = 0, self.line
        body = self.body
        while position < len(body):
            character = body[position]
            if character == "\n":
                line += 1
                position += 1
            elif character.isspace() or character == ";":
                position += 1
            elif character == "{":
                self.blocks += 1
                self.path += (self.blocks,)
                self.scopes.append({})
                position += 1
            elif character == "}":
                if not self.path:
                    return
                self.path = self.path[:-1]
                self.scopes.pop()
                position += 1
            elif match := re.compile(r"([$\w]+):(?!:)").match(body, position):
                self.labels[f"{match.group(1)}@{self.path}"] = len(self.instructions)
                position = match.end()
            elif match := re.compile(r"\.(?:loc|file|pragma)\b[^\n]*").match(body, position):
                position = match.end()
            else:
                stop = self._end(position)
                statement = body[position:stop]
                self._statement(" ".join(statement.split()), line)
                line += statement.count("\n")
                position = stop + 1
        raise SyntaxProblem(f"{self.name}: no end")

    def _end(self, position: int) -> int:
        stop = self.body.find(";", position)
        if stop < 0:
            raise SyntaxProblem(f"{self.name}: no ; after {self.body[position : position + 40]!r}")
        return stop

    def _statement(self, statement: str, line: int) -> None:
        if statement.startswith(".reg"):
            self._declare(statement)
            return
        if statement.startswith(".shared"):
            match = _GLOBAL.search(statement + ";")
            if not match or not match.group(4):
                raise SyntaxProblem(statement)
            align, size = int(match.group(1) or 1), int(match.group(4)) * WIDTHS[match.group(2)] // 8
            self.static = -(-self.static // align) * align
            self.shared[match.group(3)] = self.static
            self.static += size
            return
        if statement.startswith(".branchtargets"):
            name = next(key for key, at in reversed(self.labels.items()) if at == len(self.instructions))
            self.tables[name.partition("@")[0]] = re.findall(r"[$\w]+", statement[len(".branchtargets") :])
            return
        if statement.startswith("."):
            raise SyntaxProblem(f"{self.name}: {statement}")
        self._instruction(statement, line)

    def _declare(self, statement: str) -> None:
        match = _REGISTERS.match(statement)
        if not match or match.group(1) not in WIDTHS:
            raise SyntaxProblem(statement)
        width = WIDTHS[match.group(1)]
        for name in (part.strip() for part in match.group(2).split(",")):
            if numbered := re.fullmatch(r"(%?[\w$]+)<(\d+)>", name):
                for n in range(int(numbered.group(2))):
                    self.scopes[-1][f"{numbered.group(1)}{n}"] = len(self.widths)
                    self.widths.append(width)
            else:
                self.scopes[-1][name] = len(self.widths)
                self.widths.append(width)

    def _register(self, name: str) -> int | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]  # type: ignore[return-value]
        return None

    def _instruction(self, statement: str, line: int) -> None:
        instruction = Instruction("", statement, line)
        if guard := re.match(r"@(!?)(%?[\w$]+)\s+(.*)$", statement):
            found = self._register(guard.group(2))
            if found is None:
                raise SyntaxProblem(f"{self.name}: no register {guard.group(2)}")
            instruction.predicate, instruction.unless = found, guard.group(1) == "!"
            statement = guard.group(3)
        match = re.match(r"([\w.:]+)\s*(.*)$", statement)
        if not match:
            raise SyntaxProblem(f"{self.name}: {statement}")
        instruction.mnemonic, rest = match.groups()
        pieces = _pieces(rest)
        operation = instruction.mnemonic.split(".")[0]
        if operation == "bra":
            self.waiting.append((instruction, pieces, self.path))
        elif operation == "brx":
            instruction.operands = (self._operand(pieces[0]),)
            self.waiting.append((instruction, self.tables[pieces[1]], self.path))
        else:
            instruction.operands = tuple(map(self._operand, pieces))
        self.instructions.append(instruction)

    def _operand(self, text: str) -> Operand:
        if text == "_":
            return SINK, False, -1, 0, ()
        if text.startswith("{"):
            return VECTOR, False, -1, 0, tuple(map(self._operand, _pieces(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1])
        if "|" in text:
            return VECTOR, False, -1, 0, tuple(self._operand(part.strip()) for part in text.split("|"))
        negated = text.startswith("!")
        name = text.lstrip("!").strip()
        register = self._register(name)
        if register is not None:
            return REGISTER, negated, register, 0, ()
        if name in SPECIALS:
            return SPECIAL, False, SPECIALS.index(name), 0, ()
        if name == "WARP_SZ":
            return IMMEDIATE, False, -1, 32, ()
        return IMMEDIATE, negated, -1, self._value(name), ()

    def _value(self, text: str) -> int:
        if text in self.dynamic and self.static:
            raise SyntaxProblem(f"{self.name}: {text} behind static shared memory")
        if text in self.dynamic or text in self.shared:
            return {**self.dynamic, **self.shared}[text]
        for parameter in self.parameters:
            if parameter.name == text:
                return parameter.offset
        if match := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            return int(match.group(1), 16)
        if match := re.fullmatch(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?", text):
            number = int(match.group(2), 8 if re.fullmatch(r"0[0-7]+", match.group(2)) else 0)
            return (-number if match.group(1) else number) & (1 << 64) - 1
        raise SyntaxProblem(f"{self.name}: operand {text!r}")

    def _address(self, text: str) -> Operand:
        pieces = _pieces(text)
        coordinates = self._operand(pieces[1])[4] if len(pieces) > 1 else ()
        match = re.fullmatch(r"\s*([%\w$]+)\s*(?:([+-])\s*(-?\w+)\s*)?", pieces[0])
        if not match:
            raise SyntaxProblem(f"{self.name}: address {text!r}")
        base, sign, offset = match.groups()
        value = self._value(offset) if offset else 0
        value = -value if sign == "-" else value
        register = self._register(base)
        if register is None:
            value, register = value + self._value(base), -1
        return ADDRESS, False, register, value & (1 << 64) - 1, coordinates


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for align, kind, name, count in _PARAMETER.findall(text):
        unit = WIDTHS[kind] // 8
        size, alignment = unit * int(count or 1), int(align or unit)
        offset = -(-offset // alignment) * alignment
        parameters.append(Parameter(name, kind, offset, size))
        offset += size
    return parameters


def _pieces(text: str) -> list[str]:
    """What commas separate outside of brackets."""
    pieces, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            pieces.append(current.strip())
            current = ""
        else:
            current += character
    return pieces + ([current.strip()] if current.strip() else [])
