"""Run the engines' contract tests in a rig: `scripts/test-engines NAME [pytest arguments]`."""

import argparse
import os
import shlex

from tests.rigs.build import MODEL_NAME, ROOT, RigError, build, built, environment
from tests.rigs.recipes import CONTRACT, RECIPES


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/test-engines",
        description="Builds a rig for a real engine without a GPU, unless it is there, and runs "
        "tests/contract with that engine in it; for nixl, the tests of the transfer of KV.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", nargs="?", choices=sorted(RECIPES), help="the engine, or nixl")
    what.add_argument("--built", action="store_true", help="only name the rigs that are there")
    args, pytest_arguments = parser.parse_known_args()
    if args.built:
        print(*built(), sep="\n")
        return
    try:
        folder = build(args.name)
    except (OSError, RigError) as error:
        raise SystemExit(f"error: cannot build the rig: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the next run starts again") from None
    recipe = RECIPES[args.name]
    command = [str(folder / "venv/bin/python"), "-m", "pytest", *recipe.tests]
    if recipe.tests == CONTRACT:
        command += ["--backend", args.name, "--engine-model", str(folder / "model" / MODEL_NAME)]
        command += [f"--engine-flags={shlex.join(recipe.flags)}"]
        command += ["-W", "default"]  # others' warnings are no errors of ours
    command += pytest_arguments
    os.chdir(ROOT)
    os.execve(command[0], command, environment(args.name))  # noqa: S606 (there is no shell)


if __name__ == "__main__":
    main()
