"""
A user's mistake is a UserError: one line on stderr and exit status 2. A bug keeps its traceback.
"""
import contextlib
import errno
import os
import sys

import torch.distributed as dist

from configurator import UserError, one_line

__all__ = ["UserError", "one_line", "user_errors"]


@contextlib.contextmanager
def user_errors(script, every_process=False):
    """What fails inside is the user's input: one line on stderr and exit status 2 instead of a traceback; 1 where it is a disk, full or broken.

    every_process: for what can fail on one process alone; else the first of each machine speaks for all.
    """
    try:
        yield
    except (UserError, OSError) as error:
        disk = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
        if every_process or int(os.environ.get("LOCAL_RANK", 0)) == 0:
            print(f"{script}: {one_line(error)}" + "; once that is mended the same command goes on" * disk, file=sys.stderr, flush=True)
        if not every_process and dist.is_initialized():
            dist.destroy_process_group()  # its threads would abort a process that ends with them
        raise SystemExit(1 if disk else 2) from None
