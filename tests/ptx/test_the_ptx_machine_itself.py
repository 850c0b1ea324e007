"""The machine that runs PTX on the CPU: one instruction at a time against the PTX manual, and what it has to refuse."""

import ctypes
import functools
import itertools
import math
import re
import shutil
import struct
import subprocess
from fractions import Fraction

import numpy as np
import pytest
from ptx import build, translate

pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")

HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n.extern .shared .align 16 .b8 memory[];\n"
REGISTERS = (
    "\n".join(f".reg .b{n} {', '.join(f'%{x}{n}' for x in 'abcdxyzw')};" for n in (16, 32, 64))
    + "\n.reg .pred %p, %q;\n.reg .b64 %in, %out, %at;\n.reg .b32 %t, %s;\n.reg .b32 %m<16>;"
)
SHARED = "mov.u32 %s, memory;\n"


def entry(name, body, after=""):
    """A kernel whose threads have four numbers of 64 bits, a to d, and give one, x. %t: the thread, of all blocks."""
    return f"""
.visible .entry {name}(.param .u64 pin, .param .u64 pout) {{
{REGISTERS}
ld.param.u64 %in, [pin];
ld.param.u64 %out, [pout];
mov.u32 %a32, %ctaid.x;
mov.u32 %b32, %ntid.x;
mov.u32 %t, %tid.x;
mad.lo.u32 %t, %a32, %b32, %t;
mul.wide.u32 %at, %t, 32;
add.u64 %in, %in, %at;
mul.wide.u32 %at, %t, 8;
add.u64 %out, %out, %at;
ld.global.v2.b64 {{%a64, %b64}}, [%in];
ld.global.v2.b64 {{%c64, %d64}}, [%in+16];
{"".join(f"cvt.u32.u64 %{x}32, %{x}64;{chr(10)}cvt.u16.u64 %{x}16, %{x}64;{chr(10)}" for x in "abcd")}
mov.u64 %x64, 0;
mov.u32 %x32, 0;
{body}
{after}
st.global.b64 [%out], %x64;
ret;
}}
"""


def widen(text):
    """What brings the result of an instruction that writes %x32, %x16 or %p to %x64."""
    written = text.split()[1].rstrip(",")
    return {
        "%x64": "",
        "%x32": "cvt.u64.u32 %x64, %x32;",
        "%x16": "cvt.u64.u16 %x64, %x16;",
        "%p": "selp.b64 %x64, 1, 0, %p;",
    }[written]


# --------------------------------------------------------------------------------------------- numbers and their bits


def f32(bits):
    return np.uint32(bits & 0xFFFFFFFF).view(np.float32)


def f64(bits):
    return np.uint64(bits).view(np.float64)


def bits32(x):
    return int(np.float32(x).view(np.uint32))


def bits64(x):
    return int(np.float64(x).view(np.uint64))


def signed(x, n):
    x &= (1 << n) - 1
    return x - (1 << n) if x >> (n - 1) else x


def rounded(x, fraction, least, most, how="even"):
    """A finite Fraction that is not zero, rounded to so many bits of fraction, with exponents from least to most."""
    e = max(math.floor(math.log2(abs(x))), least)
    e += 1 if abs(x) >= Fraction(2) ** (e + 1) else -1 if e > least and abs(x) < Fraction(2) ** e else 0
    unit = Fraction(2) ** (e - fraction)
    q = x / unit
    if how == "even":
        n = round(q)
    elif how == "down":
        n = math.floor(q)
    else:  # nearest, ties away from zero
        n = math.floor(abs(q) + Fraction(1, 2)) * (1 if q > 0 else -1)
    if abs(n * unit) >= Fraction(2) ** (most + 1):
        if how == "down" and x > 0:
            return float((2 - Fraction(2) ** -fraction) * Fraction(2) ** most)
        return math.copysign(math.inf, x)
    return float(n * unit) if n else math.copysign(0.0, x)


F32, F16, BF16 = (23, -126, 127), (10, -14, 15), (7, -126, 127)


def to_f16(bits):
    x = f32(bits)
    if not np.isfinite(x) or x == 0:
        return 0x7FFF if np.isnan(x) else int(np.float16(x).view(np.uint16))
    return struct.unpack("H", struct.pack("e", rounded(Fraction(float(x)), *F16)))[0]


def to_bf16(bits):
    x = f32(bits)
    if not np.isfinite(x) or x == 0:
        return 0x7FFF if np.isnan(x) else (bits & 0xFFFFFFFF) >> 16
    return bits32(rounded(Fraction(float(x)), *BF16)) >> 16


def fma(a, b, c, fmt, how="even"):
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    return rounded(exact, *fmt, how) if exact else None


def to_int(bits, n, is_signed, how):
    x = float(f32(bits))
    if math.isnan(x):
        return (1 << 63) if n == 64 else 0
    low, high = (-(1 << n - 1), (1 << n - 1) - 1) if is_signed else (0, (1 << n) - 1)
    if math.isinf(x):
        return (high if x > 0 else low) & ((1 << n) - 1)
    whole = {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}[how](Fraction(x))
    return min(max(whole, low), high) & ((1 << n) - 1)


NAN = object()  # any NaN


def ieee(f, view, bits, *operands):
    with np.errstate(all="ignore"):
        y = f(*(view(x) for x in operands))
    return NAN if np.isnan(y) else bits(y)


def smaller(a, b, view, bits, largest=False):
    """min and max of the manual: of a number and NaN the number, -0 below +0."""
    x, y = view(a), view(b)
    if np.isnan(x) or np.isnan(y):
        return NAN if np.isnan(x) and np.isnan(y) else bits(y if np.isnan(x) else x)
    key = lambda v: (float(v), not np.signbit(v))  # noqa: E731
    return bits((max if largest else min)(x, y, key=key))


# ------------------------------------------------------------------------------------ instructions of a single thread

M32, M64 = (1 << 32) - 1, (1 << 64) - 1
INTS = [0, 1, 2, 7, 31, 32, 33, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF, 0x12345678, 0xDEADBEEF]
LONGS = [*INTS, 1 << 63, (1 << 63) - 1, M64, 0x0123456789ABCDEF, M64 - 5]
SHIFTS = [0, 1, 5, 16, 31, 32, 33, 63, 64, 65, 255, 256, 0x80000000, M32]
SINGLES = [
    *(bits32(x) for x in (0.0, -0.0, 1.0, -1.5, 0.1, 3.14159265, 1e-40, -3e-45, 3.4e38, -3.4e38, 65504, 65519.996)),
    *(bits32(x) for x in (65520.0, 6e-8, 2.98e-8, 2.0**-24, 6.1e-5, 0.5, 1.5, 2.5, -2.5, 2.0**31, -(2.0**31), 2.0**63)),
    *(bits32(x) for x in (np.inf, -np.inf, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 4.3e9)),
    *(0x7F800001, 0x7FFFFFFF, 0xFFC00000, 0x3F7FFFFF, 0x3F801000, 0x3F802FFF, 0x477FEFFF),
]  # ties of bfloat16, half and tf32 among them; NaN with several payloads
DOUBLES = [bits64(x) for x in (0.0, -0.0, 1.0, -1.5, 0.1, 1 / 3, 1e308, -1e-310, np.inf, -np.inf, np.nan, 1e-45, 3e38)]
BYTES = [0x00112233, 0x8899AABB, 0x7F80FF01]
FEW = [bits32(x) for x in (0.1, -0.3, 1 + 2.0**-23, 1 - 2.0**-24, 3e7, -7.7e-9, 1e-20, -1e20)]

CASES = {}  # the instruction -> (what the manual says, the operands' values)


def case(text, expected, *values):
    CASES[text] = expected, [dict.fromkeys(v) for v in values]


for n, values in ((32, INTS), (64, LONGS)):
    mask = (1 << n) - 1
    two = values, values
    r = f"%x{n}, %a{n}, %b{n}"
    for sign, t in (("u", f"u{n}"), ("s", f"s{n}")):
        number = (lambda x, n=n: signed(x, n)) if sign == "s" else (lambda x, n=n: x & ((1 << n) - 1))
        case(f"add.{t} {r}", lambda a, b: a + b, *two)
        case(f"sub.{t} {r}", lambda a, b: a - b, *two)
        case(f"mul.lo.{t} {r}", lambda a, b: a * b, *two)
        case(f"mul.hi.{t} {r}", lambda a, b, v=number, n=n: v(a) * v(b) >> n, *two)
        case(f"mad.lo.{t} {r}, %c{n}", lambda a, b, c: a * b + c, *two, [3, mask])
        case(f"min.{t} {r}", lambda a, b, v=number: min(v(a), v(b)), *two)
        case(f"max.{t} {r}", lambda a, b, v=number: max(v(a), v(b)), *two)
        # Toward zero, and the remainder has the sign of a.
        quotient = lambda a, b, v=number: abs(v(a)) // abs(v(b)) * (1 if (v(a) < 0) == (v(b) < 0) else -1)  # noqa: E731
        case(f"div.{t} {r}", quotient, values, [x for x in values if x])
        rest = lambda a, b, v=number, q=quotient: v(a) - v(b) * q(a, b)  # noqa: E731
        case(f"rem.{t} {r}", rest, values, [x for x in values if x])
        case(f"shr.{t} %x{n}, %a{n}, %b32", lambda a, b, v=number: v(a) >> (b & M32), values, SHIFTS)
        for name, compare in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">="), ("eq", "=="), ("ne", "!=")):
            holds = eval(f"lambda a, b, v: v(a) {compare} v(b)")
            case(f"setp.{name}.{t} %p, %a{n}, %b{n}", lambda a, b, v=number, f=holds: f(a, b, v), *two)
    case(f"neg.s{n} %x{n}, %a{n}", lambda a: -a, values)
    case(f"abs.s{n} %x{n}, %a{n}", lambda a, n=n: abs(signed(a, n)), values)
    case(f"shl.b{n} %x{n}, %a{n}, %b32", lambda a, b: a << min(b & M32, 64), values, SHIFTS)
    case(f"and.b{n} {r}", lambda a, b: a & b, *two)
    case(f"or.b{n} {r}", lambda a, b: a | b, *two)
    case(f"xor.b{n} {r}", lambda a, b: a ^ b, *two)
    case(f"not.b{n} %x{n}, %a{n}", lambda a: ~a, values)
    case(f"popc.b{n} %x32, %a{n}", lambda a, m=mask: bin(a & m).count("1"), values)
    case(f"clz.b{n} %x32, %a{n}", lambda a, n=n, m=mask: n - (a & m).bit_length(), values)
    case(f"brev.b{n} %x{n}, %a{n}", lambda a, n=n: int(f"{a & ((1 << n) - 1):0{n}b}"[::-1], 2), values)
case("mul.wide.u32 %x64, %a32, %b32", lambda a, b: a * b, INTS, INTS)
case("mul.wide.s32 %x64, %a32, %b32", lambda a, b: signed(a, 32) * signed(b, 32), INTS, INTS)
case("mad.wide.u32 %x64, %a32, %b32, %c64", lambda a, b, c: a * b + c, INTS, INTS, [5, M64])
case("mad.wide.s32 %x64, %a32, %b32, %c64", lambda a, b, c: signed(a, 32) * signed(b, 32) + c, INTS, INTS, [5, M64])
case("bfind.u32 %x32, %a32", lambda a: (a & M32).bit_length() - 1, INTS)
case("bfind.shiftamt.u32 %x32, %a32", lambda a: 32 - a.bit_length() if a else M32, INTS)
for lo in ("lo", "ls", "hi", "hs"):
    text = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}[lo]
    case(f"setp.{lo}.u32 %p, %a32, %b32", eval(f"lambda a, b: a {text} b"), INTS, INTS)


def funnel(a, b, c, left, clamp):
    n = min(c, 32) if clamp else c & 31
    pair = b << 32 | a
    return (pair << n) >> 32 if left else pair >> n


for side, how in itertools.product("lr", ("wrap", "clamp")):
    f = lambda a, b, c, s=side, h=how: funnel(a, b, c, s == "l", h == "clamp")  # noqa: E731
    case(f"shf.{side}.{how}.b32 %x32, %a32, %b32, %c32", f, BYTES, BYTES, SHIFTS)


def permuted(a, b, selector):
    together = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    out = 0
    for i in range(4):
        s = selector >> 4 * i & 15
        byte = together[s & 7]
        out |= (byte if s < 8 else 255 * (byte >> 7)) << 8 * i  # the highest bit of a selector: the byte's sign
    return out


case(
    "prmt.b32 %x32, %a32, %b32, %c32", permuted, BYTES, BYTES, [0x3210, 0x7654, 0x5410, 0xFEDC, 0x89AB, 0x0123, 0x9180]
)
for table in (0x96, 0xEA, 0xF8, 0x01, 0xB8):  # the table is the function of the constants 0xF0, 0xCC, 0xAA
    f = lambda a, b, c, t=table: sum(  # noqa: E731
        (t >> ((a >> i & 1) * 4 + (b >> i & 1) * 2 + (c >> i & 1)) & 1) << i for i in range(32)
    )
    case(f"lop3.b32 %x32, %a32, %b32, %c32, {table}", f, BYTES, INTS, INTS)


def extracted(a, position, length, n, is_signed):
    position, length = position & 255, length & 255
    out = (a & ((1 << n) - 1)) >> position & ((1 << length) - 1)
    if is_signed and length and a >> min(position + length - 1, n - 1) & 1:
        out |= -1 << max(0, min(length, n - position))
    return out


def inserted(a, b, position, length):
    position, length = position & 255, length & 255
    mask = ((1 << length) - 1) << position
    return (b & ~mask) | (a << position & mask)


FIELDS = [0, 1, 4, 8, 31, 32, 33, 64, 256, 260]
for t in ("u32", "s32", "u64", "s64"):
    n = int(t[1:])
    f = lambda a, b, c, n=n, s=t[0] == "s": extracted(a, b, c, n, s)  # noqa: E731
    case(f"bfe.{t} %x{n}, %a{n}, %b32, %c32", f, [*BYTES, M32], FIELDS, FIELDS)
case("bfi.b32 %x32, %a32, %b32, %c32, %d32", inserted, BYTES, [0, M32], FIELDS, FIELDS)

# Floating point: rounded to nearest even unless the instruction says otherwise; subnormal numbers are kept.
for t, view, bits, values in (("f32", f32, bits32, SINGLES), ("f64", f64, bits64, DOUBLES)):
    n = int(t[1:])
    r = f"%x{n}, %a{n}, %b{n}"
    for name, f in (("add.rn", np.add), ("sub.rn", np.subtract), ("mul.rn", np.multiply), ("div.rn", np.divide)):
        case(f"{name}.{t} {r}", lambda a, b, o=(f, view, bits): ieee(*o, a, b), values, values)
    case(f"sqrt.rn.{t} %x{n}, %a{n}", lambda a, o=(np.sqrt, view, bits): ieee(*o, a), values)
    case(f"rcp.rn.{t} %x{n}, %a{n}", lambda a, o=(np.reciprocal, view, bits): ieee(*o, a), values)
    for name in ("min", "max"):
        f = lambda a, b, o=(view, bits, name == "max"): smaller(a, b, *o)  # noqa: E731
        case(f"{name}.{t} {r}", f, values, values)
    case(f"neg.{t} %x{n}, %a{n}", lambda a, n=n: a ^ 1 << (n - 1), [x for x in values if not np.isnan(view(x))])
    case(f"abs.{t} %x{n}, %a{n}", lambda a, n=n: a & ~(1 << (n - 1)), [x for x in values if not np.isnan(view(x))])
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        sign = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}[name]
        for u in ("", "u"):  # without u, a comparison with NaN is false, ne too
            f = eval(f"lambda a, b, v, u: u if v(a) != v(a) or v(b) != v(b) else v(a) {sign} v(b)")
            f = lambda a, b, v=view, u=u, f=f: bool(f(a, b, v, bool(u)))  # noqa: E731
            case(f"setp.{name}{u}.{t} %p, %a{n}, %b{n}", f, values, values)
    nan = lambda a, b, v=view: bool(np.isnan(v(a)) or np.isnan(v(b)))  # noqa: E731
    case(f"setp.nan.{t} %p, %a{n}, %b{n}", nan, values, values)
    case(f"setp.num.{t} %p, %a{n}, %b{n}", lambda a, b, f=nan: not f(a, b), values, values)
case("fma.rn.f32 %x32, %a32, %b32, %c32", lambda a, b, c: bits32(fma(f32(a), f32(b), f32(c), F32)), FEW, FEW, FEW)
case(
    "fma.rm.f32 %x32, %a32, %b32, %c32", lambda a, b, c: bits32(fma(f32(a), f32(b), f32(c), F32, "down")), FEW, FEW, FEW
)
FINE = [bits64(x) for x in (0.1, -0.3, 1 + 2.0**-52, 1 - 2.0**-53, -1e-17, 3e7)]
case(
    "fma.rn.f64 %x64, %a64, %b64, %c64",
    lambda a, b, c: bits64(fma(f64(a), f64(b), f64(c), (52, -1022, 1023))),
    *[FINE] * 3,
)

# Conversions
case("cvt.rn.f16.f32 %x16, %a32", to_f16, SINGLES)
case("cvt.rn.bf16.f32 %x16, %a32", to_bf16, SINGLES)
case("cvt.rn.f16x2.f32 %x32, %a32, %b32", lambda a, b: to_f16(a) << 16 | to_f16(b), SINGLES, SINGLES)
case("cvt.rn.bf16x2.f32 %x32, %a32, %b32", lambda a, b: to_bf16(a) << 16 | to_bf16(b), SINGLES, SINGLES)
HALVES = [0, 0x8000, 1, 0x3FF, 0x400, 0x3C00, 0x3C01, 0xC500, 0x7BFF, 0x7C00, 0xFC00, 0x7E01]
half = lambda a: ieee(lambda x: np.float32(x), lambda b: np.uint16(b).view(np.float16), bits32, a)  # noqa: E731
case("cvt.f32.f16 %x32, %a16", half, HALVES)
case("cvt.rna.tf32.f32 %x32, %a32", lambda a: bits32(rounded(Fraction(float(f32(a))), 10, -126, 127, "away")), FEW)
case("cvt.sat.f32.f32 %x32, %a32", lambda a: bits32(0 if not f32(a) > 0 else min(f32(a), 1)), SINGLES)
single = lambda a: ieee(lambda x: np.float32(x), f64, bits32, a)  # noqa: E731
case("cvt.rn.f32.f64 %x32, %a64", single, DOUBLES)
case("cvt.f64.f32 %x64, %a32", lambda a: ieee(np.float64, f32, bits64, a), SINGLES)
for how, f in (("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)):
    case(f"cvt.{how}.f32.f32 %x32, %a32", lambda a, f=f: ieee(f, f32, bits32, a), SINGLES)
    for t in ("u32", "s32", "u64", "s64"):
        o = int(t[1:]), t[0] == "s", how
        case(f"cvt.{how}.{t}.f32 %x{t[1:]}, %a32", lambda a, o=o: to_int(a, *o), SINGLES)
case("cvt.rn.f32.s32 %x32, %a32", lambda a: bits32(np.float32(signed(a, 32))), INTS)
case("cvt.rn.f32.u32 %x32, %a32", lambda a: bits32(np.float32(a)), INTS)
case("cvt.rn.f32.u64 %x32, %a64", lambda a: bits32(np.float32(np.uint64(a))), LONGS)
case("cvt.rn.f64.s64 %x64, %a64", lambda a: bits64(float(signed(a, 64))), LONGS)
case("cvt.s64.s32 %x64, %a32", lambda a: signed(a, 32), INTS)
case("cvt.u64.u32 %x64, %a32", lambda a: a & M32, INTS)
case("cvt.u32.u16 %x32, %a16", lambda a: a & 0xFFFF, INTS)
case("cvt.s32.s16 %x32, %a16", lambda a: signed(a, 16), INTS)
case("cvt.s32.s8 %x32, %a32", lambda a: signed(a, 8), INTS)


def name_of(text):
    return "i_" + re.sub(r"\W+", "_", text.split()[0]) + ("_" + text.split()[-1] if "lop3" in text else "")


# ------------------------------------------------------------------------------------------ kernels of several threads

# Each warp's lane writes 16 bytes of shared memory; ldmatrix reads rows of 16 bytes at addresses in reverse order.
LDMATRIX = (
    SHARED
    + """
shl.b32 %m0, %t, 4;
add.u32 %m0, %m0, %s;
st.shared.v2.b64 [%m0], {{%a64, %b64}};
bar.warp.sync 0xffffffff;
mov.u32 %m1, 31;
sub.u32 %m1, %m1, %t;
shl.b32 %m1, %m1, 4;
add.u32 %m1, %m1, %s;
ldmatrix.sync.aligned.m8n8.{count}{trans}.shared.b16 {{{names}}}, [%m1];
"""
)
MMA = """
ld.global.v4.b32 {%m0, %m1, %m2, %m3}, [%in];
add.u64 %in, %in, 16;
"""
COPIES = (
    SHARED
    + """
shl.b32 %m0, %t, 6;
add.u32 %m0, %m0, %s;
cp.async.cg.shared.global [%m0], [%in], 16;
cp.async.commit_group;
cp.async.ca.shared.global [%m0+16], [%in], 8, 4;
cp.async.commit_group;
cp.async.ca.shared.global [%m0+32], [%in], 16;
cp.async.commit_group;
"""
)
PICK = """
setp.eq.u32 %p, {n}, {i};
@%p mov.b32 %x32, {r};
"""
TOGETHER = {
    "branch": """
setp.lt.u32 %p, %a32, 5;
@!%p bra big;
add.u32 %x32, %a32, 100;
bra.uni end;
big:
setp.gt.u32 %q, %a32, 7;
@%q mov.u32 %x32, 1;
@!%q mov.u32 %x32, 2;
end:
cvt.u64.u32 %x64, %x32;
""",
    "combined": """
setp.gt.u32 %q, %b32, 3;
setp.lt.and.u32 %p, %a32, 5, %q;
selp.b64 %x64, 1, 0, %p;
setp.lt.or.u32 %p, %a32, 5, !%q;
selp.b64 %y64, 2, 0, %p;
or.b64 %x64, %x64, %y64;
not.pred %p, %p;
xor.pred %p, %p, %q;
selp.b64 %y64, 4, 0, %p;
or.b64 %x64, %x64, %y64;
""",
    "halves": "mov.b64 {%m0, %m1}, %a64;\nmov.b64 %x64, {%m1, %m0};",
    "signs": "ld.global.s8 %x32, [%in];\nld.global.u8 %y32, [%in];\nmov.b64 %x64, {%x32, %y32};",
    "vote": """
and.b32 %m0, %a32, 1;
setp.eq.u32 %p, %m0, 1;
vote.sync.ballot.b32 %x32, %p, %b32;
vote.sync.any.pred %q, %p, %b32;
selp.b32 %y32, 1, 0, %q;
vote.sync.all.pred %q, %p, %b32;
selp.b32 %z32, 2, 0, %q;
or.b32 %y32, %y32, %z32;
mov.b64 %x64, {%x32, %y32};
""",
    "barriers": """
and.b32 %m0, %a32, 1;
setp.eq.u32 %p, %m0, 1;
bar.red.popc.u32 %x32, 0, %p;
bar.red.or.pred %q, 0, %p;
selp.b32 %y32, 1, 0, %q;
bar.red.and.pred %q, 0, %p;
selp.b32 %z32, 2, 0, %q;
or.b32 %y32, %y32, %z32;
mov.b64 %x64, {%x32, %y32};
""",
    "pending": COPIES
    + """
cp.async.wait_group 1;
shl.b32 %m1, %b32, 4;
add.u32 %m0, %m0, %m1;
ld.shared.v2.b32 {%x32, %y32}, [%m0];
mov.b64 %x64, {%x32, %y32};
cp.async.wait_all;
""",
    "never_waits": COPIES,
    "exchange": SHARED
    + """
shl.b32 %m0, %t, 2;
add.u32 %m0, %m0, %s;
st.shared.u32 [%m0], %t;
{barrier}
mov.u32 %m1, %ntid.x;
sub.u32 %m1, %m1, %t;
shl.b32 %m1, %m1, 2;
add.u32 %m1, %m1, %s;
ld.shared.u32 %x32, [%m1+-4];
cvt.u64.u32 %x64, %x32;
""",
    "misaligned": SHARED + "ld.shared.u32 %x32, [%s+2];",
    "beyond": SHARED + "ld.shared.v4.u32 {%m0, %m1, %m2, %m3}, [%s+512];",
    "null": "mov.u64 %y64, 0;\nld.global.u32 %x32, [%y64];",
    "wrong_space": "cvt.u64.u32 %y64, %t;\nst.shared.u64 [%y64], %y64;",
    "some_at_barrier": "setp.lt.u32 %p, %t, 32;\n@%p bra skip;\nbar.sync 0;\nskip:\n",
    "by_zero": "div.s32 %x32, %a32, 0;",
    "trap": "setp.gt.u32 %p, %t, 3;\n@%p trap;",
    "ex2": "ex2.approx.f32 %x32, %a32;\nex2.approx.ftz.f32 %y32, %a32;\nmov.b64 %x64, {%x32, %y32};",
    "lg2": "lg2.approx.f32 %x32, %a32;\nlg2.approx.ftz.f32 %y32, %a32;\nmov.b64 %x64, {%x32, %y32};",
    "rcp": "rcp.approx.ftz.f64 %x64, %a64;",
    "fma_rn": "mul.rn.f32 %y32, %a32, %b32;\nadd.rn.f32 %x32, %y32, %c32;\ncvt.u64.u32 %x64, %x32;",
    "fused": "mul.f32 %y32, %a32, %b32;\nadd.f32 %x32, %y32, %c32;\ncvt.u64.u32 %x64, %x32;",
}
TOGETHER["barrier"] = TOGETHER["exchange"].replace("{barrier}", "bar.sync 0;")
TOGETHER["race"] = TOGETHER.pop("exchange").replace("{barrier}", "")
for kind in ("up", "down", "bfly", "idx"):
    TOGETHER["shfl_" + kind] = f"""
shfl.sync.{kind}.b32 %x32|%p, %a32, %b32, %c32, %d32;
selp.b32 %y32, 1, 0, %p;
mov.b64 %x64, {{%x32, %y32}};
"""
for op in ("or", "and", "xor"):
    TOGETHER["redux_" + op] = f"redux.sync.{op}.b32 %x32, %a32, %b32;\ncvt.u64.u32 %x64, %x32;"
for op, t in itertools.product(("add", "min", "max"), ("u32", "s32")):
    TOGETHER[f"redux_{op}_{t}"] = f"redux.sync.{op}.{t} %x32, %a32, %b32;\ncvt.u64.u32 %x64, %x32;"
# All threads at one word, that of shared memory behind a generic address too; each has the word as it was before.
ATOMS = {"add": "u32", "or": "b32", "and": "b32", "max": "u32", "min": "u32"}
for op, t in ATOMS.items():
    TOGETHER[f"atom_global_{op}"] = f"atom.global.{op}.{t} %x32, [%c64], %a32;\ncvt.u64.u32 %x64, %x32;"
    TOGETHER[f"atom_shared_{op}"] = f"""{SHARED}
setp.eq.u32 %p, %t, 0;
@%p st.shared.u32 [%s], %b32;
bar.sync 0;
atom.shared.{op}.{t} %x32, [%s], %a32;
bar.sync 0;
ld.shared.u32 %y32, [%s];
mov.b64 %x64, {{%x32, %y32}};
"""
TOGETHER["atom_floats"] = f"""{SHARED}
st.shared.u32 [%s], %b32;
atom.shared.add.f32 %y32, [%s], %a32;
ld.shared.u32 %y32, [%s];
atom.global.add.f32 %x32, [%c64], %a32;
ld.global.u32 %x32, [%c64];
mov.b64 %x64, {{%x32, %y32}};
"""
for count, trans in itertools.product((1, 2, 4), ("", ".trans")):
    body = LDMATRIX.format(count=f"x{count}", trans=trans, names=", ".join(f"%m{4 + i}" for i in range(count)))
    # Of the matrices, the one that c names.
    body += "".join(PICK.format(n="%c32", i=i, r=f"%m{4 + i}") for i in range(count))
    TOGETHER[f"ldmatrix_x{count}{trans.replace('.', '_')}"] = body + "cvt.u64.u32 %x64, %x32;"
# One thread's fragments lie in memory of their own: 4 of A, 2 of B, 4 of C, in that order, 32 bits each.
for kind, shape in (("bf16", "m16n8k16"), ("f16", "m16n8k16"), ("tf32", "m16n8k8")):
    TOGETHER[f"mma_{kind}"] = f"""
mul.wide.u32 %at, %t, 48;
add.u64 %at, %a64, %at;
ld.global.v4.b32 {{%m0, %m1, %m2, %m3}}, [%at];
ld.global.v2.b32 {{%m4, %m5}}, [%at+16];
ld.global.v2.b32 {{%m8, %m9}}, [%at+24];
ld.global.v2.b32 {{%m10, %m11}}, [%at+32];
mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32
  {{%m12, %m13, %m14, %m15}}, {{%m0, %m1, %m2, %m3}}, {{%m4, %m5}}, {{%m8, %m9, %m10, %m11}};
st.global.v2.b32 [%at], {{%m12, %m13}};
st.global.v2.b32 [%at+8], {{%m14, %m15}};
"""


# -------------------------------------------------------------------------------------------------------------- running


def compiled(folder, contract=False):
    """Functions run() and set() over all kernels of this file."""
    bodies = {name_of(text): entry(name_of(text), text + ";", widen(text)) for text in CASES}
    bodies |= {name: entry(name, body) for name, body in TOGETHER.items()}
    ptx = folder / "all.ptx"
    ptx.write_text(HEAD + "".join(bodies.values()))
    # What is tested here is PTX as ptxas takes it.
    checked = subprocess.run(["ptxas", "-arch=sm_80", ptx, "-o", folder / "all.cubin"], capture_output=True, text=True)
    assert not checked.returncode, checked.stderr
    code = '#include "ptxrun.h"\n'
    for name, text in bodies.items():
        code += f"namespace of_{name} {{\n{translate.translate(HEAD + text, contract=contract)[0]}}}\n"
    (folder / "kernels.cpp").write_text(code)
    flags = ["-DPTX_ARCHITECTURE=90", f"-I{build.HERE}", "-w", "-shared"]
    sources = [folder / "kernels.cpp", build.HERE / "ptxrun.cpp", build.HERE / "selftest.cpp"]
    build.output(["g++", *build.TRANSLATED, *flags, *sources, "-o", folder / "machine.so"])
    library = ctypes.CDLL(str(folder / "machine.so"))
    library.run.restype = ctypes.c_char_p
    library.run.argtypes = [ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_size_t, ctypes.c_char_p]
    library.set.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_bool, ctypes.c_bool]
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("machine"))


FLOAT, EXACT, HARDWARE = range(3)


@pytest.fixture
def run(library):
    def run(name, rows, threads=None, shared=0, seed=0, mma=FLOAT, rough=False, races=False):
        """The results of threads that have the rows; one block, if their number is not given."""
        given = np.zeros((len(rows), 4), np.uint64)
        for row, values in zip(given, rows):
            row[: len(values)] = [x & M64 for x in values]
        out = np.zeros(len(rows), np.uint64)
        library.set(seed, mma, rough, races)
        threads = threads or len(rows)
        parameters = struct.pack("QQ", given.ctypes.data, out.ctypes.data)
        if error := library.run(name.encode(), len(rows) // threads, threads, shared, parameters).decode():
            raise RuntimeError(error)
        return [int(x) for x in out]

    return run


@pytest.mark.parametrize("text", CASES)
def test_one_instruction(run, text):
    expected, values = CASES[text]
    rows = list(itertools.product(*values))
    padded = rows + rows[:1] * (-len(rows) % 32)
    mask = M64 if "%x64," in text else 0xFFFF if "%x16," in text else M32
    for operands, x in zip(rows, run(name_of(text), padded, 32)):
        wanted = expected(*operands)
        if wanted is NAN:
            assert np.isnan((f64 if mask == M64 else f32)(x)), [hex(o) for o in operands]
        else:
            assert x == int(wanted) & mask, ([hex(o) for o in operands], hex(x), hex(int(wanted) & mask))


def test_predicates_and_branches(run):
    assert run("branch", [(i,) for i in range(10)]) == [100, 101, 102, 103, 104, 2, 2, 2, 1, 1]
    rows = list(itertools.product((4, 5), (3, 4)))
    wanted = [(a < 5 and b > 3) + 2 * (a < 5 or b <= 3) + 4 * ((not (a < 5 or b <= 3)) != (b > 3)) for a, b in rows]
    assert run("combined", rows) == wanted


def test_parts_of_registers(run):
    assert run("halves", [(0x1122334455667788,)]) == [0x5566778811223344]
    assert run("signs", [(0x1F0,)]) == [0xF0FFFFFFF0]


# The manual's error of ex2 and lg2 is 2^-22; of the double's reciprocal, only the upper half of the bits is computed.
@pytest.mark.parametrize("rough", [False, True])
def test_approximate_functions_keep_their_bounds(run, rough):
    x = np.concatenate([np.linspace(-120, 120, 1001), np.linspace(-1, 1, 1047)]).astype(np.float32)
    y = np.array(run("ex2", [(bits32(v),) for v in x], 32, rough=rough), np.uint64).astype(np.uint32).view(np.float32)
    error = np.abs(y / np.exp2(x.astype(float)) - 1).max()
    assert error <= 2.0**-22 * 1.3 and (error > 2.0**-22.5) == rough  # float32 rounds what is off, too
    x = np.abs(x) + np.float32(1e-3)
    y = np.array(run("lg2", [(bits32(v),) for v in x], 32, rough=rough), np.uint64).astype(np.uint32).view(np.float32)
    error = np.abs(y - np.log2(x.astype(float))) / np.maximum(1, np.abs(np.log2(x.astype(float))))
    assert error.max() <= 2.0**-22 * 1.3
    y = run("rcp", [(bits64(v),) for v in x], 32, rough=rough)
    assert not any(v & M32 for v in y)
    assert max(abs(f64(v) * float(a) - 1) for v, a in zip(y, x)) < 2.0**-18


def test_approximate_functions_of_special_numbers(run):
    tiny, smaller = bits32(2.0**-127), bits32(2.0**-140)
    inf, nan = 0x7F800000, 0x7FC00000
    both = lambda name, x: [v for y in run(name, [(x,)]) for v in (y & M32, y >> 32)]  # noqa: E731
    assert both("ex2", inf) == [inf, inf] and both("ex2", inf | 1 << 31) == [0, 0]
    assert both("ex2", 0) == both("ex2", 1 << 31) == both("ex2", tiny) == [bits32(1)] * 2
    assert both("ex2", bits32(-127)) == [tiny, 0]  # ftz
    assert both("lg2", smaller) == [bits32(-140), inf | 1 << 31]
    assert both("lg2", 0)[0] == inf | 1 << 31 and both("lg2", inf)[0] == inf
    assert np.isnan(f32(both("lg2", bits32(-1))[0])) and np.isnan(f32(both("ex2", nan)[0]))
    assert run("rcp", [(bits64(-0.0),), (bits64(np.inf),), (bits64(4),)]) == [bits64(-np.inf), 0, bits64(0.25)]


def test_products_fuse_where_they_may(run, tmp_path):
    a = 1 + 2.0**-12
    row = [(bits32(a), bits32(a), bits32(-(1 + 2.0**-11)))]
    assert run("fma_rn", row) == run("fused", row) == [bits32(0)]
    fused = compiled(tmp_path, contract=True)
    given, out = np.array(row[0] + (0,), np.uint64), np.zeros(1, np.uint64)
    for name, wanted in (("fma_rn", 0), ("fused", 2.0**-24)):
        assert not fused.run(name.encode(), 1, 1, 0, struct.pack("QQ", given.ctypes.data, out.ctypes.data))
        assert out[0] == bits32(wanted)


# -------------------------------------------------------------------------------------------------- threads of a warp

SEEDS = [0, 1, 2]


def shuffled(kind, lane, b, c):
    """The manual's pseudo-code: the lane to take from, and whether it is in the segment."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    most, least = (lane & segment) | (clamp & ~segment & 31), lane & segment
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": least | (b & ~segment & 31)}[kind]
    valid = j >= most if kind == "up" else j <= most
    return (j if valid else lane), valid


@pytest.mark.parametrize("kind", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("b, width", [(1, 32), (5, 32), (16, 32), (31, 32), (3, 8), (1, 2), (0, 16)])
def test_shuffles(run, kind, b, width):
    c = (32 - width) << 8 | (0 if kind == "up" else 31)
    rows = [(1000 + lane, b, c, M32) for lane in range(32)]
    wanted = [shuffled(kind, lane, b, c) for lane in range(32)]
    for seed in SEEDS:
        assert run("shfl_" + kind, rows, seed=seed) == [1000 + j | int(valid) << 32 for j, valid in wanted]


def test_shuffles_within_masks(run):
    """The two halves of a warp call the same instruction with masks of their own."""
    c = 16 << 8 | 31
    rows = [(lane, 8, c, 0xFFFF if lane < 16 else 0xFFFF0000) for lane in range(32)]
    assert [x & M32 for x in run("shfl_bfly", rows)] == [lane ^ 8 for lane in range(32)]
    rows = [(lane, 16, 31, 0xFFFF if lane < 16 else 0xFFFF0000) for lane in range(32)]
    with pytest.raises(RuntimeError, match="lane 0 takes from lane 16, which is not in the mask"):
        run("shfl_bfly", rows)


def test_votes(run):
    odd = 0xAAAAAAAA
    for mask, rows in ((M32, [(i, M32) for i in range(32)]), (odd, [(i, odd if i % 2 else ~odd) for i in range(32)])):
        for lane, x in enumerate(run("vote", rows)):
            mine = mask if mask == M32 or lane % 2 else ~mask & M32
            assert x == (odd & mine) | (int(odd & mine != 0) | 2 * int(odd & mine == mine)) << 32


@pytest.mark.parametrize(
    "op", ["or", "and", "xor", *(f"{x}_{t}" for x in ("add", "min", "max") for t in ("u32", "s32"))]
)
def test_reductions_of_a_warp(run, op):
    values = [(0x9E3779B9 * (i + 1)) & M32 for i in range(32)]
    name, number = op.split("_")[0], (lambda x: signed(x, 32)) if op.endswith("s32") else int
    f = {"or": int.__or__, "and": int.__and__, "xor": int.__xor__, "add": int.__add__, "min": min, "max": max}[name]
    for seed in SEEDS:
        got = run("redux_" + op, [(v, 0xFF if i < 8 else ~0xFF & M32) for i, v in enumerate(values)], seed=seed)
        for part in (slice(0, 8), slice(8, 32)):
            wanted = number(values[part][0])
            for v in values[part][1:]:
                wanted = f(wanted, number(v))
            assert set(got[part]) == {wanted & M32}


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(run, count, trans):
    words = np.arange(256, dtype=np.uint16)  # 32 rows of 8
    rows = words.view(np.uint64).reshape(32, 2)
    matrices = words.reshape(32, 8)[::-1].reshape(4, 8, 8)  # lane i names row 31 - i
    for n in range(count):
        got = run(f"ldmatrix_x{count}" + "_trans" * trans, [(int(a), int(b), n) for a, b in rows], shared=512)
        m = matrices[n].T if trans else matrices[n]
        # A lane has two elements of a row, a row lies in four lanes.
        np.testing.assert_array_equal(np.array(got, np.uint64).astype(np.uint32).view(np.uint16).reshape(8, 8), m)


def fragments(kind, a, b, c):
    """32 threads of 10 words, as the manual's figures place the elements; two spare words."""
    out = np.zeros((32, 12), np.uint32)
    for lane in range(32):
        group, within = divmod(lane, 4)
        if kind == "tf32":
            place_a = [(group + 8 * (i % 2), within + 4 * (i // 2)) for i in range(4)]
            place_b = [(within + 4 * i, group) for i in range(2)]
            out[lane, :4] = [bits32(a[p]) for p in place_a]
            out[lane, 4:6] = [bits32(b[p]) for p in place_b]
        else:
            bits = (lambda x: bits32(x) >> 16) if kind == "bf16" else (lambda x: int(np.float16(x).view(np.uint16)))
            rows = [group if i in (0, 1, 4, 5) else group + 8 for i in range(8)]
            of_a = [bits(a[rows[i], 2 * within + i % 2 + 8 * (i >= 4)]) for i in range(8)]
            of_b = [bits(b[2 * within + i % 2 + 8 * (i >= 2), group]) for i in range(4)]
            out[lane, :6] = [low | high << 16 for low, high in zip((of_a + of_b)[::2], (of_a + of_b)[1::2])]
        out[lane, 6:10] = [bits32(c[group + 8 * (i >= 2), 2 * within + i % 2]) for i in range(4)]
    return out


def multiplied(run, kind, a, b, c, **options):
    memory = fragments(kind, a, b, c)
    run("mma_" + kind, [(memory.ctypes.data,)] * 32, **options)
    out = np.zeros((16, 8), np.float32)
    for lane in range(32):
        for i, x in enumerate(memory[lane, :4]):
            out[lane // 4 + 8 * (i >= 2), 2 * (lane % 4) + i % 2] = f32(int(x))
    return out


KINDS = {"bf16": 16, "f16": 16, "tf32": 8}


@pytest.mark.parametrize("mma", [FLOAT, EXACT, HARDWARE])
@pytest.mark.parametrize("kind", KINDS)
def test_matrix_products(run, kind, mma):
    """Small whole numbers: every way to sum is exact."""
    random = np.random.default_rng(0)
    a, b = random.integers(-9, 9, (16, KINDS[kind])), random.integers(-9, 9, (KINDS[kind], 8))
    c = random.integers(-99, 99, (16, 8))
    np.testing.assert_array_equal(multiplied(run, kind, a, b, c, mma=mma), a @ b + c)


@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_products_are_cut_as_hardware_cuts_them(run, kind):
    """On sm_90, what lies more than 25 bits below the largest exponent is lost, product by product."""
    a, b, c = np.full((16, KINDS[kind]), 2.0**-13), np.full((KINDS[kind], 8), 2.0**-13), np.ones((16, 8))
    many = np.float32(1 + KINDS[kind] * 2.0**-26)
    assert (multiplied(run, kind, a, b, c, mma=EXACT) == many).all() and many > 1
    assert (multiplied(run, kind, a, b, c, mma=HARDWARE) == 1).all()
    # Toward zero: 1 - 2^-25 has no place in float32.
    b[1:] = 0
    b[0] = -(2.0**-12)
    assert (multiplied(run, kind, a, b, c, mma=EXACT) == 1).all()
    assert (multiplied(run, kind, a, b, c, mma=HARDWARE) == np.float32(1 - 2.0**-24)).all()


def test_tf32_operands_are_cut_to_ten_bits(run):
    a, b = np.full((16, 8), 1 + 2.0**-11, np.float32), np.eye(8)
    assert (multiplied(run, "tf32", a, b, np.zeros((16, 8))) == 1).all()


# ------------------------------------------------------------------------------------------------- threads of a block


@pytest.mark.parametrize("op", ATOMS)
@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(run, op, seed):
    values = [1 << (i % 32) | i for i in range(64)]
    start = {"and": M32, "min": M32}.get(op, 5)
    one = {"add": int.__add__, "or": int.__or__, "and": int.__and__, "max": max, "min": min}[op]
    f = lambda a, b: one(a, b) & M32  # noqa: E731
    word = np.array([start], np.uint32)
    in_global = run(f"atom_global_{op}", [(v, 0, word.ctypes.data) for v in values], seed=seed)
    in_shared = run(f"atom_shared_{op}", [(v, start) for v in values], shared=16, seed=seed)
    assert {x >> 32 for x in in_shared} == {int(word[0])} == {functools.reduce(f, values, start)}
    for old in (in_global, [x & M32 for x in in_shared]):
        # In some order of the threads, each has what the one before it has left.
        assert sorted([start, *map(f, old, values)]) == sorted([*old, int(word[0])])


def test_atomic_sums_of_floats(run):
    """Rounded to nearest; in global memory, subnormal numbers are flushed, in shared memory they are kept."""
    tiny = 2.0**-130
    for a, b, in_global in (
        (0.1, 0.7, None),
        (tiny, 1e-38, 0),
        (2.0**-126, -(2.0**-127), 2.0**-126),
        (3e38, 3e38, None),
    ):
        word = np.array([b], np.float32)
        with np.errstate(over="ignore"):
            wanted = np.float32(a) + np.float32(b)
        if in_global is not None:
            in_global = np.float32(in_global) + (np.float32(b) if abs(b) >= 2.0**-126 else np.float32(0))
        got = run("atom_floats", [(bits32(a), bits32(b), word.ctypes.data)], shared=16)[0]
        assert got >> 32 == bits32(wanted)
        assert got & M32 == bits32(wanted if in_global is None else in_global)


def test_reductions_at_barriers(run):
    assert run("barriers", [(i,) for i in range(96)]) == [48 | 1 << 32] * 96
    assert run("barriers", [(1,)] * 64) == [64 | 3 << 32] * 64
    assert run("barriers", [(0,)] * 64) == [0] * 64


def test_copies_come_with_their_group(run):
    number = 0x1111111122222222
    waited = lambda part: run("pending", [(number, part)], shared=64)[0]  # noqa: E731
    assert waited(0) == number
    assert waited(1) == number & M32  # 4 bytes of 8, the rest is zero
    assert waited(2) == M64  # of the last group nothing is there
    with pytest.raises(RuntimeError, match="a copy is still under way when its thread ends"):
        run("never_waits", [(number,)], shared=64)


@pytest.mark.parametrize("seed", SEEDS)
def test_races(run, seed):
    rows = [()] * 128
    assert run("barrier", rows, shared=512, seed=seed, races=True) == list(range(127, -1, -1))
    with pytest.raises(RuntimeError, match=r"a race: byte \d+ of shared memory .* with no barrier between"):
        run("race", rows, shared=512, seed=seed, races=True)
    assert run("race", rows, shared=512, seed=seed) != list(range(127, -1, -1))  # what is not there yet is 0xFF


@pytest.mark.parametrize(
    "name, message",
    [
        ("misaligned", "read of 4 bytes at shared address 2 .*not aligned"),
        ("beyond", "read of 16 bytes at shared address 512 "),
        ("null", "read of 4 bytes at global address 0 "),
        ("wrong_space", "write of 8 bytes at shared address -1024 "),
        ("some_at_barrier", "a barrier that some threads do not reach"),
        ("by_zero", "an integer is divided by zero"),
        ("trap", "thread 4, PTX line .*trap"),
    ],
)
def test_what_a_launch_refuses(run, name, message):
    with pytest.raises(RuntimeError, match=rf"kernel {name}, block 0,0,0: .*{message}"):
        run(name, [(1,)] * 64, shared=512)


def test_lanes_that_do_not_come(run):
    with pytest.raises(RuntimeError, match="the mask leaves out its own lane"):
        run("redux_or", [(0, 0xFFFF0000)] * 32)
    with pytest.raises(RuntimeError, match="a warp waits for lanes that do not come"):
        run("redux_or", [(0, M32 if i else 1) for i in range(32)])
    with pytest.raises(RuntimeError, match="the mask names a lane that does not exist"):
        run("redux_or", [(0, M32)] * 16)


# ----------------------------------------------------------------------------------------------- what is not translated


@pytest.mark.parametrize(
    "body, message",
    [
        ("wgmma.fence.sync.aligned;", "instruction wgmma.fence.sync.aligned"),
        ("tanh.approx.f32 %x32, %a32;", "instruction tanh.approx.f32"),
        ("red.global.add.u32 [%c64], %a32;", "red"),
        ("add.rz.f32 %x32, %a32, %b32;", "modifiers .*rz"),
        ("fma.rn.ftz.f32 %x32, %a32, %b32, %c32;", "modifiers .*ftz"),
        ("cvt.rz.f16.f32 %x16, %a32;", "modifiers .*rz"),
        ("atom.add.f32 %x32, [%c64], %a32;", "atom .*f32"),
        ("atom.global.exch.b32 %x32, [%c64], %a32;", "atom .*exch"),
        ("ld.volatile.global.u32 %x32, [%c64];", "ld .*volatile"),
        ("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%m0, %m1}, {%m2, %m3, %m4, %m5}, {%m6, %m7}, {%m8, %m9};",
         "mma .*f16"),
        ("cp.async.bulk.commit_group;", "cp .*bulk"),
        ("add.u32 %x32, %a32, nothing;", "operand 'nothing'"),
        ("add.u32 %x32, %a32, %u7;", "no register %u7"),
        (".local .align 4 .b8 array[16];", "directive '.local"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(body, message):
    with pytest.raises(translate.Error, match=rf"line \d+, kernel_of_test: {message}"):
        translate.translate(HEAD + entry("kernel_of_test", body))


def test_modules_with_more_than_kernels_are_refused():
    with pytest.raises(translate.Error, match=r"at the top of the module: '\.const"):
        translate.translate(HEAD + ".const .align 4 .b8 table[16];\n" + entry("kernel_of_test", ""))
