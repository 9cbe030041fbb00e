"""
Reading from disk while computing.
"""
from concurrent.futures import ThreadPoolExecutor


def read_ahead(read, items):
    """Yields read(item) for each item; a thread reads the next one meanwhile: two results are in memory."""
    with ThreadPoolExecutor(1) as thread:
        coming = None
        for item in items:
            ready = coming
            coming = thread.submit(read, item)
            if ready:
                yield ready.result()
            del ready  # let go before waiting for the next
        if coming:
            yield coming.result()
