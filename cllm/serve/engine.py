"""Continuous batching: many conversations, base and adapter alike, decoded together by one model.
Token ids, no text.

Every step: free what was cancelled, admit waiting requests within the KV-token budget, prefill a
bounded number of tokens, one decode forward over all rows, emit, drop what finished. Rows are
right-aligned in one cache (left padding, `position_ids` and a 2-D mask), so every Transformers
causal LM runs unmodified. Whether a row is base or adapter, and how much of it, is LoRA's gate of
that row.
"""

from __future__ import annotations

import inspect
import threading
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from cllm.messages import UserError, note, say
from cllm.model.device import device_of, free_bytes, out_of_memory
from cllm.model.lora import gates
from cllm.serve.cache import RowLayer, cache_bytes
from cllm.serve.sampling import Listener, Request, Sampling, sample

# what an admitted row is expected to grow by; a wrong guess costs one preemption
HEADROOM_TOKENS = 128
CPU_CACHE_BYTES = 2 * 2**30
FIRST_TOKEN_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
"""Upper ends of the histogram's buckets; one more is without end."""
# one per model: its gate and its mode are shared state
_owners: WeakKeyDictionary[nn.Module, threading.Lock] = WeakKeyDictionary()


@dataclass(slots=True, eq=False)
class _Batch:
    """Rows that are computed together, and their cache; of a prefill, `filled` of the padded
    columns are in it.
    """

    rows: list[Request]
    cache: Cache
    filled: int = 0

    @property
    def window(self) -> int:
        return max((len(row.ids) for row in self.rows), default=0)


class Engine:
    """`model` is a Transformers causal LM, its adapters injected; a request's `adapter` is the
    number of one (0 or False: the base, 1 or True: the first). `kv_tokens` bounds rows times padded
    length.

    By default the budget is half of the free GPU memory (on the CPU 2 GiB) over the bytes of one
    token's keys and values. `submit` starts the engine's thread; `generate` works without it, in
    the calling thread. Both may be used at once, of several engines too: every step holds the
    model's one lock. Gradients are off, `autocast` is on; the gate and the training mode are put
    back after every step.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        stop_ids: frozenset[int] = frozenset(),
        pad_id: int = 0,
        kv_tokens: int | None = None,
        prefill_tokens: int | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model = model
        self.stop_ids = stop_ids
        self.pad_id = pad_id
        self.autocast = autocast
        self.device = device_of(model)
        self.gates = gates(model)
        config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        self.positions = getattr(config, "max_position_embeddings", None) or 2**31
        self.stateful = bool(getattr(model, "_is_stateful", False))
        if self.stateful:
            note("serve.stateful", architecture=type(model).__name__)
        token_bytes, row_bytes = cache_bytes(
            config, next(p.dtype for p in model.parameters() if p.is_floating_point())
        )
        self.row_tokens = -(-row_bytes // token_bytes)
        on_gpu = self.device.type == "cuda"
        cache_limit = free_bytes(self.device) // 2 if on_gpu else CPU_CACHE_BYTES
        self.kv_tokens = kv_tokens or cache_limit // token_bytes
        self.prefill_tokens = prefill_tokens or (2048 if on_gpu else 256)
        self.healthy = True
        self.steps = 0
        self.requests = 0
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.first_tokens = [0] * (len(FIRST_TOKEN_SECONDS) + 1)
        self.first_seconds = 0.0
        self._closed = False
        self.waiting: deque[Request] = deque()
        self.prefill: _Batch | None = None
        self.batch = self._new_batch([])
        self._owner = _owners.setdefault(model, threading.Lock())
        self._work = threading.Condition()
        # Transformers 5.24 renamed the argument.
        self.cache_argument = (
            "cache"
            if "cache" in inspect.signature(type(model).forward).parameters
            else "past_key_values"
        )
        self._thread: threading.Thread | None = None

    @property
    def max_tokens(self) -> int:
        """The longest prompt and answer together: the model's positions or the whole budget."""
        return min(self.positions, self.kv_tokens - self.row_tokens)

    def submit(
        self,
        prompt: list[int],
        sampling: Sampling,
        adapter: int = 1,
        listener: Listener | None = None,
    ) -> Request:
        """Queue one request; returns at once. Raises UserError for an empty prompt or one that is
        too long.
        """
        row = self._row(prompt, sampling, adapter, listener)
        with self._work:
            if self._closed:
                row.finish("cancelled")
                return row
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="cllm-engine", daemon=True)
                self._thread.start()
            self.waiting.append(row)
            self._work.notify()
        return row

    def generate(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling | Sequence[Sampling],
        adapter: int | Sequence[int] = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[int]]:
        """Answers to all prompts in their order; longest prompts first, so that rows of like length
        share a forward. `sampling` and `adapter` are of all prompts or of each.

        A given seed becomes seed + index. `progress(done, total)` is called whenever an answer is
        complete. Raises UserError for a prompt that does not fit, before anything is computed, and
        RuntimeError if the model fails.
        """
        numbers = [adapter] * len(prompts) if isinstance(adapter, int) else adapter
        plans = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
        rows = []
        for i, (prompt, plan, number) in enumerate(zip(prompts, plans, numbers, strict=True)):
            seed = None if plan.seed is None else plan.seed + i
            rows.append(self._row(prompt, replace(plan, seed=seed), number))
        self.waiting.extend(sorted(rows, key=lambda row: -len(row.ids)))
        done = 0
        try:
            while done < len(rows):
                self.step()
                if failed := next((row.error for row in rows if row.error), None):
                    raise RuntimeError(failed)
                finished = sum(bool(row.finish_reason) for row in rows)
                if progress is not None and finished > done:
                    progress(finished, len(rows))
                done = finished
        finally:
            for row in rows:
                row.cancel()
            with self._owner:
                self._sweep()
        return [row.ids[row.prompt_tokens :] for row in rows]

    def stats(self) -> dict[str, int | bool]:
        """What /health and the monitor show."""
        rows = len(self.batch.rows)
        return {
            "healthy": self.healthy,
            "running": rows + (len(self.prefill.rows) if self.prefill else 0),
            "waiting": len(self.waiting),
            "steps": self.steps,
            "generated_tokens": self.generated_tokens,
            "kv_tokens": self.kv_tokens,
            "kv_tokens_used": self._cost(rows, self.batch.window),
        }

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step is taken meanwhile, so that adapters may come; requests wait."""
        with self._owner:
            yield
            self.gates = gates(self.model)

    def close(self) -> None:
        """End the thread; what still runs is cancelled."""
        with self._work:
            self._closed = True
            self._work.notify()
        if self._thread is not None:
            self._thread.join()
        for row in [*self._take_all(), *self.waiting]:
            row.finish("cancelled")
        self.waiting.clear()

    def step(self) -> None:
        """One turn of the loop. A failure ends the running requests; out-of-memory halves the
        budget and retries.
        """
        with self._owner, torch.no_grad(), self.autocast():
            training = self.model.training
            if training:
                self.model.eval()
            try:
                self._sweep()
                self._admit()
                if self.prefill:
                    self._prefill_slice(self.prefill)
                if self.batch.rows:
                    self._decode(self.batch)
                self.healthy = True
            except Exception as error:
                self._recover(error)
            finally:
                if training:
                    self.model.train()
                for number, gate in self.gates.items():
                    gate.rows = None if number == 1 else 0.0
            self.steps += 1

    def _loop(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(
                    lambda: self._closed or self.waiting or self.prefill or self.batch.rows
                )
                if self._closed:
                    return
            self.step()
            time.sleep(0)  # let a waiting `generate` or `submit` have its turn

    def _row(
        self, prompt: list[int], sampling: Sampling, adapter: int, listener: Listener | None = None
    ) -> Request:
        if not prompt:
            raise UserError("serve.empty")
        if len(prompt) >= self.max_tokens:
            raise UserError("serve.context", tokens=len(prompt), limit=self.max_tokens)
        self.requests += 1
        self.prompt_tokens += len(prompt)
        longest = min(sampling.max_new_tokens, self.max_tokens - len(prompt))
        return Request(prompt, replace(sampling, max_new_tokens=longest), adapter, listener)

    def _new_batch(self, rows: list[Request]) -> _Batch:
        # Recurrent layers have cache types that cannot be padded or joined: such models run one
        # request at a time.
        if self.stateful:
            return _Batch(rows, DynamicCache(config=self.model.config))
        return _Batch(rows, Cache(layer_class_to_replicate=RowLayer))

    def _take_all(self) -> list[Request]:
        """Empty the engine; returns what was prefilling or decoding."""
        rows = self.batch.rows + (self.prefill.rows if self.prefill else [])
        self.prefill, self.batch = None, self._new_batch([])
        return rows

    def _sweep(self) -> None:
        """Free the rows whose requests were cancelled."""
        # a copy: `submit` appends meanwhile
        for row in [row for row in list(self.waiting) if row.cancelled]:
            self.waiting.remove(row)
            row.finish("cancelled")
        for row in [row for row in self.batch.rows if row.cancelled]:
            self._drop(row, "cancelled")
        if self.prefill and all(row.cancelled for row in self.prefill.rows):
            for row in self.prefill.rows:
                row.finish("cancelled")
            self.prefill = None

    def _cost(self, rows: int, window: int) -> int:
        return rows * (window + self.row_tokens)

    def _admit(self) -> None:
        """Form the next group to prefill: within the budget, and small enough for one slice unless
        it is one row; a stateful model has one row at a time.
        """
        if self.prefill:
            return
        rows, group = self.batch.rows[:], list[Request]()
        while self.waiting:
            rows.append(self.waiting[0])
            window = max(len(row.ids) + min(row.remaining, HEADROOM_TOKENS) for row in rows)
            longest = max(len(row.ids) for row in [*group, rows[-1]])
            over_budget = len(rows) > 1 and (
                self.stateful or self._cost(len(rows), window) > self.kv_tokens
            )
            if over_budget or (group and (len(group) + 1) * longest > self.prefill_tokens):
                break
            group.append(self.waiting.popleft())
        if group:
            self.prefill = self._new_batch(group)

    def _forward(self, batch: _Batch, stop: int) -> Tensor:
        """Compute the padded columns [filled, stop) of the batch; returns the logits (B, V) float32
        after the last.
        """
        window, columns, ids = batch.window, torch.arange(stop, device=self.device), []
        pads = [window - len(row.ids) for row in batch.rows]
        for row, pad in zip(batch.rows, pads, strict=True):
            part = row.ids[max(0, batch.filled - pad) : max(0, stop - pad)]
            ids.append([self.pad_id] * (stop - batch.filled - len(part)) + part)
        pad_columns = torch.tensor(pads, device=self.device)[:, None]
        for number, gate in self.gates.items():
            strengths = [row.sampling.strength * (row.adapter == number) for row in batch.rows]
            gate.set(strengths, self.device)
        output = self.model(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=(columns >= pad_columns).long(),
            position_ids=(columns[batch.filled :] - pad_columns).clamp(min=0),
            use_cache=True,
            # By index, which copies: of a slice, PyTorch multiplies each row with a copy of the
            # head of its own (fp32: 7 times as slow).
            logits_to_keep=torch.tensor([-1], device=self.device),
            **{self.cache_argument: batch.cache},
        )
        batch.filled = stop
        logits: Tensor = output.logits[:, -1].float()
        return logits

    def _prefill_slice(self, batch: _Batch) -> None:
        """Compute the next columns of the group's prompts; after the last, join the decoding rows
        and emit.
        """
        logits = self._forward(
            batch, min(batch.window, batch.filled + max(1, self.prefill_tokens // len(batch.rows)))
        )
        if batch.filled < batch.window:
            return
        self.prefill = None
        if self.batch.rows:
            for layer, theirs in zip(self.batch.cache.layers, batch.cache.layers, strict=True):
                for i, row in enumerate(batch.rows):
                    if layer.is_initialized:
                        layer.join(theirs, i, len(row.ids))
            self.batch.rows += batch.rows
        else:
            self.batch = batch
        self._emit(batch.rows, logits)

    def _decode(self, batch: _Batch) -> None:
        while len(batch.rows) > 1 and self._cost(len(batch.rows), batch.window) > self.kv_tokens:
            youngest = min(batch.rows, key=lambda row: len(row.ids) - row.prompt_tokens)
            # preempted: first in line again, it will be prefilled with what it has generated
            self._drop(youngest)
            self.waiting.appendleft(youngest)
        batch.filled = batch.window - 1
        for layer in batch.cache.layers:
            if isinstance(layer, RowLayer):
                # the longest row may have left
                layer.start = max(layer.start, layer.end - batch.filled)
        self._emit(batch.rows, self._forward(batch, batch.window))

    def _emit(self, rows: list[Request], logits: Tensor) -> None:
        # a copy: rows that end leave the batch's own list
        for row, token in zip(rows[:], sample(logits, rows), strict=True):
            if token < 0:
                detail = row.grammar and row.grammar.error
                failed = say("serve.grammar_failed", detail=detail) if detail else ""
                self._drop(row, "error", failed or say("serve.not_finite"))
            elif token in (
                self.stop_ids if row.sampling.stop_ids is None else row.sampling.stop_ids
            ):
                self._drop(row, "stop")
            else:
                row.ids.append(token)
                if len(row.ids) == row.prompt_tokens + 1:
                    seconds = time.perf_counter() - row.created
                    self.first_tokens[bisect_left(FIRST_TOKEN_SECONDS, seconds)] += 1
                    self.first_seconds += seconds
                row.put(token)
                self.generated_tokens += 1
                if row.remaining <= 0:
                    self._drop(row, "length")

    def _drop(self, row: Request, reason: str = "", error: str = "") -> None:
        """Take a row out of the decoding batch, and end its request if there is a reason."""
        rows = self.batch.rows
        index = rows.index(row)
        rows[index] = rows[-1]
        rows.pop()
        if not rows:
            self.batch = self._new_batch([])
        else:  # not a stateful model, then
            for layer in self.batch.cache.layers:
                if layer.is_initialized:
                    layer.drop(index)
        if reason:
            row.finish(reason, error)

    def _recover(self, error: Exception) -> None:
        rows = self._take_all()
        if not out_of_memory(error):
            self.healthy = False
            detail = f"{type(error).__name__}: {error}"
            note("serve.failed", detail=detail)
            for row in rows:
                row.finish("error", say("serve.failed", detail=detail))
            return
        torch.cuda.empty_cache()  # does nothing without a GPU
        self.kv_tokens = max(1, self.kv_tokens // 2)
        note("serve.memory", tokens=self.kv_tokens)
        for row in reversed(rows):
            if self._cost(1, len(row.ids) + 1) > self.kv_tokens:
                row.finish("error", say("serve.too_long_for_memory", tokens=len(row.ids)))
            else:
                self.waiting.appendleft(row)
