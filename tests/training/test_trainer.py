"""The trainer itself: it learns, resumes to the bit, exports what transformers reads, and refuses bad input."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from training_helpers import (
    NEOX,
    SHAPE,
    phase_folder,
    save_config,
    small_config,
    tilth,
    token_ids,
    trace,
    write_shards,
    write_tokenizer,
)  # fmt: skip

from curation.errors import TilthError, UserError
from training import checkpoint
from training.config import Phase
from training.plan import plan
from training.shards import TokenStream
from training.trainer import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small training that ran without a break, two phases long."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(folder)
    write_shards(folder / "more", token_ids(8 * 32 * 6 + 1, seed=3))
    more = Phase(shards=str(folder / "more"), sequence_length=32, batch_tokens=256, learning_rate=5e-3)
    config = config.model_copy(update={"phases": {**config.phases, "midtrain": more}})
    return config, train(config)


def test_it_learns(trained):
    config, summary = trained
    rows = trace(phase_folder(plan(config).output))
    assert [row[0] for row in rows] == list(range(1, 13))
    assert rows[0][2] > 5.5  # a guess: log(300) = 5.7
    assert rows[-1][2] < rows[0][2] - 0.5
    assert [p["phase"] for p in summary["phases"]] == ["pretrain", "midtrain"]


def test_the_first_loss_is_that_of_a_plain_loop(tmp_path):
    """The oracle: the same model in ten lines of PyTorch, on windows cut by hand."""
    from curation.rng import key64
    from training.model import build

    config = small_config(tmp_path, steps=3, clip_norm=1e9, weight_decay=0.0)
    train(config)
    ids = TokenStream.open(tmp_path / "data").read(0, 3 * 256 + 1).astype(np.int64)
    steps = 3  # row r reads the windows 3r, 3r + 1, 3r + 2
    model = build(SHAPE, 300, 32, 0, key64("weights", 0) >> 1).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    rows = trace(phase_folder(tmp_path / "out"))
    for step in range(3):
        batch = torch.from_numpy(np.stack([ids[(i * steps + step) * 32 :][:33] for i in range(8)]))
        optimizer.param_groups[0]["lr"] = rows[step][3]
        loss = model(input_ids=batch[:, :-1], labels=batch[:, 1:], shift_labels=batch[:, 1:].contiguous()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert rows[step][2] == pytest.approx(loss.item(), abs=1e-5)


def test_gradient_accumulation_gives_the_same_losses(tmp_path):
    losses = {}
    for micro in (8, 2):
        config = small_config(tmp_path, steps=6, micro_batch=micro, output=str(tmp_path / f"out{micro}"))
        train(config)
        losses[micro] = [row[2] for row in trace(phase_folder(tmp_path / f"out{micro}"))]
    assert losses[8] == pytest.approx(losses[2], abs=1e-5)


@pytest.mark.parametrize("shape", [SHAPE, NEOX], ids=["llama", "gpt_neox"])
def test_transformers_reads_the_model(tmp_path, shape):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXForCausalLM
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

    config = small_config(tmp_path, steps=4, shape=shape)
    summary = train(config)
    model = AutoModelForCausalLM.from_pretrained(summary["model"])
    assert type(model) is (LlamaForCausalLM if shape is SHAPE else GPTNeoXForCausalLM)
    # The trainer's own weights, from the step checkpoint, in a model built by shape.
    from training.model import build

    mine = build(shape, 300, 32, 0, 0)
    laid_out = plan(config)
    optimizer = torch.optim.AdamW(mine.parameters())
    checkpoint.restore(checkpoint.steps(laid_out.final.folder)[-1], laid_out.final.key, mine, optimizer)
    tokens = torch.arange(1, 30)[None]
    assert torch.equal(model(tokens).logits, mine(tokens).logits)
    tokenizer = AutoTokenizer.from_pretrained(summary["model"])
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("t7")) == (
        "<|endoftext|>",
        0,
        7,
    )
    made = model.generate(tokens[:, :3], max_new_tokens=5, do_sample=False)
    assert made.shape[1] <= 8


def test_the_card_traces_to_the_data(trained):
    config, summary = trained
    laid_out = plan(config)
    card = Path(summary["model"], "README.md").read_text()
    for phase in laid_out.phases:
        assert phase.data_hash[:16] in card
        assert phase.key in card
    about = json.loads(Path(f"{summary['model']}.json").read_text())
    assert [p["key"] for p in about["phases"]] == [p.key for p in laid_out.phases]


def test_no_pickle_is_written(trained):
    config, _ = trained
    names = {path.suffix for path in plan(config).output.rglob("*") if path.is_file()}
    assert not names & {".pt", ".pth", ".bin", ".pkl"}
    assert ".safetensors" in names


def test_a_second_run_trains_nothing(trained):
    config, first = trained
    again = train(config)
    assert [p["trained"] for p in first["phases"]] == [True, True]
    assert [p["trained"] for p in again["phases"]] == [False, False]


def test_a_change_in_a_later_phase_keeps_the_trunk(trained):
    config, _ = trained
    changed = config.phases["midtrain"].model_copy(update={"learning_rate": 1e-3})
    again = train(config.model_copy(update={"phases": {**config.phases, "midtrain": changed}}))
    assert [p["trained"] for p in again["phases"]] == [False, True]


def test_other_seeds_start_elsewhere(tmp_path):
    losses = []
    for seed in (0, 1):
        train(small_config(tmp_path, steps=2, seed=seed, output=str(tmp_path / f"s{seed}")))
        losses.append(trace(phase_folder(tmp_path / f"s{seed}"))[0][2])
    assert losses[0] != losses[1]


def test_it_goes_on_from_a_hugging_face_checkpoint(tmp_path, trained):
    """A CPT arm: from another training's model, with fresh moments; its first loss is the model's own."""
    from transformers import AutoModelForCausalLM

    _, summary = trained
    config = small_config(tmp_path, steps=4, shape=None, model=summary["model"], tokenizer=None)
    done = train(config)
    ids = TokenStream.open(tmp_path / "data").pick(np.arange(8) * 4, 32)
    batch = torch.from_numpy(ids)
    model = AutoModelForCausalLM.from_pretrained(summary["model"])
    with torch.no_grad():
        logits = model(input_ids=batch[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
    assert trace(phase_folder(tmp_path / "out"))[0][2] == pytest.approx(expected, abs=1e-5)
    assert done["phases"][0]["loss"] < expected + 1


def test_checkpoints_older_than_the_last_n_go(tmp_path):
    seen = []
    config = small_config(tmp_path, steps=11, checkpoint_steps=2, keep_checkpoints=2)
    folder = plan(config).final.folder
    train(config, lambda *_: seen.append(len(checkpoint.steps(folder))))
    assert max(seen) == 2
    assert [path.name for path in checkpoint.steps(folder)] == ["step-00000011"]


@pytest.mark.slow
def test_kill_9_at_any_moment_changes_nothing(tmp_path):
    """Killed in the first steps, while a checkpoint is being written, and late: trace and weights to the bit."""
    config = small_config(tmp_path, steps=40, checkpoint_steps=4)
    smooth = config.model_copy(update={"output": str(tmp_path / "smooth")})
    assert tilth("train", save_config(smooth, tmp_path / "smooth.json")).returncode == 0
    wanted = phase_folder(tmp_path / "smooth")
    broken = save_config(config, tmp_path / "broken.json")
    output = tmp_path / "out"

    def rows() -> int:
        found = list((output / "phases").glob("*/metrics.jsonl"))
        return found[0].read_bytes().count(b"\n") if found else 0

    moments = [
        lambda: rows() >= 2,
        lambda: rows() >= 6 and any((output / "phases").glob("*/.step-*.tmp")),
        lambda: rows() >= 30,
    ]
    killed = 0
    for due in moments:
        child = subprocess.Popen(
            [sys.executable, "-m", "tilth", "train", str(broken)], env={**os.environ, "OMP_NUM_THREADS": "2"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while child.poll() is None and not due():
            time.sleep(0.001)
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            killed += 1
        child.wait()
    assert killed >= 2
    done = tilth("train", broken)
    assert done.returncode == 0, done.stderr
    found = phase_folder(output)
    assert trace(found) == trace(wanted)
    assert len(trace(found)) == 40
    for name in ("model/model.safetensors", "step-00000040/model.safetensors", "step-00000040/optimizer.safetensors"):
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name
    assert not list(found.glob(".step-*"))


def test_ctrl_c_leaves_a_way_to_go_on(tmp_path):
    config = save_config(small_config(tmp_path, steps=24, checkpoint_steps=2), tmp_path / "c.json")
    child = subprocess.Popen([sys.executable, "-m", "tilth", "train", str(config)], stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not list((tmp_path / "out").glob("phases/*/step-*")):
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert child.returncode == 130
    assert "Traceback" not in said
    assert "goes on from here" in said


# ---- bad input: one sentence, before step 1 or at the failing write


def test_a_tokenizer_of_fewer_ids_is_refused(tmp_path):
    config = small_config(tmp_path)
    write_tokenizer(tmp_path / "tokenizer.json", 100)
    with pytest.raises(UserError, match=r"holds the token id 299 and tokenizer .* ends at 99"):
        train(config)


def test_a_tokenizer_with_another_end_of_text_is_refused(tmp_path):
    config = small_config(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["<|endoftext|>"], vocab["t5"] = vocab["t5"], vocab["<|endoftext|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"do not end with <\|endoftext\|> \(id 5\)"):
        train(config)


def test_a_checkpoint_with_another_tokenizer_is_refused(tmp_path, trained):
    _, summary = trained
    config = small_config(tmp_path, shape=None, model=summary["model"])
    text = (tmp_path / "tokenizer.json").read_text().replace('"t9"', '"u9"')
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="is not that of model"):
        train(config)


def test_a_checkpoint_with_fewer_rows_is_refused(tmp_path, trained):
    _, summary = trained
    config = small_config(tmp_path, shape=None, model=summary["model"])
    write_tokenizer(tmp_path / "tokenizer.json", 500)
    with pytest.raises(UserError, match=r"has 500 ids and model .* 320"):
        train(config)


def test_a_damaged_checkpoint_to_start_from_is_refused(tmp_path, trained):
    _, summary = trained
    shutil.copytree(summary["model"], tmp_path / "bad")
    with (tmp_path / "bad/model.safetensors").open("r+b") as handle:
        handle.truncate(5_000)
    config = small_config(tmp_path, shape=None, model=str(tmp_path / "bad"), tokenizer=None)
    with pytest.raises(UserError, match="cannot be loaded"):
        train(config)


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(UserError, match="is no preset, folder or hub id: the presets are tiny, 100m, 1b, 6"):
        train(small_config(tmp_path, shape=None, model="tinny"))


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"sequence_length": 10_000, "batch_tokens": 10_000}, "less than a window of 10,000"),
        ({"batch_tokens": 32 * 10_000}, "less than one batch of 320,000"),
        ({"batch_tokens": 100}, "is no multiple of sequence_length 32"),
        ({"shards": "/nowhere"}, "holds no .ds or .bin shards"),
        ({"shards": None}, "has no `shards`"),
    ],
)
def test_a_phase_that_cannot_be_trained_is_refused(tmp_path, over, message):
    config = small_config(tmp_path)
    over = {"tokens": None, **over}
    phase = config.phases["pretrain"].model_copy(update=over)
    with pytest.raises(UserError, match=message):
        train(config.model_copy(update={"phases": {"pretrain": phase}}))
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    config = small_config(tmp_path, steps=4)
    train(config)
    laid_out = plan(config)
    other = plan(config.model_copy(update={"seed": 9}))
    shutil.copytree(checkpoint.steps(laid_out.final.folder)[0], other.final.folder / "step-00000004")
    with pytest.raises(UserError, match="another configuration"):
        train(other.config)


def test_a_damaged_step_checkpoint_is_named(tmp_path):
    config = small_config(tmp_path, steps=4)
    train(config)
    folder = plan(config).final.folder
    (folder / "phase.json").unlink()
    with (checkpoint.steps(folder)[0] / "optimizer.safetensors").open("r+b") as handle:
        handle.truncate(3_000)
    with pytest.raises(TilthError, match=r"step-00000004 is damaged .*delete it"):
        train(config)


def test_a_loss_that_is_no_number_stops_and_keeps_nothing(tmp_path):
    config = small_config(tmp_path, steps=24, checkpoint_steps=1, clip_norm=1e30)
    phase = config.phases["pretrain"].model_copy(update={"learning_rate": 1e30, "warmup": 0.0})
    config = config.model_copy(update={"phases": {"pretrain": phase}})
    with pytest.raises(TilthError, match=r"the loss of phase pretrain is .*nan.*lower its learning_rate"):
        train(config)
    from safetensors.torch import load_file

    for path in checkpoint.steps(plan(config).final.folder):
        assert all(torch.isfinite(t).all() for t in load_file(path / "model.safetensors").values())


def test_a_full_disk_is_one_sentence_and_nothing_half_written(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: a write beyond it fails as one without room does."""
    config = small_config(tmp_path, steps=6, checkpoint_steps=2)
    path = save_config(config, tmp_path / "c.json")
    done = tilth("train", path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)))
    assert done.returncode == 1
    assert "could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    folder = plan(config).final.folder
    assert not checkpoint.steps(folder)
    assert not list(folder.glob(".step*"))
    assert tilth("train", path).returncode == 0  # with room again


def test_two_trainings_of_one_phase_do_not_mix(tmp_path):
    from curation.errors import RunLocked
    from curation.manifest import RunFolder, WriterLock

    config = small_config(tmp_path)
    with WriterLock(RunFolder(str(plan(config).final.folder))), pytest.raises(RunLocked, match="another process"):
        train(config)


def test_the_command_says_what_it_would_do_and_does(tmp_path):
    path = save_config(small_config(tmp_path, steps=6), tmp_path / "c.json")
    dry = tilth("train", path, "--dry-run", "--json")
    (row,) = json.loads(dry.stdout.splitlines()[-1])
    assert (row["steps"], row["tokens"], row["trained"]) == (6, 6 * 256, False)
    assert not (tmp_path / "out").exists()
    done = tilth("train", path, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["phases"][0]["steps"] == 6
    assert os.path.exists(os.path.join(summary["model"], "model.safetensors"))
    assert "step 6 of 6" in done.stderr
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))
    wrong = tilth("train", tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("over", [{"dtype": "bfloat16"}, {"activation_checkpointing": True}], ids=str)
def test_precision_and_recomputation(tmp_path, over):
    """bfloat16 products with float32 weights, and activations computed again: close to float32."""
    train(small_config(tmp_path, steps=6))
    train(small_config(tmp_path, steps=6, output=str(tmp_path / "other"), **over))
    plain, other = trace(phase_folder(tmp_path / "out")), trace(phase_folder(tmp_path / "other"))
    assert [r[2] for r in other] == pytest.approx([r[2] for r in plain], abs=0.05 if "dtype" in over else 1e-6)
    from safetensors.torch import load_file

    weights = load_file(phase_folder(tmp_path / "other") / "model/model.safetensors")
    wanted = torch.bfloat16 if "dtype" in over else torch.float32
    assert {tensor.dtype for tensor in weights.values()} == {wanted}
