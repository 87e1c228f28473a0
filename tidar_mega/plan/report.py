"""What `tidar plan` prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from tidar_mega.plan.hardware import Hardware, figures
from tidar_mega.plan.layout import Layout
from tidar_mega.plan.memory import GIB
from tidar_mega.plan.search import RECOMPUTE, Found, overrides
from tidar_mega.plan.timing import bubble_fraction

WIDTH = 120  # of tables in a file or a pipe
_MEMORY_ROWS = {
    "weights": "weights",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer: moments, fp32 weights",
    "activations": "activations",
    "logits": "logits and head",
    "working": "working space",
}
_TIME_ROWS = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory_bound": "memory-bound: norms, RoPE, SwiGLU, loss",
    "bubble": "pipeline: filling, waiting for the slowest",
    "communication": "communication that nothing hides",
    "optimizer": "optimizer",
}


class Report:
    def __init__(self, hardware: Hardware, vocabulary: str) -> None:
        console = Console(highlight=False)
        self.console = console if console.is_terminal else Console(highlight=False, width=WIDTH)
        self.hardware, self.vocabulary = hardware, vocabulary

    def plan(self, layout: Layout, plan: dict) -> None:
        say = self.console.print
        say(f"[bold]{layout.gpus} x {self.hardware.name}[/]: {layout.describe()}")
        say(self._micro_batches(layout, plan["work"]))
        say(self.vocabulary)
        tables = [self._parameters(layout, plan), self._memory(layout, plan), self._work(plan), self._time(plan)]
        tables += [self._communication(plan), self._imbalance(layout, plan), self._assumptions()]
        for table in tables:
            if table.row_count:
                say("", table)
        say(f"\n{self._verdict(layout, plan)}")

    def search(self, found: Found, gpus: int, command: str, shown: int) -> None:
        say = self.console.print
        say(f"[bold]{gpus} x {self.hardware.name}[/]: {len(found.best)} layouts fit")
        say(self.vocabulary)
        for table in (self._layouts(found, shown), self._refused(found), self._assumptions()):
            if table.row_count:
                say("", table)
        if found.best:
            say("\nthe fastest in full:", style="green")
            say(f"  {command}", soft_wrap=True)
        else:
            say(f"\n{self._nearest(found)}")

    def _micro_batches(self, layout: Layout, work: dict) -> str:
        t = layout.config.train
        rows = f"{work['clean_rows']:,} clean + {work['mask_rows']:,} mask rows"
        part = "" if layout.config.parallel.context == 1 else f", {layout.rows:,} of them on a rank"
        return (
            f"{layout.config.method}, {t.global_batch_size} sequences of {rows}{part}: "
            f"{layout.micro_batches} micro-batch(es) of {t.micro_batch_size} on each replica"
        )

    def _parameters(self, layout: Layout, plan: dict) -> Table:
        table = _table("parameters", "millions")
        for name, count in plan["parameters"].items():
            if name != "rank_of_last_stage" or layout.config.parallel.pipeline > 1:
                table.add_row(name.replace("_", " "), f"{count / 1e6:,.1f}")
        return table

    def _memory(self, layout: Layout, plan: dict) -> Table:
        figures, chosen = plan["memory_gib"], layout.config.parallel.recompute
        columns = [f"recompute {kind}" + (" *" if kind == chosen else "") for kind in RECOMPUTE]
        table = _table("memory of a rank, GiB", *columns)
        if layout.config.parallel.pipeline > 1:
            table.add_row("fullest pipeline stage", *(str(figures[kind]["stage"]) for kind in RECOMPUTE))
        for name, label in _MEMORY_ROWS.items():
            table.add_row(label, *(f"{figures[kind][name]:.2f}" for kind in RECOMPUTE))
        table.add_row("total", *(self._colour(figures[kind]["total"], figures["usable"]) for kind in RECOMPUTE))
        return table

    @staticmethod
    def _colour(total: float, usable: float) -> str:
        return f"[{'green' if total <= usable else 'red'}]{total:.2f}[/]"

    def _work(self, plan: dict) -> Table:
        work = plan["work"]
        table = _table("work of a step", "")
        table.add_row("tokens", f"{work['tokens']:,}")
        table.add_row("visible pairs of a sequence of one document", f"{work['visible_pairs']:,.0f}")
        table.add_row("computed pairs, in whole tiles", f"{work['computed_pairs']:,.0f}")
        table.add_row("model FLOPs", f"{work['model_flops']:.4g}")
        table.add_row("hardware FLOPs", f"{work['hardware_flops']:.4g}")
        return table

    def _time(self, plan: dict) -> Table:
        time, p = plan["time"], plan["layout"]
        table = _table("a step, predicted", "seconds", "share")
        for name, label in _TIME_ROWS.items():
            seconds = time[f"{name}_seconds"]
            table.add_row(label, f"{seconds:.3f}", f"{seconds / time['step_seconds']:.1%}")
        table.add_row("step", f"{time['step_seconds']:.3f}", "")
        if p["pipeline"] > 1:
            formula = f"({p['pipeline']} - 1) / ({p['virtual_pipeline']} x {p['micro_batches']})"
            table.add_row(f"bubble of equal stages, {formula}", "", f"{time['bubble_fraction']:.1%}")
        table.add_row("model FLOP utilisation", "", f"{time['model_flop_utilisation']:.1%}")
        table.add_row("hardware FLOP utilisation", "", f"{time['hardware_flop_utilisation']:.1%}")
        table.add_row("tokens per second", f"{time['tokens_per_second']:,.0f}", "")
        table.add_row("tokens per second and GPU", f"{time['tokens_per_second'] / plan['gpus']:,.0f}", "")
        table.add_row(f"{time['tokens'] / 1e9:,.4g}B tokens", _duration(time["days"]), "")
        return table

    def _communication(self, plan: dict) -> Table:
        table = _table("sent by a rank in a step", "what", "GiB", "link", "GB/s", "seconds", "not hidden")
        for t in plan["communication"]:
            link = "between nodes" if t["crosses_nodes"] else "inside a node"
            figures = (f"{t['gb_per_second']:.0f}", f"{t['seconds']:.3f}", f"{t['exposed_seconds']:.3f}")
            table.add_row(t["kind"], t["what"], f"{t['gib']:,.2f}", link, *figures)
        return table

    def _imbalance(self, layout: Layout, plan: dict) -> Table:
        figures = plan["context_imbalance"]
        table = _table(f"attention of {layout.config.parallel.context} context ranks", "most loaded / mean")
        if figures:
            name = f"packed, lognormal documents of {figures['document_tokens']:g} tokens"
            table.add_row("one document in a sequence", f"{figures['one_document']:.4f}")
            table.add_row(f"{name}, mean", f"{figures['packed_mean']:.4f}")
            table.add_row(f"{name}, worst", f"{figures['packed_worst']:.4f}")
        return table

    def _layouts(self, found: Found, shown: int) -> Table:
        names = ("pipeline", "last stage", "virtual", "context", "data", "micro-batch", "recompute")
        table = _table("tensor", *names, "GiB", "tokens/s", "MFU", "bubble")
        for c in found.best[:shown]:
            p, layout = c.layout.config.parallel, c.layout
            last = layout.config.stage_layers[-1]
            sizes = (p.tensor, p.pipeline, f"{last} layers", p.virtual_pipeline, p.context, layout.data)
            row = (*map(str, sizes), str(layout.config.train.micro_batch_size), p.recompute)
            speed = (
                f"{c.timing.tokens_per_second:,.0f}",
                f"{c.timing.utilisation:.1%}",
                f"{bubble_fraction(layout):.1%}",
            )
            table.add_row(*row, f"{c.memory.total / GIB:.1f}", *speed)
        return table

    def _refused(self, found: Found) -> Table:
        table = _table("ruled out by", "layouts", "what", header="such as")
        for key, count in found.refused.most_common():
            reason = found.reasons.get(key, f"more than {self.hardware.usable_bytes / GIB:.1f} GiB, recomputing all")
            table.add_row(key, str(count), reason)
        return table

    def _nearest(self, found: Found) -> str:
        if found.nearest is None:
            return "[red]no layout is allowed: see what rules them out[/]"
        layout, memory = found.nearest
        need, have = memory.total / GIB, self.hardware.usable_bytes / GIB
        best = f"the least is {need:.1f} of {have:.1f} GiB: {' '.join(overrides(layout))}"
        return f"[red]no layout fits[/]; {best}; take more GPUs or lower data.seq_length"

    def _assumptions(self) -> Table:
        table = _table(f"assumed of {self.hardware.name}", "", "what", header="")
        for name, meaning in figures().items():
            table.add_row(f"--{name.replace('_', '-')}", f"{getattr(self.hardware, name):g}", meaning)
        return table

    def _verdict(self, layout: Layout, plan: dict) -> str:
        memory, chosen = plan["memory_gib"], layout.config.parallel.recompute
        kept = f"{self.hardware.memory_gib:g} less {self.hardware.reserve_gib:g} kept free"
        amount = f"{memory[chosen]['total']:.1f} of {memory['usable']:.1f} GiB ({kept})"
        if plan["fits"]:
            return f"[green]fits[/]: {amount}"
        kinds = [kind for kind in RECOMPUTE if memory[kind]["total"] <= memory["usable"]]
        way = f"set parallel.recompute={kinds[0]}, or " if kinds else ""
        return f"[red]does not fit[/]: {amount}; {way}let --search find a layout"


def _table(first: str, *columns: str, header: str | None = None) -> Table:
    """A plain table of numbers; only the columns of that name hold words. `header`: shown instead of "what"."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        is_words = column in ("what", "link", "recompute")
        shown = header if column == "what" and header is not None else column
        table.add_column(shown, justify="left" if is_words else "right")
    return table


def _duration(days: float) -> str:
    hours = days * 24
    return f"{days:,.1f} days" if days >= 2 else f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
