"""Run by ``torchrun`` with two processes: ``fastdense train``, in which process 1 cannot read an image in step 3.

With ``KILLED=1`` in the environment it is killed there instead.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from fastdense.cli.main import main
from fastdense.data.images import UnreadableImage
from fastdense.data.source import Dataset

read = Dataset.train


def unreadable(self: Dataset, batches: Any, *, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
    for n, batch in enumerate(read(self, batches, epoch=epoch)):
        if n == 3 and os.environ["RANK"] == "1":
            if os.environ.get("KILLED") == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UnreadableImage("cat.png cannot be read")
        yield batch


if __name__ == "__main__":
    Dataset.train = unreadable  # type: ignore[method-assign]
    main()
