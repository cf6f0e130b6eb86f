"""Plots as files. matplotlib comes with the dev extra and is imported only where one is drawn."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config import SettingsError

Axes = Any  # matplotlib's, which may not be installed


def require_plot(path: Path) -> None:
    """Raises `SettingsError` if there can be none, before minutes are spent on measuring."""
    if not path.absolute().parent.is_dir():
        raise SettingsError(f"--plot: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise SettingsError(
            "--plot needs matplotlib, which is not installed: pip install 'model1[dev]'"
        ) from None


@contextmanager
def figure(path: Path, *, num_rows: int, num_columns: int) -> Iterator[Sequence[Axes]]:
    """Axes to draw on, row by row; then written as SVG, PNG or what the name's suffix asks for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(
        num_rows,
        num_columns,
        figsize=(5 * num_columns, 4 * num_rows),
        layout="constrained",
        squeeze=False,
    )
    try:
        yield axes.flatten().tolist()
        drawing.savefig(path)
    finally:
        pyplot.close(drawing)
