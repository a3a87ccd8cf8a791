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

from chapter4.snapshot import Snapshot

FLEET = 1.0  # how much the fleet's loss counts against one's own
IN_THE_WAY = 0.1  # the same, for each request at the engine


def policy(snapshot: Snapshot) -> list[dict[str, float]]:
    return [
        {
            "place": -worker.place_s,
            "queue": -worker.prefill_s,
            "prefill": -worker.own_prefill_s,
            "others": -worker.own_prefill_s
            * (FLEET + IN_THE_WAY * (worker.running + worker.waiting)),
        }
        for worker in snapshot.workers
    ]
