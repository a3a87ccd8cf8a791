"""The least delay, to this request and to those that come after it. All terms are in seconds.

- `place`: if the engine runs as many requests as it can, some have to end first, which takes the
  length of an answer, divided by how many there are;
- `queue`: the prompts sent there before are computed first;
- `prefill`: then what of this prompt is not cached there;
- `others`: meanwhile nothing else is computed. Work that a cached prefix would have saved is work
  that the whole fleet waits for, which makes it worth to queue a little for a prefix; and a long
  prompt that is cached nowhere goes where it is in the way of few, because those who return to a
  prefix have no choice. The engine's requests stand for them: each is a conversation that may
  go on.

That the terms are times is what the other costs lack: blocks cached, blocks in use and requests
waiting need weights, and weights that are right when the engines are idle are wrong when they
are not. Only prefill counts. A request that decodes holds up a first token for a fraction of a
step, and has no part in the cost but as one who may return.
"""

from chapter3.snapshot import Snapshot, WorkerView

FLEET = 1.0  # how much the fleet's loss counts against one's own
IN_THE_WAY = 0.1  # the same, for each request at the engine


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    return [
        {
            "place": -place_s(worker),
            "queue": -worker.prefill_s,
            "prefill": -prefill_s(worker),
            "others": -prefill_s(worker) * (FLEET + IN_THE_WAY * (worker.running + worker.waiting)),
        }
        for worker in snapshot.workers
    ]


def prefill_s(worker: WorkerView) -> float:
    """How long the engine would compute what of the prompt it has not cached."""
    return worker.new_tokens / worker.prefill_tokens_per_s


def place_s(worker: WorkerView) -> float:
    """How long until enough of its requests have ended for one more to run."""
    ahead = worker.waiting
    if worker.max_running is not None:
        ahead = max(ahead, worker.running + worker.waiting + 1 - worker.max_running)
    return ahead * worker.answer_s / max(worker.running, 1)
