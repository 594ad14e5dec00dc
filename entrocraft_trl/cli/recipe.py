"""`entrocraft recipe`: the recipes and Accelerate's launch files that come with the package, by name."""

import argparse
import difflib
from pathlib import Path

from . import CommandError, is_main_process


FOLDER = Path(__file__).parents[1] / "recipes"  # the repository's `configs`: a link in a checkout, copies in a wheel


def recipes() -> dict[str, Path]:
    """File of each name that `entrocraft train --config NAME` takes."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def launch_files() -> dict[str, Path]:
    """File of each name that stands for a `--config_file` of `accelerate launch`."""
    return {f"accelerate/{path.stem}": path for path in sorted(FOLDER.glob("accelerate/*.yaml"))}


def comparisons() -> dict[str, Path]:
    """File of each name that stands for a `--config` of `entrocraft compare`."""
    return {f"compare/{path.stem}": path for path in sorted(FOLDER.glob("compare/*.yaml"))}


def comparison_file(value: str) -> str:
    """The file that `entrocraft compare --config value` means; the names go without `compare/` too."""
    if Path(value).is_file() or value.endswith((".yaml", ".yml")):
        return value
    named = value if value.startswith("compare/") else f"compare/{value}"
    return str(_named(named, comparisons(), "--config takes the path of a YAML file or the name of a comparison, got"))


def config_file(value: str) -> str:
    """
    The file that `--config value` means: the one at that path if there is one, else the recipe of that name.

    Raises:
        CommandError: If it is neither. What is spelled like a file is left to whoever opens it.
    """
    if Path(value).is_file() or value.endswith((".yaml", ".yml")):
        return value
    return str(_named(value, recipes(), "--config takes the path of a YAML file or the name of a recipe, got"))


def _named(name: str, files: dict[str, Path], complaint: str) -> Path:
    if name not in files:
        close = difflib.get_close_matches(name, files, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"the names are: {', '.join(files)}"
        raise CommandError(f"{complaint} {name!r}; {hint}")
    return files[name]


def main(argv: list[str]) -> None:
    """Run the command: prints the path of one file, or all names, each with the first line of its file."""
    parser = argparse.ArgumentParser(
        prog="entrocraft recipe",
        description="List the recipes, or print the path of one: to read it, or to copy and edit it. A recipe runs by "
        "its name: entrocraft train --config NAME; those that begin with compare/ are for entrocraft compare. "
        "Names that begin with accelerate/ are launch files: "
        'accelerate launch --config_file "$(entrocraft recipe accelerate/zero3)" -m entrocraft_trl train ...',
    )
    parser.add_argument(
        "name", nargs="?", help="name of a recipe, comparison or launch file; without it, all are listed"
    )
    name = parser.parse_args(argv).name
    files = {**recipes(), **launch_files(), **comparisons()}
    if name is not None:
        lines = [str(_named(name, files, "there is no recipe"))]
    else:
        width = max(map(len, files))
        lines = [f"{name:<{width}}  {_first_line(path)}" for name, path in files.items()]
    if is_main_process():
        print("\n".join(lines))


def _first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
