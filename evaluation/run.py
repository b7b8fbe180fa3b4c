"""`evaluate`: checkpoints x suite -> answers, choices, results.json and report.html. The wiring; no arithmetic."""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from curation import storage
from curation.errors import UserError
from curation.manifest import RunFolder, WriterLock, fingerprint
from evaluation import contamination, formats, results
from evaluation.backends import Ask, Backend
from evaluation.journal import Journal
from evaluation.prompts import CONDITIONS, WRAPPERS
from evaluation.suite import Prepared, Suite, choices, prepare
from evaluation.targets import POST_TRAINED, Target, default_output, parse
from evaluation.tokens import Encoder
from evaluation.validation import Loss, loss

DEFAULT_QUESTIONS = Path(__file__).with_name("tasks") / "scenarios.jsonl"
Line = Callable[[str], None]
Progress = Callable[[str, int, int], None]
_Opened = AbstractContextManager[tuple[Backend, Encoder, dict[str, Any]]]
_PROBE = 16  # asks that are timed for the plan
_WEIGHTS = (".safetensors", ".bin", ".json", ".model", ".jinja")


def load_suite(
    questions: str | None = None, *, wrappers: str | None = None, conditions: str | None = None,
    scorers: str | None = None, on_line: Line = lambda _: None,
) -> Suite:  # fmt: skip
    """A suite from what a command line says: names with commas, or for wrappers how many of the first.

    UserError: as Suite and formats.read."""
    source = questions or str(DEFAULT_QUESTIONS)
    found, rejected = formats.read(source)
    for row in rejected[:5]:
        on_line(f"left out {row.where}: {row.reason}")
    if len(rejected) > 5:
        on_line(f"left out {len(rejected) - 5} more rows, listed in results.json")
    names = tuple(WRAPPERS)
    if wrappers is not None and wrappers.isdecimal():
        if not 1 <= int(wrappers) <= len(names):
            raise UserError(f"there are {len(names)} wrappers, not {wrappers}: {', '.join(names)}")
        names = names[: int(wrappers)]
    elif wrappers is not None:
        names = _names(wrappers)
    return Suite(
        source, tuple(found), tuple(rejected), names, tuple(CONDITIONS) if conditions is None else _names(conditions),
        ("letter",) if scorers is None else _names(scorers),
    )  # fmt: skip


def evaluate(
    specs: Sequence[str],
    suite: Suite,
    *,
    output: str | None = None,
    backend: str = "transformers",
    dtype: str | None = None,
    tokenizer: str | None = None,
    served_model: str | None = None,
    corpus: str | None = None,
    capabilities: Sequence[str] = (),
    capability_data: str | None = None,
    dry_run: bool = False,
    on_line: Line = lambda _: None,
    on_progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """The results (schema in evaluation.results), also in `output` with report.html and every choice.

    `specs`: see targets.parse. `backend`: transformers (in this process) or vllm (a server of our own); URLs are asked
    as they are. The same call again asks only what has no answer yet. `dry_run`: the plan alone.
    Raises UserError for what is wrong with targets, questions or options, TilthError when a server goes away."""
    targets = parse(list(specs))
    folder = Path(output) if output is not None else default_output(targets)
    if not storage.is_local(str(folder)):
        raise UserError(f"{folder} is not a local folder: answers are appended to a file there")
    wording = f"{len(suite.wrappers)} wrappers x orders x {len(suite.conditions)} conditions"
    on_line(f"plan: {len(suite.questions):,} questions x {wording} = {suite.num_prompts:,} prompts")
    on_line(f"plan: scorers {', '.join(suite.scorers)}, of {len(targets)} checkpoints -> {folder}")
    if dry_run:
        return _dry(targets, suite, tokenizer, on_line)
    folder.mkdir(parents=True, exist_ok=True)
    with WriterLock(RunFolder(str(folder))):
        audit = None
        if corpus is not None:
            on_line(f"looking for the questions in {corpus}")
            audit = contamination.audit(
                suite.questions, corpus, on_progress=lambda done, total: on_progress("audit", done, total)
            )
            share = f"{len(audit.overlapping)} of {len(suite.questions)} questions"
            on_line(f"{share} overlap the corpus of {audit.num_documents:,} documents")
        done = []
        for target in targets:
            reached = _opened(target, backend, dtype, tokenizer, served_model, on_line)
            done.append(_target(target, suite, folder, reached, capabilities, capability_data, on_line, on_progress))
        everything = pl.concat([one.choices for one in done])
        models, capable = [one.model for one in done], [row for one in done for row in one.capabilities]
        found = results.assemble(suite, targets, models, everything, capable, audit)
        found = results.write(folder, found, everything)
        from evaluation.report import write_report

        report = write_report(folder)
    return {
        "output": str(folder), "results": str(folder / results.RESULTS), "report": str(report), "document": found,
        "asked": sum(one.asked for one in done), "reused": sum(one.reused for one in done),
        "seconds": round(sum(one.seconds for one in done), 3),
    }  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """What one checkpoint said to several suites."""

    choices: pl.DataFrame
    """As of suite.choices, with a column `set`."""
    identity: dict[str, Any]
    """What answered: its files by hash, or a server's word."""
    facts: dict[str, str]
    left_out: dict[str, dict[str, str]]
    """Set -> question_id -> why it could not be asked."""
    loss: Loss | None
    asked: int
    reused: int


def answer(
    spec: str, suites: Mapping[str, Suite], folder: Path, *, backend: str = "transformers", dtype: str | None = None,
    validation: Sequence[str] = (), on_line: Line = lambda _: None, on_progress: Progress = lambda *_: None,
) -> Answered:  # fmt: skip
    """One checkpoint asked all `suites` (name -> suite), without a report: for who compares many. Answers are kept in
    `folder`/answers; the loss is that on the texts of `validation`. Raises as `evaluate`."""
    (target,) = parse([spec])
    with _opened(target, backend, dtype, None, None, on_line) as (model, encoder, _):
        identity = _identity(target, model)
        path = folder / "answers" / f"{_slug(target.name)}-{fingerprint({**model.facts(), **identity})[:12]}.jsonl"
        tables, left_out, asked, reused = [], {}, 0, 0
        for name, suite in suites.items():
            prepared = prepare(suite, encoder, model.max_length, _chats(target, encoder))
            table, counts = _ask(prepared, model, path, target, on_line, on_progress)
            tables.append(table.select(pl.lit(name).alias("set"), pl.all()))
            left_out[name] = prepared.left_out
            asked, reused = asked + counts["asked"], reused + counts["reused"]
        found = loss(model, encoder, validation) if validation else None
        facts = model.facts()
    return Answered(pl.concat(tables), identity, facts, left_out, found, asked, reused)


@dataclass(frozen=True)
class _Done:
    """What one target said."""

    choices: pl.DataFrame
    model: dict[str, Any]
    capabilities: list[dict[str, Any]]
    asked: int
    reused: int
    seconds: float


def _target(
    target: Target, suite: Suite, folder: Path, opened: _Opened, tasks: Sequence[str], data: str | None,
    on_line: Line, on_progress: Progress,
) -> _Done:  # fmt: skip
    capable: list[dict[str, Any]] = []
    with opened as (model, encoder, where):
        identity = _identity(target, model)
        name = fingerprint({**model.facts(), **identity})[:12]
        prepared = prepare(suite, encoder, model.max_length, _chats(target, encoder))
        path = folder / "answers" / f"{_slug(target.name)}-{name}.jsonl"
        table, counts = _ask(prepared, model, path, target, on_line, on_progress)
        about = _model(target, model, identity, prepared)
        if tasks and "url" in where:
            capable = _capabilities(tasks, target, where, folder, data, on_line)
    del model  # before lm-eval, or the next target, loads one
    if tasks and "url" not in where:
        capable = _capabilities(tasks, target, where, folder, data, on_line)
    return _Done(table, about, capable, **counts)


def _dry(targets: list[Target], suite: Suite, tokenizer: str | None, on_line: Line) -> dict[str, Any]:
    plan = []
    for target in targets:
        row: dict[str, Any] = {"target": target.name, "prompts": suite.num_prompts}
        if tokenizer or not target.is_url:
            encoder = Encoder(tokenizer or target.where)
            prepared = prepare(suite, encoder, 1 << 30, _chats(target, encoder))
            row |= {"asks": len(prepared.asks) + len(prepared.generations), "tokens": prepared.num_tokens}
            on_line(f"{target.name}: {row['asks']:,} asks, {row['tokens']:,} tokens before sharing")
        plan.append(row)
    return {"plan": plan}


@contextmanager
def _opened(
    target: Target, backend: str, dtype: str | None, tokenizer: str | None, served_model: str | None, on_line: Line
) -> Iterator[tuple[Backend, Encoder, dict[str, Any]]]:
    """(backend, tokenizer, how lm-eval reaches the model)"""
    if target.is_url or backend == "vllm":
        from evaluation.backends.openai import OpenAI
        from evaluation.server import Server

        if target.is_url:
            asked = OpenAI(target.where, model=served_model, on_line=on_line)
            source = tokenizer or asked.root
            yield asked, Encoder(source), {"url": asked.url, "model_name": asked.model, "tokenizer": source}
            return
        with Server(target.where, dtype=dtype, on_line=on_line) as server:
            asked = OpenAI(server.url, on_line=on_line)
            source = tokenizer or target.where
            yield asked, Encoder(source), {"url": server.url, "model_name": server.name, "tokenizer": source}
        return
    from evaluation.backends.transformers import Transformers

    on_line(f"loading {target.name}: {target.where}")
    encoder = Encoder(tokenizer or target.where)
    yield Transformers(target.where, encoder.tokenizer, dtype=dtype), encoder, {"checkpoint": target.where}


def _ask(
    prepared: Prepared, model: Backend, path: Path, target: Target, on_line: Line, on_progress: Progress
) -> tuple[pl.DataFrame, dict[str, Any]]:
    with Journal(path) as journal:
        work: list[tuple[Sequence[Any], Any]] = [
            (prepared.asks, model.score), (prepared.generations, model.generate)
        ]  # fmt: skip
        total = sum(len(asks) for asks, _ in work)
        reused = sum(ask.key in journal.answers for asks, _ in work for ask in asks)
        for reason in sorted(set(prepared.left_out.values())):
            ids = [key for key, why in prepared.left_out.items() if why == reason]
            on_line(f"left out {len(ids)} questions ({', '.join(ids[:3])}{' …' if len(ids) > 3 else ''}): {reason}")
        line = f"{target.name}: {total:,} asks, {prepared.num_tokens:,} tokens before sharing"
        if reused:
            line += f"; {reused:,} are answered already"
        elif prepared.asks:
            line += f"; about {_duration(_estimate(model, prepared))}"
        on_line(line)
        started, done = time.monotonic(), reused
        for asks, answer in work:
            keys = [ask.key for ask in asks]
            known = {index for index, key in enumerate(keys) if key in journal.answers}
            if len(known) == len(keys):
                continue
            for batch in answer(asks, known):
                journal.add(keys, batch)
                done += len(batch.indices)
                on_progress(target.name, done, total)
        seconds = time.monotonic() - started
        table = choices(prepared, journal.answers, label=target.label, seed=target.seed)
    if total > reused:
        on_line(
            f"{target.name}: {total - reused:,} asks in {seconds:.1f} s, {(total - reused) / seconds:,.0f} a second"
        )
    return table, {"asked": total - reused, "reused": reused, "seconds": seconds}


def _estimate(model: Backend, prepared: Prepared) -> float:
    """Seconds, from a few neighbours in the middle, with other tokens in their places: no question is asked twice."""
    start = max(0, (len(prepared.asks) - _PROBE) // 2)
    middle = prepared.asks[start : start + _PROBE]
    used = sorted({token for ask in middle for token in ask.context})
    other = dict(zip(used, used[1:] + used[:1], strict=True))  # beginnings that were shared still are
    probe = [Ask(str(at), tuple(other[t] for t in ask.context), ask.continuations) for at, ask in enumerate(middle)]
    tokens = sum(ask.num_tokens for ask in probe)
    seconds = 0.0
    for _ in range(2):  # the first one warms up
        started = time.monotonic()
        for _ in model.score(probe):
            pass
        seconds = time.monotonic() - started
    return seconds * sum(ask.num_tokens for ask in prepared.asks) / tokens


def _model(target: Target, model: Backend, identity: dict[str, Any], prepared: Prepared) -> dict[str, Any]:
    asked = {cell.question.question_id for cell in prepared.cells}
    return {
        "label": target.label, "arm": target.arm, "seed": target.seed, "stage": target.stage, "identity": identity,
        "training": _training(target), "facts": model.facts(), "max_length": model.max_length,
        "num_questions": len(asked), "num_choices": len(prepared.cells),
        "left_out": [{"question_id": key, "reason": why} for key, why in sorted(prepared.left_out.items())],
    }  # fmt: skip


def _identity(target: Target, model: Backend) -> dict[str, Any]:
    """What answered: the sha256 of each file of a local checkpoint; of a server what it says."""
    folder = Path(target.where)
    if not folder.is_dir():
        return {"model": model.facts().get("model", target.where)}
    files = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS and path.is_file())
    return {"files": {path.name: storage.file_sha256(str(path)).sha256 for path in files}}


def _training(target: Target) -> dict[str, Any] | None:
    """Of a model of `tilth train`: its phases with the hashes of their shards, which name the documents."""
    beside = Path(f"{target.where}.json")
    if not beside.is_file():
        return None
    said = json.loads(beside.read_bytes())
    manifest = Path(str(said.get("run"))) / "manifest.json"
    found = {"arm": said.get("arm"), "seed": said.get("seed"), "phases": said.get("phases")}
    return {**found, "run_manifest_sha256": storage.file_sha256(str(manifest)).sha256 if manifest.is_file() else None}


def _capabilities(
    tasks: Sequence[str], target: Target, where: dict[str, Any], folder: Path, data: str | None,
    on_line: Line,
) -> list[dict[str, Any]]:  # fmt: skip
    from evaluation.lm_eval import capabilities

    output = folder / "lm_eval" / _slug(target.name)
    rows = capabilities(list(tasks), **where, data=data, output=str(output), on_line=on_line)
    return [{"label": target.label, "seed": target.seed, **row} for row in rows]


def _chats(target: Target, encoder: Encoder) -> bool:
    if target.stage == POST_TRAINED and not encoder.can_chat:
        raise UserError(
            f"{target.where} is named post-trained, but its tokenizer has no chat template: add one, or drop the name"
        )
    return target.stage == POST_TRAINED


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
