"""Affine forms, and their isl text."""

Linear = dict[str, int]  # coefficients by name; "" is the constant, "floor((i)/2)" and "((i) mod 2)" are names too


class NotAffine(Exception):
    pass


def add(left: Linear, right: Linear, factor: int) -> Linear:
    total = dict(left)
    for name, value in right.items():
        total[name] = total.get(name, 0) + factor * value
    return {name: value for name, value in total.items() if value}


def isl_text(form: Linear) -> str:
    terms = [f"{value}" if not name else name if value == 1 else f"{value}*{name}" for name, value in form.items()]
    return " + ".join(terms).replace("+ -", "- ") or "0"
