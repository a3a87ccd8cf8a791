"""The tool `calculator`: arithmetic, read by a small parser of its own.

    sum     = product {("+" | "-") product}
    product = sign {("*" | "/" | "//" | "%" | "of") sign}
    sign    = ("+" | "-") sign | power
    power   = postfix ["^" sign]
    postfix = atom {"%"}
    atom    = number | name | name "(" sum {"," sum} ")" | "(" sum ")"

`%` is percent unless an operand follows: `17% * 1200000` and `17% of 1,200,000`, but `17 % 5` is a
remainder. Numbers are decimal with 40 digits, so no result is huge and 0.1 + 0.2 is 0.3.
"""

import decimal
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated

from chapter4.tools import ToolError

from pydantic import Field

MAX_LENGTH = 300  # characters
MAX_DEPTH = 30  # of parentheses, signs and powers within each other
_CONTEXT = decimal.Context(
    prec=40,
    Emax=1000,
    Emin=-1000,
    traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow],
)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:,\d{3})+(?!\d)|\d+(?:_\d+)*)(?:\.\d*)?(?:[eE][+-]?\d{1,4})?|\.\d+)"
    r"|(?P<name>[A-Za-z]+\d*)|(?P<sign>\*\*|//|[-+*/%^(),]))"
)
_OTHER_SIGNS = str.maketrans(
    {"\N{MULTIPLICATION SIGN}": "*", "\N{DIVISION SIGN}": "/", "\N{MINUS SIGN}": "-"}
)

_CONSTANTS = {
    "pi": Decimal("3.141592653589793238462643383279502884197"),
    "e": Decimal("2.718281828459045235360287471352662497757"),
}
_FUNCTIONS: dict[str, tuple[range, Callable[..., Decimal]]] = {
    "abs": (range(1, 2), lambda x: abs(x)),
    "sqrt": (range(1, 2), _CONTEXT.sqrt),
    "exp": (range(1, 2), _CONTEXT.exp),
    "ln": (range(1, 2), _CONTEXT.ln),
    "log": (range(1, 2), _CONTEXT.log10),
    "log10": (range(1, 2), _CONTEXT.log10),
    "floor": (range(1, 2), lambda x: x.to_integral_value(decimal.ROUND_FLOOR)),
    "ceil": (range(1, 2), lambda x: x.to_integral_value(decimal.ROUND_CEILING)),
    "round": (range(1, 3), lambda x, digits=Decimal(0): _rounded(x, digits)),
    "min": (range(1, 100), min),
    "max": (range(1, 100), max),
}

_WORDS = "|".join(["of ", *_FUNCTIONS, *_CONSTANTS])
_SIGNS = "".join(map(chr, _OTHER_SIGNS))
# So that a model whose calls are forced cannot write sentences.
_PATTERN = f"^(?:[-+*/%^(),.0-9_ eE{_SIGNS}]|{_WORDS})+$"


def calculator(
    expression: Annotated[
        str,
        Field(
            min_length=1,
            max_length=MAX_LENGTH,
            pattern=_PATTERN,
            description="for example: 17% * 1200000, (3 + 4) / 2, sqrt(2) ^ 3, max(1, 2)",
        ),
    ],
) -> str:
    """Calculate an arithmetic expression exactly."""
    if len(expression) > MAX_LENGTH:
        raise ToolError(f"an expression has at most {MAX_LENGTH} characters")
    try:
        with decimal.localcontext(_CONTEXT):
            return _written(_Parser(expression).result())
    except decimal.DivisionByZero as error:
        raise ToolError("a division by zero") from error
    except decimal.Overflow as error:
        raise ToolError("the result has more than 1000 digits") from error
    except decimal.InvalidOperation as error:
        raise ToolError("it has no result among the real numbers of 40 digits") from error


class _Parser:
    """One method for each rule of the grammar; each returns a value and moves on."""

    def __init__(self, text: str) -> None:
        self._words = _words(text.translate(_OTHER_SIGNS))
        self._place = 0
        self._depth = 0

    def result(self) -> Decimal:
        value = self._sum()
        if self._next():
            raise ToolError(f"an operator was expected instead of {self._next()!r}")
        return +value

    def _next(self) -> str:
        return self._words[self._place] if self._place < len(self._words) else ""

    def _take(self, *wanted: str) -> str:
        word = self._next()
        if word not in wanted or not word:
            return ""
        self._place += 1
        return word

    def _sum(self) -> Decimal:
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = value + other if sign == "+" else value - other
        return value

    def _product(self) -> Decimal:
        value = self._sign()
        while sign := self._take("*", "/", "//", "%", "of"):
            other = self._sign()
            if sign in ("*", "of"):
                value = value * other
            elif sign == "/":
                value = value / other
            else:
                rest = value % other
                if rest and (rest < 0) != (other < 0):
                    rest += other  # the sign of the divisor, as in Python
                value = (value - rest) / other if sign == "//" else rest
        return value

    def _sign(self) -> Decimal:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ToolError(f"an expression is at most {MAX_DEPTH} levels deep")
        if sign := self._take("+", "-"):
            value = self._sign()
            value = -value if sign == "-" else value
        else:
            value = self._power()
        self._depth -= 1
        return value

    def _power(self) -> Decimal:
        value = self._postfix()
        return value ** self._sign() if self._take("^", "**") else value

    def _postfix(self) -> Decimal:
        value = self._atom()
        while self._next() == "%" and not self._operand_follows():
            self._take("%")
            value = value / 100
        return value

    def _operand_follows(self) -> bool:
        after = self._words[self._place + 1 : self._place + 2]
        return bool(after) and after[0] != "of" and (after[0][0].isalnum() or after[0][0] in "(.")

    def _atom(self) -> Decimal:
        word = self._next()
        self._place += 1
        if word == "(":
            value = self._sum()
            self._close()
            return value
        if word[:1].isdigit() or word[:1] == ".":
            return Decimal(word.replace(",", "").replace("_", ""))
        if word.lower() in _CONSTANTS:
            return _CONSTANTS[word.lower()]
        if word.lower() in _FUNCTIONS and self._take("("):
            return self._function(word.lower())
        if word[:1].isalpha():
            names = ", ".join([*_CONSTANTS, *(f"{name}()" for name in _FUNCTIONS)])
            raise ToolError(f"{word!r} is not known; there are {names}")
        raise ToolError(f"a number was expected instead of {word!r}" if word else "it ends early")

    def _function(self, name: str) -> Decimal:
        values = [self._sum()]
        while self._take(","):
            values.append(self._sum())
        self._close()
        numbers, function = _FUNCTIONS[name]
        if len(values) not in numbers:
            raise ToolError(f"{name}() does not take {len(values)} numbers")
        return function(*values)

    def _close(self) -> None:
        if not self._take(")"):
            raise ToolError("a ) is missing")


def _words(text: str) -> list[str]:
    """The words of an expression; `1,200` is one number unless a function's arguments have it."""
    words: list[str] = []
    in_function: list[bool] = []
    place = 0
    text = text.rstrip()
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise ToolError(f"{text[place:].lstrip()[:20]!r} cannot be read")
        word, place = match[match.lastgroup or 0], match.end()
        if word == "(":
            in_function.append(bool(words) and words[-1].lower() in _FUNCTIONS)
        elif word == ")" and in_function:
            in_function.pop()
        if match["number"] and "," in word and any(in_function):
            word = word.split(",")[0]
            place = match.start("number") + len(word)
        words.append(word)
    return words


def _rounded(value: Decimal, digits: Decimal) -> Decimal:
    if digits != int(digits) or not 0 <= digits <= 30:
        raise ToolError("round() takes from 0 to 30 digits")
    return value.quantize(Decimal(1).scaleb(-int(digits)), decimal.ROUND_HALF_UP)


def _written(value: Decimal) -> str:
    """Whole numbers in full, others with 15 digits, without what follows from rounding."""
    if not value.is_finite():
        raise decimal.InvalidOperation
    if value == value.to_integral_value() and value.adjusted() < 40:
        return f"{value.to_integral_value():f}".replace("-0", "0") if not value else f"{value:.0f}"
    short = decimal.Context(prec=15).plus(value).normalize()
    return f"{short:f}" if -7 < short.adjusted() < 21 else f"{short:E}"
