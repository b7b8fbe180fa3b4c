"""A checkpoint in this process, by Hugging Face transformers, on CPU or one GPU.

**Shared beginnings once.** The formats of a question differ at their ends. Neighbouring rows are put into groups by
how many tokens that saves; the beginning of each group goes through the model once, its keys and values are handed
to all rows, and these only compute their ends. **No more logits than needed**: rows end at the last column, so that
the model's head sees the positions that are scored and no others (one for letters), which for small models is most
of the work. **Batches** hold rows of like length up to a number of tokens and are a function of the asks alone: the
same asks give the same bits, wherever a run was cut off.

Layout of a row: [beginning | padding | padding | end], with positions given, so padding changes no number. Models with
sliding windows count columns, not positions: their rows are computed whole, padded on the left.
"""

import inspect
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from curation.errors import UserError
from evaluation.backends import Ask, Batch, Generate

_TOKENS = {"cpu": 8_192, "cuda": 32_768}  # in a batch: keys and values of so many are held
_LOGITS = 1 << 26  # numbers in a batch: 256 MiB in float32


@dataclass(frozen=True)
class _Row:
    """Tokens that go through the model, and where the answer is read."""

    index: int
    """Of the ask."""
    number: int
    """Of the continuation; 0 when all are read from one position."""
    tokens: tuple[int, ...]
    targets: tuple[tuple[int, ...], ...]
    """[kept positions, targets]: the ids whose log p counts, at the row's last positions."""


@dataclass(frozen=True)
class _Group:
    """Rows with `shared` tokens in common, which leaves each at least the positions that are scored."""

    rows: tuple[_Row, ...]
    shared: int

    @property
    def rest(self) -> int:
        return max(len(row.tokens) for row in self.rows) - self.shared


class Transformers:
    """Raises UserError when there is no causal language model at `checkpoint`."""

    name = "transformers"

    def __init__(self, checkpoint: str, tokenizer: Any, *, dtype: str | None = None, device: str | None = None):
        import torch
        import transformers

        self._torch, self.tokenizer = torch, tokenizer
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        kind = dtype or ("auto" if self.device == "cuda" else "float32")
        transformers.logging.disable_progress_bar()  # ours are enough
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=kind)
        # Whatever is wrong with a checkpoint, transformers has an exception for it, of many classes.
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{checkpoint} could not be loaded as a causal language model: {reason}") from None
        finally:
            transformers.logging.enable_progress_bar()
        self.model = model.to(self.device).eval()
        config = self.model.config.get_text_config()
        self.max_length = int(getattr(config, "max_position_embeddings", None) or 1_000_000)
        self._vocab = int(config.vocab_size)
        self._window = int(getattr(config, "sliding_window", None) or self.max_length + 1)
        self._keeps = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._shares = True
        self._budget = _TOKENS.get(self.device.split(":")[0], _TOKENS["cpu"])
        self._pad = self.tokenizer.pad_token_id or 0

    def facts(self) -> dict[str, str]:
        import transformers

        return {
            "backend": self.name,
            "device": self.device if self.device == "cpu" else self._torch.cuda.get_device_name(self.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "torch": self._torch.__version__,
            "transformers": transformers.__version__,
        }

    def score(self, asks: Sequence[Ask], done: Collection[int] = ()) -> Iterator[Batch]:
        """Batches of rows of like length, the longest first: what does not fit into memory shows at once.

        Batches are made of all asks, and run when they hold one that is not done."""
        left = {index: _num_rows(ask) for index, ask in enumerate(asks) if index not in done}
        found: dict[int, list[tuple[int, tuple[float, ...]]]] = {}
        for groups in self._batches(asks):
            if not any(row.index in left for group in groups for row in group.rows):
                continue
            answered = []
            for row, values in self._run(groups):
                if row.index in left:
                    found.setdefault(row.index, []).append((row.number, values))
                    left[row.index] -= 1
                    if not left[row.index]:
                        answered.append(row.index)
            # An ask whose continuations fell into two batches is answered with the later one.
            parts = [sorted(found.pop(index)) for index in answered]
            if answered:
                yield Batch(tuple(answered), tuple(tuple(x for _, values in part for x in values) for part in parts))

    def generate(self, asks: Sequence[Generate], done: Collection[int] = ()) -> Iterator[Batch]:
        from transformers import GenerationConfig

        torch = self._torch
        order = sorted(range(len(asks)), key=lambda index: (-asks[index].num_tokens, index))
        while order:
            width = asks[order[0]].num_tokens
            indices, order = order[: max(1, self._budget // width)], order[max(1, self._budget // width) :]
            if all(index in done for index in indices):
                continue
            longest = max(len(asks[index].context) for index in indices)
            ids = torch.full((len(indices), longest), self._pad)
            mask = torch.zeros_like(ids)
            for at, index in enumerate(indices):
                context = asks[index].context
                ids[at, longest - len(context) :] = torch.tensor(context)
                mask[at, longest - len(context) :] = 1
            config = GenerationConfig(
                max_new_tokens=asks[indices[0]].max_tokens, do_sample=False, pad_token_id=self._pad,
                eos_token_id=self.model.generation_config.eos_token_id or self.tokenizer.eos_token_id,
            )  # fmt: skip
            with torch.inference_mode():
                out = self.model.generate(
                    input_ids=ids.to(self.device), attention_mask=mask.to(self.device), generation_config=config
                )
            texts = self.tokenizer.batch_decode(out[:, longest:], skip_special_tokens=True)
            yield Batch(tuple(indices), tuple(texts))

    # Grouping.

    def _batches(self, asks: Sequence[Ask]) -> list[list[_Group]]:
        groups = _groups([row for index, ask in enumerate(asks) for row in _rows(index, ask)], self._budget)
        order = sorted(range(len(groups)), key=lambda at: (-groups[at].shared, -groups[at].rest, at))
        batches: list[list[_Group]] = []
        rows = shared = rest = kept = 0
        for group in (groups[at] for at in order):
            rows, shared, rest = rows + len(group.rows), max(shared, group.shared), max(rest, group.rest)
            kept = max(kept, *(len(row.targets) for row in group.rows))
            if not batches or rows * (shared + rest) > self._budget or rows * kept * self._vocab > _LOGITS:
                batches.append([])
                rows, shared, rest = len(group.rows), group.shared, group.rest
                kept = max(len(row.targets) for row in group.rows)
            batches[-1].append(group)
        return batches

    # Computing.

    def _run(self, groups: list[_Group]) -> list[tuple[_Row, tuple[float, ...]]]:
        """Splits a batch that does not fit into the GPU's memory."""
        try:
            return self._forward(groups)
        except self._torch.OutOfMemoryError:
            halves = _halves(groups)
            if halves is None:
                raise UserError(
                    f"one prompt of {len(groups[0].rows[0].tokens)} tokens does not fit into the memory of "
                    f"{self.device}: use a GPU with more, or --backend vllm"
                ) from None
        self._torch.cuda.empty_cache()
        return self._run(halves[0]) + self._run(halves[1])

    def _forward(self, groups: list[_Group]) -> list[tuple[_Row, tuple[float, ...]]]:
        torch, rows = self._torch, [row for group in groups for row in group.rows]
        longest = max(group.shared + group.rest for group in groups)
        past, mask, starts = None, torch.zeros((len(rows), 0), dtype=torch.long), [0] * len(rows)
        if self._shares and longest < self._window and (width := max(group.shared for group in groups)):
            past = self._beginnings(groups, width)
        if past is not None:
            group_of = [at for at, group in enumerate(groups) for _ in group.rows]
            past.batch_select_indices(torch.tensor(group_of, device=self.device))
            starts = [groups[at].shared for at in group_of]
            mask = (torch.arange(width) < torch.tensor(starts)[:, None]).long()
        ends = [row.tokens[start:] for row, start in zip(rows, starts, strict=True)]
        columns = max(map(len, ends))
        ids = torch.full((len(rows), columns), self._pad)
        positions, present = torch.zeros_like(ids), torch.zeros_like(ids)
        for at, (end, start) in enumerate(zip(ends, starts, strict=True)):
            ids[at, columns - len(end) :] = torch.tensor(end)
            positions[at, columns - len(end) :] = torch.arange(start, start + len(end))
            present[at, columns - len(end) :] = 1
        kept = max(len(row.targets) for row in rows)
        with torch.inference_mode():
            logits = self._logits(ids, torch.cat([mask, present], 1), positions, kept, past)
            return self._read(rows, logits, kept)

    def _beginnings(self, groups: list[_Group], width: int) -> Any:
        """The keys and values of [groups, width] beginnings; None for models that keep something else."""
        from transformers import DynamicCache

        torch = self._torch
        ids, mask = torch.full((len(groups), width), self._pad), torch.zeros((len(groups), width), dtype=torch.long)
        for at, group in enumerate(groups):
            ids[at, : group.shared] = torch.tensor(group.rows[0].tokens[: group.shared])
            mask[at, : group.shared] = 1
        positions = torch.arange(width).expand(len(groups), -1)
        with torch.inference_mode():
            past = self._model(ids, mask, positions, 1, None, fills=True).cache
        # Recurrent states stand for the padding as well.
        self._shares = isinstance(past, DynamicCache)
        return past if self._shares else None

    def _model(self, ids: Any, mask: Any, positions: Any, kept: int, past: Any, fills: bool = False) -> Any:
        keep = {"logits_to_keep": kept} if self._keeps else {}
        return self.model(
            input_ids=ids.to(self.device), attention_mask=mask.to(self.device), position_ids=positions.to(self.device),
            cache=past, use_cache=fills or past is not None, **keep,
        )  # fmt: skip

    def _logits(self, ids: Any, mask: Any, positions: Any, kept: int, past: Any) -> Any:
        """float32[rows, kept, vocabulary]"""
        return self._model(ids, mask, positions, kept, past).logits[:, -kept:].float()

    def _read(self, rows: list[_Row], logits: Any, kept: int) -> list[tuple[_Row, tuple[float, ...]]]:
        """Σ over a row's positions of log p, for each of its columns of targets."""
        torch = self._torch
        many = max(len(targets) for row in rows for targets in row.targets)
        targets = torch.zeros((len(rows), kept, many), dtype=torch.long)
        counts = torch.zeros((len(rows), kept, many))
        for at, row in enumerate(rows):
            part = torch.tensor(row.targets)
            targets[at, kept - len(row.targets) :, : part.shape[1]] = part
            counts[at, kept - len(row.targets) :, : part.shape[1]] = 1
        log_p = logits.gather(2, targets.to(self.device)) - logits.logsumexp(2, keepdim=True)
        sums = (log_p.cpu().double() * counts).sum(1).tolist()
        return [(row, tuple(values[: len(row.targets[0])])) for row, values in zip(rows, sums, strict=True)]


def _num_rows(ask: Ask) -> int:
    return 1 if ask.single else len(ask.continuations)


def _rows(index: int, ask: Ask) -> list[_Row]:
    if ask.single:
        return [_Row(index, 0, ask.context, (tuple(continuation[0] for continuation in ask.continuations),))]
    return [
        _Row(index, number, ask.context + tokens[:-1], tuple((token,) for token in tokens))
        for number, tokens in enumerate(ask.continuations)
    ]


def _groups(rows: list[_Row], budget: int) -> list[_Group]:
    """Neighbours with a beginning in common, joined while that saves tokens.

    n rows of t tokens in all with p in common cost t − (n − 1) p: one more, with p' in common, joins when
    n p' > (n − 1) p."""
    groups: list[_Group] = []
    members: list[_Row] = []
    shared = 0
    for row in rows:
        if members:
            common = min(_common(members[0].tokens, row.tokens), shared, _most(row))
            widest = max(len(member.tokens) for member in [*members, row])
            if common * len(members) > shared * (len(members) - 1) and (len(members) + 1) * widest <= budget:
                members.append(row)
                shared = common
                continue
            groups.append(_Group(tuple(members), shared if len(members) > 1 else 0))
        members, shared = [row], _most(row)
    if members:
        groups.append(_Group(tuple(members), shared if len(members) > 1 else 0))
    return groups


def _most(row: _Row) -> int:
    """How much of a row may be computed before it: not the positions that are scored."""
    return len(row.tokens) - len(row.targets)


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    for at, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return at
    return min(len(a), len(b))


def _halves(groups: list[_Group]) -> tuple[list[_Group], list[_Group]] | None:
    if len(groups) > 1:
        return groups[: len(groups) // 2], groups[len(groups) // 2 :]
    rows, shared = groups[0].rows, groups[0].shared
    if len(rows) == 1:
        return None
    return [_Group(rows[: len(rows) // 2], shared)], [_Group(rows[len(rows) // 2 :], shared)]
