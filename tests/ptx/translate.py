"""Translates PTX to C++: a kernel is a function over the registers of one thread.

The meaning of every instruction is that of the PTX ISA. An instruction, a modifier or an operand that is not known here
is an error: nothing is guessed. ptxrun.h has what is more than one C++ expression; ptxrun.cpp has what threads do
together.

Registers are unsigned integers of their width whatever their PTX type, as in the hardware; an instruction looks at the
bits as its own type says. A shared address is an offset into the shared window; a generic address, one of global memory
and one of parameters is an address of this process.

contract: does what ptxas is allowed to do to additions and multiplications without a rounding modifier: wherever an
addition takes a product of the same basic block, it becomes one fused multiply-add.
"""

import re

WIDTH = {"pred": 1, "b8": 8, "u8": 8, "s8": 8}
WIDTH |= {f"{k}{n}": n for k in "bus" for n in (16, 32, 64)}
WIDTH |= {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}
STORED = {1: "bool", 8: "uint8_t", 16: "uint16_t", 32: "uint32_t", 64: "uint64_t"}
SPECIAL = {
    f"%{name}.{d}": f"ptx::now.{name}[{i}]" for name in ("tid", "ntid", "ctaid", "nctaid") for i, d in enumerate("xyz")
}
SPECIAL["%laneid"] = "ptx::now.laneid"


class Error(RuntimeError):
    pass


def ctype(t):
    """The C++ type in which an instruction of PTX type t computes."""
    if t in ("f32", "f64"):
        return {"f32": "float", "f64": "double"}[t]
    if t == "pred":
        return "bool"
    return ("int" if t[0] == "s" else "uint") + f"{WIDTH[t]}_t"


def is_float(t):
    return t in ("f32", "f64")


def split_operands(text):
    out, depth, word = [], 0, ""
    for c in text:
        depth += (c in "{[(") - (c in "}])")
        if c == "," and depth == 0:
            out.append(word.strip())
            word = ""
        else:
            word += c
    return [*out, word.strip()] if word.strip() else out


class Kernel:
    count = False  # whether executed basic blocks are noted

    def __init__(self, name, params, directives, body, first_line, shared, contract):
        self.name, self.body, self.first_line, self.shared, self.contract = name, body, first_line, shared, contract
        self.params, offset = {}, 0  # name -> (offset, bytes)
        for align, size, param in params:
            offset = -(-offset // align) * align
            self.params[param] = (offset, size)
            offset += size
        self.param_bytes = offset
        found = re.search(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?", directives)
        self.most_threads = 1
        for n in found.groups() if found else ["1024"]:
            self.most_threads *= int(n or 1)
        unknown = re.sub(r"\.(maxntid|reqntid|minnctapersm|maxnreg)\s+\d+(\s*,\s*\d+)*", "", directives).strip()
        if unknown:
            raise Error(f"{name}: directives {unknown!r}")
        self.scopes = [{}]  # of registers: name -> width
        self.used = set()
        self.out = []
        self.products = {}  # (type, register) -> its factors, within one basic block
        self.fused = self.left_open = 0
        self.line = first_line
        self.blocks, self.new_block = [], True  # basic blocks: their instructions as (line, text)

    def fail(self, what):
        raise Error(f"line {self.line}, {self.name}: {what}")

    # Operands

    def width(self, register):
        for scope in reversed(self.scopes):
            if register in scope:
                return scope[register]
        self.fail(f"no register {register}")

    def variable(self, register):
        for i in range(len(self.scopes) - 1, -1, -1):
            if register in self.scopes[i]:
                if i == 0:
                    self.used.add(register)
                return register.replace("%", "_" if i == 0 else "_in_").replace("$", "_S")
        self.fail(f"no register {register}")

    def read(self, text, t):
        """The value of an operand as a C++ expression of ctype(t)."""
        c = ctype(t)
        if text in SPECIAL:
            return f"(({c}){SPECIAL[text]})"
        if text.startswith("%"):
            if t == "pred":
                return self.variable(text)
            if self.width(text) < WIDTH[t]:
                self.fail(f"{text} is narrower than .{t}")
            if is_float(t):
                if self.width(text) != WIDTH[t]:
                    self.fail(f"{text} is no .{t}")
                return f"ptx::bits<{c}>({self.variable(text)})"
            return f"(({c}){self.variable(text)})"
        if text.startswith("!"):
            return f"(!{self.read(text[1:], t)})"
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
            if t == "f32":
                return f"ptx::bits<float>(0x{text[2:]}u)"
            if t == "b32":
                return f"0x{text[2:]}u"
            self.fail(f"{text} as .{t}")
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
            if t == "f64":
                return f"ptx::bits<double>(0x{text[2:]}ull)"
            if t == "b64":
                return f"0x{text[2:]}ull"
            self.fail(f"{text} as .{t}")
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            value = int(text.rstrip("U"), 0)
            if is_float(t):
                self.fail(f"integer {text} as .{t}")
            if t == "pred":
                return str(bool(value)).lower()
            return f"(({c})0x{value & (1 << WIDTH[t]) - 1:x}ull)"
        if text in self.params:
            return f"(({c})(ptx::now.param + {self.params[text][0]}))"
        if text in self.shared:
            return f"(({c})ptx::kSharedBase)"  # all that is known is extern: it begins where the window begins
        self.fail(f"operand {text!r}")

    def write(self, text, value, t):
        """Assigns an expression of ctype(t); wider registers get it extended by its sign."""
        if not text.startswith("%") or text in SPECIAL:
            self.fail(f"{text} as a destination")
        width = self.width(text)
        if width < WIDTH[t] or (is_float(t) and width != WIDTH[t]):
            self.fail(f"{text} cannot hold .{t}")
        if t == "pred":
            return f"{self.variable(text)} = {value};"
        if is_float(t):
            return f"{self.variable(text)} = ptx::bits<{STORED[width]}>({value});"
        return f"{self.variable(text)} = ({STORED[width]})({ctype(t)})({value});"

    def address(self, text, space):
        """The number in brackets."""
        found = re.fullmatch(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if not found:
            self.fail(f"address {text!r}")
        base, offset = found[1], int(found[2] or 0)
        if base.startswith("%"):
            width = self.width(base)
            if width == 32 and space != "shared":
                self.fail(f"a 32-bit address {text} in .{space}")
            base = (
                f"(uint64_t)(uint32_t)({self.variable(base)} + ({offset}u))"
                if width == 32
                else f"({self.variable(base)} + ({offset}ll))"
            )
            return base
        return f"({self.read(base, 'u64')} + ({offset}ll))"

    def elements(self, text, count):
        if count == 1:
            return [text]
        found = re.fullmatch(r"\{(.*)\}", text)
        names = split_operands(found[1]) if found else []
        if len(names) != count:
            self.fail(f"{text!r} for {count} elements")
        return names

    # Statements

    def run(self):
        depth_labels = []
        for line, statement in self.statements():
            self.line = line
            if statement == "{":
                self.scopes.append({})
                self.out.append("{")
                self.products.clear()
            elif statement == "}":
                self.scopes.pop()
                self.out.append("}")
                self.products.clear()
            elif found := re.fullmatch(r"(\$?[\w$]+):", statement):
                if len(self.scopes) > 1:
                    self.fail("a label in an inner scope")
                depth_labels.append(found[1])
                self.out.append(f"{found[1].replace('$', 'S')}: __attribute__((unused));")
                self.products.clear()
                self.new_block = True
            elif statement.startswith(".reg"):
                self.declare(statement)
            elif re.match(r"\.(pragma|loc|file)\b", statement):
                pass
            elif statement.startswith("."):
                self.fail(f"directive {statement!r}")
            else:
                self.instruction(statement)
        if len(self.scopes) != 1:
            self.fail("braces")

    def statements(self):
        line, word = self.first_line, ""
        start = None
        i, body = 0, self.body
        while i < len(body):
            c = body[i]
            if c == "\n":
                line += 1
            # A brace that begins a statement is a scope; any other belongs to an operand.
            if c in "{}" and not word.strip():
                yield line, c
                word = ""
            elif c == ";":
                if word.strip():
                    yield start, " ".join(word.split())
                word = ""
            elif c == ":" and re.fullmatch(r"\s*\$?[\w$]+", word) and body[i + 1] != ":":
                yield start, word.strip() + ":"
                word = ""
            elif c == "\n" and re.match(r"\s*\.(loc|file)\b", word):
                word = ""
            else:
                if not c.isspace() and not word.strip():
                    start, word = line, ""
                word += c
            i += 1
        if word.strip():
            self.fail(f"left over: {word!r}")

    def declare(self, statement):
        found = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement)
        for name in split_operands(found[2]):
            many = re.fullmatch(r"(%\w+)<(\d+)>", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            for n in names:
                self.scopes[-1][n] = WIDTH[found[1]]
        if len(self.scopes) > 1:
            for n in names if many else split_operands(found[2]):
                self.out.append(f"{STORED[WIDTH[found[1]]]} {self.variable(n)};")

    def instruction(self, statement):
        found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement)
        if not found:
            self.fail(f"{statement!r}")
        negated, predicate, op, rest = found.groups()
        parts = op.split(".")
        operands = split_operands(rest)
        method = getattr(self, "op_" + parts[0], None)
        if method is None:
            self.fail(f"instruction {op}")
        code = method(parts[1:], *operands)
        self.forget(parts[0], operands)
        if parts[0] == "mul" and not predicate and parts[1:] in (["f32"], ["f64"]):
            self.products[parts[1], operands[0]] = operands[1:]
        if predicate:
            code = f"if ({'!' if negated else ''}{self.variable(predicate)}) {{ {code} }}"
        if self.count:
            if self.new_block:
                self.out.append(f"ptx::enter({len(self.blocks)});")
                self.blocks.append([])
            self.blocks[-1].append((self.line, statement))
            self.new_block = parts[0] in ("bra", "ret", "exit", "trap")
        self.out.append(code)
        if parts[0] in ("bra", "ret"):
            self.products.clear()

    def forget(self, root, operands):
        """Products that were, or were made of, what this instruction writes."""
        if root in ("st", "bra", "bar", "cp") or not operands:
            return
        written = set(re.findall(r"%\w+", operands[0]))
        for key in [k for k, v in self.products.items() if k[1] in written or written & set(v)]:
            del self.products[key]

    def only(self, modifiers, *allowed):
        """Checks the modifiers against the lists of those that are known."""
        if modifiers not in [list(a) for a in allowed]:
            self.fail(f"modifiers {modifiers}")

    # Arithmetic

    def op_mov(self, m, d, a):
        (t,) = m
        if t == "pred":
            return self.write(d, self.read(a, t), t)
        bits = "b" + str(WIDTH[t])
        if d.startswith("{"):
            names = self.elements(d, len(split_operands(d[1:-1])))
            part = WIDTH[t] // len(names)
            x = f"const {ctype(bits)} x = {self.read(a, bits)}; "
            return (
                "{ "
                + x
                + " ".join(self.write(n, f"x >> {part * i}", f"b{part}") for i, n in enumerate(names) if n != "_")
                + " }"
            )
        if a.startswith("{"):
            names = self.elements(a, len(split_operands(a[1:-1])))
            part = WIDTH[t] // len(names)
            terms = [f"(({ctype(bits)}){self.read(n, f'b{part}')} << {part * i})" for i, n in enumerate(names)]
            return self.write(d, " | ".join(terms), bits)
        return self.write(d, self.read(a, t if re.match("0[fFdD]", a) else bits), t if re.match("0[fFdD]", a) else bits)

    def op_cvta(self, m, d, a):
        self.only(
            m, ["to", "global", "u64"], ["to", "shared", "u64"], ["global", "u64"], ["shared", "u64"], ["param", "u64"]
        )
        x = self.read(a, "u64")
        if "shared" in m:
            x = f"ptx::{'to_shared' if m[0] == 'to' else 'from_shared'}({x}, {self.line})"
        return self.write(d, x, "u64")

    def binary(self, m, d, a, b, sign):
        t = m[-1]
        if is_float(t):
            self.only(m, [t], ["rn", t])
            if m == [t]:
                if sign != "*" and self.contract and (fused := self.fuse(t, d, a, b, sign)):
                    return fused
            return self.write(d, f"{self.read(a, t)} {sign} {self.read(b, t)}", t)
        self.only(m, *([x] for x in ("s16", "u16", "s32", "u32", "s64", "u64")))
        u = "u" + t[1:]
        return self.write(d, f"({ctype(u)})({self.read(a, u)} {sign} {self.read(b, u)})", t)

    def fuse(self, t, d, a, b, sign):
        c = ctype(t)
        neg_b = "-" if sign == "-" else ""
        if (t, a) in self.products:
            x, y = self.products[t, a]
            self.fused += 1
            return self.write(d, f"ptx::fma_rn<{c}>({self.read(x, t)}, {self.read(y, t)}, {neg_b}{self.read(b, t)})", t)
        if (t, b) in self.products:
            x, y = self.products[t, b]
            self.fused += 1
            return self.write(d, f"ptx::fma_rn<{c}>({neg_b}{self.read(x, t)}, {self.read(y, t)}, {self.read(a, t)})", t)
        return None

    def op_add(self, m, d, a, b):
        return self.binary(m, d, a, b, "+")

    def op_sub(self, m, d, a, b):
        return self.binary(m, d, a, b, "-")

    def op_mul(self, m, d, a, b):
        t = m[-1]
        if is_float(t):
            return self.binary(m, d, a, b, "*")
        if m[0] == "lo":
            return self.binary(m[1:], d, a, b, "*")
        if m[0] == "wide":
            wide = t[0] + str(2 * WIDTH[t])
            return self.write(d, f"({ctype(wide)}){self.read(a, t)} * ({ctype(wide)}){self.read(b, t)}", wide)
        if m[0] == "hi" and WIDTH[t] in (32, 64):
            wide = (
                {32: "int64_t", 64: "__int128"}[WIDTH[t]]
                if t[0] == "s"
                else {32: "uint64_t", 64: "unsigned __int128"}[WIDTH[t]]
            )
            return self.write(d, f"(({wide}){self.read(a, t)} * ({wide}){self.read(b, t)}) >> {WIDTH[t]}", t)
        self.fail(f"mul {m}")

    def op_mad(self, m, d, a, b, c):
        t = m[-1]
        if m[0] == "lo":
            u = "u" + t[1:]
            return self.write(d, f"({ctype(u)})({self.read(a, u)} * {self.read(b, u)} + {self.read(c, u)})", t)
        if m[0] == "wide":
            wide = t[0] + str(2 * WIDTH[t])
            product = f"({ctype(wide)}){self.read(a, t)} * ({ctype(wide)}){self.read(b, t)}"
            return self.write(d, f"(uint64_t)({product}) + (uint64_t){self.read(c, wide)}", wide)
        self.fail(f"mad {m}")

    def op_fma(self, m, d, a, b, c):
        self.only(m, ["rn", "f32"], ["rn", "f64"], ["rm", "f32"])
        t = m[1]
        return self.write(d, f"ptx::fma_{m[0]}<{ctype(t)}>({self.read(a, t)}, {self.read(b, t)}, {self.read(c, t)})", t)

    def op_div(self, m, d, a, b):
        t = m[-1]
        if is_float(t):
            self.only(m, ["rn", t])
            return self.write(d, f"{self.read(a, t)} / {self.read(b, t)}", t)
        self.only(m, [t])
        return self.write(d, f"ptx::divide<{ctype(t)}>({self.read(a, t)}, {self.read(b, t)}, {self.line})", t)

    def op_rem(self, m, d, a, b):
        (t,) = m
        return self.write(d, f"ptx::remainder<{ctype(t)}>({self.read(a, t)}, {self.read(b, t)}, {self.line})", t)

    def op_rcp(self, m, d, a):
        self.only(m, ["rn", "f32"], ["rn", "f64"], ["approx", "ftz", "f64"])
        t = m[-1]
        x = self.read(a, t)
        return self.write(d, f"ptx::rcp_approx({x})" if m[0] == "approx" else f"({ctype(t)})1 / {x}", t)

    def op_sqrt(self, m, d, a):
        self.only(m, ["rn", "f32"], ["rn", "f64"])
        return self.write(d, f"ptx::sqrt_rn({self.read(a, m[1])})", m[1])

    def op_ex2(self, m, d, a):
        self.only(m, ["approx", "f32"], ["approx", "ftz", "f32"])
        return self.write(d, f"ptx::ex2({self.read(a, 'f32')}, {'true' if 'ftz' in m else 'false'})", "f32")

    def op_lg2(self, m, d, a):
        self.only(m, ["approx", "f32"], ["approx", "ftz", "f32"])
        return self.write(d, f"ptx::lg2({self.read(a, 'f32')}, {'true' if 'ftz' in m else 'false'})", "f32")

    def op_abs(self, m, d, a):
        (t,) = m
        if is_float(t):
            b = "b" + t[1:]
            return self.write(d, f"{self.read(a, b)} & {hex((1 << WIDTH[t] - 1) - 1)}ull", b)
        return self.write(
            d, f"{self.read(a, t)} < 0 ? 0 - {self.read(a, 'u' + t[1:])} : {self.read(a, 'u' + t[1:])}", t
        )

    def op_neg(self, m, d, a):
        (t,) = m
        if is_float(t):
            b = "b" + t[1:]
            return self.write(d, f"{self.read(a, b)} ^ {hex(1 << WIDTH[t] - 1)}ull", b)
        return self.write(d, f"0 - {self.read(a, 'u' + t[1:])}", t)

    def op_min(self, m, d, a, b):
        (t,) = m
        return self.write(d, f"ptx::minimum<{ctype(t)}>({self.read(a, t)}, {self.read(b, t)})", t)

    def op_max(self, m, d, a, b):
        (t,) = m
        if t in ("f16x2", "bf16x2"):
            one = f"ptx::from_{t[:-2]}, ptx::to_{t[:-2]}"
            return self.write(d, f"ptx::maximum_pair<{one}>({self.read(a, 'b32')}, {self.read(b, 'b32')})", "b32")
        return self.write(d, f"ptx::maximum<{ctype(t)}>({self.read(a, t)}, {self.read(b, t)})", t)

    # Bits

    def logic(self, m, d, a, b, sign):
        (t,) = m
        self.only(m, ["pred"], ["b16"], ["b32"], ["b64"])
        return self.write(d, f"{self.read(a, t)} {sign} {self.read(b, t)}", t)

    def op_and(self, m, d, a, b):
        return self.logic(m, d, a, b, "&")

    def op_or(self, m, d, a, b):
        return self.logic(m, d, a, b, "|")

    def op_xor(self, m, d, a, b):
        return self.logic(m, d, a, b, "^")

    def op_not(self, m, d, a):
        (t,) = m
        return self.write(d, f"{'!' if t == 'pred' else '~'}{self.read(a, t)}", t)

    def op_shl(self, m, d, a, b):
        (t,) = m
        return self.write(d, f"ptx::shift_left<{ctype(t)}>({self.read(a, t)}, {self.read(b, 'u32')})", t)

    def op_shr(self, m, d, a, b):
        (t,) = m
        return self.write(d, f"ptx::shift_right<{ctype(t)}>({self.read(a, t)}, {self.read(b, 'u32')})", t)

    def op_shf(self, m, d, a, b, c):
        self.only(m, *([x, y, "b32"] for x in "lr" for y in ("wrap", "clamp")))
        n = self.read(c, "u32")
        n = f"({n} & 31)" if m[1] == "wrap" else f"ptx::minimum<uint32_t>({n}, 32)"
        pair = f"((uint64_t){self.read(b, 'u32')} << 32 | {self.read(a, 'u32')})"
        return self.write(d, f"({pair} << {n}) >> 32" if m[0] == "l" else f"{pair} >> {n}", "b32")

    def op_prmt(self, m, d, a, b, c):
        self.only(m, ["b32"])
        return self.write(
            d, f"ptx::permute({self.read(a, 'u32')}, {self.read(b, 'u32')}, {self.read(c, 'u32')})", "b32"
        )

    def op_lop3(self, m, d, a, b, c, table):
        self.only(m, ["b32"])
        return self.write(d, f"ptx::lop3({', '.join(self.read(x, 'u32') for x in (a, b, c, table))})", "b32")

    def op_bfe(self, m, d, a, b, c):
        self.only(m, ["u32"], ["s32"], ["u64"], ["s64"])
        (t,) = m
        return self.write(
            d, f"ptx::extract<{ctype(t)}>({self.read(a, t)}, {self.read(b, 'u32')}, {self.read(c, 'u32')})", t
        )

    def op_bfi(self, m, f, a, b, c, d):
        self.only(m, ["b32"], ["b64"])
        (t,) = m
        operands = self.read(a, t), self.read(b, t), self.read(c, "u32"), self.read(d, "u32")
        return self.write(f, f"ptx::insert<{ctype(t)}>({', '.join(operands)})", t)

    def op_bfind(self, m, d, a):
        self.only(m, ["shiftamt", "u32"], ["u32"])
        return self.write(
            d, f"ptx::find_high({self.read(a, 'u32')}, {'true' if m[0] == 'shiftamt' else 'false'})", "u32"
        )

    def op_brev(self, m, d, a):
        self.only(m, ["b32"], ["b64"])
        return self.write(d, f"ptx::reverse<{ctype(m[0])}>({self.read(a, m[0])})", m[0])

    def op_popc(self, m, d, a):
        self.only(m, ["b32"], ["b64"])
        return self.write(d, f"__builtin_popcountll({self.read(a, m[0])})", "u32")

    def op_clz(self, m, d, a):
        self.only(m, ["b32"], ["b64"])
        x = self.read(a, m[0])
        return self.write(d, f"{x} ? __builtin_clzll({x}) - {64 - WIDTH[m[0]]} : {WIDTH[m[0]]}", "u32")

    # Comparison

    def op_setp(self, m, d, a, b, c=None):
        t, compare = m[-1], m[0]
        combine = m[1] if len(m) == 3 else None
        if len(m) > 3 or "|" in d or (combine is None) != (c is None):
            self.fail(f"setp {m}")
        x, y = self.read(a, t), self.read(b, t)
        ordered = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
        if is_float(t):
            either_nan = f"ptx::unordered({x}, {y})"
            if compare == "ne":
                code = f"(!{either_nan} && {x} != {y})"
            elif compare in ordered:
                code = f"({x} {ordered[compare]} {y})"
            elif compare in ("nan", "num"):
                code = either_nan if compare == "nan" else f"(!{either_nan})"
            elif compare[:-1] in ("eq", "ne", "lt", "le", "gt", "ge") and compare[-1] == "u":
                code = f"({either_nan} || {x} {ordered[compare[:-1]]} {y})"
            else:
                self.fail(f"setp {m}")
        else:
            unsigned = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
            sign = ordered.get(compare) or (unsigned.get(compare) if t[0] == "u" else None)
            if sign is None or (t[0] == "b" and compare not in ("eq", "ne")):
                self.fail(f"setp {m}")
            code = f"({x} {sign} {y})"
        if combine:
            q = self.read(c, "pred")
            code = {"and": f"{code} & {q}", "or": f"{code} | {q}", "xor": f"{code} ^ {q}"}[combine]
        return self.write(d, code, "pred")

    def op_selp(self, m, d, a, b, p):
        (t,) = m
        t = t if re.match("0[fFdD]", a + b) or re.match("0[fFdD]", b) else "b" + str(WIDTH[t])
        return self.write(d, f"{self.read(p, 'pred')} ? {self.read(a, t)} : {self.read(b, t)}", t)

    # Conversion

    def op_cvt(self, m, d, a, b=None):
        to, source = m[-2], m[-1]
        how = m[:-2]
        x = None
        if to in ("f16x2", "bf16x2") and source == "f32" and how == ["rn"]:  # a is the upper half
            halves = (f"uint32_t{{ptx::to_{to[:-2]}({self.read(x, 'f32')})}}" for x in (a, b))
            return self.write(d, "{} << 16 | {}".format(*halves), "b32")
        if b is not None:
            self.fail(f"cvt {m} of two values")

        def integer(t):
            return t[0] in "us"

        if integer(to) and integer(source):
            self.only(how, [])
            return self.write(d, f"({ctype(to)}){self.read(a, source)}", to)
        if to == "tf32" and source == "f32":
            self.only(how, ["rna"])
            return self.write(d, f"ptx::to_tf32({self.read(a, 'f32')})", "b32")
        if source in ("f16", "bf16"):
            self.only(how, [])
            if to != "f32":
                self.fail(f"cvt {m}")
            return self.write(d, f"ptx::from_{source}({self.read(a, 'b16')})", "f32")
        if to in ("f16", "bf16"):
            self.only(how, ["rn"])
            if source != "f32":
                self.fail(f"cvt {m}")
            return self.write(d, f"ptx::to_{to}({self.read(a, 'f32')})", "b16")
        if is_float(source) and is_float(to):
            x = self.read(a, source)
            if source == to:
                self.only(how, ["sat"], ["rni"], ["rzi"], ["rmi"], ["rpi"])
                return self.write(d, f"ptx::{how[0]}({x})", to)
            self.only(how, *([["rn"]] if to == "f32" else [[]]))
            return self.write(d, f"({ctype(to)}){x}", to)
        if is_float(source) and integer(to) and WIDTH[to] >= 32:
            self.only(how, ["rni"], ["rzi"], ["rmi"], ["rpi"])
            return self.write(d, f"ptx::to_integer<{ctype(to)}>(ptx::{how[0]}({self.read(a, source)}))", to)
        if integer(source) and is_float(to):
            self.only(how, ["rn"])
            return self.write(d, f"({ctype(to)}){self.read(a, source)}", to)
        self.fail(f"cvt {m}")

    # Memory

    def access(self, m, address, known):
        """(space, number of elements, type, C++ expression of a checked pointer of this process)"""
        m = [x for x in m if x not in ("nc", "L1::no_allocate", "L2::128B")] if known == "ld" else list(m)
        space = m.pop(0) if m[0] in ("global", "shared", "param") else "generic"
        count = {"v2": 2, "v4": 4}.get(m[0], 1)
        if count > 1:
            m.pop(0)
        if len(m) != 1 or m[0] not in WIDTH or m[0] == "pred" or (known != "ld" and space == "param"):
            self.fail(f"{known} {m}")
        t = m[0]
        how = "ptx::kRead" if known == "ld" else "ptx::kWrite"
        at = f"ptx::{space}_at<{WIDTH[t] // 8 * count}>({self.address(address, space)}, {how}, {self.line})"
        return count, t, at

    def op_ld(self, m, d, address):
        count, t, pointer = self.access(m, address, "ld")
        c = STORED[WIDTH[t]] if t[0] in "bf" else ctype(t)
        raw = "b" + str(WIDTH[t]) if t[0] in "bf" else t
        code = f"{{ const void* const at = {pointer}; "
        for i in range(count):
            code += f"const {c} x{i} = ptx::load<{c}>(at, {i}); "
        for i, name in enumerate(self.elements(d, count)):
            code += self.write(name, f"x{i}", raw)
        return code + " }"

    def op_st(self, m, address, a):
        count, t, pointer = self.access(m, address, "st")
        raw = "b" + str(WIDTH[t])
        values = self.elements(a, count)
        stores = " ".join(
            f"ptx::store<{STORED[WIDTH[t]]}>(at, {i}, {self.read(x, t if re.match('0[fFdD]', x) else raw)});"
            if not re.match("0[fFdD]", x)
            else f"ptx::store<{STORED[WIDTH[t]]}>(at, {i}, ptx::bits<{STORED[WIDTH[t]]}>({self.read(x, t)}));"
            for i, x in enumerate(values)
        )
        return f"{{ void* const at = {pointer}; {stores} }}"

    def op_atom(self, m, d, address, a):
        space, operation, t = m if len(m) == 3 else ["generic", *m]
        known = {"add": ("u32", "u64", "f32", "f64"), "or": ("b32",), "and": ("b32",), "max": ("u32",), "min": ("u32",)}
        if space not in ("global", "shared", "generic") or t not in known.get(operation, ()):
            self.fail(f"atom {m}")
        if t == "f32" and space == "generic":  # whether subnormal numbers are flushed depends on the space
            self.fail(f"atom {m}")
        c = ctype(t)
        after = {
            "add": "old + x",
            "or": "old | x",
            "and": "old & x",
            "max": "old > x ? old : x",
            "min": "old < x ? old : x",
        }[operation]
        if t == "f32" and space == "global":
            after = "ptx::flushed(ptx::flushed(old) + ptx::flushed(x))"
        pointer = f"ptx::{space}_at<{WIDTH[t] // 8}>({self.address(address, space)}, ptx::kAtomic, {self.line})"
        return (
            f"{{ void* const at = {pointer}; const {c} x = {self.read(a, t)}; const {c} old = ptx::load<{c}>(at, 0); "
            f"ptx::store<{c}>(at, 0, {after}); {self.write(d, 'old', t)} }}"
        )

    def op_red(self, m, address, a):
        self.fail("red")

    def op_membar(self, m):
        self.only(m, ["gl"], ["cta"], ["sys"])
        return ";"

    def op_fence(self, m):
        return ";"

    def op_cp(self, m, *operands):
        if m == ["async", "commit_group"]:
            return "ptx::copy_commit();"
        if m == ["async", "wait_group"]:
            return f"ptx::copy_wait({int(operands[0])});"
        if m == ["async", "wait_all"]:
            return "ptx::copy_commit(); ptx::copy_wait(0);"
        if m not in (
            ["async", "ca", "shared", "global"],
            ["async", "cg", "shared", "global"],
            ["async", "cg", "shared", "global", "L2::128B"],
            ["async", "ca", "shared", "global", "L2::128B"],
        ):
            self.fail(f"cp {m}")
        to, source, size = operands[:3]
        size = int(size)
        if size not in ((16,) if m[1] == "cg" else (4, 8, 16)):
            self.fail(f"cp.async of {size} bytes")
        valid = self.read(operands[3], "u32") if len(operands) > 3 else str(size)
        at = f"{self.address(to, 'shared')}, {self.address(source, 'global')}"
        return f"ptx::copy_async<{size}>({at}, {valid}, {self.line});"

    # What threads do together

    def op_bar(self, m, *operands):
        if m == ["warp", "sync"]:
            return f"ptx::sync_warp({self.read(operands[0], 'u32')}, {self.line});"
        if m == ["sync"]:
            (number,) = operands
            return f"ptx::barrier({int(number)}, {self.line});"
        if m == ["red", "popc", "u32"]:
            d, number, p = operands
            return self.write(
                d, f"ptx::barrier_red<ptx::kPopc>({int(number)}, {self.read(p, 'pred')}, {self.line})", "u32"
            )
        if m[:1] == ["red"] and m[1] in ("or", "and") and m[2:] == ["pred"]:
            d, number, p = operands
            kind = {"or": "kOr", "and": "kAnd"}[m[1]]
            return self.write(
                d, f"ptx::barrier_red<ptx::{kind}>({int(number)}, {self.read(p, 'pred')}, {self.line})", "pred"
            )
        self.fail(f"bar {m}")

    def op_barrier(self, m, *operands):
        if m == ["sync", "aligned"] or m == ["cta", "sync", "aligned"]:
            return self.op_bar(["sync"], *operands)
        self.fail(f"barrier {m}")

    def op_vote(self, m, d, p, mask):
        self.only(m, ["sync", "ballot", "b32"], ["sync", "any", "pred"], ["sync", "all", "pred"])
        t = "b32" if m[1] == "ballot" else "pred"
        return self.write(
            d, f"ptx::vote<ptx::k{m[1].capitalize()}>({self.read(p, 'pred')}, {self.read(mask, 'u32')}, {self.line})", t
        )

    def op_redux(self, m, d, a, mask):
        self.only(
            m,
            *(["sync", x, "b32"] for x in ("or", "and", "xor")),
            *(["sync", x, t] for x in ("add", "min", "max") for t in ("u32", "s32")),
        )
        name = m[1].capitalize() + ("Signed" if m[2] == "s32" and m[1] != "add" else "")
        return self.write(
            d, f"ptx::redux<ptx::kRedux{name}>({self.read(a, 'u32')}, {self.read(mask, 'u32')}, {self.line})", "u32"
        )

    def op_shfl(self, m, d, a, b, c, mask):
        self.only(m, *(["sync", x, "b32"] for x in ("up", "down", "bfly", "idx")))
        d, _, p = d.partition("|")
        arguments = ", ".join(self.read(x, "b32") for x in (a, b, c, mask))
        code = f"{{ const ptx::Shuffled x = ptx::shuffle<ptx::k{m[1].capitalize()}>({arguments}, {self.line}); "
        code += self.write(d, "x.value", "b32")
        return code + (self.write(p, "x.valid", "pred") if p else "") + " }"

    def op_ldmatrix(self, m, d, address):
        turned = "trans" in m
        rest = [x for x in m if x != "trans"]
        if (
            rest[:3] != ["sync", "aligned", "m8n8"]
            or rest[4:] != ["shared", "b16"]
            or rest[3] not in ("x1", "x2", "x4")
        ):
            self.fail(f"ldmatrix {m}")
        count = int(rest[3][1])
        names = split_operands(d[1:-1])
        if len(names) != count:
            self.fail(d)
        code = f"{{ uint32_t x[{count}]; ptx::load_matrices<{count}, {'true' if turned else 'false'}>"
        code += f"(x, {self.address(address, 'shared')}, {self.line}); "
        return code + " ".join(self.write(n, f"x[{i}]", "b32") for i, n in enumerate(names)) + " }"

    def op_mma(self, m, d, a, b, c):
        kinds = {
            ("m16n8k16", "bf16"): ("kBfloat16", 4, 2),
            ("m16n8k16", "f16"): ("kHalf", 4, 2),
            ("m16n8k8", "tf32"): ("kTf32", 4, 2),
        }
        if (
            m[:2] != ["sync", "aligned"]
            or m[3:5] != ["row", "col"]
            or len(m) != 9
            or m[5] != "f32"
            or m[8] != "f32"
            or m[6] != m[7]
        ):
            self.fail(f"mma {m}")
        if (m[2], m[6]) not in kinds:
            self.fail(f"mma {m}")
        kind, in_a, in_b = kinds[m[2], m[6]]
        values = [self.read(x, "b32") for x in [*self.elements(a, in_a), *self.elements(b, in_b)]]
        sums = [self.read(x, "b32" if x.startswith("%") else "f32") for x in self.elements(c, 4)]
        sums = [s if x.startswith("%") else f"ptx::bits<uint32_t>({s})" for s, x in zip(sums, self.elements(c, 4))]
        code = f"{{ const uint32_t in[] = {{{', '.join(values + sums)}}}; uint32_t x[4]; "
        code += f"ptx::mma<ptx::{kind}>(x, in, {self.line}); "
        return code + " ".join(self.write(n, f"x[{i}]", "b32") for i, n in enumerate(self.elements(d, 4))) + " }"

    # Control

    def op_bra(self, m, label):
        self.only(m, [], ["uni"])
        return f"goto {label.replace('$', 'S')};"

    def op_ret(self, m):
        return "return;"

    def op_exit(self, m):
        return "return;"

    def op_trap(self, m):
        return f'ptx::fail({self.line}, "trap");'

    def text(self):
        self.run()
        out = ['#include "ptxrun.h"', "namespace {", f"void kernel() {{  // {self.name}"]
        by_width = {}
        for name in sorted(self.used):
            by_width.setdefault(self.scopes[0][name], []).append(name.replace("%", "_"))
        # What a register holds before it is written is unspecified; a number that no computation is likely to survive.
        poison = {1: "false", 16: "0xA5A5", 32: "0xA5A5A5A5", 64: "0xA5A5A5A5A5A5A5A5"}
        for width, names in sorted(by_width.items()):
            out.append(f"{STORED[width]} " + ", ".join(f"{n} = {poison[width]}" for n in names) + ";")
        out += self.out
        out += ["}", f'const ptx::Entry entry("{self.name}", kernel, {self.param_bytes}, {self.most_threads});', "}"]
        return "\n".join(out) + "\n"


def strip_comments(text):
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    return re.sub(r"//[^\n]*", "", text)


def kernels(text):
    """(match of the head, body, line of the body's beginning)"""
    for match in re.finditer(r"(?:\.(?:visible|weak)\s+)?\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{", text):
        depth, i = 1, match.end()
        brace = re.compile(r"[{}]")
        while depth:
            b = brace.search(text, i)
            depth += 1 if b[0] == "{" else -1
            i = b.end()
        yield match, text[match.end() : i - 1], text.count("\n", 0, match.end()) + 1


def module_level(text):
    """Names of the shared arrays outside of functions; anything else there is an error."""
    text = strip_comments(text)
    for match, body, _ in reversed(list(kernels(text))):
        text = text[: match.start()] + text[match.end() + len(body) + 1 :]
    shared = set()
    text = re.sub(r"\.section[^{]*\{[^}]*\}", "", text, flags=re.S)  # debug information
    text = re.sub(r"\.file\s[^\n]*", "", text)
    for statement in re.split(r"[;\n]", text):
        statement = statement.strip()
        if not statement or re.match(r"\.(version|target|address_size)\b", statement):
            continue
        if found := re.fullmatch(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", statement):
            shared.add(found[1])
        elif not statement.startswith(".global"):  # a kernel that uses one has an operand that is not known
            raise Error(f"at the top of the module: {statement!r}")
    return shared


def split(text):
    """The kernels of a module by mangled name, each as the text of a module of its own."""
    text = strip_comments(text)
    found = list(kernels(text))
    ends = [(match.start(), match.end() + len(body) + 1) for match, body, _ in found]
    head, tail = text[: ends[0][0]], text[ends[-1][1] :]
    head = re.sub(r"^\.global [^\n]*\n", "", head, flags=re.M)  # torch's headers bring some that no kernel uses
    return {match[1]: f"{head}{text[begin:end]}{tail}" for (match, _, _), (begin, end) in zip(found, ends)}


def translate(text, count=False, contract=False):
    """C++ for a module of one kernel, and its basic blocks as lists of (line, instruction)."""
    shared = module_level(text)
    ((match, body, line),) = kernels(text)
    params = []
    for parameter in split_operands(match[2]):
        found = re.fullmatch(r"\.param\s+(?:\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]|\.(\w+)\s+([\w$]+))", parameter)
        if not found:
            raise Error(f"parameter {parameter!r}")
        size = WIDTH[found[4]] // 8 if found[4] else int(found[3])
        params.append((size, size, found[5]) if found[4] else (int(found[1]), size, found[2]))
    kernel = Kernel(match[1], params, match[3].strip(), body, line, shared, contract)
    kernel.count = count
    return kernel.text(), kernel.blocks
