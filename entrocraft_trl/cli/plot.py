"""`entrocraft plot`: a run's figure, a comparison of runs, or a band before any training."""

import argparse
from pathlib import Path

from . import CommandError, CommandParser, is_main_process, user_errors


POINTS = 401  # of a previewed band: enough for its jumps to look upright


def make_parser() -> argparse.ArgumentParser:
    """The options of this command. What it does not know are run folders or, with `--schedule`, training options."""
    parser = CommandParser(
        prog="entrocraft plot",
        usage="%(prog)s RUN_DIR [RUN_DIR ...] [options]\n       %(prog)s --schedule [band options] [options]",
        description="Draw a run's entropy against its band, its reward and its accepted share; several runs side by "
        "side; or, with --schedule, a band before any training.",
        epilog="With --schedule, the band is given as to `entrocraft train`: --config FILE, or --entropy_low, "
        "--entropy_high, --entropy_unit, --entropy_schedule, --entropy_knots.",
        allow_abbrev=False,  # what this parser does not know goes to the training parser unchanged
    )
    parser.add_argument("--output", help="figure to write (default: entropy.png in the run's folder, or here)")
    parser.add_argument("--title", help="heading of the figure (default: the run's name)")
    parser.add_argument("--schedule", action="store_true", help="preview a band")
    parser.add_argument(
        "--initial_entropy",
        "--initial-entropy",
        type=float,
        help="entropy in nats that a band of unit 'initial' is a multiple of, to preview it in nats",
    )
    return parser


def main(argv: list[str]) -> None:
    """Run the command: writes one figure and prints its path."""
    with user_errors():
        args, rest = make_parser().parse_known_args(argv)
        path = _preview(args, rest) if args.schedule else _runs(args, rest)
    if is_main_process():
        print(path)


def _runs(args: argparse.Namespace, run_dirs: list[str]) -> Path:
    from ..reports.log import read_log
    from ..reports.plots import plot_comparison, plot_run, save_figure

    for word in run_dirs:
        if word.startswith("-"):
            raise CommandError(f"unknown option: {word!r} (options of a band go with --schedule)")
    if not run_dirs:
        raise CommandError("name the folder of a run, or preview a band with --schedule")
    folders = [Path(folder) for folder in run_dirs]
    logs = [read_log(folder) for folder in folders]
    if len(folders) == 1:
        figure = plot_run(logs[0], args.title or folders[0].resolve().name)
        home = folders[0] if folders[0].is_dir() else folders[0].parent
        return save_figure(figure, args.output or home / "entropy.png")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    figure = plot_comparison(dict(zip(names, logs, strict=True)), args.title)
    return save_figure(figure, args.output or "comparison.png")


def _preview(args: argparse.Namespace, argv: list[str]) -> Path:
    from ..reports.plots import plot_schedule, save_figure
    from .arguments import parse

    if args.initial_entropy is not None and not args.initial_entropy > 0:
        raise CommandError(f"--initial_entropy must be positive, got {args.initial_entropy}")
    config = parse(argv)[1]
    scale, unit = 1.0, "nats"
    if config.entropy_unit == "initial":
        scale, unit = (args.initial_entropy, "nats") if args.initial_entropy else (1.0, "× initial entropy")
    progress = [index / (POINTS - 1) for index in range(POINTS)]
    bands = [(point, *(edge * scale for edge in config.band_at(point))) for point in progress]
    steps = config.entropy_schedule_steps or (config.max_steps if config.max_steps > 0 else None)
    return save_figure(plot_schedule(bands, unit, steps, args.title), args.output or "schedule.png")
