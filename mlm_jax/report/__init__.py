"""One self-contained HTML page of one or more runs: what was reached, the curves, the filled masks, the config.

It reads workdirs and nothing else, so it needs neither the data nor a device. `runs` reads, `charts` draws, `page` puts
together.
"""

import os
from collections.abc import Sequence

from etils import epath

from mlm_jax.errors import MachineError, UserError
from mlm_jax.report.charts import MAX_RUNS
from mlm_jax.report.page import page
from mlm_jax.report.runs import read_runs
from mlm_jax.workdir import write_atomically

__all__ = ["write_report"]


def write_report(workdirs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], lead: str = "") -> None:
    """Writes the page.

    Args:
        workdirs: the runs, shown side by side in this order; at most `charts.MAX_RUNS`.
        out: the HTML file.
        lead: HTML that comes before the report's sections.

    Raises:
        UserError: a folder is no workdir or holds no measurement yet, or `out` is a folder.
        MachineError: a workdir's config is damaged, or the page cannot be written.
    """
    if not 1 <= len(workdirs) <= MAX_RUNS:
        raise UserError(f"a report shows 1 to {MAX_RUNS} runs, not {len(workdirs)}: name fewer workdirs")
    runs = read_runs(workdirs)
    file = epath.Path(out)
    if file.is_dir():
        raise UserError(f"{out} is a folder: name the HTML file to write, as in {os.path.join(out, 'report.html')}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, page(runs, lead).encode())
    except OSError as error:
        raise MachineError(f"{out} cannot be written: {error.strerror or error}") from error
