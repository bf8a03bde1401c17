"""Functions that a region may call: their value depends on their arguments only, and they change nothing."""

import re

_MATH = """acos acosh asin asinh atan atan2 atanh cbrt ceil copysign cos cosh erf erfc exp exp2 expm1 fabs fdim floor fma fmax
fmin fmod hypot ldexp log log10 log1p log2 logb nearbyint nextafter pow remainder rint round scalbn sin sinh sqrt tan tanh tgamma
trunc""".split()
MATH = frozenset(name + suffix for name in _MATH for suffix in ("", "f", "l"))
MINIMA, MAXIMA = ("min", "MIN", "Min", "imin", "MINIMUM"), ("max", "MAX", "Max", "imax", "MAXIMUM")
PURE = MATH | set(MINIMA) | set(MAXIMA) | set("""abs labs llabs isnan isinf isfinite signbit lround lroundf llround lrint llrint
ilogb floord ceild __builtin_fabs __builtin_sqrt __builtin_fmax __builtin_fmin""".split())
ATTRIBUTE = re.compile(r"__attribute__\s*\(\s*\((?:[^()]|\([^()]*\))*\b_*const_*\b(?:[^()]|\([^()]*\))*\)\s*\)")


def is_pure(name: str, declared: frozenset[str]) -> bool:
    """Whether a call of that function may move: it is in the list, has the attribute const, or the caller says so."""
    return name in PURE or name in declared


def declared_pure(text: str) -> set[str]:
    """The functions that text without comments declares or defines with __attribute__((const))."""
    pure = set()
    for match in ATTRIBUTE.finditer(text):
        before, after = text[:match.start()], text[match.end():]
        begin = max(before.rfind(mark) for mark in ";{}") + 1
        end = min((at for mark in ";{" if (at := after.find(mark)) >= 0), default=len(after))
        names = re.findall(r"([A-Za-z_]\w*)\s*\(", ATTRIBUTE.sub(" ", before[begin:] + " " + after[:end]))
        pure.update(name for name in names[:1] if not name.startswith("__attribute"))
    return pure
