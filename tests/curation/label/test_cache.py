"""Answers on disk: kept over kill -9, shared by processes, read back fast."""

import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import pytest

from curation.errors import UserError
from curation.label.backend import Failed, Text, Usage
from curation.label.cache import Cache, Keys

KEYS = Keys(identity={"model": "m", "revision": "r"}, schema_sha256="00" * 32, sampling={"temperature": 0})
PROMPT = "11" * 32


@pytest.fixture
def cache(tmp_path):
    with Cache(tmp_path / "cache") as cache:
        yield cache


def put(cache, text, answer="yes", payer="run"):
    cache.put(KEYS, KEYS.key(text, PROMPT), Text(answer) if isinstance(answer, str) else answer, Usage(10, 2), payer)


def test_an_answer_comes_back_as_it_was(cache):
    odd = 'a "quote"\0 and \u2028 lines\n'
    cache.put(KEYS, KEYS.key("t", PROMPT), Text(odd, "length"), Usage(10, 2))
    row = cache.get(KEYS.key("t", PROMPT))
    assert (row.result, row.usage) == (Text(odd, "length"), Usage(10, 2))
    assert cache.get(KEYS.key("other", PROMPT)) is None


def test_any_part_of_a_key_makes_another(cache):
    put(cache, "t")
    others = [
        (Keys(identity={"model": "m", "revision": "r2"}, schema_sha256="00" * 32, sampling={"temperature": 0}), PROMPT),
        (Keys(identity={"model": "m", "revision": "r"}, schema_sha256="01" * 32, sampling={"temperature": 0}), PROMPT),
        (Keys(identity={"model": "m", "revision": "r"}, schema_sha256="00" * 32, sampling={"temperature": 1}), PROMPT),
        (KEYS, "12" * 32),
    ]
    assert all(cache.get(keys.key("t", prompt)) is None for keys, prompt in others)


def test_the_first_of_two_answers_stays(cache):
    put(cache, "t", "first")
    put(cache, "t", "second")
    assert cache.get(KEYS.key("t", PROMPT)).result == Text("first")


def test_errors_by_class(cache):
    put(cache, "a")
    put(cache, "b", Failed("bad_request", "too long"))
    cache.tally("timeout")
    cache.tally("timeout", 2)
    assert cache.counts() == {"answers": 1, "bad_request": 1, "timeout": 3}
    assert cache.get(KEYS.key("b", PROMPT)).result == Failed("bad_request", "too long")
    assert cache.forget(error="bad_request") == 1
    assert cache.forget(key=KEYS.key("a", PROMPT)) == 0, "answers are never forgotten"
    assert cache.counts() == {"answers": 1, "timeout": 3}


def test_what_a_run_spent(cache):
    put(cache, "a", payer="x")
    put(cache, "b", payer="x")
    put(cache, "c", payer="y")
    assert cache.spent("x") == Usage(20, 4)
    assert cache.spent("z") == Usage(0, 0)


def test_a_claim_is_one_owners_until_it_is_answered_given_back_or_the_owner_ends(cache):
    key = KEYS.key("t", PROMPT)
    other = Cache(cache.folder)
    assert other.claim(key)
    assert not cache.claim(key)
    assert not other.claim(key), "an owner asks for a key once"
    other.release(key)
    assert cache.claim(key)
    put(cache, "t")
    assert not other.claim(key), "answered"
    second = KEYS.key("u", PROMPT)
    assert other.claim(second)
    other.close()
    assert cache.claim(second)


def test_claims_of_a_killed_process_are_free_at_once(cache):
    code = (
        "import sys; from curation.label.cache import *; c = Cache(sys.argv[1]);"
        "k = Keys(identity={'model': 'm', 'revision': 'r'}, schema_sha256='00' * 32, sampling={'temperature': 0});"
        "print(c.claim(k.key('t', '11' * 32)), flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(cache.folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "True\n"
    assert not cache.claim(KEYS.key("t", PROMPT))
    child.kill()
    child.communicate()
    cache._alive.clear()  # for half a second an owner counts as alive without a look
    assert cache.claim(KEYS.key("t", PROMPT))


WRITER = """
import sys
from curation.label.cache import *
keys = Keys(identity={"model": "m", "revision": "r"}, schema_sha256="00" * 32, sampling={"temperature": 0})
with Cache(sys.argv[1]) as cache:
    for n in range(int(sys.argv[2]), int(sys.argv[3])):
        cache.put(keys, keys.key(f"text {n}", "11" * 32), Text(f"answer {n}"), Usage(1, 1), "run")
        print(n, flush=True)
"""


def test_what_was_put_outlives_a_kill(tmp_path):
    start = 0
    for stop_at in (50, 90, 400):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), str(start), "100000"], stdout=subprocess.PIPE, text=True
        )
        for line in child.stdout:
            if int(line) >= stop_at:
                break
        child.kill()
        rest = [int(line) for line in child.communicate()[0].split()]
        start = (rest[-1] if rest else stop_at) + 1
        with Cache(tmp_path) as cache:
            for n in range(start):
                assert cache.get(KEYS.key(f"text {n}", PROMPT)).result == Text(f"answer {n}")


def test_several_processes_write_at_once(tmp_path):
    def write(part):
        args = [sys.executable, "-c", WRITER, str(tmp_path), str(part * 200), str(part * 200 + 300)]
        return subprocess.run(args, stdout=subprocess.DEVNULL, check=True)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    with Cache(tmp_path) as cache:
        assert {row.result.text for row in cache.rows()} == {f"answer {n}" for n in range(700)}
        assert cache.counts() == {"answers": 700}


def test_100_000_labels_are_read_back_in_2_s_with_flat_memory(tmp_path):
    answer = '{"evidence": "%s", "actor": "assistant", "stance": "aligned", "confidence": "high"}' % ("word " * 30)
    with Cache(tmp_path) as cache:
        setting = cache._setting(KEYS.setting)
        with cache._transaction():  # as put does, in one go
            cache._db.executemany(
                "INSERT INTO answers VALUES (?,?,?,?,?,'stop',NULL,NULL,10,2,'run',0.0)",
                ((*KEYS.key(f"text {n}", PROMPT), setting, answer) for n in range(100_000)),
            )
    with Cache(tmp_path) as cache:
        begun = perf_counter()
        assert sum(len(row.result.text) for row in cache.rows(KEYS)) == 100_000 * len(answer)
        streamed_s = perf_counter() - begun
        begun = perf_counter()
        assert all(cache.get(KEYS.key(f"text {n}", PROMPT)) for n in range(100_000))
        looked_up_s = perf_counter() - begun
        print(f"100,000 rows: streamed {streamed_s:.2f} s, looked up one by one {looked_up_s:.2f} s")
        assert streamed_s <= 2
        assert looked_up_s <= 6, "a bound for busy machines"
        tracemalloc.start()
        for _ in cache.rows():
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="can't be made"):
        Cache(tmp_path / "file")
    with pytest.raises(UserError, match="local disk"):
        Cache("s3://bucket/cache")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "labels.sqlite").write_bytes(b"not a database at all, but long enough to be read" * 100)
    with pytest.raises(UserError, match="can't be used"):
        Cache(broken)


def test_throughput_is_tokens_over_the_time_between_answers_without_pauses(cache):
    assert cache.tokens_per_second(KEYS) is None
    for n in range(30):
        put(cache, f"t{n}")
        # 12 tokens twice a second, and a night in the middle.
        cache._db.execute("UPDATE answers SET created = ? WHERE rowid = ?", (n / 2 + 36_000 * (n > 14), n + 1))
    assert cache.tokens_per_second(KEYS) == pytest.approx(24)
