"""The meter of tensor memory."""

import torch

from lora_one.memory import LivePeak


def test_the_meter_sees_the_peak_and_forgets_the_dead():
    with LivePeak() as meter:
        kept = torch.zeros(1000)
        torch.zeros(500)
        more = kept + 1
        view = more[:10]
        assert meter.live == 8000
        del more
        assert meter.live == 8000
        del view
    assert (meter.live, meter.peak) == (4000, 8000)
