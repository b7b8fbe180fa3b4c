"""A job submitted to a real Ray head as a user would do it gives the shards of a local run."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil
import pytest
from flow_helpers import shard_hashes, tilth

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(tmp_path_factory):
    """`ray start --head --block` as a child that is ended by its own pid: `ray stop` would end every Ray here."""
    dashboard = free_port()
    environment = os.environ | {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(
        [BIN / "ray", "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}", "--disable-usage-stats",
         f"--dashboard-port={dashboard}", "--object-store-memory=268435456", f"--ray-client-server-port={free_port()}",
         f"--dashboard-agent-listen-port={free_port()}"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=2)
            break
        except OSError:
            assert process.poll() is None, "ray start ended"
            time.sleep(0.25)
    yield address, environment
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, alive = psutil.wait_procs(everyone, timeout=10)
    for left in alive:
        left.kill()
    process.wait(timeout=10)


def submit(root, recipe, run, address, environment):
    for _ in range(20):
        done = subprocess.run(
            [root / "clusters/submit", recipe, run, address],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if "No available agent" not in done.stdout + done.stderr:  # the head has just started
            return done
        time.sleep(1)
    return done


@pytest.mark.slow
def test_a_submitted_job_gives_the_shards_of_a_local_run(root, head, tmp_path):
    address, environment = head
    local = tilth("curate", root / "examples/demo.yaml", "--run", tmp_path / "local", "--workers", 1, "--json")
    assert local.code == 0, local.err
    done = submit(root, "examples/demo.yaml", tmp_path / "job", address, environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "succeeded" in done.stdout
    assert shard_hashes(tmp_path / "job") == shard_hashes(tmp_path / "local")
