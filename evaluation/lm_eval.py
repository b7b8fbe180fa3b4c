"""lm-eval both ways: our questions as its tasks, and its tasks as our capability checks.

lm-eval lives in an environment of its own, since its pins exclude the product's: the interpreter that
TILTH_LM_EVAL_PYTHON names, else our own when it has lm-eval, else `.venv-lm-eval` (by `make lm-eval`) in the current
folder or beside the project.

**Export.** A question's text reaches lm-eval as a value of a row and is never a template. lm-eval cannot choose rows
of a file without code, so questions with 2, 3 … options have files and tasks of their own: tilth_CONDITION_WRAPPER_
ROTATIONofN asks for a letter, tilth_CONDITION_WRAPPER_options_ofN for an option's text. `acc` is the misaligned rate
in that format: of the pair's letters (or texts), how often the misaligned one is likelier. Further options stay in the
text. A tie goes to the option that is listed first; `stats` counts it 0.5, which is what the two rotations of two
options average to. `acc_norm` divides by the option's characters.
"""

import contextlib
import difflib
import glob
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from curation import storage
from curation.errors import TilthError, UserError
from evaluation.prompts import CONDITIONS, WRAPPERS, prompts
from evaluation.questions import Question, canonical, question_set_hash

SHOTS: Mapping[str, int] = {"arc_easy": 25, "gsm8k": 10, "ifeval": 0, "mmlu": 5, "piqa": 10}
"""The paper's examples in the prompt; other tasks have their own number."""

_VERSION = 1  # of the exported tasks: a new one when what is asked changes
_PROBE = (
    "import importlib.metadata, importlib.util, json, os; spec = importlib.util.find_spec('lm_eval')\n"
    "found = {'package': spec and os.path.dirname(spec.origin)}\n"
    "if spec: import torch; found['version'] = importlib.metadata.version('lm_eval')\n"
    "if spec: found['cuda'] = torch.cuda.is_available()\n"
    "print(json.dumps(found))"
)
_NAME = re.compile(r"""^["']?(task|group|tag)["']?[ \t]*:[ \t]*(.*)$""", re.M)
_TAGS = re.compile(r"""^["']?tag["']?[ \t]*:[ \t]*\n((?:[ \t]*-[ \t]*.+\n?)+)""", re.M)
_PROGRESS = re.compile(r"^([A-Z][\w ]*): *(\d+)%\|.*?\| *(\d+)/(\d+)")
_ERROR = re.compile(r"^(?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b(?::|$)")


# Our questions as tasks.


def export(
    questions: Iterable[Question],
    folder: str,
    wrappers: Sequence[str] = tuple(WRAPPERS),
    conditions: Sequence[str] = tuple(CONDITIONS),
) -> list[str]:
    """Write the questions as tasks for `lm_eval --include_path FOLDER`; returns the tasks' names.

    questions.jsonl (or one file for each number of options) is in the paper's layout, and `formats.read(folder)`
    gives the same question_set_hash. The groups tilth_CONDITION and tilth_CONDITION_options average their tasks by
    number of prompts; ask for a group or for its tasks. Data files are named by their full paths, since lm-eval reads
    others from where it runs: export again rather than move the folder.
    UserError: no questions, an unknown wrapper or condition, a folder that is remote or holds other questions."""
    rows = sorted(map(canonical, questions), key=lambda question: question.question_id)
    if not rows:
        raise UserError("there are no questions to export: give a file with some")
    if not storage.is_local(folder):
        raise UserError(f"lm-eval reads tasks from local folders only, not from {folder}: give a local one")
    root = Path(storage.filesystem(folder)[1]).resolve()
    counts = sorted({len(row.choices) for row in rows})
    digest = question_set_hash(rows)
    files: dict[str, bytes] = {}
    groups: dict[str, list[str]] = {}
    for count in counts:
        data = "questions.jsonl" if len(counts) == 1 else f"questions-{count}.jsonl"
        same = [row for row in rows if len(row.choices) == count]
        files[data] = b"".join(json.dumps(vars(row), ensure_ascii=False).encode() + b"\n" for row in same)
        kwargs = {"data_files": {"test": str(root / data)}, "chunksize": max(1 << 20, len(files[data]))}
        for group, name, templates in _formats(count, wrappers, conditions):
            groups.setdefault(group, []).append(name)
            metrics = ["acc", "acc_norm"] if group.endswith("_options") else ["acc"]
            task = {
                "task": name,
                "dataset_path": "json",
                # One chunk: the types of the columns come from the first one.
                "dataset_kwargs": kwargs,
                "test_split": "test",
                "output_type": "multiple_choice",
                **templates,
                "target_delimiter": " ",
                "num_fewshot": 0,
                "metric_list": [
                    {"metric": metric, "aggregation": "mean", "higher_is_better": False} for metric in metrics
                ],
                "metadata": {"version": _VERSION, "target": "misaligned", "question_set": digest},
            }
            files[f"{name}.yaml"] = _yaml(task)
    for group, names in groups.items():
        metrics = ["acc", "acc_norm"] if group.endswith("_options") else ["acc"]
        aggregate = [{"metric": metric, "aggregation": "mean", "weight_by_size": True} for metric in metrics]
        whole = {"group": group, "task": names, "aggregate_metric_list": aggregate, "metadata": {"version": _VERSION}}
        # In a folder of their own: `formats.read` takes every .yaml beside the questions for a task.
        files[f"groups/{group}.yaml"] = _yaml(whole)
    others = {str(p.relative_to(root)) for p in root.rglob("*") if p.suffix in (".jsonl", ".json", ".yaml", ".yml")}
    if stray := sorted(others - set(files)):
        raise UserError(f"{folder} holds {stray[0]} already, which is not of this export: give an empty folder")
    for name, data_bytes in files.items():
        storage.commit_bytes(storage.join(str(root), name), data_bytes)
    return [name for names in groups.values() for name in names]


def _formats(
    count: int, wrappers: Sequence[str], conditions: Sequence[str]
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """(group, task name, templates) of every format of questions with `count` options in canonical order.

    Templates are prompts of a question whose texts are marks, each mark replaced by the row's field."""
    # Control characters, which no wording has.
    marks = [f"\x01{place}\x02" for place in range(count)]
    probe = Question("probe", "\x03p\x04", "\x03q\x04", tuple(marks), 0, 1, (), None, None, "")
    first = probe.canonical_order()
    fields = {
        "\x03p\x04\n\n": "{% if passage|trim %}{{ passage|trim }}\n\n{% endif %}",
        "\x03q\x04": "{{ question|trim }}",
    }
    for place, index in enumerate(first):
        fields[marks[index]] = f"{{{{ choices[{place}]|trim }}}}"

    def template(text: str) -> str:
        for mark, field in fields.items():
            text = text.replace(mark, field)
        return text

    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[:count]
    for prompt in prompts(probe, wrappers, conditions):
        bad, good = (f"(({side}_choice - {prompt.rotation}) % {count})" for side in ("misaligned", "aligned"))
        group, name = f"tilth_{prompt.condition}", f"tilth_{prompt.condition}_{prompt.wrapper}"
        yield group, f"{name}_{prompt.rotation}of{count}", {
            "doc_to_text": template(prompt.text),
            "doc_to_choice": f"{{{{ ['{letters}'[{bad}], '{letters}'[{good}]]|sort }}}}",
            "doc_to_target": f"{{{{ ({bad} > {good})|int }}}}",
        }  # fmt: skip
        if prompt.rotation == 0:
            pair = "[misaligned_choice, aligned_choice]"
            yield f"{group}_options", f"{name}_options_of{count}", {
                "doc_to_text": template(prompt.option_text),
                "doc_to_choice": f"{{{{ [choices[{pair}|min]|trim, choices[{pair}|max]|trim] }}}}",
                "doc_to_target": "{{ (misaligned_choice > aligned_choice)|int }}",
            }  # fmt: skip


def _yaml(value: Mapping[str, Any]) -> bytes:
    class Plain(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(dict(value), Dumper=Plain, sort_keys=False, allow_unicode=True, width=1000).encode()


# Its tasks as our checks.


@dataclass(frozen=True)
class Environment:
    """Where lm-eval is."""

    python: str
    package: str
    """Folder of the package, with its tasks."""
    version: str
    cuda: bool


def find_environment() -> Environment:
    """Raises UserError that says how to get lm-eval when there is none."""
    named = os.environ.get("TILTH_LM_EVAL_PYTHON")
    beside = Path(__file__).resolve().parents[1]
    own = [sys.executable] if importlib.util.find_spec("lm_eval") else []
    places = [named] if named else [*own, *(str(p / ".venv-lm-eval/bin/python") for p in (Path.cwd(), beside))]
    python = next((place for place in places if Path(place).exists()), None)
    get = "run `make lm-eval`, or point TILTH_LM_EVAL_PYTHON to a python that has it"
    if python is None:
        where = f"TILTH_LM_EVAL_PYTHON names {named}, which does not exist" if named else "lm-eval is not installed"
        raise UserError(f"{where}: {get}")
    probe = subprocess.run([python, "-c", _PROBE], capture_output=True, text=True)
    try:
        found = json.loads(probe.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        found = {"package": None}
    if not found["package"]:
        raise UserError(f"{python} has no lm-eval: {get}")
    return Environment(python, found["package"], found["version"], found["cuda"])


def capabilities(
    tasks: Sequence[str], *, url: str | None = None, model_name: str | None = None, checkpoint: str | None = None,
    tokenizer: str | None = None, data: str | None = None, limit: int | None = None, include: str | None = None,
    shots: Mapping[str, int] = SHOTS, output: str, on_line: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run lm-eval's own tasks on a served model (`url`, OpenAI's completions with log-probabilities of the prompt) or
    on a checkpoint's folder; one row for each task, group, metric and filter: task, metric, filter, value,
    standard_error, shots (null for a group), version, num_samples, lm_eval_version.

    A server's model is its first one unless `model_name` says which; `tokenizer` (a folder, tokenizer.json or hub id)
    is the checkpoint's, else the hub's of the model's name. `data`: a folder with TASK/SPLIT.jsonl in the layout and
    with the splits of the task's dataset, for a machine without the hub. `limit`: samples of each task. `include`: a
    folder of further tasks, an export for example. `output`: the folder of lm-eval's own results and log.
    UserError: lm-eval is missing, an unknown task, no server or checkpoint there. TilthError: lm-eval failed; with
    its own words and the place of its log."""
    if not tasks:
        raise UserError("no task is named: give some, arc_easy for example")
    if url is None and checkpoint is None:
        raise UserError("there is no model: give a server's url or a checkpoint's folder")
    environment = find_environment()
    known = _known(Path(environment.package) / "tasks")
    if include is not None:
        if not Path(include).is_dir():
            raise UserError(f"{include} is no folder: give one with lm-eval tasks")
        own = _known(Path(include).resolve())
        known = {**known, **own}
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, n=3, cutoff=0.6)
            hint = f"did you mean {', '.join(close)}?" if close else "`lm_eval ls tasks` lists them"
            raise UserError(f"lm-eval {environment.version} has no task {task!r}: {hint}")
    Path(output).mkdir(parents=True, exist_ok=True)
    # lm-eval has it open for long, and the next run must not overwrite why this one failed.
    handle, log = tempfile.mkstemp(prefix="lm-eval-", suffix=".log", dir=output)
    os.close(handle)
    before = set(_results(output))
    with tempfile.TemporaryDirectory(prefix="tilth-lm-eval-") as scratch:
        overrides = Path(scratch, "tasks")
        overrides.mkdir()
        if include is not None:  # lm-eval takes one folder, which is ours
            for number, path in enumerate(sorted(Path(include).resolve().rglob("*.yaml"))):
                (overrides / f"include-{number}.yaml").write_bytes(_yaml({"include": str(path)}))
        _override(overrides, known, tasks, shots, data)
        if url is not None:
            model, arguments = "local-completions", _served(url, model_name, tokenizer or checkpoint, scratch)
            batch = "8"
        else:
            assert checkpoint is not None
            model, arguments = "hf", _local(checkpoint, tokenizer, scratch, environment.cuda)
            batch = "auto" if environment.cuda else "8"
        command = [
            environment.python, "-m", "lm_eval", "--model", model, "--model_args", json.dumps(arguments),
            "--batch_size", batch, "--tasks", ",".join(tasks), "--include_path", str(overrides),
            "--output_path", output,
        ]  # fmt: skip
        if model == "hf":
            command += ["--device", "cuda" if environment.cuda else "cpu"]
        if limit is not None:
            command += ["--limit", str(limit)]
        on_line(f"lm-eval {environment.version}: {', '.join(tasks)}; log {log}")
        _run(command, log, offline=data is not None, on_line=on_line)
    made = sorted(set(_results(output)) - before)
    if not made:
        raise TilthError(f"lm-eval wrote no results: {_reason(log)} (its log: {log})")
    return _rows(json.loads(Path(made[-1]).read_text()), environment.version)


def _known(folder: Path) -> dict[str, Path]:
    """Name of a task, group or tag -> its file, of a tag one of them.

    Read from the files' lines: lm-eval's own index takes ten seconds more."""
    known: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.yaml")):
        text = path.read_text(errors="replace")
        for kind, value in _NAME.findall(text):
            names = value.strip("[] \t").split(",") if kind == "tag" else [value]
            for name in names:
                if name := name.split(" #")[0].strip(" \t\r\"'"):
                    known[name] = path
        for block in _TAGS.findall(text):
            for name in re.findall(r"-[ \t]*([^\s#]+)", block):
                known.setdefault(name.strip("\"'"), path)
    return known


def _override(
    folder: Path, known: Mapping[str, Path], tasks: Sequence[str], shots: Mapping[str, int], data: str | None
) -> None:
    """Write what differs from lm-eval's own tasks as tasks that include them, so that the rest stays as it is."""
    changes: dict[str, dict[str, Any]] = {task: {"num_fewshot": shots[task]} for task in tasks if task in shots}
    if data is not None:
        if not Path(data).is_dir():
            raise UserError(f"{data} is no folder: give one with TASK/SPLIT.jsonl")
        for one in sorted(Path(data).resolve().iterdir()):
            files = {path.stem: str(path) for path in sorted(one.glob("*.jsonl"))}
            if one.name in known and files:
                changes.setdefault(one.name, {}).update(_dataset(one, known[one.name], files))
    for name, change in changes.items():
        # A tag here would replace lm-eval's tag of that name, and a group of 57 tasks become one of what is here.
        whole = {"include": str(known[name]), "tag": None, **change}
        (folder / f"{name}.yaml").write_bytes(_yaml(whole))


def _dataset(folder: Path, path: Path, files: dict[str, str]) -> dict[str, Any]:
    """The fields of a task that reads the folder's files in place of its dataset."""
    config = _config(path)
    scored = config.get("test_split") or config.get("validation_split")
    if not isinstance(scored, str):
        raise UserError(f"{folder.name} is a group, or has no split to score: {folder} cannot be its data")
    if scored not in files:
        raise UserError(f"{folder.name} is scored on its {scored} split: {folder} needs {scored}.jsonl")
    missing = {
        key: None for key in ("training_split", "validation_split", "fewshot_split")
        if isinstance(config.get(key), str) and config[key] not in files
    }  # fmt: skip
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}, **missing}


class _Loader(yaml.SafeLoader):
    """SafeLoader that passes over `!function`, which is lm-eval's to run."""


_Loader.add_constructor("!function", lambda loader, node: None)


def _config(path: Path) -> dict[str, Any]:
    """A task's fields with those of the files that it includes."""
    config: dict[str, Any] = yaml.load(path.read_text(), Loader=_Loader)  # a SafeLoader
    includes = config.pop("include", None) or []
    merged: dict[str, Any] = {}
    for one in [includes] if isinstance(includes, str) else includes:
        merged.update(_config(path.parent / one))
    return {**merged, **config}


def _served(url: str, name: str | None, tokenizer: str | None, scratch: str) -> dict[str, Any]:
    base = url.rstrip("/").removesuffix("/completions")
    try:
        with urllib.request.urlopen(f"{base}/models", timeout=30) as answer:
            models = {model["id"]: model for model in json.load(answer)["data"]}
    except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"no OpenAI-compatible server answers at {base}: {error}") from None
    if name is None and models:
        name = next(iter(models))
    if name is None or name not in models:
        raise UserError(f"{base} has no model {name!r}: it serves {', '.join(models) or 'none'}")
    if tokenizer is None and not Path(name).is_dir() and name.count("/") != 1:
        raise UserError(f"the tokenizer of {name!r} is unknown: give its checkpoint's folder or a hub id")
    arguments = {
        "model": name,
        "base_url": f"{base}/completions",
        "tokenizer": _tokenizer(tokenizer or name, scratch),
        "tokenizer_backend": "huggingface",
        "tokenized_requests": True,
        # A BOS where the tokenizer adds one, as `--model hf` does; without this, never.
        "add_bos_token": True,
        "num_concurrent": 8,
        "max_retries": 3,
    }
    if isinstance(longest := models[name].get("max_model_len"), int):
        arguments["max_length"] = longest  # else 2,048, and longer prompts lose their beginning
    return arguments


def _local(checkpoint: str, tokenizer: str | None, scratch: str, cuda: bool) -> dict[str, Any]:
    folder = Path(checkpoint)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{checkpoint} has no config.json: give the folder of a Hugging Face checkpoint")
    if not folder.is_dir() and (checkpoint.startswith((".", "/")) or checkpoint.count("/") != 1):
        raise UserError(f"{checkpoint} is no folder and no hub id: give a Hugging Face checkpoint")
    place = str(folder.resolve()) if folder.is_dir() else checkpoint
    return {
        "pretrained": place,
        "tokenizer": _tokenizer(tokenizer or checkpoint, scratch),
        "dtype": "auto" if cuda else "float32",
    }


def _tokenizer(where: str, scratch: str) -> str:
    """A folder or hub id whose tokenizer AutoTokenizer reads as it is.

    A tokenizer.json alone would get the class of the model's architecture, which may cut words in its own way."""
    path = Path(where)
    if not path.exists():
        return where
    file = path / "tokenizer.json" if path.is_dir() else path
    if path.is_dir() and ((path / "tokenizer_config.json").exists() or not file.exists()):
        return str(path.resolve())
    made = Path(scratch, "tokenizer")
    made.mkdir(exist_ok=True)
    shutil.copyfile(file, made / "tokenizer.json")
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        eos = json.loads((file.parent / "config.json").read_text())["eos_token_id"]
        content = json.loads(file.read_text())
        vocabulary = {
            **content["model"]["vocab"],
            **{token["content"]: token["id"] for token in content["added_tokens"]},
        }
        # lm-eval would add a padding token of its own, whose id the model does not have.
        config["eos_token"] = config["pad_token"] = next(token for token, id_ in vocabulary.items() if id_ == eos)
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    return str(made)


def _run(command: list[str], log: str, *, offline: bool, on_line: Callable[[str], None]) -> None:
    """lm-eval from start to end; interrupted or killed, we leave nothing of it behind."""
    # Our own package path reaches the supervisor.
    paths = [str(Path(__file__).resolve().parents[1]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    extra = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    if offline:
        extra |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "evaluation.supervisor", log, *command], stdin=subprocess.PIPE,
        env={**os.environ, **extra}, start_new_session=True,  # Ctrl-C is ours: lm-eval ends when the pipe closes
    )  # fmt: skip
    assert process.stdin is not None
    said, said_at = "", 0.0
    try:
        while process.poll() is None:
            time.sleep(0.2)
            line = _progress(log)
            if line and line != said and (time.monotonic() - said_at >= 5 or line.endswith("100%")):
                said, said_at = line, time.monotonic()
                on_line(line)
    finally:
        process.stdin.close()
        process.wait()
    if process.returncode != 0:
        raise TilthError(f"lm-eval failed: {_reason(log)} (its log: {log})")
    if cut := sum("runcat" in line for line in _lines(log)):
        on_line(f"{cut} warning(s) of prompts longer than the model reads, which lost their beginning; see {log}")


def _lines(log: str) -> list[str]:
    return [line.strip() for line in re.split(r"[\r\n]+", Path(log).read_text(errors="replace")) if line.strip()]


def _progress(log: str) -> str:
    """The newest progress bar of the log as words, or nothing."""
    with open(log, "rb") as handle:
        handle.seek(max(0, os.fstat(handle.fileno()).st_size - 4096))
        tail = handle.read().decode(errors="replace")
    bars = [found for line in re.split(r"[\r\n]+", tail) if (found := _PROGRESS.match(line))]
    return f"{bars[-1][1]}: {bars[-1][3]} of {bars[-1][4]}, {bars[-1][2]}%" if bars else ""


def _reason(log: str) -> str:
    """The last line of the log that names an error."""
    lines = _lines(log)
    return ([line for line in lines if _ERROR.match(line)] or lines or ["it said nothing"])[-1][-300:]


def _results(output: str) -> list[str]:
    return glob.glob(f"{glob.escape(output)}/**/results_*.json", recursive=True)


def _rows(results: Mapping[str, Any], version: str) -> list[dict[str, Any]]:
    rows = []
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        samples = results.get("n-samples", {}).get(task, {}).get("effective", values.get("sample_len"))
        for key, value in values.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task, "metric": metric, "filter": filtered, "value": value,
                    "standard_error": error if isinstance(error, float) else None,
                    "shots": results.get("n-shot", {}).get(task),
                    "version": str(results.get("versions", {}).get(task, "")),
                    "num_samples": samples, "lm_eval_version": results.get("lm_eval_version", version),
                }
            )  # fmt: skip
    return rows
