"""
Reading from disk while computing.
"""
from concurrent.futures import ThreadPoolExecutor


def read_ahead(read, items):
    """Yields read(item) for each item of a list; a thread reads the next one meanwhile.

    At most two results are in memory: the one in use and the next.
    """
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(read, items[0]) if items else None
        for item in items[1:]:
            ready = coming.result()
            coming = thread.submit(read, item)
            yield ready
            del ready  # let go before waiting for the next
        if items:
            yield coming.result()
