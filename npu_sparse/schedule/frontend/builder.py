"""SCoPs built in Python, and the operators whose vector stages the scheduler plans."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from npu_sparse.schedule.scop import Scop, ScopError

from .c import parse_text

Size = int | str  # a number, or an expression over the parameters such as "2*D"


class ScopBuilder:
    """A SCoP, statement by statement. Bounds, conditions and statements are C text, and refused where they are not affine.

        b = ScopBuilder("scale", "n")
        b.array("x", "n")
        b.array("y", "n", live_out=True)
        with b.loop("i", 0, "n"):
            b.statement("y[i] = 2 * x[i]")
        scop = b.build()
    """

    def __init__(self, name: str, parameters: str = "", context: str = ""):
        """parameters: their names, separated by blanks; context: what is known of them, in isl's words: "n >= 1 and m <= n"."""
        self.name, self.parameters, self.context = _name(name), [_name(p) for p in parameters.split()], context
        self.arrays: list[tuple[str, tuple[Size, ...], str, bool]] = []
        self.text: list[str] = []
        self.opaques: dict[str, tuple] = {}

    def array(self, name: str, *extents: Size, ctype: str = "float", live_out: bool = False) -> None:
        """Declares an array, or a scalar where no extent is given."""
        if name in [*self.parameters, *(array[0] for array in self.arrays)]:
            raise ScopError(f"<python>: {name} must be declared once, got a second declaration")
        self.arrays.append((_name(name), extents, ctype, live_out))

    @contextmanager
    def loop(self, iterator: str, start: Size, stop: Size, step: int = 1) -> Iterator[None]:
        """Statements inside run for start, start + step ... up to, not including, stop; a negative step counts down to stop."""
        self.text.append(f"for (int {_name(iterator)} = {start}; {iterator} {'<' if step > 0 else '>'} {stop}; "
                         f"{iterator} += {step}) {{")
        yield
        self.text.append("}")

    @contextmanager
    def when(self, condition: str) -> Iterator[None]:
        """Statements inside run where an affine condition holds."""
        self.text.append(f"if ({condition}) {{")
        yield
        self.text.append("}")

    def statement(self, text: str) -> None:
        """Adds an assignment such as "y[i] += a[i][k] * x[k]"."""
        self.text.append(text.strip().rstrip(";") + ";")

    def opaque(self, call: str, reads: tuple[str, ...] = (), writes: tuple[str, ...] = (),
               may_write: tuple[str, ...] = ()) -> None:
        """Adds a call whose inside is not affine: a top-k, a gather.

        Each access is a footprint: "scores[r, k]" is row r, since k is new and runs over all the extent, and
        "scores[r, k] : k <= r" a part of it. What `writes` names is all overwritten; `may_write` may keep its old value.
        """
        key = f"opaque_{len(self.opaques)}"
        write = [(*_footprint(text), False) for text in writes] + [(*_footprint(text), True) for text in may_write]
        if not write:
            raise ScopError(f"<python>: opaque statement must write something, got {call}")
        if not re.fullmatch(r"\s*[A-Za-z_]\w*\s*\(.*\)\s*;?\s*", call, re.S):
            raise ScopError(f"<python>: opaque statement must be a call, got {call}")
        self.opaques[key] = ([(*_footprint(text), False) for text in reads], write, call.strip().rstrip(";"))
        self.text.append(f"{key}();")

    def build(self) -> Scop:
        """The SCoP; raises ScopError for what is not affine."""
        live_out = [name for name, _, _, live in self.arrays if live]
        if not live_out:
            raise ScopError(f"<python>: {self.name} must have an array that is live out, got none")
        declarations = [f"int {name}" for name in self.parameters]
        for name, extents, ctype, _ in self.arrays:
            declarations.append(f"{ctype} {name}" + "".join(f"[{extent}]" for extent in extents))
        text = "\n".join([f"void {self.name}({', '.join(declarations)})", "{", f"#pragma scop live_out({', '.join(live_out)})",
                          *self.text, "#pragma endscop", "}"])
        return parse_text(text, "<python>", self.name, self.opaques, self.context)


def _name(name: str) -> str:
    if not name.isidentifier():
        raise ScopError(f"<python>: name must be an identifier, got {name!r}")
    return name


def _footprint(text: str) -> tuple[str, list[str], str]:
    match = re.fullmatch(r"\s*(\w+)\s*(?:\[(.*?)\])?\s*(?::(.*))?", text, re.S)
    if not match:
        raise ScopError(f'<python>: footprint must be like "a[i, k] : k <= i", got {text!r}')
    return match[1], [part.strip() for part in (match[2] or "").split(",") if part.strip()], (match[3] or "").strip()


def _start(name: str, *sizes: Size) -> ScopBuilder:
    """A builder whose parameters are the names in the sizes, each at least 1."""
    names = dict.fromkeys(word for size in sizes for word in re.findall(r"[A-Za-z_]\w*", str(size)))
    return ScopBuilder(name, " ".join(names), " and ".join(f"{name} >= 1" for name in names))


# Operators, as a chain of separate nests, each written the naive way: to fuse and order them is the scheduler's work.


def softmax(rows: Size = "R", columns: Size = "C") -> Scop:
    """y = softmax(x) over the columns, through row maxima, exponentials and row sums."""
    b = _start("softmax", rows, columns)
    b.array("x", rows, columns)
    b.array("top", rows)
    b.array("power", rows, columns)
    b.array("total", rows)
    b.array("y", rows, columns, live_out=True)
    with b.loop("r", 0, rows):
        b.statement("top[r] = -INFINITY")
    with b.loop("r", 0, rows), b.loop("c", 0, columns):
        b.statement("top[r] = fmaxf(top[r], x[r][c])")
    with b.loop("r", 0, rows), b.loop("c", 0, columns):
        b.statement("power[r][c] = expf(x[r][c] - top[r])")
    with b.loop("r", 0, rows):
        b.statement("total[r] = 0.0f")
    with b.loop("r", 0, rows), b.loop("c", 0, columns):
        b.statement("total[r] += power[r][c]")
    with b.loop("r", 0, rows), b.loop("c", 0, columns):
        b.statement("y[r][c] = power[r][c] / total[r]")
    return b.build()


def rms_norm_residual(rows: Size = "R", columns: Size = "C") -> Scop:
    """h = x + residual and y = h / sqrt(mean(h^2) + epsilon) * weight."""
    b = _start("rms_norm_residual", rows, columns)
    b.array("epsilon")
    b.array("x", rows, columns)
    b.array("residual", rows, columns)
    b.array("weight", columns)
    b.array("square", rows)
    b.array("scale", rows)
    b.array("h", rows, columns, live_out=True)
    b.array("y", rows, columns, live_out=True)
    with b.loop("r", 0, rows), b.loop("c", 0, columns):
        b.statement("h[r][c] = x[r][c] + residual[r][c]")
    with b.loop("r", 0, rows):
        b.statement("square[r] = 0.0f")
    with b.loop("r", 0, rows), b.loop("c", 0, columns):
        b.statement("square[r] += h[r][c] * h[r][c]")
    with b.loop("r", 0, rows):
        b.statement(f"scale[r] = 1.0f / sqrtf(square[r] / (float)({columns}) + epsilon)")
    with b.loop("r", 0, rows), b.loop("c", 0, columns):
        b.statement("y[r][c] = h[r][c] * scale[r] * weight[c]")
    return b.build()


def rope(heads: Size = "H", tokens: Size = "T", half: Size = "D") -> Scop:
    """The rotary embedding: y = x cos + rotate_half(x) sin, for a head of 2 * half dimensions."""
    b = _start("rope", heads, tokens, half)
    b.array("x", heads, tokens, f"2*{half}")
    b.array("cosine", tokens, half)
    b.array("sine", tokens, half)
    b.array("y", heads, tokens, f"2*{half}", live_out=True)
    with b.loop("h", 0, heads), b.loop("t", 0, tokens), b.loop("d", 0, half):
        b.statement(f"y[h][t][d] = x[h][t][d] * cosine[t][d] - x[h][t][d + {half}] * sine[t][d]")
    with b.loop("h", 0, heads), b.loop("t", 0, tokens), b.loop("d", 0, half):
        b.statement(f"y[h][t][d + {half}] = x[h][t][d + {half}] * cosine[t][d] + x[h][t][d] * sine[t][d]")
    return b.build()


def indexer(heads: Size = "H", blocks: Size = "N", block: Size = 64, keys: Size = "T") -> Scop:
    """best[n][k] = max over the queries u of block n of sum over heads of relu(dot[h][n][u][k]) * w[n][u][h].

    dot holds the products of index queries and keys; all keys count as valid (a caller masks dot, or cuts `keys`).
    """
    b = _start("indexer", heads, blocks, block, keys)
    b.array("dot", heads, blocks, block, keys)
    b.array("w", blocks, block, heads)
    b.array("relu", heads, blocks, block, keys)
    b.array("weighted", heads, blocks, block, keys)
    b.array("score", blocks, block, keys)
    b.array("best", blocks, keys, live_out=True)

    @contextmanager
    def queries():
        with b.loop("n", 0, blocks), b.loop("u", 0, block):
            yield
    with b.loop("h", 0, heads), queries(), b.loop("k", 0, keys):
        b.statement("relu[h][n][u][k] = fmaxf(dot[h][n][u][k], 0.0f)")
    with b.loop("h", 0, heads), queries(), b.loop("k", 0, keys):
        b.statement("weighted[h][n][u][k] = relu[h][n][u][k] * w[n][u][h]")
    with queries(), b.loop("k", 0, keys):
        b.statement("score[n][u][k] = 0.0f")
    with b.loop("h", 0, heads), queries(), b.loop("k", 0, keys):
        b.statement("score[n][u][k] += weighted[h][n][u][k]")
    with b.loop("n", 0, blocks), b.loop("k", 0, keys):
        b.statement("best[n][k] = -INFINITY")
    with queries(), b.loop("k", 0, keys):
        b.statement("best[n][k] = fmaxf(best[n][k], score[n][u][k])")
    return b.build()


def lu_decomp(n: Size = 16) -> Scop:
    """a = L U in place, without pivoting; L has a unit diagonal."""
    b = _start("lu_decomp", n)
    b.array("a", n, n, live_out=True)
    with b.loop("k", 0, n):
        with b.loop("i", "k + 1", n):
            b.statement("a[i][k] /= a[k][k]")
        with b.loop("i", "k + 1", n), b.loop("j", "k + 1", n):
            b.statement("a[i][j] -= a[i][k] * a[k][j]")
    return b.build()


def trsmL_off_diag(columns: Size = 112, n: Size = 16) -> Scop:
    """b := L^-1 b for an n x n lower triangular matrix a = L with a unit diagonal and n x columns right-hand sides."""
    b = _start("trsmL_off_diag", n, columns)
    b.array("a", n, n)
    b.array("b", n, columns, live_out=True)
    with b.loop("i", 0, n), b.loop("j", 0, "i"), b.loop("c", 0, columns):
        b.statement("b[i][c] -= a[i][j] * b[j][c]")
    return b.build()


def trsmL(columns: Size = 16, n: Size = 16) -> Scop:
    """b := L^-1 b for an n x n lower triangular matrix a = L and n x columns right-hand sides."""
    b = _start("trsmL", n, columns)
    b.array("a", n, n)
    b.array("b", n, columns, live_out=True)
    with b.loop("i", 0, n):
        with b.loop("j", 0, "i"), b.loop("c", 0, columns):
            b.statement("b[i][c] -= a[i][j] * b[j][c]")
        with b.loop("c", 0, columns):
            b.statement("b[i][c] /= a[i][i]")
    return b.build()


def trsmU_T(rows: Size = 112, n: Size = 16) -> Scop:
    """b := b U^-1 for rows x n left-hand sides and an n x n upper triangular matrix a = U."""
    b = _start("trsmU_T", rows, n)
    b.array("a", n, n)
    b.array("b", rows, n, live_out=True)
    with b.loop("r", 0, rows), b.loop("j", 0, n):
        b.statement("b[r][j] /= a[j][j]")
        with b.loop("k", "j + 1", n):
            b.statement("b[r][k] -= b[r][j] * a[j][k]")
    return b.build()


def add(rows: Size = 1024, columns: Size = 32) -> Scop:
    """y = a + b."""
    b = _start("add", rows, columns)
    b.array("a", rows, columns)
    b.array("b", rows, columns)
    b.array("y", rows, columns, live_out=True)
    with b.loop("i", 0, rows), b.loop("j", 0, columns):
        b.statement("y[i][j] = a[i][j] + b[i][j]")
    return b.build()


OPERATORS = {operator.__name__: operator for operator in
             (softmax, rms_norm_residual, rope, indexer, lu_decomp, trsmL_off_diag, trsmL, trsmU_T, add)}
