"""Statistics as tables for a terminal. Token texts are shown literally: no markup in them, no control character."""

from rich import box
from rich.table import Table
from rich.text import Text

from klft.diagnostics.stats import Statistics, summary_lines
from klft.writing import visible


def summary_table(stats: Statistics, title: str = "") -> Table:
    """summary_lines as a table of two columns."""
    table = Table("", "nats per token", title=Text(visible(title)), title_justify="left")
    for label, value in summary_lines(stats):
        table.add_row(Text(label), Text(value))
    return table


def worst_table(stats: Statistics, rows: int = 8) -> Table:
    """The tokens with the largest reverse KL, what stands before them, and text:position; texts count from 1."""
    table = Table(
        title="Largest reverse KL; at: text, from 1, and position in it, from 0", title_justify="left", box=box.SIMPLE
    )
    table.add_column("before it", justify="right", no_wrap=True, max_width=10)  # in all 80 columns: no digit is cut
    table.add_column("token", no_wrap=True, min_width=8, max_width=12)
    for name in ("reverse", "forward", "log p", "log q", "at"):
        table.add_column(name, justify="right", no_wrap=True, min_width=7)
    for row in stats.worst_tokens()[:rows]:
        numbers = (row[name] for name in ("reverse_kl", "forward_kl", "logp", "ref_logp"))
        shown = ["\N{EN DASH}" if number is None else f"{number:.3f}" for number in numbers]
        before, where = visible("".join(row["before"]))[-10:], f"{row['sample_id'] + 1}:{row['position']}"
        table.add_row(*map(Text, (before, f'"{visible(row["token"])}"', *shown, where)))
    return table
