"""Work on the items of an iterable in threads, ahead of the thread that takes the results."""

from __future__ import annotations

import contextvars
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")
Done = TypeVar("Done")
LONGEST_FAREWELL = 5.0
"""The longest wait in seconds for the items at which threads are, when they are to end."""


class _Failure(NamedTuple):
    """The exception that a thread met."""

    error: BaseException


class _Shared(Generic[Item, Done]):
    """What the threads share with the object that started them. It keeps no reference to that object."""

    def __init__(self, work: Callable[[int, Item], Done], items: Iterator[Item], ahead: int) -> None:
        self.work, self.items = work, items
        self.results: queue.SimpleQueue[Done | _Failure | None] = queue.SimpleQueue()
        self.room = threading.Semaphore(ahead)
        self.source = threading.Lock()
        self.started = threading.Semaphore(0)
        self.stopped, self.exhausted, self.reading = False, False, False
        self.begun = 0
        self.threads: list[threading.Thread] = []

    def run(self) -> None:
        """Work on items until there are none left, something fails, or somebody asks to stop."""
        use_one_thread()
        self.started.release()
        try:
            while self.room.acquire() and not self.stopped:
                with self.source:
                    if self.stopped or self.exhausted:
                        break
                    self.reading = True
                    try:
                        number, item = self.begun, next(self.items)
                        self.begun += 1
                    except StopIteration:
                        self.exhausted = True
                        break
                    finally:
                        self.reading = False
                done = self.work(number, item)
                # Nothing keeps the item while the thread waits for room.
                del item
                self.results.put(done)
                del done
        except BaseException as error:
            self.stopped = True
            self.results.put(_Failure(error))
        # The next thread that waits for room finds the end too.
        self.room.release()
        self.results.put(None)

    def stop(self) -> None:
        """Let all threads end after the item at which they are, and wait for those that do not read the source.

        The wait is short, because an item may hang, and a user who ends the program does not wait for it.
        """
        self.stopped = True
        self.room.release(len(self.threads) or 1)
        deadline = time.monotonic() + LONGEST_FAREWELL
        for thread in self.threads:
            # Nothing can end a thread that waits for the source's next item. It ends when the item comes.
            while thread.is_alive() and not self.reading and time.monotonic() < deadline:
                thread.join(0.01)


def use_one_thread() -> None:
    """Let PyTorch's operators compute in this thread alone, beside those of other threads that use all cores."""
    import torch

    # The first call in a thread sets the number to that of the process, so it has to come before.
    torch.get_num_threads()
    torch.set_num_threads(1)


class Ahead(Generic[Item, Done]):
    """Work on the items of an iterable in threads, and hand over each result as soon as it is finished.

    The items may be endless. At most `ahead` of them are worked on or wait to be taken, until make_room is called.
    The threads end when the object is closed or garbage, and see the context variables of where they were started.

    work: the function that is called with the number of an item, counted from 0, and the item.
    items: they are asked for one at a time, by any of the threads.
    threads: the number of threads; with 0, take() itself does the work.
    ahead: see above.
    """

    def __init__(self, work: Callable[[int, Item], Done], items: Iterable[Item], *, threads: int, ahead: int) -> None:
        self._shared = shared = _Shared[Item, Done](work, iter(items), ahead)
        self._running = threads
        self.taken = 0
        self._close = weakref.finalize(self, shared.stop)
        if not threads:
            return
        import torch

        usual = torch.get_num_threads()
        for number in range(threads):
            context = contextvars.copy_context()
            thread = threading.Thread(
                target=context.run, args=(shared.run,), name=f"rada_fast ahead {number}", daemon=True
            )
            shared.threads.append(thread)
            thread.start()
        for _ in shared.threads:
            shared.started.acquire()
        # The threads' own number would otherwise be that of all threads that start later.
        torch.set_num_threads(usual)

    @property
    def ended(self) -> bool:
        """Return whether all results have been taken."""
        return not self._running if self._shared.threads else self._shared.exhausted

    @property
    def at_work(self) -> bool:
        """Return whether a result will come without another item of the source."""
        return self._shared.begun > self.taken

    def take(self, timeout: float | None = None) -> Done | None:
        """Return a finished result, or None if there is none.

        timeout: the longest wait in seconds, or None to wait for a result or the end, however long it takes.

        Raises the exception of the iterable or of the work, after which nothing more comes.
        """
        shared = self._shared
        if not shared.threads:
            return self._next_here()
        while self._running:
            try:
                result = shared.results.get(timeout=timeout) if timeout != 0 else shared.results.get_nowait()
            except queue.Empty:
                return None
            if isinstance(result, _Failure):
                self.close()
                self._running = 0
                raise result.error
            if result is not None:
                self.taken += 1
                return result
            self._running -= 1
        return None

    def _next_here(self) -> Done | None:
        shared = self._shared
        if shared.exhausted or shared.stopped:
            return None
        try:
            item = next(shared.items)
        except StopIteration:
            shared.exhausted = True
            return None
        shared.begun += 1
        self.taken += 1
        return shared.work(shared.begun - 1, item)

    def make_room(self, count: int = 1) -> None:
        """Let the threads go on with further items, because results that were taken need no memory any more."""
        self._shared.room.release(count)

    def close(self) -> None:
        """Stop the threads. What they have not finished is lost."""
        self._close()
