"""Command line `drift-gate`; needs the extra `cli`."""

import gc
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import torch

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"drift-gate's command line needs the package {missing.name}: pip install drift-gate[cli]"
    ) from None

from .passes.backends import backends_on

if TYPE_CHECKING:
    from .checks import Result


def _age() -> float:
    """Seconds since this process began; those of its CPU, where the system does not tell."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()


IMPORTS = _age()  # seconds: nearly all of what came before the command
app = typer.Typer(
    help="Fused, drift-gated losses for on-policy distillation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


def fail(message: str) -> NoReturn:
    """One line on the error stream, exit code 2."""
    typer.echo(f"drift-gate: {message}", err=True)
    raise typer.Exit(2)


def parse_device(name: str) -> torch.device:
    """A device that is present here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        fail(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type not in ("cpu", "cuda"):
        fail(f"--device must be cpu, cuda or cuda:N; got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        fail(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here")
    return device


@app.command()
def check(
    backend: Annotated[
        str | None, typer.Option(help="triton, native or torch; all that can run, if left out.")
    ] = None,
    device: Device = None,
    seed: Seed = 0,
) -> None:
    """Compare each backend with the float64 reference: loss, gradients, memory, time.

    Takes some ten seconds, and says which routes it checks and which it cannot. Exits with 1 where
    an error is over its budget: twice the error of eager PyTorch in the same dtype plus half a
    unit in the last place.
    """
    from . import checks

    if backend is not None and backend not in checks.ROUTES:
        fail(f"--backend must be one of {', '.join(checks.ROUTES)}; got {backend!r}")
    present = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    devices = [parse_device(name) for name in ([device] if device else present)]
    pairs = [(d, b) for d in devices for b in checks.backends_on(d) if backend in (None, b)]
    if not pairs:
        fail(f"--backend {backend} cannot run on {', '.join(map(str, devices))}")
    start = time.perf_counter()
    passed = [_check(d, [b for at, b in pairs if at == d], seed) for d in devices]
    routes = ", ".join(f"{b} on {d}" for d, b in pairs)
    said = "within the budget" if all(passed) else "OVER THE BUDGET, see above"
    typer.echo(f"{said}: {routes}; {time.perf_counter() - start:.1f} s")
    if not all(passed):
        raise typer.Exit(1)


def _check(device: torch.device, backends: list[str], seed: int) -> bool:
    """Print a table for each backend, and return whether everything is within budget."""
    from . import checks

    console = Console(highlight=False)
    console.print(
        f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}: loss and "
        f"gradients of {checks.ROWS} rows of up to {checks.LARGE:,} words, by way of"
    )
    for backend in backends:
        console.print(f"  {checks.route(backend, device)}")
    for backend, why in checks.absent_on(device).items():
        console.print(f"  not {backend}: {why}")
    gc.freeze()  # what is loaded need not be walked before each measurement
    tables = {backend: _table(f'backend "{backend}"') for backend in backends}
    passed = True
    with console.status("drawing problems") as status:
        for problem in checks.problems(device, seed):
            dtype = str(problem.logits.dtype).removeprefix("torch.")
            words = problem.logits.shape[1]
            console.print(f"checking: {problem.name}, {checks.ROWS} x {words:,} {dtype}")
            status.update("float64 reference and eager loss")
            beside = checks.yardstick(problem)
            for backend, table in tables.items():
                status.update(backend)
                try:
                    result = checks.check(problem, beside, backend)
                except Exception as error:  # what a backend may raise is not known
                    passed = False
                    console.print(
                        f"{backend}, {problem.name}, {dtype}: {type(error).__name__}: {error}"
                    )
                    table.add_row(problem.name, dtype, *["-"] * 5, "[red]FAILED[/]")
                    continue
                passed &= result.passed
                table.add_row(problem.name, dtype, *_cells(result))
    for table in tables.values():
        console.print(table)
    return passed


def _cells(result: "Result") -> list[str]:
    """Of a line of the table, from the errors on."""
    return [
        f"{result.loss_error:.2f}",
        f"{result.grad_error:.2f}",
        f"{result.memory / 1e6:.1f}",
        f"{result.memory_ratio:.2f}",
        f"{result.time_ratio:.2f}",
        "[green]ok[/]" if result.passed else "[red]MISMATCH[/]",
    ]


def _table(title: str) -> Table:
    """Empty, with its columns."""
    table = Table(
        title=title,
        caption="error: share of what is allowed; extra: peak bytes beyond the inputs, gradient "
        "included; ratios: to the eager loss",
    )
    for name in ("problem", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("loss error", "grad error", "extra MB", "extra ratio", "time ratio"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    return table


@app.command()
def distill(
    context: typer.Context,
    steps: Annotated[int, typer.Option(help="Rollout batches; the paper has 200.")] = 32,
    seeds: Annotated[int, typer.Option(help="Runs of each variant.")] = 1,
    seed: Seed = 0,
    epochs: Annotated[
        list[int] | None, typer.Option(help="Times a batch is used: 2; may be repeated.")
    ] = None,
    extra: Annotated[
        bool, typer.Option("--extra", help="Other gates, block sizes and more reuse too.")
    ] = False,
    student: Annotated[Path | None, typer.Option(help="Folder of a causal LM.")] = None,
    teacher: Annotated[Path | None, typer.Option(help="Another, of the same tokenizer.")] = None,
    train: Annotated[Path | None, typer.Option(help="JSONL: problem and answer.")] = None,
    evaluate: Annotated[
        list[Path] | None, typer.Option("--eval", help="The same; may be repeated.")
    ] = None,
    device: Device = None,
    block_size: Annotated[int, typer.Option(help="Tokens of the Block gates.")] = 64,
    learning_rate: Annotated[float | None, typer.Option(help="2e-4; 2e-6 with --student.")] = None,
    warmup: Annotated[int, typer.Option(help="Batches until the rate is whole.")] = 5,
    minibatch: Annotated[int, typer.Option(help="Responses of an optimiser step.")] = 32,
    gradient_norm: Annotated[float, typer.Option(help="To which longer gradients are cut.")] = 1.0,
    clip: Annotated[float, typer.Option(help="Of OPD's ratio, either way.")] = 0.2,
    advantage: Annotated[str, typer.Option(help="Of OPD: old, or current at every step.")] = "old",
    tau: Annotated[float, typer.Option(help="Of the gates.")] = 1.0,
    aggregate: Annotated[
        str, typer.Option(help="Of the gates: mean, mean_abs, rms, max_abs.")
    ] = "mean",
    sample_every: Annotated[int, typer.Option(help="Gates measure every n-th token.")] = 1,
    variant: Annotated[
        list[str] | None, typer.Option(help='This alone, as "OPD + Block64"; may be repeated.')
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Of a response.")] = 192,
    compile: Annotated[
        bool, typer.Option("--compile", help="torch.compile: faster steps, a slower start.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(help="Processes; one a core, or one on a GPU.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder; runs/DATE, if left out.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder of an interrupted run, to go on with.")
    ] = None,
) -> None:
    """Distill a teacher into a student in six ways, and compare them by pass@8.

    Sampled-token OPD and LSM, each without a gate, with blocks, and with newline spans. Ends with
    a table, report.json and report.png. Without options it takes some minutes on two cores.
    """
    try:
        from .bench.distill import arguments
    except ModuleNotFoundError as missing:
        fail(f"distill needs the package {missing.name}: pip install drift-gate[distill]")
    chosen = parse_device(device or ("cuda" if student and torch.cuda.is_available() else "cpu"))
    if resume and (more := arguments.given(context) - {"--resume", "--workers"}):
        fail(f"--resume takes its settings from {resume}; leave out {', '.join(sorted(more))}")
    options = arguments.settings_of(context.params, str(chosen))
    code, message = arguments.run(options, out, resume, workers)
    if message:
        typer.echo(f"drift-gate: {message}", err=True)
    if code:
        raise typer.Exit(code)


@app.command()
def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(help="All, if left out; and a grid, as in bench quick.")
    ] = None,
    device: Device = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="Sizes: targets (README), quick, star (if left out), full, growth (64 times the "
            "rows)."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Seconds, pictures included: 600, or 60 where quick.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Paired rounds.", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="File of the results (JSON).")] = None,
    plots: Annotated[bool, typer.Option(help="Draw pictures beside the results.")] = True,
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Two files of results, instead of a run.")
    ] = None,
    recorded: Annotated[
        Path | None, typer.Option(help="Calls of drift_gate.record_calls, replayed instead.")
    ] = None,
) -> None:
    """Time, memory and error of every pass and loss, beside those of others.

    Writes JSON and pictures under bench/results; needs the extra `bench`.
    """
    begun = time.monotonic() - IMPORTS
    try:
        from .bench import command
    except ModuleNotFoundError as missing:
        fail(f"bench needs the package {missing.name}: pip install drift-gate[bench]")
    if compare is not None:
        try:
            command.compare_files(*compare)
        except (OSError, ValueError) as error:
            fail(f"--compare: {error}")
        return
    chosen = parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if recorded is not None:
        try:
            command.replay_calls(recorded, chosen, rounds)
        except (OSError, ValueError) as error:
            fail(f"--recorded: {error}")
        return
    try:
        names, sizes = command.asked(suites or [], grid)
    except ValueError as error:
        fail(str(error))
    seconds = command.BUDGETS.get(sizes, command.BUDGET) if budget is None else budget
    options = dict(device=chosen, grid=sizes, rounds=rounds, out=out, plots=plots)
    if not command.run(names, end=begun + seconds, **options):
        raise typer.Exit(1)


@app.command()
def fuzz(
    cases: Annotated[int, typer.Option(help="Problems to run.")] = 10_000,
    minutes: Annotated[float, typer.Option(help="Stop after so long.")] = 60.0,
    seed: Seed = 0,
    backend: Annotated[
        str | None,
        typer.Option(help="triton, native or torch; by turns all that can run, if left out."),
    ] = None,
    device: Device = None,
    function: Annotated[
        list[str] | None, typer.Option(help="Functions to run; all, if left out.")
    ] = None,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Run Triton's kernels on the CPU, checked.")
    ] = False,
    replay: Annotated[Path | None, typer.Option(help="Run a saved case instead.")] = None,
    out: Annotated[Path, typer.Option(help="Where a failing case is saved.")] = Path(
        "fuzz-failure.json"
    ),
) -> None:
    """Compare a backend with the float64 reference on random problems of every public function.

    Stops at the first mismatch, shrinks it, saves it, and exits with 1.
    """
    try:
        from .fuzz import command, functions
    except ModuleNotFoundError as missing:
        fail(f"fuzzing needs the package {missing.name}: pip install drift-gate[fuzz]")
    where = parse_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    names = tuple(function or functions.FUNCTIONS)
    unknown = [name for name in names if name not in functions.FUNCTIONS]
    if unknown:
        fail(f"--function must be one of {', '.join(functions.FUNCTIONS)}; got {unknown[0]!r}")
    if cases < 1 or not minutes > 0:
        fail(f"--cases and --minutes must be greater than 0; got {cases} and {minutes:g}")
    interpret = interpret or os.environ.get("TRITON_INTERPRET") == "1"
    if interpret and where.type == "cpu":
        backend = backend or "triton"
        refused = command.interpret()
        if refused:
            fail(refused)
    case = None
    if replay is not None:
        try:
            case = command.load(replay)
        except (OSError, ValueError) as error:
            fail(f"--replay: {error}")
        backend = backend or case["backend"]
    backends = backends_on(where)[::-1]  # the simplest first: a case shrinks to it
    if backend == "triton" and where.type == "cpu":
        if not interpret:
            fail("--backend triton needs a CUDA device; --interpret runs the kernels on the CPU")
    elif backend not in (None, *backends):
        fail(f"--backend must be one of {', '.join(backends)} on {where}; got {backend!r}")
    backends = backends if backend is None else (backend,)
    torch.set_num_threads(1)  # the problems are small, and choose their own threads
    if case is not None:
        passed = command.replay(case, backends[0], where)
    else:
        passed = command.fuzz(
            backends, where, seed=seed, cases=cases, minutes=minutes, functions=names, out=out
        )
    if not passed:
        raise typer.Exit(1)
