"""The calculator: what it understands, and that nothing makes it work for long."""

import re
import time

from chapter4.calculator import calculator
from chapter4.tools import ToolError, function_tool

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("17% * 1200000", "204000"),
        ("17% of 1,200,000", "204000"),
        ("0.17 * 1_200_000", "204000"),
        ("17 % 5", "2"),
        ("-17 % 5", "3"),
        ("17 % -5", "-4.83"),  # percent, as no operand follows
        ("-17 // 5", "-4"),
        ("50%%", "0.005"),
        ("10% - 3", "-2.9"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.333333333333333"),
        ("2 ^ 3 ^ 2", "512"),
        ("-2 ** 2", "-4"),
        ("2 ^ 100", "1267650600228229401496703205376"),
        ("(1 + 2) * (3 - 4.5)", "-4.5"),
        ("max(1,200)", "200"),
        ("max(1,200, 3) + 1,000", "1200"),
        ("round(2.5) + round(-1.005, 2)", "1.99"),
        ("sqrt(2) ^ 2", "2"),
        ("ln(e ^ 3) + log(1000)", "6"),
        ("6 \N{MULTIPLICATION SIGN} 7 \N{MINUS SIGN} 4 \N{DIVISION SIGN} 2", "40"),
        ("1e3", "1000"),
        ("1 / 8000000000", "1.25E-10"),
        ("-0", "0"),
    ],
)
def test_it_calculates(expression: str, result: str) -> None:
    assert calculator(expression) == result


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1 / 0", "division by zero"),
        ("sqrt(-1)", "real numbers"),
        ("ln(0)", "real numbers"),
        ("0 ^ 0", "real numbers"),
        ("2 3", "operator was expected instead of '3'"),
        ("2 *", "ends early"),
        ("(1", ") is missing"),
        ("1)", "instead of ')'"),
        ("sin(1)", "'sin' is not known; there are pi, e, abs()"),
        ("max()", "instead of ')'"),
        ("sqrt(1, 2)", "does not take 2 numbers"),
        ("round(1, 99)", "from 0 to 30 digits"),
        ("1; 2", "'; 2' cannot be read"),
        ("__import__('os')", "cannot be read"),
        ("(1).__class__", "cannot be read"),
        ("1 if 1 else 2", "instead of 'if'"),
        ("", "ends early"),
    ],
)
def test_what_it_does_not_understand_is_named(expression: str, reason: str) -> None:
    with pytest.raises(ToolError, match=re.escape(reason)):
        calculator(expression)


@pytest.mark.parametrize(
    "expression",
    [
        "9^9^9^9^9",
        "9**9**9**9",
        "exp(exp(exp(99)))",
        "1e9999 * 1e9999",
        "9^999999999999",
        "2^(2^(2^(2^(2^2))))",
        "(" * 140 + "1" + ")" * 140,
        "-" * 299 + "1",
        "2^" * 149 + "2",
        "9" * 300 + "9",
    ],
)
def test_no_expression_makes_it_work_for_long(expression: str) -> None:
    """The processor's time is counted: a paused machine is no reason to fail."""
    began = time.thread_time()
    with pytest.raises(ToolError):
        calculator(expression)
    assert time.thread_time() - began < 0.5


@given(st.text(alphabet="0123456789.,%+-*/^()e _maxround", max_size=60))
def test_any_text_gives_a_short_result_or_an_error(text: str) -> None:
    try:
        said = calculator(text)
    except ToolError as error:
        said = str(error)
    assert 0 < len(said) < 300


@pytest.mark.parametrize(
    ("expression", "fits"),
    [
        ("17% of 1,200,000", True),
        ("0.17 * 1_200_000", True),
        ("max(sqrt(2) ^ 2, 1e3) \N{MULTIPLICATION SIGN} pi", True),
        ("17% of the population", False),
        ("", False),
    ],
)
def test_the_schema_says_which_characters_an_expression_has(expression: str, fits: bool) -> None:
    parameters = function_tool(calculator).parameters
    assert jsonschema.Draft202012Validator(parameters).is_valid({"expression": expression}) == fits
