"""The process in which code of the tool `python` runs; `sandbox.py` starts it.

It reads the code from its input, locks itself up, writes `LOCKED`, and runs it. What cannot be
locked up writes why and ends before the code is looked at. As `LOCKED` is the first that is
written, no code can pretend that it was refused, nor take it back.
"""

import ast
import contextlib
import importlib
import linecache
import os
import sys
import traceback
import types

from chapter4 import sandbox_kernel, sandbox_policy

LOCKED = b"\0"
NAME = "<code>"


def main(parent: int) -> None:
    try:
        sandbox_kernel.die_with_parent(parent)
        size, _, code = sys.stdin.buffer.read().partition(b"\n")
        if len(code) != int(size):
            raise sandbox_kernel.Unsupported("the process that started it has ended")
        for name in sandbox_policy.PRELOADED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
        sandbox_kernel.lock_up(os.getcwd())
        os.write(sys.stdout.fileno(), LOCKED)
    except (sandbox_kernel.Unsupported, OSError, ValueError) as error:
        print(error, flush=True)
        os._exit(1)
    sys.exit(_run(code.decode()))


def _run(code: str) -> int:
    """Run it as a notebook does: the value of a last expression is printed."""
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        tree = ast.parse(code, NAME)
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, NAME, "exec"), module.__dict__)  # noqa: S102
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), NAME, "eval"), module.__dict__)  # noqa: S307
            if value is not None:
                print(repr(value))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code)
        return 1
    except BaseException as error:
        here = error.__traceback__
        while here and here.tb_frame.f_code.co_filename != NAME:
            here = here.tb_next  # only the code's own lines
        traceback.print_exception(error.with_traceback(here))
        return 1
    return 0
