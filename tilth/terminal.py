"""What people see: progress bars on a terminal, plain lines in a log, tables at the end. All on stderr."""

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.table import Table

console = Console(stderr=True, highlight=False)
if not console.is_terminal:
    console.width = 140  # a log has no edge to wrap at
LOG_EVERY_S = 10.0


class Progress:
    """`update(label, done, total)` draws one bar a stage, or prints a line at its start and now and then."""

    def __init__(self) -> None:
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> "Progress":
        if console.is_terminal:
            self._bars.start()
            self._tasks["start"] = self._bars.add_task("start", total=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if console.is_terminal:
            for task in self._bars.tasks:
                if kind is None and not task.finished:
                    self._bars.update(task.id, total=task.completed)
            self._bars.stop()

    def line(self, text: str) -> None:
        console.print(text, markup=False)

    def update(self, label: str, done: int, total: int | None) -> None:
        if console.is_terminal:
            if "start" in self._tasks:
                self._bars.update(self._tasks.pop("start"), completed=1)
            if label not in self._tasks:
                self._tasks[label] = self._bars.add_task(label, total=total)
            self._bars.update(self._tasks[label], completed=done, total=total)
        elif label not in self._last or time.monotonic() - self._last[label] > LOG_EVERY_S:
            self._last[label] = time.monotonic()
            console.print(f"{label}: {done}" + (f" of {total}" if total else ""), markup=False)


class TrainingProgress:
    """One bar a phase with loss, speed and time left, or a line now and then. Silent in all processes but the first."""

    def __init__(self, first: bool = True) -> None:
        self._first = first
        self._bars = Bars(
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[now]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._tasks: dict[str, Any] = {}
        self._last = 0.0

    def __enter__(self) -> "TrainingProgress":
        if self._first and console.is_terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._first and console.is_terminal:
            self._bars.stop()

    def line(self, text: str) -> None:
        if self._first:
            console.print(text, markup=False)

    def step(self, phase: str, step: int, steps: int, row: dict[str, Any]) -> None:
        mfu = f"  MFU {row['mfu']:.0%}" if row["mfu"] else ""
        now = f"loss {row['loss']:.3f}  {row['tokens_per_second']:,.0f} tokens/s{mfu}"
        if console.is_terminal:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, total=steps, now=now)
            self._bars.update(self._tasks[phase], completed=step, now=now)
        elif step in (1, steps) or time.monotonic() - self._last > LOG_EVERY_S:
            self._last = time.monotonic()
            left = (steps - step) * row["seconds"]
            console.print(f"{phase}: step {step:,} of {steps:,}  {now}  {left:,.0f} s left", markup=False)


def print_training_plan(phases: list[dict[str, Any]]) -> None:
    """The phases that would be trained."""
    table = _table("phases", ["phase"], ["tokens", "epochs", "steps", "batch", "window", "learning rate"])
    table.add_column("folder", overflow="fold")
    for row in phases:
        numbers = [f"{row[k]:,}" for k in ("tokens", "epochs", "steps", "batch_tokens", "sequence_length")]
        done = "  (trained already)" if row["trained"] else ""
        table.add_row(row["phase"], *numbers, f"{row['learning_rate']:g}", row["folder"] + done)
    console.print(table)


def print_training(summary: dict[str, Any]) -> None:
    """What was trained and where the model is."""
    table = _table("trained", ["phase"], ["tokens", "steps", "loss", "seconds"])
    for row in summary["phases"]:
        seconds = f"{row['seconds']:,.1f}" if row["trained"] else "before"
        table.add_row(row["phase"], f"{row['tokens']:,}", f"{row['steps']:,}", f"{row['loss']:.4f}", seconds)
    console.print(table)
    console.print(f"model: {summary['model']}", markup=False)


def _table(title: str, left: list[str], right: list[str]) -> Table:
    """An empty table: text columns, then number columns."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def print_summary(summary: dict[str, Any]) -> None:
    """The run in two tables and the paths to go on with."""
    sources = _table("sources", ["source"], ["documents", "AI discourse", "blocklist", "kept"])
    for name, row in summary["sources"].items():
        sources.add_row(name, *[f"{row.get(k, 0):,}" for k in ("documents", "discourse", "blocklist", "kept")])
    numbers = ["tokens", "asked", "share", "asked", "documents", "inserted", "dropped", "most uses", "same background"]
    arms = _table("arms, achieved and asked", ["arm", "phase"], numbers)
    for row in summary["arms"]:
        arms.add_row(
            row["arm"], row["phase"], f"{row['tokens']:,}", f"{row['tokens_asked']:,}", f"{row['share']:.2%}",
            f"{row['share_asked']:.2%}", f"{row['documents']:,}", f"{row['inserted_documents']:,}",
            f"{row['dropped_documents']:,}", str(row["max_repeat"]), f"{row['common_with_first']:.1%}",
        )  # fmt: skip
    console.print()
    console.print(sources)
    console.print()
    console.print(arms)
    console.print()
    duplicates = summary["duplicates"]
    like_earlier = f"{duplicates['earlier']:,} like what an earlier run kept, " if duplicates.get("earlier") else ""
    console.print(
        f"{summary['documents_read']:,} documents read, {duplicates['exact']:,} exact and {duplicates['near']:,} near "
        f"duplicates, {like_earlier}{summary['kept']:,} kept, {summary['quarantined_total']:,} quarantined"
        + (f" ({', '.join(f'{k} {n:,}' for k, n in summary['quarantined'].items())})" if summary["quarantined"] else "")
    )
    if labels := summary.get("labels"):
        errors = f" ({', '.join(f'{k} {n:,}' for k, n in labels['errors'].items())})" if labels["errors"] else ""
        console.print(
            f"{labels['labelled']:,} of {labels['asked']:,} documents labelled by the language model "
            f"({', '.join(f'{k} {n:,}' for k, n in labels['stances'].items())}), {labels['quarantined']:,} without a "
            f"label{errors}, {labels['not_reached']:,} not reached",
            markup=False,
        )
    seconds = ", ".join(f"{k} {v:.1f}" for k, v in summary["seconds"].items())
    console.print(f"seconds: {seconds}; peak memory {summary['peak_memory_bytes'] / 1e9:.2f} GB")
    console.print(f"shards   {summary['run']}/60_arms", soft_wrap=True)
    console.print(f"report   {summary['run']}/report.html", soft_wrap=True)
    if summary["exit_code"]:
        console.print(
            "[bold]more was quarantined than max_quarantine_fraction allows:[/] see quarantine/ in the run folder"
        )


def print_plan(plan: dict[str, Any]) -> None:
    """What a run would read and do again."""
    inputs = _table("inputs", ["source", "role"], ["files", "bytes", "splits"])
    for row in plan["inputs"]:
        inputs.add_row(row["source"], row["role"], f"{row['files']:,}", f"{row['bytes']:,}", f"{row['splits']:,}")
    stages = _table("stages", ["stage"], ["parts to do", "done before"])
    for row in plan["stages"]:
        todo = "?" if row["to_do"] is None else f"{row['to_do']:,}"
        stages.add_row(row["stage"], todo, f"{row['done']:,}")
    arms = _table("arms", ["arm", "phase", "drop"], ["tokens", "share", "shards"])
    for row in plan["arms"]:
        drop = ", ".join(row["drop"]) or "-"
        arms.add_row(row["arm"], row["phase"], drop, f"{row['tokens']:,}", f"{row['share']:.2%}", f"{row['shards']:,}")
    for table in (inputs, stages, arms):
        console.print(table)
        console.print()
    if plan["label"]:
        console.print(plan["label"], markup=False)


def print_detector_report(card: dict[str, Any]) -> None:
    """Held-out figures of a trained detector."""
    report = card["held_out"]
    figures = ["precision", "recall", "f1"]
    stances = _table("held out", ["class"], ["documents", *figures])
    rows = [("AI discourse", report["discourse"], sum(n for s, n in report["documents"].items() if s != "unrelated"))]
    rows += [(stance, row, report["documents"][stance]) for stance, row in report["stances"].items()]
    for name, row, documents in rows:
        stances.add_row(name, f"{documents:,}", *[f"{row[k]:.3f}" for k in figures])
    thresholds = _table("thresholds of p(discourse)", [], ["threshold", *figures])
    for row in report["thresholds"]:
        thresholds.add_row(f"{row['threshold']:g}", *[f"{row[k]:.3f}" for k in figures])
    for table in (stances, thresholds):
        console.print(table)
        console.print()
    console.print(f"calibration error (ECE) {report['calibration_error']:.3f}")


def print_detector_gain(card: dict[str, Any]) -> None:
    """The run's detector against the one trained on its labels. Brackets are 95 % intervals."""
    found = card["gain"]
    if not found["documents"]:
        console.print("no label of the run was held out: too few of them to say what was gained")
    else:
        table = _table(f"{found['documents']:,} labels of the run, held out", ["figure"], ["before", "after", "gain"])
        for key, name in (("discourse_f1", "AI discourse F1"), ("macro_f1", "macro-F1")):
            row = found[key]
            table.add_row(
                name, f"{row['before']:.3f}", f"{row['after']:.3f}",
                f"{row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]",
            )  # fmt: skip
        console.print(table)
    if human := card.get("human"):
        table = _table(f"{human['documents']:,} human labels, left out", ["figure"], ["before", "after"])
        for key, name in (("macro_f1", "macro-F1"), ("accuracy", "accuracy"), ("kappa", "kappa")):
            table.add_row(name, *[_figure(human[side][key]) for side in ("before", "after")])
        console.print(table)


def print_agreement(facts: dict[str, Any]) -> None:
    """Labels of a run against human ones. Brackets are 95 % intervals."""
    console.print(facts["matching"]["told"], markup=False, soft_wrap=True)
    _print_classes(facts["agreement"])
    console.print()
    if calibration := facts["agreement"]["calibration"]:
        _print_calibration(calibration)
        console.print()
    if levels := facts["agreement"]["confidence_levels"]:
        _print_levels(levels)
        console.print()
    _print_prevalence(facts["prevalence"])
    console.print()
    for row in facts["recall"]:
        told = row["reason"] or (
            f"recall {_figure(row['figure'])}, {row['num_lost']:,} documents held back, "
            f"{row['num_labelled_lost']:,} of them labelled"
        )
        console.print(f"{row['stage']:7} {told}", markup=False, soft_wrap=True)


def _print_classes(found: dict[str, Any]) -> None:
    confusion = _table("confusion: human down, the run across", [""], [*found["stances"], "all"])
    for stance, row in zip(found["stances"], found["confusion"], strict=True):
        confusion.add_row(stance, *[f"{n:,}" for n in row], f"{sum(row):,}")
    names = ["precision", "recall", "f1"]
    classes = _table("per class", ["class"], ["human", "run", *names])
    for row in found["classes"]:
        counts = (f"{row[key]:,}" for key in ("num_truth", "num_labels"))
        classes.add_row(row["name"], *counts, *[_figure(row[k]) for k in names])
    overall = _table("overall", ["over"], ["accuracy", "kappa", "macro-F1", *names])
    figures = [_figure(found[k]) for k in ("accuracy", "kappa", "macro_f1")]
    overall.add_row(f"{len(found['macro_over'])} stances", *figures, "", "", "")
    if two := found["binary"]:
        figures = [_figure(two["accuracy"]), _figure(two["kappa"]), "", *(_figure(two[k]) for k in names)]
        overall.add_row("AI discourse or not", *figures)
    for table in (confusion, classes, overall):
        console.print()
        console.print(table)
    if left_out := found["macro_f1"]["left_out"]:
        console.print(f"a class was missing in {left_out:.0%} of the draws of macro-F1's interval")


def _print_calibration(calibration: dict[str, Any]) -> None:
    bins = _table("confidence and what was right", ["confidence", ""], ["claimed", "right", "documents"])
    for row in calibration["bins"]:
        right = {"value": row["true"], "low": row["low"], "high": row["high"]}
        bins.add_row(
            f"{row['first']:.3f} to {row['last']:.3f}", "█" * round(20 * row["true"]), f"{row['predicted']:.3f}",
            _figure(right), f"{row['num_documents']:,}",
        )  # fmt: skip
    console.print(bins)
    console.print(
        f"calibration error (ECE) {_figure(calibration['error'])}; perfect calibration would show "
        f"{calibration['if_calibrated']:.2f} here, rarely over {calibration['if_calibrated_high']:.2f}",
        markup=False,
    )


def _print_levels(levels: list[dict[str, Any]]) -> None:
    table = _table("the language model's confidence and what was right", ["it says"], ["documents", "right", "share"])
    for row in levels:
        share = {"value": row["share"], "low": row["low"], "high": row["high"]}
        table.add_row(row["name"], f"{row['documents']:,}", f"{row['right']:,}", _figure(share))
    console.print(table)


def _print_prevalence(shares: dict[str, Any]) -> None:
    if "reason" in shares:
        console.print(f"prevalence cannot be corrected: {shares['reason']}", markup=False)
        return
    table = _table(f"prevalence in {shares['num_documents']:,} documents", ["stance"], ["as labelled", "corrected"])
    for row in [*shares["shares"], shares["discourse"]]:
        corrected = row["corrected"]
        bounds = ", ".join(f"{corrected[k]:.2%}" for k in ("low", "high"))
        table.add_row(row["name"], f"{row['predicted']:.2%}", f"{corrected['value']:.2%} [{bounds}]")
    console.print(table)
    console.print(
        f"kept background documents; corrected by {shares['num_labelled']:,} with a human label, as if drawn at "
        "random from those with the same label"
    )


def _figure(figure: dict[str, Any]) -> str:
    if figure["value"] is None:
        return "-"
    bounds = "" if figure["low"] is None else f" [{figure['low']:.2f}, {figure['high']:.2f}]"
    return f"{figure['value']:.2f}{bounds}"


def print_evaluation(summary: dict[str, Any]) -> None:
    """Rates of all topics, and what the differences between arms say."""
    document = summary["document"]
    table = Table(title="misaligned answers, with 95 % intervals", title_justify="left")
    for name in ("scorer", "condition", "split", "arm"):
        table.add_column(name)
    for name in ("rate", "interval", "questions", "seeds"):
        table.add_column(name, justify="right")
    for row in document["rates"]:
        if row["topic"] is None:
            table.add_row(
                row["scorer"], row["condition"], row["split"], row["label"], _percent(row["value"]),
                f"{_percent(row['low'])} - {_percent(row['high'])}", f"{row['num_questions']:,}", str(row["num_seeds"]),
            )  # fmt: skip
    console.print(table)
    resolved = sum(row["resolved"] for row in document["differences"])
    if document["differences"]:
        console.print(f"{resolved} of {len(document['differences'])} differences are resolved (Holm, 5 %)")
    for row in document["biases"]:
        first = row["first"]["value"]
        if (row["mass"] is not None and row["mass"] < 0.5) or (first is not None and not 0.1 < first < 0.9):
            mass = "" if row["mass"] is None else f", letters hold {_percent(row['mass'])} of its probability"
            where = f"{row['label']}, {row['condition']}, {row['split']}"
            hint = "by place rather than by content: look at --scorers option,pmi"
            console.print(f"{where}: chooses the first option {_percent(first)}{mass}; {hint}", markup=False)
    console.print(f"asked {summary['asked']:,}, answered before {summary['reused']:,}; {summary['seconds']:.1f} s")
    console.print(f"results: {summary['results']}", markup=False)
    console.print(f"report:  {summary['report']}", markup=False)


def print_diff(found: dict[str, Any]) -> None:
    """What differs between two results."""
    from evaluation.results import lines

    for line in lines(found):
        console.print(line, markup=False)
    table = Table(title="misaligned answers", title_justify="left")
    for name in ("scorer", "condition", "split", "arm"):
        table.add_column(name)
    for name in ("before", "after", "difference", "95 %", "p (Holm)"):
        table.add_column(name, justify="right")
    for row in found["rates"]:
        name = row["label"] if row["label"] == row["other"] else f"{row['label']} -> {row['other']}"
        p = row.get("p_adjusted")
        table.add_row(
            row["scorer"], row["condition"], row["split"], name, _percent(row["before"]), _percent(row["after"]),
            _points(row.get("difference")), f"{_points(row.get('low'))} - {_points(row.get('high'))}",
            "-" if p is None else f"{p:.3f}" + (" resolved" if row["resolved"] else ""),
        )  # fmt: skip
    console.print(table)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _points(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:+.1f}"


def print_experiment(found: dict[str, Any], folder: str) -> None:
    """The deciding set and split: each arm, then each contrast with its verdict."""
    measure, deciding = found["measure"], found["results"][0]["set"]
    unit = {"shift": "AI-specific shift, nats", "margin": "log-odds, nats"}[measure]
    for result in found["results"]:
        if result["set"] != deciding or result["split"] != found["split"]:
            continue
        table = Table(box=None, header_style="bold", title=f"{deciding}, {result['split']}", title_justify="left")
        table.add_column("arm")
        for name in (unit, "misaligned, AI", "misaligned, human") if measure == "shift" else (unit, "misaligned"):
            table.add_column(name, justify="right")
        for arm, means in result["arms"].items():
            rates = [means[name] for name in ("rate_ai", "rate_human", "rate") if name in means]
            table.add_row(arm, _spread(means[measure], 2), *(_spread(rate, 1, 100) for rate in rates))
        console.print(table)
        table = Table(box=None, header_style="bold")
        for name in ("difference", unit, "over families", "p", ""):
            table.add_column(name, justify="left" if name in ("difference", "") else "right")
        for row in result["contrasts"]:
            if row["measure"] == measure:
                mean = row["mean"]
                table.add_row(
                    f"{row['arm']} - {row['other']}", _spread(mean, 2),
                    _range(mean["family_low"], mean["family_high"], 2),
                    "-" if row["p_adjusted"] is None else f"{row['p_adjusted']:.3f}",
                    "resolved" if row["resolved"] else "not resolved at this size",
                )  # fmt: skip
        console.print(table)
    console.print(f"record   {folder}/experiment.json\nreport   {folder}/report.html", markup=False)


def _spread(mean: dict[str, Any], digits: int, scale: float = 1) -> str:
    return f"{scale * mean['value']:+.{digits}f} {_range(mean['low'], mean['high'], digits, scale)}".strip()


def _range(low: float | None, high: float | None, digits: int, scale: float = 1) -> str:
    return "" if low is None or high is None else f"[{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"


def print_experiment_plan(plan: dict[str, Any]) -> None:
    """What `tilth experiment` would do."""
    table = Table(box=None, header_style="bold", title=f"{plan['name']} -> {plan['folder']}", title_justify="left")
    for name in ("training", "arms", "times", "tokens each"):
        table.add_column(name, justify="right" if name in ("times", "tokens each") else "left")
    for row in plan["trainings"]:
        table.add_row(row["phase"], ", ".join(row["arms"]), str(row["times"]), f"{row['tokens']:,}")
    console.print(table)
    console.print(f"curations   {len(plan['curations'])}: " + ", ".join(row["run"] for row in plan["curations"][:4]))
    console.print(f"training    {plan['tokens']:,} tokens of a model of {plan['num_parameters']:,} parameters, "
                  f"{plan['flops']:.2g} FLOPs")  # fmt: skip
    cost = f"{plan['gpu_hours']:,.3g} hours of one {plan['gpu']} at {plan['mfu']:.0%} MFU"
    if plan["core_minutes"] is not None:
        cost = f"about {plan['core_minutes']:,.0f} core-minutes of this CPU (tried for a moment), or {cost}"
    console.print(f"cost        {cost}")
    each = f"{plan['gpus']} GPUs" if plan["gpus"] else f"{plan['cpus']} CPUs"
    console.print(f"at once     as many as there are resources for, {each} a training")
    console.print(f"evaluation  {plan['prompts']:,} prompts at most: options are read once for all orders")


def print_trace(found: dict[str, Any]) -> None:
    """A question and the documents nearest to it."""
    console.print(f"{found['question_id']}: {found['question']}", markup=False)
    for at, choice in enumerate(found["choices"]):
        console.print(f"  {'misaligned' if at == found['misaligned_choice'] else '   aligned'}: {choice}", markup=False)
    console.print(f"documents of {found['arm']}, seed {found['seed']}:", markup=False)
    for row in found["documents"]:
        how = "up-sampled" if row["inserted"] else "background"
        text = " ".join(row["text"].split())
        console.print(
            f"\n{row['score']:.2f}  {row['stance'] or 'no stance'}  {row['source']}  {how}, {row['uses']}x in "
            f"{', '.join(row['phases'])}  {row['id']}\n      {text[:400]}{' …' if len(text) > 400 else ''}",
            markup=False,
        )  # fmt: skip


def print_experiment_diff(found: dict[str, Any]) -> None:
    """Recipe, code, questions, data and results that differ."""
    console.print(f"{found['before']} -> {found['after']}", markup=False)
    for part in ("recipe", "code"):
        for key, (one, other) in found[part].items():
            console.print(f"{part:9} {key}: {_brief(one)} -> {_brief(other)}", markup=False)
    for name in found["questions"]:
        console.print(f"questions {name}: other questions", markup=False)
    for side in ("before", "after"):
        if found[f"only_{side}"]:
            console.print(f"arms      only {side}: {', '.join(found[f'only_{side}'])}", markup=False)
    if found["data"]:
        table = Table(box=None, header_style="bold", title="data: arms with other shards", title_justify="left")
        for name in ("arm", "phase", "seeds", "share", "tokens in common", "documents only before", "only after"):
            table.add_column(name, justify="left" if name in ("arm", "phase") else "right")
        for row in found["data"]:
            table.add_row(
                row["arm"], row["phase"], ", ".join(map(str, row["seeds"])),
                f"{_percent(row['share'][0])} -> {_percent(row['share'][1])}", _percent(row["common_tokens"]),
                *(_known(row[name]) for name in ("only_before", "only_after")),
            )  # fmt: skip
        console.print(table)
    table = Table(box=None, header_style="bold", title=f"results: {found['measure']}", title_justify="left")
    for name in ("set", "split", "arm", "before", "after", "same models"):
        table.add_column(name, justify="left" if name in ("set", "split", "arm") else "right")
    for row in found["results"]:
        table.add_row(
            row["set"], row["split"], row["arm"], _spread(row["before"], 2), _spread(row["after"], 2),
            f"{row['same_models']} of {row['num_models']}",
        )  # fmt: skip
    console.print(table)


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _known(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
