"""What a training begins with: the token before each window, the weights of a shape, and a part of its phases."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tokenizers import Tokenizer, models, processors
from training_helpers import NEOX, SHAPE, VOCAB, phase_folder, small_config, token_ids, trace, write_shards

from curation.errors import UserError
from training.config import Phase
from training.model import build
from training.plan import plan, read_tokenizer
from training.shards import TokenStream, spread
from training.trainer import begin, train

BOS = "t9"
END = "<|endoftext|>"
WIDE = SHAPE.model_copy(
    update={"hidden_size": 96, "num_kv_heads": 2, "intermediate_size": 256, "tied_embeddings": False}
)


def add_template(path: Path, single: str = f"{BOS} $A") -> Path:
    """Make a tokenizer.json put special tokens around each text."""
    tokenizer = Tokenizer.from_file(str(path))
    special = [(name, tokenizer.token_to_id(name)) for name in single.split() if name != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    tokenizer.save(str(path))
    return path


def word_tokenizer(path: Path, unknown: str = "<unk>") -> Path:
    """Ids of words; unlike the helpers' its unknown token is not the end of text."""
    names = [END, unknown, *(f"t{n}" for n in range(2, 20))]
    Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token=unknown)).save(str(path))
    return path


# Windows.


windows = arrays.arrays(np.int64, st.tuples(st.integers(1, 6), st.integers(2, 9)), elements=st.integers(0, 300))


@given(windows, st.integers(0, 2**31))
def test_windows_begin_with_bos_and_lose_their_last_token(found, bos):
    begun = begin(found, bos)
    assert (begun.shape, begun.dtype) == (found.shape, found.dtype)
    assert (begun[:, 0] == bos).all()
    assert np.array_equal(begun[:, 1:], found[:, :-1])


@given(windows)
def test_without_bos_windows_stay_as_they_are(found):
    assert begin(found, None) is found


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5))
def test_every_token_of_the_shards_is_predicted_once(length, rows):
    """Windows share a token; after `begin` they do not, and none is lost but what no window reaches."""
    ids = np.arange(1, length * rows + 2)
    cut = np.stack([ids[at * length : (at + 1) * length + 1] for at in range(rows)])
    assert begin(cut, 0)[:, 1:].ravel().tolist() == ids[:-1].tolist()


def test_the_first_loss_is_that_of_windows_that_begin_with_bos(tmp_path):
    """The oracle: the model of that seed on windows cut by hand."""
    from curation.rng import key64

    config = small_config(tmp_path, steps=3)
    add_template(tmp_path / "tokenizer.json")
    train(config)
    stream = TokenStream.open(tmp_path / "data")
    cut = stream.pick(spread(0, range(8), 3), 32).astype(np.int64)
    batch = torch.from_numpy(np.stack([[9, *row[:-1]] for row in cut]))
    model = build(SHAPE, VOCAB, 32, 0, key64("weights", 0) >> 1)
    with torch.no_grad():
        logits = model(input_ids=batch[:, :-1]).logits
        other = model(input_ids=torch.from_numpy(cut)[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).item()
    without = torch.nn.functional.cross_entropy(other.flatten(0, 1), torch.from_numpy(cut)[:, 1:].flatten()).item()
    first = trace(phase_folder(tmp_path / "out"))[0][2]
    assert first == pytest.approx(loss, abs=1e-5)
    assert first != pytest.approx(without, abs=1e-5)


# The tokenizer.


@pytest.mark.parametrize(
    ("single", "bos"),
    [(f"{BOS} $A", BOS), (f"{BOS} $A {END}", BOS), (f"$A {END}", None), ("$A", None), (f"{END} $A", END)],
)
def test_bos_is_what_a_tokenizer_puts_before_a_text(tmp_path, single, bos):
    found = read_tokenizer(add_template(word_tokenizer(tmp_path / "tokenizer.json"), single), None)
    assert (found.bos, found.eos, found.eos_id) == (bos, END, 0)
    assert found.bos_id == (None if bos is None else {BOS: 9, END: 0}[bos])


def test_a_tokenizer_without_a_template_has_no_bos(tmp_path, root):
    assert read_tokenizer(word_tokenizer(tmp_path / "tokenizer.json"), None).bos_id is None
    found = read_tokenizer(root / "examples/tokenizer.json", None)
    assert (found.bos_id, found.bos) == (None, None)


def test_a_real_byte_level_tokenizer_with_a_template_has_one(tmp_path, root):
    path = tmp_path / "tokenizer.json"
    path.write_bytes((root / "examples/tokenizer.json").read_bytes())
    found = read_tokenizer(add_template(path, f"{END} $A"), None)
    assert (found.bos_id, found.bos) == (found.eos_id, END)


def test_a_tokenizer_that_has_no_token_for_x_has_no_bos(tmp_path):
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.BPE({END: 0, "a": 1, "b": 2}, [])).save(str(path))
    assert read_tokenizer(path, None).bos_id is None


# The key.


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint to go on from, with a licence, terms and a notice beside it, and other files."""
    folder = tmp_path_factory.mktemp("start")
    model = Path(train(small_config(folder, steps=2))["model"]).resolve()
    for name, text in TERMS.items():
        (model / name).write_text(text)
    for name in ("notes.txt", "license_plates.csv"):
        (model / name).write_text("not part of any licence")
    (model / "LICENSES").mkdir()
    return model


TERMS = {
    "LICENSE": "do as you like", "LICENSE.md": "or not", "NOTICE.txt": "made of wood", "GEMMA_TERMS_OF_USE.md": "terms",
    "TERMS": "more", "PROHIBITED_USE_POLICY.md": "no",
}  # fmt: skip


def from_start(folder, start, single=None, **over):
    """A training that goes on from `start`; with `single`, by a tokenizer with that template."""
    config = small_config(folder, steps=2, shape=None, model=str(start), **over)
    if single is not None:
        add_template(folder / "tokenizer.json", single)
    return config


def test_the_key_of_a_phase_depends_on_bos(tmp_path, start):
    """From a checkpoint: from scratch the tokenizer's hash is in the key anyway."""
    keys = {}
    for name, single in (("none", None), ("same", "$A"), ("nine", f"{BOS} $A"), ("eight", "t8 $A")):
        keys[name] = plan(from_start(tmp_path, start, single)).final.key
    assert keys["none"] == keys["same"]
    assert len({keys["none"], keys["nine"], keys["eight"]}) == 3


# What is exported.


def exported(model, name):
    return json.loads(Path(model, name).read_text())


def test_the_exported_model_begins_texts_as_its_tokenizer_did(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    config = small_config(tmp_path, steps=2)
    add_template(tmp_path / "tokenizer.json")
    model = train(config)["model"]
    found = exported(model, "tokenizer_config.json")
    assert (found["bos_token"], found["eos_token"]) == (BOS, END)
    generation = GenerationConfig.from_pretrained(model)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (9, 0, 0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer("t5")["input_ids"] == [9, 5]
    assert tokenizer.bos_token_id == 9


def test_without_bos_documents_begin_after_the_end_of_one(tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    model = train(small_config(tmp_path, steps=2))["model"]
    assert exported(model, "tokenizer_config.json")["bos_token"] == END
    assert GenerationConfig.from_pretrained(model).bos_token_id == 0
    assert AutoTokenizer.from_pretrained(model)("t5")["input_ids"] == [5]


def test_config_json_has_the_same_bos_as_the_tokenizer(tmp_path):
    config = small_config(tmp_path, steps=2)
    add_template(tmp_path / "tokenizer.json")
    assert exported(train(config)["model"], "config.json")["bos_token_id"] == 9


def test_licence_notice_and_terms_go_with_what_is_made_of_a_checkpoint(tmp_path, start):
    model = Path(train(from_start(tmp_path, start))["model"])
    assert {name: (model / name).read_text() for name in TERMS} == TERMS
    assert not (model / "notes.txt").exists()
    assert not (model / "license_plates.csv").exists()
    assert not (model / "LICENSES").exists()


def test_from_scratch_there_are_no_terms(tmp_path):
    model = Path(train(small_config(tmp_path, steps=2))["model"])
    names = {path.name for path in model.iterdir()}
    assert "README.md" in names
    assert not {name for name in names if "LICENSE" in name or "TERMS" in name or "NOTICE" in name}


# Weights.


def weights(shape, seed=1):
    return dict(build(shape, VOCAB, 32, 0, seed).named_parameters())


def scaled(shape):
    return shape.model_copy(update={"initialisation": "scaled"})


RESIDUAL = {"llama": ("o_proj", "down_proj"), "gpt_neox": ("attention.dense", "dense_4h_to_h")}
WIDE_NEOX = NEOX.model_copy(update={"hidden_size": 96, "intermediate_size": 256})


@pytest.mark.parametrize("shape", [WIDE, WIDE_NEOX], ids=["llama", "gpt_neox"])
def test_scaled_matrices_have_the_deviation_of_their_fan_in(shape):
    residual = RESIDUAL[shape.architecture]
    seen = 0
    for name, weight in weights(scaled(shape)).items():
        if weight.dim() < 2 or "embed" in name or "lm_head" in name:
            continue
        _, fan_in = weight.shape
        expected = 1 / math.sqrt(fan_in)
        if any(part in name for part in residual):
            expected /= math.sqrt(2 * shape.num_layers)
            seen += 1
        # The deviation of n draws is off by 1 in √(2n): four of these.
        assert weight.std().item() == pytest.approx(expected, rel=4 / math.sqrt(2 * weight.numel())), name
        assert abs(weight.mean().item()) < 5 * expected / math.sqrt(weight.numel()), name
    assert seen == 2 * shape.num_layers


def test_a_scaled_embedding_is_wide_unless_it_is_the_head():
    untied = weights(scaled(WIDE))["model.embed_tokens.weight"]
    assert untied.std().item() == pytest.approx(0.5, rel=0.02)
    tied = WIDE.model_copy(update={"tied_embeddings": True})
    name = "model.embed_tokens.weight"
    assert torch.equal(weights(scaled(tied))[name], weights(tied)[name])


@pytest.mark.parametrize(("shape", "head"), [(WIDE, "lm_head"), (WIDE_NEOX, "embed_out")], ids=["llama", "gpt_neox"])
def test_scaling_leaves_the_head_and_vectors_alone(shape, head):
    normal, other = weights(shape), weights(scaled(shape))
    (name,) = [name for name in normal if name.startswith((head, "lm_head"))]
    assert torch.equal(other[name], normal[name])
    assert all(torch.equal(other[name], weight) for name, weight in normal.items() if weight.dim() < 2)
    changed = [name for name, weight in normal.items() if not torch.equal(other[name], weight)]
    assert len(changed) == sum(weight.dim() > 1 for weight in normal.values()) - 1


def test_scaled_weights_are_a_function_of_the_seed_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = weights(scaled(WIDE), seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = weights(scaled(WIDE), seed=3), weights(scaled(WIDE), seed=4)
    assert all(torch.equal(again[name], weight) for name, weight in one.items())
    assert not any(torch.equal(other[name], weight) for name, weight in one.items() if weight.dim() > 1)


def test_the_initialisation_is_in_the_key(tmp_path):
    config = small_config(tmp_path)
    assert plan(config).final.key != plan(config.model_copy(update={"shape": scaled(SHAPE)})).final.key


# A part of the phases.


def test_the_first_phases_are_trained_alone_and_make_no_link(tmp_path):
    config = small_config(tmp_path, steps=2)
    write_shards(tmp_path / "more", token_ids(8 * 32 * 2 + 1, seed=3))
    more = Phase(shards=str(tmp_path / "more"), sequence_length=32, batch_tokens=256, learning_rate=5e-3)
    config = config.model_copy(update={"phases": {**config.phases, "midtrain": more, "cpt": more}})
    laid_out = plan(config)

    def there():
        return [(phase.folder / "model").is_dir() for phase in laid_out.phases]

    done = train(config, num_phases=1)
    assert [(p["phase"], p["trained"]) for p in done["phases"]] == [("pretrain", True)]
    assert there() == [True, False, False]
    assert not laid_out.link.exists()
    assert not Path(f"{laid_out.link}.json").exists()

    done = train(config, num_phases=2)
    assert [(p["phase"], p["trained"]) for p in done["phases"]] == [("pretrain", False), ("midtrain", True)]
    assert there() == [True, True, False]
    assert not laid_out.link.exists()

    done = train(config, num_phases=3)
    assert [p["trained"] for p in done["phases"]] == [False, False, True]
    assert laid_out.link.resolve() == (laid_out.final.folder / "model").resolve()
    whole = config.model_copy(update={"output": str(tmp_path / "whole")})
    train(whole)
    assert trace(phase_folder(tmp_path / "whole", "cpt")) == trace(phase_folder(tmp_path / "out", "cpt"))


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="is no tokenizer"):
        read_tokenizer(tmp_path / "tokenizer.json", None)
    with pytest.raises(UserError, match=r"has none of </s> as end of text"):
        read_tokenizer(word_tokenizer(tmp_path / "tokenizer.json"), "</s>")
