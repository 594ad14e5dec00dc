"""`entrocraft compare`: methods on the same task, start, seeds and budget, from a YAML file; table and figures."""

from pathlib import Path

from ..printable import printable
from . import CommandError, CommandParser, is_main_process, user_errors
from .recipe import comparison_file


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="entrocraft compare",
        description="Train methods side by side from the same start, with the same seeds and budget, and write "
        "table, JSON and figures. Started again it goes on where it stopped, and repeats no run of the same settings, "
        "start and method. Under `accelerate launch` the runs come one after another, each on all processes.",
        epilog="Files that come with the package: `entrocraft recipe`, names that begin with compare/. Their keys are "
        "explained in configs/compare/README.md.",
    )
    parser.add_argument("--config", nargs="+", required=True, help="YAML file or name of one; of several, one report")
    parser.add_argument("--quick", action="store_true", help="the files' own short form (their key `quick`)")
    parser.add_argument("--output_dir", help="folder of the runs (default: runs/compare; runs/compare-quick)")
    parser.add_argument("--report", help="beginning of the paths of .md, .json and .png (default: in output_dir)")
    parser.add_argument(
        "--workers", type=int, default=0, help="runs side by side (default: the file's, or one a core)"
    )
    parser.add_argument("--report_only", action="store_true", help="run nothing; report of what is done so far")
    parser.add_argument("--dry_run", action="store_true", help="check the files, print the runs, and stop")
    return parser


def main(argv: list[str]) -> None:
    """Run the command. Errors of the files become a [`CommandError`], before any model loads."""
    options = make_parser().parse_args(argv)
    if options.workers < 0:
        raise CommandError(f"--workers must not be negative, got {options.workers}")
    with user_errors():
        from ..compare.reading import read_experiment

        experiments = [read_experiment(comparison_file(name), quick=options.quick) for name in options.config]
        names = [experiment.name for experiment in experiments]
        if len(set(names)) < len(names):
            raise CommandError(f"--config: the files must have different names, got {', '.join(names)}")
    output_dir = Path(options.output_dir or ("runs/compare-quick" if options.quick else "runs/compare"))
    report = Path(options.report or output_dir / ("compare" if len(names) > 1 else names[0]))
    if options.dry_run:
        if is_main_process():
            print("\n".join(printable(line) for e in experiments for line in describe(e)))
        return
    from accelerate import PartialState

    from ..compare.comparison import compare
    from ..compare.jobs import RunError
    from ..compare.workers import be_quiet

    with user_errors():  # data and models that are not there
        with PartialState().main_process_first():  # it makes the embedded starting policy
            for experiment in experiments:
                experiment.task.task(experiment.seeds[0], 1.0, 1, progress=is_main_process())
        output_dir.mkdir(parents=True, exist_ok=True)
    be_quiet()
    if options.report_only:
        with user_errors():
            text = compare(experiments, output_dir, report, only_read=True)
    else:
        try:
            text = compare(experiments, output_dir, report, options.workers, progress=is_main_process())
        except RunError as error:
            raise CommandError(str(error)) from error
    if is_main_process():
        print(f"\n{text}\nTable, JSON and figures: {printable(str(report))}*, runs: {printable(str(output_dir))}")


def describe(experiment) -> list[str]:
    """An experiment in a few lines: its runs, and what they cost in optimizer steps."""
    bands = len(experiment.bands) or 1
    runs = sum(len(experiment.seeds) * (bands if arm.is_steered else 1) for arm in experiment.arms.values())
    tried = sum(map(len, experiment.tuning.candidates.values())) if experiment.tuning else 0
    return [
        f"{experiment.name}: {len(experiment.arms)} methods, {len(experiment.bands)} bands, seeds "
        f"{', '.join(map(str, experiment.seeds))}: {runs} runs and {tried} of tuning, of {experiment.max_steps} "
        "optimizer steps each",
        *(f"  {arm.name}" for arm in experiment.arms.values()),
    ]
