"""How many steps are the epochs of a run?

How samples fit into rows depends on their lengths and their order, so they are packed once to be counted:
each rank its own streams, with its own workers. A stream has nothing but its position to be put back.
"""

from collections.abc import Callable

from trainer.data.stream import TokenStream


def steps_left(
    stream: TokenStream, *, micro_batch: int, is_told_to_end: Callable[[], bool] = lambda: False
) -> int:
    """Until this rank has read all, or is told to end. Afterwards the stream is where it was.

    Raises: BadDocument, DataError.
    """
    before, report, num_steps = stream.state_dict(), stream.report, 0
    stream.report = lambda bad: None  # the run itself will tell of it
    while stream.has_more() and not is_told_to_end():
        stream.next_step(micro_batch)
        num_steps += 1
    stream.load_state_dict(before, keep_counts=True)
    stream.report = report
    return num_steps
