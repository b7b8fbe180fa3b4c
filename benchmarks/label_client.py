"""The label client beside vLLM's own benchmark client on one real vLLM server, in requests per second.

    python -m benchmarks.label_client [--json] [--pairs N] [--requests N] [--concurrency N] [--checkpoint DIR]

Needs `make vllm`. `vllm bench serve` and ours take turns, each run with prompts that no other has (a prefix cache
knows nothing of them): chat completions without a schema, of one user message of so many words and always so many
tokens. Its client streams, ours does not, which is less work for the server too: the ratio is of what each gets out
of the same server. The ratio is the median over pairs of runs beside each other; starts of the clients do not count.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

from curation.label.backend import Request, Text
from curation.label.client import Client
from curation.vllm import find_environment
from evaluation.server import Server

_PEER = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""  # the `vllm` command fails where vLLM's package has another name, as for CPUs
_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Round(NamedTuple):
    """One client's run."""

    requests_per_second: float
    input_tokens: int
    output_tokens: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--requests", type=int, default=384, help="of a run")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--words", type=int, default=70, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", help="default: a Llama of 0.6 M random weights, which leaves work to clients")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or random_checkpoint(Path(folder, "model"))
        with Server(checkpoint, max_length=1024) as server:
            found = duel(server, options, Path(folder))
    for name, value in found.items():
        print(f"{name}: {value}", file=sys.stderr)
    if options.json:
        print(json.dumps(found))


def duel(server: Server, options: argparse.Namespace, folder: Path) -> dict:
    """Ours and theirs in turns; who begins changes from pair to pair."""
    seeds = iter(range(1_000_000 * options.seed, 1_000_000 * (options.seed + 1)))
    ours(server, prompts(options, next(seeds)), options)  # the server's first requests are slower
    mine: list[Round] = []
    theirs: list[Round] = []
    for pair in range(options.pairs):
        for turn in ("ours", "theirs") if pair % 2 else ("theirs", "ours"):
            asked = prompts(options, next(seeds))
            if turn == "ours":
                mine.append(ours(server, asked, options))
            else:
                theirs.append(vllm_bench(server, asked, options, folder))
        print(f"{mine[-1].requests_per_second:.1f} / {theirs[-1].requests_per_second:.1f}", file=sys.stderr)
    assert {one.output_tokens for one in [*mine, *theirs]} == {options.requests * options.tokens}
    ratios = [a.requests_per_second / b.requests_per_second for a, b in zip(mine, theirs, strict=True)]
    return {
        "ratio": median(ratios),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "ours_requests_per_second": median(one.requests_per_second for one in mine),
        "vllm_bench_requests_per_second": median(one.requests_per_second for one in theirs),
        "ours_input_tokens": median(one.input_tokens for one in mine) / options.requests,
        "vllm_bench_input_tokens": median(one.input_tokens for one in theirs) / options.requests,
        "output_tokens": options.tokens,
        "concurrency": options.concurrency,
        "requests": options.requests,
    }


def prompts(options: argparse.Namespace, seed: int) -> list[str]:
    """Of random words, different from the first word on."""
    rng = random.Random(seed)
    words = [a + b for a in ("ro", "ma", "li", "te", "su") for b in ("bot", "chine", "ne", "st")]
    return [
        " ".join([f"{rng.getrandbits(40):x}", *rng.choices(words, k=options.words - 1)])
        for _ in range(options.requests)
    ]


def ours(server: Server, asked: list[str], options: argparse.Namespace) -> Round:
    sampling = {"max_tokens": options.tokens, "ignore_eos": True}
    client = Client([server.url], model=server.name, sampling=sampling, concurrency=options.concurrency)
    rows = [Request(str(at), [{"role": "user", "content": text}]) for at, text in enumerate(asked)]

    async def run() -> tuple[float, list]:
        started = time.perf_counter()
        replies = [reply async for reply in client.label(rows)]
        return time.perf_counter() - started, replies

    seconds, replies = asyncio.run(run())
    assert len(replies) == len(asked)
    assert all(isinstance(reply.result, Text) for reply in replies)
    return Round(
        len(asked) / seconds,
        sum(reply.usage.input_tokens for reply in replies),
        sum(reply.usage.output_tokens for reply in replies),
    )


def vllm_bench(server: Server, asked: list[str], options: argparse.Namespace, folder: Path) -> Round:
    data, result = folder / "prompts.jsonl", folder / "result.json"
    data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in asked))
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [
            find_environment().python, "-c", _PEER, "--backend", "openai-chat", "--endpoint", "/v1/chat/completions",
            "--base-url", server.url.removesuffix("/v1"), "--model", server.name, "--tokenizer", server.checkpoint,
            "--dataset-name", "custom", "--dataset-path", str(data), "--skip-chat-template", "--disable-shuffle",
            "--custom-output-len", str(options.tokens), "--num-prompts", str(len(asked)), "--ignore-eos",
            "--max-concurrency", str(options.concurrency), "--temperature", "0", "--disable-tqdm", "--save-result",
            "--result-dir", str(folder), "--result-filename", result.name,
        ],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode or not result.exists():
        raise SystemExit(f"vllm bench serve ended: {(done.stderr.strip() or done.stdout.strip())[-2000:]}")
    found = json.loads(result.read_text())
    assert found["completed"] == len(asked), f"{found['completed']} of {len(asked)} requests"
    return Round(found["request_throughput"], found["total_input_tokens"], found["total_output_tokens"])


def random_checkpoint(folder: Path) -> str:
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    file = Path(__file__).parents[1] / "examples/tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
    tokenizer.chat_template = _TEMPLATE
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024, initializer_range=0.2,
        bos_token_id=0, eos_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
