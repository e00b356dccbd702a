"""Kernels in PTX, NVIDIA's virtual instruction set, as programs that ptx.c executes on the CPU.

The text is what Triton's compiler gives to NVIDIA's assembler. Instructions that no kernel of Elastic has are refused.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence

COMPARISONS = {"eq": 0, "ne": 1, "lt": 2, "le": 3, "gt": 4, "ge": 5, "lo": 2, "ls": 3, "hi": 4, "hs": 5}
COMPARISONS |= {"equ": 6, "neu": 7, "ltu": 8, "leu": 9, "gtu": 10, "geu": 11}
SHUFFLES = {"up": 0, "down": 1, "bfly": 2, "idx": 3}
SUMS = {"add": 0, "min": 1, "max": 2, "and": 3, "or": 4, "xor": 5, "exch": 6}
ROUNDINGS = {"rmi": 2, "rpi": 3, "rni": 4, "rzi": 5}
SPECIAL = [f"%{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"] + ["%laneid", "%warpid"]
SIZES = {"b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "b64": 8, "u64": 8, "s64": 8, "f64": 8}
NOTHING = {"griddepcontrol", "fence", "membar", "prefetch", "discard"}
"""Instructions that change nothing where programs and launches run one after the other."""
MOST = 20
"""Operands of an instruction, at the most."""


class Unsupported(Exception):
    """An instruction that is not known here; its text."""


class Instruction(ctypes.Structure):
    """As in ptx.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("operation", "type", "source", "mode")),
        *((name, ctypes.c_int32) for name in ("guard", "inverted", "line", "count")),
        ("offset", ctypes.c_int64),
        ("at", ctypes.c_int32 * MOST),
    ]


class Kernel(ctypes.Structure):
    """As in ptx.c."""

    _fields_ = [
        ("code", ctypes.POINTER(Instruction)),
        ("registers", ctypes.c_int32),
        ("constants", ctypes.c_int32),
        ("special", ctypes.POINTER(ctypes.c_int32)),
        ("constant", ctypes.POINTER(ctypes.c_int64)),
    ]


def statements(body: str) -> list[tuple[int, str]]:
    """Return the labels and statements of a function's body, each with its line in the source."""
    found, here = [], 0
    for line in body.splitlines():
        line = line.partition("//")[0].strip()
        place = re.match(r"\.loc\s+1\s+(\d+)", line)
        here = int(place[1]) or here if place else here
        if not line.startswith((".", "{", "}")):
            found += [(here, part.strip()) for part in line.split(";") if part.strip()]
    return found


def _address(text: str) -> tuple[str, int]:
    """Return the register or name that an address starts from, and its offset."""
    base, _, offset = text.strip("[] ").partition("+")
    return base.strip(), int(offset.strip() or "0", 0)


class Program:
    """The kernel of a text in PTX; library: ptx.c and arithmetic.c, compiled. Raises Unsupported."""

    def __init__(self, text: str, library: ctypes.CDLL) -> None:
        self._library = library
        self._registers: dict[str, int] = {}
        self._constants: dict[int, int] = {}
        head, _, body = text.partition(".visible .entry")[2].partition("\n{")
        self.name = head.partition("(")[0].strip()
        self._shared = set(re.findall(r"\.shared[^;]*?\.b8\s+([\w$]+)\[", text))
        self.sizes: list[int] = []
        """Bytes of each parameter."""
        self._parameters: dict[str, int] = {}
        end = 0
        for kind, name in re.findall(r"\.param \.(\w+)[^,\n]*?(\w+)(?=[,\s)]*\n)", head):
            self.sizes.append(SIZES.get(kind, 4))
            self._parameters[name] = -(-end // self.sizes[-1]) * self.sizes[-1]
            end = self._parameters[name] + self.sizes[-1]
        self._labels: dict[str, int] = {}
        code = []
        for line, statement in statements(body.partition("\n}")[0]):
            if statement.endswith(":"):
                self._labels[statement[:-1]] = len(code)
            else:
                code.append((line, statement))
        self._code = (Instruction * len(code))(*(self._instruction(*one) for one in code))
        special = [self._registers.get(name, -1) for name in SPECIAL]
        constants = [ctypes.c_int64(x).value for pair in self._constants.items() for x in pair]
        self._kernel = Kernel(
            self._code,
            len(self._registers),
            len(self._constants),
            (ctypes.c_int32 * len(special))(*special),
            (ctypes.c_int64 * len(constants))(*constants),
        )

    def launch(self, grid: Sequence[int], block: Sequence[int], shared: int, arguments: bytes, turn: int) -> str | None:
        """Run the kernel and return what went wrong. shared: bytes of a program's shared memory; arguments: as they lie
        in memory; turn: number of the launch (see ptx_launch)."""
        run = self._library.ptx_launch
        run.restype = ctypes.c_char_p
        sizes = ((ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block), ctypes.c_uint64(shared))
        wrong = run(ctypes.byref(self._kernel), *sizes, arguments, ctypes.c_long(turn))
        return wrong and f"{self.name}, {wrong.decode()}"

    def packed(self, parts: Sequence[bytes]) -> bytes:
        """Return arguments, one for each parameter, as they lie in memory."""
        out = b""
        for size, part in zip(self.sizes, parts, strict=True):
            out += bytes(-len(out) % size) + part
        return out

    def _register(self, name: str) -> int:
        return self._registers.setdefault(name, len(self._registers))

    def _operand(self, text: str) -> int:
        """Return a register: that of this name, or one that holds a constant."""
        if text == "_" or text.startswith("%"):
            return self._register(text)
        floating = text.lower().startswith(("0f", "0d"))
        value = 0 if text in self._shared else int(text[2:], 16) if floating else int(text.rstrip("U"), 0)
        number = self._register(f"constant {value}")
        self._constants[number] = value
        return number

    def _instruction(self, line: int, text: str) -> Instruction:
        made, statement = Instruction(line=line, guard=-1), text
        guard = re.match(r"@(!?)(%\w+)\s+", text)
        if guard:
            made.inverted, made.guard = int(bool(guard[1])), self._register(guard[2])
            text = text[guard.end() :]
        name, *rest = text.split(None, 1)
        name, *extra = name.replace("::cta", "").split(".")
        operands = [x.strip() for x in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", "".join(rest))]
        try:
            if name in ("ld", "st", "ldmatrix", "stmatrix", "atom", "red", "cp"):
                self._memory(made, name, extra, operands)
            elif name in NOTHING or name in ("bra", "ret", "exit", "bar"):
                self._control(made, name, extra, operands)
            else:
                self._computation(made, name, extra, operands)
        except (KeyError, ValueError, IndexError, StopIteration) as error:
            raise Unsupported(f"{statement} ({error})") from error
        return made

    def _put(self, made: Instruction, operation: str, kind: str, *operands: str) -> None:
        made.operation, made.type = self._number(operation.upper(), False), self._number(kind, True)
        flat = [x.strip() for one in operands for x in one.strip("{}").split(",")]
        made.count = len(flat)
        for k, one in enumerate(flat):
            made.at[k] = self._operand(one)

    def _number(self, name: str, of_type: bool) -> int:
        number: int = self._library.ptx_number(name.encode(), int(of_type))
        if number < 0:
            raise ValueError(f"{name} is not known")
        return number

    def _control(self, made: Instruction, name: str, extra: list[str], operands: list[str]) -> None:
        if name == "bar":
            made.mode = int("warp" in extra)
            if not made.mode and operands != ["0"]:
                raise ValueError("a barrier of some threads")
        elif name == "bra":
            made.offset = self._labels[operands[0]]
        self._put(made, "nop" if name in NOTHING else "ret" if name == "exit" else name, "b32")
        made.count = 0

    def _memory(self, made: Instruction, name: str, extra: list[str], operands: list[str]) -> None:
        if name == "cp":
            self._copy(made, extra, operands)
            return
        first = name in ("st", "stmatrix", "red")  # where the address is
        base, made.offset = _address(operands[0 if first else 1])
        given = [base, *operands[1:]] if first else [operands[0], base, *operands[2:]]
        if name == "ld" and extra[0] == "param":
            self._put(made, "ldparam", extra[-1], operands[0])
            if made.count > 1:
                raise ValueError("several numbers of a parameter")
            made.offset += self._parameters[base]
        elif name in ("ld", "st"):
            if extra[0] not in ("global", "shared"):
                raise ValueError(f"memory of another kind: {extra[0]}")
            self._put(made, name + ("s" if extra[0] == "shared" else ""), extra[-1], *given)
        elif name in ("atom", "red"):
            self._put(made, "atom", extra[-1], *given)
            made.mode = next(SUMS[x] for x in extra if x in SUMS)
        else:
            self._put(made, name, "b16", *given)
            made.mode = int("trans" in extra)

    def _copy(self, made: Instruction, extra: list[str], operands: list[str]) -> None:
        if extra[1] in ("commit_group", "wait_group"):
            self._put(made, extra[1].partition("_")[0], "b32")
            made.count, made.mode = 0, int(operands[0]) if operands else 0
            return
        if extra[1] not in ("ca", "cg"):
            raise ValueError(f"a copy of another kind: {extra[1]}")
        (to, made.mode), (start, made.offset) = map(_address, operands[:2])
        self._put(made, "copy", "b32", to, start, *operands[2:])

    def _computation(self, made: Instruction, name: str, extra: list[str], operands: list[str]) -> None:
        kind, vectors = extra[-1], [x for x in operands if x.startswith("{")]
        if name == "mma":
            shape, (_, left, right, _) = extra[2], extra[5:]
            if extra[3:5] != ["row", "col"] or left != right or shape not in ("m16n8k8", "m16n8k16"):
                raise ValueError("a product of another shape")
            self._put(made, name, extra[5], *operands)
            made.source, made.mode = self._number(left, True), int(shape.partition("k")[2])
        elif name == "mov" and vectors:
            self._put(made, "unpack" if operands[0] in vectors else "pack", kind, *operands)
            made.mode = 8 * SIZES.get(kind, 4) // (vectors[0].count(",") + 1)
        elif name == "setp":
            self._put(made, name, kind, *operands[0].split("|"), *operands[1:])
            made.mode = COMPARISONS[extra[0]]
            if len(operands) != 3:
                raise ValueError("a comparison with a predicate")
        elif name == "shfl":
            result, _, reached = operands[0].partition("|")
            self._put(made, name, kind, result, *operands[1:], *([reached] if reached else []))
            made.mode = SHUFFLES[extra[1]]
        elif name == "cvt":
            self._put(made, name, extra[-2], *operands)
            made.source = self._number(kind, True)
            made.mode = next((ROUNDINGS[x] for x in extra if x in ROUNDINGS), 0)
        else:
            self._put(made, "mov" if name == "cvta" else name, kind, *operands)
            wide = int("hi" in extra) + 2 * int("wide" in extra)
            made.mode = SUMS[extra[1]] if name == "redux" else wide or int("NaN" in extra)
