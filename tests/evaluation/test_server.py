"""`tilth serve`: real vLLM where its environment is, and clear words where something is wrong."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest
from training_helpers import SHAPE, small_config

from curation.errors import TilthError, UserError
from evaluation.server import Server


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny Llama, trained a few steps by Tilth's own trainer."""
    from training.trainer import train

    # vLLM's attention on CPU takes heads of 32 and more.
    shape = SHAPE.model_copy(update={"hidden_size": 64, "num_heads": 2, "num_kv_heads": 1})
    return train(small_config(tmp_path_factory.mktemp("served"), steps=4, shape=shape))["model"]


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def all_gone(processes: list[psutil.Process], within: float = 20) -> bool:
    return not psutil.wait_procs(processes, within)[1]


# ---- what needs no vLLM


def test_a_missing_vllm_is_said(monkeypatch, tmp_path, checkpoint):
    monkeypatch.setenv("TILTH_VLLM_PYTHON", str(tmp_path / "python"))
    with pytest.raises(UserError, match="does not exist: run `make vllm`"), Server(checkpoint):
        pass


def test_a_python_without_vllm_is_said(monkeypatch, checkpoint):
    monkeypatch.setenv("TILTH_VLLM_PYTHON", sys.executable)
    with pytest.raises(UserError, match="has no vLLM: run `make vllm`"), Server(checkpoint):
        pass


def test_a_taken_port_is_said(checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port} is taken"), Server(checkpoint, port=port):
            pass


@pytest.mark.parametrize("what", ["/nowhere/model", "model", "."])
def test_what_is_no_checkpoint_is_said(what, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no config\.json|no folder and no hub id"), Server(what):
        pass


def test_the_supervisor_ends_the_group_when_its_parent_is_killed(tmp_path):
    """A stand-in for vLLM that starts a child of its own and takes no notice of SIGTERM; the parent gets SIGKILL."""
    stubborn = (
        "import signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\ntime.sleep(300)"
    )
    parent = (
        "import subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], 'LOG', sys.executable, '-c', sys.argv[2]],"
        " stdin=subprocess.PIPE, start_new_session=True)\ntime.sleep(300)"
    )
    quick = "from evaluation import supervisor; supervisor.GRACE_S = 0.5; supervisor.main()"
    running = subprocess.Popen([sys.executable, "-c", parent, quick, stubborn], cwd=tmp_path)
    deadline = time.monotonic() + 30
    while len(descendants(running.pid)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    family = descendants(running.pid)
    assert len(family) == 3
    running.kill()
    running.wait()
    assert all_gone(family)


# ---- real vLLM


def test_it_serves_the_model_that_was_trained_and_leaves_nothing(vllm, checkpoint):
    """Log-probabilities of a prompt's tokens are those of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    lines, ids = [], [5, 6, 7, 250, 12, 99, 31]
    with Server(checkpoint, max_length=32, on_line=lines.append) as server:
        family = descendants(server._process.pid)
        body = {"model": server.name, "prompt": ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        request = urllib.request.Request(
            f"{server.url}/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
    found = [
        row[str(token)]["logprob"]
        for token, row in zip(ids, answer["choices"][0]["prompt_logprobs"], strict=True)
        if row
    ]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint)(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert found == pytest.approx([expected[at, token].item() for at, token in enumerate(ids[1:])], abs=1e-4)
    assert any(line.startswith("ready after") for line in lines)
    assert len(family) >= 3
    assert all_gone(family)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_command_leaves_no_engine_behind(vllm, checkpoint, how):
    running = subprocess.Popen(
        [sys.executable, "-m", "tilth", "serve", checkpoint, "--max-length", "32"], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    if how == signal.SIGTERM:  # in the middle of the start
        deadline = time.monotonic() + 60
        while len(descendants(running.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        assert running.stdout.readline().startswith("http://127.0.0.1:")
    family = descendants(running.pid)
    running.send_signal(how)
    said = running.communicate(timeout=60)[1]
    assert all_gone(family)
    assert "Traceback" not in said


def test_a_broken_model_is_named(vllm, checkpoint, tmp_path):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    with (broken / "model.safetensors").open("r+b") as handle:
        handle.truncate(3_000)
    with pytest.raises(TilthError, match=r"vLLM could not serve .*its log"), Server(str(broken), max_length=32):
        pass
