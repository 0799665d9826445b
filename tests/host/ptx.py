"""Runs PTX, what NVRTC makes of CUDA C++, without a GPU: the instructions that impl/fused.cu comes to, by their
description in NVIDIA's PTX ISA, on all threads of a block at once.

What a GPU would fault at is an error here: an address outside of the tensors, of shared memory or not a multiple of
what is read there, a warp that has parted where its lanes must be together. Threads go by the least place in the code,
so lanes that parted meet again. A copy into shared memory lands at once or when it is waited for, by chance.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pladis_core.impl import cuda_driver

BITS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
KINDS = {
    **{f"{letter}{size}": kind for size, kind in BITS.items() for letter in "ub"},
    "s16": np.int16, "s32": np.int32, "s64": np.int64, "f32": np.float32, "pred": np.bool_,
}  # fmt: skip
REGISTERS = {"%p": np.bool_, "%rs": np.uint16, "%r": np.uint32, "%rd": np.uint64, "%f": np.float32}
COMPARE = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
           "ge": np.greater_equal}  # fmt: skip
ARITHMETIC = {"add": np.add, "sub": np.subtract, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
# of address spaces: a tensor has so many bytes of its own, and so has a parameter
TENSOR, PARAMETER = 32, 12
LANES = np.arange(32)


def ptx_of(text: str, name: str, architecture: int, options: Sequence[str]) -> str:
    """What NVRTC makes of CUDA C++."""
    nvrtc = cuda_driver._library(cuda_driver._compilers())
    flags = [flag.encode() for flag in (f"--gpu-architecture=compute_{architecture}", "--ftz=true", *options)]
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
    assert nvrtc.nvrtcCompileProgram(program, len(flags), (ctypes.c_char_p * len(flags))(*flags)) == 0
    return cuda_driver._sized(nvrtc, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program).decode().rstrip("\0")


class Fault(Exception):
    """What would end a process on a GPU."""


def instructions(text: str) -> tuple[list[tuple[str, str, list[str]]], dict[str, int]]:
    """(guard, operation, operands) of the one kernel, and the places of labels."""
    body = text[text.index("{", text.index(".entry")) :]
    code, labels = [], {}
    body = re.sub(r"//[^\n]*", "", body)
    for statement in re.split(r";|(?<=:)\s", body):
        statement = statement.strip().lstrip("{} \n\t").strip()
        if re.fullmatch(r"[$\w]+:", statement):
            labels[statement[:-1]] = len(code)
        elif statement and not statement.startswith((".reg", ".pragma")):
            match = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.:]+)\s*(.*)", statement, re.S)
            assert match, statement
            guard, operation, operands = match.groups()
            code.append((guard or "", operation, re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^\s,]+", operands)))
    return code, labels


class Block:
    """A block of threads. parameters: bytes of each; tensors: bytes that addresses 1 << 32, 2 << 32, ... begin."""

    def __init__(self, code, labels, index, threads, parameters, tensors, shared_bytes, drawn) -> None:
        self._code, self._labels, self._drawn = code, labels, drawn
        self._count, self._parameters, self._tensors = threads, parameters, tensors
        self._shared = np.full(shared_bytes, 0xFF, np.uint8)
        self._registers: dict[str, np.ndarray] = {}
        self._special = {"%tid.x": np.arange(threads, dtype=np.uint32), "%ctaid.x": np.uint32(index)}
        self._copies: list[list[tuple]] = [[]]
        self._barrier = np.full(threads, -1)
        self._place = np.zeros(threads, np.int64)
        self._done = np.zeros(threads, bool)
        self._operations: dict[str, Callable] = {}

    def run(self) -> None:
        while not self._done.all():
            ready = ~self._done & (self._barrier < 0)
            if not ready.any():
                raise Fault("threads wait for each other in vain")
            place = self._place[ready].min()
            active = ready & (self._place == place)
            guard, operation, operands = self._code[place]
            self._place[active] = place + 1
            if guard:
                active = active & (self._read(guard.lstrip("!"), np.bool_) ^ guard.startswith("!"))
            if active.any():
                self._active, self._all = active, bool(active.all())
                with np.errstate(all="ignore"):
                    self._do(operation, operands)

    # operands

    def _read(self, name: str, kind) -> np.ndarray:
        """(threads,) of a register, a number or an address."""
        if name in self._special:
            found = np.broadcast_to(self._special[name], self._count)
        elif name in self._registers:
            found = self._registers[name]
        elif name.startswith("0f"):
            found = np.full(self._count, np.uint32(int(name[2:], 16))).view(np.float32)
        elif re.fullmatch(r"-?\d+", name):
            bits = np.dtype(kind).itemsize * 8
            found = np.full(self._count, int(name) % (1 << bits), BITS[str(max(bits, 8))])
        elif name == "memory":
            found = np.zeros(self._count, kind)
        else:
            found = np.full(self._count, np.uint64(int(name.rsplit("_", 1)[1]) << PARAMETER))
        return found if found.dtype == kind else found.view(kind)

    def _write(self, name: str, value: np.ndarray) -> None:
        if name == "_":
            return
        kind = next((kind for start, kind in REGISTERS.items() if re.fullmatch(start + r"\d+", name)), np.uint16)
        value = np.asarray(value)
        value = value if value.dtype == kind else value.view(kind)
        if self._all:
            self._registers[name] = np.broadcast_to(value, self._count).copy()
        else:
            before = self._registers.get(name)
            self._registers[name] = np.where(self._active, value, np.zeros(1, kind) if before is None else before)

    def _addresses(self, operand: str, kind=np.uint64) -> np.ndarray:
        name, offset = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", operand).groups()
        return (self._read(name, kind).astype(np.int64) + int(offset or 0)).astype(np.uint64)

    def _bytes(self, memory: np.ndarray, at: np.ndarray, size: int, what: str) -> np.ndarray:
        """(threads, size) places in `memory`, checked where a thread takes part."""
        at = at.astype(np.int64)
        if (at[self._active] % size).any():
            raise Fault(f"an address of {what} is no multiple of {size}")
        if (at[self._active] < 0).any() or (at[self._active] + size > len(memory)).any():
            raise Fault(f"an address is outside of {what}")
        return np.where(self._active, at, 0)[:, None] + np.arange(size)

    def _global(self, at: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each tensor that is addressed: who does, and the places."""
        found, everyone = [], self._active
        which = at >> np.uint64(TENSOR)
        for tensor in np.unique(which[everyone]):
            if not 0 < tensor <= len(self._tensors) or self._tensors[int(tensor) - 1] is None:
                raise Fault("an address is of no tensor")
            self._active = everyone & (which == tensor)
            memory = self._tensors[int(tensor) - 1]
            places = self._bytes(memory, at & np.uint64((1 << TENSOR) - 1), size, f"tensor {int(tensor)}")
            found.append((memory, places, self._active))
        self._active = everyone
        return found

    def _load(self, space: str, operand: str, size: int) -> np.ndarray:
        """(threads, size) bytes."""
        if space == "param":
            at = self._addresses(operand)
            parameter = self._parameters[int(at[0]) >> PARAMETER]
            places = self._bytes(parameter, at & np.uint64((1 << PARAMETER) - 1), size, "a parameter")
            return parameter[places]
        if space == "shared":
            return self._shared[self._bytes(self._shared, self._addresses(operand), size, "shared memory")]
        loaded = np.zeros((self._count, size), np.uint8)
        for memory, places, who in self._global(self._addresses(operand), size):
            loaded[who] = memory[places[who]]
        return loaded

    def _store(self, space: str, operand: str, value: np.ndarray) -> None:
        size = value.shape[1]
        if space == "shared":
            places = self._bytes(self._shared, self._addresses(operand), size, "shared memory")
            self._shared[places[self._active]] = value[self._active]
            return
        for memory, places, who in self._global(self._addresses(operand), size):
            memory[places[who]] = value[who]

    # instructions

    def _do(self, operation: str, operands: list[str]) -> None:
        name, *how = operation.split(".")
        kind = KINDS.get(how[-1]) if how else None
        special = getattr(self, f"_{name}", None)
        if special is not None:
            special(how, kind, operands)
            return
        target, *sources = operands
        if how[-1] == "f16x2":
            pairs = [halves(self._read(source, np.uint32), "f16") for source in sources]
            self._write(target, self._of_halves(name, how, pairs))
            return
        values = [self._read(source, kind) for source in sources]
        if kind is np.float32:
            result = self._of_floats(name, how, values)
        elif kind is np.bool_:
            result = ~values[0] if name == "not" else ARITHMETIC[name](*values)
        else:
            result = self._of_integers(name, how, values, kind)
        self._write(target, result)

    def _of_floats(self, name: str, how: list[str], values: list[np.ndarray]) -> np.ndarray:
        x, wide = values[0], [value.astype(np.float64) for value in values]
        if name == "add" and "rz" in how:
            exact = wide[0] + wide[1]
            result = exact.astype(np.float32)
            result = np.where(np.abs(result) > np.abs(exact), np.nextafter(result, np.float32(0)), result)
        elif name in ("add", "sub"):
            result = ARITHMETIC[name](*values)
        elif name == "mul":
            result = x * values[1]
        elif name == "fma":
            result = (wide[0] * wide[1] + wide[2]).astype(np.float32)
        elif name in ("max", "min"):
            of_numbers, of_any = (np.fmax, np.maximum) if name == "max" else (np.fmin, np.minimum)
            result = (of_any if "NaN" in how else of_numbers)(*values)
        elif name in ("abs", "neg"):
            return np.abs(x) if name == "abs" else -x
        elif name == "div":
            result = x / values[1]
        elif name == "rcp":
            result = np.float32(1) / x
        else:
            result = {"ex2": np.exp2, "lg2": np.log2, "sqrt": np.sqrt}[name](flushed(x))
        if "sat" in how:
            result = np.where(np.isnan(result), np.float32(0), np.clip(result, 0, 1))
        return (flushed(result) if "ftz" in how else result).astype(np.float32)

    def _of_halves(self, name: str, how: list[str], pairs: list[np.ndarray]) -> np.ndarray:
        """Registers of two float16 numbers, of (threads, 2) numbers each."""
        x, y, *added = (pair.astype(np.float64) for pair in pairs)
        if name == "set":
            result = COMPARE[how[0]](x, y).astype(np.float64)
        else:
            # exact, and rounded once
            result = {"fma": lambda: x * y + added[0], "add": lambda: x + y}[name]()
        if "sat" in how:
            result = np.where(np.isnan(result), 0.0, np.clip(result, 0.0, 1.0))
        return np.ascontiguousarray(result.astype(np.float16)).view(np.uint32).reshape(-1)

    def _of_integers(self, name: str, how: list[str], values: list[np.ndarray], kind) -> np.ndarray:
        if name in ARITHMETIC:
            return ARITHMETIC[name](*values)
        if name in ("min", "max"):
            return (np.minimum if name == "min" else np.maximum)(*values)
        if name in ("div", "rem"):
            # towards zero, as integers in C
            quotient = (values[0].astype(np.float64) / values[1].astype(np.float64)).astype(np.int64)
            return (quotient if name == "div" else values[0].astype(np.int64) - quotient * values[1]).astype(kind)
        if name in ("mul", "mad"):
            product = values[0].astype(np.int64) * values[1].astype(np.int64)
            if how[0] == "hi":
                product >>= 32
            if how[0] == "wide":
                wider = {np.uint16: np.uint32, np.int32: np.int64, np.uint32: np.uint64}[kind]
                return product.astype(wider)
            return (product + (values[2].astype(np.int64) if name == "mad" else 0)).astype(kind)
        raise NotImplementedError(name)

    def _shl(self, how, kind, operands):
        self._write(operands[0], self._read(operands[1], kind) << self._read(operands[2], np.uint32).astype(kind))

    def _shr(self, how, kind, operands):
        self._write(operands[0], self._read(operands[1], kind) >> self._read(operands[2], np.uint32).astype(kind))

    def _bfi(self, how, kind, operands):
        target, *rest = operands
        bits, into, first, length = (self._read(operand, np.uint32) for operand in rest)
        mask = ((np.uint32(1) << length) - np.uint32(1)) << first
        self._write(target, (into & ~mask) | ((bits << first) & mask))

    def _mov(self, how, kind, operands):
        target, source = operands
        if source.startswith("{"):
            low, high = (self._read(name, np.uint16).astype(np.uint32) for name in parts(source))
            self._write(target, low | high << np.uint32(16))
        else:
            self._write(target, self._read(source, kind))

    def _cvta(self, how, kind, operands):
        self._write(operands[0], self._read(operands[1], np.uint64))

    def _cvt(self, how, kind, operands):
        target, *sources = operands
        to, source = how[-2], self._read(sources[0], kind)
        if to in ("f16x2", "bf16x2"):
            # the first source goes into the upper half
            high, low = (sixteen(self._read(name, np.float32), to[:-2], "satfinite" in how) for name in sources)
            self._write(target, low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16))
        elif to == "f16":
            self._write(target, sixteen(source, to, False))
        elif to == "f32":
            self._write(target, np.rint(source).astype(np.float32) if "rni" in how else source.astype(np.float32))
        else:
            self._write(target, source.astype(KINDS[to]))

    def _setp(self, how, kind, operands):
        target, x, y = operands
        x, y, compare = self._read(x, kind), self._read(y, kind), how[0]
        if compare == "nan":
            found = np.isnan(x) | np.isnan(y)
        elif compare[:2] in COMPARE and compare[2:] == "u":
            found = COMPARE[compare[:2]](x, y) | np.isnan(x) | np.isnan(y)
        else:
            found = COMPARE[compare](x, y)
        self._write(target, found)

    def _selp(self, how, kind, operands):
        target, x, y, which = operands
        self._write(target, np.where(self._read(which, np.bool_), self._read(x, kind), self._read(y, kind)))

    def _bra(self, how, kind, operands):
        self._place[self._active] = self._labels[operands[0]]

    def _ret(self, how, kind, operands):
        self._done |= self._active

    def _ld(self, how, kind, operands):
        targets = parts(operands[0])
        size = np.dtype(kind).itemsize
        loaded = self._load(how[0], operands[1], size * len(targets))
        for i, target in enumerate(targets):
            value = np.ascontiguousarray(loaded[:, i * size : (i + 1) * size]).view(kind)[:, 0]
            wanted = REGISTERS[re.match(r"%[a-z]+", target)[0]]
            self._write(target, value if value.dtype.itemsize == np.dtype(wanted).itemsize else value.astype(wanted))

    def _st(self, how, kind, operands):
        values = [self._read(source, kind)[:, None].view(np.uint8) for source in parts(operands[1])]
        self._store(how[0], operands[0], np.concatenate(values, 1))

    def _cp(self, how, kind, operands):
        if how[1] == "commit_group":
            self._copies.append([])
            return
        if how[1] == "wait_group":
            while len(self._copies) > 1 + int(operands[0]):
                for where, copied in self._copies.pop(0):
                    self._shared[where] = copied
            return
        to, source, size, there = operands
        assert size == "16"
        everyone, inside = self._active, self._read(there, np.uint32) == 16
        where = self._bytes(self._shared, self._addresses(to, np.uint32), 16, "shared memory")[everyone]
        copied = np.zeros((self._count, 16), np.uint8)
        # what is not inside is not read
        self._active = everyone & inside
        for memory, places, who in self._global(self._addresses(source), 16):
            copied[who] = memory[places[who]]
        self._active = everyone
        if self._drawn.integers(2):
            self._shared[where] = copied[everyone]
        else:
            self._copies[-1].append((where, copied[everyone]))

    def _bar(self, how, kind, operands):
        number = int(self._read(operands[0], np.uint32)[self._active][0])
        numbers = self._read(operands[0], np.uint32)
        count = self._read(operands[1], np.uint32) if len(operands) > 1 else np.full(self._count, self._count)
        self._barrier[self._active] = numbers[self._active]
        for number in np.unique(numbers[self._active]):
            waiting = self._barrier == number
            if waiting.sum() == count[waiting][0]:
                self._barrier[waiting] = -1

    def _warps(self, value: np.ndarray) -> np.ndarray:
        """(warps, 32, ...): of those that are here, each with all of its lanes."""
        together = self._active.reshape(-1, 32)
        if (together.any(1) != together.all(1)).any():
            raise Fault("a warp has parted where its lanes must be together")
        return value.reshape(-1, 32, *value.shape[1:])

    def _shfl(self, how, kind, operands):
        target, source, lanes, *_ = operands
        value, others = (self._warps(self._read(name, np.uint32)) for name in (source, lanes))
        self._write(target.split("|")[0], np.take_along_axis(value, LANES ^ others, 1).reshape(-1))

    def _vote(self, how, kind, operands):
        target, source, *_ = operands
        value = self._read(source.lstrip("!"), np.bool_) ^ source.startswith("!")
        self._write(target, np.repeat(self._warps(value).any(1), 32))

    def _ldmatrix(self, how, kind, operands):
        targets = parts(operands[0])
        rows = self._shared[self._bytes(self._shared, self._addresses(operands[1], np.uint32), 16, "shared memory")]
        matrices = self._warps(rows.view(np.uint16)).reshape(-1, 4, 8, 8)
        for matrix, target in enumerate(targets):
            of = matrices[:, matrix]
            of = of.transpose(0, 2, 1) if "trans" in how else of
            # lane l: row l / 4, columns 2 (l % 4) and one more
            self._write(target, np.ascontiguousarray(of).reshape(-1, 64).view(np.uint32).reshape(-1))

    def _mma(self, how, kind, operands):
        targets, a, b, c = (parts(operand) for operand in operands)
        wide, dtype = how[2] == "m16n8k16", how[6]
        depth = 16 if wide else 8
        left, right = np.zeros((self._count // 32, 16, depth)), np.zeros((self._count // 32, depth, 8))
        row, pair = LANES // 4, LANES % 4 * 2
        for register, name in enumerate(a):
            both = self._warps(halves(self._read(name, np.uint32), dtype))
            for half in range(2):
                left[:, row + 8 * (register % 2), pair + half + 8 * (register // 2)] = both[:, :, half]
        for register, name in enumerate(b):
            both = self._warps(halves(self._read(name, np.uint32), dtype))
            for half in range(2):
                right[:, pair + half + 8 * register, row] = both[:, :, half]
        product = left @ right
        for register, (target, name) in enumerate(zip(targets, c, strict=True)):
            added = product[:, row + 8 * (register // 2), pair + register % 2].reshape(-1)
            self._write(target, (self._read(name, np.float32) + added).astype(np.float32))


def parts(operand: str) -> list[str]:
    return re.findall(r"[%\w]+", operand)


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < np.float32(1.17549435e-38), np.float32(0), x)


def sixteen(x: np.ndarray, dtype: str, saturated: bool) -> np.ndarray:
    """The bits of float16 or bfloat16."""
    kind = torch.float16 if dtype == "f16" else torch.bfloat16
    largest = torch.finfo(kind).max
    numbers = torch.from_numpy(np.ascontiguousarray(x))
    numbers = numbers.clamp(-largest, largest) if saturated else numbers
    return numbers.to(kind).view(torch.int16).numpy().view(np.uint16)


def halves(registers: np.ndarray, dtype: str) -> np.ndarray:
    """(threads, 2): the numbers in registers of two."""
    kind = torch.float16 if dtype == "f16" else torch.bfloat16
    bits = np.ascontiguousarray(registers).view(np.int16).reshape(-1, 2)
    return torch.from_numpy(bits.copy()).view(kind).float().numpy()


def launch(
    code, labels, blocks: int, threads: int, tensors: Sequence[torch.Tensor | None], sizes: bytes, shared_bytes: int
) -> None:
    """A kernel that takes the addresses of `tensors`, and `sizes`.

    Raises:
        Fault: it does what a GPU does not allow.
    """
    memory = [None if t is None else torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()) for t in tensors]
    addresses = [
        0 if t is None else (i + 1 << TENSOR) + t.storage_offset() * t.element_size() for i, t in enumerate(tensors)
    ]
    parameters = [np.array([address], np.uint64).view(np.uint8) for address in addresses]
    parameters.append(np.frombuffer(sizes, np.uint8))
    drawn = np.random.default_rng(0)
    for block in range(blocks):
        bytes_of = [None if t is None else t.numpy() for t in memory]
        Block(code, labels, block, threads, parameters, bytes_of, shared_bytes, drawn).run()
