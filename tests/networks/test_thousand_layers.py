"""A thousand layers train in less than 2 GB of a process; the reference network saves more than that for backward."""

from pathlib import Path

import pytest
from helpers.processes import python

GIGABYTE = 10**9
IMAGES = 14  # of which a thousand layers of the reference save more than two gigabytes
STEPS = """
import sys, torch, fastdense, torch.nn.functional as F
from pathlib import Path

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))

depth, images, impl = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(1)
torch.manual_seed(0)
n = (depth - 4) // 6
model = fastdense.DenseNet(12, (n, n, n), 24, in_channels=1, num_classes=10, small_inputs=True, impl=impl,
                           recompute="activations")
x, labels = torch.rand(images, 1, 8, 8), torch.arange(images) % 10
optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=1e-4)
before, losses = resident(), []
for _ in range(2):
    optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(x), labels)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(before, resident(), losses[0], losses[-1])
"""


def trained(depth: int, images: int, impl: str = "torch") -> list[float]:
    """Peak resident bytes before the first of two steps and after the last, and their losses, of a process."""
    if not Path("/proc/self/status").exists():
        pytest.skip("the peak of a process is read from /proc")
    done = python("-c", STEPS, depth, images, impl)
    assert done.returncode == 0, done.stderr[-3000:]
    return [float(value) for value in done.stdout.split()]


def reference_bytes(depth: int, images: int, size: int = 8) -> int:
    """A bound from below of what the reference network saves in float32: what each convolution reads, and each norm.

    A layer that reads ``C`` channels saves them concatenated, normalised (ReLU works in place), its ``4k`` bottleneck
    channels and these normalised.
    """
    n, growth, channels, pixels, total = (depth - 4) // 6, 12, 24, images * size * size, 0
    for _ in range(3):
        total += sum(2 * (channels + l * growth) + 2 * 4 * growth for l in range(n)) * pixels
        channels, pixels = (channels + n * growth) // 2, pixels // 4
    return 4 * total


def test_a_deep_network_takes_less_than_the_reference_whose_bytes_are_known() -> None:
    before, resident, loss, _ = trained(100, 64, "reference")
    my_before, my_resident, my_loss, _ = trained(100, 64)
    assert resident - before > 0.9 * reference_bytes(100, 64)
    assert my_loss == pytest.approx(loss, rel=1e-4)
    assert my_resident - my_before < resident - before - 0.8e8


def test_a_thousand_layers_train_within_two_gigabytes() -> None:
    _, resident, first_loss, last_loss = trained(1000, IMAGES)
    assert resident < 2 * GIGABYTE, f"{resident:,}"
    assert reference_bytes(1000, IMAGES) > 2 * GIGABYTE
    assert last_loss < first_loss + 0.1
