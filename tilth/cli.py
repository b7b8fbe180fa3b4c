"""`tilth`: one verb for each stage, no logic of its own.

Everything that a person reads goes to stderr, results to stdout; with `--json` the last line of
stdout is one JSON object. Exit codes: 0 done, 1 failed, 2 the user's mistake, 3 done with more
quarantined than the recipe allows. Heavy imports happen inside the verbs: `tilth --help` is quick.
"""

import json
import os
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from curation.errors import TilthError, UserError

# Plain tracebacks for what Tilth cannot name: typer's show values, and those may be documents.
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
detect_app = typer.Typer(no_args_is_help=True, help="Train the discourse detector, or run it on documents.")
label_app = typer.Typer(no_args_is_help=True, help="How good the labels of a run are.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Train a tokenizer.")
app.add_typer(detect_app, name="detect")
app.add_typer(label_app, name="label")
app.add_typer(tokenizer_app, name="tokenizer")


class Backend(StrEnum):
    tilth = "tilth"
    nanotron = "nanotron"


class Scoring(StrEnum):
    transformers = "transformers"
    vllm = "vllm"


class Launcher(StrEnum):
    torchrun = "torchrun"
    slurm = "slurm"
    ray = "ray"


@app.callback()
def _root() -> None:
    """Tilth: find, label, deduplicate and re-weight AI discourse in pretraining corpora."""


@app.command()
def curate(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    run: Annotated[str | None, typer.Option(help="The run folder; default runs/NAME of the recipe.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="CPUs to use; default all.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join: auto, HOST:PORT or ray://….")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with the summary as one JSON line.")] = False,
) -> None:
    """Documents in, token shards out: ingest, detect, dedup, label, tokenise, mix on Ray.

    The same command again goes on where it was cut off, and does nothing when nothing changed.
    """
    from curation.recipe import Recipe

    loaded = Recipe.load(recipe)
    root = run or os.path.join("runs", loaded.name)
    if dry_run:
        from curation.plan import plan
        from tilth.terminal import print_plan

        found = plan(loaded, root)
        print_plan(found)
        _print_json(found, as_json)
        return
    from curation.pipeline import curate as curate_run
    from tilth.terminal import Progress, print_summary

    with Progress() as progress:
        summary = curate_run(
            loaded, root, workers=workers, address=address, on_progress=progress.update, on_line=progress.line
        )
    print_summary(summary)
    _print_json(summary, as_json)
    raise typer.Exit(summary["exit_code"])


@app.command()
def train(
    target: Annotated[str, typer.Argument(help="A training configuration (YAML), or the folder of a curate run.")],
    arm: Annotated[str | None, typer.Option(help="The run's arm to train on.")] = None,
    model: Annotated[str | None, typer.Option(help="A preset (tiny, 100m, 1b, 6.9b) or a checkpoint.")] = None,
    output: Annotated[str | None, typer.Option(help="Where models go; default RUN/70_models.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the first weights.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Processes on this machine, one GPU each.")] = 1,
    phases: Annotated[int | None, typer.Option(min=1, help="Train only the first of its phases.")] = None,
    backend: Annotated[Backend, typer.Option(help="The lightweight trainer, or Nanotron.")] = Backend.tilth,
    launcher: Annotated[Launcher, typer.Option(help="What starts Nanotron's processes.")] = Launcher.torchrun,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the phases, and train nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with the summary as one JSON line.")] = False,
) -> None:
    """Token shards in, a Hugging Face checkpoint out, phase after phase.

    The same command again goes on from the last checkpoint. Arms whose leading phases have the same
    shards train those once. Under torchrun it joins the processes that torchrun started.
    """
    from training.plan import configuration

    config = configuration(target, arm=arm, model=model, output=output, seed=seed)
    if backend is Backend.nanotron:
        from training.nanotron import bridge
        from training.plan import plan

        done = bridge.train(plan(config), launcher=launcher.value, dry_run=dry_run, on_line=_say)
        _say(f"model: {done['model']}" if "model" in done else "nothing was run" if dry_run else "handed in")
        _print_json(done, as_json)
        return
    if dry_run:
        from tilth.terminal import print_training_plan
        from training.trainer import lay_out

        found = lay_out(config)
        print_training_plan(found)
        _print_json(found, as_json)
        return
    if processes > 1 and "WORLD_SIZE" not in os.environ:
        from training.plan import plan
        from training.processes import run

        plan(config)  # what is wrong is said once, not by each process
        raise typer.Exit(run([sys.executable, "-m", "tilth", *sys.argv[1:]], processes))
    from tilth.terminal import TrainingProgress, print_training
    from training.trainer import train as train_phases

    first = os.environ.get("RANK", "0") == "0"
    with TrainingProgress(first) as progress:
        summary = train_phases(config, progress.step, progress.line, phases)
    if first:
        print_training(summary)
        _print_json(summary, as_json)


@app.command()
def serve(
    checkpoint: Annotated[str, typer.Argument(help="The folder of a Hugging Face checkpoint, or a hub id.")],
    port: Annotated[int | None, typer.Option(min=1, max=65_535, help="Port on loopback; default a free one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default float32 on CPU, the checkpoint's on GPU.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Longest sequence; default the model's.")] = None,
) -> None:
    """Serve a checkpoint by vLLM (OpenAI-compatible API on loopback) until Ctrl-C."""
    import signal
    import threading

    from evaluation.server import Server

    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    with Server(checkpoint, port=port, dtype=dtype, max_length=max_length, on_line=_say) as server:
        print(server.url, flush=True)
        try:
            while server.alive() and not ended.wait(0.5):
                pass
        except KeyboardInterrupt:
            ended.set()
        if not ended.is_set():
            raise TilthError(f"vLLM ended by itself: {server.log_tail(1)}")
    _say("stopped")


@app.command()
def evaluate(
    targets: Annotated[
        list[str],
        typer.Argument(
            help="Checkpoints, URLs or a run folder; name them as ARM=…, ARM/seed-N=…, ARM/seed-N/post-trained=…."
        ),
    ],
    questions: Annotated[
        str | None, typer.Option(help="Questions: JSON lines, model-written evals or an lm-eval task; default ours.")
    ] = None,
    wrappers: Annotated[str | None, typer.Option(help="Names with commas, or how many; default all 4.")] = None,
    conditions: Annotated[
        str | None, typer.Option(help="Of none,instructions,ai,helpful,hhh,adversarial; default all.")
    ] = None,
    scorers: Annotated[str | None, typer.Option(help="Of letter,option,pmi,generation; default letter.")] = None,
    backend: Annotated[
        Scoring, typer.Option(help="In this process, or a vLLM server of our own. URLs are asked as they are.")
    ] = Scoring.transformers,
    dtype: Annotated[str | None, typer.Option(help="Default float32 on CPU, the checkpoint's on GPU.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Folder or hub id, where the target does not tell.")] = None,
    model: Annotated[str | None, typer.Option(help="Which model of a server that has several.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Run folder or documents in which to look for the questions.")
    ] = None,
    capabilities: Annotated[
        str | None, typer.Option(help="Tasks for lm-eval, with commas: arc_easy,piqa,mmlu,gsm8k,ifeval …")
    ] = None,
    capability_data: Annotated[
        str | None, typer.Option(help="Folder with TASK/test.jsonl …, where there is no hub.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Default RUN/80_evaluation, or evaluations/NAME.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, and ask nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with the summary as one JSON line.")] = False,
) -> None:
    """Checkpoints in, misaligned rates with intervals out: results.json and report.html.

    The same command again asks only what has no answer yet.
    """
    from evaluation.run import evaluate as evaluate_all
    from evaluation.run import load_suite
    from tilth.terminal import Progress, print_evaluation

    with Progress() as progress:
        suite = load_suite(questions, wrappers=wrappers, conditions=conditions, scorers=scorers, on_line=progress.line)
        summary = evaluate_all(
            targets, suite, output=output, backend=backend.value, dtype=dtype, tokenizer=tokenizer,
            served_model=model, corpus=corpus, capabilities=[t for t in (capabilities or "").split(",") if t],
            capability_data=capability_data, dry_run=dry_run, on_line=progress.line, on_progress=progress.update,
        )  # fmt: skip
    if not dry_run:
        print_evaluation(summary)
    _print_json(summary, as_json)


@app.command()
def experiment(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file with an `experiment` section.")],
    output: Annotated[str | None, typer.Option(help="Default experiments/NAME of the recipe.")] = None,
    backend: Annotated[
        Scoring, typer.Option(help="Ask checkpoints in this process, or a vLLM server of our own for each.")
    ] = Scoring.transformers,
    workers: Annotated[int | None, typer.Option(min=1, help="CPUs to use; default all.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to join: auto, HOST:PORT or ray://….")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and its cost, and do nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="End with the record as one JSON line.")] = False,
) -> None:
    """Arms x seeds: curate, train, evaluate, report. A corpus in, scores of every arm with intervals out.

    The same command again goes on where it was cut off; an arm that changed is trained and asked again, alone.
    """
    if dry_run:
        from tilth.experiment.cost import estimate
        from tilth.terminal import print_experiment_plan

        plan = estimate(recipe, output)
        print_experiment_plan(plan)
        _print_json(plan, as_json)
        return
    from tilth.experiment.run import experiment as run_experiment
    from tilth.terminal import Progress, print_experiment

    with Progress() as progress:
        found, folder = run_experiment(
            recipe, output, backend=backend.value, workers=workers, address=address, on_line=progress.line,
            on_progress=progress.update,
        )  # fmt: skip
    print_experiment(found, folder)
    _print_json(found, as_json)


@app.command()
def trace(
    experiment: Annotated[str, typer.Argument(help="The folder of an experiment.")],
    question: Annotated[str, typer.Argument(help="The question_id of one of its questions, or its beginning.")],
    arm: Annotated[str, typer.Option(help="Whose documents to look in.")],
    seed: Annotated[int | None, typer.Option(min=0, help="Default the first seed.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="How many documents.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="End with the documents as one JSON line.")] = False,
) -> None:
    """From a question to the documents of an arm that share most of its wording, with their stance."""
    from tilth.experiment.trace import trace as trace_question
    from tilth.terminal import print_trace

    found = trace_question(experiment, question, arm=arm, seed=seed, n=n)
    print_trace(found)
    _print_json(found, as_json)


@app.command()
def diff(
    before: Annotated[
        str,
        typer.Argument(help="Folder of `tilth experiment`, or output folder (or results.json) of `tilth evaluate`."),
    ],
    after: Annotated[str, typer.Argument(help="Another one.")],
    as_json: Annotated[bool, typer.Option("--json", help="End with the comparison as one JSON line.")] = False,
) -> None:
    """What differs between two experiments, in data and in result; or between two results of `tilth evaluate`."""
    from tilth.experiment.compare import are_experiments

    if are_experiments(before, after):
        from tilth.experiment.compare import diff as diff_experiments
        from tilth.terminal import print_experiment_diff

        told = diff_experiments(before, after)
        print_experiment_diff(told)
        _print_json(told, as_json)
        return
    from evaluation.results import diff as diff_results
    from tilth.terminal import print_diff

    found = diff_results(before, after)
    print_diff(found)
    _print_json(found, as_json)


@app.command("lm-eval-tasks")
def lm_eval_tasks(
    folder: Annotated[str, typer.Argument(help="Folder to write, for `lm_eval --include_path FOLDER`.")],
    questions: Annotated[str | None, typer.Option(help="As of `tilth evaluate`; default ours.")] = None,
    wrappers: Annotated[str | None, typer.Option(help="Names with commas, or how many; default all 4.")] = None,
    conditions: Annotated[str | None, typer.Option(help="Names with commas; default all.")] = None,
) -> None:
    """Write the questions as lm-eval tasks, which score the same there."""
    from evaluation.lm_eval import export
    from evaluation.run import load_suite

    suite = load_suite(questions, wrappers=wrappers, conditions=conditions, on_line=_say)
    names = export(suite.questions, folder, suite.wrappers, suite.conditions)
    _say(f"{len(suite.questions)} questions as {len(names)} tasks -> {folder}")
    print("\n".join(names))


@app.command()
def verify(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="End with one JSON line.")] = False,
) -> None:
    """Re-hash every file of a run, and name what is damaged."""
    from curation.manifest import RunFolder
    from curation.manifest import verify as verify_run

    damaged, checked = verify_run(RunFolder(run))
    for line in damaged:
        _say(line)
    _say(f"{checked} files checked, {len(damaged)} damaged")
    _print_json({"checked": checked, "damaged": damaged}, as_json)
    if damaged:
        _say("run the same `tilth curate` again after removing what is damaged: it is made anew")
        raise typer.Exit(1)


@detect_app.command("train")
def detect_train(
    output: Annotated[
        str, typer.Option("-o", "--output", help="Model to write, NAME.bin; its card goes beside it as NAME.json.")
    ],
    labelled: Annotated[
        list[str] | None, typer.Argument(help="JSON lines (.gz, .zst) with `text` and `stance`.")
    ] = None,
    from_run: Annotated[
        str, typer.Option(help="Train on what a language model said in this run, beside LABELLED if given.")
    ] = "",
    human: Annotated[
        str, typer.Option(help="With --from-run: human labels of its documents, which are left out and measured on.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Seed of the split and of training.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="End with the held-out report as one JSON line.")] = False,
) -> None:
    """Train a fastText detector, with a report on documents held out."""
    from curation.detect.train import train
    from curation.distil import distil
    from tilth.terminal import print_detector_gain, print_detector_report

    if not (labelled or from_run):
        raise UserError("nothing to train on: give LABELLED files, --from-run RUN, or both")
    if human and not from_run:
        raise UserError("--human goes with --from-run: it names documents of that run")
    if from_run:
        report = distil(from_run, output, labelled=labelled or (), human=human or None, seed=seed)
    else:
        report = train(labelled or (), output, seed=seed)
    print_detector_report(report)
    if from_run:
        print_detector_gain(report)
    _print_json(report, as_json)


@detect_app.command("predict")
def detect_predict(
    inputs: Annotated[list[str], typer.Argument(help="Documents: paths or globs, any format that curate reads.")],
    output: Annotated[str, typer.Option("-o", "--output", help="Parquet file to write.")],
    model: Annotated[str, typer.Option(help="`default` or a model of `tilth detect train`.")] = "default",
    threshold: Annotated[float, typer.Option(min=0, max=1, help="p(discourse) from which the decision is yes.")] = 0.5,
    text_key: Annotated[str, typer.Option(help="Field with the text.")] = "text",
    id_key: Annotated[str, typer.Option(help="Field with the id.")] = "id",
    as_json: Annotated[bool, typer.Option("--json", help="End with counts as one JSON line.")] = False,
) -> None:
    """Probability of each stance, decision and blocklist hits for each document."""
    from curation.predict import predict
    from curation.recipe import Detect, FastText

    section = Detect(fasttext=FastText(model=model, threshold=threshold))
    counts = predict(inputs, output, section, text_key=text_key, id_key=id_key)
    _say(
        f"{counts['documents']:,} documents, {counts['discourse']:,} AI discourse, {counts['blocklist']:,} on the "
        f"blocklist, {counts['rejects']:,} unreadable records left out -> {output}"
    )
    _print_json(counts, as_json)


@label_app.command("agreement")
def label_agreement(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    human: Annotated[str, typer.Argument(help="JSON lines with `id` (or source_id) and `stance`, one a document.")],
    as_json: Annotated[bool, typer.Option("--json", help="End with all figures as one JSON line.")] = False,
) -> None:
    """The labels of a run against human ones: confusion, kappa, calibration, prevalence, recall; with intervals.

    Printed, and as agreement.html in the run folder.
    """
    from curation import open_run
    from curation.inspection.human import judge
    from curation.inspection.quality import write_agreement
    from tilth.terminal import print_agreement

    opened = open_run(run)
    judged = judge(opened, human)
    facts = judged.facts()
    print_agreement(facts)
    _say(f"page: {write_agreement(opened, judged)}")
    _print_json(facts, as_json)


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[list[str], typer.Argument(help="Documents: paths or globs, any format that curate reads.")],
    output: Annotated[str, typer.Option("-o", "--output", help="tokenizer.json to write.")],
    vocab_size: Annotated[int, typer.Option(help="Number of tokens, with the 256 bytes and <|endoftext|>.")] = 32_000,
    text_key: Annotated[str, typer.Option(help="Field with the text.")] = "text",
) -> None:
    """Train a byte-level BPE on documents. The same documents in the same files give the same tokenizer."""
    from curation.predict import texts
    from curation.tokenise.tokenizer import train

    train(texts(inputs, text_key=text_key), vocab_size, output)
    _say(f"tokenizer of {vocab_size:,} tokens -> {output}")


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _print_json(value: Any, wanted: bool) -> None:
    if wanted:
        print(json.dumps(value))


def main() -> None:
    """The console script: errors that Tilth can name become one line and an exit code."""
    try:
        app()
    except TilthError as error:
        _say(f"{'error' if isinstance(error, UserError) else 'failed'}: {error}")
        sys.exit(error.exit_code)
    except PermissionError as error:
        _say(f"error: no permission for {error.filename or error}: mend its mode, or use another path")
        sys.exit(2)
    except SystemExit as end:
        if end.code == 130:  # typer's for Ctrl-C
            _say("stopped: the same command goes on from here")
        raise


if __name__ == "__main__":
    main()
