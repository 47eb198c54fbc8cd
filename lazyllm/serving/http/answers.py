"""What the jobs of a request say, as one object or as a stream of events."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from lazyllm.serving.http.errors import Json
from lazyllm.serving.http.exchange import Exchange, Outlet, Work
from lazyllm.serving.http.jobs import RequestJobs
from lazyllm.serving.http.record import Record
from lazyllm.serving.http.replies import Reply, Shape, usage_of
from lazyllm.serving.http.schema import ReplyRequest
from lazyllm.serving.http.service import Service
from lazyllm.serving.jobs import Delta, Depths, Job, JobEnd, JobFailed, ReplyEnd

DONE = "[DONE]"


@dataclass(frozen=True)
class Prepared:
    """A request's prompts, tokenised.

    Attributes:
        jobs: one for each prompt.
        echoes: what each prompt's replies begin with.
        pieces: by token, the text of the prompt; None where it is not told.
    """

    jobs: Sequence[Job]
    echoes: Sequence[str]
    pieces: Sequence[str] | None = None


@dataclass(frozen=True)
class Asked:
    """A request that was understood.

    Attributes:
        body: what it says.
        shape: how its API tells of replies.
        prepare: tokenises its prompts, in a thread of its own.
    """

    body: ReplyRequest
    shape: Shape
    prepare: Callable[[], Prepared]


def answer(service: Service, asked: Asked) -> Exchange:
    """The answer to a request, in the making."""
    if asked.body.stream:
        return Exchange(service, _streamed(asked), lag_events=service.settings.lag_events)
    return Exchange(service, _whole(asked))


def _whole(asked: Asked) -> Work:
    async def work(jobs: RequestJobs, outlet: Outlet, record: Record) -> None:
        prepared = await _submitted(asked, jobs)
        n = asked.body.replies
        replies = [Reply(echo) for echo in prepared.echoes for _ in range(n)]
        async for number, event in _said(jobs, record, n):
            if not isinstance(event, Depths):
                replies[number * n + event.reply].add(event)
        await outlet.whole(asked.shape.whole(replies, usage_of(record.costs)))

    return work


def _streamed(asked: Asked) -> Work:
    """The first event opens the stream: what goes wrong before has a status of its own."""

    async def work(jobs: RequestJobs, outlet: Outlet, record: Record) -> None:
        prepared = await _submitted(asked, jobs)
        async for number, event in _said(jobs, record, asked.body.replies):
            if not outlet.started:
                for opening in _openings(asked, prepared):
                    await outlet.event(opening)
            if (chunk := _chunk(asked, number, event)) is not None:
                await outlet.event(chunk)
        if asked.body.wants_usage:
            await outlet.event(asked.shape.beside(usage=usage_of(record.costs)))
        await outlet.event(DONE)
        await outlet.end()

    return work


async def _submitted(asked: Asked, jobs: RequestJobs) -> Prepared:
    prepared = await run_in_threadpool(asked.prepare)
    for job in prepared.jobs:
        jobs.submit(job)
    return prepared


async def _said(
    jobs: RequestJobs, record: Record, replies: int
) -> AsyncIterator[tuple[int, Delta | Depths | ReplyEnd]]:
    """Number of a job and what it says, until all are complete; what they have cost is noted."""
    async for number, event in jobs:
        match event:
            case JobFailed():
                raise event.error
            case JobEnd():
                record.usages.append((event.usage, replies))
            case Delta() | Depths() | ReplyEnd():
                yield number, event


def _openings(asked: Asked, prepared: Prepared) -> Iterator[Json]:
    """What a stream begins with."""
    if prepared.pieces is not None:
        yield asked.shape.beside(lazyllm={"prompt": list(prepared.pieces)})
    n = asked.body.replies
    for choice in range(len(prepared.jobs) * n):
        if (opening := asked.shape.opening(choice, prepared.echoes[choice // n])) is not None:
            yield opening


def _chunk(asked: Asked, number: int, event: Delta | Depths | ReplyEnd) -> Json | None:
    """An event of a stream; None for one that says nothing."""
    choice = number * asked.body.replies + event.reply
    match event:
        case Delta():
            return asked.shape.delta(choice, event) if event.text or event.logprobs else None
        case ReplyEnd():
            return asked.shape.end(choice, event.reason)
        case Depths():
            depths = {
                "reply": event.reply,
                "layers": event.layers,
                "tokens": list(event.tokens),
                "depths": list(event.depths),
            }
            return asked.shape.beside(lazyllm={"depths": depths})
