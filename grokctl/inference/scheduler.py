"""Requests as they come, on one model: each gets a slot, turns at reading, and a token a turn."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final

import numpy as np

from grokctl.errors import GrokctlError
from grokctl.inference.active import Active, Ticket, is_read_soon
from grokctl.inference.chunks import Chunk, chunks, next_chunk, turn_budget
from grokctl.inference.compiled_steps import Head
from grokctl.inference.generation import (
    BatchStats,
    Ended,
    Failed,
    FinishReason,
    Generation,
    PromptLogits,
    PromptOutput,
    PromptRead,
    Request,
    RequestEvent,
    Stats,
)
from grokctl.inference.model_runner import ModelRunner
from grokctl.inference.plan import RunPlan
from grokctl.inference.sequence import Sequence
from grokctl.inference.slots import Place, Slot, Slots
from grokctl.inference.step_logits import Draw, not_finite

_LOOKED_AT: Final = 64
"""Waiting requests that are passed over in a turn, at most."""
_FEWEST: Final = 64
"""A chunk counts as at least so many tokens: a short one reads most of the experts, too."""


class Scheduler:
    """Runs requests on a model; any thread may submit and cancel, one thread takes the turns.

    A turn makes one token of every sequence whose prompt was read, and then runs chunks of the
    prompts in other slots, one after the other, within a budget of tokens: neither a long prompt
    nor a long answer holds the others up. A free slot keeps its tokens: a prompt that begins with
    them reads only the rest.

    Args:
        plan: The model, its context, and its tokenizer.
        runner: Runs the model, and has the slots.
        stats: Of loading, for the statistics of every request.
    """

    def __init__(self, plan: RunPlan, runner: ModelRunner, *, stats: Stats) -> None:
        self.totals = BatchStats(load_s=stats.load_s, kernel=stats.kernel)
        """Of all requests until now."""
        self._plan = plan
        self._runner = runner
        self._stats = stats
        self._open: set[Ticket] = set()
        """Requests whose last event is to come."""
        self._inbox: deque[Ticket] = deque()
        self._waiting: deque[Ticket] = deque()
        self._slots = Slots(runner.slots)
        self._reading: deque[Active] = deque()
        self._decoding: list[Active] = []
        self._has_cancelled = False
        self._turning: int | None = None
        self._arrived = threading.Event()

    # --- for any thread

    def check(self, request: Request) -> None:
        """Refuse a request that cannot run; see `submit`."""
        self._plan.check(request.prompt)
        request.check_vocabulary(self._plan.config.vocab_size)

    def submit(self, request: Request, deliver: Callable[[RequestEvent], object]) -> Ticket:
        """Queue a request.

        Args:
            request: What to continue, and how.
            deliver: Called with every event of the request, in order, by the thread that takes the
                turns; the last is `Ended` or `Failed`. An exception of it cancels the request.

        Raises:
            UsageError: The prompt is empty, longer than the context, or a token id is impossible.
        """
        self.check(request)
        ticket = Ticket(request, deliver)
        self._open.add(ticket)
        self._inbox.append(ticket)
        self._arrived.set()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request before its next token; without effect if it has ended."""
        ticket.is_cancelled = self._has_cancelled = True
        self._arrived.set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until there is something to do; whether there is."""
        return self._arrived.wait(timeout_s)

    # --- for the thread that takes the turns

    @property
    def has_work(self) -> bool:
        """Whether a request is queued or in a slot."""
        return bool(self._inbox or self._waiting or self._reading or self._decoding)

    @property
    def running(self) -> int:
        """Requests in slots."""
        return self._runner.slots - len(self._slots.free)

    def turn(self) -> None:
        """Make one token of every sequence whose prompt was read, and read on in other prompts.

        Raises:
            RuntimeError: Another thread takes a turn.
            KeyboardInterrupt: The requests in slots have ended as interrupted.
        """
        with self._own_turn():
            compiled, begun = self._runner.compile_s, self._runner.clock()
            self._admit()
            self._decode()
            decoded = self._runner.clock()
            self._admit()  # into the slots of those that ended
            self._read_on()
            ended = self._runner.clock()
            for active in self._decoding:
                if len(active.sequence.ids) > 1:  # it waited
                    active.decode_s += ended - decoded
            compiled = self._runner.compile_s - compiled
            self._count(seconds=ended - begun, compile_s=compiled)

    def end_cancelled(self) -> None:
        """End the requests that were cancelled, without a turn."""
        with self._own_turn():
            self._sort_out()

    @contextmanager
    def _own_turn(self) -> Iterator[None]:
        if self._turning not in {None, threading.get_ident()}:
            raise RuntimeError("another thread takes the turns of this scheduler")
        self._turning = threading.get_ident()
        try:
            self._arrived.clear()
            yield
        except BaseException:
            self._lose_all(FinishReason.INTERRUPTED)
            self._end_lost()
            raise
        finally:
            self._turning = None
            if self.has_work:
                self._arrived.set()

    # --- slots

    def _sort_out(self) -> None:
        """Look into the inbox, and end the requests that were cancelled."""
        has_cancelled, self._has_cancelled = self._has_cancelled, False  # before the inbox
        while self._inbox:
            ticket = self._inbox.popleft()
            if ticket.needs_slot:
                self._waiting.append(ticket)
            else:
                self._end_unread(ticket)
        if not has_cancelled:
            return
        for _ in range(len(self._waiting)):
            ticket = self._waiting.popleft()
            if ticket.is_cancelled:
                self._end_unread(ticket, FinishReason.INTERRUPTED)
            else:
                self._waiting.append(ticket)
        for active in [*self._reading, *self._decoding]:
            if active.ticket.is_cancelled:
                self._end(active, FinishReason.INTERRUPTED)

    def _admit(self) -> None:
        """Give waiting requests free slots, first come, first served, and compile their steps.

        A prompt waits while another request reads a beginning that both have.
        """
        self._sort_out()
        later: list[Ticket] = []
        while self._waiting and self._slots.free and len(later) < _LOOKED_AT:
            ticket = self._waiting.popleft()
            if is_read_soon(ticket, self._reading, lambda: [*self._slots.free, *self._busy()]):
                later.append(ticket)
                continue
            active = self._placed(ticket)
            if active is None:
                break
            try:
                self._compile(active)
            except GrokctlError as error:  # the cache is as it was: the others go on
                self._end(active, error)
                continue
            if not active.decodes:
                self._tell(ticket, PromptRead(done=active.read, cached=active.cached))
            self._go_on(active)
        self._waiting.extendleft(reversed(later))

    def _busy(self) -> list[Slot]:
        """The slots of requests under way, with what they have kept until now."""
        running = (*self._reading, *self._decoding)
        return [active.as_slot() for active in running if active.request.cache_prompt]

    def _placed(self, ticket: Ticket) -> Active | None:
        """A request in a slot, with the prefix that was kept; None if copying it has failed."""
        request = ticket.request
        place = self._slots.take(request, self._busy())
        active = Active(
            ticket=ticket,
            sequence=Sequence(
                request,
                eos_token=self._plan.config.eos_token,
                tokenizer=self._plan.tokenizer,
                context=self._plan.context,
            ),
            slot=place.slot,
            compiled=self._runner.compile_s,
        )
        self._reading.append(active)  # now it is found if this is interrupted
        if place.source is not None:
            copy = partial(self._runner.copy, place.source, place.slot.number)
            if self._computed(copy) is None:
                return None
        self._start_from(active, place)
        return active

    def _start_from(self, active: Active, place: Place) -> None:
        """Begin behind the tokens that the slot has."""
        common = place.common
        active.scores = place.scores
        if active.request.of_prompt is PromptOutput.SCORES:
            # a token's score comes from the token before, which runs again unless both are kept
            self._tell(active.ticket, *active.scores)
            common = active.scores[-1].end if active.scores else 0
            active.read = max(0, common - 1)
        else:
            active.read = min(common, len(active.request.prompt) - 1)  # its logits are wanted
        active.cached = active.read

    def _compile(self, active: Active) -> None:
        """Compile the steps of a prompt's chunks, and one of decoding."""
        past = self._runner.past
        end = active.read if active.decodes else active.to_read
        for chunk in chunks(active.read, end, longest=self._budget, past=past):
            self._runner.chunk_step(chunk, active.head_of(chunk))
        if active.steps > 0:
            self._runner.decode_step(1)

    def _go_on(self, active: Active) -> None:
        """Let a request read that can, or decode, or end."""
        if active.decodes:
            self._reading.remove(active)
            self._decoding.append(active)
        elif active.read == active.to_read:
            self._tell(active.ticket, *active.sequence.finish())
            self._end(active)

    # --- steps

    @property
    def _budget(self) -> int:
        """Tokens of prompts in a turn."""
        runner, waits = self._runner, bool(self._decoding)
        longest, is_streamed = runner.longest_chunk, runner.stream is not None
        return turn_budget(longest, runner.platform, is_decoding=waits, is_streamed=is_streamed)

    def _decode(self) -> None:
        """Make one token of every sequence whose prompt was read."""
        runner, due = self._runner, list(self._decoding)
        if not due:
            return
        begun, read, streamed = runner.clock(), runner.experts_nbytes(), runner.streamed()
        sequences = [active.sequence for active in due]
        drawn = self._computed(
            lambda: runner.decode(
                [active.slot.number for active in due],
                [sequence.last for sequence in sequences],
                [sequence.position for sequence in sequences],
            ).draw(sequences)
        )
        if drawn is None:
            return
        spent = runner.clock() - begun
        nbytes = runner.step_nbytes(runner.experts_nbytes() - read)
        more = asdict(runner.streamed() - streamed)
        self._count(decode_s=spent, steps=1, decoded=len(due), bytes_read=nbytes, **more)
        for active, draw in zip(due, drawn, strict=True):
            if active.sequence.ids:
                active.decode_s += spent
            else:  # it ran the last token of the prompt
                active.read, active.ran = active.read + 1, active.ran + 1
                active.read_s += spent
            self._take(active, draw)

    def _read_on(self) -> None:
        """Run chunks of prompts, the next one's first, as many as the budget allows.

        A prompt whose chunk is too long for the rest lets shorter ones pass, and is the next one in
        the next turn; one that was read goes to the end.
        """
        budget = left = self._budget
        for active in list(self._reading):
            chunk = next_chunk(active.read, active.to_read, longest=budget, past=self._runner.past)
            cost = max(_FEWEST, chunk.count)
            if left < min(cost, budget):
                continue
            left -= cost
            self._reading.remove(active)
            self._reading.append(active)
            begun = self._runner.clock()
            draws = self._computed(partial(self._run, active, chunk))
            if draws is None:
                return  # all have ended
            spent = self._runner.clock() - begun
            active.read_s += spent
            active.ran += chunk.count
            active.read = chunk.end
            self._count(prefill_s=spent, prefilled=chunk.count)
            self._tell(active.ticket, PromptRead(done=active.read, cached=active.cached))
            for draw in draws:
                self._take(active, draw)
            if active in self._reading:  # it has not ended
                self._go_on(active)

    def _run(self, active: Active, chunk: Chunk) -> list[Draw | GrokctlError]:
        """Run a chunk of a prompt; the first token, if that was the last chunk."""
        slot, prompt = active.slot.number, active.request.prompt
        match active.head_of(chunk):
            case Head.NONE:
                self._runner.read(slot, prompt, chunk)
            case Head.LAST:
                return self._runner.read_last(slot, prompt, chunk).draw([active.sequence])
            case Head.EVERY:
                logits = self._runner.read_every(slot, prompt, chunk)[active.read - chunk.start :]
                self._tell(active.ticket, PromptLogits(active.read, logits))
                return [] if np.isfinite(logits).all() else [not_finite()]
            case Head.SCORES:
                part = self._runner.score(slot, prompt, chunk)
                part = part.between(active.read + 1, part.end)
                if not np.isfinite(part.logprobs).all():
                    return [not_finite()]
                active.scores.append(part)
                self._tell(active.ticket, part)
        return []

    def _computed(self, compute: Callable[[], Any]) -> Any:
        """What a step gives; None if it failed, with everything that was in the cache."""
        try:
            return compute()
        except GrokctlError as error:
            self._lose_all(error)
            return None

    def _take(self, active: Active, draw: Draw | GrokctlError) -> None:
        """Add a token to a sequence, and end it if that was the last."""
        if isinstance(draw, GrokctlError):
            self._end(active, draw)
            self._computed(partial(self._runner.clear, active.slot.number))
            return
        tokens = active.sequence.take(draw.token, logprob=draw.logprob, top=draw.top)
        self._tell(active.ticket, *tokens)
        if active.sequence.is_over:
            self._end(active)

    # --- ends

    def _end_unread(self, ticket: Ticket, reason: FinishReason = FinishReason.LENGTH) -> None:
        """End a request that never had a slot."""
        generation = Generation(
            prompt_tokens=len(ticket.request.prompt),
            seed=ticket.request.sampling.seed,
            ids=(),
            text="",
            finish_reason=reason,
            stats=self._stats,
        )
        if reason is FinishReason.LENGTH:
            self._count(prompt_tokens=generation.prompt_tokens)
        self._tell(ticket, Ended(generation))

    def _lose_all(self, reason: FinishReason | GrokctlError) -> None:
        """End the requests in slots, whose keys and values are lost."""
        lost = [*self._reading, *self._decoding]
        self._reading.clear()
        self._decoding.clear()
        self._slots = Slots(self._runner.slots)
        for active in lost:
            self._conclude(active, reason)

    def _end_lost(self) -> None:
        """End the requests that an interrupt has caught between two lists."""
        for ticket in self._open.difference(self._waiting, self._inbox):
            self._end_unread(ticket, FinishReason.INTERRUPTED)

    def _end(self, active: Active, reason: FinishReason | GrokctlError | None = None) -> None:
        """Free the slot of a request, and conclude it.

        Args:
            active: The request.
            reason: If its sequence is not over by itself.
        """
        for each in (self._reading, self._decoding):
            if active in each:
                each.remove(active)
        is_kept = active.request.cache_prompt and not isinstance(reason, GrokctlError)
        if is_kept:
            self._slots.give_back(active.slot, active.kept, active.scores)
        else:
            self._slots.give_back(active.slot)
        self._conclude(active, reason)

    def _conclude(self, active: Active, reason: FinishReason | GrokctlError | None) -> None:
        """Deliver the last event of a request."""
        if isinstance(reason, GrokctlError):
            self._tell(active.ticket, Failed(reason))
            return
        if reason is not None:
            active.sequence.finish(reason)
        stats = replace(self._stats, compile_s=self._runner.compile_s - active.compiled)
        generation = active.result(stats)
        self._count(
            prompt_tokens=generation.prompt_tokens,
            cached_tokens=active.cached,
            tokens=len(generation.ids),
        )
        self._tell(active.ticket, Ended(generation))

    def _tell(self, ticket: Ticket, *events: RequestEvent) -> None:
        """Deliver events. Nobody is there for them any more if that fails."""
        try:
            for event in events:
                ticket.deliver(event)
                if isinstance(event, Ended | Failed):
                    self._open.discard(ticket)
        except Exception:  # noqa: BLE001  # of a stranger's code: other requests go on
            self.cancel(ticket)

    def _count(self, **more: float) -> None:
        self.totals = self.totals.plus(**more)
