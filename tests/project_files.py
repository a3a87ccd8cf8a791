"""Which files make up the project."""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# What the scripts and the tools make, as .gitignore has it.
GENERATED = {".git", ".venv", ".cache", "__pycache__", ".hypothesis"}


def project_files(root: Path = ROOT) -> list[Path]:
    """Every file that is or would be committed, relative to `root`.

    Where git cannot tell (there is none, or the project came as an archive), every file that
    is not a generated one.
    """
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
            cwd=root,
            capture_output=True,
            check=True,
            text=True,
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        return sorted(_walk(root))
    paths = [Path(name) for name in listed.split("\0") if name]
    return [path for path in paths if (root / path).is_file()]


def _walk(root: Path) -> list[Path]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [
            name
            for name in folders
            if name not in GENERATED and not name.endswith(("_cache", ".egg-info"))
        ]
        found += [(Path(folder) / name).relative_to(root) for name in files]
    return found
