"""Decisions, without a model."""

from typing import Any

from titans_server.engine.request import Generation, Ingestion
from titans_server.engine.scheduler import Portion, Scheduler

WINDOW = 16
CHUNK = 4


def make_scheduler(
    max_running: int = 8, ingest_budget: int = 4 * WINDOW, seconds: float = 0.1, largest_block: int = WINDOW
) -> Scheduler:
    return Scheduler(
        window=WINDOW,
        chunk=CHUNK,
        max_running=max_running,
        largest_block=largest_block,
        ingest_budget=ingest_budget,
        portion_seconds=seconds,
    )


def document(num_tokens: int, position: int = 0, *, urgent: bool = False) -> Ingestion:
    nothing: Any = None
    return Ingestion(nothing, [0] * num_tokens, position, urgent=urgent)


def answer(prompt: int = 4) -> Generation:
    nothing: Any = None
    return Generation(nothing, [0] * prompt, 100, nothing, True, lambda _: None)


def run_step(scheduler: Scheduler) -> list[Generation | Ingestion]:
    """Do what was decided, without computing, a second a part; returns what had a turn."""
    step = scheduler.next_step()
    for request, size in step.prefill:
        request.num_read += size
        if request.num_read == len(request.prompt):
            scheduler.prompt_read(request)
    for part, size in step.ingest:
        part.num_done += size
        if part.num_done == len(part.tokens):
            scheduler.finish(part)
    if step.decode:
        scheduler.spent("decode", len(step.decode), 1.0)
    for kind, parts in (("prefill", step.prefill), ("ingest", step.ingest)):
        if parts:
            scheduler.spent(kind, len(parts) * max(size for _, size in parts), 1.0)  # type: ignore[arg-type]
    return [*step.decode, *(r for r, _ in step.prefill), *(r for r, _ in step.ingest)]


def test_nothing_to_do_is_no_step() -> None:
    assert not make_scheduler().next_step()


def test_blocks_keep_to_the_boundaries_of_the_session() -> None:
    scheduler = make_scheduler()
    request = document(40, position=WINDOW + 5)
    scheduler.add(request)
    sizes = []
    while len(scheduler):
        before = request.num_done
        run_step(scheduler)
        sizes.append(request.num_done - before)
    assert sizes == [WINDOW - 5, WINDOW, 40 - WINDOW - (WINDOW - 5)]


def test_few_documents_are_read_several_windows_at_once_up_to_a_boundary_of_one() -> None:
    scheduler = make_scheduler(ingest_budget=8 * WINDOW, largest_block=4 * WINDOW)
    first, second = document(10 * WINDOW, position=WINDOW + 5), document(3 * WINDOW + 1)
    for request in (first, second):
        scheduler.add(request)
    assert scheduler.next_step().ingest == [(first, 4 * WINDOW - 5), (second, 3 * WINDOW + 1)]
    run_step(scheduler)
    assert scheduler.next_step().ingest == [(first, 4 * WINDOW)]


def test_a_stride_that_ends_on_a_window_is_one_step() -> None:
    for position in (0, 1, WINDOW, 2 * WINDOW + 3, 3 * WINDOW - 1):
        scheduler = make_scheduler(ingest_budget=16 * WINDOW, largest_block=4 * WINDOW)
        scheduler.add(document(4 * WINDOW - position % WINDOW, position))
        run_step(scheduler)
        assert not len(scheduler)


def test_many_documents_get_a_window_each_and_several_once_they_are_few() -> None:
    scheduler = make_scheduler(ingest_budget=8 * WINDOW, largest_block=4 * WINDOW)
    requests = [document(20 * WINDOW), document(20 * WINDOW), document(WINDOW)]
    for request in requests:
        scheduler.add(request)
    assert scheduler.next_step().ingest == [(request, WINDOW) for request in requests]
    run_step(scheduler)
    assert scheduler.next_step().ingest == [(request, 4 * WINDOW) for request in requests[:2]]


def test_beside_answers_a_lone_document_gets_a_window_at_most() -> None:
    scheduler = make_scheduler(ingest_budget=16 * WINDOW, largest_block=4 * WINDOW, seconds=1e6)
    scheduler.add(answer())
    run_step(scheduler)
    scheduler.add(document(100 * WINDOW))
    sizes = []
    for _ in range(40):
        sizes += [size for _, size in scheduler.next_step().ingest]
        run_step(scheduler)
    assert max(sizes) == WINDOW


def test_documents_share_the_budget_in_turn() -> None:
    scheduler = make_scheduler(ingest_budget=2 * WINDOW)
    requests = [document(10 * WINDOW) for _ in range(5)]
    for request in requests:
        scheduler.add(request)
    for _ in range(5):
        run_step(scheduler)
    assert [r.num_done for r in requests] == [2 * WINDOW] * 5


def test_padding_counts() -> None:
    scheduler = make_scheduler(ingest_budget=2 * WINDOW)
    requests = [document(n) for n in (3, 5, 4, WINDOW, 2)]
    for request in requests:
        scheduler.add(request)
    assert [r for r, _ in scheduler.next_step().ingest] == requests[:3], "four of sixteen tokens would be sixty-four"
    assert [r for r, _ in scheduler.next_step().ingest] == requests[3:]


def test_every_answer_gets_a_token_a_step_whatever_else_waits() -> None:
    scheduler = make_scheduler()
    running = [answer() for _ in range(3)]
    for request in running:
        scheduler.add(request)
    for _ in range(3):
        run_step(scheduler)
    for _ in range(4):
        scheduler.add(document(100 * WINDOW))
    scheduler.add(answer(prompt=50 * WINDOW))
    for _ in range(20):
        step = scheduler.next_step()
        assert step.decode == running
        assert len(step.prefill) + len(step.ingest) <= 1, "one thing beside them"
        assert sum(size for _, size in [*step.prefill, *step.ingest]) <= CHUNK
        run_step(scheduler)


def test_short_prompts_are_read_together_in_line_as_far_as_they_fit() -> None:
    scheduler = make_scheduler()
    prompts = [answer(n) for n in (5, 6, 6, 2, 40, 1, 3)]
    for request in prompts:
        scheduler.add(request)
    assert scheduler.next_step().prefill == [(prompts[0], 5), (prompts[1], 6)], "of 16 tokens; nobody is passed by"
    run_step(scheduler)
    assert scheduler.next_step().prefill == [(prompts[2], CHUNK)], "while others are answered"


def test_padding_of_prompts_counts() -> None:
    scheduler = make_scheduler()
    prompts = [answer(n) for n in (WINDOW - 6, 1, 1, 1, 1, 1)]
    for request in prompts:
        scheduler.add(request)
    assert scheduler.next_step().prefill == [(prompts[0], WINDOW - 6)], "five more would make 60 tokens of 15"
    scheduler.finish(prompts[0])
    assert scheduler.next_step().prefill == [(request, 1) for request in prompts[1:]]


def test_what_is_left_of_a_long_prompt_goes_with_those_behind_it() -> None:
    scheduler = make_scheduler()
    long, behind, last = answer(2 * WINDOW + 3), answer(5), answer(WINDOW)
    for request in (long, behind, last):
        scheduler.add(request)
    for _ in range(2):
        assert scheduler.next_step().prefill == [(long, WINDOW)]
        run_step(scheduler)
    assert scheduler.next_step().prefill == [(long, 3), (behind, 5)]


def test_as_many_prompts_are_read_together_as_answers_may_begin() -> None:
    scheduler = make_scheduler(max_running=3)
    requests = [answer(1) for _ in range(5)]
    for request in requests:
        scheduler.add(request)
    assert [request for request, _ in scheduler.next_step().prefill] == requests[:3]
    run_step(scheduler)
    assert not scheduler.next_step().prefill
    scheduler.finish(requests[1])
    assert [request for request, _ in scheduler.next_step().prefill] == requests[3:4]


def test_documents_have_half_of_the_time_and_no_more_while_answers_run() -> None:
    scheduler = make_scheduler()
    scheduler.add(answer())
    run_step(scheduler)
    scheduler.add(document(1_000 * WINDOW))
    answering = documents = 0.0
    for _ in range(400):
        step = scheduler.next_step()
        scheduler.spent("decode", 1, 1.0)
        answering += 1.0
        if step.ingest:
            scheduler.spent("ingest", CHUNK, 3.5)
            documents += 3.5
    assert 0.4 < documents / (documents + answering) <= 0.5


def test_what_documents_took_while_nobody_asked_is_not_owed_to_who_asks() -> None:
    scheduler, request = make_scheduler(), document(1_000 * WINDOW)
    scheduler.add(request)
    for _ in range(50):
        assert run_step(scheduler) == [request]
    scheduler.add(answer())
    turns = [run_step(scheduler) for _ in range(3)]
    assert any(request in turn for turn in turns), "it would wait for fifty seconds"


def test_a_portion_that_time_allows_ends_with_a_chunk() -> None:
    scheduler = make_scheduler(seconds=0.1)
    scheduler.add(answer())
    run_step(scheduler)
    scheduler.spent("ingest", CHUNK, 0.025)  # so two chunks and a half may come next
    scheduler.spent("decode", 1, 1.0)
    request = document(1_000 * WINDOW)
    scheduler.add(request)
    assert scheduler.next_step().ingest == [(request, 2 * CHUNK)]


def test_portions_are_as_large_as_their_time_allows() -> None:
    """From one chunk on a slow machine to a window on a fast one."""
    for seconds_a_token, expected in ((1.0, CHUNK), (0.012, 2 * CHUNK), (0.0001, WINDOW)):
        scheduler = make_scheduler()
        scheduler.add(answer())
        run_step(scheduler)
        scheduler.add(document(1_000 * WINDOW))
        sizes = []
        for _ in range(60):
            step = scheduler.next_step()
            scheduler.spent("decode", 1, 1.0)
            for part, size in step.ingest:
                part.num_done += size
                scheduler.spent("ingest", size, size * seconds_a_token)
                sizes.append(size)
        assert sizes[-1] == max(sizes) == expected


def test_a_few_tokens_of_a_prompt_tell_nothing_of_many() -> None:
    portion = Portion(64, 16, 256, 0.1)
    for _ in range(50):
        portion.took(4, 0.08)
    assert portion.size == 64


def test_what_an_answer_waits_for_goes_before_other_documents() -> None:
    scheduler = make_scheduler(ingest_budget=WINDOW)
    slow, other, urgent = document(9 * WINDOW), document(9 * WINDOW), document(2 * WINDOW, urgent=True)
    for request in (slow, other, urgent):
        scheduler.add(request)
    assert [run_step(scheduler) for _ in range(4)] == [[urgent], [urgent], [slow], [other]]


def test_nobody_starves() -> None:
    scheduler = make_scheduler(max_running=2)
    requests = [document(8 * WINDOW) for _ in range(6)] + [answer(3 * WINDOW) for _ in range(2)]
    for request in requests:
        scheduler.add(request)
    turns = [run_step(scheduler) for _ in range(500)]
    for request in requests:
        assert any(request in turn for turn in turns)
    assert all(r.num_done == len(r.tokens) for r in requests if isinstance(r, Ingestion))


def test_no_more_answers_run_than_allowed() -> None:
    scheduler = make_scheduler(max_running=2)
    requests = [answer() for _ in range(3)]
    for request in requests:
        scheduler.add(request)
    for _ in range(5):
        run_step(scheduler)
    assert scheduler.next_step().decode == requests[:2]
    scheduler.finish(requests[0])
    run_step(scheduler)
    assert scheduler.next_step().decode == requests[1:]


def test_what_is_cancelled_has_no_further_turn() -> None:
    scheduler = make_scheduler()
    gone, stays = answer(), answer()
    dropped = document(100)
    for request in (gone, stays, dropped):
        scheduler.add(request)
    run_step(scheduler)
    gone.cancelled = True
    dropped.done.cancel()
    assert set(scheduler.cancelled()) == {gone, dropped}
    for request in scheduler.cancelled():
        scheduler.finish(request)
    assert gone not in run_step(scheduler)
    assert len(scheduler) == 1
