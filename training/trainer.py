"""The lightweight trainer: one CPU, one GPU, or torchrun with DDP or FSDP2.

Exact resume: the windows that a step reads are a function of the step alone (shards.spread), whatever the
number of processes; a checkpoint holds float32 weights, both Adam
moments and the position. On one CPU the same command after a kill gives the same bits.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation import storage
from curation.errors import RunLocked, TilthError, UserError
from curation.manifest import RunFolder, WriterLock
from curation.rng import key64
from training import checkpoint
from training.config import Train, learning_rate
from training.model import build, flops_per_token, load, num_parameters, peak_flops
from training.plan import PhasePlan, Plan, plan
from training.shards import TokenStream, spread

MICRO_TOKENS = {"cuda": 16_384, "cpu": 8_192}  # of a forward pass, unless the configuration says
LOG_STEPS = {"cuda": 10, "cpu": 1}  # a loss is fetched from a GPU only now and then: fetching waits for it
STATE_BYTES = 16  # a parameter, its gradient and two moments, float32

Step = dict[str, Any]
OnStep = Callable[[str, int, int, Step], None]


@dataclass(frozen=True)
class World:
    """The processes of this training, as torchrun's environment has them."""

    rank: int
    size: int
    local_rank: int

    @staticmethod
    def from_environment() -> "World":
        get = os.environ.get
        return World(int(get("RANK", "0")), int(get("WORLD_SIZE", "1")), int(get("LOCAL_RANK", "0")))


def train(
    config: Train, on_step: OnStep | None = None, on_line: Callable[[str], None] | None = None,
    num_phases: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train all phases of `config` that are not trained yet, or the first `num_phases`; returns a summary (phases,
    model, link).

    Raises UserError for what is wrong before step 1 (see plan.plan), RunLocked when another process
    trains the same phase, TilthError when the loss is no number or a write fails."""
    import torch

    laid_out = plan(config)
    world = World.from_environment()
    say = on_line or (lambda _: None)
    with _processes(world):
        device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        job = _Job(laid_out, world, device, say, on_step or (lambda *_: None))
        wanted = laid_out.phases[:num_phases]
        done = [job.phase(phase) for phase in wanted]
        if world.rank == 0 and len(wanted) == len(laid_out.phases):
            link(laid_out)
        return {
            "arm": config.arm, "seed": config.seed, "model": str(laid_out.link), "phases": done,
            "seconds": round(sum(d["seconds"] for d in done), 3),
        }  # fmt: skip


class _Job:
    """A model and its optimizer, moved through the phases of a plan. Both are made when first needed."""

    def __init__(self, laid_out: Plan, world: World, device: Any, say: Callable[[str], None], on_step: OnStep):
        self.plan, self.world, self.device, self.say, self.on_step = laid_out, world, device, say, on_step
        self.model: Any = None

    def phase(self, phase: PhasePlan) -> dict[str, Any]:
        """Train one phase, or read what it gave when it is trained already."""
        if (found := _finished(phase)) is not None:
            self.say(f"{phase.name}: trained already ({phase.folder})")
            return {**found, "trained": False}
        import torch

        lock = WriterLock(RunFolder(str(phase.folder))) if self.world.rank == 0 else contextlib.nullcontext()
        try:
            with lock:
                return {**self._train(phase), "trained": True}
        except torch.OutOfMemoryError as error:
            raise TilthError(
                f"phase {phase.name} does not fit the GPU's memory ({str(error).splitlines()[0]}): set a smaller "
                "micro_batch, activation_checkpointing, or sharding: fsdp with more processes"
            ) from None
        except RunLocked:
            raise RunLocked(f"phase {phase.name} in {phase.folder} is being trained by another process: wait") from None

    def _train(self, phase: PhasePlan) -> dict[str, Any]:
        import torch

        started = time.monotonic()
        local = self._local_windows(phase)
        micro = self.plan.config.micro_batch or _micro_batch(local, phase.sequence_length, self.device.type)
        if local % micro:
            raise UserError(f"micro_batch {micro} does not divide the {local} windows of a process in {phase.name}")
        if self.model is None:
            self._make()
        step = self._restore(phase)
        stream = TokenStream.open(phase.shards)
        metrics = _Metrics(phase, step) if self.world.rank == 0 else None
        per_step = phase.windows * phase.sequence_length
        flops = flops_per_token(self.raw, phase.sequence_length) * per_step
        peak = peak_flops(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        pending: list[tuple[int, float, Any, Any]] = []
        mark, last = time.monotonic(), step

        def drain() -> None:
            """Fetch what the device has computed since the last time; refuse a loss that is no number."""
            nonlocal mark, last
            if not pending:
                return
            losses = torch.stack([loss for _, _, loss, _ in pending])
            if self.world.size > 1:
                torch.distributed.all_reduce(losses, torch.distributed.ReduceOp.SUM)
                losses /= self.world.size
            norms = torch.stack([norm for *_, norm in pending]).tolist()
            seconds = (time.monotonic() - mark) / (step - last)
            for (at, rate, _, _), loss, norm in zip(pending, losses.tolist(), norms, strict=True):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise TilthError(
                        f"the loss of phase {phase.name} is {loss} at step {at} (gradient norm {norm}): lower its "
                        "learning_rate, and the same command starts it anew; no checkpoint holds this step"
                    )
                row = {
                    "step": at, "tokens": at * per_step, "loss": loss, "learning_rate": rate, "gradient_norm": norm,
                    "tokens_per_second": per_step / seconds, "seconds": seconds,
                    "mfu": flops / seconds / (peak * self.world.size) if peak else None,
                }  # fmt: skip
                if metrics is not None:
                    metrics.write(row)
                    self.on_step(phase.name, at, phase.steps, row)
            pending.clear()
            mark, last = time.monotonic(), step

        while step < phase.steps:
            rate = learning_rate(phase.values, step, phase.steps)
            loss, norm = self._step(stream, phase, step, local, micro, rate)
            step += 1
            pending.append((step, rate, loss, norm))
            if step % LOG_STEPS[self.device.type] == 0 or step == phase.steps:
                drain()
            if step % self.plan.config.checkpoint_steps == 0 and step < phase.steps:
                drain()
                self._save(phase, step, metrics)
                mark = time.monotonic()
        weights = self._save(phase, step, metrics)
        if metrics is not None:
            metrics.close()
            checkpoint.export(self.plan, phase, self.raw, weights, self.dtype)
            _finish(phase, metrics.loss, time.monotonic() - started, num_parameters(self.raw))
        if self.world.size > 1:
            torch.distributed.barrier()
        finished = _finished(phase)
        assert finished is not None
        return finished

    def _local_windows(self, phase: PhasePlan) -> int:
        if phase.windows % self.world.size:
            raise UserError(
                f"phase {phase.name} has {phase.windows} windows a step, which {self.world.size} processes cannot "
                "share evenly: change batch_tokens or the number of processes"
            )
        return phase.windows // self.world.size

    def _make(self) -> None:
        """The model on its device, wrapped for this world, and its optimizer."""
        import torch

        config, shape = self.plan.config, self.plan.config.scratch_shape()
        if shape is not None:
            seed = key64("weights", config.seed) >> 1  # torch takes 63 bits
            tokenizer = self.plan.tokenizer
            raw = build(shape, tokenizer.vocab_size, self.plan.max_positions, tokenizer.eos_id, seed)
        else:
            raw = load(config.model)
        on_gpu = self.device.type == "cuda"
        self.dtype = (
            torch.bfloat16 if config.dtype == "bfloat16" or (config.dtype == "auto" and on_gpu) else torch.float32
        )
        if config.activation_checkpointing:
            raw.gradient_checkpointing_enable()
        raw.train()
        self.fsdp = config.sharding == "fsdp" or (
            config.sharding == "auto" and on_gpu and self.world.size > 1
            and num_parameters(raw) * STATE_BYTES > 0.6 * torch.cuda.get_device_properties(self.device).total_memory
        )  # fmt: skip
        if self.fsdp:
            _fully_shard(raw, self.dtype, self.world, self.device)
        else:
            raw.to(self.device)
        self.raw = raw
        model = raw
        if config.compile if config.compile is not None else on_gpu:
            torch.set_float32_matmul_precision("high")
            model = torch.compile(model)
        if self.world.size > 1 and not self.fsdp:
            model = torch.nn.parallel.DistributedDataParallel(
                model, device_ids=[self.world.local_rank] if on_gpu else None, gradient_as_bucket_view=True
            )
        self.model = model
        # Norms and biases are not pulled to zero: decay is for matrices.
        matrices = [p for p in raw.parameters() if p.dim() > 1]
        others = [p for p in raw.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=0.0, betas=config.betas, eps=config.eps, fused=not self.fsdp or on_gpu,
        )  # fmt: skip

    def _restore(self, phase: PhasePlan) -> int:
        """Go on from this phase's newest checkpoint, else from the end of the phase before. Returns the step."""
        own = checkpoint.steps(phase.folder)
        self.optimizer_steps = 0
        if own:
            state = checkpoint.restore(own[-1], phase.key, self.raw, self.optimizer)
            self.optimizer_steps = state.optimizer_steps
            self.say(f"{phase.name}: goes on after step {state.step:,} of {phase.steps:,}")
            return state.step
        if phase.parent is not None:
            before = next(p for p in self.plan.phases if p.key == phase.parent)
            ends = checkpoint.steps(before.folder)
            if not ends:
                raise TilthError(f"{before.folder} has no step checkpoint to go on from: delete it, and run this again")
            state = checkpoint.restore(ends[-1], before.key, self.raw, self.optimizer)
            self.optimizer_steps = state.optimizer_steps
        return 0

    def _step(
        self, stream: TokenStream, phase: PhasePlan, step: int, local: int, micro: int, rate: float
    ) -> tuple[Any, Any]:
        """One optimizer step: (this process's mean loss, gradient norm), both on the device."""
        import torch

        rows = range(self.world.rank * local, (self.world.rank + 1) * local)
        windows = stream.pick(spread(step, rows, phase.steps), phase.sequence_length)
        _check_batch(windows, self.plan, phase, step)
        windows = begin(windows, self.plan.tokenizer.bos_id)
        batch = torch.from_numpy(windows)
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # Dropout, where a checkpoint has any, by step and process: a resume needs no generator's state.
        torch.manual_seed(key64("dropout", self.plan.config.seed, phase.key, step, self.world.rank) >> 1)
        rounds = local // micro
        total = torch.zeros((), device=self.device)
        mixed = self.dtype != torch.float32 and not self.fsdp  # FSDP casts by its own policy
        for at in range(rounds):
            part = batch[at * micro : (at + 1) * micro]
            with self._sync_if(at == rounds - 1):
                with torch.autocast(self.device.type, self.dtype, enabled=mixed):
                    logits = self.model(input_ids=part[:, :-1], use_cache=False).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten()) / rounds
                loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.raw.parameters(), self.plan.config.clip_norm)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer_steps += 1
        return total, norm

    def _sync_if(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Gradients cross processes once a step, after the last micro-batch."""
        if self.fsdp:
            self.raw.set_requires_gradient_sync(last)
        elif self.world.size > 1 and not last:
            return self.model.no_sync()
        return contextlib.nullcontext()

    def _save(self, phase: PhasePlan, step: int, metrics: "_Metrics | None") -> dict[str, Any]:
        weights, moments = checkpoint.gather(self.raw, self.optimizer)
        if metrics is not None:
            metrics.sync()
            state = checkpoint.State(phase.key, step, self.optimizer_steps)
            checkpoint.save(phase, state, weights, moments)
            checkpoint.prune(phase.folder, 1 if step == phase.steps else self.plan.config.keep_checkpoints)
        return weights


class _Metrics:
    """PHASE/metrics.jsonl, a row for each step, and TensorBoard's files beside it where it is installed.
    Rows after the checkpoint that a training goes on from are dropped: their steps come again."""

    def __init__(self, phase: PhasePlan, step: int):
        path = phase.folder / "metrics.jsonl"
        kept: list[bytes] = []
        if path.exists():
            with contextlib.suppress(ValueError, KeyError):  # a kill may have cut the last line
                for line in path.read_bytes().splitlines():
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
        storage.commit_bytes(str(path), b"".join(line + b"\n" for line in kept))
        self._file = path.open("ab")
        self.loss = json.loads(kept[-1])["loss"] if kept else None
        self._board: Any = None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(phase.folder / "tensorboard"), purge_step=step + 1)

    def write(self, row: Step) -> None:
        self.loss = row["loss"]
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()  # people follow it
        if self._board is not None:
            for name in ("loss", "learning_rate", "gradient_norm", "tokens_per_second"):
                self._board.add_scalar(name, row[name], row["step"])

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def begin(windows: np.ndarray, bos_id: int | None) -> np.ndarray:
    """[n, length + 1] windows that begin with `bos_id`: their last token is the next window's first, none is lost."""
    if bos_id is None:
        return windows
    return np.hstack([np.full((len(windows), 1), bos_id, windows.dtype), windows[:, :-1]])


def _check_batch(windows: np.ndarray, laid_out: Plan, phase: PhasePlan, step: int) -> None:
    largest = int(windows.max())
    if largest >= laid_out.vocab_size:
        raise TilthError(
            f"{phase.shards} holds the token id {largest:,} in the batch of step {step + 1} and the model ends at "
            f"{laid_out.vocab_size - 1:,}: train with the tokenizer that the shards were made with"
        )


def _micro_batch(local: int, sequence_length: int, device: str) -> int:
    """The most windows of a forward pass that divide a process's share and stay within MICRO_TOKENS."""
    most = max(1, MICRO_TOKENS[device] // sequence_length)
    return next(n for n in range(min(most, local), 0, -1) if local % n == 0)


def _fully_shard(raw: Any, dtype: Any, world: World, device: Any) -> None:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if world.size == 1 and not torch.distributed.is_initialized():
        raise UserError("sharding: fsdp needs more than one process: start it with --processes N, or use auto")
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layers = next(module for module in raw.modules() if isinstance(module, torch.nn.ModuleList))
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(raw, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def _processes(world: World) -> Iterator[None]:
    """torch.distributed for more than one process, and its end."""
    import torch

    if world.size == 1:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _finish(phase: PhasePlan, loss: float | None, seconds: float, parameters: int) -> None:
    """Publish PHASE/phase.json, last of all: a phase without one is not trained."""
    files = {
        path.name: storage.file_sha256(str(path)).sha256
        for path in sorted((phase.folder / checkpoint.EXPORT).iterdir())
    }
    about = {
        "phase": phase.name, "key": phase.key, "parent": phase.parent, "data_hash": phase.data_hash,
        "shards": phase.shards, "steps": phase.steps, "tokens": phase.tokens, "parameters": parameters,
        "loss": loss, "seconds": round(seconds, 3), "files": files, "values": phase.values.model_dump(),
    }  # fmt: skip
    storage.commit_bytes(str(phase.folder / "phase.json"), json.dumps(about, indent=1).encode())


def _finished(phase: PhasePlan) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads((phase.folder / "phase.json").read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise TilthError(f"{phase.folder}/phase.json is damaged ({error}): delete it, and run this again") from None
    return found


def link(laid_out: Plan) -> None:
    """ARM/seed-N points to the last phase's model; ARM/seed-N.json says what it went through."""
    place = laid_out.link
    place.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(laid_out.final.folder / checkpoint.EXPORT, place.parent)
    temporary = place.with_name(f".{place.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target, target_is_directory=True)
    os.replace(temporary, place)
    about = {
        "run": laid_out.config.run, "arm": laid_out.config.arm, "seed": laid_out.config.seed, "model": target,
        "phases": [
            {"name": p.name, "key": p.key, "data_hash": p.data_hash, "tokens": p.tokens} for p in laid_out.phases
        ],
    }  # fmt: skip
    storage.commit_bytes(f"{place}.json", json.dumps(about, indent=1).encode())


def lay_out(config: Train) -> list[dict[str, Any]]:
    """What `train` would do, a row for each phase, for --dry-run."""
    return [
        {
            "phase": p.name, "tokens": p.tokens, "epochs": round(p.epochs, 2), "steps": p.steps,
            "batch_tokens": p.windows * p.sequence_length, "sequence_length": p.sequence_length,
            "learning_rate": p.values.learning_rate, "trained": _finished(p) is not None, "folder": str(p.folder),
        }
        for p in plan(config).phases
    ]  # fmt: skip
