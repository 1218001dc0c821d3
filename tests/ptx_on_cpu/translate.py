"""From PTX to programs that machine.h runs: what a compiler emitted for a GPU, on a CPU.

An instruction becomes a C++ function of a warp and of operands: numbers of registers, of constants, or other words. The
same function serves wherever the same is done to other operands, so few are compiled; a kernel is a list of them, cut
into basic blocks. In a function, what each lane does is a loop over the lanes that are there; instructions of a warp
(mma, shfl, ...) stand beside such loops. What is not known here raises, with the instruction.
"""

from __future__ import annotations

import re
import struct
from array import array
from dataclasses import dataclass
from typing import NamedTuple

C_TYPES = {"pred": "bool", "f16": "F16", "bf16": "BF16", "f32": "float", "f64": "double", "tf32": "TF32"}
REGISTERS = {"pred": "uint8_t", "b16": "uint16_t", "b32": "uint32_t", "b64": "uint64_t"}
C_TYPES |= {"f16x2": "Pair<F16>", "bf16x2": "Pair<BF16>"}
SIZES = {"pred": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "tf32": 4, "f16x2": 4, "bf16x2": 4}
for bits in (8, 16, 32, 64):
    for kind, name in (("b", "uint"), ("u", "uint"), ("s", "int")):
        C_TYPES[f"{kind}{bits}"], SIZES[f"{kind}{bits}"] = f"{name}{bits}_t", bits // 8
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
SPECIAL = {
    **{f"%tid.{d}": f"t.id.{d}" for d in "xyz"},
    **{f"%ntid.{d}": f"block.size.{d}" for d in "xyz"},
    **{f"%ctaid.{d}": f"block.id.{d}" for d in "xyz"},
    **{f"%nctaid.{d}": f"block.grid.{d}" for d in "xyz"},
    "%cluster_ctarank": "block.rank",
    "%laneid": "t.lane",
    "%warpid": "w.index",
    "%lanemask_lt": "((1u << t.lane) - 1)",
}
# Modifiers that change nothing here: caches, scopes, order (one thread runs at a time), subnormals, approximations.
HARMLESS = {"ftz", "approx", "full", "rn", "noftz", "sync", "aligned", "uni", "cta", "gpu", "sys", "cluster", "weak"}
HARMLESS |= {"relaxed", "acquire", "release", "acq_rel", "sc", "volatile", "nc", "ca", "cg", "cs", "lu", "cv", "wb"}
HARMLESS_LIKE = re.compile(r"L[12]::\w+|shared::\w+")
ROUND = {"rni": "nearest", "rzi": "zero", "rmi": "down", "rpi": "up"}
COMPARE = {
    "eq": "==",
    "ne": "!=",
    "lt": "<",
    "le": "<=",
    "gt": ">",
    "ge": ">=",
    "lo": "<",
    "ls": "<=",
    "hi": ">",
    "hs": ">=",
}
OPPOSITE = {"eq": "ne", "ne": "eq", "lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


SHARED_BASE = 1024  # where shared memory begins; below is what nothing may touch
FINISHED = 2**31 - 1  # in the place of a basic block


class UnknownPTX(Exception):
    """An instruction that the translator does not know."""


class Instruction(NamedTuple):
    text: str
    predicate: str  # C++ of whether a lane takes part, or ""
    name: str
    modifiers: list[str]
    operands: list[str]

    @property
    def type(self) -> str:
        return self.modifiers[-1]

    def has(self, *modifiers: str) -> bool:
        return any(m in self.modifiers for m in modifiers)

    def allow(self, *modifiers: str) -> None:
        """Raises where a modifier is not among these, not harmless and not a type."""
        known = HARMLESS | set(C_TYPES) | set(modifiers)
        for m in self.modifiers:
            if m not in known and not HARMLESS_LIKE.fullmatch(m):
                raise UnknownPTX(f".{m} in {self.text}")


def split_list(text: str) -> list[str]:
    """The parts between the commas outside of brackets."""
    parts, depth = [""], 0
    for ch in text:
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += ch
    return [p.strip() for p in parts if p.strip()]


def vector(operand: str) -> list[str]:
    return split_list(operand.strip("{} ")) if operand.startswith("{") else [operand]


def statements(body: str) -> list[str]:
    """``{`` and ``}`` of scopes, ``label:``, and statements without their semicolon."""
    found, start, i = [], 0, 0
    while i < len(body):
        begun = body[start:i].strip()
        if body[i] in "{}" and not begun:
            found.append(body[i])
            start = i + 1
        elif body[i] == "{":
            i = body.index("}", i)
        elif body[i] == ";":
            found.append(begun)
            start = i + 1
        elif body[i] == ":" and re.fullmatch(r"[%$\w]+", begun) and body[i + 1] != ":":
            found.append(begun + ":")
            start = i + 1
        i += 1
    return found


class Scope:
    """Names of registers (type, number) and labels, a dictionary an open ``{``."""

    def __init__(self):
        self.names: list[dict] = [{}]

    def find(self, name: str):
        return next((names[name] for names in reversed(self.names) if name in names), None)


class KernelTranslator:
    def __init__(self, parameters: str, body: str, symbols: dict[str, int | str]):
        self.symbols = symbols  # of the module: addresses in shared memory, and tables
        self.parameters: dict[str, tuple[int, int]] = {}  # offset, bytes
        self.registers = 0
        self.constants: dict[int | str, int] = {}  # place of each value, or of a symbol's address
        self.scope = Scope()
        self.blocks: list[list[tuple[str, list[int | str], str]]] = [[]]  # function, operands, PTX
        self._begin("")
        self._read_parameters(parameters)
        items = statements(body)
        products = " ".join(item for item in items if item.startswith("wgmma.mma_async"))
        found = dict.fromkeys(name for held in re.findall(r"\{(.*?)\}", products) for name in split_list(held))
        self.matrix = {name: i for i, name in enumerate(found)}  # registers that wgmma uses
        self._translate(items)

    # ---- structure ---------------------------------------------------------------------------------------------------

    def _read_parameters(self, text: str) -> None:
        end = 0
        for declaration in split_list(text):
            m = re.search(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+).*?([\w$]+)(?:\[(\d+)\])?$", declaration, re.DOTALL)
            align, type_, name, count = m.groups()
            size, step = SIZES[type_] * int(count or 1), int(align or SIZES[type_])
            end = -(-end // step) * step
            self.parameters[name] = end, size
            end += size

    def _translate(self, items: list[str]) -> None:
        # A label may be used before it stands there: each gets its basic block by its place among all labels.
        labels: list[dict[str, str]] = []
        open_: list[dict[str, str]] = [{}]
        labels_seen = 0
        for item in items:
            if item == "{":
                open_.append({})
                labels.append(open_[-1])
            elif item == "}":
                open_.pop()
            elif item.endswith(":"):
                labels_seen += 1
                open_[-1][item[:-1]] = f"label {labels_seen}"
        self.scope.names = [open_[0]]
        scopes = iter(labels)
        self.places: dict[str, int] = {}
        for item in items:
            if item == "{":
                self.scope.names.append(next(scopes))
            elif item == "}":
                self.scope.names.pop()
            elif item.endswith(":"):
                self._begin(item)
                if self.blocks[-1]:
                    self._end_block()
                self.places[self.scope.find(item[:-1])] = len(self.blocks) - 1
            elif item.startswith("."):
                self._declare(item)
            else:
                self._instruction(item)
        self._begin("}")
        self._end_block(FINISHED)

    def _declare(self, text: str) -> None:
        if m := re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.DOTALL):
            type_ = "pred" if m[1] == "pred" else f"b{8 * max(SIZES[m[1]], 2)}"
            for name in split_list(m[2]):
                many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
                for i in range(int(many[2])) if many else [0]:
                    self.scope.names[-1][f"{many[1]}{i}" if many else name] = type_, self.registers
                    self.registers += 1
        elif m := re.match(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]$", text):
            self.scope.names[-1][m[2]] = "local", self.registers
            self.registers += -(-int(m[3]) // 8)
        elif not text.startswith((".pragma", ".loc", ".file")):
            raise UnknownPTX(text)

    def _begin(self, text: str) -> None:
        """Of a statement: its functions share one list of operands."""
        self.text, self.operands, self.code, self.in_lanes = text, [], "", False

    def word(self, *words: int | str) -> str:
        """C++ of the first of these words among the operands: numbers, or labels."""
        self.operands += words
        return f"o[{len(self.operands) - len(words)}]"

    def constant(self, value: int | str) -> str:
        return f"w.constants[{self.word(self.constants.setdefault(value, len(self.constants)))}]"

    def lane(self, code: str) -> None:
        """Code of one lane, t."""
        self.code += code if self.in_lanes else f"EACH_LANE {{ {code}"
        self.in_lanes = True

    def _close_lanes(self) -> None:
        self.code += " }" * self.in_lanes
        self.in_lanes = False

    def warp(self, code: str, predicate: str = "") -> None:
        """Code of a warp, for the lanes in ``active``."""
        self._close_lanes()
        self.code += f"{{ ONLY_LANES({predicate}) if (active != 0) {{ {code} }} }}" if predicate else f"{{ {code} }}"

    def _end_statement(self) -> None:
        self._close_lanes()
        if self.code:
            self.blocks[-1].append((self.code, self.operands, self.text))
            self.code = ""

    def _end_block(self, to: int | str | None = None, predicate: str = "") -> None:
        """Ends a basic block; ``to``: the one that comes next, where ``predicate`` is; else the following one."""
        following = self.word(len(self.blocks))
        self.lane(f"t.next = {f'{predicate or 1} ? {self.word(to)} : ' if to is not None else ''}{following};")
        self._end_statement()
        self.blocks.append([])

    def pause(self) -> None:
        """Ends the basic block, so that a warp that waits or yields may stop."""
        self._end_block()

    # ---- operands ----------------------------------------------------------------------------------------------------

    def bits(self, operand: str) -> str:
        """C++ of an operand's bits."""
        if operand.startswith("!"):
            return f"!{self.bits(operand[1:])}"
        if (known := self.scope.find(operand)) is not None:
            type_, register = known
            held = self.word(register)
            return f"t.local({held})" if type_ == "local" else f"t.at<{REGISTERS[type_]}>({held})"
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand in self.symbols:
            return self.constant(self.symbols[operand])
        if operand in self.parameters:
            return self.constant(self.parameters[operand][0])
        if m := re.fullmatch(r"0[fFdD]([0-9a-fA-F]{8}|[0-9a-fA-F]{16})", operand):
            return self.constant(int(m[1], 16))
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            return self.constant(int(operand.rstrip("U"), 0) % 2**64)
        if m := re.fullmatch(r"([\w$%.]+)\s*\+\s*(\d+)", operand):
            return f"({self.bits(m[1])} + {m[2]})"
        raise UnknownPTX(f"operand {operand}")

    def value(self, operand: str, type_: str) -> str:
        return f"as<{C_TYPES[type_]}>({self.bits(operand)})"

    def address(self, operand: str) -> str:
        m = re.fullmatch(r"\[\s*([\w$%.]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
        if m is None:
            raise UnknownPTX(f"address {operand}")
        return f"({self.bits(m[1])} + {self.bits(m[2] or '0')})"

    def memory(self, operand: str, ins: Instruction, size: int) -> str:
        """C++ of a pointer to ``size`` bytes."""
        space = next(
            (m.split("::")[0] for m in ins.modifiers if re.match(r"(global|shared|param|local|const)\b", m)), ""
        )
        at = self.address(operand)
        if space == "param":
            return f"(block.parameters + uint32_t({at}))"
        if space == "local":
            return f"reinterpret_cast<char*>({at})"
        return f"block.shared(uint32_t({at}), {size})" if space == "shared" else f"block.generic({at}, {size})"

    def assign(self, operand: str, expression: str) -> str:
        return "" if operand == "_" else f"{self.bits(operand)} = {expression};"

    # ---- instructions ------------------------------------------------------------------------------------------------

    def _instruction(self, text: str) -> None:
        m = re.match(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)$", text, re.DOTALL)
        if m is None:
            raise UnknownPTX(text)
        self._begin(text)
        predicate = m[1] + self.bits(m[2]) if m[2] else ""
        ins = Instruction(text, predicate, m[3], m[4].split(".")[1:], split_list(m[5]))
        handler = getattr(self, f"do_{ins.name}", None)
        if handler is None:
            raise UnknownPTX(text)
        accesses = "" if ins.name == "wgmma" else self._accesses(ins)
        if accesses:
            self.lane(f"if ({predicate}) {{ {accesses} }}" if predicate else accesses)
        code = handler(ins)
        if code:
            self.lane(f"if ({predicate}) {{ {code} }}" if predicate else code)
        self._end_statement()

    def _accesses(self, ins: Instruction) -> str:
        """C++ that asks whether registers may be touched that wgmma uses."""
        code = ""
        for i, operand in enumerate(ins.operands if self.matrix else []):
            for name in re.findall(r"%\w+", operand):
                if name in self.matrix:
                    code += f"w.access({self.word(self.matrix[name])}, {int(i == 0)});"
        return code

    def _simple(self, ins: Instruction, function: str, *types: str) -> str:
        arguments = [self.value(o, t) for o, t in zip(ins.operands[1:], types, strict=True)]
        return self.assign(ins.operands[0], f"bits({function}({', '.join(arguments)}))")

    def _arithmetic(self, ins: Instruction) -> str:
        ins.allow("lo")
        count = len(ins.operands) - 1
        return self._simple(ins, ins.name, *[ins.type] * count)

    do_add = do_sub = do_neg = do_abs = do_fma = do_div = _arithmetic

    def _extreme(self, ins: Instruction) -> str:
        ins.allow("NaN", *(["relu"] if ins.type == "s32" else []))
        function = f"{ins.name}_or_nan" if ins.has("NaN") else ins.name
        found = f"{function}({', '.join(self.value(o, ins.type) for o in ins.operands[1:])})"
        if ins.has("relu"):
            found = f"max({found}, 0)"
        return self.assign(ins.operands[0], f"bits({found})")

    do_min = do_max = _extreme

    def do_rem(self, ins: Instruction) -> str:
        ins.allow()
        a, b = (self.value(o, ins.type) for o in ins.operands[1:])
        return self.assign(ins.operands[0], f"bits(sub({a}, mul(div({a}, {b}), {b})))")

    def _product(self, ins: Instruction) -> tuple[str, str]:
        """(C++ of a product, its type)."""
        a, b = (self.value(o, ins.type) for o in ins.operands[1:3])
        if ins.has("wide"):
            wide = WIDER[ins.type]
            return f"mul({C_TYPES[wide]}({a}), {C_TYPES[wide]}({b}))", wide
        return f"{'high_product' if ins.has('hi') else 'mul'}({a}, {b})", ins.type

    def do_mul(self, ins: Instruction) -> str:
        ins.allow("lo", "hi", "wide")
        return self.assign(ins.operands[0], f"bits({self._product(ins)[0]})")

    def do_mad(self, ins: Instruction) -> str:
        ins.allow("lo", "hi", "wide")
        if ins.type.startswith("f"):
            return self._simple(ins, "fma", *[ins.type] * 3)
        product, type_ = self._product(ins)
        return self.assign(ins.operands[0], f"bits(add({product}, {self.value(ins.operands[3], type_)}))")

    def _logic(self, ins: Instruction) -> str:
        ins.allow()
        operator = {"and": "&", "or": "|", "xor": "^"}[ins.name]
        a, b = (self.value(o, ins.type) for o in ins.operands[1:])
        return self.assign(ins.operands[0], f"{a} {operator} {b}")

    do_and = do_or = do_xor = _logic

    def do_not(self, ins: Instruction) -> str:
        ins.allow()
        sign = "!" if ins.type == "pred" else "~"
        return self.assign(ins.operands[0], f"{sign}{self.value(ins.operands[1], ins.type)}")

    def _shift(self, ins: Instruction) -> str:
        ins.allow()
        return self._simple(ins, ins.name, ins.type, "u32")

    do_shl = do_shr = _shift

    def do_shf(self, ins: Instruction) -> str:
        ins.allow("l", "r", "wrap", "clamp")
        low, high, by = (self.value(o, "u32") for o in ins.operands[1:])
        flags = f"{int(ins.has('l'))}, {int(ins.has('wrap'))}"
        return self.assign(ins.operands[0], f"funnel({low}, {high}, {by}, {flags})")

    def do_bfe(self, ins: Instruction) -> str:
        ins.allow()
        return self._simple(ins, "bfe", ins.type, "u32", "u32")

    def do_bfi(self, ins: Instruction) -> str:
        ins.allow()
        return self._simple(ins, "bfi", ins.type, ins.type, "u32", "u32")

    def do_prmt(self, ins: Instruction) -> str:
        ins.allow()
        return self._simple(ins, "prmt", "u32", "u32", "u32")

    def do_lop3(self, ins: Instruction) -> str:
        ins.allow()
        return self._simple(ins, "lop3", "u32", "u32", "u32", "s32")

    def do_popc(self, ins: Instruction) -> str:
        ins.allow()
        return self.assign(ins.operands[0], f"__builtin_popcountll({self.value(ins.operands[1], ins.type)})")

    def do_clz(self, ins: Instruction) -> str:
        ins.allow()
        a, spare = self.value(ins.operands[1], ins.type), 64 - 8 * SIZES[ins.type]
        return self.assign(ins.operands[0], f"({a} ? __builtin_clzll({a}) : 64) - {spare}")

    def do_brev(self, ins: Instruction) -> str:
        ins.allow()
        return self._simple(ins, "reversed", ins.type)

    def do_bfind(self, ins: Instruction) -> str:
        ins.allow("shiftamt")
        return self._simple(ins, f"bfind<{str(ins.has('shiftamt')).lower()}>", ins.type)

    def _special_function(self, ins: Instruction) -> str:
        ins.allow()
        a = f"float({self.value(ins.operands[1], ins.type)})"
        formula = {
            "ex2": f"std::exp2({a})",
            "lg2": f"std::log2({a})",
            "rcp": f"1.0f / {a}",
            "rsqrt": f"1.0f / std::sqrt({a})",
            "sqrt": f"std::sqrt({a})",
            "tanh": f"std::tanh({a})",
            "sin": f"std::sin({a})",
            "cos": f"std::cos({a})",
        }[ins.name]
        return self.assign(ins.operands[0], f"bits({C_TYPES[ins.type]}({formula}))")

    do_ex2 = do_lg2 = do_rcp = do_rsqrt = do_sqrt = do_tanh = do_sin = do_cos = _special_function

    def do_selp(self, ins: Instruction) -> str:
        ins.allow()
        to, a, b, choice = ins.operands
        return self.assign(to, f"{self.bits(choice)} ? {self.bits(a)} : {self.bits(b)}")

    def do_setp(self, ins: Instruction) -> str:
        ins.allow("and", "or", "xor", "num", "nan", *COMPARE, *(f"{c}u" for c in OPPOSITE))
        how, (to, a, b, *rest) = ins.modifiers[0], ins.operands
        a, b = self.value(a, ins.type), self.value(b, ins.type)
        floating = ins.type in ("f16", "bf16", "f32", "f64")
        if how in ("num", "nan"):
            result = f"({'!' if how == 'nan' else ''}({a} == {a} && {b} == {b}))"
        elif floating and how.endswith("u"):  # unordered: true beside NaN
            result = f"!{self._ordered(OPPOSITE[how[:-1]], a, b)}"
        elif floating:
            result = self._ordered(how, a, b)
        else:
            result = f"({a} {COMPARE[how]} {b})"
        if rest:
            joined = {"and": "&&", "or": "||", "xor": "!="}[
                next(m for m in ins.modifiers[1:] if m in ("and", "or", "xor"))
            ]
            other = self.bits(rest[0])
        both = to.split("|")
        code = f"const bool is = {result};"
        for name, sign in zip(both, ("", "!"), strict=False):
            code += self.assign(name, f"{sign}is {joined} {other}" if rest else f"{sign}is")
        return f"{{ {code} }}"

    @staticmethod
    def _ordered(how: str, a: str, b: str) -> str:
        return f"({a} < {b} || {a} > {b})" if how == "ne" else f"({a} {COMPARE[how]} {b})"

    def do_mov(self, ins: Instruction) -> str:
        ins.allow()
        to, source = ins.operands
        if source.startswith("{"):
            parts = vector(source)
            width = 8 * SIZES[ins.type] // len(parts)
            joined = " | ".join(f"uint64_t({self.value(p, f'u{width}')}) << {i * width}" for i, p in enumerate(parts))
            return self.assign(to, joined)
        if to.startswith("{"):
            parts = vector(to)
            width = 8 * SIZES[ins.type] // len(parts)
            code = f"const uint64_t whole = {self.bits(source)};"
            code += "".join(self.assign(p, f"uint{width}_t(whole >> {i * width})") for i, p in enumerate(parts))
            return f"{{ {code} }}"
        return self.assign(to, self.bits(source))

    def do_cvt(self, ins: Instruction) -> str:
        ins.allow("rz", "rna", *ROUND)
        kinds = [m for m in ins.modifiers if m in C_TYPES]
        to, source = kinds
        if ins.has("rz") and not source.startswith(("s", "u")):
            raise UnknownPTX(ins.text)
        if to in ("f16x2", "bf16x2"):
            high, low = (self.value(o, source) for o in ins.operands[1:])
            half = C_TYPES[to[:-2]]
            return self.assign(ins.operands[0], f"bits({C_TYPES[to]}{{{half}({low}), {half}({high})}})")
        if to == "tf32":
            return self._simple(ins, "round_to_tf32", source)
        how = next((ROUND[m] for m in ins.modifiers if m in ROUND), "nearest")
        whole = to[0] == "f" and any(m in ROUND for m in ins.modifiers)  # to a whole number, kept floating
        value = f"convert<{C_TYPES[to]}, {C_TYPES[source]}>({self.value(ins.operands[1], source)}, Round::{how})"
        return self.assign(
            ins.operands[0],
            f"bits({C_TYPES[to]}(round_to_integer({value}, Round::{how})))" if whole else f"bits({value})",
        )

    def do_cvta(self, ins: Instruction) -> str:
        ins.allow("to", "global", "shared", "local", "const", "param")
        to, source = ins.operands
        code = self.bits(source)
        if ins.has("param"):
            code = f"reinterpret_cast<uint64_t>(block.parameters + uint32_t({code}))"
        if ins.has("shared"):
            code = f"block.{'to_shared' if ins.has('to') else 'to_generic'}({code})"
        return self.assign(to, code)

    # ---- memory ------------------------------------------------------------------------------------------------------

    def do_ld(self, ins: Instruction) -> str:
        ins.allow("global", "shared", "param", "local", "const", "v2", "v4", "v8")
        to = vector(ins.operands[0])
        size, c = SIZES[ins.type], C_TYPES[ins.type]
        at = self.memory(ins.operands[1], ins, size * len(to))
        code = f"const char* const at = {at};"
        code += "".join(self.assign(o, f"bits(load<{c}>(at + {i * size}))") for i, o in enumerate(to))
        if ins.has("volatile", "acquire", "relaxed"):
            self._spin()
        return f"{{ {code} }}"

    do_ldu = do_ld

    def do_st(self, ins: Instruction) -> str:
        ins.allow("global", "shared", "local", "v2", "v4", "v8")
        values = vector(ins.operands[1])
        size, c = SIZES[ins.type], C_TYPES[ins.type]
        code = f"char* const at = {self.memory(ins.operands[0], ins, size * len(values))};"
        code += "".join(f"store<{c}>(at + {i * size}, {self.value(o, ins.type)});" for i, o in enumerate(values))
        if self.matrix:
            code += f"block.wrote(at, {size * len(values)});"
        return f"{{ {code} }}"

    def _spin(self) -> None:
        """Before an instruction by which a warp may wait for another: others go first."""
        self.warp("w.yields = true;")
        self.pause()

    def do_atom(self, ins: Instruction) -> str:
        ins.allow("global", "shared", "add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        self._spin()
        return self._update(ins, ins.operands[0], ins.operands[1:])

    def do_red(self, ins: Instruction) -> str:
        if ins.has("async"):
            raise UnknownPTX(ins.text)
        ins.allow("global", "shared", "add", "min", "max", "and", "or", "xor", "inc", "dec")
        return self._update(ins, "_", ins.operands)

    def _update(self, ins: Instruction, to: str, operands: list[str]) -> str:
        c, (at, *arguments) = C_TYPES[ins.type], operands
        values = [self.value(a, ins.type) for a in arguments]
        how = next(
            m for m in ins.modifiers if m in ("add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec")
        )
        operators = {"and": "&", "or": "|", "xor": "^"}
        if how in operators:
            following = f"{c}(old {operators[how]} {values[0]})"
        else:
            following = {
                "exch": values[0],
                "cas": f"(old == {values[0]} ? {values[-1]} : old)",
                "inc": f"(old >= {values[0]} ? 0 : old + 1)",
                "dec": f"(old == 0 || old > {values[0]} ? {values[0]} : old - 1)",
            }.get(how, f"{how}(old, {values[0]})")
        where = self.memory(at, ins, SIZES[ins.type])
        old = f"bits(update<{c}>({where}, [&]({c} old) -> {c} {{ return {following}; }}))"
        return self.assign(to, old) if to != "_" else f"{old};"

    def do_cp(self, ins: Instruction) -> str | None:
        if ins.has("commit_group", "wait_group", "wait_all") and not ins.has("bulk"):
            if ins.has("commit_group"):
                return "t.commit();"
            return "t.commit(); t.wait(block, 0);" if ins.has("wait_all") else f"t.wait(block, {ins.operands[0]});"
        if ins.has("mbarrier"):
            ins.allow("async", "mbarrier", "arrive", "noinc", "shared")
            barrier = self.address(ins.operands[0])
            return f"arrive_after_copies(block, t, uint32_t({barrier}), {'true' if ins.has('noinc') else 'false'});"
        if ins.has("tensor"):
            return self._tensor_copy(ins)
        if ins.has("bulk"):
            ins.allow("async", "bulk", "global", "mbarrier::complete_tx::bytes")
            if not ins.modifiers[2].startswith("shared"):
                raise UnknownPTX(ins.text)
            to, source, size, barrier = ins.operands
            return (
                f"bulk_copy(block, uint32_t({self.address(to)}), {self.address(source)}, "
                f"{self.value(size, 'u32')}, uint32_t({self.address(barrier)}));"
            )
        ins.allow("async", "shared", "global")
        to, source, size, *rest = ins.operands
        if any(m.endswith("cache_hint") for m in ins.modifiers):
            rest.pop()
        filled, into = (
            self.value(rest[0], "u32") if rest else size,
            f"block.shared(uint32_t({self.address(to)}), {size})",
        )
        return (
            f"{{ const uint32_t filled = {filled}; char* const into = {into}; "
            f"const char* const from = filled ? block.generic_span({self.address(source)}, filled) : nullptr; "
            f"t.open.push_back({{into, from, {size}, filled}}); }}"
        )

    def _tensor_copy(self, ins: Instruction) -> str:
        ins.allow("async", "bulk", "tensor", "2d", "global", "mbarrier::complete_tx::bytes", "multicast::cluster")
        if not ins.modifiers[4].startswith("shared"):
            raise UnknownPTX(ins.text)
        to, tile, barrier, *rest = ins.operands
        map_, (column, row) = tile.strip("[] ").split(",")[0], vector(tile[tile.index("{") : tile.index("}") + 1])
        blocks = self.value(rest[0], "u16") if ins.has("multicast::cluster") else "1u << block.rank"
        return (
            f"tensor_copy(block, uint32_t({self.address(to)}), {self.bits(map_.strip())}, {self.value(column, 's32')}, "
            f"{self.value(row, 's32')}, uint32_t({self.address(barrier)}), {blocks});"
        )

    def do_mapa(self, ins: Instruction) -> str:
        ins.allow()
        to, at, rank = ins.operands
        if any(m.startswith("shared") for m in ins.modifiers):
            return self.assign(to, f"Block::in_cluster(uint32_t({self.bits(at)}), uint32_t({self.bits(rank)}))")
        there = f"block.other(uint32_t({self.bits(rank)})).to_generic(block.to_shared({self.bits(at)}))"
        return self.assign(to, there)

    def do_createpolicy(self, ins: Instruction) -> str:
        return self.assign(ins.operands[0], "0")

    def _nothing(self, ins: Instruction) -> None:
        """Orders memory, or tells caches: one thread runs at a time."""

    do_membar = do_prefetch = do_prefetchu = do_discard = do_setmaxnreg = _nothing

    def do_fence(self, ins: Instruction) -> str | None:
        return "block.fence_async();" if ins.has("proxy") and ins.has("async") else None

    def do_griddepcontrol(self, ins: Instruction) -> None:
        self.warp("w.let_next_grid_start();" if ins.has("launch_dependents") else "block.of->wait_for_previous();")
        self.pause()

    # ---- control -----------------------------------------------------------------------------------------------------

    def do_bra(self, ins: Instruction) -> None:
        self._end_block(self.scope.find(ins.operands[0]), ins.predicate)

    def do_ret(self, ins: Instruction) -> None:
        self._end_block(FINISHED, ins.predicate)

    do_exit = do_ret

    def do_trap(self, ins: Instruction) -> str:
        return 'fail("trap");'

    def do_bar(self, ins: Instruction) -> None:
        ins.allow("warp", "arrive", "sync", "cta")
        if ins.has("warp"):
            self.warp("")
            return
        barrier, count = [*ins.operands, "0"][:2]
        code = "Thread& t = *w.threads[__builtin_ctz(active)]; (void)t; "
        stays = "false" if ins.has("arrive") else "true"
        code += f"w.arrive(uint32_t({self.bits(barrier)}), uint32_t({self.bits(count)}), {stays});"
        self.warp(code, ins.predicate)
        self.pause()

    def do_barrier(self, ins: Instruction) -> None:
        if not ins.has("cluster"):
            return self.do_bar(ins)
        ins.allow("arrive", "wait")
        self.warp(f"w.{'arrive' if ins.has('arrive') else 'wait'}_in_cluster();", ins.predicate)
        return self.pause()

    def do_nanosleep(self, ins: Instruction) -> None:
        self._spin()

    # ---- of a warp ---------------------------------------------------------------------------------------------------

    def _collective(self, ins: Instruction, call: str, sources: list[str], targets: list[str]) -> None:
        """``call`` with Lanes ``in`` of ``sources`` (C++) and ``out``, which go to ``targets``."""
        code = f"Lanes<{len(sources) or 1}> in{{}}; Lanes<{len(targets) or 1}> out{{}}; (void)out; "
        code += "EACH_LANE { " + "".join(f"in[lane][{i}] = uint32_t({s});" for i, s in enumerate(sources)) + " } "
        code += call + " "
        if targets:
            code += "EACH_LANE { " + "".join(self.assign(o, f"out[lane][{i}]") for i, o in enumerate(targets)) + " }"
        self.warp(code, ins.predicate)

    def do_shfl(self, ins: Instruction) -> None:
        mode = ins.modifiers[1]
        to, value, by, clamp, _ = ins.operands
        targets = [*to.split("|"), "_"][:2]
        self._collective(
            ins, f"shuffle(active, '{mode[0]}', in, out);", [self.bits(o) for o in (value, by, clamp)], targets
        )

    def do_vote(self, ins: Instruction) -> None:
        ins.allow("ballot", "all", "any", "uni")
        to, source, _ = ins.operands
        lanes = "const uint32_t set = ballot(active, in);"
        result = {"ballot": "set", "all": "set == active", "any": "set != 0"}[ins.modifiers[1]]
        self._collective(ins, f"{lanes} EACH_LANE {{ out[lane][0] = {result}; }}", [self.bits(source)], [to])

    def do_activemask(self, ins: Instruction) -> None:
        self._collective(ins, "EACH_LANE { out[lane][0] = active; }", [], [ins.operands[0]])

    def do_elect(self, ins: Instruction) -> None:
        targets = ins.operands[0].split("|")
        chosen = "out[lane] = {uint32_t(__builtin_ctz(active)), lane == uint32_t(__builtin_ctz(active))};"
        self._collective(ins, f"EACH_LANE {{ {chosen} }}", [], targets)

    def do_redux(self, ins: Instruction) -> None:
        ins.allow("add", "min", "max", "and", "or", "xor")
        how, c = ins.modifiers[1], C_TYPES[ins.type]
        step = {"and": "all &= v;", "or": "all |= v;", "xor": "all ^= v;"}.get(how, f"all = {how}(all, v);")
        start = f"{c} all = as<{c}>(in[__builtin_ctz(active)][0]); bool first = true;"
        loop = f"EACH_LANE {{ const {c} v = as<{c}>(in[lane][0]); if (!first) {{ {step} }} first = false; }}"
        self._collective(
            ins,
            f"{start} {loop} EACH_LANE {{ out[lane][0] = uint32_t(bits(all)); }}",
            [self.bits(ins.operands[1])],
            [ins.operands[0]],
        )

    def do_ldmatrix(self, ins: Instruction) -> None:
        ins.allow("m8n8", "x1", "x2", "x4", "trans", "shared")
        targets = vector(ins.operands[0])
        transposed = "true" if ins.has("trans") else "false"
        call = f"load_matrices<{len(targets)}>(block, active, {transposed}, in, out);"
        self._collective(ins, call, [self.address(ins.operands[1])], targets)

    def do_stmatrix(self, ins: Instruction) -> None:
        ins.allow("m8n8", "x1", "x2", "x4", "trans", "shared")
        values = vector(ins.operands[1])
        transposed = "true" if ins.has("trans") else "false"
        call = f"store_matrices<{len(values)}>(block, active, {transposed}, in);"
        self._collective(ins, call, [self.address(ins.operands[0]), *map(self.bits, values)], [])

    def do_mma(self, ins: Instruction) -> None:
        ins.allow("m16n8k16", "m16n8k8", "row", "col")
        d, a, b, c = map(vector, ins.operands)
        element = ins.modifiers[-3]
        shape = "m16n8k8" if element == "tf32" else "m16n8k16"
        if not ins.has(shape) or ins.modifiers[-4:] != ["f32", element, element, "f32"]:
            raise UnknownPTX(ins.text)
        self._collective(ins, f"mma<{C_TYPES[element]}>(active, in, out);", [self.bits(o) for o in a + b + c], d)

    def do_wgmma(self, ins: Instruction) -> None:
        if ins.has("fence"):
            self.warp("w.fence();")
            return
        if ins.has("commit_group", "wait_group"):
            self.warp("w.commit();" if ins.has("commit_group") else f"w.wait({ins.operands[0]});")
            return
        m = re.search(r"\.m64n(\d+)k(\d+)\.f32\.(\w+)\.\3$", ins.text.split()[0])
        if m is None or ins.predicate:
            raise UnknownPTX(ins.text)
        columns, element = int(m[1]), m[3]
        d, a, (b, scale, *flags) = vector(ins.operands[0]), vector(ins.operands[1]), ins.operands[2:]
        if flags[:2] != ["1", "1"]:
            raise UnknownPTX(ins.text)
        in_registers = len(a) > 1
        majors = [flag != "0" for flag in flags[2:]]
        a_major, b_major = (False, *majors, False)[:2] if in_registers else (*majors, False, False)[:2]
        bools = ", ".join(str(v).lower() for v in (in_registers, a_major, b_major))
        registers = self.word(*(self.matrix[o] for o in (d + a if in_registers else d)))
        code = f'need_all(active, "wgmma"); Wgmma<{C_TYPES[element]}, {columns}> product{{&w, {bools}}}; EACH_LANE {{ '
        code += f"product.adds = {self.bits(scale)}; product.b.held = {self.bits(b)}; "
        if in_registers:
            first = self.word(*(self.scope.find(o)[1] for o in a))
            code += f"for (int i = 0; i < {len(a)}; ++i) product.a_registers[lane][i] = t.at<uint32_t>((&{first})[i]);"
        else:
            code += f"product.a.held = {self.bits(a[0])};"
        first = self.word(*(self.scope.find(o)[1] for o in d))
        code += f"for (int i = 0; i < {len(d)}; ++i) product.d[lane][i] = &t.at<uint32_t>((&{first})[i]);"
        self.warp(f"{code} }} product.issue(&{registers});")

    # ---- mbarrier ----------------------------------------------------------------------------------------------------

    def do_mbarrier(self, ins: Instruction) -> str | None:
        ins.allow("init", "inval", "arrive", "expect_tx", "try_wait", "test_wait", "parity", "shared", "complete_tx")
        place = next(i for i, operand in enumerate(ins.operands) if operand.startswith("["))
        address, after = f"uint32_t({self.address(ins.operands[place])})", ins.operands[place + 1 :]
        barrier = f"MBarrier::at(block, {address})"
        if ins.has("try_wait", "test_wait"):
            if not ins.has("parity"):
                raise UnknownPTX(ins.text)
            to = self.assign(ins.operands[0], f"try_wait(w, {address}, {self.value(after[0], 'u32')})")
            self.lane(f"if ({ins.predicate}) {{ {to} }}" if ins.predicate else to)
            self.pause()
            return None
        if ins.has("init"):
            return f"{barrier}.begin({self.value(after[0], 'u32')});"
        if ins.has("inval"):
            return None
        if ins.operands[0] != "_" and not ins.operands[0].startswith("["):
            used = self.assign(ins.operands[0], "~0ull")  # the state: only waits by parity are known
        else:
            used = ""
        count = self.value(after[0], "u32") if after else "1"
        if ins.has("arrive"):
            change = f"1, int({count})" if ins.has("expect_tx") else f"int({count}), 0"
        else:
            change = f"0, {'-' if ins.has('complete_tx') else ''}int({count})"
        return f"{barrier}.change({change}); {used}"

    # ---- programs ----------------------------------------------------------------------------------------------------

    def program(self, static_shared: int) -> Program:
        functions: dict[str, int] = {}
        code, blocks, texts = array("I"), array("I"), bytearray()
        for block in self.blocks:
            blocks.append(len(code))
            for function, operands, text in block:
                code.extend((functions.setdefault(function, len(functions)), len(texts), len(operands)))
                code.extend(self.places[o] if isinstance(o, str) else o for o in operands)
                texts += text.encode() + b"\0"
        blocks.append(len(code))
        parameters = array("I", [word for place in self.parameters.values() for word in place])
        sizes = array("I", [self.registers, static_shared, len(self.matrix)])
        return Program(list(functions), code, blocks, list(self.constants), bytes(texts), parameters, sizes)


class Program(NamedTuple):
    """A kernel as machine.h takes it."""

    functions: list[str]  # C++ of their bodies
    code: array  # of each instruction: function, place of its text, count of operands, operands
    blocks: array  # where each begins in ``code``, and the end
    constants: list[int | str]  # a string: the address of a table
    texts: bytes
    parameters: array  # offset and bytes of each
    sizes: array  # registers, bytes of static shared memory, registers of wgmma


@dataclass
class Module:
    kernels: dict[str, Program]
    tables: dict[str, bytes]  # in global memory


def table_bytes(type_: str, count: int, values: str | None) -> bytes:
    found = [int(v, 0) for v in split_list((values or "").strip("{} "))]
    return struct.pack(f"<{count}{'BHIQ'[SIZES[type_].bit_length() - 1]}", *(found + [0] * (count - len(found))))


def translate(ptx: str, only: str = "") -> Module:
    """A module, of whose kernels those are translated whose names match ``only``."""
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", ptx), flags=re.DOTALL)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*$", "", text, flags=re.MULTILINE)
    symbols: dict[str, int | str] = {}
    module = Module({}, {})
    kernels = []
    outside = ""
    position = 0
    for m in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{;]*)\{", text, re.DOTALL):
        end, depth = m.end(), 1
        while depth:
            following = re.compile("[{}]").search(text, end)
            depth += 1 if following[0] == "{" else -1
            end = following.end()
        outside += text[position : m.start()]
        kernels.append((m[1], m[2], text[m.end() : end - 1]))
        position = end
    if re.search(r"\.func\b", outside):
        raise UnknownPTX("a function that is called: .func")
    static = 0
    bodies = "".join(k[2] for k in kernels)
    for m in re.finditer(
        r"(\.extern\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?\s*;", outside + bodies
    ):
        if m[1]:
            continue
        static = -(-static // int(m[2])) * int(m[2])
        symbols[m[4]] = SHARED_BASE + static
        static += int(m[5] or 1) * SIZES[m[3]]
    static = -(-static // 128) * 128 if static else 0
    for m in re.finditer(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.\w+\s+([\w$]+)\[\s*\]", outside):
        symbols[m[1]] = SHARED_BASE + static
    table = (
        r"\.(?:global|const)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?\s*(?:=\s*(\{[^}]*\}|[^;]*))?;"
    )
    for m in re.finditer(table, outside):
        _, type_, name, count, values = m.groups()
        module.tables[name] = table_bytes(type_, int(count or 1), values)
        symbols[name] = name
    for name, parameters, body in kernels:
        if not re.search(only, name):
            continue
        body = re.sub(r"\.shared\s+\.align\s+\d+\s+\.\w+\s+[\w$]+(?:\[\d*\])?\s*;", "", body)
        module.kernels[name] = KernelTranslator(parameters, body, symbols).program(static)
    return module
