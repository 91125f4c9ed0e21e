"""When is a report written, and where to? After every run, and again on demand."""

from __future__ import annotations

from typing import Any

from loguru import logger

from cuvis_dist.errors import one_line
from cuvis_dist.report.kept import FOLDER, PAGE, Kept, kept_of, read_kept
from cuvis_dist.report.tracking import is_tracked, track
from cuvis_dist.storage import Location, OutputFolder

#: The name of the page about a run beside another one.
COMPARED = "report-against.html"


def report_on(output: OutputFolder, record: dict[str, Any]) -> str | None:
    """Write the report of a run that has ended; None, and a warning, where that fails.

    Where MLflow is set up, the run becomes one of MLflow's, too.

    Parameters
    ----------
    output : OutputFolder
        The run's folder, with what a :class:`~cuvis_dist.report.noting.Notebook` has kept.
    record : dict
        What its ``run.json`` is going to say.
    """
    try:
        kept = kept_of(output, record)
        place = str(_write(output, [kept], False))
    except Exception as error:
        logger.opt(exception=True).debug("the report failed")
        logger.warning(f"no report was written: {one_line(error)}")
        return None
    if is_tracked():
        try:
            logger.info(f"tracked by MLflow as run {track(output, kept)}")
        except Exception as error:
            logger.opt(exception=True).debug("MLflow failed")
            logger.warning(f"the run is not tracked by MLflow: {one_line(error)}")
    return place


def write_report(
    output: OutputFolder, against: OutputFolder | None = None, data: bool = False
) -> Location:
    """Write the report of a run again, or beside another one; return where it lies.

    Parameters
    ----------
    output : OutputFolder
        The folder of a run.
    against : OutputFolder, optional
        That of another one.
    data : bool
        Write the data of each plot beside it, as CSV.

    Raises
    ------
    InputError
        If one of them is no folder of a run, or nothing can be written.
    ClusterError
        If a store does not answer.
    """
    runs = [read_kept(each) for each in (output, against) if each is not None]
    return _write(output, runs, data)


def _write(output: OutputFolder, runs: list[Kept], data: bool) -> Location:
    from cuvis_dist.report.page import file_name, render  # matplotlib takes its time

    page, plots = render(runs, data)
    if data:
        for plot in plots:
            if plot.file:
                output.write(f"{FOLDER}/{file_name(plot)}", plot.csv())
    return output.write(PAGE if len(runs) == 1 else COMPARED, page.encode())
