"""The suite beside lm-eval on the same prompts and checkpoint: prompts/s in one process, and through one vLLM server.

    python -m benchmarks.evaluate [--json] [--questions N] [--rounds N] [--checkpoint DIR] [--no-vllm]

Needs `make lm-eval`, and `make vllm` for the server. Rounds take turns, each with questions of its own (a prefix cache
knows nothing of them), ours first: vLLM reads nothing from its prefix cache for lm-eval's requests, which ask for
log-probabilities of the prompt. A *prompt* is one question in one format; lm-eval sends it once an option. lm-eval's
models are loaded before the clock runs, and get what it does best with of --batch (hf) and of --concurrent (server).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from evaluation.backends import Ask, Backend
from evaluation.backends.transformers import Transformers
from evaluation.lm_eval import find_environment
from evaluation.prompts import Prompt, prompts
from evaluation.run import DEFAULT_QUESTIONS, load_suite
from evaluation.suite import Suite, choices, prepare
from evaluation.tokens import Encoder

_PEER = """
import json, sys, time
from lm_eval.api.instance import Instance
kind, arguments = sys.argv[1], json.loads(sys.argv[2])
if kind == "hf":
    from lm_eval.models.huggingface import HFLM as Model
else:
    from lm_eval.models.openai_completions import LocalCompletionsAPI as Model
model = Model(**arguments)
print("ready", flush=True)
for line in sys.stdin:
    pairs = json.loads(line)
    asked = [Instance("loglikelihood", {}, tuple(pair), at) for at, pair in enumerate(pairs)]
    started = time.perf_counter()
    found = model.loglikelihood(asked, disable_tqdm=True)
    print(json.dumps([time.perf_counter() - started, [value for value, _ in found]]), flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=20, help="of a round, times 4 wrappers and 2 orders")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--checkpoint", help="default: a Llama of 10 M random weights")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64], help="batch sizes for lm-eval's hf")
    parser.add_argument("--concurrent", type=int, nargs="+", default=[8, 32, 64], help="num_concurrent for lm-eval")
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or random_checkpoint(Path(folder))
        encoder = Encoder(checkpoint)
        found = in_process(checkpoint, encoder, options)
        if not options.no_vllm:
            found |= through_a_server(checkpoint, encoder, options)
    for name, value in found.items():
        print(f"{name}: {value:,.2f}", file=sys.stderr)
    if options.json:
        print(json.dumps(found))


def random_checkpoint(folder: Path) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    file = Path(__file__).parents[1] / "examples/tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=256, intermediate_size=768, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.1,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Peer:
    """lm-eval in its own environment, loaded, waiting for rounds."""

    def __init__(self, kind: str, arguments: dict[str, Any]):
        self._process = subprocess.Popen(
            [find_environment().python, "-c", _PEER, kind, json.dumps(arguments)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self._line("ready")

    def ask(self, pairs: Sequence[tuple[str, str]]) -> tuple[float, list[float]]:
        """(seconds, log-likelihoods)"""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(pairs) + "\n")
        self._process.stdin.flush()
        seconds, values = json.loads(self._line("["))
        return seconds, values

    def _line(self, start: str) -> str:
        """lm-eval prints things of its own."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise SystemExit("lm-eval ended: run its command by hand to see why")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def suites(options: argparse.Namespace, scorer: str) -> list[Suite]:
    """One a round, of questions that no other has."""
    whole = load_suite(str(DEFAULT_QUESTIONS), conditions="ai", scorers=scorer)
    size = options.questions
    parts = [whole.questions[at * size : (at + 1) * size] for at in range(options.rounds)]
    assert all(len(part) == size for part in parts), f"there are {len(whole.questions)} questions"
    return [Suite(whole.source, part, (), whole.wrappers, whole.conditions, whole.scorers) for part in parts]


def pairs_of(suite: Suite) -> list[tuple[str, str]]:
    """What lm-eval is asked for the same choices: (context, continuation), the pair of each prompt together."""
    many: list[Prompt] = [
        one for question in suite.questions for one in prompts(question, suite.wrappers, suite.conditions)
    ]
    found = []
    for prompt in many:
        for place in (prompt.misaligned_place, prompt.aligned_place):
            if suite.scorers == ("letter",):
                found.append((prompt.text, prompt.letter_continuations[place]))
            elif prompt.rotation == 0:
                found.append((prompt.option_text, prompt.option_continuations[place]))
    return found


def ours(suite: Suite, encoder: Encoder, model: Backend) -> tuple[float, list[float]]:
    """(seconds with tokenising and reading, margins in lm-eval's order)"""
    started = time.perf_counter()
    prepared = prepare(suite, encoder, model.max_length, chat=False)
    answers: dict[str, Any] = {}
    asks: Sequence[Ask] = prepared.asks
    for batch in model.score(asks):
        answers |= {asks[at].key: value for at, value in zip(batch.indices, batch.values, strict=True)}
    table = choices(prepared, answers, label="ours", seed="0")
    return time.perf_counter() - started, table["margin"].to_list()


def duel(
    name: str, suite_list: list[Suite], encoder: Encoder, model: Backend, peers: dict[str, Peer]
) -> dict[str, float]:
    """Medians of prompts/s, the ratio to the best peer, and how many choices differ."""
    warm = Suite(suite_list[0].source, suite_list[0].questions[:1], (), ("dash",), ("none",), suite_list[0].scorers)
    ours(warm, encoder, model)
    for peer in peers.values():
        peer.ask(pairs_of(warm))
    speeds: dict[str, list[float]] = {"ours": [], **{peer: [] for peer in peers}}
    other = worst = 0.0
    for suite in suite_list:
        seconds, margins = ours(suite, encoder, model)
        speeds["ours"].append(len(margins) / seconds)
        asked = pairs_of(suite)
        for peer_name, peer in peers.items():
            seconds, values = peer.ask(asked)
            speeds[peer_name].append(len(margins) / seconds)
            if suite.scorers == ("letter",):
                theirs = [bad - good for bad, good in zip(values[::2], values[1::2], strict=True)]
                other += sum((a > 0) != (b > 0) for a, b in zip(margins, theirs, strict=True))
                worst = max(worst, *(abs(a - b) for a, b in zip(margins, theirs, strict=True)))
    found = {f"{name} {key} prompts/s": median(values) for key, values in speeds.items()}
    best = max(median(values) for key, values in speeds.items() if key != "ours")
    found[f"{name} ratio"] = median(speeds["ours"]) / best
    if suite_list[0].scorers == ("letter",):
        found |= {f"{name} choices that differ": other, f"{name} largest difference (nats)": worst}
    return found


def in_process(checkpoint: str, encoder: Encoder, options: argparse.Namespace) -> dict[str, float]:
    model = Transformers(checkpoint, encoder.tokenizer)
    peers = {
        f"lm-eval hf batch {size}": Peer("hf", {"pretrained": checkpoint, "dtype": "float32", "batch_size": size,
                                                "device": model.device})
        for size in options.batch
    }  # fmt: skip
    try:
        letters = duel("in-process letter", suites(options, "letter"), encoder, model, peers)
        return letters | duel("in-process option", suites(options, "option"), encoder, model, peers)
    finally:
        for peer in peers.values():
            peer.close()


def through_a_server(checkpoint: str, encoder: Encoder, options: argparse.Namespace) -> dict[str, float]:
    from evaluation.backends.openai import OpenAI
    from evaluation.server import Server

    with Server(checkpoint, dtype="float32") as server:
        model = OpenAI(server.url)
        peers = {
            f"lm-eval num_concurrent {count}": Peer(
                "server",
                {"base_url": f"{server.url}/completions", "model": server.name, "tokenizer": checkpoint,
                 "tokenizer_backend": "huggingface", "tokenized_requests": True, "num_concurrent": count,
                 "max_length": model.max_length, "batch_size": 1},
            )
            for count in options.concurrent
        }  # fmt: skip
        try:
            letters = duel("vLLM letter", suites(options, "letter"), encoder, model, peers)
            return letters | duel("vLLM option", suites(options, "option"), encoder, model, peers)
        finally:
            for peer in peers.values():
                peer.close()


if __name__ == "__main__":
    main()
