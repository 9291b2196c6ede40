"""The explorer behind widgets, for JupyterLab. Needs the ``lab`` extra (ipywidgets).

Pictures and tables are widgets (images and HTML), so the panel does not depend on the notebook's output area. Without
a browser the same objects can be set and read; the tests do so.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import matplotlib.pyplot as plt

from obdlab.lab.paper.tables import as_html
from obdlab.lab.show.explorer import AXES, Explorer, label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMES = {"image": "image", "rate_mbit": "rate", "rtt_ms": "round trip", "disk": "disk", "start": "start"}


class Panel:
    """Drop-down choices with their pictures and table.

    A choice narrows the choices after it; they keep their values where these are still offered.
    """

    def __init__(self, explorer: Explorer) -> None:
        self.explorer = explorer
        self.experiment = widgets.Dropdown(
            options=list(explorer.experiments), value=explorer.name, description="experiment"
        )
        self.axes = {axis: widgets.Dropdown(description=name) for axis, name in _NAMES.items()}
        self.arm = widgets.Dropdown(description="arm")
        self.rank = widgets.Dropdown(description="one start")
        self.distribution = widgets.Image(format="png")
        self.table = widgets.HTML()
        self.waterfall = widgets.Image(format="png")
        self._updating = False
        for choice in (self.experiment, *self.axes.values(), self.arm, self.rank):
            choice.observe(self._changed, names="value")
        self._changed({"owner": self.experiment})

    @property
    def chosen(self) -> dict[str, Any]:
        """The chosen values by axis."""
        return {axis: choice.value for axis, choice in self.axes.items()}

    def widget(self) -> widgets.VBox:
        """Return the widget with all choices, pictures and the table."""
        first = widgets.HBox([self.experiment, self.axes["image"], self.axes["start"]])
        second = widgets.HBox([self.axes["rate_mbit"], self.axes["rtt_ms"], self.axes["disk"]])
        third = widgets.HBox([self.arm, self.rank])
        return widgets.VBox([first, second, self.distribution, self.table, third, self.waterfall])

    def _changed(self, change: dict[str, Any]) -> None:
        # Setting a choice's options below triggers this observer again.
        if self._updating:
            return
        self._updating = True
        try:
            owner = change["owner"]
            if owner is self.experiment:
                self.explorer.open(self.experiment.value)
            if owner not in (self.arm, self.rank):
                self._narrow()
                self._draw_all()
            if owner is not self.rank:
                self._rank()
            figure = self.explorer.waterfall(self.arm.value, self.rank.value, **self.chosen)
            self.waterfall.value = _png(figure)
        finally:
            self._updating = False

    def _narrow(self) -> None:
        starts = self.explorer.starts
        chosen: dict[str, Any] = {}
        for axis in AXES:
            known = starts.choices(axis, **chosen)
            chosen[axis] = _offer(self.axes[axis], {label(axis, value): value for value in known})
        _offer(self.arm, {arm: arm for arm in starts.choices("arm", **chosen)}, starts.ranked(**chosen)[0]["arm"])

    def _rank(self) -> None:
        ranked = self.explorer.starts.ranked(self.arm.value, **self.chosen)
        named = {f"{rank} of {len(ranked)}: {row['total_s']:.2f} s": rank for rank, row in enumerate(ranked, 1)}
        # Ranks of different arms are different starts: begin at the middle one again.
        self.rank.options = list(named.items())
        self.rank.value = (len(ranked) + 1) // 2

    def _draw_all(self) -> None:
        self.distribution.value = _png(self.explorer.distribution(**self.chosen))
        note = f"<p>{self.explorer.starts.note()}</p>"
        self.table.value = as_html(self.explorer.table(**self.chosen)) + note


def show(explorer: Explorer) -> None:
    """Display the panel in a notebook."""
    from IPython import display

    shown: Any = display  # untyped
    shown.display(Panel(explorer).widget())


def _offer(choice: widgets.Dropdown, options: dict[str, Any], default: Any = None) -> Any:
    values = list(options.values())
    kept = choice.value if choice.value in values else default if default in values else values[0]
    choice.options = list(options.items())
    choice.value = kept
    return kept


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    plt.close(figure)
    return stream.getvalue()
